#!/usr/bin/env bash
# Distil Qwen3-32B on a scored store, on four nodes (TP 4 x PP 2 x DP 4).
#   sbatch slurm/opd_32b_4nodes.sh [RECIPE] [FIELD=VALUE ...]
#SBATCH --job-name=opd_32b_4nodes
#SBATCH --nodes=4
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

train_job train opd_32b_4nodes "$@"
