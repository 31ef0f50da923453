"""What every row of METHODS must do, through the real plan, sampling, scoring, credit and step.

One trial per row: three real steps, then properties of the fullest of them. The trial is a fixture
of the module, so pytest runs all properties of a row together and forgets the trial after them.
"""

import dataclasses
import functools
import inspect
import re

import chex
import jax
import numpy as np
import pytest
import tiny

from zppo_jax.core import masks, trees, types
from zppo_jax.mesh import place
from zppo_jax.methods import api, table
from zppo_jax.train import checkpoint, compiles, prepare, state, step
from zppo_jax.train import run as run_lib

# Switches that no row of the table has on: the optional streams of a signal.
SWITCHES = {
  'grpo+switches': dict(kl_beta=0.1, kl_kind='k3+', correction='token_tis', entropy_weight=0.01,
                        delta=1.5, filter_overlong=True),
  'dr_grpo+kl': dict(kl_beta=0.1, entropy_weight=0.01),
  'ppo+kl': dict(kl_beta=0.1),
}
NAMES = sorted(table.METHODS) + sorted(SWITCHES)
# A row per kind of program; the others differ in credit and surrogates, whose exact truths
# have tests of their own, and are left to `-m slow`.
QUICK = {'distill_off', 'gspo', 'grpo+switches', 'opd', 'ppo+kl', 'remax', 'sft', 'zppo',
         'zppo_hint'}
WIDE = dict(data=2, fsdp=2, tensor=2)
# A split never sees a method, and credit reduces over the batch by few estimators: one row of a
# kind.
FOUR_MICRO_BATCHES = {'zppo', 'ppo', 'gspo', 'distill_off', 'grpo+switches'}
# Tests that compile the step of a row again; the rows that are not named are left to `-m slow`.
COSTLY = {'test_one_device_equals_eight': ('ppo+kl', 'zppo'),
          'test_nan_outside_the_mask_changes_nothing': ('distill_off', 'ppo+kl', 'zppo'),
          'test_padding_and_micro_batches_change_nothing': ('distill_off', 'ppo+kl', 'zppo')}
CREDIT_ON_EIGHT = {'zppo', 'ppo+kl', 'reinforce_pp', 'remax', 'opd', 'distill_off'}


@pytest.fixture(scope='module', autouse=True)
def counted_compiles():
  compiles.install()
  yield
  _compiled.cache_clear()


def make_run(name: str, **kwargs) -> run_lib.Run:
  return tiny.make_run(name.split('+')[0], **SWITCHES.get(name, {}), **kwargs)


@functools.cache
def step_rows() -> dict[str, str]:
  """{row: first row with the same terms, mini-batches and models in the step}."""
  first, found = {}, {}
  for name in NAMES:
    m = make_run(name).method
    key = m.terms, m.iterations, m.needs & {'critic', 'teacher_hidden', 'old_logp', 'reference'}
    found[name] = first.setdefault(key, name)
  return found


def skip_if_step_is_tested(name: str):
  """A step never sees which row its parts come from: one row per step is enough."""
  if step_rows()[name] != name:
    pytest.skip(f'its step is that of {step_rows()[name]}')


