"""Two recall tasks for linear attention, and how a small model learns them.

Streams of writes, deletes and queries (arXiv 2604.19021 motivates separate rates by exactly this);
multi-query associative recall with overwrites. The tasks are ours.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from kernels import delta_rule as lib
from zppo_jax.core import rng
from zppo_jax.models import decoder
from zppo_jax.models import params as params_lib
from zppo_jax.models.config import ModelConfig

Array = jax.Array
STREAM_ARMS = ('kda', 'fg2_gdn', 'scalar_decoupled', 'fg2_gdn_plus')
RECALL_ARMS = ('gdn', 'kda', 'fg2_gdn', 'fg2_gdn_plus')


@dataclasses.dataclass(frozen=True)
class Stream:
  """Steps over orthonormal keys: write (key, value), delete (key, distractor), query key."""

  size: int = 8
  keys: int = 6
  length: int = 40
  batch: int = 32
  steps: int = 800
  rate: float = 1e-2


@dataclasses.dataclass(frozen=True)
class Recall:
  """Pairs, then overwrites of some of them, then queries, in one sequence of tokens."""

  pairs: int = 12
  overwrites: int = 3
  alphabet: int = 16  # keys, and as many values
  length: int = 64
  batch: int = 32
  steps: int = 3000
  rate: float = 3e-3


def stream_batch(key: Array, task: Stream) -> tuple[Array, Array, Array]:
  """(inputs [B, T, 2D + 3], targets [B, T, D], whether the step is a query [B, T])."""
  def one(key):
    k_basis, k_op, k_slot, k_value = jax.random.split(key, 4)
    basis = jnp.linalg.qr(jax.random.normal(k_basis, (task.size, task.size)))[0][:task.keys]
    op = jax.random.randint(k_op, (task.length,), 0, 3)  # write, delete, query
    slot = jax.random.randint(k_slot, (task.length,), 0, task.keys)
    value = jax.random.normal(k_value, (task.length, task.size)) * (op < 2)[:, None]

    def step(held, now):
      op, slot, value = now
      target = held[slot]
      new = jnp.where(op == 0, value, jnp.where(op == 1, 0., target))
      return held.at[slot].set(new), target

    _, target = jax.lax.scan(step, jnp.zeros((task.keys, task.size)), (op, slot, value))
    return jnp.concatenate([basis[slot], value, jax.nn.one_hot(op, 3)], -1), target, op == 2

  return jax.vmap(one)(jax.random.split(key, task.batch))


def stream_params(key: Array, task: Stream) -> dict[str, Array]:
  """One layer, one head; every arm draws the same weights and uses those that it has."""
  wide = 2 * task.size + 3
  sizes = dict(query=task.size, key=task.size, value=task.size, decay=task.size, rate=task.size,
               value_rate=task.size, out=task.size)
  found = {n: jax.random.normal(rng.fold(key, n), (wide, s)) * wide**-0.5
           for n, s in sizes.items() if n != 'out'}
  found['out'] = jax.random.normal(rng.fold(key, 'out'), (task.size, task.size)) * task.size**-0.5
  return found | dict(decay_bias=jnp.full(task.size, -4.), rate_bias=jnp.zeros(task.size),
                      value_rate_bias=jnp.zeros(task.size))


def stream_loss(params, batch, arm: str) -> Array:
  """Mean squared error of the queries."""
  x, target, asked = batch

  def unit(v):
    return v * jax.lax.rsqrt(jnp.sum(v * v, -1, keepdims=True) + 1e-6)

  def rate(name):
    found = jax.nn.sigmoid(x @ params[name] + params[f'{name}_bias'])
    return found if arm.startswith('fg2') else jnp.broadcast_to(found[..., :1], found.shape)

  q, key, value = unit(x @ params['query']), unit(x @ params['key']), x @ params['value']
  own = rate('rate')
  written = rate('value_rate') if arm in ('scalar_decoupled', 'fg2_gdn_plus') else own
  decay = -jax.nn.softplus(x @ params['decay'] + params['decay_bias'])
  one_head = [v[:, :, None] for v in (q, key, value, own, written, decay)]
  q, key, value, own, written, decay = one_head
  out, _ = lib.delta_rule(q, *lib.fg2_plus_inputs(key, value, own, written), decay, scale=1.)
  error = jnp.mean((out[:, :, 0] @ params['out'] - target)**2, -1)
  return jnp.sum(error * asked) / jnp.sum(asked)


def recall_batch(key: Array, task: Recall) -> tuple[Array, Array, Array]:
  """(tokens i32[B, T], labels i32[B, T], whether a label counts [B, T]); keys are 0 .. A - 1."""
  def one(key):
    ks = jax.random.split(key, 5)
    keys = jax.random.permutation(ks[0], task.alphabet)[:task.pairs]
    values = jax.random.randint(ks[1], (task.pairs,), 0, task.alphabet)
    again = jax.random.permutation(ks[2], task.pairs)[:task.overwrites]
    new = jax.random.randint(ks[3], (task.overwrites,), 0, task.alphabet)
    written = jnp.stack([jnp.concatenate([keys, keys[again]]),
                         task.alphabet + jnp.concatenate([values, new])], 1).reshape(-1)
    asked = jax.random.randint(ks[4], (task.length - len(written),), 0, task.pairs)
    final = values.at[again].set(new)
    tokens = jnp.concatenate([written, keys[asked]])
    labels = jnp.concatenate([0 * written, task.alphabet + final[asked]])
    return tokens, labels, jnp.arange(task.length) >= len(written)

  return jax.vmap(one)(jax.random.split(key, task.batch))


def recall_model(arm: str, task: Recall) -> ModelConfig:
  """One layer of width 64 and two heads of 8: equal state in every arm."""
  return ModelConfig(
    vocab=2 * task.alphabet, hidden=64, layers=1, heads=2, kv_heads=2, head_dim=8, inter=128,
    mixers=(arm,), linear_heads=2, linear_value_heads=2, linear_key_dim=8, linear_value_dim=8)


def recall_params(key: Array, arm: str, task: Recall):
  """Decays start slow (decay_scale 0): at full size half-lives are of a few tokens."""
  params = params_lib.init(recall_model(arm, task), key)
  blocks = [dataclasses.replace(b, mixer=dataclasses.replace(
    b.mixer, decay_scale=0 * b.mixer.decay_scale)) for b in params.blocks]
  return dataclasses.replace(params, blocks=tuple(blocks))


def recall_loss(params, batch, arm: str, task: Recall) -> tuple[Array, Array]:
  """(cross-entropy in nats, accuracy) of the queries."""
  tokens, labels, asked = batch
  logits = decoder.forward(recall_model(arm, task), params, tokens).logits
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  right = jnp.argmax(logits, -1) == labels
  return jnp.sum(loss * asked) / jnp.sum(asked), jnp.sum(right * asked) / jnp.sum(asked)


@functools.partial(jax.jit, static_argnames=('arm', 'task'))
def train(keys: Array, *, arm: str, task: Stream | Recall) -> Array:
  """Error (stream) or accuracy (recall) of every training batch, f32[S, steps], one run per key.

  Adam with a cosine to zero. A key fixes weights and data, which the arms therefore share.
  """
  make, loss = ((stream_batch, stream_loss) if isinstance(task, Stream) else
                (recall_batch, functools.partial(recall_loss, task=task)))
  optimizer = optax.adam(optax.cosine_decay_schedule(task.rate, task.steps))
  shows = isinstance(task, Recall)

  def run(key):
    params = (recall_params(rng.fold(key, 'init'), arm, task) if shows else
              stream_params(rng.fold(key, 'init'), task))

    def step(carry, at):
      params, held = carry
      batch = make(rng.fold(key, 'data', at), task)
      found, grads = jax.value_and_grad(loss, has_aux=shows)(params, batch, arm)
      updates, held = optimizer.update(grads, held, params)
      return (optax.apply_updates(params, updates), held), found[1] if shows else found

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(task.steps))[1]

  return jax.vmap(run)(keys)
