"""Divergences between student q and teacher p at one prefix. Dims: V vocabulary, K top ids; nats.

The teacher (and the reference) is always under stop_gradient. Source: GKD arXiv:2306.13649,
DistiLLM arXiv:2402.03898 (skewed kinds), Schulman 2020 (k1, k2, k3).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from zppo_jax.core.types import Array
from zppo_jax.ops.credit import LOGP_FLOOR
from zppo_jax.ops.groups import widen
from zppo_jax.ops.logprobs import head_logits, map_tokens

KINDS = ('fkl', 'rkl', 'gjsd', 'skew_fkl', 'skew_rkl')
ESTIMATORS = ('k1', 'k2', 'k3', 'k3+')
VARIANTS = ('tail', 'renorm', 'trunc', 'trunc_mean')
sg = lax.stop_gradient


def kl_estimate(logp: Array, ref_logp: Array, kind: str = 'k3') -> Array:
  """Sampled-token estimate of KL(pi || ref), same shape as logp; gradient in logp only.

  d = ref_logp - logp: k1 = -d; k2 = d^2 / 2; k3 = exp(d) - 1 - d with d clamped to [-20, 20] and
  the result to [-10, 10] (verl); 'k3+' has the value of k3 and the gradient of k2. Inputs must be
  zero outside the mask. Errors: unknown kind.
  """
  if kind not in ESTIMATORS:
    raise ValueError(f'kind must be one of {ESTIMATORS}, got {kind!r}')
  d = sg(ref_logp) - logp
  if kind == 'k1':
    return -d
  k2 = 0.5 * d**2
  if kind == 'k2':
    return k2
  bounded = jnp.clip(d, -20, 20)
  k3 = jnp.clip(jnp.expm1(bounded) - bounded, -10, 10)
  return k3 if kind == 'k3' else k2 - sg(k2) + sg(k3)


def check_kl_loss(kind: str) -> None:
  """ValueError for a KL estimator whose expected gradient as a loss is zero (k1), or unknown."""
  if kind not in ESTIMATORS or kind == 'k1':
    raise ValueError(f"kind of a KL loss must be 'k2', 'k3' or 'k3+', got {kind!r}")


def _kl(log_a, log_b) -> Array:
  """sum a (log a - log b) over the last axis; outcomes with a = 0 add nothing, nor NaN."""
  live = jnp.exp(log_a) > 0
  gap = jnp.where(live, log_a, 0) - jnp.where(live, log_b, 0)
  return (jnp.where(live, jnp.exp(jnp.where(live, log_a, 0)), 0) * gap).sum(-1)


def _mix(log_a, log_b, weight) -> Array:
  """log(weight a + (1 - weight) b); outcomes impossible under both are set to 0 first."""
  dead = jnp.isneginf(log_a) & jnp.isneginf(log_b)
  log_a, log_b = jnp.where(dead, 0, log_a), jnp.where(dead, 0, log_b)
  return jnp.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def _divergence(log_p, log_q, kind, beta, alpha) -> Array:
  """The named divergence of normalised teacher log_p and student log_q over the last axis."""
  if kind == 'gjsd':
    kind = {0.0: 'fkl', 1.0: 'rkl'}.get(float(beta), kind)
  if kind == 'fkl' or (kind == 'skew_fkl' and alpha == 0):
    return _kl(log_p, log_q)
  if kind == 'rkl' or (kind == 'skew_rkl' and alpha == 0):
    return _kl(log_q, log_p)
  if kind == 'skew_fkl':
    return _kl(log_p, _mix(log_p, log_q, alpha))
  if kind == 'skew_rkl':
    return _kl(log_q, _mix(log_q, log_p, alpha))
  log_m = _mix(log_p, log_q, beta)
  return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def check_divergence(kind: str, *, beta=0.5, alpha=0.1, temperature=1.0) -> None:
  """ValueError for an unknown kind, beta outside [0, 1], alpha outside [0, 1), temperature <= 0."""
  if kind not in KINDS:
    raise ValueError(f'kind must be one of {KINDS}, got {kind!r}')
  if not 0 <= beta <= 1:
    raise ValueError(f'beta must be in [0, 1], got {beta}')
  if not 0 <= alpha < 1:
    raise ValueError(f'alpha must be in [0, 1), got {alpha}')
  if not temperature > 0:
    raise ValueError(f'temperature must be > 0, got {temperature}')


def token_divergence(
  logits: Array,
  teacher_logits: Array,
  kind: str = 'gjsd',
  *,
  beta: float = 0.5,
  alpha: float = 0.1,
  temperature: float = 1.0,
  scale_by_tau2: bool = False,
) -> Array:
  """Full-vocabulary divergence f32[...] of student logits and teacher logits, both [..., V].

  q, p = softmax(logits / tau), softmax(teacher_logits / tau):
    fkl KL(p || q) | rkl KL(q || p) | gjsd beta KL(p || m) + (1 - beta) KL(q || m),
    m = beta p + (1 - beta) q | skew_fkl KL(p || alpha p + (1 - alpha) q) |
    skew_rkl KL(q || alpha q + (1 - alpha) p)
  gjsd with beta = 0 is fkl and with beta = 1 rkl (TRL): the scale jumps there, since the gjsd
  itself tends to 0. `scale_by_tau2` multiplies by tau^2. Ids with -inf under both add nothing.
  Errors: see check_divergence; vocabularies of different size.
  """
  check_divergence(kind, beta=beta, alpha=alpha, temperature=temperature)
  if logits.shape[-1] != teacher_logits.shape[-1]:
    raise ValueError(
      f'teacher_logits must have the {logits.shape[-1]} ids of logits, '
      f'got {teacher_logits.shape[-1]}'
    )
  log_q = jax.nn.log_softmax(widen(logits) / temperature)
  log_p = sg(jax.nn.log_softmax(widen(teacher_logits) / temperature))
  value = _divergence(log_p, log_q, kind, beta, alpha)
  return value * temperature**2 if scale_by_tau2 else value


def kl_full(logits: Array, ref_logits: Array) -> Array:
  """sum_v pi (log pi - log pi_ref), f32[...] from logits [..., V]; gradient in `logits` only."""
  return token_divergence(logits, ref_logits, 'rkl')


def divergence_chunked(
  hidden_s: Array,
  unembed_s: Array,
  hidden_t: Array,
  unembed_t: Array,
  kind: str = 'gjsd',
  *,
  chunk: int,
  beta: float = 0.5,
  alpha: float = 0.1,
  temperature: float = 1.0,
  scale_by_tau2: bool = False,
  logit_cap: float | None = None,
  teacher_logit_cap: float | None = None,
  num_valid: int | None = None,
) -> Array:
  """token_divergence f32[..., T] from hidden states, with logits for `chunk` positions at a time.

  hidden_s [..., T, Ds], unembed_s [Ds, V], hidden_t [..., T, Dt], unembed_t [Dt, V]; ids >=
  num_valid are padding of the vocabulary. Gradients reach hidden_s and unembed_s only. The caller
  zeroes hidden states that may be NaN. Errors: see check_divergence; chunk < 1.
  """
  check_divergence(kind, beta=beta, alpha=alpha, temperature=temperature)
  unembed_t = sg(unembed_t)

  def score(h_s, h_t):
    return token_divergence(
      head_logits(h_s, unembed_s, logit_cap=logit_cap, num_valid=num_valid),
      head_logits(h_t, unembed_t, logit_cap=teacher_logit_cap, num_valid=num_valid),
      kind,
      beta=beta,
      alpha=alpha,
      temperature=temperature,
      scale_by_tau2=scale_by_tau2,
    )

  return map_tokens(score, (hidden_s, sg(hidden_t)), chunk=chunk, axis=hidden_s.ndim - 2)


def tail_logp(logp: Array) -> Array:
  """log of the mass outside a set, f32[..., 1]: log1p(-min(sum exp logp, 1 - 1e-7))."""
  mass = jnp.exp(jax.nn.logsumexp(logp, axis=-1, keepdims=True))
  return jnp.log1p(-jnp.minimum(mass, 1 - 1e-7))


def topk_divergence(
  logits: Array,
  teacher_ids: Array,
  teacher_logp: Array,
  kind: str = 'fkl',
  variant: str = 'tail',
  *,
  beta: float = 0.5,
  alpha: float = 0.1,
) -> Array:
  """Divergence f32[...] on K ids: logits [..., V], teacher_ids i32[..., K], teacher_logp [..., K].

  tail: K + 1 outcomes, the last is the rest of the mass; a lower bound, exact for K >= V - 1.
  renorm: both renormalised on the ids (blind to mass elsewhere). trunc: the plain partial sum (fkl
  sum p (log p - log q), rkl sum q (log q - log p)), may be negative; trunc_mean: divided by K.
  teacher_logp is floored at log 1e-30. Pass the student's own top ids for a student-side set.
  Errors: see check_divergence; unknown variant, K outside [1, V], trunc with a mixture kind.
  """
  check_divergence(kind, beta=beta, alpha=alpha)
  if variant not in VARIANTS:
    raise ValueError(f'variant must be one of {VARIANTS}, got {variant!r}')
  size, vocab = teacher_ids.shape[-1], logits.shape[-1]
  if not 1 <= size <= vocab:
    raise ValueError(f'K = teacher_ids.shape[-1] must be in [1, {vocab}], got {size}')
  if variant.startswith('trunc') and kind not in ('fkl', 'rkl'):
    raise ValueError(f"kind must be 'fkl' or 'rkl' for variant {variant!r}, got {kind!r}")
  log_q = jnp.take_along_axis(jax.nn.log_softmax(widen(logits)), teacher_ids, axis=-1)
  log_p = sg(jnp.maximum(widen(teacher_logp), LOGP_FLOOR))
  if variant == 'tail':
    log_q = jnp.concatenate([log_q, tail_logp(log_q)], -1)
    log_p = jnp.concatenate([log_p, tail_logp(log_p)], -1)
  elif variant == 'renorm':
    log_q, log_p = jax.nn.log_softmax(log_q), jax.nn.log_softmax(log_p)
  value = _divergence(log_p, log_q, kind, beta, alpha)
  return value / size if variant == 'trunc_mean' else value
