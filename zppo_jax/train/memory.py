"""What a program needs of a chip's memory: the compiler's figures, known before it runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per device. `parts` is the share of each role in the arguments, by its shapes."""

  arguments: int
  temporaries: int
  outputs: int
  aliased: int  # outputs that take the place of donated arguments
  parts: dict[str, int]

  @property
  def total(self) -> int:
    return self.arguments + self.temporaries + self.outputs - self.aliased

  def line(self, limit: int | None = None) -> str:
    """One line in GiB; with the device's bytes, whether it fits."""
    parts = ', '.join(f'{k} {v / GIB:.2f}' for k, v in self.parts.items())
    text = (f'arguments {self.arguments / GIB:7.2f} GiB ({parts})  temporaries '
            f'{self.temporaries / GIB:7.2f} GiB  total {self.total / GIB:7.2f} ')
    if limit is None:
      return f'{text}GiB per device'
    short = (self.total - limit) / GIB
    verdict = 'fits' if short <= 0 else f'DOES NOT FIT by {short:.2f} GiB'
    return f'{text}of {limit / GIB:.0f} GiB per device: {verdict}'


def memory_report(compiled: jax.stages.Compiled, parts: Mapping[str, Any]) -> Memory:
  """Of a compiled program; `parts` are arguments by role, arrays or abstract with shardings."""
  found = compiled.memory_analysis()
  return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes,
                found.output_size_in_bytes, found.alias_size_in_bytes,
                {name: per_device(tree) for name, tree in parts.items()})


def per_device(tree) -> int:
  """Bytes that one device holds of a tree with shardings."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(
               x.dtype, jax.dtypes.extended))


def device_limit() -> int | None:
  """Bytes of a device, None where it does not say."""
  return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
