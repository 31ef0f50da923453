r"""Public row formats: GSM8K, MATH, DAPO and plain question/answer, one parser each.

A parser maps one row (a dict) to `Parsed` and raises RowError with the reason it cannot.
"""

from __future__ import annotations

import dataclasses
import decimal
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from zppo_jax.core import text
from zppo_jax.core.types import Message

_CALCULATOR = re.compile(r'<<[^<>]*>>')
_LEVEL = re.compile(r'(?:Level\s*)?(\d+)$')
_QUESTION_KEYS = ('question', 'problem', 'prompt')
# The head and tail that DAPO-Math-17k wraps around every problem.
_DAPO_HEAD = re.compile(r'^Solve the following math problem step by step\..*?\n\n', re.DOTALL)
_DAPO_TAIL = re.compile(r'\n\nRemember to put your answer on its own line after "Answer:"\.?\s*$')


class RowError(ValueError):
  """Why one row cannot become an example."""


class Parsed(NamedTuple):
  """One row, understood."""

  messages: tuple[Message, ...]
  answer: str
  solution: str | None
  verifier: str
  meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Schema:
  """A row format: how to recognise and parse it, and a row to show in error messages."""

  matches: Callable[[dict[str, Any]], bool]
  parse: Callable[[dict[str, Any], bool], Parsed]
  layout: str
  deduplicate: bool = False


def _string(row: dict[str, Any], key: str) -> str:
  """A non-empty string field, numbers allowed; RowError otherwise."""
  if key not in row:
    raise RowError(f'field {key!r} is missing, the row has {sorted(map(str, row))}')
  value = row[key]
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    raise RowError(f'field {key!r} is a {type(value).__name__}, expected text or a number')
  if value != value:
    raise RowError(f'field {key!r} is NaN')
  value = str(value).strip()
  if not value:
    raise RowError(f'field {key!r} is empty')
  return value


def _messages(row: dict[str, Any], key: str) -> tuple[Message, ...]:
  """A prompt: text, or a list of {role, content} that ends with the user."""
  if not isinstance(row.get(key), list | tuple):
    return (Message('user', _string(row, key)),)
  turns = row[key]
  if not turns or not all(isinstance(t, dict) and {'role', 'content'} <= set(t) for t in turns):
    raise RowError(f'field {key!r} must be a non-empty list of {{role, content}}')
  messages = tuple(Message(_string(t, 'role'), _string(t, 'content')) for t in turns)
  if bad := sorted({m.role for m in messages} - {'system', 'user', 'assistant', 'tool'}):
    raise RowError(f'field {key!r} has the unknown roles {bad}')
  if messages[-1].role != 'user':
    raise RowError(f'field {key!r} must end with the user, not with {messages[-1].role!r}')
  return messages


def _number(value: str) -> str:
  """The number without `,` and `$`; RowError if there is none."""
  cleaned = value.replace(',', '').replace('$', '').strip().rstrip('.')
  try:
    finite = decimal.Decimal(cleaned).is_finite()
  except decimal.InvalidOperation:
    finite = False
  if not finite:
    raise RowError(f'answer {value.strip()[:40]!r} is not a number')
  return cleaned


def parse_gsm8k(row: dict[str, Any], keep_instruction: bool = True) -> Parsed:
  """`question`, `answer` with the gold number after the last `####`."""
  del keep_instruction
  question, full = _string(row, 'question'), _string(row, 'answer')
  trace, mark, gold = full.rpartition('####')
  if not mark:
    raise RowError("field 'answer' has no '####' before the final number")
  answer = _number(gold)
  steps = _CALCULATOR.sub('', trace).strip()
  solution = '\n'.join(filter(None, [steps, f'\\boxed{{{answer}}}']))
  return Parsed((Message('user', question),), answer, solution, 'numeric_exact', {})


def _level(value: Any) -> int | None:
  found = _LEVEL.match(str(value).strip())
  return int(found.group(1)) if found else None


