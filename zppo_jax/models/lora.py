"""Low-rank adapters as a second tree: W + (alpha / rank) B A, arXiv 2106.09685.

Factors belong to the tensors of a published checkpoint, not to our leaves: one A serves queries and
their gates where one matrix holds both. So every family has them by its table of names, and a saved
adapter is what the `peft` package reads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from zppo_jax.core import trees, types
from zppo_jax.core.errors import UserError
from zppo_jax.models import hf_names
from zppo_jax.models import params as params_lib
from zppo_jax.models import safetensors as files
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.hf_names import Row
from zppo_jax.models.load import named_specs

WEIGHTS, CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
PEFT_PREFIX = 'base_model.model.'
NOT_ADAPTED = ('norm', 'conv1d', 'gate.weight', 'shared_expert_gate', 'experts')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Adapters of a run; `targets` None means every matrix."""

  rank: int
  alpha: float
  targets: tuple[str, ...] | None = None


@types.record
class Factors:
  """Of one matrix [out, in] in each layer of a slot."""

  a: types.Array  # f32[R, rank, in]
  b: types.Array  # f32[R, out, rank], zeros at the start


def _rows(config: ModelConfig) -> Iterator[tuple[str, int, Row]]:
  """(key, slot, row) of every matrix that can be adapted; keys are 'SLOT.MODULE'."""
  for n, slot in enumerate(config.slots):
    for row in hf_names.block_rows(config, slot, fused=True):
      name = row.names[0]
      if len(row.names) == 1 and name.endswith('.weight') and not any(
          part in name for part in NOT_ADAPTED):
        yield f'{n}.{name.removeprefix("layers.{i}.").removesuffix(".weight")}', n, row


def modules(config: ModelConfig) -> list[str]:
  """Names of the matrices that can be adapted, as `targets` take them."""
  return sorted({key.rsplit('.', 1)[1] for key, _, _ in _rows(config)})


def _chosen(config: ModelConfig, targets: Sequence[str] | None):
  known = modules(config)
  unknown = sorted(set(targets or ()) - set(known))
  if unknown:
    raise ValueError(f'targets: unknown {unknown}; this model has {known}')
  return [entry for entry in _rows(config)
          if targets is None or entry[0].rsplit('.', 1)[1] in targets]


def abstract(config: ModelConfig, rank: int,
             targets: Sequence[str] | None = None) -> dict[str, Factors]:
  """Specs of the adapters of all matrices, or of those named (q_proj, down_proj, ..).

  Raises ValueError on a rank below 1 or an unknown target.
  """
  if rank < 1:
    raise ValueError(f'rank must be at least 1, got {rank}')
  specs, found = named_specs(config), {}
  for key, n, row in _chosen(config, targets):
    leaves = [jax.ShapeDtypeStruct(specs[f'blocks.{n}.{x}'].shape[1:], jnp.float32)
              for x in row.leaves]
    rows, columns = jax.eval_shape(row.join, *leaves)[0].shape
    repeats = config.slots[n].repeats
    found[key] = Factors(
      params_lib.Spec((repeats, rank, columns), ('layers', None, 'embed'), columns**-0.5,
                      'float32'),
      params_lib.Spec((repeats, rows, rank), ('layers', None, None), 0.0, 'float32'))
  return found


def init(config: ModelConfig, key: jax.Array, rank: int,
         targets: Sequence[str] | None = None) -> dict[str, Factors]:
  """Adapters that change nothing yet."""
  return params_lib.materialise(abstract(config, rank, targets), key)


def merge(config: ModelConfig, params, factors: Mapping[str, Factors], *, alpha: float):
  """Parameters with the adapters added: differentiable in both, same dtypes and shardings."""
  rows = {key: (n, row) for key, n, row in _rows(config)}
  added: dict[str, jax.Array] = {}
  for key, f in factors.items():
    n, row = rows[key]
    change = jnp.einsum('lor,lri->loi', f.b, f.a) * (alpha / f.a.shape[1])
    for leaf, x in zip(row.leaves, jax.vmap(row.split)(change)):
      added[f'blocks.{n}.{leaf}'] = x

  def add(path, leaf):
    change = added.get(trees.path_name(path))
    return leaf if change is None else (leaf.astype(jnp.float32) + change).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(add, params)


