"""Stop strings: found in the text, whatever the borders of its tokens. Host code."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def stop_strings(strings: Sequence[str], decode: Callable[[Sequence[int]], str]
                 ) -> Callable[[Sequence[int], int], int | None]:
  """stop(tokens, begin) -> number of tokens up to the one that completes a stop string, or None.

  `begin` tokens are known to hold none. Only the text from a little before them on is decoded: so
  many tokens back that they are as many bytes as the longest string has. Raises ValueError on no
  strings, or an empty one.
  """
  if not strings or not all(strings):
    raise ValueError(f'stop strings must be given and not empty, got {list(strings)}')
  reach = max(len(s.encode()) for s in strings)

  def found(tokens: Sequence[int]) -> bool:
    text = decode(tokens)
    return any(s in text for s in strings)

  def stop(tokens: Sequence[int], begin: int) -> int | None:
    first = max(0, begin - reach)
    ids = lambda start, end=None: [int(t) for t in tokens[start:end]]
    while first and len(decode(ids(first, begin)).encode()) < reach:  # special tokens have no text
      first = max(0, first - reach)
    tail = ids(first)
    if not found(tail):
      return None
    low, high = max(0, begin - first), len(tail)  # found within `high`, not within `low`
    while high - low > 1:
      middle = (low + high) // 2
      low, high = (low, middle) if found(tail[:middle]) else (middle, high)
    return first + high

  return stop


def cut(text: str, strings: Sequence[str]) -> str:
  """The text before the first stop string in it."""
  at = [text.find(s) for s in strings if s in text]
  return text[:min(at)] if at else text
