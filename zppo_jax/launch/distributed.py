"""Joining the processes of one run, before any device is touched."""

from __future__ import annotations

import os

import jax

from zppo_jax.core.errors import UserError

# One failing process is noticed by the others after this time; a checkpoint may take minutes.
HEARTBEAT_SECS = 300


def start(address: str | None = None, num_processes: int | None = None,
          process_id: int | None = None) -> bool:
  """Joins the other processes of the run; True if there is a cluster.

  Without arguments JAX looks for Cloud TPU, GKE, SLURM or Open MPI, and a lone host stays alone.
  Raises UserError if only some arguments are given, or one is out of bounds.
  """
  given = dict(coordinator_address=address, num_processes=num_processes, process_id=process_id)
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if 0 < len(missing) < len(given):
    raise UserError(f'{", ".join(missing)}: must be given too, as processes are joined by hand')
  if not missing and not 0 <= process_id < num_processes:
    raise UserError(f'--process_id must lie in 0..num_processes - 1 = {num_processes - 1}, got '
                    f'{process_id}')
  if os.environ.get('JAX_PLATFORMS') == 'cpu' and missing:
    return False  # a lone process for tests and small runs, even inside an allocation
  try:
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECS)
  except ValueError as error:
    if 'coordinator_address should be defined' in str(error):
      return False
    raise
  return True
