"""Held-out plain accuracy: the same questions, the same settings, at any step and for any
method."""

from __future__ import annotations

import dataclasses

import numpy as np

from zppo_jax.methods import api
from zppo_jax.sampling import decode
from zppo_jax.train.context import StepContext
from zppo_jax.train.setup import Setup


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  """`samples` answers per question at the given sampling settings."""

  num_questions: int = 256
  chunk: int = 128  # questions per call
  samples: int = 1
  sampling: decode.Settings | None = None  # None = greedy


def evaluate(setup: Setup, params, s: EvalSettings) -> dict[str, float]:
  """Mean reward on the first num_questions rows of setup.questions, and mean response length.

  Rows that nothing scored (reward NaN: a fault) are left out of the mean and counted.
  """
  if s.sampling is None:
    sampling = dataclasses.replace(setup.sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
  else:
    sampling = s.sampling
  setup = dataclasses.replace(setup, sampling=sampling, group_size=s.samples)
  total, rows, length, unscored = 0.0, 0, 0.0, 0
  count = min(s.num_questions, len(setup.questions.source))
  for begin in range(0, count, s.chunk):
    ctx = StepContext(setup, params, step=begin, version=0)
    groups = [api.Group(q) for q in range(begin, min(begin + s.chunk, count))]
    drawn = ctx.draw(groups, capacity=s.chunk)
    total += float(np.nansum(drawn.reward))
    unscored += int(np.isnan(drawn.reward).sum())
    length += float(drawn.rollout.traj_tokens.sum())
    rows += len(groups) * s.samples
  return {'eval/accuracy': total / max(1, rows - unscored), 'eval/response_tokens': length / rows,
          'eval/unscored_frac': unscored / rows}
