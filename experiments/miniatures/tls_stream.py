"""A synthetic decode stream over a long cache, and what each way to choose tokens makes of it.

Keys cluster by block, a dozen channels are heavy, and the directions of eight topics are added to
tokens that lie scattered over the cache; the query drifts among the topics. The description is of
arXiv 2604.07815's setting, the stream is ours.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import tls_attention as tls
from kernels.tls_attention import baselines, chunked, levels

Array = jax.Array
ARMS = ('window', 'Quest', 'Double Sparsity', 'two levels, sync', 'two levels, stale')
CONFIG = tls.Config(block=64, top_blocks=64)


@dataclasses.dataclass(frozen=True)
class Stream:
  """Sizes of the stream. `rho` is the memory of the topic logits, `noise` that within a block.

  `planted_norm`, `spread`, `heads_apart` and `sharpness` are free in the description; they were
  set once, on other seeds, to the figures that a prototype had for all arms at 512 tokens.
  """

  room: int = 16384
  width: int = 64
  heads: int = 4  # of queries, on one key head
  topics: int = 8
  planted: int = 48  # tokens of a topic
  planted_norm: float = 1.0  # of what they get, where a channel has standard deviation 1
  heavy: int = 12  # channels three times as large
  rho: float = 0.98
  noise: float = 0.5
  spread: float = 3.0  # standard deviation of the topic logits
  heads_apart: float = 0.2  # of a head from the common direction, which has norm 1
  sharpness: float = 96.0  # scaled logit of a key in the direction of the query
  steps: int = 64
  labels: int = 16


class Drawn(NamedTuple):
  key: Array  # f32[1, 1, N, D], unit rows
  value: Array  # f32[1, 1, N, D]
  queries: Array  # f32[1 + steps, 1, G, D]; the first ends the prompt
  channels: Array  # i32[1, R]
  planted: Array  # bool[N]


class Trace(NamedTuple):
  """Of every step, [steps] or [seeds, steps]."""

  error: dict[str, Array]  # arm -> |out - dense| / |dense|
  mass: dict[str, Array]  # arm -> attention of the dense softmax on the tokens read
  new: Array  # share of the blocks looked into that the step before did not choose
  planted: Array  # attention of the dense softmax on planted tokens


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(s: Stream, seed: int) -> Drawn:
  """The stream of that seed."""
  gen = np.random.default_rng(seed)
  weight = np.ones(s.width)
  weight[gen.choice(s.width, s.heavy, replace=False)] = 3
  base = gen.normal(size=(s.room // CONFIG.block, s.width))
  raw = np.repeat(base, CONFIG.block, axis=0) + s.noise * gen.normal(size=(s.room, s.width))
  topics = _unit(gen.normal(size=(s.topics, s.width)))
  at = gen.choice(s.room, (s.topics, s.planted), replace=False)
  raw[at] += s.planted_norm * topics[:, None]
  key, topics = _unit(raw * weight), _unit(topics * weight)
  logits = s.spread * gen.normal(size=s.topics)
  apart = s.heads_apart * gen.normal(size=(s.heads, s.width)) * s.width**-0.5
  queries = []
  for _ in range(1 + s.steps):
    logits = s.rho * logits + s.spread * (1 - s.rho**2)**0.5 * gen.normal(size=s.topics)
    share = np.exp(logits - logits.max())
    queries.append(s.sharpness * s.width**0.5 * _unit(_unit(share @ topics) + apart))
  queries, planted = np.stack(queries), np.zeros(s.room, bool)
  planted[at] = True
  single = lambda x: jnp.asarray(x, jnp.float32)
  sample = gen.integers(0, s.room, len(queries))
  channels = tls.calibrate(single(queries), single(key[sample, None]), s.labels)
  return Drawn(single(key[None, None]), single(gen.normal(size=(1, 1, s.room, s.width))),
               single(queries[:, None]), channels, jnp.asarray(planted))


@functools.partial(jax.jit, static_argnames=('s', 'config'))
def play(x: Drawn, *, s: Stream, config: tls.Config) -> Trace:
  """Decodes the stream with every arm at config.top_tokens tokens; the cache does not grow."""
  scale, length = s.width**-0.5, jnp.full((1,), s.room, jnp.int32)
  key, value, channels = x.key, x.value, x.channels
  blocks = s.room // config.block

  def choices(q, state, chosen):  # (token numbers, which count) of every arm
    def inside(candidates):
      scores = chunked.token_scores(q, state.labels, channels, candidates, length, config, scale)
      return levels.choose_tokens(scores, candidates, config)

    return (baselines.window(length, 1, config),
            baselines.block_only(q, state.summary, length, config),
            baselines.token_only(q, state.labels, channels, length, config, scale),
            inside(chosen), inside(state.chosen))

  def step(state, q):
    weight = jax.nn.softmax(scale * jnp.einsum('bhd,bxnd->bhn', q, key), axis=-1)
    dense = jnp.einsum('bhn,bxnd->bhd', weight, value)
    after = tls.choose(q, state, length=length, config=config)
    error, mass = {}, {}
    for arm, (at, valid) in zip(ARMS, choices(q, state, after.chosen)):
      out = chunked.attend_rows(q, key, value, at, valid, scale)
      error[arm] = jnp.linalg.norm(out - dense) / jnp.linalg.norm(dense)
      held = jnp.take_along_axis(weight, jnp.broadcast_to(at, (1, s.heads, at.shape[-1])), axis=2)
      mass[arm] = jnp.mean(jnp.sum(jnp.where(valid, held, 0), axis=-1))
    new = tls.turnover(state, after, blocks).sum() / config.top_blocks
    return after, Trace(error, mass, new, jnp.mean(jnp.sum(weight * x.planted, axis=-1)))

  start = tls.summarise(key, length, channels, config)
  start = tls.choose(x.queries[0], start, length=length, config=config)
  return jax.lax.scan(step, start, x.queries[1:])[1]


def play_seeds(s: Stream, config: tls.Config, num_seeds: int) -> Trace:
  """Traces [seeds, steps] of seeds 0, 1, .."""
  found = [jax.device_get(play(draw(s, seed), s=s, config=config)) for seed in range(num_seeds)]
  return jax.tree.map(lambda *x: np.stack(x), *found)
