"""Levels two and three on NVIDIA GPUs by Triton, which read what the page table names.

A program takes one key head and a share of its pages. The rows of a page that are not chosen are
masked out of the loads, so that a page costs no more memory traffic than its chosen rows; shares
are joined afterwards. Compiled to Triton's intermediate code and run as XLA operations in tests;
not yet timed on a GPU, hence not the default there.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels.common import dispatch
from kernels.common.products import dot
from kernels.tls_attention import levels, select
from kernels.tls_attention.config import Array, Config, Labels

SMALLEST = 16  # rows, columns and inner size of a product
TILE = 64  # tokens in hand at a time, at most
COLUMNS = 128  # of a key or value in hand at a time, at most
PROGRAMS = 264  # two for each multiprocessor of an H100 or H200
NOTHING = -1e30  # logit of a token that is not chosen
LOWEST = -1e20  # smaller than any logit; e^(NOTHING - LOWEST) = 0


class Plan(NamedTuple):
  """Static facts of a call."""

  scale: float
  tile: int
  turns: int  # tiles of a program
  key: tuple[tuple[int, int], ...]  # (first, size) of the columns of a key, sizes powers of two
  value: tuple[tuple[int, int], ...]
  behind: int  # columns of a row before those of the value


def token_scores(q: Array, labels: Labels, channels: Array, candidates: Array, length: Array,
                 config: Config, scale: float, interpret: bool | None = None) -> Array:
  """As `chunked.token_scores`, f32[B, HK, C].

  `interpret` runs the kernel as XLA operations, by default False: then only a GPU can run it.
  Raises NotImplementedError where it cannot run.
  """
  interpret = dispatch.require('gpu', interpret, q.dtype)
  rows, heads, half, room = labels.codes.shape
  if half != pl.next_power_of_2(half):
    raise NotImplementedError(f'R = {2 * half} channels of a label: a power of two is needed')
  query = _padded_heads(levels.label_query(q, channels) * scale)
  tiles, size = _tiles(jnp.minimum(candidates, room // config.block - 1), config)
  number, group = tiles.shape[2], q.shape[1] // heads
  found = pl.pallas_call(
    functools.partial(_label_body, size), grid=(number, heads, rows), name='tls_labels',
    in_specs=[_per_head(tiles), _per_head(query), _per_head(labels.codes),
              _per_head(labels.scale), _per_head(labels.zero)],
    out_specs=pl.BlockSpec((None, None, query.shape[2], size), lambda n, h, b: (b, h, 0, n)),
    out_shape=jax.ShapeDtypeStruct((*query.shape[:3], number * size), jnp.float32),
    compiler_params=plt.CompilerParams(num_warps=4, num_stages=2), interpret=interpret)(
      tiles, query, *jax.tree.leaves(labels))
  _, real = levels.token_positions(candidates, length, config)
  return levels.reduce_heads(found[:, :, :group], real, config)


def attend(q: Array, key: Array, value: Array | int | None, pages: Array, scores: Array,
           config: Config, scale: float, interpret: bool | None = None) -> Array:
  """As `chunked.attend`, [B, HQ, V]."""
  interpret = dispatch.require('gpu', interpret, key.dtype)
  rows, heads, room, width = *key.shape[:3], key.shape[-1]
  sources, wide, behind = [key], value, 0  # latent: values are the first columns of the keys
  if value is None:
    sources, wide, behind = [key.reshape(rows, heads, room, 2 * width)], width, width
  elif not isinstance(value, int):
    sources, wide = [key, value], value.shape[3]
  tiles, size = _tiles(jnp.minimum(pages, room // config.block - 1), config)
  shares = min(max(PROGRAMS // (rows * heads), 1), tiles.shape[2])
  turns = -(-tiles.shape[2] // shares)
  shares = -(-tiles.shape[2] // turns)
  pad = shares * turns - tiles.shape[2]
  tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, pad)))
  chosen = select.in_top(scores, config.top_tokens).astype(jnp.int8)
  chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, pad * size)))
  query = _padded_heads(levels.grouped(q, heads).astype(key.dtype))
  plan = Plan(scale, size, turns, _columns(width), _columns(wide), behind)
  operands = [tiles, chosen, query, *sources]
  shapes = [(query.shape[2], wide), (query.shape[2],), (query.shape[2],)]
  out, top, total = pl.pallas_call(
    functools.partial(_attend_body, plan), grid=(shares, heads, rows), name='tls_attend',
    in_specs=[_per_head(x) for x in operands],
    out_specs=[_share(*shape) for shape in shapes],
    out_shape=[jax.ShapeDtypeStruct((rows, heads, shares, *shape), jnp.float32)
               for shape in shapes],
    compiler_params=plt.CompilerParams(num_warps=4, num_stages=2), interpret=interpret)(*operands)
  return _join(out, top, total)[:, :, :q.shape[1] // heads].reshape(*q.shape[:2], wide).astype(
    key.dtype)


def _join(out: Array, top: Array, total: Array) -> Array:
  """Attention over all shares: sums [B, HK, S, G, V], largest logits, sums of e^(logit - top)."""
  weight = jnp.exp(top - jnp.max(top, axis=2, keepdims=True))
  whole = jnp.sum(weight * total, axis=2)
  summed = jnp.sum(weight[..., None] * out, axis=2)
  return summed / jnp.where(whole > 0, whole, 1)[..., None]


def _tiles(pages: Array, config: Config) -> tuple[Array, int]:
  """(numbers of the pieces of the pages i32[B, HK, n], their tokens, a power of two)."""
  size = min(config.block & -config.block, TILE)
  if size < SMALLEST:
    raise NotImplementedError(f'block = {config.block}: a multiple of {SMALLEST} is needed')
  pieces = config.block // size
  tiles = pages[..., None] * pieces + jnp.arange(pieces)
  return tiles.reshape(*pages.shape[:2], -1).astype(jnp.int32), size


def _columns(width: int) -> tuple[tuple[int, int], ...]:
  """(first, size) of parts that are powers of two."""
  parts, first = [], 0
  while first < width:
    size = min(1 << ((width - first).bit_length() - 1), COLUMNS)
    parts.append((first, size))
    first += size
  if parts[-1][1] < SMALLEST:
    raise NotImplementedError(f'width {width}: a multiple of {SMALLEST} is needed')
  return tuple(parts)


def _padded_heads(query: Array) -> Array:
  """[B, HK, G, D] with the query heads of a key head padded to what a product takes."""
  group = query.shape[2]
  return jnp.pad(query, ((0, 0), (0, 0), (0, max(pl.next_power_of_2(group), SMALLEST) - group),
                         (0, 0)))


def _per_head(x: Array):
  """All of a key head of [B, HK, ...], for the grid (share, head, row)."""
  return pl.BlockSpec((None, None, *x.shape[2:]), lambda n, h, b: (b, h, *[0] * (x.ndim - 2)))


def _share(*shape: int):
  """A share of [B, HK, S, ...], for the same grid."""
  return pl.BlockSpec((None, None, None, *shape), lambda n, h, b: (b, h, n, *[0] * len(shape)))


def _label_body(size: int, tiles_ref, q_ref, codes_ref, scale_ref, zero_ref, out_ref):
  """Scores f32[G, size] of a tile of tokens by their labels."""
  tokens = pl.ds(tiles_ref[pl.program_id(0)] * size, size)
  codes, half = codes_ref[:, tokens].astype(jnp.int32), codes_ref.shape[0]
  query = q_ref[:, pl.ds(0, half)], q_ref[:, pl.ds(half, half)]
  found = sum(_small_dot(q, x.astype(jnp.float32)) for q, x in zip(query, (codes & 15, codes >> 4)))
  total = jnp.sum(query[0], axis=1) + jnp.sum(query[1], axis=1)
  out_ref[...] = found * scale_ref[tokens][None] + total[:, None] * zero_ref[tokens][None]


def _small_dot(a: Array, b: Array) -> Array:
  """[G, C] . [C, N], where C may be less than a product takes."""
  if a.shape[1] >= SMALLEST:
    return dot(a, b, (1, 0))
  return jnp.sum(a[:, :, None] * b[None], axis=1)


def _attend_body(plan: Plan, tiles_ref, chosen_ref, q_ref, *refs):
  """Running softmax over the chosen tokens of `turns` tiles: sums, largest logits, their sums."""
  *sources, out_ref, top_ref, total_ref = refs
  key_ref, value_ref = sources[0], sources[-1]
  queries = [q_ref[:, pl.ds(*part)] for part in plan.key]
  first = pl.program_id(0) * plan.turns

  def visit(i, carry):
    top, total, sums = carry
    rows = pl.ds(tiles_ref[first + i] * plan.tile, plan.tile)
    chosen = chosen_ref[pl.ds((first + i) * plan.tile, plan.tile)] != 0

    def load(ref, start, size):
      mask = jnp.broadcast_to(chosen[:, None], (plan.tile, size))
      return plt.load(ref.at[rows, pl.ds(start, size)], mask=mask, other=0)

    logits = sum(dot(q, load(key_ref, *part), (1, 1)) for q, part in zip(queries, plan.key))
    logits = jnp.where(chosen[None], plan.scale * logits, NOTHING)
    now = jnp.maximum(top, jnp.max(logits, axis=1))
    weight, keep = jnp.exp(logits - now[:, None]), jnp.exp(top - now)
    total = keep * total + jnp.sum(weight, axis=1)
    sums = tuple(
      keep[:, None] * old + dot(weight.astype(key_ref.dtype),
                                 load(value_ref, plan.behind + start, size), (1, 0))
      for old, (start, size) in zip(sums, plan.value))
    return now, total, sums

  group = q_ref.shape[0]
  start = (jnp.full((group,), LOWEST, jnp.float32), jnp.zeros((group,), jnp.float32),
           tuple(jnp.zeros((group, size), jnp.float32) for _, size in plan.value))
  top_ref[...], total_ref[...], sums = lax.fori_loop(0, plan.turns, visit, start)
  for part, found in zip(plan.value, sums):
    out_ref[:, pl.ds(*part)] = found
