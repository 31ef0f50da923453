"""The train step and the layout of mini-batches, apart from any method."""

import dataclasses
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zppo_jax import models
from zppo_jax.core import trees, types
from zppo_jax.methods import common
from zppo_jax.models import params as params_lib
from zppo_jax.train import prepare, state, step

CONFIG = models.ModelConfig(vocab=16, num_valid=13, hidden=16, layers=1, heads=2, kv_heads=1,
                            head_dim=8, inter=16, rope_theta=1e4)
SETTINGS = step.StepSettings(window=4, chunk=8)
ROWS, TOKENS = 8, 7


def make_rollout(rows=ROWS, seed=0, group_size=2):
  """Prompts of two tokens, responses of one to four."""
  generator = np.random.default_rng(seed)
  length = generator.integers(1, 5, rows)
  column = np.arange(TOKENS)[None]
  mask = (column >= 2) & (column < 2 + length[:, None])
  inside = column < 2 + length[:, None]
  ids = np.arange(rows, dtype=np.int32)
  zeros = np.zeros((rows, TOKENS), np.int32)
  return jax.tree.map(jnp.asarray, types.Rollout(
    tokens=np.where(inside, generator.integers(1, 13, (rows, TOKENS)), 0).astype(np.int32),
    segment_ids=inside.astype(np.int32), positions=np.where(inside, column, 0).astype(np.int32),
    loss_mask=mask, behavior_logp=np.where(mask, -2.5, 0).astype(np.float32), version=zeros,
    turn_id=mask.astype(np.int32), group_id=ids // group_size, traj_id=ids,
    traj_tokens=mask.sum(1).astype(np.float32), role_id=np.zeros(rows, np.int32),
    kind=np.zeros(rows, np.int32), question_id=ids // group_size,
    reward=np.zeros(rows, np.float32), status=np.zeros(rows, np.int32),
    valid=np.ones(rows, bool)))


def make_part(advantage=None, **kwargs):
  rollout = make_rollout(**kwargs)
  rows = rollout.valid.shape[0]
  value = jnp.linspace(-1, 1, rows) if advantage is None else jnp.full(rows, advantage)
  return step.Part(rollout, common.signal(rollout, types.Scores(), value, active=value != 0))


def make_method(iterations=1, terms=None):
  loss = common.policy(common.PolicyLoss())
  return python_types.SimpleNamespace(terms=terms or (loss,), iterations=iterations,
                                      needs=frozenset(), init=lambda key: ())


def run(parts, *, iterations=1, terms=None, settings=SETTINGS, optim=None):
  """(state before, state after, metrics)."""
  method = make_method(iterations, terms)
  optimizer = state.make_optimizer(optim or state.Optim(learning_rate=1e-2, eps=1e-2))
  before = state.create(CONFIG, method, optimizer, seed=0)
  update = jax.jit(step.make_train_step(CONFIG, method, optimizer, settings))
  after, metrics = update(before, tuple(parts), {})
  return before, after, {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize('slots,count,num_valid', [(6, 3, 6), (7, 3, 7), (7, 3, 2), (5, 4, 3),
                                                   (1, 4, 1), (4, 1, 0)])
def test_valid_groups_are_dealt_evenly(slots, count, num_valid):
  valid = np.zeros(slots, bool)
  valid[np.random.default_rng(0).permutation(slots)[:num_valid]] = True
  for seed in range(5):
    order = np.asarray(prepare.deal(jnp.asarray(valid), jax.random.key(seed), count))
    assert sorted(order.tolist()) == list(range(-(-slots // count) * count))
    per_batch = [sum(valid[i] for i in part if i < slots) for part in order.reshape(count, -1)]
    assert max(per_batch) - min(per_batch) <= 1 and sum(per_batch) == num_valid


def test_the_deal_is_random():
  orders = {tuple(prepare.deal(jnp.ones(6, bool), jax.random.key(s), 2).tolist()) for s in range(9)}
  assert len(orders) > 5


def test_a_group_is_never_split():
  rollout = make_rollout(10)
  found = prepare.arrange(rollout, 2, jax.random.key(1), 3)
  assert found.valid.shape == (12,)  # five groups and an empty slot
  groups = np.asarray(found.group_id).reshape(3, -1, 2)
  assert (groups[..., 0] == groups[..., 1]).all()
  valid = np.asarray(found.valid)
  assert sorted(np.asarray(found.traj_id)[valid].tolist()) == list(range(10))
  assert not np.asarray(found.loss_mask)[~valid].any()
  for row in np.flatnonzero(valid):  # rows travel whole
    source = int(found.traj_id[row])
    np.testing.assert_array_equal(found.tokens[row], rollout.tokens[source])
    np.testing.assert_array_equal(found.behavior_logp[row], rollout.behavior_logp[source])


def test_cut_inverts_join():
  parts = [make_part(), make_part(rows=4, seed=1)]
  wide = jax.tree.map(lambda x: trees.pad_axis(x, 10, 1) if x.ndim == 2 else x, parts[1])
  joined = prepare.join([parts[0].signal, wide.signal], 10)
  assert joined.mask.shape == (12, 10)
  cut = prepare.cut(joined, [parts[0].rollout, wide.rollout])
  for found, wanted in zip(cut, (parts[0].signal, wide.signal)):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_minibatch_without_signal_is_skipped():
  """Neither weight decay nor moments move; the mini-batches with signal still step."""
  part = make_part()
  half = jnp.arange(ROWS) < ROWS // 2
  signal = dataclasses.replace(part.signal, active=part.signal.active & half)
  before, after, metrics = run([step.Part(part.rollout, signal)], iterations=2)
  assert (int(after.updates), int(after.skipped)) == (1, 1)
  assert metrics['update/skipped_frac'] == 0.5 and int(after.version) == 1
  before, after, metrics = run([step.Part(part.rollout, dataclasses.replace(
    signal, active=jnp.zeros(ROWS, bool)))])
  jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
  jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)


def test_a_non_finite_gradient_is_dropped_and_flagged():
  part = make_part()
  bad = dataclasses.replace(part.signal, advantage=part.signal.advantage * jnp.inf)
  before, after, metrics = run([step.Part(part.rollout, bad)])
  assert metrics['nonfinite_max'] == 1 and int(after.updates) == 0 and int(after.skipped) == 0
  jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_the_denominator_is_that_of_the_whole_minibatch():
  """One part of eight rows equals the same rows as two parts of uneven length."""
  part = make_part()
  lengths = part.rollout.traj_tokens
  assert float(lengths[:3].sum()) != float(lengths[3:].sum())
  rows = lambda a, b: jax.tree.map(lambda x: x[a:b], part)
  _, whole, one = run([part])
  _, split, two = run([rows(0, 3), rows(3, 8)])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, split.params)
  for key in one:
    assert two[key] == pytest.approx(one[key], abs=1e-5), key
  # A mean of means over the parts would be another loss.
  _, naive, _ = run([rows(0, 3)])
  assert not np.allclose(naive.params['policy'].embed, whole.params['policy'].embed, atol=1e-6)


def test_a_minibatch_step_is_optax_on_the_written_loss():
  """The gradient of the whole machinery against the loss written out by hand."""
  part = make_part()
  optim = state.Optim(learning_rate=1e-2, eps=1e-2)
  before, after, metrics = run([part], optim=optim)

  def loss(policy):
    out = models.forward(CONFIG, policy, part.rollout.tokens,
                         segment_ids=part.rollout.segment_ids)
    logp = jax.nn.log_softmax(out.logits[..., :13])[:, :-1]
    taken = jnp.take_along_axis(logp, part.rollout.tokens[:, 1:, None], axis=2)[..., 0]
    mask, advantage = part.signal.mask[:, 1:], part.signal.advantage[:, 1:]
    ratio = jnp.exp(taken - jax.lax.stop_gradient(taken))
    return -jnp.sum(jnp.where(mask, ratio * advantage, 0)) / jnp.sum(mask)

  grads = jax.grad(loss)(before.params['policy'])
  assert metrics['grad_norm'] == pytest.approx(float(optax.global_norm(grads)), rel=1e-5)
  plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, eps=1e-2, weight_decay=0.1))
  updates, _ = plain.update(grads, plain.init(before.params['policy']), before.params['policy'])
  wanted = optax.apply_updates(before.params['policy'], updates)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.params['policy'],
               wanted)


