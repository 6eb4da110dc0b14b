# shellcheck shell=bash
# Shared by the sbatch files of the job: the checks before it, the ranks, and the rule by which a
# job is requeued. Sourced from the checkout (sbatch runs a copy of the sbatch file from elsewhere).
# The files set CHECKOUT, PYTHON, SHARDS, MODEL, OUTPUT_DIR, RANKS_PER_NODE, RESTARTS, SHUTDOWN_S
# and RENDEZVOUS, and call: run_job "$@"

set -uo pipefail

# Name of this job or array element, as in gradproj/distributed/process.py. SLURM_JOB_ID will not
# do: that of one element is the whole array's, and requeueing it would requeue all elements.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}

say() {
    echo "gradproj: $(date '+%F %T') job $JOB, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"
}

# --output_dir among the flags given to sbatch overrides OUTPUT_DIR, which everything below uses.
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

# Units that this job has committed in all its starts, from the logs of its ranks. Units of other
# jobs on the same store are no progress of this one.
count_units() {
    cat "$OUTPUT_DIR"/logs/rank-*-slurm-"$JOB".log 2>/dev/null | grep -c ' unit [0-9]* committed: '
}

drained="" cancelled="" step=""
# srun forwards USR1 to torchrun and the ranks of all nodes, which save and exit. Never send TERM:
# on TERM srun kills them at once.
on_usr1() {
    drained=yes
    say "told to stop (USR1): saving"
    [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null
}
# This script gets TERM from scancel, and from a preemption after which Slurm itself requeues the
# job.
on_term() {
    cancelled=yes
    say "told to end (TERM)"
}

# Runs in the background, waited for in a loop: bash runs a trap only between commands, and a trap
# ends a wait early. The wait comes first, since it gives the code of a step that has ended already.
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

# With this script's whole environment, even if sbatch --export selected a part of it.
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
    # The rule by which a job is queued again reads logs and marks in the output's folder.
    if [[ $OUTPUT_DIR =~ ^[a-z0-9]+:/ ]]; then
        say "an output in a bucket is for gradproj.run outside of Slurm; give --output_dir a" \
            "shared folder, and copy it afterwards (gradproj copy); it is not queued again"
        exit 2
    fi
    command -v "$PYTHON" >/dev/null || {
        say "there is no Python at $PYTHON: bash launch/setup.sh makes it, or set PYTHON;" \
            "it is not queued again"
        exit 2
    }
    # All checks of the job in one process: a user's error ends here with one line, and no requeue.
    run_step "$PYTHON" -m gradproj plan "${JOB_FLAGS[@]}"
    status=$?
    if ((status != 0)) && [[ -z $drained$cancelled ]]; then
        say "the job cannot run as it is (code $status); it is not queued again"
        exit "$status"
    fi
    mkdir -p "$OUTPUT_DIR/logs" || exit 2
    idle_mark=$OUTPUT_DIR/logs/slurm-$JOB.idle
    # The ranks write it when a user's error ends them; another job's error does not end this one.
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

# end_job CODE UNITS: exit code of the ranks, and the number of units they committed in this start.
end_job() {
    local code=$1 units=$2
    if is_complete; then
        say "complete; $units units by this job in this start"
        rm -f "$idle_mark"
        exit 0
    fi
    if [[ -e $failed_mark ]]; then
        say "ended by an error that you can fix, see above or $OUTPUT_DIR/failed.json;" \
            "it is not queued again"
        exit 1
    fi
    # A preemption may signal the ranks only and not this script: TERM is 15, USR1 is 10.
    if ((code == 128 + 15 || code == 128 + 10)); then
        drained=yes
    fi
    if [[ -z $drained ]] && ((code == 0)); then
        say "nothing is left to start; other jobs are at work on the rest;" \
            "$units units in this start"
        rm -f "$idle_mark"
        exit 0
    fi
    if [[ -z $drained ]] && ((units == 0)); then
        say "ended with code $code and without a new unit; it is not queued again," \
            "see $OUTPUT_DIR/logs"
        exit 1
    fi
    stop_if_idle "$units"
    queue_again "$units"
}

# Otherwise starts without a new unit would follow each other for ever.
stop_if_idle() {
    if (($1 > 0)); then
        rm -f "$idle_mark"
    elif [[ -e $idle_mark ]]; then
        rm -f "$idle_mark"
        say "two starts in a row ended without a new unit, so it is not queued again:" \
            "give it more time (--time)," \
            "or smaller units (--rows_per_shard, in a new output)"
        exit 1
    else
        touch "$idle_mark"
    fi
}

queue_again() {
    end_if_cancelled
    say "not complete; $1 units in this start: queued again"
    # Not by exit code: Slurm takes a clean exit within a preemption's grace time for COMPLETED.
    trap - TERM  # the requeue sends it
    scontrol requeue "$JOB" || {
        say "could not be queued again; submit it once more to resume"
        exit 1
    }
    # The requeue ends this script.
    sleep 60
    exit 1
}
