# shellcheck shell=bash
# Common code of the jobs; each sources it on its first node and calls train_job, serve_job, cpu_job or, from pipeline.sh, stage_job.
#
# Stop and resume: Slurm sends USR1 to this shell before the time limit, and at preemption if the site is configured so (#SBATCH
# --signal=B:USR1@SECONDS). Training is told to save; the job then requeues itself under the same id, and resumes from
# what is on disk. After a node failure Slurm does that by itself (#SBATCH --requeue). A job that failed for a reason that the user need
# not fix is requeued as well, without the node at fault, at most RETRIES times.
set -uo pipefail
# shellcheck source=slurm/env.sh
source "${OPD_ENV:-slurm/env.sh}" || exit 2
# shellcheck source=slurm/functions.sh
source "${BASH_SOURCE[0]%/*}/functions.sh" || exit 2
for name in $(compgen -e OPD_SET_); do export "${name#OPD_SET_}=${!name}"; done # the recipe's goes before the site's

# A task of an array by its own name: the id of its last task is also the id of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}
records=${OPD_RUN_DIR:-logs}/slurm_jobs.jsonl
told=no  # yes: Slurm asked us to stop
saves=no # yes: a step wants to hear of it, and ends when it has saved
# How ranks ended that failed, a row each: megatron_opd/train/node.py writes it.
export OPD_ENDINGS=$PWD/logs/endings-$job
rm -f "$OPD_ENDINGS"
trap 'told=yes; say "USR1: the time limit or a preemption is near"' USR1

say() { echo "[$(date '+%F %T')] job $job on $SLURMD_NODENAME: $*"; }
fail() {
    say "error: $*" >&2
    ((BASH_SUBSHELL)) || record failed label "${OPD_LABEL:-}" reason "$*"
    exit 2
}

# record EVENT [KEY VALUE ...]: a row in the run folder (of jobs that pipeline.sh has not submitted in logs/), on disk when this returns.
record() {
    local event=$1 fields=''
    shift
    while (($#)); do
        fields+="${fields:+, }\"$1\": \"$(tr -cd '[:alnum:] _.,:;()[]/=+-' <<<"$2")\""
        shift 2
    done
    mkdir -p "$(dirname "$records")"
    row "$event" "$job" "$fields" >>"$records" || say "can't write to $records"
    sync "$records"
}

# use train|serve|engines: where the steps run, in a container image or a virtual environment. Sets the arrays `srun`, `inside`.
use() {
    local image=$IMAGE_TRAIN venv=$VENV_TRAIN container=()
    case $1 in
    serve) image=$IMAGE_SERVE venv=$VENV_SERVE ;;
    engines) image=${IMAGE_ENGINES:-$IMAGE_TRAIN} ;;
    esac
    # A step gets one CPU a task unless told otherwise, also where the job has the whole node.
    srun=(srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --kill-on-bad-exit=1)
    export -n OPD_BINDS
    if [[ -n $image ]]; then
        image_there "$image" || fail "no image $image; see docs/containers.md, or change slurm/env.sh"
        [[ $image != *.sqsh || $image == /* || $image == ./* ]] || image=./$image # else Pyxis would ask a registry for it
    else
        [[ -x $venv/bin/megatron-opd ]] || fail "no $venv/bin/megatron-opd; make the environment, or change slurm/env.sh"
        PATH=$(cd "$venv/bin" && pwd):$PATH
    fi
    if [[ $image == *.sif ]]; then
        local program=apptainer
        command -v apptainer >/dev/null || program=singularity
        command -v "$program" >/dev/null || fail "$image needs apptainer (or singularity), and there is none on $SLURMD_NODENAME; load its module: slurm.prologue, or slurm/env.sh"
        container=("$program" exec --pwd "$PWD")
        [[ -z ${SLURM_JOB_GPUS:-${SLURM_GPUS_ON_NODE:-}} ]] || container+=(--nv)
        container+=("$image")
        export OPD_BINDS=$PWD:$PWD${MOUNTS:+,$MOUNTS}
    elif [[ -n $image ]]; then
        # Pyxis wants its options on every step.
        srun+=(--container-image="$image" --container-mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}" --container-workdir="$PWD")
    fi
    srun+=(bash slurm/task.sh)
    inside=("${container[@]}")
}

# with_recipe RECIPE [ARGUMENT...]: sets the array `arguments`; a first argument that is no FIELD=VALUE is another recipe.
with_recipe() {
    arguments=("$@")
    [[ $# == 1 || $2 == -* ]] || is_setting "$2" || arguments=("${@:2}")
}

# is_setting WORD: FIELD=VALUE, and not a path with = in it; megatron_opd/commands/slurm.py has the same rule.
is_setting() { [[ $1 == *=* && ${1%%=*} != */* && ! -e $1 ]]; }

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
opd() { run step_of_one megatron-opd "$@"; }
step_of_one() { "${srun[@]:0:1}" --nodes=1 --ntasks=1 "${srun[@]:1}" "${inside[@]}" "$@"; }

