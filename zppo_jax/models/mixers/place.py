"""Where the tokens of a call stand."""

from __future__ import annotations

from zppo_jax.core import types


@types.record
class Place:
  rotary: dict[int, tuple[types.Array, types.Array]]  # see `layers.rotary`
  segment_ids: types.Array  # i32[B, T], 0 = padding
  start: types.Array  # i32[B] or i32[], column of the first token in the cache (0 without one)
  prefix_length: types.Array | None = None  # i32[P], of a shared prefix
  keep: bool = types.static(default=False)  # whole rows hand back what a cache holds of them
