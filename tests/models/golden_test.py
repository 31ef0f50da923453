"""Every family against transformers: logits, hidden states, padding, packing, decoding, saving.

The files under golden/ are made by golden/make.py.
"""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax import models
from zppo_jax.core.errors import UserError
from zppo_jax.mesh import place
from zppo_jax.models import cache as cache_lib
from zppo_jax.models import decoder, safetensors
from zppo_jax.models import params as params_lib
from zppo_jax.sampling import conversations, decode, engine

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'golden')
FAMILIES = sorted(n for n in os.listdir(GOLDEN) if os.path.isdir(os.path.join(GOLDEN, n))
                  and not n.startswith('_'))
LENGTHS = (1, 2, 3, 5, 70)
COSTLY = {'test_decoding_in_pieces_equals_the_forward': ('gemma2', 'qwen3_next'),
          'test_greedy_continuations_are_the_same': ('gemma2', 'glm4_moe_lite', 'qwen3_5')}
SHAPE = len(LENGTHS), sum(LENGTHS)  # of a batch: five rows, or all of them packed in one
BOUND = 1e-5  # relative RMS in float32; the layout is wrong where it is more


@functools.cache
def loaded(name):
  config, params = models.load(os.path.join(GOLDEN, name))
  return config, params, dict(np.load(os.path.join(GOLDEN, name, 'golden.npz')))


@functools.cache
def program(name, **static):
  config = loaded(name)[0]
  return jax.jit(lambda p, t, **kw: decoder.forward(config, p, t, **static, **kw))


def error(found, wanted):
  found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
  return np.sqrt(np.mean((found - wanted)**2) / np.mean(wanted**2))


@pytest.mark.parametrize('name', FAMILIES)
def test_logits_and_hidden_states(name):
  config, params, golden = loaded(name)
  taps = tuple(f'residual.{i}' for i in range(config.layers - 1))
  out = program(name, taps=taps)(params, golden['tokens_70'][None])
  hidden = golden['hidden_70']  # the last one is behind the final norm
  for i, tap in enumerate(taps):
    assert error(out.taps[tap][0], hidden[i + 1]) < BOUND, tap
  assert error(out.hidden[0], hidden[-1]) < BOUND
  assert error(out.logits[0], golden['logits_70']) < BOUND


@pytest.mark.parametrize('name', FAMILIES)
def test_padding_on_either_side_changes_nothing(name):
  _, params, golden = loaded(name)
  tokens, segments = np.zeros(SHAPE, np.int32), np.zeros(SHAPE, np.int32)
  for side in ('left', 'right'):
    tokens[:], segments[:], rows = 3, 0, []
    for row, n in enumerate(LENGTHS):
      rows.append(slice(SHAPE[1] - n, SHAPE[1]) if side == 'left' else slice(0, n))
      tokens[row, rows[-1]], segments[row, rows[-1]] = golden[f'tokens_{n}'], 1
    found = program(name)(params, tokens, segment_ids=segments).logits
    for row, n in enumerate(LENGTHS):
      assert error(found[row, rows[row]], golden[f'logits_{n}']) < BOUND, (side, n)


@pytest.mark.parametrize('name', FAMILIES)
def test_packed_segments_do_not_see_each_other(name):
  _, params, golden = loaded(name)
  order = (3, 70, 1, 5, 2)
  tokens, segments = np.zeros(SHAPE, np.int32), np.zeros(SHAPE, np.int32)
  tokens[0] = np.concatenate([golden[f'tokens_{n}'] for n in order])
  segments[0] = np.repeat(np.arange(1, 6), order)
  found = program(name)(params, tokens, segment_ids=segments).logits[0]
  for n, part in zip(order, np.split(found, np.cumsum(order)[:-1])):
    assert error(part, golden[f'logits_{n}']) < BOUND, n


@pytest.mark.parametrize('name', FAMILIES)
def test_decoding_in_pieces_equals_the_forward(name):
  """A prefill, shorter than a convolution or over chunks, then a token at a time."""
  config, params, golden = loaded(name)
  tokens, wanted = golden['tokens_70'], golden['logits_70']
  step = program(name)
  for first in (1, 3, 64, 65) if name in ('qwen3_next', 'gemma2') else (3, 65):
    cache, found, at = cache_lib.init(config, 1, 72), [], 0
    for size in (first, *[1] * min(4, 70 - first)):
      out = step(params, tokens[None, at:at + size], cache=cache)
      cache, at = out.cache, at + size
      found.append(out.logits[0])
    assert error(np.concatenate(found), wanted[:at]) < BOUND, first


