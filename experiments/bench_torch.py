"""Worker of bench_kernels: the chunked gated delta rule of transformers, in torch on CPU threads.

Reads a JSON line per request and answers with one; runs in a virtualenv of its own and imports
nothing of this project.
"""

import json
import os
import sys
import time

import numpy as np
import torch
import transformers
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule


def main():
  torch.set_num_threads(os.cpu_count())
  first = json.loads(sys.stdin.readline())
  arrays = {k: torch.tensor(x) for k, x in np.load(first['arrays']).items()}
  arguments = [arrays[k].requires_grad_() for k in ('q', 'key', 'value', 'decay', 'rate')]

  def rule():
    return torch_chunk_gated_delta_rule(*arguments, output_final_state=True)

  def forward():
    with torch.no_grad():
      return rule()

  def both():
    out, state = rule()
    return torch.autograd.grad((out * arrays['weight']).sum() + state.sum(), arguments)

  found = {f'd_{n}': x.numpy() for n, x in zip(('q', 'key', 'value', 'decay', 'rate'), both())}
  path = os.path.join(first['folder'], 'outputs.npz')
  np.savez(path, out=forward()[0].numpy(), **found)
  print(json.dumps(dict(torch=torch.__version__, transformers=transformers.__version__,
                        threads=torch.get_num_threads(), outputs=path)), flush=True)
  for line in sys.stdin:
    request = json.loads(line)
    start = time.perf_counter()
    {'forward': forward, 'both': both}[request['part']]()
    print(json.dumps(dict(seconds=time.perf_counter() - start)), flush=True)


if __name__ == '__main__':
  main()
