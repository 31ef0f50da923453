#!/usr/bin/env bash
#SBATCH --job-name=zppo-pod
#SBATCH --output=zppo-pod-%j.out
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --requeue

# One task per GPU. Submit from the checkout, in an environment with '.[gpu]' installed.
srun --cpus-per-task=8 --kill-on-bad-exit=0 --wait=600 \
  python -m experiments.train --config=ml_collections_configs/zppo.py:pod --workdir=/mnt/runs/zppo '--config.optim.betas=(0.9, 0.95)'
status=$?
if [ "$status" -eq 42 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
