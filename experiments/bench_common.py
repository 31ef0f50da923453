"""What both speed benches share: sizes, peer processes, checks, paired timing and the report.

A peer is the same model in another library, in a virtualenv and a process of its own. A ratio is
taken pair by pair in one run (ours, peer, peer, ours, ...) and is printed only when all checks of
the run have passed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from zppo_jax.core.errors import UserError
from zppo_jax.models import ModelConfig
from zppo_jax.models.params import Params
from zppo_jax.sampling import decode

TUNIX = 'tunix'
WORKER = pathlib.Path(__file__).with_name('bench_tunix.py')
PARTS = ('call', 'compiled')  # what a user waits for, and the compiled programs alone
Timings = dict[str, dict[str, list[float]]]  # seconds of each run: {part: {side: [...]}}
UNREACHABLE = -1  # an end-of-sequence id that no sampler draws: all samples are equally long


@dataclasses.dataclass(frozen=True)
class Spec:
  """The model and the batch; both sides are built from these numbers and the same weights."""

  hidden: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  inter: int
  vocab: int
  prompts: int
  group: int
  prompt_tokens: int  # bucket; true lengths lie in half of it .. all of it
  new_tokens: int
  rope_theta: float = 1e6  # Tunix hard-codes this value
  norm_eps: float = 1e-6
  learning_rate: float = 1e-4
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  epsilon: float = 0.2  # ratio clip
  seed: int = 0


PRESETS = {
  'tiny': Spec(hidden=96, layers=3, heads=4, kv_heads=2, head_dim=24, inter=256, vocab=128,
               prompts=40, group=8, prompt_tokens=96, new_tokens=48),
  'small': Spec(hidden=256, layers=6, heads=8, kv_heads=4, head_dim=32, inter=768, vocab=4096,
                prompts=8, group=8, prompt_tokens=128, new_tokens=128),
}


class Refused(UserError):
  """A check failed, so that no ratio may be printed."""


@dataclasses.dataclass(frozen=True)
class Check:
  """A number that must not exceed its bound."""

  name: str
  value: float
  bound: float

  @property
  def fine(self) -> bool:
    return bool(self.value <= self.bound)  # NaN is not fine


def require(checks: Sequence[Check]) -> None:
  """Raises Refused naming every failed check."""
  failed = [f'{c.name}: {c.value:.3g} exceeds {c.bound:.3g}' for c in checks if not c.fine]
  if failed:
    raise Refused('no figures, the two sides do not compute the same: ' + '; '.join(failed))


def model_config(spec: Spec) -> ModelConfig:
  """Our config; blocks are written out, as in Tunix, which has no scan over layers."""
  return ModelConfig(
    vocab=spec.vocab, hidden=spec.hidden, layers=spec.layers, heads=spec.heads,
    kv_heads=spec.kv_heads, head_dim=spec.head_dim, inter=spec.inter, rope_theta=spec.rope_theta,
    norm_eps=spec.norm_eps, unroll=spec.layers)


def make_prompts(spec: Spec) -> decode.Prompts:
  """Random prompts; one of them fills the bucket."""
  draw = np.random.default_rng(spec.seed)
  length = draw.integers(-(-spec.prompt_tokens // 2), spec.prompt_tokens + 1, spec.prompts)
  length[0] = spec.prompt_tokens
  tokens = draw.integers(0, spec.vocab, (spec.prompts, spec.prompt_tokens))
  tokens = np.where(np.arange(spec.prompt_tokens)[None] < length[:, None], tokens, 0)
  count = np.arange(spec.prompts, dtype=np.int32)
  return decode.Prompts(
    tokens=tokens.astype(np.int32), length=length.astype(np.int32),
    forced=np.zeros((spec.prompts, 0), np.int32), forced_length=np.zeros_like(count),
    request=count.astype(np.uint32), group_id=count, kind=np.zeros_like(count), question_id=count,
    valid=np.ones(spec.prompts, bool))


def prompt_ids(prompts: decode.Prompts) -> list[list[int]]:
  """The true ids of each prompt."""
  return [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.length)]


def named_weights(params: Params) -> dict[str, np.ndarray]:
  """Flat arrays, stacked over layers, in the layouts that both sides use."""
  block = params.blocks[0]
  return jax.tree.map(np.asarray, {
    'embed': params.embed, 'final_norm': params.final_norm, 'mixer_norm': block.mixer_norm,
    'mlp_norm': block.mlp_norm, **vars(block.mixer), **vars(block.mlp)})


class Peer:
  """The worker process: one JSON line in, one JSON line out; arrays travel as npz files."""

  def __init__(self, python: str, kind: str, spec: Any, arrays: dict[str, Any],
               worker: pathlib.Path = WORKER):
    self._folder = tempfile.TemporaryDirectory(prefix='zppo_bench_')
    self._log = open(os.path.join(self._folder.name, 'stderr'), 'w+')
    path = os.path.join(self._folder.name, 'inputs.npz')
    np.savez(path, **arrays)
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    env['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # a first call compiles
    self._process = subprocess.Popen([python, str(worker)], stdin=subprocess.PIPE, text=True,
                                     stdout=subprocess.PIPE, stderr=self._log, env=env)
    self.facts = self.ask(kind=kind, spec=dataclasses.asdict(spec), arrays=path,
                          folder=self._folder.name)

  def ask(self, **request) -> dict[str, Any]:
    """Raises UserError with the end of the worker's log if it has died."""
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
    for line in self._process.stdout:
      if line.startswith('{'):
        return json.loads(line)
    self._log.seek(0)
    end = self._log.read()[-2000:]
    self.close()
    raise UserError(f'the worker of {self._process.args[0]} has died:\n{end}')

  def close(self) -> None:
    """Ends the worker and removes its files; a second call does nothing."""
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    self._process.wait(timeout=30)
    self._process.stdout.close()
    self._log.close()
    self._folder.cleanup()


