"""Two plain agents: one answers a question with tools, one acts in an environment.

Source of the pattern: ReAct, arXiv 2210.03629. Their histories only grow, so an episode is one
unbroken conversation and one training row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from zppo_jax.agents import loop, parsing
from zppo_jax.agents.records import Completion, Status
from zppo_jax.agents.tools import Answers
from zppo_jax.core import types
from zppo_jax.envs import api


def fit(calls: Sequence[types.ToolCall], specs: Sequence[types.ToolSpec], parser: str
        ) -> tuple[types.ToolCall, ...]:
  """Calls as their tools want them: the one text of a notation without names is the one argument
  that a tool requires."""
  key, wanted = parsing.PARSERS[parser].argument, {}
  for spec in specs:
    required = spec.parameters.get('required', ())
    wanted[spec.name] = required[0] if key and len(required) == 1 else key
  return tuple(dataclasses.replace(c, arguments={wanted[c.name]: c.arguments[key]})
               if key and c.name in wanted else c for c in calls)


def write(message: types.Message, parser: str) -> str:
  """The text of an answer, calls included. ValueError on a call that the notation cannot write."""
  notation = parsing.PARSERS[parser]
  calls = message.tool_calls
  if notation.argument:
    if any(len(c.arguments) != 1 for c in calls):
      raise ValueError(f'notation {parser!r} has room for one argument, got {calls}')
    calls = [dataclasses.replace(c, arguments={notation.argument: str(*c.arguments.values())})
             for c in calls]
  return '\n'.join(filter(None, [message.content, notation.render(calls)]))


@dataclasses.dataclass(frozen=True)
class State:
  """The chat so far, and what comes next."""

  messages: tuple[types.Message, ...]
  move: Any


def _ask(messages: tuple[types.Message, ...]) -> State:
  return State(messages, loop.Call(messages))


def tool_agent(specs: Sequence[types.ToolSpec], parser: str, *, system: str = '{tools}'
               ) -> loop.Agent:
  """Answers task.args['messages'] and is through with the first answer that calls no tool.

  A call that cannot be read is answered by what is wrong with it. `system` opens the chat, with the
  description of the tools at '{tools}'; '' leaves it out. Errors: ValueError of
  `parsing.tools_text`.
  """
  text = system.replace('{tools}', parsing.tools_text(specs, parser))
  before = (types.Message('system', text),) if text else ()

  def init(task: api.Task, observation):
    del observation
    return _ask((*before, *task.args['messages']))

  def observe(state: State, event):
    if isinstance(event, Answers):
      return _ask((*state.messages, *event.messages, *_complaints(state)))
    assert isinstance(event, Completion)
    found = parsing.PARSERS[parser].parse(event.text)
    calls = event.tool_calls or fit(found.calls, specs, parser)
    messages = (*state.messages, types.Message('assistant', event.text, calls))
    errors = tuple(filter(None, (*found.errors, event.error)))
    if not calls and not errors:
      return State(messages, loop.Done(Status.FINISHED))
    return Unread(messages, loop.UseTools(calls, len(errors)), errors)

  return loop.Agent(init, lambda state: state.move, observe)


@dataclasses.dataclass(frozen=True)
class Unread(State):
  """An answer some of whose calls could not be read."""

  errors: tuple[str, ...] = ()


def _complaints(state: State) -> tuple[types.Message, ...]:
  return tuple(types.Message('tool', f'error: {e}') for e in state.errors)


def env_agent(*, system: str = '', parser: str | None = None) -> loop.Agent:
  """Says an action to every observation: the last line of an answer, or its first call.

  task.args['messages'], if there, ask in the place of the first observation.
  With a `parser` an answer without a call that can be read goes to the environment as it is, which
  says what it makes of it.
  """
  before = (types.Message('system', system),) if system else ()

  def init(task: api.Task, observation: api.Observation):
    first = task.args.get('messages') or (types.Message('user', observation.text),)
    return _ask((*before, *first))

  def observe(state: State, event):
    if isinstance(event, api.StepResult):
      return _ask((*state.messages, types.Message('user', event.observation.text)))
    messages = (*state.messages, types.Message('assistant', event.text))
    calls = parsing.PARSERS[parser].parse(event.text).calls if parser else ()
    lines = event.text.strip().splitlines()
    return State(messages, loop.Act(calls[:1] or (lines[-1].strip() if lines else '')))

  return loop.Agent(init, lambda state: state.move, observe)
