"""Slots against the fixed batch: the same rows, whatever the shapes and the order of refills."""

import dataclasses

import jax
import numpy as np
import pytest
from decode_test import CONFIG, GROUP, prompts, settings

from zppo_jax import models
from zppo_jax.core import trees, types
from zppo_jax.mesh import place
from zppo_jax.models import cache, decoder
from zppo_jax.models import params as params_lib
from zppo_jax.models.config import Mla
from zppo_jax.sampling import decode, engine, slots, stops

MODELS = {
  'full': CONFIG,
  'sliding': dataclasses.replace(CONFIG, mixers=('sliding', 'full'), window=5),
  'hybrid': dataclasses.replace(CONFIG, mixers=('gdn', 'full'), linear_heads=2,
                                linear_value_heads=2, linear_key_dim=8, linear_value_dim=8),
  'latent': dataclasses.replace(CONFIG, mixers=('mla',), mla=Mla(
    rank=8, nope=8, rope=4, value=8))}
BATCH = dict(rows=(0, 1, 2, 3, 1), valid=(True, True, True, False, True))


def weights(name):
  return models.init(MODELS[name], jax.random.key(0))


def both(name, batch, shape, **changes):
  """(rollout of the fixed batch, rollout through slots, Stats)."""
  params, given = weights(name), dict(key=jax.random.key(0), settings=settings(**changes))
  batch = dataclasses.replace(batch, request=np.arange(len(batch.length), dtype=np.uint32))
  wanted = decode.generate(MODELS[name], params, batch, **given, version=3)
  found, stats = engine.run(MODELS[name], params, batch, **given, version=3, engine=shape)
  return wanted, found, stats


def assert_same(found, wanted):
  for name, x in trees.named_leaves(wanted).items():
    y = trees.named_leaves(found)[name]
    if name in ('behavior_logp', 'log_kept_mass'):
      np.testing.assert_allclose(y, x, atol=1e-5, err_msg=name)
    else:
      np.testing.assert_array_equal(y, x, err_msg=name)


@pytest.mark.parametrize('name', MODELS)
def test_slots_give_the_rows_of_the_fixed_batch(name):
  wanted, found, stats = both(name, prompts(**BATCH), engine.Engine(slots=4, steps=3, prefill=2))
  assert_same(found, wanted)
  assert stats.prefills == 2 and stats.tokens == int(np.asarray(wanted.traj_tokens).sum())
  lengths = np.asarray(wanted.traj_tokens).reshape(-1, GROUP)
  assert len(set(lengths[[0, 1, 2, 4]].reshape(-1))) > 3, 'all equally long: no refill is shown'


@pytest.mark.parametrize('shape', [(1, 1, 1), (3, 16, 5), (16, 5, 1), (40, 100, 8)], ids=str)
def test_shapes_of_the_programs_change_nothing(shape):
  wanted, found, stats = both('full', prompts(**BATCH), engine.Engine(*shape))
  assert_same(found, wanted)
  assert 0 < stats.occupancy <= 1 and stats.decode_steps * shape[0] >= stats.tokens
  if shape[0] == 1:
    assert stats.occupancy == 1 and stats.decode_steps == stats.tokens


def test_forced_prefixes_greedy_rows_and_filters():
  forced = ((5, 6, 7), (), (8,), (9, 9), (4,))
  batch = prompts(**BATCH, forced=forced)
  for changes in (dict(), dict(temperature=0.0, group_size=1), dict(top_k=3, top_p=0.9),
                  dict(presence=0.7, frequency=0.4, repetition=1.5)):
    wanted, found, _ = both('full', batch, engine.Engine(slots=3, steps=2), **changes)
    assert_same(found, wanted)


def test_nothing_to_do_costs_nothing():
  wanted, found, stats = both('full', prompts(rows=(0, 1), valid=(False, False)),
                              engine.Engine(slots=2))
  assert_same(found, wanted)
  assert stats == engine.Stats(0, 0, 0, 0.0, 0.0)


