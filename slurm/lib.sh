# shellcheck shell=bash
# Common code of the jobs; each sources it on its first node and calls train_job, serve_job or cpu_job.
#
# Stop and go on: Slurm sends USR1 to this shell before the time limit, and at preemption where the site says so (#SBATCH
# --signal=B:USR1@SECONDS). Training is told to save; the job then puts itself back into the queue under the same id, and goes on from
# what is on disk. After a node failure Slurm does that by itself (#SBATCH --requeue).
set -uo pipefail
# shellcheck source=slurm/env.sh
source "${OPD_ENV:-slurm/env.sh}" || exit 2

# A task of an array by its own name: the id of its last task is also the id of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}
told=no  # yes: Slurm asked us to stop
saves=no # yes: a step wants to hear of it, and ends when it has saved
trap 'told=yes; say "USR1: the time limit or a preemption is near"' USR1

say() { echo "[$(date '+%F %T')] job $job on $SLURMD_NODENAME: $*"; }
fail() {
    say "error: $*" >&2
    exit 2
}

# use train|serve: where the steps run, in a container image or a virtual environment. Sets the array `srun`.
use() {
    local image=$IMAGE_TRAIN venv=$VENV_TRAIN
    [[ $1 == train ]] || image=$IMAGE_SERVE venv=$VENV_SERVE
    # A step gets one CPU a task unless told otherwise, also where the job has the whole node.
    srun=(srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --kill-on-bad-exit=1)
    if [[ -n $image ]]; then
        [[ $image != /* && $image != ./* || -e $image ]] || fail "no image $image; see docs/containers.md, or change slurm/env.sh"
        # Pyxis wants its options on every step.
        srun+=(--container-image="$image" --container-mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}" --container-workdir="$PWD")
    else
        [[ -x $venv/bin/megatron-opd ]] || fail "no $venv/bin/megatron-opd; make the environment, or change slurm/env.sh"
        PATH=$(cd "$venv/bin" && pwd):$PATH
    fi
}

# with_recipe RECIPE [ARGUMENT...]: sets the array `arguments`; a first argument that is no FIELD=VALUE is another recipe.
with_recipe() {
    arguments=("$@")
    [[ $# == 1 || $2 == *=* || $2 == -* ]] || arguments=("${@:2}")
}

# run COMMAND...: as a child, so that a signal interrupts the waiting and not the work. Returns the command's exit code.
run() {
    "$@" &
    local pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        wait "$pid"
        while [[ $told == yes ]] && kill -0 "$pid" 2>/dev/null; do
            [[ $saves == yes ]] || again
            scancel --signal=USR1 "$job" 2>/dev/null # again and again: one that comes before the trainer listens is lost
            sleep 2
        done
    done
    wait "$pid"
}

# opd SUBCOMMAND [ARGUMENT...]: one process on this node.
opd() { run "${srun[@]}" --nodes=1 --ntasks=1 megatron-opd "$@"; }

# Back into the queue under the same id; does not return.
again() {
    ((restarts < MAX_RESTARTS)) || fail "stopped after $restarts restarts (MAX_RESTARTS in slurm/env.sh); submit it again to go on"
    say "back into the queue, restart $((restarts + 1)) of at most $MAX_RESTARTS"
    scontrol requeue "$job" || fail "can't be put back into the queue; submit it again to go on"
    sleep 300 # the requeue ends this shell
    exit 1
}

# asked_to_stop: by the signal, or by a preemption that told the steps alone.
asked_to_stop() { [[ $told == yes ]] || scontrol show job "$job" | grep -q ' PreemptTime=[0-9]'; }

# finish CODE: the end of the job.
finish() {
    [[ $1 != 0 ]] || exit 0
    asked_to_stop && again
    fail "exit code $1; the reason is above; submit it again to go on"
}

# train_job sft|train RECIPE [ARGUMENT...]: on all nodes of the job.
train_job() {
    local stage=$1 leader word settings=() per_node=${RANKS_PER_NODE:-$SLURM_GPUS_ON_NODE}
    use train
    with_recipe "${@:2}"
    for word in "${arguments[@]}"; do [[ $word == --* ]] || settings+=("$word"); done # without flags that are for training alone
    say "$stage ${arguments[*]} (restart $restarts)"
    if [[ $restarts == 0 && -z ${OPD_CHECKED:-} ]]; then
        opd check "${arguments[@]}" --stage "$stage" --ranks $((SLURM_NNODES * per_node)) || finish $?
    fi
    # The first node of the list leads: localhost would be another machine on each node.
    leader=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    saves=yes
    # torchrun and its workers start deaf to USR1 and TERM; the trainer listens as soon as it can save.
    export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGINT PET_SIGNALS_TO_HANDLE=SIGINT # older and newer torchrun
    # shellcheck disable=SC2016  # SLURM_NODEID is a node's own
    run "${srun[@]}" bash -c 'trap "" USR1 TERM; exec torchrun --node-rank="$SLURM_NODEID" "$@"' ranks \
        --nnodes="$SLURM_NNODES" --nproc-per-node="$per_node" --max-restarts=0 \
        --master-addr="$leader" --master-port=$((15000 + SLURM_JOB_ID % 10000)) -m megatron_opd "$stage" "${arguments[@]}" || finish $?
    "${srun[@]}" --nodes=1 --ntasks=1 megatron-opd progress "${settings[@]}" --stage "$stage" && finish 0
    asked_to_stop && again
    fail "stopped before the last step, and not by Slurm; submit it again to go on"
}

# serve_job generate|rollout|score|eval RECIPE [ARGUMENT...]: on one node, or as one task of an array; parts that are done stay done.
# $servers: the SGLang servers of a node, "tp=N dp=M".
serve_job() {
    local word options=()
    use serve
    with_recipe "${@:2}"
    if [[ $LAUNCH == yes ]]; then
        for word in ${servers:?}; do options+=("engine.launch.$word"); done
    fi
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        # shellcheck disable=SC2153
        if [[ -z ${SHARDS:-} && ($SLURM_ARRAY_TASK_MIN != 0 || $SLURM_ARRAY_TASK_COUNT != $((SLURM_ARRAY_TASK_MAX + 1))) ]]; then
            fail "this array is not 0 to N-1: submit the whole of it again (what is done stays done), or SHARDS=N sbatch --array=..."
        fi
        options+=(--shard "$SLURM_ARRAY_TASK_ID/${SHARDS:-$((SLURM_ARRAY_TASK_MAX + 1))}")
    fi
    say "$1 ${arguments[*]} ${options[*]} (restart $restarts)"
    opd "$1" "${arguments[0]}" "${options[@]}" "${arguments[@]:1}"
    finish $?
}

# cpu_job SUBCOMMAND [ARGUMENT...]: anything that needs no GPU.
cpu_job() {
    use train
    say "$* (restart $restarts)"
    opd "$@"
    finish $?
}
