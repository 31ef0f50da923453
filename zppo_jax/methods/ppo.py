"""PPO with a critic: GAE advantages, clipped policy and value losses, KL in the reward.

Sources: PPO 1707.06347, GAE 1506.02438. The critic is a decoder of its own with its own
learning rate.
"""

from __future__ import annotations

import dataclasses

import jax

from zppo_jax.methods import api, common
from zppo_jax.ops import advantages


@dataclasses.dataclass(frozen=True)
class Config:
  num_new: int = 32
  group_size: int = 4
  iterations: int = 4
  gamma: float = 1.0
  lam: float = 1.0
  eps_low: float = 0.2
  eps_high: float = 0.2
  dual_clip: float | None = 3.0
  value_clip: float = 0.2
  value_weight: float = 1.0
  kl_beta: float = 0.0
  aggregation: common.Aggregation = 'token_mean'


def build(c: Config) -> api.Method:
  """PPO. Raises ValueError naming the field, the bound and the value."""
  for name, fine, bound in (('gamma', 0 <= c.gamma <= 1, 'in [0, 1]'),
                            ('lam', 0 <= c.lam <= 1, 'in [0, 1]'),
                            ('value_clip', c.value_clip > 0, 'above 0'),
                            ('kl_beta', c.kl_beta >= 0, 'at least 0'),
                            ('num_new', c.num_new >= 1, 'at least 1'),
                            ('iterations', c.iterations >= 1, 'at least 1'),
                            ('group_size', c.group_size >= 1, 'at least 1')):
    if not fine:
      raise ValueError(f'{name} must be {bound}, got {getattr(c, name)}')

  def credit(state, rollout, scores):
    mask = common.loss_mask(rollout)
    value = common.on_mask(mask, scores.value)
    advantage, returns = advantages.gae(
      common.outcome_reward(rollout, rollout.reward, scores, kl_beta=c.kl_beta), value, mask,
      gamma=c.gamma, lam=c.lam)
    advantage = advantages.whiten(advantage, mask)
    signal = common.signal(rollout, scores, advantage, active=rollout.valid)
    return state, dataclasses.replace(signal, returns=jax.lax.stop_gradient(returns),
                                      old_value=jax.lax.stop_gradient(value))

  critic = common.value_error(c.value_clip)

  def weighted(out, signal):
    num, den, metrics = critic(out, signal)
    return c.value_weight * num, den, metrics

  loss = common.PolicyLoss(eps_low=c.eps_low, eps_high=c.eps_high, dual_clip=c.dual_clip,
                           aggregation=c.aggregation)
  needs = {'old_logp', 'critic'} | ({'reference'} if c.kl_beta else set())
  return api.Method(plan=common.plan_new, credit=credit, terms=(common.policy(loss), weighted),
                    group_size=c.group_size, capacity=c.num_new, iterations=c.iterations,
                    needs=frozenset(needs))
