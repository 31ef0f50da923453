"""Multi-key needle recall: the task, a two-layer model that learns it, and its sparse decoding.

Keys with values of a few characters lie scattered in a context of filler. A question names a key,
and again as the opening of the answer, as RULER's templates do; question, opening and answer are
all decoded token by token, so that every look-up happens under the budget.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kernels import tls_attention as tls
from zppo_jax.core import rng
from zppo_jax.models import config as config_lib
from zppo_jax.models import decoder
from zppo_jax.models import params as params_lib
from zppo_jax.sampling import decode

Array = jax.Array
STOP, ASK = 0, 1  # STOP is never trained: an answer ends at its length


@dataclasses.dataclass(frozen=True)
class Needles:
  """Sizes of the task and of its training: short contexts, densely asked, come first.

  A stage goes on until `enough` answers of its last quarter of a part are right, at most `most`
  parts; how soon a model finds the look-up depends on the seed, by a factor of ten.
  """

  context: int = 512
  needles: int = 46
  characters: int = 2  # of a value
  keys: int = 64
  values: int = 96
  fillers: int = 32
  rate: float = 4e-3
  # (context, needles = questions, rows) in turn
  stages: tuple[tuple[int, int, int], ...] = (
    (32, 4, 32), (64, 8, 16), (128, 16, 8), (512, 46, 3))
  part: int = 100  # steps
  most: int = 60
  enough: float = 0.97
  block: int = 16

  @property
  def vocab(self) -> int:
    return 2 + self.keys + self.values + self.fillers

  @property
  def longest(self) -> int:
    """Tokens of a question with its answer."""
    return 3 + self.characters


def model(task: Needles) -> config_lib.ModelConfig:
  """A layer that sees the last four tokens under one that sees all, as Gemma alternates them; four
  query and two key heads, half of whose channels are rotated. The budget is the second layer's."""
  return config_lib.ModelConfig(
    vocab=task.vocab, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, inter=128,
    mixers=('sliding', 'full'), window=4, qk_norm=False, rope_theta=1e4, rope_dim=16, unroll=2)


def context(key: Array, task: Needles, size: int, count: int) -> tuple[Array, Array, Array]:
  """(tokens i32[size], keys i32[count], values i32[count, characters]): none of these twice."""
  k_fill, k_key, k_value, k_place = jax.random.split(key, 4)
  wide = 1 + task.characters
  tokens = task.vocab - 1 - jax.random.randint(k_fill, (size,), 0, task.fillers)
  keys = 2 + jax.random.permutation(k_key, task.keys)[:count]
  values = 2 + task.keys + jax.random.permutation(k_value, task.values)[:count * task.characters]
  values = values.reshape(count, task.characters)
  slots = size - count * (wide - 1)  # a needle takes one, as a filler token does
  slot = jnp.sort(jax.random.permutation(k_place, slots)[:count])
  start = slot + (wide - 1) * jnp.arange(count)
  needles = jnp.concatenate([keys[:, None], values], axis=1)
  return tokens.at[start[:, None] + jnp.arange(wide)].set(needles), keys, values


def rows(key: Array, task: Needles, size: int, needles: int, questions: int, count: int
         ) -> tuple[Array, Array]:
  """(contexts i32[count, size], questions with answers i32[count, questions, longest])."""
  def one(key):
    tokens, keys, values = context(rng.fold(key, 'context'), task, size, needles)
    asked = jax.random.permutation(rng.fold(key, 'asked'), needles)[:questions]
    named = keys[asked][:, None]
    return tokens, jnp.concatenate([0 * named + ASK, named, named, values[asked]], axis=1)

  return jax.vmap(one)(jax.random.split(key, count))


def loss(params, batch: tuple[Array, Array], task: Needles) -> tuple[Array, Array]:
  """(cross-entropy in nats, accuracy) of the characters of all answers.

  The first character is also asked for where the key is named first: there the key occurs only once
  before, and the look-up is learned sooner.
  """
  contexts, asked = batch
  tokens = jnp.concatenate([contexts, asked.reshape(len(asked), -1)], axis=1)
  hidden = decoder.forward(model(task), params, tokens, want='hidden').hidden
  at = (contexts.shape[1] + task.longest * jnp.arange(asked.shape[1])[:, None]
        + jnp.arange(1, 2 + task.characters))
  logits = decoder.unembed(model(task), params, hidden[:, at])
  labels = jnp.concatenate([asked[..., 3:4], asked[..., 3:]], axis=-1)
  lost = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return jnp.mean(lost), jnp.mean(jnp.argmax(logits, -1) == labels)


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.), optax.scale_by_adam(b2=0.98),
                        optax.add_decayed_weights(0.01))


