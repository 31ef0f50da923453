"""Distillation baselines: full-vocabulary divergences on teacher or student tokens, and sampled
OPD.

Off-policy: right teacher answers, JSD at each of their tokens. On-policy: JSD at the student's own
tokens, or (`signal='advantage'`) the sampled reverse KL as a token advantage of the one clipped
term. Sources: arXiv:2606.18216 (baselines), GKD 2306.13649. Dims: N rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from zppo_jax.core import types
from zppo_jax.methods import api, common, second_phase
from zppo_jax.ops import credit as credit_ops
from zppo_jax.ops import divergences
from zppo_jax.replay import prompts as prompt_buffer


@dataclasses.dataclass(frozen=True)
class Config:
  num_new: int = 384
  group_size: int = 8
  teacher_group_size: int = 4
  source: Literal['student', 'teacher'] = 'student'  # who writes the tokens
  signal: Literal['divergence', 'advantage'] = 'divergence'
  divergence: Literal['fkl', 'rkl', 'gjsd', 'skew_fkl', 'skew_rkl'] = 'gjsd'
  beta: float = 0.5
  temperature: float = 1.0
  discount: float = 0.0  # advantage: weight of later tokens' divergence
  use_buffer: bool = False
  rho_replay: float = 0.25
  tau: float = 0.5
  buffer_capacity: int = 10_000
  teacher_chunk: int = 96
  chunk: int = 1024  # tokens per vocabulary block

  @property
  def num_replay(self) -> int:
    return math.floor(self.rho_replay * self.num_new) if self.use_buffer else 0


def check(c: Config) -> None:
  """Raises ValueError naming the field, the bound and the value."""
  common.check_choices(c)
  divergences.check_divergence(c.divergence, beta=c.beta, temperature=c.temperature)
  for name in ('num_new', 'group_size', 'teacher_group_size', 'teacher_chunk', 'chunk'):
    if getattr(c, name) < 1:
      raise ValueError(f'{name} must be at least 1, got {getattr(c, name)}')
  if c.source == 'teacher' and c.signal == 'advantage':
    raise ValueError("signal must be 'divergence' with source 'teacher', got 'advantage'")


def _teacher_rows(c: Config, capacity: int):
  """Explore: fresh teacher answers to every question; the right ones train, the student's do
  not."""

  def explore(state, drawn: api.Drawn, ctx: api.Context):
    groups = [g for g in drawn.groups if g is not None]
    answers = ctx.draw(groups, capacity=capacity, first_id=capacity,
                       group_size=c.teacher_group_size, role=types.TEACHER)
    scored = answers.reward[:len(groups) * c.teacher_group_size]
    ctx.count('teacher/accuracy', float(np.nansum(scored)), int(np.isfinite(scored).sum()))
    return state, [drawn, answers]

  return explore


def build(c: Config) -> api.Method:
  """Off- or on-policy distillation; one optimiser step per rollout step, optional prompt buffer."""
  check(c)
  capacity = c.num_new + c.num_replay

  def credit(state, rollout, scores):
    if c.source == 'teacher':
      keep = (rollout.role_id == types.TEACHER) & (rollout.reward > 0)
      rollout = dataclasses.replace(rollout, loss_mask=rollout.loss_mask & keep[:, None])
    value = jnp.ones_like(rollout.reward)
    if c.signal == 'advantage':
      mask = common.loss_mask(rollout)
      value = credit_ops.opd_advantage(
        common.on_mask(mask, scores.teacher_logp), common.on_mask(mask, scores.old_logp), mask,
        discount=c.discount)
    return state, common.signal(rollout, scores, value, active=rollout.valid)

  fields = {}
  if c.use_buffer:
    fields = dict(
      init=lambda key: prompt_buffer.init(c.buffer_capacity, c.group_size),
      absorb=second_phase.refresh(capacity=capacity, group_size=c.group_size, tau=c.tau),
      summary=second_phase.buffer_summary)
  if c.source == 'teacher':
    fields |= dict(explore=_teacher_rows(c, capacity),
                   extra=(api.Slots(capacity, c.teacher_group_size),))
  if c.signal == 'advantage':
    terms, needs = (common.policy(common.PolicyLoss()),), {'teacher_logp', 'old_logp'}
  else:
    terms = (common.teacher_divergence(c.divergence, beta=c.beta, temperature=c.temperature,
                                       chunk=c.chunk),)
    needs = {'teacher_hidden'} | ({'teacher'} if c.source == 'teacher' else set())
  return api.Method(
    plan=second_phase.replay_plan(c.num_replay), credit=credit, terms=terms,
    group_size=c.group_size, capacity=capacity, needs=frozenset(needs), **fields)
