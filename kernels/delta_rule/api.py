"""The asymmetric delta rule with channel-wise decay: one op for a family of linear attentions."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels.common import dispatch
from kernels.delta_rule import chunked, pallas_gpu, pallas_tpu, reference

Array = jax.Array
IMPLEMENTATIONS = {'reference': reference.delta_rule, 'chunked': chunked.delta_rule,
                   'pallas_tpu': pallas_tpu.delta_rule, 'pallas_gpu': pallas_gpu.delta_rule}
_DEFAULT = {'tpu': ('pallas_tpu', 'chunked')}


def delta_rule(q: Array, write_key: Array, erase_key: Array, value: Array, log_decay: Array, *,
               scale: float | None = None, state: Array | None = None,
               segment_ids: Array | None = None,
               implementation: str | Sequence[str] | None = None) -> tuple[Array, Array]:
  """S_t = (I - kappa_t iota_t^T) Diag(e^{g_t}) S_{t-1} + kappa_t u_t^T;  o_t = scale S_t^T q_t.

  q, write_key (kappa), erase_key (iota) [B, T, H or HV, K], heads repeated in consecutive groups;
  value (u) [B, T, HV, V]; log_decay (g, nats, <= 0) [B, T, HV, K] or [B, T, HV, 1]; state
  f32[B, HV, K, V], zeros without; segment_ids i32[B, T]: the state is cleared where a new id
  begins, and tokens of id 0 are padding: output 0, state unchanged, values never read. The given
  state belongs to the first segment. scale defaults to K ** -0.5.

  `implementation=None` takes the fastest that can run here; a name (reference, chunked,
  pallas_tpu, pallas_gpu) runs or raises NotImplementedError. Returns (out [B, T, HV, V] of the
  dtype of value, state f32[B, HV, K, V]). Raises ValueError on shapes or dtypes that do not fit,
  and, outside jit, on a log-decay that is positive or NaN. arXiv 2604.19021, 2510.26692.
  """
  _check(q, write_key, erase_key, value, log_decay, state, segment_ids)
  inputs, segments = [q, write_key, erase_key, value, log_decay], None
  if segment_ids is not None:
    real = (segment_ids != 0)[..., None, None]
    inputs = [jnp.where(real, x, 0) for x in inputs]
    segments = count_segments(segment_ids)
  _check_decay(inputs[-1])
  if state is None:
    wide = jnp.promote_types(jnp.float32, q.dtype)
    state = jnp.zeros((q.shape[0], value.shape[2], q.shape[3], value.shape[3]), wide)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  default = _DEFAULT.get(dispatch.platform(), ('chunked',))
  return dispatch.run('delta_rule', IMPLEMENTATIONS, implementation, default, *inputs, state=state,
                      segments=segments, scale=scale)


def step(state: Array, q: Array, write_key: Array, erase_key: Array, value: Array,
         log_decay: Array, *, scale: float | None = None) -> tuple[Array, Array]:
  """One token of `delta_rule`, for decoding: returns (state, out).

  Shapes of `delta_rule` without T. Memory-bound: reads and writes the state once.
  """
  _check(*(x[:, None] for x in (q, write_key, erase_key, value, log_decay)), state, None)
  wide = [jnp.repeat(x, value.shape[1] // x.shape[1], axis=1).astype(state.dtype)
          for x in (q, write_key, erase_key, value, log_decay)]
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  state, out = reference.token(state, *wide, scale)
  return state, out.astype(value.dtype)


def count_segments(segment_ids: Array) -> Array:
  """Number of borders passed, i32[B, T]: padding (id 0) takes the number of the token before.

  A border is a token whose id differs from the last id that was not 0.
  """
  def latest(before, now):
    return jnp.where(now == 0, before, now)

  last = jax.lax.associative_scan(latest, segment_ids, axis=1)
  before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
  border = (before != 0) & (last != before)
  return jnp.cumsum(border, axis=1, dtype=jnp.int32)


def _check(q, write_key, erase_key, value, log_decay, state, segment_ids):
  """Raises one ValueError that names every argument that does not fit."""
  if q.ndim != 4 or value.ndim != 4:
    raise ValueError(f'delta_rule: q {q.shape} and value {value.shape} must be '
                     '[batch, time, heads, size]')
  batch, time, _, size = q.shape
  heads, wrong = value.shape[2], []

  def expect(name, x, allowed):
    if x.shape not in allowed:
      wrong.append(f'{name} {x.shape}, expected {" or ".join(map(str, allowed))}')

  for name, x in (('q', q), ('write_key', write_key), ('erase_key', erase_key)):
    shape = (*x.shape[:2], x.shape[2] if x.ndim == 4 else None, *x.shape[3:])
    if shape != (batch, time, shape[2], size) or not shape[2] or heads % shape[2]:
      wrong.append(f'{name} {x.shape}, expected ({batch}, {time}, H, {size}) with H a divisor of '
                   f'the {heads} value heads')
    if x.dtype != q.dtype:
      wrong.append(f'{name} {x.dtype}, expected {q.dtype} as q')
  expect('value', value, [(batch, time, heads, value.shape[3])])
  expect('log_decay', log_decay, [(batch, time, heads, size), (batch, time, heads, 1)])
  if value.dtype != q.dtype:
    wrong.append(f'value {value.dtype}, expected {q.dtype} as q')
  for name, x in (('q', q), ('log_decay', log_decay)):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      wrong.append(f'{name} {x.dtype}, expected a floating dtype')
  if state is not None:
    expect('state', state, [(batch, heads, size, value.shape[3])])
    wide = jnp.promote_types(jnp.float32, q.dtype)
    if state.dtype != wide:
      wrong.append(f'state {state.dtype}, expected {wide}')
  if segment_ids is not None:
    expect('segment_ids', segment_ids, [(batch, time)])
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
      wrong.append(f'segment_ids {segment_ids.dtype}, expected int32')
  if wrong:
    raise ValueError('delta_rule: ' + '; '.join(wrong))


def _check_decay(log_decay):
  """Outside jit the values are at hand."""
  if not isinstance(log_decay, jax.core.Tracer) and log_decay.size:
    highest = float(jnp.max(log_decay))
    if not highest <= 0:
      raise ValueError(f'delta_rule: log_decay must be <= 0, got {highest}')
