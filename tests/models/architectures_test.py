"""Published shapes, readings of config.json, refusals, gradients, and meshes with experts."""

import copy
import dataclasses
import functools
import json
import os
import shutil
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax import models
from zppo_jax.core import trees
from zppo_jax.core.errors import UserError
from zppo_jax.mesh import place
from zppo_jax.models import decoder, flops, hf_config, mlps, presets, safetensors
from zppo_jax.models import params as params_lib
from zppo_jax.models.config import Moe
from zppo_jax.models.stages import find_stages

load_lib = sys.modules['zppo_jax.models.load']  # the package has a function of this name
GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'golden')
BILLIONS = {
  'qwen3-0.6b': 0.596, 'qwen3-1.7b': 1.721, 'qwen3-4b': 4.022, 'qwen3-8b': 8.191,
  'qwen3-14b': 14.77, 'qwen3-32b': 32.76, 'qwen3-30b-a3b': 30.53, 'qwen3.5-0.8b': 0.7524,
  'qwen3.5-2b': 1.882, 'qwen3.5-4b': 4.206, 'qwen3.5-9b': 8.954, 'qwen3.5-27b': 26.90,
  'qwen3.5-35b-a3b': 34.66, 'qwen3-next-80b-a3b': 79.67, 'llama-3.2-1b': 1.236,
  'llama-3.2-3b': 3.213, 'llama-3.1-8b': 8.030, 'gemma-2-2b': 2.614, 'gemma-2-9b': 9.242,
  'gemma-2-27b': 27.23, 'glm-4.7-flash': 29.94, 'kimi-linear-48b-a3b': 49.12}


def given(name):
  with open(os.path.join(GOLDEN, name, 'config.json'), encoding='utf-8') as f:
    return json.load(f)


@pytest.mark.parametrize('name', sorted(BILLIONS))
def test_published_shapes_have_the_published_number_of_parameters(name):
  config = models.ModelConfig(**presets.PRESETS[name])
  assert params_lib.count(config) / 1e9 == pytest.approx(BILLIONS[name], rel=5e-4)
  assert len(config.slots) <= 7, 'layers must be scanned'


@pytest.mark.parametrize('name', ['qwen3-8b', 'llama-3.2-1b', 'gemma-2-9b', 'qwen3.5-9b',
                                  'glm-4.7-flash', 'kimi-linear-48b-a3b', 'qwen3-30b-a3b'])
def test_operations_are_two_for_every_weight_that_a_token_passes(name):
  config = models.ModelConfig(**presets.PRESETS[name])
  weights = params_lib.count(config) - (0 if config.tied else config.vocab * config.hidden)
  if config.moe:
    idle = config.moe.experts - config.moe.top_k
    mixtures = sum(mlp == 'moe' for _, mlp in config.kinds)
    weights -= 3 * config.hidden * config.moe.inter * idle * mixtures
  states = sum(mixer in ('gdn', 'kda') for mixer, _ in config.kinds) * 7 * (
    config.linear_value_heads * config.linear_key_dim * config.linear_value_dim)
  assert flops.forward(config, 0) - states == pytest.approx(2 * weights, rel=2e-3)
  longer = flops.forward(config, 8192) - flops.forward(config, 0)
  assert 0 < longer < 0.5 * flops.forward(config, 0) + 1e10


def test_every_published_preset_is_counted():
  assert set(presets.PRESETS) - {'hybrid_tiny'} == set(BILLIONS)


@pytest.mark.parametrize('kinds, expected', [
  ('aaaaaa', [('a', 6)]), ('abababab', [('ab', 4)]), ('aaabaaab', [('aaab', 2)]),
  ('daaaa', [('d', 1), ('a', 4)]), ('kkkmkkkmkkkmkkm', [('kkkm', 3), ('k', 2), ('m', 1)]),
  ('abc', [('abc', 1)]), ('a', [('a', 1)])])
def test_layers_are_cut_into_repeated_patterns(kinds, expected):
  stages = find_stages(tuple((k, 'dense') for k in kinds))
  assert [(''.join(s.mixer for s in stage.slots), stage.repeats) for stage in stages] == expected
  layers = [layer for stage in stages for slot in stage.slots for layer in slot.layers]
  assert sorted(layers) == list(range(len(kinds)))
  for stage in stages:
    for slot in stage.slots:
      assert all(kinds[layer] == slot.mixer for layer in slot.layers)
      assert len(slot.layers) == slot.repeats


