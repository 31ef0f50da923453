"""Sampling at a fixed budget of keys: all of them is dense, and less depends on the row alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversations_test import SHAPE, request
from decode_test import CONFIG, NEW, prompts, settings
from engine_test import BATCH, MODELS, assert_same, weights

from kernels import tls_attention as tls
from zppo_jax.mesh import place
from zppo_jax.models import cache as cache_lib
from zppo_jax.models import config as config_lib
from zppo_jax.models import decoder
from zppo_jax.models import params as params_lib
from zppo_jax.sampling import conversations, decode, engine, score

COSTLY = {'test_a_budget_of_all_keys_is_dense': ('full', 'latent'),
          'test_a_pool_before_host_memory_changes_nothing': ('latent',),
          'test_slots_give_the_rows_of_the_fixed_batch': ('full, stale',)}
ALL = config_lib.Sparse(tls.Config(block=8, top_blocks=8, top_tokens=64), labels=4)
FEW = config_lib.Sparse(tls.Config(block=8, top_blocks=2, top_tokens=6), labels=4)
STALE = dataclasses.replace(FEW, kernel=dataclasses.replace(FEW.kernel, stale=True, top_blocks=3,
                                                            top_tokens=7))


def sparse(name, how):
  return dataclasses.replace(MODELS[name], sparse=how)


def batch():
  return dataclasses.replace(prompts(**BATCH), request=np.arange(5, dtype=np.uint32))


def draw(config, name, **changes):
  return decode.generate(config, weights(name), batch(), key=jax.random.key(0),
                         settings=settings(**changes), version=3)


@pytest.mark.parametrize('name', MODELS)
def test_a_budget_of_all_keys_is_dense(name):
  assert_same(draw(sparse(name, ALL), name), draw(MODELS[name], name))


@pytest.mark.parametrize('name, how', [
  pytest.param('full', FEW, id='full'), pytest.param('full', STALE, id='full, stale'),
  pytest.param('hybrid', STALE, id='hybrid, stale'), pytest.param('latent', FEW, id='latent')])
def test_slots_give_the_rows_of_the_fixed_batch(name, how):
  config = sparse(name, how)
  wanted = draw(config, name)
  found, _ = engine.run(config, weights(name), batch(), key=jax.random.key(0), version=3,
                        settings=settings(), engine=engine.Engine(slots=4, steps=3, prefill=2))
  assert_same(found, wanted)


def test_a_refilled_slot_chooses_as_a_fresh_row():
  """Nine blocks and more, of which five are read: what rows before left behind would be felt."""
  how = config_lib.Sparse(tls.Config(block=8, top_blocks=5, top_tokens=16), labels=4)
  config, draws = sparse('full', how), np.random.default_rng(0)
  length = np.asarray([64, 51, 38, 60, 45, 33], np.int32)
  rows = np.arange(6, dtype=np.int32)
  tokens = np.where(np.arange(64) < length[:, None], draws.integers(3, 21, (6, 64)), 0)
  batch = decode.Prompts(
    tokens=tokens.astype(np.int32), length=length, forced=np.zeros((6, 0), np.int32),
    forced_length=0 * rows, request=rows.astype(np.uint32), group_id=rows, kind=0 * rows,
    question_id=rows, valid=rows >= 0)
  options = dict(key=jax.random.key(0), version=3, settings=settings(
    max_new_tokens=24, group_size=1, eos_ids=(22,)))
  wanted = decode.generate(config, weights('full'), batch, **options)
  found, stats = engine.run(config, weights('full'), batch, **options,
                            engine=engine.Engine(slots=2, steps=8, prefill=2))
  assert_same(found, wanted)
  assert stats.decode_steps >= 3 * 24


def test_few_keys_are_felt_and_the_scorer_says_by_how_much():
  """Otherwise nothing above would show that keys were left out."""
  found = draw(sparse('full', FEW), 'full')
  scored = score.score(MODELS['full'], weights('full'), found, window=NEW, chunk=5)
  gap = np.abs(np.asarray(scored.logp - found.behavior_logp))[np.asarray(found.loss_mask)]
  assert 1e-4 < gap.mean() < 1


def test_steps_keep_the_books_and_waiting_rows_keep_still():
  """State behind a prompt and nine tokens = that of all keys at once; row 1 waits after four."""
  config = dataclasses.replace(CONFIG, sparse=FEW)
  params = decoder.split_blocks(config, weights('full'))
  tokens = jnp.asarray(np.random.default_rng(0).integers(3, 21, (2, 30)), jnp.int32)
  prompts, _ = decode.prefill(config, weights('full'), tokens[:, :21], jnp.asarray([21, 20]))
  cache, step = cache_lib.whole(config, prompts, 1, 40), jax.jit(decoder.forward, static_argnums=0)
  for i in range(9):
    alive = jnp.asarray([[1], [i < 4]], jnp.int32)
    cache = step(config, params, tokens[:, 21 + i:22 + i], segment_ids=alive, cache=cache).cache
  assert cache.length.tolist() == [30, 24]
  for layer in cache.layers:
    wanted = tls.summarise(layer.rows.key, cache.length, layer.channels, FEW.kernel)
    np.testing.assert_array_equal(layer.state.summary.bounds, wanted.summary.bounds)
    for b, n in enumerate(cache.length.tolist()):
      np.testing.assert_array_equal(layer.state.labels.codes[b, ..., :n],
                                    wanted.labels.codes[b, ..., :n])
      np.testing.assert_array_equal(layer.state.labels.scale[b, :, :n],
                                    wanted.labels.scale[b, :, :n])
    assert layer.rows.key.shape[2] == 40 and (np.asarray(layer.weight) > 0).all()


POOLED = dataclasses.replace(STALE, pool=5, misses=3)


@pytest.mark.parametrize('name', ['full', 'hybrid', 'latent'])
def test_a_pool_before_host_memory_changes_nothing(name):
  wanted = draw(sparse(name, STALE), name)
  found = draw(sparse(name, POOLED), name)
  assert wanted.pool_hits is None
  hits, absent = (np.asarray(x)[np.asarray(found.valid)] for x in (found.pool_hits,
                                                                  found.pool_absent))
  assert (0 < hits).all() and (hits < 1).any() and not absent.any()
  assert_same(found, wanted)
  slots, _ = engine.run(sparse(name, POOLED), weights(name), batch(), key=jax.random.key(0),
                        version=3, settings=settings(),
                        engine=engine.Engine(slots=4, steps=3, prefill=2))
  assert_same(slots, wanted)
  assert slots.pool_hits.shape == found.pool_hits.shape and not slots.pool_absent.any()


def talk(config, shape):
  chat = conversations.Conversations(config, shape)
  requests, said = [request(i, 3 + 4 * i) for i in range(4)], []
  for _ in range(2):
    answers = chat.generate(weights('hybrid'), requests, key=jax.random.key(0),
                            settings=settings(group_size=1))
    said += [(a.tokens, a.logp) for a in answers]
    requests = [dataclasses.replace(r, tokens=r.tokens + a.tokens + request(70 + i, 2).tokens,
                                    name=r.name + 100)
                for i, (r, a) in enumerate(zip(requests, answers))]
  return said


def test_slots_and_chunks_of_conversations_change_nothing():
  config = sparse('hybrid', STALE)
  wanted = talk(config, SHAPE)
  for rows, steps, chunks in ((1, 4, (1,)), (6, 3, (64,))):
    found = talk(config, conversations.Shape(rows, 64, steps, chunks))
    for (tokens, logp), (other, other_logp) in zip(wanted, found):
      assert tokens == other
      np.testing.assert_allclose(logp, other_logp, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('shape, how', [
  (dict(data=4, tensor=2), STALE), (dict(fsdp=2, tensor=4), POOLED)], ids=['resident', 'pool'])
def test_eight_devices_draw_the_same(shape, how):
  config, mesh = sparse('full', how), place.make_mesh(shape, jax.devices()[:8])
  given = prompts(rows=(0, 1, 2, 3)), dict(key=jax.random.key(0), settings=settings())
  wanted = decode.generate(config, weights('full'), given[0], **given[1])
  with jax.set_mesh(mesh):
    placed = jax.device_put(weights('full'),
                            params_lib.shardings(params_lib.abstract(config), mesh))
    found = decode.generate(config, placed, given[0], **given[1])
  assert_same(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, wanted))


@pytest.mark.parametrize('changes, part', [
  (dict(sparse=dataclasses.replace(ALL, labels=9)), 'sparse.labels: must be even and in 2..8'),
  (dict(sparse=dataclasses.replace(ALL, kernel=tls.Config(block=12))),
   'sparse.block: must be a multiple of 8, got 12'),
  (dict(sparse=ALL, attn_cap=30.0), 'sparse: scores have no soft cap'),
  (dict(sparse=ALL, mixers=('sliding',), window=4), 'sparse: needs full or mla layers')],
  ids=['labels', 'block', 'cap', 'layers'])
def test_settings_that_do_not_fit_are_named(changes, part):
  found = config_lib.problems(dataclasses.replace(CONFIG, **changes))
  assert len(found) == 1 and part in found[0], found


def test_a_config_comes_back_from_json():
  config = sparse('full', STALE)
  assert config_lib.from_dict(dataclasses.asdict(config)) == config
