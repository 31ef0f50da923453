"""What every row of METHODS must do, through the real plan, sampling, scoring, credit and train step.

One trial per row, cached: three real steps, then properties of the fullest of them.
"""

import dataclasses
import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from zppo_jax.core import masks, rng, types
from zppo_jax.methods import api, table
from zppo_jax.train import checkpoint, compiles, loop, prepare, state, step

# Switches that no row of the table has on: the optional streams of a signal.
SWITCHES = {
  'grpo+switches': dict(kl_beta=0.1, kl_kind='k3+', correction='token_tis', entropy_weight=0.01,
                        delta=1.5, filter_overlong=True),
  'dr_grpo+kl': dict(kl_beta=0.1, entropy_weight=0.01),
  'ppo+kl': dict(kl_beta=0.1),
}
NAMES = sorted(table.METHODS) + sorted(SWITCHES)
WIDE = dict(data=2, fsdp=2, tensor=2)
every_method = pytest.mark.parametrize('name', NAMES)


@pytest.fixture(scope='module', autouse=True)
def quick_compiles():
  """Programs are small: compiling them is the cost. No property here needs fast code."""
  compiles.install()
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
  trial.cache_clear()


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
  """Three steps of a row. `before`, `item`, `after`, `metrics` are those of the fullest one."""

  run: loop.Run
  programs: loop.Programs
  compile_counts: tuple[int, ...]  # after each step
  at: int
  before: state.TrainState
  item: loop.Sampled
  after: state.TrainState
  metrics: dict[str, jax.Array]
  moved: jax.Array  # distance of the parameters from the start

  def prepare(self, rollouts=None, *, key=None, programs=None):
    key = self.key if key is None else key
    programs = programs or self.programs
    rollouts = self.item.rollouts if rollouts is None else rollouts
    return programs.prepare(self.before.params, self.before.method, rollouts, key, programs.roles,
                            self.item.group_sizes)[1]

  @property
  def key(self):
    return rng.fold(jax.random.key(self.run.setup.seed), self.at, 'minibatches')

  @functools.cached_property
  def parts(self):
    return self.prepare()

  @functools.cached_property
  def gradient(self):
    """Gradient and metrics of all rows as one mini-batch."""
    return jax.device_get(self.grad_with(self.parts))

  def grad_with(self, parts, micro_batches: int = 1):
    return self._grad_program(micro_batches)(self.before.params, parts, self.step_roles)

  @functools.cached_property
  def step_roles(self):
    return self.programs.roles if 'teacher_hidden' in self.run.method.needs else {}

  @functools.cache  # noqa: B019, trials live as long as the module
  def _grad_program(self, micro_batches: int):
    settings = dataclasses.replace(tiny.SETTINGS, micro_batches=micro_batches)
    configs = {k: tiny.model() for k in self.step_roles}
    gradient = step.make_gradient(tiny.model(), self.run.method.terms, settings, configs)

    def program(params, parts, roles):
      grads, metrics = gradient(params, parts, roles, jnp.bool_(True))
      return grads, step.finish_metrics(metrics)

    return jax.jit(program)


@functools.cache
def trial(name: str) -> Trial:
  row, changes = name.split('+')[0], SWITCHES.get(name, {})
  run = tiny.make_run(row, **changes)
  with jax.set_mesh(run.setup.mesh):
    programs = loop.compile_programs(run)
    at_start = now = loop.initial_state(run, programs)
    at_start = tiny.copy(at_start.params)
    steps, counts = [], []
    for at in range(3):
      before, item, now, metrics = tiny.one_step(run, programs, now, at)
      steps.append((at, before, item, tiny.copy(now), metrics))
      counts.append(compiles.count())
  fullest = max(steps, key=lambda s: sum(int(r.valid.sum()) for r in s[2].rollouts))
  moved = sum(jnp.sum(jnp.abs(a - b)) for a, b in zip(
    jax.tree.leaves(now.params), jax.tree.leaves(at_start)))
  return Trial(run, programs, tuple(counts), *fullest, moved)


def assert_close(got, wanted, tolerance: float):
  """Every leaf within tolerance of the largest entry of its tree: sums have no better unit."""
  size = max(float(np.abs(x).max()) for x in jax.tree.leaves(wanted))
  chex.assert_trees_all_close(got, wanted, rtol=0, atol=tolerance * size)


