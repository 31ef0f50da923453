"""Two real processes of two devices each, and what they must agree on."""

import os
import socket
import subprocess
import sys

import pytest

from zppo_jax.core.errors import UserError
from zppo_jax.launch import distributed
from zppo_jax.mesh import hosts

PROGRAM = """
import sys
from zppo_jax.launch import distributed
rank = int(sys.argv[2])
assert distributed.start(sys.argv[1], 2, rank)
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from zppo_jax.core.errors import UserError
from zppo_jax.mesh import hosts, place
mesh = place.make_mesh(dict(data=2, tensor=2))
wanted = np.arange(24.).reshape(4, 6)
x = jax.device_put(wanted, NamedSharding(mesh, P('data', 'tensor')))
assert not x.is_fully_addressable
found = hosts.fetch({'x': x, 'host': np.int32(3), 'row': x[1] + 1})
np.testing.assert_array_equal(found['x'], wanted)
np.testing.assert_array_equal(found['row'], wanted[1] + 1)
assert found['host'] == 3
assert hosts.gather({'rank': rank, 'text': 'a' * 5 * rank}) == [
  {'rank': 0, 'text': ''}, {'rank': 1, 'text': 'aaaaa'}]
assert hosts.agree(rank == 1) and not hosts.agree(False)
seen = []
assert hosts.share(lambda rows: seen.extend(rows) or [[r, str(r)] for r in rows], 5) == [
  [r, str(r)] for r in range(5)]
assert seen == ([0, 1, 2] if rank == 0 else [3, 4])
assert hosts.share(lambda rows: list(rows), 0) == []
assert hosts.on_first(lambda: {'rank': rank}) == {'rank': 0}
def fail():
  raise UserError(f'no room on {rank}')
try:
  hosts.on_first(fail)
except UserError as error:
  assert str(error) == 'no room on 0'
else:
  raise AssertionError('an error of the first process is that of all')
print('agreed', hosts.is_first())
"""


def test_two_processes_agree():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  env = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  pair = [subprocess.Popen([sys.executable, '-c', PROGRAM, address, str(i)], env=env, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]
  for i, process in enumerate(pair):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f'agreed {i == 0}' in out


def test_one_process_needs_nobody():
  assert hosts.is_first() and hosts.gather(3) == [3] and hosts.agree(True)
  assert hosts.share(lambda rows: [2 * r for r in rows], 3) == [0, 2, 4]
  assert hosts.on_first(lambda: 'x') == 'x'
  assert not distributed.start()


@pytest.mark.parametrize('given, message', [
  ((None, 2, 0), '--coordinator_address: must be given too'),
  (('host:1', None, None), '--num_processes, --process_id: must be given too'),
  (('host:1', 2, 2), r'--process_id must lie in 0..num_processes - 1 = 1, got 2')])
def test_half_an_address_is_refused(given, message):
  with pytest.raises(UserError, match=message):
    distributed.start(*given)
