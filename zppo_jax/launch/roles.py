"""Models of a run and where they come from: a config section, the workdir of an earlier run, or a
published checkpoint folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import Any

import jax

from zppo_jax import models
from zppo_jax.core.errors import UserError
from zppo_jax.data import jinja_templates
from zppo_jax.data import tokenizer as tokenizer_lib
from zppo_jax.launch import workdir as workdir_lib
from zppo_jax.mesh import hosts, place
from zppo_jax.models import config as config_lib
from zppo_jax.models import hf_config, lora, presets
from zppo_jax.models import params as params_lib
from zppo_jax.models.config import ModelConfig
from zppo_jax.train import checkpoint
from zppo_jax.train.setup import Questions


@dataclasses.dataclass(frozen=True)
class Policy:
  """A policy with all that it takes to talk to it; `template` None = it came without one."""

  config: ModelConfig
  params: Any
  tokenizer: Any
  template: Any


# What a config section still decides when the architecture comes from a checkpoint.
RUN_FIELDS = ('dtype', 'param_dtype', 'remat', 'unroll', 'query_chunk')


def is_published(folder: str) -> bool:
  """Whether a folder holds a published checkpoint, and not the workdir of a run."""
  return bool(folder) and os.path.exists(os.path.join(folder, 'config.json')) and not (
    os.path.exists(os.path.join(folder, 'model.json')))


def own_tokenizer(folder: str) -> str:
  """Folder of the tokenizer that came with a published checkpoint, or ''."""
  found = is_published(folder) and os.path.exists(os.path.join(folder, 'tokenizer.json'))
  return folder if found else ''


def own_template(folder: str, field: str = 'init.checkpoint'):
  """Chat template that came with a published checkpoint, or None.

  Raises UserError on a bad one, naming the config field that gave the folder.
  """
  if not is_published(folder):
    return None
  try:
    return jinja_templates.load_template(folder)
  except (FileNotFoundError, jinja_templates.MissingTemplateError):
    return None
  except jinja_templates.TemplateError as error:
    raise UserError(f'{field}: {folder}: {error}') from error


def _kernels(section: Any) -> dict[str, str | None]:
  return {name: section[name] or None for name in ('linear_kernel', 'attn_kernel')}


def model_config(section: Any, vocab_size: int = 0) -> ModelConfig:
  """ModelConfig of a config section; `vocab_size` is the tokenizer's."""
  fields = presets.expand(dict(section))
  fields |= _kernels(section)
  multiple = fields.pop('vocab_multiple')
  valid = vocab_size or fields['vocab']
  if not fields['vocab']:
    fields['vocab'] = -(-vocab_size // multiple) * multiple
  fields['mixers'] = tuple(fields['mixers'])
  return ModelConfig(**fields, num_valid=valid)


def architecture(section: Any, folder: str, vocab_size: int = 0) -> ModelConfig:
  """ModelConfig of a role: of the published checkpoint that it starts from, else of its section.

  Raises UserError on a checkpoint that is not supported, or too small for the tokenizer.
  """
  if not is_published(folder):
    return model_config(section, vocab_size)
  found = hf_config.read(folder)
  _check_rows(folder, found, vocab_size)
  own = {name: section[name] for name in RUN_FIELDS}
  return dataclasses.replace(found, **own, **_kernels(section),
                             num_valid=vocab_size or found.vocab)


def _check_rows(folder: str, model: ModelConfig, vocab_size: int) -> None:
  if vocab_size > model.vocab:
    raise UserError(f'{folder}: {model.vocab} rows of the embedding, but the tokenizer has '
                    f'{vocab_size} ids')


def adapters(config: Any) -> lora.Settings | None:
  """Adapters of a run's config; rank 0 trains all parameters."""
  c = config.lora
  return lora.Settings(c.rank, c.alpha, tuple(c.targets) or None) if c.rank else None


def load_policy(folder: str, mesh) -> tuple[ModelConfig, Any, dict[str, Any]]:
  """(model config, policy weights, facts) of a run's newest checkpoint, placed on a mesh.

  Raises UserError when the folder is no workdir of a run.
  """
  facts_path = os.path.join(folder, 'model.json')
  if not os.path.exists(facts_path):
    raise UserError(f'checkpoint {folder!r} is neither the workdir of a run (no model.json) nor a '
                    'published checkpoint (no config.json)')
  with open(facts_path, encoding='utf-8') as file:
    facts = json.load(file)
  config = config_lib.from_dict(facts['model'])
  own = facts.get('lora')
  specs = params_lib.abstract(config) if own is None else lora.abstract(
    config, own['rank'], own['targets'])
  template = checkpoint.abstract(params_lib.shapes(specs), params_lib.shardings(specs, mesh))
  params = checkpoint.load_params(os.path.join(os.path.abspath(folder), 'checkpoints'), template)
  if own is not None:
    base = (_published(own['base'], config, mesh) if is_published(own['base']) else
            load_policy(own['base'], mesh)[1])
    params = lora.merge(config, base, params, alpha=own['alpha'])
  return config, params, facts


def weights_name(folder: str) -> str:
  """Which weights a checkpoint folder holds now: a run's newest step, or the files of a published
  one by size and time."""
  place = os.path.abspath(folder)
  if not is_published(folder):
    return f'{place} at step {workdir_lib.latest_step(place)}'
  files = sorted(f for f in os.listdir(folder) if f.endswith('.safetensors'))
  facts = [(f, s.st_size, s.st_mtime_ns) for f in files for s in [os.stat(os.path.join(folder, f))]]
  return f'{place}, {hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}'


def load_with_tokenizer(folder: str, mesh, dtype: str | None = None) -> Policy:
  """The newest policy of a run, or a published checkpoint (in `dtype`, default its own).

  Raises UserError on a folder that is neither, or lacks its tokenizer.
  """
  if not is_published(folder):
    if dtype:
      raise UserError('dtype: only a published checkpoint takes one, a run keeps its own')
    config, params, _ = load_policy(folder, mesh)
    tokenizer = tokenizer_lib.load(_file(folder, 'tokenizer.json'))
    with open(_file(folder, 'config.json'), encoding='utf-8') as file:
      given = json.load(file)
    template = given['data']['template']
    if template == 'auto':
      template = own_template(given['init']['checkpoint']) or 'plain'
    return Policy(config, params, tokenizer, template)
  tokenizer = tokenizer_lib.build_tokenizer(dict(kind='hf', path=_file(folder, 'tokenizer.json')))
  config, params = models.load(folder, mesh=mesh, dtype=dtype)
  _check_rows(folder, config, tokenizer.vocab_size)
  config = dataclasses.replace(config, num_valid=tokenizer.vocab_size)
  return Policy(config, params, tokenizer, own_template(folder))


def _file(folder: str, name: str) -> str:
  path = os.path.join(folder, name)
  if not os.path.exists(path):
    raise UserError(f'{folder}: {name} is missing')
  return path


def write_facts(workdir: str, config: ModelConfig, tokenizer, own: lora.Settings | None = None,
                base: str = '') -> None:
  """model.json and tokenizer.json: what `load_policy` needs from this run later.

  `own` are its adapters, `base` the folder of the weights that they adapt.
  """
  facts: dict[str, Any] = dict(model=dataclasses.asdict(config), tokenizer=tokenizer.fingerprint)
  if own is not None:
    facts['lora'] = dataclasses.asdict(own) | dict(base=os.path.abspath(base))
  with open(os.path.join(workdir, 'model.json'), 'w', encoding='utf-8') as file:
    json.dump(facts, file, indent=2)
  tokenizer_lib.save(tokenizer, os.path.join(workdir, 'tokenizer.json'))


def load_init(folder: str, model: ModelConfig, tokenizer, mesh):
  """Weights to start from: of the run's own architecture, and from a run of its own tokenizer."""
  if is_published(folder):
    return _published(folder, model, mesh)
  found, params, facts = load_policy(folder, mesh)
  if facts['tokenizer'] != tokenizer.fingerprint:
    raise UserError(f'init.checkpoint: {folder} was trained with another tokenizer '
                    f'({facts["tokenizer"]}, this run {tokenizer.fingerprint})')
  if found != model:
    raise UserError(f'init.checkpoint: {folder} holds {found}, this run {model}')
  return params


def _published(folder: str, model: ModelConfig, mesh):
  found, params = models.load(folder, mesh=mesh, dtype=model.dtype, param_dtype=model.param_dtype)
  if found.tied != model.tied:
    raise UserError(f'{folder}: config.json says tied, lm_head.weight says not')
  return params


def load_teacher(section: Any, folder: str, questions: Questions, mesh):
  """((config, params), questions in its own tokens, or None where they are the policy's)."""
  if is_published(folder):
    own = questions.tokenizer
    if own_tokenizer(folder):
      own = tokenizer_lib.build_tokenizer(dict(kind='hf', path=folder))
    model = architecture(section, folder, own.vocab_size)
    params, known = _published(folder, model, mesh), own.fingerprint
  else:
    model, params, facts = load_policy(folder, mesh)
    own, known = None, facts['tokenizer']
  if known == questions.tokenizer.fingerprint:
    return (model, params), None
  own = own or tokenizer_lib.load(os.path.join(folder, 'tokenizer.json'))
  template = own_template(folder, 'teacher.checkpoint') or questions.template
  return (model, params), dataclasses.replace(questions, tokenizer=own, template=template)


def export(workdir: str, out: str, source: str = '', dtype: str | None = None) -> None:
  """Writes the newest policy of a run as a published checkpoint folder; see `models.save`.

  `source` is the published checkpoint that the run started from, if any.
  """
  config, params, _ = load_policy(workdir, place.make_mesh({'data': len(jax.devices())}))
  if hosts.is_first():
    models.save(out, config, params, source=source or None, dtype=dtype)
