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
    score_QC = batch["score_B"].reshape(-1, group)
    picked_Q2 = jnp.stack([score_QC.argmax(1), score_QC.argmin(1)], axis=1)
    rows_Q2 = picked_Q2 + group * jnp.arange(score_QC.shape[0])[:, None]
    responses = {
        "tokens_BCT": batch["tokens_BT"],
        "segment_ids_BCT": batch["segment_ids_BT"],
        "positions_BCT": batch["positions_BT"],
        "loss_mask_BCT": response_mask(batch),
        "reference_BC": (batch["reference_BR"] * batch["mask_BR"]).sum(1),
    }
    differ_Q = (score_QC.max(1) > score_QC.min(1)).astype(jnp.int32)
    ranks_Q2 = jnp.stack([jnp.ones_like(differ_Q), 1 + differ_Q], axis=1)
    return {name: x[rows_Q2] for name, x in responses.items()} | {"ranks_BC": ranks_Q2}