def test_old_and_new_configs_read_the_same():
  new = given('llama')
  old = {k: v for k, v in new.items() if k not in ('rope_parameters', 'head_dim', 'dtype')}
  rope = dict(new['rope_parameters'])
  old |= dict(rope_theta=rope.pop('rope_theta'), head_dim=16, torch_dtype='float32',
              rope_scaling={'type': rope.pop('rope_type'), **rope})
  assert hf_config.from_json(old) == hf_config.from_json(new)
  moe = given('qwen3_moe')
  renamed = {k: v for k, v in moe.items() if k != 'num_local_experts'}
  assert hf_config.from_json(renamed | {'num_experts': 6}) == hf_config.from_json(moe)
  kimi = given('kimi_linear')
  listed = {k: v for k, v in kimi.items() if k not in (
    'layer_types', 'mlp_layer_types', 'linear_num_heads', 'linear_head_dim')}
  assert hf_config.from_json(listed) == hf_config.from_json(kimi)


def test_defaults_of_absent_keys():
  bare = {k: v for k, v in given('qwen3_5')['text_config'].items() if k != 'layer_types'}
  bare |= {'model_type': 'qwen3_5_text', 'num_hidden_layers': 8}
  assert hf_config.from_json(bare).mixers == ('gdn', 'gdn', 'gdn', 'full') * 2
  gemma = {k: v for k, v in given('gemma2').items() if k not in ('layer_types',
                                                                'tie_word_embeddings')}
  found = hf_config.from_json(gemma)
  assert found.tied and found.mixers == ('sliding', 'full', 'sliding')
  composite = given('qwen3_5')
  untied = copy.deepcopy(composite) | {'tie_word_embeddings': False}
  assert untied['text_config']['tie_word_embeddings'] and not hf_config.from_json(untied).tied
  bare = {k: v for k, v in given('qwen3_moe').items() if k != 'norm_topk_prob'}
  assert not hf_config.from_json(bare).moe.renormalise


@pytest.mark.parametrize('name, changes, parts', [
  ('qwen3', dict(model_type='gpt2'), ["model_type 'gpt2'", 'qwen3_5']),
  ('qwen3', dict(hidden_act='relu', attention_bias=True), ["hidden_act: 'relu'",
                                                           'attention_bias: True']),
  ('qwen3', dict(quantization_config={}), ['quantization_config']),
  ('qwen3', dict(rope_parameters=dict(rope_type='longrope', rope_theta=1e4)), ["'longrope'"]),
  ('qwen3', dict(rope_parameters=dict(rope_type='default')), ['rope_theta: missing']),
  ('qwen3', dict(hidden_size=None), ['hidden_size: missing']),
  ('qwen3', dict(num_attention_heads=3), ['heads: must be a multiple of kv_heads = 2, got 3']),
  ('qwen3', dict(layer_types=['full_attention'] * 2), ['layer_types: 2 entries for 3 layers']),
  ('qwen3_moe', dict(num_experts_per_tok=9), ['moe.top_k: must lie in 1..experts = 6, got 9']),
  ('kimi_linear', dict(mla_use_nope=False), ['mla_use_nope: False']),
  ('kimi_linear', dict(layer_types=None, linear_attn_config=dict(
    num_heads=3, head_dim=8, short_conv_kernel_size=4)), ['full_attn_layers']),
  ('glm4_moe_lite', dict(n_group=4), ['moe.groups: must divide experts = 6, got 4']),
])
def test_unsupported_configs_say_what(name, changes, parts):
  with pytest.raises(UserError) as error:
    hf_config.from_json(given(name) | changes)
  for part in parts:
    assert part in str(error.value), error.value


def broken(tmp_path, name, change):
  """A golden checkpoint with changed tensors: {name: array or None to drop}."""
  folder = tmp_path / 'broken'
  shutil.copytree(os.path.join(GOLDEN, name), folder)
  tensors = {k: np.array(t.read()) for k, t in safetensors.open_folder(str(folder)).items()}
  for key, value in change.items():
    tensors.pop(key, None)
    if value is not None:
      tensors[key] = value
  planned = {k: safetensors.Planned(safetensors.NAMES[v.dtype], v.shape, lambda v=v: v)
             for k, v in tensors.items()}
  safetensors.write_folder(str(folder), planned)
  return folder


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
  folder = broken(tmp_path, 'qwen3', {
    'model.layers.1.mlp.up_proj.weight': None, 'model.layers.0.extra': np.zeros(3, np.float32),
    'model.norm.weight': np.zeros(31, np.float32)})
  with pytest.raises(UserError) as error:
    models.load(str(folder))
  for part in ('3 tensors', 'model.layers.1.mlp.up_proj.weight: missing',
               'model.layers.0.extra: unknown', 'model.norm.weight: (31,), expected (32,)'):
    assert part in str(error.value)


