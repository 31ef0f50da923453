"""Examples from a user's own file: jsonl, json array or parquet, also .gz; every row is checked."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

from zppo_jax.core.types import Example
from zppo_jax.data import schemas
from zppo_jax.data.tasks import common

OPTIONS = ('path', 'schema', 'split', 'heldout_percent', 'on_bad_row', 'keep_instruction', 'limit')
SPLITS = ('all', 'train', 'validation')
_SUFFIXES = ('.jsonl', '.ndjson', '.json', '.parquet')
_DETECT_ROWS = 100
_SHOWN_ERRORS = 5


class FileFormatError(ValueError):
  """A file, or some of its rows, cannot be used; the message names file, rows and reasons."""


@dataclasses.dataclass(frozen=True)
class BadRow:
  """A row that was refused: its line (from 1; row number in arrays and parquet) and why."""

  line: int
  reason: str


@dataclasses.dataclass(frozen=True)
class FileSource:
  """The examples of one file; `skipped` are its bad rows, `duplicates` the repeats dropped."""

  path: str
  schema: str
  examples: tuple[Example, ...]
  skipped: tuple[BadRow, ...] = ()
  duplicates: int = 0

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> Example:
    return self.examples[common.check_index(index, len(self))]


Row = tuple[int, dict[str, Any] | BadRow]


def _kind(path: pathlib.Path) -> str:
  """'.jsonl', '.ndjson', '.json' or '.parquet'; FileFormatError for another suffix."""
  suffixes = [s for s in path.suffixes if s != '.gz']
  kind = suffixes[-1].lower() if suffixes else ''
  if kind not in _SUFFIXES:
    raise FileFormatError(f'{path}: suffix must be one of {_SUFFIXES}, with .gz or without')
  return kind


def _check_row(line: int, row: Any) -> Row:
  if not isinstance(row, dict):
    return line, BadRow(line, f'expected an object, found {type(row).__name__}')
  return line, row


def _read_lines(data: bytes) -> Iterator[Row]:
  for line, raw in enumerate(data.split(b'\n'), start=1):
    try:
      if raw.strip():
        yield _check_row(line, json.loads(raw.decode('utf-8-sig' if line == 1 else 'utf-8')))
    except UnicodeDecodeError as error:
      yield line, BadRow(line, f'not UTF-8: {error.reason} at byte {error.start}')
    except json.JSONDecodeError as error:
      yield line, BadRow(line, f'not JSON: {error.msg} at column {error.colno}')


def _read_array(path: pathlib.Path, data: bytes) -> Iterator[Row]:
  try:
    rows = json.loads(data.decode('utf-8-sig'))
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise FileFormatError(f'{path}: not JSON: {error}; one object per line is .jsonl') from error
  if not isinstance(rows, list):
    raise FileFormatError(f'{path}: expected an array of objects, found {type(rows).__name__}')
  for line, row in enumerate(rows, start=1):
    yield _check_row(line, row)


def _read_parquet(path: pathlib.Path) -> Iterator[Row]:
  import pyarrow
  import pyarrow.parquet

  line = 0
  try:
    table = pyarrow.parquet.ParquetFile(path)
    for batch in table.iter_batches(batch_size=1024):
      for row in batch.to_pylist():
        line += 1
        yield line, row
  except (pyarrow.ArrowException, OSError) as error:
    raise FileFormatError(f'{path}: not a parquet file: {error}') from error


def read_rows(path: str | pathlib.Path) -> Iterator[Row]:
  """(line number from 1, row or BadRow) of each row; empty lines are passed over.

  Errors: FileNotFoundError with the expected layouts, FileFormatError for an unreadable file.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: no such file. Expected one of {_SUFFIXES} (or .gz), with rows such as\n'
      f'{schemas.layouts()}'
    )
  kind = _kind(path)
  if kind == '.parquet':
    return _read_parquet(path)
  data = path.read_bytes()
  if path.suffix == '.gz':
    try:
      data = gzip.decompress(data)
    except (OSError, EOFError) as error:
      raise FileFormatError(f'{path}: not a gzip file: {error}') from error
  return _read_array(path, data) if kind == '.json' else _read_lines(data)


