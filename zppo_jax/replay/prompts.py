"""The prompt replay buffer of ZPPO: question ids only, first in first out, of static shape.

Dims: C capacity, P questions of a step, K = group_size + 1 bins of entry accuracy (k right out of
group_size). Slots are kept sorted by age, oldest first. Source: arXiv:2606.18216.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zppo_jax.core.types import Array, record

LAST = np.iinfo(np.int32).max


@record
class PromptBuffer:
  """Hard questions waiting for replay; part of the checkpoint."""

  question_id: Array  # i32[C], -1 in an empty slot
  valid: Array  # bool[C]
  order: Array  # i32[C], value of `counter` at admission
  entry_acc: Array  # f32[C], accuracy of the plain group at admission
  visits: Array  # i32[C], failing visits since admission
  counter: Array  # i32[], admissions so far
  admitted: Array  # i32[K], by entry accuracy
  graduated: Array  # i32[K]
  evicted: Array  # i32[K]


def init(capacity: int, group_size: int) -> PromptBuffer:
  """An empty buffer. Errors: capacity < 1, group_size < 1."""
  for name, x in (('capacity', capacity), ('group_size', group_size)):
    if x < 1:
      raise ValueError(f'{name} must be >= 1, got {x}')
  slots = lambda value, dtype: jnp.full((capacity,), value, dtype)
  bins = lambda: jnp.zeros((group_size + 1,), jnp.int32)
  return PromptBuffer(
    question_id=slots(-1, jnp.int32),
    valid=slots(False, bool),
    order=slots(0, jnp.int32),
    entry_acc=slots(0, jnp.float32),
    visits=slots(0, jnp.int32),
    counter=jnp.zeros((), jnp.int32),
    admitted=bins(),
    graduated=bins(),
    evicted=bins(),
  )


def size(buffer: PromptBuffer) -> Array:
  """Number of questions held, i32[]."""
  return buffer.valid.sum(dtype=jnp.int32)


def sample(
  buffer: PromptBuffer, key: Array, n: int, exclude: Array | None = None
) -> tuple[Array, Array]:
  """n questions, uniform without replacement: (ids i32[n], ok bool[n]); the buffer is unchanged.

  `exclude` i32[m]: ids that are new in this step. With fewer than n questions left all of them
  come, and the rest has ok = False and id -1. Gumbel top-n over the slots.
  """
  live = buffer.valid
  if exclude is not None:
    live = live & ~jnp.isin(buffer.question_id, exclude)
  score = jnp.where(live, jax.random.gumbel(key, live.shape), -jnp.inf)
  _, slot = lax.top_k(score, min(n, live.shape[0]))
  short = n - slot.shape[0]
  ok = jnp.pad(live[slot], (0, short))
  return jnp.where(ok, jnp.pad(buffer.question_id[slot], (0, short)), -1), ok


def update(
  buffer: PromptBuffer, ids: Array, accuracy: Array, ok: Array, *, tau: float
) -> PromptBuffer:
  """The buffer after a step with plain groups of accuracy f32[P] on questions ids i32[P].

  A held question with accuracy >= tau graduates (leaves); one below tau keeps its place and entry
  accuracy, visits + 1; an unknown one below tau is admitted as the newest, in the order of ids.
  Then the oldest are evicted until the capacity holds. Rows with ok = False, a negative id, a NaN
  accuracy or an id seen earlier in the same call are left out.
  Errors: tau outside (0, 1]. Source: arXiv:2606.18216, algorithm 1.
  """
  if not 0 < tau <= 1:
    raise ValueError(f'tau must be in (0, 1], got {tau}')
  ids = jnp.asarray(ids, jnp.int32)
  row = jnp.asarray(ok, bool) & (ids >= 0) & ~jnp.isnan(accuracy)
  twin = (ids[:, None] == ids[None, :]) & row[None, :]
  row = row & ~jnp.tril(twin, -1).any(1)
  hit = (buffer.question_id[:, None] == ids[None, :]) & buffer.valid[:, None] & row[None, :]
  leaves = (hit & (accuracy >= tau)[None, :]).any(1)
  again = (hit & (accuracy < tau)[None, :]).any(1)
  enters = row & (accuracy < tau) & ~hit.any(0)
  rank = jnp.cumsum(enters, dtype=jnp.int32)
  both = lambda old, new: jnp.concatenate([old, jnp.broadcast_to(new, ids.shape).astype(old.dtype)])
  merged = PromptBuffer(
    question_id=both(buffer.question_id, ids),
    valid=both(buffer.valid & ~leaves, enters),
    order=both(buffer.order, buffer.counter + rank - 1),
    entry_acc=both(buffer.entry_acc, accuracy),
    visits=both(buffer.visits + again, 0),
    counter=buffer.counter + enters.sum(dtype=jnp.int32),
    admitted=buffer.admitted + _histogram(buffer, accuracy, enters),
    graduated=buffer.graduated + _histogram(buffer, buffer.entry_acc, leaves),
    evicted=buffer.evicted,
  )
  return _evict(merged, buffer.valid.shape[0])


def _evict(buffer: PromptBuffer, capacity: int) -> PromptBuffer:
  """The newest `capacity` entries, oldest first; the rest is counted as evicted."""
  live = buffer.valid
  by_age = jnp.argsort(jnp.where(live, buffer.order, LAST))
  over = jnp.maximum(live.sum(dtype=jnp.int32) - capacity, 0)
  victim = jnp.zeros_like(live).at[by_age].set(jnp.arange(live.shape[0]) < over)
  kept = lax.dynamic_slice_in_dim(by_age, over, capacity)
  valid = live[kept]
  pick = lambda x, empty: jnp.where(valid, x[kept], empty)
  return PromptBuffer(
    question_id=pick(buffer.question_id, -1),
    valid=valid,
    order=pick(buffer.order, 0),
    entry_acc=pick(buffer.entry_acc, 0),
    visits=pick(buffer.visits, 0),
    counter=buffer.counter,
    admitted=buffer.admitted,
    graduated=buffer.graduated,
    evicted=buffer.evicted + _histogram(buffer, buffer.entry_acc, victim),
  )


def _histogram(buffer: PromptBuffer, accuracy: Array, chosen: Array) -> Array:
  """i32[K]: chosen entries by accuracy bin round(accuracy * group_size)."""
  bins = buffer.admitted.shape[0]
  share = jnp.where(chosen, accuracy, 0) * (bins - 1)
  index = jnp.clip(jnp.round(share).astype(jnp.int32), 0, bins - 1)
  return jax.ops.segment_sum(chosen.astype(jnp.int32), index, bins)


def check_restored(buffer: PromptBuffer, num_questions: int) -> None:
  """Host check of a restored buffer: ids in [0, num_questions), none twice. ValueError if not."""
  ids = np.asarray(buffer.question_id)[np.asarray(buffer.valid)]
  unknown = ids[(ids < 0) | (ids >= num_questions)]
  if unknown.size:
    raise ValueError(
      f'question_id of the restored buffer must be in [0, num_questions={num_questions}), '
      f'got {unknown[0]}'
    )
  values, counts = np.unique(ids, return_counts=True)
  if (counts > 1).any():
    raise ValueError(f'question_id of the restored buffer holds {values[counts > 1][0]} twice')