def test_padded_vocabulary_rows_get_no_gradient():
  """Ids that can never be sampled take no mass in any term, full-vocabulary ones included."""
  method_terms = (common.cross_entropy(), common.entropy_bonus(0.1, 'token_mean'),
                  common.teacher_divergence('gjsd', beta=0.5, temperature=1.0, chunk=4))
  part, teacher = make_part(), params_lib.init(CONFIG, jax.random.key(9))
  gradient = step.make_gradient(CONFIG, method_terms, SETTINGS, {'teacher': CONFIG})
  params = {'policy': params_lib.init(CONFIG, jax.random.key(0))}
  grads, metrics = jax.jit(gradient)(params, (part,), {'teacher': teacher}, jnp.bool_(True))
  embed = np.asarray(grads['policy'].embed)
  assert not embed[13:].any() and np.abs(embed[:13]).sum() > 0
  other = dataclasses.replace(teacher, embed=teacher.embed.at[13:].add(100.0))
  _, same = jax.jit(gradient)(params, (part,), {'teacher': other}, jnp.bool_(True))
  np.testing.assert_array_equal(same['loss/distill'][0], metrics['loss/distill'][0])
  assert float(metrics['loss/distill'][0]) > 0


def test_metrics_merge_by_sum_and_maximum():
  a = {'x': (jnp.float32(1), jnp.float32(2)), 'y_max': (jnp.float32(5), jnp.float32(1))}
  b = {'x': (jnp.float32(3), jnp.float32(2)), 'y_max': (jnp.float32(4), jnp.float32(1)),
       'z': (jnp.float32(0), jnp.float32(0))}
  found = step.finish_metrics(step.merge_metrics(a, b))
  assert {k: float(v) for k, v in found.items()} == {'x': 1.0, 'y_max': 5.0, 'z': 0.0}


def test_mismatch_is_measured_before_the_first_update_only():
  part = make_part()
  off = dataclasses.replace(part.rollout, behavior_logp=jnp.where(
    part.rollout.loss_mask, -1.0, 0.0))
  _, _, metrics = run([step.Part(off, part.signal)])
  assert metrics['mismatch/abs_max'] > 0.5 and 0 < metrics['mismatch/mean_abs']
  _, _, given = run([step.Part(dataclasses.replace(off, role_id=jnp.full(ROWS, types.TEACHER)),
                               part.signal)])
  assert given['mismatch/abs_max'] == 0  # given rows had no sampler


def test_roles_learn_at_their_own_rate():
  optim = state.Optim(learning_rate=1e-2, critic_learning_rate=0.0, weight_decay=0.0)
  optimizer = state.make_optimizer(optim)
  params = {'policy': jnp.ones(3), 'critic': jnp.ones(3)}
  grads = {'policy': jnp.ones(3), 'critic': jnp.full(3, 1e3)}
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(updates['policy'], -1e-2, rtol=1e-4)  # its clip never saw the critic
  assert not np.asarray(updates['critic']).any()
  with pytest.raises(ValueError, match=r"\['teacher'\] are frozen and cannot enter"):
    optimizer.init(params | {'teacher': jnp.ones(3)})
