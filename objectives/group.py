"""Online methods without a critic: advantages from groups of responses, ratios, averages.

Rows are responses, those to one prompt next to one another: B = Q C for Q prompts with C responses
each. Index t of [B, R] arrays is response token t, as in objectives/policy.py. All are float32. No
gradient passes through rewards or advantages.
"""

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, Literal

import jax
import jax.numpy as jnp

from model import Params
from objectives.likelihood import Apply, LossSum
from objectives.policy import (
    KlEstimator,
    Responses,
    clipped_surrogate,
    gae,
    kl_estimate,
    masked,
    response_logprobs,
    whiten,
)

Array = jax.Array
Ratio = Literal["token", "sequence", "geometric"]
Average = Literal["sequence", "tokens", "constant"]

# What a paper sets, in fields of train_grpo.py, which explains them; "paper" is its citation.
# Sizes of groups are ours: the papers' are up to 64.
GRPO = {
    "paper": "Shao et al. 2024; the group's size is ours",
    "samples_per_prompt": 8,
    "ratio": "token",
    "average": "sequence",
    "clip": 0.2,
    "clip_high": 0.2,
    "kl_coef": 0.04,
    "kl_in": "loss",
    "kl_estimator": "k3",
    "dynamic_sampling": False,
    "overlong": 0.0,
}
DR_GRPO = {
    "paper": "Liu et al. 2025; the group's size is ours",
    "average": "constant",
    "kl_coef": 0.0,
}
# No KL; the penalty on length grows over the last 4,096 of 20,480 tokens.
DAPO = {
    "paper": "Yu et al. 2025; the group's size is ours",
    "average": "tokens",
    "clip_high": 0.28,
    "kl_coef": 0.0,
    "dynamic_sampling": True,
    "overlong": 0.2,
}
GSPO = {
    "paper": "Zheng et al. 2025; the group's size is ours",
    "ratio": "geometric",
    "clip": 3e-4,
    "clip_high": 4e-4,
    "kl_coef": 0.0,
}
# Plain REINFORCE on whole responses, the KL in the reward; beta is that for their summaries.
RLOO = {
    "paper": "Ahmadian et al. 2024",
    "samples_per_prompt": 4,
    "ratio": "sequence",
    "clip": inf,
    "clip_high": inf,
    "kl_coef": 0.03,
    "kl_in": "reward",
    "kl_estimator": "k1",
}
REINFORCE_PP = {
    "paper": "Hu et al. 2025",
    "samples_per_prompt": 1,
    "average": "tokens",
    "kl_coef": 0.01,
    "kl_in": "reward",
    "kl_estimator": "k1",
}
PAPERS: dict[str, dict[str, Any]] = {
    "grpo": GRPO,
    "dr_grpo": GRPO | DR_GRPO,
    "dapo": GRPO | DAPO,
    "gspo": GRPO | GSPO,
    "rloo": GRPO | RLOO,
    "reinforce_pp": GRPO | REINFORCE_PP,
}

# ---- Rewards ----


def overlong_penalty(length_B: Array, longest: int, window: float) -> Array:
    """Return the penalty on long responses, [B] in [-1, 0] (Yu et al. 2025, DAPO, eq. 13).

    It is 0 up to `longest - window` tokens, then falls linearly to -1 at `longest`, and is -1
    beyond; it is added to the score. `length_B`: tokens of each response. `window`, in tokens,
    must be above 0 (not checked).
    """
    # How far into the window the response reaches.
    beyond_B = length_B - (longest - window)
    return -jnp.clip(beyond_B / window, 0.0, 1.0)


def shaped(rewards_BR: Array, potential_BR: Array, mask_BR: Array) -> Array:
    """Add phi(s') - phi(s) to the reward of each token under `mask_BR`; return [B, R].

    It leaves the optimal policy as it is (Ng et al. 1999, theorem 1, gamma = 1). `potential_BR`:
    at t phi(s), of the state in which token t was emitted; s' is the state of the row's next token
    under the mask, and after the last one phi counts as 0. Rewards off the mask are returned as
    they are.
    """
    # phi(s') is the next action's phi(s), and 0 after the last: what gae sums over one step.
    potential_BR = masked(potential_BR, mask_BR)
    change_BR, _ = gae(
        jnp.zeros_like(rewards_BR), potential_BR, mask_BR, gamma=1.0, gae_lambda=0.0
    )
    return rewards_BR + change_BR


