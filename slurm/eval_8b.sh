#!/usr/bin/env bash
# Accuracy of the distilled student, and its reverse KL to the teacher.
#   sbatch slurm/eval_8b.sh [RECIPE] [FIELD=VALUE ...]            for example eval.model=runs/opd_8b/sft-hf eval.name=sft
#SBATCH --job-name=eval_8b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
source "$SLURM_SUBMIT_DIR/slurm/lib.sh" || exit 2

serve_job eval opd_8b "$@"
