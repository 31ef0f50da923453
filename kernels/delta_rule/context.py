"""The delta rule over a sequence that is cut along a mesh axis: exact, by passing states.

A shard maps the state that enters it affinely to the one that leaves it, A S + b. Run on values
[u | 0] from the state [0 | I], the rule itself returns [b | A]: no kernel of its own is needed. The
shards exchange these maps, 4 K (K + V) bytes per head, compose them, and run from the right state.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels.delta_rule import api

Array = jax.Array


def delta_rule_sharded(q: Array, write_key: Array, erase_key: Array, value: Array,
                       log_decay: Array, *, axis_name: str, scale: float | None = None,
                       state: Array | None = None, segment_ids: Array | None = None,
                       implementation: str | Sequence[str] | None = None) -> tuple[Array, Array]:
  """`delta_rule` inside `jax.shard_map`: arrays hold the shard's tokens, in the order of the axis.

  `state`, the same on all shards, enters the first one; the returned state leaves the last one and
  is the same on all shards. Costs one more pass at value width K + V, outputs unused.
  """
  batch, _, heads, width = value.shape
  size = q.shape[-1]
  if state is None:
    state = jnp.zeros((batch, heads, size, width), jnp.promote_types(jnp.float32, q.dtype))
  wide = jnp.concatenate([value, jnp.zeros((*value.shape[:3], size), value.dtype)], -1)
  eye = jnp.broadcast_to(jnp.eye(size, dtype=state.dtype), (batch, heads, size, size))
  start = jnp.concatenate([jnp.zeros_like(state), eye], -1)
  shared = dict(segment_ids=segment_ids, implementation=implementation)
  _, own = api.delta_rule(q, write_key, erase_key, wide, log_decay, state=start, **shared)
  maps = jax.lax.all_gather(own, axis_name)  # [N, B, HV, K, V + K]
  goes_on = _goes_on(segment_ids, axis_name, len(maps), batch)
  entering = []
  for shard in range(len(maps)):
    state = jnp.where(goes_on[shard][:, None, None, None], state, 0)
    entering.append(state)
    state = maps[shard, ..., :width] + jnp.einsum(
      'bhij,bhjv->bhiv', maps[shard, ..., width:], state, precision=jax.lax.Precision.HIGHEST)
  mine = jnp.stack(entering)[jax.lax.axis_index(axis_name)]
  out, _ = api.delta_rule(q, write_key, erase_key, value, log_decay, scale=scale, state=mine,
                          **shared)
  return out, state


def _goes_on(segment_ids, axis_name: str, shards: int, batch: int) -> Array:
  """Whether the segment that ends before a shard is the one that it starts with, bool[N, B]."""
  if segment_ids is None:
    return jnp.ones((shards, batch), bool)
  real = segment_ids != 0
  length = segment_ids.shape[1]
  first = jnp.take_along_axis(segment_ids, jnp.argmax(real, 1)[:, None], 1)[:, 0]
  last = jnp.take_along_axis(segment_ids, length - 1 - jnp.argmax(real[:, ::-1], 1)[:, None],
                             1)[:, 0]
  first, last = jax.lax.all_gather((first, last), axis_name)  # 0 where a shard is all padding
  found, before = [], jnp.zeros(batch, segment_ids.dtype)
  for shard in range(shards):
    found.append((before == 0) | (first[shard] == 0) | (first[shard] == before))
    before = jnp.where(last[shard] == 0, before, last[shard])
  return jnp.stack(found)
