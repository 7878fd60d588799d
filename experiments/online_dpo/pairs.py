"""Online DPO (Guo et al. 2024): the best and the worst response of a group are a pair."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from objectives.likelihood import response_mask


def best_and_worst(batch: Mapping[str, Any], group: int) -> dict[str, jax.Array]:
    """Pick two candidates a prompt, [P, 2, T], as objectives.direct.preference_objective takes.

    `batch`: a Rollout with `score_B`, by which responses are ranked, and `reference_BR`, the
    reference's log-probabilities; `group` neighbouring rows a prompt. Rank 1 is best; a group of
    equal scores gets two equal ranks, which form no pair.
    """
    score_PC = batch["score_B"].reshape(-1, group)
    picked_P2 = jnp.stack([score_PC.argmax(1), score_PC.argmin(1)], axis=1)
    rows_P2 = picked_P2 + group * jnp.arange(score_PC.shape[0])[:, None]
    responses = {
        "tokens_BCT": batch["tokens_BT"],
        "segment_ids_BCT": batch["segment_ids_BT"],
        "positions_BCT": batch["positions_BT"],
        "loss_mask_BCT": response_mask(batch),
        "reference_BC": (batch["reference_BR"] * batch["mask_BR"]).sum(1),
    }
    differ_P = (score_PC.max(1) > score_PC.min(1)).astype(jnp.int32)
    ranks_P2 = jnp.stack([jnp.ones_like(differ_P), 1 + differ_P], axis=1)
    return {name: x[rows_P2] for name, x in responses.items()} | {"ranks_BC": ranks_P2}