def test_nothing_compiles_after_the_first_call():
  def call(rows, seed):
    batch = dataclasses.replace(prompts(rows), request=np.arange(len(rows), dtype=np.uint32))
    engine.run(CONFIG, weights('full'), batch, key=jax.random.key(seed), settings=settings(),
               engine=engine.Engine(slots=4, steps=3))

  call((0, 1, 2, 3), 0)
  programs = slots.prefill, slots.insert, slots.steps, slots.empty, engine._assemble
  before = [p._cache_size() for p in programs]
  call((3, 3, 1, 0), 1)
  assert [p._cache_size() for p in programs] == before


def test_eight_devices_draw_the_same():
  mesh = place.make_mesh(dict(data=2, fsdp=2, tensor=2), jax.devices()[:8])
  params, batch = weights('full'), prompts(rows=(0, 1, 2, 3))
  given = dict(key=jax.random.key(0), settings=settings(), engine=engine.Engine(8, 4, 4))
  wanted, _ = engine.run(CONFIG, params, batch, **given)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, params_lib.shardings(params_lib.abstract(CONFIG), mesh))
    found, _ = engine.run(CONFIG, placed, batch, **given)
  assert_same(jax.tree.map(np.asarray, found), wanted)


@pytest.mark.parametrize('name', ['slots', 'steps', 'prefill'])
def test_shapes_are_at_least_one(name):
  shape = dataclasses.replace(engine.Engine(2), **{name: 0})
  with pytest.raises(ValueError, match=f'engine.{name} must be at least 1, got 0'):
    engine.run(CONFIG, weights('full'), prompts(), key=jax.random.key(0), settings=settings(),
               engine=shape)


def text_of(tokens):
  """A token is a letter, or a piece of two."""
  return ''.join('abcdefghijklmnopq'[t - 4] if t < 20 else 'xy' for t in tokens if t > 3)


@pytest.mark.parametrize('steps', [1, 3, 50])
def test_stop_strings_cut_rows_wherever_the_host_looks(steps):
  """Against a slow reference: decode everything, and cut at the first prefix that holds one."""
  batch, strings = prompts(**BATCH), ('l', 'ed', 'nx')
  given = dict(key=jax.random.key(0), settings=settings())
  whole = jax.tree.map(np.asarray, decode.generate(CONFIG, weights('full'), batch, **given))
  found, stats = engine.run(
    CONFIG, weights('full'), batch, **given, engine=engine.Engine(slots=4, steps=steps),
    stop=stops.stop_strings(strings, text_of))
  found, cuts = jax.tree.map(np.asarray, found), 0
  for row, valid in enumerate(whole.valid):
    response = whole.tokens[row][whole.turn_id[row] > 0].tolist()
    size = next((n for n in range(1, len(response) + 1)
                 if any(s in text_of(response[:n]) for s in strings)), None)
    cuts += size is not None
    assert found.tokens[row][found.turn_id[row] > 0].tolist() == response[:size]
    if valid and size is not None:
      assert found.status[row] == types.FINISHED
      assert found.traj_tokens[row] == size
  assert cuts > 3 and stats.tokens < whole.traj_tokens.sum() or steps == 50


def test_stop_strings_across_borders_and_far_apart():
  stop = stops.stop_strings(['xyz', 'END'], lambda ids: ''.join(map(chr, ids)))
  row = [ord(c) for c in 'some text, xy and then xyz, END']
  assert stop(row, 0) == len('some text, xy and then xyz')
  assert stop(row[:25], 0) is None and stop(row, 25) == 26
  assert stops.cut('a xyz END', ['END', 'xyz']) == 'a ' and stops.cut('a', ['b']) == 'a'
  for bad in ([], ['a', '']):
    with pytest.raises(ValueError, match='not empty'):
      stops.stop_strings(bad, str)


