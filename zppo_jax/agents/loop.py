"""Episodes: agents as pure state machines, and the loop that runs many of them side by side.

All episodes that wait for the same model go into one `generate` call, all that wait for an
environment into one `step`. Nothing here is concurrent but what clients and environments do inside
a call; so an episode depends on its task, its seed and its models alone.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import numbers
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

from zppo_jax.agents import tools as tools_lib
from zppo_jax.agents import traces
from zppo_jax.agents.llm import LMClient
from zppo_jax.agents.records import FAULTS, Completion, Episode, GenRequest, Status
from zppo_jax.core import rng, types
from zppo_jax.envs import api
from zppo_jax.envs.vector import VectorEnv

_SIDE_BY_SIDE = 32  # episodes whose tools run at once

# What an agent may want next.


@dataclasses.dataclass(frozen=True)
class Call:
  """An answer of a model to a chat; `segment` tags its tokens."""

  messages: tuple[types.Message, ...]
  role: str = 'policy'
  segment: str = 'act'


@dataclasses.dataclass(frozen=True)
class UseTools:
  """Answers of tools; calls that could not be read count as errors, too."""

  calls: tuple[types.ToolCall, ...]
  unread: int = 0


@dataclasses.dataclass(frozen=True)
class Act:
  """A step of the environment."""

  action: str | tuple[types.ToolCall, ...]


@dataclasses.dataclass(frozen=True)
class Done:
  """The agent is through."""

  status: Status = Status.FINISHED


# What an agent is told: a Completion, `tools.Answers` or an `api.StepResult`.


@dataclasses.dataclass(frozen=True)
class Agent:
  """Pure functions: `init(task, observation or None) -> state`, `next(state) -> Call | UseTools |
  Act | Done`, `observe(state, event) -> state`."""

  init: Callable[[api.Task, api.Observation | None], Any]
  next: Callable[[Any], Call | UseTools | Act | Done]
  observe: Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Limits:
  """What ends an episode from outside. `max_tokens` counts what follows the first prompt of a role,
  whoever said it: an observation that leaves no room for an answer is not part of the trace.
  Clients without tokens are not counted. `wall_s` is that of all episodes of a chunk together."""

  max_turns: int = 8  # answers
  turn_tokens: int = 256  # of one answer
  max_tokens: int = 1 << 20
  max_prompt_tokens: int = 1 << 20
  wall_s: float = 600.0
  max_consecutive_errors: int = 3  # of tools

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not getattr(self, field.name) > 0:
        raise ValueError(f'{field.name} must be above 0, got {getattr(self, field.name)}')


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How answers are drawn; `seed` names the noise of all episodes."""

  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  min_p: float = 0.0
  stop: tuple[str, ...] = ()
  seed: int = 0


@dataclasses.dataclass
class _Live:
  """An episode that is running."""

  task: api.Task
  repetition: int
  state: Any
  recorders: dict[str, traces.Recorder]
  turns: int = 0
  first: dict[str, int] = dataclasses.field(default_factory=dict)  # tokens of each first prompt
  errors: int = 0  # consecutive
  reward: float = 0.0
  progress: float | None = None
  text: str = ''
  info: dict[str, Any] = dataclasses.field(default_factory=dict)
  status: Status | None = None


def _request(live: _Live, call: Call, client: LMClient, limits: Limits, how: Sampling):
  """The next request of an episode, or None if a limit leaves no room; then it has a status."""
  if live.turns >= limits.max_turns:
    live.status = Status.MAX_TURNS
    return None
  recorder = live.recorders.get(call.role)
  if recorder is None:
    exact = 'tokens' in client.capabilities
    recorder = traces.Recorder(call.role, client if exact else None, 'train' in client.capabilities)
    live.recorders[call.role] = recorder
  ids = recorder.ask(call.messages, turn=live.turns, segment=call.segment)
  if call.role not in live.first:
    live.first[call.role] = len(ids)
    if len(ids) > limits.max_prompt_tokens:
      recorder.forget()
      live.status, live.info['reason'] = Status.MODEL_ERROR, (
        f'the prompt has {len(ids)} tokens, max_prompt_tokens is {limits.max_prompt_tokens}')
      return None
  room = min(limits.turn_tokens, limits.max_tokens - (len(ids) - live.first[call.role]))
  if room < 1:
    recorder.forget()
    live.status = Status.MAX_TOKENS
    return None
  name = f'{live.task.uid}/{live.repetition}/{live.turns}'
  return GenRequest(
    messages=call.messages, token_ids=ids or None, max_tokens=room, temperature=how.temperature,
    top_p=how.top_p, top_k=how.top_k, min_p=how.min_p, stop=how.stop,
    seed=rng.name_hash(f'{how.seed}/{name}'))


