"""A policy with linear attention is a policy like any other."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from zppo_jax.models import params as params_lib
from zppo_jax.train import compiles
from zppo_jax.train import run as run_lib


@pytest.mark.parametrize('name', ('zppo_grpo_buffer',
                                  pytest.param('zppo_ncq', marks=pytest.mark.slow)))
def test_hybrid_policy_trains_and_its_scorer_agrees_with_its_sampler(name):
  model = tiny.model(layers=2, mixers=('fg2_gdn_plus', 'full'), linear_heads=1,
                     linear_value_heads=2, linear_key_dim=8, linear_value_dim=8)
  run = tiny.make_run(name)
  params = jax.jit(lambda key: params_lib.init(model, key))(jax.random.key(0))
  run = dataclasses.replace(run, setup=dataclasses.replace(run.setup, model=model),
                            warm_start=params,
                            reference=params if 'reference' in run.method.needs else None)
  compiles.install()
  with jax.set_mesh(run.setup.mesh):
    programs = run_lib.compile_programs(run)
    now = run_lib.initial_state(run, programs)
    start = tiny.copy(now.params['policy'])
    for at in range(2):
      taken = tiny.take_step(run, programs, now, at)
      now = taken.after
      assert taken.metrics['mismatch/abs_max'] < 1e-4
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), tiny.copy(now.params['policy']), start)
  assert all(np.isfinite(x) for x in jax.tree.leaves(moved))
  assert max(jax.tree.leaves(moved.blocks[0].mixer)) > 0
