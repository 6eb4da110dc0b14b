#!/usr/bin/env bash
# The job on several machines without a scheduler: call it with the same settings and flags on each
# of them.
#   NODES=4 HEAD=node1 bash launch/multi_node.sh --shards pile/tars --model DIR --output_dir out
# HEAD is one of the machines, by a name that all of them reach. Tars, model and --output_dir must
# be the same shared folders everywhere. (With Slurm: slurm/project_pile.sbatch. Machines that come
# and go need no common start at all: call launch/one_node.sh on each with one --output_dir, and
# they share the work.)
set -euo pipefail

# ---- Settings; each can be given in the environment as well.
NODES=${NODES:-}
HEAD=${HEAD:-}
PORT=${PORT:-29500}
# What this start is called; the same on all machines, another for each job that uses the same HEAD
# and PORT.
JOB=${JOB:-gradproj}
# Processes on each machine: auto = one per GPU, or one per CPU core where there is no GPU.
RANKS=${RANKS:-auto}
# Seconds that a process gets to save its work when the job receives a stop signal.
SHUTDOWN_S=${SHUTDOWN_S:-60}
# How often all processes are started again after one of them died.
RESTARTS=${RESTARTS:-3}
# Seconds that machines wait for each other at the start.
JOIN_S=${JOIN_S:-1800}
# The Python that gradproj is installed in: that of launch/setup.sh if it was called, else the one
# of the shell.
CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV_PYTHON=$CHECKOUT/.venv/bin/python
PYTHON=${PYTHON:-$([[ -x $VENV_PYTHON ]] && echo "$VENV_PYTHON" || echo python3)}

"$PYTHON" -c 'import gradproj' 2>/dev/null || {
    echo "gradproj: $PYTHON has no gradproj: bash launch/setup.sh installs it, or set PYTHON" >&2
    exit 2
}
# Every check that the job makes, in one process. It runs on every machine, so that each one's own
# view of the folders is checked, and an error ends all of them with the same line.
"$PYTHON" -m gradproj plan "$@"
[[ " $* " != *" --help "* && " $* " != *" -h "* ]] || exit 0
[[ $NODES =~ ^[1-9][0-9]*$ && -n $HEAD ]] || {
    echo "gradproj: set NODES (how many machines) and HEAD (the name of one of them):" \
        "NODES=4 HEAD=node1 bash $0 ..." >&2
    exit 2
}

exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NODES" \
    --nproc-per-node "$RANKS" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD:$PORT" \
    --rdzv-id "$JOB" \
    --rdzv-conf "join_timeout=$JOIN_S,read_timeout=$JOIN_S" \
    --max-restarts "$RESTARTS" \
    --shutdown-timeout "$SHUTDOWN_S" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m gradproj.run "$@"
