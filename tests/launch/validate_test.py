"""Configs: every problem at once, presets that load, and no field that nothing reads."""

import ast
import dataclasses
import importlib
import pathlib

import pytest
from ml_collections import config_dict

from zppo_jax.core.errors import ConfigError, UserError
from zppo_jax.launch import build, validate
from zppo_jax.methods import table

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = ('zppo', 'grpo', 'ppo', 'sft', 'distill')
PRESETS = ('tiny', 'local', 'pod')


def load(name, preset='tiny', **changes):
  """Config of a file with dotted changes (double underscore for the dot)."""
  config = importlib.import_module(f'ml_collections_configs.{name}').get_config(preset)
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
  return config


def problems(config, num_devices=1, aot=False):
  return [f'{p.field}: {p.message}' for p in
          validate.problems(config, num_devices=num_devices, aot=aot)]


@pytest.mark.parametrize('name', FILES)
def test_method_fields_are_those_of_the_method(name):
  config = load(name)
  defaults = table.METHODS[config.method.name].defaults
  assert set(config.method) == {'name'} | {f.name for f in dataclasses.fields(defaults)}


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('name', FILES)
def test_presets_are_valid_but_for_the_roles_they_need(name, preset):
  devices = 64 if preset == 'pod' else 1
  assert problems(load(name, preset), devices, aot=True) == []
  found = [p for p in problems(load(name, preset), devices) if not p.startswith('teacher.checkp')]
  assert found == []


def test_no_preset_means_the_published_scale():
  config = load('zppo', '')
  method = build.method_config(config)
  published = dict(num_new=384, group_size=8, teacher_group_size=4, tau=0.5, rho_replay=0.25,
                   rho_aug=0.25, buffer_capacity=10_000, iterations=4, eps_low=0.2, eps_high=0.28,
                   dual_clip=10.0, norm='without_zero', compress_tokens=512, compress='teacher')
  assert {k: getattr(method, k) for k in published} == published
  optim = dict(learning_rate=1e-6, warmup_steps=0, beta1=0.9, beta2=0.999, eps=1e-8,
               weight_decay=0.1, clip_norm=1.0)
  assert {k: config.optim[k] for k in optim} == optim
  assert (config.num_steps, config.rollout.max_new_tokens, config.rollout.prompt_tokens) == (
    200, 12_288, 4096)


def test_all_problems_come_at_once():
  config = load('zppo', method__tau=1.5, rollout__temperature=0.0, mesh__fsdp=3,
                data__path='/nowhere.jsonl', optim__beta1=1.0, data__on_bad_row='ignore')
  with pytest.raises(ConfigError) as error:
    validate.validate(config, num_devices=1)
  for part in ('tau must be in (0, 1], got 1.5', 'rollout.temperature', 'optim.beta1',
               '/nowhere.jsonl', 'data.on_bad_row'):
    assert part in str(error.value), part


