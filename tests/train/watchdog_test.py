"""Phases that take too long end with their names."""

import signal
import threading
import time

import pytest

from zppo_jax.core.errors import UserError
from zppo_jax.train import metrics, watchdog


def test_a_phase_over_its_limit_is_interrupted_by_name():
  start = time.monotonic()
  with watchdog.Watchdog(0.2) as watch:
    timer = metrics.PhaseTimer(watch=watch)
    with pytest.raises(UserError, match=r"'reward' took longer than log.phase_limit_s = 0.2"):
      with timer('reward'):
        time.sleep(30)
    with timer('update'):  # the next one starts anew
      time.sleep(0.1)
  assert time.monotonic() - start < 10
  assert set(timer.take()) == {'time/reward', 'time/update'}


def test_each_phase_has_a_limit_of_its_own():
  with watchdog.Watchdog(0.5) as watch:
    for _ in range(4):
      with watch('prepare'):
        time.sleep(0.2)
    time.sleep(0.6)  # nothing is watched between phases


def test_an_outer_phase_is_over_first():
  with watchdog.Watchdog(0.4) as watch, pytest.raises(UserError, match="phase 'outer'"):
    with watch('outer'):
      for _ in range(100):
        with watch('inner'):
          time.sleep(0.1)


@pytest.mark.parametrize('limit', [0.0, 0.1])
def test_no_limit_and_other_threads_are_not_watched(limit):
  def phase():
    with watchdog.Watchdog(limit) as watch, watch('reward'):
      time.sleep(0.3)
    done.append(True)

  done = []
  if limit:
    thread = threading.Thread(target=phase)
    thread.start()
    thread.join()
  else:
    phase()
  assert done


def test_a_phase_that_cannot_be_interrupted_ends_the_process(capfd):
  """The main thread takes no signal, as one that waits inside a program."""
  codes, over = [], threading.Event()

  def kill(code):
    codes.append(code)
    over.set()

  handler = signal.getsignal(signal.SIGALRM)
  with watchdog.Watchdog(0.1, grace_s=0.2, kill=kill) as watch:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
      with watch('update'):
        assert over.wait(30)
    finally:
      signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
  assert codes == [watchdog.HUNG] and signal.getsignal(signal.SIGALRM) is handler
  told = capfd.readouterr().err
  assert "phase 'update' took longer than log.phase_limit_s = 0.1 and cannot be inter" in told
  assert 'most recent call first' in told and 'test_a_phase_that_cannot' in told  # the stacks


def test_a_phase_that_ends_at_its_limit_is_never_taken_for_one_that_hangs():
  """The signal may come while the phase is being taken off."""
  killed, late = [], 0
  with watchdog.Watchdog(0.004, grace_s=0.05, kill=killed.append) as watch:
    for i in range(150):
      try:
        with watch('p'):
          time.sleep(0.0036 + 0.00001 * (i % 60))
      except UserError:
        late += 1
      assert watch._phases == []
    time.sleep(0.1)
  assert not killed and late > 0