class Trial:
  """Three steps of a row, and the fullest of them: `at`, `before`, `item`, `parts`, `after`."""

  def __init__(self, name: str):
    self.name, self.run, self._programs = name, make_run(name), {}
    steps, self.compile_counts = [], []
    with jax.set_mesh(self.run.setup.mesh):
      self.programs = run_lib.compile_programs(self.run)
      now = run_lib.initial_state(self.run, self.programs)
      start = tiny.copy(now.params)
      for at in range(3):
        taken = tiny.take_step(self.run, self.programs, now, at)
        self.compile_counts.append(compiles.count())
        now = taken.after  # donated to the next step
        steps.append(dataclasses.replace(taken, after=tiny.copy(now)))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).sum(), tiny.copy(now.params), start)
    self.moved = sum(jax.tree.leaves(moved))
    best = max(steps, key=lambda s: sum(int(r.valid.sum()) for r in s.item.rollouts))
    self.at, self.before, self.item, self.parts = best.at, best.before, best.item, best.parts
    self.after, self.metrics = best.after, best.metrics

  def step(self, parts, *, micro_batches: int):
    """(moments of the optimiser, metrics) after the update on other parts."""
    args = self.before, parts, self.programs.roles
    if micro_batches not in self._programs:
      settings = dataclasses.replace(tiny.SETTINGS, micro_batches=micro_batches)
      run = dataclasses.replace(self.run, step_settings=settings)
      with jax.set_mesh(run.setup.mesh):
        self._programs[micro_batches] = compile_once(run_lib.compile_programs(run).update, *args)
    after, metrics = self._programs[micro_batches](*args)
    return tiny.gradients(tiny.copy(after)), tiny.copy(metrics)

  @functools.cached_property
  def padded(self):
    """Parts with more columns and more rows, all of them padding."""
    return tuple(pad_part(p, self.run.method.iterations) for p in self.parts)

  @functools.cached_property
  def padded_result(self):
    return self.step(self.padded, micro_batches=2)

  @property
  def result(self):
    """The same of the trial's own update."""
    own = {k: v for k, v in self.metrics.items() if not k.startswith('buffer/')}
    return tiny.gradients(self.after), own


@pytest.fixture(scope='module', params=[
  pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in NAMES])
def t(request):
  return Trial(request.param)


@functools.cache
def _compiled() -> dict:
  return {}


def compile_once(jitted, *args):
  """The compiled program, shared by rows whose step is the same: many differ in plan or credit."""
  lowered = jitted.lower(*args)
  key = (lowered.as_text(), str(lowered.in_tree), str(lowered.out_tree))
  if key not in _compiled():
    _compiled()[key] = lowered.compile()
  return _compiled()[key]


def poison(mask, x):
  """NaN outside the mask, in floats of its shape."""
  if x is None or not np.issubdtype(x.dtype, np.floating) or x.shape != mask.shape:
    return x
  return np.where(mask, x, np.nan).astype(x.dtype)


def poison_rollout(r: types.Rollout) -> types.Rollout:
  """NaN in the floats outside the loss mask and in rewards of padding rows; junk ids on padding."""
  junk = np.arange(r.tokens.size, dtype=np.int32).reshape(r.tokens.shape) % 90 + 5
  return dataclasses.replace(
    r, behavior_logp=poison(r.loss_mask, r.behavior_logp), reward=poison(r.valid, r.reward),
    tokens=np.where(r.segment_ids > 0, r.tokens, junk))


def poison_part(part: step.Part) -> step.Part:
  signal = jax.tree.map(lambda x: poison(part.signal.mask, x), part.signal)
  return dataclasses.replace(part, rollout=poison_rollout(part.rollout), signal=signal)


def pad_part(part: step.Part, minibatches: int, columns: int = 5) -> step.Part:
  """More columns of padding; in every mini-batch more rows that look real but are not valid.

  They are whole copies of its first groups, since rows of a group share their prompt.
  """
  rows = part.rollout.valid.shape[0] // minibatches
  extra = 4 - rows % 4  # at least one, and micro-batches of equal size
  assert extra % part.group == 0

  def grow(x):
    if x.ndim == 2:
      x = np.pad(x, ((0, 0), (0, columns)))
    x = x.reshape(minibatches, rows, *x.shape[1:])
    return np.concatenate([x, x[:, :extra]], axis=1).reshape(-1, *x.shape[2:])

  grown = jax.tree.map(grow, part)
  real = np.tile(np.arange(rows + extra) < rows, minibatches)
  rollout = dataclasses.replace(grown.rollout, valid=grown.rollout.valid & real)
  signal = dataclasses.replace(grown.signal, mask=grown.signal.mask & real[:, None],
                               active=grown.signal.active & real)
  return dataclasses.replace(grown, rollout=rollout, signal=signal)


