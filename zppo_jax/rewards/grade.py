"""Batches of responses to rewards, and the checks that no reward slips through unseen."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from zppo_jax.core.errors import RewardError
from zppo_jax.core.types import Example
from zppo_jax.rewards import answers, verifiers
from zppo_jax.rewards.pool import Pool
from zppo_jax.rewards.verifiers import Pending, VerifyResult


class Grader:
  """Grades batches; owns the process pool, which starts only if a verifier needs it.

  Use as a context manager, or call `close`. Safe to call from several threads.
  """

  def __init__(
    self, deadline_s: float = 5.0, *, num_workers: int = 2, batch_deadline_s: float = 300.0
  ):
    """`deadline_s` is for one answer, `batch_deadline_s` for one `grade`; late answers score 0."""
    self._pool = Pool(
      num_workers=num_workers, deadline_s=deadline_s, batch_deadline_s=batch_deadline_s
    )
    self._lock = threading.Lock()

  def grade(
    self, responses: Sequence[str], examples: Sequence[Example]
  ) -> tuple[np.ndarray, list[VerifyResult]]:
    """(rewards f32[B], results) of B responses, row i to `examples[i]`.

    Equal answers to one question are judged once per call. Raises RewardError for unequal lengths
    or an unknown verifier.
    """
    if len(responses) != len(examples):
      raise RewardError(f'{len(responses)} responses for {len(examples)} examples')
    keys, judged = [], {}
    for response, example in zip(responses, examples, strict=True):
      verifier = verifiers.get(example.verifier)
      answer = verifier.read(response, example)
      key = (example.uid, example.verifier, example.answer, answer)
      keys.append(key)
      if key not in judged:
        judged[key] = verifier.begin(answer, example)
    judged |= self._finish({k: j for k, j in judged.items() if isinstance(j, Pending)})
    results = [judged[key] for key in keys]
    rewards = check_rewards([r.score for r in results], len(examples), allow_fractional=True)
    return rewards, results

  def _finish(self, pending: Mapping[tuple, Pending]) -> dict[tuple, VerifyResult]:
    if not pending:
      return {}
    with self._lock:
      outcomes = self._pool.run([item.call for item in pending.values()])
    return {k: p.finish(o) for (k, p), o in zip(pending.items(), outcomes, strict=True)}

  def close(self) -> None:
    """Ends the worker processes."""
    self._pool.close()

  def __enter__(self) -> Grader:
    return self

  def __exit__(self, *_) -> None:
    self.close()


def check_rewards(
  rewards: Sequence[float] | np.ndarray,
  num_rows: int,
  *,
  allow_fractional: bool = False,
  name: str = 'reward',
) -> np.ndarray:
  """`rewards` as f32[num_rows], each 0 or 1 (in [0, 1] with `allow_fractional`).

  A scalar is never broadcast. Raises RewardError that names the first bad row and its value.
  """
  if np.ndim(rewards) != 1 or len(rewards) != num_rows:
    shape = list(np.shape(rewards))
    raise RewardError(f'{name}: shape {shape}, expected one value for each of {num_rows} rows')
  out = np.zeros(num_rows, np.float32)
  for row, value in enumerate(rewards):
    out[row] = _check_value(value, row, name)
    if not allow_fractional and out[row] not in (0.0, 1.0):
      raise RewardError(f'{name}[{row}] = {value}: not 0 or 1 (allow_fractional is off)')
  return out


def _check_value(value: object, row: int, name: str) -> float:
  if value is None:
    raise RewardError(f'{name}[{row}] is None: a reward function must score every row')
  try:
    number = float(value)
  except (TypeError, ValueError) as error:
    raise RewardError(f'{name}[{row}] = {value!r}: not a number') from error
  if not np.isfinite(number) or not 0.0 <= number <= 1.0:
    raise RewardError(f'{name}[{row}] = {number}: outside [0, 1]')
  return number


def combine(
  rewards: Mapping[str, Sequence[float | None]], weights: Mapping[str, float] | None = None
) -> np.ndarray:
  """One reward from several functions: f32[N], the weighted mean over those that apply.

  r_i = sum_k w_k r_ki / sum_k w_k over the k with r_ki not None; weights default to 1.
  Raises RewardError for unequal lengths, bad values, bad weights, or a row where none applies.
  """
  weights = dict.fromkeys(rewards, 1.0) if weights is None else dict(weights)
  if set(weights) != set(rewards):
    raise RewardError(f'weights for {sorted(weights)}, rewards for {sorted(rewards)}')
  for name, weight in weights.items():
    if not (np.isfinite(weight) and weight > 0):
      raise RewardError(f'weight of {name!r} must be positive and finite, got {weight}')
  lengths = {name: len(values) for name, values in rewards.items()}
  if len(set(lengths.values())) != 1:
    raise RewardError(f'reward functions must return one value per row, got {lengths}')
  num_rows = next(iter(lengths.values()))
  total, weight_sum = np.zeros(num_rows), np.zeros(num_rows)
  for name, values in rewards.items():
    for row, value in enumerate(values):
      if value is not None:
        total[row] += weights[name] * _check_value(value, row, name)
        weight_sum[row] += weights[name]
  if not np.all(weight_sum):
    row = int(np.argmin(weight_sum))
    raise RewardError(f'no reward function applies to row {row}: all of {list(rewards)} gave None')
  return (total / weight_sum).astype(np.float32)


def normalise_distinct(candidates: Iterable[str | None]) -> list[str]:
  """The distinct answers in order, first spelling kept; None is skipped.

  Two spellings are one answer if they agree after the grader's normalisation, numbers by value.
  """
  first: dict[object, str] = {}
  for candidate in candidates:
    if candidate is not None:
      first.setdefault(answers.canonical(candidate), candidate)
  return list(first.values())
