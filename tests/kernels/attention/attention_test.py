"""Every implementation against all scores at once: outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention
from kernels.attention import blocked, reference, splash, triton

INTERPRETED = {'splash': functools.partial(splash.attention, interpret=True),
               'triton': functools.partial(triton.attention, interpret=True)}
CASES = {  # batch, time, heads, key heads, K, V, window, cap, packed
  'one token': (1, 1, 2, 1, 16, 16, 0, None, False),
  'grouped': (2, 65, 6, 2, 16, 24, 0, None, True),
  'window and cap': (1, 200, 2, 1, 32, 32, 17, 5.0, True),
  'latent sizes': (1, 70, 3, 3, 24, 16, 0, None, False),
  'long': (1, 600, 2, 2, 128, 128, 0, None, True)}


def make(case, dtype):
  batch, time, heads, groups, key, value, window, cap, packed = CASES[case]
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=(batch, time, h, k)) for h, k in (
    (heads, key), (groups, key), (groups, value))]
  ids = np.ones((batch, time), np.int32)
  if packed:  # three segments, then padding
    ids = np.broadcast_to(np.searchsorted([time // 3, time // 2, time - 5], np.arange(time),
                                          side='right') + 1, (batch, time)).astype(np.int32)
    ids = np.where(ids == 4, 0, ids)
  weight = rng.normal(size=(batch, time, heads, value)) * (ids > 0)[..., None, None]
  static = dict(scale=key**-0.5, window=window, cap=cap)
  return [jnp.asarray(a, dtype) for a in arrays], jnp.asarray(ids), weight, static


def evaluate(rule, case, dtype):
  arrays, ids, weight, static = make(case, dtype)

  def loss(arrays):
    out = rule(*arrays, segment_ids=ids, **static)
    wide = jnp.promote_types(out.dtype, jnp.float32)
    out = jnp.where(ids[..., None, None] > 0, out, 0).astype(wide)  # padding is nobody's
    return jnp.sum(out * jnp.asarray(weight, wide)), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
  return [np.asarray(x, np.float64) for x in (out, *grads)]


@functools.cache
def law(case):
  with jax.enable_x64(True):
    return evaluate(reference.attention, case, jnp.float64)


def worst(found, wanted):
  assert all(np.isfinite(x).all() for x in found)
  return max(np.sqrt(np.mean((a - b)**2) / max(np.mean(b**2), 1e-30))
             for a, b in zip(found, wanted))


@pytest.mark.parametrize('chunk', [7, 1024])
@pytest.mark.parametrize('case', CASES)
def test_blocked(case, chunk):
  rule = functools.partial(blocked.attention, query_chunk=chunk)
  assert worst(evaluate(rule, case, jnp.float32), law(case)) < 1e-5


@pytest.mark.parametrize('case', CASES)
def test_splash_interpreted(case):
  assert worst(evaluate(INTERPRETED['splash'], case, jnp.float32), law(case)) < 1e-5


@pytest.mark.parametrize('case', ['one token', 'long'])
def test_triton_interpreted(case):
  assert worst(evaluate(INTERPRETED['triton'], case, jnp.float32), law(case)) < 1e-5


@pytest.mark.parametrize('name', ['splash', 'triton'])
def test_bfloat16(name):
  assert worst(evaluate(INTERPRETED[name], 'long', jnp.bfloat16), law('long')) < 2e-2


def test_what_cannot_run_says_why_and_the_default_always_can():
  arrays, ids, _, static = make('latent sizes', jnp.float32)
  out = attention.attention(*arrays, segment_ids=ids)
  wanted = reference.attention(*arrays, segment_ids=ids, **static)
  np.testing.assert_allclose(out, wanted, atol=1e-5)
  for name in ('splash', 'triton'):
    with pytest.raises(NotImplementedError, match=f'{name}: a .PU is needed, the platform is cpu'):
      attention.attention(*arrays, implementation=name)
  with pytest.raises(NotImplementedError, match='K=24, V=16'):
    triton.attention(*arrays, segment_ids=ids, **static, interpret=True)
  with pytest.raises(ValueError, match='expected of'):
    attention.attention(*arrays, implementation='fast')


def test_every_argument_that_does_not_fit_is_named():
  q = jnp.zeros((2, 5, 4, 8))
  with pytest.raises(ValueError) as error:
    attention.attention(q, jnp.zeros((2, 5, 3, 8)), jnp.zeros((2, 5, 2, 8), jnp.bfloat16),
                        segment_ids=jnp.zeros((2, 4), jnp.int32), window=-1)
  for part in ('key (2, 5, 3, 8), expected (2, 5, KV, 8)', 'value (2, 5, 2, 8), expected (2, 5, 3)',
               'value bfloat16, expected float32', 'segment_ids (2, 4), expected (2, 5)',
               'window must be at least 0, got -1'):
    assert part in str(error.value)