def decoded_by_hand(config, versions, prompt, response, used):
  """Log-probs of a response, token by token; used[i]: the weights that made the logits of token i.

  A cache column keeps what the weights wrote that were in use when its token was read.
  """
  tokens, length = prompt[None], np.asarray([len(prompt)], np.int32)
  held, logits = decode.prefill(config, versions[used[0]], tokens, length)
  room = cache.whole(config, held, 1, len(prompt) + len(response))
  found = []
  for at, token in enumerate(response):
    found.append(jax.nn.log_softmax(logits[0])[token])
    if at + 1 < len(response):
      params = decoder.split_blocks(config, versions[used[at + 1]])
      out = decoder.forward(config, params, np.asarray([[token]], np.int32), cache=room)
      room, logits = out.cache, out.logits[:, 0]
  return np.asarray(found)


def refreshed(name, how, looks, **shape):
  """(rollout, stats) of a run that gets version 4 after version 3 at its look number `looks`."""
  params = dict(zip((3, 4), (weights(name), jax.tree.map(lambda x: 1.5 * x, weights(name)))))
  count = iter(range(1000))
  rollout, stats = engine.run(
    MODELS[name], params[3], prompts(rows=(0, 1, 2, 3)), key=jax.random.key(0),
    settings=settings(), engine=engine.Engine(**shape, refresh=how), version=3,
    refresh=lambda: (params[4], 4) if next(count) == looks else None)
  return params, jax.tree.map(np.asarray, rollout), stats


@pytest.mark.parametrize('name', ['full', 'hybrid'])
def test_rows_in_flight_go_on_with_newer_weights(name):
  versions, rollout, _ = refreshed(name, 'keep', 2, slots=5, steps=3, prefill=2)
  mixed = 0
  for row, mask in enumerate(rollout.loss_mask):
    used, start = rollout.version[row][mask], int(np.argmax(mask))
    assert (np.diff(used) >= 0).all() and set(used) <= {3, 4}
    mixed += len(set(used)) == 2
    wanted = decoded_by_hand(MODELS[name], versions, rollout.tokens[row, :start],
                             rollout.tokens[row][mask], used)
    np.testing.assert_allclose(rollout.behavior_logp[row][mask], wanted, atol=2e-5)
  assert mixed >= 3 and (rollout.version[rollout.loss_mask] == 4).any()


def test_rows_in_flight_end_before_newer_weights_are_used():
  versions, rollout, stats = refreshed('full', 'drain', 1, slots=5, steps=3, prefill=2)
  rows = [set(v[m]) for v, m in zip(rollout.version, rollout.loss_mask)]
  assert all(len(row) == 1 for row in rows) and {3} in rows and {4} in rows
  assert stats.prefills == 3  # the second prompt of the first prefill was not finished
  for version, params in versions.items():
    whole = decode.generate(CONFIG, params, prompts(rows=(0, 1, 2, 3)), key=jax.random.key(0),
                            settings=settings(), version=version)
    same = [i for i, row in enumerate(rows) if row == {version}]
    assert_same(*(jax.tree.map(lambda x, same=same: np.asarray(x)[same], x)
                  for x in (rollout, whole)))


def test_newer_weights_of_another_shape_are_refused_by_name():
  other = dataclasses.replace(CONFIG, inter=40)
  with pytest.raises(ValueError, match=r'refresh: blocks.0.mlp.down must be .*48.*, got .*40'):
    engine.run(CONFIG, weights('full'), prompts(), key=jax.random.key(0), settings=settings(),
               engine=engine.Engine(2), refresh=lambda: (models.init(other, jax.random.key(0)), 1))
  with pytest.raises(ValueError, match="engine.refresh must be 'keep' or 'drain', got 'abort'"):
    engine.run(CONFIG, weights('full'), prompts(), key=jax.random.key(0), settings=settings(),
               engine=engine.Engine(2, refresh='abort'))


@pytest.mark.parametrize('changes', [{}, dict(top_k=3), dict(temperature=0.0, group_size=1)],
                         ids=str)
