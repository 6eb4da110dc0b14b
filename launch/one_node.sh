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
# common.sh has those that all starts share: SHUTDOWN_S, RESTARTS, PYTHON.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# --standalone: a rendezvous of its own on a free port, so that two jobs on one machine do not meet.
# With exec, signals reach torchrun itself, which hands them to the processes and waits for them.
exec "$PYTHON" -m torch.distributed.run \
    --standalone \
    --nproc-per-node "$RANKS" \
    --max-restarts "$RESTARTS" \
    --shutdown-timeout "$SHUTDOWN_S" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m gradproj.run "$@"
