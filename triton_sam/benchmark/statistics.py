"""What a list of times says, and how surely it says it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Values: TypeAlias = NDArray[np.float64]
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Interval:
    """A value and the bounds between which it lies with the confidence asked for."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval as a share of the value; infinite without bounds."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.value > 0):
            return math.inf
        return (self.high - self.low) / (2 * self.value)


def percentiles(values: Sequence[float], which: Sequence[int] = PERCENTILES) -> dict[str, float]:
    """``{"p50": …}`` of ``values``, interpolated between neighbours."""
    found = np.percentile(np.asarray(values, float), which)
    return {f"p{q}": float(value) for q, value in zip(which, found, strict=True)}


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median and its interval, from order statistics: no shape is assumed.

    Times that follow each other are alike, which makes them worth fewer than they are: the
    interval is widened by their lag-1 autocorrelation. With too few values it is open.
    """
    ordered = np.sort(np.asarray(values, float))
    count = len(ordered)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    reach = z * math.sqrt(count) / 2 * _inflation(np.asarray(values, float))
    low, high = math.floor(count / 2 - reach), math.ceil(count / 2 + reach)
    value = float(np.median(ordered))
    if low < 1 or high > count:
        return Interval(value, -math.inf, math.inf)
    return Interval(value, float(ordered[low - 1]), float(ordered[high - 1]))


def _inflation(values: Values) -> float:
    correlation = min(max(autocorrelation(values), 0.0), 0.9)
    return math.sqrt((1 + correlation) / (1 - correlation))


def autocorrelation(values: Values) -> float:
    """Lag-1 correlation of the ranks, which outliers do not rule; 0 for a constant."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(float)
    if len(values) < 3 or np.ptp(values) == 0:
        return 0.0
    centred = ranks - ranks.mean()
    return float((centred[:-1] * centred[1:]).sum() / (centred**2).sum())


def block_indices(count: int, resamples: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Rows of indices into ``count`` values: a moving-block bootstrap, which keeps drift.

    Blocks are about ``sqrt(count)`` long and wrap around.
    """
    length = max(1, round(math.sqrt(count)))
    blocks = -(-count // length)
    starts = generator.integers(0, count, (resamples, blocks, 1))
    indices: NDArray[np.int64] = (starts + np.arange(length)) % count
    return indices.reshape(resamples, -1)[:, :count]


def bootstrap(
    columns: Sequence[Values],
    statistic: Callable[..., Values],
    resamples: int = 2000,
    seed: int = 0,
) -> Values:
    """``statistic`` of resampled ``columns``; rows stay together.

    ``statistic`` takes one array (resamples, n) for each column and reduces the last axis.
    """
    indices = block_indices(len(columns[0]), resamples, np.random.default_rng(seed))
    return statistic(*(column[indices] for column in columns))
