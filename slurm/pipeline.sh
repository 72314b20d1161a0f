#!/usr/bin/env bash
# Submit the jobs of a recipe, each to start when the jobs before it have succeeded, and print their ids:
#   slurm/pipeline.sh [--from STAGE] [--until STAGE] [--dry-run] [RECIPE] [FIELD=VALUE ...]
#   slurm/pipeline.sh opd_8b                               all of it
#   slurm/pipeline.sh --from score opd_8b train.lr=1e-6    after a failure, or to do a part again
#   slurm/pipeline.sh --dry-run mine.toml slurm.nodes=2    what would be submitted
# NODES=2 before the command means slurm.nodes=2; SHARDS=16 means 16 nodes each for generate, rollout and score.
# The recipe's [slurm] section has what the jobs request, slurm/env.sh the settings of the site. `megatron-opd slurm` makes the list.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=slurm/env.sh
source "${OPD_ENV:-slurm/env.sh}"
# shellcheck source=slurm/functions.sh
source slurm/functions.sh

fail() {
    echo "pipeline: $*" >&2
    exit 2
}

# The Python that makes the list: of the virtual environment, of PATH, or of the training image.
opd=()
if [[ -x ${VENV_TRAIN:-}/bin/megatron-opd ]]; then
    opd=("$VENV_TRAIN/bin/megatron-opd")
elif command -v megatron-opd >/dev/null; then
    opd=(megatron-opd)
elif [[ ${IMAGE_TRAIN:-} == *.sif && -e $IMAGE_TRAIN ]] && program=$(command -v apptainer || command -v singularity); then
    opd=("$program" exec --pwd "$PWD" --bind "$PWD:$PWD${MOUNTS:+,$MOUNTS}" "$IMAGE_TRAIN" megatron-opd)
elif [[ ${IMAGE_TRAIN:-} == *.sqsh && -e $IMAGE_TRAIN ]] && program=$(command -v enroot); then
    # shellcheck disable=SC2016  # for the shell in the container
    opd=("$program" start --mount "$PWD:$PWD" "$IMAGE_TRAIN" bash -c 'cd "$0" && exec megatron-opd "$@"' "$PWD")
else
    fail "no megatron-opd to make the list of jobs: neither ${VENV_TRAIN:-VENV_TRAIN}/bin/megatron-opd, nor on PATH, nor a training image" \
        "(IMAGE_TRAIN=${IMAGE_TRAIN:-}) with apptainer or enroot on this machine; make one (docs/cluster.md), or change slurm/env.sh"
fi

settings=() # as slurm/env.sh has them
for name in SBATCH_ACCOUNT SBATCH_PARTITION SBATCH_QOS CPU_PARTITION GPUS RANKS_PER_NODE IMAGE_TRAIN IMAGE_SERVE IMAGE_ENGINES \
    VENV_TRAIN VENV_SERVE MOUNTS CACHE_DIR RETRIES MAX_RESTARTS; do
    [[ -z ${!name:-} ]] || settings+=(--site "$name=${!name}")
done
# Shorter words for overrides.
set -- "$@" ${NODES:+slurm.nodes="$NODES"} ${SHARDS:+slurm.shards.generate="$SHARDS" slurm.shards.rollout="$SHARDS" slurm.shards.score="$SHARDS"}
for word in "$@"; do
    [[ $word != --dry-run && $word != --help && $word != -h ]] || exec "${opd[@]}" slurm "${settings[@]}" "$@"
done
plan=$("${opd[@]}" slurm --plan "${settings[@]}" "$@") || fail "nothing was submitted"
[[ $plan == *"# jobs"* ]] || fail "megatron-opd slurm --plan printed no list of jobs"
plan=${plan#*"# jobs"} # an image may print a greeting

submitted=()
declare -A ids
records=
undo() {
    set +e # all that can be taken back
    local id left=()
    for id in "${submitted[@]}"; do
        if scancel "$id"; then row cancelled "$id" >>"$records"; else left+=("$id"); fi
    done
    echo "pipeline: not submitted" >&2
    [[ ${#left[@]} == 0 ]] || echo "pipeline: could not cancel ${left[*]}, which still stand in the queue: scancel them yourself" >&2
}
trap '[[ $? == 0 || ${#submitted[@]} == 0 ]] || undo' EXIT

# The plan is made of these four.
record_in() {
    mkdir -p "$1" logs
    records=$1/slurm_jobs.jsonl
}
variable() { export "$1=$2"; } # sbatch hands its environment to the job
image() { image_there "$1" || fail "no image $1; see docs/containers.md, or change slurm/env.sh"; }
# submit LABEL "LABEL ..." RECORD WORD ...: sbatch WORDS, to start after the jobs of those labels.
submit() {
    local label id after='' quoted=''
    for label in $2; do
        after+=:${ids[$label]}
        quoted+=${quoted:+, }\"${ids[$label]}\"
    done
    id=$(sbatch --parsable --export=ALL ${after:+--dependency="afterok$after" --kill-on-invalid-dep=yes} "${@:4}") || fail "sbatch refused $1"
    id=${id%%;*} # without the cluster's name
    submitted+=("$id")
    ids[$1]=$id
    row submitted "$id" "\"after\": [$quoted], $3" >>"$records"
    sync "$records"
    printf '%-12s %s%s\n' "$1" "$id" "${after:+   after ${after#:}}"
}

eval "$plan"
echo "logs: $PWD/logs; records: $records; to cancel all: scancel ${submitted[*]}"
