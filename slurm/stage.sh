#!/usr/bin/env bash
# One stage of a recipe, as slurm/pipeline.sh submits it: what it asks Slurm for stands in the recipe's [slurm] section.
#   stage.sh cpu|serve|train|one LABEL SUBCOMMAND [ARGUMENT ...]
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
source "$SLURM_SUBMIT_DIR/slurm/lib.sh" || exit 2

stage_job "$@"
