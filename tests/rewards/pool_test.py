"""The killable pool: deadlines, crashes, recycling, and nothing left behind."""

import os
import time

import fake_graders as fake
import pytest

from zppo_jax.rewards import pool as pool_lib


def calls(function, *values):
  return [pool_lib.Call(function, (value,)) for value in values]


def is_alive(process_id):
  try:
    with open(f'/proc/{process_id}/stat') as file:
      return file.read().rpartition(')')[2].split()[0]  # a zombie reads 'Z'
  except FileNotFoundError:
    return None


def test_starts_lazily_keeps_order_and_reuses_workers():
  with pool_lib.Pool(num_workers=2) as pool:
    assert not pool._workers
    assert pool.run([]) == [] and not pool._workers
    outcomes = pool.run(calls(fake.double, *range(30)))
    assert [o.value for o in outcomes] == [2 * i for i in range(30)]
    first = {o.value for o in pool.run(calls(fake.process_id, *range(8)))}
    second = {o.value for o in pool.run(calls(fake.process_id, *range(8)))}
    assert len(first | second) <= 2 and os.getpid() not in first
  assert not any(map(is_alive, first | second))


def test_hanging_items_time_out_alone():
  with pool_lib.Pool(num_workers=1, deadline_s=0.5) as pool:
    worker = pool.run(calls(fake.process_id, 0))[0].value
    start = time.monotonic()
    work = calls(fake.double, 1) + calls(fake.sleep, 60) + calls(fake.double, 2)
    work += calls(fake.endless_power, 0) + calls(fake.double, 3)
    outcomes = pool.run(work)
    assert time.monotonic() - start < 15
    assert [o.value for o in outcomes] == [2, None, 4, None, 6]
    assert [o.reason for o in outcomes] == ['ok', 'timeout', 'ok', 'timeout', 'ok']
    assert is_alive(worker) is None  # reaped, not a zombie


def test_batch_deadline_ends_everything():
  with pool_lib.Pool(num_workers=1, deadline_s=60, batch_deadline_s=2.0) as pool:
    start = time.monotonic()
    outcomes = pool.run(calls(fake.sleep, 50, 50, 50))
    assert time.monotonic() - start < 8
    assert {o.reason for o in outcomes} == {'timeout'}
    assert not pool._workers


def test_worker_that_ignores_sigterm_is_killed():
  with pool_lib.Pool(num_workers=1, deadline_s=0.5) as pool:
    worker = pool.run(calls(fake.process_id, 0))[0].value
    assert pool.run(calls(fake.deaf_sleep, 60))[0].reason == 'timeout'
    assert is_alive(worker) is None


def test_failures_are_outcomes():
  with pool_lib.Pool(num_workers=1) as pool:
    work = calls(fake.fail, 'odd') + calls(fake.leave, 0) + calls(fake.crash, 0)
    work += calls(fake.eat_memory, 0) + calls(fake.double, 4)
    reasons = [o.reason for o in pool.run(work)]
  assert reasons[0] == 'error: ValueError: odd'
  assert reasons[1] == 'error: SystemExit: 3'
  assert reasons[2] == 'died'
  assert reasons[3].startswith('error: MemoryError')
  assert reasons[4] == 'ok'


def test_recycles_workers():
  with pool_lib.Pool(num_workers=1, recycle_after=2) as pool:
    processes = [o.value for o in pool.run(calls(fake.process_id, *range(5)))]
  assert len(set(processes)) == 3
  assert not any(map(is_alive, processes))


def test_missing_package_is_an_error_not_a_score():
  with pool_lib.Pool(num_workers=1) as pool:
    call = pool_lib.Call(fake.double, (1,), imports=('no_such_package_zppo',))
    with pytest.raises(ModuleNotFoundError, match='no_such_package_zppo'):
      pool.run([call])
    assert pool.run(calls(fake.double, 1))[0].value == 2


@pytest.mark.parametrize(
  'bad', [{'num_workers': 0}, {'deadline_s': 0}, {'batch_deadline_s': -1}, {'recycle_after': 0}]
)
def test_bad_arguments_are_named(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    pool_lib.Pool(**bad)
