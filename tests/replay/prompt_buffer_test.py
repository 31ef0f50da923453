"""The prompt buffer against an OrderedDict model, and its sampling (zppo.md, truth 7)."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from zppo_jax.replay import prompts

GROUP = 8
update = jax.jit(prompts.update, static_argnames='tau')
sample = jax.jit(prompts.sample, static_argnums=2)


class Model:
  """What the buffer means, one question at a time."""

  def __init__(self, capacity):
    self.capacity, self.counter = capacity, 0
    self.entries = collections.OrderedDict()  # id -> [order, entry accuracy, visits]
    self.counts = {k: np.zeros(GROUP + 1, int) for k in ('admitted', 'graduated', 'evicted')}
    self.victims = []

  def count(self, what, accuracy):
    self.counts[what][int(round(accuracy * GROUP))] += 1

  def update(self, ids, accuracy, ok, tau):
    seen, self.victims = set(), []
    for i, acc, use in zip(ids, accuracy, ok):
      if not use or np.isnan(acc) or i < 0 or i in seen:
        continue
      seen.add(i)
      if i in self.entries:
        if acc >= tau:
          self.count('graduated', self.entries.pop(i)[1])
        else:
          self.entries[i][2] += 1
      elif acc < tau:
        self.entries[i] = [self.counter, acc, 0]
        self.counter += 1
        self.count('admitted', acc)
    while len(self.entries) > self.capacity:
      victim, (_, acc, _) = self.entries.popitem(last=False)
      self.victims.append(victim)
      self.count('evicted', acc)


def contents(buffer):
  b = jax.device_get(buffer)
  keep = b.valid
  rows = zip(b.question_id[keep], b.order[keep], b.entry_acc[keep], b.visits[keep])
  return {int(i): [int(o), float(a), int(v)] for i, o, a, v in rows}


@pytest.mark.parametrize('capacity, rows', [(8, 5), (4, 9)])
def test_a_thousand_random_operations_equal_the_ordered_dict(capacity, rows):
  rng = np.random.default_rng(capacity)
  model, buffer = Model(capacity), prompts.init(capacity, GROUP)
  victims = 0
  for _ in range(1000):
    ids = rng.integers(-1, 24, rows)
    accuracy = (rng.integers(0, GROUP + 1, rows) / GROUP).astype(np.float32)
    accuracy[rng.random(rows) < 0.05] = np.nan
    ok = rng.random(rows) < 0.8
    model.update(ids, accuracy, ok, 0.5)
    buffer = update(buffer, ids, accuracy, ok, tau=0.5)
    now = contents(buffer)
    assert now == dict(model.entries)
    assert list(now) == list(model.entries)  # slots are in the order of age
    assert len(now) == int(prompts.size(buffer)) <= capacity
    assert int(buffer.counter) == model.counter
    for what, want in model.counts.items():
      np.testing.assert_array_equal(getattr(buffer, what), want)
    assert not set(model.victims) & set(now)
    victims += len(model.victims)
  assert victims > 100 and model.counts['graduated'].sum() > 100


ROWS = 20  # one compilation for all calls of a capacity


def step(buffer, ids, accuracy, ok=None, tau=0.5):
  pad = ROWS - len(ids)
  ok = np.ones(len(ids), bool) if ok is None else ok
  fill = lambda x, value: np.append(x, np.full(pad, value))
  ids, accuracy = fill(ids, 0).astype(np.int32), fill(accuracy, 0).astype(np.float32)
  return update(buffer, ids, accuracy, fill(ok, False).astype(bool), tau=tau)


def test_the_worked_step_of_the_paper():
  buffer = step(prompts.init(32, GROUP), [8, 9, 20], [0.25, 0.375, 0.125])
  ids = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
  buffer = step(buffer, ids, [0, 0.125, 0.375, 0.5, 0.75, 1, 0.625, 0.875, 0, 0.625])
  assert list(contents(buffer)) == [8, 20, 0, 1, 2]
  assert contents(buffer)[8] == [0, 0.25, 1]  # keeps place and entry accuracy
  np.testing.assert_array_equal(buffer.graduated, [0, 0, 0, 1, 0, 0, 0, 0, 0])


def test_exactly_tau_graduates_and_is_not_admitted():
  buffer = step(prompts.init(4, GROUP), [1], [0.375])
  buffer = step(buffer, [1, 2], [0.5, 0.5])
  assert contents(buffer) == {} and buffer.graduated.sum() == 1 and buffer.admitted.sum() == 1


def test_readmission_is_a_new_entry():
  buffer = step(prompts.init(2, GROUP), [1, 2], [0.0, 0.25])
  buffer = step(buffer, [3, 1], [0.125, 0.25])  # 1 revisited, then evicted as the oldest
  assert list(contents(buffer)) == [2, 3]
  buffer = step(buffer, [1], [0.25])
  assert contents(buffer) == {3: [2, 0.125, 0], 1: [3, 0.25, 0]}


def test_more_admissions_than_capacity_keep_the_newest():
  buffer = step(prompts.init(4, GROUP), [9], [0.0])
  buffer = step(buffer, range(6), [0.0, 0.125, 0.25, 0.25, 0.375, 0.375])
  assert list(contents(buffer)) == [2, 3, 4, 5]
  np.testing.assert_array_equal(buffer.evicted, [2, 1, 0, 0, 0, 0, 0, 0, 0])


def test_graduation_makes_room_before_eviction():
  buffer = step(prompts.init(2, GROUP), [1, 2], [0.0, 0.0])
  buffer = step(buffer, [3, 2], [0.0, 1.0])
  assert list(contents(buffer)) == [1, 3] and buffer.evicted.sum() == 0


def test_left_out_rows_change_nothing_and_jit_agrees():
  buffer = step(prompts.init(4, GROUP), [1, 2], [0.0, 0.125])
  same = step(buffer, [3, -1, 1, 2], [0.0, 0.0, np.nan, 1.0], ok=[False, True, True, False])
  jax.tree.map(np.testing.assert_array_equal, same, buffer)
  args = (buffer, np.array([2, 5]), np.float32([0.9, 0.1]), np.array([True, True]))
  plain, jitted = prompts.update(*args, tau=0.5), update(*args, tau=0.5)
  jax.tree.map(np.testing.assert_array_equal, plain, jitted)


def filled(capacity, ids):
  return step(prompts.init(capacity, GROUP), ids, np.zeros(len(ids)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def many(buffer, draws, n, exclude=None):
  keys = jax.random.split(jax.random.key(0), draws)
  return jax.vmap(lambda k: prompts.sample(buffer, k, n, exclude))(keys)


def test_sampling_is_uniform_without_duplicates():
  ids, draws, n = np.arange(100, 120), 20_000, 5
  out, ok = (np.asarray(x) for x in many(filled(32, ids), draws, n))
  assert ok.all() and np.isin(out, ids).all()
  assert (np.diff(np.sort(out, 1), axis=1) > 0).all()
  for column in (out[:, 0], out[:, -1]):  # every place is uniform
    assert stats.chisquare([(column == i).sum() for i in ids]).pvalue > 1e-3
  pairs = (out[:, 0] - 100) * 20 + out[:, 1] - 100  # and so are ordered pairs
  counts = np.bincount(pairs, minlength=400).reshape(20, 20)
  assert np.diag(counts).sum() == 0
  assert stats.chisquare(counts[~np.eye(20, dtype=bool)]).pvalue > 1e-3


def test_excluded_ids_never_come_and_the_rest_is_uniform():
  ids, draws = np.arange(12), 6000
  exclude = jnp.array([3, 7, -1, 99])
  out, ok = (np.asarray(x) for x in many(filled(32, ids), draws, 4, exclude))
  assert ok.all() and not np.isin(out, [3, 7]).any()
  rest = np.setdiff1d(ids, [3, 7])
  assert stats.chisquare([(out[:, 0] == i).sum() for i in rest]).pvalue > 1e-3


def test_all_of_a_small_buffer_comes_and_the_rest_is_not_ok():
  buffer = filled(4, [5, 6])
  for n in (3, 7):  # more than held, more than the capacity
    ids, ok = sample(buffer, jax.random.key(1), n)
    assert ok.sum() == 2 and set(np.asarray(ids)[np.asarray(ok)]) == {5, 6}
    np.testing.assert_array_equal(np.asarray(ids)[~np.asarray(ok)], -1)
  ids, ok = sample(prompts.init(4, GROUP), jax.random.key(1), 2)
  assert not ok.any()


def test_same_key_same_draw_under_jit_and_not():
  buffer = filled(4, range(3))
  a, b = sample(buffer, jax.random.key(4), 2), prompts.sample(buffer, jax.random.key(4), 2)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_bad_input_is_named():
  with pytest.raises(ValueError, match='capacity must be >= 1, got 0'):
    prompts.init(0, 8)
  with pytest.raises(ValueError, match='group_size must be >= 1, got 0'):
    prompts.init(8, 0)
  for tau in (0.0, 1.5, float('nan')):
    with pytest.raises(ValueError, match=r'tau must be in \(0, 1\], got'):
      step(prompts.init(2, GROUP), [1], [0.0], tau=tau)
  buffer = filled(4, [5, 6])
  prompts.check_restored(buffer, 7)
  with pytest.raises(ValueError, match=r'question_id .* num_questions=6\), got 6'):
    prompts.check_restored(buffer, 6)
  twice = dataclasses.replace(buffer, question_id=jnp.full(4, 5))
  with pytest.raises(ValueError, match='holds 5 twice'):
    prompts.check_restored(twice, 7)
