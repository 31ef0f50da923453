"""The decoder: one pure function for training, scoring, prefill and decoding."""

from __future__ import annotations

import dataclasses
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
from zppo_jax.models.params import Params

Array = jax.Array
Edit = tuple[str, Callable[[Array], Array]]
TAP_KINDS = ('residual', 'mixer', 'mlp')


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


def _hook(config: ModelConfig, kind: str, slot: int, repeat, x: Array, edits: Sequence[Edit]):
  """Applies the edits that name this place; `repeat` is the traced index of the scanned block."""
  for name, edit in edits:
    edit_kind, layer = parse_tap(config, name)
    if edit_kind == kind and layer % len(config.mixers) == slot:
      x = jnp.where(repeat == layer // len(config.mixers), edit(x), x)
  return x


def _blocks(config: ModelConfig, params: Params, x: Array, place: Place, cache, prefix, taps,
            edits):
  """Scans the repeated blocks; returns (x, cache layers, {(kind, slot): [R, B, T, D]})."""
  wanted = {parse_tap(config, t)[0] for t in taps}

  def body(carry, scanned):
    x, held = carry
    blocks, repeat, shared, layer = scanned
    held, seen = list(held), {}
    for slot, (block, mixer, prefix) in enumerate(zip(blocks, config.mixers, shared)):
      normed = layers.rms_norm(x, block.mixer_norm, config.norm_eps)
      mixed, held[slot] = MIXERS[mixer](config, block.mixer, normed, place, held[slot], layer,
                                        prefix)
      mixed = _hook(config, 'mixer', slot, repeat, mixed, edits)
      x = x + mixed
      normed = layers.rms_norm(x, block.mlp_norm, config.norm_eps)
      branch = layers.swiglu(normed, block.mlp.gate, block.mlp.up, block.mlp.down)
      branch = _hook(config, 'mlp', slot, repeat, branch, edits)
      x = _hook(config, 'residual', slot, repeat, x + branch, edits)
      x = axes.constrain(x, 'batch', 'length', None)
      seen |= {(k, slot): v for k, v in zip(TAP_KINDS, (x, mixed, branch)) if k in wanted}
    return (x, tuple(held)), seen

  if config.remat:
    body = jax.checkpoint(body, policy=jax.checkpoint_policies.nothing_saveable)
  none = (None,) * len(config.mixers)
  held = none if cache is None else cache.layers
  shared = none if prefix is None else prefix.layers
  if cache is not None and cache.split:
    return _one_by_one(body, x, held, params.blocks, shared)
  index = jnp.arange(config.repeats)
  return jax.lax.scan(body, (x, held), (params.blocks, index, shared, index),
                      unroll=config.unroll)


def split_blocks(config: ModelConfig, params: Params) -> Params:
  """Parameters for a split cache: the blocks of each repeat by themselves."""
  return dataclasses.replace(params, blocks=cache_lib.unstack(params.blocks, config.repeats))


def _one_by_one(body, x: Array, held, blocks, prefix):
  """The scan of _blocks over a split cache, written out."""
  out, seen = [], []
  for r, scanned in enumerate(zip(held, blocks, prefix)):
    (x, cache), found = body((x, scanned[0]), (scanned[1], r, scanned[2], None))
    out.append(cache)
    seen.append(found)
  return (x, tuple(out)), jax.tree.map(lambda *a: jnp.stack(a), *seen)


def forward(config: ModelConfig, params: Params, tokens: Array, *, positions: Array | None = None,
            segment_ids: Array | None = None, cache: Cache | None = None,
            prefix: Prefix | None = None, taps: Sequence[str] = (),
            edits: Sequence[Edit] = (),
            want: Literal['logits', 'hidden'] = 'logits') -> Output:
  """Runs the decoder on tokens i32[B, T].

  Without a cache, tokens attend causally inside equal segment ids (0 = padding). With a cache, row
  b is appended after its cache.length[b] tokens; its padding (segment 0) must be a suffix and does
  not lengthen the row. With a prefix, every token also sees the prompt of its group. `taps` names
  states to return ('residual.2', 'mixer.0', 'mlp.1'), `edits` are (name, function) pairs applied
  there.
  """
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
  x = axes.constrain(x, 'batch', 'length', None)
  place = Place(positions, segment_ids, start, None if prefix is None else prefix.length)
  (x, held), seen = _blocks(config, params, x, place, cache, prefix, taps, edits)
  hidden = layers.rms_norm(x, params.final_norm, config.norm_eps)
  if cache is not None:
    added = (tokens.shape[1] if start.ndim == 0 else
             jnp.sum(segment_ids > 0, axis=1, dtype=jnp.int32))
    cache = Cache(held, start + added, cache.split)
  found = {}
  for name in taps:
    kind, layer = parse_tap(config, name)
    found[name] = seen[kind, layer % len(config.mixers)][layer // len(config.mixers)]
  logits = unembed(config, params, hidden) if want == 'logits' else None
  return Output(logits, hidden, cache, found)
