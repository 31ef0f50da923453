"""Compiles a config for a pod on this host and says what it needs:

python -m experiments.launch_pod --aot_only --topology=v5p:4x4x4 \
  --config=ml_collections_configs/zppo.py:pod --workdir=runs/aot

Prints bytes per chip and flops of the train step and of sampling, and whether they fit; exit
status 1 if one does not. Starting a run on a pod is `experiments.train` on every host (README).
"""

from __future__ import annotations

import os
import sys

from absl import flags

from zppo_jax.core.errors import UserError
from zppo_jax.launch import app

flags.DEFINE_string('topology', 'v5p:4x4x4', 'TPU slice, GENERATION:AxB or :AxBxC.')
flags.DEFINE_list('programs', [], 'Which of train, sample, teacher to compile; empty = all.')
flags.DEFINE_bool('aot_only', False, 'Compile only; the one mode there is on a host without TPUs.')


def main(launch: app.Launch) -> int:
  from zppo_jax.launch import aot

  if not flags.FLAGS.aot_only:
    raise UserError('launch_pod needs --aot_only; on the pod itself run experiments.train')
  pod = aot.describe(launch.config, flags.FLAGS.topology)
  print(f'{flags.FLAGS.topology}: {len(pod.mesh.devices.flat)} chips, mesh '
        f'{dict(pod.mesh.shape)}', flush=True)
  jobs = {'train': pod.train, 'sample': lambda: pod.sample(pod.model, 'sample')}
  if pod.teacher is not None:
    jobs['teacher'] = lambda: pod.sample(pod.teacher, 'teacher')
  reports = []
  for name in flags.FLAGS.programs or jobs:
    if name not in jobs:
      raise UserError(f'programs: {name!r} is not one of {sorted(jobs)}')
    reports.append(jobs[name]())
    print(reports[-1].line(), flush=True)
  return 0 if all(r.fits for r in reports) else 1


if __name__ == '__main__':
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  sys.exit(app.run(main))
