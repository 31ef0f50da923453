"""How the layers of a model are stacked: runs of repeated patterns, each scanned."""

from __future__ import annotations

import dataclasses
import functools

LONGEST_PATTERN = 16  # layers


@dataclasses.dataclass(frozen=True)
class Slot:
  """Layers first, first + step, .. of one kind, whose parameters are stacked."""

  mixer: str
  mlp: str
  first: int
  step: int
  repeats: int

  @property
  def layers(self) -> range:
    """Numbers of its layers, in the order of the stack."""
    return range(self.first, self.first + self.step * self.repeats, self.step)


@dataclasses.dataclass(frozen=True)
class Stage:
  """A pattern of layers that is scanned `repeats` times."""

  slots: tuple[Slot, ...]
  repeats: int


@functools.lru_cache(maxsize=256)
def find_stages(kinds: tuple[tuple[str, str], ...]) -> tuple[Stage, ...]:
  """Greedy: at each layer the pattern that covers most of what follows by repeating.

  Layers that start no repetition form stages of one repeat.
  """
  stages, at, lonely = [], 0, []

  def close():
    if lonely:
      stages.append(_stage(kinds, lonely[0], len(lonely), 1))
      lonely.clear()

  while at < len(kinds):
    period, repeats = _best_pattern(kinds, at)
    if repeats < 2:
      lonely.append(at)
      at += 1
      continue
    close()
    stages.append(_stage(kinds, at, period, repeats))
    at += period * repeats
  close()
  return tuple(stages)


def _best_pattern(kinds, at: int) -> tuple[int, int]:
  """(period, repeats) of the longest cover from `at` on, the shortest period among equals."""
  best = (1, 1)
  for period in range(1, min(LONGEST_PATTERN, (len(kinds) - at) // 2) + 1):
    pattern, repeats = kinds[at:at + period], 1
    while kinds[at + repeats * period:at + (repeats + 1) * period] == pattern:
      repeats += 1
    if repeats > 1 and period * repeats > best[0] * best[1]:
      best = period, repeats
  return best


def _stage(kinds, first: int, period: int, repeats: int) -> Stage:
  return Stage(tuple(Slot(*kinds[first + i], first + i, period, repeats) for i in range(period)),
               repeats)
