"""Plans, credits and terms that many methods share. Dims: N rows, T tokens."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zppo_jax.core import masks, types
from zppo_jax.methods import api
from zppo_jax.ops import aggregate, divergences, importance, surrogates

Array = jax.Array
Aggregation = Literal['token_mean', 'seq_mean_token_mean', 'seq_mean_token_sum',
                      'seq_mean_token_sum_norm']


def check_choices(config) -> None:
  """Raises ValueError for a field typed Literal that holds none of its values."""
  for name, hint in typing.get_type_hints(type(config)).items():
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    if choices and getattr(config, name) not in choices:
      raise ValueError(f'{name} must be one of {choices}, got {getattr(config, name)!r}')


def plan_new(state, batch: np.ndarray, ctx: api.Context):
  """One plain group per new question."""
  del ctx
  return state, [api.Group(int(q)) for q in batch]


def loss_mask(rollout: types.Rollout) -> Array:
  """Tokens of valid rows that carry a loss, bool[N, T]; a NaN reward takes its row out."""
  usable = rollout.valid & jnp.isfinite(rollout.reward)
  return rollout.loss_mask & usable[:, None]


def final_token(mask: Array) -> Array:
  """True at the last loss token of each row, bool[N, T]."""
  column = jnp.arange(mask.shape[1])[None]
  return mask & (column == jnp.max(jnp.where(mask, column, -1), axis=1, keepdims=True))


def outcome_reward(rollout: types.Rollout, reward: Array, scores: types.Scores, *,
                   kl_beta: float) -> Array:
  """Outcome at the last loss token, minus kl_beta * k1 on every token, f32[N, T]."""
  mask = loss_mask(rollout)
  token_reward = jnp.where(final_token(mask), reward[:, None], 0.0)
  if not kl_beta:
    return token_reward
  return token_reward - kl_beta * divergences.kl_estimate(
    on_mask(mask, scores.old_logp), on_mask(mask, scores.ref_logp), 'k1')


def signal(rollout: types.Rollout, scores: types.Scores, advantage: Array, *, active: Array,
           correction: str = 'none', correction_cap: float = 2.0) -> types.Signal:
  """Signal from a value per row f32[N] or per token f32[N, T]; no gradient, zero outside the
  mask."""
  mask = loss_mask(rollout)
  if advantage.ndim == 1:
    advantage = advantage[:, None]
  is_weight = None
  if correction != 'none':
    is_weight = importance.sampler_weights(scores.old_logp, rollout.behavior_logp, mask,
                                           mode=correction, cap=correction_cap)
    sampled = (rollout.role_id == types.POLICY)[:, None]  # given rows have no sampler to correct
    is_weight = jnp.where(sampled, is_weight, 1.0)
  return lax.stop_gradient(types.Signal(
    mask=mask, advantage=jnp.where(mask, advantage, 0.0), active=active & jnp.any(mask, axis=1),
    traj_tokens=rollout.traj_tokens, old_logp=scores.old_logp, is_weight=is_weight,
    ref_logp=scores.ref_logp))


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
  """Choices of the policy term; `weight_max` is CISPO's absolute bound."""

  surrogate: Literal['clip', 'gspo', 'cispo', 'reinforce'] = 'clip'
  eps_low: float = 0.2
  eps_high: float = 0.2
  dual_clip: float | None = None
  delta: float | None = None  # two-sided ratio cap in the unclipped branch
  weight_max: float = 5.0
  aggregation: Aggregation = 'token_mean'
  max_tokens: int | None = None  # constant of seq_mean_token_sum_norm


def check_policy_loss(c: PolicyLoss) -> None:
  """Raises ValueError naming the field, the bound and the value."""
  check_choices(c)
  if c.surrogate in ('clip', 'gspo'):
    surrogates.check_clip(c.eps_low, c.eps_high, c.dual_clip)
  aggregate.check_aggregation(c.aggregation, c.surrogate)
  if c.aggregation == 'seq_mean_token_sum_norm' and not c.max_tokens:
    raise ValueError(f'max_tokens must be at least 1 with {c.aggregation}, got {c.max_tokens}')


def _surrogate_loss(c: PolicyLoss, logp: Array, old: Array, s: types.Signal) -> Array:
  if c.surrogate == 'clip':
    return surrogates.clipped(logp, old, s.advantage, eps_low=c.eps_low, eps_high=c.eps_high,
                              dual_clip=c.dual_clip, delta=c.delta)
  if c.surrogate == 'gspo':
    return surrogates.gspo(logp, old, s.advantage, s.mask, eps_low=c.eps_low, eps_high=c.eps_high)
  if c.surrogate == 'cispo':
    return surrogates.cispo(logp, old, s.advantage, w_max=c.weight_max)
  return surrogates.reinforce(logp, s.advantage)


def on_mask(mask: Array, x: Array | None) -> Array | None:
  """Zero outside the mask, before any exp or product."""
  return None if x is None else jnp.where(mask, x, 0.0)


@functools.cache
def policy(c: PolicyLoss) -> api.Term:
  """The one policy-gradient term: surrogate * token_weight * is_weight, aggregated."""
  check_policy_loss(c)

  def term(out: api.Outputs, s: types.Signal):
    logp = on_mask(s.mask, out.logp)
    old = lax.stop_gradient(logp) if s.old_logp is None else on_mask(s.mask, s.old_logp)
    loss = _surrogate_loss(c, logp, old, s)
    for weight in (s.token_weight, s.is_weight):
      if weight is not None:
        loss = loss * on_mask(s.mask, lax.stop_gradient(weight))
    num, den = aggregate.aggregate(loss, s.mask, c.aggregation, traj_tokens=s.traj_tokens,
                                   max_tokens=c.max_tokens)
    found = surrogates.clip_fractions(logp, old, s.advantage, s.mask, eps_low=c.eps_low,
                                      eps_high=c.eps_high, dual_clip=c.dual_clip)
    metrics = {f'ratio/{k}': v for k, v in found.items()}
    tokens = jnp.sum(s.mask, dtype=jnp.float32)
    metrics['entropy'] = (jnp.sum(on_mask(s.mask, lax.stop_gradient(out.entropy))), tokens)
    metrics['positive_advantage_frac'] = (
      jnp.sum((s.advantage > 0) & s.mask, dtype=jnp.float32), tokens)
    return num, den, {'loss/policy': (num, den), **metrics}

  return term


