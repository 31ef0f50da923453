"""Times one decode step of two-level sparse attention beside full attention over the same cache:

  python -m experiments.bench_kernels --kernel=tls_attention [--lengths=16384,49152,98304 --out=DIR]

Both sides are XLA, in turn and in one run, as ratios. A row is printed only if the sparse output is
that of exact attention over the tokens which it chose. Bytes are by formula: what each side reads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench_common as common
from kernels import tls_attention as tls
from kernels.tls_attention import chunked, levels, shapes

BOUND = {'float32': 1e-5, 'bfloat16': 2e-2}  # relative RMS, to attention over the chosen tokens


@functools.partial(jax.jit, static_argnames='scale')
def full(q, key, value, length, scale: float):
  """Exact attention of one token over the whole cache, [B, HQ, V]."""
  heads = key.shape[1]
  query = q.reshape(q.shape[0], heads, -1, q.shape[-1])
  logits = scale * jnp.einsum('bhgd,bhnd->bhgn', query, key, preferred_element_type=jnp.float32)
  real = jnp.arange(key.shape[2])[None] < length[:, None]
  weight = jax.nn.softmax(jnp.where(real[:, None, None], logits, -jnp.inf), axis=-1)
  out = jnp.einsum('bhgn,bhnv->bhgv', weight.astype(value.dtype), value,
                   preferred_element_type=jnp.float32)
  return out.reshape(q.shape[0], q.shape[1], -1).astype(value.dtype)


def arrays(s: shapes.Case, config: tls.Config) -> dict[str, Any]:
  """A cache whose keys cluster by block, as those of a text do."""
  rng = np.random.default_rng(0)
  draw = lambda *size: rng.standard_normal(size, dtype=np.float32)
  blocks = s.length // config.block
  base = np.repeat(draw(1, s.key_heads, blocks, s.width), config.block, axis=2)
  key = jnp.asarray(base + 0.5 * draw(*base.shape), s.dtype)
  value = jnp.asarray(draw(*base.shape), s.dtype)
  q = jnp.asarray(draw(1, s.heads, s.width), s.dtype)
  at = rng.integers(0, s.length, 256)
  channels = tls.calibrate(jnp.asarray(draw(256, s.heads, s.width)),
                           jnp.swapaxes(key[0][:, at], 0, 1).astype(jnp.float32), s.labels)
  length = jnp.asarray([s.length], jnp.int32)
  state = jax.jit(tls.summarise, static_argnames='config')(key, length, channels, config=config)
  return dict(q=q, key=key, value=value, length=length, channels=channels, state=state)


def measure(s: shapes.Case, config: tls.Config, repeats: int) -> dict[str, Any]:
  """Minimal seconds per side and the ratio of minima. Raises Refused on a wrong output."""
  x, scale = arrays(s, config), s.width ** -0.5

  @jax.jit
  def decode(*args, **kwargs):  # what the state holds unchanged is not copied, as in a loop
    out, state = tls.decode(*args, config=config, **kwargs)
    return out, state.chosen

  given = dict(channels=x['channels'], length=x['length'])
  sides = {
    'full': lambda: full(x['q'], x['key'], x['value'], x['length'], scale),
    'sparse': lambda: decode(x['q'], x['key'], x['value'], x['state'], **given)[0]}
  outs = {name: np.asarray(side(), np.float64) for name, side in sides.items()}
  common.require([common.Check('error of attention over the chosen tokens',
                               common.error([outs['sparse']], [_over_chosen(x, config, scale)]),
                               BOUND[s.dtype])])
  seconds = common.in_turn(repeats, sides)
  best = {name: min(t) for name, t in seconds.items()}
  return dict(shape=dataclasses.asdict(s), seconds=seconds, best=best,
              ratio=best['full'] / best['sparse'], bytes=dict(
                full=shapes.full_bytes(s), sparse=shapes.sparse_bytes(s, config)),
              error_to_full=common.error([outs['sparse']], [outs['full']]))


def _over_chosen(x, config: tls.Config, scale: float) -> np.ndarray:
  """Full attention with everything but the chosen tokens masked, in float64."""
  scores = levels.block_scores(x['q'], x['state'].summary, x['length'], config)
  blocks = levels.choose_blocks(scores, x['length'], config)
  tokens = chunked.token_scores(x['q'], x['state'].labels, x['channels'], blocks, x['length'],
                                config, scale)
  at, valid = (np.asarray(a) for a in levels.choose_tokens(tokens, blocks, config))
  heads = at.shape[1]
  query = np.asarray(x['q'], np.float64)[0].reshape(heads, -1, x['q'].shape[-1])
  out = []
  for h in range(heads):
    chosen = at[0, h][valid[0, h]]
    key, value = (np.asarray(x[n][0, h], np.float64)[chosen] for n in ('key', 'value'))
    logits = scale * query[h] @ key.T
    weight = np.exp(logits - logits.max(1, keepdims=True))
    out.append(weight @ value / weight.sum(1, keepdims=True))
  return np.concatenate(out)[None]


def slope(rows: list[dict[str, Any]]) -> float:
  """Of log seconds of the sparse side in log length, by least squares."""
  x = np.log([r['shape']['length'] for r in rows])
  return float(np.polyfit(x, np.log([r['best']['sparse'] for r in rows]), 1)[0])


def run(lengths: list[int], dtypes: list[str], repeats: int, out: str) -> dict[str, Any]:
  """Prints a row per length and type, and writes bench_tls.json to `out` if it is given."""
  config, found = tls.Config(), {}
  for dtype in dtypes:
    rows = []
    for length in lengths:
      rows.append(measure(shapes.Case(length, dtype=dtype), config, repeats))
      r = rows[-1]
      print(f'{dtype:9s} {length:7d} tokens: full {r["best"]["full"] * 1e3:7.2f} ms, sparse '
            f'{r["best"]["sparse"] * 1e3:6.2f} ms, ratio {r["ratio"]:5.2f}; reads '
            f'{r["bytes"]["full"] / r["bytes"]["sparse"]:.1f}x fewer bytes', flush=True)
    found[dtype] = dict(rows=rows)
    if len(rows) > 1:
      found[dtype]['slope'] = slope(rows)
      print(f'{dtype:9s} time grows as length ** {found[dtype]["slope"]:.2f}')
  found |= dict(config=dataclasses.asdict(config), jax=jax.__version__,
                platform=jax.default_backend())
  if out:
    common.write_json(out, f'bench_tls_{jax.default_backend()}', found)
  return found
