"""Tokens/s of continuous batching beside the fixed batch, on rows of very different lengths.

  python -m experiments.bench_engine --preset=tiny
256 requests whose lengths are log-normal (median 48, sigma 1, at most 512 tokens) go through 16
slots, and through `decode.generate` in batches of 16, in turn and in one run. Lengths are given by
forced responses, so that both sides decode exactly the same tokens; what is forced costs what is
sampled.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments import bench_common as common
from zppo_jax.core.errors import UserError
from zppo_jax.models import params as params_lib
from zppo_jax.sampling import decode, engine
from zppo_jax.train import compiles

STOP = 1


@dataclasses.dataclass(frozen=True)
class Load:
  """A queue of requests and the slots that it goes through."""

  requests: int = 256
  slots: int = 16
  steps: int = 16  # between two looks of the host
  median: int = 48  # response tokens
  sigma: float = 1.0
  most: int = 512
  seed: int = 0


def lengths(load: Load) -> np.ndarray:
  """Response tokens of each request, the stop token included."""
  draw = np.random.default_rng(load.seed).lognormal(np.log(load.median), load.sigma, load.requests)
  return np.clip(np.round(draw), 2, load.most).astype(np.int32)


def make_prompts(spec: common.Spec, load: Load) -> decode.Prompts:
  """Random prompts, each with its whole response given."""
  prompts = common.make_prompts(dataclasses.replace(spec, prompts=load.requests))
  size = lengths(load)
  forced = np.random.default_rng(load.seed).integers(2, spec.vocab, (load.requests, load.most))
  column = np.arange(load.most)[None]
  forced = np.where(column == size[:, None] - 1, STOP, np.where(column < size[:, None], forced, 0))
  return dataclasses.replace(prompts, forced=forced.astype(np.int32), forced_length=size)


def run(spec: common.Spec, load: Load, pairs: int) -> dict[str, Any]:
  """Medians, the paired ratio and the slots' occupancy. Raises Refused if the rows differ."""
  compiles.install()
  config, key = common.model_config(spec), jax.random.key(0)
  params = params_lib.init(config, key)
  prompts = make_prompts(spec, load)
  settings = decode.Settings(load.most, (STOP,))
  parts = [jax.tree.map(lambda x, i=i: x[i:i + load.slots], prompts)
           for i in range(0, load.requests, load.slots)]

  def fixed():
    return [jax.device_get(decode.generate(config, params, p, key=key, settings=settings).tokens)
            for p in parts]

  def slots():
    rollout, stats = engine.run(config, params, prompts, key=key, settings=settings,
                                engine=engine.Engine(load.slots, load.steps))
    return jax.device_get(rollout.tokens), stats

  wanted, (found, stats) = np.concatenate(fixed()), slots()
  common.require([common.Check('tokens that differ', int((wanted != found).sum()), 0)])
  before = compiles.count()
  seconds = common.in_turn(pairs, dict(fixed=fixed, slots=slots))
  ratio = np.asarray(seconds['fixed']) / np.asarray(seconds['slots'])
  return dict(
    spec=dataclasses.asdict(spec), load=dataclasses.asdict(load), seconds=seconds,
    tokens=stats.tokens, ratio=float(np.median(ratio)), ratio_min=float(ratio.min()),
    ratio_max=float(ratio.max()), occupancy=stats.occupancy,
    occupancy_while_waiting=stats.waiting, steps_per_call=load.steps,
    decode_steps=stats.decode_steps,
    fixed_steps=int(sum(x.max() for x in lengths(load).reshape(-1, load.slots))),
    compiles_after_warm_up=compiles.count() - before, jax=jax.__version__,
    platform=jax.default_backend())


def main(argv) -> int:
  values = flags.FLAGS
  try:
    if len(argv) > 1:
      raise UserError(f'unexpected argument {argv[1]!r}: flags start with --')
    load = Load(values.requests, values.slots, values.steps)
    found = run(common.PRESETS[values.preset], load, values.pairs)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  rate = {k: found['tokens'] / np.median(v) for k, v in found['seconds'].items()}
  print(f'{found["tokens"]} tokens of {values.requests} requests: fixed batches '
        f'{rate["fixed"]:.0f} tokens/s in {found["fixed_steps"]} steps, slots {rate["slots"]:.0f} '
        f'in {found["decode_steps"]}; ratio {found["ratio"]:.2f} ({found["ratio_min"]:.2f} to '
        f'{found["ratio_max"]:.2f}), occupancy {found["occupancy"]:.0%} ('
        f'{found["occupancy_while_waiting"]:.0%} while requests wait), '
        f'{found["compiles_after_warm_up"]} compiles after the warm-up')
  if values.out:
    common.write_json(values.out, f'bench_engine_{values.preset}', found)
  return 0


if __name__ == '__main__':
  flags.DEFINE_enum('preset', 'tiny', sorted(common.PRESETS), 'Size of the model.')
  flags.DEFINE_integer('requests', 256, 'Requests in the queue.', lower_bound=1)
  flags.DEFINE_integer('slots', 16, 'Slots, and rows of a fixed batch.', lower_bound=1)
  flags.DEFINE_integer('steps', 16, 'Decode steps between two looks of the host.', lower_bound=1)
  flags.DEFINE_integer('pairs', 5, 'Timed pairs after the warm-up.', lower_bound=1)
  flags.DEFINE_string('out', '', 'Folder for the JSON result; empty: none.')
  app.run(main)
