"""Advantage estimators. Dims: N rows (rollouts), T tokens, P groups; rewards are unitless.

Outcome estimators return f32[N], exactly 0 for trivial groups and for invalid or unscorable (NaN
reward) rows; token estimators return f32[N, T], exactly 0 outside the mask. Nothing here is meant
to be differentiated. Everything is a global reduction: call it on the whole rollout batch.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from zppo_jax.core.types import Array
from zppo_jax.ops.credit import reward_to_go
from zppo_jax.ops.groups import GroupStats, group_stats, scorable, widen

UNGROUPED = frozenset({'reinforce', 'reinforce_pp', 'remax', 'gae', 'ppo', 'opd'})


def check_group_size(name: str, group_size: int) -> None:
  """ValueError unless group_size >= 2, or >= 1 for an estimator that compares no group."""
  least = 1 if name in UNGROUPED else 2
  if group_size < least:
    raise ValueError(f'group_size must be >= {least} for estimator {name!r}, got {group_size}')


def _centred(reward, group_id, valid, num_groups, ddof=1) -> tuple[Array, Array, GroupStats]:
  """(r - mean_g, rows that carry signal, stats); the first is zero off those rows."""
  stats = group_stats(reward, group_id, valid, num_groups=num_groups, ddof=ddof)
  live = scorable(reward, valid) & ~stats.trivial[group_id]
  value = jnp.where(live, jnp.where(live, widen(reward), 0) - stats.mean[group_id], 0)
  return value, live, stats


def reinforce(reward: Array, valid: Array, *, baseline: Array | float | None = None) -> Array:
  """A_i = R_i - b, b = `baseline` or the mean over the scorable rows of the batch. f32[N]."""
  rows = scorable(reward, valid)
  r = jnp.where(rows, widen(reward), 0)
  if baseline is None:
    baseline = r.sum() / jnp.maximum(rows.sum(), 1)
  return jnp.where(rows, r - baseline, 0)


def rloo(reward: Array, group_id: Array, valid: Array, *, num_groups: int) -> Array:
  """A_i = R_i - mean of the others in its group = G / (G - 1) (R_i - mean_g). f32[N].

  G counts the scorable rows of the group. Source: arXiv:2402.14740.
  """
  value, _, stats = _centred(reward, group_id, valid, num_groups)
  count = stats.count[group_id]
  return value * count / jnp.maximum(count - 1, 1)


def grpo(
  reward: Array, group_id: Array, valid: Array, *, num_groups: int, ddof: int = 1, eps: float = 1e-6
) -> Array:
  """A_i = (R_i - mean_g) / (std_g + eps), sample std by default. f32[N]. Source: 2402.03300."""
  value, live, stats = _centred(reward, group_id, valid, num_groups, ddof)
  return value / jnp.where(live, stats.std[group_id] + eps, 1)


def grpo_batch_scaled(
  reward: Array, group_id: Array, valid: Array, *, num_groups: int, ddof: int = 1, eps: float = 1e-4
) -> Array:
  """A_i = (R_i - mean_g) / (std over the batch of the uncentred R + eps). f32[N].

  Source: TRL, scale_rewards='batch' (its eps is 1e-4).
  """
  value, live, _ = _centred(reward, group_id, valid, num_groups, ddof)
  rows = scorable(reward, valid)
  _, std = _moments(jnp.where(rows, widen(reward), 0), rows, ddof)
  return value / jnp.where(live, std + eps, 1)


def dr_grpo(reward: Array, group_id: Array, valid: Array, *, num_groups: int) -> Array:
  """A_i = R_i - mean_g. f32[N]. Source: Dr.GRPO arXiv:2503.20783."""
  return _centred(reward, group_id, valid, num_groups)[0]


def _moments(x, weight, ddof) -> tuple[Array, Array]:
  """Weighted mean and std over all entries, std = sqrt(sum w (x - mean)^2 / (sum w - ddof))."""
  weight = weight.astype(x.dtype)
  total = weight.sum()
  mean = (weight * x).sum() / jnp.maximum(total, 1)
  var = (weight * (x - mean) ** 2).sum() / jnp.maximum(total - ddof, 1)
  return mean, jnp.sqrt(var)


def reinforce_pp_baseline(
  reward: Array,
  group_id: Array,
  valid: Array,
  *,
  num_groups: int,
  norm: str = 'without_zero',
  over: str = 'rollouts',
  token_counts: Array | None = None,
  eps: float = 1e-6,
  ddof: int = 0,
) -> Array:
  """Two-step advantage: A' = R_i - mean_g, then A = (A' - mu) / (sigma + eps). f32[N].

  mu and sigma are over the rows of S: the non-trivial groups ('without_zero') or all groups
  ('with_zero'); 'none' returns A'. `over` weighs each row by 1 ('rollouts') or by
  token_counts f32[N] ('tokens'). Trivial groups end at exactly 0 under every norm.
  Errors: unknown norm or over, 'tokens' without token_counts.
  Source: REINFORCE++ arXiv:2501.03262, ZPPO arXiv:2606.18216.
  """
  if norm not in ('none', 'without_zero', 'with_zero'):
    raise ValueError(f"norm must be 'none', 'without_zero' or 'with_zero', got {norm!r}")
  if over not in ('rollouts', 'tokens'):
    raise ValueError(f"over must be 'rollouts' or 'tokens', got {over!r}")
  if over == 'tokens' and token_counts is None:
    raise ValueError("over='tokens' needs token_counts f32[N], got None")
  value, live, _ = _centred(reward, group_id, valid, num_groups)
  if norm == 'none':
    return value
  rows = live if norm == 'without_zero' else scorable(reward, valid)
  weight = rows if over == 'rollouts' else jnp.where(rows, token_counts, 0)
  mean, std = _moments(value, weight, ddof)
  return jnp.where(live, (value - mean) / jnp.where(live, std + eps, 1), 0)


def remax(reward: Array, greedy_reward: Array, valid: Array | None = None) -> Array:
  """A_i = R_i - R(greedy response to the same prompt), both f32[N]. Source: arXiv:2310.10505."""
  rows = jnp.isfinite(widen(reward)) & jnp.isfinite(widen(greedy_reward))
  rows = rows if valid is None else rows & jnp.asarray(valid, bool)
  return jnp.where(rows, widen(reward) - widen(greedy_reward), 0)


def broadcast(advantage: Array, mask: Array) -> Array:
  """An outcome advantage f32[N] on every token of the mask bool[N, T]: f32[N, T]."""
  return jnp.where(jnp.asarray(mask, bool), advantage[:, None], 0)


def whiten(x: Array, mask: Array, *, ddof: int = 1, eps: float = 1e-8) -> Array:
  """(x - mean) / sqrt(var + eps) over the masked tokens of the batch, zero elsewhere.

  x f32[N, T]; one token or none gives 0, not NaN. Source: verl (sample variance, eps 1e-8).
  """
  mask = jnp.asarray(mask, bool)
  x = jnp.where(mask, widen(x), 0)
  mean, std = _moments(x, mask, ddof)
  return jnp.where(mask, (x - mean) * lax.rsqrt(std**2 + eps), 0)


def _check_unit(**values: float) -> None:
  for name, x in values.items():
    if not 0 <= x <= 1:
      raise ValueError(f'{name} must be in [0, 1], got {x}')


def reinforce_pp(token_reward: Array, mask: Array, *, gamma: float = 1.0) -> Array:
  """A_t = whiten(sum_{s >= t} gamma^(s - t) r_s) over the batch of tokens. f32[N, T].

  token_reward f32[N, T] holds the per-token KL penalty and the outcome at the last token; rewards
  outside the mask are ignored. Errors: gamma outside [0, 1]. Source: arXiv:2501.03262.
  """
  _check_unit(gamma=gamma)
  return whiten(reward_to_go(token_reward, mask, discount=gamma), mask)


def gae(
  token_reward: Array, value: Array, mask: Array, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Array, Array]:
  """Generalised advantage estimation over the masked tokens: (advantage, returns), f32[N, T].

  delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, returns = A + V; V and A
  are carried over tokens outside the mask, whose rewards are ignored, and V = 0 after the last.
  Not whitened. Errors: gamma or lam outside [0, 1]. Source: arXiv:1506.02438.
  """
  _check_unit(gamma=gamma, lam=lam)
  mask = jnp.asarray(mask, bool)
  reward = jnp.where(mask, widen(token_reward), 0)
  value = jnp.where(mask, widen(value), 0)

  def step(carry, token):
    next_value, acc = carry
    r, v, keep = token
    here = r + gamma * next_value - v + gamma * lam * acc
    return (jnp.where(keep, v, next_value), jnp.where(keep, here, acc)), jnp.where(keep, here, 0)

  start = (jnp.zeros_like(value[:, 0]), jnp.zeros_like(reward[:, 0]))
  _, out = lax.scan(step, start, (reward.T, value.T, mask.T), reverse=True)
  return out.T, out.T + value


def overlong_penalty(
  length: Array, *, max_tokens: int, buffer_tokens: int, factor: float = 1.0
) -> Array:
  """min(0, -(length - (max_tokens - buffer_tokens)) / buffer_tokens * factor), f32[N].

  0 below the buffer, -factor at max_tokens. length i32[N] in tokens. Errors: buffer_tokens outside
  [1, max_tokens]. Source: DAPO arXiv:2503.14476.
  """
  if not 1 <= buffer_tokens <= max_tokens:
    raise ValueError(f'buffer_tokens must be in [1, {max_tokens}], got {buffer_tokens}')
  over = widen(length) - (max_tokens - buffer_tokens)
  return jnp.minimum(0, -over / buffer_tokens * factor)
