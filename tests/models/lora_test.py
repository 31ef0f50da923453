"""Low-rank adapters: what they add, that gradients reach them alone, and their files."""

import functools
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax import models
from zppo_jax.core import trees
from zppo_jax.core.errors import UserError
from zppo_jax.models import decoder, lora, safetensors

COSTLY = {'test_merging_adds_the_product_to_the_published_matrix': ('glm4_moe_lite', 'qwen3_5')}
GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'golden')


def loaded(name):
  return models.load(os.path.join(GOLDEN, name))


def drawn(config, seed=0, rank=3, targets=None):
  """Adapters that change something."""
  factors = lora.init(config, jax.random.key(seed), rank, targets)
  return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed + 1), x.shape),
                      factors)


@pytest.mark.parametrize('name', ['qwen3', 'qwen3_5', 'glm4_moe_lite', 'kimi_linear', 'gemma2'])
def test_merging_adds_the_product_to_the_published_matrix(name, tmp_path):
  """Through the files: saved with and without, every matrix differs by (alpha / rank) B A."""
  config, params = loaded(name)
  factors = drawn(config)
  merged = lora.merge(config, params, factors, alpha=6.0)
  for part, tree in (('base', params), ('merged', merged)):
    models.save(str(tmp_path / part), config, tree, source=os.path.join(GOLDEN, name))
  lora.save(str(tmp_path / 'adapter'), config, factors, alpha=6.0, base='tiny')
  base, after = (safetensors.open_folder(str(tmp_path / p)) for p in ('base', 'merged'))
  adapter = safetensors.header(str(tmp_path / 'adapter' / lora.WEIGHTS))
  prefix = 'model.language_model.' if name == 'qwen3_5' else 'model.'
  changed = set()
  for key in adapter:
    if key.endswith('lora_A.weight'):
      a, b = adapter[key].read(), adapter[key.replace('lora_A', 'lora_B')].read()
      own = key.removeprefix('base_model.model.model.').replace('.lora_A', '')
      changed.add(prefix + own)
      np.testing.assert_allclose(after[prefix + own].read() - base[prefix + own].read(),
                                 2.0 * b @ a, atol=1e-5, err_msg=own)
  same = base.keys() - changed
  assert changed and all(np.array_equal(base[k].read(), after[k].read()) for k in same)


def test_fresh_adapters_change_nothing_and_take_all_the_gradient():
  config, params = loaded('qwen3_next')
  factors = lora.init(config, jax.random.key(0), 2)
  tokens = np.arange(3, 15, dtype=np.int32)[None]

  merge = functools.partial(lora.merge, config, params, alpha=2.0)
  logits = jax.jit(lambda p: decoder.forward(config, p, tokens).logits)
  np.testing.assert_array_equal(logits(merge(factors)), logits(params))
  grads = jax.jit(jax.grad(lambda f: jnp.sum(logits(merge(f))**2)))(factors)
  grads = trees.named_leaves(grads)
  assert all((np.abs(g).max() > 0) == k.endswith('.b') for k, g in grads.items())


def test_an_adapter_folder_reads_back(tmp_path):
  config, _ = loaded('qwen3_5')
  factors = drawn(config, targets=('q_proj', 'in_proj_qkv', 'down_proj'))
  lora.save(str(tmp_path / 'adapter'), config, factors, alpha=8.0)
  found, alpha = lora.read(str(tmp_path / 'adapter'), config)
  assert alpha == 8.0 and found.keys() == factors.keys()
  for key in factors:
    jax.tree.map(np.testing.assert_array_equal, found[key], factors[key])
  written = json.loads((tmp_path / 'adapter' / lora.CONFIG).read_text())
  pattern = re.compile(written['target_modules'])
  assert pattern.fullmatch('model.layers.12.linear_attn.in_proj_qkv') and written['r'] == 3
  assert not pattern.fullmatch('model.layers.0.mlp.experts.3.down_proj')
  other, _ = loaded('qwen3')
  with pytest.raises(UserError, match='0.linear_attn.in_proj_qkv: the model has no such matrix'):
    lora.read(str(tmp_path / 'adapter'), other)
  with pytest.raises(UserError, match='exists'):
    lora.save(str(tmp_path / 'adapter'), config, factors, alpha=8.0)


def test_bad_arguments_are_named():
  config, _ = loaded('llama')
  assert lora.modules(config) == ['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj',
                                  'up_proj', 'v_proj']
  with pytest.raises(ValueError, match=r"unknown \['c_attn'\]; this model has .*q_proj"):
    lora.abstract(config, 4, ('c_attn',))
  with pytest.raises(ValueError, match='rank must be at least 1, got 0'):
    lora.abstract(config, 0)