def _ask(lives, wanted, agent: Agent, clients, limits, how) -> None:
  """One `generate` call per role."""
  by_role = collections.defaultdict(list)
  for i, call in wanted.items():
    if call.role not in clients:
      raise ValueError(f'role {call.role!r} has no client, there are {sorted(clients)}')
    request = _request(lives[i], call, clients[call.role], limits, how)
    if request is not None:
      by_role[call.role].append((i, request))
  for role, asked in by_role.items():
    answers = clients[role].generate([r for _, r in asked])
    for (i, _), answer in zip(asked, answers, strict=True):
      _answered(lives[i], role, answer, agent)


def _answered(live: _Live, role: str, answer: Completion, agent: Agent) -> None:
  if answer.finish == 'error':
    live.recorders[role].forget()
    live.status, live.info['reason'] = Status.MODEL_ERROR, answer.error
    return
  live.recorders[role].answer(answer)
  live.turns, live.text = live.turns + 1, answer.text
  if answer.finish == 'length':
    live.status = Status.MAX_TOKENS
    return
  live.state = agent.observe(live.state, answer)


def _use_tools(lives, wanted: dict[int, UseTools], agent, tools, limits: Limits, seed: int) -> None:
  """The calls of an episode one after the other, the episodes side by side."""
  def answer(i: int) -> tools_lib.Answers:
    ctx = tools_lib.ToolContext(lives[i].task.uid, lives[i].turns, seed)
    return tools_lib.run_calls(wanted[i].calls, tools, ctx)

  with futures.ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
    for i, answers in zip(wanted, pool.map(answer, wanted)):
      _used(lives[i], wanted[i], answers, agent, limits)


def _used(live: _Live, wanted: UseTools, answers, agent: Agent, limits: Limits) -> None:
  failed = answers.num_errors + wanted.unread
  live.errors = live.errors + failed if failed else 0
  live.info['tool_calls'] = live.info.get('tool_calls', 0) + len(wanted.calls)
  live.info['tool_errors'] = live.info.get('tool_errors', 0) + failed
  if live.errors >= limits.max_consecutive_errors:
    live.status = Status.INVALID_OUTPUT
    return
  live.state = agent.observe(live.state, answers)


def _act(lives, wanted, agent: Agent, envs: VectorEnv) -> None:
  actions = [wanted[i].action if i in wanted else None for i in range(len(lives))]
  for live, outcome in zip(lives, envs.step(actions)):
    if outcome is None:
      continue
    if outcome.error:
      live.status, live.info['reason'] = Status.ENV_ERROR, outcome.error
      continue
    step = outcome.value
    if not _is_step(step):
      live.status, live.info['reason'] = Status.ENV_ERROR, f'step returned {step!r:.100}'
      continue
    live.reward, live.progress = live.reward + float(step.reward), step.progress
    live.state = agent.observe(live.state, step)
    if step.done:
      solved = live.reward > 0 if step.progress is None else step.progress >= 1
      live.status = Status.SUCCEEDED if solved else Status.FAILED


def _is_step(found: Any) -> bool:
  """Whether an environment kept to its protocol."""
  number = lambda x: isinstance(x, numbers.Real) and math.isfinite(x)
  return isinstance(found, api.StepResult) and number(found.reward) and (
    found.progress is None or number(found.progress))


