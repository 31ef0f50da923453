"""Samples of every question of a set, one JSON line each; goes on where an earlier call stopped.

The noise of a sample belongs to (seed, question, sample): neither the size of a call nor a stop in
the middle changes a row.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from zppo_jax.core import rng, types
from zppo_jax.core.errors import UserError
from zppo_jax.mesh import hosts
from zppo_jax.methods import api
from zppo_jax.ops import intervals
from zppo_jax.rewards import answers
from zppo_jax.sampling import select
from zppo_jax.train.context import StepContext
from zppo_jax.train.setup import Setup

FILE = 'samples.jsonl'


def draw(setup: Setup, params, *, questions: int, samples: int, chunk: int, path: str,
         weights: str) -> list[dict[str, Any]]:
  """Rows of the first `questions` questions, `samples` each, in order; `path` holds them on disk.

  `chunk` questions per call of the sampler. A file that was cut in a line is mended. `weights`
  names the parameters: UserError where the rows on disk are those of others.
  """
  setup = dataclasses.replace(setup, group_size=samples)
  rows = hosts.on_first(lambda: _read(path, samples, weights))
  done = len(rows) // samples
  with open(path if hosts.is_first() else os.devnull, 'a', encoding='utf-8') as file:
    for begin in range(done, questions, chunk):
      for row in _call(setup, params, range(begin, min(begin + chunk, questions)), chunk):
        row['weights'] = weights
        file.write(json.dumps(row) + '\n')
        rows.append(row)
      file.flush()
  return rows[:questions * samples]


def _call(setup: Setup, params, numbers: range, chunk: int) -> Iterator[dict[str, Any]]:
  ctx = StepContext(setup, params, step=0, version=0)
  drawn = ctx.draw([api.Group(q) for q in numbers], capacity=chunk)
  status, length = hosts.fetch((drawn.rollout.status, drawn.rollout.traj_tokens))
  for slot, question in enumerate(numbers):
    example = ctx.example(question)
    for sample, row in enumerate(drawn.rows(slot)):
      yield dict(question=question, uid=example.uid, sample=sample, text=drawn.texts[row],
                 parsed=drawn.answers[row], answer=example.answer,
                 reward=None if math.isnan(drawn.reward[row]) else float(drawn.reward[row]),
                 tokens=int(length[row]),
                 truncated=bool(status[row] == types.TRUNCATED))


def _read(path: str, samples: int, weights: str) -> list[dict[str, Any]]:
  """Whole questions of an earlier call; anything behind them is cut off."""
  rows: list[dict[str, Any]] = []
  try:
    with open(path, encoding='utf-8') as file:
      for line in file:
        row = json.loads(line) if line.endswith('\n') else None
        wanted = divmod(len(rows), samples)
        if row is None or (row['question'], row['sample']) != wanted:
          break
        if row.get('weights') != weights:
          raise UserError(f'{path} holds samples of {row.get("weights", "unnamed weights")}, asked '
                          f'for are those of {weights}: take another --workdir, or '
                          '--resume=never --cleanup')
        rows.append(row)
  except FileNotFoundError:
    return []
  rows = rows[:len(rows) // samples * samples]
  with open(path + '.tmp', 'w', encoding='utf-8') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)
  os.replace(path + '.tmp', path)
  return rows


def summarise(rows: Sequence[Mapping[str, Any]], ks: Sequence[int], *, seed: int = 0
              ) -> dict[str, dict[str, float]]:
  """{metric: mean over questions, standard error, 95 % interval low and high}.

  avg@n, and for each k pass@k (unbiased), all@k, maj@k (votes by the value of the answer, all
  right ones alike; the first of tied answers wins) and maj@k_frac (tied ones share). Questions are
  the unit: samples of one question are not independent. A reward of 1 is right; a sample without
  one was not scored and is left out, and so is a question with fewer than k that were. NaN where
  there is no figure. Raises ValueError on k above the samples of a question.
  """
  ks = list(dict.fromkeys(ks))
  by_question: dict[int, list[Mapping[str, Any]]] = {}
  for row in rows:
    by_question.setdefault(row['question'], []).append(row)
  groups = list(by_question.values())
  fewest = min(map(len, groups), default=0)
  if not groups or max(ks) > fewest:
    raise ValueError(f'k must be at most the samples of a question, {fewest}, got {max(ks)}')
  found: dict[str, list[float]] = {f'avg@{fewest}': []}
  for number, whole in enumerate(groups):
    group = [row for row in whole if row['reward'] is not None]
    right = [row['reward'] == 1 for row in group]
    n, c = len(group), sum(right)
    found[f'avg@{fewest}'].append(float(np.mean([row['reward'] for row in group])) if group
                                  else math.nan)
    votes = select.clusters([_vote(row) for row in group])
    for k in ks:
      found.setdefault(f'pass@{k}', []).append(select.pass_at_k(n, c, k))
      found.setdefault(f'all@{k}', []).append(select.all_at_k(n, c, k))
      first, shared = select.maj_at_k(votes, right, k, rng.host_rng(seed, 'vote', number, k))
      found.setdefault(f'maj@{k}', []).append(first)
      found.setdefault(f'maj@{k}_frac', []).append(shared)
  found['unscored'] = [float(np.mean([row['reward'] is None for row in g])) for g in groups]
  found['truncated'] = [float(np.mean([row['truncated'] for row in g])) for g in groups]
  found['unread'] = [float(np.mean([row['parsed'] is None for row in g])) for g in groups]
  out = {}
  for name, values in found.items():
    known = [x for x in values if not math.isnan(x)]
    mean = float(np.mean(known)) if known else math.nan
    error = intervals.standard_error(known)
    low, high = intervals.normal(mean, error, len(known))
    if known and name.startswith('maj'):  # no plain mean over independent samples
      low, high = intervals.bootstrap(known, np.mean, rng.host_rng(seed, 'bootstrap', name))
    out[name] = dict(mean=mean, error=error, low=low, high=high)
  return out


def _vote(row: Mapping[str, Any]):
  """What a sample votes for: right answers are one, however they are written."""
  if row['parsed'] is None:
    return None
  return 'right' if row['reward'] == 1 else ('wrong', answers.canonical(row['parsed']))
