"""The second phase: pick hard groups under a static cap, ask the teacher, sample again.

Serves ZPPO and its Hint, Prefix and teacher-response baselines. Source: arXiv:2606.18216.
Dims: P group slots, C slots of the second phase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from zppo_jax.core import types
from zppo_jax.mesh import hosts
from zppo_jax.methods import api
from zppo_jax.replay import prompts as prompt_buffer
from zppo_jax.replay.prompts import PromptBuffer

Array = jax.Array


def select_hard(accuracy: Array, ok: Array, *, tau: float) -> tuple[Array, Array]:
  """Slots with accuracy < tau, ascending, ties in slot order: (index i32[P], ok bool[P]).

  tau is strict: a group at exactly tau is not hard. NaN accuracy counts as a padding slot.
  """
  hard = ok & (accuracy < tau)
  index = jnp.argsort(jnp.where(hard, accuracy, jnp.inf), stable=True).astype(jnp.int32)
  return index, hard[index]


def cap_instances(has: Array, *, cap: int) -> Array:
  """Which instances stay, bool[C, 2], walking (question, BCQ, NCQ) and stopping at the first
  misfit.

  Every instance costs one slot, so the walk keeps exactly the first `cap` of them.
  """
  order = jnp.cumsum(has.reshape(-1)).reshape(has.shape)
  return has & (order <= cap)


def hard_slots(drawn: api.Drawn, tau: float) -> list[int]:
  """Hard slots of a first phase, hardest first."""
  accuracy = drawn.accuracy()
  index, ok = select_hard(jnp.asarray(accuracy), jnp.asarray(~np.isnan(accuracy)), tau=tau)
  return [int(i) for i in np.asarray(index)[np.asarray(ok)]]


def right_traces(drawn: api.Drawn, slots: Sequence[int], ctx: api.Context, *, group_size: int,
                 chunk: int, finished: bool = False) -> dict[int, list[str]]:
  """Right teacher answers to the plain questions of `slots`, drawn anew: {slot: [text, ...]}.

  The teacher is sampled in equal chunks of `chunk` groups, so that only hard questions cost
  anything and one shape is compiled. `finished` leaves out answers that were cut by length.
  """
  found: dict[int, list[str]] = {}
  tokens = 0.0
  for begin in range(0, len(slots), chunk):
    part = slots[begin:begin + chunk]
    groups = [api.Group(drawn.groups[s].question) for s in part]
    sampled = ctx.draw(groups, capacity=chunk, group_size=group_size, role=types.TEACHER)
    tokens += float(hosts.fetch(sampled.rollout.traj_tokens).sum())
    keep = sampled.reward > 0
    if finished:
      keep &= hosts.fetch(sampled.rollout.status) == types.FINISHED
    for i, slot in enumerate(part):
      found[slot] = [sampled.texts[r] for r in sampled.rows(i) if keep[r]]
  ctx.count('teacher/solved_frac', sum(map(bool, found.values())), len(slots))
  ctx.count('teacher/sampled_tokens', tokens, 1)
  return found


def with_room(groups: Sequence[api.Group], ctx: api.Context) -> list[api.Group]:
  """The reformulated groups whose prompts fit; the others are dropped and counted, for no answer of
  any length may end a run."""
  fine = [g for g in groups if ctx.fits(g, reformulated=True)]
  ctx.count('second_phase/no_room_frac', len(groups) - len(fine), len(groups))
  return fine


def replay_plan(num_replay: int) -> Callable:
  """Plan: the new questions, then uniform draws from the buffer (state.buffer) without doubles."""
  pick = jax.jit(prompt_buffer.sample, static_argnums=2)

  def plan(state, batch: np.ndarray, ctx: api.Context):
    groups = [api.Group(int(q)) for q in batch]
    if num_replay:
      ids, ok = jax.device_get(
        pick(state, ctx.key('replay'), num_replay, jnp.asarray(batch, jnp.int32)))
      groups += [api.Group(int(q)) for q in ids[ok]]
    return state, groups

  return plan


def plain_accuracy(rollout: types.Rollout, *, capacity: int, group_size: int):
  """Question id i32[P], accuracy f32[P] and ok bool[P] of the first-phase slots.

  A teacher's row stands where a wrong row of the student stood, and counts as that. A group with a
  row that nothing scored (reward NaN) has no accuracy.
  """
  rows = capacity * group_size
  ids = rollout.question_id[:rows].reshape(capacity, group_size)[:, 0]
  reward = jnp.where(rollout.role_id == types.POLICY, rollout.reward, 0.0)
  accuracy = reward[:rows].reshape(capacity, group_size).mean(axis=1)
  ok = rollout.valid[:rows].reshape(capacity, group_size).all(axis=1) & jnp.isfinite(accuracy)
  return ids, accuracy, ok


def refresh(*, capacity: int, group_size: int, tau: float) -> Callable:
  """Absorb: graduate, admit and evict by the plain groups only."""

  def absorb(buffer: PromptBuffer, rollout: types.Rollout) -> PromptBuffer:
    ids, accuracy, ok = plain_accuracy(rollout, capacity=capacity, group_size=group_size)
    return prompt_buffer.update(buffer, ids, accuracy, ok, tau=tau)

  return absorb


def buffer_summary(buffer: PromptBuffer) -> dict[str, Array]:
  """Size and counts by entry accuracy, for the metrics."""
  found = {'buffer/size': prompt_buffer.size(buffer),
           'buffer/visits_mean': jnp.sum(buffer.visits) / jnp.maximum(buffer.valid.sum(), 1)}
  for name in ('admitted', 'graduated', 'evicted'):
    counts = getattr(buffer, name)
    found[f'buffer/{name}'] = counts.sum()
    for k in range(counts.shape[0] - 1):
      found[f'buffer/{name}_at_{k}'] = counts[k]
  return found
