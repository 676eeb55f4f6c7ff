#!/bin/bash
# Searches on several machines at once: sbatch cluster/slurm/tune.sh CONFIG SPACE [KEY.SUB=VALUE ...]
# Each task of the array makes trials of one search, whose storage lies in the shared folder TUTTI_STORAGE (here).
#SBATCH --job-name=tutti-tune
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --signal=INT@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cores="${SLURM_CPUS_PER_TASK:-1}"  # srun takes them over from sbatch only before Slurm 22.05
usage="sbatch cluster/slurm/tune.sh CONFIG SPACE [KEY.SUB=VALUE ...]"
config=${1:?$usage}
space=${2:?$usage}
shift 2
storage="journal:${TUTTI_STORAGE:-$PWD}/search-$(basename "$space" .yaml).log"
exec srun --cpus-per-task="$cores" --cpu-bind=cores tutti tune "$config" "$@" --space "$space" --storage "$storage" \
    --jobs "$cores"
