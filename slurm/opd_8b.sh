#!/usr/bin/env bash
# Distil Qwen3-8B on a scored store, with checkpoints every 25 steps.
#   sbatch [--nodes=N] slurm/opd_8b.sh [RECIPE] [FIELD=VALUE ...]         for example train.lr=1e-6
#SBATCH --job-name=opd_8b
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

train_job train opd_8b "$@"
