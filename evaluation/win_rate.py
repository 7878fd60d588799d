"""How often one model's responses beat another's."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.intervals import share_interval


def wins(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> np.ndarray:
    """Compare scores prompt by prompt: 1 where ours is higher, 1/2 for a tie, else 0."""
    our_N = np.asarray(ours)
    their_N = np.asarray(theirs)
    won_N = our_N > their_N
    tied_N = our_N == their_N
    return won_N + 0.5 * tied_N


def win_rate_table(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Compare the rewards [N] of two models' responses to the same prompts.

    Returns `n`, `win_rate` with its interval `win_rate_ci`, and the mean rewards, `reward` (ours)
    and `reward_against`.
    """
    rate = share_interval(wins(ours, theirs))
    return {
        "n": len(ours),
        "win_rate": rate.value,
        "win_rate_ci": rate.ends,
        "reward": float(ours.mean()),
        "reward_against": float(theirs.mean()),
    }
