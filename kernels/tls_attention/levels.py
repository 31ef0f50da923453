"""What every implementation shares: choice of blocks, scores over heads, choice of tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels.tls_attention import select
from kernels.tls_attention.config import NONE, Array, Config, Summary, per_row


def grouped(q: Array, heads: int) -> Array:
  """f32[B, HK, G, D] of queries [B, HQ, D]."""
  return q.astype(jnp.float32).reshape(q.shape[0], heads, -1, q.shape[-1])


def label_query(q: Array, channels: Array) -> Array:
  """The channels of queries [B, HQ, D] that labels hold, f32[B, HK, G, R]."""
  grouped_q = grouped(q, channels.shape[-2])
  return jnp.take_along_axis(grouped_q, per_row(channels)[:, :, None], axis=3)


def block_scores(q: Array, summary: Summary, length: Array, config: Config) -> Array:
  """Largest possible q . k in each block over the query heads of a key head, f32[B, HK, NB].

  max(q, 0) . high + min(q, 0) . low, one product of width 2 D; -inf behind length[b] keys.
  arXiv 2406.10774 in the form of 2604.07815.
  """
  heads, blocks = summary.bounds.shape[1:3]
  query = grouped(q, heads)
  both = jnp.concatenate([jnp.maximum(query, 0), jnp.minimum(query, 0)], axis=-1)
  used = jnp.arange(blocks)[None] * config.block < length[:, None]
  scores = jnp.max(jnp.einsum(
    'bhnd,bhgd->bhng', summary.bounds.astype(jnp.float32), both,
    precision=lax.Precision.HIGHEST), axis=3)
  return jnp.where(used[:, None], scores, -jnp.inf)


def choose_blocks(scores: Array, length: Array, config: Config) -> Array:
  """Blocks to look into, i32[B, HK, top_blocks] in rising order, NONE behind them.

  The sinks and the block of the last token are always among them, and, where the choice is for the
  next query, the block that its token will be in.
  """
  number, last = jnp.arange(scores.shape[-1])[None], (length - 1)[:, None] // config.block
  always = (number < config.sink_blocks) & (number <= last) | (number == last)
  if config.stale:
    always |= number == length[:, None] // config.block
  found = select.top(jnp.where(always[:, None], jnp.inf, scores), config.top_blocks)
  return jnp.where(found < scores.shape[-1], found, NONE)


def token_positions(candidates: Array, length: Array, config: Config) -> tuple[Array, Array]:
  """(token numbers i32[B, HK, C], which of them exist) of candidate blocks, in their order."""
  at = candidates[..., None] * config.block + jnp.arange(config.block)
  at = at.reshape(*candidates.shape[:2], -1)
  return at, at < length[:, None, None]


def reduce_heads(scores: Array, real: Array, config: Config) -> Array:
  """How much a token may matter to any query head of its key head, f32[B, HK, C]; -inf = not there.

  The largest over the heads of softmax(scores) over the candidates, or of the scores themselves;
  scores f32[B, HK, G, C], real bool[B, HK, C].
  """
  found = jnp.where(real[:, :, None], scores, -jnp.inf)
  if config.reduce == 'softmax_max':
    found = jax.nn.log_softmax(found, axis=-1)  # the same order, and no underflow
  return jnp.where(real, jnp.max(found, axis=2), -jnp.inf)


def choose_tokens(scores: Array, pages: Array, config: Config) -> tuple[Array, Array]:
  """(rows of the cache i32[B, HK, top_tokens] in the order of the pages, which of them count).

  scores f32[B, HK, C] of the tokens of pages i32[B, HK, C / block]: candidate blocks of a whole
  cache, or the slots of a pool that hold them.
  """
  found = select.top(scores, config.top_tokens)
  inside = jnp.minimum(found, scores.shape[-1] - 1)
  rows = pages[..., None] * config.block + jnp.arange(config.block)
  rows = jnp.take_along_axis(rows.reshape(scores.shape), inside, axis=-1)
  return jnp.where(found < scores.shape[-1], rows, 0), found < scores.shape[-1]
