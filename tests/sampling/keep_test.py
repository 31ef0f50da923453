"""Whole rows keep what an empty cache would hold of them."""

import dataclasses

import jax
import numpy as np
import pytest
from engine_test import MODELS, weights
from sparse_test import STALE

from zppo_jax.core import masks, trees
from zppo_jax.mesh import place
from zppo_jax.models import cache as cache_lib
from zppo_jax.models import decoder, layers
from zppo_jax.models import params as params_lib

FORWARD = jax.jit(decoder.forward, static_argnums=0, static_argnames=('keep', 'want'))
LENGTHS = np.asarray([21, 17, 9])
SIZE = 21  # no multiple of the block
CASES = MODELS | {f'{name}, sparse': dataclasses.replace(MODELS[name], sparse=STALE)
                  for name in ('full', 'latent')}


def rows(size=SIZE):
  tokens = np.random.default_rng(0).integers(3, 21, (3, size))
  return dict(tokens=tokens, segment_ids=masks.segments_from_lengths(LENGTHS, size),
              want='hidden')


def held(cache) -> dict[str, np.ndarray]:
  """Leaves of the layers; keys and labels behind the end of a row, which nobody reads, as zeros."""
  first = 0 if cache.split else 1  # axis of the rows

  def cut(name, x):
    along = x.ndim - 1 if '.labels.' in name else x.ndim - 2
    if '.labels.' not in name and not name.endswith(('key', 'value')):
      return np.asarray(x)
    shape = [len(LENGTHS) if i == first else -1 if i == along else 1 for i in range(x.ndim)]
    return np.where((np.arange(x.shape[along]) < LENGTHS[:, None]).reshape(shape), x, 0)

  return {name: cut(name, x) for name, x in trees.named_leaves(cache.layers).items()}


@pytest.mark.parametrize('name', CASES)
def test_rows_keep_what_an_empty_cache_would_hold(name):
  config, params = CASES[name], weights(name.split(',')[0])
  kept = FORWARD(config, params, **rows(), keep='stacked')
  filled = FORWARD(config, params, **rows(), cache=cache_lib.init(config, 3, SIZE))
  real = rows()['segment_ids'] > 0
  np.testing.assert_allclose(kept.hidden[real], filled.hidden[real], atol=1e-5)
  np.testing.assert_array_equal(kept.cache.length, LENGTHS)
  found, wanted = held(kept.cache), held(filled.cache)
  assert found.keys() == wanted.keys()
  for leaf, x in wanted.items():
    np.testing.assert_allclose(found[leaf], x, atol=1e-5, err_msg=leaf)
  assert FORWARD(config, params, **rows()).cache is None

  split = FORWARD(config, decoder.split_blocks(config, params), **rows(), keep='split')
  wanted = cache_lib.Cache(cache_lib.unstack(config, kept.cache.layers), kept.cache.length, True)
  for leaf, x in held(wanted).items():
    np.testing.assert_allclose(held(split.cache)[leaf], x, atol=1e-5, err_msg=leaf)


@pytest.mark.parametrize('name', ['full', 'hybrid'])
def test_rows_cut_over_chips_keep_the_same(name):
  """Columns of a row on two chips, in chunks of four queries on each."""
  config, params = dataclasses.replace(MODELS[name], query_chunk=8), weights(name)
  given = rows(24)
  wanted = FORWARD(config, params, **given, keep='stacked')
  mesh = place.make_mesh(dict(context=2, tensor=2), jax.devices()[:4])
  shardings = params_lib.shardings(params_lib.abstract(config), mesh)
  with jax.set_mesh(mesh):
    found = FORWARD(config, jax.device_put(params, shardings), **given, keep='stacked')
  real = given['segment_ids'] > 0
  np.testing.assert_allclose(found.hidden[real], wanted.hidden[real], atol=1e-5)
  leaves = held(wanted.cache)
  for leaf, x in held(found.cache).items():
    np.testing.assert_allclose(x, leaves[leaf], atol=1e-5, err_msg=leaf)


def test_only_whole_rows_are_kept():
  config = MODELS['full']
  with pytest.raises(ValueError, match="keep: 'stacked' is for whole rows"):
    FORWARD(config, weights('full'), **rows(), keep='stacked', cache=cache_lib.init(config, 3, 30))


def test_a_table_of_angles_changes_nothing():
  config, params = MODELS['full'], weights('full')
  table = layers.rotary_table(config, 40)
  found = FORWARD(config, params, **rows(), rotary=table)
  np.testing.assert_allclose(found.hidden, FORWARD(config, params, **rows()).hidden, atol=1e-6)
