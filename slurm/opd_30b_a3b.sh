#!/usr/bin/env bash
# Distil Qwen3-30B-A3B (mixture of experts) on a scored store.
#   sbatch [--nodes=N] slurm/opd_30b_a3b.sh [RECIPE] [FIELD=VALUE ...]
#SBATCH --job-name=opd_30b_a3b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
source "$SLURM_SUBMIT_DIR/slurm/lib.sh" || exit 2

train_job train opd_30b_a3b "$@"
