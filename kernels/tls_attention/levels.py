"""The three levels as XLA operations: bounds of blocks, labels of tokens, exact attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels.tls_attention import select
from kernels.tls_attention.config import Array, Config, Labels, Summary


def _grouped(q: Array, heads: int) -> Array:
  """f32[B, HK, G, D] of queries [B, HQ, D]."""
  return q.astype(jnp.float32).reshape(q.shape[0], heads, -1, q.shape[-1])


def block_scores(q: Array, summary: Summary, length: Array, config: Config) -> Array:
  """Largest possible q . k in each block over the query heads of a key head, f32[B, HK, NB].

  max(q, 0) . high + min(q, 0) . low, one product of width 2 D; -inf behind length[b] keys.
  arXiv 2406.10774 in the form of 2604.07815.
  """
  heads, blocks = summary.bounds.shape[1:3]
  query = _grouped(q, heads)
  both = jnp.concatenate([jnp.maximum(query, 0), jnp.minimum(query, 0)], axis=-1)
  used = jnp.arange(blocks)[None] * config.block < length[:, None]
  scores = jnp.max(jnp.einsum(
    'bhgd,bhnd->bhgn', both, summary.bounds.astype(jnp.float32),
    precision=lax.Precision.HIGHEST), axis=2)
  return jnp.where(used[:, None], scores, -jnp.inf)


def choose_blocks(scores: Array, length: Array, config: Config) -> Array:
  """Blocks to look into, i32[B, HK, top_blocks] in rising order, NB = none.

  The sinks and the block of the last token are always among them, and, where the choice is for the
  next query, the block that its token will be in.
  """
  number, last = jnp.arange(scores.shape[-1])[None], (length - 1)[:, None] // config.block
  always = (number < config.sink_blocks) & (number <= last) | (number == last)
  if config.stale:
    always |= number == length[:, None] // config.block
  return select.top(jnp.where(always[:, None], jnp.inf, scores), config.top_blocks)


def token_positions(candidates: Array, length: Array, config: Config) -> tuple[Array, Array]:
  """(token numbers i32[B, HK, C], which of them exist) of candidate blocks, in their order."""
  at = candidates[..., None] * config.block + jnp.arange(config.block)
  at = at.reshape(*candidates.shape[:2], -1)
  return at, at < length[:, None, None]


def token_scores(q: Array, labels: Labels, channels: Array, candidates: Array, length: Array,
                 config: Config, scale: float) -> Array:
  """How much each token of the candidate blocks may matter, f32[B, HK, C]; -inf = not there.

  a = scale q[channels] . label, at 4 bits; then the largest over the query heads of softmax(a) over
  the candidates, or of a itself. arXiv 2408.07092.
  """
  rows, heads, half, room = labels.codes.shape
  blocks = room // config.block
  picked = jnp.take_along_axis(_grouped(q, heads), channels[None, :, None], axis=3) * scale
  index = jnp.minimum(candidates, blocks - 1)

  def cut(x):  # the candidate blocks of [B, HK, ..., N], tokens last
    inner = x.reshape(*x.shape[:-1], blocks, config.block)
    wide = index.reshape(rows, heads, *(1,) * (x.ndim - 3), -1, 1)
    return jnp.take_along_axis(inner, wide, axis=-2).reshape(*x.shape[:-1], -1)

  codes = cut(labels.codes)
  low, high = (x.astype(jnp.float32) for x in (codes & 15, codes >> 4))
  product = jnp.einsum('bhgc,bhcn->bhgn', picked, jnp.concatenate([low, high], axis=2),
                       precision=lax.Precision.HIGHEST)
  found = (product * cut(labels.scale)[:, :, None]
           + jnp.sum(picked, axis=-1, keepdims=True) * cut(labels.zero)[:, :, None])
  _, real = token_positions(candidates, length, config)
  found = jnp.where(real[:, :, None], found, -jnp.inf)
  if config.reduce == 'softmax_max':
    found = jax.nn.log_softmax(found, axis=-1)  # the same order, and no underflow
  return jnp.where(real, jnp.max(found, axis=2), -jnp.inf)


def choose_tokens(scores: Array, candidates: Array, length: Array, config: Config
                  ) -> tuple[Array, Array]:
  """(token numbers i32[B, HK, top_tokens] in rising order, which of them count)."""
  found = select.top(scores, config.top_tokens)
  at, _ = token_positions(candidates, length, config)
  count = scores.shape[-1]
  chosen = jnp.take_along_axis(at, jnp.minimum(found, count - 1), axis=-1)
  return jnp.where(found < count, chosen, 0), found < count


def attend(q: Array, key: Array, value: Array, at: Array, valid: Array, scale: float) -> Array:
  """Softmax attention of [B, HQ, D] over the tokens at[b, h], [B, HQ, V] in the dtype of value.

  A row without tokens gives 0.
  """
  heads = key.shape[1]
  query = _grouped(q, heads)
  rows = lambda x: jnp.take_along_axis(x, at[..., None], axis=2)
  chosen = rows(key)
  logits = scale * jnp.einsum('bhgd,bhnd->bhgn', query.astype(chosen.dtype), chosen,
                              preferred_element_type=jnp.float32)
  logits = jnp.where(valid[:, :, None], logits, -jnp.inf)
  top = jnp.max(logits, axis=-1, keepdims=True)
  weight = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0))
  total = jnp.sum(weight, axis=-1)
  out = jnp.einsum('bhgn,bhnv->bhgv', weight.astype(value.dtype), rows(value),
                   preferred_element_type=jnp.float32)
  out = out / jnp.where(total > 0, total, 1)[..., None]
  return out.reshape(q.shape[0], q.shape[1], -1).astype(value.dtype)
