#!/usr/bin/env bash
set -euo pipefail

gcloud compute tpus queued-resources create zppo-pod --zone=us-central1-a \
  --node-id=zppo-pod --accelerator-type=v5litepod-16 \
  --runtime-version=v2-alpha-tpuv5-lite --spot

while state=$(gcloud compute tpus queued-resources describe zppo-pod --zone=us-central1-a \
  --format='value(state.state)')
      [ "$state" != ACTIVE ]; do
  echo "$state"
  case "$state" in FAILED | SUSPENDED) exit 1 ;; esac
  sleep 30
done

gcloud compute tpus tpu-vm ssh zppo-pod --zone=us-central1-a --worker=all \
  --command='mkdir -p zppo_jax'

gcloud compute tpus tpu-vm scp --recurse --zone=us-central1-a --worker=all \
  setup.py pyproject.toml zppo_jax kernels experiments ml_collections_configs \
  zppo-pod:zppo_jax

# The same command on every host. Called again, it continues the run.
gcloud compute tpus tpu-vm ssh zppo-pod --zone=us-central1-a --worker=all \
  --command='cd zppo_jax && bash experiments/launch/run_tpu.sh experiments.train --config=ml_collections_configs/zppo.py:pod --workdir=/mnt/runs/zppo '"'"'--config.optim.betas=(0.9, 0.95)'"'"''

# At the end, and after a preemption before the next start:
# gcloud compute tpus queued-resources delete zppo-pod --zone=us-central1-a --force --quiet
