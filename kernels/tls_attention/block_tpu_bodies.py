"""Bodies of the TPU kernels of block-table attention: the rows of a list against one block of keys.

What stays while the grid moves on stands in columns, what moves in rows: scores are [rows, keys] in
the walks over tiles and [keys, rows] in the walk over blocks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.common.products import dot
from kernels.tls_attention.block_lists import Plan

Array = jax.Array
NONE = -1e30  # score of a key that is not seen
LOWEST = -1e20  # smaller than any score; e^(NONE - LOWEST) = 0


def _column(row: Array, scratch) -> Array:
  """[n, lanes], every lane the row [1, n]."""
  return jnp.swapaxes(jnp.broadcast_to(row, (scratch.shape[1], row.shape[1])), 0, 1)


def _step(plan: Plan, table) -> tuple[Array, Array, Array]:
  """(step, entry of the list, number of the entry) of a walk over tiles."""
  x, t, j = (pl.program_id(n) for n in range(3))
  return table[(x * plan.tiles + t) * plan.entries + j], j, t


def _scores(plan: Plan, query: Array, keys: Array, key_ids: Array, block: Array, ids, at) -> Array:
  """scale q . k [R, block], NONE where not seen; ids and positions of the rows in columns."""
  place = block * plan.block + lax.broadcasted_iota(jnp.int32, (1, plan.block), 1)
  seen = (ids[:, :1] == key_ids) & (place <= at[:, :1])
  return jnp.where(seen, plan.scale * dot(query, keys, (1, 1)), NONE)


def forward_body(plan: Plan, base, table, q_ref, k_ref, v_ref, rows_ref, key_ids_ref, out_ref,
                 log_sum_ref, ids, at, top, total, acc):
  del base
  block, j, _ = _step(plan, table)

  @pl.when(j == 0)
  def _():
    ids[...], at[...] = (_column(rows_ref[n:n + 1], ids) for n in range(2))
    top[...] = jnp.full_like(top, LOWEST)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

  @pl.when(block >= 0)
  def _():
    scores = _scores(plan, q_ref[...], k_ref[...], key_ids_ref[...], block, ids, at)
    before = top[:, :1]
    best = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    weight, fade = jnp.exp(scores - best), jnp.exp(before - best)
    top[...] = jnp.broadcast_to(best, top.shape)
    total[...] = total[...] * fade + jnp.sum(weight, axis=1, keepdims=True)
    acc[...] = acc[...] * fade + dot(weight.astype(v_ref.dtype), v_ref[...], (1, 0))

  @pl.when(j == plan.entries - 1)
  def _():
    some = jnp.where(total[...] > 0, total[...], 1)  # a row without keys: the output is 0
    out_ref[...] = (acc[...] / some[:, :1]).astype(out_ref.dtype)
    log_sum_ref[...] = jnp.swapaxes(top[...] + jnp.log(some), 0, 1)[:1]


def d_query_body(plan: Plan, base, table, q_ref, k_ref, v_ref, d_out_ref, stats_ref, rows_ref,
                 key_ids_ref, d_q_ref, ids, at, log_sum, own, acc):
  del base
  block, j, _ = _step(plan, table)

  @pl.when(j == 0)
  def _():
    ids[...], at[...] = (_column(rows_ref[n:n + 1], ids) for n in range(2))
    log_sum[...], own[...] = (_column(stats_ref[n:n + 1], own) for n in range(2))
    acc[...] = jnp.zeros_like(acc)

  @pl.when(block >= 0)
  def _():
    keys = k_ref[...]
    scores = _scores(plan, q_ref[...], keys, key_ids_ref[...], block, ids, at)
    weight = jnp.exp(scores - log_sum[:, :1])
    d_weight = dot(d_out_ref[...], v_ref[...], (1, 1))
    d_scores = plan.scale * weight * (d_weight - own[:, :1])
    acc[...] += dot(d_scores.astype(keys.dtype), keys, (1, 0))

  @pl.when(j == plan.entries - 1)
  def _():
    d_q_ref[...] = acc[...].astype(d_q_ref.dtype)


def d_key_value_body(plan: Plan, base, table, q_ref, k_ref, v_ref, d_out_ref, stats_ref, rows_ref,
                     key_ids_ref, d_k_ref, d_v_ref, ids, d_key, d_value):
  del base
  x, p = pl.program_id(0), pl.program_id(1)
  steps, bits = pl.num_programs(1), (plan.lists * plan.tiles - 1).bit_length()

  def block_of(p):
    step = table[x * steps + p]
    return (step ^ (step >> 31)) >> bits

  block = block_of(p)

  @pl.when((p == 0) | (block_of(jnp.maximum(p - 1, 0)) != block))
  def _():
    ids[...] = _column(key_ids_ref[...], ids)
    d_key[...] = jnp.zeros_like(d_key)
    d_value[...] = jnp.zeros_like(d_value)

  @pl.when(table[x * steps + p] >= 0)
  def _():
    query, d_out, keys = q_ref[...], d_out_ref[...], k_ref[...]
    place = block * plan.block + lax.broadcasted_iota(jnp.int32, (plan.block, 1), 0)
    seen = (ids[:, :1] == rows_ref[:1]) & (place <= rows_ref[1:])
    scores = jnp.where(seen, plan.scale * dot(keys, query, (1, 1)), NONE)
    weight = jnp.exp(scores - stats_ref[:1])
    d_value[...] += dot(weight.astype(d_out.dtype), d_out, (1, 0))
    d_weight = dot(v_ref[...], d_out, (1, 1))
    d_scores = plan.scale * weight * (d_weight - stats_ref[1:])
    d_key[...] += dot(d_scores.astype(query.dtype), query, (1, 0))

  @pl.when((p == steps - 1) | (block_of(jnp.minimum(p + 1, steps - 1)) != block))
  def _():
    d_k_ref[...] = d_key[...].astype(d_k_ref.dtype)
    d_v_ref[...] = d_value[...].astype(d_v_ref.dtype)
