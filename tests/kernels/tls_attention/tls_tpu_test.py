"""The TPU kernels of sparse decoding, interpreted, against the written reference."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import tls_attention as tls
from kernels.tls_attention import (
  api,
  cache,
  chunked,
  levels,
  pallas_tpu,
  reference,
  select,
  shapes,
  tpu_append,
  tpu_select,
)

COSTLY = {'test_packed_is_apart': ('pages', 'rows'),
          'test_pages_are_as_the_reference': ('2-2-softmax_max',),
          'test_the_choice_of_tokens_is_that_of_the_other_platforms': ('128-17',)}
CONFIG = tls.Config(block=64, top_blocks=3, top_tokens=40)
ROOM = 384


def interpreted(mode=True):
  """The implementation as XLA operations."""
  return types.SimpleNamespace(
    token_scores=functools.partial(pallas_tpu.token_scores, interpret=mode),
    attend=functools.partial(pallas_tpu.attend, interpret=mode))


@pytest.fixture(autouse=True)
def _interpret(monkeypatch):
  monkeypatch.setitem(api.IMPLEMENTATIONS, 'pallas_tpu', interpreted())


def inputs(seed=0, *, heads=2, kv=2, width=128, value=None, dtype=jnp.float32, whole=False,
           room=ROOM, labels=16):
  """Queries, keys, values of two rows and calibrated channels; `whole` numbers add up exactly."""
  rng = np.random.default_rng(seed)
  draw = (lambda *s: rng.integers(-3, 4, s)) if whole else (lambda *s: rng.normal(size=s))
  q, key, val = draw(2, heads, width), draw(2, kv, room, width), draw(2, kv, room, value or width)
  channels = tls.calibrate(jnp.asarray(rng.normal(size=(8, heads, width))),
                           jnp.asarray(rng.normal(size=(8, kv, width))), labels)
  if whole:  # labels that span 15 are exact at 4 bits
    for head, (first, second) in enumerate(np.asarray(channels)[:, :2]):
      key[:, head, :, first], key[:, head, :, second] = -8, 7
  return *(jnp.asarray(x, jnp.float32).astype(dtype) for x in (q, key, val)), channels


def decoder(config=CONFIG, implementation='pallas_tpu', latent=0):
  """decode(q, key, value, length, channels) of the state behind `length` keys; one program for all
  lengths. Without a value, `latent` channels of the keys are the values, or the keys are packed."""
  @jax.jit
  def run(q, key, value, length, channels):
    own = key[:, :, :, 0] if key.ndim == 5 else key
    state = tls.summarise(jnp.nan_to_num(own), length, channels, config)
    return tls.decode(q, key, latent or value, state, channels=channels, length=length,
                      config=config, scale=0.1, implementation=implementation)[0]
  return run


def error(found, wanted):
  found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
  return np.sqrt(np.mean((found - wanted)**2) / np.mean(wanted**2))


def behind(length, *arrays):
  """The arrays with NaN where no token is yet."""
  hidden = (np.arange(arrays[0].shape[2])[None] >= np.asarray(length)[:, None])[:, None, :, None]
  return [jnp.where(hidden.reshape(*hidden.shape, *(1,) * (x.ndim - 4)), jnp.nan, x)
          for x in arrays]


def check(config, q, key, value, channels, lengths, dtype='float32', latent=0):
  """Every pair of lengths, with NaN behind them, is as the reference says."""
  run = decoder(config, latent=latent)
  for length in lengths:
    length = jnp.asarray(length)
    wide = [np.asarray(x, np.float32) for x in (q, key, value)]
    wanted, _ = reference.decode(*wide, *map(np.asarray, (channels, length)), config, 0.1)
    found = run(q, *behind(length, key, value), length, channels)
    assert found.dtype == key.dtype and found.shape == (*q.shape[:2], value.shape[3])
    assert error(found, wanted) < shapes.TOLERANCE[dtype], length


@pytest.mark.parametrize('heads, kv, reduce', [(2, 2, 'softmax_max'), (16, 1, 'max_logit')])
def test_pages_are_as_the_reference(heads, kv, reduce):
  """Odd and unequal lengths, a single token, fewer tokens than the budget, a full cache."""
  config = dataclasses.replace(CONFIG, reduce=reduce)
  q, key, value, channels = inputs(heads=heads, kv=kv)
  check(config, q, key, value, channels, [(301, 384), (1, 39), (64, 65), (200, 129)])


@pytest.mark.slow
@pytest.mark.parametrize('block', [8, 16, 32, 128, 256])
@pytest.mark.parametrize('heads, kv, width, value', [(8, 2, 128, 128), (12, 2, 64, 64),
                                                     (6, 3, 128, 256), (20, 1, 192, 128)])
def test_blocks_and_widths(block, heads, kv, width, value):
  q, key, value, channels = inputs(heads=heads, kv=kv, width=width, value=value, room=768)
  config = tls.Config(block=block, top_blocks=max(3, 128 // block), top_tokens=60)
  latent = 128 if width == 192 else 0
  check(config, q, key, key[..., :128] if latent else value, channels, [(301, 768), (1, 39)],
        latent=latent)


def test_latent_pages_with_tokens_in_lanes():
  """Keys of 192 channels whose first 128 are the values, blocks of half a tile, 20 query heads."""
  q, key, _, channels = inputs(heads=20, kv=1, width=192)
  check(CONFIG, q, key, key[..., :128], channels, [(301, 65)], latent=128)


def test_bfloat16_stays_near():
  q, key, value, channels = inputs(heads=8, kv=2, dtype=jnp.bfloat16)
  check(CONFIG, q, key, value, channels, [(301, 384), (1, 40)], 'bfloat16')


@pytest.mark.parametrize('few, mode', [
  (True, True), (False, True), (True, pltpu.InterpretParams(detect_races=True))],
  ids=['rows', 'pages', 'rows by a machine'])
def test_packed_is_apart(monkeypatch, mode, few):
  """Rows fetched one by one, two tiles of them, and pages of packed rows. What no copy has brought
  is NaN to the machine, which also looks for races."""
  monkeypatch.setattr(pallas_tpu, 'ROWS', 16)
  monkeypatch.setitem(api.IMPLEMENTATIONS, 'pallas_tpu', interpreted(mode))
  config = dataclasses.replace(CONFIG, top_tokens=20 if few else 30)
  q, key, value, channels = inputs(heads=4)
  packed, apart = decoder(config), decoder(config, 'chunked')
  for length in [(301, 384), (1, 17)]:
    key_nan, value_nan = behind(jnp.asarray(length), key, value)
    found = packed(q, tls.pack(key_nan, value_nan), None, jnp.asarray(length), channels)
    wanted = apart(q, key, value, jnp.asarray(length), channels)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    if mode is True:
      np.testing.assert_allclose(
        decoder(config, 'chunked')(q, tls.pack(key, value), None, jnp.asarray(length), channels),
        wanted, atol=1e-6)


def test_equal_scores_are_cut_where_the_reference_cuts_them():
  """Whole numbers add up exactly and tie: the sets are equal, ties included."""
  q, key, _, channels = inputs(3, heads=4, whole=True)
  config, length = dataclasses.replace(CONFIG, reduce='max_logit'), jnp.asarray([301, 150])
  state = tls.choose(q, tls.summarise(key, length, channels, config), length=length, config=config)
  given = q, state.labels, channels, state.chosen, length, config, 0.25
  found = interpreted().token_scores(*given)
  np.testing.assert_array_equal(found, chunked.token_scores(*given))
  sets = reference.decode(*map(np.asarray, (q, key, key, channels, length)), config, 0.25)[1]
  at, real = levels.token_positions(state.chosen, length, config)
  taken = np.asarray(select.in_top(found, config.top_tokens) & real)
  assert [[np.asarray(at[b, h])[taken[b, h]].tolist() for h in range(2)] for b in range(2)] == sets


def test_only_chosen_rows_of_a_pool_count():
  """Blocks lie elsewhere in a pool than in the sequence, some are in no slot, and every row that is
  not chosen holds NaN. Candidates are stale: of any order, with gaps. Tables do not fit at once."""
  q, key, value, channels = inputs(5, heads=4)
  length = jnp.asarray([301, 384])
  state = tls.summarise(key, length, channels, CONFIG)
  candidates = jnp.asarray([[[3, 0, levels.NONE], [4, levels.NONE, 1]],
                            [[5, 2, 1], [levels.NONE] * 3]], jnp.int32)
  slots = jnp.asarray([[[1, 3, 9], [0, 9, 2]], [[2, 0, 1], [9, 9, 9]]], jnp.int32)
  scores = chunked.token_scores(q, state.labels, channels, candidates, length, CONFIG, 0.1)
  taken = np.asarray(select.in_top(scores, 40)).reshape(2, 2, 3, 64)
  pools = []
  for source in (key, value):
    pool = np.full((2, 2, 256, 128), np.nan, np.float32)
    for b, h, i in np.ndindex(2, 2, 3):
      block, slot = int(candidates[b, h, i]), int(slots[b, h, i])
      if block < 6:
        rows = np.asarray(source[b, h, block * 64:block * 64 + 64])
        pool[b, h, slot * 64:slot * 64 + 64] = np.where(taken[b, h, i][:, None], rows, np.nan)
    pools.append(jnp.asarray(pool))
  wanted = tls.read(q, key, value, state, candidates, candidates, channels=channels, length=length,
                    config=CONFIG, scale=0.1, implementation='chunked')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pallas_tpu, 'TABLE_BYTES', 64)
    found = tls.read(q, *pools, state, candidates, slots, channels=channels, length=length,
                     config=CONFIG, scale=0.1, implementation='pallas_tpu')
  np.testing.assert_allclose(found, wanted, atol=1e-6)
  assert not np.asarray(found[1, 2:]).any()  # without candidates


@pytest.mark.parametrize('n, k', [(7, 3), (128, 17), (300, 200)])
def test_the_choice_of_tokens_is_that_of_the_other_platforms(n, k):
  rng = np.random.default_rng(n)
  run = jax.jit(functools.partial(tpu_select.in_top, k=k, interpret=True))
  compact = jax.jit(functools.partial(tpu_select.compact, k=k))
  for scores in (rng.normal(size=(9, n)), rng.integers(-2, 3, (9, n)), np.zeros((9, n)),
                 np.where(rng.random((9, n)) < 0.7, -np.inf, rng.normal(size=(9, n))),
                 np.where(rng.random((9, n)) < 0.5, 0.0, -0.0), rng.normal(size=(9, n)) * 1e-40,
                 np.full((9, n), np.inf), np.full((9, n), -np.inf)):
    scores = jnp.asarray(scores, jnp.float32).reshape(3, 3, n)
    np.testing.assert_array_equal(run(scores), select.in_top(scores, k))
    np.testing.assert_array_equal(compact(run(scores)), select.top(scores, k))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_token_is_written_where_a_scatter_writes_it(dtype):
  _, key, _, channels = inputs(6, dtype=dtype)
  state = tls.summarise(key, jnp.asarray([380, 200]), channels, CONFIG)
  label = tuple(x[:, :, 0] for x in cache.label_of(key[:, :, 7:8], channels))
  write = jax.jit(functools.partial(tpu_append.write, config=CONFIG, interpret=True))
  scatter = jax.jit(functools.partial(cache.scatter, config=CONFIG))
  for length in ([380, 200], [0, 127], [383, 384]):  # the last one has no room
    given = state, key[:, :, 7], label, jnp.asarray(length)
    for found, wanted in zip(jax.tree.leaves(write(*given)), jax.tree.leaves(scatter(*given))):
      np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize('changes, part', [
  (dict(config=tls.Config(block=48, top_blocks=3, top_tokens=40)), 'block = 48'),
  (dict(room=448), 'N = 448 is not a multiple of 128'),
  (dict(dtype=jnp.float16), 'dtype float16'),
  (dict(config=tls.Config(block=8, top_blocks=3, top_tokens=4), dtype=jnp.bfloat16),
   'block = 8 is not a multiple of 16'),
  (dict(value=64), r'widths \[128, 64\]')], ids=lambda x: x if isinstance(x, str) else '')
def test_what_a_kernel_cannot_do_is_said(changes, part):
  config = changes.pop('config', CONFIG)
  q, key, value, channels = inputs(**changes)
  run = lambda *args: decoder(config).lower(*args)
  with pytest.raises(NotImplementedError, match=part):
    run(q, key, value, jnp.asarray([30, 40]), channels)


def test_elsewhere_the_default_is_another(monkeypatch):
  monkeypatch.setitem(api.IMPLEMENTATIONS, 'pallas_tpu', pallas_tpu)
  q, key, value, channels = inputs()
  with pytest.raises(NotImplementedError, match='a TPU is needed, the platform is cpu'):
    decoder()(q, key, value, jnp.asarray([3, 4]), channels)
  assert decoder(CONFIG, None)(q, key, value, jnp.asarray([3, 4]), channels).shape == q.shape
