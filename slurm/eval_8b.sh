#!/usr/bin/env bash
# Evaluations of a recipe, or those that are named, and their table.
#   sbatch slurm/eval_8b.sh [RECIPE [EVALUATION ...]] [FIELD=VALUE ...] [--of MODEL ...]      for example opd_8b aime24 --of sft opd
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
