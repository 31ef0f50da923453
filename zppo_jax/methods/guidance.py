"""Ways to put a teacher's answer to use beside BCQ and NCQ: compression, Hint, Prefix, teacher
response.

Source: arXiv:2606.18216 (baselines); Hint after Guide-GRPO and SEELE, Prefix after BREAD
and StepHint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from zppo_jax.core import types
from zppo_jax.methods import api, second_phase
from zppo_jax.methods import reformulate as text

HINT, PREFIX = 3, 4  # kinds of group


def tail(source: str, ctx: api.Context, max_tokens: int) -> str:
  """The last max_tokens tokens of a trace, with its answer restored if the cut lost it."""
  return text.restore_answer(source, ctx.decode(ctx.encode(source)[-max_tokens:]))


def _answer_line(source: str) -> str:
  answer = text.short_answer(source)
  if answer is None:
    return 'The source gives no final answer: do not add one.'
  return f'The final answer to copy is \\boxed{{{answer}}}.'


def compress(how: str, sources: Sequence[str], ctx: api.Context, *, max_tokens: int,
             wording: text.Wording) -> list[str]:
  """Each trace in at most max_tokens tokens and with the same final answer.

  'teacher': greedy rewriting; a summary that changes the answer is redone once with the answer
  named, then replaced by the tail. 'tail': the last tokens, for teachers that follow no
  instruction.
  """
  if how == 'tail' or not sources:
    return [tail(s, ctx, max_tokens) for s in sources]
  prompts = [text.compress_prompt(s, wording) for s in sources]
  found = [text.read_summary(t) for t in ctx.write(prompts, max_tokens=max_tokens, tag='compress')]
  bad = [i for i, (s, f) in enumerate(zip(sources, found)) if not text.keeps_answer(s, f)]
  if bad:
    named = [f'{prompts[i]}\n{_answer_line(sources[i])}' for i in bad]
    for i, redone in zip(bad, ctx.write(named, max_tokens=max_tokens, tag='compress')):
      redone = text.read_summary(redone)
      kept = text.keeps_answer(sources[i], redone)
      found[i] = redone if kept else tail(sources[i], ctx, max_tokens)
  ctx.count('compress/violations', len(bad), len(sources))
  return [text.restore_answer(s, f) for s, f in zip(sources, found)]


def _picked(c, drawn: api.Drawn, ctx: api.Context, *, limit: int,
            finished: bool = False) -> list[tuple[int, str]]:
  """(slot, one right teacher trace) of the hardest questions; those without one are skipped."""
  slots = second_phase.hard_slots(drawn, c.tau)[:limit]
  right = second_phase.right_traces(drawn, slots, ctx, group_size=c.teacher_group_size,
                                    chunk=c.teacher_chunk, finished=finished)
  found = []
  for slot in slots:
    if right[slot]:
      rng = ctx.rng('guide', drawn.groups[slot].question)
      found.append((slot, right[slot][rng.integers(len(right[slot]))]))
  return found


def hint(c, capacity: int):
  """Explore: a new group per hard question with an answer-free hint by the teacher."""

  def explore(state, drawn: api.Drawn, ctx: api.Context):
    wording = text.WORDINGS[c.wording]
    picked = _picked(c, drawn, ctx, limit=c.num_aug)
    questions = [ctx.example(drawn.groups[s].question).messages for s, _ in picked]
    prompts = [text.hint_prompt(m[-1].content, t, wording) for m, (_, t) in zip(questions, picked)]
    hints = ctx.write(prompts, max_tokens=c.compress_tokens, tag='hint') if prompts else []
    groups, leaks = [], 0
    for (slot, trace), messages, line in zip(picked, questions, hints):
      if text.leaks_answer(line, trace):
        leaks += 1
        continue
      body = text.build_hint(messages[-1].content, line, wording)
      groups.append(api.Group(drawn.groups[slot].question, kind=HINT,
                              messages=(*messages[:-1], types.Message('user', body))))
    ctx.count('hint/leaks', leaks, len(picked))
    groups = second_phase.with_room(groups, ctx)
    return state, [drawn, ctx.draw(groups, capacity=c.num_aug, first_id=capacity,
                                   reformulated=True)]

  return explore


def prefix(c, capacity: int):
  """Explore: a new group per hard question, its responses opened by 40 % of a right teacher
  trace."""

  def explore(state, drawn: api.Drawn, ctx: api.Context):
    groups = []
    for slot, trace in _picked(c, drawn, ctx, limit=c.num_aug):
      ids = ctx.encode(trace)
      size = min(math.floor(c.prefix_fraction * len(ids)), c.prefix_tokens)
      groups.append(api.Group(drawn.groups[slot].question, kind=PREFIX, forced=ids[:size]))
    return state, [drawn, ctx.draw(groups, capacity=c.num_aug, first_id=capacity,
                                   forced_tokens=c.prefix_tokens)]

  return explore


ROW_FIELDS = ('tokens', 'segment_ids', 'positions', 'loss_mask', 'behavior_logp', 'version',
              'turn_id', 'traj_tokens', 'role_id', 'status')


def teacher_response(c, capacity: int):
  """Explore: one wrong row of a hard group is replaced by a right teacher answer with reward 1.

  Its old log-probs are the student's own, by scoring. The row keeps its group.
  """

  def explore(state, drawn: api.Drawn, ctx: api.Context):
    # An answer that was cut has no room for the stop token that closes a given response.
    picked = _picked(c, drawn, ctx, limit=capacity, finished=True)
    if not picked:
      return state, [drawn]
    given = ctx.draw([api.Group(drawn.groups[s].question, response=ctx.encode(t))
                      for s, t in picked], capacity=capacity, group_size=1)
    rows = []
    for slot, _ in picked:
      wrong = [r for r in drawn.rows(slot) if drawn.reward[r] <= 0]
      rng = ctx.rng('replaced', drawn.groups[slot].question)
      rows.append(wrong[rng.integers(len(wrong))])
    return state, [_replace_rows(drawn, given, rows)]

  return explore


def _replace_rows(drawn: api.Drawn, given: api.Drawn, rows: list[int]) -> api.Drawn:
  """Drawn with given row i written over row rows[i], reward 1."""
  # One index per slot, so that no shape depends on how many rows there are; blanks point outside.
  index = jnp.asarray([*rows, *[len(drawn.texts)] * (len(given.texts) - len(rows))], jnp.int32)
  reward, texts, answers = drawn.reward.copy(), list(drawn.texts), list(drawn.answers)
  for i, row in enumerate(rows):
    reward[row], texts[row], answers[row] = 1.0, given.texts[i], given.answers[i]
  changed = {name: getattr(drawn.rollout, name).at[index].set(
    getattr(given.rollout, name), mode='drop') for name in ROW_FIELDS}
  rollout = dataclasses.replace(drawn.rollout, reward=jnp.asarray(reward), **changed)
  return api.Drawn(rollout, drawn.groups, drawn.group_size, tuple(texts), tuple(answers), reward)


GUIDES = {'hint': hint, 'prefix': prefix, 'teacher_response': teacher_response}
