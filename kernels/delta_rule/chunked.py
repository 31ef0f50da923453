"""The delta rule in chunks, on any back end: one scan over chunks, with its own backward.

Inside a chunk of C rows, with S the state that enters it (fg2-gdn, WY form):

    M_ij = sum_d iota_id kappa_jd e^{G_id - G_jd}  (i > j)    A likewise of q (i >= j), scaled
    x = iota e^G    qg = scale q e^G    kr = kappa e^{G_C - G}
    vn = (I + M)^{-1} (u - x S)    o = qg S + A vn    S' = e^{G_C} S + kr^T vn

The decays between rows come from `tree`. The backward keeps the entering states, vn, A and M, and
runs the same scan in reverse. Nothing of size [T, K, V] is ever held.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.delta_rule import tree

Array = jax.Array
CHUNK = 32
SPAN = 4


class Masks(NamedTuple):
  """What the segments let through, per chunk."""

  pair: Array  # [N, C, C], the rows are of one segment
  enters: Array  # [N, C, 1], the row sees the state that enters the chunk
  leaves: Array  # [N, C, 1], the row writes into the state that leaves the chunk
  carries: Array  # [N, 1, 1], the state that enters is part of the state that leaves


class Rows(NamedTuple):
  """Rows of the chunks of a span, and their decays; N = P * B * HV, chunk by chunk."""

  q: Array  # scaled [N, C, K]
  write: Array
  erase: Array
  value: Array  # [N, C, V]
  decays: tree.Decays
  entering: Array  # [qg ; x] [N, 2C, K], what reads the state that enters
  leaving: Array  # kr [N, C, K]
  keep: Array  # e^{G_C} [N, K or 1, 1]
  masks: Masks | None


class Kept(NamedTuple):
  """What the forward of a span leaves for its backward."""

  states: Array  # [P, B * HV, K, V], entering each chunk
  new: Array  # vn [N, C, V]
  scores: Array  # A below the diagonal [N, C, C]
  erase: Array  # M [N, C, C]
  inverse: Array  # (I + M)^{-1} [N, C, C]


class Sizes(NamedTuple):
  scale: float
  chunk: int
  span: int  # chunks that are worked on at once


def delta_rule(q, write_key, erase_key, value, log_decay, *, state, segments, scale,
               chunk: int = CHUNK, span: int = SPAN):
  """Arguments as `api.delta_rule` prepares them; returns (out, state)."""
  time = q.shape[1]
  chunk = min(chunk, max(1 << (time - 1).bit_length(), 2))
  span = min(span, -(-time // chunk))
  inputs = q, write_key, erase_key, value, log_decay
  pad = -time % (chunk * span)
  if pad:  # rows of zeros change nothing
    inputs = [jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in inputs]
    segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, pad)), mode='edge')
  out, state = _chunked(Sizes(scale, chunk, span), *inputs, state, segments)
  return out[:, :time], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(sizes, *args):
  return _forward(sizes, *args)[0]


def _slice(sizes: Sizes, x: Array, at, heads: int, dtype) -> Array:
  """Rows of a span, [P * B * heads, C, K], of x [B, T, H, K]."""
  length = sizes.chunk * sizes.span
  x = jax.lax.dynamic_slice_in_dim(x, at * length, length, 1).astype(dtype)
  x = x.reshape(x.shape[0], sizes.span, sizes.chunk, *x.shape[2:]).transpose(1, 0, 3, 2, 4)
  x = jnp.repeat(x, heads // x.shape[2], axis=2)
  return x.reshape(-1, *x.shape[3:])


def _put(sizes: Sizes, out: Array, rows: Array, at) -> Array:
  """The transpose of `_slice`: writes rows into out [B, T, H, K], repeated heads summed."""
  batch, _, heads, width = out.shape
  rows = rows.reshape(sizes.span, batch, heads, -1, sizes.chunk, width)
  rows = jnp.sum(rows, 3) if rows.shape[3] > 1 else rows[:, :, :, 0]
  rows = rows.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, width).astype(out.dtype)
  return jax.lax.dynamic_update_slice_in_dim(out, rows, at * sizes.chunk * sizes.span, 1)


def _masks(sizes: Sizes, segments, at, heads) -> Masks | None:
  if segments is None:
    return None
  length = sizes.chunk * sizes.span
  own = jax.lax.dynamic_slice_in_dim(segments, at * length, length, 1)
  before = jnp.where(at > 0, segments[:, jnp.maximum(at * length - 1, 0)], 0)[:, None]
  own = own.reshape(-1, sizes.span, sizes.chunk)
  before = jnp.concatenate([before, own[:, :-1, -1]], axis=1)[..., None]
  own, before = (jnp.repeat(jnp.swapaxes(x, 0, 1), heads, axis=1).reshape(-1, x.shape[-1])
                 for x in (own, before))
  last = own[:, -1:]
  return Masks(own[:, :, None] == own[:, None], (own == before)[..., None],
               (own == last)[..., None], (last == before)[..., None])


def _load(sizes: Sizes, inputs, segments, at, dtype) -> Rows:
  heads = inputs[3].shape[2]
  q, write, erase, value, log_decay = (_slice(sizes, x, at, heads, dtype) for x in inputs)
  q, masks = q * sizes.scale, _masks(sizes, segments, at, heads)
  d = tree.decays(log_decay)
  after, leaving = d.after, write * d.before
  keep = jnp.swapaxes(after[:, -1:], 1, 2)
  if masks is not None:
    after, leaving, keep = after * masks.enters, leaving * masks.leaves, keep * masks.carries
  entering = jnp.concatenate([q * after, erase * after], 1)
  return Rows(q, write, erase, value, d, entering, leaving, keep, masks)


def _per_chunk(sizes: Sizes, *arrays) -> list:
  """Arrays [N, ...] of a span as [P, N / P, ...]."""
  return [x.reshape(sizes.span, -1, *x.shape[1:]) for x in arrays]


def _dot(dtype):
  precision = None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
  return functools.partial(jnp.einsum, precision=precision)


def _own(rows: Rows) -> Array:
  """What a row reads of itself, the diagonal of A, [N, C, 1]."""
  return jnp.sum(rows.q * rows.write, -1, keepdims=True)


def _forward(sizes, *args):
  *inputs, state, segments = args
  chunk, dot = sizes.chunk, _dot(inputs[0].dtype)

  def body(carry, at):
    state, out = carry
    rows = _load(sizes, inputs, segments, at, state.dtype)
    scores, erase = tree.pairs(rows.decays, rows.q, rows.erase, rows.write)
    if rows.masks is not None:
      scores, erase = scores * rows.masks.pair, erase * rows.masks.pair
    inverse = tree.inverse(erase)
    states, news, reads = [], [], []
    for entering, value, solve, leaving, keep in zip(*_per_chunk(
        sizes, rows.entering, rows.value, inverse, rows.leaving, rows.keep)):
      states.append(state)
      seen = dot('nck,nkv->ncv', entering, state)
      new = dot('nij,njv->niv', solve, value - seen[:, chunk:])
      state = keep * state + dot('nck,ncv->nkv', leaving, new)
      news.append(new)
      reads.append(seen[:, :chunk])
    new = jnp.concatenate(news)
    part = jnp.concatenate(reads) + dot('nij,njv->niv', scores, new) + _own(rows) * new
    kept = Kept(jnp.stack(states), new, scores, erase, inverse)
    return (state, _put(sizes, out, part, at)), kept

  start = state.reshape(-1, *state.shape[2:]), jnp.zeros_like(inputs[3])
  spans = jnp.arange(inputs[3].shape[1] // (chunk * sizes.span))
  (after, out), kept = jax.lax.scan(body, start, spans)
  return (out, after.reshape(state.shape)), (inputs, state, segments, kept)


def _backward(sizes, saved, grads):
  inputs, state, segments, kept = saved
  d_out, d_state = grads
  heads = inputs[3].shape[2]
  chunk, dot = sizes.chunk, _dot(inputs[0].dtype)

  def body(carry, scanned):
    d_state, d_inputs = carry
    at, (states, new, scores, erase, inverse) = scanned
    rows = _load(sizes, inputs, segments, at, state.dtype)
    d_out_rows = _slice(sizes, d_out, at, heads, state.dtype)
    d_new = dot('nij,niv->njv', scores, d_out_rows) + _own(rows) * d_out_rows
    d_states, both = [], []
    for d_read, d_own, entering, solve, leaving, keep in reversed(list(zip(*_per_chunk(
        sizes, d_out_rows, d_new, rows.entering, inverse, rows.leaving, rows.keep)))):
      d_states.append(d_state)
      d_own += dot('nck,nkv->ncv', leaving, d_state)
      both.append(jnp.concatenate([d_read, -dot('nij,niv->njv', solve, d_own)], 1))
      d_state = keep * d_state + dot('nck,ncv->nkv', entering, both[-1])
    both, d_states = jnp.concatenate(both[::-1]), jnp.concatenate(d_states[::-1])
    states = states.reshape(d_states.shape)
    pairs = scores, erase, *_strictly_lower(dot('ncv,njv->ncj', both, new), rows.masks)
    d_q, d_write, d_erase, d_decay = _rows_backward(
      rows, pairs, jnp.sum(d_out_rows * new, -1, keepdims=True),
      dot('ncv,nkv->nck', both, states), dot('ncv,nkv->nck', new, d_states),
      rows.keep * jnp.sum(d_states * states, -1, keepdims=True))
    parts = d_q * sizes.scale, d_write, d_erase, -both[:, chunk:], d_decay
    return (d_state, [_put(sizes, x, part, at) for x, part in zip(d_inputs, parts)]), None

  start = d_state.reshape(-1, *d_state.shape[2:]), [jnp.zeros_like(x) for x in inputs]
  spans = jnp.arange(inputs[3].shape[1] // (chunk * sizes.span))
  (before, d_inputs), _ = jax.lax.scan(body, start, (spans, kept), reverse=True)
  return *d_inputs, before.reshape(state.shape), None


def _strictly_lower(d_pairs: Array, masks: Masks | None) -> list[Array]:
  """Gradients of A and of M below the diagonal, of [N, 2C, C]."""
  chunk = d_pairs.shape[2]
  allowed = jnp.tril(jnp.ones((chunk, chunk), bool), -1)
  if masks is not None:
    allowed = allowed & masks.pair
  return [jnp.where(allowed, x, 0) for x in (d_pairs[:, :chunk], d_pairs[:, chunk:])]


def _rows_backward(rows: Rows, pairs, d_own, d_entering, d_leaving, d_keep):
  """(d_q, d_write, d_erase, d_log_decay) of the rows, of the gradients of what they made.

  `pairs` are A, M and their gradients; d_own [N, C, 1]; d_entering [N, 2C, K] of q, then of erase;
  d_keep is that of the logarithm of `keep`.
  """
  chunk, d = rows.q.shape[1], rows.decays
  d_q, d_erase, d_write, levels = tree.pairs_backward(d, rows.q, rows.erase, rows.write, *pairs)
  moved = d_entering * rows.entering
  d_after = (moved[:, :chunk] + moved[:, chunk:]).at[:, -1].add(d_keep[..., 0])
  d_before = d_leaving * rows.leaving
  after, before = d.after, d.before
  if rows.masks is not None:
    after, before = after * rows.masks.enters, before * rows.masks.leaves
  d_q += d_own * rows.write + d_entering[:, :chunk] * after
  d_erase += d_entering[:, chunk:] * after
  d_write += d_own * rows.q + d_leaving * before
  if d.after.shape[-1] == 1:
    d_after, d_before = (jnp.sum(x, -1, keepdims=True) for x in (d_after, d_before))
  return d_q, d_write, d_erase, tree.decays_backward(d, levels, d_after, d_before)


_chunked.defvjp(_forward, _backward)
