"""Graders that may hang: they run in a worker of `pool`, never in the trainer's process."""

from __future__ import annotations

import logging
import re
from typing import Any

from zppo_jax.rewards.answers import strip_marks


def math_equal(pairs: tuple[tuple[str, str], ...]) -> float:
  """1 if every (gold, answer) pair is equal for math-verify, gold first; else 0.

  A pair that fails is tried once more without degree and percent signs on both sides
  (arXiv:2606.18216).
  """
  return float(all(_equal(g, a) or _retry(g, a) for g, a in pairs))


def _retry(gold: str, answer: str) -> bool:
  bare = strip_marks(gold), strip_marks(answer)
  return bare != (gold, answer) and _equal(*bare)


def _equal(gold: str, answer: str) -> bool:
  import math_verify

  # Its own time-out is signal.alarm; the pool kills instead, and the library warns about that.
  logging.getLogger('math_verify').setLevel(logging.ERROR)
  parsed = [math_verify.parse(f'${text}$', parsing_timeout=None) for text in (gold, answer)]
  return bool(math_verify.verify(*parsed, timeout_seconds=None))


def reasoning_gym_score(dataset: str, entry: dict[str, Any], answer: str, partial: bool) -> float:
  """The data set's own score of `answer`; below 1 counts as 0 unless `partial`."""
  import reasoning_gym

  score = float(reasoning_gym.get_score_answer_fn(dataset)(answer=answer, entry=entry))
  if partial:
    return min(max(score, 0.0), 1.0)
  return float(score >= 1.0)


def full_match(pattern: str, answer: str) -> float:
  """1 if the whole answer matches; for patterns that may backtrack without end."""
  return float(re.fullmatch(pattern, answer) is not None)
