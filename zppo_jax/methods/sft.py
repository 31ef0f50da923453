"""Supervised fine-tuning on given responses: the warm start, and every imitation baseline's loss.

A warm start for ZPPO also shows reformulated prompts, so that the model can read candidates and
wrong lists before it is asked to learn from them, and may have wrong labels on its plain rows, so
that there is something left to learn (arXiv:2606.18216; the mixture is our own).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from zppo_jax.core import types
from zppo_jax.core.errors import UserError
from zppo_jax.methods import api, common, guidance
from zppo_jax.methods import reformulate as text

BCQ, NCQ = 1, 2  # kinds of group


@dataclasses.dataclass(frozen=True)
class Config:
  num_new: int = 64  # plain rows per optimiser step
  aggregation: common.Aggregation = 'token_mean'
  bcq_fraction: float = 0.0  # further rows with two candidates, as a fraction of num_new
  ncq_fraction: float = 0.0  # further rows with a wrong list
  label_noise: float = 0.0  # fraction of plain rows that teach a wrong answer
  max_wrong: int = 8  # candidates of a wrong list
  wording: Literal['full', 'short'] = 'full'
  compress_tokens: int = 512

  @property
  def num_bcq(self) -> int:
    return int(self.bcq_fraction * self.num_new)

  @property
  def num_ncq(self) -> int:
    return int(self.ncq_fraction * self.num_new)


def solution(ctx: api.Context, question: int) -> str:
  """Worked solution of a question, or its boxed answer where the data has none."""
  example = ctx.example(question)
  return example.solution or f'\\boxed{{{example.answer}}}'


def wrong_solution(ctx: api.Context, question: int, wrong: str) -> str:
  """The solution with its final answer, boxed and in the step before, replaced by a wrong one."""
  example = ctx.example(question)
  lines = [x for x in solution(ctx, question).splitlines() if '\\boxed' not in x]
  if lines and lines[-1].endswith(example.answer):
    lines[-1] = lines[-1].removesuffix(example.answer) + wrong
  return '\n'.join([*lines, f'\\boxed{{{wrong}}}'])


def _plan(c: Config):
  def plan(state, batch: np.ndarray, ctx: api.Context):
    groups = []
    for question in map(int, batch):
      noisy = ctx.rng('noise', question).random() < c.label_noise
      if ctx.example(question).dialogue and not noisy:
        ids, others = ctx.worked(question)
        groups.append(api.Group(question, response=ids, others_said=others))
        continue
      label = (wrong_solution(ctx, question, ctx.distractor(question)) if noisy
               else solution(ctx, question))
      groups.append(api.Group(question, response=ctx.encode(label)))
    return state, groups

  return plan


def _row(c: Config, ctx: api.Context, question: int, kind: int) -> api.Group:
  """One reformulated question with its right solution as the label."""
  rng, wording = ctx.rng('candidates', question, kind), text.WORDINGS[c.wording]
  messages = ctx.example(question).messages
  wrong = [ctx.distractor(question)]
  if kind == BCQ:
    traces = [guidance.tail(t, ctx, c.compress_tokens) for t in (
      solution(ctx, question), wrong_solution(ctx, question, wrong[0]))]
    body = text.build_bcq(messages[-1].content, *traces, rng, wording)
  else:
    for other in ctx.others(question, int(rng.integers(c.max_wrong)), rng):
      answer = ctx.example(other).answer
      if answer != ctx.example(question).answer:
        wrong.append(answer)
    traces = [guidance.tail(wrong_solution(ctx, question, w), ctx, c.compress_tokens)
              for w in wrong]
    body = text.build_ncq(messages[-1].content, traces, wrong, wording)
  return api.Group(question, kind=kind, messages=(*messages[:-1], types.Message('user', body)),
                   response=ctx.encode(solution(ctx, question)))


def _reformulated(c: Config):
  """Explore: rows with candidates and wrong lists on further questions."""
  kinds = [BCQ] * c.num_bcq + [NCQ] * c.num_ncq

  def explore(state, drawn: api.Drawn, ctx: api.Context):
    questions = ctx.next_questions(len(kinds))
    groups = [_row(c, ctx, int(q), k) for q, k in zip(questions, kinds)]
    extra = ctx.draw(groups, capacity=len(kinds), first_id=c.num_new, reformulated=True)
    return state, [drawn, extra]

  return explore


def build(c: Config) -> api.Method:
  """Cross-entropy on the solutions of the data; prompts are masked. Raises UserError on bad
  fields."""
  found = [f'{n} must be in [0, 1], got {getattr(c, n)}'
           for n in ('bcq_fraction', 'ncq_fraction', 'label_noise') if not 0 <= getattr(c, n) <= 1]
  found += [f'{n} must be at least 1, got {getattr(c, n)}'
            for n in ('num_new', 'max_wrong', 'compress_tokens') if getattr(c, n) < 1]
  if found:
    raise UserError('; '.join(found))
  common.check_choices(c)

  def credit(state, rollout, scores):
    return state, common.signal(rollout, scores, jnp.ones_like(rollout.reward),
                                active=rollout.valid)

  kinds = c.num_bcq + c.num_ncq
  return api.Method(
    plan=_plan(c), credit=credit, terms=(common.cross_entropy(c.aggregation),), group_size=1,
    capacity=c.num_new, explore=_reformulated(c) if kinds else api.keep_drawn,
    extra=(api.Slots(kinds, 1, True),) if kinds else (), needs=frozenset({'solutions'}))
