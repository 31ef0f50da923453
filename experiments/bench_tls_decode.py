"""Tokens/s of a whole model that decodes at a fixed budget of keys, and what a pool has to fetch:

  python -m experiments.bench_kernels --kernel=tls_decode [--lengths=8192,32768,98304 --out=DIR]

Two layers of the shape of Qwen3-8B (with a small vocabulary) read all keys or a budget of them, in
turn and in one run; what is timed does not depend on the keys, which are random. What a pool before
host memory has to fetch does: it is counted on the stream of the miniature `asynctls`, whose
queries drift as those of a text. Times with a pool say little here: XLA copies whole arrays on CPU
where it works in place on TPU (tests/sampling/slots_aot_test.py).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench_common as common
from experiments.miniatures import tls_stream
from kernels import tls_attention as tls
from zppo_jax.models import cache as cache_lib
from zppo_jax.models import config as config_lib
from zppo_jax.models import decoder
from zppo_jax.models import params as params_lib

MODEL = config_lib.ModelConfig(
  vocab=1024, hidden=4096, layers=2, heads=32, kv_heads=8, head_dim=128, inter=12288)
BUDGET = tls.Config(stale=True)
STEPS = 8  # tokens of a timed call


def sides(model: config_lib.ModelConfig, budget: tls.Config, labels: int
          ) -> dict[str, config_lib.ModelConfig]:
  """The model with all keys, and with a budget."""
  sparse = config_lib.Sparse(budget, labels=labels)
  return {'dense': model, 'sparse': dataclasses.replace(model, sparse=sparse)}


def fill(config: config_lib.ModelConfig, length: int, rows: int) -> cache_lib.Cache:
  """A split cache whose rows hold `length` random keys, with room for STEPS tokens more."""
  block = BUDGET.block if config.sparse is None else config.sparse.kernel.block
  room = -(-(length + STEPS) // block) * block

  def layer(n: int):
    rng = np.random.default_rng(n)
    draw = lambda *size: rng.standard_normal(size, dtype=np.float32)
    heads, width = config.kv_heads, config.head_dim
    base = np.repeat(draw(rows, heads, room // block, width), block, axis=2)
    base += 0.5 * draw(*base.shape)
    keys = cache_lib.KeyValue(jnp.asarray(base, config.dtype),
                              jnp.asarray(draw(*base.shape), config.dtype))
    if config.sparse is None:
      return keys
    weight, held = jnp.asarray(np.abs(draw(rows, heads, width))), jnp.full(rows, length, jnp.int32)
    channels = tls.channels_of(weight, config.sparse.labels)
    state = jax.jit(tls.summarise, static_argnums=3)(keys.key, held, channels, config.sparse.kernel)
    state = tls.choose(jnp.asarray(draw(rows, config.heads, width)), state, length=held,
                       config=config.sparse.kernel)
    return cache_lib.Sparse(keys, state, weight, channels)

  layers = tuple(map(layer, range(config.layers)))
  start = jnp.int32(length) if config.sparse is None else jnp.full(rows, length, jnp.int32)
  return cache_lib.Cache(layers, start, split=True)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(config: config_lib.ModelConfig, blocks, cache: cache_lib.Cache, tokens):
  """(last hidden states, the cache with its old length) after STEPS tokens i32[B, STEPS]."""
  def step(i, carry):
    out = decoder.forward(config, blocks, jax.lax.dynamic_slice_in_dim(tokens, i, 1, 1),
                          cache=carry[1], want='hidden')
    return out.hidden[:, 0], out.cache

  shape = tokens.shape[0], config.hidden
  hidden, after = jax.lax.fori_loop(0, STEPS, step, (jnp.zeros(shape, config.dtype), cache))
  return hidden, dataclasses.replace(after, length=cache.length)


def measure(configs: dict[str, config_lib.ModelConfig], length: int, rows: int, repeats: int
            ) -> dict[str, Any]:
  """Tokens/s per side and their ratios to dense. Raises Refused if an output is not finite."""
  first = next(iter(configs.values()))
  blocks = decoder.split_blocks(first, params_lib.init(first, jax.random.key(0)))
  tokens = jax.random.randint(jax.random.key(1), (rows, STEPS), 0, first.vocab)
  caches = {name: fill(config, length, rows) for name, config in configs.items()}

  def call(name):
    hidden, caches[name] = decode(configs[name], blocks, caches[name], tokens)
    return hidden

  common.require([common.Check(  # the first call of each, which is compiled
    f'share of {name} outputs that are not finite', float(1 - np.isfinite(call(name)).mean()), 0.0)
    for name in configs])
  seconds = common.in_turn(repeats, {name: functools.partial(call, name) for name in configs})
  rate = {name: rows * STEPS / min(t) for name, t in seconds.items()}
  return dict(length=length, rows=rows, seconds=seconds, tokens_per_second=rate,
              ratio=rate['sparse'] / rate['dense'])


def trace(stream: tls_stream.Stream, config: tls.Config, slots: int, misses: int, prefetch: bool,
          repeats: int) -> dict[str, Any]:
  """Shares of the blocks that a step wants: chosen again, in the pool, late; and time of a step.

  The cache does not grow: every step writes the last token anew.
  """
  x = tls_stream.draw(stream, 0)
  length = jnp.full((1,), stream.room, jnp.int32)
  state = tls.choose(x.queries[0], tls.summarise(x.key, length, x.channels, config),
                     length=length, config=config)

  @jax.jit
  def run(key, value, state):
    pool = tls.pool.create(key, value, state, slots=slots, config=config)

    def step(carry, q):
      pool, state = carry
      out, pool, after, seen = tls.pool.decode(
        pool, state, q, key[:, :, -1], value[:, :, -1], channels=x.channels, length=length - 1,
        config=config, misses=misses, prefetch=prefetch)
      new = tls.turnover(state, after, stream.room // config.block).sum()
      return (pool, after), (out, new, jax.tree.map(jnp.sum, seen))

    return jax.lax.scan(step, (pool, state), x.queries[1:])[1]

  out, new, seen = run(x.key, x.value, state)
  best = min(common.seconds(lambda: run(x.key, x.value, state)[0])[0] for _ in range(repeats))
  wanted = int(np.sum(seen.wanted))
  share = lambda count: float(np.sum(count) / wanted)
  page = 2 * config.block * stream.width * 2  # bytes of keys and values at 16 bits
  return dict(slots=slots, misses=misses, prefetch=prefetch, overlap=1 - share(new),
              hits=1 - share(seen.missing), waiting=share(seen.waiting), absent=share(seen.absent),
              most_missing=int(np.max(seen.missing)), seconds_per_step=best / len(out),
              bytes_per_step=page * float(np.sum(seen.missing) / len(out)),
              checksum=float(np.sum(np.asarray(out, np.float64))))


def traces(repeats: int, stream: tls_stream.Stream | None = None) -> list[dict[str, Any]]:
  """Pools of several sizes, with copies enough and too few, ahead of their step and in it."""
  stream = stream or tls_stream.Stream()
  config = dataclasses.replace(tls_stream.CONFIG, top_tokens=512, stale=True)
  return [trace(stream, config, slots, misses, prefetch, repeats) for slots, misses, prefetch in (
    (65, 16, True), (96, 16, True), (128, 16, True), (96, 4, True), (96, 64, True),
    (96, 64, False))]


def run(lengths: list[int], repeats: int, out: str) -> dict[str, Any]:
  """Prints a row per length and per trace, and writes bench_tls_decode.json to `out` if given."""
  configs, rows = sides(MODEL, BUDGET, 32), []
  for length in lengths:
    rows.append(measure(configs, length, 1, repeats))
    r = rows[-1]
    print(f'{length:7d} tokens: ' + ', '.join(
      f'{name} {r["tokens_per_second"][name]:6.2f} tokens/s' for name in configs)
      + f', ratio {r["ratio"]:5.2f}', flush=True)
  found = traces(repeats)
  for t in found:
    when = 'ahead' if t['prefetch'] else 'on demand'
    print(f'pool of {t["slots"]:3d}, {t["misses"]:2d} copies {when}: {t["overlap"]:.3f} chosen '
          f'again, {t["hits"]:.3f} in the pool, {t["absent"]:.4f} absent, '
          f'{t["bytes_per_step"] / 1e3:.0f} kB and {t["seconds_per_step"] * 1e3:.2f} ms a step')
  found = dict(model=dataclasses.asdict(MODEL), budget=dataclasses.asdict(BUDGET), rows=rows,
               traces=found, jax=jax.__version__, platform=jax.default_backend())
  if out:
    common.write_json(out, f'bench_tls_decode_{jax.default_backend()}', found)
  return found
