#!/usr/bin/env bash
# Submit the whole chain, each job to start when the one before has succeeded, and print the job ids:
#   slurm/pipeline.sh [--from STAGE] [RECIPE] [FIELD=VALUE ...]
#   slurm/pipeline.sh                                      opd_8b, from the teacher's answers to the evaluation
#   slurm/pipeline.sh --from score opd_8b train.lr=1e-6    after a failure, or to do a part again
# STAGE: generate, sft, rollout, score, train or eval. SHARDS=16: nodes of each array job. NODES=2: nodes of sft and train; else as many as
# the script of the recipe's name asks for (slurm/opd_32b_4nodes.sh: 4), for a recipe without one opd_8b.sh. Jobs without a GPU check what a
# stage needs, its layout and number of ranks too, before the job with GPUs starts; when a job fails, those that wait for it are cancelled.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=slurm/env.sh
source "${OPD_ENV:-slurm/env.sh}"

fail() {
    echo "pipeline: $*" >&2
    exit 2
}

from=generate
if [[ ${1:-} == --from ]]; then
    from=${2:-}
    shift 2
fi
recipe=opd_8b
if [[ $# != 0 && $1 != *=* ]]; then
    recipe=$1
    shift
fi
stages="generate sft rollout score train eval"
[[ " $stages " == *" $from "* ]] || fail "no stage '$from'; there are: $stages"
for image in "$IMAGE_TRAIN" "$IMAGE_SERVE"; do
    [[ $image != /* && $image != ./* || -e $image ]] || fail "no image $image; see docs/containers.md, or change slurm/env.sh"
done
train=slurm/$(basename "$recipe" .toml).sh # the script of that size, if there is one
[[ -e $train ]] || train=slurm/opd_8b.sh
asks() { sed -n "s/^#SBATCH --$1=\([0-9]*\)\$/\1/p" "$train"; }
nodes=${NODES:-$(asks nodes)}
ranks=$((nodes * ${RANKS_PER_NODE:-$(asks gpus-per-node)}))
cpu=(${CPU_PARTITION:+--partition="$CPU_PARTITION"} slurm/cpu.sh)
array=(${SHARDS:+--array=0-$((SHARDS - 1))})
export OPD_CHECKED=yes # the training jobs need not check again

submitted=()
trap '[[ $? == 0 ]] || { scancel "${submitted[@]}" 2>/dev/null; echo "pipeline: not submitted" >&2; }' EXIT

# submit NAME [SBATCH OPTION ...] SCRIPT [ARGUMENT ...]: after the job before.
submit() {
    local after=${submitted[*]: -1} id
    id=$(sbatch --parsable --job-name="$1" ${after:+--dependency="afterok:$after" --kill-on-invalid-dep=yes} "${@:2}")
    submitted+=("${id%%;*}") # without the cluster's name
    printf '%-10s %s%s\n' "$1" "${submitted[*]: -1}" "${after:+   after $after}"
}

case $from in # each stage goes on to the next
generate)
    submit inputs "${cpu[@]}" check "$recipe" "$@" --stage inputs --ranks "$ranks"
    submit generate "${array[@]}" slurm/generate_8b.sh "$recipe" "$@"
    ;;&
generate | sft)
    submit check-sft "${cpu[@]}" check "$recipe" "$@" --stage sft --ranks "$ranks"
    submit sft --nodes="$nodes" slurm/sft_8b.sh "$recipe" "$@"
    submit sft-hf "${cpu[@]}" convert trained "$recipe" "$@" --stage sft
    ;;&
generate | sft | rollout)
    submit rollout "${array[@]}" slurm/rollout_8b.sh "$recipe" "$@"
    ;;&
generate | sft | rollout | score)
    submit score "${array[@]}" slurm/score_8b.sh "$recipe" "$@"
    ;;&
generate | sft | rollout | score | train)
    submit check "${cpu[@]}" check "$recipe" "$@" --ranks "$ranks"
    submit train --nodes="$nodes" "$train" "$recipe" "$@"
    submit opd-hf "${cpu[@]}" convert trained "$recipe" "$@"
    ;;&
*)
    submit eval slurm/eval_8b.sh "$recipe" "$@"
    ;;
esac
echo "logs: $PWD/logs; to cancel all: scancel ${submitted[*]}"
