"""Sparse decoding by Triton: equal to the XLA form, and Triton code on a host without a GPU."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels import tls_attention as tls
from kernels.tls_attention import api, chunked, pallas_gpu

CALL = '__gpu$xla.gpu.triton'
COSTLY = {'test_kernels_give_what_the_xla_form_gives': ('grouped',)}
CASES = {  # rows, HQ, HK, room, D, V, labels, block, top_blocks, top_tokens, layout
  'grouped': (2, 6, 2, 192, 32, 16, 8, 16, 5, 24, 'apart'),
  'packed': (1, 4, 4, 128, 48, 48, 32, 32, 3, 50, 'packed'),
  'latent': (2, 5, 1, 256, 80, 64, 16, 16, 6, 40, 'latent'),
  'uneven pages': (1, 2, 1, 288, 16, 16, 4, 48, 4, 30, 'apart'),
}


@pytest.fixture
def interpreted(monkeypatch):
  """The Triton kernels as XLA operations, by their name."""
  rule = types.SimpleNamespace(
    token_scores=functools.partial(pallas_gpu.token_scores, interpret=True),
    attend=functools.partial(pallas_gpu.attend, interpret=True))
  monkeypatch.setitem(api.IMPLEMENTATIONS, 'pallas_gpu', rule)


def make(case, dtype=np.float32):
  """Arguments of `decode`; what lies behind the length is not a number."""
  rows, heads, kv, room, width, wide, labels, block, blocks, tokens, layout = CASES[case]
  rng = np.random.default_rng(len(case))
  draw = lambda *size: jnp.asarray(rng.normal(size=size), jnp.float32)
  config = tls.Config(block=block, top_blocks=blocks, top_tokens=tokens)
  length = jnp.asarray([room - 7, 9][:rows], jnp.int32)
  behind = jnp.arange(room)[None, None, :, None] >= length[:, None, None, None]
  key, value = draw(rows, kv, room, width), draw(rows, kv, room, wide)
  channels = tls.calibrate(draw(32, heads, width), draw(32, kv, width), labels)
  state = tls.summarise(key.astype(dtype), length, channels, config)
  key, value = (jnp.where(behind, jnp.nan, x).astype(dtype) for x in (key, value))
  if layout == 'packed':
    key, value = tls.pack(key, value), None
  elif layout == 'latent':
    value = wide
  q = draw(rows, heads, width).astype(dtype)
  return (q, key, value, state), dict(channels=channels, length=length, config=config)


@pytest.mark.parametrize('case', CASES)
def test_kernels_give_what_the_xla_form_gives(case, interpreted):
  (q, key, value, state), given = make(case)
  state = tls.choose(q, state, length=given['length'], config=given['config'])
  scores = [rule(q, state.labels, given['channels'], state.chosen, given['length'],
                 given['config'], 0.2)
            for rule in (chunked.token_scores, api.IMPLEMENTATIONS['pallas_gpu'].token_scores)]
  np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5, atol=1e-5)
  found, wanted = (tls.decode(q, key, value, state, **given, implementation=name)[0]
                   for name in ('pallas_gpu', 'chunked'))
  assert found.shape == wanted.shape and found.dtype == wanted.dtype
  np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_bfloat16(interpreted):
  arrays, given = make('latent', jnp.bfloat16)
  found, wanted = (tls.decode(*arrays, **given, implementation=name)[0].astype(jnp.float32)
                   for name in ('pallas_gpu', 'chunked'))
  assert np.sqrt(np.mean((found - wanted)**2) / np.mean(wanted**2)) < 2e-2


def test_a_row_without_tokens_gives_zero():
  (q, key, value, _), given = make('grouped')
  pages, scores = jnp.zeros((2, 2, 5), jnp.int32), jnp.full((2, 2, 80), -jnp.inf)
  out = pallas_gpu.attend(q, key, value, pages, scores, given['config'], 1.0, interpret=True)
  np.testing.assert_array_equal(out, 0)


def test_where_it_cannot_run_it_says_why():
  arrays, given = make('grouped')
  with pytest.raises(NotImplementedError, match='pallas_gpu: a GPU is needed, the platform is cpu'):
    tls.decode(*arrays, **given, implementation='pallas_gpu')
  assert 'pallas_gpu' not in api.DEFAULT
  attend = functools.partial(pallas_gpu.attend, scale=1.0, interpret=True)
  q, key, value, state = arrays
  scores = jnp.zeros((2, 2, 80))
  with pytest.raises(NotImplementedError, match='block = 8: a multiple of 16 is needed'):
    attend(q, key, value, jnp.zeros((2, 2, 10), jnp.int32), scores,
           config=tls.Config(block=8, top_blocks=10, top_tokens=24))
  with pytest.raises(NotImplementedError, match='width 24: a multiple of 16 is needed'):
    attend(q[..., :24], key[..., :24], value, jnp.zeros((2, 2, 5), jnp.int32), scores,
           config=given['config'])


@pytest.mark.parametrize('heads, kv, width, layout, labels, dtype', [
  (32, 8, 128, 'apart', 32, 'bfloat16'), (32, 8, 128, 'packed', 32, 'float32'),
  (20, 1, 576, 'latent', 128, 'bfloat16')])
def test_kernels_lower_for_cuda(heads, kv, width, layout, labels, dtype):
  config, room, rows = tls.Config(), 98304, 2
  struct = jax.ShapeDtypeStruct
  key = struct((rows, kv, room, *([2] if layout == 'packed' else []), width), dtype)
  value = dict(apart=key, packed=None, latent=512)[layout]
  state = jax.eval_shape(
    functools.partial(tls.summarise, config=config), struct((rows, kv, room, width), dtype),
    struct((rows,), jnp.int32), struct((kv, labels), jnp.int32))
  static = {} if layout == 'apart' else dict(value=value)

  def step(q, state, channels, length, cache):
    return tls.decode(q, **cache, **static, state=state, channels=channels, length=length,
                      config=config, implementation='pallas_gpu')

  cache = dict(key=key) | (dict(value=value) if layout == 'apart' else {})
  gpu = jax.sharding.AbstractDevice('NVIDIA H200', None, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=gpu)
  with jax.sharding.use_abstract_mesh(mesh):
    done = export.export(jax.jit(step), platforms=['cuda'],
                         disabled_checks=[export.DisabledSafetyCheck.custom_call(CALL)])(
      struct((rows, heads, width), dtype), state, struct((kv, labels), jnp.int32),
      struct((rows,), jnp.int32), cache)
  text = str(done.mlir_module())
  for name in ('tls_labels', 'tls_attend'):
    assert f'"{name}"' in text, name
