r"""Plain text helpers that data and rewards share: the last boxed answer, by balanced braces."""

from __future__ import annotations

import re

_BOX = r'\\(?:boxed|fbox)(?![A-Za-z])\s*'
_TOKEN = re.compile(rf'(?P<box>{_BOX}\{{?)|\\.|[{{}}]', re.DOTALL)
_BARE = re.compile(rf'(?!{_BOX})(?:\{{[^{{}}]*\}}|[^\s$,.;{{}}]|[.,](?=\d))+')


def _boxes(text: str) -> list[tuple[int, int, int, int]]:
  """(start, content start, content end, end) of every complete box; one pass, any nesting."""
  spans, open_braces, position = [], [], 0
  while match := _TOKEN.search(text, position):
    position, token = match.end(), match.group()
    if match['box'] and token.endswith('{'):
      open_braces.append((match.start(), position))
    elif match['box']:
      if bare := _BARE.match(text, position):
        spans.append((match.start(), position, bare.end(), bare.end()))
        position = bare.end()
    elif token == '{':
      open_braces.append(None)
    elif token == '}' and open_braces and (opened := open_braces.pop()):
      spans.append((*opened, position - 1, position))
  return sorted(spans)


def last_boxed(text: str) -> str | None:
  r"""Content of the last `\boxed{..}` or `\fbox{..}` (or `\boxed 7`), stripped; None if none.

  Braces are balanced (`\boxed{\frac{1}{2}}` gives `\frac{1}{2}`), a box that never closes does not
  count, and of nested boxes the innermost wins. Total and linear in the length of any text.
  """
  spans = _boxes(text)
  if not spans:
    return None
  _, start, end, _ = spans[-1]
  return text[start:end].strip()


def strip_boxed(text: str) -> str:
  r"""The text with every complete box replaced by its content: `so \boxed{7}.` -> `so 7.`."""
  cuts = sorted(cut for a, b, c, d in _boxes(text) for cut in ((a, b), (c, d)))
  parts, position = [], 0
  for start, end in cuts:
    parts.append(text[position:start])
    position = end
  return ''.join([*parts, text[position:]])
