"""Online methods without a critic: advantages from groups of responses, ratios, averages, combined rewards.

Rows are responses, those to one prompt next to one another: B = P C for P prompts with C responses each. Index t
of [B, R] arrays is response token t, as in objectives/policy.py. No gradient passes through rewards or advantages.
"""

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

import jax
import jax.numpy as jnp

from objectives.likelihood import Apply, response_mask
from objectives.policy import clipped_surrogate, gae, kl_estimate, response_logprobs, whiten

Array = jax.Array

# What a paper sets, in fields of train_grpo.py (explained there); group sizes are ours, the papers' are up to 64.
GRPO = {
    "samples_per_prompt": 8, "ratio": "token", "average": "sequence", "clip": 0.2, "clip_high": 0.2,
    "kl_coef": 0.04, "kl_in": "loss", "kl_estimator": "k3", "dynamic_sampling": False, "overlong": 0.0,
}  # fmt: skip
IN_REWARD = {"kl_in": "reward", "kl_estimator": "k1"}
UNCLIPPED = {"clip": inf, "clip_high": inf}
PAPERS: dict[str, dict[str, Any]] = {
    "grpo": GRPO,  # Shao et al. 2024
    "dr_grpo": GRPO | {"average": "constant", "kl_coef": 0.0},  # Liu et al. 2025
    # Yu et al. 2025: no KL; the penalty on length grows over the last 4,096 of 20,480 tokens.
    "dapo": GRPO
    | {
        "average": "tokens",
        "clip_high": 0.28,
        "kl_coef": 0.0,
        "dynamic_sampling": True,
        "overlong": 0.2,
    },
    "gspo": GRPO
    | {"ratio": "geometric", "clip": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},  # Zheng et al. 2025
    # Ahmadian et al. 2024: plain REINFORCE on whole responses, the KL in the reward; beta as for their summaries.
    "rloo": GRPO
    | IN_REWARD
    | UNCLIPPED
    | {"samples_per_prompt": 4, "ratio": "sequence", "kl_coef": 0.03},
    "reinforce_pp": GRPO
    | IN_REWARD
    | {"samples_per_prompt": 1, "average": "tokens", "kl_coef": 0.01},  # Hu et al.
    "online_dpo": GRPO | {"samples_per_prompt": 2, "kl_coef": 0.1},  # Guo et al. 2024
}

# ---- Rewards ----


def overlong_penalty(length_B: Array, longest: int, cache: float) -> Array:
    """0 up to `longest - cache` tokens, then falling linearly to -1 at `longest` (Yu et al. 2025, DAPO, eq. 13)."""
    return -jnp.clip((length_B - (longest - cache)) / cache, 0.0, 1.0)


def shaped(rewards_BR: Array, potential_BR: Array, mask_BR: Array) -> Array:
    """Rewards plus phi(s') - phi(s), which leaves the optimal policy as it is (Ng et al. 1999, theorem 1, gamma = 1).

    `potential_BR`: phi of the states in which the tokens were emitted; after the last token it counts as 0.
    """
    potential_BR = potential_BR * mask_BR
    return rewards_BR + jnp.pad(potential_BR[:, 1:], ((0, 0), (0, 1))) - potential_BR


# ---- Advantages: of whole responses [P, C], or per token [B, R] ----


def centred(rewards_PC: Array) -> Array:
    """A = r - mean(r) over the group (Liu et al. 2025, Dr. GRPO, section 3: the deviation would weigh prompts)."""
    # From the first response on: a group of equal rewards then gives exactly 0, however its mean is rounded.
    rewards_PC = rewards_PC - rewards_PC[:, :1]
    return rewards_PC - rewards_PC.mean(1, keepdims=True)


def normalised(rewards_PC: Array, *, unbiased: bool = False, eps: float = 1e-4) -> Array:
    """A = (r - mean(r)) / std(r) over the group (Shao et al. 2024, GRPO, section 4.1.2).

    `unbiased` divides the variance by C - 1; `eps` keeps rounding among equal rewards from passing for a difference.
    """
    centred_PC = centred(rewards_PC)
    variance_P1 = jnp.square(centred_PC).sum(1, keepdims=True) / max(
        rewards_PC.shape[1] - unbiased, 1
    )
    return centred_PC / (jnp.sqrt(variance_P1) + eps)


def leave_one_out(rewards_PC: Array) -> Array:
    """A_i = r_i - mean of the others (Kool et al. 2019; Ahmadian et al. 2024, RLOO): an unbiased baseline."""
    count = rewards_PC.shape[1]
    return centred(rewards_PC) * (count / (count - 1))  # r_i - (sum - r_i) / (C - 1)


def by_response(
    advantage: Callable[[Array], Array], rewards_BR: Array, mask_BR: Array, *, group: int
) -> Array:
    """`advantage` of the sums of responses' rewards, at each of their tokens, [B, R]."""
    return advantage(rewards_BR.sum(1).reshape(-1, group)).reshape(-1, 1) * mask_BR