def test_compiles_once(t):
  counts = t.compile_counts
  assert counts[0] == counts[1] == counts[2]


def test_is_finite_and_learns(t):
  assert np.isfinite(list(t.metrics.values())).all(), t.metrics
  assert t.metrics['nonfinite_max'] == 0 and t.metrics['grad_norm'] > 0
  assert any(k.startswith('loss/') for k in t.metrics)
  assert t.after.version == t.at + 1
  assert np.isfinite(t.moved) and t.moved > 0
  given = all((r.role_id != types.POLICY)[r.valid].all() for r in tiny.copy(t.item.rollouts))
  assert given or 0 < t.metrics['mismatch/abs_max'] < 1e-4  # sampler and scorer agree


def test_every_part_carries_signal(t):
  """The other properties would say nothing about a part without worth, or one that is all worth."""
  for part in t.parts:
    assert part.rollout.valid.any() and not part.signal.mask.all()
  worth = [p for p in t.parts if p.signal.active.any() and p.signal.advantage.any()]
  books = t.name == 'distill_off'  # its student rows only feed the buffer
  assert len(worth) == len(t.parts) - books


def test_explore_adds_the_parts_that_the_method_declares(t):
  """`extra` is what the config check and the pod compilation know of the second phase."""
  found = [(r.tokens.shape, size) for r, size in zip(t.item.rollouts, t.item.group_sizes)]
  method, wanted = t.run.method, []
  for slots in (api.Slots(method.capacity, method.group_size), *method.extra):
    bucket = tiny.REFORMULATED if slots.reformulated else tiny.PROMPT
    wanted.append(((slots.capacity * slots.group_size, bucket + tiny.RESPONSE), slots.group_size))
  assert found == wanted


def _blank_outputs(t: Trial, seed: int):
  """What the models hand to the terms: random, negative, in the shapes of the trial's parts."""
  roles = t.programs.roles if 'teacher_hidden' in t.run.method.needs else {}
  generator = np.random.default_rng(seed)

  def outputs(part):
    shapes = jax.eval_shape(lambda p, frozen: step.model_outputs(
      tiny.model(), p, part.rollout, {k: (tiny.model(), v) for k, v in frozen.items()},
      tiny.SETTINGS), t.before.params, roles)
    drawn = jax.tree.map(lambda x: -np.abs(generator.normal(size=x.shape)).astype(np.float32),
                         shapes)
    return dataclasses.replace(drawn, start=None)

  return [outputs(p) for p in t.parts]


def test_masked_tokens_get_exactly_zero_gradient(t):
  """Terms differentiated in what the models hand them; outside the mask that is junk or NaN."""
  signals, clean = [p.signal for p in t.parts], _blank_outputs(t, 0)
  starts = [masks.window_start(p.rollout.loss_mask, tiny.RESPONSE) for p in t.parts]

  def total(outputs):
    outputs = [dataclasses.replace(o, start=s) for o, s in zip(outputs, starts)]
    dens = step.denominators(t.run.method.terms, outputs, signals)
    return sum(term(out, signal)[0] / den for out, signal in zip(outputs, signals)
               for term, den in zip(t.run.method.terms, dens))

  dirty = [dataclasses.replace(o, **{k: poison(s.mask, getattr(o, k)) for k in (
    'logp', 'value', 'entropy')}) for o, s in zip(clean, signals)]
  gradient = jax.jit(jax.grad(total))
  found = tiny.copy(gradient(clean))
  chex.assert_trees_all_equal(found, tiny.copy(gradient(dirty)))
  largest = 0.0
  for out, signal, start in zip(found, signals, starts):
    for x in (out.logp, out.entropy, out.value):
      assert x is None or not x[~signal.mask].any()
    window = np.asarray(masks.take_window(signal.mask, start, tiny.RESPONSE))
    assert not out.hidden[~window].any()
    largest = max(largest, np.abs(out.logp).max(), np.abs(out.hidden).max())
  assert largest > 0


