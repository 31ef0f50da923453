"""Sampling: agreement with the scorer, independence of the batch, prefixes, filters, stops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax import models, sampling
from zppo_jax.core import types
from zppo_jax.mesh import place
from zppo_jax.models import decoder
from zppo_jax.models import params as params_lib
from zppo_jax.sampling import decode, rules, score

CONFIG = models.ModelConfig(vocab=24, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8,
                            inter=48, rope_theta=1e4, num_valid=21)
EOS, BUCKET, NEW, GROUP = 2, 10, 12, 3
LENGTHS = (7, 10, 1, 4)


@pytest.fixture(scope='module')
def params():
  return jax.tree.map(lambda x: 2.0 * x, models.init(CONFIG, jax.random.key(0)))


def prompts(rows=range(4), bucket=BUCKET, forced=(), valid=None):
  """Prompt i is the same whatever else is in the batch."""
  rows = list(rows)
  tokens = np.zeros((len(rows), bucket), np.int32)
  for at, i in enumerate(rows):
    tokens[at, :LENGTHS[i]] = np.random.default_rng(i).integers(3, 21, LENGTHS[i])
  width = max([len(f) for f in forced], default=0)
  prefix = np.zeros((len(rows), width), np.int32)
  for at, ids in enumerate(forced):
    prefix[at, :len(ids)] = ids
  ids = np.asarray(rows, np.int32)
  return decode.Prompts(
    tokens=tokens, length=np.asarray([LENGTHS[i] for i in rows], np.int32), forced=prefix,
    forced_length=np.asarray([len(f) for f in forced] or [0] * len(rows), np.int32),
    request=ids.astype(np.uint32), group_id=ids, kind=0 * ids, question_id=ids,
    valid=np.ones(len(rows), bool) if valid is None else np.asarray(valid))


def settings(**changes):
  return dataclasses.replace(
    sampling.Settings(max_new_tokens=NEW, eos_ids=(EOS,), group_size=GROUP), **changes)


def draw(params, batch, key=0, **changes):
  return sampling.generate(CONFIG, params, batch, key=jax.random.key(key),
                           settings=settings(**changes))


def responses(rollout):
  """Response ids of every row, prompt cut off."""
  tokens, turns = np.asarray(rollout.tokens), np.asarray(rollout.turn_id)
  return [tuple(t[u > 0]) for t, u in zip(tokens, turns)]


def shape(logits, **changes):
  """What the chain of the settings makes of logits."""
  chain = settings(**changes).chain
  return rules.apply(chain, ((),) * len(chain), logits, jnp.zeros(len(logits), jnp.int32))


def scorer(params, rollout, temperature=1.0):
  return score.score(CONFIG, params, rollout, window=NEW, temperature=temperature, chunk=4)


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_sampler_and_scorer_agree(params, temperature):
  rollout = draw(params, prompts(), temperature=temperature)
  scored = scorer(params, rollout, temperature)
  assert np.abs(scored.logp - rollout.behavior_logp).max() < 1e-4
  assert np.all(np.asarray(rollout.behavior_logp)[np.asarray(rollout.loss_mask)] < 0)


def test_scores_are_log_softmax_of_the_forward():
  params = models.init(CONFIG, jax.random.key(0))  # rounding grows with the logits: usual size
  rollout = draw(params, prompts())
  logits = decoder.forward(CONFIG, params, rollout.tokens, segment_ids=rollout.segment_ids).logits
  logp = jax.nn.log_softmax(logits)[:, :-1]
  wanted = jnp.take_along_axis(logp, rollout.tokens[:, 1:, None], axis=2)[..., 0]
  mask = rollout.loss_mask[:, 1:]
  scored = scorer(params, rollout)
  np.testing.assert_allclose(np.where(mask, scored.logp[:, 1:], 0), np.where(mask, wanted, 0),
                             atol=1e-5)
  entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
  np.testing.assert_allclose(np.where(mask, scored.entropy[:, 1:], 0),
                             np.where(mask, entropy, 0), atol=1e-5)


def test_scores_of_rows_that_share_their_prompt_are_those_of_the_rows_alone():
  """Log-probs, entropies and the gradient, with forced tokens and an invalid group."""
  params = models.init(CONFIG, jax.random.key(0))  # rounding grows with the logits: usual size
  rollout = draw(params, prompts(forced=((), (5, 6), (7,), ()), valid=(True, True, True, False)))

  def scores(params, group):
    found = score.score(CONFIG, params, rollout, window=NEW, chunk=4, group=group)
    return jnp.sum(found.logp * jnp.cos(found.logp)), (found.logp, found.entropy)

  (_, alone), grads = jax.jit(jax.value_and_grad(scores, has_aux=True), static_argnums=1)(params, 1)
  (_, shared), found = jax.jit(jax.value_and_grad(scores, has_aux=True), static_argnums=1)(
    params, GROUP)
  for a, b in zip(shared, alone):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(grads)):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9)


def test_a_sample_depends_on_nothing_else_in_the_batch(params):
  whole = responses(draw(params, prompts()))
  for rows, bucket in (((2,), BUCKET), ((3, 1, 0), BUCKET), ((0, 1, 2, 3), 16)):
    part = responses(draw(params, prompts(rows, bucket)))
    for at, i in enumerate(rows):
      assert part[at * GROUP:(at + 1) * GROUP] == whole[i * GROUP:(i + 1) * GROUP]
  fewer = responses(draw(params, prompts(), group_size=2))
  assert fewer[:2] == whole[:2] and fewer[2:4] == whole[GROUP:GROUP + 2]


def test_keys_and_samples_differ(params):
  first = responses(draw(params, prompts()))
  assert first == responses(draw(params, prompts())) != responses(draw(params, prompts(), key=1))
  assert len(set(first[:GROUP])) > 1


def test_rows_have_no_gap_and_stop_at_eos(params):
  stops = (EOS, 5, 9)
  rollout = draw(params, prompts(), eos_ids=stops)
  for row, ids in enumerate(responses(rollout)):
    start = LENGTHS[row // GROUP]
    mask = np.asarray(rollout.loss_mask[row])
    assert list(np.flatnonzero(mask)) == list(range(start, start + len(ids)))
    assert not set(stops) & set(ids[:-1])
    finished = ids[-1] in stops
    assert int(rollout.status[row]) == (types.FINISHED if finished else types.TRUNCATED)
    assert finished or len(ids) == NEW
    assert int(rollout.traj_tokens[row]) == len(ids)
    assert np.asarray(rollout.segment_ids[row]).sum() == start + len(ids)
  assert {int(s) for s in rollout.status} == {types.FINISHED, types.TRUNCATED}


def test_forced_prefix_opens_the_response_and_is_not_sampled(params):
  forced = [(5, 6, 7), (), (9,), (4, 4)]
  rollout = draw(params, prompts(forced=forced))
  for row, ids in enumerate(responses(rollout)):
    prefix = forced[row // GROUP]
    assert ids[:len(prefix)] == prefix
    mask = np.asarray(rollout.loss_mask[row])
    assert mask.sum() == len(ids) - len(prefix)
    assert not mask[:LENGTHS[row // GROUP] + len(prefix)].any()
  assert np.abs(scorer(params, rollout).logp - rollout.behavior_logp).max() < 1e-4
  free = responses(draw(params, prompts()))
  assert free[GROUP:2 * GROUP] == responses(rollout)[GROUP:2 * GROUP]  # an empty prefix is none


def test_invalid_prompts_yield_invalid_rows_and_nothing_else(params):
  rollout = draw(params, prompts(valid=[True, False, True, False]))
  whole = responses(draw(params, prompts()))
  valid = np.repeat([True, False, True, False], GROUP)
  np.testing.assert_array_equal(rollout.valid, valid)
  assert not np.asarray(rollout.loss_mask)[~valid].any()
  assert responses(rollout)[:GROUP] == whole[:GROUP]
  empty = draw(params, prompts(valid=[False] * 4))
  assert not np.asarray(empty.loss_mask).any() and not np.asarray(empty.turn_id).any()


def test_greedy_takes_the_best_token(params):
  rollout = draw(params, prompts(), temperature=0.0, group_size=1)
  logits = decoder.forward(CONFIG, params, rollout.tokens, segment_ids=rollout.segment_ids).logits
  best = np.asarray(jnp.argmax(logits, axis=-1))[:, :-1]
  mask = np.asarray(rollout.loss_mask)[:, 1:]
  np.testing.assert_array_equal(np.asarray(rollout.tokens)[:, 1:][mask], best[mask])


def test_filtered_log_probs_are_renormalised(params):
  rollout = draw(params, prompts(), top_k=2)
  logits = decoder.forward(CONFIG, params, rollout.tokens, segment_ids=rollout.segment_ids).logits
  shaped = jax.nn.log_softmax(shape(logits.reshape(-1, 24), top_k=2)).reshape(logits.shape)
  wanted = jnp.take_along_axis(shaped[:, :-1], rollout.tokens[:, 1:, None], axis=2)[..., 0]
  mask = np.asarray(rollout.loss_mask)[:, 1:]
  np.testing.assert_allclose(np.asarray(rollout.behavior_logp)[:, 1:][mask],
                             np.asarray(wanted)[mask], atol=1e-4)


def test_samples_follow_the_distribution(params):
  batch = prompts((2,))
  rollout = draw(params, batch, group_size=4000, max_new_tokens=1)
  first = np.asarray(rollout.tokens)[:, LENGTHS[2]]
  logits = decoder.forward(CONFIG, params, jnp.asarray(batch.tokens[:, :1])).logits[0, 0]
  probs = np.asarray(jax.nn.softmax(logits))
  counts = np.bincount(first, minlength=24)
  error = np.abs(counts / 4000 - probs) / np.sqrt(probs * (1 - probs) / 4000 + 1e-9)
  assert error[probs > 1e-3].max() < 4 and counts[21:].sum() == 0


def test_a_shorter_bucket_cuts_the_same_sample(params):
  """Noise is keyed by the position in the response: the room behind it does not matter."""
  long, short = responses(draw(params, prompts())), responses(draw(params, prompts(),
                                                                   max_new_tokens=5))
  assert [ids[:5] for ids in long] == short
  assert any(len(ids) > 5 for ids in long)


def test_noise_is_named_by_the_request_not_by_the_slot(params):
  batch = prompts((2, 2, 2))
  same = responses(draw(params, batch))
  assert same[:GROUP] == same[GROUP:2 * GROUP] == same[2 * GROUP:]
  named = dataclasses.replace(batch, request=np.asarray([7, 8, 7], np.uint32))
  found = responses(draw(params, named))
  assert found[:GROUP] == found[2 * GROUP:] != found[GROUP:2 * GROUP]


def test_the_loop_ends_with_the_last_row(params):
  """All ids but one end a response: a step is as long as its longest row, not as its bucket."""
  run = jax.jit(decode._decode, static_argnums=(0, 4))
  stop = settings(eos_ids=tuple(i for i in range(24) if i != 5))
  state = run(CONFIG, params, prompts(), jax.random.key(0), stop)
  assert int(state.step) == int(np.max(state.length)) < NEW
  nobody = run(CONFIG, params, prompts(valid=[False] * 4), jax.random.key(0), stop)
  assert int(nobody.step) == 0


def test_any_of_several_stop_ids_ends_a_row(params):
  free = responses(draw(params, prompts()))
  second = next(ids[2] for ids in free if len(ids) > 4)
  cut = responses(draw(params, prompts(), eos_ids=(EOS, second)))
  for before, after in zip(free, cut):
    stops = [i for i, t in enumerate(before) if t in (EOS, second)]
    assert after == before[:stops[0] + 1] if stops else after == before


@pytest.mark.parametrize('changes', [dict(top_p=0.5), dict(min_p=0.3), dict(
  temperature=0.6, top_k=5, top_p=0.8, min_p=0.1)])
def test_all_filters_renormalise_behaviour(params, changes):
  rollout = draw(params, prompts(), **changes)
  logits = decoder.forward(CONFIG, params, rollout.tokens, segment_ids=rollout.segment_ids).logits
  shaped = shape(logits.reshape(-1, 24), **changes)
  logp = jax.nn.log_softmax(shaped).reshape(logits.shape)[:, :-1]
  wanted = jnp.take_along_axis(logp, rollout.tokens[:, 1:, None], axis=2)[..., 0]
  mask = np.asarray(rollout.loss_mask)[:, 1:]
  found = np.asarray(rollout.behavior_logp)[:, 1:][mask]
  np.testing.assert_allclose(found, np.asarray(wanted)[mask], atol=1e-4)
  assert found.min() > -20  # no dropped id was ever drawn
  plain = np.asarray(jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], rollout.tokens[
    :, 1:, None], axis=2))[..., 0][mask]
  assert (found >= plain - 1e-4).mean() > 0.5 and not np.allclose(found, plain, atol=1e-3)


def test_a_mesh_of_eight_draws_the_same_samples(params):
  mesh = place.make_mesh(dict(data=2, fsdp=2, tensor=2), jax.devices()[:8])
  single = draw(params, prompts())
  with jax.set_mesh(mesh):
    shardings = params_lib.shardings(params_lib.abstract(CONFIG), mesh)
    wide = draw(jax.device_put(params, shardings), prompts())
  assert len(wide.tokens.sharding.device_set) == 8
  assert responses(wide) == responses(single)
  np.testing.assert_allclose(wide.behavior_logp, single.behavior_logp, atol=1e-5)


def test_version_and_padding_are_written_per_token(params):
  rollout = sampling.generate(CONFIG, params, prompts(), key=jax.random.key(0),
                              settings=settings(), version=17)
  mask = np.asarray(rollout.loss_mask)
  assert set(np.asarray(rollout.version)[mask]) == {17}
  for name in ('version', 'behavior_logp'):
    assert not np.asarray(getattr(rollout, name))[~mask].any()
  inside = np.asarray(rollout.segment_ids) > 0
  columns = np.broadcast_to(np.arange(inside.shape[1]), inside.shape)
  np.testing.assert_array_equal(np.asarray(rollout.positions)[inside], columns[inside])
  assert not np.asarray(rollout.tokens)[~inside].any()


@pytest.mark.parametrize('changes, part', [
  (dict(max_new_tokens=0), 'max_new_tokens must be at least 1, got 0'),
  (dict(temperature=-1.0), 'temperature must be at least 0'),
  (dict(temperature=0.0), 'temperature 0 draws 3 equal samples'),
  (dict(top_p=0.0), r'top_p must be in \(0, 1\], got 0.0'),
  (dict(min_p=1.0), 'min_p'), (dict(top_k=-1), 'top_k'), (dict(eos_ids=()), 'eos_ids'),
  (dict(group_size=0), 'group_size')])
def test_bad_settings_are_named(changes, part):
  with pytest.raises(ValueError, match=part):
    decode.check_settings(settings(**changes))


def test_penalties_against_a_loop_that_counts(params):
  """Greedy rows, one forward of the whole row per token, logits changed by hand."""
  penalties = dict(presence=0.6, frequency=0.3, repetition=1.4)
  found = jax.tree.map(np.asarray, draw(params, prompts(), group_size=1, temperature=0.0,
                                        **penalties))
  plain = jax.tree.map(np.asarray, draw(params, prompts(), group_size=1, temperature=0.0))
  assert (found.tokens != plain.tokens).any()
  batch, forward = prompts(), jax.jit(lambda p, t: decoder.forward(CONFIG, p, t).logits[0])
  for row, length in enumerate(batch.length):
    ids, response = batch.tokens[row, :length].tolist(), []
    while len(response) < NEW and (not response or response[-1] != EOS):
      whole = ids + response
      z = np.array(forward(params, np.pad(whole, (0, 64 - len(whole)))[None])[len(whole) - 1])
      for token in set(ids + response):
        z[token] = z[token] / 1.4 if z[token] > 0 else z[token] * 1.4
      for token in set(response):
        z[token] -= 0.3 * response.count(token) + 0.6
      response.append(int(z.argmax()))
    assert found.tokens[row][found.turn_id[row] > 0].tolist() == response
  shaped = np.log(np.exp(z - z.max()) / np.exp(z - z.max()).sum())
  last = found.behavior_logp[row][found.loss_mask[row]][-1]
  np.testing.assert_allclose(last, shaped[response[-1]], atol=1e-5)


@pytest.mark.parametrize('changes', [dict(repetition=0.0), dict(presence=float('nan')),
                                     dict(frequency=float('inf'))])
def test_penalties_out_of_range_are_refused(params, changes):
  with pytest.raises(ValueError, match=f'{next(iter(changes))} must be'):
    draw(params, prompts(), **changes)