@pytest.mark.parametrize('name', FAMILIES)
def test_greedy_continuations_are_the_same(name):
  """Through slots that are refilled, and as a conversation whose second turn comes from the
  cache."""
  config, params, golden = loaded(name)
  wanted, given = golden['greedy'].tolist(), tuple(golden['tokens_5'].tolist())
  options = decode.Settings(max_new_tokens=len(wanted), eos_ids=(-1,), temperature=0.0)
  tokens = np.zeros((3, 8), np.int32)
  tokens[:, :5] = given
  length = np.asarray([5, 3, 5], np.int32)
  batch = decode.Prompts(
    tokens=tokens, length=length, forced=np.zeros((3, 0), np.int32), forced_length=0 * length,
    request=np.arange(3, dtype=np.uint32), group_id=0 * length, kind=0 * length,
    question_id=0 * length, valid=np.ones(3, bool))
  rollout, _ = engine.run(config, params, batch, key=jax.random.key(0), settings=options,
                          engine=engine.Engine(slots=2, steps=7, prefill=2))
  for row in (0, 2):
    assert np.asarray(rollout.tokens)[row, 5:5 + len(wanted)].tolist() == wanted
  chat = conversations.Conversations(config, conversations.Shape(2, 32, steps=5, chunks=(3,)))
  said, reused = [], []
  for size in (8, len(wanted) - 8):
    request = conversations.Request((*given, *said), size)
    answer, = chat.generate(params, [request], key=jax.random.key(0), settings=options)
    said, reused = said + list(answer.tokens), [*reused, answer.reused]
  assert said == wanted and reused[1] >= 12


@pytest.mark.parametrize('name', FAMILIES)
def test_a_saved_source_keeps_every_byte(name, tmp_path):
  source = os.path.join(GOLDEN, name)
  config, params, _ = loaded(name)
  models.save(str(tmp_path / 'out'), config, params, source=source)
  before, after = (safetensors.open_folder(str(p)) for p in (source, tmp_path / 'out'))
  renamed = {k.replace('layers.0.block_sparse_moe', 'layers.0.mlp') for k in before}
  assert renamed == after.keys()
  for key, old in before.items():
    new = after[key.replace('layers.0.block_sparse_moe', 'layers.0.mlp')]
    assert new.dtype == old.dtype
    np.testing.assert_array_equal(new.read(), old.read(), err_msg=key)
  assert (tmp_path / 'out' / 'generation_config.json').exists()


@pytest.mark.parametrize('name', FAMILIES)
def test_a_config_of_ours_reads_back(name, tmp_path):
  """Without its source a text model gets a config.json of its own, and loads as the same model."""
  config, params, golden = loaded(name)
  models.save(str(tmp_path / 'out'), config, params)
  found, again = models.load(str(tmp_path / 'out'))
  assert dataclasses.replace(found, family='', window=config.window) == dataclasses.replace(
    config, family='')
  jax.tree.map(np.testing.assert_array_equal, params, again)
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert written['architectures'][0].endswith('ForCausalLM')


def test_weights_of_ours_find_their_family(tmp_path):
  """A model trained from scratch is saved under the architecture whose choices it makes."""
  config = models.ModelConfig(vocab=40, hidden=16, layers=4, heads=2, kv_heads=1, head_dim=8,
                              inter=24, mixers=('gdn', 'gdn', 'gdn', 'full'), norm='one_plus',
                              attn_gate=True, linear_heads=1, linear_value_heads=2,
                              linear_key_dim=8, linear_value_dim=8)
  params = models.init(config, jax.random.key(0))
  models.save(str(tmp_path / 'hybrid'), config, params)
  found, again = models.load(str(tmp_path / 'hybrid'))
  assert found.family == 'qwen3_5_text'
  jax.tree.map(np.testing.assert_array_equal, params, again)
  plain = models.ModelConfig(vocab=40, hidden=16, layers=2, heads=2, kv_heads=1, head_dim=8,
                             inter=24)
  models.save(str(tmp_path / 'plain'), plain, models.init(plain, jax.random.key(0)))
  assert models.load(str(tmp_path / 'plain'))[0].family == 'qwen3'
  ours = dataclasses.replace(config, mixers=('fg2_gdn_plus', 'full'))
  with pytest.raises(UserError, match='no published architecture'):
    models.save(str(tmp_path / 'ours'), ours, models.init(ours, jax.random.key(0)))
  assert not (tmp_path / 'ours').exists()


@pytest.mark.parametrize('name', ['qwen3_5', 'qwen3_moe', 'kimi_linear'])
def test_shards_and_meshes_read_the_same(name, tmp_path, monkeypatch):
  """Several files with an index; every device reads its own part."""
  config, params, _ = loaded(name)
  monkeypatch.setattr(safetensors, 'SHARD_BYTES', 20_000)
  models.save(str(tmp_path / 'out'), config, params, source=os.path.join(GOLDEN, name))
  assert (tmp_path / 'out' / safetensors.INDEX).exists()
  mesh = place.make_mesh({'data': 1, 'fsdp': 2, 'expert': 2, 'tensor': 2})
  _, found = models.load(str(tmp_path / 'out'), mesh=mesh)
  shardings = params_lib.shardings(params_lib.abstract(config), mesh)
  jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(str(x.sharding)), found, shardings)
  jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize('name', [n for n in FAMILIES if not loaded(n)[0].moe])
def test_bfloat16_stays_near(name):
  """Against the same rounded weights in float32; a mixture would choose other experts."""
  config, params = models.load(os.path.join(GOLDEN, name), dtype='bfloat16')
  assert params.embed.dtype == jnp.bfloat16 and params.final_norm.dtype == jnp.float32
  logits = [jax.jit(functools.partial(decoder.forward, c))(
    params, loaded(name)[2]['tokens_70'][None]).logits
    for c in (config, dataclasses.replace(config, dtype='float32'))]
  recurrent = 'gdn' in config.mixers  # transformers itself is 3.1e-2 away here, ours 4.1e-2
  assert error(*logits) < (5e-2 if recurrent else 3e-2)
