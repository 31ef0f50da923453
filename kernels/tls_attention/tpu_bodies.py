"""Bodies of the TPU kernels of sparse decoding. Their grid is (row, key head, step).

Steps of a row follow each other, those of the next head behind those of the last: what is fetched
by hand is fetched one step ahead, over the borders of heads too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.common.products import dot

Array = jax.Array
LANES = 128
UNROLL = 8  # copies of rows issued per turn of a loop
NOTHING = -1e30  # a logit that counts for nothing, and whose differences are finite


class Labels(NamedTuple):
  """Static facts of the kernel that scores tokens."""

  unit: int  # tokens of a piece of the cache: a block, or 128 of its tokens
  pieces: int  # per step
  row: int  # the first row of the batch


class Attention(NamedTuple):
  """Static facts of the kernels that attend."""

  scale: float
  value: int  # V
  layout: str  # of keys and values: 'apart', 'packed', or 'latent', the values in the keys
  lanes: bool  # whether pages are [D, T], tokens along the lanes
  pages: int  # per step; 0 = rows one by one
  row: int  # the first row of the batch


def in_hbm(interpret, *arrays: Array) -> list[Array]:
  """Keeps XLA from fetching whole operands of a kernel into vector memory beforehand."""
  if interpret:
    return list(arrays)
  return [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]


def _ahead(fetch: Callable, live: Callable, work: Callable):
  """Runs work(head, step, slot) on what fetch(head, step, slot) has brought one step before.

  live(head, step) says whether a step has anything to do.
  """
  head, step = pl.program_id(1), pl.program_id(2)
  heads, steps = pl.num_programs(1), pl.num_programs(2)
  number = head * steps + step
  slot = number & 1
  last = step + 1 == steps
  later = jnp.where(last, head + 1, head), jnp.where(last, 0, step + 1)

  @pl.when((number == 0) & live(head, step))
  def _():
    fetch(head, step, slot)

  @pl.when(number + 1 < heads * steps)
  def _():
    @pl.when(live(*later))
    def _():
      fetch(*later, 1 - slot)

  @pl.when(live(head, step))
  def _():
    work(head, step, slot)


def label_body(plan: Labels, table, q_ref, codes_hbm, scale_hbm, zero_hbm, out_ref, codes, scale,
               zero, arrived):
  """Scores of the tokens of `pieces` pieces, f32[G, pieces * unit], by their labels.

  A piece lies somewhere in a tile of 128 tokens, which is fetched whole and rotated to where the
  piece stands in the output.
  """
  batch, heads, steps = pl.program_id(0), pl.num_programs(1), pl.num_programs(2)
  shift = LANES.bit_length() - plan.unit.bit_length()  # of a piece's number to its tile's
  here = LANES // plan.unit  # pieces of a tile

  def piece(head, step, i):
    return table[((batch * heads + head) * steps + step) * plan.pieces + i]

  def fetch(head, step, slot):
    row = batch + plan.row
    for i in range(plan.pieces):
      at = pl.ds(pl.multiple_of((piece(head, step, i) >> shift) * LANES, LANES), LANES)
      pltpu.make_async_copy(codes_hbm.at[row, head, :, at], codes.at[slot, i],
                            arrived.at[slot]).start()
      for source, target in ((scale_hbm, scale), (zero_hbm, zero)):
        pltpu.make_async_copy(source.at[row, head, at], target.at[slot, i],
                              arrived.at[slot]).start()

  def work(head, step, slot):
    for held in (codes, scale, zero):  # one wait for all copies into it
      pltpu.make_async_copy(held.at[slot], held.at[slot], arrived.at[slot]).wait()

    def place(load):  # [..., pieces * unit] of the tiles [..., 128] by `load`
      tiles = []
      for first in range(0, plan.pieces, here):
        whole = load(first)
        if here > 1:
          lane = lax.broadcasted_iota(jnp.int32, whole.shape, 1) >> (plan.unit.bit_length() - 1)
          for n in range(here):
            own = piece(head, step, first + n) & (here - 1)
            moved = pltpu.roll(load(first + n), ((n - own) & (here - 1)) * plan.unit, 1)
            whole = jnp.where(lane == n, moved, whole)
        tiles.append(whole)
      return jnp.concatenate(tiles, axis=1)

    both = place(lambda i: codes[slot, i].astype(jnp.int32))
    scales, zeros = (place(lambda i, x=x: x[slot, pl.ds(i, 1)]) for x in (scale, zero))
    query = q_ref[0, 0]
    half, group = query.shape[1] // 2, out_ref.shape[2]
    low = _by_codes(query[:, :half], both & 15) + _by_codes(query[:, half:], both >> 4)
    found = low * scales + jnp.sum(query, axis=1, keepdims=True) * zeros
    out_ref[0, 0] = found[:group]

  _ahead(fetch, lambda head, step: True, work)


def _by_codes(query: Array, codes: Array) -> Array:
  """query [G, R] . codes [R, N] in float32: small whole numbers are exact in bfloat16, so three
  bfloat16 parts of the query make the product exact."""
  codes = codes.astype(jnp.float32).astype(jnp.bfloat16)
  parts, left = [], query
  for _ in range(3):
    parts.append(left.astype(jnp.bfloat16))
    left = left - parts[-1].astype(jnp.float32)
  return sum(dot(part, codes, (1, 0)) for part in parts[::-1])


def _start(top, total, sums):
  top[...] = jnp.full(top.shape, NOTHING, jnp.float32)
  total[...] = jnp.zeros(total.shape, jnp.float32)
  sums[...] = jnp.zeros(sums.shape, jnp.float32)


def _add(plan: Attention, q: Array, key: Array, value: Array, row: Array, column: Array | None, top,
         total, sums):
  """One step of the running softmax. Tokens count where row [1, T] and column [T, 1] are true; the
  values of the others are cleared, as 0 times NaN is NaN."""
  tokens, real = (1, row) if plan.lanes else (0, column)  # an axis of key and value
  logits = jnp.where(row, plan.scale * dot(q, key, (1, 1 - tokens)), NOTHING)
  before = top[...]
  now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
  weight = jnp.where(row, jnp.exp(logits - now[:, :1]), 0)
  keep = jnp.exp(before - now)
  top[...] = now
  total[...] = keep * total[...] + jnp.sum(weight, axis=1, keepdims=True)
  clean = jnp.where(real, value.astype(jnp.float32), 0).astype(value.dtype)
  sums[...] = keep[:, :1] * sums[...] + dot(weight.astype(value.dtype), clean, (1, tokens))


def _finish(out_ref, total, sums):
  whole = total[...][:, :1]
  found = sums[...] / jnp.where(whole > 0, whole, 1)
  out_ref[0, 0] = found[:out_ref.shape[2]].astype(out_ref.dtype)


def page_body(plan: Attention, table, q_ref, chosen_ref, *refs):
  """Attention over the chosen tokens of `pages` pages of the cache a step."""
  del table  # the index maps read it
  *pages, out_ref, top, total, sums = refs
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _():
    _start(top, total, sums)

  def tokens(refs, *at):
    return jnp.concatenate([ref[0, 0, :, *at] for ref in refs], axis=int(plan.lanes))

  if plan.layout == 'packed':
    key, value = tokens(pages, 0), tokens(pages, 1)
  else:
    key = tokens(pages[:plan.pages])
    if plan.layout == 'apart':
      value = tokens(pages[plan.pages:])
    else:
      value = key[:plan.value] if plan.lanes else key[:, :plan.value]
  chosen = chosen_ref[0, 0, pl.ds(step, 1), :]
  column = None
  if not plan.lanes:
    column = jnp.swapaxes(jnp.broadcast_to(chosen, (8, chosen.shape[1])), 0, 1)[:, :1] > 0
  _add(plan, q_ref[0, 0], key, value, chosen > 0, column, top, total, sums)

  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    _finish(out_ref, total, sums)


def row_body(plan: Attention, table, counts, q_ref, cache_hbm, out_ref, top, total, sums, held,
             arrived):
  """Attention over `held.shape[1]` rows of a packed cache a step, each fetched by itself."""
  batch, heads, steps = pl.program_id(0), pl.num_programs(1), pl.num_programs(2)
  tile, now = held.shape[1], pl.program_id(2)

  def count(head):
    return counts[batch * heads + head]

  def fetch(head, step, slot):
    first = ((batch * heads + head) * steps + step) * tile

    def some(i, _):
      for j in range(UNROLL):
        n = i * UNROLL + j
        pltpu.make_async_copy(cache_hbm.at[batch + plan.row, head, pl.ds(table[first + n], 1)],
                              held.at[slot, pl.ds(n, 1)], arrived.at[slot]).start()
      return 0

    lax.fori_loop(0, tile // UNROLL, some, 0)

  @pl.when(now == 0)
  def _():
    _start(top, total, sums)

  def work(head, step, slot):
    pltpu.make_async_copy(held.at[slot], held.at[slot], arrived.at[slot]).wait()
    left = count(head) - step * tile
    row = lax.broadcasted_iota(jnp.int32, (1, tile), 1) < left
    column = lax.broadcasted_iota(jnp.int32, (tile, 1), 0) < left
    _add(plan, q_ref[0, 0], held[slot, :, 0], held[slot, :, 1], row, column, top, total, sums)

  _ahead(fetch, lambda head, step: step * tile < count(head), work)

  @pl.when(now == steps - 1)
  def _():
    _finish(out_ref, total, sums)
