"""Writes procedural data sets as ArrayRecord files.

Usage: python -m zppo_jax.data.prepare --dataset=zppo_arith/easy --data_dir=DIR
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import app, flags, logging


def define_flags() -> None:
  """Defines the flags of this command; importing the module defines none."""
  flags.DEFINE_list(
    'dataset', None, 'Names such as zppo_arith or zppo_modmath/hard, separated by commas.'
  )
  flags.DEFINE_string('data_dir', None, 'Folder for the prepared data.')
  flags.mark_flags_as_required(['dataset', 'data_dir'])


def prepare(dataset: str, data_dir: str) -> dict[str, int]:
  """Prepares one data set unless it is there already; returns examples per split."""
  from zppo_jax.data import tfds_builders

  builder = tfds_builders.builder(dataset, data_dir)
  builder.download_and_prepare()
  return {name: split.num_examples for name, split in builder.info.splits.items()}


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  data_dir = flags.FLAGS.data_dir
  for dataset in flags.FLAGS.dataset:
    logging.info('%s in %s: %s', dataset, data_dir, prepare(dataset, data_dir))


if __name__ == '__main__':
  define_flags()
  app.run(main)
