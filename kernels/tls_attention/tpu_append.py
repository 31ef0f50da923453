"""Writes the label and the bounds of one token into the tiles that hold them, in place.

As scatters, XLA would convert and copy all labels as soon as there are two rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.common import dispatch
from kernels.tls_attention.config import Array, Config, Labels, State, Summary
from kernels.tls_attention.tpu_bodies import LANES, in_hbm


def write(state: State, key: Array, label: tuple[Array, Array, Array], length: Array,
          config: Config, interpret=None) -> State:
  """State with the key [B, HK, D] and its label as the token number length[b]; none behind N.

  label = (codes u8[B, HK, R / 2], scale f32[B, HK], zero f32[B, HK]). `interpret` runs the kernel
  as XLA operations, by default False: then only a TPU can run it. Raises NotImplementedError where
  it cannot run.
  """
  held = state.summary.bounds
  dispatch.require('tpu', interpret, held.dtype)
  if held.shape[3] % LANES:
    raise NotImplementedError(f'2 D = {held.shape[3]} is not a multiple of {LANES}')
  rows, heads, half, room = state.labels.codes.shape
  tile = 32 // held.dtype.itemsize  # rows of bounds
  blocks = held.shape[2]
  wide = jnp.concatenate([key, key], axis=-1).astype(held.dtype)[:, :, None]
  codes, scale, zero = label

  def at_token(b, length):
    return jnp.minimum(length[b], room - 1) // LANES

  def at_block(b, length):
    return jnp.minimum(length[b] // config.block, blocks - 1) // tile

  new = lambda *rest: pl.BlockSpec((1, heads, *rest), lambda b, _: (b, *[0] * (1 + len(rest))))
  tiles = [pl.BlockSpec((1, heads, tile, held.shape[3]), lambda b, n: (b, 0, at_block(b, n), 0)),
           pl.BlockSpec((1, heads, half, LANES), lambda b, n: (b, 0, 0, at_token(b, n))),
           *[pl.BlockSpec((1, heads, LANES), lambda b, n: (b, 0, at_token(b, n)))] * 2]
  old = [held, state.labels.codes, state.labels.scale, state.labels.zero]

  def body(length_ref, wide, codes, scale, zero, bounds_in, codes_in, scale_in, zero_in,
           bounds_out, codes_out, scale_out, zero_out):
    length = length_ref[pl.program_id(0)]
    first = at_block(pl.program_id(0), length_ref) * tile
    before, own = bounds_in[0].astype(jnp.float32), wide[0].astype(jnp.float32)
    bounds_out[0] = _widen(before, own, length, first, config.block).astype(bounds_out.dtype)
    lane = length - at_token(pl.program_id(0), length_ref) * LANES
    here = lax.broadcasted_iota(jnp.int32, (heads, LANES), 1) == lane
    for source, target, value in ((scale_in, scale_out, scale), (zero_in, zero_out, zero)):
      target[0] = jnp.where(here, value[0], source[0])
    before = codes_in[0].astype(jnp.int32)
    here = lax.broadcasted_iota(jnp.int32, before.shape, 2) == lane
    codes_out[0] = jnp.where(here, codes[0], before).astype(jnp.uint8)

  moved = rows * sum(2 * heads * n for n in (tile * held.shape[3] * held.dtype.itemsize,
                                             half * LANES, 8 * LANES))
  found = pl.pallas_call(
    body, out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old], name='tls_append',
    interpret=interpret or False, input_output_aliases={5: 0, 6: 1, 7: 2, 8: 3},
    cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(rows,), out_specs=tiles,
      in_specs=[new(1, held.shape[3]), new(half, 1), new(1), new(1), *tiles]),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)))(
    length, wide, codes.astype(jnp.int32)[..., None], scale[..., None], zero[..., None],
    *in_hbm(interpret, *old))
  return State(Summary(found[0]), Labels(*found[1:]), state.chosen)


def _widen(before: Array, own: Array, length: Array, first: Array, block: int) -> Array:
  """Bounds [HK, rows, 2 D] of the blocks from `first` on, with a key in that of token `length`."""
  number, row = lax.broadcasted_iota(jnp.int32, before.shape, 1) + first, length // block
  high = lax.broadcasted_iota(jnp.int32, before.shape, 2) < before.shape[2] // 2
  wider = jnp.where(high, jnp.maximum(before, own), jnp.minimum(before, own))
  opened = jnp.where(length % block == 0, row, -1)
  return jnp.where(number == row, jnp.where(number == opened, own, wider), before)
