"""Building blocks without state. Dims: B rows, T tokens, S keys, H heads, KV key heads, K head
size."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from zppo_jax.models.config import ModelConfig, Rope

Array = jax.Array


def project(x: Array, weight: Array) -> Array:
  """x [B, T, D] by weight [D, ...] -> [B, T, ...], as one flat product.

  XLA's CPU backward of a batched product is twice as slow.
  """
  wide = x.reshape(-1, x.shape[-1]) @ weight.astype(x.dtype).reshape(weight.shape[0], -1)
  return wide.reshape(*x.shape[:2], *weight.shape[1:])


def project_heads(x: Array, weight: Array) -> Array:
  """x [B, T, H, K] by weight [H, K, D] -> [B, T, D]; flat as `project`."""
  flat = weight.astype(x.dtype).reshape(-1, weight.shape[-1])
  return (x.reshape(-1, flat.shape[0]) @ flat).reshape(*x.shape[:2], -1)


def _unit_rms(x: Array, eps: float) -> Array:
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
  """x / rms(x) * weight over the last axis, in float32, cast back before the product."""
  return _unit_rms(x, eps).astype(x.dtype) * weight.astype(x.dtype)


def norm(config: ModelConfig, x: Array, weight: Array) -> Array:
  """RMSNorm of the family's kind; 'one_plus' multiplies by 1 + weight in float32, cast after."""
  if config.norm == 'weight':
    return rms_norm(x, weight, config.norm_eps)
  return (_unit_rms(x, config.norm_eps) * (1 + weight.astype(jnp.float32))).astype(x.dtype)


def frequencies(size: int, theta: float, scaling: Rope | None) -> tuple[np.ndarray, float]:
  """(f32[size / 2] radians per position, factor of sin and cos).

  theta ** (-2 j / size), stretched: linear by the factor; llama3 by wavelength; yarn (arXiv
  2309.00071) by a ramp over the features.
  """
  j = np.arange(size // 2)
  plain = theta ** (-2.0 * j / size)
  if scaling is None:
    return plain.astype(np.float32), 1.0
  s = scaling
  if s.kind == 'linear':
    return (plain / s.factor).astype(np.float32), 1.0
  if s.kind == 'llama3':
    share = np.clip((s.original * plain / (2 * np.pi) - s.low) / (s.high - s.low), 0, 1)
    return ((1 - share) * plain / s.factor + share * plain).astype(np.float32), 1.0

  def turns(n):  # the feature that turns n times over the original context
    return size * math.log(s.original / (2 * math.pi * n)) / (2 * math.log(theta))

  low, high = max(math.floor(turns(s.beta_fast)), 0), min(math.ceil(turns(s.beta_slow)), size - 1)
  ramp = np.clip((j - low) / max(high - low, 1e-3), 0, 1)
  factor = 0.1 * math.log(s.factor) + 1 if s.attention is None else s.attention
  return (plain / s.factor * ramp + plain * (1 - ramp)).astype(np.float32), factor


def rotary(config: ModelConfig, positions: Array) -> dict[int, tuple[Array, Array]]:
  """{rotated features: (sin, cos) f32[B, T, features / 2]} at positions i32[B, T], for `rope`.

  Made once for all layers. The barrier keeps it so: XLA's CPU fusions would compute the angles
  again for every head of every layer.
  """
  found = {}
  for size in config.rotary_sizes:
    freqs, factor = frequencies(size, config.rope_theta, config.rope)
    angle = positions.astype(jnp.float32)[..., None] * freqs
    found[size] = jnp.sin(angle) * factor, jnp.cos(angle) * factor
  return jax.lax.optimization_barrier(found)


def rotary_table(config: ModelConfig, size: int) -> dict[int, tuple[Array, Array]]:
  """`rotary` of the positions below `size`, f32[size, features / 2]."""
  return jax.tree.map(lambda x: x[0], rotary(config, jnp.arange(size)[None]))


def rope(x: Array, sin: Array, cos: Array, *, interleaved: bool = False) -> Array:
  """Rotary positions on the first features of x [B, T, H, K], as many as the angles [B, T, .] turn.

  Pairs are (j, j + size / 2), or (2j, 2j + 1) written apart when `interleaved`.
  """
  sin, cos, size = sin[:, :, None], cos[:, :, None], 2 * sin.shape[-1]
  turned = x[..., :size].astype(jnp.float32)
  if interleaved:
    a, b = turned[..., 0::2], turned[..., 1::2]
  else:
    a, b = jnp.split(turned, 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
  return turned if size == x.shape[-1] else jnp.concatenate([turned, x[..., size:]], axis=-1)


ACTIVATIONS = {'silu': jax.nn.silu, 'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True)}


def gated_mlp(act: str, x: Array, gate: Array, up: Array, down: Array) -> Array:
  """(act(x gate) * (x up)) down; SwiGLU with act silu."""
  dtype = x.dtype
  flat = x.reshape(-1, x.shape[-1])  # XLA's CPU backward of a batched product is twice as slow
  wide = ACTIVATIONS[act](flat @ gate.astype(dtype)) * (flat @ up.astype(dtype))
  return (wide @ down.astype(dtype)).reshape(x.shape)
