#!/bin/bash
# Runs a study on one machine, a cell on each core: sbatch cluster/slurm/compare.sh STUDY [KEY.SUB=VALUE ...]
# Submit it again after a time limit: finished cells are kept, interrupted ones go on from their checkpoints.
#SBATCH --job-name=tutti-compare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=INT@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cores="${SLURM_CPUS_PER_TASK:-1}"  # srun takes them over from sbatch only before Slurm 22.05
: "${1:?name a study: sbatch cluster/slurm/compare.sh STUDY [KEY.SUB=VALUE ...]}"
exec srun --cpus-per-task="$cores" --cpu-bind=cores tutti compare "$@" "jobs=$cores"
