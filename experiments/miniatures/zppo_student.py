"""M1, the log-linear student: the task, the policy, and one jitted training run.

A question is a skill plus noise, a response is one answer, and each skill has a misconception: a
wrong answer with a large logit. A prompt is a bias on the answers: BCQ raises both candidates
alike, NCQ lowers the listed wrong answers. Config, advantages, hard set, cap, mini-batch deal,
surrogate and buffer are the library's own. Source: arXiv:2606.18216; the task is ours.
Dims: K skills, A answers, Q training questions, H held-out ones, P group slots of a step, C slots
of the second phase, G rollouts per group, S seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import types as python_types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zppo_jax.core import rng, trees, types
from zppo_jax.methods import second_phase, zppo
from zppo_jax.ops import aggregate, surrogates
from zppo_jax.replay import prompts
from zppo_jax.train import prepare

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Task:
  """The protocol of M1; logits in nats."""

  skills: int = 64
  answers: int = 64
  questions: int = 1280
  held_out: int = 512
  feature_noise: float = 0.3  # length of the noise vector
  weight_std: float = 0.1
  misconception: tuple[float, float] = (2.0, 10.0)
  bcq_logit: float = 6.0
  ncq_logit: float = -1.5
  teacher_right: tuple[float, float] = (0.02, 0.9)  # out of and within the teacher's reach
  learning_rate: float = 30.0


TASK = Task()
ZPPO = zppo.Config(num_new=64, buffer_capacity=512, norm_scope='minibatch')
GRPO = dataclasses.replace(ZPPO, use_bcq=False, use_ncq=False)
REACH, REACHES = 0.8, (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the skills that the teacher knows
ARMS: Mapping[str, tuple[zppo.Config, float]] = {
  'grpo': (dataclasses.replace(GRPO, use_buffer=False), REACH),
  'grpo_buffer': (GRPO, REACH),
  'grpo_buffer_matched': (dataclasses.replace(GRPO, group_size=10), REACH),  # >= ZPPO's rollouts
  'zppo': (ZPPO, REACH),
  'grpo_both': (dataclasses.replace(ZPPO, use_buffer=False), REACH),
  'bcq': (dataclasses.replace(ZPPO, use_ncq=False), REACH),
  'ncq': (dataclasses.replace(ZPPO, use_bcq=False), REACH),
  'with_zero': (dataclasses.replace(ZPPO, norm='with_zero'), REACH),
  'none': (dataclasses.replace(ZPPO, norm='none'), REACH),
  **{f'reach_{r:g}': (ZPPO, r) for r in REACHES},
}


@types.record
class World:
  """One seed's task; the last H questions are held out."""

  phi: Array  # f32[Q + H, K], features
  right: Array  # i32[Q + H], right answer
  teacher: Array  # f32[Q + H], probability that one teacher sample is right
  order: Array  # i32[Q], data order, the same in every epoch


@types.record
class Groups:
  """Sampled groups; a group is keyed by its slot, never by its question."""

  question: Array  # i32[P], -1 in an empty slot
  ok: Array  # bool[P]
  bias: Array  # f32[P, A], the prompt
  answer: Array  # i32[P, G]
  logp: Array  # f32[P, G], of the policy and prompt that sampled it
  reward: Array  # f32[P, G]


@types.record
class Trained:
  """What a run leaves behind; a leading S on every field in a Result."""

  curve: Array  # f32[steps + 1], held-out probability of the right answer before and after steps
  rollouts: Array  # i32[], by the student
  teacher_samples: Array  # i32[]
  weights: Array  # f32[K, A]
  buffer: prompts.PromptBuffer

  @property
  def auc(self) -> Array:
    """Mean of the curve over the states after each step, [S]."""
    return self.curve[..., 1:].mean(-1)

  def graduation(self, of: str = 'admitted') -> Array:
    """Share of the 0 %-entries that graduated, [S]; NaN without a buffer.

    'admitted' (table, bar): among all admitted, so that no arm gains by what its buffer still
    holds. 'left' (the paper's): among those that graduated or were evicted.
    """
    b = self.buffer
    total = b.admitted if of == 'admitted' else b.graduated + b.evicted
    return np.where(total[..., 0] > 0, b.graduated[..., 0] / np.maximum(total[..., 0], 1), np.nan)


