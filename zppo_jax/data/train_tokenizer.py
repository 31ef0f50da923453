"""Trains a SentencePiece model on the text of the generators, or of a file.

Usage: python -m zppo_jax.data.train_tokenizer --out=tok.model [--path=FILE.jsonl] --vocab_size=1024
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence

from absl import app, flags, logging


def define_flags() -> None:
  """Defines the flags of this command; importing the module defines none."""
  flags.DEFINE_string('out', None, 'Where to write the model.')
  flags.DEFINE_string('path', None, 'Questions to train on; default: the generators.')
  flags.DEFINE_string('schema', 'auto', 'Schema of --path.')
  flags.DEFINE_integer('vocab_size', 1024, 'Pieces, 256 bytes and specials included.')
  flags.DEFINE_integer('num_examples', 2000, 'Examples of each generator, without --path.')
  flags.mark_flags_as_required(['out'])


def texts_of(source) -> Iterator[str]:
  """Every message, solution and answer of a source."""
  for i in range(len(source)):
    example = source[i]
    yield from (m.content for m in example.messages)
    yield example.solution or example.answer


def generator_texts(num_examples: int) -> Iterator[str]:
  """Text of every procedural task at its default configuration."""
  from zppo_jax.data.tasks import sources

  for name in sources.TASKS:
    yield from texts_of(sources.build_task(name, size=num_examples))


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  from zppo_jax.data import files, subwords

  options = flags.FLAGS
  if options.path:
    texts = texts_of(files.load_file(options.path, schema=options.schema))
  else:
    texts = generator_texts(options.num_examples)
  model = subwords.train_sentencepiece(texts, vocab_size=options.vocab_size)
  out = pathlib.Path(options.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_bytes(model)
  tokenizer = subwords.SentencePieceTokenizer(model)
  logging.info('%s: %d pieces, %d bytes', out, tokenizer.vocab_size, len(model))


if __name__ == '__main__':
  define_flags()
  app.run(main)
