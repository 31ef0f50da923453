"""The law: the delta rule as a scan over tokens, in three lines."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def token(state: Array, q: Array, write_key: Array, erase_key: Array, value: Array,
          log_decay: Array, scale: float) -> tuple[Array, Array]:
  """(state, out) after one token: S = e^g S;  S += kappa (u - S^T iota)^T;  o = scale S^T q.

  state [B, HV, K, V]; q, write_key, erase_key [B, HV, K]; value [B, HV, V]; log_decay
  [B, HV, K or 1].
  """
  def read(state, key):
    return jnp.einsum('...kv,...k->...v', state, key, precision=jax.lax.Precision.HIGHEST)

  state = jnp.exp(log_decay)[..., None] * state
  state += write_key[..., None] * (value - read(state, erase_key))[..., None, :]
  return state, scale * read(state, q)


def delta_rule(q, write_key, erase_key, value, log_decay, *, state, segments, scale):
  """Arguments as `api.delta_rule` prepares them; returns (out, state)."""
  heads = value.shape[2]

  def scanned(x):
    return jnp.moveaxis(jnp.repeat(x, heads // x.shape[2], axis=2).astype(state.dtype), 1, 0)

  def body(carry, now):
    state, before = carry
    *inputs, segment = now
    state = jnp.where((segment == before)[:, None, None, None], state, 0)
    state, out = token(state, *inputs, scale)
    return (state, segment), out

  if segments is None:
    segments = jnp.zeros(q.shape[:2], jnp.int32)
  inputs = [scanned(x) for x in (q, write_key, erase_key, value, log_decay)]
  start = state, jnp.zeros(q.shape[:1], jnp.int32)
  (state, _), out = jax.lax.scan(body, start, (*inputs, segments.T))
  return jnp.moveaxis(out, 0, 1).astype(value.dtype), state
