#!/usr/bin/env bash
set -euo pipefail

gcloud compute tpus tpu-vm create zppo-pod --zone=us-central1-a --project=lab \
  --accelerator-type=v5litepod-16 --version=v9

gcloud compute tpus tpu-vm ssh zppo-pod --zone=us-central1-a --project=lab --worker=all \
  --command='mkdir -p zppo_jax'

gcloud compute tpus tpu-vm scp --recurse --zone=us-central1-a --project=lab --worker=all \
  setup.py pyproject.toml zppo_jax kernels experiments ml_collections_configs \
  zppo-pod:zppo_jax

# The same command on every host. Called again, it continues the run.
gcloud compute tpus tpu-vm ssh zppo-pod --zone=us-central1-a --project=lab --worker=all \
  --command='cd zppo_jax && bash experiments/launch/run_tpu.sh experiments.train --config=ml_collections_configs/zppo.py:pod --workdir=/mnt/runs/zppo'

# At the end, and after a preemption before the next start:
# gcloud compute tpus tpu-vm delete zppo-pod --zone=us-central1-a --project=lab --quiet
