#!/bin/bash
# Two nodes of eight GPUs: sbatch launch/slurm.sh experiment=gpu data.path=/shared/voxels run_dir=/shared/runs/a
# Data and run_dir must lie where every node sees them. Sent SIGTERM two minutes before the time is up, the run saves its state
# and ends with status 75, and the job goes back into the queue, until the training is done.
#SBATCH --job-name=shapediff
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# One task a GPU, no ssh and no launcher: each task says who it is the way the launcher would. A lost rank ends the others by
# itself; killing them on a bad exit would turn the 75 of the last ones into 137. Rank 0 writes the export when the rest is done.
status=0
srun --kill-on-bad-exit=0 --wait=1800 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec python launch/train.py "$@"' train "$@" || status=$?
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