def assert_same_step(got, wanted, tolerance: float):
  """(gradient or parameters, metrics) within tolerance."""
  assert_close(jax.device_get(got[0]), jax.device_get(wanted[0]), tolerance)
  assert got[1].keys() == wanted[1].keys()
  for key, value in wanted[1].items():
    np.testing.assert_allclose(got[1][key], value, rtol=tolerance, atol=tolerance, err_msg=key)


def poison(mask, x):
  """NaN outside the mask, in floats."""
  if x is None or not jnp.issubdtype(x.dtype, jnp.floating) or x.shape != mask.shape:
    return x
  return jnp.where(mask, x, jnp.nan)


def poison_rollout(r: types.Rollout) -> types.Rollout:
  """NaN in the floats outside the loss mask and in rewards of padding rows; junk ids on padding."""
  junk = jnp.arange(r.tokens.size, dtype=jnp.int32).reshape(r.tokens.shape) % 90 + 5
  return dataclasses.replace(
    r, behavior_logp=poison(r.loss_mask, r.behavior_logp), reward=poison(r.valid, r.reward),
    tokens=jnp.where(r.segment_ids > 0, r.tokens, junk))


def poison_part(part: step.Part) -> step.Part:
  signal = jax.tree.map(lambda x: poison(part.signal.mask, x), part.signal)
  return step.Part(poison_rollout(part.rollout), signal)


def pad_part(part: step.Part, rows: int, columns: int) -> step.Part:
  """More columns of padding, and rows that look like real ones but are not valid."""
  size = part.rollout.tokens.shape[1]

  def widen(x, value):
    if x is None or x.ndim < 2:
      return x
    value = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else value
    return jnp.pad(x, ((0, 0), (0, columns)), constant_values=value)

  ints = {f: 7 if f == 'tokens' else 0 for f in vars(part.rollout)}
  rollout = types.Rollout(**{f: widen(x, ints[f]) for f, x in vars(part.rollout).items()})
  signal = jax.tree.map(lambda x: widen(x, 0), part.signal)
  blank = jax.tree.map(lambda x: x[:rows], (rollout, signal))
  blank_rollout = dataclasses.replace(blank[0], valid=jnp.zeros(rows, bool))
  blank_signal = dataclasses.replace(
    blank[1], mask=jnp.zeros((rows, size + columns), bool), active=jnp.zeros(rows, bool))
  join = lambda a, b: jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)
  return step.Part(join(rollout, blank_rollout), join(signal, blank_signal))


@every_method
def test_compiles_once(name):
  counts = trial(name).compile_counts
  assert counts[0] == counts[1] == counts[2]


@every_method
def test_is_finite_and_learns(name):
  t = trial(name)
  metrics = {k: float(v) for k, v in t.metrics.items()}
  assert np.isfinite(list(metrics.values())).all(), metrics
  assert metrics['nonfinite_max'] == 0 and metrics['grad_norm'] > 0
  assert any(k.startswith('loss/') for k in metrics)
  assert int(t.after.version) == t.at + 1
  assert np.isfinite(t.moved) and t.moved > 0
  given = all(bool((r.role_id != types.POLICY)[r.valid].all()) for r in t.item.rollouts)
  assert given or 0 < metrics['mismatch/abs_max'] < 1e-4  # sampler and scorer agree


@every_method
def test_every_part_carries_signal(name):
  """The other properties say nothing about a part without valid rows or without worth."""
  for part in trial(name).parts:
    assert bool(part.rollout.valid.any()) and bool(part.signal.active.any())
    assert bool((part.signal.advantage != 0).any()) and not bool(part.signal.mask.all())


def _term_gradient(t: Trial, floats, starts):
  """Gradient of all terms in the float outputs of the models."""
  signals = [p.signal for p in t.parts]

  def total(floats):
    value = 0.0
    outputs = [dataclasses.replace(o, start=s) for o, s in zip(floats, starts)]
    dens = step.denominators(t.run.method.terms, outputs, signals)
    for out, signal in zip(outputs, signals):
      for term, den in zip(t.run.method.terms, dens):
        value += term(out, signal)[0] / den
    return value

  return jax.grad(total)(floats)