check_restarts() {
    ((restarts < MAX_RESTARTS)) || fail "stopped after $restarts restarts (MAX_RESTARTS in slurm/env.sh); submit it again to go on"
}

# again [NODE [KEY VALUE ...]]: back into the queue under the same id, from now on without that node, with a record `retried` of those
# fields; does not return.
again() {
    check_restarts
    say "back into the queue, restart $((restarts + 1)) of at most $MAX_RESTARTS"
    trap '' TERM # the requeue ends this shell, and what comes next must be done
    scontrol requeue "$job" || fail "can't be put back into the queue; submit it again to go on"
    (($# < 2)) || record retried "${@:2}"
    [[ -z ${1:-} ]] || exclude "$1"
    sleep 300
    exit 1
}

# exclude NODE: of this job, which is waiting in the queue.
exclude() {
    local try nodes
    nodes=$(job_field ExcNodeList)
    nodes=${nodes:+$nodes,}$1
    for try in {1..20}; do
        scontrol update JobId="$job" ExcNodeList="$nodes" 2>/dev/null && say "excluded from now on: $nodes" && return
        sleep 0.5
    done
    say "could not exclude $1 after $try tries; it may be chosen again"
}

# job_field NAME: as Slurm has it for this job; nothing where it has none.
job_field() { scontrol -o show job "$job" | sed -n "s/.* $1=\([^ ]*\).*/\1/p" | grep -vx '(null)'; }

# asked_to_stop: by the signal, or by a preemption that told the steps alone.
asked_to_stop() { [[ $told == yes ]] || scontrol show job "$job" | grep -q ' PreemptTime=[0-9]'; }

# finish CODE: the end of the job.
finish() {
    [[ $1 != 0 ]] || { rm -f "$OPD_ENDINGS" && exit 0; }
    asked_to_stop && again
    retry "$1"
    fail "exit code $1; the reason is above; submit it again to go on"
}

# retry CODE: back into the queue if another node could help; returns if not.
retry() {
    local code=$1 kind node rank words count
    judge
    case $code in 2 | 3 | 130) return ;; esac # what the user must mend, and Ctrl-C
    count=$(grep -cF "{\"event\": \"retried\", \"job\": \"$job\"," "$records" 2>/dev/null)
    if ((${count:-0} >= RETRIES)); then
        say "failed (exit code $code) and was tried again ${count:-0} times already (RETRIES=$RETRIES)"
        return
    fi
    check_restarts
    say "failed on ${node:-a node that is not known}: ${rank:+rank $rank, }exit code $code${words:+, $words}; try $((${count:-0} + 1)) of $RETRIES again"
    if [[ -n $node ]] && ! spare_without "$node"; then
        say "$node is not excluded: without it there may be too few nodes"
        node=
    fi
    again "$node" label "${OPD_LABEL:-}" excluded "$node" code "$code" reason "$words" nodes "$SLURM_JOB_NODELIST"
}

# judge: sets code, node, rank, words to what ended the job. Of the ranks' rows the first counts: a refusal, then a rank that was killed,
# then one that failed by itself. If every rank only lost others (or was aborted by NCCL's watchdog, which aborts ranks that lost others),
# the node at fault is the one without a row, whose ranks could not record anything.
judge() {
    local silent
    kind='' node='' rank='' words=''
    ((SLURM_NNODES > 1)) || node=$SLURM_JOB_NODELIST
    [[ -s $OPD_ENDINGS ]] || return
    read -r kind _ node rank code words < <(sort -n -k1,1 -k2,2 "$OPD_ENDINGS")
    [[ $kind == [34] && $SLURM_NNODES != 1 ]] || return
    silent=$(comm -23 <(scontrol show hostnames "$SLURM_JOB_NODELIST" | sort) <(awk '{print $3}' "$OPD_ENDINGS" | sort -u))
    rank='' node=$silent
    [[ $silent != *[[:space:]]* ]] || node=''
}

# spare_without NODE: whether the partition has enough nodes that work (idle or at work: no reserved, drained or lost ones) without it and
# those that are excluded already. No where the job asks for particular nodes: how many of these there are is not known.
spare_without() {
    local excluded name
    for name in Features Reservation ReqNodeList; do
        [[ -z $(job_field "$name") ]] || return 1
    done
    excluded=$(job_field ExcNodeList)
    excluded=$({
        echo "$1"
        [[ -z $excluded ]] || scontrol show hostnames "$excluded"
    } | sort -u)
    # The last sign of a state: ~ # % + - for power and plans, * for a node that does not answer, $ for maintenance.
    (($(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %t' | awk '$2 ~ /^(idle|mix|alloc|comp|plnd)[~#%+-]?$/ {print $1}' |
        sort -u | comm -23 - <(echo "$excluded") | wc -l) >= SLURM_NNODES))
}

# prologue: the recipe's own lines of shell, once for the job; its steps inherit what they set.
prologue() {
    [[ -n ${OPD_PROLOGUE:-} ]] || return 0
    set +u # `module` is not written for it
    eval "$OPD_PROLOGUE" || fail "slurm.prologue ended with exit code $?"
    set -u
}

# train_job sft|train RECIPE [ARGUMENT...]: on all nodes of the job.
train_job() {
    local stage=$1 leader per_node=${RANKS_PER_NODE:-$SLURM_GPUS_ON_NODE}
    use train
    with_recipe "${@:2}"
    say "$stage ${arguments[*]} (restart $restarts)"
    if [[ $restarts == 0 && -z ${OPD_CHECKED:-} ]]; then
        opd check "${arguments[@]}" --stage "$stage" --ranks $((SLURM_NNODES * per_node)) || finish $?
    fi
    ! finished "$stage" || nothing_left
    # The first node of the list leads: localhost would be another machine on each node.
    leader=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    saves=yes
    # torchrun and its workers start deaf to USR1 and TERM; the trainer listens as soon as it can save.
    export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGINT PET_SIGNALS_TO_HANDLE=SIGINT # older and newer torchrun
    run "${srun[@]}" --deaf "${inside[@]}" megatron-opd slurm-ranks --per-node "$per_node" --leader "$leader" \
        --port $((15000 + SLURM_JOB_ID % 10000)) "$stage" "${arguments[@]}" || finish $?
    finished "$stage" && finish 0
    asked_to_stop && again
    fail "stopped before the last step, and not by Slurm; submit it again to go on"
}

# finished STAGE: prints how far the stage of $arguments is. Exit code 3, "no", is no error that srun need tell of.
finished() {
    set_settings
    step_of_one megatron-opd progress "${settings[@]}" --stage "${OPD_LABEL:-$1}" 2> >(grep -v '^srun: .*\(exit code 3$\|Terminating StepId\)' >&2)
}

# set_settings: sets the array `settings` to the recipe and overrides of $arguments, without flags and the number behind --round.
set_settings() {
    local word
    settings=()
    for word in "${arguments[@]}"; do
        [[ $word == --* || ($word != *=* && ${#settings[@]} != 0) ]] || settings+=("$word")
    done
}

nothing_left() {
    say "nothing is left to do"
    finish 0
}

# serve_job generate|rollout|score|eval RECIPE [ARGUMENT...]: on one node, or as one task of an array; parts that are done stay done.
serve_job() {
    local options=()
    use serve
    with_recipe "${@:2}"
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

# stage_job cpu|serve|train|one LABEL SUBCOMMAND [ARGUMENT...]: what pipeline.sh submits.
stage_job() {
    local kind=$1
    export OPD_LABEL=$2
    shift 2
    prologue
    record started label "$OPD_LABEL" nodes "$SLURM_JOB_NODELIST" restart "$restarts"
    case $kind in
    train | serve) "${kind}_job" "$@" ;;
    one)
        use engines
        say "$* (restart $restarts)"
        arguments=("${@:2}")
        ! finished "$OPD_LABEL" || nothing_left
        opd "$@"
        finish $?
        ;;
    cpu)
        # Found without GPUs: is there what the jobs with GPUs will start?
        if [[ $OPD_LABEL == inputs ]]; then
            arguments=("${@:2}")
            set_settings
            (use serve && step_of_one megatron-opd slurm-servers "${settings[@]}") || finish $?
        fi
        cpu_job "$@"
        ;;
    esac
}
