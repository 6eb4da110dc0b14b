# shellcheck shell=bash
# What the sbatch files of the job share: the checks before it, the ranks, and the rule by which a job is queued again.
# Sourced by them, from the checkout (sbatch runs a copy of the file itself, from elsewhere). They set CHECKOUT, PYTHON,
# SHARDS, MODEL, OUTPUT_DIR, RANKS_PER_NODE, RESTARTS, SHUTDOWN_S and RENDEZVOUS, and call: run_job "$@"

set -uo pipefail

# An element of an array has a name of its own, which gradproj/dist.py uses too. Its SLURM_JOB_ID will not do: that of
# one element is the whole array's, and to requeue it is to requeue all.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}

say() {
    echo "gradproj: $(date '+%F %T') job $JOB, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"
}

# --output_dir among the flags given to sbatch is what counts; everything below needs to know it.
set_flags() {
    local i
    JOB_FLAGS=(--shards "$SHARDS" --model "$MODEL" --output_dir "$OUTPUT_DIR" "$@")
    for ((i = 0; i < ${#JOB_FLAGS[@]}; i++)); do
        case ${JOB_FLAGS[i]} in
            --output_dir) OUTPUT_DIR=${JOB_FLAGS[i + 1]:-} ;;
            --output_dir=*) OUTPUT_DIR=${JOB_FLAGS[i]#*=} ;;
        esac
    done
}

# Units that this job has committed, in all its starts, by the logs of its ranks. Those of other jobs on the same store
# are no sign that this one gets on.
count_units() {
    cat "$OUTPUT_DIR"/logs/rank-*-slurm-"$JOB".log 2>/dev/null | grep -c ' unit [0-9]* committed: '
}

drained="" cancelled="" step=""
# srun hands USR1 to torchrun and the ranks of all nodes, which save and leave. Never TERM: srun kills at once then.
on_usr1() {
    drained=yes
    say "told to stop (USR1): saving"
    [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null
}
# TERM comes to this script from scancel, and from a preemption that Slurm itself queues again.
on_term() {
    cancelled=yes
    say "told to end (TERM)"
}

# In the background and waited for in a loop: bash runs a trap only between commands, and a trap ends a wait early.
# The wait comes first: a step that has ended already would give no code otherwise.
run_step() {
    local code
    "$@" &
    step=$!
    while :; do
        wait "$step"
        code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    step=""
    return "$code"
}

# With all of this script's environment, also where sbatch --export has chosen some of it.
run_ranks() {
    run_step srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        "$PYTHON" "$CHECKOUT/slurm/torchrun.py" "${RENDEZVOUS[@]}" \
        --nproc-per-node "$RANKS_PER_NODE" \
        --max-restarts "$RESTARTS" \
        --shutdown-timeout "$SHUTDOWN_S" \
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
        -m gradproj.run "${JOB_FLAGS[@]}"
}

is_complete() {
    "$PYTHON" -m gradproj status "$OUTPUT_DIR"
}

run_job() {
    local status=0 units_before
    trap on_usr1 USR1
    trap on_term TERM
    set_flags "$@"
    say "nodes $SLURM_JOB_NODELIST, output $OUTPUT_DIR"
    command -v "$PYTHON" >/dev/null || {
        say "there is no Python at $PYTHON: bash launch/setup.sh makes it, or set PYTHON; it is not queued again"
        exit 2
    }
    # Every check that the job makes, in one process: a user's mistake ends here, in one line, and is not queued again.
    run_step "$PYTHON" -m gradproj plan "${JOB_FLAGS[@]}"
    status=$?
    if ((status != 0)) && [[ -z $drained$cancelled ]]; then
        say "the job cannot run as it is (code $status); it is not queued again"
        exit "$status"
    fi
    mkdir -p "$OUTPUT_DIR/logs" || exit 2
    idle_mark=$OUTPUT_DIR/logs/slurm-$JOB.idle
    # The ranks make it when a mistake of the user's ends them; another job's mistake is no harm to this one.
    failed_mark=$OUTPUT_DIR/logs/slurm-$JOB.failed
    rm -f "$failed_mark"
    units_before=$(count_units)
    if [[ -z $drained$cancelled ]] && is_complete >/dev/null 2>&1; then
        say "complete already"
        rm -f "$idle_mark"
        exit 0
    fi
    if [[ -z $drained$cancelled ]]; then
        run_ranks
        status=$?
    fi
    end_if_cancelled
    end_job "$status" $(($(count_units) - units_before))
}

end_if_cancelled() {
    if [[ -n $cancelled ]]; then
        say "ended by scancel or by Slurm"
        exit 1
    fi
}

# end_job CODE UNITS: the code that the ranks ended with, and how many units they have committed in this start.
end_job() {
    local code=$1 units=$2
    if is_complete; then
        say "complete; $units units by this job in this start"
        rm -f "$idle_mark"
        exit 0
    fi
    if [[ -e $failed_mark ]]; then
        say "ended by a mistake that has to be mended, see above or $OUTPUT_DIR/failed.json; it is not queued again"
        exit 1
    fi
    # A preemption may tell the ranks only, not this script: TERM is 15, USR1 is 10.
    if ((code == 128 + 15 || code == 128 + 10)); then
        drained=yes
    fi
    if [[ -z $drained ]] && ((code == 0)); then
        say "nothing is left to start; other jobs are at work on the rest; $units units in this start"
        rm -f "$idle_mark"
        exit 0
    fi
    if [[ -z $drained ]] && ((units == 0)); then
        say "ended with code $code and without a new unit; it is not queued again, see $OUTPUT_DIR/logs"
        exit 1
    fi
    stop_if_idle "$units"
    queue_again "$units"
}

# Two starts in a row without a new unit would go on for ever.
stop_if_idle() {
    if (($1 > 0)); then
        rm -f "$idle_mark"
    elif [[ -e $idle_mark ]]; then
        rm -f "$idle_mark"
        say "two starts in a row ended without a new unit, so it is not queued again: give it more time (--time)," \
            "or smaller units (--rows_per_shard, in a new output)"
        exit 1
    else
        touch "$idle_mark"
    fi
}

queue_again() {
    end_if_cancelled
    say "not complete; $1 units in this start: queued again"
    # Not by exit code: a clean exit within a preemption's grace time counts as COMPLETED and would be the end.
    trap - TERM  # the requeue sends it, and it is no news then
    scontrol requeue "$JOB" || {
        say "could not be queued again; submit it once more to go on"
        exit 1
    }
    # The requeue ends this script; until it does, there is nothing to do.
    sleep 60
    exit 1
}