def _begin(jobs, agent: Agent, envs: VectorEnv | None, seed: int) -> list[_Live]:
  lives = [_Live(task, repetition, None, {}) for task, repetition in jobs]
  seeds = [rng.name_hash(f'{seed}/{t.uid}/{r}') for t, r in jobs]
  found = [None] * len(jobs) if envs is None else envs.reset([t for t, _ in jobs], seeds)
  for live, outcome in zip(lives, found):
    if outcome is not None and outcome.error:
      live.status, live.info['reason'] = Status.ENV_ERROR, outcome.error
    else:
      live.state = agent.init(live.task, None if outcome is None else outcome.value)
  return lives


def _run(jobs, agent: Agent, clients, tools, envs, limits: Limits, how: Sampling) -> list[Episode]:
  begin = time.monotonic()
  lives = _begin(jobs, agent, envs, how.seed)
  while any(live.status is None for live in lives):
    wanted: dict[type, dict[int, Any]] = {Call: {}, UseTools: {}, Act: {}}
    for i, live in enumerate(lives):
      if live.status is not None:
        continue
      if time.monotonic() - begin > limits.wall_s:
        live.status = Status.TIMEOUT
        continue
      move = agent.next(live.state)
      if isinstance(move, Done):
        live.status = move.status
      else:
        wanted[type(move)][i] = move
    _ask(lives, wanted[Call], agent, clients, limits, how)
    if wanted[UseTools]:
      _use_tools(lives, wanted[UseTools], agent, tools, limits, how.seed)
    if wanted[Act]:
      if envs is None:
        raise ValueError('the agent acts, but no environment was given')
      _act(lives, wanted[Act], agent, envs)
  return [Episode(x.task.uid, x.repetition, x.status, tuple(
    r.trace() for r in x.recorders.values()), x.reward,
    None if x.progress is None else float(x.progress), x.turns, x.text, x.info)
    for x in lives]


def rollout(tasks: Sequence[api.Task], agent: Agent, clients: Mapping[str, LMClient], *,
            limits: Limits, sampling: Sampling | None = None, group_size: int = 1,
            tools: Mapping[str, tools_lib.Tool] | None = None,
            env: Callable[[], api.TextEnv] | None = None, step_s: float = 30.0,
            path: str = '', chunk: int = 0) -> list[Episode]:
  """`group_size` episodes of each task, task by task.

  `path` names a file of finished episodes, one JSON line each: those it holds are not run again,
  but for faults, and new ones are added, `chunk` (0 = all) at a time. `step_s` bounds a step of an
  environment. Tools of several episodes are called side by side.
  """
  for name, value, least in (('group_size', group_size, 1), ('chunk', chunk, 0)):
    if value < least:
      raise ValueError(f'{name} must be at least {least}, got {value}')
  jobs = [(t, r) for t in tasks for r in range(group_size)]
  if len({t.uid for t in tasks}) < len(tasks):
    raise ValueError('tasks: every uid must occur once')
  done = {}
  if path:
    done = {k: e for k, e in read(path).items() if e.status not in FAULTS}
    with open(path, 'a', encoding='utf-8'):  # before any work is lost
      pass
  left = [job for job in jobs if (job[0].uid, job[1]) not in done]
  for begin in range(0, len(left), chunk or len(left) or 1):
    part = left[begin:begin + (chunk or len(left))]
    envs = None if env is None else VectorEnv(env, len(part), step_s)
    try:
      found = _run(part, agent, clients, tools or {}, envs, limits, sampling or Sampling())
    finally:
      if envs is not None:
        envs.close()
    done |= {(e.task, e.repetition): e for e in found}
    if path:
      with open(path, 'a', encoding='utf-8') as file:
        file.writelines(traces.to_json(e) + '\n' for e in found)
  return [done[t.uid, r] for t, r in jobs]


def read(path: str) -> dict[tuple[str, int], Episode]:
  """Episodes of a file by (task, repetition); a last line that was cut is dropped from it."""
  if not os.path.exists(path):
    return {}
  with open(path, encoding='utf-8') as file:
    lines = file.readlines()
  whole = [line for line in lines if line.endswith('\n')]
  if len(whole) < len(lines):
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
      file.writelines(whole)
    os.replace(path + '.tmp', path)
  found = map(traces.from_json, whole)
  return {(e.task, e.repetition): e for e in found}
