"""Samples held-out questions with a checkpoint and says how many are solved:

python -m experiments.evaluate --config=ml_collections_configs/grpo.py:tiny --workdir=runs/eval \
  --config.init.checkpoint=runs/warm --config.eval.samples=8 --k=1,4,8

The config's `eval` section says how many questions and samples, and how they are drawn. Every
sample is a line of samples.jsonl; a call that was stopped goes on there. results.json holds avg@n,
pass@k (unbiased), all@k and maj@k with standard errors and 95 % intervals over questions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from zppo_jax.core.errors import UserError
from zppo_jax.launch import app, workdir

flags.DEFINE_list('k', ['1'], 'Values of k, at most eval.samples.')


def evaluate(config: Any, folder: str, ks: Sequence[int], *, resume: str = 'auto',
             cleanup: bool = False) -> dict[str, dict[str, float]]:
  """Draws, grades and summarises; returns what results.json holds. Raises UserError."""
  import jax

  from zppo_jax.evals import samples
  from zppo_jax.launch import build, roles, validate
  from zppo_jax.mesh import hosts
  from zppo_jax.rewards.grade import Grader

  if not ks or min(ks) < 1 or max(ks) > config.eval.samples:
    raise UserError(f'--k must lie in 1..eval.samples = {config.eval.samples}, got {list(ks)}')
  if not config.init.checkpoint:
    raise UserError('init.checkpoint: the weights to evaluate must be given, got none')
  validate.validate(config, num_devices=len(jax.devices()))
  if resume == 'must' and not os.path.exists(os.path.join(folder, samples.FILE)):
    raise UserError(f'resume=must, but there is no {samples.FILE} in {folder}')
  place = workdir.prepare(folder, config, 'never' if resume == 'never' else 'auto', cleanup).path
  with Grader(deadline_s=config.data.deadline_secs) as grader:
    run = build.build(config, place, grader=grader)
    given = run.eval_settings
    setup = dataclasses.replace(run.eval_setup, sampling=given.sampling)
    count = min(given.num_questions, len(setup.questions.source))
    with jax.set_mesh(setup.mesh):
      rows = samples.draw(setup, run.warm_start, questions=count, samples=given.samples,
                          chunk=given.chunk, path=os.path.join(place, samples.FILE),
                          weights=roles.weights_name(config.init.checkpoint))
  found = samples.summarise(rows, ks, seed=config.seed)
  if hosts.is_first():
    with open(os.path.join(place, 'results.json'), 'w', encoding='utf-8') as file:
      shown = {name: {k: None if math.isnan(x) else x for k, x in row.items()}
               for name, row in found.items()}
      json.dump(dict(questions=count, samples=given.samples, results=shown), file, indent=2)
  return found


def main(launch: app.Launch) -> None:
  from zppo_jax.evals import samples

  try:
    ks = [int(k) for k in flags.FLAGS.k]
  except ValueError as error:
    raise UserError(f'--k must be whole numbers, got {flags.FLAGS.k}') from error
  found = evaluate(launch.config, launch.workdir, ks, resume=launch.resume, cleanup=launch.cleanup)
  for name, row in found.items():
    print(f'{name:10s} {row["mean"]:.4f} +- {row["error"]:.4f}  '
          f'[{row["low"]:.4f}, {row["high"]:.4f}]')
  print(os.path.join(launch.workdir, samples.FILE))


if __name__ == '__main__':
  sys.exit(app.run(main))