def test_nan_outside_the_mask_changes_nothing(t):
  """Bit for bit, on padded parts in two micro-batches."""
  skip_if_step_is_tested(t.name)
  dirty = tuple(poison_part(p) for p in t.padded)
  spoilt = [k for k, x in trees.named_leaves(dirty).items() if np.isnan(x).any()]
  assert any('advantage' in k for k in spoilt) and any('behavior_logp' in k for k in spoilt)
  chex.assert_trees_all_equal(t.step(dirty, micro_batches=2), t.padded_result)


def test_padding_and_micro_batches_change_nothing(t):
  """More columns, more rows and two or four micro-batches against the trial's own update."""
  skip_if_step_is_tested(t.name)
  tiny.assert_close(t.padded_result, t.result, 1e-6)
  if t.name in FOUR_MICRO_BATCHES:  # and no prompt is shared
    alone = tuple(dataclasses.replace(p, group=1) for p in t.padded)
    tiny.assert_close(t.step(alone, micro_batches=4), t.result, 1e-6)


def test_nan_outside_the_mask_changes_no_credit(t):
  """The same for what credit reads: rewards and sampler log-probs of the rollout, every score."""
  size = max(p.rollout.tokens.shape[1] for p in t.parts)
  rollout = tiny.copy(prepare.join([p.rollout for p in t.parts], size))
  needs, count = t.run.method.needs, t.run.method.iterations
  wanted = dict(old_logp='old_logp' in needs, entropy='old_logp' in needs,
                ref_logp='reference' in needs, teacher_logp='teacher_logp' in needs,
                value='critic' in needs)
  generator = np.random.default_rng(1)
  streams = {k: -np.abs(generator.normal(size=rollout.tokens.shape)).astype(np.float32)
             for k, needed in wanted.items() if needed}
  minibatch = np.concatenate([np.repeat(np.arange(count), p.rollout.valid.shape[0] // count)
                              for p in t.parts])
  clean = types.Scores(**streams, minibatch=minibatch)
  dirty = types.Scores(**{k: poison(rollout.loss_mask, x) for k, x in streams.items()},
                       minibatch=minibatch)
  credit = jax.jit(t.run.method.credit)
  found = tiny.copy(credit(t.before.method, rollout, clean)[1])
  other = tiny.copy(credit(t.before.method, poison_rollout(rollout), dirty)[1])

  def on_mask(s):
    return jax.tree.map(lambda x: np.where(s.mask, x, 0) if x.shape == s.mask.shape else x, s)

  chex.assert_trees_all_equal(on_mask(found), on_mask(other))
  assert not found.advantage[~found.mask].any() and not other.advantage[~other.mask].any()
  assert not (found.mask & ~rollout.valid[:, None]).any() and found.mask.any()
  gone = rollout.group_id == rollout.group_id[np.flatnonzero(found.active)[0]]  # a padding slot now
  blanked = dataclasses.replace(rollout, valid=rollout.valid & ~gone)
  without = tiny.copy(credit(t.before.method, blanked, clean)[1])
  assert not without.mask[gone].any() and not without.active[gone].any()


def _permute(rollout: types.Rollout, group_size: int, seed: int) -> types.Rollout:
  """Groups in another order, and rows in another order inside each."""
  generator, slots = np.random.default_rng(seed), rollout.valid.shape[0] // group_size
  rows = np.arange(slots * group_size).reshape(slots, group_size)[generator.permutation(slots)]
  rows = generator.permuted(rows, axis=1).reshape(-1)
  return jax.tree.map(lambda x: x[rows], rollout)


def _by_row(parts) -> list[dict]:
  """{trajectory: (advantage, mask, active, tokens)} per part."""
  found = []
  for part in parts:
    rows = np.flatnonzero(part.rollout.valid)
    ids = part.rollout.traj_id[rows].tolist()
    assert len(set(ids)) == len(ids)
    s = part.signal
    found.append({i: (s.advantage[r], s.mask[r], s.active[r], part.rollout.tokens[r])
                  for i, r in zip(ids, rows)})
  return found


def test_group_order_changes_no_advantage(t):
  """Another order of groups and rows, dealt to the mini-batches by another key."""
  shuffled = tuple(_permute(r, g, 3)
                   for r, g in zip(tiny.copy(t.item.rollouts), t.item.group_sizes))
  like = lambda x, old: jax.device_put(x, old.sharding)  # the program of the trial, not a new one
  before = jax.tree.map(like, t.before, t.programs.abstract)
  with jax.set_mesh(t.run.setup.mesh):
    _, other = t.programs.prepare(
      before.params, before.method, jax.tree.map(like, shuffled, t.item.rollouts),
      jax.random.key(99), t.programs.roles, t.item.group_sizes)
  other = tiny.copy(other)
  assert not np.array_equal(other[0].rollout.tokens, t.parts[0].rollout.tokens)
  for found, wanted in zip(_by_row(other), _by_row(t.parts)):
    assert found.keys() == wanted.keys()
    for row in wanted:
      np.testing.assert_allclose(found[row][0], wanted[row][0], rtol=1e-5, atol=1e-6)
      chex.assert_trees_all_equal(found[row][1:], wanted[row][1:])


def test_one_device_equals_eight(t):
  """Update, and for some rows scores and credit, on a mesh of rows, parameters and heads."""
  if t.name not in CREDIT_ON_EIGHT:
    skip_if_step_is_tested(t.name)
  run = make_run(t.name, shape=WIDE)
  mesh = run.setup.mesh
  with jax.set_mesh(mesh):
    programs = run_lib.compile_programs(run)
    before = state.put(t.before, tiny.model(), run.method, mesh)
    assert len(before.params['policy'].embed.sharding.device_set) == 8
    parts = jax.device_put(t.parts, place.replicated(mesh))
    if t.name in CREDIT_ON_EIGHT:
      rollouts = jax.device_put(tiny.copy(t.item.rollouts), place.replicated(mesh))
      _, parts = programs.prepare(
        before.params, before.method, rollouts, tiny.minibatch_key(run, t.at), programs.roles,
        t.item.group_sizes)
      for found, wanted in zip(tiny.copy(parts), t.parts):
        chex.assert_trees_all_equal(found.rollout, wanted.rollout)
        chex.assert_trees_all_close(found.signal, wanted.signal, rtol=1e-5, atol=1e-5)
    args = before, parts, programs.roles
    after, metrics = compile_once(programs.update, *args)(*args)
  tiny.assert_close((tiny.gradients(tiny.copy(after)), tiny.copy(metrics)), t.result, 1e-5)


def test_state_survives_save_and_restore(t, tmp_path):
  saved = jax.device_put(t.after)
  with checkpoint.make_manager(str(tmp_path)) as manager:
    checkpoint.save(manager, 1, state=saved, pending=[], meta={}, force=True)
    manager.wait_until_finished()
    found, _, _ = checkpoint.restore(manager, 1, state=checkpoint.abstract(saved))
  chex.assert_trees_all_equal(found, saved)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, saved)


def test_trains_the_policy_alone(t):
  """No frozen model enters the optimiser; a critic is trainable, a teacher never is."""
  roles = {'policy'} | ({'critic'} if 'critic' in t.run.method.needs else set())
  assert set(t.before.params) == roles
  seen = {k.split('.mu.')[1].split('.')[0] for k in tiny.gradients(t.after)}
  assert seen == roles


@pytest.mark.parametrize('name', sorted(table.METHODS))
def test_docstring_names_its_source(name):
  docs = inspect.getmodule(table.METHODS[name].build).__doc__
  assert re.search(r'\b\d{4}\.\d{5}\b', docs)
