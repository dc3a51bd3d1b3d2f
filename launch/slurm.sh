#!/bin/bash
# Two nodes of eight GPUs: sbatch launch/slurm.sh experiment=gpu data.path=/shared/voxels run_dir=/shared/runs/a
# Data and run_dir must lie where every node sees them. Sent SIGTERM two minutes before the end, the run saves its state;
# submit the same line again to go on.
#SBATCH --job-name=shapediff
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500
# One task a GPU, no ssh and no launcher: each task says who it is the way the launcher would.
exec srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec python launch/train.py "$@"' train "$@"
