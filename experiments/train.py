"""Trains one run: python -m experiments.train --config=FILE.py:PRESET --workdir=DIR [--config.x=y]

A second call with the same config resumes from the newest checkpoint, or says that the run is done.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from zppo_jax.launch import app, workdir


def train(config: Any, folder: str, *, resume: str = 'auto', cleanup: bool = False,
          report_paths: bool = True) -> str:
  """Validates, prepares the workdir and trains; returns the workdir. Raises UserError.

  Writes plots and a page into the workdir and, with `report_paths`, prints where.
  """
  import jax

  from zppo_jax.launch import build, roles, validate
  from zppo_jax.mesh import hosts
  from zppo_jax.rewards.grade import Grader
  from zppo_jax.train import loop

  validate.validate(config, num_devices=len(jax.devices()))
  place = workdir.prepare(folder, config, resume, cleanup)
  if place.done:
    if hosts.is_first():
      print(f'{folder}: done, nothing left to do')
    return folder
  with Grader(deadline_s=config.data.deadline_secs) as grader:
    loop.train(build.build(config, place.path, grader=grader))
  if config.ckpt.export and roles.is_published(config.init.checkpoint):
    roles.export(place.path, os.path.join(place.path, 'export'), config.init.checkpoint)
  hosts.on_first(lambda: _close(config, place.path, folder, report_paths))
  return folder


def _close(config: Any, path: str, folder: str, report_paths: bool) -> None:
  from zppo_jax.train import report

  paths = report.write_report({config.method.name: path}, path,
                              title=f'{config.method.name}: {folder}')
  workdir.mark_done(path)
  if report_paths:
    print('\n'.join(paths))


def main(launch: app.Launch) -> None:
  train(launch.config, launch.workdir, resume=launch.resume, cleanup=launch.cleanup)


if __name__ == '__main__':
  sys.exit(app.run(main))
