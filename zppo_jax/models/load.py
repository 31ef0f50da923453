"""Published checkpoints: folders of safetensors with a config.json, read and written.

Every shard of a parameter reads just its own bytes, leaf by leaf, into its place on the mesh.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from zppo_jax.core import trees
from zppo_jax.core.errors import UserError
from zppo_jax.mesh import hosts
from zppo_jax.models import hf_config, hf_names, hf_write
from zppo_jax.models import params as params_lib
from zppo_jax.models import safetensors as files
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.hf_names import Row

PREFIXES = ('model.language_model.', 'model.', 'language_model.model.', '')
AT_ONCE = 2**28  # bytes of a leaf that the host may hold
IGNORED = ('mtp.', 'model.visual.', 'visual.')  # parts that a text model does not have
COPIED = ('generation_config.json', 'tokenizer.json', 'tokenizer_config.json',
          'special_tokens_map.json', 'vocab.json', 'merges.txt', 'tokenizer.model',
          'tiktoken.model', 'chat_template.jinja', 'preprocessor_config.json',
          'video_preprocessor_config.json', 'added_tokens.json')


@dataclasses.dataclass(frozen=True)
class _Place:
  """A row of one layer: its full names, and which leaves it fills."""

  row: Row
  names: tuple[str, ...]
  leaves: tuple[str, ...]  # paths in Params
  layer: int | None  # index in the stack
  shapes: tuple[tuple[int, ...], ...]  # of the tensors, of one expert where each has its own


def _places(config: ModelConfig, prefix: str, fused: bool) -> Iterator[_Place]:
  specs = named_specs(config)

  def shapes(row: Row, leaves, stacked: bool):
    drop = stacked + row.per_expert
    abstract = [jax.ShapeDtypeStruct(specs[leaf].shape[drop:], jnp.float32) for leaf in leaves]
    return tuple(x.shape for x in jax.eval_shape(row.join, *abstract))

  for row in hf_names.top_rows(config):
    yield _Place(row, (prefix + row.names[0],), row.leaves, None, shapes(row, row.leaves, False))
  if not config.tied:
    head = hf_names.HEAD
    yield _Place(head, head.names, head.leaves, None, shapes(head, head.leaves, False))
  for n, slot in enumerate(config.slots):
    for row in hf_names.block_rows(config, slot, fused):
      leaves = tuple(f'blocks.{n}.{leaf}' for leaf in row.leaves)
      own = shapes(row, leaves, True)
      for r, layer in enumerate(slot.layers):
        names = tuple(prefix + name.replace('{i}', str(layer)) for name in row.names)
        yield _Place(row, names, leaves, r, own)


def _expanded(place: _Place, experts: int) -> Iterator[tuple[str, ...]]:
  """Names of a place, for each expert where there is one tensor per expert."""
  if not place.row.per_expert:
    yield place.names
    return
  for e in range(experts):
    yield tuple(name.replace('{e}', str(e)) for name in place.names)


def named_specs(config: ModelConfig) -> dict[str, params_lib.Spec]:
  flat = jax.tree_util.tree_flatten_with_path(params_lib.abstract(config),
                                              is_leaf=params_lib.is_spec)[0]
  return {trees.path_name(path): spec for path, spec in flat}


def _open(path: str) -> dict[str, files.Tensor]:
  """Tensors of a folder; some releases call the dense layer of Kimi a mixture: its own name."""
  dense = tuple(f'block_sparse_moe.{n}_proj.weight' for n in ('gate', 'up', 'down'))
  return {name.replace('.block_sparse_moe.', '.mlp.') if name.endswith(dense) and
          '.shared_experts.' not in name else name: t
          for name, t in files.open_folder(path).items()}


def _layout(config: ModelConfig, tensors: Mapping[str, Any]) -> tuple[str, bool]:
  """(prefix of the decoder's tensors, whether experts are fused) of a checkpoint."""
  prefix = next((p for p in PREFIXES if f'{p}embed_tokens.weight' in tensors), None)
  if prefix is None:
    raise UserError('model: no tensor is called [..]embed_tokens.weight')
  return prefix, any(name.endswith('experts.gate_up_proj') for name in tensors)


def _ignored(config: ModelConfig, prefix: str, name: str) -> bool:
  """Whether a tensor belongs to a part that a text decoder leaves out."""
  if name.startswith(IGNORED) or name.endswith('rotary_emb.inv_freq'):
    return True
  number = name.removeprefix(f'{prefix}layers.').split('.')[0]
  return (name.startswith(f'{prefix}layers.') and number.isdecimal() and
          int(number) >= config.layers)  # a layer that predicts later tokens


def _check_names(config: ModelConfig, places, tensors, prefix: str, where: str) -> None:
  """Raises UserError with every tensor that is missing, extra or of another shape."""
  faults, known = [], set()
  for place in places:
    for names in _expanded(place, config.moe.experts if config.moe else 0):
      known.update(names)
      for name, shape in zip(names, place.shapes):
        if name not in tensors:
          faults.append(f'{name}: missing')
        elif tensors[name].shape != shape:
          faults.append(f'{name}: {tensors[name].shape}, expected {shape}')
  faults += [f'{name}: unknown' for name in tensors
             if name not in known and not _ignored(config, prefix, name)]
  if faults:
    raise UserError(f'model: {where}: {len(faults)} tensors do not fit: ' + '; '.join(faults))


def _head_of_tied(config: ModelConfig, tensors: Mapping[str, files.Tensor], prefix: str,
                  where: str) -> tuple[ModelConfig, dict[str, files.Tensor]]:
  """A tied checkpoint may still hold its head; one that differs from the embedding is used."""
  tensors = dict(tensors)
  if not config.tied or 'lm_head.weight' not in tensors:
    return config, tensors
  if np.array_equal(tensors['lm_head.weight'].read(),
                    tensors[f'{prefix}embed_tokens.weight'].read()):
    del tensors['lm_head.weight']
    return config, tensors
  warnings.warn(f'{where}: tied by its config, but lm_head.weight is not the embedding: untied',
                stacklevel=3)
  return dataclasses.replace(config, tied=False), tensors


def load(path: str, *, mesh: Mesh | None = None, dtype: str | None = None,
         param_dtype: str | None = None, check: bool = False) -> tuple[ModelConfig, Any]:
  """(config, parameters) of a published checkpoint folder, each shard read into its place.

  `dtype` of activations and `param_dtype` of parameters, by default both as config.json says;
  norms, routers and rates of recurrent states are float32. `check` refuses values that are not
  finite. Raises UserError, before any array is made, listing every tensor that does not fit.
  """
  path = os.path.abspath(path)
  config = hf_config.read(path)
  stored = hf_config.stored_dtype(path)
  config = dataclasses.replace(config, dtype=dtype or stored, param_dtype=param_dtype or dtype or
                               stored)
  tensors = _open(path)
  prefix, fused = _layout(config, tensors)
  config, tensors = _head_of_tied(config, tensors, prefix, path)
  places = list(_places(config, prefix, fused))
  _check_names(config, places, tensors, prefix, path)
  sources: dict[str, dict[int | None, _Place]] = {}
  for place in places:
    for leaf in place.leaves:
      sources.setdefault(leaf, {})[place.layer] = place
  specs = params_lib.abstract(config)
  shardings = None if mesh is None else params_lib.shardings(specs, mesh)

  def fill(key_path, spec: params_lib.Spec, sharding=None):
    name = trees.path_name(key_path)
    read = functools.partial(_read, sources[name], tensors, name, spec)
    return _checked(name, _array(spec, sharding, read), check)

  rest = () if shardings is None else (shardings,)
  return config, jax.tree_util.tree_map_with_path(fill, specs, *rest, is_leaf=params_lib.is_spec)


def _array(spec: params_lib.Spec, sharding, read) -> jax.Array:
  """The leaf, of `read(index)`; a large one layer by layer, so that the host holds little of it."""
  def whole(shape, where, read):
    if where is None:
      return jnp.asarray(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, where, read)

  size = math.prod(spec.shape) * jnp.dtype(spec.dtype).itemsize
  if size <= AT_ONCE or spec.axes[0] != 'layers':
    return whole(spec.shape, sharding, read)
  put = jax.jit(lambda x, part, at: jax.lax.dynamic_update_slice_in_dim(x, part, at, 0),
                donate_argnums=0, out_shardings=sharding)
  x = jnp.zeros(spec.shape, spec.dtype, device=sharding)
  for at in range(spec.shape[0]):
    part = whole((1, *spec.shape[1:]), sharding, lambda i, at=at: read((slice(at, at + 1), *i[1:])))
    x = jax.block_until_ready(put(x, part, at))
  return x


def _checked(name: str, x: jax.Array, check: bool) -> jax.Array:
  if check and not bool(jnp.isfinite(x).all()):
    raise UserError(f'model: {name} holds values that are not finite')
  return x


def _read(places: Mapping[int | None, _Place], tensors: Mapping[str, files.Tensor], leaf: str,
          spec: params_lib.Spec, index) -> np.ndarray:
  """A slice of a stacked leaf, copied out of the mapped files."""
  index = tuple(slice(*i.indices(n)) for i, n in zip(index, spec.shape))
  out = np.empty([len(range(i.start, i.stop)) for i in index], jnp.dtype(spec.dtype))

  def view(place: _Place, expert: int | None):
    names = place.names
    if expert is not None:
      names = tuple(n.replace('{e}', str(expert)) for n in names)
    return place.row.split(*(tensors[n].read() for n in names))[place.leaves.index(leaf)]

  def fill(target, place: _Place, rest):
    if not place.row.per_expert:
      target[...] = view(place, None)[rest]
      return
    for n, e in enumerate(range(rest[0].start, rest[0].stop)):
      target[n] = view(place, e)[rest[1:]]

  if None in places:
    fill(out, places[None], index)
  else:
    for n, layer in enumerate(range(index[0].start, index[0].stop)):
      fill(out[n], places[layer], index[1:])
  return out


def save(path: str, config: ModelConfig, params, *, source: str | None = None,
         dtype: str | None = None) -> None:
  """Writes a folder that `transformers` loads with equal logits.

  With a `source` folder (the checkpoint that was read) its config, tokenizer, layout, dtypes and
  the parts that a text model leaves out (vision tower, MTP) are kept; else config.json is written
  from `config`. `dtype` of the tensors, by default that of the source or of the parameters. The
  folder appears whole or not at all. Raises UserError if `path` exists.
  """
  if os.path.exists(path):
    raise UserError(f'model: {path!r} exists')
  kept: dict[str, files.Tensor] = _open(source) if source else {}
  if not source:
    config = dataclasses.replace(config, family=hf_write.text_family(config))
  prefix, fused = _layout(config, kept) if source else ('model.', False)
  planned = _plan(config, params, kept, prefix, fused, dtype)
  for name, t in kept.items():
    if name not in planned and _ignored(config, prefix, name):
      planned[name] = files.Planned(t.dtype, t.shape, t.read)
  temporary = f'{path.rstrip("/")}.tmp'
  writes = jax.process_index() == 0
  if writes:
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    files.write_folder(temporary, planned)
    _write_config(temporary, config, source, dtype)
    os.rename(temporary, path)
  else:
    for t in planned.values():  # takes part in the gathering
      t.make()


def _plan(config: ModelConfig, params, kept: Mapping[str, files.Tensor], prefix: str, fused: bool,
          dtype: str | None) -> dict[str, files.Planned]:
  specs, leaves, planned = named_specs(config), dict(_leaves(params)), {}
  for place in _places(config, prefix, fused):
    for e, names in enumerate(_expanded(place, config.moe.experts if config.moe else 0)):
      at = () if place.layer is None else (place.layer,)
      at += (e,) if place.row.per_expert else ()
      for k, (name, shape) in enumerate(zip(names, place.shapes)):
        make = functools.partial(_join, place, [leaves[x] for x in place.leaves], at, k)
        own = files.NAMES[jnp.dtype(leaves[place.leaves[0]].dtype)]
        if dtype and specs[place.leaves[0]].dtype != 'float32':
          own = files.NAMES[jnp.dtype(dtype)]
        planned[name] = files.Planned(kept[name].dtype if name in kept and not dtype else own,
                                      shape, make)
  return planned


def _leaves(params) -> Iterator[tuple[str, jax.Array]]:
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    yield trees.path_name(path), leaf


def _join(place: _Place, leaves, at: tuple[int, ...], which: int) -> np.ndarray:
  return place.row.join(*(hosts.fetch(x[at]) for x in leaves))[which]


def _write_config(folder: str, config: ModelConfig, source: str | None, dtype: str | None) -> None:
  if source:
    with open(os.path.join(source, 'config.json'), encoding='utf-8') as f:
      found = json.load(f)
    for name in COPIED:
      if os.path.exists(os.path.join(source, name)):
        shutil.copy(os.path.join(source, name), folder)
    if dtype:
      found['dtype'] = dtype
    if 'tie_word_embeddings' in found or not config.tied:
      found['tie_word_embeddings'] = config.tied
  else:
    found = hf_write.to_json(config, dtype or config.param_dtype)
  with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:
    json.dump(found, f, indent=2)
