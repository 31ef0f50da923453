"""Policy-gradient losses per token, f32[N, T]; smaller is better, reduce with `aggregate`.

Dims: N rows, T tokens; log-probs in nats at the sampling temperature. Everything but `logp` (and
`value`) is under stop_gradient; `old_logp=None` means on-policy: stop_gradient(logp).
Functions without a `mask` argument expect inputs that the caller has zeroed outside the mask with
where(mask, x, 0): a NaN that enters an exp or a product poisons the gradient, whatever the mask.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from zppo_jax.core.types import Array

sg = lax.stop_gradient


def check_clip(eps_low: float, eps_high: float, dual_clip: float | None = None) -> None:
  """ValueError unless 0 < eps_low < 1, eps_high > 0 and dual_clip > 1 (or None)."""
  if not 0 < eps_low < 1:
    raise ValueError(f'eps_low must be in (0, 1), got {eps_low}')
  if not eps_high > 0:
    raise ValueError(f'eps_high must be > 0, got {eps_high}')
  if dual_clip is not None and not dual_clip > 1:
    raise ValueError(f'dual_clip must be > 1 or None, got {dual_clip}')


def _check_same(logp: Array, old_logp: Array | None) -> None:
  if old_logp is not None and old_logp.shape != logp.shape:
    raise ValueError(f'old_logp must have the shape of logp {logp.shape}, got {old_logp.shape}')


def log_ratio(logp: Array, old_logp: Array | None) -> Array:
  """clip(logp - stop_gradient(old_logp), -20, 20), f32[N, T]; gradient in logp only.

  Raises ValueError on unequal shapes: they would broadcast.
  """
  _check_same(logp, old_logp)
  return jnp.clip(logp - sg(logp if old_logp is None else old_logp), -20, 20)


def _bounded(ratio, advantage, eps_low, eps_high, dual_clip=None, delta=None) -> Array:
  """The factor s with loss -s * A of the clipped objective: r where it may move, else a bound.

  Comparisons rather than min and max: their gradient is halved at ties, and r = 1 on-policy.
  They are written so that a NaN ratio stays NaN.
  """
  top, floor, cap = 1 + eps_high, 1 - eps_low, None
  if delta is not None:
    top, cap = min(top, delta), max(top, delta)
  if dual_clip is not None:
    cap = dual_clip if cap is None else min(cap, dual_clip)
  gain = jnp.where(ratio >= top, top, ratio)
  loss = ratio if cap is None else jnp.where(ratio > cap, cap, ratio)
  loss = jnp.where(ratio <= floor, floor, loss)
  return jnp.where(advantage >= 0, gain, loss)


def clipped(
  logp: Array,
  old_logp: Array | None,
  advantage: Array,
  *,
  eps_low: float,
  eps_high: float,
  dual_clip: float | None = None,
  delta: float | None = None,
) -> Array:
  """PPO clip: -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), f32[N, T]; inputs f32[N, T].

  The gradient lives iff (A > 0 and r < 1 + eps_high) or (A < 0 and r > 1 - eps_low). `dual_clip` c
  bounds the loss of A < 0 by -c A (no gradient for r > c); `delta` replaces r by min(r, delta) in
  the unclipped branch (TRL). Inputs must be zero outside the mask.
  Errors: see check_clip. Source: arXiv:1707.06347, DAPO 2503.14476, dual clip 1912.09729.
  """
  check_clip(eps_low, eps_high, dual_clip)
  advantage = sg(advantage)
  ratio = jnp.exp(log_ratio(logp, old_logp))
  return -_bounded(ratio, advantage, eps_low, eps_high, dual_clip, delta) * advantage


def gspo(
  logp: Array,
  old_logp: Array | None,
  advantage: Array,
  mask: Array,
  *,
  eps_low: float,
  eps_high: float,
) -> Array:
  """Sequence-ratio clip in token form, f32[N, T], zero outside the mask.

  s_i = exp(mean over the mask of logp - old_logp); r_t = exp(logp - sg(logp) + sg(log s_i)); the
  clipped loss of r_t. Under seq_mean_token_mean it has the value and gradient of the sequence form.
  logp, old_logp, advantage f32[N, T], mask bool[N, T]; the log-ratio is clamped to [-20, 10].
  Source: GSPO arXiv:2507.18071 (eps_low 3e-4, eps_high 4e-4).
  """
  check_clip(eps_low, eps_high)
  _check_same(logp, old_logp)
  mask = jnp.asarray(mask, bool)
  logp = jnp.where(mask, logp, 0)
  old = sg(logp) if old_logp is None else sg(jnp.where(mask, old_logp, 0))
  advantage = sg(jnp.where(mask, advantage, 0))
  count = jnp.maximum(mask.sum(-1, keepdims=True), 1)
  log_s = sg((logp - old).sum(-1, keepdims=True) / count)
  ratio = jnp.exp(jnp.clip(logp - sg(logp) + log_s, -20, 10))
  return -_bounded(ratio, advantage, eps_low, eps_high) * advantage


def cispo(
  logp: Array, old_logp: Array | None, advantage: Array, *, w_min: float = 0.0, w_max: float
) -> Array:
  """-sg(clip(r, w_min, w_max)) A logp, f32[N, T]: no token is dropped, the weight is bounded.

  The bounds are absolute. Inputs must be zero outside the mask. Errors: not 0 <= w_min < w_max.
  Source: CISPO arXiv:2506.13585.
  """
  if not 0 <= w_min < w_max:
    raise ValueError(f'w_min must be in [0, w_max={w_max}), got {w_min}')
  weight = sg(jnp.clip(jnp.exp(log_ratio(logp, old_logp)), w_min, w_max))
  return -weight * sg(advantage) * logp


def reinforce(logp: Array, advantage: Array) -> Array:
  """-A logp, f32[N, T]: the gradient of `clipped` at r = 1. Inputs zero outside the mask."""
  return -sg(advantage) * logp


def value_loss(
  value: Array, old_value: Array, returns: Array, *, clip: float | None = None
) -> Array:
  """0.5 max((V - ret)^2, (clip(V, V_old - clip, V_old + clip) - ret)^2), f32[N, T].

  Gradient in `value` only; `clip=None` drops the second branch. Inputs zero outside the mask.
  Errors: clip <= 0. Source: arXiv:1707.06347 and its code.
  """
  if clip is not None and not clip > 0:
    raise ValueError(f'clip must be > 0 or None, got {clip}')
  old_value, returns = sg(old_value), sg(returns)
  loss = (value - returns) ** 2
  if clip is not None:
    near = jnp.clip(value, old_value - clip, old_value + clip)
    loss = jnp.maximum(loss, (near - returns) ** 2)
  return 0.5 * loss


def clip_fractions(
  logp: Array,
  old_logp: Array | None,
  advantage: Array,
  mask: Array,
  *,
  eps_low: float,
  eps_high: float,
  dual_clip: float | None = None,
) -> dict[str, tuple[Array, Array]]:
  """Metrics of `clipped` as (numerator, denominator) scalars that add over micro-batches.

  clip_frac_low (A < 0, r <= 1 - eps_low), clip_frac_high (A > 0, r >= 1 + eps_high),
  clip_frac_dual (A < 0, r > dual_clip), ratio_mean, approx_kl (mean of -log r); per masked token.
  """
  mask = jnp.asarray(mask, bool)
  log_r = sg(_masked_log_ratio(logp, old_logp, mask))
  ratio, a = jnp.exp(log_r), jnp.where(mask, advantage, 0)
  parts = {
    'clip_frac_low': (a < 0) & (ratio <= 1 - eps_low),
    'clip_frac_high': (a > 0) & (ratio >= 1 + eps_high),
    'clip_frac_dual': (a < 0) & (ratio > (jnp.inf if dual_clip is None else dual_clip)),
    'ratio_mean': ratio,
    'approx_kl': -log_r,
  }
  count = mask.sum().astype(log_r.dtype)
  return {k: (jnp.where(mask, x, 0).sum().astype(log_r.dtype), count) for k, x in parts.items()}


def ratio_max(logp: Array, old_logp: Array | None, mask: Array) -> Array:
  """Largest ratio over the mask, f32[]; combine micro-batches by max. Zero for an empty mask."""
  mask = jnp.asarray(mask, bool)
  return jnp.where(mask, jnp.exp(sg(_masked_log_ratio(logp, old_logp, mask))), 0).max()


def _masked_log_ratio(logp, old_logp, mask) -> Array:
  _check_same(logp, old_logp)
  old_logp = None if old_logp is None else jnp.where(mask, old_logp, 0)
  return log_ratio(jnp.where(mask, logp, 0), old_logp)
