"""Intervals of what is measured: a share (Wilson) and a mean (normal), each with its 95 % interval."""

from collections.abc import Sequence

import numpy as np

Interval = tuple[float, list[float]]
"""A value and the two ends of its 95 % interval."""


def share(hits: Sequence[bool]) -> Interval:
    """A share and its 95 % interval (Wilson 1927)."""
    n, z = len(hits), 1.96
    if not n:
        return float("nan"), [0.0, 1.0]
    p = float(np.mean(hits))
    centre, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    ends = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return p, [max(0.0, ends[0]), min(1.0, ends[1])]  # rounding may leave [0, 1]


def mean(values: Sequence[float]) -> Interval:
    """A mean and its 95 % interval (normal)."""
    m, half = float(np.mean(values)), 1.96 * float(np.std(values)) / max(len(values) - 1, 1) ** 0.5
    return m, [m - half, m + half]