def save(path: str, config: ModelConfig, factors: Mapping[str, Factors], *, alpha: float,
         base: str = '') -> None:
  """Writes an adapter folder as the `peft` package reads it; `base` is the checkpoint's name.

  peft 0.21.2 gives equal logits for models without mixtures; beside mixtures it also wraps the
  fused experts and does not. Raises UserError if `path` exists.
  """
  if os.path.exists(path):
    raise UserError(f'lora: {path!r} exists')
  planned, rank = {}, next(iter(factors.values())).a.shape[1]
  for key, f in factors.items():
    n, module = key.split('.', 1)
    slot = config.slots[int(n)]
    for r, layer in enumerate(slot.layers):
      at = f'{PEFT_PREFIX}model.layers.{layer}.{module}'
      for letter, x in (('A', f.a), ('B', f.b)):
        planned[f'{at}.lora_{letter}.weight'] = files.Planned(
          'F32', x.shape[1:], lambda x=x, r=r: np.asarray(x[r]))
  os.makedirs(path)
  files.write_file(os.path.join(path, WEIGHTS), planned)
  with open(os.path.join(path, CONFIG), 'w', encoding='utf-8') as f:
    json.dump(dict(
      peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=base, r=rank,
      lora_alpha=alpha, lora_dropout=0.0, bias='none', fan_in_fan_out=False, inference_mode=True,
      target_modules=_pattern(factors)), f, indent=2)


def _pattern(factors: Mapping[str, Factors]) -> str:
  """Regular expression of the adapted matrices: a bare name would match experts as well."""
  found = sorted({re.escape(key.split('.', 1)[1]) for key in factors})
  return rf'.*\.layers\.\d+\.({"|".join(found)})'


def read(path: str, config: ModelConfig) -> tuple[dict[str, Factors], float]:
  """(factors, alpha) of an adapter folder.

  Raises UserError on adapters that do not fit the model, listing all of them.
  """
  with open(os.path.join(path, CONFIG), encoding='utf-8') as f:
    given = json.load(f)
  if given.get('peft_type') != 'LORA' or given.get('use_dora') or given.get('rank_pattern'):
    raise UserError(f'lora: {path}: only plain LORA of one rank is supported, got '
                    f'{ {k: given.get(k) for k in ("peft_type", "use_dora", "rank_pattern")} }')
  tensors = files.header(os.path.join(path, WEIGHTS))
  at = re.compile(r'.*layers\.(\d+)\.(.+)\.lora_([AB])\.weight')
  parts, faults = {}, []
  for name, t in tensors.items():
    match = at.fullmatch(name)
    if match is None:
      faults.append(f'{name}: unknown')
      continue
    layer, module, letter = int(match[1]), match[2], match[3]
    if layer >= config.layers:
      faults.append(f'{name}: the model has {config.layers} layers')
      continue
    parts[f'{config.place_of(layer)[0]}.{module}', letter, layer] = t
  specs = abstract(config, given['r'])
  found = {}
  for key in dict.fromkeys(k for k, _, _ in parts):
    if key not in specs:
      faults.append(f'{key}: the model has no such matrix')
      continue
    slot, own = config.slots[int(key.split('.')[0])], {}
    for letter, spec in (('A', specs[key].a), ('B', specs[key].b)):
      held = [parts.get((key, letter, layer)) for layer in slot.layers]
      if any(t is None or t.shape != spec.shape[1:] for t in held):
        faults.append(f'{key}.lora_{letter}: missing in a layer, or not {spec.shape[1:]}')
      else:
        own[letter] = jnp.asarray(np.stack([np.asarray(t.read(), np.float32) for t in held]))
    if len(own) == 2:
      found[key] = Factors(own['A'], own['B'])
  if faults:
    raise UserError(f'lora: {path}: ' + '; '.join(faults))
  return found, float(given['lora_alpha'])
