"""Two-level sparse decoding against the written reference: sets, outputs, bounds, bookkeeping."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import tls_attention as tls
from kernels.tls_attention import baselines, cache, chunked, levels, reference, select

COSTLY = {'test_outputs_and_sets_are_those_of_the_reference': (
  'max_logit-4-2', 'softmax_max-16-1', 'softmax_max-4-4')}
CONFIG = tls.Config(block=8, top_blocks=4, top_tokens=12)


def inputs(seed=0, *, rows=2, heads=4, kv=2, room=96, width=16, value=None, length=(96, 61),
           whole=False, dtype=np.float32):
  """Queries, keys, values, lengths and calibrated channels; `whole` numbers add up exactly."""
  rng = np.random.default_rng(seed)
  draw = ((lambda *s: rng.integers(-3, 4, s)) if whole else (lambda *s: rng.normal(size=s)))
  q, key = draw(rows, heads, width), draw(rows, kv, room, width)
  val = draw(rows, kv, room, value or width)
  cast = lambda x: jnp.asarray(x, jnp.float32).astype(dtype)
  length = jnp.asarray(length[:rows], jnp.int32)
  samples = jnp.asarray(rng.normal(size=(32, heads, width)), jnp.float32)
  keys = jnp.asarray(rng.normal(size=(32, kv, width)), jnp.float32)
  channels = tls.calibrate(samples, keys, 8)
  if whole:  # labels that span 15 are exact at 4 bits
    for head, (first, second) in enumerate(np.asarray(channels)[:, :2]):
      key[:, head, :, first], key[:, head, :, second] = -8, 7
  return cast(q), cast(key), cast(val), length, channels


summarise = jax.jit(tls.summarise, static_argnames='config')
append = jax.jit(tls.append, static_argnames='config')
choose = jax.jit(tls.choose, static_argnames='config')
decode = jax.jit(tls.decode, static_argnames=('config', 'scale'))


def run(q, key, value, length, channels, config=CONFIG, **kwargs):
  state = summarise(key, length, channels, config=config)
  return decode(q, key, value, state, channels=channels, length=length, config=config, **kwargs)


def dense(q, key, value, length, scale=None):
  scale = q.shape[-1]**-0.5 if scale is None else scale
  return np.stack([reference.dense(*map(np.asarray, (q[b], key[b], value[b])), int(length[b]),
                                   scale) for b in range(len(q))])


@functools.partial(jax.jit, static_argnames=('config', 'scale'))
def _chosen(q, key, length, channels, config, scale):
  state = tls.summarise(key, length, channels, config)
  blocks = levels.choose_blocks(levels.block_scores(q, state.summary, length, config), length,
                                config)
  scores = chunked.token_scores(q, state.labels, channels, blocks, length, config, scale)
  return levels.choose_tokens(scores, blocks, config)


def chosen(q, key, length, channels, config, scale):
  """Token sets of the library, per row and head."""
  at, valid = map(np.asarray, _chosen(q, key, length, channels, config, scale))
  return [[a[v].tolist() for a, v in zip(*rows)] for rows in zip(at, valid)]


@pytest.mark.parametrize('heads, kv', [(4, 4), (4, 2), (8, 2), (16, 1)])
@pytest.mark.parametrize('reduce', ['softmax_max', 'max_logit'])
def test_outputs_and_sets_are_those_of_the_reference(heads, kv, reduce):
  """Whole numbers add up exactly and tie: sets are equal, ties included. A softmax rounds, so there
  the numbers are drawn without ties."""
  config = dataclasses.replace(CONFIG, reduce=reduce)
  for seed in range(4):
    q, key, value, length, channels = inputs(seed, heads=heads, kv=kv, whole=reduce == 'max_logit')
    wanted, sets = reference.decode(*map(np.asarray, (q, key, value, channels, length)), config,
                                    0.25)
    assert chosen(q, key, length, channels, config, 0.25) == sets
    np.testing.assert_allclose(run(q, key, value, length, channels, config, scale=0.25)[0], wanted,
                               atol=1e-5)


@pytest.mark.parametrize('length', [(96, 61), (1, 7), (8, 9), (40, 95)], ids=str)
def test_a_budget_that_covers_everything_is_dense_attention(length):
  config = tls.Config(block=8, top_blocks=12, top_tokens=96)
  q, key, value, length, channels = inputs(length=length)
  np.testing.assert_allclose(run(q, key, value, length, channels, config)[0],
                             dense(q, key, value, length), atol=1e-5)


def test_all_blocks_and_exact_labels_take_the_true_best():
  """Every block kept, every channel a label, at 4 bits without loss: the largest q . k win."""
  q, key, value, length, _ = inputs(1, heads=2, kv=2, whole=True)
  key = key.at[..., 0].set(-8.0).at[..., 1].set(7.0)
  channels = jnp.broadcast_to(jnp.arange(16), (2, 16))
  config = tls.Config(block=8, top_blocks=12, top_tokens=10, reduce='max_logit')
  for b, sets in enumerate(chosen(q, key, length, channels, config, 1.0)):
    for h, at in enumerate(sets):
      logits = np.asarray(key[b, h, :int(length[b])]) @ np.asarray(q[b, h])
      assert at == reference.best(logits.tolist(), 10)


def test_bounds_hold_and_both_forms_agree():
  q, key, value, length, _ = inputs(2, heads=6, kv=2)
  state = tls.summarise(key, length, jnp.zeros((2, 2), jnp.int32), CONFIG)
  scores = np.asarray(levels.block_scores(q, state.summary, length, CONFIG))
  for b in range(2):
    for h in range(2):
      queries = np.asarray(q[b, 3 * h:3 * h + 3])
      true = queries @ np.asarray(key[b, h]).T
      for j in range(12):
        inside = range(8 * j, min(8 * j + 8, int(length[b])))
        if not len(inside):
          assert scores[b, h, j] == -np.inf
          continue
        assert scores[b, h, j] >= true[:, list(inside)].max() - 1e-5
        high, low = np.split(np.asarray(state.summary.bounds[b, h, j]), 2)
        wanted = max(np.maximum(x * high, x * low).sum() for x in queries)
        np.testing.assert_allclose(scores[b, h, j], wanted, rtol=1e-5)


def test_sinks_and_the_block_being_filled_are_always_looked_into():
  q, key, _, length, channels = inputs(3)
  for stale in (False, True):
    for sinks in (0, 1, 2):
      config = dataclasses.replace(CONFIG, sink_blocks=sinks, stale=stale)
      state = summarise(key, length, channels, config=config)
      blocks = np.asarray(levels.choose_blocks(
        levels.block_scores(q, state.summary, length, config), length, config))
      for b, n in enumerate(length.tolist()):
        wanted = {*range(sinks), (n - 1) // 8} | ({n // 8} & set(range(12)) if stale else set())
        assert all(wanted <= set(row) for row in blocks[b]), (stale, sinks)
      assert (np.diff(blocks) > 0).all()


def test_the_error_falls_as_the_budget_grows():
  errors = []
  for tokens in (4, 8, 16, 32, 64):
    config = tls.Config(block=8, top_blocks=8, top_tokens=tokens)
    found = []
    for seed in range(12):
      args = inputs(seed, width=16, length=(96, 96))
      found.append(np.abs(run(*args, config)[0] - dense(*args[:4])).mean())
    errors.append(np.mean(found))
  assert errors == sorted(errors, reverse=True), errors


def test_token_by_token_is_all_at_once():
  _, key, _, _, channels = inputs(4)
  length = jnp.asarray([5, 23])
  state = summarise(key, length, channels, config=CONFIG)
  for _ in range(30):
    state = append(state, jnp.take_along_axis(key, length[:, None, None, None], axis=2)[:, :, 0],
                 length, channels, config=CONFIG)
    length = length + 1
  wanted = summarise(key, length, channels, config=CONFIG)
  np.testing.assert_array_equal(state.summary.bounds, wanted.summary.bounds)
  real = np.arange(96)[None] < np.asarray(length)[:, None]
  for b in range(2):
    np.testing.assert_array_equal(state.labels.codes[b][..., real[b]],
                                  wanted.labels.codes[b][..., real[b]])
    np.testing.assert_array_equal(state.labels.scale[b][:, real[b]],
                                  wanted.labels.scale[b][:, real[b]])


def test_bounds_are_not_those_of_a_row_that_was_here_before():
  """As in a slot that is filled again: blocks behind the prompt hold what they held."""
  _, key, _, _, channels = inputs(4)
  length = jnp.asarray([5, 23])
  state = summarise(key, length, channels, config=CONFIG)
  older = summarise(5 * key, jnp.asarray([96, 96]), channels, config=CONFIG).summary.bounds
  behind = jnp.arange(older.shape[2]) * CONFIG.block >= length[:, None]
  bounds = jnp.where(behind[:, None, :, None], older, state.summary.bounds)
  state = dataclasses.replace(state, summary=tls.Summary(bounds))
  for _ in range(30):
    state = append(state, jnp.take_along_axis(key, length[:, None, None, None], axis=2)[:, :, 0],
                   length, channels, config=CONFIG)
    length = length + 1
  wanted = summarise(key, length, channels, config=CONFIG).summary.bounds
  used = jnp.arange(older.shape[2]) * CONFIG.block < length[:, None]
  for b in range(2):
    np.testing.assert_array_equal(state.summary.bounds[b][:, used[b]], wanted[b][:, used[b]])


def test_what_lies_behind_the_length_is_never_read():
  q, key, value, length, channels = inputs(5)
  behind = (np.arange(96)[None] >= np.asarray(length)[:, None])[:, None, :, None]
  wanted, _ = run(q, key, value, length, channels)
  found, _ = run(q, *(jnp.where(behind, jnp.nan, x) for x in (key, value)), length, channels)
  np.testing.assert_array_equal(found, wanted)


def test_stale_blocks_of_a_constant_query_are_the_fresh_ones():
  q, key, value, length, channels = inputs(6, length=(60, 41))
  fresh, stale = CONFIG, dataclasses.replace(CONFIG, stale=True)
  states = [summarise(key, length, channels, config=fresh)] * 2
  states[1] = choose(q, states[1], length=length, config=stale)
  for _ in range(12):
    given = dict(channels=channels, length=length)
    # The stale choice also holds the next block: compare where that is the last one anyway.
    outs = [decode(q, key, value, s, config=c, **given)
            for s, c in zip(states, (fresh, stale))]
    sets = [set(np.asarray(s.chosen).ravel().tolist()) for _, s in outs]
    inside = [int(n) % 8 != 0 and int(n) // 8 == (int(n) - 1) // 8 for n in length]
    if all(inside):
      assert sets[0] == sets[1]
    new = jnp.take_along_axis(key, length[:, None, None, None], axis=2)[:, :, 0]
    states = [append(s, new, length, channels, config=CONFIG) for _, s in outs]
    length = length + 1
  assert int(tls.turnover(states[0], states[0], 12).sum()) == 0


def test_a_new_block_is_seen_by_its_first_token():
  """The stale choice was made before the block existed; its token attends to itself."""
  config = dataclasses.replace(CONFIG, stale=True, top_tokens=32)
  q, key, value, _, channels = inputs(7, rows=1, heads=2, kv=2)
  length = jnp.asarray([64])
  state = tls.choose(q, tls.summarise(key, length, channels, config), length=length, config=config)
  key = key.at[0, :, 64].set(100 * q[0])  # nothing else matters to these queries
  state = tls.append(state, key[:, :, 64], length, channels, config)
  out, _ = tls.decode(q, key, value, state, channels=channels, length=length + 1, config=config)
  np.testing.assert_allclose(out[0], value[0, :, 64], atol=1e-4)


def test_latent_attention_is_the_same_with_one_head():
  """Keys of 24 channels whose first 16 are the values."""
  q, key, _, length, channels = inputs(8, heads=8, kv=1, width=24)
  value = key[..., :16]
  config = tls.Config(block=8, top_blocks=12, top_tokens=96)
  found, _ = run(q, key, value, length, channels[:, :8], config)
  assert found.shape == (2, 8, 16)
  state = tls.summarise(key, length, channels[:, :8], config)
  same, _ = tls.decode(q, key, 16, state, channels=channels[:, :8], length=length, config=config)
  np.testing.assert_allclose(same, found, atol=1e-6)
  np.testing.assert_allclose(found, dense(q, key, value, length), atol=1e-5)


def test_bfloat16_stays_near():
  config = tls.Config(block=8, top_blocks=12, top_tokens=96)
  q, key, value, length, channels = inputs(9, dtype=jnp.bfloat16)
  found, _ = run(q, key, value, length, channels, config)
  assert found.dtype == jnp.bfloat16
  wanted = dense(*(np.asarray(x, np.float32) for x in (q, key, value)), length)
  error = np.sqrt(np.mean((np.asarray(found, np.float64) - wanted)**2) / np.mean(wanted**2))
  assert error < 2e-2


@pytest.mark.parametrize('n, k', [(1, 1), (7, 3), (64, 64), (100, 17), (33, 50)])
def test_top_is_a_stable_sort(n, k):
  rng = np.random.default_rng(n)
  for scores in (rng.normal(size=(3, n)), rng.integers(-2, 3, (3, n)).astype(float),
                 np.where(rng.random((3, n)) < 0.7, -np.inf, rng.normal(size=(3, n))),
                 np.zeros((3, n)), np.where(rng.random((3, n)) < 0.5, 0.0, -0.0),
                 rng.normal(size=(3, n)) * 1e-30, np.full((3, n), np.inf)):
    found = np.asarray(select.top(jnp.asarray(scores, jnp.float32), k))
    for row, wanted in zip(found, np.asarray(scores, np.float32)):
      best = reference.best(wanted.tolist(), k)
      assert row.tolist() == best + [n] * (k - len(best))


def test_labels_are_within_half_a_step_and_equal_channels_are_exact():
  rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
  rows[3] = 1.5
  codes, scale, zero = cache.quantise(jnp.asarray(rows))
  low, high = np.asarray(codes) & 15, np.asarray(codes) >> 4
  back = np.concatenate([low, high], 1) * np.asarray(scale)[:, None] + np.asarray(zero)[:, None]
  assert (np.abs(back - rows) <= np.asarray(scale)[:, None] / 2 + 1e-6).all()
  np.testing.assert_array_equal(back[3], rows[3])
  np.testing.assert_allclose(back, [reference.label(r) for r in rows], atol=1e-6)


def test_calibration_finds_the_heavy_channels():
  rng = np.random.default_rng(0)
  weight = np.ones(16)
  weight[[2, 5, 11, 12]] = 4
  q, key = rng.normal(size=(200, 4, 16)) * weight, rng.normal(size=(200, 2, 16))
  assert tls.calibrate(jnp.asarray(q), jnp.asarray(key), 4).tolist() == [[2, 5, 11, 12]] * 2
  with pytest.raises(ValueError, match=r'count must lie in 1..D = 16, got 17'):
    tls.calibrate(jnp.asarray(q), jnp.asarray(key), 17)
  with pytest.raises(ValueError, match='HQ a multiple of HK'):
    tls.calibrate(jnp.asarray(q[:, :3]), jnp.asarray(key), 4)


def test_every_row_may_have_channels_of_its_own():
  """Two rows with other channels give what each gives alone; padding does not count."""
  q, key, value, length, _ = inputs(4)
  rng = np.random.default_rng(0)
  samples = jnp.asarray(rng.normal(size=(2, 32, 4, 16)), jnp.float32)
  keys = jnp.asarray(rng.normal(size=(2, 32, 2, 16)), jnp.float32)
  real = jnp.arange(32)[None] < jnp.asarray([32, 20])[:, None]
  channels = tls.channels_of(jax.vmap(tls.weigh)(samples, keys, real), 8)
  np.testing.assert_array_equal(channels[1], tls.calibrate(samples[1, :20], keys[1, :20], 8))
  assert (channels[0] != channels[1]).any()
  out, _ = run(q, key, value, length, channels)
  for b in range(2):
    own, _ = run(*(x[b:b + 1] for x in (q, key, value, length)), channels[b])
    np.testing.assert_allclose(out[b:b + 1], own, atol=1e-6)


def test_no_gradient_is_pretended():
  q, key, value, length, channels = inputs()
  with pytest.raises(NotImplementedError, match='no gradient'):
    jax.grad(lambda q: run(q, key, value, length, channels)[0].sum())(q)


@pytest.mark.parametrize('changes, part', [
  (dict(block=12), 'block must be a multiple of 8, got 12'),
  (dict(block=64), 'N must be a multiple of block = 64, got 96'),
  (dict(top_tokens=33), r'top_tokens must be at most top_blocks \* block = 32, got 33'),
  (dict(top_blocks=0), 'top_blocks must be at least 1'),
  (dict(sink_blocks=4), 'sink_blocks must lie in 0..3'),
  (dict(sink_blocks=3, stale=True), 'sink_blocks must lie in 0..2'),
  (dict(reduce='mean'), "reduce must be 'softmax_max' or 'max_logit', got 'mean'")], ids=str)
def test_settings_that_do_not_fit_are_named(changes, part):
  q, key, value, length, channels = inputs()
  config = dataclasses.replace(CONFIG, **changes)
  state = tls.summarise(key, length, channels, CONFIG)
  with pytest.raises(ValueError, match=part):
    tls.decode(q, key, value, state, channels=channels, length=length, config=config)


def test_shapes_that_do_not_fit_are_named():
  q, key, value, length, channels = inputs()
  state = tls.summarise(key, length, channels, CONFIG)
  given = dict(length=length, config=CONFIG)
  with pytest.raises(ValueError, match='HQ = 3 must be a multiple of HK = 2'):
    tls.decode(q[:, :3], key, value, state, channels=channels, **given)
  with pytest.raises(ValueError, match=r'channels must be \[HK=2, R\]'):
    tls.decode(q, key, value, state, channels=channels[:1], **given)
  with pytest.raises(ValueError, match='R must be even and in 2..D = 16, got 7'):
    tls.decode(q, key, value, state, channels=channels[:, :7], **given)
  with pytest.raises(ValueError, match=r"implementation='no'"):
    tls.decode(q, key, value, state, channels=channels, implementation='no', **given)


def test_baselines_spend_the_same_budget_on_their_own_choice():
  q, key, value, length, channels = inputs(3, room=128, length=(128, 45))
  config = tls.Config(block=8, top_blocks=6, top_tokens=24)
  state = tls.summarise(key, length, channels, config)
  for b, n in enumerate(length.tolist()):
    at, valid = (np.asarray(x[b]) for x in baselines.window(length, 2, config))
    for h in range(2):
      assert at[h][valid[h]].tolist() == [*range(8), *range(max(8, n - 16), n)]
    at, valid = (np.asarray(x[b]) for x in baselines.block_only(q, state.summary, length, config))
    few = dataclasses.replace(config, top_blocks=3)
    found = reference.blocks_of(np.asarray(q[b]), np.asarray(key[b]), n, few)
    for h in range(2):
      assert at[h][valid[h]].tolist() == [t for j in found[h][1]
                                          for t in range(8 * j, min(8 * j + 8, n))]
    at, valid = (np.asarray(x[b]) for x in baselines.token_only(
      q, state.labels, channels, length, config, 0.25))
    for h in range(2):
      _, _, wanted = reference.tokens_of(
        np.asarray(q[b, 2 * h:2 * h + 2]), np.asarray(key[b, h]), range(-(-n // 8)),
        np.asarray(channels[h]), n, config, 0.25)
      assert at[h][valid[h]].tolist() == wanted
