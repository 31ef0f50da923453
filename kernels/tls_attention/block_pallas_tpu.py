"""Block-table attention on TPU: a grid step is one entry of a list, whose block the table names.

The tables are scalars, known before the steps run. An entry that does not count repeats the block
of the one before it, so that nothing is fetched, and is skipped. `forward` and `d_query` walk over
the lists of the tiles; `d_key_value` over the same pairs in the order of the blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.common import dispatch
from kernels.tls_attention import block_lists, block_tpu_bodies
from kernels.tls_attention.block_lists import Facts, Plan

Array = jax.Array
LANES = 128
MOST_ROWS = 1024  # of a list: its scores and their gradients stay in VMEM
VMEM_LIMIT = 60 * 2**20  # below the memory of every generation
TABLE_BYTES = 2**19  # of a table of scalars; they have 1 MiB


def block_attention(query: Array, key: Array, value: Array, table: Array, *, block: int,
                    query_tile: int, budget: Array, segment_ids: Array, scale: float,
                    interpret: bool | None = None) -> Array:
  """Arguments as `block_table.block_attention` prepares them.

  `interpret` runs the kernels as XLA operations, by default False: then only a TPU can run them.
  Raises NotImplementedError where they cannot run.
  """
  interpret = dispatch.require('tpu', interpret, query.dtype)
  least = 16 if query.dtype == jnp.bfloat16 else 8
  for name, size in (('query_tile', query_tile), ('block', block)):
    if size % least:
      raise NotImplementedError(f'{name}={size}: a multiple of {least} is needed')
  plan = block_lists.make_plan(query, key, table, block=block, tile=query_tile, scale=scale,
                               most_rows=MOST_ROWS)
  _rows_of_a_call(1, plan.lists * plan.tiles * plan.entries)
  out = _run(plan, interpret, block_lists.lay_queries(plan, query),
             block_lists.lay_keys(plan, key), block_lists.lay_keys(plan, value),
             block_lists.lay_entries(plan, table, budget),
             block_lists.lay_facts(plan, segment_ids))
  return block_lists.unlay_queries(plan, out, query.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(plan: Plan, interpret: bool, *args):
  return _forward(plan, interpret, *args)[0]


def _save(plan: Plan, interpret: bool, *args):
  out, log_sum = _forward(plan, interpret, *args)
  return out, (args, out, log_sum)


def by_tile(plan: Plan, entries: Array) -> Array:
  """Steps of the walk over tiles, i32[B * HK * L, Tq * E]: a block, or -1 - the block before."""
  live = entries < plan.blocks
  last = lax.cummax(jnp.where(live, jnp.arange(plan.entries), 0), axis=4)
  held = jnp.take_along_axis(entries, last, axis=4)
  return jnp.where(live, held, -1 - held).reshape(-1, plan.tiles * plan.entries)


def by_block(plan: Plan, entries: Array) -> Array:
  """Steps of the walk over blocks, i32[B * HK, L * Tq * E] in rising order of the blocks.

  A step is block << item_bits | list * Tq + tile; behind the last one that counts stands -1 - it.
  Every block has a step: the tiles that lie in it.
  """
  item = jnp.arange(plan.lists * plan.tiles).reshape(plan.lists, plan.tiles, 1)
  steps = (entries << item_bits(plan)) | item
  none = jnp.iinfo(jnp.int32).max
  steps = jnp.where(entries < plan.blocks, steps, none).reshape(plan.batch * plan.key_heads, -1)
  steps = lax.sort(steps, dimension=1, is_stable=False)
  last = jnp.max(jnp.where(steps < none, steps, 0), axis=1, keepdims=True)
  return jnp.where(steps < none, steps, -1 - last)


def item_bits(plan: Plan) -> int:
  return (plan.lists * plan.tiles - 1).bit_length()


class _Places(NamedTuple):
  """(row of the grid, steps, base and table) -> which block of an array a step works on."""

  row: Callable  # of the batch's key heads and lists
  item: Callable  # list and tile, or tile
  block: Callable


def _tile_places(plan: Plan) -> _Places:
  def block(x, t, j, base, table):
    step = table[(x * plan.tiles + t) * plan.entries + j]
    return step ^ (step >> 31)
  return _Places(lambda x, t, j, base, table: base[0] + x, lambda x, t, *_: t, block)


def _block_places(plan: Plan) -> _Places:
  steps = plan.lists * plan.tiles * plan.entries

  def step(x, p, table):
    found = table[x * steps + p]
    return found ^ (found >> 31)
  return _Places(lambda x, p, base, table: base[0] + x,
                 lambda x, p, base, table: step(x, p, table) & ((1 << item_bits(plan)) - 1),
                 lambda x, p, base, table: step(x, p, table) >> item_bits(plan))


def _specs(plan: Plan, places: _Places, per_key_head: int):
  """(rows, keys, facts of rows, facts of keys): specs by size; `per_key_head` rows of the grid."""
  def spec(shape, *index):
    return pl.BlockSpec((None, None, *shape), lambda *a: (*(f(*a) for f in index), 0, 0))

  def head(*a):
    return lax.div(places.row(*a), per_key_head)

  def batch(*a):
    return lax.div(places.row(*a), per_key_head * plan.key_heads)

  def tile(*a):
    return lax.rem(places.item(*a), plan.tiles)

  return (lambda size: spec((plan.rows, size), places.row, places.item),
          lambda size: spec((plan.block, size), head, places.block),
          lambda count: spec((count, plan.rows), places.row, places.item),
          [spec((2, plan.rows), batch, tile), spec((1, plan.block), batch, places.block)])


def _facts(facts: Facts) -> list[Array]:
  """i32[B, Tq, 2, R], ids and positions of the rows, and i32[B, NB, 1, block]."""
  at = jnp.broadcast_to(facts.row_at, facts.row_ids.shape)
  return [jnp.stack([facts.row_ids, at], axis=2), facts.key_ids[:, :, None]]


def _rows_of_a_call(rows: int, steps: int) -> int:
  """Rows of the grid whose table fits beside the scalars of a kernel."""
  if 4 * steps > TABLE_BYTES:
    raise NotImplementedError(f'{steps} table entries for a key head, at most {TABLE_BYTES // 4}')
  return max(n for n in range(1, rows + 1) if rows % n == 0 and 4 * n * steps <= TABLE_BYTES)


def _call(plan: Plan, interpret: bool, body, name: str, grid, table, operands, in_specs, outs,
          scratch, cost):
  """`outs` are (shape, dtype, spec), the shape without the rows; several calls for a long table."""
  rows, steps = table.shape
  count = _rows_of_a_call(rows, steps)
  kernel = pl.pallas_call(
    functools.partial(body, plan), name=name, interpret=interpret, cost_estimate=cost(count),
    out_shape=[jax.ShapeDtypeStruct((count, *shape), dtype) for shape, dtype, _ in outs],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(count, *grid), in_specs=in_specs,
      out_specs=[spec for *_, spec in outs], scratch_shapes=scratch),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',) * len(grid) + ('arbitrary',),
      vmem_limit_bytes=VMEM_LIMIT))
  if count == rows:
    return kernel(jnp.zeros(1, jnp.int32), table.reshape(-1), *operands)
  found = lax.map(lambda part: kernel(*part, *operands), (
    jnp.arange(0, rows, count, dtype=jnp.int32)[:, None], table.reshape(-1, count * steps)))
  return [x.reshape(rows, *x.shape[2:]) for x in found]


def _out_spec(shape, index):
  return pl.BlockSpec((None, None, *shape), index)


def _flat(x: Array, axes: int) -> Array:
  """The first axes as one."""
  return x.reshape(-1, *x.shape[axes:])


def _columns(plan: Plan, count: int, dtype):
  return [pltpu.VMEM((plan.rows, LANES), dtype)] * count


def _forward(plan: Plan, interpret: bool, query, key, value, entries, facts: Facts):
  """(out [B, HK, L, Tq, R, V], log of the sum of e^score f32[B, HK, L, Tq, 1, R])."""
  rows, keys, _, fact_specs = _specs(plan, _tile_places(plan), plan.lists)
  width, size = query.shape[-1], value.shape[-1]
  here = lambda x, t, *_: (x, t, 0, 0)
  out, log_sum = _call(
    plan, interpret, block_tpu_bodies.forward_body, 'block_attention_forward',
    (plan.tiles, plan.entries), by_tile(plan, entries),
    [_flat(query, 3), _flat(key, 2), _flat(value, 2), *_facts(facts)],
    [rows(width), keys(width), keys(size), *fact_specs],
    [((plan.tiles, plan.rows, size), value.dtype, _out_spec((plan.rows, size), here)),
     ((plan.tiles, 1, plan.rows), jnp.float32, _out_spec((1, plan.rows), here))],
    [*_columns(plan, 2, jnp.int32), *_columns(plan, 2, jnp.float32),
     pltpu.VMEM((plan.rows, size), jnp.float32)],
    functools.partial(_cost, plan, query, value, width + size, plan.lists))
  return tuple(x.reshape(*query.shape[:4], *x.shape[2:]) for x in (out, log_sum))


def _backward(plan: Plan, interpret: bool, saved, d_out: Array):
  (query, key, value, entries, facts), out, log_sum = saved
  own = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[..., None, :]
  stats = jnp.concatenate([log_sum, own], axis=-2)
  width, size = query.shape[-1], value.shape[-1]
  keys_values, facts = [_flat(key, 2), _flat(value, 2)], _facts(facts)
  rows, keys, row_facts, fact_specs = _specs(plan, _tile_places(plan), plan.lists)
  d_query, = _call(
    plan, interpret, block_tpu_bodies.d_query_body, 'block_attention_d_query',
    (plan.tiles, plan.entries), by_tile(plan, entries),
    [_flat(query, 3), *keys_values, _flat(d_out, 3), _flat(stats, 3), *facts],
    [rows(width), keys(width), keys(size), rows(size), row_facts(2), *fact_specs],
    [((plan.tiles, plan.rows, width), query.dtype,
      _out_spec((plan.rows, width), lambda x, t, *_: (x, t, 0, 0)))],
    [*_columns(plan, 2, jnp.int32), *_columns(plan, 2, jnp.float32),
     pltpu.VMEM((plan.rows, width), jnp.float32)],
    functools.partial(_cost, plan, query, value, 2 * width + size, plan.lists))
  items = lambda x: _flat(x, 2).reshape(-1, plan.lists * plan.tiles, *x.shape[4:])
  places = _block_places(plan)
  rows, keys, row_facts, fact_specs = _specs(plan, places, 1)
  here = lambda x, *a: (x, places.block(x, *a), 0, 0)
  d_key, d_value = _call(
    plan, interpret, block_tpu_bodies.d_key_value_body, 'block_attention_d_key_value',
    (plan.lists * plan.tiles * plan.entries,), by_block(plan, entries),
    [items(query), *keys_values, items(d_out), items(stats), *facts],
    [rows(width), keys(width), keys(size), rows(size), row_facts(2), *fact_specs],
    [((plan.blocks, plan.block, n), x.dtype, _out_spec((plan.block, n), here))
     for x, n in ((key, width), (value, size))],
    [pltpu.VMEM((plan.block, LANES), jnp.int32), pltpu.VMEM((plan.block, width), jnp.float32),
     pltpu.VMEM((plan.block, size), jnp.float32)],
    functools.partial(_cost, plan, query, value, 2 * (width + size), 1))
  return (d_query.reshape(query.shape), d_key.reshape(key.shape), d_value.reshape(value.shape),
          None, Facts(None, None, None))


_run.defvjp(_save, _backward)


def _cost(plan: Plan, query: Array, value: Array, widths: int, split: int, rows: int):
  """Roofline of a call when every entry counts: `widths` channels of products for a score."""
  scores = rows * plan.lists // split * plan.tiles * plan.entries * plan.rows * plan.block
  moved = (query.shape[-1] + value.shape[-1]) * query.dtype.itemsize
  return pl.CostEstimate(flops=2 * scores * widths, transcendentals=scores,
                         bytes_accessed=scores // plan.rows * moved)
