"""Tokens/s of sampling beside Tunix 0.1.7 and transformers 5.23 on the same model, as ratios.

  python -m experiments.bench_rollout --preset=tiny --peer_python=.venv-tunix/bin/python \\
    --transformers_python=.venv-torch/bin/python
The virtualenvs of the peers; each may be left out:
  python3.11 -m venv .venv-tunix
  .venv-tunix/bin/pip install google-tunix==0.1.7 jax==0.10.2 flax==0.12.8
  python3.11 -m venv .venv-torch
  .venv-torch/bin/pip install torch==2.13.0 transformers==5.23.0
All sides sample at temperature 1 without filters, in float32, and draw exactly prompts * group *
new_tokens tokens. A ratio is a peer's seconds over ours.
'call', with log-probs recorded. Ours: `decode.generate` on padded prompt ids, until tokens and
log-probs are on the host. Tunix: `Sampler.__call__` on the prompts as strings of ids, `group` times
each, until token lists and log-probs are back, with its tokenising, state set-up and unpadding.
transformers: `generate` on left-padded ids with `group` samples of each, its logits kept, until the
log-probs of the tokens are gathered.
'compiled', the programs alone. Ours: generate; Tunix: prefill and decode, jitted. transformers
compiles nothing: `generate` with no log-probs kept, which is less work than that of the others.
'first': 'call' in a fresh process, from a sampler just constructed to the end of its first call,
with all compilation and without the persistent compilation cache; not counted are imports and the
making of the model. Ours runs in a process of its own, too, `--firsts` times on each side.
"""

from __future__ import annotations

import functools
import multiprocessing
import pathlib
from concurrent import futures

import jax
import numpy as np
from absl import flags

from experiments import bench_common as common
from zppo_jax.core import types
from zppo_jax.models import params as params_lib
from zppo_jax.sampling import decode
from zppo_jax.sampling import score as score_lib

TRANSFORMERS = 'transformers'
WORKERS = {common.TUNIX: common.WORKER,
           TRANSFORMERS: pathlib.Path(__file__).with_name('bench_transformers.py')}
GAP = 1e-4  # nats between a sampler's log-prob and our scorer's

_score = jax.jit(score_lib.score, static_argnames=('config', 'window', 'chunk'))


def gap(config, params, rollout: types.Rollout, logp: np.ndarray, window: int) -> float:
  """Largest |log-prob of a sampler - ours by the scorer| over the sampled tokens; NaN shows."""
  scored = _score(config, params, rollout, window=window)
  mask = np.asarray(rollout.loss_mask)
  return float(np.max(np.abs(np.asarray(scored.logp) - logp)[mask]))


def rows_of(spec: common.Spec, prompts: decode.Prompts, responses: np.ndarray) -> types.Rollout:
  """Rollout of given responses [N, R], for the scorer."""
  rows, size = responses.shape[0], spec.prompt_tokens + spec.new_tokens
  start = np.repeat(prompts.length, spec.group)[:, None]
  column = np.arange(size)[None]
  tokens = np.pad(np.repeat(prompts.tokens, spec.group, axis=0), ((0, 0), (0, spec.new_tokens)))
  mask = (column >= start) & (column < start + spec.new_tokens)
  tokens[mask] = responses.reshape(-1)
  used = (column < start + spec.new_tokens).astype(np.int32)
  zeros = np.zeros(rows, np.int32)
  return types.Rollout(
    tokens=tokens, segment_ids=used, positions=used * column, loss_mask=mask,
    behavior_logp=np.zeros((rows, size), np.float32), version=0 * used, turn_id=0 * used,
    group_id=np.repeat(prompts.group_id, spec.group), traj_id=np.arange(rows, dtype=np.int32),
    traj_tokens=mask.sum(1).astype(np.float32), role_id=zeros, kind=zeros, question_id=zeros,
    reward=zeros.astype(np.float32), status=zeros, valid=np.ones(rows, bool))


