"""The arithmetic of one chunk of one head on TPU tiles: what the TPU kernels are made of.

Arrays are f32 [C, ...] values with C a power of two of at least 8. The tree of `tree` in a form for
vector registers: below 8 rows siblings are exchanged by rotating sublanes and chosen by masks; from
8 rows on, blocks are whole registers and the choice is made while tracing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array
SUBLANES = 8


class Masks(NamedTuple):
  """Masks of a chunk, shared by all heads."""

  row: Array  # i32[C, K], the number of the row
  i: Array  # i32[C, C]
  j: Array  # i32[C, C]
  same: Array | None = None  # i32[C, C], 1 where both rows are of one segment
  enters: Array | None = None  # f32[C, 1], the row sees the state that enters the chunk
  leaves: Array | None = None  # f32[C, 1], the row writes into the state that leaves
  carries: Array | None = None  # f32[1, 1]


class Decays(NamedTuple):
  """Factors of `tree.Decays`; of a level in one array: `after` in odd blocks, `before` in even."""

  levels: tuple[Array, ...]  # [C, K] each
  after: Array  # e^G
  before: Array  # e^{G_C - G}
  total: Array  # e^{G_C} in every row


def iota(shape: tuple[int, ...], axis: int) -> Array:
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def dot(a: Array, b: Array, contract: tuple[int, int], passes: int) -> Array:
  """Product of matrices over axis contract[0] of a and contract[1] of b, in float32."""
  dims = (((contract[0],), (contract[1],)), ((), ()))
  if passes == 6:
    return jax.lax.dot_general(a, b, dims, precision=jax.lax.Precision.HIGHEST,
                               preferred_element_type=jnp.float32)
  a1, b1 = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
  if passes == 3:  # (a1 + a2) (b1 + b2) without a2 b2, as one product
    a2 = (a - a1.astype(jnp.float32)).astype(jnp.bfloat16)
    b2 = (b - b1.astype(jnp.float32)).astype(jnp.bfloat16)
    a1 = jnp.concatenate([a1, a1, a2], contract[0])
    b1 = jnp.concatenate([b1, b2, b1], contract[1])
  # Operands are bfloat16: the default precision is exact.
  return jax.lax.dot_general(a1, b1, dims, precision=jax.lax.Precision.DEFAULT,
                             preferred_element_type=jnp.float32)


def blocks(x: Array, size: int) -> list[Array]:
  return [x[i:i + size] for i in range(0, x.shape[0], size)]


def rows(parts: list[Array]) -> Array:
  return jnp.concatenate(parts, 0)


def odd(x: Array, size: int) -> Array:
  """Rows of the odd blocks."""
  return rows(blocks(x, size)[1::2])


def spread(x: Array, size: int) -> Array:
  """Rows of odd blocks back in their places, zeros in even blocks."""
  return rows([y for b in blocks(x, size) for y in (jnp.zeros_like(b), b)])


def decays(log_decay: Array, masks: Masks) -> Decays:
  """Factors of all levels, one exponential per entry."""
  after = total = jnp.exp(log_decay)
  before, levels, size = jnp.ones_like(after), [], 1
  while size < log_decay.shape[0]:
    if size < SUBLANES:
      is_odd = (masks.row & size) != 0
      levels.append(jnp.where(is_odd, after, before))
      chunk = log_decay.shape[0]
      sibling = jnp.where(is_odd, pltpu.roll(total, size, 0),
                          pltpu.roll(total, chunk - size, 0))
      after = jnp.where(is_odd, after * sibling, after)
      before = jnp.where(is_odd, before, before * sibling)
      total = total * sibling
    else:
      a, b, t = (blocks(x, size) for x in (after, before, total))
      levels.append(rows([a[n] if n % 2 else b[n] for n in range(len(a))]))
      after = rows([a[n] * t[n - 1] if n % 2 else a[n] for n in range(len(a))])
      before = rows([b[n] if n % 2 else b[n] * t[n + 1] for n in range(len(a))])
      total = rows([t[n] * t[n ^ 1] for n in range(len(t))])
    size *= 2
  return Decays(tuple(levels), after, before, total)


def level_mask(masks: Masks, size: int) -> Array:
  """Pairs (odd row, even column) of sibling blocks, [C, C]; [C / 2, C] from 8 rows on."""
  used = [x for x in (masks.i, masks.j, masks.same) if x is not None]
  if size >= SUBLANES:
    used = [odd(x, size) for x in used]
  i, j, *same = used
  found = (((i ^ j) >> (size.bit_length() - 1)) == 1) & ((i & size) != 0)
  return found & (same[0] != 0) if same else found


def pairs(level: int, factor: Array, q: Array, erase: Array, write: Array, mask: Array,
          passes: int) -> tuple[Array, Array]:
  """(A, M) of a level, [C, C] each, or [C / 2, C] of the odd blocks from 8 rows on."""
  left = [q * factor, erase * factor]
  if level >= SUBLANES:
    left = [odd(x, level) for x in left]
  both = dot(rows(left), write * factor, (1, 1), passes)
  half = both.shape[0] // 2
  return jnp.where(mask, both[:half], 0), jnp.where(mask, both[half:], 0)


def invert_tiles(erase: Array, masks: Masks) -> Array:
  """(I + M)^{-1} of the 8-row blocks on the diagonal of M [C, C], by substitution in float32.

  The blocks stand side by side in one tile, [8, (block, column)], and are solved together: row c is
  final after c steps, and a step takes M_rc times row c from all rows r below.
  """
  chunk, shift = erase.shape[0], SUBLANES.bit_length() - 1
  lane, sublane = masks.j[:SUBLANES], masks.i[:SUBLANES]
  column = lane & (SUBLANES - 1)
  packed = sum(jnp.where((lane >> shift) == n, tile, 0)
               for n, tile in enumerate(blocks(erase, SUBLANES)))
  solved = (column == sublane).astype(jnp.float32)
  for c in range(SUBLANES - 1):
    factor = jnp.where(column == c, packed, 0)
    for step in (1, 2, 4):  # to the lanes of the block: c - step above, then the rest below
      down = (c & step) != 0
      factor = factor + pltpu.roll(factor, chunk - step if down else step, 1)
    solved = solved - factor * solved[c:c + 1]
  return rows([jnp.where((lane >> shift) == n, solved, 0) for n in range(chunk // SUBLANES)])


def join(inverse: Array, erase: Array, level: int, passes: int) -> Array:
  """Inverse of the blocks of 2 * level rows, of that of blocks of `level` and M of the odd rows."""
  own = odd(inverse, level)
  below = dot(own, spread(dot(erase, inverse, (1, 0), passes), level), (1, 0), passes)
  return inverse - spread(below, level)


def pairs_backward(level: int, factor: Array, q: Array, erase: Array, write: Array,
                   d_scores: Array, d_erase: Array, mask: Array, passes: int):
  """(d_q, d_erase, d_write) of a level, [C, K]."""
  left, d = [q * factor, erase * factor], [d_scores, d_erase]
  if level >= SUBLANES:
    left, d = [odd(x, level) for x in left], [odd(x, level) for x in d]
  d = rows([jnp.where(mask, x, 0) for x in d])
  d_left = dot(d, write * factor, (1, 0), passes)
  d_write = dot(d, rows(left), (0, 0), passes) * factor
  half = d.shape[0] // 2
  parts = [d_left[:half], d_left[half:]]
  if level >= SUBLANES:
    parts = [spread(x, level) for x in parts]
  return parts[0] * factor, parts[1] * factor, d_write
