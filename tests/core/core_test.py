"""The bottom layer: masks and windows, named keys, tree helpers, pytree records."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax.core import errors, masks, rng, trees, types


def test_positions_restart_in_every_segment():
  segments = jnp.asarray([[1, 1, 2, 2, 2, 0], [3, 0, 0, 1, 1, 1]])
  found = masks.positions_in_segments(segments)
  assert found.tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 1, 2]]


def test_segments_from_lengths():
  found = masks.segments_from_lengths(jnp.asarray([0, 2, 3]), 3)
  assert found.tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_a_window_begins_at_the_first_true_column_or_fits_the_end():
  mask = jnp.asarray([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1], [0] * 6, [1] * 6], bool)
  assert masks.window_start(mask, 3).tolist() == [2, 3, 0, 0]


def test_put_window_inverts_take_window():
  x = jnp.arange(24.0).reshape(4, 6)
  start = jnp.asarray([0, 1, 2, 3])
  window = masks.take_window(x, start, 3)
  assert window.tolist() == [[0, 1, 2], [7, 8, 9], [14, 15, 16], [21, 22, 23]]
  back = np.asarray(masks.put_window(window, start, 6))
  inside = (np.arange(6) >= start[:, None]) & (np.arange(6) < start[:, None] + 3)
  np.testing.assert_array_equal(back, np.where(inside, x, 0))
  deep = masks.take_window(jnp.stack([x, -x], axis=-1), start, 3)
  np.testing.assert_array_equal(deep[..., 1], -window)


def test_keys_have_addresses():
  key = jax.random.key(0)
  data = lambda k: tuple(jax.random.key_data(k).tolist())
  assert data(rng.fold(key, 'a', 1)) == data(rng.fold(rng.fold(key, 'a'), 1))
  places = [(), ('a',), ('b',), ('a', 1), (1, 'a'), ('a', 2), (1,), ('1',)]
  assert len({data(rng.fold(key, *p)) for p in places}) == len(places)
  traced = jax.jit(lambda i: rng.fold(key, 'a', i))(1)
  assert data(traced) == data(rng.fold(key, 'a', 1))


def test_name_hash_is_the_same_on_every_machine():
  assert rng.name_hash('zppo') == 0x8305F28B


def test_host_generators_have_addresses_too():
  draw = lambda *names: rng.host_rng(0, *names).integers(2**40)
  assert draw('x', 3) == draw('x', 3)
  assert len({draw('x', 3), draw('x', 4), draw('y', 3), draw(3, 'x'), draw('x')}) == 5
  assert rng.host_rng(1, 'x').integers(2**40) != draw('x')


@types.record
class _Pair:
  left: jax.Array
  right: jax.Array | None
  label: str = types.static(default='plain')


def test_records_are_pytrees_with_static_labels():
  pair = _Pair(jnp.ones(2), None)
  leaves, tree = jax.tree.flatten(pair)
  assert len(leaves) == 1 and tree != jax.tree.structure(dataclasses.replace(pair, label='other'))
  assert jax.tree.map(lambda x: x + 1, pair).left.tolist() == [2, 2]
  with pytest.raises(dataclasses.FrozenInstanceError):
    pair.left = 0


def test_tree_helpers():
  tree = {'a': [jnp.zeros((2, 3)), _Pair(jnp.ones(2, jnp.int8), None)]}
  assert list(trees.named_leaves(tree)) == ['a.0', 'a.1.left']
  assert trees.num_params(tree) == 8 and trees.num_bytes(tree) == 26
  abstract = jax.eval_shape(lambda: tree)
  assert trees.num_bytes(abstract) == 26
  joined = trees.concat([tree, tree])
  assert joined['a'][0].shape == (4, 3) and joined['a'][1].left.shape == (4,)
  assert trees.pad_axis(jnp.ones((2, 3)), 5, 1, value=7).tolist() == [[1, 1, 1, 7, 7]] * 2
  other = jax.tree.map(lambda x: x + 5, tree)
  assert trees.select(jnp.bool_(False), tree, other)['a'][0][0, 0] == 5


def test_user_errors_are_value_errors():
  for error in (errors.UserError, errors.ConfigError, errors.RewardError):
    assert issubclass(error, ValueError)
