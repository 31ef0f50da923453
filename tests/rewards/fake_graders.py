"""Misbehaving graders for the pool's tests; workers import this file by name."""

import os
import signal
import time


def double(x):
  return 2 * x


def process_id(_):
  return os.getpid()


def sleep(seconds):
  time.sleep(seconds)
  return seconds


def endless_power(_):
  return 9**9**9


def fail(text):
  raise ValueError(text)


def leave(_):
  raise SystemExit(3)


def crash(_):
  os.kill(os.getpid(), signal.SIGKILL)


def eat_memory(_):
  return len(bytearray(1 << 40))


def deaf_sleep(seconds):
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  time.sleep(seconds)
