"""METHODS: every training method by name. A row is its default config and its builder."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from zppo_jax.methods import api, distill, grpo, ppo, sft, zppo


@dataclasses.dataclass(frozen=True)
class Row:
  """defaults: a frozen config; build(config) -> Method."""

  defaults: Any
  build: Callable[[Any], api.Method]


def _grpo(**changes) -> Row:
  return Row(grpo.Config(**changes), grpo.build)


def _zppo(**changes) -> Row:
  return Row(zppo.Config(**changes), zppo.build)


_OFF = dict(use_bcq=False, use_ncq=False)

METHODS: dict[str, Row] = {
  # group-relative policy gradients
  'grpo': _grpo(),
  'rloo': _grpo(estimator='rloo', surrogate='reinforce', aggregation='seq_mean_token_sum'),
  'dr_grpo': _grpo(estimator='dr_grpo', aggregation='seq_mean_token_sum_norm', max_tokens=4096),
  'dapo': _grpo(eps_high=0.28, aggregation='token_mean', dynamic_sampling=True, max_tokens=20480,
                overlong_buffer=4096, iterations=4),
  'gspo': _grpo(surrogate='gspo', eps_low=3e-4, eps_high=4e-4, iterations=4),
  'cispo': _grpo(surrogate='cispo', weight_max=5.0, aggregation='token_mean', iterations=4),
  'reinforce': _grpo(estimator='reinforce', surrogate='reinforce',
                     aggregation='seq_mean_token_sum'),
  'reinforce_pp': _grpo(estimator='reinforce_pp', aggregation='token_mean'),
  'reinforce_pp_baseline': _grpo(estimator='reinforce_pp_baseline', aggregation='token_mean'),
  'remax': _grpo(estimator='remax', surrogate='reinforce', aggregation='seq_mean_token_sum'),
  'ppo': Row(ppo.Config(), ppo.build),
  # ZPPO and its baselines: switches of one builder
  'zppo': _zppo(),
  'zppo_grpo': _zppo(**_OFF, use_buffer=False),
  'zppo_grpo_buffer': _zppo(**_OFF),
  'zppo_bcq': _zppo(use_ncq=False),
  'zppo_ncq': _zppo(use_bcq=False),
  'zppo_both': _zppo(use_buffer=False),
  'zppo_hint': _zppo(**_OFF, guide='hint'),
  'zppo_prefix': _zppo(**_OFF, guide='prefix'),
  'zppo_teacher_response': _zppo(**_OFF, use_buffer=False, guide='teacher_response'),
  # distillation and imitation
  'distill_off': Row(distill.Config(source='teacher'), distill.build),
  'distill_on': Row(distill.Config(), distill.build),
  'opd': Row(distill.Config(signal='advantage', group_size=1), distill.build),
  'sft': Row(sft.Config(), sft.build),
}


def configure(name: str, overrides: Mapping[str, Any]) -> Any:
  """Config of a row with some fields changed. Raises ValueError with the closest name."""
  if name not in METHODS:
    close = difflib.get_close_matches(name, METHODS, n=1)
    raise ValueError(f'method.name: unknown {name!r}' + (f', did you mean {close[0]!r}?' if close
                                                         else f'; known: {sorted(METHODS)}'))
  defaults = METHODS[name].defaults
  fields = [f.name for f in dataclasses.fields(defaults)]
  for key in overrides:
    if key not in fields:
      close = difflib.get_close_matches(key, fields, n=1)
      raise ValueError(f'method.{key}: {name} has no such field' +
                       (f', did you mean {close[0]!r}?' if close else f'; fields: {fields}'))
  return dataclasses.replace(defaults, **overrides)


def build(name: str, overrides: Mapping[str, Any]) -> api.Method:
  """Method by name with some fields changed."""
  return METHODS[name].build(configure(name, overrides))
