#!/usr/bin/env bash
# The job on one machine: checks the flags in one process, then starts a process for every GPU.
#   bash launch/one_node.sh --shards pile/tars --model EleutherAI/pythia-160m --output_dir out
# All arguments are the job's flags (--help lists them). Started again, it goes on where it stopped;
# Ctrl-C or kill -TERM ends it in order, with nothing lost.
set -euo pipefail

# ---- Settings; each can be given in the environment as well.
# Processes to start: auto = one per GPU, or one per CPU core where there is no GPU (each holds the
# model).
RANKS=${RANKS:-auto}
# Seconds that a process gets to save its work when the job receives a stop signal.
SHUTDOWN_S=${SHUTDOWN_S:-60}
# How often all processes are started again after one of them died.
RESTARTS=${RESTARTS:-3}
# The Python that gradproj is installed in: that of launch/setup.sh if it was called, else the one
# of the shell.
CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV_PYTHON=$CHECKOUT/.venv/bin/python
PYTHON=${PYTHON:-$([[ -x $VENV_PYTHON ]] && echo "$VENV_PYTHON" || echo python3)}

"$PYTHON" -c 'import gradproj' 2>/dev/null || {
    echo "gradproj: $PYTHON has no gradproj: bash launch/setup.sh installs it, or set PYTHON" >&2
    exit 2
}
# Every check that the job makes, in one process: an error ends here with one line.
"$PYTHON" -m gradproj plan "$@"
[[ " $* " != *" --help "* && " $* " != *" -h "* ]] || exit 0

# --standalone: a rendezvous of its own on a free port, so that two jobs on one machine do not meet.
# With exec, signals reach torchrun itself, which hands them to the processes and waits for them.
exec "$PYTHON" -m torch.distributed.run \
    --standalone \
    --nproc-per-node "$RANKS" \
    --max-restarts "$RESTARTS" \
    --shutdown-timeout "$SHUTDOWN_S" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m gradproj.run "$@"