# ---- Advantages of whole responses, [P, C] from rewards [Q, C]: a row is a prompt's group ----


def centred(rewards_QC: Array) -> Array:
    """Return A = r - mean(r) over the group, [Q, C] (Liu et al. 2025, Dr. GRPO, section 3).

    Q prompts with C responses each: a row is a group. Equal rewards give exactly 0, as does C = 1.
    Dividing by the deviation, as GRPO does, would weigh prompts against each other.
    """
    # Counted from the first response: a group of equal rewards then gives exactly 0, however its
    # mean is rounded.
    rewards_QC = rewards_QC - rewards_QC[:, :1]
    return rewards_QC - rewards_QC.mean(1, keepdims=True)


def normalised(rewards_QC: Array, *, unbiased: bool = False, eps: float = 1e-4) -> Array:
    """Return A = (r - mean(r)) / (std(r) + eps) over the group, [Q, C].

    Q prompts with C responses each: a row is a group. Shao et al. 2024, section 4.1.2. The
    variance is divided by C, with `unbiased` by C - 1. Equal rewards give exactly 0, as does C =
    1, with `unbiased` too; `eps` keeps rounding from passing for a difference.
    """
    # The mean and the deviation of each group.
    centred_QC = centred(rewards_QC)
    count = max(rewards_QC.shape[1] - unbiased, 1)
    variance_Q1 = jnp.square(centred_QC).sum(1, keepdims=True) / count
    return centred_QC / (jnp.sqrt(variance_Q1) + eps)


def leave_one_out(rewards_QC: Array) -> Array:
    """Return A_i = r_i - mean of the group's other rewards, [Q, C]: an unbiased baseline.

    Q prompts with C responses each: a row is a group. Raises ZeroDivisionError where C is 1. Kool
    et al. 2019; Ahmadian et al. 2024 (RLOO).
    """
    # r_i - (sum - r_i) / (C - 1)
    count = rewards_QC.shape[1]
    return centred(rewards_QC) * (count / (count - 1))


# ---- Advantages of tokens, [B, R] ----


def by_response(
    advantage: Callable[[Array], Array], rewards_BR: Array, mask_BR: Array, *, group: int
) -> Array:
    """Give each token the advantage of its response, [B, R]; 0 where `mask_BR` is 0.

    `rewards_BR`: rewards of tokens, 0 off the mask; their sum over a row is the response's reward.
    Rows are responses, the `group` of them to one prompt next to each other; `group` must divide B
    (TypeError). `advantage`, such as `centred`, maps rewards [Q, C] to advantages [Q, C], Q
    prompts, C = `group`. `mask_BR`: 1 for the response's tokens, else 0.
    """
    # Rows by group, and back.
    total_QC = rewards_BR.sum(1).reshape(-1, group)
    advantage_B1 = advantage(total_QC).reshape(-1, 1)
    return advantage_B1 * mask_BR


def reinforce_pp(
    rewards_BR: Array, mask_BR: Array, *, group: int = 1, unbiased: bool = False
) -> Array:
    """Return the rewards from t on, normalised over the batch's tokens, [B, R]; 0 off the mask.

    Hu et al. 2025, REINFORCE++. `rewards_BR`: rewards of tokens, 0 off the mask; they are summed
    without a discount, then normalised by objectives.policy.whiten. A `group` above 1 must divide
    B (TypeError): each `group` neighbouring rows answer one prompt, and the mean of their sums of
    rewards is subtracted at each of their tokens before it is normalised: the paper's variant with
    a baseline (its KL, by k2, is the caller's to put into the loss). The variance is divided by
    the number of tokens n, with `unbiased` by n - 1.
    """
    # Advantages without a critic and without discounts are the rewards still to come.
    zeros_BR = jnp.zeros_like(rewards_BR)
    to_go_BR, _ = gae(rewards_BR, zeros_BR, mask_BR, gamma=1.0, gae_lambda=1.0)
    # Every token of a response has the same baseline.
    if group > 1:
        mean_Q = rewards_BR.sum(1).reshape(-1, group).mean(1)
        to_go_BR -= jnp.repeat(mean_Q, group)[:, None]
    return whiten(to_go_BR, mask_BR, unbiased=unbiased)


