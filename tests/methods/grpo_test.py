"""GRPO and its family through the real train step (../specs/grpo-baselines.md), PPO's refusals."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from fake_context import FakeContext, make_drawn, make_rollout

from kernels import tls_attention as tls
from zppo_jax.core import types
from zppo_jax.core.errors import UserError
from zppo_jax.data import batches
from zppo_jax.methods import api, grpo, sft, table
from zppo_jax.models.config import ModelConfig, Sparse
from zppo_jax.rewards.verifiers import VerifyResult
from zppo_jax.sampling import decode
from zppo_jax.train import context, loop, state, step
from zppo_jax.train import run as run_lib
from zppo_jax.train import setup as setup_lib

GROUP_RELATIVE = ['grpo', 'rloo', 'dr_grpo', 'gspo', 'cispo', 'reinforce_pp_baseline']


def run_steps(run: run_lib.Run, count: int = 1):
  """(first state, [Step]) of a run."""
  with jax.set_mesh(run.setup.mesh):
    programs = run_lib.compile_programs(run)
    now = run_lib.initial_state(run, programs)
    start, taken = tiny.copy(now), []
    for at in range(count):
      made = tiny.take_step(run, programs, now, at)
      now = made.after
      taken.append(dataclasses.replace(made, after=tiny.copy(now)))
  return start, taken


@pytest.mark.parametrize('name', [
  n if n in ('grpo', 'gspo') else pytest.param(n, marks=pytest.mark.slow)
  for n in GROUP_RELATIVE + ['reinforce']])
def test_constant_rewards_leave_the_parameters_exactly_unchanged(name):
  """Miniature 2 and 8: not even the weight decay moves them, and the skip is counted.

  All wrong in the first step, all right in the second.
  """
  start, steps = run_steps(tiny.make_run(name, grader=tiny.FixedGrader(0.0, 1.0), iterations=2), 2)
  for count, made in enumerate(steps, start=1):
    assert (made.item.rollouts[0].reward == count - 1).all()
    jax.tree.map(np.testing.assert_array_equal, made.after.params, start.params)
    jax.tree.map(np.testing.assert_array_equal, made.after.opt_state, start.opt_state)
    assert made.after.skipped == 2 * count and made.after.updates == 0
    assert made.metrics['update/skipped_frac'] == 1


def test_constant_rewards_still_feel_a_kl_term():
  start, (made,) = run_steps(tiny.make_run('grpo', grader=tiny.FixedGrader(1.0), kl_beta=0.1))
  assert made.after.updates == 1 and made.metrics['loss/kl'] > 0
  assert made.metrics['loss/policy'] == 0
  assert (made.after.params['policy'].embed != start.params['policy'].embed).any()


@pytest.mark.parametrize('name', ['grpo', *(pytest.param(n, marks=pytest.mark.slow)
                                            for n in ('dapo', 'gspo'))])
def test_one_minibatch_is_reinforce(name):
  """Miniature 4: ratios are 1, nothing is clipped, and the gradient is that of -A logp."""
  changes = dict(iterations=1, dynamic_sampling=False, overlong_buffer=0)
  _, (made,) = run_steps(tiny.make_run(name, **changes))
  assert made.metrics['ratio/ratio_mean'] == 1 and made.metrics['ratio/approx_kl'] == 0
  for side in ('low', 'high', 'dual'):
    assert made.metrics[f'ratio/clip_frac_{side}'] == 0
  aggregation = table.METHODS[name].defaults.aggregation
  _, (plain,) = run_steps(tiny.make_run('grpo', surrogate='reinforce', aggregation=aggregation))
  moments = [jax.tree.leaves(s.after.opt_state) for s in (made, plain)]
  norm = float(optax.global_norm(moments[1]))
  for a, b in zip(*moments):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * norm)
  assert norm > 0


def test_later_minibatches_leave_the_ratio_of_one():
  """The opposite of the test above: with I = 2 the second mini-batch is off-policy."""
  _, (made,) = run_steps(tiny.make_run('gspo', optim=state.Optim(learning_rate=0.1, eps=1e-2)))
  assert made.metrics['ratio/ratio_mean'] != 1
  assert made.metrics['ratio/clip_frac_low'] + made.metrics['ratio/clip_frac_high'] > 0


# Dynamic sampling.


def fill(rewards_by_draw, *, num_new=4, max_draws=10):
  """Explore of dynamic sampling; rewards_by_draw[k][slot] are those of the k-th draw."""
  config = grpo.Config(num_new=num_new, group_size=4, dynamic_sampling=True, max_draws=max_draws,
                       max_tokens=8)
  script = iter(rewards_by_draw[1:])

  class Context(FakeContext):
    def draw(self, groups, **kwargs):
      rewards = next(script)
      self.draws.append((groups, kwargs))
      return make_drawn(groups, rewards, first_id=kwargs['first_id'])

  ctx = Context()
  drawn = make_drawn([api.Group(q) for q in range(num_new)], rewards_by_draw[0])
  method = grpo.build(config)
  return method.explore((), drawn, ctx)[1], ctx


MIXED, RIGHT, WRONG = [1.0, 0, 0, 0], [1.0] * 4, [0.0] * 4


def test_dynamic_sampling_draws_until_enough_groups_carry_signal():
  parts, ctx = fill([[MIXED, RIGHT, WRONG, MIXED], [RIGHT, WRONG, MIXED, WRONG],
                     [MIXED, MIXED, MIXED, WRONG]])
  (part,) = parts
  assert [g.question for g in part.groups] == [0, 3, 1002, 1004]  # exactly num_new, in order
  assert len(ctx.draws) == 2 and part.reward.reshape(4, 4).tolist() == [MIXED] * 4
  assert part.rollout.group_id.tolist() == np.repeat(range(4), 4).tolist()
  assert part.rollout.traj_id.tolist() == list(range(16))
  assert part.rollout.question_id.tolist() == np.repeat([0, 3, 1002, 1004], 4).tolist()
  np.testing.assert_array_equal(part.rollout.reward, part.reward)
  assert part.texts[8:12] == tuple(f'trace 1002.{i}' for i in range(4))
  assert part.answers[12] == '10040' and bool(part.rollout.valid.all())


def test_dynamic_sampling_needs_no_second_draw_when_all_groups_do():
  parts, ctx = fill([[MIXED] * 4])
  assert not ctx.draws and [g.question for g in parts[0].groups] == [0, 1, 2, 3]


def test_dynamic_sampling_gives_up_after_max_draws():
  with pytest.raises(ValueError, match=r'max_draws: 3 draws of 4 groups gave only 2'):
    fill([[MIXED, RIGHT, WRONG, MIXED]] + [[RIGHT] * 4] * 5, max_draws=3)


def test_overlong_shaping_and_filtering():
  """0 below the buffer, linear inside, -1 at the cap; a cut row leaves the loss, not the group."""
  config = grpo.Config(num_new=1, group_size=4, max_tokens=10, overlong_buffer=4,
                       filter_overlong=True, estimator='dr_grpo')
  rollout = make_rollout([api.Group(0)], [1, 1, 0, 0], capacity=1, group_size=4)
  rollout = dataclasses.replace(
    rollout, traj_tokens=jnp.asarray([6.0, 8.0, 7.0, 10.0]),
    status=jnp.asarray([types.FINISHED, types.FINISHED, types.FINISHED, types.TRUNCATED]))
  np.testing.assert_allclose(grpo.shaped_reward(config, rollout), [1, 0.5, -0.25, -1])
  _, signal = grpo.build(config).credit((), rollout, types.Scores())
  mean = (1 + 0.5 - 0.25 - 1) / 4
  np.testing.assert_allclose(signal.advantage[:3, 2], [1 - mean, 0.5 - mean, -0.25 - mean])
  assert not signal.mask[3].any() and signal.mask[:3].any()
  kept = dataclasses.replace(config, filter_overlong=False)
  assert grpo.build(kept).credit((), rollout, types.Scores())[1].mask[3].any()


def test_remax_baseline_is_the_greedy_reward_of_the_same_question():
  """However the rows were dealt since."""
  config = grpo.Config(num_new=4, group_size=2, estimator='remax', surrogate='reinforce')
  method, ctx = grpo.build(config), FakeContext(reward=lambda group, i: float(group.question == 2))
  rewards = [[1, 0], [0, 0], [1, 0], [1, 1]]
  drawn = make_drawn([api.Group(q) for q in range(4)], rewards)
  baseline, (same,) = method.explore(method.init(jax.random.key(0)), drawn, ctx)
  assert same is drawn and baseline.tolist() == [0, 0, 1, 0]
  assert ctx.draws[0][1]['greedy'] and ctx.draws[0][1]['group_size'] == 1
  order = np.asarray([4, 5, 0, 1, 6, 7, 2, 3])
  dealt = jax.tree.map(lambda x: x[order], drawn.rollout)
  _, signal = method.credit(baseline, dealt, types.Scores())
  assert signal.advantage[:, 2].tolist() == [0, -1, 1, 0, 1, 1, 0, 0]


def test_greedy_draws_are_deterministic_and_graded():
  run = tiny.make_run('remax')
  ctx = context.StepContext(run.setup, tiny.weights(1), step=0, version=0)
  other = context.StepContext(run.setup, tiny.weights(1), step=9, version=0)  # another key
  groups = [api.Group(q) for q in range(3)]
  a, b = (c.draw(groups, capacity=tiny.SLOTS, group_size=1, greedy=True) for c in (ctx, other))
  assert a.texts == b.texts and len(set(a.texts)) > 1


# The table, the config and bad input.


def test_kl_needs_a_reference():
  assert 'reference' in grpo.build(grpo.Config(kl_beta=0.1)).needs
  assert 'reference' not in grpo.build(grpo.Config()).needs  # and then it is never loaded
  run = dataclasses.replace(tiny.make_run('grpo', kl_beta=0.1), reference=None)
  with pytest.raises(UserError, match='reference'):
    run_lib.frozen_roles(run)
  assert run_lib.frozen_roles(tiny.make_run('grpo')) == ({}, {})
  idle = dataclasses.replace(tiny.make_run('grpo'), reference=tiny.weights(5))
  with pytest.raises(UserError, match='kl_beta = 0'):
    run_lib.frozen_roles(idle)


def test_scores_come_only_from_roles_that_are_needed():
  assert grpo.build(grpo.Config()).needs == frozenset()
  assert grpo.build(grpo.Config(iterations=2)).needs == {'old_logp'}
  assert grpo.build(grpo.Config(correction='token_tis')).needs == {'old_logp'}


@pytest.mark.parametrize('field,changes', [
  ('kl_kind', dict(kl_beta=0.1, kl_kind='k1')), ('kl_kind', dict(kl_kind='k4')),
  ('kl_in_reward', dict(kl_beta=0.1, kl_in_reward=True)),
  ('kl_beta', dict(kl_beta=-0.1)), ('entropy_weight', dict(entropy_weight=-1.0)),
  ('group_size', dict(group_size=1)),
  ('group_size', dict(group_size=0, estimator='reinforce')),
  ('num_new', dict(num_new=0)), ('iterations', dict(iterations=0)),
  ('max_draws', dict(max_draws=0)),
  ('eps_low', dict(eps_low=0.0)), ('eps_low', dict(eps_low=1.0)),
  ('eps_high', dict(eps_high=0.0)),
  ('dual_clip', dict(dual_clip=1.0)), ('estimator', dict(estimator='grpoo')),
  ('surrogate', dict(surrogate='clipped')), ('aggregation', dict(aggregation='mean')),
  ('aggregation', dict(surrogate='gspo', aggregation='seq_mean_token_sum')),
  ('correction', dict(correction='tis')), ('norm', dict(norm='batch')),
  ('max_tokens', dict(aggregation='seq_mean_token_sum_norm')),
  ('max_tokens', dict(overlong_buffer=4)), ('max_tokens', dict(overlong_buffer=4, max_tokens=4)),
])
def test_bad_fields_are_refused_by_name(field, changes):
  with pytest.raises(ValueError, match=rf'\b{field}\b'):
    grpo.build(grpo.Config(**changes))


@pytest.mark.parametrize('name,changes', [
  ('ppo', dict(gamma=1.5)), ('ppo', dict(lam=-0.1)), ('ppo', dict(value_clip=0.0)),
  ('ppo', dict(group_size=0)), ('ppo', dict(iterations=0)), ('ppo', dict(num_new=0)),
  ('ppo', dict(aggregation='mean')), ('ppo', dict(eps_low=0.0)), ('ppo', dict(kl_beta=-1.0)),
  ('distill_on', dict(source='nobody')), ('distill_on', dict(signal='loss')),
  ('distill_on', dict(divergence='kl')), ('distill_on', dict(teacher_chunk=0)),
  ('distill_off', dict(signal='advantage')), ('distill_on', dict(temperature=0.0)),
  ('sft', dict(bcq_fraction=1.5)), ('sft', dict(max_wrong=0)), ('sft', dict(wording='long')),
  ('sft', dict(aggregation='mean')), ('sft', dict(label_noise=-0.1)),
])
def test_bad_fields_of_other_rows_are_refused_by_name(name, changes):
  with pytest.raises(ValueError, match=rf'\b{next(iter(changes))}\b'):
    table.build(name, changes)


def test_unknown_names_get_a_suggestion():
  with pytest.raises(ValueError, match=r"method\.name: unknown 'grop', did you mean 'grpo'\?"):
    table.configure('grop', {})
  with pytest.raises(ValueError, match=r"method\.eps_hi: grpo has no such field.*'eps_high'"):
    table.configure('grpo', dict(eps_hi=0.3))
  with pytest.raises(ValueError, match='known:.*zppo'):
    table.configure('qqqqqqqq', {})


def test_every_row_builds_as_published():
  for name, row in table.METHODS.items():
    method = table.build(name, {})
    assert isinstance(method, api.Method) and method.terms, name
    assert method.capacity >= row.defaults.num_new and method.iterations >= 1
    documented = set(re.findall(r"'(\w+)'", api.Method.__doc__))
    assert method.needs <= documented, name


def test_published_settings_of_the_family():
  c = {name: row.defaults for name, row in table.METHODS.items()}
  assert (c['dapo'].eps_low, c['dapo'].eps_high, c['dapo'].aggregation) == (0.2, 0.28, 'token_mean')
  assert (c['dapo'].max_tokens, c['dapo'].overlong_buffer) == (20480, 4096)
  assert c['dapo'].kl_beta == 0 and c['dapo'].dynamic_sampling
  assert (c['gspo'].eps_low, c['gspo'].eps_high) == (3e-4, 4e-4)
  assert c['gspo'].aggregation == 'seq_mean_token_mean'
  assert c['dr_grpo'].aggregation == 'seq_mean_token_sum_norm' and c['cispo'].weight_max == 5.0
  assert c['grpo'].aggregation == 'seq_mean_token_mean' and c['grpo'].eps_high == 0.2


def test_a_bad_temperature_is_refused():
  run = tiny.make_run('grpo', iterations=2, settings=dataclasses.replace(
    tiny.SETTINGS, temperature=0.0))
  with pytest.raises(ValueError, match='temperature'):
    run_steps(run)


def test_a_non_finite_gradient_leaves_the_state_alone():
  """NaN weights of the reference reach the loss; the update is dropped and reported."""
  run = tiny.make_run('grpo', kl_beta=0.1)
  broken = jax.tree.map(lambda x: x * jnp.nan, tiny.weights(5))
  start, (made,) = run_steps(dataclasses.replace(run, reference=broken))
  assert made.metrics['nonfinite_max'] == 1 and made.after.updates == 0
  jax.tree.map(np.testing.assert_array_equal, made.after.params, start.params)


# Miniature 8: a tiny transformer on addition modulo a prime, one letter per number.

LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVW'


class Addition:
  """All pairs a, b modulo a prime."""

  def __init__(self, prime: int):
    self.prime = prime

  def __len__(self):
    return self.prime**2

  def __getitem__(self, row):
    a, b = divmod(row, self.prime)
    question = types.Message('user', LETTERS[a] + LETTERS[b])
    return types.Example(f'{a}+{b}', (question,), LETTERS[(a + b) % self.prime])


class Exact:
  def grade(self, texts, examples):
    right = [float(t == e.answer) for t, e in zip(texts, examples)]
    return np.asarray(right, np.float32), [VerifyResult(r, t, '') for r, t in zip(right, texts)]


def noisy_labels(prime: int, noise: float, num_new: int) -> api.Method:
  """Supervised, with a fresh uniform letter in place of a label now and then."""

  def plan(state, batch, ctx):
    groups = []
    for question in map(int, batch):
      rng = ctx.rng('noise', question)
      wrong = LETTERS[rng.integers(prime)]
      label = wrong if rng.random() < noise else ctx.example(question).answer
      groups.append(api.Group(question, response=ctx.encode(label)))
    return state, groups

  return dataclasses.replace(sft.build(sft.Config(num_new=num_new)), plan=plan)


def addition_run(prime, method, *, learning_rate, seed, grader=None, warm=None) -> run_lib.Run:
  size = tiny.tokenizer().vocab_size
  model = ModelConfig(vocab=size, hidden=48, layers=4, heads=4, kv_heads=4, head_dim=12, inter=128,
                      rope_theta=1e4)
  source = Addition(prime)
  questions = setup_lib.Questions(source, tiny.tokenizer(), 'plain')
  setup = setup_lib.Setup(
    model=model, questions=questions, grader=grader or Exact(), group_size=method.group_size,
    sampling=decode.Settings(max_new_tokens=2, eos_ids=(questions.stop_id,)), prompt_tokens=3,
    reformulated_tokens=3, seed=seed, mesh=tiny.mesh())
  optim = state.Optim(learning_rate=learning_rate, weight_decay=0.0)
  return run_lib.Run(
    setup=setup, method=method, optimizer=state.make_optimizer(optim),
    learning_rate=state.schedule(learning_rate, optim),
    step_settings=step.StepSettings(window=2), settings=run_lib.LoopSettings(1, dump_every=0),
    stream=batches.prompt_stream(source, batch_size=method.capacity, seed=seed), workdir='',
    warm_start=warm, progress=False)


def train(run: run_lib.Run, count: int):
  """(policy weights, mean reward of each step)."""
  rewards = []
  with jax.set_mesh(run.setup.mesh):
    programs = run_lib.compile_programs(run)
    now = run_lib.initial_state(run, programs)
    for at in range(count):
      method_state, item = loop.sample(run, now.params['policy'], now.method, at, now.version,
                                       context.no_timer)
      _, parts = programs.prepare(now.params, method_state, item.rollouts,
                                  tiny.minibatch_key(run, at), programs.roles, item.group_sizes)
      now, _ = programs.update(now, parts, programs.roles)
      rewards.append(item.metrics.get('reward/mean', 0.0))
  return tiny.copy(now.params['policy']), rewards


def learns_addition(prime: int, *, warm_steps: int, noise: float, steps: int, num_new: int,
                    seed: int):
  """(mean reward of the first five steps, of the last ten)."""
  warm, _ = train(addition_run(prime, noisy_labels(prime, noise, 256), learning_rate=2e-3,
                               seed=seed), warm_steps)
  method = table.build('grpo', dict(num_new=num_new, group_size=8, iterations=4))
  _, rewards = train(addition_run(prime, method, learning_rate=3e-4, seed=seed, warm=warm), steps)
  return np.mean(rewards[:5]), np.mean(rewards[-10:])


@pytest.mark.slow
def test_grpo_learns_addition_in_short():
  """Miniature 8 on addition modulo 7: the same rise in a fraction of the time."""
  before, after = learns_addition(7, warm_steps=120, noise=0.7, steps=30, num_new=16, seed=0)
  assert before < 0.5 and after > before + 0.3, (before, after)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(3))
def test_grpo_learns_addition_mod_23(seed):
  """Miniature 8 as written: 150 rollout steps of 32 x 8, 4 updates each, Adam 3e-4."""
  before, after = learns_addition(23, warm_steps=1600, noise=0.85, steps=150, num_new=32, seed=seed)
  assert 0.1 < before < 0.3 and after > 0.5, (before, after)


@pytest.mark.slow
def test_rollouts_drawn_by_few_keys_are_corrected():
  """The scorer sees all keys: the gap is logged, and the loss knows both log-probs."""
  run = tiny.make_run('grpo', correction='token_tis')
  few = Sparse(tls.Config(block=8, top_blocks=2, top_tokens=8), labels=4, pool=3, misses=2)
  run = dataclasses.replace(run, setup=dataclasses.replace(run.setup, sparse=few))
  with jax.set_mesh(run.setup.mesh):
    programs = run_lib.compile_programs(run)
    now = run_lib.initial_state(run, programs)
    taken = tiny.take_step(run, programs, now, 0)
  assert 1e-3 < taken.metrics['mismatch/abs_max'] < 5 and taken.metrics['mismatch/kl_k3'] > 0
  assert np.isfinite(taken.metrics['grad_norm']) and 'old_logp' in run.method.needs
  seen = taken.item.metrics
  assert seen['rollout/pool_hits'] == 1 and seen['rollout/pool_absent'] == 0  # three blocks a row


def test_slots_train_as_the_fixed_batch_does():
  """Continuous batching inside a step: the same rows, credit and update."""
  found = {}
  for slots in (0, 6):
    run = tiny.make_run('grpo')
    run = dataclasses.replace(run, setup=dataclasses.replace(run.setup, slots=slots))
    with jax.set_mesh(run.setup.mesh):
      programs = run_lib.compile_programs(run)
      found[slots] = tiny.take_step(run, programs, run_lib.initial_state(run, programs), 0)
  for a, b in zip(found[0].item.rollouts, found[6].item.rollouts):
    for name in ('tokens', 'loss_mask', 'reward', 'status', 'segment_ids'):
      np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    np.testing.assert_allclose(a.behavior_logp, b.behavior_logp, atol=1e-5)
  assert 0 < found[6].item.metrics['rollout/occupancy'] <= 1
  for a, b in zip(*(jax.tree.leaves(f.after.params) for f in found.values())):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
