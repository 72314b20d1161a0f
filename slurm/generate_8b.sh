#!/usr/bin/env bash
# The teacher's answers for SFT, by four nodes with SGLang servers of their own.
#   sbatch slurm/generate_8b.sh [RECIPE] [FIELD=VALUE ...]         again after a failure: what is done stays done
#SBATCH --job-name=generate_8b
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%A_%a.out
source "$SLURM_SUBMIT_DIR/slurm/lib.sh" || exit 2

serve_job generate opd_8b "$@"
