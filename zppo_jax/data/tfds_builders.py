"""tfds builders of the procedural tasks, and the source that reads prepared data back.

Import this module before `tfds.data_source('zppo_arith/easy', ...)`. Everything runs on the
array_record path of tensorflow-datasets: TensorFlow is never imported.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from zppo_jax.core.types import Example, Message
from zppo_jax.data.tasks import common, sources


@dataclasses.dataclass(kw_only=True)
class DifficultyConfig(tfds.core.BuilderConfig):
  """One difficulty: the fields of the task's Config, and the examples per split."""

  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  train_size: int = 20_000
  heldout_size: int = 500  # each of validation, test and ood


def _configs(tiny: dict, easy: dict, medium: dict, hard: dict) -> list[DifficultyConfig]:
  rows = {'easy': easy, 'medium': medium, 'hard': hard}
  configs = [DifficultyConfig(name=name, settings=row) for name, row in rows.items()]
  small = DifficultyConfig(name='tiny', settings=tiny, train_size=200, heldout_size=50)
  return [*configs, small]


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A procedural source written to ArrayRecord files, in the order of the source."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  TASK = ''

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
      builder=self,
      description=f'Procedural, verifiable task {self.TASK!r} of zppo_jax.',
      features=tfds.features.FeaturesDict(
        {
          'uid': text(),
          'messages': tfds.features.Sequence({'role': text(), 'content': text()}),
          'answer': text(),
          'verifier': text(),
          'verifier_args': text(),  # JSON
          'meta': text(),  # JSON
          'solution': text(),
          'distractor': text(),
          'index': np.int32,
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    return {split: self._generate_examples(split) for split in common.SPLITS}

  def _generate_examples(self, split: str):
    config = self.builder_config
    size = config.train_size if split == 'train' else config.heldout_size
    source = sources.build_task(self.TASK, split=split, size=size, **config.settings)
    for i in range(size):
      yield i, _encode(source[i], source.distractor(i), i)


class ZppoArith(_Builder):
  """Sums, differences, products and exact quotients."""

  name = 'zppo_arith'
  TASK = 'arithmetic'
  BUILDER_CONFIGS = _configs(
    tiny={'digits': 1, 'terms': 3},
    easy={'digits': 2, 'terms': 2},
    medium={'digits': 2, 'terms': 3, 'operators': '+-*'},
    hard={'digits': 3, 'terms': 4, 'operators': '+-*/', 'parentheses': True},
  )


class ZppoModmath(_Builder):
  """Residues, powers, inverses, congruences."""

  name = 'zppo_modmath'
  TASK = 'modmath'
  BUILDER_CONFIGS = _configs(
    tiny={'modulus': 12, 'operand': 10},
    easy={'modulus': 20, 'operand': 20},
    medium={'modulus': 20, 'operand': 20, 'kinds': ('linear', 'power', 'inverse', 'congruence')},
    hard={'modulus': 60, 'operand': 60, 'kinds': ('power', 'inverse', 'congruence', 'crt')},
  )


class ZppoCountdown(_Builder):
  """Reach a target from some numbers."""

  name = 'zppo_countdown'
  TASK = 'countdown'
  BUILDER_CONFIGS = _configs(
    tiny={'count': 3, 'largest': 10},
    easy={'count': 3, 'largest': 20},
    medium={'count': 4, 'largest': 50},
    hard={'count': 5, 'largest': 100, 'operators': '+-*/', 'max_target': 1000},
  )


BUILDERS = {'zppo_arith': ZppoArith, 'zppo_modmath': ZppoModmath, 'zppo_countdown': ZppoCountdown}


def _encode(example: Example, distractor: str, index: int) -> dict[str, Any]:
  """An Example as one row of features."""
  return {
    'uid': example.uid,
    'messages': [{'role': m.role, 'content': m.content} for m in example.messages],
    'answer': example.answer,
    'verifier': example.verifier,
    'verifier_args': json.dumps(example.verifier_args, sort_keys=True),
    'meta': json.dumps(example.meta, sort_keys=True),
    'solution': example.solution or '',
    'distractor': distractor,
    'index': index,
  }


def _decode(row: dict[str, Any]) -> Example:
  """The Example of one row; text features read back as bytes."""
  text = {key: row[key].decode() for key in row if key not in ('messages', 'index')}
  turns = row['messages']
  if isinstance(turns, dict):  # tfds gives a dict of lists or a list of dicts, by version
    turns = [dict(zip(turns, values)) for values in zip(*turns.values())]
  return Example(
    uid=text['uid'],
    messages=tuple(Message(t['role'].decode(), t['content'].decode()) for t in turns),
    answer=text['answer'],
    verifier=text['verifier'],
    verifier_args=json.loads(text['verifier_args']),
    meta=json.loads(text['meta']),
    solution=text['solution'] or None,
  )


def builder(dataset: str, data_dir: str | pathlib.Path):
  """The builder of 'zppo_arith' or 'zppo_arith/easy'; ValueError lists the known names."""
  name, _, config = dataset.partition('/')
  if name not in BUILDERS:
    raise common.unknown('dataset', name, list(BUILDERS))
  kind = BUILDERS[name]
  configs = [c.name for c in kind.BUILDER_CONFIGS]
  config = config or configs[0]
  if config not in configs:
    raise common.unknown(f'config of {name}', config, configs)
  return kind(data_dir=str(data_dir), config=config, file_format='array_record')


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """Prepared data as examples, row for row those of the procedural source.

  Errors: ValueError for an unknown name or split, FileNotFoundError with the command that
  prepares the data.
  """

  dataset: str
  data_dir: str
  split: str = 'train'

  def __post_init__(self):
    common.check_split(self.split)
    _ = self._rows  # fails early when nothing is prepared

  @functools.cached_property
  def _rows(self):
    prepared = builder(self.dataset, self.data_dir)
    if not prepared.is_prepared():
      raise FileNotFoundError(
        f'{self.dataset} is not prepared in {self.data_dir}; run: python -m zppo_jax.data.prepare '
        f'--dataset={self.dataset} --data_dir={self.data_dir}'
      )
    return prepared.as_data_source(split=self.split)

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Example:
    return _decode(self._rows[common.check_index(index, len(self))])

  def distractor(self, index: int) -> str:
    """The plausible wrong answer stored with row `index`."""
    return self._rows[common.check_index(index, len(self))]['distractor'].decode()
