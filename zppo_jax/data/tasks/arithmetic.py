"""Arithmetic: sums, differences, products and exact quotients of small integers, '37+58-9'."""

from __future__ import annotations

import ast
import dataclasses
from fractions import Fraction

import numpy as np

from zppo_jax.core.types import Message, ToolCall
from zppo_jax.data.tasks import common

_SYMBOLS = {ast.Add: '+', ast.Sub: '-', ast.Mult: '*', ast.Div: '/'}
_MAX_TRIES = 1000


@dataclasses.dataclass(frozen=True)
class Config:
  """`digits` per number, `terms` numbers; intermediate values stay within +-`bound`."""

  digits: int = 2
  terms: int = 2
  operators: str = '+-'
  parentheses: bool = False
  negative: bool = True  # may intermediate values and the answer fall below zero?
  bound: int = 10**9
  tool: bool = False  # the worked trace calls a tool 'calculator' and reads its answer

  def __post_init__(self):
    errors = []
    if not 1 <= self.digits <= 9:
      errors.append(f'digits {self.digits} must be in 1..9')
    if not 2 <= self.terms <= 12:
      errors.append(f'terms {self.terms} must be in 2..12')
    if not set(self.operators) <= set('+-*/') or not set(self.operators) - {'/'}:
      errors.append(f"operators {self.operators!r} must come from '+-*/', not only '/'")
    if self.bound < 10**self.digits:
      errors.append(f'bound {self.bound} must hold numbers of {self.digits} digits')
    if errors:
      raise ValueError('arithmetic: ' + '; '.join(errors))


def _apply(symbol: str, left: Fraction, right: Fraction) -> Fraction:
  if symbol == '/':
    return left / right
  return {'+': left + right, '-': left - right, '*': left * right}[symbol]


def _show(value: Fraction, right: bool) -> str:
  return f'({value})' if right and value < 0 else str(value)


def _reduce(node: ast.expr, steps: list[tuple[str, Fraction]]) -> Fraction:
  if isinstance(node, ast.Constant) and type(node.value) is int:
    return Fraction(node.value)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    return -_reduce(node.operand, steps)
  if not isinstance(node, ast.BinOp) or type(node.op) not in _SYMBOLS:
    raise ValueError(f'not plain arithmetic: {ast.unparse(node)!r}')
  left, right = _reduce(node.left, steps), _reduce(node.right, steps)
  symbol = _SYMBOLS[type(node.op)]
  value = _apply(symbol, left, right)
  steps.append((f'{_show(left, False)}{symbol}{_show(right, True)}={value}', value))
  return value


def work(expression: str) -> tuple[Fraction, list[tuple[str, Fraction]]]:
  """(value, [(step text, step value)]) of an expression of integers, + - * / and parentheses.

  Errors: ValueError (SyntaxError is one) for anything else, ZeroDivisionError.
  """
  try:
    body = ast.parse(expression.strip(), mode='eval').body
  except SyntaxError as error:
    raise ValueError(f'not an expression: {expression!r}') from error
  steps: list[tuple[str, Fraction]] = []
  return _reduce(body, steps), steps


def solve(question: str) -> int:
  """The integer value of a question; ValueError if it is not an integer."""
  value, _ = work(question)
  if value.denominator != 1:
    raise ValueError(f'{question!r} is {value}, not an integer')
  return int(value)


def _number(rng: np.random.Generator, config: Config) -> int:
  return int(rng.integers(10**config.digits))


def _divisor(rng: np.random.Generator, value: int, config: Config) -> int | None:
  limit = min(10**config.digits, 1000)
  found = [d for d in range(2, limit) if value % d == 0] if value else []
  return common.pick(rng, found) if found else None


def _operator(rng: np.random.Generator, config: Config, divide: bool) -> str:
  return common.pick(rng, [o for o in config.operators if divide or o != '/'])


