"""Every implementation against the token scan in float64: outputs, state and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.delta_rule import api, chunked, pallas_gpu, pallas_tpu, reference, shapes

SINGLE = tuple(shapes.Case(n) for n in (7, 65))
# The kernel as XLA operations: slow to compile, so each case carries several properties.
KERNEL = (shapes.Case(65, heads=2, key_heads=1, key=16, value=24, batch=1),
          shapes.Case(100, heads=1, key_heads=1, batch=1, segments=True),
          shapes.Case(100, heads=1, key_heads=1, batch=1, keys='equal', rate=1.99, decay='none'),
          shapes.Case(100, heads=1, key_heads=1, batch=1, keys='positive', rate=.9, decay='mixed'))
IMPLEMENTATIONS = {
  'reference': reference.delta_rule, 'chunked': chunked.delta_rule,
  'pallas_tpu': functools.partial(pallas_tpu.delta_rule, interpret=True),
  'pallas_gpu': functools.partial(pallas_gpu.delta_rule, interpret=True)}


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
WIDE = (shapes.Case(1), shapes.Case(64),
        slow(shapes.Case(1000, heads=4, key_heads=2, key=32, value=16)),
        slow(shapes.Case(80, heads=1, key_heads=1, key=256, value=32, batch=1)),
        slow(shapes.Case(80, heads=1, key_heads=1, key=16, value=256, batch=1)),
        slow(shapes.Case(100, heads=6, key_heads=2, segments=True, decay='dense')))
# Cases of one shape share a program; those of a shape of their own are left to `-m slow`.
ACCURACY = [slow(c) if c.time in (80, 150, 1000) or c.heads == 6 else c for c in shapes.ACCURACY]
COSTLY = {'test_bfloat16': ('chunked', 'pallas_gpu')}


@functools.cache
def evaluate(name: str, time_and_shape, segmented: bool, scale: float):
  """Jitted (out, state, gradients) of an implementation; cached by shapes."""
  rule = IMPLEMENTATIONS[name]

  def loss(arguments, segments, weights):
    *inputs, state = (arguments[n] for n in shapes.ARGUMENTS)
    out, after = rule(*inputs, state=state, segments=segments, scale=scale)
    total = jnp.sum(out.astype(state.dtype) * weights[0]) + jnp.sum(after * weights[1])
    return total, (out, after)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(name: str, case: shapes.Case, dtype, rounded: bool = False) -> dict[str, np.ndarray]:
  """`rounded`: of arguments in bfloat16, whose rounding is the caller's and not the kernel's."""
  arguments, segment_ids = shapes.make(case)
  if rounded:
    arguments |= {k: x.astype(jnp.bfloat16).astype(np.float64) for k, x in arguments.items()
                  if k not in ('state', 'log_decay')}
  rng = np.random.default_rng(1)
  weights = [rng.normal(size=s) for s in (arguments['value'].shape, arguments['state'].shape)]
  with jax.enable_x64(dtype == jnp.float64):
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    arguments = {k: jnp.asarray(x, wide if k in ('state', 'log_decay') else dtype)
                 for k, x in arguments.items()}
    segments = None
    if segment_ids is not None:
      real = (jnp.asarray(segment_ids) != 0)[..., None, None]
      arguments |= {k: jnp.where(real, x, 0) for k, x in arguments.items() if k != 'state'}
      segments = api.count_segments(jnp.asarray(segment_ids))
    key = tuple((k, x.shape, str(x.dtype)) for k, x in arguments.items())
    program = evaluate(name, key, segments is not None, case.key**-0.5)
    (_, (out, after)), grads = program(arguments, segments, [jnp.asarray(w, wide) for w in weights])
  found = dict(out=out, after=after) | {f'd_{k}': g for k, g in grads.items()}
  return {k: np.asarray(x, np.float64) for k, x in found.items()}


@functools.cache
def law(case: shapes.Case, rounded: bool = False):
  return run('reference', case, jnp.float64, rounded)


def check(found, wanted, bound):
  errors = {k: np.sqrt(np.mean((found[k] - wanted[k])**2) / max(np.mean(wanted[k]**2), 1e-30))
            for k in wanted}
  assert all(np.isfinite(x).all() for x in found.values())
  assert max(errors.values()) <= bound, {k: f'{e:.1e}' for k, e in errors.items()}


@pytest.mark.parametrize('case', ACCURACY, ids=str)
def test_chunked_in_float32(case):
  bound = shapes.TOLERANCE_HARD if case.hard else shapes.TOLERANCE['float32']
  check(run('chunked', case, jnp.float32), law(case), bound)


@pytest.mark.parametrize('case', SINGLE, ids=str)
def test_chunked_in_float64(case):
  check(run('chunked', case, jnp.float64), law(case), 1e-13)


@pytest.mark.parametrize('name', ('chunked', 'pallas_tpu', 'pallas_gpu'))
@pytest.mark.parametrize('case', [slow(KERNEL[0]), KERNEL[3]], ids=str)
def test_bfloat16(name, case):
  check(run(name, case, jnp.bfloat16), law(case, rounded=True), shapes.TOLERANCE['bfloat16'])


@pytest.mark.parametrize('name', ('pallas_tpu', 'pallas_gpu'))
@pytest.mark.parametrize('case', KERNEL, ids=str)
def test_kernel_in_float32(name, case):
  bound = shapes.TOLERANCE_HARD if case.hard else shapes.TOLERANCE['float32']
  check(run(name, case, jnp.float32), law(case), bound)


@pytest.mark.parametrize('case', WIDE, ids=str)
def test_gpu_kernel_at_other_lengths_and_sizes(case):
  check(run('pallas_gpu', case, jnp.float32), law(case), shapes.TOLERANCE['float32'])
