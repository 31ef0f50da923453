#!/usr/bin/env bash
set -euo pipefail

xpk workload create --workload=zppo-pod \
  --cluster=pods \
  --tpu-type=v5litepod-256 --num-slices=1 \
  --docker-image=gcr.io/p/zppo:1 \
  --priority=medium \
  --max-restarts=50 --restart-on-exit-codes=42 \
  --termination-grace-period-seconds=300 \
  --command='exec python -m experiments.train --config=ml_collections_configs/zppo.py:pod --workdir=/mnt/runs/zppo '"'"'--config.optim.betas=(0.9, 0.95)'"'"''
