"""Levels two and three as XLA operations: scores of tokens by their labels, exact attention."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from kernels.tls_attention import levels
from kernels.tls_attention.config import Array, Config, Labels


def token_scores(q: Array, labels: Labels, channels: Array, candidates: Array, length: Array,
                 config: Config, scale: float) -> Array:
  """How much each token of the candidate blocks may matter, f32[B, HK, C]; -inf = not there.

  a = scale q[channels] . label, at 4 bits, reduced over the query heads. arXiv 2408.07092.
  """
  rows, heads, _, room = labels.codes.shape
  blocks = room // config.block
  picked = levels.label_query(q, channels) * scale
  index = jnp.minimum(candidates, blocks - 1)

  def cut(x):  # the candidate blocks of [B, HK, ..., N], tokens last
    inner = x.reshape(*x.shape[:-1], blocks, -1)
    wide = index.reshape(rows, heads, *(1,) * (x.ndim - 3), -1, 1)
    return jnp.take_along_axis(inner, wide, axis=-2, mode='clip').reshape(*x.shape[:-1], -1)

  # Four codes at once: a gather costs by its elements, and this one was half of the step.
  words = lax.bitcast_convert_type(
    labels.codes.reshape(*labels.codes.shape[:-1], room // 4, 4), jnp.uint32)
  codes = lax.bitcast_convert_type(cut(words), jnp.uint8)
  codes = codes.reshape(*codes.shape[:-2], -1)
  low, high = (x.astype(jnp.float32) for x in (codes & 15, codes >> 4))
  product = jnp.einsum('bhgc,bhcn->bhgn', picked, jnp.concatenate([low, high], axis=2),
                       precision=lax.Precision.HIGHEST)
  found = (product * cut(labels.scale)[:, :, None]
           + jnp.sum(picked, axis=-1, keepdims=True) * cut(labels.zero)[:, :, None])
  _, real = levels.token_positions(candidates, length, config)
  return levels.reduce_heads(found, real, config)


def attend(q: Array, key: Array, value: Array | int | None, pages: Array, scores: Array,
           config: Config, scale: float) -> Array:
  """Softmax attention of [B, HQ, D] over the best top_tokens tokens of the pages, [B, HQ, V]."""
  at, valid = levels.choose_tokens(scores, pages, config)
  return attend_rows(q, key, value, at, valid, scale)


def attend_rows(q: Array, key: Array, value: Array | int | None, at: Array, valid: Array,
                scale: float) -> Array:
  """Softmax attention of [B, HQ, D] over the rows at[b, h], [B, HQ, V] in the dtype of the cache.

  key [B, HK, N, D] with value [B, HK, N, V] or an int V: the first V channels of the keys; or None
  with packed keys [B, HK, N, 2, D]. A query without rows gives 0.
  """
  rows = lambda x: jnp.take_along_axis(
    x, at.reshape(*at.shape, *(1,) * (x.ndim - 3)), axis=2, mode='promise_in_bounds')
  keys = rows(key)
  if value is None:
    keys, values = keys[..., 0, :], keys[..., 1, :]
  else:
    values = keys[..., :value] if isinstance(value, int) else rows(value)
  query = levels.grouped(q, key.shape[1])
  logits = scale * jnp.einsum('bhnd,bhgd->bhng', keys, query.astype(keys.dtype),
                              preferred_element_type=jnp.float32)
  logits = jnp.where(valid[:, :, None], jnp.swapaxes(logits, 2, 3), -jnp.inf)
  top = jnp.max(logits, axis=-1, keepdims=True)
  weight = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0))
  total = jnp.sum(weight, axis=-1)
  out = jnp.einsum('bhgn,bhnv->bhgv', weight.astype(values.dtype), values,
                   preferred_element_type=jnp.float32)
  out = out / jnp.where(total > 0, total, 1)[..., None]
  return out.reshape(q.shape[0], q.shape[1], -1).astype(values.dtype)
