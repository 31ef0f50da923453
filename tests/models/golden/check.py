"""Checks that transformers loads what `models.save` writes, with equal logits.

  pip install torch==2.13.0 transformers==5.23.0 && python tests/models/golden/check.py

Every golden checkpoint is read, written with and without its source, and read by transformers.
"""

import os
import sys
import tempfile

import numpy as np
import torch
import transformers

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(
  os.path.abspath(__file__))))))
from make import COMPOSITE, FAMILIES, FOLDER

from zppo_jax import models


def logits(path: str, prefix: str, composite: bool, tokens: np.ndarray) -> np.ndarray:
  kind = 'ForConditionalGeneration' if composite else 'ForCausalLM'
  model, info = getattr(transformers, prefix + kind).from_pretrained(
    path, attn_implementation='eager', dtype=torch.float32, output_loading_info=True)
  problems = {k: v for k, v in info.items() if v}
  assert not problems, problems
  with torch.no_grad():
    return model.eval()(torch.tensor(tokens[None].astype(np.int64)), use_cache=False).logits.numpy()


def main():
  for name, (prefix, _) in FAMILIES.items():
    source = os.path.join(FOLDER, name)
    golden = np.load(os.path.join(source, 'golden.npz'))
    config, params = models.load(source)
    for kept in (source, None):
      with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'out')
        models.save(path, config, params, source=kept)
        found = logits(path, prefix, kept is not None and name in COMPOSITE, golden['tokens_70'])
      gap = np.abs(found - golden['logits_70']).max()
      print(f'{name:16s} {"with" if kept else "without":7s} source: largest difference {gap:.1e}')
      assert gap < 1e-5, (name, kept)


if __name__ == '__main__':
  main()
