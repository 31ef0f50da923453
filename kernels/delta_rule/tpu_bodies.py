"""Bodies of the TPU kernels: a chunk of a block of heads, stage by stage over the heads.

The arithmetic of `chunked`. A loop over whole heads would not be overlapped by the scheduler; doing
each stage for all heads is. The state stands transposed, [V, K], where the decays of channels are
rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.delta_rule import limits, tiles

Array = jax.Array


class Plan(NamedTuple):
  """Static facts of a call."""

  scale: float
  heads: int  # value heads
  key_heads: tuple[int, int, int]  # of q, write_key, erase_key
  key: int  # K, padded
  value: int  # V, padded
  block: int  # value heads per grid step
  chunk: int
  passes: limits.Passes
  interpret: bool


class Head(NamedTuple):
  """Rows of one head and what follows from them alone."""

  q: Array  # scaled
  write: Array
  erase: Array
  value: Array
  decays: tiles.Decays
  scores: Array  # A below the diagonal
  inverse: Array
  entering: Array  # [qg ; x]
  leaving: Array  # kr


def _masks(plan: Plan, facts) -> tiles.Masks:
  square = (plan.chunk, plan.chunk)
  shared = (tiles.iota((plan.chunk, plan.key), 0), tiles.iota(square, 0), tiles.iota(square, 1))
  if not facts:
    return tiles.Masks(*shared)
  rows, columns = facts[0][0], facts[1][0, 0]
  same = (jnp.broadcast_to(rows[:, :1], square) == jnp.broadcast_to(columns, square))
  enters, leaves, carries = (rows[:, n:n + 1].astype(jnp.float32) for n in (1, 2, 3))
  return tiles.Masks(*shared, same.astype(jnp.int32), enters, leaves, carries[:1])


def _heads(plan: Plan, masks: tiles.Masks, refs) -> list[Head]:
  """Stage by stage over the heads of the block."""
  def load(ref, n, size):
    held = ref.shape[2] // size
    at = n * held // plan.block
    return ref[0, :, at * size:(at + 1) * size].astype(jnp.float32)

  every, passes = range(plan.block), plan.passes
  q, write, erase = ([load(r, n, plan.key) for n in every] for r in refs[:3])
  q = [x * plan.scale for x in q]
  value = [load(refs[3], n, plan.value) for n in every]
  decays = [tiles.decays(load(refs[4], n, plan.key), masks) for n in every]
  scores = [jnp.zeros((plan.chunk, plan.chunk), jnp.float32) for _ in every]
  erased = list(scores)
  for level in range(plan.chunk.bit_length() - 1):
    size = 1 << level
    mask = tiles.level_mask(masks, size)
    found = [tiles.pairs(size, decays[n].levels[level], q[n], erase[n], write[n], mask,
                         passes.pair) for n in every]
    scores = [s + (tiles.spread(a, size) if size >= tiles.SUBLANES else a)
              for s, (a, _) in zip(scores, found)]
    if size < tiles.SUBLANES:
      erased = [x + m for x, (_, m) in zip(erased, found)]
      if 2 * size == tiles.SUBLANES:
        inverse = [tiles.invert_tiles(x, masks) for x in erased]
    else:
      inverse = [tiles.join(x, m, size, passes.solve) for x, (_, m) in zip(inverse, found)]
  heads = []
  for n in every:
    after, before = decays[n].after, decays[n].before
    if masks.same is not None:
      after, before = after * masks.enters, before * masks.leaves
    entering = tiles.rows([q[n] * after, erase[n] * after])
    heads.append(Head(q[n], write[n], erase[n], value[n], decays[n], scores[n], inverse[n],
                      entering, write[n] * before))
  return heads


def _keep(head: Head, masks: tiles.Masks, state: Array) -> Array:
  """e^{G_C} S of S [V, K], or 0 when the segment ends."""
  total = head.decays.total[:1]
  if masks.same is not None:
    total = total * masks.carries
  return total * state


def _start(scratch, state_ref):
  for n in range(scratch.shape[0]):
    scratch[n] = jnp.swapaxes(state_ref[0, n], 0, 1)


def _finish(state_ref, scratch):
  for n in range(scratch.shape[0]):
    state_ref[0, n] = jnp.swapaxes(scratch[n], 0, 1)


def _own(head: Head) -> Array:
  return jnp.sum(head.q * head.write, 1, keepdims=True)


def _new_values(plan, heads, states):
  """(vn, what q reads of the entering states), per head."""
  c, passes = plan.chunk, plan.passes
  erased = [tiles.dot(h.entering[c:], s, (1, 1), passes.state) for h, s in zip(heads, states)]
  return [tiles.dot(h.inverse, h.value - e, (1, 0), passes.solve) for h, e in zip(heads, erased)]


def forward_body(plan: Plan, segmented: bool, keep_states: bool, *refs):
  inputs, state_ref, facts = refs[:5], refs[5], refs[6:8] if segmented else ()
  *outs, scratch = refs[8 if segmented else 6:]
  at, passes, c = pl.program_id(2), plan.passes, plan.chunk

  @pl.when(at == 0)
  def _():
    _start(scratch, state_ref)

  masks = _masks(plan, facts)
  heads = _heads(plan, masks, inputs)
  states = [scratch[n] for n in range(plan.block)]
  if keep_states:
    outs[0][0, 0] = scratch[...]
  new = _new_values(plan, heads, states)
  for n, (h, s, v) in enumerate(zip(heads, states, new)):
    scratch[n] = _keep(h, masks, s) + tiles.dot(v, h.leaving, (0, 0), passes.state)
  if keep_states:
    return
  for n, (h, s, v) in enumerate(zip(heads, states, new)):
    read = tiles.dot(h.entering[:c], s, (1, 1), passes.pair)
    read += tiles.dot(h.scores, v, (1, 0), passes.pair) + _own(h) * v
    outs[0][0, :, n * plan.value:(n + 1) * plan.value] = read.astype(outs[0].dtype)

  @pl.when(at == pl.num_programs(2) - 1)
  def _():
    _finish(outs[1], scratch)


def backward_body(plan: Plan, segmented: bool, *refs):
  inputs, states_ref, d_out_ref, d_after_ref = refs[:5], *refs[5:8]
  facts = refs[8:10] if segmented else ()
  *outs, scratch = refs[10 if segmented else 8:]
  at, passes = pl.program_id(2), plan.passes

  @pl.when(at == 0)
  def _():
    _start(scratch, d_after_ref)

  every = range(plan.block)
  masks = _masks(plan, facts)
  heads = _heads(plan, masks, inputs)
  states, d_states = [states_ref[0, 0, n] for n in every], [scratch[n] for n in every]
  new = _new_values(plan, heads, states)
  d_out = [d_out_ref[0, :, n * plan.value:(n + 1) * plan.value].astype(jnp.float32)
           for n in every]
  d_new = [tiles.dot(h.scores, d, (0, 0), passes.pair) + _own(h) * d
           + tiles.dot(h.leaving, s, (1, 1), passes.state)
           for h, d, s in zip(heads, d_out, d_states)]
  d_value = [tiles.dot(h.inverse, d, (0, 0), passes.solve) for h, d in zip(heads, d_new)]
  both = [tiles.rows([d, -v]) for d, v in zip(d_out, d_value)]
  for n, h in enumerate(heads):
    scratch[n] = _keep(h, masks, d_states[n]) + tiles.dot(both[n], h.entering, (0, 0),
                                                         passes.state)
  d_pairs = [tiles.dot(b, v, (1, 1), passes.pair) for b, v in zip(both, new)]
  d_entering = [tiles.dot(b, s, (1, 0), passes.pair) for b, s in zip(both, states)]
  d_leaving = [tiles.dot(v, s, (1, 0), passes.pair) for v, s in zip(new, d_states)]
  for n, h in enumerate(heads):
    d_keep = jnp.sum(_keep(h, masks, d_states[n] * states[n]), 0, keepdims=True)
    parts = _rows_backward(plan, masks, h, d_pairs[n], jnp.sum(d_out[n] * new[n], 1, keepdims=True),
                           d_entering[n], d_leaving[n], d_keep)
    d_q, d_write, d_erase, d_decay = parts
    for ref, x in zip(outs, (d_q * plan.scale, d_write, d_erase, d_value[n], d_decay)):
      size = x.shape[1]
      ref[0, :, n * size:(n + 1) * size] = x.astype(ref.dtype)

  @pl.when(at == pl.num_programs(2) - 1)
  def _():
    _finish(outs[5], scratch)


def _rows_backward(plan, masks, head: Head, d_pairs, d_own, d_entering, d_leaving, d_keep):
  """(d_q, d_write, d_erase, d_log_decay) of the rows of a head."""
  c, d = plan.chunk, head.decays
  d_q = d_write = d_erase = jnp.zeros_like(head.q)
  for level, factor in enumerate(d.levels):
    size = 1 << level
    found = tiles.pairs_backward(size, factor, head.q, head.erase, head.write, d_pairs[:c],
                                 d_pairs[c:], tiles.level_mask(masks, size), plan.passes.pair)
    d_q, d_erase, d_write = d_q + found[0], d_erase + found[1], d_write + found[2]
  inside = head.q * d_q + head.erase * d_erase - head.write * d_write
  moved = d_entering * head.entering
  inside += moved[:c] + moved[c:]
  # Row t decays what stands before it, for every row from t on: sums over later and earlier rows.
  later = (masks.i <= masks.j).astype(jnp.float32)
  earlier = (masks.i > masks.j).astype(jnp.float32)
  d_decay = tiles.dot(later, inside, (1, 0), max(plan.passes.pair, 3)) + d_keep
  d_decay += tiles.dot(earlier, d_leaving * head.leaving, (1, 0), max(plan.passes.pair, 3))
  after, before = d.after, d.before
  if masks.same is not None:
    after, before = after * masks.enters, before * masks.leaves
  d_q += d_own * head.write + d_entering[:c] * after
  d_erase += d_entering[c:] * after
  d_write += d_own * head.q + d_leaving * before
  return d_q, d_write, d_erase, d_decay
