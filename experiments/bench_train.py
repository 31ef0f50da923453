"""Tokens/s of one GRPO update on given rollouts, beside Tunix 0.1.7 on the same model, as a ratio.

  python -m experiments.bench_train --preset=tiny --peer_python=.venv-tunix/bin/python
The peer's virtualenv:
  python3.11 -m venv .venv-tunix
  .venv-tunix/bin/pip install google-tunix==0.1.7 jax==0.10.2 flax==0.12.8
Timed, ours: the jitted, state-donating step of `train.step` (forward, GRPO loss, backward, global
norm, clip, AdamW, metrics) on prepared parts. Tunix: the jitted step of its RL trainer with its
GRPO loss, from `jit_train_and_eval_step` with the cached graph, as its own loop calls it; the same
work. Outside on both sides: sampling, rewards, advantages. Neither has a reference or an
old-log-prob pass (no KL, one iteration, so old = stop_gradient(new) on both). One mini-batch of all
rows, float32, no remat. 'call' and 'compiled' are both one call of the step, until it is done.
Tokens: prompt and response, without padding.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench_common as common
from zppo_jax.methods import grpo
from zppo_jax.models import params as params_lib
from zppo_jax.sampling import decode
from zppo_jax.train import prepare, state, step

CHUNK = 4096  # that of the :tiny configs


class Ours:
  """Our train step on a batch that our sampler drew; rewards are random."""

  def __init__(self, spec: common.Spec):
    self.spec, self.config = spec, common.model_config(spec)
    self.params = params_lib.init(self.config, jax.random.key(spec.seed))
    self.prompts = common.make_prompts(spec)
    reward = np.random.default_rng(spec.seed).integers(0, 2, spec.prompts * spec.group)
    self.reward = reward.astype(np.float32)
    rollout = decode.generate(
      self.config, self.params, self.prompts, key=jax.random.key(spec.seed),
      settings=decode.Settings(spec.new_tokens, (common.UNREACHABLE,), spec.group))
    self.rollout = dataclasses.replace(rollout, reward=jnp.asarray(self.reward))
    method = grpo.build(grpo.Config(num_new=spec.prompts, group_size=spec.group,
                                    eps_low=spec.epsilon, eps_high=spec.epsilon))
    settings = step.StepSettings(window=spec.new_tokens, chunk=CHUNK)
    optimizer = state.make_optimizer(state.Optim(
      learning_rate=spec.learning_rate, weight_decay=spec.weight_decay, clip_norm=spec.clip_norm))
    create = jax.jit(lambda policy: state.create(self.config, method, optimizer, seed=spec.seed,
                                                 policy=policy))
    self._state = create(self.params)
    ready = jax.jit(prepare.make_prepare(self.config, method, settings, {}), static_argnums=5)
    _, self._parts = ready(self._state.params, (), (self.rollout,), jax.random.key(0), {},
                           (spec.group,))
    self._update = jax.jit(step.make_train_step(self.config, method, optimizer, settings),
                           donate_argnums=0)
    self.metrics: list[dict[str, float]] = []

  def run(self) -> dict[str, float]:
    """One timed update; its metrics are appended to `self.metrics`."""
    took, (self._state, metrics) = common.seconds(
      lambda: self._update(self._state, self._parts, {}))
    self.metrics.append({k: float(v) for k, v in metrics.items()})
    return {'call': took, 'compiled': took}

  def tokens(self) -> int:
    return int(np.sum(self.rollout.segment_ids > 0))

  def describe(self) -> str:
    return (f'one GRPO update of {self.spec.prompts} x {self.spec.group} rows, {self.tokens():,} '
            f'tokens, {params_lib.count(self.config):,} parameters, float32')

  def checks(self) -> list[common.Check]:
    """Of the first update: the rollout's log-probs, and that every update was made."""
    first = self.metrics[0]
    return [
      common.Check('our sampler against the train step, max |gap| in nats',
                   first['mismatch/abs_max'], 1e-4),
      common.Check('our updates, skipped or not finite',
                   sum(m['nonfinite_max'] + m['update/skipped_frac'] for m in self.metrics), 0)]


class Theirs:
  """The peer's train step on the same weights and rollouts."""

  def __init__(self, ours: Ours, python: str):
    spec, prompts = ours.spec, ours.prompts
    left = np.full((spec.prompts, spec.prompt_tokens), -1, np.int32)
    for row, ids in zip(left, common.prompt_ids(prompts)):
      row[-len(ids):] = ids
    mask = np.asarray(ours.rollout.loss_mask)
    response = np.asarray(ours.rollout.tokens)[mask].reshape(-1, spec.new_tokens)
    self.peer = common.Peer(python, 'train', spec, common.named_weights(ours.params) | {
      'prompt_ids': np.repeat(left, spec.group, axis=0), 'completion_ids': response,
      'reward': ours.reward})
    self._ours = ours
    self.metrics: list[dict[str, float]] = []

  def run(self) -> dict[str, float]:
    self.metrics.append(self.peer.ask(seed=0))
    return self.metrics[-1]

  def checks(self) -> list[common.Check]:
    """The first two updates agree: the second one's gradient depends on the first one's AdamW."""
    found = []
    for i, bound in enumerate((1e-3, 1e-2)):
      ours, theirs = self._ours.metrics[i], self.metrics[i]
      relative = abs(theirs['grad_norm'] / ours['grad_norm'] - 1)
      found += [common.Check(f'gradient norm of update {i}, relative gap', relative, bound),
                common.Check(f'entropy at update {i}, gap in nats',
                             abs(theirs['entropy'] - ours['entropy']), 1e-4)]
    size = abs(self.peer.facts['num_params'] - params_lib.count(self._ours.config))
    return [*found, common.Check('parameters, difference', size, 0)]


def bench(spec: common.Spec, **options) -> dict:
  """Runs the bench; see common.bench for the options. Raises common.Refused on a failed check."""
  return common.bench('train', Ours, Theirs, spec, warmups=2, **options)


if __name__ == '__main__':
  common.main(bench)
