"""Notations in which a model writes tool calls: `PARSERS` reads them from text and writes them.

Thoughts are skipped: from `<think>` to `</think>` or the end of the text, and, because a prompt may
open the thought itself, all that stands before a `</think>` which nothing opened. Whatever begins
first wins: a `<think>` inside a call is part of the call. Reading takes linear time.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

from zppo_jax.core.types import ToolCall, ToolSpec

_END_THINK = '</think>'
_VERB = r'[A-Za-z_][\w.-]*'
_MAX_DEPTH = 64  # of a call's JSON: deeper values can be read, but neither copied nor written


@dataclasses.dataclass(frozen=True)
class ParseResult:
  """`content` is the text without the calls that were read, stripped; `errors` say what was not."""

  calls: tuple[ToolCall, ...]
  content: str
  errors: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Block:
  """`text[start:end]`, delimiters included; `name` stands in the opening one, or is ''."""

  start: int
  end: int
  name: str
  body: str


@dataclasses.dataclass(frozen=True)
class Parser:
  """One notation. `read` gives (name, arguments) pairs of a block, or raises ValueError.

  A group `name` in `closing` must equal that in `opening`. `usage` tells a model how to call;
  `argument` is the name of the only argument where calls carry one plain text.
  """

  opening: re.Pattern
  closing: re.Pattern
  read: Callable[[str, str], list[tuple[str, dict[str, Any]]]]
  write: Callable[[Sequence[ToolCall]], str]
  usage: str
  argument: str | None = None
  one_block: bool = False

  def parse(self, text: str) -> ParseResult:
    """The calls of any text, with ids `call_0`, `call_1`, ...; never raises."""
    blocks, errors = _find_blocks(self, text)
    if self.one_block and len(blocks) > 1:
      errors.append(f'{len(blocks)} blocks with calls, only one is allowed')
      blocks = []
    pairs, rest, position = [], [], 0
    for block in blocks:
      try:
        pairs += self.read(block.name, block.body)
      except ValueError as error:
        errors.append(str(error))
        continue
      rest.append(text[position : block.start])
      position = block.end
    calls = tuple(ToolCall(f'call_{i}', *pair) for i, pair in enumerate(pairs))
    content = ''.join([*rest, text[position:]]).strip()
    return ParseResult(calls, content, tuple(dict.fromkeys(errors)))

  def render(self, calls: Sequence[ToolCall]) -> str:
    """Text that `parse` reads as `calls`, ids apart; ValueError names what cannot be written."""
    text = self.write(calls) if calls else ''
    wanted = [(c.name, c.arguments) for c in calls]
    found = [(c.name, c.arguments) for c in self.parse(text).calls]
    if found == wanted:
      return text
    if self.one_block and self.argument and len(wanted) > 1:
      raise ValueError(f'{len(wanted)} calls, this notation has room for one')
    first = next((i for i, pair in enumerate(wanted) if found[i : i + 1] != [pair]), 0)
    raise ValueError(f'this notation cannot express call {first}: {_shown(calls[first])}')


def _find_blocks(parser: Parser, text: str) -> tuple[list[_Block], list[str]]:
  """The closed blocks outside thoughts, in order and without overlap, and what is left open."""
  named = 'name' in parser.closing.groupindex
  ends: dict[str, list[tuple[int, int]]] = {}  # by name; a search per opening would be quadratic
  for match in parser.closing.finditer(text):
    ends.setdefault(match['name'] if named else '', []).append(match.span())
  blocks, errors, position = [], [], _end_of_open_thought(text)
  while match := parser.opening.search(text, position):
    position = match.end()
    if match['think']:
      end = text.find(_END_THINK, position)
      if end < 0:
        break
      position = end + len(_END_THINK)
      continue
    name = match.groupdict().get('name') or ''
    spans = ends.get(name if named else '', [])
    index = bisect.bisect_left(spans, (position, 0))
    if index == len(spans):
      errors.append(f'{match.group().strip()} is not closed')
      continue
    blocks.append(_Block(match.start(), spans[index][1], name, text[position : spans[index][0]]))
    position = spans[index][1]
  return blocks, errors


def _end_of_open_thought(text: str) -> int:
  head, found, _ = text.partition(_END_THINK)
  return len(head) + len(found) if found and '<think>' not in head else 0


def _refuse(constant: str) -> float:
  raise ValueError(f'{constant} is not a JSON number')


def _finite(number: str) -> float:
  value = float(number)
  return value if math.isfinite(value) else _refuse(number)


def read_json(text: str) -> Any:
  """The value of strict JSON, without NaN and Infinity; ValueError if it is none, or too deep."""
  try:
    level = [value := json.loads(text, parse_float=_finite, parse_constant=_refuse)]
    for _ in range(_MAX_DEPTH):
      inner = (v.values() if isinstance(v, dict) else v for v in level
               if isinstance(v, (dict, list)))
      level = [x for part in inner for x in part]
  except (ValueError, RecursionError) as error:
    raise ValueError(f'a call is not valid JSON: {error}') from error
  if level:
    raise ValueError(f'a call is nested more than {_MAX_DEPTH} deep')
  return value


def _dump(value: Any) -> str:
  try:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(f'not expressible in JSON: {error}: {reprlib.repr(value)}') from error
  # `<` occurs inside JSON strings only, where it may be spelt as an escape
  for tag in (_END_THINK, '</tool_call>'):
    text = text.replace(tag, '\\u003c' + tag[1:])
  return text


def _as_pair(value: Any) -> tuple[str, dict[str, Any]]:
  if not isinstance(value, dict):
    raise ValueError(f'a call must be a JSON object, got {reprlib.repr(value)}')
  if unknown := sorted(set(value) - {'name', 'arguments'}):
    raise ValueError(f'a call has the keys "name" and "arguments", not {reprlib.repr(unknown)}')
  name, arguments = value.get('name'), value.get('arguments', {})
  if not isinstance(name, str) or not name:
    raise ValueError(f'"name" must be the name of a tool, got {reprlib.repr(name)}')
  if not isinstance(arguments, dict):
    raise ValueError(f'"arguments" of {name!r} must be an object, got {reprlib.repr(arguments)}')
  return name, arguments


def _read_object(name: str, body: str) -> list[tuple[str, dict[str, Any]]]:
  del name
  return [_as_pair(read_json(body))]


def _read_objects(name: str, body: str) -> list[tuple[str, dict[str, Any]]]:
  del name
  value = read_json(body)
  if value == []:
    raise ValueError('a list of calls is empty')
  return [_as_pair(v) for v in value] if isinstance(value, list) else [_as_pair(value)]


def _write_hermes(calls: Sequence[ToolCall]) -> str:
  objects = [_dump({'name': c.name, 'arguments': c.arguments}) for c in calls]
  return '\n'.join(f'<tool_call>\n{o}\n</tool_call>' for o in objects)


def _write_json_block(calls: Sequence[ToolCall]) -> str:
  values = [{'name': c.name, 'arguments': c.arguments} for c in calls]
  return f'```json\n{_dump(values[0] if len(values) == 1 else values)}\n```'


def _write_text(pattern: str, key: str) -> Callable[[Sequence[ToolCall]], str]:
  """Writes calls whose only argument is the text `key` as `pattern`, one below the other."""

  def write(calls: Sequence[ToolCall]) -> str:
    for call in calls:
      if set(call.arguments) != {key} or not isinstance(call.arguments[key], str):
        raise ValueError(f'this notation has the one text argument {key!r}, not {_shown(call)}')
    return '\n'.join(pattern.format(name=c.name, text=c.arguments[key]) for c in calls)

  return write


def _shown(call: ToolCall) -> str:
  return f'{call.name!r} with arguments {reprlib.repr(call.arguments)}'


def _opening(pattern: str) -> re.Pattern:
  return re.compile(rf'(?P<think><think>)|{pattern}', re.MULTILINE)


_FENCE = re.compile(r'^```[ \t\r]*$', re.MULTILINE)

PARSERS: dict[str, Parser] = {
  'hermes': Parser(
    _opening('<tool_call>'),
    re.compile('</tool_call>'),
    _read_object,
    _write_hermes,
    'To call a tool, write a JSON object with its name and its arguments between <tool_call> and'
    ' </tool_call>. Several calls may follow each other:\n'
    '<tool_call>\n{"name": "the tool", "arguments": {"an argument": "its value"}}\n</tool_call>',
  ),
  'xml_tags': Parser(
    _opening(rf'<(?P<name>{_VERB})>'),
    re.compile(rf'</(?P<name>{_VERB})>'),
    lambda name, body: [(name, {'body': body})],
    _write_text('<{name}>{text}</{name}>', 'body'),
    'To call a tool, write its input between tags with its name. Calls do not nest:\n'
    '<the_tool>its input</the_tool>',
    argument='body',
  ),
  'json_block': Parser(
    _opening(r'^```json[ \t\r]*\n'),
    _FENCE,
    _read_objects,
    _write_json_block,
    'To call tools, write one fenced block with a JSON object, or with a list of such objects:\n'
    '```json\n{"name": "the tool", "arguments": {"an argument": "its value"}}\n```',
    one_block=True,
  ),
  'code_block': Parser(
    _opening(r'^```(?P<name>python|bash)[ \t\r]*\n'),
    _FENCE,
    lambda name, body: [(name, {'code': body.removesuffix('\n')})],
    _write_text('```{name}\n{text}\n```', 'code'),
    'To call a tool, write exactly one fenced block that opens with its name:\n'
    '```name\nthe code\n```',
    argument='code',
    one_block=True,
  ),
  'bracket': Parser(
    _opening(r'(?<!\w)(?P<name>[A-Za-z_]\w*)\[(?=[^\[\]\n]*\])'),
    re.compile(r'\]'),
    lambda name, body: [(name, {'arg': body})],
    _write_text('{name}[{text}]', 'arg'),
    'To call a tool, write its name and, in square brackets, its input on one line:\n'
    'the_tool[its input]',
    argument='arg',
  ),
}


def tools_text(specs: Sequence[ToolSpec], parser_name: str) -> str:
  """What tells a model which tools exist and how to call them; '' without tools.

  Errors: ValueError for an unknown parser, or a tool that cannot be called in its notation.
  """
  if parser_name not in PARSERS:
    raise ValueError(f'parser {parser_name!r} is not one of {sorted(PARSERS)}')
  parser = PARSERS[parser_name]
  for spec in specs:
    _check_callable(spec, parser, parser_name)
  if not specs:
    return ''
  if parser.argument:
    lines = '\n'.join(f'- {s.name}: {s.description}' for s in specs)
    return f'These tools can be called, each with one text as its input:\n{lines}\n\n{parser.usage}'
  functions = [{'type': 'function', 'function': dataclasses.asdict(s)} for s in specs]
  lines = '\n'.join(json.dumps(f, ensure_ascii=False) for f in functions)
  return (
    'These tools can be called. Each line is one tool as JSON, with the schema of its arguments.\n'
    f'<tools>\n{lines}\n</tools>\n\n{parser.usage}'
  )


def _check_callable(spec: ToolSpec, parser: Parser, parser_name: str) -> None:
  key = parser.argument
  if key:
    needs = spec.parameters.get('required', ())
    if len(needs) != 1:
      raise ValueError(f'tool {spec.name!r} must require one argument for the one text of '
                       f'{parser_name!r}, it requires {list(needs)}')
  try:
    parser.render([ToolCall('call_0', spec.name, {key: 'x'} if key else {})])
  except ValueError as error:
    raise ValueError(f'tool {spec.name!r} has no call in {parser_name!r}: {error}') from error
