"""Bodies of the GPU kernels: arithmetic of `chunked` under the limits of Triton.

Every value has sizes that are powers of two; values are never sliced, only refs; there is no
scratch memory, so a state is carried by a loop. All exponents of the tree come from products with
0/1 matrices: sums of decays of the rows concerned and of no others, hence nothing cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.delta_rule.limits import Passes

Array = jax.Array


class Plan(NamedTuple):
  """Static facts of a call."""

  scale: float
  heads: int  # value heads
  key_heads: tuple[int, int, int]  # of q, write_key, erase_key
  key: int  # K, a power of two
  value: int  # V, a power of two
  chunk: int
  key_block: int  # columns of K in hand at a time
  value_block: int  # columns of V of a program
  passes: Passes
  interpret: bool


class Borders(NamedTuple):
  """What the segments let through in a chunk."""

  pair: Array  # bool[C, C]
  enters: Array  # f32[C, 1]
  leaves: Array  # f32[C, 1]
  carries: Array  # f32[]


def dot(a: Array, b: Array, contract: tuple[int, int], passes: int) -> Array:
  """Product of matrices over axis contract[0] of a and contract[1] of b, in float32."""
  dims = (((contract[0],), (contract[1],)), ((), ()))

  def product(x, y, precision):
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)

  if passes == 6:
    return product(a, b, jax.lax.Precision.HIGHEST)
  default = jax.lax.Precision.DEFAULT  # exact for operands in bfloat16
  a1, b1 = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
  out = product(a1, b1, default)
  if passes == 3:
    out += product(a1, _rest(b, b1), default) + product(_rest(a, a1), b1, default)
  return out


def _rest(x: Array, rounded: Array) -> Array:
  return (x - rounded.astype(jnp.float32)).astype(jnp.bfloat16)


def sums(chosen: Array, x: Array) -> Array:
  """Sums of the rows of x that each row of the 0/1 matrix `chosen` bool[C, C] names, in float32.

  Three bfloat16 parts hold a float32 and the matrix is exact, so only the sum rounds.
  """
  ones = chosen.astype(jnp.bfloat16)
  first = x.astype(jnp.bfloat16)
  second = _rest(x, first)
  third = _rest(x - first.astype(jnp.float32), second)
  return sum(dot(ones, part, (1, 0), 1) for part in (third, second, first))


def grid(chunk: int) -> tuple[Array, Array]:
  """Numbers of row and column, i32[C, C]."""
  shape = chunk, chunk
  return (jax.lax.broadcasted_iota(jnp.int32, shape, 0),
          jax.lax.broadcasted_iota(jnp.int32, shape, 1))


def factor(log_decay: Array, level: int) -> Array:
  """Decays of the level [C, K]: from the start of an odd block, to the end of an even one."""
  i, j = grid(log_decay.shape[0])
  is_odd = (i >> level) & 1 == 1
  return jnp.exp(sums((i >> level == j >> level) & jnp.where(is_odd, j <= i, j > i), log_decay))


def level_mask(chunk: int, level: int, borders: Borders | None) -> Array:
  """Pairs (odd row, even column) of sibling blocks."""
  i, j = grid(chunk)
  found = ((i ^ j) >> level == 1) & ((i >> level) & 1 == 1)
  return found if borders is None else found & borders.pair


def load_borders(segments, at, chunk: int) -> Borders | None:
  if segments is None:
    return None
  own = segments[pl.ds(at * chunk, chunk)]
  last = segments[at * chunk + chunk - 1]
  before = jnp.where(at > 0, segments[jnp.maximum(at * chunk - 1, 0)], 0)

  def column(x):
    return x.astype(jnp.float32)[:, None]

  return Borders(own[:, None] == own[None, :], column(own == before), column(own == last),
                 (last == before).astype(jnp.float32))


def _rows(ref, at, chunk: int, columns=slice(None)) -> Array:
  return ref[pl.ds(at * chunk, chunk), columns].astype(jnp.float32)


def ends(log_decay: Array, borders: Borders | None) -> tuple[Array, Array, Array]:
  """(e^G [C, K], e^{G_C - G} [C, K], e^{G_C} [K]) with what the segments let through."""
  i, j = grid(log_decay.shape[0])
  after, before = jnp.exp(sums(j <= i, log_decay)), jnp.exp(sums(j > i, log_decay))
  keep = jnp.exp(jnp.sum(log_decay, 0))
  if borders is None:
    return after, before, keep
  return after * borders.enters, before * borders.leaves, keep * borders.carries


def pairs_body(plan: Plan, segmented: bool, *refs):
  """A [C, C] with its diagonal and (I + M)^{-1} of one chunk of one head."""
  q_ref, write_ref, erase_ref, decay_ref = refs[:4]
  segments, (scores_ref, inverse_ref) = refs[4] if segmented else None, refs[-2:]
  at, c, passes = pl.program_id(0), plan.chunk, plan.passes
  borders, (i, j) = load_borders(segments, at, c), grid(c)
  levels = c.bit_length() - 1
  scores, erased = jnp.zeros((c, c), jnp.float32), [0.0] * levels
  for start in range(0, plan.key, plan.key_block):
    columns = pl.ds(start, plan.key_block)
    q = _rows(q_ref, at, c, columns) * plan.scale
    write, erase = _rows(write_ref, at, c, columns), _rows(erase_ref, at, c, columns)
    log_decay = _rows(decay_ref, at, c, columns)
    for level in range(levels):
      f, mask = factor(log_decay, level), level_mask(c, level, borders)
      scores += jnp.where(mask, dot(q * f, write * f, (1, 1), passes.pair), 0)
      erased[level] += jnp.where(mask, dot(erase * f, write * f, (1, 1), passes.pair), 0)
    scores += jnp.where(i == j, jnp.sum(q * write, 1)[:, None], 0)
  inverse = jnp.where(i == j, 1.0, -erased[0])  # joins blocks of one row
  for below in erased[1:]:
    inverse -= dot(inverse, dot(below, inverse, (1, 0), passes.solve), (1, 0), passes.solve)
  scores_ref[...] = scores.astype(scores_ref.dtype)
  inverse_ref[...] = inverse


def forward_body(plan: Plan, segmented: bool, keep_states: bool, *refs):
  """All chunks of one head, for a block of V: out and state, or what the backward wants to know."""
  q_ref, write_ref, erase_ref, value_ref, decay_ref, scores_ref, inverse_ref, state_ref = refs[:8]
  segments, outs, c, passes = refs[8] if segmented else None, refs[-2:], plan.chunk, plan.passes

  def body(at, state):
    borders = load_borders(segments, at, c)
    after, before, keep = ends(_rows(decay_ref, at, c), borders)
    erased = dot(_rows(erase_ref, at, c) * after, state, (1, 0), passes.state)
    new = dot(inverse_ref[at], _rows(value_ref, at, c) - erased, (1, 0), passes.solve)
    if keep_states:
      outs[0][at] = state
      outs[1][pl.ds(at * c, c), :] = new
    else:
      read = dot(_rows(q_ref, at, c) * plan.scale * after, state, (1, 0), passes.pair)
      read += dot(scores_ref[at].astype(jnp.float32), new, (1, 0), passes.pair)
      outs[0][pl.ds(at * c, c), :] = read.astype(outs[0].dtype)
    leaving = _rows(write_ref, at, c) * before
    return keep[:, None] * state + dot(leaving, new, (0, 0), passes.state)

  state = jax.lax.fori_loop(0, scores_ref.shape[0], body, state_ref[...])
  if not keep_states:
    outs[1][...] = state


def states_backward_body(plan: Plan, segmented: bool, *refs):
  """Chunks in reverse, for a block of V: gradients of the values, of the states and of the first.

  The gradient of a chunk's state is that of the state which leaves it.
  """
  q_ref, write_ref, erase_ref, decay_ref, scores_ref, inverse_ref = refs[:6]
  d_out_ref, d_after_ref = refs[6:8]
  segments, (d_value_ref, d_states_ref, d_state_ref) = refs[8] if segmented else None, refs[-3:]
  c, passes, chunks = plan.chunk, plan.passes, scores_ref.shape[0]

  def body(step, d_state):
    at = chunks - 1 - step
    after, before, keep = ends(_rows(decay_ref, at, c), load_borders(segments, at, c))
    d_out = _rows(d_out_ref, at, c)
    d_new = dot(scores_ref[at].astype(jnp.float32), d_out, (0, 0), passes.pair)
    d_new += dot(_rows(write_ref, at, c) * before, d_state, (1, 0), passes.state)
    d_value = dot(inverse_ref[at], d_new, (0, 0), passes.solve)
    d_value_ref[pl.ds(at * c, c), :] = d_value
    d_states_ref[at] = d_state
    read = dot(_rows(q_ref, at, c) * plan.scale * after, d_out, (0, 0), passes.state)
    erased = dot(_rows(erase_ref, at, c) * after, d_value, (0, 0), passes.state)
    return keep[:, None] * d_state + read - erased

  d_state_ref[...] = jax.lax.fori_loop(0, chunks, body, d_after_ref[...])


def keys_backward_body(plan: Plan, segmented: bool, *refs):
  """Gradients of q, write_key, erase_key and log_decay in one chunk of one head."""
  q_ref, write_ref, erase_ref, decay_ref = refs[:4]
  new_ref, d_out_ref, d_value_ref, states_ref, d_states_ref = refs[4:9]
  segments, outs = refs[9] if segmented else None, refs[-4:]
  at, c, pair = pl.program_id(0), plan.chunk, plan.passes.pair
  borders, (i, j) = load_borders(segments, at, c), grid(c)
  value_blocks = [pl.ds(v, plan.value_block) for v in range(0, plan.value, plan.value_block)]
  d_scores = d_erased = jnp.zeros((c, c), jnp.float32)
  for v in value_blocks:
    new = _rows(new_ref, at, c, v)
    d_scores += dot(_rows(d_out_ref, at, c, v), new, (1, 1), pair)
    d_erased -= dot(_rows(d_value_ref, at, c, v), new, (1, 1), pair)
  own = jnp.sum(jnp.where(i == j, d_scores, 0), 1)[:, None]
  for start in range(0, plan.key, plan.key_block):
    k = pl.ds(start, plan.key_block)
    d_read = d_erase_state = d_leave = jnp.zeros((c, plan.key_block), jnp.float32)
    d_keep = jnp.zeros((plan.key_block,), jnp.float32)
    for v in value_blocks:
      state, d_state = states_ref[k, v], d_states_ref[k, v]
      d_read += dot(_rows(d_out_ref, at, c, v), state, (1, 1), pair)
      d_erase_state -= dot(_rows(d_value_ref, at, c, v), state, (1, 1), pair)
      d_leave += dot(_rows(new_ref, at, c, v), d_state, (1, 1), pair)
      d_keep += jnp.sum(state * d_state, 1)
    q = _rows(q_ref, at, c, k) * plan.scale
    write, erase = _rows(write_ref, at, c, k), _rows(erase_ref, at, c, k)
    log_decay = _rows(decay_ref, at, c, k)
    d_q = d_write = d_erase = jnp.zeros_like(q)
    for level in range(c.bit_length() - 1):
      f, mask = factor(log_decay, level), level_mask(c, level, borders)
      scores, erased = jnp.where(mask, d_scores, 0), jnp.where(mask, d_erased, 0)
      d_q += f * dot(scores, write * f, (1, 0), pair)
      d_erase += f * dot(erased, write * f, (1, 0), pair)
      d_write += f * (dot(scores, q * f, (0, 0), pair) + dot(erased, erase * f, (0, 0), pair))
    after, before, keep = ends(log_decay, borders)
    inside = q * d_q + erase * d_erase - write * d_write
    d_q, d_erase = d_q + d_read * after, d_erase + d_erase_state * after
    inside += (d_read * q + d_erase_state * erase) * after
    leaving = d_leave * before
    # Row t decays what stands before it, for every row from t on.
    d_decay = sums(j >= i, inside) + sums(j < i, leaving * write) + (keep * d_keep)[None, :]
    found = (d_q + own * write) * plan.scale, d_write + own * q + leaving, d_erase, d_decay
    for ref, x in zip(outs, found):
      ref[pl.ds(at * c, c), k] = x.astype(ref.dtype)
