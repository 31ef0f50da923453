"""Pairs of tokens inside a chunk, by a binary tree: exact for every decay, no reference point.

At level s = 1, 2, .., C/2 the rows stand in blocks of s, and blocks pair up (even, odd). For a row
i of an odd block and a row j of its even sibling the decay between them is
exp(G_i - G_j) = after_i * before_j: the decay from the start of i's block through i, times the
decay behind j to the end of j's block. Both factors are products of decays, at most 1: they
underflow to an exact 0 and never overflow, and no logarithm is ever subtracted.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Level(NamedTuple):
  """Decay factors of one level, [N, C / 2s, s, K or 1]."""

  after: Array  # of the rows of the odd blocks
  before: Array  # of the rows of the even blocks


class Decays(NamedTuple):
  levels: tuple[Level, ...]
  after: Array  # [N, C, K or 1], e^G: from the start of the chunk through the row
  before: Array  # [N, C, K or 1], e^{G_C - G}: behind the row to the end of the chunk


def _blocks(x: Array, size: int) -> tuple[Array, Array]:
  """(even, odd) blocks of `size` rows, [N, C / 2 size, size, K], of x [N, C, K]."""
  x = x.reshape(x.shape[0], -1, 2, size, x.shape[-1])
  return x[:, :, 0], x[:, :, 1]


def _rows(even: Array, odd: Array) -> Array:
  """The inverse of `_blocks`."""
  return jnp.stack([even, odd], axis=2).reshape(even.shape[0], -1, even.shape[-1])


def decays(log_decay: Array) -> Decays:
  """Factors of all levels; log_decay [N, C, K or 1], C a power of two."""
  after = jnp.exp(log_decay)
  before, levels, size = jnp.ones_like(after), [], 1
  while size < log_decay.shape[1]:
    (after_even, after_odd), (before_even, before_odd) = _blocks(after, size), _blocks(before, size)
    levels.append(Level(after_odd, before_even))
    after = _rows(after_even, after_odd * after_even[:, :, -1:])
    before = _rows(before_even * after_odd[:, :, -1:], before_odd)
    size *= 2
  return Decays(tuple(levels), after, before)


def decays_backward(d: Decays, level_grads, d_after: Array, d_before: Array) -> Array:
  """Gradient of log_decay, of gradients with respect to the logarithms of the factors.

  `level_grads` are (after, before) per level. The tree upside down: every sum runs over terms that
  the decay of the row really is part of, so nothing cancels.
  """
  for level, (own_after, own_before) in zip(reversed(d.levels), reversed(level_grads)):
    size = level.after.shape[2]
    (after_even, after_odd), (before_even, before_odd) = (_blocks(d_after, size),
                                                          _blocks(d_before, size))
    after_even = _add_last(after_even, after_odd)
    after_odd = _add_last(after_odd + own_after, before_even)
    d_after = _rows(after_even, after_odd)
    d_before = _rows(before_even + own_before, before_odd)
  return d_after


def _add_last(x: Array, rows: Array) -> Array:
  """Adds the sum of the rows of each block to the last row of x."""
  if x.shape[2] == 1:
    return x + rows
  return x.at[:, :, -1].add(jnp.sum(rows, 2))


def pairs(d: Decays, q: Array, erase: Array, write: Array) -> tuple[Array, Array]:
  """P_ij = sum_d left_id write_jd exp(G_id - G_jd) for i > j, 0 elsewhere; left is q, then erase.

  Arguments [N, C, K], results [N, C, C].
  """
  if _scalar(d):
    plain = _product(jnp.concatenate([q, erase], 1), write)
    both = plain.reshape(len(q), 2, q.shape[1], q.shape[1]) * _factors(d)[:, None]
  else:
    blocks = [_product(_odd(level, q, erase), _even(level, write)) for level in d.levels]
    both = _assemble([_two(x) for x in blocks])
  return both[:, 0], both[:, 1]


def pairs_backward(d: Decays, q: Array, erase: Array, write: Array, q_pairs: Array,
                   erase_pairs: Array, d_q_pairs: Array, d_erase_pairs: Array):
  """(d_q, d_erase, d_write, level_grads) of `pairs`; gradients of pairs are strictly lower."""
  both = jnp.stack([d_q_pairs, d_erase_pairs], 1)
  if _scalar(d):
    return _scalar_backward(d, q, erase, write, q_pairs, erase_pairs, both)
  d_q, d_erase, d_write, grads = 0, 0, 0, []
  for level, d_block in zip(d.levels, _take(both)):
    size = level.after.shape[2]
    d_block = jnp.moveaxis(d_block, 1, 2).reshape(len(q), -1, 2 * size, size)
    rows, columns = _odd(level, q, erase), _even(level, write)
    d_rows = jnp.einsum('nbij,nbjk->nbik', d_block, columns)
    d_columns = jnp.einsum('nbij,nbik->nbjk', d_block, rows)
    product = d_rows * rows
    grads.append((product[:, :, :size] + product[:, :, size:], d_columns * columns))
    zeros = jnp.zeros_like(columns)
    d_q += _rows(zeros, d_rows[:, :, :size] * level.after)
    d_erase += _rows(zeros, d_rows[:, :, size:] * level.after)
    d_write += _rows(d_columns * level.before, zeros)
  return d_q, d_erase, d_write, grads


def inverse(lower: Array) -> Array:
  """(I + M)^{-1} of strictly lower M [N, C, C], by joining inverted blocks: no power series.

  Not by lax.linalg.triangular_solve: on CPU it can wait for ever when two loops run side by side.
  """
  out = jnp.ones_like(lower, shape=(*lower.shape[:2], 1, 1))
  for block in _take(lower[:, None]):
    block = block[:, 0]
    even, odd = out[:, 0::2], out[:, 1::2]
    below = -block if block.shape[-1] == 1 else -(odd @ (block @ even))
    out = jnp.concatenate([jnp.concatenate([even, jnp.zeros_like(below)], -1),
                           jnp.concatenate([below, odd], -1)], -2)
  return out[:, 0]


def _scalar(d: Decays) -> bool:
  return d.after.shape[-1] == 1


def _factors(d: Decays) -> Array:
  """exp(G_i - G_j) below the diagonal, [N, C, C], of one decay per row."""
  return _assemble([(level.after * jnp.swapaxes(level.before, 2, 3))[:, None]
                    for level in d.levels])[:, 0]


def _scalar_backward(d, q, erase, write, q_pairs, erase_pairs, d_both):
  chunk = q.shape[1]
  d_log = d_both[:, 0] * q_pairs + d_both[:, 1] * erase_pairs
  grads = [(jnp.sum(x[:, 0], 3, keepdims=True), jnp.sum(x[:, 0], 2)[..., None])
           for x in _take(d_log[:, None])]
  d_plain = (d_both * _factors(d)[:, None]).reshape(len(q), -1, chunk)
  d_left = jnp.einsum('nij,njk->nik', d_plain, write)
  d_write = jnp.einsum('nij,nik->njk', d_plain, jnp.concatenate([q, erase], 1))
  return d_left[:, :chunk], d_left[:, chunk:], d_write, grads


def _odd(level: Level, q: Array, erase: Array) -> Array:
  """Rows of q and erase in the odd blocks, decayed, [N, b, 2s, K]."""
  size = level.after.shape[2]
  rows = [_blocks(x, size)[1] * level.after for x in (q, erase)]
  return jnp.concatenate(rows, axis=2)


def _even(level: Level, write: Array) -> Array:
  return _blocks(write, level.before.shape[2])[0] * level.before


def _product(rows: Array, columns: Array) -> Array:
  return jnp.einsum('...ik,...jk->...ij', rows, columns)


def _two(block: Array) -> Array:
  """[N, 2, b, s, s] of [N, b, 2s, s]."""
  n, b, _, size = block.shape
  return jnp.moveaxis(block.reshape(n, b, 2, size, size), 2, 1)


def _assemble(blocks: list[Array]) -> Array:
  """Strictly lower [N, S, C, C] of its blocks [N, S, C / 2s, s, s] per level."""
  n, stack = blocks[0].shape[:2]
  out = jnp.zeros_like(blocks[0], shape=(n, stack, 2 * blocks[0].shape[2], 1, 1))
  for block in blocks:
    size = block.shape[-1]
    out = out.reshape(n, stack, -1, 2, size, size)
    even = jnp.concatenate([out[:, :, :, 0], jnp.zeros_like(block)], axis=-1)
    odd = jnp.concatenate([block, out[:, :, :, 1]], axis=-1)
    out = jnp.concatenate([even, odd], axis=-2)
  return out[:, :, 0]


def _take(x: Array) -> list[Array]:
  """The transpose of `_assemble`."""
  blocks, size = [], x.shape[-1] // 2
  x = x[:, :, None]
  while size:
    blocks.append(x[..., size:, :size])
    x = jnp.stack([x[..., :size, :size], x[..., size:, size:]], axis=3)
    x = x.reshape(*x.shape[:2], -1, size, size)
    size //= 2
  return blocks[::-1]