class Ours:
  """Our sampler on the spec's prompts."""

  def __init__(self, spec: common.Spec):
    self.spec, self.config = spec, common.model_config(spec)
    self.params = jax.block_until_ready(
      params_lib.init(self.config, jax.random.key(spec.seed)))  # no part of the first call
    self.prompts = common.make_prompts(spec)
    self._settings = decode.Settings(spec.new_tokens, (common.UNREACHABLE,), spec.group)
    self._seed = 0

  def run(self) -> dict[str, float]:
    """One timed call; the rollout stays in `self.rollout`."""
    self._seed += 1
    key = jax.random.key(self._seed)
    compiled, self.rollout = common.seconds(lambda: decode.generate(
      self.config, self.params, self.prompts, key=key, settings=self._settings))
    fetch, _ = common.seconds(lambda: jax.device_get(
      (self.rollout.tokens, self.rollout.loss_mask, self.rollout.behavior_logp)))
    return {'call': compiled + fetch, 'compiled': compiled}

  def tokens(self) -> int:
    return self.spec.prompts * self.spec.group * self.spec.new_tokens

  def describe(self) -> str:
    s = self.spec
    return (f'{s.prompts} prompts x {s.group} samples x {s.new_tokens} new tokens, prompt bucket '
            f'{s.prompt_tokens}, {params_lib.count(self.config):,} parameters, float32')

  def checks(self) -> list[common.Check]:
    """Of the last rollout: our log-probs, and how many tokens there are."""
    rollout, spec = self.rollout, self.spec
    return [
      common.Check('our sampler against our scorer, max |gap| in nats',
                   gap(self.config, self.params, rollout, np.asarray(rollout.behavior_logp),
                       spec.new_tokens), GAP),
      common.Check('our tokens, missing', self.tokens() - int(np.sum(rollout.loss_mask)), 0)]


class Theirs:
  """A peer's sampler on the same weights and prompts."""

  def __init__(self, ours: Ours, python: str, name: str = common.TUNIX):
    prompts, self._name = ours.prompts, name
    self.peer = common.Peer(python, 'rollout', ours.spec, common.named_weights(ours.params) | {
      'prompts': prompts.tokens, 'prompt_length': prompts.length}, WORKERS[name])
    self._ours, self._seed = ours, 0

  def run(self) -> dict[str, float]:
    self._seed += 1
    found = self.peer.ask(seed=self._seed)
    self._samples = found.pop('samples')
    self.peer.facts |= found.pop('facts', {})
    return found

  def checks(self) -> list[common.Check]:
    """Of the last call: our scorer finds its log-probs, so it is one model; equal counts."""
    ours, spec = self._ours, self._ours.spec
    with np.load(self._samples) as arrays:
      tokens, logp = arrays['tokens'], arrays['logp']
    count = common.Check(f'{self._name} tokens, missing', abs(ours.tokens() - tokens.size), 0)
    common.require([count])  # otherwise there are no rows to score
    rollout = rows_of(spec, ours.prompts, tokens)
    placed = np.zeros(rollout.tokens.shape)
    placed[rollout.loss_mask] = logp.reshape(-1)
    size = abs(self.peer.facts['num_params'] - params_lib.count(ours.config))
    return [
      common.Check(f'{self._name} sampler against our scorer, max |gap| in nats', gap(
        ours.config, ours.params, rollout, placed, spec.new_tokens), GAP),
      common.Check(f'{self._name} parameters, difference', size, 0), count]


def our_first_call(spec: common.Spec) -> dict[str, float]:
  """Seconds of our sampler's first call; means something in a process that has run nothing."""
  jax.config.update('jax_enable_compilation_cache', False)
  return Ours(spec).run()


def first_calls(ours: Ours, pythons: dict[str, str], repeats: int) -> common.Timings:
  """Seconds of the first call, in turn and each in a fresh process. Raises common.Refused."""
  def fresh():
    spawn = multiprocessing.get_context('spawn')  # a fork would inherit what is compiled
    with futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
      return pool.submit(our_first_call, ours.spec).result()

  def peer(name: str):
    theirs = Theirs(ours, pythons[name], name)
    try:
      found = theirs.run()
      common.require(theirs.checks())
    finally:
      theirs.peer.close()
    return found

  sides = {'ours': fresh} | {name: functools.partial(peer, name) for name in pythons}
  return {'first': common.interleave(repeats, sides, parts=('call',))['call']}


def bench(spec: common.Spec, *, peer_python: str = '', transformers_python: str = '',
          firsts: int = 0, **options) -> dict:
  """Runs the bench; see common.bench for the options. Raises common.Refused on a failed check."""
  pythons = {common.TUNIX: peer_python, TRANSFORMERS: transformers_python}
  pythons = {name: python for name, python in pythons.items() if python}
  others = {name: lambda ours, name=name: Theirs(ours, pythons[name], name)
            for name in pythons if name != common.TUNIX}
  return common.bench(
    'rollout', Ours, Theirs, spec, warmups=1, peer_python=peer_python, others=others,
    after=lambda ours: first_calls(ours, pythons, firsts) if firsts else {}, **options)


if __name__ == '__main__':
  flags.DEFINE_string('transformers_python', '', 'python with torch and transformers; empty: none')
  flags.DEFINE_integer('firsts', 3, 'first calls on each side; 0: none', lower_bound=0)
  common.main(lambda spec, **options: bench(
    spec, transformers_python=flags.FLAGS.transformers_python, firsts=flags.FLAGS.firsts,
    **options))
