"""Attention over a table of key blocks per tile of queries, with a gradient, and its router."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels.common import dispatch
from kernels.tls_attention import block_chunked, block_pallas_tpu, block_reference
from kernels.tls_attention.block_lists import own_blocks

Array = jax.Array
IMPLEMENTATIONS = {'reference': block_reference.block_attention,
                   'chunked': block_chunked.block_attention,
                   'pallas_tpu': block_pallas_tpu.block_attention}
_DEFAULT = {'tpu': ('pallas_tpu', 'chunked')}


def block_attention(query: Array, key: Array, value: Array, table: Array, *, block: int,
                    query_tile: int = 128, budget: Array | int | None = None,
                    segment_ids: Array | None = None, scale: float | None = None,
                    implementation: str | Sequence[str] | None = None) -> Array:
  """Causal softmax attention over the key blocks that the table lists, [B, T, HQ, V].

  query [B, T, HQ, K], key [B, T, HK, K], value [B, T, HK, V]; table i32[B, HQ or HK,
  ceil(T / query_tile), M] in order of rank, none = NB = ceil(T / block), such as `route` makes.
  Entries of rank < `budget` count, i32[] or i32[B], which may be traced (None = M): no shape
  depends on it, and the work falls with it. The blocks that a tile lies in are always seen, listed
  or not, so that no query is without keys and only they need the causal mask; an entry that repeats
  another, or does not end before them, takes a rank and adds nothing.

  Queries see keys of their own segment (segment_ids i32[B, T], 0 = padding: output and gradients 0,
  values never read). scale defaults to K ** -0.5. Gradients go to query, key and value alone.
  `implementation` is reference, chunked or pallas_tpu, None the fastest that can run here. Raises
  ValueError naming every argument that does not fit, NotImplementedError where a named
  implementation cannot run. arXiv 2502.13189; a traced budget as 2604.13847 needs it.
  """
  _check(query, key, value, table, block, query_tile, budget, segment_ids)
  batch, time, _, width = query.shape
  if segment_ids is None:
    segment_ids = jnp.ones((batch, time), jnp.int32)
  else:
    query, key, value = (jnp.where((segment_ids != 0)[..., None, None], x, 0)
                         for x in (query, key, value))
  budget = jnp.broadcast_to(jnp.asarray(table.shape[3] if budget is None else budget), (batch,))
  default = _DEFAULT.get(dispatch.platform(), ('chunked',))
  return dispatch.run(
    'block_attention', IMPLEMENTATIONS, implementation, default, query, key, value, table,
    block=block, query_tile=query_tile, budget=budget, segment_ids=segment_ids,
    scale=width ** -0.5 if scale is None else scale)


def block_means(key: Array, segment_ids: Array | None = None, *, block: int) -> Array:
  """Mean key of each block, f32[B, NB, HK, K] of [B, T, HK, K]; 0 where all is padding.

  Over the tokens of the last segment in the block: whoever sees the block from behind is of it.
  """
  ids = _ids(segment_ids, key, block)
  counts = (ids == _edge_ids(segment_ids, ids, -1)[..., None]) & (ids != 0)
  return _mean(_cut(key, block), counts)


def route(query: Array, means: Array, *, block: int, top: int, query_tile: int = 128,
          segment_ids: Array | None = None, reduce: str = 'mean', per_key_head: bool = False
          ) -> tuple[Array, Array]:
  """(table i32[B, H, Tq, top] for `block_attention`, scores f32[B, H, Tq, NB]) of MoBA's router.

  The score of a query for a block is q . mean; of a tile its mean or, by `reduce`, its maximum over
  the queries; H = HQ, or with `per_key_head` HK, the mean over the query heads. The blocks that a
  tile lies in rank first, then those before them in its segment by score, ties by the lowest index;
  the scores of all others, its own too, are -inf. Where a tile has two segments, its first decides:
  the second cannot see an earlier block. query [B, T, HQ, K], means by `block_means`. Exact MoBA:
  query_tile = 1. No gradient. Raises ValueError on what does not fit. arXiv 2502.13189.
  """
  _check_route(query, means, block, top, query_tile, segment_ids, reduce)
  query, means = lax.stop_gradient((query, means))
  batch, time, heads, _ = query.shape
  blocks, key_heads = means.shape[1:3]
  tiles = _cut(query, query_tile)
  tiles = tiles.reshape(*tiles.shape[:3], key_heads, heads // key_heads, -1)
  ids = _ids(segment_ids, query, query_tile)
  mine = _edge_ids(segment_ids, ids, 1)
  theirs = _edge_ids(segment_ids, _ids(segment_ids, query, block), -1)
  counts = (ids == mine[..., None]) & (mine != 0)[..., None]
  if reduce == 'mean':
    scores = _products(_mean(tiles, counts), means)
  else:
    scores = _largest(tiles, counts, means)
  if per_key_head:
    scores = jnp.mean(scores, axis=2, keepdims=True)
  scores = scores.reshape(batch, -1, *scores.shape[3:])
  number, first = jnp.arange(blocks), jnp.arange(tiles.shape[1]) * query_tile // block
  seen = (number < first[:, None]) & (mine[..., None] == theirs[:, None])
  seen &= (mine != 0)[..., None]
  scores = jnp.where(seen[:, None], scores, -jnp.inf)
  return _ranked(scores, first, own_blocks(query_tile, block), top), scores


def _mean(x: Array, counts: Array) -> Array:
  """Mean over axis 2 of [B, N, W, ...], in float32, of what bool[B, N, W] marks."""
  counts = counts.reshape(*counts.shape, *(1,) * (x.ndim - 3))
  total = jnp.sum(jnp.where(counts, x, 0), axis=2, dtype=jnp.float32)
  return total / jnp.maximum(jnp.sum(counts, axis=2), 1)


def _products(query: Array, means: Array) -> Array:
  """f32[B, HK, G, N, NB] of [B, N, HK, G, K] and [B, NB, HK, K]."""
  return jnp.einsum('bnhgk,bjhk->bhgnj', query.astype(jnp.float32), means,
                    precision=lax.Precision.HIGHEST)


def _largest(tiles: Array, counts: Array, means: Array) -> Array:
  """As `_products` of [B, N, W, HK, G, K]: the largest over W, one tile at a time."""
  def one(args):
    queries, counted = args  # [B, W, HK, G, K], bool[B, W]
    found = _products(queries, means)
    return jnp.max(jnp.where(counted[:, None, None, :, None], found, -jnp.inf), axis=3)

  found = lax.map(one, (jnp.moveaxis(tiles, 1, 0), jnp.moveaxis(counts, 1, 0)))
  return jnp.moveaxis(found, 0, 3)


def _cut(x: Array, size: int) -> Array:
  """[B, N, size, ...] of [B, T, ...], zeros behind."""
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))
  return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _ids(segment_ids: Array | None, like: Array, size: int) -> Array:
  """Segment ids of the tokens of [B, T, ...], cut; 0 = padding."""
  return _cut(jnp.ones(like.shape[:2], jnp.int32) if segment_ids is None else segment_ids, size)


def _edge_ids(segment_ids: Array | None, ids: Array, way: int) -> Array:
  """First (way 1) or last (way -1) of ids[B, N, W] that is not 0, or 0."""
  if segment_ids is None:  # every piece has a token; the compiler would search constants for it
    return jnp.ones(ids.shape[:2], jnp.int32)
  ids = ids[..., ::way]
  at = jnp.argmax(ids != 0, axis=-1, keepdims=True)
  return jnp.take_along_axis(ids, at, axis=-1)[..., 0]


def _ranked(scores: Array, first: Array, own: int, top: int) -> Array:
  """The own blocks first[t] .. first[t] + own - 1, then those of the largest scores; NB = none."""
  blocks = scores.shape[-1]
  found, at = lax.top_k(scores, min(top - own, blocks))
  at = jnp.where(found > -jnp.inf, at, blocks)
  mine = jnp.minimum(first[:, None] + jnp.arange(own), blocks)
  table = jnp.concatenate([jnp.broadcast_to(mine, (*at.shape[:3], own)), at], axis=-1)
  rest = ((0, 0),) * 3 + ((0, top - table.shape[-1]),)
  return jnp.pad(table, rest, constant_values=blocks).astype(jnp.int32)


def _problems_of_sizes(block, query_tile) -> list[str]:
  wrong = []
  if block < 8 or block % 8:
    wrong.append(f'block must be a multiple of 8, got {block}')
  if query_tile < 1 or block > 0 and block % query_tile and query_tile % block:
    wrong.append(f'query_tile must divide block = {block} or be a multiple of it, got {query_tile}')
  return wrong


def _problems_of_ids(segment_ids, batch, time) -> list[str]:
  if segment_ids is None or (segment_ids.shape == (batch, time) and
                             jnp.issubdtype(segment_ids.dtype, jnp.integer)):
    return []
  return [f'segment_ids {segment_ids.dtype}{segment_ids.shape}, expected int32{(batch, time)}']


def _check(query, key, value, table, block, query_tile, budget, segment_ids) -> None:
  if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
    raise ValueError(f'block_attention: query {query.shape}, key {key.shape} and value '
                     f'{value.shape} must be [batch, time, heads, size]')
  batch, time, heads, size = query.shape
  key_heads = key.shape[2]
  wrong = _problems_of_sizes(block, query_tile)
  if key.shape != (batch, time, key_heads, size) or not key_heads or heads % key_heads:
    wrong.append(f'key {key.shape}, expected ({batch}, {time}, HK, {size}) with HK a divisor of '
                 f'HQ = {heads}')
  if value.shape[:3] != key.shape[:3]:
    wrong.append(f'value {value.shape}, expected {key.shape[:3]} as key')
  for name, x in (('key', key), ('value', value)):
    if x.dtype != query.dtype:
      wrong.append(f'{name} {x.dtype}, expected {query.dtype} as query')
  if not jnp.issubdtype(query.dtype, jnp.floating):
    wrong.append(f'query {query.dtype}, expected a floating dtype')
  if not wrong:
    tiles = -(-time // query_tile)
    fits = (table.ndim == 4 and table.shape[0] == batch and table.shape[1] in (heads, key_heads)
            and table.shape[2] == tiles and table.shape[3] > 0)
    if not fits or not jnp.issubdtype(table.dtype, jnp.integer):
      wrong.append(f'table {table.dtype}{table.shape}, expected int32({batch}, HQ = {heads} or '
                   f'HK = {key_heads}, {tiles}, M) with M at least 1')
  wrong += _problems_of_budget(budget, batch) + _problems_of_ids(segment_ids, batch, time)
  if wrong:
    raise ValueError('block_attention: ' + '; '.join(wrong))


def _problems_of_budget(budget, batch: int) -> list[str]:
  """A value is checked only where it is at hand."""
  if budget is None:
    return []
  known = not isinstance(budget, jax.core.Tracer)
  given = np.asarray(budget) if known else budget
  if given.shape not in ((), (batch,)) or not jnp.issubdtype(given.dtype, jnp.integer):
    return [f'budget {given.dtype}{given.shape}, expected int32() or int32({batch},)']
  if known and given.size and given.min() < 1:
    return [f'budget must be at least 1, got {given.min()}']
  return []


def _check_route(query, means, block, top, query_tile, segment_ids, reduce) -> None:
  if query.ndim != 4 or means.ndim != 4:
    raise ValueError(f'route: query {query.shape} must be [batch, time, heads, size], means '
                     f'{means.shape} [batch, blocks, key heads, size]')
  batch, time, heads, size = query.shape
  wrong = _problems_of_sizes(block, query_tile)
  if not wrong:
    blocks, own = -(-time // block), own_blocks(query_tile, block)
    shape = (batch, blocks, means.shape[2], size)
    if means.shape != shape or not means.shape[2] or heads % means.shape[2]:
      wrong.append(f'means {means.shape}, expected ({batch}, {blocks}, HK, {size}) with HK a '
                   f'divisor of HQ = {heads}')
    if top < own:
      wrong.append(f'top must be at least {own}, the blocks of a tile itself, got {top}')
  if reduce not in ('mean', 'max'):
    wrong.append(f"reduce must be 'mean' or 'max', got {reduce!r}")
  wrong += _problems_of_ids(segment_ids, batch, time)
  if wrong:
    raise ValueError('route: ' + '; '.join(wrong))
