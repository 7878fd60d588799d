"""Weights of tokens by the rank of their response."""

import numpy as np

from data.batches import Batch


def with_rank_weights(batch: Batch, unwanted: float) -> Batch:
    """Add `weights_BCT` to a batch of comparisons: 1 on tokens of rank 1, else -`unwanted`.

    Candidates of rank 0 (absent, or not judged) and tokens outside the loss mask have weight 0.
    """
    ranks_BC = batch["ranks_BC"]
    others_BC = np.where(ranks_BC > 1, -unwanted, 0.0)
    signed_BC = np.where(ranks_BC == 1, 1.0, others_BC)
    # One weight a response, spread over its tokens.
    weights_BC1 = signed_BC.astype(np.float32)[:, :, None]
    weights_BCT = weights_BC1 * batch["loss_mask_BCT"]
    return {**batch, "weights_BCT": weights_BCT}
