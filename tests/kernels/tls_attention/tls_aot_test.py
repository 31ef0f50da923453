"""Whole decode steps compiled for TPU topologies: in place, without a copy of the cache.

In a process of their own: libtpu stops at any XLA flag that it does not know.
"""

import itertools
import json

import child
import pytest

from kernels.tls_attention import ahead

pytest.importorskip('libtpu')
SCRIPT = '''
import json, sys
from kernels.tls_attention import ahead
for case in json.loads(sys.argv[1]):
  print(json.dumps(ahead.measure(*case)), flush=True)
'''


def measure(*cases):
  """`ahead.measure` of (topology, form, length, rows), in one process."""
  return [json.loads(x) for x in child.answer('-c', SCRIPT, json.dumps(cases)).splitlines()]


def check(found):
  """Figures of one chip. What may stand in memory for a while are numbers of the 8192 candidates:
  the logits of every query head, and a dozen arrays of the choice for every key head."""
  print(ahead.line(found))
  key_heads, group = (1, 20) if found['form'] == 'latent' else (8, 4)
  heads = found['rows'] * key_heads // found['chips']
  assert found['temp_bytes'] < 2**20 * 4 + heads * (group + 12) * 8192 * 4
  assert found['temp_bytes'] < found['cache_bytes'] / 50
  assert found['alias_bytes'] >= found['state_bytes']  # the state is updated in place
  # The compiler also counts the passes of the softmax over the candidates and of their choice, most
  # of them in vector memory.
  passes = 24 * 8192 * 4 * heads * group
  assert found['fetched_bytes'] * 0.9 < found['accessed_bytes'] < found['fetched_bytes'] + passes
  assert found['full_bytes'] > 4 * found['fetched_bytes']


@pytest.mark.aot
def test_a_step_compiles_in_place():
  for found in measure(('v5e:2x2', 'rows', 98304, 1), ('v6e:2x2', 'pages', 131072, 1),
                       ('v5p:2x2x1', 'latent', 98304, 1)):
    check(found)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize('topology', ahead.TOPOLOGIES)
def test_every_form_compiles_at_full_size(topology):
  for found in measure(*itertools.product([topology], ahead.FORMS, (98304, 131072), (1, 64))):
    check(found)
