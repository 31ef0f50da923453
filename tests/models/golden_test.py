"""Every family against transformers: logits, hidden states, padding, packing, decoding, saving.

The files under golden/ are made by golden/make.py.
"""

import functools
import os

import jax
import numpy as np
import pytest

from zppo_jax import models
from zppo_jax.models import decoder

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'golden')
FAMILIES = sorted(n for n in os.listdir(GOLDEN) if os.path.isdir(os.path.join(GOLDEN, n))
                  and not n.startswith('_'))
LENGTHS = (1, 2, 3, 5, 70)
BOUND = 1e-5  # relative RMS in float32; the layout is wrong where it is more


@functools.cache
def loaded(name):
  config, params = models.load(os.path.join(GOLDEN, name))
  return config, params, dict(np.load(os.path.join(GOLDEN, name, 'golden.npz')))


@functools.cache
def program(name, **static):
  config = loaded(name)[0]
  return jax.jit(lambda p, t, **kw: decoder.forward(config, p, t, **static, **kw))


def error(found, wanted):
  found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
  return np.sqrt(np.mean((found - wanted)**2) / np.mean(wanted**2))


@pytest.mark.parametrize('name', FAMILIES)
def test_logits_and_hidden_states(name):
  config, params, golden = loaded(name)
  taps = tuple(f'residual.{i}' for i in range(config.layers - 1))
  out = program(name, taps=taps)(params, golden['tokens_70'][None])
  hidden = golden['hidden_70']  # the last one is behind the final norm
  for i, tap in enumerate(taps):
    assert error(out.taps[tap][0], hidden[i + 1]) < BOUND, tap
  assert error(out.hidden[0], hidden[-1]) < BOUND
  assert error(out.logits[0], golden['logits_70']) < BOUND