def make_world(seed: int, task: Task, reach: float) -> tuple[World, np.ndarray]:
  """(World, initial weights f32[K, A]), made on the host.

  phi = onehot(skill) + .3 N(0, 1) / sqrt(K); W ~ N(0, .1^2) plus m ~ U[2, 10] on one wrong answer
  of each skill. Skills are balanced over questions; those within reach are nested in `reach`.
  """
  k, a = task.skills, task.answers
  at = functools.partial(rng.host_rng, seed, 'world')
  right = at('right').integers(a, size=k)
  wrong = (right + at('wrong').integers(1, a, size=k)) % a
  weights = task.weight_std * at('weights').normal(size=(k, a))
  weights[np.arange(k), wrong] += at('misconception').uniform(*task.misconception, size=k)
  taught = at('reach').permutation(k) < round(reach * k)
  skill = np.concatenate([np.arange(task.questions), np.arange(task.held_out)]) % k
  noise = task.feature_noise * at('features').normal(size=(skill.size, k)) / k**0.5
  world = World((np.eye(k)[skill] + noise).astype(np.float32), right[skill].astype(np.int32),
                np.where(taught, *task.teacher_right[::-1])[skill].astype(np.float32),
                at('order').permutation(task.questions).astype(np.int32))
  return world, weights.astype(np.float32)


def pick(mass: Array, u: Array) -> Array:
  """First index whose running sum of mass f32[..., A] exceeds u * total, i32; u f32 in [0, 1)."""
  upto = jnp.cumsum(mass, axis=-1)
  index = jnp.sum(upto <= u[..., None] * upto[..., -1:], axis=-1)
  return jnp.minimum(index, mass.shape[-1] - 1)


def group_logp(weights: Array, phi: Array, bias: Array, answer: Array) -> Array:
  """log softmax(W^T phi + b)[answer], f32[P, G]; phi f32[P, K], bias f32[P, A]."""
  return jnp.take_along_axis(jax.nn.log_softmax(phi @ weights + bias), answer, axis=1)


def held_out(task: Task, world: World, weights: Array) -> Array:
  """Mean probability of the right answer on the held-out plain questions, f32[]."""
  phi, right = world.phi[task.questions:], world.right[task.questions:, None]
  return jnp.exp(group_logp(weights, phi, jnp.zeros(()), right)).mean()


def respond(weights, world: World, ids, ok, bias, u) -> Groups:
  """Samples and grades G answers per prompt, u f32[P, G]; empty slots are sampled, never read."""
  phi = world.phi[ids]
  answer = pick(jax.nn.softmax(phi @ weights + bias)[:, None], u)
  reward = (answer == world.right[ids][:, None]).astype(jnp.float32)
  return Groups(ids, ok, bias, answer, group_logp(weights, phi, bias, answer), reward)


def choose_plain(c: zppo.Config, world: World, buffer, at, key) -> tuple[Array, Array]:
  """(ids, ok) [P]: the next questions in data order, then uniform draws from the buffer."""
  ids = world.order[(at * c.num_new + jnp.arange(c.num_new)) % world.order.shape[0]]
  again, live = prompts.sample(buffer, key, c.num_replay, ids)
  return jnp.concatenate([ids, again]), jnp.concatenate([jnp.ones(ids.shape, bool), live])


def prompt_bias(task: Task, world: World, plain: Groups, u: Array) -> Array:
  """BCQ: +6 on the right answer and on that of one uniform wrong rollout; NCQ: -1.5 on each
  distinct wrong answer. f32[P, 2, A], u f32[P]."""
  given = jax.nn.one_hot(plain.answer, task.answers)
  shown = jnp.take_along_axis(given, pick(1 - plain.reward, u)[:, None, None], axis=1)[:, 0]
  both = shown + jax.nn.one_hot(world.right[plain.question], task.answers)
  listed = jnp.max(given * (1 - plain.reward)[..., None], axis=1)
  return jnp.stack([task.bcq_logit * both, task.ncq_logit * listed], axis=1)


