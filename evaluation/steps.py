"""Measures of reward models of steps, and the majority among final answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def auc(scores: np.ndarray, right: np.ndarray) -> float:
    """Return the probability that a right one scores above a wrong one, ties a half; [N] each.

    Mann and Whitney 1947. nan where all are right or all wrong.
    """
    rights = int(right.sum())
    wrongs = len(right) - rights
    if not rights * wrongs:
        return float("nan")

    # Ranks from 1, the lowest score first; equal scores share the mean of their ranks.
    _, number, count = np.unique(scores, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(count) - (count - 1) / 2
    ranks = mean_ranks[number]

    # The rank sum of the right ones, less what it would be if they were the lowest.
    above = ranks[right].sum() - rights * (rights + 1) / 2
    return float(above / (rights * wrongs))


def step_table(
    logits_NT: np.ndarray, targets_NT: np.ndarray, mask_NT: np.ndarray
) -> dict[str, float]:
    """Measure the log-odds `logits_NT` that steps are right against their labels.

    A step counts at its last token, where `mask_NT` is 1; it is right where `targets_NT` >= 0.5.
    Returns `accuracy` (at probability 1/2, which itself is half right), `auc`, `first_error`,
    `wrong` (the share of wrong steps) and `steps` (how many are labelled). `first_error`: of the
    solutions with a wrong step, the share whose first step with negative log-odds is the first
    wrong one (else nan).
    """
    labelled_NT = mask_NT > 0
    right_NT = targets_NT >= 0.5

    # Over all labelled steps, M of them.
    right_M = right_NT[labelled_NT]
    logits_M = logits_NT[labelled_NT]
    same_side_M = (logits_M > 0) == right_M
    correct_M = np.where(logits_M == 0, 0.5, same_side_M)

    # By solution: where its wrong steps are, and where the model takes a step for wrong.
    wrong_NT = labelled_NT & ~right_NT
    doubted_NT = labelled_NT & (logits_NT < 0)
    return {
        "accuracy": float(correct_M.mean()),
        "auc": auc(logits_M, right_M),
        "first_error": first_error(wrong_NT, doubted_NT),
        "wrong": float(wrong_NT.sum() / labelled_NT.sum()),
        "steps": float(labelled_NT.sum()),
    }


def first_error(wrong_NT: np.ndarray, doubted_NT: np.ndarray) -> float:
    """Return how often the first doubted step is the first wrong one, of rows that have one."""
    has_wrong_N = wrong_NT.any(1)
    if not has_wrong_N.any():
        return float("nan")
    # Rows without a doubted step find nothing: -1 is no position.
    first_doubted_N = np.where(doubted_NT.any(1), doubted_NT.argmax(1), -1)
    found_N = wrong_NT.argmax(1) == first_doubted_N
    return float(found_N[has_wrong_N].mean())


def majority(answers: Sequence[Any]) -> int:
    """Return the index of the first of the commonest answer (Wang et al. 2023).

    None, no answer, does not vote, unless all are None. Among equally common answers the one that
    comes first wins.
    """
    votes = [answer for answer in answers if answer is not None]
    if not votes:
        votes = list(answers)
    # In the order of their first appearance, so that max takes the first of equally common ones.
    distinct = dict.fromkeys(votes)
    winner = max(distinct, key=votes.count)
    return list(answers).index(winner)
