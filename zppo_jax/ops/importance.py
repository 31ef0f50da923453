"""Correction for a sampler that is not numerically the trainer. Dims: N rows, T tokens; nats.

Source: verl `rollout_corr_helper`, TRL `vllm_importance_sampling_mode`, IcePop (token mask).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from zppo_jax.core.types import Array
from zppo_jax.ops.groups import widen

MODES = ('none', 'token_tis', 'seq_tis', 'token_mask', 'seq_mask')


def sampler_weights(
  old_logp: Array,
  behavior_logp: Array,
  mask: Array,
  *,
  mode: str = 'none',
  cap: float = 2.0,
  floor: float | None = None,
) -> Array:
  """Weight of each token loss, f32[N, T], detached, zero outside the mask; outside any clip.

  With d = old_logp - behavior_logp and w_t = exp(d_t), W = exp(sum over the mask of d), the log of
  both clamped to [-20, 20]:
    none 1 | token_tis min(w_t, cap) | seq_tis min(W, cap) | token_mask w_t where
    floor <= w_t <= cap, else 0 | seq_mask W where floor <= W <= cap, else 0
  `floor` is 1 / cap for token_mask and 0 for seq_mask unless given. All inputs [N, T].
  Errors: unknown mode, cap < 1, floor outside [0, 1].
  """
  if mode not in MODES:
    raise ValueError(f'mode must be one of {MODES}, got {mode!r}')
  if not cap >= 1:
    raise ValueError(f'cap must be >= 1, got {cap}')
  if floor is not None and not 0 <= floor <= 1:
    raise ValueError(f'floor must be in [0, 1] or None, got {floor}')
  mask = jnp.asarray(mask, bool)
  d = _difference(old_logp, behavior_logp, mask)
  if mode == 'none':
    return mask.astype(d.dtype)
  if mode.startswith('seq'):
    d = jnp.broadcast_to(d.sum(-1, keepdims=True), d.shape)
  weight = jnp.exp(jnp.clip(d, -20, 20))
  if mode.endswith('tis'):
    weight = jnp.minimum(weight, cap)
  else:
    if floor is None:
      floor = 1 / cap if mode == 'token_mask' else 0.0
    weight = jnp.where((weight > cap) | (weight < floor), 0, weight)
  return lax.stop_gradient(jnp.where(mask, weight, 0))


def mismatch(
  old_logp: Array, behavior_logp: Array, mask: Array, *, cap: float = 2.0
) -> dict[str, Array]:
  """Gap between trainer and sampler log-probs over the mask of the whole batch, scalars f32[].

  kl_k3 = mean exp(d) - 1 - d, an estimate of KL(sampler || trainer) in nats; max_abs and mean_abs
  of d = old_logp - behavior_logp in nats; frac_over = share of tokens with exp(|d|) > cap.
  """
  mask = jnp.asarray(mask, bool)
  d = lax.stop_gradient(_difference(old_logp, behavior_logp, mask))
  count = jnp.maximum(mask.sum(), 1)
  clamped = jnp.clip(d, -20, 20)
  return {
    'kl_k3': (jnp.expm1(clamped) - clamped).sum() / count,
    'max_abs': jnp.abs(d).max(),
    'mean_abs': jnp.abs(d).sum() / count,
    'frac_over': (jnp.abs(d) > jnp.log(cap)).sum() / count,
  }


def _difference(old_logp, behavior_logp, mask) -> Array:
  return jnp.where(mask, widen(old_logp), 0) - jnp.where(mask, widen(behavior_logp), 0)
