"""A user's path: a local published checkpoint is trained by one command and comes back as one."""

import importlib
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers

from experiments.train import train
from zppo_jax import models
from zppo_jax.core.errors import ConfigError, UserError
from zppo_jax.data import tokenizer as tokenizer_lib
from zppo_jax.launch import roles, validate
from zppo_jax.mesh import place
from zppo_jax.models import lora, safetensors
from zppo_jax.train import checkpoint

SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<think>', '</think>')
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MODEL = models.ModelConfig(
  vocab=320, hidden=32, layers=2, heads=8, kv_heads=2, head_dim=16, inter=48, rope_theta=1e4,
  rope_dim=8, mixers=('gdn', 'full'), norm='one_plus', attn_gate=True, linear_heads=4,
  linear_value_heads=8, linear_key_dim=8, linear_value_dim=8, context=512, family='qwen3_5_text')


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """Random weights with a byte-level tokenizer and a chat template, as folders are published."""
  folder = tmp_path_factory.mktemp('published') / 'qwen'
  models.save(str(folder), MODEL, models.init(MODEL, jax.random.key(0)))
  made = tokenizers.ByteLevelBPETokenizer()
  made.train_from_iterator(['What is 1+2?', '3'], vocab_size=300, special_tokens=list(SPECIAL))
  made.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(
    dict(eos_token='<|im_end|>', pad_token='<|endoftext|>')))
  (folder / 'chat_template.jinja').write_text(TEMPLATE)
  return folder


def config(folder, **changes):
  found = importlib.import_module('ml_collections_configs.grpo').get_config('tiny')
  flat = {'init.checkpoint': str(folder), 'num_steps': 2, 'method.num_new': 8,
          'method.group_size': 8, 'method.iterations': 1, 'rollout.prompt_tokens': 64,
          'rollout.reformulated_tokens': 64, 'rollout.max_new_tokens': 4, 'data.eval_size': 8,
          'eval.num_questions': 8, 'eval.chunk': 8, 'log.progress': False, 'mesh.fsdp': 1,
          'mesh.data': -1, 'optim.learning_rate': 1e-3, 'model.query_chunk': 512}
  found.update_from_flattened_dict(flat | {k.replace('__', '.'): v for k, v in changes.items()})
  return found


def test_a_published_checkpoint_trains_and_comes_back(published, tmp_path):
  train(config(published), str(tmp_path / 'run'))
  rows = [json.loads(x) for x in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert all(r['mismatch/abs_max'] < 1e-4 for r in rows if r['step'])
  out = tmp_path / 'run' / 'export'
  found, params = models.load(str(out))
  assert found == MODEL
  for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
    assert (out / name).read_bytes() == (published / name).read_bytes()
  assert safetensors.open_folder(str(out)).keys() == safetensors.open_folder(
    str(published)).keys()
  trained, weights, _ = roles.load_policy(str(tmp_path / 'run'), place.make_mesh({'data': -1}))
  assert trained.family == 'qwen3_5_text' and trained.num_valid < 320
  jax.tree.map(np.testing.assert_array_equal, weights, params)


def test_the_tokenizer_and_template_come_along(published):
  template = roles.own_template(str(published))
  assert roles.own_tokenizer(str(published)) == str(published)
  assert template.format([], True, '', '') == '<|im_start|>assistant\n'
  assert not roles.is_published('') and not roles.is_published(str(published.parent))


@pytest.mark.parametrize('name, text, wanted', [
  ('tokenizer_config.json', '{}', None),
  ('chat_template.jinja', '{% if %}', 'init.checkpoint: .*does not compile')])
def test_a_missing_template_is_none_and_a_bad_one_is_named(tmp_path, published, name, text, wanted):
  folder = tmp_path / 'copy'
  shutil.copytree(published, folder)
  (folder / 'chat_template.jinja').unlink()
  (folder / name).write_text(text, encoding='utf-8')
  if wanted is None:
    assert roles.own_template(str(folder)) is None
    return
  with pytest.raises(UserError, match=wanted):
    roles.own_template(str(folder))


def test_adapters_of_a_run_are_merged_on_their_base(published, tmp_path):
  tokenizer = tokenizer_lib.build_tokenizer(dict(kind='hf', path=str(published)))
  _, base = models.load(str(published))
  factors = jax.tree.map(lambda x: x + 0.1, lora.init(MODEL, jax.random.key(1), 2, ('q_proj',)))
  roles.write_facts(str(tmp_path), MODEL, tokenizer, lora.Settings(2, 4.0, ('q_proj',)),
                    str(published))
  with checkpoint.make_manager(str(tmp_path / 'checkpoints')) as manager:
    checkpoint.save(manager, 1, state={'params': {'policy': factors}}, pending=[], meta={},
                    force=True)
    manager.wait_until_finished()
  _, params, _ = roles.load_policy(str(tmp_path), place.make_mesh({'data': -1}))
  wanted = lora.merge(MODEL, base, factors, alpha=4.0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, wanted)
  assert not np.array_equal(params.blocks[1].mixer.query, base.blocks[1].mixer.query)


def test_what_does_not_fit_is_refused_before_any_array(published, tmp_path):
  with pytest.raises(ConfigError, match='model.heads: 8 is not a multiple of mesh.tensor = 3'):
    validate.validate(config(published, mesh__tensor=3, mesh__data=1), num_devices=3)
  with pytest.raises(ConfigError, match='exceeds model.context = 512'):
    validate.validate(config(published, rollout__max_new_tokens=600), num_devices=1)
  with pytest.raises(UserError, match='320 rows of the embedding, but the tokenizer has 400 ids'):
    roles.architecture(config(published).model, str(published), 400)
  broken = tmp_path / 'broken'
  broken.mkdir()
  (broken / 'config.json').write_text(json.dumps({'model_type': 'gpt2'}))
  with pytest.raises(ConfigError, match="init.checkpoint: model: model_type 'gpt2'"):
    validate.validate(config(broken), num_devices=1)