def parse_math(row: dict[str, Any], keep_instruction: bool = True) -> Parsed:
  r"""`problem`, `solution` with the gold in its last `\boxed{}`; MATH-500 also gives `answer`."""
  del keep_instruction
  problem, solution = _string(row, 'problem'), _string(row, 'solution')
  answer = _string(row, 'answer') if 'answer' in row else text.last_boxed(solution)
  if answer is None:
    raise RowError(r"field 'solution' has no complete \boxed{} or \fbox{}")
  if not answer:
    raise RowError(r"the last \boxed{} of field 'solution' is empty")
  meta = {'level': _level(row.get('level')), 'subject': row.get('subject', row.get('type'))}
  return Parsed((Message('user', problem),), answer, solution, 'math', meta)


def _strip_instruction(message: Message) -> Message:
  return Message(message.role, _DAPO_TAIL.sub('', _DAPO_HEAD.sub('', message.content)).strip())


def parse_dapo(row: dict[str, Any], keep_instruction: bool = True) -> Parsed:
  """`prompt` (messages), `reward_model.ground_truth`; the same problem comes many times."""
  messages = _messages(row, 'prompt')
  reward_model = row.get('reward_model')
  if not isinstance(reward_model, dict):
    raise RowError("field 'reward_model' must be an object with 'ground_truth'")
  answer = _string(reward_model, 'ground_truth')
  if not keep_instruction:
    messages = tuple(_strip_instruction(m) if m.role == 'user' else m for m in messages)
    if not all(m.content for m in messages):
      raise RowError("field 'prompt' holds nothing but instructions")
  meta = {key: row[key] for key in ('data_source', 'ability') if key in row}
  return Parsed(messages, answer, None, 'math', meta)


def parse_plain(row: dict[str, Any], keep_instruction: bool = True) -> Parsed:
  """One of `question`, `problem`, `prompt`, and `answer`; `solution` if it is there."""
  del keep_instruction
  keys = [key for key in _QUESTION_KEYS if key in row]
  if len(keys) != 1:
    raise RowError(f'expected exactly one of the fields {_QUESTION_KEYS}, found {keys}')
  solution = _string(row, 'solution') if row.get('solution') is not None else None
  return Parsed(_messages(row, keys[0]), _string(row, 'answer'), solution, 'math', {})


def _has(row: dict[str, Any], *keys: str) -> bool:
  return all(key in row for key in keys)


# In order of detection: the first schema that matches a row is taken.
SCHEMAS = {
  'dapo': Schema(
    lambda row: _has(row, 'prompt', 'reward_model'),
    parse_dapo,
    '{"prompt": [{"role": "user", "content": ".."}], "reward_model": {"ground_truth": "34"}}',
    deduplicate=True,
  ),
  'math': Schema(
    lambda row: _has(row, 'problem', 'solution'),
    parse_math,
    r'{"problem": "..", "level": "Level 3", "type": "Algebra", "solution": ".. \\boxed{7}"}',
  ),
  'gsm8k': Schema(
    lambda row: _has(row, 'question', 'answer') and '####' in str(row['answer']),
    parse_gsm8k,
    '{"question": "..", "answer": ".. #### 72"}',
  ),
  'plain': Schema(
    lambda row: _has(row, 'answer') and any(key in row for key in _QUESTION_KEYS),
    parse_plain,
    '{"question" or "problem" or "prompt": "..", "answer": "72"}',
  ),
}


def layouts() -> str:
  """One line per schema, for error messages."""
  return '\n'.join(f'  {name}: {schema.layout}' for name, schema in SCHEMAS.items())


def detect(rows: list[dict[str, Any]]) -> str | None:
  """The schema that most of the rows match, the earlier in SCHEMAS on a tie; None if none."""
  votes = {name: 0 for name in SCHEMAS}
  for row in rows:
    name = next((n for n, schema in SCHEMAS.items() if schema.matches(row)), None)
    if name:
      votes[name] += 1
  best = max(votes, key=votes.get)
  return best if votes[best] else None
