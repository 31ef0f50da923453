r"""Third-party tasks: reasoning-gym data sets behind the same source protocol.

reasoning-gym draws item i from `Random(seed + i)`, so neighbouring seeds share items: here every
(seed, split) owns an index range of its own. Scoring may hang or raise (rewards runs it in a
killable process); five data sets have no single answer, and theirs is left to the verifier.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from zppo_jax.core.types import Example, Message
from zppo_jax.data.tasks import arithmetic, common

SPLITS = ('train', 'validation', 'test')
_RANGE = 10**8  # item numbers of one (seed, split)
_MAX_DRAWS = 300
# Data sets whose metadata holds a plain expression of + - * / to work through.
_EXPRESSIONS = frozenset({'chain_sum', 'basic_arithmetic'})
# Data sets whose answer is one integer: equality is their own verdict below partial credit, so the
# exact grader serves them inline, without a process of its own.
_INTEGERS = _EXPRESSIONS | {'gcd', 'lcm'}


@dataclasses.dataclass(frozen=True)
class ReasoningGymSource:
  """`dataset` of reasoning-gym at `config`, as examples for the verifier 'reasoning_gym'.

  With `disjoint` (the default) an item whose question hashes into another split is drawn again
  from its own range; switch it off for data sets with few or slow items. For an out-of-domain
  split pass a harder `config`. ImportError names the extra, ValueError a bad split or config.
  """

  dataset: str
  config: dict[str, Any] | None = None
  seed: int = 0
  split: str = 'train'
  size: int = 1000
  disjoint: bool = True

  def __post_init__(self):
    common.check_split(self.split, SPLITS)
    limit = _RANGE // _MAX_DRAWS
    if not 1 <= self.size <= limit or self.seed < 0:
      raise ValueError(f'size {self.size} must be in 1..{limit} and seed {self.seed} >= 0')
    if clash := {'seed', 'size'} & set(self.config or {}):
      raise ValueError(f'{sorted(clash)} belong to the source, not to its config')
    _ = self._items  # fails early on an unknown data set or config

  @functools.cached_property
  def _items(self):
    try:
      import reasoning_gym.factory
    except ImportError as error:
      raise ImportError("reasoning-gym is missing: pip install 'zppo_jax[rg]'") from error
    known = list(reasoning_gym.factory.DATASETS)
    if self.dataset not in known:
      raise common.unknown('reasoning_gym dataset', self.dataset, known)
    start = (self.seed * len(SPLITS) + SPLITS.index(self.split)) * _RANGE
    options = {**(self.config or {}), 'seed': start, 'size': _RANGE}
    try:
      return reasoning_gym.create_dataset(self.dataset, **options)
    except (AssertionError, TypeError, ValueError) as error:
      raise ValueError(f'reasoning_gym {self.dataset!r} with {self.config}: {error}') from error

  def __len__(self) -> int:
    return self.size

  def _owned(self, question: str) -> bool:
    # The content buckets of 'ood' go to train: this source has no such split.
    owner = common.split_of(f'{self.dataset}:{question}')
    return not self.disjoint or (owner if owner in SPLITS else 'train') == self.split

  def entry(self, index: int) -> dict[str, Any]:
    """Raw item {'question', 'answer', 'metadata'}; ValueError if the split stays empty."""
    index = common.check_index(index, self.size)
    for draw in range(_MAX_DRAWS):
      entry = self._items[index + draw * (_RANGE // _MAX_DRAWS)]
      if self._owned(entry['question']):
        return entry
    raise ValueError(
      f'{self.dataset}: no question for split {self.split!r} in {_MAX_DRAWS} draws; '
      'it has too few different ones, pass disjoint=False'
    )

  def __getitem__(self, index: int) -> Example:
    entry = self.entry(index)
    question = entry['question'].strip()
    answer = '' if entry['answer'] is None else str(entry['answer'])
    exact = self.dataset in _INTEGERS
    return Example(
      uid=common.content_uid(f'reasoning_gym/{self.dataset}', self.split, [question, answer]),
      messages=(Message('user', question),),
      answer=answer,
      verifier='numeric_exact' if exact else 'reasoning_gym',
      verifier_args={} if exact else {'dataset': self.dataset, 'entry': entry},
      meta={
        'task': f'reasoning_gym/{self.dataset}',
        'split': self.split,
        'index': common.check_index(index, self.size),
      },
      solution=_solution(self.dataset, entry) if answer else None,
    )

  def distractor(self, index: int) -> str:
    """A wrong answer: a neighbouring integer, or the answer of another item."""
    answer = self.entry(index)['answer']
    rng = common.generator(common.hash32(self.dataset), self.seed, self.split, index)
    if str(answer).lstrip('-').isdecimal():
      return str(common.wrong_integer(rng, int(answer), []))
    others = (self.entry(int(i))['answer'] for i in rng.integers(self.size, size=_MAX_DRAWS))
    return next((str(o) for o in others if o != answer), f'{answer}?')


def _solution(dataset: str, entry: dict[str, Any]) -> str:
  """The answer in a box, after the steps where the metadata make them plain."""
  answer = str(entry['answer'])
  if dataset not in _EXPRESSIONS:
    return common.boxed([], answer)
  try:
    value, steps = arithmetic.work(entry['metadata']['expression'])
  except (KeyError, ValueError, ZeroDivisionError):
    return common.boxed([], answer)
  return common.boxed([text for text, _ in steps] if str(value) == answer else [], answer)
