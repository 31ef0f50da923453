"""The decoder: causality, padding, packing, cache, taps and edits, shardings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax import models
from zppo_jax.core import trees
from zppo_jax.mesh import place
from zppo_jax.models import cache as cache_lib
from zppo_jax.models import config as config_lib
from zppo_jax.models import decoder, heads
from zppo_jax.models import params as params_lib

CONFIG = models.ModelConfig(vocab=40, hidden=32, layers=3, heads=4, kv_heads=2, head_dim=8,
                            inter=48, rope_theta=1e4, num_valid=37)
FORWARD = jax.jit(decoder.forward, static_argnums=0, static_argnames=('taps', 'edits', 'want'))


@pytest.fixture(scope='module')
def params():
  return models.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope='module')
def tokens():
  return jax.random.randint(jax.random.key(1), (3, 12), 0, 37)


def logits(params, tokens, config=CONFIG, **kwargs):
  return FORWARD(config, params, tokens, **kwargs).logits[..., :37]


def test_position_t_never_sees_later_tokens(params, tokens):
  embedded = lambda rows: decoder.forward(
    dataclasses.replace(CONFIG), dataclasses.replace(params, embed=rows, head=params.embed.T),
    jnp.arange(12)[None], want='hidden').hidden[0]
  jacobian = jax.jacobian(embedded)(params.embed[tokens[0]])  # [T, D, S, D]
  reach = np.abs(np.asarray(jacobian)).sum((1, 3))
  assert np.all(np.triu(reach, 1) == 0) and np.all(np.diag(reach) > 0)


def test_padding_changes_nothing(params, tokens):
  padded = jnp.pad(tokens, ((0, 0), (0, 5)), constant_values=9)
  segments = jnp.pad(jnp.ones_like(tokens), ((0, 0), (0, 5)))
  np.testing.assert_allclose(logits(params, padded, segment_ids=segments)[:, :12],
                             logits(params, tokens), atol=2e-6)


def test_packed_segments_equal_separate_rows(params, tokens):
  packed = jnp.concatenate([tokens[0, :7], tokens[1, :5]])[None]
  segments = jnp.asarray([[1] * 7 + [2] * 5])
  both = logits(params, packed, segment_ids=segments)[0]
  np.testing.assert_allclose(both[:7], logits(params, tokens[:1, :7])[0], atol=2e-6)
  np.testing.assert_allclose(both[7:], logits(params, tokens[1:2, :5])[0], atol=2e-6)


def test_cached_decoding_equals_the_full_forward_at_uneven_lengths(params, tokens):
  lengths = jnp.asarray([3, 6, 1])
  segments = (jnp.arange(6)[None] < lengths[:, None]).astype(jnp.int32)
  out = FORWARD(CONFIG, params, tokens[:, :6], segment_ids=segments,
                cache=cache_lib.init(CONFIG, 3, 12))
  np.testing.assert_array_equal(out.cache.length, lengths)
  full = logits(params, tokens)
  cache = out.cache
  for _ in range(5):
    column = cache.length
    step = FORWARD(CONFIG, params, tokens[jnp.arange(3), column][:, None], cache=cache)
    cache = step.cache
    np.testing.assert_allclose(step.logits[:, 0, :37], full[jnp.arange(3), column], atol=3e-6)


def test_query_chunks_remat_and_unrolling_change_nothing(params, tokens):
  whole = logits(params, tokens)
  for changes in (dict(query_chunk=5), dict(query_chunk=1), dict(remat='full'),
                  dict(remat='dots'), dict(unroll=3)):
    config = dataclasses.replace(CONFIG, **changes)
    np.testing.assert_allclose(logits(params, tokens, config), whole, atol=2e-6)


def test_gradients_agree_under_remat_and_query_chunks(params, tokens):
  def loss(p, config):
    return jnp.sum(decoder.forward(config, p, tokens, want='hidden').hidden ** 3)

  plain = jax.grad(loss)(params, CONFIG)
  other = jax.grad(loss)(params, dataclasses.replace(CONFIG, remat='full', query_chunk=5))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), plain, other)


def test_padded_vocabulary_is_never_sampled(params, tokens):
  full = FORWARD(CONFIG, params, tokens).logits
  assert full.shape[-1] == 40 and np.all(np.asarray(full[..., 37:]) < -1e29)


def test_taps_are_the_states_and_edits_act_on_them(params, tokens):
  taps = tuple(f'{kind}.{layer}' for kind in decoder.TAP_KINDS for layer in range(3))
  seen = FORWARD(CONFIG, params, tokens, taps=taps).taps
  for layer in (1, 2):
    np.testing.assert_allclose(
      seen[f'residual.{layer}'],
      seen[f'residual.{layer - 1}'] + seen[f'mixer.{layer}'] + seen[f'mlp.{layer}'], atol=2e-6)
  silent = FORWARD(CONFIG, params, tokens, taps=taps, edits=(('mlp.1', jnp.zeros_like),)).taps
  np.testing.assert_array_equal(silent['mlp.1'], 0)
  np.testing.assert_allclose(silent['residual.1'], silent['residual.0'] + silent['mixer.1'],
                             atol=2e-6)
  np.testing.assert_array_equal(silent['residual.0'], seen['residual.0'])


@pytest.mark.parametrize('tap', ['residual', 'residual.3', 'attn.0', 'mlp.x'])
def test_unknown_tap_is_named(params, tokens, tap):
  with pytest.raises(ValueError, match='taps'):
    decoder.forward(CONFIG, params, tokens, taps=(tap,))


def test_bad_configs_list_everything():
  bad = dataclasses.replace(CONFIG, heads=3, head_dim=7, mixers=('full', 'none'), remat='some')
  with pytest.raises(ValueError) as error:
    params_lib.abstract(bad)
  for part in ('heads', 'head_dim', 'layers', "unknown ['none']", 'remat: must be one of'):
    assert part in str(error.value)
  assert config_lib.problems(CONFIG) == []


def test_counts_and_shardings_come_from_one_tree(params):
  assert params_lib.count(CONFIG) == trees.num_params(params)
  mesh = place.make_mesh({'fsdp': 2, 'tensor': 2, 'data': 2}, jax.devices()[:8])
  shardings = params_lib.shardings(params_lib.abstract(CONFIG), mesh)
  sharded = jax.jit(lambda k: models.init(CONFIG, k), out_shardings=shardings)(jax.random.key(0))
  assert sharded.blocks[0].mlp.gate.sharding.shard_shape((3, 32, 48)) == (3, 16, 24)
  # Equal draws; scaling may round differently where it is fused: one unit in the last place.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-7), sharded, params)


def test_tensor_parallel_forward_equals_one_device(params, tokens):
  mesh = place.make_mesh({'fsdp': 2, 'tensor': 2, 'data': 2}, jax.devices()[:8])
  shardings = params_lib.shardings(params_lib.abstract(CONFIG), mesh)
  rows = jnp.concatenate([tokens, tokens[:1]])
  with jax.set_mesh(mesh):
    out = FORWARD(CONFIG, jax.device_put(params, shardings),
                  jax.device_put(rows, place.batch_sharding(mesh)))
  np.testing.assert_allclose(out.logits[:3, :, :37], logits(params, tokens), atol=5e-6)


def test_meshes_must_use_every_device():
  with pytest.raises(ValueError, match='must equal the device count, 8'):
    place.resolve_shape({'data': 3}, 8)
  with pytest.raises(ValueError, match='at most one axis'):
    place.resolve_shape({'data': -1, 'fsdp': -1}, 8)
  with pytest.raises(ValueError, match="unknown axis 'model'"):
    place.resolve_shape({'model': 2}, 8)
  assert place.resolve_shape({'tensor': 2, 'fsdp': -1}, 8)['fsdp'] == 4


def test_published_weights_are_copies_on_the_asked_sharding(params):
  mesh = place.make_mesh({'fsdp': 8}, jax.devices()[:8])
  shardings = params_lib.shardings(params_lib.abstract(CONFIG), mesh)
  moved = place.publish(params, shardings)
  assert moved.embed.sharding == shardings.embed
  np.testing.assert_array_equal(moved.embed, params.embed)


def test_a_pattern_of_mixers_counts_layers_in_order(tokens):
  """Four layers as two repeats of two: taps and edits name the layer, not the slot."""
  config = dataclasses.replace(CONFIG, layers=4, mixers=('full', 'sliding'), window=4)
  params = models.init(config, jax.random.key(2))
  assert len(params.blocks) == 2 and params.blocks[0].mlp.gate.shape[0] == 2
  assert not np.array_equal(params.blocks[0].mlp.gate, params.blocks[1].mlp.gate)
  taps = tuple(f'{kind}.{layer}' for kind in decoder.TAP_KINDS for layer in range(4))
  seen = FORWARD(config, params, tokens, taps=taps).taps
  for layer in (1, 2, 3):
    np.testing.assert_allclose(
      seen[f'residual.{layer}'],
      seen[f'residual.{layer - 1}'] + seen[f'mixer.{layer}'] + seen[f'mlp.{layer}'], atol=2e-6)
  edits = (('mlp.2', jnp.zeros_like),)
  silent = FORWARD(config, params, tokens, taps=taps, edits=edits).taps
  for layer in range(4):
    assert bool(np.any(silent[f'mlp.{layer}'])) == (layer != 2)
  np.testing.assert_array_equal(silent['residual.1'], seen['residual.1'])
  assert (silent['residual.3'] != seen['residual.3']).any()


def test_edits_pass_gradients(params, tokens):
  def loss(scale):
    edits = (('residual.1', lambda x: x * scale),)
    return jnp.sum(decoder.forward(CONFIG, params, tokens, edits=edits, want='hidden').hidden ** 3)

  slope = (loss(1.01) - loss(0.99)) / 0.02
  np.testing.assert_allclose(jax.grad(loss)(1.0), slope, rtol=1e-2)
  np.testing.assert_allclose(
    loss(1.0), jnp.sum(decoder.forward(CONFIG, params, tokens, want='hidden').hidden ** 3),
    rtol=1e-6)


def test_prefill_in_query_chunks_equals_one_piece(params, tokens):
  config = dataclasses.replace(CONFIG, query_chunk=5)
  lengths = jnp.asarray([12, 7, 3])
  segments = (jnp.arange(12)[None] < lengths[:, None]).astype(jnp.int32)
  outs = [FORWARD(c, params, tokens, segment_ids=segments, cache=cache_lib.init(c, 3, 14))
          for c in (CONFIG, config)]
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(outs[0].logits[row, :length, :37], outs[1].logits[row, :length, :37],
                               atol=2e-6)
    np.testing.assert_allclose(outs[0].cache.layers[0].key[:, row, :length],
                               outs[1].cache.layers[0].key[:, row, :length], atol=2e-6)


def test_tied_and_untied_heads(tokens):
  untied = dataclasses.replace(CONFIG, tied=False)
  params = models.init(untied, jax.random.key(0))
  assert params.head.shape == (32, 40) and params_lib.count(untied) == trees.num_params(params)
  assert params_lib.count(untied) - params_lib.count(CONFIG) == 32 * 40
  tied = dataclasses.replace(params, head=None)
  np.testing.assert_allclose(
    logits(tied, tokens), logits(dataclasses.replace(params, head=params.embed.T), tokens, untied),
    atol=1e-6)


def test_bfloat16_stays_near_float32(params, tokens):
  half = logits(params, tokens, dataclasses.replace(CONFIG, dtype='bfloat16'))
  full = logits(params, tokens)
  assert half.dtype == jnp.float32
  gap = np.abs(np.asarray(jax.nn.log_softmax(half) - jax.nn.log_softmax(full)))
  assert gap.mean() < 2e-2 and 0 < gap.max() < 0.2


def test_a_critic_values_the_state_before_the_token(params, tokens):
  """V_t has seen tokens < t; column 0 is zero; a fresh critic is unbiased."""
  critic = params_lib.materialise(heads.abstract_critic(CONFIG), jax.random.key(3))
  critic = dataclasses.replace(critic, weight=critic.weight * 1e3)
  ones = jnp.ones_like(tokens)
  value = lambda t: heads.values(CONFIG, critic, t, segment_ids=ones, positions=None)
  base, other = value(tokens), value(tokens.at[:, 5].set((tokens[:, 5] + 1) % 37))
  assert not np.asarray(base[:, 0]).any() and float(critic.bias) == 0
  np.testing.assert_array_equal(base[:, :6], other[:, :6])
  assert (base[:, 6:] != other[:, 6:]).all()