def reinforce_pp(
    rewards_BR: Array, mask_BR: Array, *, group: int = 1, unbiased: bool = False
) -> Array:
    """A_t = rewards from t on, normalised over all tokens of the batch (Hu et al. 2025, REINFORCE++).

    With several responses to a prompt their mean reward is taken off first: the paper's variant with baseline, which
    also has the KL in the loss, by k2.
    """
    to_go_BR = gae(rewards_BR, jnp.zeros_like(rewards_BR), gamma=1.0, gae_lambda=1.0)[0]
    if group > 1:
        to_go_BR -= jnp.repeat(rewards_BR.sum(1).reshape(-1, group).mean(1), group)[:, None]
    return whiten(to_go_BR, mask_BR, unbiased=unbiased)


# ---- The loss ----


def log_ratio(change_BR: Array, mask_BR: Array, level: str) -> Array:
    """Log of the importance ratio at each token, [B, R], from the tokens' own log-ratios (0 at padding).

    token: its own (GRPO). sequence: that of the whole response (RLOO: the response is one action). geometric: its
    geometric mean over the response, s_i = (pi(y) / pi_old(y))^(1 / |y|) (Zheng et al. 2025, GSPO, eq. 7).
    """
    whole_B1, length_B1 = (
        change_BR.sum(1, keepdims=True),
        jnp.maximum(mask_BR.sum(1, keepdims=True), 1.0),
    )
    return {
        "token": change_BR,
        "sequence": whole_B1 * mask_BR,
        "geometric": whole_B1 / length_B1 * mask_BR,
    }[level]


def row_weights(mask_BR: Array, average: str) -> tuple[Array, Array]:
    """Of each response, the weight of its tokens and what it adds to the denominator, [B] each; 0 without tokens.

    sequence: mean over its tokens, then over responses (GRPO, eq. 3). tokens: mean over all tokens (DAPO, eq. 8, over
    the minibatch). constant: sum over its tokens by the longest length, then mean over responses (Dr. GRPO).
    """
    length_B = mask_BR.sum(1)
    counts_B = (length_B > 0).astype(jnp.float32)
    return {
        "sequence": (counts_B / jnp.maximum(length_B, 1.0), counts_B),
        "tokens": (counts_B, length_B),
        "constant": (counts_B / mask_BR.shape[1], counts_B),
    }[average]


def surrogate_objective(
    apply: Apply,
    params: Any,
    batch: dict[str, Array],
    *,
    ratio: str,
    average: str,
    clip: float,
    clip_high: float,
    kl_coef: float,
    kl_estimator: str,
    temperature: float,
):
    """Clipped surrogate of the advantages, plus `kl_coef` times the KL estimate of each token (GRPO, eq. 3 and 4)."""
    mask_BR = batch["mask_BR"]
    logp_BR = response_logprobs(apply, params, batch, temperature)
    losses_BR, metrics = clipped_surrogate(
        logp_BR, batch, clip, clip_high, partial(log_ratio, level=ratio)
    )
    # Padding gets KL 0, so that nothing there can overflow before it is masked.
    kl_BR = kl_estimate(logp_BR * mask_BR, batch["reference_BR"] * mask_BR, kl_estimator)
    metrics["kl"] = (kl_BR.sum(), mask_BR.sum())
    if kl_coef:
        losses_BR += kl_coef * kl_BR
    weight_B, count_B = row_weights(mask_BR, average)
    loss = (losses_BR * mask_BR * weight_B[:, None]).sum()
    return loss, (count_B.sum(), metrics)


# ---- Online DPO (Guo et al. 2024): the best and the worst of a group are a pair for objectives/direct.py ----


def best_and_worst(batch: dict[str, Array], group: int) -> dict[str, Array]:
    """The candidates [P, 2, T] that the preference objective takes; a group of equal rewards forms no pair.

    `batch`: rollouts with `total_B`, the rewards they are judged by, and the reference's `reference_BR`.
    """
    total_PC = batch["total_B"].reshape(-1, group)
    picked_P2 = jnp.stack([total_PC.argmax(1), total_PC.argmin(1)], axis=1)
    rows_P2 = picked_P2 + group * jnp.arange(total_PC.shape[0])[:, None]
    parts = {
        "tokens_BCT": batch["tokens_BT"],
        "segment_ids_BCT": batch["segment_ids_BT"],
        "positions_BCT": batch["positions_BT"],
        "loss_mask_BCT": response_mask(batch),
        "reference_BC": (batch["reference_BR"] * batch["mask_BR"]).sum(1),
    }
    unequal_P = (total_PC.max(1) > total_PC.min(1)).astype(jnp.int32)
    ranks_P2 = jnp.stack([jnp.ones_like(unequal_P), 1 + unequal_P], axis=1)
    return {name: x[rows_P2] for name, x in parts.items()} | {"ranks_BC": ranks_P2}
