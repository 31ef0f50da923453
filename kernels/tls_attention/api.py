"""Attention of one new token over a long cache at a fixed budget (AsyncTLS, arXiv 2604.07815)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels.common import dispatch
from kernels.tls_attention import config as config_lib
from kernels.tls_attention import levels
from kernels.tls_attention.config import Array, Config, State

IMPLEMENTATIONS = {'chunked': levels.attend}


def decode(q: Array, key: Array, value: Array, state: State, *, channels: Array, length: Array,
           config: Config, scale: float | None = None,
           implementation: str | Sequence[str] | None = None) -> tuple[Array, State]:
  """softmax(scale q . k) v over at most config.top_tokens tokens per key head.

  The blocks with the largest bounds of q . k, in them the tokens with the largest 4-bit scores,
  over those exact attention. q [B, HQ, D] of the token number length[b] - 1, whose key and value
  [B, HK, N, D] and [B, HK, N, V] are in the cache and in `state` already; channels i32[HK, R] by
  `calibrate`. With config.stale the tokens come from the blocks that the query before chose, which
  a pool may have fetched meanwhile; this query's blocks are the state's next ones.

  Returns (out [B, HQ, V] in the dtype of value, state). Scale defaults to D ** -0.5. Raises
  ValueError on shapes or settings that do not fit. There is no gradient through the choice.
  """
  config_lib.check(config, q, key, channels)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  scores = levels.block_scores(q, state.summary, length, config)
  chosen = levels.choose_blocks(scores, length, config)
  candidates = state.chosen if config.stale else chosen
  weights = levels.token_scores(q, state.labels, channels, candidates, length, config, scale)
  at, valid = levels.choose_tokens(weights, candidates, length, config)
  out = dispatch.run('tls_attention', IMPLEMENTATIONS, implementation, ('chunked',), q, key, value,
                     at, valid, scale)
  return _no_gradient(out), dataclasses.replace(state, chosen=chosen)


@jax.custom_jvp
def _no_gradient(out: Array) -> Array:
  return out


@_no_gradient.defjvp
def _refuse(primals, tangents):
  raise NotImplementedError('tls_attention.decode has no gradient: its choice of tokens is not '
                            'differentiable')


def begin(q: Array, state: State, *, length: Array, config: Config) -> State:
  """State whose first stale step has candidates: the blocks that the last prompt query chooses."""
  scores = levels.block_scores(q, state.summary, length, config)
  return dataclasses.replace(state, chosen=levels.choose_blocks(scores, length, config))


def turnover(before: State, after: State, blocks: int) -> Array:
  """Blocks chosen now and not before, i32[B, HK]: what an offloaded cache has to fetch."""
  new = after.chosen[..., :, None] != before.chosen[..., None, :]
  return jnp.sum(jnp.all(new, axis=-1) & (after.chosen < blocks), axis=-1)
