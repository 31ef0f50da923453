"""Bad input is one error that says what was given and what is allowed."""

import jax
import jax.numpy as jnp
import pytest

from kernels import delta_rule as lib


def arguments(**changes):
  given = dict(q=jnp.ones((2, 5, 2, 4)), write_key=jnp.ones((2, 5, 2, 4)),
               erase_key=jnp.ones((2, 5, 4, 4)), value=jnp.ones((2, 5, 4, 3)),
               log_decay=-jnp.ones((2, 5, 4, 1)), state=jnp.zeros((2, 4, 4, 3)),
               segment_ids=jnp.ones((2, 5), jnp.int32))
  return given | changes


@pytest.mark.parametrize('changes, message', [
  (dict(q=jnp.ones((2, 5, 3, 4))), r'q \(2, 5, 3, 4\).*divisor of the 4'),
  (dict(write_key=jnp.ones((2, 5, 2, 5))), r'write_key \(2, 5, 2, 5\)'),
  (dict(erase_key=jnp.ones((2, 5, 4))), r'erase_key \(2, 5, 4\)'),
  (dict(log_decay=-jnp.ones((2, 5, 4, 2))), r'log_decay.*\(2, 5, 4, 4\) or \(2, 5, 4, 1\)'),
  (dict(state=jnp.zeros((2, 4, 3, 4))), r'state \(2, 4, 3, 4\), expected \(2, 4, 4, 3\)'),
  (dict(state=jnp.zeros((2, 4, 4, 3), jnp.bfloat16)), 'state bfloat16, expected float32'),
  (dict(segment_ids=jnp.ones((2, 6), jnp.int32)), r'segment_ids \(2, 6\)'),
  (dict(value=jnp.ones((2, 5, 4, 3), jnp.bfloat16)), 'value bfloat16, expected float32 as q'),
  (dict(log_decay=jnp.full((2, 5, 4, 1), 0.5)), 'log_decay must be <= 0, got 0.5'),
  (dict(log_decay=jnp.full((2, 5, 4, 1), jnp.nan)), 'log_decay must be <= 0, got nan'),
  (dict(implementation='cuda'), "implementation='cuda'.*chunked")])
def test_bad_arguments(changes, message):
  with pytest.raises(ValueError, match=message):
    lib.delta_rule(**arguments(**changes))


def test_all_faults_are_listed_together():
  with pytest.raises(ValueError, match='write_key.*state'):
    lib.delta_rule(**arguments(write_key=jnp.ones((2, 5, 2, 5)), state=jnp.zeros(3)))


def test_a_named_implementation_runs_or_says_why_not():
  with pytest.raises(NotImplementedError, match='pallas_tpu: a TPU is needed.*cpu'):
    lib.delta_rule(**arguments(implementation='pallas_tpu'))
  with pytest.raises(NotImplementedError, match='pallas_gpu: a GPU is needed.*cpu'):
    lib.delta_rule(**arguments(implementation='pallas_gpu'))
  out, _ = lib.delta_rule(**arguments(implementation=('pallas_gpu', 'pallas_tpu', 'chunked')))
  assert out.shape == (2, 5, 4, 3)


def test_fg2_needs_equal_sizes():
  with pytest.raises(ValueError, match='V=3 must equal key size K=4: use fg2_plus_inputs'):
    lib.fg2_inputs(jnp.ones((1, 2, 1, 4)), jnp.ones((1, 2, 1, 3)), jnp.ones((1, 2, 1, 4)))


def test_under_jit_shapes_are_still_checked():
  with pytest.raises(ValueError, match='state'):
    jax.jit(lib.delta_rule)(**arguments(state=jnp.zeros((1, 4, 4, 3))))