def seconds(fn: Callable[[], Any]) -> tuple[float, Any]:
  """Wall-clock time of a call whose result is waited for, and the result."""
  start = time.perf_counter()
  out = jax.block_until_ready(fn())
  return time.perf_counter() - start, out


def interleave(pairs: int, sides: dict[str, Callable[[], dict[str, Any]]],
               parts: Sequence[str] = PARTS) -> Timings:
  """Runs the sides in turn; who goes first alternates, too."""
  found = {part: {side: [] for side in sides} for part in parts}
  for i in range(pairs):
    for side in list(sides)[::1 if i % 2 == 0 else -1]:
      result = sides[side]()
      for part in parts:
        found[part][side].append(result[part])
  return found


def in_turn(repeats: int, sides: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
  """`interleave` of plain calls: the seconds of every run."""
  calls = {name: lambda side=side: {'call': seconds(side)[0]} for name, side in sides.items()}
  return interleave(repeats, calls, parts=('call',))['call']


def error(found: Sequence[Any], wanted: Sequence[Any]) -> float:
  """Largest relative RMS error among arrays."""
  pairs = [(np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel())
           for a, b in zip(found, wanted)]
  return max(float(np.sqrt(np.mean((a - b)**2) / np.mean(b**2))) for a, b in pairs)


def write_json(folder: str, name: str, result: dict[str, Any]) -> pathlib.Path:
  """Writes NAME.json; returns the folder, made if it is not there."""
  place = pathlib.Path(folder)
  place.mkdir(parents=True, exist_ok=True)
  (place / f'{name}.json').write_text(json.dumps(result, indent=1))
  return place


def _spread(side: str, took: np.ndarray, ours: np.ndarray) -> dict[str, float]:
  """The paired ratio to a peer; the keys of Tunix, the first peer, are bare."""
  name, ratio = 'ratio' if side == TUNIX else f'{side}_ratio', took / ours
  at = np.quantile(ratio, (0.5, 0.25, 0.75, 0, 1))
  return dict(zip((name, f'{name}_q1', f'{name}_q3', f'{name}_min', f'{name}_max'), at))


def summary(timings: Timings, tokens: int) -> dict[str, dict[str, float]]:
  """Per part: seconds and tokens/s of every side at the median; paired ratios with their spread."""
  out = {}
  for part, runs in timings.items():
    row, ours = {}, np.asarray(runs['ours'])
    for side, took in runs.items():
      row |= {f'{side}_seconds': np.median(took), f'{side}_tokens_per_s': tokens / np.median(took)}
      row |= _spread(side, np.asarray(took), ours) if side != 'ours' else {}
    out[part] = {k: float(v) for k, v in row.items()}
  return out


def _lines(timings: Timings, tokens: int):
  """The table, a line per part and side."""
  for (part, runs), row in zip(timings.items(), summary(timings, tokens).values()):
    for side, took in runs.items():
      line = (f'{part:8s} {side:12s} {row[f"{side}_seconds"]:7.2f} s '
              f'{row[f"{side}_tokens_per_s"]:8.0f} tokens/s')
      if side != 'ours':
        mid, *at = _spread(side, np.asarray(took), np.asarray(runs['ours'])).values()
        line += (f', ratio {mid:.2f} (quartiles {at[0]:.2f}-{at[1]:.2f}, range {at[2]:.2f}-'
                 f'{at[3]:.2f}, {len(took)} pairs), our time {1 / mid:.2f} of its')
      yield line


def report(name: str, what: str, spec: Spec, timings: Timings, tokens: int,
           checks: Sequence[Check], facts: dict[str, Any], out: str | None) -> dict[str, Any]:
  """Refuses on a failed check; otherwise prints the table and writes NAME.json and NAME.png."""
  require(checks)
  ours = {'jax': jax.__version__, 'platform': jax.default_backend(), 'cpus': os.cpu_count()}
  print(f'{name}: {what}')
  print(f'ours {ours}; ' + ('; '.join(f'{side} {fact}' for side, fact in facts.items()) or
                            'no python of a peer: only our own figures, no ratio'))
  found = [f'check {c.name}: {c.value:.3g} <= {c.bound:.3g}' for c in checks]
  for line in [*found, *_lines(timings, tokens)]:
    print(f'  {line}')
  result = dict(name=name, what=what, spec=dataclasses.asdict(spec), tokens=tokens, versions=ours,
                peers=facts, checks=[dataclasses.asdict(c) for c in checks],
                results=summary(timings, tokens), seconds=timings)
  if out:
    _write(out, name, result)
  return result


def _write(folder: str, name: str, result: dict[str, Any]) -> None:
  from matplotlib.figure import Figure  # without pyplot: no global state

  place = write_json(folder, name, result)
  figure = Figure(figsize=(6.4, 2.6), layout='constrained')
  axes = figure.subplots()
  rows, sides = result['results'], list(result['seconds'][PARTS[0]])
  width = 0.8 / len(sides)
  for i, side in enumerate(sides):
    bars = axes.bar(np.arange(len(rows)) + i * width,
                    [row[f'{side}_tokens_per_s'] for row in rows.values()], width, label=side)
    axes.bar_label(bars, fmt='%.0f', fontsize=7)
  axes.set_xticks(np.arange(len(rows)) + 0.4 - width / 2, list(rows))
  axes.set(ylabel='tokens/s', title=name)
  figure.legend(frameon=False, loc='outside right upper')
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(place / f'{name}.png', dpi=110)


def bench(name: str, make_ours: Callable, make_theirs: Callable, spec: Spec, *, warmups: int,
          pairs: int, peer_python: str = '', others: dict[str, Callable] | None = None,
          after: Callable[[Any], Timings] = lambda ours: {}, out: str | None = None) -> dict:
  """Warm-up and checks on each side, timed pairs, checks and report; `after` times more parts."""
  peers = {TUNIX: lambda ours: make_theirs(ours, peer_python)} if peer_python else {}
  ours, sides = make_ours(spec), {}
  with contextlib.ExitStack() as stack:
    for side, make in {'ours': lambda ours: ours, **peers, **(others or {})}.items():
      sides[side] = make(ours)
      if side != 'ours':
        stack.callback(sides[side].peer.close)
      for _ in range(warmups):
        sides[side].run()
      require(sides[side].checks())
    timings = interleave(pairs, {k: side.run for k, side in sides.items()})
    checks = [check for side in sides.values() for check in side.checks()]  # of the timed runs
  facts = {k: side.peer.facts for k, side in sides.items() if side is not ours}
  return report(name, ours.describe(), spec, timings | after(ours), ours.tokens(), checks, facts,
                out)


def main(run: Callable) -> None:
  """Parses the flags and calls run(spec, pairs=, peer_python=, out=); status 2 on a user error."""
  flags.DEFINE_enum('preset', 'tiny', sorted(PRESETS), 'size of model and batch')
  flags.DEFINE_integer('pairs', 7, 'timed pairs after the warm-up', lower_bound=1)
  flags.DEFINE_string('peer_python', '', 'python of the Tunix virtualenv; empty: no ratio')
  flags.DEFINE_string('out', '', 'folder for the JSON result and the plot; empty: none')

  def call(argv: list[str]) -> int:
    values = flags.FLAGS
    try:
      if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}: flags start with --')
      run(PRESETS[values.preset], pairs=values.pairs, peer_python=values.peer_python,
          out=values.out)
    except UserError as error:
      print(f'error: {error}', file=sys.stderr)
      return 2
    return 0

  app.run(call)
