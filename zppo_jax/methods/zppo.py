"""ZPPO: the teacher in the prompt, never in the gradient; and its baselines as switches.

Hard questions (mean plain reward < tau) get two reformulated prompts: BCQ shows one right teacher
trace and one wrong student trace, NCQ lists the wrong ones. Fresh student rollouts from them train
by the ordinary clipped surrogate, and a prompt buffer recirculates hard questions until half of
their plain rollouts are right. Source: arXiv:2606.18216.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from zppo_jax.core import types
from zppo_jax.methods import api, common, guidance, second_phase
from zppo_jax.methods import reformulate as text
from zppo_jax.ops import advantages, surrogates
from zppo_jax.replay import prompts as prompt_buffer

BCQ, NCQ = 1, 2  # kinds of group


@dataclasses.dataclass(frozen=True)
class Config:
  """The published recipe; sizes are per rollout step."""

  num_new: int = 384
  group_size: int = 8
  teacher_group_size: int = 4
  tau: float = 0.5  # a question is hard below this mean plain reward; strict
  rho_replay: float = 0.25
  rho_aug: float = 0.25
  buffer_capacity: int = 10_000
  iterations: int = 4
  eps_low: float = 0.2
  eps_high: float = 0.28
  dual_clip: float | None = 10.0
  norm: Literal['none', 'without_zero', 'with_zero'] = 'without_zero'
  norm_scope: Literal['rollout_batch', 'minibatch'] = 'rollout_batch'
  use_bcq: bool = True
  use_ncq: bool = True
  use_buffer: bool = True
  guide: Literal['none', 'hint', 'prefix', 'teacher_response'] = 'none'
  prefix_fraction: float = 0.4
  prefix_tokens: int = 4915  # static cap of the forced prefix: .4 of the published 12 288
  compress: Literal['teacher', 'tail'] = 'teacher'
  compress_tokens: int = 512
  wording: Literal['full', 'short'] = 'full'
  teacher_chunk: int = 96  # groups per teacher call

  @property
  def num_replay(self) -> int:
    return math.floor(self.rho_replay * self.num_new) if self.use_buffer else 0

  @property
  def num_aug(self) -> int:
    return math.floor(self.rho_aug * self.num_new)

  @property
  def reformulates(self) -> bool:
    return self.use_bcq or self.use_ncq


def check(c: Config) -> None:
  """Raises ValueError naming every field out of bounds."""
  rules = (
    ('tau', 0 < c.tau <= 1, 'in (0, 1]'), ('rho_replay', c.rho_replay >= 0, 'at least 0'),
    ('rho_aug', c.rho_aug >= 0, 'at least 0'), ('num_new', c.num_new >= 1, 'at least 1'),
    ('group_size', c.group_size >= 2, 'at least 2'),
    ('teacher_group_size', c.teacher_group_size >= 1 or not (c.use_bcq or c.guide != 'none'),
     'at least 1 with use_bcq or a guide'),
    ('buffer_capacity', c.buffer_capacity >= 1, 'at least 1'),
    ('iterations', 1 <= c.iterations <= c.num_new, f'in 1..num_new = {c.num_new}'),
    ('compress_tokens', c.compress_tokens >= 1, 'at least 1'),
    ('teacher_chunk', c.teacher_chunk >= 1, 'at least 1'),
    ('prefix_fraction', 0 < c.prefix_fraction < 1, 'in (0, 1)'),
    ('prefix_tokens', c.prefix_tokens >= 1 or c.guide != 'prefix', 'at least 1 with guide=prefix'),
    ('guide', c.guide == 'none' or not c.reformulates, 'none while use_bcq or use_ncq is on'))
  found = [f'{n} must be {bound}, got {getattr(c, n)!r}' for n, fine, bound in rules if not fine]
  if (c.reformulates or c.guide in ('hint', 'prefix')) and c.num_aug < 1:
    found.append(f'rho_aug must give floor(rho_aug * num_new) >= 1, got {c.rho_aug} * {c.num_new}')
  if found:
    raise ValueError('; '.join(found))
  common.check_choices(c)
  surrogates.check_clip(c.eps_low, c.eps_high, c.dual_clip)


def wrong_rows(drawn: api.Drawn, slot: int) -> list[int]:
  """Rows of a slot with reward 0."""
  return [r for r in drawn.rows(slot) if drawn.reward[r] <= 0]


@dataclasses.dataclass(frozen=True)
class Instance:
  """One reformulated prompt in the making: which slot, and its source traces."""

  slot: int
  kind: int
  traces: tuple[str, ...]  # BCQ: (right, wrong); NCQ: all wrong
  answers: tuple[str | None, ...] = ()


def choose_instances(c: Config, drawn: api.Drawn, right: dict[int, list[str]],
                     hard: list[int], ctx: api.Context) -> list[Instance]:
  """Steps 3 to 5 of the algorithm: pre-cap on questions, instances, post-cap on instances."""
  groups = sum(g is not None for g in drawn.groups)
  ctx.count('second_phase/easy_frac', groups - len(hard), groups)
  if not c.use_ncq:
    hard = [s for s in hard if right.get(s)]
  slots = hard[:c.num_aug]
  has = np.zeros((c.num_aug, 2), bool)
  for i, slot in enumerate(slots):
    wrong = bool(wrong_rows(drawn, slot))
    has[i] = (c.use_bcq and bool(right.get(slot)) and wrong, c.use_ncq and wrong)
  for name, column in zip(('bcq', 'ncq'), has.T):
    ctx.count(f'second_phase/{name}_eligible_frac', int(column.sum()), len(slots))
  keep = np.asarray(second_phase.cap_instances(jnp.asarray(has), cap=c.num_aug))
  found = []
  for i, slot in enumerate(slots):
    wrong = wrong_rows(drawn, slot)
    rng = ctx.rng('candidates', drawn.groups[slot].question)
    if keep[i, 0]:
      pair = (right[slot][rng.integers(len(right[slot]))],
              drawn.texts[wrong[rng.integers(len(wrong))]])
      found.append(Instance(slot, BCQ, pair))
    if keep[i, 1]:
      found.append(Instance(slot, NCQ, tuple(drawn.texts[r] for r in wrong),
                            tuple(drawn.answers[r] for r in wrong)))
  return found


def build_groups(c: Config, drawn: api.Drawn, instances: list[Instance], ctx: api.Context):
  """Compresses all traces in one call and writes the reformulated prompts."""
  wording = text.WORDINGS[c.wording]
  sources = [t for x in instances for t in x.traces]
  short = iter(guidance.compress(c.compress, sources, ctx, max_tokens=c.compress_tokens,
                                 wording=wording))
  groups = []
  for instance in instances:
    question = drawn.groups[instance.slot].question
    messages = ctx.example(question).messages
    traces = [next(short) for _ in instance.traces]
    if instance.kind == BCQ:
      body = text.build_bcq(messages[-1].content, traces[0], traces[1],
                            ctx.rng('coin', question), wording)
    else:
      body = text.build_ncq(messages[-1].content, traces, instance.answers, wording)
    messages = (*messages[:-1], types.Message('user', body))
    groups.append(api.Group(question, kind=instance.kind, messages=messages))
  return second_phase.with_room(groups, ctx)


def _reformulate(c: Config, capacity: int):
  """Explore: teacher on the hard questions, BCQ and NCQ groups added after the plain ones."""

  def explore(state, drawn: api.Drawn, ctx: api.Context):
    hard = second_phase.hard_slots(drawn, c.tau)
    # With NCQ on, the pre-cap does not look at the teacher, so only the candidates are asked; the
    # samples are the same as if all hard questions were (noise is keyed by the question).
    asked = hard[:c.num_aug] if c.use_ncq else hard
    right = {}
    if c.use_bcq:
      right = second_phase.right_traces(drawn, asked, ctx, group_size=c.teacher_group_size,
                                        chunk=c.teacher_chunk)
    instances = choose_instances(c, drawn, right, hard, ctx)
    groups = build_groups(c, drawn, instances, ctx)
    extra = ctx.draw(groups, capacity=c.num_aug, first_id=capacity, reformulated=True)
    return state, [drawn, extra]

  return explore


def batch_advantage(c: Config, rollout: types.Rollout, scores: types.Scores):
  """Two-step REINFORCE++ over rollouts, f32[N], per rollout batch or per mini-batch."""
  def estimate(valid):
    return advantages.reinforce_pp_baseline(rollout.reward, rollout.group_id, valid, norm=c.norm,
                                            num_groups=rollout.group_id.shape[0])

  if c.norm_scope == 'rollout_batch':
    return estimate(rollout.valid)
  return sum(estimate(rollout.valid & (scores.minibatch == i)) for i in range(c.iterations))


def build(c: Config) -> api.Method:
  """ZPPO, or with switches: GRPO, +buffer, +BCQ, +NCQ, both, Hint, Prefix, teacher response."""
  check(c)
  capacity = c.num_new + c.num_replay
  explore = api.keep_drawn
  if c.reformulates:
    explore = _reformulate(c, capacity)
  elif c.guide != 'none':
    explore = guidance.GUIDES[c.guide](c, capacity)

  def credit(state, rollout, scores):
    value = batch_advantage(c, rollout, scores)
    return state, common.signal(rollout, scores, value, active=value != 0)

  loss = common.PolicyLoss(eps_low=c.eps_low, eps_high=c.eps_high, dual_clip=c.dual_clip)
  needs = {'old_logp'} if c.iterations > 1 else set()
  if c.use_bcq or c.guide != 'none' or (c.reformulates and c.compress == 'teacher'):
    needs.add('teacher')
  fields = {}
  if c.reformulates or c.guide in ('hint', 'prefix'):
    fields['extra'] = (api.Slots(c.num_aug, c.group_size, c.guide != 'prefix'),)
  if c.use_buffer:
    fields |= dict(
      init=lambda key: prompt_buffer.init(c.buffer_capacity, c.group_size),
      absorb=second_phase.refresh(capacity=capacity, group_size=c.group_size, tau=c.tau),
      summary=second_phase.buffer_summary)
  return api.Method(
    plan=second_phase.replay_plan(c.num_replay), explore=explore, credit=credit,
    terms=(common.policy(loss),), group_size=c.group_size, capacity=capacity,
    iterations=c.iterations, needs=frozenset(needs), **fields)
