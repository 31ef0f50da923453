"""Other ways to spend the same budget of tokens, in the shape of the second level's choice.

Each returns (token numbers i32[B, HK, top_tokens], which of them count) for
`chunked.attend_rows`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kernels.tls_attention import chunked, levels
from kernels.tls_attention.config import Array, Config, Labels, Summary


def block_only(q: Array, summary: Summary, length: Array, config: Config) -> tuple[Array, Array]:
  """Whole blocks by their bounds, top_tokens / block of them. arXiv 2406.10774."""
  own = dataclasses.replace(config, top_blocks=config.top_tokens // config.block, stale=False)
  chosen = levels.choose_blocks(levels.block_scores(q, summary, length, own), length, own)
  at, real = levels.token_positions(chosen, length, own)
  return jnp.where(real, at, 0), real


def token_only(q: Array, labels: Labels, channels: Array, length: Array, config: Config,
               scale: float) -> tuple[Array, Array]:
  """Tokens by their labels, over the whole cache. arXiv 2408.07092."""
  rows, heads, _, room = labels.codes.shape
  blocks = room // config.block
  every = jnp.broadcast_to(jnp.arange(blocks), (rows, heads, blocks))
  own = dataclasses.replace(config, top_blocks=blocks)
  scores = chunked.token_scores(q, labels, channels, every, length, own, scale)
  return levels.choose_tokens(scores, every, own)


def window(length: Array, heads: int, config: Config) -> tuple[Array, Array]:
  """The sink blocks and the newest tokens. arXiv 2309.17453."""
  sinks = config.sink_blocks * config.block
  number = jnp.arange(config.top_tokens)[None]
  recent = jnp.maximum(sinks, length[:, None] - (config.top_tokens - sinks)) + number - sinks
  at = jnp.where(number < sinks, number, recent)
  real = at < length[:, None]
  wide = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], heads, x.shape[1]))
  return wide(jnp.where(real, at, 0)), wide(real)
