"""AsyncTLS: sparse decoding on a synthetic stream, and of a small model that recalls needles.

Arms at equal token budgets: whole blocks by their bounds (Quest, arXiv 2406.10774), tokens by 4-bit
labels over the whole cache (Double Sparsity, 2408.07092), and both levels (AsyncTLS, 2604.07815)
inside the blocks of this query (sync) or of the one before (stale: what an offloaded cache can
have fetched meanwhile). The tasks are ours.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.miniatures import tls_needle, tls_stream
from experiments.miniatures.bars import Bar, mean_error

WINDOW, QUEST, LABELS, SYNC, STALE = tls_stream.ARMS
BUDGETS = (256, 512, 1024)
NOISY = (64, 96, 128, 192, 256)  # blocks looked into when a block says little of its tokens
RESTLESS = 'rho 0.5, 512 tokens'
STRONG = 'planted 8 times as strong, 512 tokens'
# Tokens that a needle question may read, and blocks that two levels look into: four times as many
# tokens as are read, the least that the published settings have.
TOKENS, BLOCKS = 64, 16
LOOSE, RECALL = 'mass, noise 1.0 within blocks', 'recall, right answers at 64 of 517 tokens'
OTHER = (8, 12, 24)  # the same with other numbers of blocks, for information


class Result(NamedTuple):
  num_seeds: int
  stream: tls_stream.Stream
  needles: tls_needle.Needles
  cases: dict[str, tls_stream.Trace]  # [S, steps]
  recall: dict[str, np.ndarray]  # arm -> share of answers with all characters right, f32[S]


def cases(s: tls_stream.Stream) -> dict[str, tuple[tls_stream.Stream, Any]]:
  """Name -> stream and setting: token budgets, a restless query, strong topics, loose blocks."""
  of = lambda tokens, **kw: dataclasses.replace(tls_stream.CONFIG, top_tokens=tokens, **kw)
  found = {f'{k} tokens': (s, of(k)) for k in BUDGETS}
  found[RESTLESS] = dataclasses.replace(s, rho=0.5), of(512)
  found[STRONG] = dataclasses.replace(s, planted_norm=8 * s.planted_norm), of(512)
  return found | {noisy(n): (dataclasses.replace(s, noise=1.0), of(512, top_blocks=n))
                  for n in NOISY}


def noisy(blocks: int) -> str:
  """Name of a case."""
  return f'noise 1.0, {blocks} blocks, 512 tokens'


def needle_arms(task: tls_needle.Needles) -> dict[str, Any]:
  """All arms, and two levels with other numbers of blocks."""
  found = tls_needle.arms(task, TOKENS, BLOCKS)
  for n in OTHER:
    for arm in (SYNC, STALE):
      found[f'{arm}, {n} blocks'] = tls_needle.arms(task, TOKENS, n)[arm]
  return found


def recall(task: tls_needle.Needles, seed: int, count: int) -> dict[str, float]:
  """Trains a model; share of right answers of every arm to `count` held-out questions."""
  params, _ = tls_needle.train(task, seed)
  prompts, wanted = tls_needle.questions(task, seed, count)
  return {arm: float(np.mean(np.all(
    tls_needle.answer(task, params, prompts, sparse) == wanted, axis=1)))
    for arm, sparse in needle_arms(task).items()}


def run(num_seeds: int = 5, *, stream: tls_stream.Stream | None = None,
        needles: tls_needle.Needles | None = None, count: int = 256) -> Result:
  """Plays every case of the stream and trains a model, for every seed. Errors: num_seeds < 2."""
  if num_seeds < 2:
    raise ValueError(f'num_seeds must be >= 2 for standard errors, got {num_seeds}')
  s, task = stream or tls_stream.Stream(), needles or tls_needle.Needles()
  played = {name: tls_stream.play_seeds(own, config, num_seeds)
            for name, (own, config) in cases(s).items()}
  answered = [recall(task, seed, count) for seed in range(num_seeds)]
  return Result(num_seeds, s, task, played,
                jax.tree.map(lambda *x: np.array(x), *answered))


def _above(name: str, figure: float, threshold: float) -> Bar:
  return Bar(name, bool(figure > threshold), float(figure), threshold)


def bars(result: Result) -> list[Bar]:
  """The bars of the specification; 'stale' is AsyncTLS."""
  found = []
  for k in BUDGETS:
    trace = result.cases[f'{k} tokens']
    found.append(_above(f'stream, {k} tokens: attention mass, stale', trace.mass[STALE].mean(),
                        0.95))
    found.append(_above(f'stream, {k} tokens: 0.3 - error of stale over that of Quest',
                        0.3 - trace.error[STALE].mean() / trace.error[QUEST].mean(), 0.))
  new = result.cases['512 tokens'].new.mean()
  found.append(_above('stream: 0.2 - share of the blocks that a step transfers', 0.2 - new, 0.))
  right = {arm: x.mean() for arm, x in result.recall.items()}
  found.append(_above('recall: accuracy of dense', right['dense'], 0.95))
  for arm in (SYNC, STALE):
    found.append(_above(f'recall: 0.02 - (dense minus {arm})', 0.02 - right['dense'] + right[arm],
                        0.))
    found.append(_above(f'recall: {arm} minus Quest', right[arm] - right[QUEST], 0.05))
  return found


def table(result: Result) -> list[str]:
  """Error and mass of the stream by case and arm; accuracy of recall by arm."""
  lines = [f'{"stream: error / mass":40s}' + ''.join(f'{a:>20s}' for a in tls_stream.ARMS)
           + f'{"new blocks":>13s}']
  for name, trace in result.cases.items():
    cells = ''.join(f'{trace.error[a].mean():12.3f} / {trace.mass[a].mean():.3f}'
                    for a in tls_stream.ARMS)
    lines.append(f'{name:40s}{cells}{trace.new.mean():13.3f}')
  lines.append(f'recall: right answers at {TOKENS} tokens')
  for arm, x in result.recall.items():
    mean, error = mean_error(x)
    lines.append(f'{arm:40s}{mean:8.3f} +- {error:.3f}   ' + ' '.join(f'{v:.3f}' for v in x))
  return lines


def notes(result: Result) -> list[str]:
  """Figures without a bar: limits, and what depends on the reading of the stream."""
  usual, restless, strong = (result.cases[n] for n in ('512 tokens', RESTLESS, STRONG))
  ratio = restless.error[STALE].mean() / restless.error[SYNC].mean()
  worst = max(float((t.error[STALE].mean(1) / t.error[QUEST].mean(1)).max())
              for t in (result.cases[f'{k} tokens'] for k in BUDGETS))
  page = tls_stream.CONFIG.block * 4 * result.stream.width  # bytes of keys and values at 16 bits
  moved = usual.new.mean() * tls_stream.CONFIG.top_blocks * page
  return [
    f'limit: with rho 0.5 {restless.new.mean():.2f} of the blocks are new at each step, and the '
    f'stale error is {ratio:.1f} times the synchronous one',
    f'transfers per step and key head at 16 bits: {moved / 1e3:.0f} kB, of '
    f'{tls_stream.CONFIG.top_blocks * page / 1e3:.0f} kB looked into and '
    f'{result.stream.room * page / tls_stream.CONFIG.block / 1e3:.0f} kB of cache',
    f'largest ratio of the stale error to that of Quest in one seed: {worst:.2f}',
    f'planted tokens hold {usual.planted.mean():.3f} of the dense attention, and '
    f'{strong.planted.mean():.3f} where they are planted 8 times as strong']


def record(result: Result) -> dict[str, Any]:
  """JSON values: protocol and figures per seed."""
  mean = lambda x: np.mean(x, axis=1).tolist()
  return dict(
    num_seeds=result.num_seeds, stream=dataclasses.asdict(result.stream),
    needles=dataclasses.asdict(result.needles), tokens=TOKENS, blocks=BLOCKS,
    cases={name: dict(error={a: mean(x) for a, x in t.error.items()},
                      mass={a: mean(x) for a, x in t.mass.items()}, new=mean(t.new),
                      planted=mean(t.planted)) for name, t in result.cases.items()},
    recall={arm: x.tolist() for arm, x in result.recall.items()})


def panels(result: Result) -> dict[str, dict[str, np.ndarray]]:
  """Attention mass by step; by blocks where their bounds are loose; accuracy by blocks."""
  arms = QUEST, LABELS, SYNC, STALE  # of one colour each in all panels
  blocks = sorted((*OTHER, BLOCKS))
  many = lambda arm, n: result.recall[
    f'{arm}, {n} blocks' if n in OTHER and arm in (SYNC, STALE) else arm]
  usual = result.cases['512 tokens'].mass
  loose = {arm: np.stack([result.cases[noisy(n)].mass[arm].mean(1) for n in NOISY], axis=1)
           for arm in arms}
  recalled = {arm: np.stack([many(arm, n) for n in blocks], axis=1) for arm in (*arms, 'dense')}
  return {'mass, 512 of 16384 tokens': {arm: usual[arm] for arm in (*arms, WINDOW)},
          LOOSE: loose, RECALL: recalled}


def ticks(_: Result) -> dict[str, tuple[int, ...]]:
  """Blocks of the panels that go by them."""
  return {LOOSE: NOISY, RECALL: tuple(sorted((*OTHER, BLOCKS)))}
