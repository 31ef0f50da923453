"""Tools that a model may call, and `run_calls`, which answers its calls and never raises for one.

A call that goes wrong becomes a tool message that says so: the model reads it and may go on.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from zppo_jax.agents import sandbox
from zppo_jax.core.errors import brief
from zppo_jax.core.types import Message, ToolCall, ToolSpec


@dataclasses.dataclass(frozen=True)
class ToolContext:
  """Where a call is made. Whatever a tool draws at random comes from `seed`."""

  task: str  # uid
  turn: int = 0
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class ToolResult:
  """`ok` false means that the tool ran and reports a failure, e.g. a program that ended in one."""

  content: str
  ok: bool = True
  cost: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tool:
  """`call` gets arguments that fit `spec.parameters`; it may raise, and should end by itself."""

  spec: ToolSpec
  call: Callable[[dict[str, Any], ToolContext], ToolResult]


@dataclasses.dataclass(frozen=True)
class ToolLimits:
  """`call_s` per call; a message has up to `max_tool_bytes` of UTF-8, marker of a cut included."""

  call_s: float = 30.0
  max_tool_bytes: int = 16384

  def __post_init__(self):
    if not 0 < self.call_s <= threading.TIMEOUT_MAX:
      raise ValueError(f'call_s must be positive and at most {threading.TIMEOUT_MAX:.0f}, '
                       f'got {self.call_s}')
    if self.max_tool_bytes < 64:
      raise ValueError(f'max_tool_bytes must be at least 64, got {self.max_tool_bytes}')


@dataclasses.dataclass(frozen=True)
class Answers:
  """One message per call, in order. Errors are calls that no tool answered: an unknown tool,
  arguments against the schema, an exception, a time-out; `num_failed` counts results not ok."""

  messages: tuple[Message, ...]
  num_errors: int
  num_failed: int
  cost: dict[str, float]


def toolbox(*tools: Tool) -> dict[str, Tool]:
  """The tools by name; ValueError if two have one name."""
  names = [tool.spec.name for tool in tools]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise ValueError(f'tools {twice} occur more than once')
  return dict(zip(names, tools, strict=True))


def run_calls(
  calls: Sequence[ToolCall],
  tools: Mapping[str, Tool],
  ctx: ToolContext,
  *,
  limits: ToolLimits = ToolLimits(),  # noqa: B008
) -> Answers:
  """Answers the calls one after the other; nothing that a model or a tool does raises.

  A tool that misses the deadline is left behind in its thread, which ends with the process at the
  latest: what it still does is not undone.
  """
  messages, cost = [], {}
  num_errors = num_failed = 0
  for call in calls:
    outcome = _answer(call, tools, ctx, limits.call_s)
    if isinstance(outcome, str):
      num_errors += 1
      content = f'error: {outcome}'
    else:
      num_failed += not outcome.ok
      content = outcome.content
      for name, value in outcome.cost.items():
        cost[name] = cost.get(name, 0.0) + value
    content = sandbox.cut(content.encode('utf-8', 'replace'), limits.max_tool_bytes)
    messages.append(Message('tool', content, tool_call_id=call.id, name=call.name))
  return Answers(tuple(messages), num_errors, num_failed, cost)


def _answer(
  call: ToolCall, tools: Mapping[str, Tool], ctx: ToolContext, call_s: float
) -> ToolResult | str:
  """The tool's result, or what went wrong."""
  tool = tools.get(call.name)
  if tool is None:
    return f'there is no tool {call.name!r}; the tools are {", ".join(sorted(tools)) or "none"}'
  if errors := validate(call.arguments, tool.spec.parameters):
    return f'wrong arguments for {call.name!r}: {"; ".join(errors)}'
  ended, value = _guarded(lambda: tool.call(copy.deepcopy(call.arguments), ctx), call_s)
  if ended == 'late':
    return f'{call.name!r} gave no answer within {call_s:g} s'
  if ended == 'raised':
    return f'{call.name!r} failed: {brief(value)}'
  if not isinstance(value, ToolResult):
    return f'{call.name!r} returned {type(value).__name__}, not a ToolResult'
  if not isinstance(value.content, str) or not _is_cost(value.cost):
    return f'{call.name!r} returned a ToolResult without a text or with a cost that is no number'
  return value


def _is_cost(cost: Any) -> bool:
  return isinstance(cost, dict) and all(isinstance(v, (int, float)) for v in cost.values())


def _guarded(
  work: Callable[[], Any], call_s: float
) -> tuple[Literal['returned', 'raised', 'late'], Any]:
  """How `work` ended in a thread of its own, with its value or exception."""
  results: queue.SimpleQueue = queue.SimpleQueue()

  def run() -> None:
    try:
      results.put(('returned', work()))
    except BaseException as error:  # SystemExit too would end the thread without an answer
      results.put(('raised', error))

  # A thread per call, no executor: its workers are joined at exit, and a hanging one never ends.
  threading.Thread(target=run, daemon=True).start()
  try:
    return results.get(timeout=call_s)
  except queue.Empty:
    return 'late', None


def validate(arguments: Any, schema: Mapping[str, Any]) -> list[str]:
  """What in `arguments` is against the JSON schema; empty if nothing is.

  With `jsonschema` installed the whole schema counts, else type, properties, required, enum, items
  and additionalProperties.
  """
  if _jsonschema() is None:
    return list(_violations(arguments, schema, 'arguments'))
  validators = _jsonschema().validators
  kind = validators.validator_for(schema, default=validators.Draft202012Validator)
  errors = sorted(kind(schema).iter_errors(arguments), key=lambda e: (e.json_path, e.message))
  return [f'arguments{e.json_path[1:]}: {e.message}' for e in errors]


@functools.cache
def _jsonschema():
  try:
    import jsonschema
  except ImportError:
    return None
  return jsonschema


_TYPES = {
  'object': lambda v: isinstance(v, dict),
  'array': lambda v: isinstance(v, (list, tuple)),
  'string': lambda v: isinstance(v, str),
  'boolean': lambda v: isinstance(v, bool),
  'null': lambda v: v is None,
  'number': lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
  'integer': lambda v: (
    not isinstance(v, bool) and (isinstance(v, int) or (isinstance(v, float) and v.is_integer()))
  ),
}


def _violations(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
  kinds = schema.get('type', [])
  kinds = [kinds] if isinstance(kinds, str) else kinds
  if kinds and not any(_TYPES[kind](value) for kind in kinds):
    yield f'{path}: must be of type {" or ".join(kinds)}'
    return
  if 'enum' in schema and not any(_equal(value, choice) for choice in schema['enum']):
    yield f'{path}: must be one of {schema["enum"]}'
  if isinstance(value, dict):
    yield from _object_violations(value, schema, path)
  if isinstance(value, (list, tuple)) and 'items' in schema:
    for i, item in enumerate(value):
      yield from _violations(item, schema['items'], f'{path}[{i}]')


def _object_violations(value: dict, schema: Mapping[str, Any], path: str) -> Iterator[str]:
  known, extra = schema.get('properties', {}), schema.get('additionalProperties', True)
  for name in schema.get('required', ()):
    if name not in value:
      yield f'{path}: {name!r} is missing'
  for name, item in value.items():
    if name in known:
      yield from _violations(item, known[name], f'{path}.{name}')
    elif extra is False:
      yield f'{path}: {name!r} is not known'
    elif isinstance(extra, Mapping):
      yield from _violations(item, extra, f'{path}.{name}')


def _equal(a: Any, b: Any) -> bool:
  """JSON equality: 1 is 1.0, but not true."""
  return a == b and isinstance(a, bool) == isinstance(b, bool)
