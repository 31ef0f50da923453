"""What a user sees of the rollouts of a step: numbers for the metrics, rows for reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zppo_jax.core import types
from zppo_jax.mesh import hosts
from zppo_jax.methods import api


def _kind_metrics(part: api.Drawn, own: np.ndarray) -> dict[int, list[tuple[float, bool]]]:
  """(accuracy, trivial) of each group by kind; `own` as `_own_reward`."""
  shape = -1, part.group_size
  found: dict[int, list[tuple[float, bool]]] = {}
  for group, given, mine in zip(part.groups, part.reward.reshape(shape), own.reshape(shape)):
    scored = np.isfinite(given)  # NaN: a fault ended it
    if group is not None and scored.any():
      found.setdefault(group.kind, []).append(
        (float(mine[scored].mean()), bool(given[scored].max() == given[scored].min())))
  return found


def _own_reward(part: api.Drawn, by_policy: np.ndarray) -> np.ndarray:
  """Rewards of the student: a given answer stands where a wrong one of its own stood."""
  return np.where(by_policy, part.reward, 0.0) if by_policy.any() else part.reward


def rollout_metrics(parts: Sequence[api.Drawn]) -> dict[str, float]:
  """Rewards, groups, lengths and cost of a step. Plain statistics are over kind-0 policy groups."""
  first = parts[0]
  valid, masks, roles = zip(*hosts.fetch(
    [(p.rollout.valid, p.rollout.loss_mask, p.rollout.role_id) for p in parts]))
  own = [_own_reward(p, r == types.POLICY) for p, r in zip(parts, roles)]
  cost = {'rollouts': float(sum(x.sum() for x in valid)),
          'sampled_tokens': float(sum(x.sum() for x in masks))}
  if any(g is not None and g.response is not None for g in first.groups):
    return cost  # given rows: nobody sampled or graded them
  rows = valid[0]
  reward = own[0][rows & np.isfinite(first.reward)]
  reward = reward if len(reward) else np.zeros(1)
  length, status = (x[rows] for x in hosts.fetch((first.rollout.traj_tokens, first.rollout.status)))
  found = {
    'reward/mean': float(reward.mean()), 'reward/std': float(reward.std()),
    'reward/min': float(reward.min()), 'reward/max': float(reward.max()),
    'response/len_mean': float(length.mean()), 'response/len_max': float(length.max()),
    'response/truncated_frac': float((status == types.TRUNCATED).mean()),
  }
  if first.rollout.pool_hits is not None:
    hits, absent = (x[rows] for x in hosts.fetch((first.rollout.pool_hits,
                                                  first.rollout.pool_absent)))
    found |= {'rollout/pool_hits': float(hits.mean()), 'rollout/pool_absent': float(absent.mean())}
  by_kind: dict[int, list[tuple[float, bool]]] = {}
  for part, mine in zip(parts, own):
    for kind, groups in _kind_metrics(part, mine).items():
      by_kind.setdefault(kind, []).extend(groups)
  for kind, groups in sorted(by_kind.items()):
    found[f'group/kind{kind}_count'] = len(groups)
    found[f'group/kind{kind}_accuracy'] = float(np.mean([a for a, _ in groups]))
    found[f'group/kind{kind}_zero_var_frac'] = float(np.mean([t for _, t in groups]))
  everything = [x for groups in by_kind.values() for x in groups]
  found['reward/zero_var_frac'] = float(np.mean([t for _, t in everything] or [1.0]))
  plain = [a for a, _ in by_kind.get(api.PLAIN, [])]
  bins = {'zero': lambda a: a <= 0, 'low': lambda a: 0 < a < 0.5, 'high': lambda a: 0.5 <= a < 1,
          'one': lambda a: a >= 1}
  for name, inside in bins.items():
    found[f'group/pass_rate_{name}'] = float(np.mean([inside(a) for a in plain])) if plain else 0.0
  return found | cost


def version_lag(rollouts: Sequence[types.Rollout], version: int) -> dict[str, float]:
  """How many updates ago the loss tokens were sampled."""
  lags = [version - hosts.fetch(r.version)[hosts.fetch(r.loss_mask)] for r in rollouts]
  lag = np.concatenate(lags) if lags else np.zeros(1)
  return {'version_lag/mean': float(lag.mean()) if lag.size else 0.0,
          'version_lag/max': float(lag.max()) if lag.size else 0.0}


def readable(parts: Sequence[api.Drawn], ctx, max_rows: int) -> list[dict[str, Any]]:
  """Rows for rollouts/step_N.jsonl: some of every kind of group."""
  found = []
  share = max(1, max_rows // max(1, len({g.kind for p in parts for g in p.groups if g})))
  taken: dict[int, int] = {}
  for part in parts:
    for slot, group in enumerate(part.groups):
      if group is None or taken.get(group.kind, 0) >= share:
        continue
      row = part.rows(slot)[taken.get(group.kind, 0) % part.group_size]
      taken[group.kind] = taken.get(group.kind, 0) + 1
      example = ctx.example(group.question)
      messages = group.messages or example.messages
      found.append({'question': example.uid, 'kind': group.kind, 'prompt': messages[-1].content,
                    'response': part.texts[row], 'parsed': part.answers[row],
                    'answer': example.answer, 'reward': float(part.reward[row]),
                    **_turns(part.rollout, row, ctx)})
  return found


def _turns(rollout: types.Rollout, row: int, ctx) -> dict[str, list[dict[str, str]]]:
  """Who said what, where a row has several turns."""
  tokens, mask, turn = hosts.fetch((rollout.tokens[row], rollout.loss_mask[row],
                                    rollout.turn_id[row]))
  if turn.max(initial=0) < 2:
    return {}
  inside = turn > 0
  tokens, mask = tokens[inside], mask[inside]
  cuts = np.flatnonzero(np.diff(mask)) + 1
  return {'turns': [{'by': 'policy' if own[0] else 'environment', 'text': ctx.decode(ids.tolist())}
                    for ids, own in zip(np.split(tokens, cuts), np.split(mask, cuts))]}
