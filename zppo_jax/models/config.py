"""The record of architectural choices: scalars and tuples only, hashable, static under jit."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder. `mixers` is the repeated pattern of token mixers, scanned layers/len(mixers) times.

  `vocab` counts the rows of the embedding; ids from `num_valid` up are padding and never sampled.
  """

  vocab: int
  hidden: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  inter: int  # width of the SwiGLU branch
  num_valid: int | None = None
  mixers: tuple[str, ...] = ('full',)
  qk_norm: bool = True
  rope_theta: float = 1e6
  norm_eps: float = 1e-6
  tied: bool = True
  dtype: str = 'float32'  # activations
  param_dtype: str = 'float32'
  remat: bool = False  # recompute each block in the backward pass
  unroll: int = 1  # repeated blocks per loop iteration; a small model on a CPU wants all
  query_chunk: int = 1024  # attention over longer queries goes block by block
  context: int = 32768  # largest number of tokens in a row

  @property
  def repeats(self) -> int:
    return self.layers // len(self.mixers)


def problems(config: ModelConfig) -> list[str]:
  """Everything that is wrong with a config, as 'field: reason' lines."""
  found = []
  for name in ('vocab', 'hidden', 'layers', 'heads', 'kv_heads', 'head_dim', 'inter'):
    if getattr(config, name) < 1:
      found.append(f'{name}: must be at least 1, got {getattr(config, name)}')
  if not found and config.heads % config.kv_heads:
    found.append(f'heads: must be a multiple of kv_heads = {config.kv_heads}, got {config.heads}')
  if not config.mixers or config.layers % len(config.mixers):
    found.append(f'layers: must be a multiple of len(mixers) = {len(config.mixers)}, '
                 f'got {config.layers}')
  if config.head_dim % 2:
    found.append(f'head_dim: must be even for rotary positions, got {config.head_dim}')
  if config.num_valid is not None and not 0 < config.num_valid <= config.vocab:
    found.append(f'num_valid: must lie in 1..vocab = {config.vocab}, got {config.num_valid}')
  return found