def _chain(rng: np.random.Generator, config: Config) -> str:
  """Numbers and operators from left to right, usual precedence, every quotient exact."""
  product = _number(rng, config)  # of the factors since the last + or -
  parts = [str(product)]
  for _ in range(config.terms - 1):
    divisor = _divisor(rng, product, config)
    symbol = _operator(rng, config, divide=divisor is not None)
    number = divisor if symbol == '/' else _number(rng, config)
    product = {'/': product // (divisor or 1), '*': product * number}.get(symbol, number)
    parts += [symbol, str(number)]
  return ''.join(parts)


def _tree(rng: np.random.Generator, config: Config, terms: int) -> str:
  """A random tree, parentheses around every inner operation, every quotient exact."""
  if terms == 1:
    return str(_number(rng, config))
  cut = int(rng.integers(1, terms))
  left, right = _tree(rng, config, cut), _tree(rng, config, terms - cut)
  a, b = solve(left), solve(right)
  symbol = _operator(rng, config, divide=b != 0 and a % b == 0)
  left, right = (f'({s})' if not s.isdigit() else s for s in (left, right))
  return f'{left}{symbol}{right}'


def generate(rng: np.random.Generator, config: Config) -> common.Problem:
  """One problem; ValueError if `bound` or `negative` refuse every try."""
  for _ in range(_MAX_TRIES):
    question = _tree(rng, config, config.terms) if config.parentheses else _chain(rng, config)
    value, steps = work(question)
    low = -config.bound if config.negative else 0
    if all(low <= v <= config.bound for _, v in steps):
      trace = common.boxed([text for text, _ in steps], str(value))
      dialogue = _dialogue(question, str(value)) if config.tool else ()
      return common.Problem(question, str(value), trace, 'numeric_exact', {}, dialogue)
  raise ValueError(f'arithmetic: no problem within bounds in {_MAX_TRIES} tries of {config}')


def _dialogue(question: str, value: str) -> tuple[Message, ...]:
  call = ToolCall('call_0', 'calculator', {'expression': question})
  return (Message('assistant', '', (call,)), Message('tool', value, (), call.id, call.name),
          Message('assistant', common.boxed([], value)))


def _signed_terms(node: ast.expr, sign: int) -> list[str]:
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
    flip = -1 if isinstance(node.op, ast.Sub) else 1
    return _signed_terms(node.left, sign) + _signed_terms(node.right, sign * flip)
  return [f'{"-" if sign < 0 else "+"}{_factors(node)}']


def _factors(node: ast.expr) -> str:
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
    return '*'.join(sorted([_factors(node.left), _factors(node.right)]))
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
    return f'{_factors(node.left)}/{_factors(node.right)}'
  if isinstance(node, ast.BinOp):
    return f'({"".join(sorted(_signed_terms(node, 1)))})'
  return ast.unparse(node)


def canonical(problem: common.Problem) -> str:
  """The question with its terms and factors sorted: '3+5' and '5+3' are one problem."""
  return ''.join(sorted(_signed_terms(ast.parse(problem.question, mode='eval').body, 1)))


def distractor(rng: np.random.Generator, problem: common.Problem) -> str:
  """A slip: the last step left out, a wrong sign, a lost carry, two digits swapped."""
  answer = int(problem.answer)
  _, steps = work(problem.question)
  swapped = str(abs(answer))
  swapped = int(swapped[:-2] + swapped[-1] + swapped[-2]) if len(swapped) > 1 else answer
  slips = [int(v) for _, v in steps[:-1]] + [-answer, swapped if answer >= 0 else -swapped]
  return str(common.wrong_integer(rng, answer, slips))


def harder(config: Config) -> Config:
  """One more term."""
  return dataclasses.replace(config, terms=config.terms + 1)


def difficulty(config: Config) -> float:
  """More digits, terms, products and parentheses are harder; in [0, 1]."""
  weight = 1 + 0.5 * bool(set(config.operators) & set('*/')) + 0.5 * config.parentheses
  return min(1.0, config.digits * (config.terms - 1) * weight / 20)


def task() -> common.Task:
  """The record that sources and builders use."""
  return common.Task(
    'arithmetic', '1.0.0', Config, generate, canonical, distractor, harder, difficulty
  )
