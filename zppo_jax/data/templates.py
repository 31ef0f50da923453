"""Chat templates: messages to token ids; only template text may produce special ids.

A template formats messages to one string in which special tokens that came with the content are
broken by a marker character; the string is then tokenised between the unbroken ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from zppo_jax.core.types import Example, Message
from zppo_jax.data import tokenizer as tokenizer_lib

# A private-use character; content that holds it makes `_marker` take the next one.
_FIRST_MARKER, _LAST_MARKER = 0xE000, 0xF8FF
# What the model itself writes between special tokens: kept whole in assistant turns only.
_ASSISTANT_TAGS = frozenset({'<think>', '</think>', '<tool_call>', '</tool_call>'})


@dataclasses.dataclass(frozen=True)
class Template:
  """`format(messages, add_generation_prompt, bos, eos) -> str`; `stop` ends an assistant turn.

  `stop` None means the tokenizer's eos; `requires` are the special tokens the format writes.
  """

  name: str
  format: Callable[[Sequence[Message], bool, str, str], str]
  requires: tuple[str, ...] = ()
  stop: str | None = None


def _format_plain(messages, add_generation_prompt, bos, eos):
  """Content and one end token per turn: `question<|sep|>answer<|eos|>`."""
  del add_generation_prompt, bos  # the separator that ends a question opens the answer
  ends = {'assistant': eos}
  return ''.join(m.content + ends.get(m.role, tokenizer_lib.SEP) for m in messages)


def _format_chatml(messages, add_generation_prompt, bos, eos):
  """Qwen style turns: `<|im_start|>role`, newline, content, `<|im_end|>`, newline."""
  del bos, eos
  turns = [f'<|im_start|>{m.role}\n{m.content}<|im_end|>\n' for m in messages]
  return ''.join(turns) + ('<|im_start|>assistant\n' if add_generation_prompt else '')


def get_template(template: str | Template) -> Template:
  """'plain', 'chatml', or a Template as it is (see `jinja.load_template`)."""
  if isinstance(template, Template):
    return template
  builtin = {
    'plain': Template('plain', _format_plain, requires=(tokenizer_lib.SEP,)),
    'chatml': Template(
      'chatml', _format_chatml, requires=('<|im_start|>', '<|im_end|>'), stop='<|im_end|>'
    ),
  }
  if template not in builtin:
    raise ValueError(f'template {template!r} is not one of {sorted(builtin)} nor a Template')
  return builtin[template]


def _marker(messages: Sequence[Message]) -> str:
  text = ''.join(m.content for m in messages)
  free = (chr(c) for c in range(_FIRST_MARKER, _LAST_MARKER + 1) if chr(c) not in text)
  marker = next(free, None)
  if marker is None:
    raise ValueError('messages use every private-use character, none is left as a marker')
  return marker


def _escape(message: Message, pattern, marker: str) -> Message:
  """The message with a marker inside every special token of its content."""
  kept = _ASSISTANT_TAGS if message.role == 'assistant' else frozenset()
  parts, position, start = [], 0, 0
  while pattern and (match := pattern.search(message.content, position)):
    position = match.end() if match.group() in kept else match.start() + 1
    if match.group() not in kept:
      parts.append(message.content[start:position])
      start = position
  return Message(message.role, marker.join([*parts, message.content[start:]]))


def _check(tokenizer, messages: Sequence[Message], template: Template) -> None:
  if missing := [token for token in template.requires if token not in tokenizer.special]:
    raise ValueError(
      f'template {template.name!r} needs the special tokens {missing}; '
      f'the tokenizer has {sorted(tokenizer.special)}'
    )
  if not messages:
    raise ValueError(f'template {template.name!r}: no messages to render')
  roles = ('system', 'user', 'assistant', 'tool')
  if bad := [m.role for m in messages if m.role not in roles]:
    raise ValueError(f'roles {bad} are not among {roles}')


def render(
  tokenizer,
  messages: Sequence[Message],
  template: str | Template,
  add_generation_prompt: bool = True,
) -> list[int]:
  """Token ids of a chat, without padding. Content never yields special ids, whatever it says.

  Errors: ValueError for an empty chat, an unknown role or template, or a missing special token.
  """
  template = get_template(template)
  _check(tokenizer, messages, template)
  pattern = tokenizer_lib.compile_special(tokenizer.special)
  marker = _marker(messages)
  names = {i: token for token, i in tokenizer.special.items()}
  escaped = [_escape(m, pattern, marker) for m in messages]
  text = template.format(
    escaped, add_generation_prompt, names.get(tokenizer.bos_id, ''), names[tokenizer.eos_id]
  )
  ids: list[int] = []
  for part, known in tokenizer_lib.split_special(text, pattern):
    pieces = [part] if known else part.split(marker)
    ids.extend(i for piece in pieces for i in tokenizer.encode(piece, special=known))
  return ids


def render_turn(tokenizer, messages: Sequence[Message], template: str | Template) -> list[int]:
  """Token ids that follow the stop id of an answer: `messages`, and the opening of the next one.

  What was said before does not matter, so nothing of it is tokenised again. Errors as in `render`.
  """
  before = Message('user', '.'), Message('assistant', '.')
  ids = render(tokenizer, (*before, *messages), template)
  opening = render(tokenizer, before, template, add_generation_prompt=False)
  end = max(i for i, t in enumerate(opening) if t == stop_id(tokenizer, template)) + 1
  if ids[:end] != opening[:end]:
    name = get_template(template).name
    raise ValueError(f'template {name!r} rewrites earlier turns when {messages[0].role!r} follows')
  return ids[end:]


def stop_id(tokenizer, template: str | Template) -> int:
  """The id that ends an assistant turn: what a sampler stops at."""
  stop = get_template(template).stop
  return tokenizer.eos_id if stop is None else tokenizer.special[stop]


def render_training(
  tokenizer, messages: Sequence[Message], template: str | Template
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens int32[L], loss_mask bool[L]): true on what the assistant writes, its stop id included.

  Every prefix of the chat must be a prefix in tokens; ValueError names the turn where a template
  rewrites history instead, or a chat without an assistant turn.
  """
  tokens = render(tokenizer, messages, template, add_generation_prompt=False)
  mask = np.zeros(len(tokens), bool)
  end_id = stop_id(tokenizer, template)
  turns = [i for i, m in enumerate(messages) if m.role == 'assistant']
  if not turns or turns[0] == 0:
    raise ValueError('a training chat needs an assistant turn after a first question')
  for i in turns:
    before = render(tokenizer, messages[:i], template, add_generation_prompt=True)
    after = tokens  # of the whole chat, cut below unless this turn is the last
    if i + 1 < len(messages):
      after = render(tokenizer, messages[: i + 1], template, add_generation_prompt=False)
    if tokens[: len(after)] != after or after[: len(before)] != before:
      raise ValueError(f'turn {i}: the template rewrites earlier turns, prefixes differ in tokens')
    stops = [t for t in range(len(before), len(after)) if after[t] == end_id]
    mask[len(before) : stops[-1] + 1 if stops else len(after)] = True
  return np.asarray(tokens, np.int32), mask


def render_example(tokenizer, example: Example, template: str | Template):
  r"""`render_training` on the question and its solution, or `\boxed{answer}` when it has none."""
  reply = example.solution or f'\\boxed{{{example.answer}}}'
  return render_training(tokenizer, (*example.messages, Message('assistant', reply)), template)