def _schema_of(path: str, rows: list[Row], schema: str) -> str:
  """The schema asked for, or the one of the first good rows; errors list the known ones."""
  if schema != 'auto':
    if schema not in schemas.SCHEMAS:
      raise ValueError(f"schema {schema!r} is not 'auto' nor one of {list(schemas.SCHEMAS)}")
    return schema
  good = [row for _, row in rows if isinstance(row, dict)][:_DETECT_ROWS]
  found = schemas.detect(good)
  if found is None:
    fields = sorted(map(str, good[0])) if good else 'no readable row'
    raise FileFormatError(
      f'{path}: no schema fits, found {fields}; expected rows such as\n{schemas.layouts()}'
    )
  return found


def _in_split(question: str, split: str, heldout_percent: int) -> bool:
  heldout = common.content_bucket(question) < heldout_percent
  return split == 'all' or heldout == (split == 'validation')


def _parse_rows(rows: list[Row], name: str, keep_instruction: bool):
  """([(line, question text, Parsed)], [BadRow], number of duplicates dropped)."""
  schema = schemas.SCHEMAS[name]
  parsed, bad, seen, duplicates = [], [], {}, 0
  for line, row in rows:
    if isinstance(row, BadRow):
      bad.append(row)
      continue
    try:
      item = schema.parse(row, keep_instruction)
    except schemas.RowError as error:
      bad.append(BadRow(line, str(error)))
      continue
    question = json.dumps([[m.role, m.content] for m in item.messages])
    first = seen.setdefault(question, line)
    if first == line:
      parsed.append((question, item))
    elif schema.deduplicate:
      duplicates += 1
    else:
      bad.append(BadRow(line, f'same question as line {first}'))
  return parsed, bad, duplicates


def _report(path: str, bad: list[BadRow], on_bad_row: str) -> None:
  shown = '\n'.join(f'  {path}:{row.line}: {row.reason}' for row in bad[:_SHOWN_ERRORS])
  more = f'\n  and {len(bad) - _SHOWN_ERRORS} more' if len(bad) > _SHOWN_ERRORS else ''
  if bad and on_bad_row == 'error':
    raise FileFormatError(
      f"{path}: {len(bad)} bad rows (on_bad_row='skip' leaves them out)\n{shown}{more}"
    )
  if bad:
    logging.getLogger(__name__).warning('skipped %d bad rows\n%s%s', len(bad), shown, more)


def _example(question: str, item: schemas.Parsed, task: str, split: str) -> Example:
  meta = {'task': task, 'split': split} | item.meta
  return Example(
    uid=common.content_uid(task, split, [question, item.answer]),
    messages=item.messages,
    answer=item.answer,
    verifier=item.verifier,
    meta=meta,
    solution=item.solution,
  )


def load_file(
  path: str | pathlib.Path,
  schema: str = 'auto',
  *,
  split: str = 'all',
  heldout_percent: int = 10,
  on_bad_row: str = 'error',
  keep_instruction: bool = True,
  limit: int | None = None,
) -> FileSource:
  """A file as a source; 'train' and 'validation' are told apart by the hash of the question.

  `schema` is 'auto', 'gsm8k', 'math', 'dapo' or 'plain'; `keep_instruction=False` cuts the
  instructions that DAPO wraps around a problem; `limit` keeps the first examples of the split.
  Errors: FileNotFoundError and FileFormatError with file, line and reason of the bad rows, or
  `.skipped` holds them under on_bad_row='skip'; ValueError for an option outside its choices.
  """
  common.check_split(split, SPLITS)
  if on_bad_row not in ('error', 'skip'):
    raise ValueError(f"on_bad_row {on_bad_row!r} must be 'error' or 'skip'")
  if not 1 <= heldout_percent <= 99:
    raise ValueError(f'heldout_percent {heldout_percent} must be in 1..99')
  if limit is not None and limit < 1:
    raise ValueError(f'limit {limit} must be at least 1')
  shown = str(path)
  rows = list(read_rows(path))
  name = _schema_of(shown, rows, schema)
  parsed, bad, duplicates = _parse_rows(rows, name, keep_instruction)
  _report(shown, bad, on_bad_row)
  chosen = [pair for pair in parsed if _in_split(pair[0], split, heldout_percent)][:limit]
  if not chosen:
    raise FileFormatError(
      f'{shown}: no example in split {split!r} (rows {len(rows)}, bad {len(bad)})'
    )
  examples = tuple(_example(question, item, f'file/{name}', split) for question, item in chosen)
  return FileSource(shown, name, examples, tuple(bad), duplicates)