@functools.partial(jax.jit, static_argnames=('task', 'stage'), donate_argnums=(0, 1))
def _part(params, held, key: Array, rates: Array, task: Needles, stage: tuple[int, int, int]):
  """(params, optimiser state, accuracy [steps]) after a step at each of the rates."""
  size, needles, count = stage

  def step(carry, given):
    params, held = carry
    key, rate = given
    batch = rows(key, task, size, needles, needles, count)
    (_, right), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, task)
    updates, held = OPTIMIZER.update(grads, held, params)
    params = optax.apply_updates(params, jax.tree.map(lambda x: -rate * x, updates))
    return (params, held), right

  (params, held), right = jax.lax.scan(
    step, (params, held), (jax.random.split(key, len(rates)), rates))
  return params, held, right


def train(task: Needles, seed: int) -> tuple[params_lib.Params, np.ndarray]:
  """(parameters, accuracy of the characters of every training batch): attention to all keys."""
  key = jax.random.key(seed)
  params = params_lib.init(model(task), rng.fold(key, 'init'))
  held, curve = OPTIMIZER.init(params), []
  flat = np.full(task.part, task.rate, np.float32)
  fall = np.linspace(1, 0.05, task.part, dtype=np.float32)

  def run(params, held, rates, stage):
    params, held, right = _part(params, held, rng.fold(key, 'part', len(curve)), rates, task, stage)
    curve.append(np.asarray(right))
    return params, held

  for stage in task.stages:
    for _ in range(task.most):
      rise = np.minimum(1, (1 + np.arange(task.part)) / 50) if not curve else 1
      params, held = run(params, held, flat * np.float32(rise), stage)
      if curve[-1][-(-task.part // 4):].mean() >= task.enough:
        break
  params, _ = run(params, held, flat * fall, task.stages[-1])
  return params, np.concatenate(curve)


def questions(task: Needles, seed: int, count: int) -> tuple[decode.Prompts, np.ndarray]:
  """(contexts as prompts with the question as forced tokens, answers [count, characters])."""
  contexts, asked = jax.device_get(rows(
    rng.fold(jax.random.key(seed), 'held out'), task, task.context, task.needles, 1, count))
  number = np.arange(count, dtype=np.int32)
  prompts = decode.Prompts(
    tokens=contexts, length=np.full(count, task.context, np.int32), forced=asked[:, 0, :3],
    forced_length=np.full(count, 3, np.int32), request=number.astype(np.uint32), group_id=number,
    kind=0 * number, question_id=number, valid=np.ones(count, bool))
  return prompts, asked[:, 0, 3:]


def answer(task: Needles, params, prompts: decode.Prompts, sparse: config_lib.Sparse | None
           ) -> np.ndarray:
  """Greedy answers [count, characters] of the library's sampler; None reads all keys."""
  config = dataclasses.replace(model(task), sparse=sparse)
  settings = decode.Settings(max_new_tokens=task.longest, eos_ids=(STOP,), temperature=0.)
  found = decode.generate(config, params, prompts, key=jax.random.key(0), settings=settings)
  first = task.context + 3
  return np.asarray(found.tokens)[:, first:first + task.characters]


def budget(task: Needles, blocks: int, tokens: int, stale: bool = False) -> config_lib.Sparse:
  """Labels of a quarter of the channels, as in the stream."""
  return config_lib.Sparse(tls.Config(block=task.block, top_blocks=blocks, top_tokens=tokens,
                                      stale=stale), labels=model(task).head_dim // 4)


def arms(task: Needles, tokens: int, blocks: int) -> dict[str, config_lib.Sparse | None]:
  """Every way to spend `tokens` tokens; the two-level arms look into `blocks` blocks."""
  every = -(-(task.context + task.longest) // task.block)
  return {'dense': None, 'Quest': budget(task, tokens // task.block, tokens),
          'Double Sparsity': budget(task, every, tokens),
          'two levels, sync': budget(task, blocks, tokens),
          'two levels, stale': budget(task, blocks, tokens, True)}
