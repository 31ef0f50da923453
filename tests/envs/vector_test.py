"""Environments side by side: order, deadlines, and that a bad one harms no other."""

import os
import subprocess
import sys
import threading
import time

import pytest

from zppo_jax.envs import api, household, vector


class Counting:
  """Counts its steps; acts up on command. `made` lists all that were built, `uid` is the first."""

  def __init__(self, made, gate):
    self.gate, self.count, self.closed, self.uid = gate, None, threading.Event(), ''
    self.home = threading.get_ident()
    made.append(self)

  def reset(self, task, seed):
    if task.uid == 'broken':
      raise LookupError('no such task')
    self.count, self.uid = seed, self.uid or task.uid
    return api.Observation(f'{task.uid} {seed}')

  def step(self, action):
    assert threading.get_ident() == self.home
    if action == 'hang':
      self.gate.wait(30)
    if action == 'fail':
      raise ValueError('odd')
    if action == 'exit':
      sys.exit(3)
    if isinstance(action, threading.Barrier):
      action.wait(5)
    if action == 'nap':
      time.sleep(0.05)
    self.count += 1
    return api.StepResult(api.Observation(str(self.count)), 0.0, False)

  def close(self):
    assert threading.get_ident() == self.home
    self.closed.set()


@pytest.fixture
def gate():
  event = threading.Event()
  yield event
  event.set()  # lets the hanging threads go


def started(gate, size=4, *, deadline_s=1.0):
  made = []
  envs = vector.VectorEnv(lambda: Counting(made, gate), size, deadline_s)
  outcomes = envs.reset([api.Task(f't{i}') for i in range(size)], [10 * i for i in range(size)])
  assert [o.value.text for o in outcomes] == [f't{i} {10 * i}' for i in range(size)]
  return envs, made


def texts(outcomes):
  return [o and (o.error or o.value.observation.text) for o in outcomes]


def test_results_are_in_order_whoever_is_first(gate):
  envs, made = started(gate)
  with envs:
    assert texts(envs.step(['nap', 'go', 'nap', 'go'])) == ['1', '11', '21', '31']
    assert texts(envs.step([None, 'go', None, 'nap'])) == [None, '12', None, '32']
    assert texts(envs.step(['go'] * 4)) == ['2', '13', '22', '33']
    assert len(made) == 4


def test_all_step_at_the_same_time(gate):
  with started(gate, 8, deadline_s=10.0)[0] as envs:
    assert texts(envs.step([threading.Barrier(8)] * 8)) == [f'{10 * i + 1}' for i in range(8)]


def test_a_hang_costs_one_environment_and_one_deadline(gate):
  envs, made = started(gate)
  with envs:
    start = time.monotonic()
    assert texts(envs.step(['go', 'hang', 'go', 'hang'])) == ['1', 'timeout', '21', 'timeout']
    assert 0.9 < time.monotonic() - start < 10
    assert texts(envs.step(['go', None, 'go', None])) == ['2', None, '22', None]
    with pytest.raises(ValueError, match=r'environments \[1, 3\] have no episode'):
      envs.step(['go'] * 4)
    assert texts(envs.step(['go', None, 'go', None])) == ['3', None, '23', None]
    fresh = envs.reset([None, api.Task('new'), None, None], [0, 5, 0, 0])
    assert [o and o.value.text for o in fresh] == [None, 'new 5', None, None]
    assert len(made) == 5
    gate.set()  # the old thread goes on, and nobody hears of it
    late = [env for env in made if env.uid in ('t1', 't3')]
    assert [env.closed.wait(5) for env in late] == [True, True]
    assert texts(envs.step([None, 'go', None, None])) == [None, '6', None, None]


def test_a_thread_that_comes_back_closes_its_environment(gate):
  envs, made = started(gate, 1)
  with envs:
    assert texts(envs.step(['hang'])) == ['timeout'] and not made[0].closed.is_set()
    gate.set()
    assert made[0].closed.wait(5)


