#!/usr/bin/env bash
set -euo pipefail

xpk workload create --workload=zppo-pod \
  --cluster=pods --zone=us-east5-b --project=lab \
  --device-type=h200-141gb-8 --num-nodes=4 \
  --docker-image=gcr.io/p/zppo:1 \
  --priority=medium \
  --max-restarts=50 --restart-on-exit-codes=42 \
  --termination-grace-period-seconds=300 \
  --command='exec python -m experiments.train --config=ml_collections_configs/zppo.py:pod --workdir=/mnt/runs/zppo --coordinator_address=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT --num_processes=$NNODES --process_id=$NODE_RANK'
