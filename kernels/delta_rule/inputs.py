"""Input maps: what makes each published rule a member of the asymmetric delta rule.

Every map returns (write_key, erase_key, value) for `delta_rule`; q and log_decay go in as they
are. Keys are expected L2-normalised where the rate is below one: then the state never grows except
by what is written. Rates lie in (0, 1], or in (0, 2] where negative eigenvalues are wanted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
Keys = tuple[Array, Array, Array]
_SMALLEST_RATE = 1e-6  # the square root has no slope at zero


def _root(rate: Array) -> Array:
  return jnp.sqrt(jnp.maximum(rate, _SMALLEST_RATE))


def _heads(key: Array, like: Array) -> Array:
  """Repeats the heads of [B, T, H, K] in consecutive groups, to as many as `like` has."""
  heads, wanted = key.shape[2], like.shape[2]
  if wanted % heads:
    raise ValueError(f'value heads {wanted} must be a multiple of key heads {heads}')
  return jnp.repeat(key, wanted // heads, axis=2) if heads != wanted else key


def fg2_inputs(key: Array, value: Array, rate: Array) -> Keys:
  """FG2-GDN: one rate per channel, of key and value alike; k~ = sqrt(rate) k, v~ = sqrt(rate) v.

  key, rate [B, T, H, K], value [B, T, H, V]. Raises ValueError unless K = V. arXiv 2604.19021.
  """
  if key.shape[-1] != value.shape[-1]:
    raise ValueError(f'fg2: value size V={value.shape[-1]} must equal key size '
                     f'K={key.shape[-1]}: use fg2_plus_inputs')
  return fg2_plus_inputs(key, value, rate, rate)


def fg2_plus_inputs(key: Array, value: Array, key_rate: Array, value_rate: Array) -> Keys:
  """FG2-GDN+: rates of their own for keys (what is erased) and values (what is written).

  k~ = sqrt(key_rate) k, erased and written along k~; v~ = sqrt(value_rate) v. key [B, T, H, K],
  key_rate [B, T, H or HV, K], value, value_rate [B, T, HV, V]. arXiv 2604.19021.
  """
  key = _root(key_rate) * _heads(key, key_rate)
  return key, key, _root(value_rate) * value


def kda_inputs(key: Array, value: Array, rate: Array) -> Keys:
  """Kimi Delta Attention: a scalar rate; erase key rate * k, value rate * v; rate [B, T, HV].

  arXiv 2510.26692.
  """
  rate = rate[..., None]
  return key, rate * _heads(key, rate), rate * value


def gdn_inputs(key: Array, value: Array, rate: Array) -> Keys:
  """Gated DeltaNet: as KDA, with a log-decay of one channel. arXiv 2412.06464."""
  return kda_inputs(key, value, rate)


def delta_net_inputs(key: Array, value: Array, rate: Array) -> Keys:
  """DeltaNet: as GDN, with a log-decay of zero. arXiv 2406.06484."""
  return kda_inputs(key, value, rate)


def gdn2_inputs(key: Array, value: Array, erase: Array, write: Array) -> Keys:
  """GDN-2: vector gates for erasing, [B, T, HV, K], and writing, [B, T, HV, V].

  The transition is asymmetric and its norm may exceed one. arXiv 2605.22791.
  """
  return key, erase * _heads(key, erase), write * value


def gla_inputs(key: Array, value: Array) -> Keys:
  """Gated linear attention and Mamba-2: nothing is erased. arXiv 2312.06635."""
  return key, jnp.zeros_like(key), value
