"""The ring against a plain list: order, wrap, age, reuse, strategies (training-loop.md, 7)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from zppo_jax.replay import ring

C = 6
SPEC = {'tokens': jax.ShapeDtypeStruct((2, 3), jnp.int32), 'x': (jnp.zeros(()),)}
add = jax.jit(ring.add)
sample = jax.jit(ring.sample, static_argnames=('n', 'strategy'))
evict = jax.jit(ring.evict, static_argnames=('max_staleness', 'max_uses'))


def entries(values):
  """Groups of 2 rows by 3 tokens; the value is in every leaf."""
  v = jnp.asarray(values)
  tokens = jnp.broadcast_to(v[:, None, None], (len(v), 2, 3)).astype(jnp.int32)
  return {'tokens': tokens, 'x': (v.astype(jnp.float32),)}


def put(r, values, valid=None, version=0, priority=1.0):
  valid = np.ones(len(values), bool) if valid is None else np.array(valid)
  return add(r, entries(values), valid, version, priority)


def held(r):
  """Values in the order of age; both leaves of an entry must agree."""
  r = jax.device_get(r)
  np.testing.assert_array_equal(r.data['tokens'][..., 0, 0], r.data['x'][0])
  same = np.broadcast_to(r.data['tokens'][:, :1, :1], r.data['tokens'].shape)
  np.testing.assert_array_equal(r.data['tokens'], same)
  slots = [s for s in np.argsort(r.order, kind='stable') if r.valid[s]]
  return [int(r.data['x'][0][s]) for s in slots]


def test_random_operations_equal_a_list():
  rng = np.random.default_rng(0)
  r, model, version, left = ring.init(SPEC, C), [], 0, 0
  for i in range(150):
    version += int(rng.random() < 0.3)
    values, valid = rng.integers(1, 1000, 4), rng.random(4) < 0.7
    r = put(r, values, valid, version)
    model += [[int(v), version, 0] for v in values[valid]]
    left += max(len(model) - C, 0)
    model = model[-C:]
    assert held(r) == [e[0] for e in model]
    if model and rng.random() < 0.6:
      r, batch, ok = sample(r, jax.random.key(i), n=3, strategy='fifo')
      take = model[:3]
      np.testing.assert_array_equal(batch['x'][0][: len(take)], [e[0] for e in take])
      np.testing.assert_array_equal(ok, np.arange(3) < len(take))
      for e in take:
        e[2] += 1
    r = evict(r, current_version=version, max_staleness=2, max_uses=2)
    keep = [e for e in model if e[1] >= version - 2 and e[2] < 2]
    left += len(model) - len(keep)
    model = keep
    assert held(r) == [e[0] for e in model] and int(ring.size(r)) == len(model)
    assert int(r.evicted) == left
  assert left > 100


def test_wrap_keeps_the_newest_even_within_one_call():
  r = put(ring.init(SPEC, C), range(1, 5))
  r = put(r, range(5, 9))
  assert held(r) == [3, 4, 5, 6, 7, 8] and r.evicted == 2
  r = put(r, range(20, 29), valid=[1, 1, 0, 1, 1, 1, 1, 1, 1])
  assert held(r) == [23, 24, 25, 26, 27, 28] and r.counter == 16 and r.evicted == 10


def test_rows_that_are_not_valid_never_enter():
  r = put(ring.init(SPEC, C), [1, 2, 3], valid=[False, True, False])
  assert held(r) == [2]
  r = put(r, [4, 5], valid=[False, False])
  assert held(r) == [2] and r.counter == 1


def test_age_eviction_at_the_bound():
  r = ring.init(SPEC, C)
  r = put(r, [1, 2, 3], version=np.array([3, 4, 5]))
  assert held(evict(r, current_version=5, max_staleness=1)) == [2, 3]
  assert held(evict(r, current_version=5, max_staleness=0)) == [3]
  assert held(evict(r, current_version=jnp.array(9), max_staleness=2)) == []
  assert held(evict(r)) == [1, 2, 3]


def test_reuse_is_counted_and_limits():
  r = put(ring.init(SPEC, C), [1, 2, 3])
  for _ in range(2):
    r, batch, ok = sample(r, jax.random.key(0), n=1, strategy='fifo')
    assert ok.all() and batch['x'][0][0] == 1
  assert r.uses.sum() == 2
  r = evict(r, max_uses=2)
  assert held(r) == [2, 3]
  r = put(r, [9])  # a new entry in the freed slot starts at zero
  assert r.uses.sum() == 0 and held(r) == [2, 3, 9]


@functools.partial(jax.jit, static_argnames=('n', 'strategy', 'draws'))
def many(r, n, strategy, draws=8000, current_version=None):
  keys = jax.random.split(jax.random.key(1), draws)
  fn = lambda k: ring.sample(r, k, n, strategy=strategy, current_version=current_version)[1:]
  batch, ok = jax.vmap(fn)(keys)
  return batch['x'][0], ok


def counts(column, values):
  return [(column == v).sum() for v in values]


def test_uniform_without_duplicates():
  r = put(ring.init(SPEC, C), [1, 2, 3, 4, 5])
  x, ok = (np.asarray(a) for a in many(r, 3, 'uniform'))
  assert ok.all() and (np.diff(np.sort(x, 1), axis=1) > 0).all()
  for column in x.T:
    assert stats.chisquare(counts(column, range(1, 6))).pvalue > 1e-3


def test_prioritised_in_proportion_and_never_zero():
  priority = np.array([1.0, 2.0, 0.0, 5.0])
  r = put(ring.init(SPEC, C), [1, 2, 3, 4], priority=priority)
  x, ok = (np.asarray(a) for a in many(r, 4, 'prioritised'))
  np.testing.assert_array_equal(ok.sum(1), 3)
  assert not (x == 3).any()
  expected = 8000 * np.array([1, 2, 5]) / 8
  assert stats.chisquare(counts(x[:, 0], [1, 2, 4]), expected).pvalue > 1e-3


def test_on_policy_only_takes_the_current_version():
  r = put(ring.init(SPEC, C), [1, 2, 3, 4], version=np.array([6, 7, 7, 8]))
  x, ok = (np.asarray(a) for a in many(r, 3, 'on_policy_only', current_version=7))
  np.testing.assert_array_equal(ok.sum(1), 2)
  assert set(x[ok]) == {2.0, 3.0}
  assert stats.chisquare(counts(x[:, 0], [2, 3])).pvalue > 1e-3


@pytest.mark.parametrize('strategy', ring.STRATEGIES)
def test_missing_entries_are_not_ok_and_zero(strategy):
  r = ring.init(SPEC, C)
  _, batch, ok = sample(r, jax.random.key(0), n=2, strategy=strategy, current_version=0)
  assert not ok.any()
  r = evict(put(r, [7, 8], version=np.array([1, 3])), current_version=3, max_staleness=0)
  r, batch, ok = sample(r, jax.random.key(0), n=2, strategy=strategy, current_version=3)
  np.testing.assert_array_equal(ok, [True, False])
  np.testing.assert_array_equal(batch['x'][0], [8, 0])  # the evicted 7 does not leak
  assert r.uses.sum() == 1


@pytest.mark.parametrize('strategy', ring.STRATEGIES)
def test_jit_and_not_agree(strategy):
  r = put(ring.init(SPEC, C), [1, 2, 3, 4], version=2, priority=np.float32([1, 2, 3, 4]))
  key, kwargs = jax.random.key(3), dict(n=2, strategy=strategy, current_version=2)
  plain, jitted = ring.sample(r, key, **kwargs), sample(r, key, **kwargs)
  jax.tree.map(np.testing.assert_array_equal, plain, jitted)


def test_empty_ring_is_an_error_on_the_host():
  r = ring.init(SPEC, C)
  with pytest.raises(ValueError, match='ring must hold at least 1 entry .* got 0 of 6'):
    ring.require_nonempty(r)
  ring.require_nonempty(put(r, [1]))


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda r: ring.init(SPEC, 0), 'capacity must be >= 1, got 0'),
    (lambda r: ring.sample(r, None, 2, strategy='lifo'), "strategy must be one of .* got 'lifo'"),
    (lambda r: ring.sample(r, None, 7), r'n must be in \[1, 6\], got 7'),
    (
      lambda r: ring.sample(r, jax.random.key(0), 2, strategy='on_policy_only'),
      'current_version must be given',
    ),
    (lambda r: ring.evict(r, max_staleness=1), 'max_staleness must be >= 0 and come with'),
    (lambda r: ring.evict(r, max_staleness=-1, current_version=0), 'max_staleness .* got -1'),
    (lambda r: ring.evict(r, max_uses=0), 'max_uses must be >= 1, got 0'),
    (lambda r: ring.add(r, {'x': jnp.zeros(2)}, np.ones(2, bool), 0), 'batch must have the str'),
    (
      lambda r: ring.add(r, {**entries([1]), 'x': (jnp.zeros((1, 2)),)}, np.ones(1, bool), 0),
      r"batch\['x'\]\[0\] must be float32",
    ),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(ring.init(SPEC, C))
