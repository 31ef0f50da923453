"""The delta rule on TPU: one kernel forward, one backward, nothing in between in HBM.

Grid (batch, block of heads, chunk); the chunk axis is sequential and carries the state in VMEM.
The backward first runs the forward for the states that enter the chunks. The bodies of the kernels
are in `tpu_bodies`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.delta_rule import limits
from kernels.delta_rule.tpu_bodies import Plan, backward_body, forward_body

Array = jax.Array
CHUNK = 64
LANES = 128
BLOCK = 16  # heads of 128 per grid step: the more, the better the scheduler interleaves them
VMEM_LIMIT = 60 * 2**20  # below the memory of every generation, above what 8 heads of 256 need


def delta_rule(q, write_key, erase_key, value, log_decay, *, state, segments, scale,
               interpret: bool | None = None, passes: limits.Passes | None = None):
  """Arguments as `api.delta_rule` prepares them; returns (out, state).

  Sizes K and V are padded to multiples of 128. `interpret` runs the kernel as XLA operations, by
  default False: then only a TPU can run it. Raises NotImplementedError where it cannot run.
  """
  interpret = limits.check('tpu', interpret, q, value)
  batch, time, heads, width = value.shape
  key_heads = tuple(x.shape[2] for x in (q, write_key, erase_key))
  plan = make_plan(scale, heads, key_heads, q.shape[3], width, q.dtype, interpret, passes)
  decay = jnp.broadcast_to(log_decay.astype(jnp.float32), (*log_decay.shape[:3], q.shape[3]))
  flat = [_flatten(x, size, plan.chunk) for x, size in (
    (q, plan.key), (write_key, plan.key), (erase_key, plan.key), (value, plan.value),
    (decay, plan.key))]
  pad = plan.key - q.shape[3], plan.value - width
  wide = jnp.pad(state, ((0, 0), (0, 0), (0, pad[0]), (0, pad[1]))) if any(pad) else state
  out, after = _run(plan, *flat, wide, _facts(segments, plan.chunk))
  out = out.reshape(batch, -1, heads, plan.value)[:, :time, :, :width]
  return out, after[:, :, :q.shape[3], :width]


def make_plan(scale: float, heads: int, key_heads, key: int, value: int, dtype, interpret: bool,
              passes: limits.Passes | None = None) -> Plan:
  """Static facts of a call with `heads` value heads."""
  most = BLOCK if max(key, value) <= LANES else BLOCK // 4
  return Plan(scale, heads, key_heads, _padded(key), _padded(value), _block(heads, key_heads, most),
              CHUNK, passes or limits.default_passes(dtype), interpret)


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
  body = functools.partial(forward_body, plan, facts is not None, keep_states)
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
  body = functools.partial(backward_body, plan, facts is not None)
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
