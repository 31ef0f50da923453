"""Countdown: reach a target from some numbers with + - * /, 'numbers 3 5 8 target 16'."""

from __future__ import annotations

import ast
import dataclasses
import itertools
from fractions import Fraction

import numpy as np

from zppo_jax.data.tasks import arithmetic, common

_MAX_TRIES = 1000


@dataclasses.dataclass(frozen=True)
class Config:
  """`count` numbers in 1..`largest`; with `use_all` the answer must use each of them."""

  count: int = 3
  largest: int = 20
  max_target: int = 100
  operators: str = '+-*'
  use_all: bool = False

  def __post_init__(self):
    errors = []
    if not 2 <= self.count <= 6:
      errors.append(f'count {self.count} must be in 2..6')
    if not 2 <= self.largest <= 100:
      errors.append(f'largest {self.largest} must be in 2..100')
    if not 2 <= self.max_target <= 10**6:
      errors.append(f'max_target {self.max_target} must be in 2..1000000')
    if not self.operators or set(self.operators) - set('+-*/'):
      errors.append(f"operators {self.operators!r} must come from '+-*/'")
    if errors:
      raise ValueError('countdown: ' + '; '.join(errors))


def _combine(symbol: str, a: int, b: int) -> int | None:
  """a symbol b if it is a positive integer, else None."""
  if symbol == '/':
    return a // b if a % b == 0 else None
  value = {'+': a + b, '-': a - b, '*': a * b}[symbol]
  return value if value > 0 else None


def _join(symbol: str, left: str, right: str) -> str:
  """Parentheses only where the usual precedence would change the value."""

  def rank(text):
    body = ast.parse(text, mode='eval').body
    if not isinstance(body, ast.BinOp):
      return 3
    return 1 if isinstance(body.op, ast.Add | ast.Sub) else 2

  own = 1 if symbol in '+-' else 2
  left = f'({left})' if rank(left) < own else left
  right = f'({right})' if rank(right) < own + (symbol in '-/') else right
  return f'{left}{symbol}{right}'


def _random_tree(rng: np.random.Generator, numbers: list[int], operators: str):
  """(expression, value) of a random tree over all numbers, or None if a step is refused."""
  pool = [(str(n), n) for n in numbers]
  while len(pool) > 1:
    i, j = (int(k) for k in rng.choice(len(pool), size=2, replace=False))
    symbol = common.pick(rng, operators)
    value = _combine(symbol, pool[i][1], pool[j][1])
    if value is None:
      return None
    joined = (_join(symbol, pool[i][0], pool[j][0]), value)
    pool = [p for k, p in enumerate(pool) if k not in (i, j)] + [joined]
  return pool[0]


def generate(rng: np.random.Generator, config: Config) -> common.Problem:
  """One problem with a known answer; ValueError if no tree fits the target range."""
  for _ in range(_MAX_TRIES):
    numbers = [int(n) for n in rng.integers(1, config.largest + 1, size=config.count)]
    low = config.count if config.use_all else 2
    used = numbers[: int(rng.integers(low, config.count + 1))]
    found = _random_tree(rng, used, config.operators)
    if found is None or found[1] > config.max_target or found[1] in numbers:
      continue
    expression, target = found
    shown = ' '.join(map(str, rng.permutation(numbers)))
    question = f'numbers {shown} target {target}' + ' use all' * config.use_all
    steps = [text for text, _ in arithmetic.work(expression)[1]]
    args = {'numbers': sorted(numbers), 'target': target}
    args |= {'use_all': True} if config.use_all else {}
    return common.Problem(question, expression, common.boxed(steps, expression), 'countdown', args)
  raise ValueError(f'countdown: no problem in {_MAX_TRIES} tries of {config}')


def check(expression: str, numbers: list[int], target: int, use_all: bool = False) -> bool:
  """Does the expression reach the target with each number used at most (or exactly) once?

  Total on any text of plain arithmetic and refuses everything else; literals are counted, so
  `8--3` or `1_0` cannot smuggle numbers in.
  """
  if set(expression) - set('0123456789+-*/() '):
    return False
  try:
    value, _ = arithmetic.work(expression)
    literals = [
      node.value
      for node in ast.walk(ast.parse(expression.strip(), mode='eval'))
      if isinstance(node, ast.Constant)
    ]
  except (ValueError, ZeroDivisionError, RecursionError, MemoryError):
    return False
  spare = list(numbers)
  for literal in literals:
    if literal not in spare:
      return False
    spare.remove(literal)
  return value == target and not (use_all and spare)


def solve(numbers: list[int], target: int, use_all: bool = False) -> str | None:
  """Brute force over every tree with rational intermediates; None if there is no answer."""

  def search(pool):
    if pool[-1][1] == target and (len(pool) == 1 or not use_all):
      return pool[-1][0]
    for (i, (x, a)), (j, (y, b)) in itertools.permutations(enumerate(pool), 2):
      rest = [p for k, p in enumerate(pool) if k not in (i, j)]
      values = {'+': a + b, '-': a - b, '*': a * b} | ({'/': a / b} if b else {})
      for symbol, value in values.items():
        if found := search([*rest, (f'({x}{symbol}{y})', value)]):
          return found
    return None

  return search([(str(n), Fraction(n)) for n in numbers])


def canonical(problem: common.Problem) -> str:
  """The sorted numbers and the target."""
  args = problem.verifier_args
  return f'{args["numbers"]}->{args["target"]}'


def distractor(rng: np.random.Generator, problem: common.Problem) -> str:
  """An expression over the same numbers that misses the target."""
  args = problem.verifier_args
  for _ in range(50):
    numbers = [int(n) for n in rng.permutation(args['numbers'])]
    found = _random_tree(rng, numbers, '+-*')
    if found is not None and found[1] != args['target']:
      return found[0]
  return str(args['numbers'][0])  # no number is the target itself


def harder(config: Config) -> Config:
  """One more number, or at six numbers twice as large ones."""
  if config.count < 6:
    return dataclasses.replace(config, count=config.count + 1)
  return dataclasses.replace(config, largest=min(100, 2 * config.largest))


def difficulty(config: Config) -> float:
  """More and larger numbers are harder; in [0, 1]."""
  return min(1.0, (config.count - 1) / 8 + config.largest / 400 + 0.1 * config.use_all)


def task() -> common.Task:
  """The record that sources and builders use."""
  return common.Task(
    'countdown', '1.0.0', Config, generate, canonical, distractor, harder, difficulty
  )
