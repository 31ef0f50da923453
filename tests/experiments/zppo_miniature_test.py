"""M1, the log-linear student (zppo.md, Miniature): its bars, its counts and its GRPO."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import miniature
from experiments.miniatures import zppo as m1
from experiments.miniatures import zppo_student as student
from zppo_jax.core import rng
from zppo_jax.ops import advantages, surrogates
from zppo_jax.train import prepare

ARMS = ('grpo_buffer', 'grpo_buffer_matched', 'zppo', 'reach_0', 'reach_1')
STEPS = 120


@pytest.fixture(scope='module')
def result():
  """The published protocol at full length, with the arms that the bars read."""
  return m1.run(num_seeds=5, steps=STEPS, arms=ARMS)


def test_the_pass_bars_hold(result):
  bars = m1.bars(result)
  assert [bar.name[:3] for bar in bars] == ['(a)', '(a)', '(b)', '(c)']
  assert all(bar.passed and bar.figure > bar.threshold for bar in bars), bars


def test_bars_fail_when_the_arms_are_exchanged(result):
  arms = dict(result.arms, zppo=result.arms['grpo_buffer'], grpo_buffer=result.arms['zppo'],
              reach_0=result.arms['reach_1'], reach_1=result.arms['reach_0'])
  assert not any(bar.passed for bar in m1.bars(result._replace(arms=arms)))


def test_rollouts_are_counted(result):
  new, replay, extra = 64, 16, 16
  late = STEPS - 1  # the buffer is empty in the first step, and holds 16 others ever after
  for name, size in (('grpo_buffer', 8), ('grpo_buffer_matched', 10)):
    np.testing.assert_array_equal(result.arms[name].rollouts, size * (new * STEPS + replay * late))
    assert not result.arms[name].teacher_samples.any()
  both = result.arms['zppo']
  most = 8 * ((new + extra) * STEPS + replay * late)
  assert (both.rollouts <= most).all() and (both.rollouts > 0.99 * most).all()
  assert (both.rollouts % 8 == 0).all() and (both.teacher_samples <= 4 * extra * STEPS).all()
  assert (result.arms['grpo_buffer_matched'].rollouts >= both.rollouts).all()


def test_buffer_conserves_its_entries_in_every_bin(result):
  for name, arm in result.arms.items():
    buffer, size = arm.buffer, student.ARMS[name][0].group_size
    for seed in range(result.num_seeds):
      entry = np.round(buffer.entry_acc[seed][buffer.valid[seed]] * size).astype(int)
      held = np.bincount(entry, minlength=size + 1)
      np.testing.assert_array_equal(
        buffer.admitted[seed], held + buffer.graduated[seed] + buffer.evicted[seed])
    assert (buffer.admitted.sum(axis=1) > 512).all() and (buffer.valid.sum(axis=1) <= 512).all()


def test_graduation_by_both_denominators():
  buffer = types.SimpleNamespace(admitted=np.array([[10, 5], [0, 1]]),
                                 graduated=np.array([[2, 1], [0, 0]]),
                                 evicted=np.array([[6, 1], [0, 1]]))
  trained = student.Trained(None, None, None, None, buffer)
  np.testing.assert_allclose(trained.graduation(), [0.2, np.nan])
  np.testing.assert_allclose(trained.graduation('left'), [0.25, np.nan])


def stacked_worlds(num_seeds, task=student.TASK):
  made = [student.make_world(seed, task, student.REACH) for seed in range(num_seeds)]
  return jax.tree.map(lambda *x: np.stack(x), *made)


def plain_grpo(key, world, weights, *, steps, new=64, size=8, count=4):
  """GRPO written out: no buffer, no second phase, no empty slot."""
  question = jnp.repeat(jnp.arange(new), size)

  def step(weights, at):
    here = rng.fold(key, 'step', at)
    ids = world.order[(at * new + jnp.arange(new)) % 1280]
    noise = rng.fold(here, 'noise')
    u = jax.vmap(lambda q: jax.random.uniform(jax.random.fold_in(noise, q), (3 * size + 5,)))(ids)
    phi = world.phi[ids]
    answer = student.pick(jax.nn.softmax(phi @ weights)[:, None], u[:, :size])
    reward = (answer == world.right[ids][:, None]).astype(jnp.float32).reshape(-1)
    logp = lambda w: jnp.take_along_axis(
      jax.nn.log_softmax(phi @ w), answer, axis=1).reshape(-1, 1)
    order = prepare.deal(jnp.ones(new, bool), rng.fold(here, 'minibatches'), count)
    old = logp(weights)
    for part in order.reshape(count, -1):
      rows = jnp.isin(question, part)
      advantage = advantages.reinforce_pp_baseline(reward, question, rows, num_groups=new * size)

      def loss(w, rows=rows[:, None], advantage=advantage):
        terms = surrogates.clipped(jnp.where(rows, logp(w), 0), jnp.where(rows, old, 0),
                                   advantage[:, None], eps_low=0.2, eps_high=0.28, dual_clip=10.0)
        return jnp.where(rows, terms, 0).sum() / rows.sum()

      weights = weights - 30.0 * jax.grad(loss)(weights)
    return weights, None

  return jax.lax.scan(step, weights, jnp.arange(steps))[0]


def test_switches_off_equal_grpo_bit_for_bit():
  off = dataclasses.replace(student.ZPPO, use_bcq=False, use_ncq=False, use_buffer=False)
  assert student.ARMS['grpo'] == (off, student.REACH)
  keys, steps = jax.vmap(jax.random.key)(np.arange(2)), 24  # more than one epoch
  worlds, weights = stacked_worlds(2)
  found = student.train_seeds(keys, worlds, weights, config=off, task=student.TASK, steps=steps)
  want = jax.jit(jax.vmap(lambda *x: plain_grpo(*x, steps=steps)))(keys, worlds, weights)
  np.testing.assert_array_equal(found.weights, want)
  assert np.abs(found.weights - weights).max() > 1
  np.testing.assert_array_equal(found.rollouts, 64 * 8 * steps)
  assert not found.buffer.admitted.any() and not found.teacher_samples.any()


def test_world_is_the_protocol():
  world, weights = student.make_world(3, student.TASK, student.REACH)
  plain = student.group_logp(weights, np.eye(64, dtype=np.float32), 0.0, world.right[:64, None])
  assert -10.5 < plain.min() < plain.max() < -3.8  # 5e-5 to 1.4e-2, and the noise of W
  assert (world.teacher[:64] > 0.5).sum() == 51
  assert sorted(world.order) == list(range(1280)) and world.phi.shape == (1280 + 512, 64)
  less, _ = student.make_world(3, student.TASK, 0.25)
  np.testing.assert_array_equal(less.phi, world.phi)
  assert (less.teacher <= world.teacher).all() and (less.teacher[:64] > 0.5).sum() == 16


def test_pick_follows_the_mass():
  mass = jnp.array([0.0, 1.0, 0.0, 3.0, 0.0])
  u = (np.arange(1000) + 0.5) / 1000
  counts = np.bincount(student.pick(jnp.broadcast_to(mass, (1000, 5)), u), minlength=5)
  np.testing.assert_array_equal(counts, [0, 250, 0, 750, 0])


def example_groups(accuracy):
  """Groups of 8 on questions 0.. with the given accuracies; wrong answers are right + 1 or + 2."""
  world, weights = student.make_world(0, student.TASK, 0.0)
  ids = np.arange(len(accuracy))
  reward = (np.arange(8) < 8 * np.asarray(accuracy)[:, None]).astype(np.float32)
  wrong = 1 + np.arange(8) % 2
  answer = (world.right[ids][:, None] + np.where(reward > 0, 0, wrong)) % 64
  ok = np.ones(len(ids), bool)
  return world, weights, student.Groups(ids, ok, None, answer, None, jnp.asarray(reward))


def test_prompts_raise_both_candidates_and_lower_the_listed_answers():
  world, _, plain = example_groups([0.0, 0.25, 0.875])
  for u in (0.0, 0.999):
    bias = student.prompt_bias(student.TASK, world, plain, jnp.full(3, u))
    bcq, ncq = np.moveaxis(np.asarray(bias), 1, 0)
    for i in range(3):
      wrong = set(plain.answer[i]) - {world.right[i]}
      raised = set(np.flatnonzero(bcq[i] == 6))
      assert world.right[i] in raised and len(raised & wrong) == 1 and (bcq[i] != 0).sum() == 2
      assert set(np.flatnonzero(ncq[i] == -1.5)) == wrong and (ncq[i] != 0).sum() == len(wrong)


@pytest.mark.parametrize('cap, taught, want', [
  (2, {0}, [(0, 'bcq'), (0, 'ncq')]),
  (3, {0}, [(0, 'bcq'), (0, 'ncq'), (8, 'ncq')]),
  (3, {0, 8}, [(0, 'bcq'), (0, 'ncq'), (8, 'bcq')]),
])
def test_worked_example_of_the_step(cap, taught, want):
  world, weights, plain = example_groups([0, 1/8, 3/8, 1/2, 5/8, 5/8, 5/8, 5/8, 0, 5/8])
  world = dataclasses.replace(
    world, teacher=jnp.asarray([float(q in taught) for q in range(world.right.size)]))
  c = dataclasses.replace(student.ZPPO, num_new=8, rho_aug=cap / 8)
  u = jnp.full((10, 2 * 8 + 4 + 1), 0.5)
  groups, samples = student.reformulate(c, student.TASK, world, weights, plain, u)
  kinds = ['bcq' if row.max() > 0 else 'ncq' for row in np.asarray(groups.bias)]
  assert np.all(groups.ok) and list(zip(np.asarray(groups.question), kinds)) == want
  assert samples == 4 * cap


def test_too_few_seeds_are_refused():
  with pytest.raises(ValueError, match='num_seeds must be >= 2'):
    m1.run(num_seeds=1)


def test_unknown_name_lists_the_known_ones(capsys):
  flags = types.SimpleNamespace(FLAGS=types.SimpleNamespace(name='nope', num_seeds=2, out=None))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(miniature, 'flags', flags)
    assert miniature.main(['miniature']) == 2
  assert ("--name must be one of asynctls, babyai, calculator, fg2-gdn, zppo; got 'nope'"
          in capsys.readouterr().err)


@pytest.mark.parametrize('swap, status', [(False, 0), (True, 1)])
def test_command_prints_writes_and_returns_the_status(result, swap, status, tmp_path, capsys):
  arms = dict(result.arms)
  for name in ('grpo', 'grpo_both', 'bcq', 'ncq', 'with_zero', 'none'):  # the notes name them
    arms[name] = arms['grpo_buffer']
  if swap:
    arms['zppo'] = arms['reach_0'] = arms['reach_1'] = arms['grpo_buffer']
  given = result._replace(arms=arms)
  fake = dataclasses.replace(miniature.MINIATURES['zppo'], run=lambda num_seeds: given)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(miniature, 'MINIATURES', {'zppo': fake})
    assert miniature.execute('zppo', 5, str(tmp_path)) == status
  text = capsys.readouterr().out
  assert ('FAIL' in text) == swap and 'super-additivity' in text
  values = json.loads((tmp_path / 'zppo.json').read_text())
  assert [bar['passed'] for bar in values['bars']] == [not swap] * 4
  assert len(values['arms']['zppo']['curve'][0]) == STEPS + 1
  assert (tmp_path / 'zppo.png').stat().st_size > 10_000
