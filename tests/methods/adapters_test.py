"""Any method trains adapters instead of the policy: the base stands still, files come back."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from zppo_jax.core.errors import UserError
from zppo_jax.models import lora
from zppo_jax.train import run as run_lib

ADAPTERS = lora.Settings(rank=2, alpha=8.0)


@pytest.mark.parametrize('name', [
  'distill_on', pytest.param('zppo_ncq', marks=pytest.mark.slow)])
def test_only_the_adapters_learn(name):
  settings = dataclasses.replace(tiny.SETTINGS, adapters=ADAPTERS, micro_batches=1)
  run = tiny.make_run(name, settings=settings)
  before = tiny.copy(run.warm_start)
  with jax.set_mesh(run.setup.mesh):
    programs = run_lib.compile_programs(run)
    now = run_lib.initial_state(run, programs)
    start = tiny.copy(programs.policy(now.params))
    jax.tree.map(np.testing.assert_array_equal, start, before)
    for at in range(2):
      taken = tiny.take_step(run, programs, now, at)
      now = taken.after
      assert taken.metrics['mismatch/abs_max'] < 1e-4  # sampler and scorer merge alike
    end = tiny.copy(programs.policy(now.params))
  assert now.updates > 0 and set(now.params) == {'policy'}
  assert all(isinstance(f, lora.Factors) for f in now.params['policy'].values())
  jax.tree.map(np.testing.assert_array_equal, tiny.copy(run.warm_start), before)
  np.testing.assert_array_equal(end.embed, before.embed)
  assert np.abs(end.blocks[0].mlp.up - before.blocks[0].mlp.up).max() > 0


def test_adapters_need_a_base():
  settings = dataclasses.replace(tiny.SETTINGS, adapters=ADAPTERS)
  run = dataclasses.replace(tiny.make_run('grpo', settings=settings), warm_start=None)
  with pytest.raises(UserError, match='adapters need the weights that they adapt'):
    run_lib.frozen_roles(run)
