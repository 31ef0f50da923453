"""Exact comparisons without sympy: numbers, tuples, words and four-operation expressions."""

from __future__ import annotations

import ast
import collections
import operator
import re
from collections.abc import Sequence
from fractions import Fraction

from zppo_jax.rewards import answers

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}

_MAX_EXPONENT = 1000
_EXPONENT = re.compile(r'(?:\^|\*\*)\s*[({]?\s*[-+]?(\d+)')
_TOWER = re.compile(r'(?:\^|\*\*)[\s({]*[-+\d.]+\s*[)}]?\s*(?:\^|\*\*)')
_ASSIGNED = re.compile(r'[a-zA-Z]=(?!=)(.+)')
_OPENING, _CLOSING = '([', ')]'


def danger(answer: str) -> str | None:
  """Why `answer` must not be parsed (a tower of powers, a large exponent or factorial), or None."""
  if len(answer) > answers.MAX_CHARS:
    return f'answer longer than {answers.MAX_CHARS} characters'
  if _TOWER.search(answer):
    return 'tower of powers'
  if any(int(e) > _MAX_EXPONENT for e in _EXPONENT.findall(answer)):
    return f'exponent above {_MAX_EXPONENT}'
  if re.search(r'\d{4,}\s*\)*!|!\)*!', answer):
    return 'factorial of a large number'
  return None


def compare(gold: str, answer: str) -> tuple[bool | None, tuple[tuple[str, str], ...]]:
  """(equal, the pairs still to be compared as mathematics); equal is None when undecided.

  Decides equal spellings, plain numbers (degree and percent signs included), words, and tuples
  of the same brackets element by element.
  """
  gold, answer = _unassign(answers.normalise(gold), answers.normalise(answer))
  decided = _equal_plain(gold, answer)
  if decided is not None:
    return decided, ()
  left, right = split_tuple(gold), split_tuple(answer)
  if not left or not right:
    return None, ((gold, answer),)
  if (left[0], left[2], len(left[1])) != (right[0], right[2], len(right[1])):
    return False, ()
  parts = [compare(a, b) for a, b in zip(left[1], right[1], strict=True)]
  if any(equal is False for equal, _ in parts):
    return False, ()
  rest = tuple(pair for _, pairs in parts for pair in pairs)
  return (None, rest) if rest else (True, ())


def _unassign(gold: str, answer: str) -> tuple[str, str]:
  """`x=5` against `5`: drops the variable where only one side names it."""
  left, right = _ASSIGNED.fullmatch(gold), _ASSIGNED.fullmatch(answer)
  if left and not right and '=' not in answer:
    return left[1], answer
  if right and not left and '=' not in gold:
    return gold, right[1]
  return gold, answer


def _equal_plain(gold: str, answer: str) -> bool | None:
  bare = answers.strip_marks(gold)
  if gold == answer or (bare and bare == answers.strip_marks(answer)):
    return True
  a, b = _readings(gold), _readings(answer)
  if a and b:
    return any(answers.same_number(x, y) for x in a for y in b)
  words = answers.is_words(gold), answers.is_words(answer)
  if any(words) and (all(words) or a or b):
    return gold.casefold() == answer.casefold()
  return None


def _readings(text: str) -> list[tuple[Fraction, int]]:
  """What a number with a percent sign may mean: the bare number, or a hundredth of it."""
  number = answers.plain_number(answers.strip_marks(text))
  if number is None:
    return []
  return [number, (number[0] / 100, 0)] if '%' in text else [number]


def split_tuple(text: str) -> tuple[str, list[str], str] | None:
  """(opening bracket, parts, closing bracket) of `(a, b)`, `[a, b)`, ...; else None."""
  if len(text) < 2 or text[0] not in _OPENING or text[-1] not in _CLOSING:
    return None
  parts, depth, start = [], 0, 1
  for i, char in enumerate(text[:-1]):
    depth += (char in '([{') - (char in ')]}')
    if depth < 1:  # the first bracket closes early, as in (1,2)(3,4)
      return None
    if char == ',' and depth == 1:
      parts.append(text[start:i])
      start = i + 1
  parts.append(text[start:-1])
  return (text[0], parts, text[-1]) if depth == 1 and len(parts) > 1 else None


_SIGNS = (('\u00d7', '*'), ('\u00f7', '/'), ('\\times', '*'), ('\\cdot', '*'), ('\\div', '/'))


def check_expression(
  text: str, numbers: Sequence[int], target: int | str, *, use_all: bool = False
) -> str | None:
  """None if the expression uses `numbers` (each at most once) and equals `target`, else why not.

  Only + - * / and brackets over integers are read, by the syntax tree, as exact fractions.
  """
  if len(text) > answers.MAX_CHARS:
    return f'answer longer than {answers.MAX_CHARS} characters'
  for sign, plain in (*_SIGNS, ('\u2212', '-'), ('\\left', ''), ('\\right', ''), ('$', '')):
    text = text.replace(sign, plain)
  left, equals, right = text.partition('=')
  if equals and right.strip() != str(target).strip():
    return 'ends in another number than the target'
  used: list[int] = []
  try:
    value = _evaluate(ast.parse(left.strip(), mode='eval').body, used)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return 'not an expression of + - * /'
  except ZeroDivisionError:
    return 'division by zero'
  have, need = collections.Counter(used), collections.Counter(int(n) for n in numbers)
  if have - need or (use_all and have != need):
    return 'wrong numbers'
  return None if value == Fraction(target) else f'value is {_short(value)}'


def _short(value: Fraction) -> str:
  return str(value) if value.numerator.bit_length() < 100 else 'too large'


def _evaluate(node: ast.AST, used: list[int]) -> Fraction:
  if isinstance(node, ast.Constant) and type(node.value) is int:
    used.append(node.value)
    return Fraction(node.value)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
    value = _evaluate(node.operand, used)
    return -value if isinstance(node.op, ast.USub) else value
  if not isinstance(node, ast.BinOp):
    raise ValueError('only numbers and + - * /')
  left, right = _evaluate(node.left, used), _evaluate(node.right, used)
  if type(node.op) not in OPERATORS:
    raise ValueError('only numbers and + - * /')
  return OPERATORS[type(node.op)](left, right)