@functools.cache
def kl_penalty(beta: float, kind: str, aggregation: Aggregation,
               max_tokens: int | None = None) -> api.Term:
  """beta * KL estimate to the reference on the sampled tokens; k1 has no gradient and is
  refused."""
  if kind == 'k1':
    raise ValueError("kl_kind must be 'k2', 'k3' or 'k3+' in the loss, got 'k1'")

  def term(out: api.Outputs, s: types.Signal):
    loss = divergences.kl_estimate(on_mask(s.mask, out.logp), on_mask(s.mask, s.ref_logp), kind)
    num, den = aggregate.aggregate(loss, s.mask, aggregation, traj_tokens=s.traj_tokens,
                                   max_tokens=max_tokens)
    return beta * num, den, {'loss/kl': (num, den)}

  return term


@functools.cache
def entropy_bonus(weight: float, aggregation: Aggregation,
                  max_tokens: int | None = None) -> api.Term:
  """-weight * entropy of the policy at the sampled positions."""

  def term(out: api.Outputs, s: types.Signal):
    num, den = aggregate.aggregate(on_mask(s.mask, out.entropy), s.mask, aggregation,
                                   traj_tokens=s.traj_tokens, max_tokens=max_tokens)
    return -weight * num, den, {'loss/entropy': (-num, den)}

  return term


@functools.cache
def value_error(clip: float) -> api.Term:
  """Critic loss 0.5 max((V - R)^2, (clip(V) - R)^2), a mean over tokens."""

  def term(out: api.Outputs, s: types.Signal):
    loss = surrogates.value_loss(on_mask(s.mask, out.value), on_mask(s.mask, s.old_value),
                                 on_mask(s.mask, s.returns), clip=clip)
    num, den = aggregate.aggregate(loss, s.mask, 'token_mean')
    return num, den, {'loss/critic': (num, den)}

  return term


@functools.cache
def cross_entropy(aggregation: Aggregation = 'token_mean') -> api.Term:
  """-log pi(y), weighted by token_weight where there is one."""

  def term(out: api.Outputs, s: types.Signal):
    loss = -on_mask(s.mask, out.logp)
    if s.token_weight is not None:
      loss = loss * on_mask(s.mask, s.token_weight)
    num, den = aggregate.aggregate(loss, s.mask, aggregation, traj_tokens=s.traj_tokens)
    return num, den, {'loss/nll': (num, den)}

  return term


@functools.cache
def teacher_divergence(kind: str, *, beta: float, temperature: float, chunk: int,
                       aggregation: Aggregation = 'token_mean') -> api.Term:
  """Full-vocabulary divergence between teacher and student at every loss token."""

  def term(out: api.Outputs, s: types.Signal):
    teacher = out.roles['teacher']
    loss = divergences.divergence_chunked(
      out.hidden, out.unembedding, teacher.hidden, teacher.unembedding, kind, chunk=chunk,
      beta=beta, temperature=temperature, logit_cap=out.logit_cap,
      teacher_logit_cap=teacher.logit_cap)
    loss = masks.put_window(loss, out.start, s.mask.shape[1])
    num, den = aggregate.aggregate(on_mask(s.mask, loss), s.mask, aggregation,
                                   traj_tokens=s.traj_tokens)
    return num, den, {'loss/distill': (num, den)}

  return term


def _lay_over(base: types.Rollout, top: types.Rollout, rows: np.ndarray, here: np.ndarray):
  """Row rows[i] of `top` where here[i], row i of `base` elsewhere."""
  found = jax.tree.map(lambda x: x[np.where(here, rows, 0)], top)
  return jax.tree.map(
    lambda a, b: jnp.where(here.reshape(-1, *(1,) * (a.ndim - 1)), a, b), found, base)


def keep_groups(parts: Sequence[api.Drawn], picks: Sequence[tuple[int, int]]) -> api.Drawn:
  """One Drawn of as many picked (part, slot) groups as a part has slots, renumbered from 0.

  Parts share their shapes. One gather per part, so that no shape depends on how many there are.
  """
  size = parts[0].group_size
  offsets = np.cumsum([0] + [len(p.texts) for p in parts])
  rows = np.concatenate([offsets[p] + np.asarray(parts[p].rows(s)) for p, s in picks])
  rollout = parts[0].rollout
  for begin, end, part in zip(offsets, offsets[1:], parts):
    rollout = _lay_over(rollout, part.rollout, rows - begin, (rows >= begin) & (rows < end))
  new_ids = jnp.repeat(jnp.arange(len(picks), dtype=jnp.int32), size)
  sample = jnp.tile(jnp.arange(size, dtype=jnp.int32), len(picks))
  rollout = dataclasses.replace(rollout, group_id=new_ids, traj_id=new_ids * size + sample)
  texts = [t for p in parts for t in p.texts]
  answers = [a for p in parts for a in p.answers]
  return api.Drawn(rollout, tuple(parts[p].groups[s] for p, s in picks), size,
                   tuple(texts[r] for r in rows), tuple(answers[r] for r in rows),
                   np.concatenate([p.reward for p in parts])[rows])
