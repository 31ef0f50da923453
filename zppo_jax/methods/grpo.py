"""GRPO and its family: one estimator, one surrogate, one aggregation, chosen by the config.

Sources: GRPO 2402.03300, RLOO 2402.14740, Dr.GRPO 2503.20783, DAPO 2503.14476, GSPO 2507.18071,
CISPO 2506.13585, REINFORCE++ 2501.03262, ReMax 2310.10505. Dims: N rows, T tokens, P groups.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from zppo_jax.core import types
from zppo_jax.methods import api, common
from zppo_jax.ops import advantages

Array = types.Array


@dataclasses.dataclass(frozen=True)
class Config:
  """The defaults are GRPO as its paper writes it; the table holds the other family members."""

  num_new: int = 32  # new questions per rollout step
  group_size: int = 8
  iterations: int = 1  # mini-batches, one optimiser step each
  estimator: Literal['grpo', 'rloo', 'dr_grpo', 'grpo_batch_scaled', 'reinforce',
                     'reinforce_pp', 'reinforce_pp_baseline', 'remax'] = 'grpo'
  norm: Literal['none', 'without_zero', 'with_zero'] = 'without_zero'  # reinforce_pp_baseline
  surrogate: Literal['clip', 'gspo', 'cispo', 'reinforce'] = 'clip'
  eps_low: float = 0.2
  eps_high: float = 0.2
  dual_clip: float | None = None
  delta: float | None = None
  weight_max: float = 5.0
  aggregation: common.Aggregation = 'seq_mean_token_mean'
  # Constant of seq_mean_token_sum_norm; response cap of overlong shaping
  max_tokens: int | None = None
  gamma: float = 1.0  # reinforce_pp
  kl_beta: float = 0.0
  kl_kind: Literal['k1', 'k2', 'k3', 'k3+'] = 'k3'
  kl_in_reward: bool = False
  entropy_weight: float = 0.0
  correction: Literal['none', 'token_tis', 'seq_tis', 'token_mask', 'seq_mask'] = 'none'
  correction_cap: float = 2.0
  dynamic_sampling: bool = False  # DAPO: draw until num_new groups carry signal
  max_draws: int = 10
  overlong_buffer: int = 0  # DAPO: tokens of the length penalty's ramp, 0 = off
  filter_overlong: bool = False  # rows cut by length leave the loss


ESTIMATORS = {
  'grpo': advantages.grpo, 'rloo': advantages.rloo, 'dr_grpo': advantages.dr_grpo,
  'grpo_batch_scaled': advantages.grpo_batch_scaled,
}


def check(c: Config) -> None:
  """Raises ValueError naming the field, the bound and the value."""
  common.check_choices(c)
  advantages.check_group_size(c.estimator, c.group_size)
  for name, least in (('num_new', 1), ('iterations', 1), ('max_draws', 1), ('kl_beta', 0),
                      ('entropy_weight', 0), ('overlong_buffer', 0)):
    if getattr(c, name) < least:
      raise ValueError(f'{name} must be at least {least}, got {getattr(c, name)}')
  if c.kl_in_reward and c.estimator not in ('reinforce_pp',):
    raise ValueError(f"kl_in_reward needs estimator 'reinforce_pp', got {c.estimator!r}")
  if c.overlong_buffer and not (c.max_tokens and c.overlong_buffer < c.max_tokens):
    raise ValueError(f'max_tokens must exceed overlong_buffer = {c.overlong_buffer}, '
                     f'got {c.max_tokens}')


def policy_loss(c: Config) -> common.PolicyLoss:
  names = [f.name for f in dataclasses.fields(common.PolicyLoss)]
  return common.PolicyLoss(**{n: getattr(c, n) for n in names})


def shaped_reward(c: Config, rollout: types.Rollout) -> Array:
  """Reward with DAPO's overlong penalty, f32[N]."""
  if not c.overlong_buffer:
    return rollout.reward
  return rollout.reward + advantages.overlong_penalty(
    rollout.traj_tokens, max_tokens=c.max_tokens, buffer_tokens=c.overlong_buffer)


