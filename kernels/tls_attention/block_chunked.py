"""Block-table attention as XLA operations: tile after tile, the blocks of its list a few at a time.

Only entries that count are visited: the number of turns is data, so the cost falls with the budget.
The backward computes the scores again and adds to the gradients of the blocks where they lie.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels.tls_attention import block_lists
from kernels.tls_attention.block_lists import Facts, Plan

Array = jax.Array
KEYS = 256  # of a turn, at least one block
LEVELS = 8  # turns of a whole list at least, where it has so many entries: steps of the cost
QUERIES = 128  # of a head in a step, at least one tile
GATHERED = 1 << 22  # floats of keys that a turn may hold
NONE = -1e30  # score of a key that is not seen
LOWEST = -1e20  # smaller than any score; e^(NONE - LOWEST) = 0


def block_attention(query: Array, key: Array, value: Array, table: Array, *, block: int,
                    query_tile: int, budget: Array, segment_ids: Array, scale: float) -> Array:
  """Arguments as `block_table.block_attention` prepares them."""
  plan = block_lists.make_plan(query, key, table, block=block, tile=query_tile, scale=scale)
  out = _run(plan, block_lists.lay_queries(plan, query), block_lists.lay_keys(plan, key),
             block_lists.lay_keys(plan, value), block_lists.lay_entries(plan, table, budget),
             block_lists.lay_facts(plan, segment_ids))
  return block_lists.unlay_queries(plan, out, query.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan: Plan, query, key, value, entries, facts: Facts):
  return _forward(plan, query, key, value, entries, facts)[0]


def _save(plan: Plan, *args):
  out, log_sum = _forward(plan, *args)
  return out, (args, out, log_sum)


def _einsum(rule: str, a: Array, b: Array) -> Array:
  """In float32: exact products of bfloat16, six passes of float32 on TPU."""
  precision = lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
  return jnp.einsum(rule, a, b, precision=precision,
                    preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _sizes(plan: Plan, width: int) -> tuple[int, int]:
  """(tiles of a step, entries of a turn)."""
  turn = min(max(KEYS // plan.block, 1), -(-plan.entries // LEVELS))
  one = plan.batch * plan.key_heads * plan.lists * turn * plan.block * width
  return max(min(QUERIES // plan.tile, GATHERED // one, plan.tiles), 1), turn


def _steps(plan: Plan, x: Array, tiles: int, fill=0) -> Array:
  """[steps, B, HK, L * tiles, ...] of [B, HK, L, Tq, ...]."""
  pad = -plan.tiles % tiles
  x = jnp.pad(x, ((0, 0),) * 3 + ((0, pad),) + ((0, 0),) * (x.ndim - 4), constant_values=fill)
  x = x.reshape(*x.shape[:3], -1, tiles, *x.shape[4:])
  x = jnp.moveaxis(x, 3, 0)
  return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _unstep(plan: Plan, x: Array) -> Array:
  """Inverse of _steps."""
  x = x.reshape(*x.shape[:3], plan.lists, -1, *x.shape[4:])
  x = jnp.moveaxis(x, 0, 3)
  return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :plan.tiles]


def _work(plan: Plan, width: int, entries: Array, facts: Facts):
  """What both directions walk over: (entries, ids and positions of rows, turns) per step."""
  tiles, turn = _sizes(plan, width)
  entries = jnp.pad(entries, ((0, 0),) * 4 + ((0, -plan.entries % turn),),
                    constant_values=plan.blocks)
  entries = _steps(plan, entries, tiles, plan.blocks)
  used = jnp.where(entries < plan.blocks, jnp.arange(entries.shape[-1]) // turn + 1, 0)
  shape = plan.lists, plan.tiles, plan.rows
  ids = jnp.broadcast_to(facts.row_ids[:, None, None], (plan.batch, 1, *shape))
  at = jnp.broadcast_to(facts.row_at, (1, 1, *shape))
  return entries, _steps(plan, ids, tiles, -1), _steps(plan, at, tiles), jnp.max(
    used, axis=(1, 2, 3, 4))


def _cut(plan: Plan, x: Array, entries: Array) -> Array:
  """The blocks [B, HK, lists, turn * block, D] of [B, HK, NB, block, D]."""
  index = jnp.minimum(entries, plan.blocks - 1).reshape(*entries.shape[:2], -1, 1, 1)
  return jnp.take_along_axis(x, index, axis=2).reshape(*entries.shape[:3], -1, x.shape[-1])


def _scores(plan: Plan, query: Array, keys: Array, entries: Array, ids: Array, at: Array,
            key_ids: Array) -> Array:
  """scale q . k of the rows of each list and the keys of its blocks, NONE where not seen."""
  rows = jnp.arange(plan.batch)[:, None, None, None]
  theirs = key_ids[rows, jnp.minimum(entries, plan.blocks - 1)]
  where = entries[..., None] * plan.block + jnp.arange(plan.block)  # an absent block lies behind
  theirs, where = (x.reshape(*x.shape[:3], 1, -1) for x in (theirs, where))
  seen = (where <= at[..., None]) & (theirs == ids[..., None])
  return jnp.where(seen, plan.scale * _einsum('bhlrk,bhlsk->bhlrs', query, keys), NONE)


def _forward(plan: Plan, query, key, value, entries, facts: Facts):
  """(out [B, HK, L, Tq, R, V], log of the sum of e^score f32[B, HK, L, Tq, R])."""
  tiles, turn = _sizes(plan, query.shape[-1])
  entries, ids, at, turns = _work(plan, query.shape[-1], entries, facts)

  def step(_, xs):
    q, listed, ids, at, count = xs

    def visit(i, carry):
      top, total, acc = carry
      now = lax.dynamic_slice_in_dim(listed, i * turn, turn, axis=3)
      scores = _scores(plan, q, _cut(plan, key, now), now, ids, at, facts.key_ids)
      best = jnp.maximum(top, jnp.max(scores, axis=-1))
      weight, fade = jnp.exp(scores - best[..., None]), jnp.exp(top - best)
      acc = acc * fade[..., None] + _einsum(
        'bhlrs,bhlsv->bhlrv', weight.astype(value.dtype), _cut(plan, value, now))
      return best, total * fade + jnp.sum(weight, axis=-1), acc

    wide = jnp.promote_types(q.dtype, jnp.float32)
    start = (jnp.full(q.shape[:-1], LOWEST, wide), jnp.zeros(q.shape[:-1], wide),
             jnp.zeros((*q.shape[:-1], value.shape[-1]), wide))
    top, total, acc = lax.fori_loop(0, count, visit, start)
    total = jnp.where(total > 0, total, 1)  # a row without keys: the output is 0
    return None, ((acc / total[..., None]).astype(value.dtype), top + jnp.log(total))

  _, (out, log_sum) = lax.scan(step, None, (_steps(plan, query, tiles), entries, ids, at, turns))
  return _unstep(plan, out), _unstep(plan, log_sum)


def _backward(plan: Plan, saved, d_out: Array):
  (query, key, value, entries, facts), out, log_sum = saved
  tiles, turn = _sizes(plan, query.shape[-1])
  entries, ids, at, turns = _work(plan, query.shape[-1], entries, facts)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  own = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)
  rows, heads = jnp.arange(plan.batch)[:, None, None], jnp.arange(plan.key_heads)[:, None]

  def add(total, blocks, x):  # a block that is absent is dropped
    x = x.reshape(*blocks.shape[:2], -1, *total.shape[3:])
    return total.at[rows, heads, blocks.reshape(*blocks.shape[:2], -1)].add(x, mode='drop')

  def step(carry, xs):
    q, d_o, log_sum, own, listed, ids, at, count = xs

    def visit(i, carry):
      d_q, d_key, d_value = carry
      now = lax.dynamic_slice_in_dim(listed, i * turn, turn, axis=3)
      keys = _cut(plan, key, now)
      scores = _scores(plan, q, keys, now, ids, at, facts.key_ids)
      weight = jnp.exp(scores - log_sum[..., None])
      d_weight = _einsum('bhlrv,bhlsv->bhlrs', d_o, _cut(plan, value, now))
      d_scores = (plan.scale * weight * (d_weight - own[..., None])).astype(q.dtype)
      d_q = d_q + _einsum('bhlrs,bhlsk->bhlrk', d_scores, keys)
      d_key = add(d_key, now, _einsum('bhlrs,bhlrk->bhlsk', d_scores, q))
      d_value = add(d_value, now, _einsum('bhlrs,bhlrv->bhlsv', weight.astype(d_o.dtype), d_o))
      return d_q, d_key, d_value

    d_q, *carry = lax.fori_loop(0, count, visit, (jnp.zeros(q.shape, wide), *carry))
    return tuple(carry), d_q.astype(q.dtype)

  xs = [_steps(plan, x, tiles) for x in (query, d_out, log_sum, own)]
  start = jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide)
  (d_key, d_value), d_q = lax.scan(step, start, (*xs, entries, ids, at, turns))
  return (_unstep(plan, d_q), d_key.astype(key.dtype), d_value.astype(value.dtype), None,
          Facts(None, None, None))


_run.defvjp(_save, _backward)
