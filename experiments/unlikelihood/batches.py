"""Weights of tokens by the rank of their response."""

import numpy as np

from data.batches import Batch


def with_rank_weights(batch: Batch, unwanted: float) -> Batch:
    """Add `weights_BCT` to a batch of comparisons: 1 on tokens of rank 1, else -`unwanted`.

    Candidates of rank 0 (absent, or not judged) and tokens outside the loss mask have weight 0.
    """
    ranks_BC = batch["ranks_BC"]
    others_BC = np.where(ranks_BC > 1, -unwanted, 0.0)
    weights_BC = np.where(ranks_BC == 1, 1.0, others_BC).astype(np.float32)
    return {**batch, "weights_BCT": weights_BC[:, :, None] * batch["loss_mask_BCT"]}
