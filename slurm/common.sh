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

# --output_dir among the flags given to sbatch overrides OUTPUT_DIR, a folder or an address.
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
    # A signal before the line above had nobody to go to. Sent twice at once it counts as one.
    [[ -z $drained ]] || kill -USR1 "$step" 2>/dev/null
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

# The rule itself is in gradproj/maintenance/requeue.py; it reads the store and this job's marks
# there, in a folder or in a bucket. Sets VERDICT, one line.
ask() {
    VERDICT=$("$PYTHON" -m gradproj slurm "$OUTPUT_DIR" "$@")
}

run_job() {
    local status=0
    trap on_usr1 USR1
    trap on_term TERM
    set_flags "$@"
    say "nodes $SLURM_JOB_NODELIST"
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
    # Not before the check: a wrong address may hold a secret.
    ((status != 0)) || say "output $OUTPUT_DIR"
    end_if_cancelled
    ask
    end_unless_told_to_go_on "$?"
    if [[ -z $drained$cancelled ]]; then
        run_ranks
        status=$?
    fi
    end_if_cancelled
    ask --ended "$status" ${drained:+--drained}
    status=$?
    if ((status == 2)) && [[ -n $drained ]]; then
        # Not the job's fault, and the next start's check finds out whether it lasts.
        VERDICT="the output cannot be read now, see above: queued again"
        status=3
    fi
    end_unless_told_to_go_on "$status"
    end_if_cancelled
    say "$VERDICT"
    queue_again
}

end_if_cancelled() {
    if [[ -n $cancelled ]]; then
        say "ended by scancel or by Slurm"
        exit 1
    fi
}

# end_unless_told_to_go_on CODE: what "ask" returned.
end_unless_told_to_go_on() {
    local code=$1
    ((code != 3)) || return 0
    say "${VERDICT:-the output cannot be read (code $code), see above; it is not queued again}"
    exit "$code"
}

queue_again() {
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
