"""The k largest of each row as a TPU kernel: a search that stays in vector memory.

As XLA operations each of the search's passes is a program of its own, for more time than it takes
to read the candidate blocks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.common import dispatch
from kernels.tls_attention.config import Array

LANES = 128
ROWS = 8  # per grid step: one register high
LOWEST = -2**31


def in_top(scores: Array, k: int, interpret=None) -> Array:
  """As `select.in_top`, bool[..., n].

  `interpret` runs the kernel as XLA operations, by default False: then only a TPU can run it.
  Raises NotImplementedError where it cannot run.
  """
  dispatch.require('tpu', interpret, scores.dtype)
  n = scores.shape[-1]
  flat = scores.astype(jnp.float32).reshape(-1, n)
  flat = jnp.pad(flat, ((0, 0), (0, -n % LANES)), constant_values=-jnp.inf)
  rows, width = flat.shape
  block = pl.BlockSpec((min(rows, ROWS), width), lambda i: (i, 0))
  passes = 32 + width.bit_length()
  found = pl.pallas_call(
    functools.partial(_body, k), grid=(pl.cdiv(rows, ROWS),), in_specs=[block], out_specs=block,
    out_shape=jax.ShapeDtypeStruct(flat.shape, jnp.int32), name='tls_in_top',
    scratch_shapes=[pltpu.VMEM(block.block_shape, jnp.int32)], interpret=interpret or False,
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    cost_estimate=pl.CostEstimate(flops=2 * passes * flat.size, transcendentals=0,
                                  bytes_accessed=8 * flat.size))(flat)
  return found[:, :n].reshape(scores.shape) > 0


def compact(mask: Array, k: int) -> Array:
  """As `select.compact`, i32[..., k], as XLA operations that suit a TPU: products instead of sums
  along the row, and all compared with all, as it gathers the probes of a search slowly."""
  n = mask.shape[-1]
  cut = jnp.pad(mask.reshape(-1, n), ((0, 0), (0, -n % LANES))).reshape(mask.size // n, -1, LANES)
  upper = lambda size, above: jnp.triu(jnp.ones((size, size), jnp.bfloat16), above)
  # Numbers up to 256 are exact in bfloat16, sums of them in float32.
  within = jnp.einsum('rbi,ij->rbj', cut.astype(jnp.bfloat16), upper(LANES, 0),
                      preferred_element_type=jnp.float32)
  before = jnp.einsum('rb,bc->rc', within[..., -1].astype(jnp.bfloat16), upper(cut.shape[1], 1),
                      preferred_element_type=jnp.float32)
  place = (within + before[..., None]).reshape(-1, cut.shape[1] * LANES)[:, :n]
  found = jnp.sum(place[:, None] < jnp.arange(1, k + 1)[:, None], axis=-1, dtype=jnp.int32)
  return found.reshape(*mask.shape[:-1], k)


def _body(k: int, scores_ref, out_ref, ordered):
  """Bit by bit the largest number that k entries reach; then, bit by bit, how far along the row the
  entries equal to it are taken."""
  scores = scores_ref[...]
  small = jnp.abs(scores) < jnp.finfo(jnp.float32).tiny
  bits = lax.bitcast_convert_type(jnp.where(small, 0., scores), jnp.int32)
  bits = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # the order of the numbers
  ordered[...] = jnp.where(scores > -jnp.inf, bits, LOWEST)
  row = (scores.shape[0], 1)

  def count(true):
    return jnp.sum(jnp.where(true, 1., 0.), axis=1, keepdims=True)  # exact below 2 ** 24

  def rise(i, least):  # `least` as an unsigned number
    tried = least | (jnp.int32(1) << (31 - i))
    enough = count(ordered[...] >= (tried ^ jnp.int32(LOWEST))) >= k
    return jnp.where(enough, tried, least)

  least = lax.fori_loop(0, 32, rise, jnp.zeros(row, jnp.int32)) ^ jnp.int32(LOWEST)
  left = k - count(ordered[...] > least)
  number = lax.broadcasted_iota(jnp.int32, scores.shape, 1)

  def extend(i, end):
    tried = end + (jnp.int32(1) << (scores.shape[1].bit_length() - 1 - i))
    fits = count((ordered[...] == least) & (number < tried)) <= left
    return jnp.where(fits, tried, end)

  end = lax.fori_loop(0, scores.shape[1].bit_length(), extend, jnp.zeros(row, jnp.int32))
  held = ordered[...]
  taken = (held > least) | ((held == least) & (number < end))
  out_ref[...] = jnp.where(taken & (held > LOWEST), 1, 0)
