"""From a response to one answer, and from an answer to its canonical spelling.

One candidate only, in exactly the form that the prompt asked for: format and accuracy are separate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from zppo_jax.core import text as text_lib
from zppo_jax.core.errors import RewardError

MAX_CHARS = 256  # longer answers are refused before any parsing
BOXED = ('boxed',)

_NUMBER = r'[-+]?(?:\d+(?:\.\d*)?|\.\d+)'
_GROUPED = re.compile(r'[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?')
_PLAIN = re.compile(_NUMBER)
_RATIO = re.compile(rf'({_NUMBER})/({_NUMBER})')
_FRAC = re.compile(rf'([-+]?)\\frac\{{({_NUMBER})\}}\{{({_NUMBER})\}}')
_WORDS = re.compile(r'[a-zA-Z]+(?: [a-zA-Z]+)*')
_LAST_NUMBER = re.compile(r'[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?')


def after_thinking(response: str) -> str:
  """The text after the last `</think>`; the whole text where there is none."""
  return response.rpartition('</think>')[2]


def _last_match(pattern: str, text: str) -> str | None:
  found = re.findall(pattern, text, flags=re.IGNORECASE | re.MULTILINE)
  return found[-1].strip() if found else None


def _answer_tag(text: str) -> str | None:
  end = text.rfind('</answer>')
  start = text.rfind('<answer>', 0, max(end, 0))
  return text[start + len('<answer>') : end].strip() if 0 <= start < end else None


def _last_number(text: str) -> str | None:
  found = _LAST_NUMBER.findall(text)
  return found[-1].rstrip(',') if found else None


FORMS: dict[str, Callable[[str], str | None]] = {
  'boxed': text_lib.last_boxed,
  'answer_tag': _answer_tag,
  'answer_line': lambda text: _last_match(r'^[ \t*]*(?:final )?answer[ \t*]*:[ \t*]*(\S.*)$', text),
  'hashes': lambda text: _last_match(r'####[ \t]*(\S.*)$', text),
  'last_number': _last_number,
  'whole': str.strip,
}


def extract(response: str, order: Sequence[str] = BOXED) -> str | None:
  """The answer in `response`, stripped, or None: the first form of `order` that is present.

  Only the text after the last `</think>` counts. Forms: `boxed` (last balanced box), `answer_tag`,
  `answer_line`, `hashes`, `last_number` (lenient), `whole` (all of it). An empty span is None.
  Raises RewardError for an unknown form.
  """
  unknown = [form for form in order if form not in FORMS]
  if unknown or isinstance(order, str):
    raise RewardError(f'answer forms {order!r}: choose from {", ".join(FORMS)}')
  tail = after_thinking(response)
  for form in order:
    span = FORMS[form](tail)
    if span is not None and span.strip():
      return span.strip()
  return None


_WRAPPERS = ('text', 'textbf', 'textit', 'textrm', 'mathrm', 'mathbf', 'mbox', 'operatorname')
_WRAPPED = re.compile(r'\\(?:' + '|'.join(_WRAPPERS) + r')\s*\{([^{}]*)\}')
_SPACING = re.compile(
  r'(?<!\\)\\[,!;: ]|~|\\q?quad\b|\\(?:left|right)(?![a-zA-Z])|\\displaystyle\b'
)
_REPLACED = (
  ('\u2212', '-'),
  ('\u2013', '-'),
  ('\u00d7', '\\times'),
  ('\u00f7', '/'),
  ('\u03c0', '\\pi '),
  ('\\%', '%'),
  ('\\$', ''),
  ('$', ''),
  ('{,}', ','),
  ('\\dfrac', '\\frac'),
  ('\\tfrac', '\\frac'),
  ('\\cfrac', '\\frac'),
  ('\\degree', '^\\circ'),
  ('\u00b0', '^\\circ'),
  ('^{\\circ}', '^\\circ'),
  ('\\times', '*'),
)
_DELIMITERS = (('\\(', '\\)'), ('\\[', '\\]'))


def normalise(answer: str) -> str:
  """Canonical spelling of a short answer, without changing its value; case is kept.

  Drops math delimiters, spacing commands, text wrappers, thousands separators, a closing full stop
  and spaces beside non-letters; spells fractions `\\frac{a}{b}` and powers without needless braces.
  """
  text = answer.strip()
  for opening, closing in _DELIMITERS:
    if text.startswith(opening) and text.endswith(closing) and len(text) >= 4:
      text = text[2:-2]
  for old, new in _REPLACED:
    text = text.replace(old, new)
  text = _WRAPPED.sub(r'\1', _SPACING.sub(' ', text))
  text = re.sub(r'\\cdot(?!s)', '*', text)
  text = re.sub(r'\\frac\s*(\d)\s*(\d)', r'\\frac{\1}{\2}', text)
  text = re.sub(r'\\frac\s*(\d)\s*\{', r'\\frac{\1}{', text)
  text = re.sub(r'(\\frac\s*\{[^{}]*\})\s*(\d)', r'\1{\2}', text)
  text = re.sub(r'\\sqrt\s*(\w)', r'\\sqrt{\1}', text)
  text = re.sub(r'([\^_])\{(\w)\}', r'\1\2', text)
  text = re.sub(r'\s+', ' ', text).strip()
  text = re.sub(r' (?=[^a-zA-Z])|(?<=[^a-zA-Z]) ', '', text)
  text = text.rstrip('.') or text
  while text.startswith('{') and text.endswith('}') and '}' not in text[1:-1]:
    text = text[1:-1].strip()
  if _GROUPED.fullmatch(text):
    text = text.replace(',', '')
  return text.removeprefix('+')


def strip_marks(answer: str) -> str:
  """`answer` without degree and percent signs (ZPPO's second attempt)."""
  for mark in ('^{\\circ}', '^\\circ', '\\circ', '\\degree', '\u00b0', '\\%', '%'):
    answer = answer.replace(mark, '')
  return answer.strip()


def plain_number(answer: str) -> tuple[Fraction, int] | None:
  """(value, number of decimals) of a normalised integer, decimal or ratio of such, else None.

  Decimals are 0 for integers and ratios; division by zero and over-long texts are None.
  """
  if len(answer) > MAX_CHARS:
    return None
  if _PLAIN.fullmatch(answer):
    return Fraction(answer), len(answer.partition('.')[2])
  ratio = _RATIO.fullmatch(answer)
  latex = _FRAC.fullmatch(answer)
  if not ratio and not latex:
    return None
  sign, top, bottom = ('', *ratio.groups()) if ratio else latex.groups()
  if not Fraction(bottom):
    return None
  value = Fraction(top) / Fraction(bottom)
  return (-value if sign == '-' else value), 0


def same_number(a: tuple[Fraction, int], b: tuple[Fraction, int]) -> bool:
  """Exact equality; a decimal of 6 or more places may also stand for a ratio (`.333333` = 1/3)."""
  if a[0] == b[0]:
    return True
  places = max(a[1], b[1])
  return min(a[1], b[1]) == 0 and places >= 6 and abs(a[0] - b[0]) < Fraction(1, 10**places)


def is_words(answer: str) -> bool:
  """Whether a normalised answer is plain words, one of at least four letters: not a product."""
  return bool(_WORDS.fullmatch(answer)) and max(map(len, answer.split())) >= 4


def canonical(answer: str) -> Fraction | str:
  """Key under which spellings of one answer meet: a number, words without case, or the text."""
  text = normalise(answer)
  number = plain_number(text)
  if number:
    return number[0]
  return text.casefold() if is_words(text) else text