CASES = (
  ('zppo', dict(), 'teacher.checkpoint: zppo needs a teacher'),
  ('zppo', dict(method__name='zpo'), "did you mean 'zppo'?"),
  ('zppo', dict(method__name='grpo', method__tau=0.5), 'method.tau: unknown field'),
  ('zppo', dict(method__group_size=1), 'group_size must be at least 2, got 1'),
  ('zppo', dict(method__rho_aug=0.01), 'rho_aug must give floor'),
  ('grpo', dict(method__iterations=9999), 'method.iterations: 9999 mini-batches'),
  ('zppo', dict(method__iterations=99), 'iterations must be in 1..num_new = 32, got 99'),
  ('zppo', dict(method__compress_tokens=100), 'rollout.reformulated_tokens: 184 cannot hold'),
  ('zppo', dict(method__compress='teacher'), 'rollout.write_prompt_tokens'),
  ('zppo', dict(method__compress='teacher', rollout__write_prompt_tokens=40),
   'rollout.write_prompt_tokens: must be at least 41, got 40'),
  ('zppo', dict(method__name='zppo_hint'), 'rollout.write_prompt_tokens: must be at least'),
  ('zppo', dict(method__name='zppo_prefix', method__prefix_tokens=0),
   'prefix_tokens must be at least 1 with guide=prefix, got 0'),
  ('grpo', dict(eval__temperature=0.0, eval__samples=4), 'samples must be 1'),
  ('grpo', dict(eval__top_p=1.5), 'eval: top_p must be in (0, 1], got 1.5'),
  ('grpo', dict(eval__min_p=-1.0), 'eval: min_p must be in [0, 1), got -1.0'),
  ('grpo', dict(log__profile_steps=0), 'log.profile_steps'),
  ('grpo', dict(method__name='remax', max_staleness=2, method__correction='token_tis'),
   'max_staleness: 2, but remax keeps one baseline'),
  ('zppo', dict(rollout__max_new_tokens=40_000), 'exceeds model.context = 32768'),
  ('zppo', dict(max_staleness=1), 'max_staleness: 1 without a sampler correction'),
  ('zppo', dict(rollout__sparse__top_tokens=64),
   'rollout.sparse.top_tokens: 64 draws from another distribution'),
  ('grpo', dict(rollout__sparse__top_tokens=64, rollout__sparse__block=20),
   'rollout.sparse.block: must be a multiple of 8, got 20'),
  ('grpo', dict(rollout__sparse__top_tokens=64, rollout__sparse__labels=40),
   'rollout.sparse.labels: must be even and in 2..24'),
  ('grpo', dict(rollout__sparse__top_tokens=64, rollout__sparse__labels=8,
                rollout__sparse__pool=100),
   'rollout.sparse.pool: must be at least top_blocks + 1 = 129, what a step reads, got 100'),
  ('grpo', dict(rollout__sparse__top_tokens=64, rollout__sparse__labels=8,
                rollout__sparse__pool=129, rollout__sparse__misses=0),
   'rollout.sparse.misses: must lie in 1..top_blocks = 128, got 0'),
  ('grpo', dict(rollout__sparse__top_tokens=64, rollout__sparse__labels=8,
                rollout__sparse__pool=129, agent__tools=('calculator',)),
   'rollout.sparse.pool: 129 with agent.tools or agent.env'),
  ('zppo', dict(model__heads=3), 'model.heads: must be a multiple of kv_heads = 2, got 3'),
  ('zppo', dict(model__layers=0), 'model.layers: must be at least 1, got 0'),
  ('zppo', dict(train__micro_batches=7), 'method.num_new'),
  ('zppo', dict(mesh__data=-1), 'mesh: at most one axis may be -1'),
  ('grpo', dict(method__kl_beta=0.01), 'init.checkpoint: a KL penalty needs a reference'),
  ('grpo', dict(method__kl_beta=0.01, method__kl_kind='k1'), 'k1'),
  ('grpo', dict(method__eps_low=1.0), 'eps_low'),
  ('grpo', dict(method__dual_clip=0.5), 'dual_clip'),
  ('grpo', dict(method__surrogate='gspo', method__aggregation='seq_mean_token_sum'), 'aggregation'),
  ('grpo', dict(teacher__checkpoint='tests'), 'teacher.checkpoint: grpo never reads a teacher'),
  ('grpo', dict(init__checkpoint='/none'),
   "init.checkpoint: '/none' is neither a published checkpoint"),
  ('grpo', dict(lora__rank=4), 'init.checkpoint: lora.rank = 4 adapts given weights'),
  ('ppo', dict(lora__rank=4), 'lora.rank: ppo trains a critic, which has no adapters'),
  ('grpo', dict(lora__rank=4, lora__targets=('c_attn',)), "unknown ['c_attn']"),
  ('ppo', dict(method__lam=2.0), 'lam must be in [0, 1], got 2.0'),
  ('sft', dict(method__label_noise=1.5), 'label_noise must be in [0, 1], got 1.5'),
  ('distill', dict(method__beta=1.5), 'beta'),
  ('distill', dict(method__temperature=0.0), 'temperature'),
)


@pytest.mark.parametrize('name, changes, part', CASES)
def test_problem(name, changes, part):
  found = problems(load(name, **changes))
  assert any(part in p for p in found), found


def test_rows_must_divide_over_the_mesh():
  config = load('grpo', method__num_new=3, method__group_size=2)
  found = problems(config, num_devices=8)
  assert any(p.startswith('method.num_new: 6') for p in found), found


@pytest.mark.parametrize('changes', [dict(method__correction='token_tis'),
                                     dict(rollout__sparse__uncorrected=True)], ids=str)
def test_sparse_rollouts_are_corrected_or_named(changes):
  few = dict(rollout__sparse__top_tokens=64, rollout__sparse__labels=8)
  assert problems(load('grpo', **few, **changes)) == []


def test_correction_allows_staleness():
  for name in ('grpo', 'remax'):
    assert problems(load('grpo', max_staleness=1, method__correction='token_tis',
                         method__name=name)) == []


def test_unparsable_answers_and_bad_lines_name_file_line_and_reason(tmp_path):
  path = tmp_path / 'mine.jsonl'
  path.write_text('{"question": "1+1", "answer": "#### 2"}\n{"question": "2+2"}\nnot json\n')
  with pytest.raises(UserError) as error:
    build.build_source(load('sft', data__path=str(path)), 'train')
  assert 'mine.jsonl' in str(error.value) and '3' in str(error.value)


def config_leaves(config, prefix=''):
  for key, value in config.items():
    if isinstance(value, config_dict.ConfigDict):
      yield from config_leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}'


# Sections handed over whole: their fields are those of a dataclass that refuses unknown names.
SPLATTED = ('method.', 'optim.', 'model.', 'teacher.model.', 'data.tasks.', 'mesh.', 'tokenizer.')


def test_every_config_field_is_read_somewhere():
  read = set()
  for path in [*(ROOT / 'zppo_jax').rglob('*.py'), *(ROOT / 'experiments').glob('*.py')]:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        read.add(node.attr)
  for name in FILES:
    for leaf in config_leaves(load(name)):
      if not leaf.startswith(SPLATTED):
        assert leaf.split('.')[-1] in read, leaf
