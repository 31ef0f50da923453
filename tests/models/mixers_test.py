"""Linear-attention mixers in hybrid stacks: one function for training, prefill and decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax import models
from zppo_jax.core import masks
from zppo_jax.mesh import place
from zppo_jax.models import cache as cache_lib
from zppo_jax.models import decoder, presets
from zppo_jax.models import params as params_lib
from zppo_jax.models.config import DELTA_KINDS
from zppo_jax.models.mixers import delta
from zppo_jax.train import state

LENGTHS = (40, 33)
GROUP = 3
FORWARD = jax.jit(decoder.forward, static_argnums=0, static_argnames='keep')


@pytest.fixture(scope='module', params=[  # the others differ in the inputs of one op
  k if k in ('gdn', 'fg2_gdn') else pytest.param(k, marks=pytest.mark.slow) for k in DELTA_KINDS])
def case(request):
  """(config, params, tokens, logits of the whole rows)."""
  config = models.ModelConfig(
    vocab=32, hidden=32, layers=4, heads=4, kv_heads=2, head_dim=8, inter=48,
    mixers=(request.param, 'full'), linear_heads=2, linear_value_heads=4, linear_key_dim=8,
    linear_value_dim=8 if request.param == 'fg2_gdn' else 12)
  params = models.init(config, jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 50), 0, 32)
  return config, params, tokens, FORWARD(config, params, tokens).logits


def prompts(config, params, tokens):
  """The prefix that two prompts of different lengths leave, right-padded."""
  lengths = jnp.asarray(LENGTHS)
  segments = masks.segments_from_lengths(lengths, 45)
  dirty = jnp.where(segments > 0, tokens[:, :45], 7)
  out = FORWARD(config, params, dirty, segment_ids=segments, keep='stacked')
  return cache_lib.as_prefix(out.cache)


def test_decoding_after_a_prompt_equals_the_whole_row(case):
  config, params, tokens, whole = case
  prefix = prompts(config, params, tokens)
  cache = cache_lib.split(config, 2 * GROUP, 8, prefix)
  prefix, blocks = cache_lib.split_prefix(config, prefix), decoder.split_blocks(config, params)
  step = jax.jit(lambda new, cache: decoder.forward(config, blocks, new, cache=cache,
                                                    prefix=prefix))
  for t in range(5):
    new = jnp.repeat(jnp.stack([tokens[i, n + t] for i, n in enumerate(LENGTHS)]), GROUP)
    out = step(new[:, None], cache)
    cache = out.cache
    wanted = jnp.repeat(jnp.stack([whole[i, n + t] for i, n in enumerate(LENGTHS)]), GROUP, axis=0)
    np.testing.assert_allclose(out.logits[:, 0], wanted, atol=1e-4)


def test_scoring_behind_a_shared_prompt_equals_the_whole_row(case):
  config, params, tokens, whole = case
  rows = jnp.stack([tokens[i, n:n + 10] for i, n in enumerate(LENGTHS)])
  out = FORWARD(config, params, rows, segment_ids=jnp.ones_like(rows),
                prefix=prompts(config, params, tokens))
  wanted = jnp.stack([whole[i, n:n + 10] for i, n in enumerate(LENGTHS)])
  np.testing.assert_allclose(out.logits, wanted, atol=1e-4)


def test_packed_segments_equal_separate_rows(case):
  config, params, tokens, whole = case
  packed = jnp.concatenate([tokens[:1, :20], tokens[1:, :25], tokens[:1, :5]], 1)
  segments = jnp.asarray([[1] * 20 + [2] * 25 + [0] * 5])
  found = FORWARD(config, params, packed, segment_ids=segments).logits[0]
  np.testing.assert_allclose(found[:20], whole[0, :20], atol=1e-4)
  np.testing.assert_allclose(found[20:45], whole[1, :25], atol=1e-4)


def test_eight_devices_equal_one(case):
  config, params, tokens, whole = case
  mesh = place.make_mesh(dict(data=2, fsdp=2, expert=1, context=1, tensor=2), jax.devices()[:8])
  specs = params_lib.abstract(config)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, params_lib.shardings(specs, mesh))
    found = jax.jit(decoder.forward, static_argnums=0)(config, placed, jnp.tile(tokens, (2, 1)))
  np.testing.assert_allclose(found.logits[:2], whole, atol=2e-5)


def test_convolution_is_the_written_sum():
  rng = np.random.default_rng(0)
  x, weight = rng.normal(size=(2, 9, 3)), rng.normal(size=(3, 4))
  before = rng.normal(size=(2, 3, 3))
  ids = np.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0, 0]])
  y, recent = delta.causal_conv(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(before),
                                jnp.asarray(ids))
  wide = np.concatenate([before, x], 1)
  for row, t in ((0, 0), (0, 3), (0, 4), (0, 5), (0, 8), (1, 2), (1, 5)):
    wanted = sum(weight[:, 3 - d] * wide[row, 3 + t - d] for d in range(4)
                 if (ids[row, max(t - d, 0)] == ids[row, t]))
    np.testing.assert_allclose(y[row, t], wanted, rtol=1e-5)
  np.testing.assert_allclose(recent[0], x[0, 6:], rtol=1e-6)
  np.testing.assert_allclose(recent[1], x[1, 3:6], rtol=1e-6)


def test_rates_of_the_state_are_not_decayed_to_zero():
  params = dict(policy=dict(mixer=dict(decay_scale=jnp.ones(2), decay_bias=jnp.ones(2),
                                       query=jnp.ones(2))))
  optimizer = state.make_optimizer(state.Optim(learning_rate=0.1, weight_decay=0.5))
  params['critic'] = dict(out=jnp.ones(2))
  updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params),
                                params)
  mixer = updates['policy']['mixer']
  assert not np.any(mixer['decay_scale']) and not np.any(mixer['decay_bias'])
  assert np.all(np.asarray(mixer['query']) < 0)


def test_wrong_sizes_are_all_named():
  config = models.ModelConfig(vocab=8, hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8, inter=8,
                              mixers=('fg2_gdn',), linear_heads=2, linear_value_heads=3,
                              linear_key_dim=4, linear_value_dim=6)
  with pytest.raises(ValueError, match='linear_value_heads.*3.*linear_value_dim.*fg2_gdn_plus'):
    params_lib.abstract(config)
  with pytest.raises(ValueError, match='linear_heads: must be at least 1'):
    params_lib.abstract(dataclasses.replace(config, linear_heads=0))


def test_presets():
  fields = presets.expand(dict(preset='hybrid_tiny', hidden=1, vocab=5))
  assert fields['mixers'].count('full') == 1 and fields['vocab'] == 5 and fields['hidden'] > 1
  with pytest.raises(ValueError, match="'hybrid'.*hybrid_tiny"):
    presets.expand(dict(preset='hybrid'))
