"""Linear attention by the delta rule: GDN, KDA, FG2-GDN and FG2-GDN+ as one layer.

Short causal convolutions and SiLU on queries, keys and values; queries and keys of unit length; a
decay per head (gdn) or channel; learning rates per head (gdn, kda) or channel; per-head RMSNorm and
a gate on what is read. arXiv 2412.06464, 2510.26692, 2604.19021.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels import delta_rule
from zppo_jax.mesh import axes
from zppo_jax.models import layers
from zppo_jax.models.cache import RECURRENT_AXES, Recurrent
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.mixers.place import Place

Array = jax.Array


def delta_mixer(kind: str, config: ModelConfig, params, x: Array, place: Place,
                cache: Recurrent | None, layer, prefix: Recurrent | None = None
                ) -> tuple[Array, Recurrent | None]:
  """x [B, T, D]. Padding leaves the state as it is; a new segment starts from an empty one.

  A prefix is where the rows of its group start, unless they have a cache: a cache that follows a
  prefix starts from it (`cache.split`).
  """
  batch, dtype = x.shape[0], x.dtype
  held = cache
  if cache is None and prefix is not None:
    held = jax.tree.map(lambda s: jnp.repeat(s, batch // s.shape[0], axis=0), prefix)
  elif cache is not None and layer is not None:
    held = jax.tree.map(lambda s: s[layer], cache)
  channels = jnp.concatenate([_project(x, w) for w in (params.query, params.key, params.value)], -1)
  mixed, recent = causal_conv(channels, params.conv.astype(dtype),
                              None if held is None else held.conv, place.segment_ids)
  q, key, value = _split(config, jax.nn.silu(mixed))
  q, key = _unit(q), _unit(key)
  inputs = q.astype(dtype), *(a.astype(dtype) for a in _inputs(kind, config, params, x, key, value))
  decay = _log_decay(kind, config, params, x)
  out, state = _rule(config, *inputs, decay, None if held is None else held.state,
                     place.segment_ids, decoding=cache is not None)
  out = layers.rms_norm(out, params.norm, config.norm_eps)
  out = out * _gate(kind, config, params, x)
  y = layers.project_heads(out, params.out)
  new = Recurrent(state, recent)
  if cache is None:
    return y, new if place.keep else None
  if layer is not None:
    new = jax.tree.map(lambda old, own: old.at[layer].set(own), cache, new)
  return y, new


def causal_conv(x: Array, weight: Array, before: Array | None, segment_ids: Array
                ) -> tuple[Array, Array]:
  """y_t = sum_i weight[:, i] x_{t - (W - 1) + i}, within segments; returns (y, last W - 1 inputs).

  x [B, T, C], weight [C, W], `before` [B, W - 1, C] the inputs before x, zeros by default, of the
  segment of the first token. Padding (segment 0) must be a suffix and is not remembered.
  """
  batch, time, channels = x.shape
  reach = weight.shape[1] - 1
  if before is None:
    before = jnp.zeros((batch, reach, channels), x.dtype)
  wide = jnp.concatenate([before.astype(x.dtype), x], axis=1)
  ids = jnp.concatenate([jnp.repeat(segment_ids[:, :1], reach, axis=1), segment_ids], axis=1)
  y = x * weight[:, reach]
  for i in range(reach):
    same = (ids[:, i:i + time] == segment_ids)[..., None]
    y += jnp.where(same, wide[:, i:i + time], 0) * weight[:, i]
  if time == 1:
    return y, jnp.where(segment_ids[..., None] > 0, wide[:, 1:], wide[:, :-1])
  real = jnp.sum(segment_ids > 0, axis=1)
  columns = real[:, None] + jnp.arange(reach)
  return y, jnp.take_along_axis(wide, columns[..., None], axis=1)


def _project(x: Array, weight: Array) -> Array:
  """[B, T, out] of weight [D, ...], its other dims flat."""
  return layers.project(x, weight).reshape(*x.shape[:2], -1)


def _heads(x: Array, size: int) -> Array:
  return x.reshape(*x.shape[:2], -1, size)


def _split(config: ModelConfig, channels: Array) -> list[Array]:
  keys = config.linear_heads * config.linear_key_dim
  q, key, value = jnp.split(channels, [keys, 2 * keys], axis=-1)
  return [_heads(q, config.linear_key_dim), _heads(key, config.linear_key_dim),
          _heads(value, config.linear_value_dim)]


def _unit(x: Array) -> Array:
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


def _low_rank(x: Array, first: Array, second: Array) -> Array:
  """f32[B, T, HV, size] of x through first [D, R] and second [R, HV, size]."""
  wide = _project(_project(x, first), second).astype(jnp.float32)
  return _heads(wide, second.shape[-1])


def _inputs(kind: str, config: ModelConfig, params, x: Array, key: Array, value: Array):
  """(write_key, erase_key, value) of the delta rule."""
  most = 2. if config.linear_negative else 1.
  value = value.astype(jnp.float32)
  if kind in ('gdn', 'kda'):
    rate = most * jax.nn.sigmoid(_project(x, params.rate).astype(jnp.float32))
    return delta_rule.kda_inputs(key, value, rate)
  rate = most * jax.nn.sigmoid(_low_rank(x, *params.rate))
  if kind == 'fg2_gdn':
    return delta_rule.fg2_inputs(key, value, rate)
  written = most * jax.nn.sigmoid(_low_rank(x, *params.value_rate))
  return delta_rule.fg2_plus_inputs(key, value, rate, written)


def _log_decay(kind: str, config: ModelConfig, params, x: Array) -> Array:
  """-exp(A) softplus(f(x) + bias) in nats, f32[B, T, HV, 1] (gdn) or [B, T, HV, K]."""
  if kind == 'gdn':
    raw = _project(x, params.decay).astype(jnp.float32)[..., None]
    bias = params.decay_bias[:, None]
  else:
    raw, bias = _low_rank(x, *params.decay), params.decay_bias
  return -jnp.exp(params.decay_scale)[:, None] * jax.nn.softplus(raw + bias)


def _gate(kind: str, config: ModelConfig, params, x: Array) -> Array:
  if kind == 'gdn':
    return jax.nn.silu(_heads(_project(x, params.gate), config.linear_value_dim))
  return jax.nn.sigmoid(_low_rank(x, *params.gate)).astype(x.dtype)


def _rule(config: ModelConfig, q, write, erase, value, decay, state, segment_ids, decoding: bool):
  """The delta rule on the chips that hold the rows, heads and parts of rows."""
  if decoding and q.shape[1] == 1:
    inputs = (x[:, 0] for x in (q, write, erase, value, decay))
    after, out = delta_rule.step(state, *inputs)
    after = jnp.where(segment_ids[..., None, None] > 0, after, state)  # rows that wait keep theirs
    return out[:, None], axes.constrain(after, *RECURRENT_AXES.state[1:])

  parts = axes.shards('length', q.shape[1])

  def rule(q, write, erase, value, decay, state, segment_ids):
    inputs, kwargs = (q, write, erase, value, decay), dict(
      state=state, segment_ids=segment_ids, implementation=config.linear_kernel)
    if parts > 1:
      return delta_rule.delta_rule_sharded(*inputs, axis_name='context', **kwargs)
    return delta_rule.delta_rule(*inputs, **kwargs)

  if state is None:
    state = jnp.zeros((q.shape[0], *value.shape[2:3], q.shape[3], value.shape[3]), jnp.float32)
  heads, whole = ('batch', 'length', 'heads', None), ('batch', 'heads', None, None)
  return axes.on_shards(rule, [heads] * 5 + [whole, ('batch', 'length')], [heads, whole])(
    q, write, erase, value, decay, state, segment_ids)
