#!/usr/bin/env bash
#SBATCH --job-name=zppo-pod
#SBATCH --output=zppo-pod-%j.out
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=h100:4
#SBATCH --cpus-per-task=12
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --time=1-12:00:00
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --requeue

# One task per GPU. Submit from the checkout, in an environment with '.[gpu]' installed.
srun --cpus-per-task=12 --kill-on-bad-exit=0 --wait=600 \
  python -m experiments.train --config=a.py --workdir=runs/a
status=$?
if [ "$status" -eq 42 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
