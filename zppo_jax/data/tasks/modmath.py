"""Modular arithmetic: '(7*8+5) mod 11', powers, inverses, congruences, remainders, orders."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from zppo_jax.data.tasks import common

KINDS = ('linear', 'power', 'inverse', 'congruence', 'crt', 'order')
_NUMBER = re.compile(r'\d+')


@dataclasses.dataclass(frozen=True)
class Config:
  """Moduli in 3..`modulus`, numbers below `operand`; `kinds` are drawn uniformly."""

  modulus: int = 12
  operand: int = 10
  kinds: tuple[str, ...] = ('linear',)
  exponent: int = 8  # largest exponent of 'power'
  moduli: int = 2  # congruences in 'crt'

  def __post_init__(self):
    object.__setattr__(self, 'kinds', tuple(self.kinds))
    errors = []
    if not 3 <= self.modulus <= 10_000:
      errors.append(f'modulus {self.modulus} must be in 3..10000')
    if not 2 <= self.operand <= 10**6:
      errors.append(f'operand {self.operand} must be in 2..1000000')
    if not 2 <= self.exponent <= 1000:
      errors.append(f'exponent {self.exponent} must be in 2..1000')
    if not 2 <= self.moduli <= 3 or ('crt' in self.kinds and self.modulus < 2 + self.moduli):
      errors.append(f'moduli {self.moduli} must be 2 or 3, with modulus >= moduli + 2 for crt')
    if not self.kinds or set(self.kinds) - set(KINDS):
      errors.append(f'kinds {self.kinds} must come from {KINDS}')
    if errors:
      raise ValueError('modmath: ' + '; '.join(errors))


def _modulus(rng: np.random.Generator, config: Config) -> int:
  return int(rng.integers(3, config.modulus + 1))


def _unit(rng: np.random.Generator, modulus: int) -> int:
  """A number in 2..modulus-1 without a common factor with the modulus."""
  return common.pick(rng, [a for a in range(2, modulus) if math.gcd(a, modulus) == 1])


def _linear(rng, config):
  m = _modulus(rng, config)
  a, b, c = (int(x) for x in rng.integers(config.operand, size=3))
  total = a * b + c
  steps = [f'{a}*{b}={a * b}', f'{a * b}+{c}={total}']
  steps.append(f'{total}={total // m}*{m}+{total % m}')
  return f'({a}*{b}+{c}) mod {m}', total % m, m, steps


def _power(rng, config):
  m = _modulus(rng, config)
  base = int(rng.integers(2, config.operand + 1))
  exponent = int(rng.integers(2, config.exponent + 1))
  value, reached, steps = base % m, 1, [f'{base}^1={base % m}']
  for bit in bin(exponent)[3:]:  # square, and multiply where the bit is set
    reached, square = 2 * reached, value * value
    steps.append(f'{base}^{reached}={value}*{value}={square}={square % m}')
    value = square % m
    if bit == '1':
      reached, product = reached + 1, value * (base % m)
      steps.append(f'{base}^{reached}={value}*{base % m}={product}={product % m}')
      value = product % m
  return f'{base}^{exponent} mod {m}', value, m, steps


def _inverse(rng, config):
  m = _modulus(rng, config)
  a = _unit(rng, m)
  x = pow(a, -1, m)
  return f'inverse of {a} mod {m}', x, m, [f'{a}*{x}={a * x}={a * x // m}*{m}+1']


def _congruence(rng, config):
  m = _modulus(rng, config)
  a, b = _unit(rng, m), int(rng.integers(m))
  inverse = pow(a, -1, m)
  x = inverse * b % m
  steps = [f'{a}*{inverse}={a * inverse}=1', f'x={inverse}*{b}={inverse * b}={x}']
  return f'{a}*x={b} mod {m}', x, m, steps


def _coprime_moduli(rng, config) -> list[int]:
  """Pairwise coprime moduli; they end because the numbers n and n + 1 always are."""
  while True:
    chosen = sorted(int(m) for m in rng.integers(2, config.modulus + 1, size=config.moduli))
    if math.lcm(*chosen) == math.prod(chosen):
      return chosen


def _crt(rng, config):
  moduli = _coprime_moduli(rng, config)
  product = math.prod(moduli)
  x = int(rng.integers(product))
  question = ', '.join(f'x={x % m} mod {m}' for m in moduli)
  steps, value, period = [], x % moduli[0], moduli[0]
  for m in moduli[1:]:
    tried = [value + k * period for k in range(m)]
    value = next(t for t in tried if t % m == x % m)
    steps.append(f'{",".join(map(str, tried[: tried.index(value) + 1]))}: {value}={x % m} mod {m}')
    period *= m
  return question, x, product, steps


def _order(rng, config):
  m = _modulus(rng, config)
  a = _unit(rng, m)
  powers = [a]
  while powers[-1] != 1:
    powers.append(powers[-1] * a % m)
  steps = [f'{a}^{i + 1}={p}' for i, p in enumerate(powers)]
  return f'order of {a} mod {m}', len(powers), None, steps


def generate(rng: np.random.Generator, config: Config) -> common.Problem:
  """One problem of one of `config.kinds`; the answer is the least non-negative residue."""
  kinds = dict(zip(KINDS, (_linear, _power, _inverse, _congruence, _crt, _order)))
  question, answer, modulus, steps = kinds[common.pick(rng, config.kinds)](rng, config)
  # An order is a count, not a residue: only the exact number is right.
  verifier = ('numeric_exact', {}) if modulus is None else ('mod_equal', {'modulus': modulus})
  return common.Problem(question, str(answer), common.boxed(steps, str(answer)), *verifier)


def solve(question: str) -> int:
  """The answer by trying every candidate; ValueError for an unknown form."""
  n = [int(x) for x in _NUMBER.findall(question)]
  if question.startswith('('):
    return next(x for x in range(n[3]) if (n[0] * n[1] + n[2] - x) % n[3] == 0)
  if '^' in question:
    return next(x for x in range(n[2]) if (n[0] ** n[1] - x) % n[2] == 0)
  if question.startswith('inverse'):
    return next(x for x in range(n[1]) if n[0] * x % n[1] == 1)
  if question.startswith('order'):
    return next(k for k in range(1, n[1]) if n[0] ** k % n[1] == 1)
  if question.startswith('x='):
    pairs = list(zip(n[::2], n[1::2]))
    return next(x for x in range(math.prod(n[1::2])) if all(x % m == r for r, m in pairs))
  if '*x=' in question:
    return next(x for x in range(n[2]) if (n[0] * x - n[1]) % n[2] == 0)
  raise ValueError(f'not a question of this task: {question!r}')


def canonical(problem: common.Problem) -> str:
  """The question, with the two factors of the linear kind in order."""
  if not problem.question.startswith('('):
    return problem.question
  a, b, c, m = (int(x) for x in _NUMBER.findall(problem.question))
  return f'({min(a, b)}*{max(a, b)}+{c}) mod {m}'


def distractor(rng: np.random.Generator, problem: common.Problem) -> str:
  """A wrong residue: one off, negated, or another number of the question."""
  answer = int(problem.answer)
  modulus = problem.verifier_args.get('modulus')
  if modulus is None:
    return str(common.wrong_integer(rng, answer, [answer * 2]))
  shown = [int(x) for x in _NUMBER.findall(problem.question)]
  slips = {x % modulus for x in [*shown, -answer, answer + 1, answer - 1]} - {answer}
  return str(common.pick(rng, sorted(slips)))


def harder(config: Config) -> Config:
  """Twice the modulus and the operands."""
  return dataclasses.replace(
    config, modulus=min(10_000, 2 * config.modulus), operand=min(10**6, 2 * config.operand)
  )


def difficulty(config: Config) -> float:
  """Larger moduli and operands are harder; in [0, 1]."""
  size = math.log10(config.modulus) + math.log10(config.operand)
  return min(1.0, size / 8 + 0.1 * (config.kinds != ('linear',)))


def task() -> common.Task:
  """The record that sources and builders use."""
  return common.Task(
    'modmath', '1.0.0', Config, generate, canonical, distractor, harder, difficulty
  )
