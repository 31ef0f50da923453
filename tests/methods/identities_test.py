"""Rows of METHODS that are one another at some setting: whole steps with the same numbers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from zppo_jax.train import run as run_lib

COSTLY = {'test_on_policy_surrogates_have_one_gradient': ('gspo', 'zppo_teacher_response')}


def two_steps(run: run_lib.Run):
  """Parameters and metrics after two steps."""
  with jax.set_mesh(run.setup.mesh):
    programs = run_lib.compile_programs(run)
    now, metrics = run_lib.initial_state(run, programs), []
    for at in range(2):
      taken = tiny.take_step(run, programs, now, at)
      now = taken.after
      metrics.append({k: v for k, v in taken.metrics.items() if not k.startswith('buffer/')})
  return tiny.copy(now.params['policy']), metrics


def test_zppo_without_its_switches_is_its_baseline_bit_for_bit():
  """Exact truth 2: same key, same prompts, same numbers as the row of the GRPO builder."""
  off = two_steps(tiny.make_run('zppo', use_bcq=False, use_ncq=False, use_buffer=False,
                                 num_new=tiny.SLOTS))
  parent = two_steps(tiny.make_run(
    'grpo', estimator='reinforce_pp_baseline', eps_low=0.2, eps_high=0.28, dual_clip=10.0,
    aggregation='token_mean', iterations=2))
  chex.assert_trees_all_equal(off, parent)
  other = two_steps(tiny.make_run('grpo', estimator='grpo', eps_low=0.2, eps_high=0.28,
                                   dual_clip=10.0, aggregation='token_mean', iterations=2))
  with pytest.raises(AssertionError):
    chex.assert_trees_all_equal(off[0], other[0])


def first_update(name: str, run: run_lib.Run | None = None, **changes):
  """Moments after one step with one mini-batch, where every ratio is 1."""
  run = run or tiny.make_run(name, iterations=1, **changes)
  with jax.set_mesh(run.setup.mesh):
    programs = run_lib.compile_programs(run)
    now = run_lib.initial_state(run, programs)
    if 'critic' in now.params:
      silent = jax.tree.map(jnp.zeros_like, now.params['critic'])
      now = dataclasses.replace(now, params=now.params | {'critic': silent})
    return tiny.gradients(tiny.copy(tiny.take_step(run, programs, now, 0).after))


@pytest.mark.parametrize('child,changes,parent,same', [
  ('gspo', {}, 'grpo', {}),
  ('cispo', {}, 'grpo', dict(surrogate='reinforce', aggregation='token_mean')),
  ('dapo', dict(dynamic_sampling=False, overlong_buffer=0), 'grpo', dict(aggregation='token_mean')),
  ('zppo_grpo', {}, 'reinforce_pp_baseline', {}),
  ('zppo_teacher_response', dict(tau=1e-6, guide='none'), 'zppo_grpo', {}),
])
def test_on_policy_surrogates_have_one_gradient(child, changes, parent, same):
  """With one mini-batch the ratio is 1 and every clip, bound and sequence ratio falls away."""
  found, wanted = first_update(child, **changes), first_update(parent, **same)
  tiny.assert_close((found, {}), (wanted, {}), 1e-6)


def test_ppo_with_a_silent_critic_is_reinforce_pp():
  found = {k: v for k, v in first_update('ppo').items() if '.mu.policy' in k}
  tiny.assert_close((found, {}), (first_update('reinforce_pp'), {}), 1e-6)


@pytest.mark.parametrize('name', ['opd', 'distill_on'])
def test_a_student_has_nothing_to_learn_from_itself(name):
  run = tiny.make_run(name)
  setup = dataclasses.replace(run.setup, teacher=(tiny.model(), tiny.weights(1)))
  found = first_update(name, dataclasses.replace(run, setup=setup))
  assert max(np.abs(x).max() for x in found.values()) < 1e-6
