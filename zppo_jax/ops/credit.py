"""Token credit from a teacher. Dims: N rows, T tokens; log-probs in nats, float32.

Source: on-policy distillation (GKD arXiv:2306.13649, MiniLLM arXiv:2306.08543).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from zppo_jax.core.types import Array
from zppo_jax.ops.groups import widen

LOGP_FLOOR = math.log(1e-30)  # a teacher that forbids a token is worth at most this much


def reward_to_go(
  value: Array, mask: Array, *, discount: float, length_norm: bool = False
) -> Array:
  """Discounted sum of the values from each token on, f32[N, T], zero outside the mask.

  A_t = sum_{s >= t} discount^(s - t) value_s, distances counted in masked-in tokens only, so that
  observation tokens in between neither add nor discount; `length_norm` divides by
  sum_{s >= t} discount^(s - t). value f32[N, T], mask bool[N, T].
  Errors: discount outside [0, 1]. Source: arXiv:2306.08543 (relative form).
  """
  if not 0 <= discount <= 1:
    raise ValueError(f'discount must be in [0, 1], got {discount}')
  mask = jnp.asarray(mask, bool)
  value = jnp.where(mask, widen(value), 0)

  def step(carry, token):
    total, weight = carry
    x, keep = token
    total = jnp.where(keep, x + discount * total, total)
    weight = jnp.where(keep, 1 + discount * weight, weight)
    out = total / weight if length_norm else total
    return (total, weight), jnp.where(keep, out, 0)

  # Derived from `value`, so that the carry keeps its sharding under shard_map.
  start = (jnp.zeros_like(value[:, 0]), jnp.zeros_like(value[:, 0]))
  _, out = lax.scan(step, start, (value.T, mask.T), reverse=True)
  return out.T


def opd_advantage(
  teacher_logp: Array,
  old_logp: Array,
  mask: Array,
  *,
  discount: float = 0.0,
  clip: tuple[float, float] | None = None,
  kl_baseline: Array | None = None,
) -> Array:
  """Advantage of a sampled token under reverse-KL distillation, f32[N, T], no gradient.

  a_t = clip(log p_T(y_t) - log q_old(y_t)) (+ kl_baseline_t, the closed-form KL(q || p)), then the
  reward-to-go of a with `discount`; 0 keeps the immediate term only. All f32[N, T] in nats, zero
  outside the mask; teacher log-probs are floored at log 1e-30; `clip` = (low, high) bounds the
  log-ratio before the baseline. Errors: discount outside [0, 1], clip not increasing.
  Source: arXiv:2306.13649, arXiv:2605.07865 (baseline).
  """
  if clip is not None and not clip[0] < clip[1]:
    raise ValueError(f'clip must be (low, high) with low < high, got {clip}')
  if not 0 <= discount <= 1:
    raise ValueError(f'discount must be in [0, 1], got {discount}')
  mask = jnp.asarray(mask, bool)
  teacher = jnp.maximum(jnp.where(mask, widen(teacher_logp), 0), LOGP_FLOOR)
  value = teacher - jnp.where(mask, widen(old_logp), 0)
  if clip is not None:
    value = jnp.clip(value, *clip)
  if kl_baseline is not None:
    value = value + jnp.where(mask, kl_baseline, 0)
  value = jnp.where(mask, value, 0)
  if discount:
    value = reward_to_go(value, mask, discount=discount)
  return jax.lax.stop_gradient(value)