# ---- The loss ----


def log_ratio(change_BR: Array, mask_BR: Array, level: Ratio) -> Array:
    """Return the log of each token's importance ratio, [B, R], from the tokens' own log-ratios.

    `change_BR`: log pi - log pi_old of each token, nats, 0 where `mask_BR` is 0, where the result
    is 0 too. `level`: "token", its own (GRPO); "sequence", the sum over its response (RLOO: the
    response is one action); "geometric", the mean over its response, s_i = (pi(y) / pi_old(y))^(1
    / |y|) (Zheng et al. 2025, GSPO, eq. 7). Sum and mean pass gradients to all of the response's
    tokens. KeyError for another level.
    """
    # Of the whole response: 0 at padding, so sums over R are over its tokens.
    whole_B1 = change_BR.sum(1, keepdims=True)
    length_B1 = jnp.maximum(mask_BR.sum(1, keepdims=True), 1.0)
    return {
        "token": change_BR,
        "sequence": whole_B1 * mask_BR,
        "geometric": whole_B1 / length_B1 * mask_BR,
    }[level]


def row_weights(mask_BR: Array, average: Average) -> tuple[Array, Array]:
    """Return the weight of each response's tokens, and its part of the denominator, [B] each.

    The batch's loss is the sum over tokens of weight times loss, divided by the sum of the parts.
    Both are 0 for a response without tokens. By `average`, for a response of n tokens: "sequence",
    1 / n and 1, mean over a response's tokens, then over responses (GRPO, eq. 3); "tokens", 1 and
    n, mean over all tokens (DAPO, eq. 8); "constant", 1 / R and 1, sum over a response's tokens /
    R, then mean over responses (Dr. GRPO). KeyError for another.
    """
    # Numerator and denominator of each average, as parts a response.
    length_B = mask_BR.sum(1)
    counts_B = (length_B > 0).astype(jnp.float32)
    return {
        "sequence": (counts_B / jnp.maximum(length_B, 1.0), counts_B),
        "tokens": (counts_B, length_B),
        "constant": (counts_B / mask_BR.shape[1], counts_B),
    }[average]


def surrogate_objective(
    apply: Apply,
    params: Params,
    batch: Responses,
    *,
    ratio: Ratio,
    average: Average,
    clip: float,
    clip_high: float,
    kl_coef: float,
    kl_estimator: KlEstimator,
    temperature: float,
) -> LossSum:
    """Sum the clipped surrogate over responses, plus `kl_coef` times each token's KL estimate.

    A loss, to be minimised. Shao et al. 2024, eq. 3 and 4. `apply` and `params`: of a
    LanguageModel. `batch` also has `old_logp_BR` and `reference_BR`, the tokens' log-probabilities
    in nats before the updates and under the reference, at `temperature`, and `advantages_BR`, [B,
    R] each; perhaps `is_first_B`: see `clipped_surrogate`. `ratio`: see `log_ratio`. `average`:
    see `row_weights`, whose second result sums to the weight. Ratios are clipped to [1 - `clip`, 1
    + `clip_high`]. `temperature`: the sampler's, 0 counts as 1. `kl_coef` 0 leaves the KL out of
    the loss, not out of the metrics. Metrics: those of `clipped_surrogate`, and kl, the mean
    estimate per token.
    """
    # The surrogate of each token, by the method's importance ratio.
    mask_BR = batch["mask_BR"]
    logp_BR = response_logprobs(apply, params, batch, temperature)
    losses_BR, metrics = clipped_surrogate(
        logp_BR, batch, clip, clip_high, partial(log_ratio, level=ratio)
    )

    kl_BR = kl_estimate(logp_BR, batch["reference_BR"], kl_estimator, mask_BR)
    metrics["kl"] = (kl_BR.sum(), mask_BR.sum())
    if kl_coef:
        losses_BR += kl_coef * kl_BR

    # Tokens weigh as the method averages them.
    weight_B, count_B = row_weights(mask_BR, average)
    loss = (masked(losses_BR, mask_BR) * weight_B[:, None]).sum()
    return loss, (count_B.sum(), metrics)
