#!/usr/bin/env bash
# The job on several machines without a scheduler: call it with the same settings and flags on each
# of them.
#   NODES=4 HEAD=node1 bash launch/multi_node.sh --shards pile/tars --model DIR --output_dir out
# HEAD is one of the machines, by a name that all of them reach. Tars, model and --output_dir must
# be the same shared folders everywhere; tars and --output_dir may also be addresses in a bucket.
# (With Slurm: slurm/project_pile.sbatch. Machines that come and go need no common start at all:
# call launch/one_node.sh on each with one --output_dir, and they share the work.)
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
# Seconds that machines wait for each other at the start.
JOIN_S=${JOIN_S:-1800}
# common.sh has those that all starts share: SHUTDOWN_S, RESTARTS, PYTHON.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

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
