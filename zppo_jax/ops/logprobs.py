"""Log-probs of chosen tokens without holding all logits. Dims: D width, V vocabulary; nats."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from zppo_jax.core.types import Array
from zppo_jax.ops.groups import widen


def logprobs(logits: Array, targets: Array) -> tuple[Array, Array]:
  """(log-prob of the targets, entropy), f32[...], from whole logits [..., V].

  logp = z_y - logsumexp(z); entropy = logsumexp(z) - sum_v p_v z_v. Ids with z = -inf are outside
  the vocabulary. The gather is a masked sum, which stays local when V is sharded.
  """
  logits = widen(logits)
  total = jax.nn.logsumexp(logits, axis=-1)
  ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  chosen = jnp.where(ids == targets[..., None], logits, 0).sum(-1)
  prob = jnp.exp(logits - total[..., None])
  mean = (prob * jnp.where(jnp.isneginf(logits), 0, logits)).sum(-1)
  return chosen - total, total - mean


def head_logits(
  hidden: Array,
  unembed: Array,
  *,
  temperature: float = 1.0,
  logit_cap: float | None = None,
  num_valid: int | None = None,
) -> Array:
  """Logits f32[..., V] of hidden [..., D] and unembed [D, V], accumulated in float32.

  z = h W; z = cap tanh(z / cap) if `logit_cap`; z / temperature; -inf for ids >= num_valid.
  """
  dtype = jnp.promote_types(jnp.result_type(hidden, unembed), jnp.float32)
  logits = jnp.einsum('...d,dv->...v', hidden, unembed, preferred_element_type=dtype)
  if logit_cap is not None:
    logits = logit_cap * jnp.tanh(logits / logit_cap)
  if temperature != 1.0:
    logits = logits / temperature
  if num_valid is not None:
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    logits = jnp.where(ids < num_valid, logits, -jnp.inf)
  return logits


def map_tokens(fn: Callable, arrays: tuple[Array, ...], *, chunk: int, axis: int):
  """fn over slices of `chunk` positions of `axis`, one after another, recomputed in the backward.

  All arrays share the axes up to and including `axis`; fn maps the slices to arrays with these
  axes. The other leading axes stay whole in every slice, so a batch-sharded mesh stays parallel.
  The axis is padded with zeros to a multiple of the chunk. Errors: chunk < 1.
  """
  if chunk < 1:
    raise ValueError(f'chunk must be >= 1, got {chunk}')
  length = arrays[0].shape[axis]
  chunk = min(chunk, max(length, 1))
  count = -(-length // chunk)

  def split(x):
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, count * chunk - length)
    x = jnp.pad(x, pad).reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)

  def join(y):
    y = jnp.moveaxis(y, 0, axis)
    y = y.reshape(*y.shape[:axis], count * chunk, *y.shape[axis + 2 :])
    return lax.slice_in_dim(y, 0, length, axis=axis)

  out = lax.map(jax.checkpoint(lambda xs: fn(*xs)), tuple(split(x) for x in arrays))
  return jax.tree.map(join, out)


def logprobs_chunked(
  hidden: Array,
  unembed: Array,
  targets: Array,
  *,
  chunk: int,
  temperature: float = 1.0,
  logit_cap: float | None = None,
  num_valid: int | None = None,
) -> tuple[Array, Array]:
  """(logp, entropy) f32[..., T] of the targets, with logits for `chunk` positions at a time.

  hidden [..., T, D], unembed [D, V], targets i32[..., T]; see head_logits for the options. Memory
  is leading axes x chunk x V, in the backward pass too. Gradients reach hidden and unembed, and
  are summed over the chunks in the dtype of unembed: pass it in float32. The caller zeroes hidden
  where it may be NaN. Errors: temperature <= 0, chunk < 1.
  """
  if not temperature > 0:
    raise ValueError(f'temperature must be > 0, got {temperature}')

  def score(h, y):
    logits = head_logits(
      h, unembed, temperature=temperature, logit_cap=logit_cap, num_valid=num_valid
    )
    return logprobs(logits, y)

  return map_tokens(score, (hidden, targets), chunk=chunk, axis=hidden.ndim - 2)
