"""The delta rule on TPU: one kernel forward, one backward, nothing in between in HBM.

Grid (batch, block of heads, chunk); the chunk axis is sequential and carries the state in VMEM.
The arithmetic of `chunked`, stage by stage over the heads of a block, so that the scheduler can
interleave them; the state stands transposed, [V, K], where decays are rows. The backward first runs the forward for the states that enter the chunks.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.common import dispatch
from kernels.delta_rule import tiles

Array = jax.Array
CHUNK = 64
LANES = 128
BLOCK = 16  # heads of 128 per grid step: the scheduler interleaves them, at the cost of compile time
VMEM_LIMIT = 60 * 2**20  # below the memory of every generation, above what 8 heads of 256 need
EXACT = tiles.Passes(6, 6, 6)
MIXED = tiles.Passes(1, 3, 3)


class Plan(NamedTuple):
  """Static facts of a call."""

  scale: float
  heads: int  # value heads
  key_heads: tuple[int, int, int]  # of q, write_key, erase_key
  key: int  # K, padded
  value: int  # V, padded
  block: int  # value heads per grid step
  chunk: int
  passes: tiles.Passes
  interpret: bool


def delta_rule(q, write_key, erase_key, value, log_decay, *, state, segments, scale,
               interpret: bool | None = None, passes: tiles.Passes | None = None):
  """Arguments as `api.delta_rule` prepares them; returns (out, state).

  Sizes K and V are padded to multiples of 128. `interpret` runs the kernel as XLA operations, by
  default False: then only a TPU can run it. Raises NotImplementedError where it cannot run.
  """
  if interpret is None:
    interpret = False
    if dispatch.platform() != 'tpu':
      raise NotImplementedError(f'a TPU is needed, the platform is {dispatch.platform()}')
  if q.dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(f'dtype {q.dtype} is not one of float32, bfloat16')
  if max(q.shape[3], value.shape[3]) > 256:
    raise NotImplementedError(f'K={q.shape[3]}, V={value.shape[3]}: at most 256')
  batch, time, heads, width = value.shape
  key_heads = tuple(x.shape[2] for x in (q, write_key, erase_key))
  plan = Plan(scale, heads, key_heads, _padded(q.shape[3]), _padded(width),
              _block(heads, key_heads, BLOCK if width <= LANES else BLOCK // 4), CHUNK, passes or (EXACT if q.dtype == jnp.float32 else
                                                         MIXED), interpret)
  decay = jnp.broadcast_to(log_decay.astype(jnp.float32), (*log_decay.shape[:3], q.shape[3]))
  flat = [_flatten(x, size, plan.chunk) for x, size in (
    (q, plan.key), (write_key, plan.key), (erase_key, plan.key), (value, plan.value),
    (decay, plan.key))]
  pad = plan.key - q.shape[3], plan.value - width
  wide = jnp.pad(state, ((0, 0), (0, 0), (0, pad[0]), (0, pad[1]))) if any(pad) else state
  out, after = _run(plan, *flat, wide, _facts(segments, plan.chunk))
  out = out.reshape(batch, -1, heads, plan.value)[:, :time, :, :width]
  return out, after[:, :, :q.shape[3], :width]


def _padded(size: int) -> int:
  return -(-size // LANES) * LANES


def _block(heads: int, key_heads, most: int) -> int:
  """Most value heads of a grid step that share or split the blocks of their keys evenly."""
  def fits(n):
    groups = [heads // k for k in key_heads]
    return heads % n == 0 and all(n % g == 0 or g % n == 0 for g in groups)
  return max(n for n in range(1, most + 1) if fits(n))


def _flatten(x: Array, size: int, chunk: int) -> Array:
  """[B, T, H * size] with time padded to chunks."""
  pad = -x.shape[1] % chunk, size - x.shape[3]
  if any(pad):
    x = jnp.pad(x, ((0, 0), (0, pad[0]), (0, 0), (0, pad[1])))
  return x.reshape(*x.shape[:2], -1)


def _facts(segments, chunk: int):
  """Segments as the kernels read them: by row i32[B, T, 128] (lane 0 the segment, 1 whether the row
  sees the state that enters, 2 whether it writes into the one that leaves, 3 whether the chunk
  carries the one to the other), and by column i32[B, T / C, 1, C]."""
  if segments is None:
    return None
  batch, time = segments.shape
  own = jnp.pad(segments, ((0, 0), (0, -time % chunk)), mode='edge').reshape(batch, -1, chunk)
  last = own[:, :, -1:]
  before = jnp.pad(last[:, :-1], ((0, 0), (1, 0), (0, 0)))
  facts = jnp.stack([own, own == before, own == last,
                     jnp.broadcast_to(last == before, own.shape)], -1)
  facts = jnp.pad(facts.astype(jnp.int32), ((0, 0),) * 3 + ((0, LANES - 4),))
  return facts.reshape(batch, -1, LANES), own[:, :, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan, *args):
  out, after, _ = _forward(plan, args, keep_states=False)
  return out, after


def _save(plan, *args):
  return _run(plan, *args), args


def _specs(plan: Plan, reverse: int | None = None):
  """(keys, value, states, state, facts): block specs; `reverse` is the number of chunks."""
  def chunk_of(c):
    return c if reverse is None else reverse - 1 - c

  def keys(heads):
    group = plan.heads // heads
    count = max(plan.block // group, 1)
    return pl.BlockSpec((1, plan.chunk, count * plan.key),
                        lambda b, h, c: (b, chunk_of(c), h * plan.block // group // count))

  def flat(size):
    return pl.BlockSpec((1, plan.chunk, plan.block * size), lambda b, h, c: (b, chunk_of(c), h))

  states = pl.BlockSpec((1, 1, plan.block, plan.value, plan.key),
                        lambda b, h, c: (b, chunk_of(c), h, 0, 0))
  state = pl.BlockSpec((1, plan.block, plan.key, plan.value), lambda b, h, c: (b, h, 0, 0))
  facts = (pl.BlockSpec((1, plan.chunk, LANES), lambda b, h, c: (b, chunk_of(c), 0)),
           pl.BlockSpec((1, 1, 1, plan.chunk), lambda b, h, c: (b, chunk_of(c), 0, 0)))
  return keys, flat, states, state, facts


def _call(plan: Plan, body, name: str, grid, in_specs, out_specs, out_shape, cost):
  return pl.pallas_call(
    body, grid=grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_shape, name=name,
    scratch_shapes=[pltpu.VMEM((plan.block, plan.value, plan.key), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=VMEM_LIMIT),
    cost_estimate=cost, interpret=plan.interpret)


def _forward(plan: Plan, args, keep_states: bool):
  """(out, after, states): out is None and states are f32[B, T / C, HV, V, K] for the backward."""
  *inputs, state, facts = args
  batch, time, _ = inputs[0].shape
  chunks = time // plan.chunk
  keys, flat, states, single, fact_specs = _specs(plan)
  in_specs = [*(keys(h) for h in plan.key_heads), flat(plan.value), flat(plan.key), single]
  shapes = jax.ShapeDtypeStruct
  if keep_states:
    out_specs = [states]
    out_shape = [shapes((batch, chunks, plan.heads, plan.value, plan.key), jnp.float32)]
  else:
    out_specs = [flat(plan.value), single]
    out_shape = [shapes(inputs[3].shape, inputs[3].dtype), shapes(state.shape, jnp.float32)]
  operands = [*inputs, state]
  if facts is not None:
    operands, in_specs = operands + list(facts), in_specs + list(fact_specs)
  body = functools.partial(_forward_body, plan, facts is not None, keep_states)
  found = _call(plan, body, 'delta_rule_states' if keep_states else 'delta_rule_forward',
                (batch, plan.heads // plan.block, chunks), in_specs, out_specs, out_shape,
                cost(plan, batch, time, inputs[0].dtype, backward=False))(*operands)
  return (None, None, found[0]) if keep_states else (*found, None)


def _backward(plan: Plan, args, grads):
  *inputs, state, facts = args
  d_out, d_after = grads
  batch, time, _ = inputs[0].shape
  chunks = time // plan.chunk
  held = _forward(plan, args, keep_states=True)[2]
  keys, flat, states, single, fact_specs = _specs(plan, reverse=chunks)
  in_specs = [*(keys(h) for h in plan.key_heads), flat(plan.value), flat(plan.key), states,
              flat(plan.value), single]
  operands = [*inputs, held, d_out, d_after]
  if facts is not None:
    operands, in_specs = operands + list(facts), in_specs + list(fact_specs)
  shapes = [jax.ShapeDtypeStruct((batch, time, plan.heads * size), x.dtype) for x, size in zip(
    inputs, (plan.key, plan.key, plan.key, plan.value, plan.key))]
  out_specs = [flat(plan.key)] * 3 + [flat(plan.value), flat(plan.key), single]
  body = functools.partial(_backward_body, plan, facts is not None)
  *found, d_state = _call(
    plan, body, 'delta_rule_backward', (batch, plan.heads // plan.block, chunks), in_specs,
    out_specs, [*shapes, jax.ShapeDtypeStruct(state.shape, jnp.float32)],
    cost(plan, batch, time, inputs[0].dtype, backward=True))(*operands)
  for n, heads in enumerate(plan.key_heads):  # heads that share a key
    if heads != plan.heads:
      found[n] = found[n].reshape(batch, time, heads, -1, plan.key).astype(jnp.float32).sum(
        3).astype(found[n].dtype).reshape(batch, time, -1)
  return *found, d_state, None


_run.defvjp(_save, _backward)


def cost(plan: Plan, batch: int, time: int, dtype, backward: bool) -> pl.CostEstimate:
  """Roofline of a kernel: bytes that must move, and flops of single passes."""
  k, v, c, size = plan.key, plan.value, plan.chunk, jnp.dtype(dtype).itemsize
  levels = c.bit_length() - 1
  tokens = batch * time * plan.heads
  moved = (3 * k + 2 * v) * size + 4 * k
  flops = 4 * c * c * k * levels + 4 * c**3 * (levels - 1) + 6 * c * k * v + 4 * c * c * v
  if backward:
    moved += (3 * k + v) * size + 4 * k + 4 * k * v // c
    flops += 8 * c * c * k * levels + 10 * c * k * v + 8 * c * c * v + 2 * c * c * k
  return pl.CostEstimate(flops=tokens * flops // c, bytes_accessed=tokens * moved,
                         transcendentals=tokens * k)


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
      inverse = [tiles.invert_tiles(x, masks) for x in erased]  # of the last level below 8 is used
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


def _forward_body(plan: Plan, segmented: bool, keep_states: bool, *refs):
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


def _backward_body(plan: Plan, segmented: bool, *refs):
  inputs, states_ref, d_out_ref, d_after_ref = refs[:5], *refs[5:8]
  facts = refs[8:10] if segmented else ()
  *outs, scratch = refs[10 if segmented else 8:]
  at, passes, c = pl.program_id(2), plan.passes, plan.chunk

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