def test_exceptions_are_outcomes_of_one_environment(gate):
  envs, made = started(gate)
  with envs:
    got = texts(envs.step(['fail', 'go', 'exit', 'go']))
    assert got == ['error: ValueError: odd', '11', 'error: SystemExit: 3', '31']
    assert all(env.closed.wait(5) for env in made if env.uid in ('t0', 't2'))
    assert not any(env.closed.is_set() for env in made if env.uid in ('t1', 't3'))
    tasks = [api.Task('broken'), None, api.Task('fine'), None]
    broken, _, fine, _ = envs.reset(tasks, [0] * 4)
    assert broken == vector.Outcome(None, 'error: LookupError: no such task')
    assert fine.value.text == 'fine 0'
    assert texts(envs.step([None, 'go', 'go', 'go'])) == [None, '12', '1', '32']


def test_a_factory_that_fails_is_an_outcome():
  def factory():
    raise OSError('no room')

  with vector.VectorEnv(factory, 2, 0.3) as envs:
    for _ in range(2):
      errors = [o.error for o in envs.reset([api.Task('a')] * 2, [0, 0])]
      assert errors == ['error: OSError: no room'] * 2


def test_an_environment_that_is_empty_is_still_one(gate):
  made = []

  class Empty(Counting):
    def __len__(self):
      return 0

  with vector.VectorEnv(lambda: Empty(made, gate), 1, 1.0) as envs:
    envs.reset([api.Task('a')], [0])
    assert texts(envs.step(['go'])) == ['1'] and len(made) == 1
  assert made[0].closed.is_set()


def test_a_reset_has_a_deadline_of_its_own(gate):
  envs = vector.VectorEnv(lambda: gate.wait(30), 1, 0.1, reset_s=0.2)
  assert [o.error for o in envs.reset([api.Task('a')], [0])] == ['timeout']


def test_close_closes_all_and_a_reset_starts_anew(gate):
  envs, made = started(gate)
  envs.close()
  assert all(env.closed.is_set() for env in made)
  with pytest.raises(ValueError, match='have no episode'):
    envs.step(['go'] * 4)
  assert envs.reset([api.Task('again')] * 4, [0] * 4)[3].value.text == 'again 0'
  envs.close()
  assert len(made) == 8 and all(env.closed.is_set() for env in made)


def test_wrong_numbers_are_refused(gate):
  with started(gate)[0] as envs:
    for call in (lambda: envs.step(['go']), lambda: envs.reset([None] * 4, [0])):
      with pytest.raises(ValueError, match='one value per environment, 4, got 1'):
        call()
  for size, deadline_s in ((0, 1.0), (1, 0.0), (1, float('inf'))):
    with pytest.raises(ValueError, match='must be'):
      vector.VectorEnv(household.HouseholdEnv, size, deadline_s)


def test_plays_as_one_environment_after_another():
  tasks = [household.make('train', i) for i in range(6)]
  alone = []
  for task in tasks:
    env = household.HouseholdEnv()
    env.reset(task, 0)
    alone.append([(a, env.step(a)) for a in env.expert()])
  with vector.VectorEnv(household.HouseholdEnv, 6, 10.0) as envs:
    envs.reset(tasks, [0] * 6)
    for turn in range(max(map(len, alone))):
      now = [played[turn] if turn < len(played) else None for played in alone]
      outcomes = envs.step([pair and pair[0] for pair in now])
      assert outcomes == [pair and vector.Outcome(pair[1]) for pair in now]


def test_a_hanging_thread_does_not_keep_the_process_alive():
  code = """
import time, types
from zppo_jax.envs import api, vector
env = types.SimpleNamespace(reset=lambda *_: time.sleep(300), close=print)
print(vector.VectorEnv(lambda: env, 1, 0.1, reset_s=0.1).reset([api.Task('a')], [0])[0].error)
"""
  path = os.pathsep.join(filter(None, sys.path))
  out = subprocess.run(
    [sys.executable, '-c', code], env=os.environ | {'PYTHONPATH': path}, timeout=60,
    capture_output=True, check=True,
  )  # fmt: skip
  assert out.stdout == b'timeout\n'