def test_heads_and_values_of_a_tied_checkpoint(tmp_path):
  embed = safetensors.open_folder(os.path.join(GOLDEN, 'qwen3'))['model.embed_tokens.weight'].read()
  equal = broken(tmp_path / 'a', 'qwen3', {'lm_head.weight': np.array(embed)})
  assert models.load(str(equal))[0].tied
  other = broken(tmp_path / 'b', 'qwen3', {'lm_head.weight': 2 * embed})
  with pytest.warns(UserWarning, match='untied'):
    config, params = models.load(str(other))
  np.testing.assert_array_equal(params.head, 2 * embed.T)
  nan = broken(tmp_path / 'c', 'qwen3', {'model.norm.weight': np.full(32, np.nan, np.float32)})
  with pytest.raises(UserError, match='final_norm holds values that are not finite'):
    models.load(str(nan), check=True)


@pytest.mark.parametrize('shape', [None, dict(fsdp=2, tensor=2)])
def test_a_large_leaf_is_read_layer_by_layer(tmp_path, monkeypatch, shape):
  """The host holds at most the largest tensor and a tenth of the model at a time."""
  config = models.ModelConfig(vocab=4096, hidden=256, layers=24, heads=4, kv_heads=4, head_dim=64,
                              inter=1024, family='qwen3')
  wanted = jax.tree.map(np.asarray, models.init(config, jax.random.key(0)))
  models.save(str(tmp_path / 'model'), config, wanted)
  tensors = safetensors.open_folder(str(tmp_path / 'model')).values()
  largest, total = max(t.stop - t.start for t in tensors), sum(t.stop - t.start for t in tensors)
  assert wanted.blocks[0].mlp.gate.nbytes > largest + total / 10, 'nothing would be shown'
  monkeypatch.setattr(load_lib, 'AT_ONCE', 2**20)
  mesh = None if shape is None else place.make_mesh(shape, jax.devices()[:4])
  tracemalloc.start()
  try:
    _, params = models.load(str(tmp_path / 'model'), mesh=mesh)
    assert tracemalloc.get_traced_memory()[1] < largest + total / 10
  finally:
    tracemalloc.stop()
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), wanted)
  if mesh:
    wanted = params_lib.shardings(params_lib.abstract(config), mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, params, wanted)))


def test_broken_files_are_named(tmp_path):
  source = os.path.join(GOLDEN, 'qwen3')
  with pytest.raises(UserError, match='no config.json'):
    models.load(str(tmp_path))
  shutil.copy(os.path.join(source, 'config.json'), tmp_path)
  with pytest.raises(UserError, match='neither model.safetensors nor'):
    models.load(str(tmp_path))
  whole = open(os.path.join(source, 'model.safetensors'), 'rb').read()
  for cut, message in ((5, 'header of'), (500, 'header of'), (len(whole) - 100, 'truncated')):
    (tmp_path / 'model.safetensors').write_bytes(whole[:cut])
    with pytest.raises(UserError, match=message):
      models.load(str(tmp_path))
  (tmp_path / 'model.safetensors').write_bytes(whole)
  index = tmp_path / safetensors.INDEX
  index.write_text(json.dumps({'weight_map': {'a': 'gone.safetensors'}}))
  with pytest.raises(UserError, match=r"not there: \['gone.safetensors'\]"):
    models.load(str(tmp_path))
  index.write_text(json.dumps({'weight_map': {'model.nothing': 'model.safetensors'}}))
  with pytest.raises(UserError, match='model.nothing: not in model.safetensors'):
    models.load(str(tmp_path))
  with pytest.raises(UserError, match='exists'):
    models.save(str(tmp_path), *models.load(source))


COSTLY = {'test_gradients_are_those_of_finite_differences': ('glm4_moe_lite',),
          'test_a_large_leaf_is_read_layer_by_layer': ('None',)}
FAMILIES = ('gemma2', 'glm4_moe_lite', 'kimi_linear', 'llama', 'qwen3_5_moe', 'qwen3_next')


@functools.cache
def gradients(name):
  """(config, params, loss, gradients) on two rows of the golden tokens."""
  config, params = models.load(os.path.join(GOLDEN, name))
  tokens = np.load(os.path.join(GOLDEN, name, 'golden.npz'))['tokens_70'][:24].reshape(2, 12)
  loss = jax.jit(functools.partial(loss_of, config))
  return config, params, tokens, loss, jax.jit(jax.grad(loss))(params, tokens)