def reformulate(c: zppo.Config, task: Task, world: World, weights, plain: Groups, u: Array):
  """Steps 2 to 5 of the algorithm: (groups of C slots, teacher samples i32[]); u f32[P, ...]."""
  u_extra, u_teacher, u_shown = jnp.split(u, (2 * c.group_size, u.shape[1] - 1), axis=1)
  taught = jnp.any(u_teacher < world.teacher[plain.question][:, None], axis=1)
  accuracy = plain.reward.mean(axis=1)
  asked = jnp.sum(plain.ok & (accuracy < c.tau))
  if c.use_ncq:  # the pre-cap does not look at the teacher: only the candidates are asked
    asked = jnp.minimum(asked, c.num_aug)
  index, hard = second_phase.select_hard(accuracy, plain.ok & (taught | c.use_ncq), tau=c.tau)
  index, hard = index[:c.num_aug], hard[:c.num_aug]
  has = jnp.stack([hard & taught[index] & c.use_bcq, hard & c.use_ncq], axis=1)
  keep = second_phase.cap_instances(has, cap=c.num_aug).reshape(-1)  # (question, BCQ, NCQ) order
  slot = jnp.argsort(~keep, stable=True)[:c.num_aug]
  row, kind, ok = index[slot // 2], slot % 2, keep[slot]
  bias = prompt_bias(task, world, plain, u_shown[:, 0])[row, kind]
  u = u_extra.reshape(-1, 2, c.group_size)[row, kind]
  groups = respond(weights, world, jnp.where(ok, plain.question[row], -1), ok, bias, u)
  return groups, asked * c.teacher_group_size * c.use_bcq


def update(c: zppo.Config, task: Task, world: World, weights, g: Groups, key: Array) -> Array:
  """I plain SGD steps on the clipped surrogate; the mean is over the mini-batch's rollouts."""
  slots, size = g.answer.shape
  order = prepare.deal(g.ok, key, c.iterations).reshape(c.iterations, -1)
  batch = jnp.zeros(slots, jnp.int32).at[order].set(jnp.arange(c.iterations)[:, None], mode='drop')
  valid, minibatch = jnp.repeat(g.ok, size), jnp.repeat(batch, size)
  rollout = python_types.SimpleNamespace(  # the fields that batch_advantage reads
    reward=g.reward.reshape(-1), group_id=jnp.repeat(jnp.arange(slots), size), valid=valid)
  advantage = zppo.batch_advantage(c, rollout, types.Scores(minibatch=minibatch))

  def loss(weights, i):
    mask = (valid & (minibatch == i))[:, None]
    only = lambda x: jnp.where(mask, x.reshape(-1, 1), 0)
    logp = only(group_logp(weights, world.phi[g.question], g.bias, g.answer))
    terms = surrogates.clipped(logp, only(g.logp), only(advantage), eps_low=c.eps_low,
                               eps_high=c.eps_high, dual_clip=c.dual_clip)
    num, den = aggregate.aggregate(terms, mask, 'token_mean')
    return num / jnp.maximum(den, 1)

  sgd = lambda w, i: (w - task.learning_rate * jax.grad(loss)(w, i), None)
  return lax.scan(sgd, weights, jnp.arange(c.iterations))[0]


def train(key: Array, world: World, weights: Array, *, config: zppo.Config, task: Task,
          steps: int) -> Trained:
  """One whole run. Noise is keyed by (step, question), never by what else is in the batch."""
  c = config

  def step(carry, scanned):
    weights, buffer, count = carry
    at, key = scanned
    ids, ok = choose_plain(c, world, buffer, at, rng.fold(key, 'replay'))
    noise_key = rng.fold(key, 'noise')
    u = jax.vmap(lambda q: jax.random.uniform(
      jax.random.fold_in(noise_key, q), (3 * c.group_size + c.teacher_group_size + 1,)))(ids)
    plain = groups = respond(weights, world, ids, ok, jnp.zeros((ids.shape[0], task.answers)),
                             u[:, :c.group_size])
    asked = jnp.zeros((), jnp.int32)
    if c.reformulates:
      extra, asked = reformulate(c, task, world, weights, plain, u[:, c.group_size:])
      groups = trees.concat([plain, extra])
    if c.use_buffer:
      buffer = prompts.update(buffer, ids, plain.reward.mean(axis=1), ok, tau=c.tau)
    weights = update(c, task, world, weights, groups, rng.fold(key, 'minibatches'))
    count += jnp.stack([groups.ok.sum() * c.group_size, asked])
    return (weights, buffer, count), held_out(task, world, weights)

  keys = jax.vmap(lambda at: rng.fold(key, 'step', at))(jnp.arange(steps))
  start = (weights, prompts.init(c.buffer_capacity, c.group_size), jnp.zeros(2, jnp.int32))
  (last, buffer, count), after = lax.scan(step, start, (jnp.arange(steps), keys))
  curve = jnp.concatenate([held_out(task, world, weights)[None], after])
  return Trained(curve, count[0], count[1], last, buffer)


@functools.partial(jax.jit, static_argnames=('config', 'task', 'steps'))
def train_seeds(keys: Array, worlds: World, weights: Array, *, config, task, steps) -> Trained:
  """`train` over S seeds: every argument and result with a leading S."""
  one = functools.partial(train, config=config, task=task, steps=steps)
  return jax.vmap(one)(keys, worlds, weights)
