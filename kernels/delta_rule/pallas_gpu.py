"""The delta rule on NVIDIA GPUs by Triton: chunks side by side where they can be, then a scan.

`pairs` makes A and the inverse of every chunk (one program per chunk and head); `forward` scans the
chunks with the state in registers (one program per head and block of V). The backward scans once
more for the states and vn, scans in reverse for the gradients of values and states, and last makes
the gradients of the keys chunk by chunk. Bodies are in `gpu_bodies`.

Compiled to Triton's intermediate code and run as XLA operations in tests; not yet timed on a GPU,
hence not the default there.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels.delta_rule import gpu_bodies, limits
from kernels.delta_rule.gpu_bodies import Plan

Array = jax.Array
CHUNK = 64
SMALLEST = 16  # rows and columns of a product


def delta_rule(q, write_key, erase_key, value, log_decay, *, state, segments, scale,
               interpret: bool | None = None, passes: limits.Passes | None = None):
  """Arguments as `api.delta_rule` prepares them; returns (out, state).

  Sizes K and V are padded to powers of two. `interpret` runs the kernels as XLA operations, by
  default False: then only a GPU can run them. Raises NotImplementedError where they cannot run.
  """
  interpret = limits.check('gpu', interpret, q, value)
  batch, time, heads, width = value.shape
  key_heads = tuple(x.shape[2] for x in (q, write_key, erase_key))
  plan = make_plan(scale, heads, key_heads, q.shape[3], width, q.dtype, interpret, passes)
  decay = jnp.broadcast_to(log_decay.astype(jnp.float32), (*log_decay.shape[:3], q.shape[3]))
  pad = plan.key - q.shape[3], plan.value - width
  inputs = [jnp.pad(x, ((0, 0), (0, -time % CHUNK), (0, 0), (0, size - x.shape[3])))
            for x, size in ((q, plan.key), (write_key, plan.key), (erase_key, plan.key),
                            (value, plan.value), (decay, plan.key))]
  wide = jnp.pad(state, ((0, 0), (0, 0), (0, pad[0]), (0, pad[1])))
  if segments is not None:
    segments = jnp.pad(segments, ((0, 0), (0, -time % CHUNK)), mode='edge')
  out, after = _run(plan, *inputs, wide, segments)
  return out[:, :time, :, :width], after[:, :, :q.shape[3], :width]


def make_plan(scale: float, heads: int, key_heads, key: int, value: int, dtype, interpret: bool,
              passes: limits.Passes | None = None) -> Plan:
  """Static facts of a call: a state of 8192 floats is 64 registers for each of 128 threads."""
  key, value = (max(pl.next_power_of_2(x), SMALLEST) for x in (key, value))
  return Plan(scale, heads, key_heads, key, value, CHUNK, min(key, 64),
              min(value, max(8192 // key, SMALLEST)),
              passes or limits.default_passes(dtype), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan, *args):
  *inputs, state, segments = args
  return _forward(plan, inputs, state, segments, *_pairs(plan, inputs, segments), False)


def _save(plan, *args):
  return _run(plan, *args), args


class _Specs:
  """Block specs for a grid (chunk or block of V, head, batch)."""

  def __init__(self, plan: Plan, time: int, value_blocks: bool):
    """`value_blocks`: the first axis of the grid goes over blocks of V and not over chunks."""
    self.plan, self.time, self.split = plan, time, value_blocks
    self.chunks = time // plan.chunk
    self.width = plan.value_block if value_blocks else plan.value

  def rows(self, heads: int, size: int):
    """All rows of one head of [B, T, H, size]."""
    group = self.plan.heads // heads
    return pl.BlockSpec((None, self.time, None, size), lambda n, h, b: (b, 0, h // group, 0))

  def keys(self):
    return [self.rows(h, self.plan.key) for h in self.plan.key_heads]

  def values(self):
    return pl.BlockSpec((None, self.time, None, self.width),
                        lambda n, h, b: (b, 0, h, n if self.split else 0))

  def squares(self):
    """[B, HV, T / C, C, C], all chunks or one."""
    c = self.plan.chunk
    if self.split:
      return pl.BlockSpec((None, None, self.chunks, c, c), lambda n, h, b: (b, h, 0, 0, 0))
    return pl.BlockSpec((None, None, None, c, c), lambda n, h, b: (b, h, n, 0, 0))

  def states(self):
    """[B, HV, T / C, K, V], all chunks or one."""
    if self.split:
      return pl.BlockSpec((None, None, self.chunks, self.plan.key, self.width),
                          lambda n, h, b: (b, h, 0, 0, n))
    return pl.BlockSpec((None, None, None, self.plan.key, self.width),
                        lambda n, h, b: (b, h, n, 0, 0))

  def state(self):
    return pl.BlockSpec((None, None, self.plan.key, self.width), lambda n, h, b: (b, h, 0, n))

  def segments(self):
    return pl.BlockSpec((None, self.time), lambda n, h, b: (b, 0))


def _call(plan: Plan, specs: _Specs, body, name: str, operands, in_specs, outs, segments,
          warps: int = 4):
  """`outs` are (shape, dtype, spec)."""
  if segments is not None:
    operands, in_specs = [*operands, segments], [*in_specs, specs.segments()]
  first = plan.value // specs.width if specs.split else specs.chunks
  return pl.pallas_call(
    functools.partial(body, plan, segments is not None),
    grid=(first, plan.heads, operands[0].shape[0]), in_specs=in_specs,
    out_specs=[spec for *_, spec in outs],
    out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outs], name=name,
    compiler_params=plt.CompilerParams(num_warps=warps, num_stages=2),
    interpret=plan.interpret)(*operands)


def _pairs(plan: Plan, inputs, segments):
  """(A of the dtype of q, (I + M)^{-1} in float32), [B, HV, T / C, C, C]."""
  q, write, erase, _, decay = inputs
  specs = _Specs(plan, q.shape[1], False)
  shape = q.shape[0], plan.heads, specs.chunks, plan.chunk, plan.chunk
  return _call(plan, specs, gpu_bodies.pairs_body, 'delta_rule_pairs', [q, write, erase, decay],
               [*specs.keys(), specs.rows(plan.heads, plan.key)],
               [(shape, q.dtype, specs.squares()), (shape, jnp.float32, specs.squares())], segments)


def _forward(plan: Plan, inputs, state, segments, scores, inverse, keep_states: bool):
  """(out, state), or for the backward (states [B, HV, T / C, K, V], vn [B, T, HV, V])."""
  value = inputs[3]
  specs = _Specs(plan, value.shape[1], True)
  if keep_states:
    outs = [((*state.shape[:2], specs.chunks, *state.shape[2:]), jnp.float32, specs.states()),
            (value.shape, jnp.float32, specs.values())]
  else:
    outs = [(value.shape, value.dtype, specs.values()), (state.shape, jnp.float32, specs.state())]
  return _call(plan, specs, lambda p, s, *refs: gpu_bodies.forward_body(p, s, keep_states, *refs),
               'delta_rule_states' if keep_states else 'delta_rule_forward',
               [*inputs, scores, inverse, state],
               [*specs.keys(), specs.values(), specs.rows(plan.heads, plan.key), specs.squares(),
                specs.squares(), specs.state()], outs, segments)


def _backward(plan: Plan, args, grads):
  *inputs, state, segments = args
  q, write, erase, value, decay = inputs
  d_out, d_after = grads
  scores, inverse = _pairs(plan, inputs, segments)
  states, new = _forward(plan, inputs, state, segments, scores, inverse, True)
  specs = _Specs(plan, value.shape[1], True)
  d_value, d_states, d_state = _call(
    plan, specs, gpu_bodies.states_backward_body, 'delta_rule_states_backward',
    [q, write, erase, decay, scores, inverse, d_out, d_after],
    [*specs.keys(), specs.rows(plan.heads, plan.key), specs.squares(), specs.squares(),
     specs.values(), specs.state()],
    [(value.shape, jnp.float32, specs.values()), (states.shape, jnp.float32, specs.states()),
     (state.shape, jnp.float32, specs.state())], segments)
  specs = _Specs(plan, value.shape[1], False)
  every = specs.rows(plan.heads, plan.key)
  found = _call(
    plan, specs, gpu_bodies.keys_backward_body, 'delta_rule_keys_backward',
    [q, write, erase, decay, new, d_out, d_value, states, d_states],
    [*specs.keys(), every, *[specs.values()] * 3, *[specs.states()] * 2],
    [((*value.shape[:3], plan.key), jnp.float32, every)] * 4, segments, warps=8)
  d_keys = [x.reshape(*x.shape[:2], like.shape[2], -1, plan.key).sum(3).astype(like.dtype)
            for x, like in zip(found, (q, write, erase))]  # value heads that share a key
  return *d_keys, d_value.astype(value.dtype), found[3], d_state, None


_run.defvjp(_save, _backward)