def loss_of(config, params, tokens):
  logits = decoder.forward(config, params, tokens).logits
  logp = jax.nn.log_softmax(logits[:, :-1])
  return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], -1))


@pytest.mark.parametrize('name', FAMILIES)
def test_gradients_are_those_of_finite_differences(name):
  """One leaf per kind of tensor, along its own gradient; the correction bias gets none.

  Steps are small enough that no token changes its experts.
  """
  _, params, tokens, loss, grads = gradients(name)
  named, leaves = trees.named_leaves(grads), trees.named_leaves(params)
  assert all(np.abs(g).max() > 0 for k, g in named.items() if not k.endswith('mlp.bias'))
  seen = set()
  for key, g in named.items():
    kind = key.split('.', 2)[-1] if key.startswith('blocks') else key
    if kind in seen or 'norm' in kind:
      continue
    seen.add(kind)
    if key.endswith('mlp.bias'):
      assert not g.any()
      continue
    size = float(np.linalg.norm(g))
    step = 3e-4 * float(np.linalg.norm(leaves[key])) / g.size**0.5

    def moved(by, key=key, g=g, size=size):
      return jax.tree_util.tree_map_with_path(
        lambda p, x: x + by * g / size if trees.path_name(p) == key else x, params)

    slope = (float(loss(moved(step), tokens)) - float(loss(moved(-step), tokens))) / (2 * step)
    assert slope == pytest.approx(size, rel=0.05, abs=5e-3), key


@pytest.mark.parametrize('name, shape', [
  ('kimi_linear', dict(expert=2, context=2, tensor=2)), *(
    pytest.param(*x, marks=pytest.mark.slow) for x in (
      ('qwen3_5_moe', dict(expert=2, data=2, tensor=2)), ('qwen3_5_moe', dict(data=2)),
      ('qwen3_5_moe', dict(context=2, data=2)),
      ('kimi_linear', dict(fsdp=4))))], ids=str)
def test_meshes_give_the_same_loss_and_gradients(name, shape):
  config, params, tokens, alone, wanted = gradients(name)
  count = int(np.prod(list(shape.values())))
  mesh = place.make_mesh(shape, jax.devices()[:count])
  shardings = params_lib.shardings(params_lib.abstract(config), mesh)
  rows = np.concatenate([tokens] * 2)
  config = dataclasses.replace(config, query_chunk=8)  # of all chips that hold parts of a row
  with jax.set_mesh(mesh):
    loss, found = jax.jit(jax.value_and_grad(functools.partial(loss_of, config)))(
      jax.device_put(params, shardings), jax.device_put(rows, place.batch_sharding(mesh)))
  assert float(loss) == pytest.approx(float(alone(params, tokens)), rel=1e-5)
  size = sum(float((g**2).sum()) for g in jax.tree.leaves(wanted)) ** 0.5
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * size)


def test_a_mixture_is_the_written_sum():
  """Groups, bias, scale and shared expert against loops over tokens and experts."""
  moe = Moe(8, 2, 6, score='sigmoid', scale=1.7, bias=True, groups=4, top_groups=2, shared=5)
  config = models.ModelConfig(vocab=9, hidden=4, layers=1, heads=1, kv_heads=1, head_dim=4, inter=3,
                              mlps=('moe',), moe=moe)
  p = models.init(config, jax.random.key(0)).blocks[0].mlp
  p = jax.tree.map(lambda x: np.asarray(x[0]), p)
  p = dataclasses.replace(p, bias=np.random.default_rng(0).normal(size=8).astype(np.float32))
  x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
  silu = lambda v: v / (1 + np.exp(-v))
  wanted = np.zeros_like(x)
  for at in np.ndindex(2, 3):
    score = 1 / (1 + np.exp(-x[at] @ p.router))
    ranked = (score + p.bias).reshape(4, 2)
    keep = np.argsort(-ranked.sum(1))[:2]
    ranked = np.where(np.isin(np.arange(4), keep)[:, None], ranked, -np.inf).reshape(-1)
    chosen = np.argsort(-ranked)[:2]
    for e in chosen:
      y = (silu(x[at] @ p.gate[e]) * (x[at] @ p.up[e])) @ p.down[e]
      wanted[at] += moe.scale * score[e] / score[chosen].sum() * y
    wanted[at] += (silu(x[at] @ p.shared.gate) * (x[at] @ p.shared.up)) @ p.shared.down
  np.testing.assert_allclose(mlps.moe(config, p, jnp.asarray(x)), wanted, atol=1e-5)
