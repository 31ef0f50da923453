"""The JSON of an OpenAI-compatible server, both ways: messages out, answers and embeddings in."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from zppo_jax.agents import parsing
from zppo_jax.agents.records import Completion, Usage
from zppo_jax.core import types

Answer = tuple[Any, Any]  # a choice and its usage as sent: a cache file holds no reading of them
# What reading JSON of any shape can raise
MISREAD = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def write_message(message: types.Message) -> dict[str, Any]:
  """One chat message; that of a tool which answers no call becomes the user's."""
  calls = [{'id': c.id, 'type': 'function',
            'function': {'name': c.name, 'arguments': json.dumps(c.arguments)}}
           for c in message.tool_calls]
  optional = {'tool_calls': calls, 'tool_call_id': message.tool_call_id, 'name': message.name}
  astray = message.role == 'tool' and not message.tool_call_id  # servers refuse it
  return {'role': 'user' if astray else message.role, 'content': message.content} | given(optional)


def given(fields: dict[str, Any]) -> dict[str, Any]:
  """The fields that are not empty."""
  return {name: value for name, value in fields.items() if value}


def _tool_calls(raw: Any) -> tuple[tuple[types.ToolCall, ...], str]:
  """The calls that can be read, and what is wrong with the others."""
  calls, wrong = [], []
  for i, call in enumerate(raw or ()):
    name, text = call['function']['name'], call['function'].get('arguments') or '{}'
    try:
      arguments = parsing.read_json(text if isinstance(text, str) else json.dumps(text))
      if not isinstance(arguments, dict):
        raise ValueError('not an object')
      calls.append(types.ToolCall(str(call.get('id') or f'call_{i}'), str(name), arguments))
    except (ValueError, RecursionError) as error:
      wrong.append(f'tool_calls[{i}] ({name}): arguments: {error}')
  return tuple(calls), '; '.join(wrong)


def read_completion(answer: Answer) -> Completion:
  """Reads one choice; raises one of MISREAD if it has another shape."""
  choice, used = answer
  message, reason = choice['message'], choice.get('finish_reason')
  text = message.get('content') or ''
  if not isinstance(text, str):
    raise TypeError(f'message.content is a {type(text).__name__}')
  calls, error = _tool_calls(message.get('tool_calls'))
  # Not by `reason` alone: a forced call ends with 'stop'
  finish = 'length' if reason == 'length' else 'tool' if calls or error else 'stop'
  if reason not in ('stop', 'tool_calls', 'length'):  # such as a filter: not the model's own text
    finish, error = 'error', f'finish_reason {reason!r}'
  tokens = (choice.get('logprobs') or {}).get('content')
  logprobs = None if tokens is None else tuple(float(t['logprob']) for t in tokens)
  counts = [(used or {}).get(k) for k in ('prompt_tokens', 'completion_tokens')]
  usage = Usage(*counts) if all(isinstance(c, int) for c in counts) else None
  return Completion(text, finish, logprobs=logprobs, usage=usage, tool_calls=calls, error=error)


def read_answers(payload: Any) -> list[Answer]:
  """All choices of a reply, each of which can be read; the first has the usage of all."""
  answers = [(c, None if i else payload.get('usage')) for i, c in enumerate(payload['choices'])]
  if not [read_completion(a) for a in answers]:
    raise ValueError('choices is empty')
  return answers


def read_rows(payload: Any, count: int) -> np.ndarray:
  """Embeddings f32[count, d] of unit norm, in the order of their index."""
  data = sorted(payload['data'], key=lambda row: row['index'])
  rows = np.asarray([row['embedding'] for row in data], np.float32).reshape(count, -1)
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  if len(data) != count or not (np.isfinite(norms) & (norms > 0)).all():
    raise ValueError('rows are missing, zero or not finite')
  return rows / norms
