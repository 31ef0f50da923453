"""Everything that is wrong with a config, found before any array is made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax

from zppo_jax.core.errors import ConfigError, UserError
from zppo_jax.launch import build, roles, turns
from zppo_jax.launch.config import (
  Problem,
  check_divisible,
  check_enum,
  check_range,
  raise_all,
  unknown_keys,
)
from zppo_jax.mesh import place
from zppo_jax.methods import api, reformulate, table
from zppo_jax.models import config as model_lib
from zppo_jax.models import lora, presets
from zppo_jax.models import params as params_lib
from zppo_jax.sampling import decode

RANGES = {  # dotted field -> (low, low is excluded)
  'num_steps': (1, False), 'max_staleness': (0, False), 'rollout.prompt_tokens': (1, False),
  'rollout.reformulated_tokens': (1, False), 'rollout.max_new_tokens': (1, False),
  'rollout.temperature': (0, True), 'rollout.write_prompt_tokens': (0, False),
  'rollout.write_chunk': (1, False), 'rollout.chunk_groups': (0, False),
  'rollout.slots': (0, False), 'agent.max_turns': (1, False), 'agent.turn_tokens': (0, False),
  'optim.learning_rate': (0, False),
  'optim.critic_learning_rate': (0, False), 'optim.warmup_steps': (0, False),
  'optim.decay_steps': (0, False), 'optim.weight_decay': (0, False), 'optim.eps': (0, True),
  'optim.clip_norm': (0, True), 'train.micro_batches': (1, False), 'train.chunk': (1, False),
  'eval.every_steps': (0, False), 'eval.num_questions': (1, False), 'eval.chunk': (1, False),
  'eval.samples': (1, False), 'eval.temperature': (0, False), 'log.every_steps': (1, False),
  'log.dump_every_steps': (0, False), 'log.dump_rows': (1, False),
  'log.phase_limit_s': (0, False), 'log.profile_steps': (1, False),
  'ckpt.every_steps': (1, False), 'ckpt.keep': (1, False), 'data.size': (1, False),
  'data.eval_size': (1, False),
  'data.deadline_secs': (0, True), 'lora.rank': (0, False), 'lora.alpha': (0, True),
}


def _field(config: Any, dotted: str) -> Any:
  for name in dotted.split('.'):
    config = config[name]
  return config


def _ranges(config: Any) -> list[Problem]:
  found = []
  for name, (low, open_low) in RANGES.items():
    found += check_range(name, _field(config, name), low=low, open_low=open_low)
  for name in ('optim.beta1', 'optim.beta2'):
    found += check_range(name, _field(config, name), low=0, high=1, open_high=True)
  return found


def _method(config: Any) -> tuple[list[Problem], Any]:
  """(problems, the method's config or None)."""
  found = check_enum('method.name', config.method.name, table.METHODS)
  if found:
    return found, None
  row = table.METHODS[config.method.name]
  given = {k: v for k, v in config.method.items() if k != 'name' and v is not None}
  found = unknown_keys(given, [*vars(row.defaults)], 'method')
  if found:
    return found, None
  try:
    build.build_method(config)
  except ValueError as error:
    return [Problem(f'method ({config.method.name})', str(error))], None
  return [], build.method_config(config)


def _model(config: Any) -> tuple[list[Problem], Any]:
  """(problems, ModelConfig or None)."""
  found = check_enum('model.preset', config.model.preset, ('', *presets.PRESETS))
  if found:
    return found, None
  try:
    model = roles.architecture(config.model, config.init.checkpoint, 64)
  except UserError as error:
    return [Problem('init.checkpoint', str(error))], None
  found = [p for m in dict.fromkeys(model.mixers)
           for p in check_enum('model.mixers', m, params_lib.MIXER_PARAMS)]
  found = found or [Problem(f'model.{p.split(":")[0]}', p.split(': ', 1)[1])
                    for p in model_lib.problems(model)]
  return found, None if found else model


def _lengths(config: Any, method: Any, model: Any) -> list[Problem]:
  """Rows must fit the context; reformulated prompts are never truncated, so their bound must
  fit."""
  r, found = config.rollout, []
  for name in ('prompt_tokens', 'reformulated_tokens'):
    total = r[name] + r.max_new_tokens
    if total > model.context:
      found.append(Problem(f'rollout.{name}', f'{r[name]} + max_new_tokens {r.max_new_tokens} = '
                           f'{total} exceeds model.context = {model.context}'))
  wanted = 0
  if getattr(method, 'reformulates', False):
    wanted = reformulate.prompt_bound(r.prompt_tokens, method.group_size, method.compress_tokens,
                                      method.wording)
  if wanted > r.reformulated_tokens:
    found.append(Problem('rollout.reformulated_tokens',
                         f'{r.reformulated_tokens} cannot hold a prompt of {r.prompt_tokens} and '
                         f'{method.group_size} candidates of {method.compress_tokens}: needs '
                         f'{wanted}'))
  return found


def _sharding(config: Any, method: Any, model: Any, num_devices: int) -> list[Problem]:
  try:
    shape = place.resolve_shape(config.mesh, num_devices)
  except ValueError as error:
    return [Problem('mesh', str(error).removeprefix('mesh: '))]
  found = [] if model is None else _axes(model, shape)
  if config.rollout.slots:
    found += check_divisible('rollout.slots', config.rollout.slots, shape['data'] * shape['fsdp'],
                             by='data shards')
  if method is None:
    return found
  built = build.build_method(config)
  shards, pieces = shape['data'] * shape['fsdp'], config.train.micro_batches
  for part in (api.Slots(built.capacity, built.group_size), *built.extra):
    slots = -(-part.capacity // built.iterations)
    found += check_divisible(
      'method.num_new', slots * part.group_size, pieces * shards,
      by=f'{pieces} micro-batches x {shards} data shards; a mini-batch has {slots} groups of '
         f'{part.group_size} rows')
  if built.iterations > built.capacity:
    found.append(Problem('method.iterations', f'{built.iterations} mini-batches, but only '
                         f'{built.capacity} groups'))
  return found


def _axes(model: Any, shape: Mapping[str, int]) -> list[Problem]:
  """Heads and experts that their mesh axis does not divide; few key heads may stay whole."""
  sizes = [('tensor', 'heads', model.heads)]
  if set(model.mixers) & set(model_lib.DELTA_KINDS):
    sizes.append(('tensor', 'linear_value_heads', model.linear_value_heads))
  if model.moe is not None:
    sizes.append(('expert', 'moe.experts', model.moe.experts))
  return [p for axis, name, size in sizes for p in check_divisible(
    f'model.{name}', size, shape[axis], by=f'mesh.{axis}')]


def _roles(config: Any, method: Any) -> list[Problem]:
  found = []
  for name in ('init', 'teacher'):
    folder = config[name].checkpoint
    if folder and not roles.is_published(folder) and not os.path.isdir(
        os.path.join(folder, 'checkpoints')):
      found.append(Problem(f'{name}.checkpoint', f'{folder!r} is neither a published checkpoint '
                           '(no config.json) nor the workdir of a run (no checkpoints folder)'))
  if method is None:
    return found
  needs = build.build_method(config).needs
  reads = bool(needs & {'teacher', 'teacher_hidden', 'teacher_logp'})
  if reads and not config.teacher.checkpoint:
    found.append(Problem('teacher.checkpoint', f'{config.method.name} needs a teacher: give the '
                         'workdir of its run'))
  if config.teacher.checkpoint and not reads:
    found.append(Problem('teacher.checkpoint', f'{config.method.name} never reads a teacher: '
                         'leave it empty'))
  if 'reference' in needs and not config.init.checkpoint:
    found.append(Problem('init.checkpoint', 'a KL penalty needs a reference: the initial policy'))
  return found + _instructions(config, method)


def _instructions(config: Any, method: Any) -> list[Problem]:
  """Room for what the teacher is told to write: its own answer, and what to do with it."""
  guide = getattr(method, 'guide', 'none')
  if not (guide == 'hint' or (getattr(method, 'reformulates', False)
                              and method.compress == 'teacher')):
    return []
  source = config.rollout.max_new_tokens + (config.rollout.prompt_tokens if guide == 'hint' else 0)
  return check_range('rollout.write_prompt_tokens', config.rollout.write_prompt_tokens,
                     low=source + 1)


def _evaluation(config: Any) -> list[Problem]:
  """How answers are drawn for evaluation, in the sampler's own words."""
  e = config.eval
  try:
    decode.check_settings(decode.Settings(
      config.rollout.max_new_tokens, (0,), e.samples, e.temperature, e.top_k, e.top_p, e.min_p))
  except ValueError as error:
    return [Problem('eval', str(error).replace('group_size', 'samples'))]
  return []


def _adapters(config: Any, method: Any, model: Any) -> list[Problem]:
  own = roles.adapters(config)
  if own is None:
    return []
  found = []
  if not config.init.checkpoint:
    found.append(Problem('init.checkpoint', f'lora.rank = {own.rank} adapts given weights: name '
                         'them, or set lora.rank=0'))
  if method is not None and 'critic' in build.build_method(config).needs:
    found.append(Problem('lora.rank', f'{config.method.name} trains a critic, which has no '
                         'adapters: set lora.rank=0'))
  if model is not None:
    try:
      lora.abstract(model, own.rank, own.targets)
    except ValueError as error:
      found.append(Problem('lora', str(error)))
  return found


def _staleness(config: Any, method: Any) -> list[Problem]:
  if method is None or not config.max_staleness:
    return []
  if config.max_staleness > 1 and 'fresh_explore' in build.build_method(config).needs:
    return [Problem('max_staleness', f'{config.max_staleness}, but {config.method.name} keeps one '
                    'baseline, that of the newest batch: must be at most 1')]
  if config.allow_uncorrected_staleness:
    return []
  if getattr(method, 'correction', 'none') != 'none':
    return []
  return [Problem('max_staleness', f'{config.max_staleness} without a sampler correction: set '
                  'method.correction where there is one, or allow_uncorrected_staleness=True')]


def _sparse(config: Any, method: Any, model: Any, aot: bool) -> list[Problem]:
  """Settings of sparse decoding, and what makes up for it in the loss."""
  own = build.sparse_settings(config.rollout)
  if own is None or model is None:
    return []
  lines = model_lib.problems(dataclasses.replace(model, sparse=own))
  found = [Problem(f'rollout.{p.split(":")[0]}', p.split(': ', 1)[1]) for p in lines]
  if own.pool and (config.agent.tools or config.agent.env):
    found.append(Problem('rollout.sparse.pool', f'{own.pool} with agent.tools or agent.env: turns '
                         'are appended to keys on the device, must be 0'))
  if own.pool and not aot:
    kinds = sorted(m.kind for m in jax.local_devices()[0].addressable_memories())
    if 'pinned_host' not in kinds:
      found.append(Problem('rollout.sparse.pool', f'{own.pool} needs memory of kind pinned_host, '
                           f'{jax.default_backend()} has {kinds}'))
  if method is not None and not config.rollout.sparse.uncorrected and (
      getattr(method, 'correction', 'none') == 'none'):
    found.append(Problem(
      'rollout.sparse.top_tokens', f'{own.kernel.top_tokens} draws from another distribution than '
      'the loss scores: set method.correction where there is one, or '
      'rollout.sparse.uncorrected=True'))
  return found


def _data(config: Any) -> list[Problem]:
  found = check_enum('data.on_bad_row', config.data.on_bad_row, ('error', 'skip'))
  found += check_enum('tokenizer.kind', config.tokenizer.kind,
                      ('auto', 'char', 'sentencepiece', 'hf', 'saved'))
  if config.data.path and not os.path.exists(config.data.path):
    found.append(Problem('data.path', f'{config.data.path!r} does not exist; expected .jsonl, '
                         '.json or .parquet rows with question and answer fields'))
  elif not config.data.path and not len(config.data.tasks):
    found.append(Problem('data.tasks', 'is empty and data.path is not set'))
  if config.data.path:
    found += check_range('data.heldout_percent', config.data.heldout_percent, low=1, high=99)
  return found


def problems(config: Any, *, num_devices: int, aot: bool = False) -> list[Problem]:
  """Every problem of a config; an empty list means that it can run (`aot`: compile)."""
  found, method = _method(config)
  found += _ranges(config)
  if found and method is None:  # the rest reads numbers that are known to be wrong
    return found + _data(config)
  faults, model = _model(config)
  found += faults
  if not aot:  # checkpoints and files are only needed where it runs
    found += _data(config) + _roles(config, method)
  if model is not None:
    found += _lengths(config, method, model)
  found += _sharding(config, method, model, num_devices) + turns.problems(config)
  found += _evaluation(config)
  return (found + _adapters(config, method, model) + _staleness(config, method)
          + _sparse(config, method, model, aot))


def validate(config: Any, *, num_devices: int, aot: bool = False) -> None:
  """Raises ConfigError listing all problems at once."""
  try:
    found = problems(config, num_devices=num_devices, aot=aot)
  except (KeyError, AttributeError, TypeError) as error:
    raise ConfigError(f'config: {type(error).__name__}: {error}') from error
  raise_all(found)
