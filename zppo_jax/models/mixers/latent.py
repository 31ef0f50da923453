"""Multi-head latent attention: keys and values of all heads from one small latent per token.

c = norm(x W_c); k_h = [W_k,h c ; rope(x W_r)], v_h = W_v,h c. A cache holds c and the rotated part
alone: with q~_h = W_k,h^T q_h the scores are q~_h . c + q_r . k_r, and the values are read as
W_v,h (sum p c). arXiv 2405.04434.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zppo_jax.models import layers
from zppo_jax.models.cache import Latent, Sparse
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.mixers import cached
from zppo_jax.models.mixers.attention import attend_rows
from zppo_jax.models.mixers.place import Place

Array = jax.Array
EPS = 1e-6  # of the latents' norms, whatever the model's


def latent_attention(config: ModelConfig, params, x: Array, place: Place,
                     cache: Latent | Sparse | None, layer, prefix: Latent | None = None
                     ) -> tuple[Array, Latent | Sparse | None]:
  """x [B, T, D]. Without cache and prefix, keys and values are made whole: fewer products."""
  m = config.mla
  query = _query(config, params, x)
  plain, turned = query[..., :m.nope], _rope(config, query[..., m.nope:], place)
  both = layers.project(x, params.latent)
  latent = layers.rms_norm(both[..., :m.rank], params.latent_norm, EPS)
  shared_key = _rope(config, both[..., None, m.rank:], place)
  scale = (m.nope + m.rope) ** -0.5 * (config.rope.scores if config.rope else 1.0)
  scale = config.attn_scale or scale
  new = Latent(jnp.concatenate([latent[:, None], jnp.swapaxes(shared_key, 1, 2)], axis=-1))
  absorb = lambda: jnp.concatenate(
    [jnp.einsum('bthn,rhn->bthr', plain, params.key.astype(x.dtype)), turned], axis=-1)
  if cache is None and prefix is None:
    key, value = layers.project(latent, params.key), layers.project(latent, params.value)
    key = jnp.concatenate(
      [key, jnp.broadcast_to(shared_key, (*key.shape[:3], m.rope))], axis=-1)
    out = attend_rows(config, jnp.concatenate([plain, turned], -1), key, value, place, scale=scale)
    cache = cached.keep(config, absorb(), new, place) if place.keep else None
    return layers.project_heads(out, params.out), cache
  found, cache = cached.read(config, absorb(), new, place, cache, layer, prefix, scale=scale)
  out = jnp.einsum('bthr,rhv->bthv', found, params.value.astype(x.dtype))
  return layers.project_heads(out, params.out), cache


def _query(config: ModelConfig, params, x: Array) -> Array:
  if not config.mla.query_rank:
    return layers.project(x, params.query)
  down, norm, up = params.query
  return layers.project(layers.rms_norm(layers.project(x, down), norm, EPS), up)


def _rope(config: ModelConfig, x: Array, place: Place) -> Array:
  if config.mla.pairs == 'none':
    return x
  return layers.rope(x, *place.rotary[config.mla.rope],
                     interleaved=config.mla.pairs == 'interleaved')
