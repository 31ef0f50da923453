"""What the verdicts of all miniatures are made of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Bar(NamedTuple):
  """A pass bar: figure must be above threshold."""

  name: str
  passed: bool
  figure: float
  threshold: float


def mean_error(x: np.ndarray) -> tuple[float, float]:
  """Mean and standard error over seeds."""
  return float(np.mean(x)), float(np.std(x, ddof=1) / len(x) ** 0.5)
