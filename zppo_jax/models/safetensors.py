"""Files of the safetensors format as mapped views, and back: 8 bytes of header length (little
endian), a JSON header {name: {dtype, shape, data_offsets}}, the data.

The public package reads bfloat16 only into other frameworks' arrays and copies what it reads; views
let a sharded load touch just the bytes of its shards.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from zppo_jax.core.errors import UserError

DTYPES = {'F64': np.dtype('float64'), 'F32': np.dtype('float32'), 'F16': np.dtype('float16'),
          'BF16': np.dtype(ml_dtypes.bfloat16), 'I64': np.dtype('int64'), 'I32': np.dtype('int32'),
          'U8': np.dtype('uint8'), 'BOOL': np.dtype('bool')}
NAMES = {v: k for k, v in DTYPES.items()}
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor stands."""

  file: str
  dtype: str
  shape: tuple[int, ...]
  start: int  # bytes from the beginning of the file
  stop: int

  def read(self) -> np.ndarray:
    """A view of the mapped file; bytes are read when they are used."""
    return _mapped(self.file)[self.start:self.stop].view(DTYPES[self.dtype]).reshape(self.shape)


@functools.lru_cache(maxsize=256)
def _mapped(file: str) -> np.ndarray:
  return np.memmap(file, np.uint8, mode='r')


def open_folder(path: str) -> dict[str, Tensor]:
  """All tensors of a checkpoint folder, one file or many. Raises UserError listing every fault."""
  index = os.path.join(path, INDEX)
  _mapped.cache_clear()  # a file of this name may be another one by now
  if not os.path.exists(index):
    single = os.path.join(path, SINGLE)
    if not os.path.exists(single):
      raise UserError(f'model: {path!r} has neither {SINGLE} nor {INDEX}')
    return _checked(path, {single: header(single)}, None)
  with open(index, encoding='utf-8') as f:
    placed = json.load(f)['weight_map']
  files = {name: os.path.join(path, name) for name in sorted(set(placed.values()))}
  absent = [n for n, file in files.items() if not os.path.exists(file)]
  if absent:
    raise UserError(f'model: {index} names files that are not there: {absent}')
  return _checked(path, {file: header(file) for file in files.values()}, placed)


def _checked(path: str, found: Mapping[str, dict[str, Tensor]],
             placed: Mapping[str, str] | None) -> dict[str, Tensor]:
  count = collections.Counter(name for tensors in found.values() for name in tensors)
  faults = [f'{name}: in {n} files' for name, n in count.items() if n > 1]
  tensors = {name: t for part in found.values() for name, t in part.items()}
  for name, file in (placed or {}).items():
    if name not in found[os.path.join(path, file)]:
      faults.append(f'{name}: not in {file}, where the index has it')
  for name, t in tensors.items():
    if t.dtype not in DTYPES:
      faults.append(f'{name}: dtype {t.dtype} is not supported')
  if faults:
    raise UserError(f'model: {path}: ' + '; '.join(sorted(faults)))
  return tensors


def header(file: str) -> dict[str, Tensor]:
  """Tensors of one file. Raises UserError on a file that is cut, or whose offsets do not fit."""
  size = os.path.getsize(file)
  with open(file, 'rb') as f:
    length = int.from_bytes(f.read(8), 'little')
    if size < 8 or length > size - 8:
      raise UserError(f'model: {file}: header of {length} bytes in a file of {size}: truncated?')
    try:
      entries = json.loads(f.read(length))
    except ValueError as error:
      raise UserError(f'model: {file}: the header is not JSON: {error}') from error
  entries.pop('__metadata__', None)
  found, begin, faults, at = {}, 8 + length, [], 0
  for name, e in sorted(entries.items(), key=lambda item: item[1]['data_offsets']):
    start, stop = e['data_offsets']
    wanted = DTYPES[e['dtype']].itemsize * math.prod(e['shape']) if e['dtype'] in DTYPES else None
    if start < at or (wanted is not None and stop - start != wanted):
      faults.append(f'{name}: bytes {start}..{stop} overlap others or do not hold {e["dtype"]}'
                    f'{e["shape"]}')
    if begin + stop > size:
      faults.append(f'{name}: ends at byte {begin + stop} of a file of {size}: truncated')
    at = stop
    found[name] = Tensor(file, e['dtype'], tuple(e['shape']), begin + start, begin + stop)
  if faults:
    raise UserError(f'model: {file}: ' + '; '.join(faults))
  return found


@dataclasses.dataclass(frozen=True)
class Planned:
  """A tensor to be written; `make` is called once, when its turn comes."""

  dtype: str
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    return DTYPES[self.dtype].itemsize * math.prod(self.shape)


def write_folder(path: str, tensors: Mapping[str, Planned]) -> None:
  """Writes one file, or numbered ones of at most SHARD_BYTES with their index."""
  parts: list[dict[str, Planned]] = [{}]
  for name, t in tensors.items():
    if parts[-1] and sum(x.size for x in parts[-1].values()) + t.size > SHARD_BYTES:
      parts.append({})
    parts[-1][name] = t
  if len(parts) == 1:
    return write_file(os.path.join(path, SINGLE), parts[0])
  files = [f'model-{n + 1:05d}-of-{len(parts):05d}.safetensors' for n in range(len(parts))]
  for file, part in zip(files, parts):
    write_file(os.path.join(path, file), part)
  index = {'metadata': {'total_size': sum(t.size for t in tensors.values())},
           'weight_map': {name: file for file, part in zip(files, parts) for name in part}}
  with open(os.path.join(path, INDEX), 'w', encoding='utf-8') as f:
    json.dump(index, f, indent=2)
  return None


def write_file(file: str, tensors: Mapping[str, Planned]) -> None:
  """One file with the header that older readers want too."""
  entries, at = {'__metadata__': {'format': 'pt'}}, 0
  for name, t in tensors.items():
    entries[name] = dict(dtype=t.dtype, shape=list(t.shape), data_offsets=[at, at + t.size])
    at += t.size
  text = json.dumps(entries, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with open(file, 'wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    for name, t in tensors.items():
      made = np.ascontiguousarray(np.asarray(t.make()).astype(DTYPES[t.dtype]))
      if made.shape != t.shape:
        raise ValueError(f'{name}: made {made.shape}, planned {t.shape}')
      f.write(made.reshape(-1).view(np.uint8).data)