def test_rows_without_finite_logits_end_and_harm_no_other(changes):
  """The head is not tied to the embedding: only rows that read token 5 meet a NaN."""
  config = dataclasses.replace(CONFIG, tied=False)
  whole = models.init(config, jax.random.key(0))
  broken = dataclasses.replace(whole, embed=whole.embed.at[5].set(np.nan))
  given = dict(key=jax.random.key(0), settings=settings(**changes), version=3)
  batch = prompts(**BATCH)
  fine = jax.tree.map(np.asarray, decode.generate(config, whole, batch, **given))
  both = [decode.generate(config, broken, batch, **given),
          engine.run(config, broken, batch, **given, engine=engine.Engine(3, steps=2))[0]]
  assert_same(*both)
  found, faults = jax.tree.map(np.asarray, both[0]), 0
  for row in np.flatnonzero(fine.valid):
    tokens, start = fine.tokens[row], int(fine.turn_id[row].argmax())
    end = start + int((fine.turn_id[row] > 0).sum())
    read = [i for i in range(end) if tokens[i] == 5]
    if not read or read[0] + 1 >= end:  # never read, or only as the last token
      assert_same(*(jax.tree.map(lambda x, row=row: x[row], x) for x in (found, fine)))
      continue
    faults += 1
    assert found.status[row] == types.NONFINITE and np.isnan(found.reward[row])
    assert found.traj_tokens[row] == max(0, read[0] + 1 - start)
    assert np.isfinite(found.behavior_logp[row]).all()
  assert 0 < faults < fine.valid.sum()


def test_a_fault_behind_a_stop_string_was_never_read():
  config = dataclasses.replace(CONFIG, tied=False)
  whole = models.init(config, jax.random.key(0))
  broken = dataclasses.replace(whole, embed=whole.embed.at[5].set(np.nan))
  stop = stops.stop_strings(('b',), text_of)  # token 5 itself: drawn, and read only afterwards
  found = [jax.tree.map(np.asarray, engine.run(
    config, broken, prompts(**BATCH), key=jax.random.key(0), settings=settings(), stop=stop,
    engine=engine.Engine(4, steps=steps))[0]) for steps in (1, 3, 50)]
  assert (found[0].status == types.FINISHED).any()
  for other in found[1:]:
    assert_same(other, found[0])


def test_stop_strings_are_found_across_tokens_without_text():
  stop = stops.stop_strings(['ab'], lambda ids: ''.join('ab'[i] for i in ids if i < 2))
  assert stop([0, 9, 9, 1], 0) == 4 and stop([0, 9, 9], 0) is None and stop([0, 9, 9, 1], 3) == 4
  assert stop(np.asarray([9, 9, 9, 9, 1]), 4) is None


@pytest.mark.parametrize('change, part', [
  (dict(length=np.asarray([7, 0, 1, 4], np.int32)), r'row 1 must have 1..10 tokens, got 0'),
  (dict(length=np.asarray([7, 10, 11, 4], np.int32)), r'row 2 must have 1..10 tokens, got 11'),
  (dict(tokens=np.full((4, 10), 99, np.int32)), r'row 0 must have token ids in 0..23, got 99'),
  (dict(tokens=np.where(np.arange(10) == 3, -7, 5) * np.ones((4, 1), np.int32)),
   r'row 0 must have token ids in 0..23, got -7'),
  (dict(forced_length=np.asarray([1, 0, 0, 0], np.int32)),
   'row 0 has room to force 0 tokens, got 1'),
  (dict(eos_ids=(99,)), r'eos_ids must be below'), (dict(top_k=99), 'top_k at most')], ids=str)
def test_bad_prompts_are_refused_by_row(change, part):
  own = {k: v for k, v in change.items() if k in ('eos_ids', 'top_k')}
  batch = dataclasses.replace(prompts(), **({} if own else change))
  with pytest.raises(ValueError, match=part):
    engine.run(CONFIG, weights('full'), batch, key=jax.random.key(0), settings=settings(**own),
               engine=engine.Engine(2))
