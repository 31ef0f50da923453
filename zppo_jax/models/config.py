"""The record of architectural choices: scalars and tuples only, hashable, static under jit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kernels import tls_attention as tls
from zppo_jax.models.stages import Slot, Stage, find_stages

DELTA_KINDS = ('gdn', 'kda', 'fg2_gdn', 'fg2_gdn_plus')  # mixers by the delta rule
ATTENTION_KINDS = ('full', 'sliding')
MLPS = ('dense', 'moe')
# What is computed again: nothing; all but the input of a block; all but products with weights.
REMAT = ('none', 'full', 'dots')


@dataclasses.dataclass(frozen=True)
class Rope:
  """How rotary frequencies are stretched: kind is linear, llama3 or yarn."""

  kind: str
  factor: float
  original: int = 0  # context of the pretraining
  low: float = 1.0  # llama3
  high: float = 4.0
  beta_fast: float = 32.0  # yarn
  beta_slow: float = 1.0
  attention: float | None = None  # factor of sin and cos; None = 0.1 ln(factor) + 1
  scores: float = 1.0  # yarn of MLA: factor of the scores, 0.1 m ln(factor) + 1, squared


@dataclasses.dataclass(frozen=True)
class Mla:
  """Attention through a shared latent, arXiv 2405.04434."""

  rank: int  # of keys and values
  nope: int  # features of a head without position
  rope: int  # features of a head with position
  value: int
  query_rank: int = 0  # 0 = queries are projected directly
  pairs: str = 'interleaved'  # how features are rotated: interleaved, half, or none (no position)


@dataclasses.dataclass(frozen=True)
class Moe:
  """A mixture of SwiGLU experts."""

  experts: int
  top_k: int
  inter: int
  score: str = 'softmax'  # or sigmoid
  renormalise: bool = True
  scale: float = 1.0  # of the chosen weights
  bias: bool = False  # a correction that selects and does not weigh
  groups: int = 1
  top_groups: int = 1
  shared: int = 0  # width of the expert that all tokens take
  shared_gate: bool = False


@dataclasses.dataclass(frozen=True)
class Sparse:
  """Decoding at a fixed budget of keys, in full and latent attention (arXiv 2604.07815).

  Labels hold the channels that weigh most in their own row. With a pool the keys lie in host memory
  and a row of each key head has that many blocks on the device; `misses` of them come in at a step.
  """

  kernel: tls.Config = tls.Config()
  labels: int = 32  # channels of a label
  pool: int = 0  # blocks; 0 = all keys stay on the device
  misses: int = 8
  implementation: str | None = None  # None = fastest that runs


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder. `mixers` and `mlps` are patterns, repeated over the layers.

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
  mlps: tuple[str, ...] = ('dense',)
  qk_norm: bool = True
  rope_theta: float = 1e6
  rope_dim: int = 0  # rotated features of a head; 0 = all
  rope: Rope | None = None
  norm_eps: float = 1e-6
  norm: str = 'weight'  # or one_plus: the weight is an offset from 1
  sandwich: bool = False  # norms behind the branches too
  act: str = 'silu'  # or gelu_tanh
  attn_gate: bool = False  # a sigmoid gate on what attention read
  attn_scale: float | None = None  # of the scores; None = head_dim ** -0.5
  attn_cap: float | None = None  # soft cap of the scores
  attn_kernel: str | None = None  # implementation of attention; None = fastest that runs
  sparse: Sparse | None = None  # how tokens are drawn; training and scoring see all keys
  logit_cap: float | None = None
  window: int = 0  # keys that a sliding layer sees, its own included
  embed_scale: float = 1.0
  tied: bool = True
  mla: Mla | None = None
  moe: Moe | None = None
  dtype: str = 'float32'  # activations
  param_dtype: str = 'float32'
  remat: str = 'none'  # what a block keeps for the backward pass: none (all), full, dots
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
  family: str = ''  # model_type of the checkpoint: names of tensors, never read by the forward

  @property
  def kinds(self) -> tuple[tuple[str, str], ...]:
    """(mixer, mlp) of every layer."""
    return tuple((self.mixers[i % len(self.mixers)], self.mlps[i % len(self.mlps)])
                 for i in range(self.layers))

  @property
  def stages(self) -> tuple[Stage, ...]:
    """The layers as runs of repeated patterns."""
    return find_stages(self.kinds)

  @property
  def slots(self) -> tuple[Slot, ...]:
    """One entry per stack of equal layers: the order of parameters and caches."""
    return tuple(slot for stage in self.stages for slot in stage.slots)

  @property
  def pooled(self) -> bool:
    """Whether keys of drawn tokens lie in host memory, behind a pool."""
    return self.sparse is not None and self.sparse.pool > 0

  @property
  def rotary_sizes(self) -> tuple[int, ...]:
    """Numbers of features that rotary positions turn in some layer."""
    found = set()
    if {'full', 'sliding'} & set(self.mixers):
      found.add(self.rope_dim or self.head_dim)
    if 'mla' in self.mixers and self.mla.pairs != 'none':
      found.add(self.mla.rope)
    return tuple(sorted(found))

  def place_of(self, layer: int) -> tuple[int, int]:
    """(index in `slots`, index in its stack) of a layer."""
    return next((n, slot.layers.index(layer)) for n, slot in enumerate(self.slots)
                if layer in slot.layers)


def from_dict(fields: Mapping[str, Any]) -> ModelConfig:
  """The config that `dataclasses.asdict` described, as JSON gives it back."""
  fields = dict(fields)
  for name, record in (('rope', Rope), ('mla', Mla), ('moe', Moe), ('sparse', Sparse)):
    if fields.get(name) is not None:
      fields[name] = record(**fields[name])
  if fields.get('sparse') is not None:
    fields['sparse'] = dataclasses.replace(
      fields['sparse'], kernel=tls.Config(**fields['sparse'].kernel))
  for name in ('mixers', 'mlps'):
    if name in fields:
      fields[name] = tuple(fields[name])
  return ModelConfig(**fields)


def problems(config: ModelConfig) -> list[str]:
  """Everything that is wrong with a config, as 'field: reason' lines."""
  found = []
  for name in ('vocab', 'hidden', 'layers', 'heads', 'kv_heads', 'head_dim', 'inter'):
    if getattr(config, name) < 1:
      found.append(f'{name}: must be at least 1, got {getattr(config, name)}')
  if not found and config.heads % config.kv_heads:
    found.append(f'heads: must be a multiple of kv_heads = {config.kv_heads}, got {config.heads}')
  for name in ('mixers', 'mlps'):
    pattern = getattr(config, name)
    if not pattern or config.layers % len(pattern):
      found.append(f'layers: must be a multiple of len({name}) = {len(pattern)}, '
                   f'got {config.layers}')
  rotary = config.rope_dim or config.head_dim
  if rotary % 2 or rotary > config.head_dim:
    name = 'rope_dim' if config.rope_dim else 'head_dim'
    found.append(f'{name}: must be even and at most head_dim = {config.head_dim} for rotary '
                 f'positions, got {rotary}')
  if config.num_valid is not None and not 0 < config.num_valid <= config.vocab:
    found.append(f'num_valid: must lie in 1..vocab = {config.vocab}, got {config.num_valid}')
  for name, allowed in (('norm', ('weight', 'one_plus')), ('act', ('silu', 'gelu_tanh')),
                        ('remat', REMAT)):
    if getattr(config, name) not in allowed:
      found.append(f'{name}: must be one of {allowed}, got {getattr(config, name)!r}')
  if 'sliding' in config.mixers and config.window < 1:
    found.append(f'window: must be at least 1 with sliding layers, got {config.window}')
  if set(config.mixers) & set(DELTA_KINDS):
    found += _linear_problems(config)
  return found + _mla_problems(config) + _moe_problems(config) + _sparse_problems(config)


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


def _mla_problems(c: ModelConfig) -> list[str]:
  if 'mla' not in c.mixers:
    return []
  if c.mla is None:
    return ['mla: must be given with mla layers, got None']
  found = [f'mla.{name}: must be at least 1, got {getattr(c.mla, name)}'
           for name in ('rank', 'nope', 'rope', 'value') if getattr(c.mla, name) < 1]
  if c.mla.rope % 2:
    found.append(f'mla.rope: must be even, got {c.mla.rope}')
  if c.mla.pairs not in ('interleaved', 'half', 'none'):
    found.append(f"mla.pairs: must be interleaved, half or none, got {c.mla.pairs!r}")
  return found


def _sparse_problems(c: ModelConfig) -> list[str]:
  if c.sparse is None:
    return []
  lines = (line.split(' ', 1) for line in tls.problems(c.sparse.kernel))
  found = [f'sparse.{name}: {reason}' for name, reason in lines]
  widths = ({c.head_dim} if 'full' in c.mixers else set()) | (
    {c.mla.rank + c.mla.rope} if 'mla' in c.mixers and c.mla else set())
  if not widths:
    found.append(f'sparse: needs full or mla layers, got {sorted(set(c.mixers))}')
  elif c.sparse.labels % 2 or not 2 <= c.sparse.labels <= min(widths):
    found.append(f'sparse.labels: must be even and in 2..{min(widths)}, the width of a key, '
                 f'got {c.sparse.labels}')
  if c.sparse.pool:
    lines = tls.pool.problems(c.sparse.kernel, c.sparse.pool, c.sparse.misses)
    names = {'slots': 'pool', 'misses': 'misses'}
    found += [f'sparse.{names[name]}: {reason}'
              for name, reason in (line.split(' ', 1) for line in lines)]
  if c.attn_cap is not None:
    found.append(f'sparse: scores have no soft cap, got attn_cap = {c.attn_cap}')
  return found


def _moe_problems(c: ModelConfig) -> list[str]:
  unknown = sorted(set(c.mlps) - set(MLPS))
  if unknown:
    return [f'mlps: unknown {unknown}; known: {sorted(MLPS)}']
  if 'moe' not in c.mlps:
    return []
  if c.moe is None:
    return ['moe: must be given with moe layers, got None']
  m, found = c.moe, []
  if not 1 <= m.top_k <= m.experts:
    found.append(f'moe.top_k: must lie in 1..experts = {m.experts}, got {m.top_k}')
  if m.inter < 1:
    found.append(f'moe.inter: must be at least 1, got {m.inter}')
  if m.groups < 1 or m.experts % m.groups:
    found.append(f'moe.groups: must divide experts = {m.experts}, got {m.groups}')
  elif not 1 <= m.top_groups <= m.groups or m.top_groups * (m.experts // m.groups) < m.top_k:
    found.append(f'moe.top_groups: must lie in 1..groups = {m.groups} and hold top_k = {m.top_k} '
                 f'experts, got {m.top_groups}')
  if m.score not in ('softmax', 'sigmoid'):
    found.append(f"moe.score: must be softmax or sigmoid, got {m.score!r}")
  return found
