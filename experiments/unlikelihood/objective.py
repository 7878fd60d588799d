"""Unlikelihood: wanted tokens are made likely, unwanted ones unlikely."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from objectives import direct
from objectives.likelihood import Apply, LossSum
from objectives.reward import Candidates


def unlikelihood(logps: Array, weights: Array) -> Array:
    """Return -w log p of each token where its weight w is above 0, else -|w| log(1 - p).

    Any shape. Welleck et al. 2020, here with signed weights of tokens.
    """
    likely = weights * logps
    unlikely = -weights * direct.log_complement(logps)
    return -jnp.where(weights > 0, likely, unlikely)


def unlikelihood_objective(apply: Apply, params: Any, batch: Candidates) -> LossSum:
    """Sum `unlikelihood` over the tokens of weight other than 0; the weight is their number.

    `batch`: of comparison_batches, with `weights_BCT` (with_rank_weights). Metrics: mean
    log-probability, nats a token, of the `wanted` (weight above 0) and `unwanted` tokens.
    """
    # Which tokens count: prompts and padding never do.
    weights_BCT = batch["weights_BCT"] * batch["loss_mask_BCT"]
    counted_BCT = weights_BCT != 0
    logp_BCT = direct.candidate_token_logprobs(apply, params, batch)

    # -1 stands where no token counts, so that no gradient is lost to an infinity there.
    safe_logp_BCT = jnp.where(counted_BCT, logp_BCT, -1.0)
    losses_BCT = jnp.where(counted_BCT, unlikelihood(safe_logp_BCT, weights_BCT), 0.0)

    # Log-probabilities of both kinds, whatever their weights.
    metrics = {}
    for name, side_BCT in (("wanted", weights_BCT > 0), ("unwanted", weights_BCT < 0)):
        tokens = side_BCT.sum().astype(jnp.float32)
        metrics[name] = ((logp_BCT * side_BCT).sum(), tokens)
    weight = counted_BCT.sum().astype(jnp.float32)
    return losses_BCT.sum(), (weight, metrics)
