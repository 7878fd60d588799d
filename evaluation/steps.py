"""Measures of reward models of steps, and the majority among final answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def auc(scores: np.ndarray, right: np.ndarray) -> float:
    """Probability that a right one scores above a wrong one, ties a half (Mann and Whitney 1947); nan without both."""
    _, number, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[number]  # ties share the mean of theirs
    n = int(right.sum())
    pairs = n * (len(right) - n)
    return float((rank[right].sum() - n * (n + 1) / 2) / pairs) if pairs else float("nan")


def step_table(
    logits_NT: np.ndarray, targets_NT: np.ndarray, mask_NT: np.ndarray
) -> dict[str, float]:
    """Of labelled steps: accuracy at probability 1/2, AUC; of solutions with a wrong step, how often the first one
    that the model takes for wrong is the first one that is."""
    labelled, right = mask_NT > 0, targets_NT >= 0.5
    faults_NT, found_NT = labelled & ~right, labelled & (logits_NT < 0)
    with_fault = faults_NT.any(1)
    first = faults_NT.argmax(1) == np.where(found_NT.any(1), found_NT.argmax(1), -1)
    return {
        "accuracy": float(((logits_NT > 0) == right)[labelled].mean()),
        "auc": auc(logits_NT[labelled], right[labelled]),
        "first_error": float(first[with_fault].mean()) if with_fault.any() else float("nan"),
        "wrong": float(faults_NT.sum() / labelled.sum()),
        "steps": float(labelled.sum()),
    }


def majority(answers: Sequence[Any]) -> int:
    """Index of the first of the commonest answer (Wang et al. 2023); None does not vote, unless all are."""
    votes = [answer for answer in answers if answer is not None] or list(answers)
    return answers.index(max(dict.fromkeys(votes), key=votes.count))
