"""Log-probs of given tokens, by the same forward that sampled them."""

from __future__ import annotations

import jax.numpy as jnp

from zppo_jax.core import masks, types
from zppo_jax.models import decoder
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.params import Params
from zppo_jax.ops import logprobs


@types.record
class Scored:
  """Per-token results; entries are zero outside the loss mask. Hidden states are windowed."""

  logp: types.Array  # f32[N, T]
  entropy: types.Array  # f32[N, T], nats
  hidden: types.Array  # [N, W, D], the state that predicts window column w
  start: types.Array  # i32[N], first column of the window
  taps: dict[str, types.Array]  # [N, T, D]


def states(config: ModelConfig, params: Params, rollout: types.Rollout, *, window: int, taps=()):
  """Hidden states that predict the columns of the loss window: ([N, W, D], start, taps).

  The window is the `window` columns from the first loss token on, so that nobody pays for the
  vocabulary on prompt tokens. It must cover the loss mask (sampling makes it so).
  """
  out = decoder.forward(config, params, rollout.tokens, segment_ids=rollout.segment_ids,
                        positions=rollout.positions, taps=taps, want='hidden')
  start = masks.window_start(rollout.loss_mask, window)
  shifted = jnp.pad(out.hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
  return masks.take_window(shifted, start, window), start, out.taps


def score(config: ModelConfig, params: Params, rollout: types.Rollout, *, window: int,
          temperature: float = 1.0, chunk: int = 1024, taps=()) -> Scored:
  """log pi(token t | tokens < t) and entropy where rollout.loss_mask is set; differentiable."""
  hidden, start, found = states(config, params, rollout, window=window, taps=taps)
  targets = masks.take_window(rollout.tokens, start, window)
  logp, entropy = logprobs.logprobs_chunked(
    hidden, decoder.unembedding(params), targets, chunk=chunk, temperature=temperature,
    num_valid=config.num_valid)
  total = rollout.tokens.shape[1]

  def place(x):
    return jnp.where(rollout.loss_mask, masks.put_window(x, start, total), 0.0)

  return Scored(place(logp), place(entropy), hidden, start, found)


