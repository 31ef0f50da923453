"""What every procedural task shares: counter-based noise, content hashes, splits, the source.

Item i is a pure function of (task, version, config, seed, split, i): it does not depend on length,
order, process or any other item. Splits share no content: a drawn problem whose hash falls in the
bucket of another split is drawn again from the next counter.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from zppo_jax.core.types import Example, Message

SPLITS = ('train', 'validation', 'test', 'ood')
# First bucket (of 100) that each split does not own.
_BUCKET_ENDS = (70, 80, 90, 100)
_MAX_DRAWS = 10_000


class TaskSource(Protocol):
  """Random access to examples: exactly what `grain.MapDataset.source` takes."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


class Problem(NamedTuple):
  """One generated problem; `solution` is a worked trace that ends with the boxed answer,
  `dialogue` one of several turns, with tools."""

  question: str
  answer: str
  solution: str
  verifier: str
  verifier_args: dict[str, Any]
  dialogue: tuple[Message, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
  """A procedural task as a record of pure functions.

  `canonical` maps equivalent problems to one text, `distractor` gives a plausible wrong answer,
  `harder` the configuration of the 'ood' split, `difficulty` a number in [0, 1].
  """

  name: str
  version: str
  config: type
  generate: Callable[[np.random.Generator, Any], Problem]
  canonical: Callable[[Problem], str]
  distractor: Callable[[np.random.Generator, Problem], str]
  harder: Callable[[Any], Any]
  difficulty: Callable[[Any], float]


def digest(text: str, size: int = 8) -> bytes:
  """blake2b of the UTF-8 text, `size` bytes."""
  return hashlib.blake2b(text.encode(), digest_size=size).digest()


def hash32(*parts: str) -> int:
  """A stable 32-bit hash of some strings."""
  return int.from_bytes(digest(json.dumps(parts), 4), 'big')


def content_uid(task: str, split: str, content: Any) -> str:
  """16 hex digits over the canonical JSON of (task, split, content); never a row number."""
  text = json.dumps([task, split, content], sort_keys=True, separators=(',', ':'))
  return digest(text).hex()


def content_bucket(content: str) -> int:
  """Bucket of a problem in 0..99; it decides which split may hold it."""
  return int.from_bytes(digest(content), 'big') % 100


def split_of(content: str) -> str:
  """The one split that may hold this content."""
  bucket = content_bucket(content)
  return next(name for name, end in zip(SPLITS, _BUCKET_ENDS) if bucket < end)


def unknown(kind: str, value: str, known: Sequence[str]) -> ValueError:
  """The error for a name that does not exist: the closest one and all known ones."""
  close = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)
  return ValueError(f'unknown {kind} {value!r}; closest is {close[0]!r}, known {sorted(known)}')


def check_keys(where: str, given: Sequence[str], known: Sequence[str]) -> None:
  """ValueError with the closest known name if a key is not known."""
  for key in given:
    if key not in known:
      raise ValueError(f'{where}: {unknown("key", key, known)}')


def check_split(split: str, known: tuple[str, ...] = SPLITS) -> str:
  """The split itself; ValueError lists the known ones."""
  if split not in known:
    raise ValueError(f'split {split!r} is not one of {known}')
  return split


def check_index(index: int, size: int) -> int:
  """A row number in [0, size), negative ones counted from the end; IndexError otherwise."""
  if not -size <= index < size:
    raise IndexError(f'index {index} is outside a source of {size} examples')
  return int(index) % size


def generator(key: int, seed: int, split: str, index: int, draw: int = 0) -> np.random.Generator:
  """Noise of one item: Philox keyed by (key, seed), counter at (draw, split, index)."""
  counter = [0, draw, SPLITS.index(split), index]
  return np.random.Generator(np.random.Philox(key=[key, seed], counter=counter))


@dataclasses.dataclass(frozen=True)
class ProceduralSource:
  """A task at one configuration, seed and split; 'ood' uses the task's harder configuration."""

  task: Task
  settings: Any
  seed: int = 0
  split: str = 'train'
  size: int = 10_000

  def __post_init__(self):
    check_split(self.split)
    if self.size < 1 or self.seed < 0:
      raise ValueError(f'size {self.size} must be >= 1 and seed {self.seed} >= 0')

  def __len__(self) -> int:
    return self.size

  @functools.cached_property
  def active(self) -> Any:
    """The configuration that this split draws from."""
    return self.task.harder(self.settings) if self.split == 'ood' else self.settings

  @functools.cached_property
  def _key(self) -> int:
    return hash32(self.task.name, self.task.version)

  def problem(self, index: int) -> Problem:
    """Problem number `index`; ValueError if no content of this split turns up."""
    index = check_index(index, self.size)
    for draw in range(_MAX_DRAWS):
      rng = generator(self._key, self.seed, self.split, index, draw)
      problem = self.task.generate(rng, self.active)
      if split_of(self.task.canonical(problem)) == self.split:
        return problem
    raise ValueError(
      f'{self.task.name}: no problem for split {self.split!r} in {_MAX_DRAWS} draws, '
      f'{self.active} has too few different problems'
    )

  def distractor(self, index: int) -> str:
    """A plausible wrong answer to problem `index`, fixed for this source."""
    index = check_index(index, self.size)
    rng = generator(self._key, self.seed, self.split, index, draw=_MAX_DRAWS)
    return self.task.distractor(rng, self.problem(index))

  def __getitem__(self, index: int) -> Example:
    problem = self.problem(index)
    name = self.task.name
    return Example(
      uid=content_uid(name, self.split, [problem.question, problem.answer]),
      messages=(Message('user', problem.question),),
      answer=problem.answer,
      verifier=problem.verifier,
      verifier_args=problem.verifier_args,
      meta={
        'task': name,
        'split': self.split,
        'index': check_index(index, self.size),
        'difficulty': self.task.difficulty(self.active),
      },
      solution=problem.solution,
      dialogue=problem.dialogue,
    )


def boxed(steps: list[str], answer: str) -> str:
  r"""A worked trace: steps joined by '; ', then the boxed answer on its own line."""
  return '\n'.join([*filter(None, ['; '.join(steps)]), f'\\boxed{{{answer}}}'])


def pick(rng: np.random.Generator, values):
  """One of `values`, uniformly, as the Python object itself."""
  return values[int(rng.integers(len(values)))]


def wrong_integer(rng: np.random.Generator, answer: int, candidates: list[int]) -> int:
  """A candidate that differs from the answer, else a neighbour of it."""
  near = [answer + 1, answer - 1, answer + 10, answer - 10]
  pool = sorted({c for c in candidates if c != answer}) + near
  return pick(rng, pool)