def advantage(c: Config, state, rollout: types.Rollout, scores: types.Scores) -> Array:
  """Advantage per row f32[N], or per token f32[N, T] for REINFORCE++."""
  reward = shaped_reward(c, rollout)
  if c.estimator == 'reinforce':
    return advantages.reinforce(reward, rollout.valid)
  if c.estimator == 'remax':
    # By group id: the rows were dealt to mini-batches since the greedy answers were drawn.
    return advantages.remax(reward, state[rollout.group_id], rollout.valid)
  if c.estimator == 'reinforce_pp':
    token_reward = common.outcome_reward(rollout, reward, scores,
                                         kl_beta=c.kl_beta if c.kl_in_reward else 0.0)
    mask = common.loss_mask(rollout)
    return advantages.reinforce_pp(token_reward, mask, gamma=c.gamma)
  args = dict(num_groups=rollout.group_id.shape[0])
  if c.estimator == 'reinforce_pp_baseline':
    return advantages.reinforce_pp_baseline(reward, rollout.group_id, rollout.valid, norm=c.norm,
                                            **args)
  return ESTIMATORS[c.estimator](reward, rollout.group_id, rollout.valid, **args)


def drop_overlong(rollout: types.Rollout) -> types.Rollout:
  """Rows cut by length leave the loss, but stay in the group statistics."""
  keep = rollout.status != types.TRUNCATED
  return dataclasses.replace(rollout, loss_mask=rollout.loss_mask & keep[:, None])


def _fill(c: Config):
  """Explore of dynamic sampling: draws until num_new groups have a non-zero reward spread."""

  def mixed(drawn: api.Drawn) -> list[int]:
    reward = drawn.reward.reshape(-1, drawn.group_size)
    spread = reward.max(1) > reward.min(1)
    return [s for s, g in enumerate(drawn.groups) if g is not None and spread[s]]

  def explore(state, drawn: api.Drawn, ctx: api.Context):
    parts, picks = [drawn], [(0, s) for s in mixed(drawn)]
    while len(picks) < c.num_new:
      if len(parts) >= c.max_draws:
        raise ValueError(f'max_draws: {len(parts)} draws of {c.num_new} groups gave only '
                         f'{len(picks)} with both right and wrong answers')
      questions = ctx.next_questions(c.num_new)
      parts.append(ctx.draw([api.Group(int(q)) for q in questions], capacity=c.num_new,
                            first_id=len(parts) * c.num_new))
      picks += [(len(parts) - 1, s) for s in mixed(parts[-1])]
    return state, [common.keep_groups(parts, picks[:c.num_new])]

  return explore


def _greedy_baseline(c: Config):
  """Explore of ReMax: the reward of one greedy answer per question goes into the state."""

  def explore(state, drawn: api.Drawn, ctx: api.Context):
    groups = [g for g in drawn.groups if g is not None]
    greedy = ctx.draw(groups, capacity=c.num_new, group_size=1, greedy=True)
    return jnp.asarray(np.nan_to_num(greedy.accuracy()), jnp.float32), [drawn]

  return explore


def build(c: Config) -> api.Method:
  """GRPO and family. Raises ValueError on a combination that makes no sense."""
  check(c)
  uses_reference = c.kl_beta > 0
  in_loss = uses_reference and not c.kl_in_reward

  def credit(state, rollout, scores):
    value = advantage(c, state, rollout, scores)
    if c.filter_overlong:
      rollout = drop_overlong(rollout)
    per_row = value if value.ndim == 1 else jnp.max(jnp.abs(value), axis=1)
    carries = (per_row != 0) | bool(in_loss or c.entropy_weight)
    return state, common.signal(rollout, scores, value, active=rollout.valid & carries,
                                correction=c.correction, correction_cap=c.correction_cap)

  terms = [common.policy(policy_loss(c))]
  if in_loss:
    terms.append(common.kl_penalty(c.kl_beta, c.kl_kind, c.aggregation, c.max_tokens))
  if c.entropy_weight:
    terms.append(common.entropy_bonus(c.entropy_weight, c.aggregation, c.max_tokens))
  needs = {'old_logp'} if c.iterations > 1 or c.correction != 'none' or c.kl_in_reward else set()
  fields = {}
  if c.estimator == 'remax':
    needs.add('fresh_explore')
    fields = dict(explore=_greedy_baseline(c), init=lambda key: jnp.zeros(c.num_new))
  elif c.dynamic_sampling:
    fields = dict(explore=_fill(c))
  return api.Method(
    plan=common.plan_new, credit=credit, terms=tuple(terms), group_size=c.group_size,
    capacity=c.num_new, iterations=c.iterations,
    needs=frozenset(needs | ({'reference'} if uses_reference else set())), **fields)
