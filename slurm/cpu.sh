#!/usr/bin/env bash
# Any subcommand that needs no GPU.
#   sbatch slurm/cpu.sh check opd_8b          sbatch slurm/cpu.sh convert trained opd_8b
#SBATCH --job-name=cpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
source "$SLURM_SUBMIT_DIR/slurm/lib.sh" || exit 2

cpu_job "$@"
