"""Values with 95 % intervals: a share (Wilson) and a mean (normal)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Standard errors from the middle of a normal interval of 95 % to its end.
Z = 1.96


class Interval(NamedTuple):
    """A value and the two ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def ends(self) -> list[float]:
        """[low, high], as JSON files have them beside the value."""
        return [self.low, self.high]

    def __str__(self) -> str:
        """Show the value and half the interval's width: `0.512 ±0.031`."""
        half = (self.high - self.low) / 2
        return f"{self.value:.3f} ±{half:.3f}"

    def __format__(self, spec: str) -> str:
        """Show it as a text: f"{interval:>14}" pads on the left."""
        return format(str(self), spec)


def share_interval(hits: Sequence[float] | np.ndarray) -> Interval:
    """Return the mean of `hits`, values in [0, 1], with its interval (Wilson 1927).

    It lies within [0, 1]. Values between, as 1/2 for a tie, vary less than hits of the same mean,
    and count as so many more. Without values: nan in [0, 1].
    """
    count = len(hits)
    if not count:
        return Interval(float("nan"), 0.0, 1.0)
    share = float(np.mean(hits))

    # Values of 0 and 1 alone have the variance of a coin, others less.
    coin = share * (1 - share)
    ratio = float(np.var(hits)) / coin if coin else 1.0
    spread = Z * Z * min(ratio, 1.0) / count

    # The shares from which this one is Z standard errors away. They are not centred on it but
    # between it and 1/2.
    centre = share + spread / 2
    half = (spread * coin + spread * spread / 4) ** 0.5

    # Rounding may leave [0, 1].
    low = max(0.0, (centre - half) / (1 + spread))
    high = min(1.0, (centre + half) / (1 + spread))
    return Interval(share, low, high)


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the mean of `values` with its interval (normal; the unbiased variance)."""
    mean = float(np.mean(values))
    deviation = float(np.std(values))
    # Divided by n - 1: np.std divides by n.
    half = Z * deviation / max(len(values) - 1, 1) ** 0.5
    return Interval(mean, mean - half, mean + half)
