"""Reduction of token losses to a numerator and a denominator. Dims: N rows, T tokens.

Both are sums that add over micro-batches and shards; the loss is numerator / denominator of the
whole optimiser batch, never a mean of means. Source: verl, TRL (num_items_in_batch).
"""

from __future__ import annotations

import jax.numpy as jnp

from zppo_jax.core.types import Array
from zppo_jax.ops.groups import widen

MODES = ('token_mean', 'seq_mean_token_mean', 'seq_mean_token_sum', 'seq_mean_token_sum_norm')
SEQUENCE_RATIO = frozenset({'gspo'})


def check_aggregation(mode: str, surrogate: str) -> None:
  """ValueError for an unknown mode, or a sequence ratio whose tokens would be summed.

  A sum over tokens would multiply a sequence-level objective by its length.
  """
  if mode not in MODES:
    raise ValueError(f'aggregation must be one of {MODES}, got {mode!r}')
  if surrogate in SEQUENCE_RATIO and mode in ('seq_mean_token_sum', 'seq_mean_token_sum_norm'):
    raise ValueError(
      f"aggregation must be 'seq_mean_token_mean' for surrogate {surrogate!r}, got {mode!r}"
    )


def aggregate(
  loss: Array,
  mask: Array,
  mode: str,
  *,
  traj_tokens: Array | None = None,
  max_tokens: int | None = None,
) -> tuple[Array, Array]:
  """(numerator, denominator) of a token loss, both f32[].

  With m the mask, n_i = sum_t m_it, L_i = traj_tokens_i (or n_i) and S = sum_i n_i / L_i, the
  number of trajectories that have a token in the loss:
    token_mean                sum_it m l / sum_it m
    seq_mean_token_mean       sum_it m l / L_i  /  S
    seq_mean_token_sum        sum_it m l / S
    seq_mean_token_sum_norm   sum_it m l / (S max_tokens)
  loss f32[N, T], mask bool[N, T], traj_tokens f32[N] = loss tokens of the whole trajectory to which
  a row belongs. Fully masked rows count for nothing. A NaN loss outside the mask leaves the value
  alone, but not the gradient of what produced it: zero its inputs before any exp or product.
  Errors: unknown mode, the last mode without max_tokens >= 1. Source: arXiv:2503.20783, 2503.14476.
  """
  if mode not in MODES:
    raise ValueError(f'mode must be one of {MODES}, got {mode!r}')
  mask = jnp.asarray(mask, bool)
  loss = jnp.where(mask, widen(loss), 0)
  tokens = mask.sum(-1).astype(loss.dtype)
  if mode == 'token_mean':
    return loss.sum(), tokens.sum()
  length = jnp.maximum(tokens if traj_tokens is None else traj_tokens.astype(loss.dtype), 1)
  trajectories = (tokens / length).sum()
  if mode == 'seq_mean_token_mean':
    return (loss.sum(-1) / length).sum(), trajectories
  if mode == 'seq_mean_token_sum':
    return loss.sum(), trajectories
  if max_tokens is None or max_tokens < 1:
    raise ValueError(f'max_tokens must be >= 1 for mode {mode!r}, got {max_tokens}')
  return loss.sum(), trajectories * max_tokens
