"""Weights of tokens from the edits that turn the worst response of a ranking into the best."""

import numpy as np

from data.batches import Batch
from data.preferences import best_and_worst_index


def edit_distances(same: np.ndarray) -> list[np.ndarray]:
    """Return the table of Levenshtein distances between all beginnings of two sequences.

    `same` [I, J]: whether item i of the first equals item j of the second. Entry [i][j] is the
    fewest insertions, deletions and replacements from the first i items to the first j.
    """
    insertions = np.arange(same.shape[1] + 1)
    distances = [insertions]
    for equal in same:
        # From the row above: drop this token, or keep or replace it.
        above = distances[-1]
        row = above + 1
        row[1:] = np.minimum(row[1:], above[:-1] + ~equal)
        # Insertions come from the left: the cheapest place to the left, plus one for each step.
        cheapest = np.minimum.accumulate(row - insertions)
        distances.append(cheapest + insertions)
    return distances


def edit_weights(
    initial: list[int],
    revised: list[int],
    *,
    added: float = 1.0,
    removed: float = -0.5,
    kept: float = 0.0,
) -> tuple[list[float], list[float]]:
    """Return a weight for each token of an answer and of its revision, from a shortest edit.

    Tokens that the revision adds or puts in another's place weigh `added`, those that it drops or
    replaces `removed`; all others weigh `kept` in the revision and 0 in the answer (Guo et al.
    2024, FIGA, section 3).
    """
    same = np.array(initial)[:, None] == np.array(revised)
    distances = edit_distances(same)
    before = [removed] * len(initial)
    after = [added] * len(revised)

    # Back along a shortest edit, from the end of both.
    i = len(initial)
    j = len(revised)
    while i and j:
        is_same = same[i - 1, j - 1]
        if is_same:
            before[i - 1] = 0.0
            after[j - 1] = kept
        if distances[i][j] == distances[i - 1][j - 1] + (not is_same):
            i -= 1
            j -= 1
        elif distances[i][j] == distances[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
    return before, after


def with_edit_weights(batch: Batch, removed: float) -> Batch:
    """Add `weights_BCT` to a batch of comparisons: 1 on tokens added, -`removed` on those removed.

    Of each row the worst response is the initial answer and the best its revision; a row whose
    responses all tie, and every other response, has weight 0.
    """
    weights_BCT = np.zeros_like(batch["loss_mask_BCT"])
    for b, ranks in enumerate(batch["ranks_BC"]):
        best, worst = best_and_worst_index(ranks)
        if worst is None:
            continue
        # Edits are of the responses alone, their end tokens included.
        worst_mask = batch["loss_mask_BCT"][b, worst] > 0
        best_mask = batch["loss_mask_BCT"][b, best] > 0
        initial = batch["tokens_BCT"][b, worst][worst_mask].tolist()
        revised = batch["tokens_BCT"][b, best][best_mask].tolist()
        before, after = edit_weights(initial, revised, removed=-removed)
        weights_BCT[b, worst, worst_mask] = before
        weights_BCT[b, best, best_mask] = after
    return {**batch, "weights_BCT": weights_BCT}