@every_method
def test_masked_tokens_get_exactly_zero_gradient(name):
  """Terms are differentiated in what the models hand them; outside the mask that is junk or NaN."""
  t = trial(name)
  configs = {k: tiny.model() for k in t.step_roles}
  key = jax.random.key(0)

  def outputs(part):
    shapes = jax.eval_shape(lambda p, roles: step.model_outputs(
      tiny.model(), p, part.rollout, {k: (configs[k], v) for k, v in roles.items()},
      tiny.SETTINGS), t.before.params, t.step_roles)
    leaves, tree = jax.tree.flatten(dataclasses.replace(shapes, start=None))
    drawn = [-jnp.abs(jax.random.normal(jax.random.fold_in(key, i), x.shape))
             for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, drawn)

  clean = [outputs(p) for p in t.parts]
  dirty = [dataclasses.replace(o, logp=poison(p.signal.mask, o.logp), value=poison(
    p.signal.mask, o.value), entropy=poison(p.signal.mask, o.entropy))
    for o, p in zip(clean, t.parts)]
  starts = [masks.window_start(p.rollout.loss_mask, tiny.RESPONSE) for p in t.parts]
  gradient = jax.jit(lambda x: _term_gradient(t, x, starts))
  found = gradient(clean)
  chex.assert_trees_all_equal(found, gradient(dirty))
  largest = 0.0
  for out, part, start in zip(found, t.parts, starts):
    window = masks.take_window(part.signal.mask, start, tiny.RESPONSE)
    for x in (out.logp, out.entropy, out.value):
      assert x is None or not bool(jnp.any(jnp.where(part.signal.mask, 0, x) != 0))
    assert not bool(jnp.any(jnp.where(window[..., None], 0, out.hidden) != 0))
    largest = max(largest, *(float(jnp.abs(x).max()) for x in (out.logp, out.hidden)))
  assert largest > 0


@every_method
def test_nan_outside_the_mask_changes_nothing(name):
  t = trial(name)
  dirty = tuple(poison_part(p) for p in t.parts)
  assert any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(dirty) if x.dtype == jnp.float32)
  chex.assert_trees_all_equal(jax.device_get(t.grad_with(dirty)), t.gradient)


