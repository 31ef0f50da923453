"""Scalar heads on a decoder: the critic of PPO, later reward models and routers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zppo_jax.core import types
from zppo_jax.models import decoder, params
from zppo_jax.models.config import ModelConfig


@types.record
class Critic:
  """A decoder of its own with one number per token."""

  backbone: params.Params
  weight: types.Array  # [D]
  bias: types.Array  # []


def abstract_critic(config: ModelConfig) -> Critic:
  """Specs of a critic; the head starts near zero so that early values carry no bias."""
  return Critic(params.abstract(config),
                params.Spec((config.hidden,), ('features',), 1e-3, config.param_dtype),
                params.Spec((), (), 0.0, config.param_dtype))


def values(config: ModelConfig, critic: Critic, tokens: jax.Array, *, segment_ids: jax.Array,
           positions: jax.Array) -> jax.Array:
  """Value of the state *before* token t (it has seen tokens < t), f32[B, T]; column 0 is zero."""
  out = decoder.forward(config, critic.backbone, tokens, segment_ids=segment_ids,
                        positions=positions, want='hidden')
  value = out.hidden.astype(jnp.float32) @ critic.weight.astype(jnp.float32) + critic.bias
  return jnp.pad(value[:, :-1], ((0, 0), (1, 0)))
