"""Models by name: the fields that `--config.model.preset=NAME` sets."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
  # Three linear layers to one of softmax attention, as in the published hybrids.
  'hybrid_tiny': dict(
    hidden=96, layers=4, heads=4, kv_heads=2, head_dim=24, inter=256, linear_heads=2,
    linear_value_heads=4, linear_key_dim=16, linear_value_dim=16,
    mixers=('fg2_gdn_plus', 'fg2_gdn_plus', 'fg2_gdn_plus', 'full')),
})


def expand(section: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a model section with those of its preset, if it names one, in their place.

  Raises ValueError on an unknown name.
  """
  fields = dict(section)
  name = fields.pop('preset', '')
  if not name:
    return fields
  if name not in PRESETS:
    raise ValueError(f'model.preset {name!r} is not one of {sorted(PRESETS)}')
  return fields | PRESETS[name]
