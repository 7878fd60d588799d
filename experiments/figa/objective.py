"""FIGA's loss: a likelihood in which each token has its own weight, of either sign."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from objectives import direct
from objectives.likelihood import Apply, LossSum
from objectives.reward import Candidates


def figa(logps: Array, weights: Array) -> Array:
    """Return -w log p of each token, any shape: added tokens w > 0, removed tokens w < 0.

    Guo et al. 2024 (FIGA), section 3: the loss with its two token weights.
    """
    return -weights * logps


def figa_objective(apply: Apply, params: Any, batch: Candidates) -> LossSum:
    """Sum `figa` over the tokens of weight other than 0; the weight is their number.

    `batch`: of comparison_batches, with `weights_BCT` (with_edit_weights). Metrics: mean
    log-probability, nats a token, of the `wanted` (weight above 0) and `unwanted` tokens.
    """
    # Which tokens count: prompts and padding never do.
    weights_BCT = batch["weights_BCT"] * batch["loss_mask_BCT"]
    counted_BCT = weights_BCT != 0
    logp_BCT = direct.candidate_token_logprobs(apply, params, batch)

    # -1 stands where no token counts, so that no gradient is lost to an infinity there.
    safe_logp_BCT = jnp.where(counted_BCT, logp_BCT, -1.0)
    losses_BCT = jnp.where(counted_BCT, figa(safe_logp_BCT, weights_BCT), 0.0)

    # Log-probabilities of both kinds, whatever their weights.
    metrics = {}
    for name, side_BCT in (("wanted", weights_BCT > 0), ("unwanted", weights_BCT < 0)):
        tokens = side_BCT.sum().astype(jnp.float32)
        metrics[name] = ((logp_BCT * side_BCT).sum(), tokens)
    weight = counted_BCT.sum().astype(jnp.float32)
    return losses_BCT.sum(), (weight, metrics)
