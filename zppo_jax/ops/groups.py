"""Statistics of reward groups. Dims: N rows, P groups; a group is keyed by its own id.

Source: GRPO arXiv:2402.03300; the trivial flag is max == min, never a float std.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from zppo_jax.core.types import Array, record


@record
class GroupStats:
  """Per-group reward statistics over scorable rows; every field has shape [P]."""

  mean: Array  # f32, 0 for an empty group
  std: Array  # f32, with the `ddof` asked for; 0 where count <= ddof
  count: Array  # f32, scorable rows
  low: Array  # f32, smallest reward, +inf for an empty group
  high: Array  # f32, largest reward, -inf for an empty group
  trivial: Array  # bool, all rewards equal, or fewer than 2 scorable rows


def widen(x: Array) -> Array:
  """x as float32, or as it is when wider (float64 under x64): the dtype of all reductions."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def scorable(reward: Array, valid: Array) -> Array:
  """bool[N]: valid rows whose reward is finite; the others enter no statistic."""
  return jnp.asarray(valid, bool) & jnp.isfinite(widen(reward))


def group_stats(
  reward: Array, group_id: Array, valid: Array, *, num_groups: int, ddof: int = 1
) -> GroupStats:
  """Mean and std of the rewards of each group, over its scorable rows.

  std = sqrt(sum (r - mean)^2 / (count - ddof)), two passes.
  reward f32[N], group_id i32[N], valid bool[N] -> fields [P]. Rows with a NaN reward, and rows
  whose id is outside [0, num_groups), are left out. Source: arXiv:2402.03300 (ddof 1).
  """
  rows = scorable(reward, valid)
  r = jnp.where(rows, widen(reward), 0)
  total = lambda x: jax.ops.segment_sum(x, group_id, num_groups)
  count = total(rows.astype(r.dtype))
  mean = total(r) / jnp.maximum(count, 1)
  centred = jnp.where(rows, r - mean[group_id], 0)
  var = total(centred**2) / jnp.maximum(count - ddof, 1)
  low = jax.ops.segment_min(jnp.where(rows, r, jnp.inf), group_id, num_groups)
  high = jax.ops.segment_max(jnp.where(rows, r, -jnp.inf), group_id, num_groups)
  std = jnp.sqrt(jnp.where(count > ddof, var, 0))
  return GroupStats(mean, std, count, low, high, (count < 2) | (low == high))


def check_group_ids(group_id, num_groups: int, group_size: int) -> None:
  """Host check: ids in [0, num_groups) and at least `group_size` rows in each group that occurs.

  Raises ValueError naming the argument, the bound and the value.
  """
  ids = np.asarray(group_id)
  if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(f'group_id must be an integer vector, got {ids.dtype}{list(ids.shape)}')
  outside = ids[(ids < 0) | (ids >= num_groups)]
  if outside.size:
    raise ValueError(f'group_id must be in [0, num_groups={num_groups}), got {outside[0]}')
  found, count = np.unique(ids, return_counts=True)
  short = np.flatnonzero(count < group_size)
  if short.size:
    raise ValueError(
      f'group_id: every group must have group_size={group_size} rows, '
      f'group {found[short[0]]} has {count[short[0]]}'
    )
