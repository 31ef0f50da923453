"""The decoder: one pure function for training, scoring, prefill and decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from zppo_jax.core import masks, types
from zppo_jax.mesh import axes
from zppo_jax.models import cache as cache_lib
from zppo_jax.models import layers
from zppo_jax.models.cache import Cache, Prefix
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.mixers import MIXERS, Place
from zppo_jax.models.mlps import MLPS
from zppo_jax.models.params import Block, Params
from zppo_jax.models.stages import Slot, Stage

Array = jax.Array
Edit = tuple[str, Callable[[Array], Array]]
TAP_KINDS = ('residual', 'mixer', 'mlp')
POLICIES = {'full': jax.checkpoint_policies.nothing_saveable,
            'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@types.record
class Output:
  """Result of `forward`. `logits` is None when only hidden states were asked for."""

  logits: Array | None  # f32[B, T, V]
  hidden: Array  # [B, T, D], after the final norm
  cache: Cache | None
  taps: dict[str, Array]  # name -> [B, T, D]


def unembedding(params: Params) -> Array:
  """The output matrix [D, V], tied or not."""
  return params.embed.T if params.head is None else params.head


def unembed(config: ModelConfig, params: Params, hidden: Array) -> Array:
  """Float32 logits; padded vocabulary ids get -1e30 and can never be sampled."""
  matrix = unembedding(params).astype(hidden.dtype)
  logits = jnp.einsum('...d,dv->...v', hidden, matrix, preferred_element_type=jnp.float32)
  if config.logit_cap is not None:
    logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
  if config.num_valid is None or config.num_valid == config.vocab:
    return logits
  return jnp.where(jnp.arange(config.vocab) < config.num_valid, logits, -1e30)


def parse_tap(config: ModelConfig, name: str) -> tuple[str, int]:
  """'mlp.3' -> ('mlp', 3). Raises ValueError on an unknown kind or layer."""
  kind, _, layer = name.partition('.')
  if kind not in TAP_KINDS or not layer.isdigit() or int(layer) >= config.layers:
    raise ValueError(f'taps: {name!r} is not KIND.LAYER with KIND in {TAP_KINDS} and LAYER below '
                     f'{config.layers}')
  return kind, int(layer)


def _hook(config: ModelConfig, kind: str, slot: Slot, repeat, x: Array, edits: Sequence[Edit]):
  """Applies the edits that name this place; `repeat` may be the traced index of a scan."""
  for name, edit in edits:
    edit_kind, layer = parse_tap(config, name)
    if edit_kind == kind and layer in slot.layers:
      x = jnp.where(repeat == slot.layers.index(layer), edit(x), x)
  return x


def _layer(config: ModelConfig, slot: Slot, block: Block, x: Array, place: Place, cache, index,
           prefix, repeat, edits):
  """One layer: (x, its cache, (residual, mixer, mlp) as taps name them)."""
  def finish(branch, post_norm, kind):
    if post_norm is not None:
      branch = layers.norm(config, branch, post_norm)
    return _hook(config, kind, slot, repeat, branch, edits)

  normed = layers.norm(config, x, block.mixer_norm)
  mixed, cache = MIXERS[slot.mixer](config, block.mixer, normed, place, cache, index, prefix)
  mixed = finish(mixed, block.mixer_post_norm, 'mixer')
  x = x + mixed
  branch = MLPS[slot.mlp](config, block.mlp, layers.norm(config, x, block.mlp_norm))
  branch = finish(branch, block.mlp_post_norm, 'mlp')
  x = _hook(config, 'residual', slot, repeat, x + branch, edits)
  return axes.constrain(x, 'batch', 'length', None), cache, (x, mixed, branch)


def _stage(config: ModelConfig, stage: Stage, blocks, x: Array, place: Place, held, prefix, wanted,
           edits):
  """Scans the repeats of a stage: (x, caches, {kind: [stack [R, B, T, D] of each slot]})."""
  def body(carry, scanned):
    x, held = carry
    blocks, index, shared = scanned
    after, seen = list(held), {kind: [] for kind in wanted}
    for n, slot in enumerate(stage.slots):
      x, after[n], states = _layer(config, slot, blocks[n], x, place, held[n], index, shared[n],
                                   index, edits)
      for kind in wanted:
        seen[kind].append(states[TAP_KINDS.index(kind)])
    after = tuple(after)
    return (x, held if place.keep else after), (seen, after if place.keep else None)

  if config.remat != 'none':
    body = jax.checkpoint(body, policy=POLICIES[config.remat])
  index = jnp.arange(stage.repeats)
  (x, held), (seen, kept) = jax.lax.scan(body, (x, held), (blocks, index, prefix),
                                         unroll=min(config.unroll, stage.repeats))
  return x, kept if place.keep else held, seen


def _blocks(config: ModelConfig, params: Params, x: Array, place: Place, cache, prefix, taps,
            edits, split: bool):
  """All layers: (x, caches, {tap: [B, T, D]})."""
  wanted = sorted({parse_tap(config, t)[0] for t in taps})
  none = (None,) * len(params.blocks)
  held = none if cache is None else cache.layers
  shared = none if prefix is None else prefix.layers
  if split:
    return _one_by_one(config, params, x, place, held, shared, taps, edits)
  out, stacks, at = [], {kind: [] for kind in wanted}, 0
  for stage in config.stages:
    part = slice(at, at + len(stage.slots))
    x, caches, seen = _stage(config, stage, params.blocks[part], x, place, held[part], shared[part],
                             wanted, edits)
    out, at = [*out, *caches], part.stop
    for kind in wanted:
      stacks[kind] += seen[kind]

  def find(name):
    kind, layer = parse_tap(config, name)
    slot, repeat = config.place_of(layer)
    return stacks[kind][slot][repeat]

  return x, tuple(out), {name: find(name) for name in taps}


def split_blocks(config: ModelConfig, params: Params) -> Params:
  """Parameters for a split cache: the block of each layer by itself."""
  return dataclasses.replace(params, blocks=cache_lib.unstack(config, params.blocks))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _plain_layer(config: ModelConfig, slot: Slot, block: Block, x: Array, place: Place, cache,
                 prefix):
  """`_layer` without edits; traced and lowered once for all layers of a slot."""
  return _layer(config, slot, block, x, place, cache, None, prefix, None, ())


def _one_by_one(config: ModelConfig, params: Params, x: Array, place: Place, held, prefix, taps,
                edits):
  """`_blocks` over a split cache, layer by layer."""
  out, seen = [], {}
  for layer in range(config.layers):
    n, repeat = config.place_of(layer)
    slot, block = config.slots[n], params.blocks[layer]
    if edits:
      x, cache, states = _layer(config, slot, block, x, place, held[layer], None, prefix[layer],
                                repeat, edits)
    else:
      x, cache, states = _plain_layer(config, slot, block, x, place, held[layer], prefix[layer])
    out.append(cache)
    seen |= {f'{kind}.{layer}': state for kind, state in zip(TAP_KINDS, states)}
  return x, tuple(out), {name: seen[name] for name in taps}


def forward(config: ModelConfig, params: Params, tokens: Array, *, positions: Array | None = None,
            segment_ids: Array | None = None, cache: Cache | None = None,
            prefix: Prefix | None = None, taps: Sequence[str] = (),
            edits: Sequence[Edit] = (), want: Literal['logits', 'hidden'] = 'logits',
            keep: Literal['nothing', 'stacked', 'split'] = 'nothing',
            rotary: dict[int, tuple[Array, Array]] | None = None) -> Output:
  """Runs the decoder on tokens i32[B, T].

  Without a cache, tokens attend causally inside equal segment ids (0 = padding). With a cache, row
  b is appended after its cache.length[b] tokens; its padding (segment 0) must be a suffix and does
  not lengthen the row. With a prefix, every token also sees the prompt of its group. `taps` names
  states to return ('residual.2', 'mixer.0', 'mlp.1'), `edits` are (name, function) pairs applied
  there. `keep` makes a cache, or from split blocks a split one, of whole rows: it is as long as
  they are. `rotary`: `layers.rotary_table` of all positions, which a loop makes once.

  Raises ValueError where `keep` goes with a cache or a prefix.
  """
  if keep != 'nothing' and (cache is not None or prefix is not None):
    raise ValueError(f'keep: {keep!r} is for whole rows, without a cache and a prefix')
  if segment_ids is None:
    segment_ids = jnp.ones(tokens.shape, jnp.int32)
  start = jnp.zeros(tokens.shape[0], jnp.int32) if cache is None else cache.length
  if positions is None:
    positions = (masks.positions_in_segments(segment_ids) if cache is None else
                 jnp.broadcast_to(start, tokens.shape[:1])[:, None] + jnp.arange(tokens.shape[1]))
    if prefix is not None:
      group = tokens.shape[0] // prefix.length.shape[0]
      positions += jnp.repeat(prefix.length, group)[:, None]
  x = jnp.take(params.embed, tokens, axis=0).astype(config.dtype)
  if config.embed_scale != 1.0:
    x = x * jnp.asarray(config.embed_scale, config.dtype)
  x = axes.constrain(x, 'batch', 'length', None)
  angles = (layers.rotary(config, positions) if rotary is None else
            jax.tree.map(lambda table: jnp.take(table, positions, axis=0, mode='clip'), rotary))
  place = Place(angles, segment_ids, start, None if prefix is None else prefix.length,
                keep=keep != 'nothing')
  split = keep == 'split' if cache is None else cache.split
  x, held, found = _blocks(config, params, x, place, cache, prefix, taps, edits, split)
  hidden = layers.norm(config, x, params.final_norm)
  if cache is not None or place.keep:
    added = (tokens.shape[1] if start.ndim == 0 else
             jnp.sum(segment_ids > 0, axis=1, dtype=jnp.int32))
    cache = Cache(held, start + added, split)
  logits = unembed(config, params, hidden) if want == 'logits' else None
  return Output(logits, hidden, cache, found)