@every_method
def test_nan_outside_the_mask_changes_no_credit(name):
  """The same for what credit reads: rewards and sampler log-probs of the rollout, every score."""
  t = trial(name)
  size = max(p.rollout.tokens.shape[1] for p in t.parts)
  rollout = prepare.join([p.rollout for p in t.parts], size)
  needs, count = t.run.method.needs, t.run.method.iterations
  wanted = dict(old_logp='old_logp' in needs, entropy='old_logp' in needs,
                ref_logp='reference' in needs, teacher_logp='teacher_logp' in needs,
                value='critic' in needs)
  streams = {k: -jnp.abs(jax.random.normal(rng.fold(jax.random.key(1), k), rollout.tokens.shape))
             for k, needed in wanted.items() if needed}
  minibatch = jnp.concatenate([jnp.repeat(jnp.arange(count), p.rollout.valid.shape[0] // count)
                               for p in t.parts])
  clean = types.Scores(**streams, minibatch=minibatch)
  dirty = types.Scores(**{k: poison(rollout.loss_mask, x) for k, x in streams.items()},
                       minibatch=minibatch)
  credit = jax.jit(t.run.method.credit)
  _, found = credit(t.before.method, rollout, clean)
  _, other = credit(t.before.method, poison_rollout(rollout), dirty)
  chex.assert_trees_all_equal((found.mask, found.advantage, found.active),
                              (other.mask, other.advantage, other.active))
  on_mask = lambda s: jax.tree.map(
    lambda x: jnp.where(s.mask, x, 0) if x.shape == s.mask.shape else x, s)
  chex.assert_trees_all_equal(on_mask(found), on_mask(other))
  assert not bool(jnp.any(jnp.where(found.mask, 0, found.advantage) != 0))
  assert not bool(jnp.any(found.mask & ~rollout.valid[:, None]))


@every_method
def test_padding_and_micro_batches_change_nothing(name):
  """Five more columns and four more rows per part in two micro-batches; four micro-batches."""
  t = trial(name)
  padded = tuple(pad_part(p, 4, 5) for p in t.parts)
  assert_same_step(t.grad_with(padded, 2), t.gradient, 1e-6)
  assert_same_step(t.grad_with(t.parts, 4), t.gradient, 1e-6)


def _permute(rollout: types.Rollout, group_size: int, seed: int) -> types.Rollout:
  """Groups in another order, and rows in another order inside each."""
  generator, slots = np.random.default_rng(seed), rollout.valid.shape[0] // group_size
  rows = np.arange(slots * group_size).reshape(slots, group_size)[generator.permutation(slots)]
  rows = generator.permuted(rows, axis=1).reshape(-1)
  return jax.tree.map(lambda x: x[rows], rollout)


def _by_row(parts) -> list[dict]:
  """{trajectory: (advantage, mask, active)} per part."""
  found = []
  for part in jax.device_get(parts):
    rows = np.flatnonzero(part.rollout.valid)
    ids = part.rollout.traj_id[rows]
    assert len(set(ids.tolist())) == len(ids)
    found.append({i: (part.signal.advantage[r], part.signal.mask[r], part.signal.active[r],
                      part.rollout.tokens[r]) for i, r in zip(ids.tolist(), rows)})
  return found


@every_method
def test_group_order_changes_no_advantage(name):
  """Another order of groups and rows, dealt to the mini-batches by another key."""
  t = trial(name)
  shuffled = tuple(_permute(r, g, 3) for r, g in zip(t.item.rollouts, t.item.group_sizes))
  other = t.prepare(shuffled, key=jax.random.key(99))
  assert not np.array_equal(other[0].rollout.tokens, t.parts[0].rollout.tokens)
  for found, wanted in zip(_by_row(other), _by_row(t.parts)):
    assert found.keys() == wanted.keys()
    for row in wanted:
      np.testing.assert_allclose(found[row][0], wanted[row][0], rtol=1e-5, atol=1e-6)
      chex.assert_trees_all_equal(found[row][1:], wanted[row][1:])


@every_method
def test_one_device_equals_eight(name):
  t = trial(name)
  row, changes = name.split('+')[0], SWITCHES.get(name, {})
  run = tiny.make_run(row, shape=WIDE, **changes)
  with jax.set_mesh(run.setup.mesh):
    programs = loop.compile_programs(run)
    before = state.put(jax.device_get(t.before), tiny.model(), run.method, run.setup.mesh)
    assert len(before.params['policy'].embed.sharding.device_set) == 8
    item = dataclasses.replace(t.item, rollouts=jax.device_put(
      t.item.rollouts, jax.sharding.NamedSharding(run.setup.mesh, jax.sharding.PartitionSpec())))
    after, metrics = loop._update(run, programs, before, item, t.at, loop.PhaseTimer())
  single = {k: v for k, v in t.metrics.items() if k in metrics}
  assert_same_step((after.params, metrics), (t.after.params, single), 1e-5)


@every_method
def test_state_survives_save_and_restore(name, tmp_path):
  t = trial(name)
  with checkpoint.make_manager(str(tmp_path)) as manager:
    checkpoint.save(manager, 1, state=t.after, pending=[], meta={}, force=True)
    manager.wait_until_finished()
    found, _, _ = checkpoint.restore(manager, 1, state=checkpoint.abstract(t.after))
  chex.assert_trees_all_equal(found, t.after)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, t.after)


@pytest.mark.parametrize('name', sorted(table.METHODS))
def test_docstring_names_its_source(name):
  docs = inspect.getmodule(table.METHODS[name].build).__doc__
  assert re.search(r'\b\d{4}\.\d{5}\b', docs)


@pytest.mark.parametrize('name', sorted(table.METHODS))
def test_trains_the_policy_alone(name):
  """No frozen model enters the optimiser; a critic is trainable, a teacher never is."""
  run = tiny.make_run(name)
  params = state.specs(run.setup.model, run.method.needs)
  assert set(params) == {'policy'} | ({'critic'} if 'critic' in run.method.needs else set())
  assert isinstance(run.method, api.Method)
