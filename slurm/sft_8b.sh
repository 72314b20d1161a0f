#!/usr/bin/env bash
# Fine-tune Qwen3-8B-Base on the teacher's answers.
#   sbatch [--nodes=N] slurm/sft_8b.sh [RECIPE] [FIELD=VALUE ...]
#SBATCH --job-name=sft_8b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
source "$SLURM_SUBMIT_DIR/slurm/lib.sh" || exit 2

train_job sft opd_8b "$@"
