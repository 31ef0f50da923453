"""Times block-table attention, forward and backward, beside dense causal attention:

  python -m experiments.bench_kernels --kernel=block_attention [--lengths=4096,8192 --out=DIR]

Both sides are XLA, in turn and in one run, as ratios; ours with its router. A row is printed only
if values and gradients at a short length are those of the reference with the same table.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench_common as common
from kernels import attention
from kernels import tls_attention as tls

LENGTHS = 4096, 8192, 16384
BOUND = {'float32': 1e-5, 'bfloat16': 2e-2}  # relative RMS error to the reference
SHORT = 1024  # tokens of the check


@dataclasses.dataclass(frozen=True)
class Shape:
  """The query heads of one key head, with budgets of `top` blocks and of half of them."""

  length: int
  heads: int = 4
  key_heads: int = 1
  width: int = 128
  block: int = 256
  query_tile: int = 128
  top: int = 8
  dtype: str = 'float32'
  seed: int = 0


def arrays(s: Shape) -> list[jax.Array]:
  """query, key, value and the gradient of the output."""
  rng = np.random.default_rng(s.seed)
  return [jnp.asarray(rng.standard_normal((1, s.length, h, s.width), np.float32), s.dtype)
          for h in (s.heads, s.key_heads, s.key_heads, s.heads)]


def sparse(s: Shape, implementation: str):
  """Compiled (query, key, value, gradient, budget) -> (out, three gradients)."""
  def rule(query, key, value, budget):
    means = tls.block_means(key, block=s.block)
    table, _ = tls.route(query, means, block=s.block, top=s.top, query_tile=s.query_tile,
                         per_key_head=True)
    return tls.block_attention(query, key, value, table, block=s.block, query_tile=s.query_tile,
                               budget=budget, implementation=implementation)

  def run(query, key, value, weight, budget):
    out, back = jax.vjp(lambda *a: rule(*a, budget), query, key, value)
    return out, *back(weight)

  return jax.jit(run)


@jax.jit
def dense(query, key, value, weight):
  """Of exact attention, the same."""
  out, back = jax.vjp(attention.attention, query, key, value)
  return out, *back(weight)


def check(s: Shape) -> common.Check:
  """Worst error of the chunked form among the output and the gradients."""
  s = dataclasses.replace(s, length=min(s.length, SHORT), block=64, query_tile=32)
  given, budget = arrays(s), jnp.int32(max(s.top // 2, 1))
  found, wanted = (sparse(s, name)(*given, budget) for name in ('chunked', 'reference'))
  return common.Check('error of values and gradients to the reference',
                      common.error(found, wanted), BOUND[s.dtype])


def measure(s: Shape, repeats: int) -> dict[str, Any]:
  """Minimal seconds per side and ratios of minima. Raises Refused on a wrong output."""
  common.require([check(s)])
  given, run = arrays(s), sparse(s, 'chunked')
  half = max(s.top // 2, 1)
  sides = {'dense': lambda: dense(*given),
           'top': lambda: run(*given, jnp.int32(s.top)),
           'half': lambda: run(*given, jnp.int32(half))}
  for side in sides.values():
    jax.block_until_ready(side())
  seconds = common.in_turn(repeats, sides)
  best = {name: min(t) for name, t in seconds.items()}
  return dict(shape=dataclasses.asdict(s), seconds=seconds, best=best,
              ratio={name: best['dense'] / best[name] for name in ('top', 'half')})


def run(lengths: list[int], dtypes: list[str], repeats: int, out: str) -> list[dict[str, Any]]:
  """Prints a row per length and type, and writes bench_blocks.json to `out` if it is given."""
  rows = []
  for dtype in dtypes:
    for length in lengths:
      rows.append(measure(Shape(length, dtype=dtype), repeats))
      s, best, ratio = (rows[-1][k] for k in ('shape', 'best', 'ratio'))
      print(f'{dtype:9s} {length:7d} tokens: dense {best["dense"] * 1e3:6.0f} ms, {s["top"]} '
            f'blocks of {s["block"]} {best["top"] * 1e3:6.0f} ms, ratio {ratio["top"]:5.2f}; half '
            f'of them {best["half"] * 1e3:6.0f} ms, ratio {ratio["half"]:5.2f}', flush=True)
  found = dict(rows=rows, jax=jax.__version__, platform=jax.default_backend())
  if out:
    common.write_json(out, f'bench_blocks_{jax.default_backend()}', found)
  return rows
