"""The transformers side of bench_rollout: `generate` on the same weights, in its own virtualenv.

  python3.11 -m venv .venv-torch
  .venv-torch/bin/pip install torch==2.13.0 transformers==5.23.0
Knows nothing of zppo_jax; the protocol is that of bench_tunix.py. Whatever the API leaves open is
set to what is fast on a CPU: sdpa (on 2 cores 1.2 to 1.4 times as fast as eager), no logits
processor, no end-of-sequence test, and after the first call, which has torch's thread per core, one
thread where that is faster. On a busy machine set OMP_WAIT_POLICY=passive for the whole bench:
otherwise torch's threads spin for a core that they do not get, up to ten times as long.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np
import torch
import transformers

ATTENTION = 'sdpa'


def make_model(spec: dict, arrays) -> transformers.Qwen3ForCausalLM:
  """Qwen3 with the given weights; torch keeps [out, in] and joins the heads."""
  config = transformers.Qwen3Config(
    vocab_size=spec['vocab'], hidden_size=spec['hidden'], intermediate_size=spec['inter'],
    num_hidden_layers=spec['layers'], num_attention_heads=spec['heads'],
    num_key_value_heads=spec['kv_heads'], head_dim=spec['head_dim'],
    rms_norm_eps=spec['norm_eps'], tie_word_embeddings=True,
    max_position_embeddings=spec['prompt_tokens'] + spec['new_tokens'],
    rope_parameters={'rope_type': 'default', 'rope_theta': spec['rope_theta']},
    attn_implementation=ATTENTION, dtype=torch.float32)
  model = transformers.Qwen3ForCausalLM(config).eval()
  state = {'model.embed_tokens.weight': arrays['embed'], 'model.norm.weight': arrays['final_norm']}
  for i in range(spec['layers']):
    at, attention, mlp = (f'model.layers.{i}.{x}' for x in ('', 'self_attn.', 'mlp.'))
    state |= {at + 'input_layernorm.weight': arrays['mixer_norm'][i],
              at + 'post_attention_layernorm.weight': arrays['mlp_norm'][i]}
    for short, name in (('q', 'query'), ('k', 'key'), ('v', 'value')):
      state[f'{attention}{short}_proj.weight'] = arrays[name][i].reshape(spec['hidden'], -1).T
    state[attention + 'o_proj.weight'] = arrays['out'][i].reshape(-1, spec['hidden']).T
    for short, name in (('q', 'query_norm'), ('k', 'key_norm')):
      state[f'{attention}{short}_norm.weight'] = arrays[name][i]
    for name in ('gate', 'up', 'down'):
      state[f'{mlp}{name}_proj.weight'] = arrays[name][i].T
  state['lm_head.weight'] = state['model.embed_tokens.weight']
  model.load_state_dict({k: torch.tensor(np.ascontiguousarray(x)) for k, x in state.items()})
  return model


class Rollout:
  """`generate` on left-padded prompts, `group` samples of each."""

  def __init__(self, spec: dict, model: transformers.Qwen3ForCausalLM, arrays, folder: str):
    self._model, self._path = model, os.path.join(folder, 'samples.npz')
    length, size = arrays['prompt_length'], spec['prompt_tokens']
    left = [np.roll(row, size - n) for row, n in zip(arrays['prompts'], length)]
    mask = np.arange(size)[None] >= size - length[:, None]
    self._inputs = dict(input_ids=torch.tensor(np.stack(left), dtype=torch.long),
                        attention_mask=torch.tensor(mask, dtype=torch.long))
    self._size, self._calls = size, 0
    # No end-of-sequence id: every sample is new_tokens long, and no step has to look for it.
    self._settings = {logp: transformers.GenerationConfig(
      do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=spec['new_tokens'],
      num_return_sequences=spec['group'], pad_token_id=0, eos_token_id=None,
      return_dict_in_generate=logp, output_logits=logp) for logp in (True, False)}

  @torch.inference_mode()
  def _generate(self, seed: int, logp: bool) -> tuple[float, np.ndarray, np.ndarray | None]:
    """(seconds, tokens, log-probs or None) of one call."""
    torch.manual_seed(seed)
    start, found = time.perf_counter(), None
    out = self._model.generate(**self._inputs, generation_config=self._settings[logp])
    tokens = (out.sequences if logp else out)[:, self._size:]
    if logp:
      found = torch.stack([x.log_softmax(-1).gather(-1, t[:, None])[:, 0]
                           for x, t in zip(out.logits, tokens.T)], dim=1).numpy()
    return time.perf_counter() - start, tokens.numpy(), found

  def _choose_threads(self) -> None:
    """One thread or one per core, whichever is faster; on a busy machine more threads wait."""
    took = {}
    for threads in (1, os.cpu_count()):
      torch.set_num_threads(threads)
      took[threads] = min(self._generate(0, logp=True)[0] for _ in range(2))
    torch.set_num_threads(min(took, key=took.get))

  def run(self, seed: int) -> dict:
    """'call' records log-probs, as ours does; 'compiled', with nothing to compile, does not."""
    self._calls += 1
    if self._calls == 2:
      self._choose_threads()
    call, tokens, logp = self._generate(seed, logp=True)
    bare, again, _ = self._generate(seed, logp=False)
    if not np.array_equal(tokens, again):
      raise ValueError('the timed calls of one seed must draw the same tokens')
    np.savez(self._path, tokens=tokens, logp=logp)
    return {'call': call, 'compiled': bare, 'samples': self._path,
            'facts': {'threads': torch.get_num_threads()}}


def main() -> None:
  answer = os.fdopen(os.dup(1), 'w')  # libraries that print to stdout must not reach the driver
  os.dup2(2, 1)

  def say(**facts):
    answer.write(json.dumps(facts) + '\n')
    answer.flush()

  torch.set_num_threads(os.cpu_count())
  first = json.loads(sys.stdin.readline())
  with np.load(first['arrays']) as arrays:
    model = make_model(first['spec'], arrays)
    worker = Rollout(first['spec'], model, arrays, first['folder'])
  say(num_params=sum(x.numel() for x in model.parameters()), torch=torch.__version__,
      transformers=transformers.__version__, attention=ATTENTION)
  for line in sys.stdin:
    say(**worker.run(json.loads(line)['seed']))


if __name__ == '__main__':
  main()
