"""Groups of episodes: answers with tool calls, or acts in an environment, as rows to train on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from zppo_jax.agents import loop, policy, traces
from zppo_jax.agents.records import FAULTS, Episode, Status
from zppo_jax.agents.tools import Tool
from zppo_jax.core import types
from zppo_jax.core.errors import UserError
from zppo_jax.envs import api
from zppo_jax.models.config import ModelConfig
from zppo_jax.sampling import conversations, decode


@dataclasses.dataclass(frozen=True)
class Episodes:
  """How a question is answered in several turns; token counts are those of `loop.Limits`."""

  agent: loop.Agent
  tools: Mapping[str, Tool]
  max_turns: int
  turn_tokens: int
  env: Callable[[], api.TextEnv] | None = None  # whose rewards count, instead of a grader's


def run(e: Episodes, tasks: Sequence[api.Task], *, config: ModelConfig, params: Any,
        tokenizer: Any, template: Any, settings: decode.Settings, prompt_tokens: int, slots: int,
        key: jax.Array, version: int) -> list[Episode]:
  """settings.group_size episodes per task, in order.

  What an episode does depends on no clock: steps of environments and calls of tools have limits of
  their own. Raises UserError where the policy could not be asked (a prompt above its bucket), or
  has no finite logits in any episode.
  """
  room = prompt_tokens + settings.max_new_tokens
  rows = len(tasks) * settings.group_size
  client = policy.PolicyClient(
    config, params, tokenizer, template, key=key, version=version, max_new_tokens=e.turn_tokens,
    shape=conversations.Shape(slots=slots or rows, context=room))
  limits = loop.Limits(max_turns=e.max_turns, turn_tokens=e.turn_tokens, wall_s=math.inf,
                       max_tokens=settings.max_new_tokens, max_prompt_tokens=prompt_tokens)
  found = loop.rollout(
    tasks, e.agent, dict(policy=client), limits=limits, group_size=settings.group_size,
    sampling=loop.Sampling(settings.temperature, settings.top_p, settings.top_k, settings.min_p),
    tools=e.tools, env=e.env)
  broken = [x.info.get('reason') == policy.NOT_FINITE for x in found]
  for episode, fault in zip(found, broken):
    if episode.status == Status.MODEL_ERROR and (not fault or all(broken)):
      raise UserError(f'task {episode.task}: {episode.info["reason"]}')
  return found


def pack(found: Sequence[Episode], *, size: int, group_size: int, first_id: int,
         kind: Sequence[int], question_id: Sequence[int]) -> types.Rollout:
  """One row of `size` columns per episode, `group_size` per group, groups named from first_id on.

  `kind` and `question_id` have an entry per group, those behind the last episode are blank. An
  episode that a fault ended has reward NaN, which takes it out of the loss and of the statistics.
  """
  count = len(kind) * group_size
  parts = [traces.rows(e.traces[0]) if e.traces else [] for e in found]
  if any(len(part) > 1 for part in parts):
    raise ValueError('an agent that rewrites its history makes several rows of an episode: its '
                     'groups are not of equal size')
  per_row = lambda values: np.repeat(np.asarray(values), group_size)
  blank = count - len(found)
  return traces.pack(
    parts + [[]] * blank, size=size, count=count, first_traj=first_id * group_size,
    status=[traces.STATUS.get(e.status, types.FINISHED) for e in found] + [types.FINISHED] * blank,
    reward=[np.nan if e.status in FAULTS else e.reward for e in found] + [0.0] * blank,
    group_id=per_row(first_id + np.arange(len(kind))), kind=per_row(kind),
    question_id=per_row(question_id))


def metrics(found: Sequence[Episode]) -> dict[str, tuple[float, float]]:
  """{name: (numerator, denominator)} of a call."""
  count = len(found)
  calls = sum(e.info.get('tool_calls', 0) for e in found)
  out = {'episode/turns': (sum(e.turns for e in found), count),
         'episode/tool_calls': (calls, count),
         'episode/tool_error_frac': (sum(e.info.get('tool_errors', 0) for e in found),
                                     max(1, calls))}
  for status in Status:
    if status not in (Status.FINISHED, Status.MODEL_ERROR):
      out[f'episode/{status.value}'] = sum(e.status == status for e in found), count
  return out
