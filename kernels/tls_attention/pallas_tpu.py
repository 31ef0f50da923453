"""Levels two and three as TPU kernels, which read the candidate blocks and nothing else of a cache.

The bodies of the kernels are in `tpu_bodies`. Tables of what to fetch lie in scalar memory, for as
many rows of the batch at once as fit there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.common import dispatch
from kernels.tls_attention import levels, select, shapes, tpu_bodies
from kernels.tls_attention.config import Array, Config, Labels
from kernels.tls_attention.tpu_bodies import LANES, in_hbm

TOKENS = 1024  # per grid step at most: a step costs a third of a microsecond of its own
ROWS = 128  # rows of a cache in flight, each by a copy of its own
TABLE_BYTES = 512 * 2**10  # of the 1 MiB of scalar memory
PAGE_BYTES = 4 * 2**20  # of the 16 MiB of vector memory that a kernel has on v5e and v5p


def token_scores(q: Array, labels: Labels, channels: Array, candidates: Array, length: Array,
                 config: Config, scale: float, interpret=None) -> Array:
  """As `chunked.token_scores`, f32[B, HK, C].

  `interpret` runs the kernel as XLA operations, by default False: then only a TPU can run it.
  Raises NotImplementedError where it cannot run.
  """
  dispatch.require('tpu', interpret, q.dtype)
  rows, heads, _, room = labels.codes.shape
  _require_tiles(config, room)
  unit = min(config.block, LANES)
  index = jnp.minimum(candidates, room // config.block - 1)
  index = index[..., None] * (config.block // unit) + jnp.arange(config.block // unit)
  size = min(TOKENS, max(LANES, pl.next_power_of_2(config.candidates)))
  index = _padded(index.reshape(rows, heads, -1), size // unit)
  steps = index.shape[2] * unit // size
  query = levels.label_query(q, channels) * scale
  group = query.shape[2]
  query = jnp.pad(query, ((0, 0), (0, 0), (0, -group % 8), (0, 0)))

  def call(first, table):
    count, width = table.shape[0], labels.codes.shape[2]
    buffers = [pltpu.VMEM((2, size // unit, width, LANES), jnp.uint8),
               *[pltpu.VMEM((2, size // unit, LANES), jnp.float32)] * 2,
               pltpu.SemaphoreType.DMA((2,))]
    plan = tpu_bodies.Labels(unit, size // unit, first)
    return _call(
      functools.partial(tpu_bodies.label_body, plan), 'tls_labels', (count, heads, steps),
      [table], [query, *in_hbm(interpret, labels.codes, labels.scale, labels.zero)],
      [_per_head(query, first), *[pl.BlockSpec(memory_space=pl.ANY)] * 3],
      pl.BlockSpec((1, 1, group, size), lambda b, h, s, *_: (b, h, 0, s)),
      jax.ShapeDtypeStruct((count, heads, group, steps * size), jnp.float32), buffers,
      shapes.label_cost(count * heads, group, steps * size, 2 * width, unit), interpret)

  found = _sliced(call, index)[..., :config.candidates]
  _, real = levels.token_positions(candidates, length, config)
  return levels.reduce_heads(found, real, config)


def attend(q: Array, key: Array, value: Array | int | None, pages: Array, scores: Array,
           config: Config, scale: float, interpret=None) -> Array:
  """As `chunked.attend`, [B, HQ, V].

  Rows are copied one by one only from packed caches, and only if there are fewer than an eighth of
  the candidates: each copy costs its own issue, and keys apart from values would need two. Else
  whole pages are copied, which hold more rows than needed but move at full bandwidth.
  """
  dispatch.require('tpu', interpret, key.dtype)
  if value is None and 8 * config.top_tokens < config.candidates:
    return _attend_rows(q, key, pages, scores, config, scale, interpret)
  return _attend_pages(q, key, value, pages, scores, config, scale, interpret)


def _attend_pages(q, key, value, pages, scores, config, scale, interpret):
  """Whole pages; the tokens that are not chosen are masked."""
  layout = 'packed' if value is None else 'latent' if isinstance(value, int) else 'apart'
  sources = [key, value] if layout == 'apart' else [key]
  lanes = _tokens_in_lanes(sources, config)
  span = max(config.block, LANES) if lanes else config.block  # rows that are read for a page
  if lanes:
    sources = [jnp.swapaxes(x, 2, 3) for x in sources]
  width = sum(x.shape[2] if lanes else math.prod(x.shape[3:]) for x in sources)
  bytes_page = span * width * key.dtype.itemsize
  per = min(TOKENS // span, PAGE_BYTES // (2 * bytes_page), pages.shape[2]) or 1
  chosen = select.in_top(scores, config.top_tokens).astype(jnp.float32)
  chosen = _spread(chosen.reshape(*pages.shape, config.block), pages, span)
  chosen = _padded(chosen, per * span).reshape(*pages.shape[:2], -1, per * span)
  steps, heads, group = chosen.shape[2], key.shape[1], q.shape[1] // key.shape[1]
  table = _repeated(pages, key.shape[2] // config.block, per) // (span // config.block)
  query, wide = _query(q, key), _value_width(key, value)

  def page(x, first, i):
    at = lambda b, h, s, table: table[((b * heads + h) * steps + s) * per + i]
    if lanes:
      return pl.BlockSpec((1, 1, x.shape[2], span), lambda b, h, s, table: (
        b + first, h, 0, at(b, h, s, table)))
    return pl.BlockSpec((1, 1, span, *x.shape[3:]), lambda b, h, s, table: (
      b + first, h, at(b, h, s, table), *[0] * (x.ndim - 3)))

  def call(first, part):
    rows = part.shape[0]
    plan = tpu_bodies.Attention(scale, wide, layout, lanes, per, first)
    return _call(
      functools.partial(tpu_bodies.page_body, plan), 'tls_pages', (rows, heads, steps), [part],
      [query, chosen, *(x for x in in_hbm(interpret, *sources) for _ in range(per))],
      [_per_head(query, first), _per_head(chosen, first),
       *(page(x, first, i) for x in sources for i in range(per))],
      pl.BlockSpec((1, 1, group, wide), lambda b, h, s, *_: (b, h, 0, 0)),
      jax.ShapeDtypeStruct((rows, heads, group, wide), key.dtype), _softmax_scratch(query, wide),
      shapes.attend_cost(rows * heads, group, part.shape[2] * span, bytes_page // span,
                         key.shape[-1] + wide), interpret)

  return _sliced(call, table).reshape(*q.shape[:2], wide)


def _tokens_in_lanes(sources: list[Array], config: Config) -> bool:
  """Whether XLA lays a cache [.., N, D] out as [.., D, N], which it does where D is not a multiple
  of 128: a kernel that wants [N, D] would get a copy of all of it."""
  dtype, room = sources[0].dtype, sources[0].shape[2]
  odd = [x.shape[-1] % LANES != 0 for x in sources]
  if not any(odd):
    least = 32 // dtype.itemsize
    if config.block % least:
      raise NotImplementedError(f'block = {config.block} is not a multiple of {least}, the rows of '
                                f'a tile of {dtype}')
    return False
  if not all(odd) or sources[0].ndim == 5:
    raise NotImplementedError(f'widths {[x.shape[-1] for x in sources]} of keys and values must be '
                              f'multiples of {LANES}, if packed or if one is')
  _require_tiles(config, room)
  return True


def _require_tiles(config: Config, room: int) -> None:
  if config.block % LANES and LANES % config.block:
    raise NotImplementedError(f'block = {config.block} neither divides {LANES} nor is a multiple')
  if room % LANES:
    raise NotImplementedError(f'N = {room} is not a multiple of {LANES}, the tokens of a tile')


def _spread(chosen: Array, pages: Array, span: int) -> Array:
  """f32[B, HK, pages * span] of tokens [B, HK, pages, block] at their places in the rows read."""
  here = span // chosen.shape[3]
  own = (pages % here)[..., None] == jnp.arange(here)
  return jnp.where(own[..., None], chosen[..., None, :], 0).reshape(*pages.shape[:2], -1)


def _attend_rows(q, key, pages, scores, config, scale, interpret):
  """Chosen rows one by one."""
  _tokens_in_lanes([key], config)
  found = select.top(scores, config.top_tokens)
  # A page number by comparing, as a TPU gathers single numbers slowly; none gives row 0.
  own = (found // config.block)[..., None] == jnp.arange(pages.shape[2])
  at = jnp.sum(jnp.where(own, pages[:, :, None], 0), axis=-1) * config.block + found % config.block
  at, counts = _padded(at, ROWS), jnp.sum(found < scores.shape[2], axis=-1, dtype=jnp.int32)
  query, wide = _query(q, key), key.shape[-1]
  heads, group = key.shape[1], q.shape[1] // key.shape[1]

  def call(first, part):
    count = part.shape[0]
    plan = tpu_bodies.Attention(scale, wide, 'packed', False, 0, first)
    scratch = [*_softmax_scratch(query, wide), pltpu.VMEM((2, ROWS, 2, wide), key.dtype),
               pltpu.SemaphoreType.DMA((2,))]
    bytes_row = 2 * wide * key.dtype.itemsize
    return _call(
      functools.partial(tpu_bodies.row_body, plan), 'tls_rows',
      (count, heads, part.shape[2] // ROWS), [part, counts[first:first + count]],
      [query, *in_hbm(interpret, key)],
      [_per_head(query, first), pl.BlockSpec(memory_space=pl.ANY)],
      pl.BlockSpec((1, 1, group, wide), lambda b, h, s, *_: (b, h, 0, 0)),
      jax.ShapeDtypeStruct((count, heads, group, wide), key.dtype), scratch,
      shapes.attend_cost(count * heads, group, part.shape[2], bytes_row, 2 * wide), interpret)

  return _sliced(call, at).reshape(*q.shape[:2], wide)


def _call(body, name, grid, tables, operands, in_specs, out_specs, out_shape, scratch, cost,
          interpret) -> Array:
  return pl.pallas_call(
    body, out_shape=out_shape, name=name, cost_estimate=cost, interpret=interpret or False,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(tables), grid=grid, in_specs=in_specs, out_specs=out_specs,
      scratch_shapes=scratch),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary', 'arbitrary')))(
    *(x.reshape(-1) for x in tables), *operands)


def _sliced(call: Callable, table: Array) -> Array:
  """call(first row, part of the table i32[B, HK, n]) for as many rows as scalar memory holds."""
  bytes_row = 4 * table.shape[1] * table.shape[2]
  most = TABLE_BYTES // bytes_row
  if not most:
    raise NotImplementedError(f'a table of {bytes_row} bytes per row is above {TABLE_BYTES}')
  parts = [call(first, table[first:first + most]) for first in range(0, table.shape[0], most)]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _per_head(x: Array, first: int) -> pl.BlockSpec:
  """All of [B, HK, ...] that belongs to a head."""
  return pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, h, s, *_: (b + first, h, 0, 0))


def _query(q: Array, key: Array) -> Array:
  """[B, HK, G, D] in the dtype of the keys, G padded to whole tiles."""
  query = levels.grouped(q, key.shape[1]).astype(key.dtype)
  return jnp.pad(query, ((0, 0), (0, 0), (0, -query.shape[2] % (32 // key.dtype.itemsize)), (0, 0)))


def _softmax_scratch(query: Array, wide: int):
  """Largest logit, sum of weights and sum of weighted values so far, per query head."""
  group = query.shape[2]
  return [*[pltpu.VMEM((group, LANES), jnp.float32)] * 2, pltpu.VMEM((group, wide), jnp.float32)]


def _value_width(key: Array, value: Array | int | None) -> int:
  return key.shape[-1] if value is None else value if isinstance(value, int) else value.shape[-1]


def _repeated(pages: Array, none: int, per: int) -> Array:
  """Tables i32[B, HK, steps * per] of pages, `per` a step; an absent page repeats what its place in
  the step before held, which no copy is issued for."""
  padded = _padded(pages, per, none)
  steps = padded.reshape(*padded.shape[:2], -1, per)
  held = lambda now, before: jnp.where(now < none, now, before)
  found = [held(steps[:, :, 0], 0)]
  for n in range(1, steps.shape[2]):
    found.append(held(steps[:, :, n], found[-1]))
  return jnp.stack(found, axis=2).reshape(padded.shape)


def _padded(x: Array, multiple: int, fill=0) -> Array:
  return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % multiple)), constant_values=fill)
