"""A first-in-first-out store for any pytree, of static shape, on the device.

Dims: C capacity, B entries offered, n entries drawn. One entry is one whole group (put its rows on
an axis inside the entry), so groups enter and leave whole. Spec: training-loop, section 7.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zppo_jax.core.types import Array, record

STRATEGIES = ('uniform', 'fifo', 'prioritised', 'on_policy_only')


@record
class Ring:
  """Entries and their bookkeeping; part of the checkpoint."""

  data: Any  # pytree, leaves [C, ...]
  valid: Array  # bool[C]
  order: Array  # i32[C], value of `counter` at insertion
  version: Array  # i32[C], policy version that made the entry
  uses: Array  # i32[C], times drawn
  priority: Array  # f32[C], >= 0
  counter: Array  # i32[], entries added so far
  evicted: Array  # i32[], entries that left: overwritten, too old or used up


def init(spec: Any, capacity: int) -> Ring:
  """An empty ring. `spec`: pytree of arrays or ShapeDtypeStructs of one entry. capacity >= 1."""
  if capacity < 1:
    raise ValueError(f'capacity must be >= 1, got {capacity}')
  slots = lambda dtype: jnp.zeros((capacity,), dtype)
  return Ring(
    data=jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), spec),
    valid=slots(bool),
    order=slots(jnp.int32),
    version=slots(jnp.int32),
    uses=slots(jnp.int32),
    priority=slots(jnp.float32),
    counter=jnp.zeros((), jnp.int32),
    evicted=jnp.zeros((), jnp.int32),
  )


def size(ring: Ring) -> Array:
  """Number of entries held, i32[]."""
  return ring.valid.sum(dtype=jnp.int32)


def add(
  ring: Ring, batch: Any, valid: Array, version: Array, priority: Array | float = 1.0
) -> Ring:
  """The ring with the valid entries of `batch` (leaves [B, ...]) as its newest, in batch order.

  valid bool[B] (the zero-variance filter is the caller's), version i32[] or i32[B], priority f32
  likewise. Empty slots are filled first, then the oldest are overwritten; with more entries than
  the capacity the last of them stay. Errors: leaves whose entry shape or dtype differs.
  """
  _check_entries(ring.data, batch)
  capacity, valid = ring.valid.shape[0], jnp.asarray(valid, bool)
  count = valid.sum(dtype=jnp.int32)
  seq = jnp.cumsum(valid, dtype=jnp.int32) - 1
  place = seq - jnp.maximum(count - capacity, 0)  # negative: overwritten within this call
  oldest = jnp.argsort(jnp.where(ring.valid, ring.order, -1))
  slot = jnp.where(valid & (place >= 0), oldest[jnp.clip(place, 0, capacity - 1)], capacity)
  put = lambda old, new: old.at[slot].set(
    jnp.broadcast_to(jnp.asarray(new, old.dtype), (slot.shape[0], *old.shape[1:])), mode='drop'
  )
  return Ring(
    data=jax.tree.map(put, ring.data, batch),
    valid=put(ring.valid, True),
    order=put(ring.order, ring.counter + seq),
    version=put(ring.version, version),
    uses=put(ring.uses, 0),
    priority=put(ring.priority, priority),
    counter=ring.counter + count,
    evicted=ring.evicted + jnp.maximum(size(ring) + count - capacity, 0),
  )


def _check_entries(data, batch) -> None:
  expected, got = jax.tree.structure(data), jax.tree.structure(batch)
  if expected != got:
    raise ValueError(f'batch must have the structure {expected}, got {got}')
  for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(data), jax.tree.leaves(batch)):
    if old.shape[1:] != new.shape[1:] or old.dtype != new.dtype:
      name = jax.tree_util.keystr(path)
      raise ValueError(
        f'batch{name} must be {old.dtype}[B, *{list(old.shape[1:])}], '
        f'got {new.dtype}{list(new.shape)}'
      )


def sample(
  ring: Ring,
  key: Array,
  n: int,
  *,
  strategy: str = 'uniform',
  current_version: Array | int | None = None,
) -> tuple[Ring, Any, Array]:
  """n entries without replacement: (ring with uses + 1, batch with leaves [n, ...], ok bool[n]).

  uniform | fifo: oldest first | prioritised: in proportion to the priority given to `add`, 0 never
  | on_policy_only: uniform over entries with version == current_version. Where too few entries
  qualify, ok is False and the entry is zero; call require_nonempty on the host first.
  Errors: unknown strategy, on_policy_only without current_version, n outside [1, C].
  """
  if strategy not in STRATEGIES:
    raise ValueError(f'strategy must be one of {STRATEGIES}, got {strategy!r}')
  if not 1 <= n <= ring.valid.shape[0]:
    raise ValueError(f'n must be in [1, {ring.valid.shape[0]}], got {n}')
  live = ring.valid
  if strategy == 'fifo':
    score = jnp.where(live, -ring.order, np.iinfo(np.int32).min)
  else:
    score = jax.random.gumbel(key, live.shape)
    if strategy == 'prioritised':
      live = live & (ring.priority > 0)
      score = score + jnp.log(jnp.where(live, ring.priority, 1))
    elif strategy == 'on_policy_only':
      if current_version is None:
        raise ValueError("current_version must be given for strategy 'on_policy_only', got None")
      live = live & (ring.version == current_version)
    score = jnp.where(live, score, -jnp.inf)
  _, slot = lax.top_k(score, n)
  ok = live[slot]
  take = lambda x: jnp.where(ok.reshape(-1, *[1] * (x.ndim - 1)), x[slot], jnp.zeros((), x.dtype))
  uses = ring.uses.at[slot].add(ok.astype(jnp.int32))
  return dataclasses.replace(ring, uses=uses), jax.tree.map(take, ring.data), ok


def evict(
  ring: Ring,
  *,
  current_version: Array | int | None = None,
  max_staleness: int | None = None,
  max_uses: int | None = None,
) -> Ring:
  """The ring without entries that are too old or used up.

  Too old: version < current_version - max_staleness; used up: uses >= max_uses. None switches a
  rule off. Errors: max_staleness < 0 or without current_version, max_uses < 1.
  """
  keep = ring.valid
  if max_staleness is not None:
    if max_staleness < 0 or current_version is None:
      raise ValueError(
        f'max_staleness must be >= 0 and come with current_version, '
        f'got {max_staleness} and {current_version}'
      )
    keep = keep & (ring.version >= current_version - max_staleness)
  if max_uses is not None:
    if max_uses < 1:
      raise ValueError(f'max_uses must be >= 1, got {max_uses}')
    keep = keep & (ring.uses < max_uses)
  gone = (ring.valid & ~keep).sum(dtype=jnp.int32)
  return dataclasses.replace(ring, valid=keep, evicted=ring.evicted + gone)


def require_nonempty(ring: Ring) -> None:
  """Host check before `sample`: ValueError if the ring holds nothing."""
  if not np.asarray(ring.valid).any():
    raise ValueError(f'ring must hold at least 1 entry to sample from, got 0 of {len(ring.valid)}')
