"""The record of architectural choices: scalars and tuples only, hashable, static under jit."""

from __future__ import annotations

import dataclasses

DELTA_KINDS = ('gdn', 'kda', 'fg2_gdn', 'fg2_gdn_plus')  # mixers by the delta rule


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
  linear_heads: int = 0  # of queries and keys in linear-attention mixers
  linear_value_heads: int = 0  # a multiple of linear_heads
  linear_key_dim: int = 0
  linear_value_dim: int = 0
  linear_conv: int = 4  # width of the short convolution
  linear_rank: int = 0  # of the vector rates; 0 = linear_key_dim
  linear_negative: bool = False  # rates up to 2: eigenvalues in [-1, 1]
  linear_kernel: str | None = None  # implementation of the delta rule; None = fastest that runs

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
  if set(config.mixers) - {'full'}:
    found += _linear_problems(config)
  return found


def _linear_problems(c: ModelConfig) -> list[str]:
  found = []
  for name in ('linear_heads', 'linear_value_heads', 'linear_key_dim', 'linear_value_dim'):
    if getattr(c, name) < 1:
      found.append(f'{name}: must be at least 1 with mixers {c.mixers}, got {getattr(c, name)}')
  if not found and c.linear_value_heads % c.linear_heads:
    found.append(f'linear_value_heads: must be a multiple of linear_heads = {c.linear_heads}, '
                 f'got {c.linear_value_heads}')
  if c.linear_conv < 2:
    found.append(f'linear_conv: must be at least 2, got {c.linear_conv}')
  if 'fg2_gdn' in c.mixers and c.linear_value_dim != c.linear_key_dim:
    found.append(f'linear_value_dim: must equal linear_key_dim = {c.linear_key_dim} for fg2_gdn '
                 f'(one rate for both; fg2_gdn_plus has two), got {c.linear_value_dim}')
  return found
