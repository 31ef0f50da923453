"""The delta rule in chunks, on any back end: one scan over chunks, with its own backward.

Inside a chunk of C rows, with S the state that enters it (fg2-gdn, WY form):

    M_ij = sum_d iota_id kappa_jd e^{G_id - G_jd}  (i > j)    A likewise of q (i >= j), scaled
    x = iota e^G    qg = scale q e^G    kr = kappa e^{G_C - G}
    vn = (I + M)^{-1} (u - x S)    o = qg S + A vn    S' = e^{G_C} S + kr^T vn

The decays between rows come from `tree`. The backward keeps the entering states, vn, A, M and the
inverse, and runs the same scan in reverse. Nothing of size [T, K, V] is ever held.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.delta_rule import tree

Array = jax.Array
CHUNK = 64


class Masks(NamedTuple):
  """What the segments let through, per chunk."""

  pair: Array  # [N, C, C], the rows are of one segment
  enters: Array  # [N, C, 1], the row sees the state that enters the chunk
  leaves: Array  # [N, C, 1], the row writes into the state that leaves the chunk
  carries: Array  # [N, 1, 1], the state that enters is part of the state that leaves


class Rows(NamedTuple):
  """Rows of a chunk and their decays; N = B * HV."""

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
  """What the forward of a chunk leaves for its backward."""

  state: Array  # [N, K, V], entering
  new: Array  # vn [N, C, V]
  scores: Array  # A below the diagonal [N, C, C]
  erase: Array  # M [N, C, C]
  inverse: Array  # (I + M)^{-1} [N, C, C]


def delta_rule(q, write_key, erase_key, value, log_decay, *, state, segments, scale,
               chunk: int = CHUNK):
  """Arguments as `api.delta_rule` prepares them; returns (out, state)."""
  time = q.shape[1]
  chunk = min(chunk, max(1 << (time - 1).bit_length(), 2))
  inputs = q, write_key, erase_key, value, log_decay
  pad = -time % chunk
  if pad:  # rows of zeros change nothing
    inputs = [jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in inputs]
    segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, pad)), mode='edge')
  out, state = _chunked(scale, chunk, *inputs, state, segments)
  return out[:, :time], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(scale, chunk, *args):
  return _forward(scale, chunk, *args)[0]


def _slice(x: Array, at, chunk: int, heads: int, dtype) -> Array:
  """Rows of a chunk, [B * heads, C, K], of x [B, T, H, K]."""
  x = jax.lax.dynamic_slice_in_dim(x, at * chunk, chunk, 1).astype(dtype)
  x = jnp.repeat(jnp.swapaxes(x, 1, 2), heads // x.shape[2], axis=1)
  return x.reshape(-1, *x.shape[2:])


def _put(out: Array, rows: Array, at) -> Array:
  """The transpose of `_slice`: writes rows into out [B, T, H, K], repeated heads summed."""
  batch, _, heads, width = out.shape
  rows = rows.reshape(batch, heads, -1, *rows.shape[1:])
  rows = jnp.sum(rows, 2) if rows.shape[2] > 1 else rows[:, :, 0]
  rows = jnp.swapaxes(rows, 1, 2).astype(out.dtype)
  return jax.lax.dynamic_update_slice_in_dim(out, rows, at * rows.shape[1], 1)


def _masks(segments, at, chunk: int, heads: int) -> Masks | None:
  if segments is None:
    return None
  own = jax.lax.dynamic_slice_in_dim(segments, at * chunk, chunk, 1)
  before = jnp.where(at > 0, segments[:, jnp.maximum(at * chunk - 1, 0)], 0)[:, None]
  own, before = jnp.repeat(own, heads, axis=0), jnp.repeat(before, heads, axis=0)
  last = own[:, -1:]
  return Masks(own[:, :, None] == own[:, None], (own == before)[..., None],
               (own == last)[..., None], (last == before)[..., None])


def _load(inputs, segments, at, scale: float, chunk: int, dtype) -> Rows:
  heads = inputs[3].shape[2]
  q, write, erase, value, log_decay = (_slice(x, at, chunk, heads, dtype) for x in inputs)
  q, masks = q * scale, _masks(segments, at, chunk, heads)
  d = tree.decays(log_decay)
  after, leaving = d.after, write * d.before
  keep = jnp.swapaxes(after[:, -1:], 1, 2)
  if masks is not None:
    after, leaving, keep = after * masks.enters, leaving * masks.leaves, keep * masks.carries
  entering = jnp.concatenate([q * after, erase * after], 1)
  return Rows(q, write, erase, value, d, entering, leaving, keep, masks)


def _dot(dtype):
  precision = None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
  return functools.partial(jnp.einsum, precision=precision)


def _own(rows: Rows) -> Array:
  """What a row reads of itself, the diagonal of A, [N, C, 1]."""
  return jnp.sum(rows.q * rows.write, -1, keepdims=True)


def _forward(scale, chunk, *args):
  *inputs, state, segments = args
  dot = _dot(inputs[0].dtype)

  def body(carry, at):
    state, out = carry
    rows = _load(inputs, segments, at, scale, chunk, state.dtype)
    scores, erase = tree.pairs(rows.decays, rows.q, rows.erase, rows.write)
    if rows.masks is not None:
      scores, erase = scores * rows.masks.pair, erase * rows.masks.pair
    inverse = tree.inverse(erase)
    seen = dot('nck,nkv->ncv', rows.entering, state)
    new = dot('nij,njv->niv', inverse, rows.value - seen[:, chunk:])
    part = seen[:, :chunk] + dot('nij,njv->niv', scores, new) + _own(rows) * new
    after = rows.keep * state + dot('nck,ncv->nkv', rows.leaving, new)
    return (after, _put(out, part, at)), Kept(state, new, scores, erase, inverse)

  start = state.reshape(-1, *state.shape[2:]), jnp.zeros_like(inputs[3])
  (after, out), kept = jax.lax.scan(body, start, jnp.arange(inputs[3].shape[1] // chunk))
  return (out, after.reshape(state.shape)), (inputs, state, segments, kept)


def _backward(scale, chunk, saved, grads):
  inputs, state, segments, kept = saved
  d_out, d_state = grads
  heads, dot = inputs[3].shape[2], _dot(inputs[0].dtype)

  def body(carry, scanned):
    d_state, d_inputs = carry
    at, (state, new, scores, erase, inverse) = scanned
    rows = _load(inputs, segments, at, scale, chunk, state.dtype)
    d_rows = _slice(d_out, at, chunk, heads, state.dtype)
    d_new = (dot('nij,niv->njv', scores, d_rows) + _own(rows) * d_rows
             + dot('nck,nkv->ncv', rows.leaving, d_state))
    d_value = dot('nij,niv->njv', inverse, d_new)
    both = jnp.concatenate([d_rows, -d_value], 1)
    before = rows.keep * d_state + dot('nck,ncv->nkv', rows.entering, both)
    pairs = scores, erase, *_strictly_lower(dot('ncv,njv->ncj', both, new), rows.masks)
    d_q, d_write, d_erase, d_decay = _rows_backward(
      rows, pairs, jnp.sum(d_rows * new, -1, keepdims=True),
      dot('ncv,nkv->nck', both, state), dot('ncv,nkv->nck', new, d_state),
      rows.keep * jnp.sum(d_state * state, -1, keepdims=True))
    parts = d_q * scale, d_write, d_erase, d_value, d_decay
    return (before, [_put(x, part, at) for x, part in zip(d_inputs, parts)]), None

  start = d_state.reshape(-1, *d_state.shape[2:]), [jnp.zeros_like(x) for x in inputs]
  chunks = jnp.arange(inputs[3].shape[1] // chunk)
  (before, d_inputs), _ = jax.lax.scan(body, start, (chunks, kept), reverse=True)
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
