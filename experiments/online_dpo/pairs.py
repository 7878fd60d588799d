"""Online DPO (Guo et al. 2024): the best and the worst response of a group are a pair."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from objectives.likelihood import response_mask


def best_and_worst(batch: Mapping[str, Any], group: int) -> dict[str, jax.Array]:
    """Pick two candidates a prompt, [Q, 2, T], as objectives.direct.preference_objective takes.

    `batch`: a Rollout with `score_B`, by which responses are ranked, and `reference_BR`, the
    reference's log-probabilities; `group` neighbouring rows a prompt. Rank 1 is best; a group of
    equal scores gets two equal ranks, which form no pair.
    """
    # The rows of each group's best and worst response.
    score_QC = batch["score_B"].reshape(-1, group)
    picked_Q2 = jnp.stack([score_QC.argmax(1), score_QC.argmin(1)], axis=1)
    first_Q = group * jnp.arange(len(score_QC))
    rows_Q2 = picked_Q2 + first_Q[:, None]

    # What a candidate has; the reference's log-probability is of the whole response.
    reference_B = (batch["reference_BR"] * batch["mask_BR"]).sum(1)
    responses = {
        "tokens_BCT": batch["tokens_BT"],
        "segment_ids_BCT": batch["segment_ids_BT"],
        "positions_BCT": batch["positions_BT"],
        "loss_mask_BCT": response_mask(batch),
        "reference_BC": reference_B,
    }
    pairs = {name: x[rows_Q2] for name, x in responses.items()}

    # Ranks 1 and 2; 1 and 1 where all scores are equal.
    differ_Q = (score_QC.max(1) > score_QC.min(1)).astype(jnp.int32)
    pairs["ranks_BC"] = jnp.stack([jnp.ones_like(differ_Q), 1 + differ_Q], axis=1)
    return pairs
