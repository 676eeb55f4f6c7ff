#!/bin/bash
# Trains on several machines with torchrun: sbatch cluster/slurm/train.sh CONFIG [KEY.SUB=VALUE ...]
# Submit it again after a time limit or a preemption: it goes on; a finished training is kept and ends at once.
#SBATCH --job-name=tutti-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cores="${SLURM_CPUS_PER_TASK:-1}"  # srun takes them over from sbatch only before Slurm 22.05
: "${1:?name a config: sbatch cluster/slurm/train.sh CONFIG [KEY.SUB=VALUE ...]}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
exec srun --cpus-per-task="$cores" torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "${hosts%%$'\n'*}:${TUTTI_PORT:-29500}" \
    -m -- tutti train "$@"
