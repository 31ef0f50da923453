"""The Tunix side of bench_rollout and bench_train; runs in Tunix's own virtualenv.

  python3.11 -m venv .venv-tunix
  .venv-tunix/bin/pip install google-tunix==0.1.7 jax==0.10.2 flax==0.12.8
Knows nothing of zppo_jax: the first line on stdin names the kind ('rollout' or 'train'), the spec
and an npz file with weights and inputs; every further line asks for one timed run; each answer is
one JSON line on stdout. Started by bench_common.Peer.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler as sampler_lib
from tunix.models.qwen3 import model as qwen3
from tunix.rl import algo_core, function_registry, trainer
from tunix.rl.grpo import grpo_learner
from tunix.sft import peft_trainer

PAD, EOS = -1, -1  # no id of the vocabulary: nothing is cut short and nothing is masked by accident


class IdTokenizer:
  """'5 17 3' <-> [5, 17, 3]: the sampler takes strings only."""

  def encode(self, text: str) -> list[int]:
    return [int(x) for x in text.split()]

  def decode(self, ids: list[int]) -> str:
    return ' '.join(map(str, ids))

  def bos_id(self) -> None:
    return None

  def eos_id(self) -> int:
    return EOS

  def pad_id(self) -> int:
    return PAD


def make_model(spec: dict, arrays) -> qwen3.Qwen3:
  """Tunix's Qwen3 with the given weights, float32, no remat."""
  config = qwen3.ModelConfig(
    num_layers=spec['layers'], vocab_size=spec['vocab'], embed_dim=spec['hidden'],
    hidden_dim=spec['inter'], num_heads=spec['heads'], head_dim=spec['head_dim'],
    num_kv_heads=spec['kv_heads'], rope_theta=int(spec['rope_theta']), norm_eps=spec['norm_eps'],
    use_tied_embedding=True)
  model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))

  def put(param, value):
    if param.shape != value.shape:
      raise ValueError(f'weights: shape {value.shape} does not fit {param.shape}')
    param.value = jnp.asarray(value)

  put(model.embedder.input_embedding, arrays['embed'])
  put(model.final_norm.w, arrays['final_norm'])
  for i, layer in enumerate(model.layers):
    attention, mlp = layer.attn, layer.mlp
    for name, param in {
        'mixer_norm': layer.input_layernorm.w, 'mlp_norm': layer.post_attention_layernorm.w,
        'query': attention.q_proj.w, 'key': attention.k_proj.w, 'value': attention.v_proj.w,
        'out': attention.o_proj.w, 'query_norm': attention.q_norm.w, 'key_norm': attention.k_norm.w,
        'gate': mlp.gate_proj.kernel, 'up': mlp.up_proj.kernel, 'down': mlp.down_proj.kernel,
    }.items():
      put(param, arrays[name][i])
  return model


class Rollout:
  """Tunix's vanilla sampler on every prompt `group` times, as its GRPO learner calls it."""

  def __init__(self, spec: dict, model: qwen3.Qwen3, arrays, folder: str):
    self._spec, self._path, self._compiled = spec, os.path.join(folder, 'samples.npz'), 0.0
    rows = [row[:n] for row, n in zip(arrays['prompts'], arrays['prompt_length'])]
    self._texts = [' '.join(map(str, row)) for row in rows for _ in range(spec['group'])]
    self._sampler = sampler_lib.Sampler(
      model, IdTokenizer(),
      sampler_lib.CacheConfig(spec['prompt_tokens'] + spec['new_tokens'], spec['layers'],
                              spec['kv_heads'], spec['head_dim']))
    for name in ('_compiled_prefill_fn', '_compiled_decode_fn'):
      setattr(self._sampler, name, self._timed(getattr(self._sampler, name)))

  def _timed(self, fn):
    def call(*args, **kwargs):
      start = time.perf_counter()
      out = jax.block_until_ready(fn(*args, **kwargs))
      self._compiled += time.perf_counter() - start
      return out

    return call

  def run(self, seed: int) -> dict:
    self._compiled = 0.0
    start = time.perf_counter()
    out = self._sampler(
      self._texts, max_generation_steps=self._spec['new_tokens'],
      max_prompt_length=self._spec['prompt_tokens'], temperature=1.0, top_p=1.0, top_k=None,
      seed=seed, return_logprobs=True)
    call = time.perf_counter() - start
    np.savez(self._path, tokens=np.stack(out.tokens), logp=np.asarray(out.logprobs))
    return {'call': call, 'compiled': self._compiled, 'samples': self._path}


class Train:
  """The jitted train step of Tunix's RL trainer with its GRPO loss, wired as GRPOLearner does."""

  def __init__(self, spec: dict, model: qwen3.Qwen3, arrays, folder: str):
    del folder
    config = grpo_learner.GRPOConfig(num_generations=spec['group'], beta=0.0,
                                     epsilon=spec['epsilon'])
    config.temperature = 1.0  # GRPOLearner sets it from the rollout config
    optimizer = optax.chain(
      optax.clip_by_global_norm(spec['clip_norm']),
      optax.adamw(spec['learning_rate'], b1=0.9, b2=0.999, eps=1e-8,
                  weight_decay=spec['weight_decay']))
    actor = trainer.Trainer(model, optimizer, peft_trainer.TrainingConfig(eval_every_n_steps=10**9),
                            custom_checkpoint_metadata_fn=dict)
    loss = function_registry.get_policy_loss_fn(config.policy_loss_fn)
    actor.with_loss_fn(
      lambda model, train_example, algo_config: loss(
        model, train_example, algo_config=config, pad_id=PAD, eos_id=EOS), has_aux=True)
    actor.with_gen_model_input_fn(lambda x: {'train_example': x, 'algo_config': config})
    self._step, _ = actor.jit_train_and_eval_step(cache_nnx_graph=True)  # as Trainer.train does
    advantages = algo_core.compute_advantages(arrays['reward'], spec['group'])
    prompt, completion = jnp.asarray(arrays['prompt_ids']), jnp.asarray(arrays['completion_ids'])
    self._example = grpo_learner.TrainExample(
      prompt_ids=prompt, prompt_mask=prompt != PAD, completion_ids=completion,
      completion_mask=completion != PAD, ref_per_token_logps=None,
      advantages=jax.device_put(advantages), old_per_token_logps=None)

  def run(self, seed: int) -> dict:
    del seed
    start = time.perf_counter()
    loss, aux, norm = jax.block_until_ready(self._step(self._example))
    took = time.perf_counter() - start
    return {'call': took, 'compiled': took, 'loss': float(loss), 'grad_norm': float(norm),
            'entropy': float(aux['entropy'])}


KINDS = {'rollout': Rollout, 'train': Train}


def main() -> None:
  answer = os.fdopen(os.dup(1), 'w')  # libraries that print to stdout must not reach the driver
  os.dup2(2, 1)

  def say(**facts):
    answer.write(json.dumps(facts) + '\n')
    answer.flush()

  first = json.loads(sys.stdin.readline())
  arrays = np.load(first['arrays'])
  model = make_model(first['spec'], arrays)
  params = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
  worker = KINDS[first['kind']](first['spec'], model, arrays, first['folder'])
  version = importlib.metadata.version
  say(num_params=int(params), tunix=version('google-tunix'), jax=jax.__version__,
      flax=version('flax'), optax=version('optax'), platform=jax.default_backend())
  for line in sys.stdin:
    say(**worker.run(json.loads(line)['seed']))


if __name__ == '__main__':
  main()
