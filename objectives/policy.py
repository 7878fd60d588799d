"""PPO's mathematics: KL estimates, rewards per token, advantages, the clipped losses. Arrays in, arrays out.

Index t of [B, R] arrays is response token t: its log-probability, the value of the state it was emitted in,
the reward for having emitted it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model import unembed
from objectives.likelihood import (
    Apply,
    hidden_logprobs,
    inputs,
    label_logprobs,
    likelihood_objective,
)


def kl_estimate(logp: jax.Array, reference_logp: jax.Array, estimator: str) -> jax.Array:
    """Per-token estimates of KL(policy || reference) in nats, from tokens of the policy (Schulman 2020).

    k1 = log ratio: unbiased. k2 = (log ratio)^2 / 2. k3 = exp(-k1) - 1 + k1: unbiased and never negative.
    """
    k1 = logp - reference_logp
    return {"k1": lambda: k1, "k2": lambda: 0.5 * k1 * k1, "k3": lambda: jnp.expm1(-k1) + k1}[
        estimator
    ]()


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `x` where `mask` is 1."""
    return (x * mask).sum() / jnp.maximum(mask.sum(), 1.0)


def whiten(
    x: jax.Array, mask: jax.Array, *, shift_mean: bool = True, unbiased: bool = False
) -> jax.Array:
    """(x - mean) / sqrt(var + 1e-8) over the masked entries, 0 elsewhere; `unbiased` divides by n - 1."""
    mean, count = masked_mean(x, mask), mask.sum()
    variance = (jnp.square(x - mean) * mask).sum() / jnp.maximum(count - unbiased, 1.0)
    white = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean) * mask


def token_rewards(
    score_B: jax.Array, kl_BR: jax.Array, mask_BR: jax.Array, beta: jax.Array, at_B: jax.Array
):
    """-beta KL at each response token, plus the response's score at index `at_B` (Ziegler et al. 2019, eq. 2)."""
    at_BR = jnp.arange(mask_BR.shape[1]) == at_B[:, None]
    return -beta * kl_BR * mask_BR + jnp.where(at_BR, score_B[:, None], 0.0)


def score_position(mask_BR: jax.Array, at: str) -> tuple[jax.Array, jax.Array]:
    """Where the score is added, [B], and the mask [B, R] of states that have a value.

    At the `last` real token; or at the position `after` it, whose state then has a value too, where one is left.
    """
    length_B, new = mask_BR.sum(1).astype(jnp.int32), mask_BR.shape[1]
    if at == "last":
        return length_B - 1, mask_BR
    at_B = jnp.minimum(length_B, new - 1)
    return at_B, (jnp.arange(new) <= at_B[:, None]).astype(jnp.float32)


def missing_eos(score_B: jax.Array, ended_B: jax.Array, rule: str, score: float) -> jax.Array:
    """Scores [B] in which an unended response has `score` (replace), its own and `score` (penalty), or its own."""
    without = {
        "replace": jnp.full_like(score_B, score),
        "penalty": score_B + score,
        "none": score_B,
    }[rule]
    return jnp.where(ended_B, score_B, without)


def gae(
    rewards_BR: jax.Array, values_BR: jax.Array, *, gamma: float, gae_lambda: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates and returns A + V (Schulman et al. 2016, eq. 16), [B, R] each.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma gae_lambda A_{t+1}; V after the end is 0.
    Rewards and values must be 0 after a row's last token.
    """

    def earlier(carry, now):
        advantage, next_value = carry
        reward, value = now
        advantage = reward + gamma * next_value - value + gamma * gae_lambda * advantage
        return (advantage, value), advantage

    zero = jnp.zeros_like(rewards_BR[:, 0])
    _, advantages_RB = jax.lax.scan(
        earlier, (zero, zero), (rewards_BR.T, values_BR.T), reverse=True
    )
    return advantages_RB.T, advantages_RB.T + values_BR


def clipped_policy_loss(
    logp: jax.Array, old_logp: jax.Array, advantage: jax.Array, clip: float, clip_high: float
) -> jax.Array:
    """max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high)) per token (Schulman et al. 2017, eq. 7).

    `clip_high` is PPO's `clip` (apart: Yu et al. 2025, eq. 10); infinite ones leave REINFORCE's weighted loss.
    """
    ratio = jnp.exp(logp - old_logp)
    return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip_high))


def clipped_value_loss(
    value: jax.Array, old_value: jax.Array, returns: jax.Array, clip: float
) -> jax.Array:
    """Half the larger square error of the value and of the value clipped to within `clip` of the old one."""
    clipped = old_value + jnp.clip(value - old_value, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(value - returns), jnp.square(clipped - returns))


def adapt_kl(
    beta: jax.Array, kl: jax.Array, target: float, horizon: float, episodes: int
) -> jax.Array:
    """Adaptive KL coefficient (Ziegler et al. 2019, section 2.2): proportional control of KL towards `target`."""
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return beta * (1.0 + error * episodes / horizon)


def response_logits(
    apply: Apply, params: Any, batch: dict[str, jax.Array], temperature: float
) -> jax.Array:
    """[B, R + 1, V]: at t what response token t is drawn from; the last position predicts nothing here."""
    output = apply(params, *inputs(batch))
    logits_BTV = unembed(output.x_BTD[:, before_response(batch) :], output.unembed_DV)
    return logits_BTV / (temperature or 1.0)


def before_response(batch: dict[str, jax.Array]) -> int:
    """The position that predicts the first response token."""
    return batch["tokens_BT"].shape[1] - batch["response_BR"].shape[1] - 1


def response_labels(batch: dict[str, jax.Array]) -> jax.Array:
    """[B, R + 1]: the response's tokens, and one more, of which nothing is used: a slice of logits would copy them."""
    return jnp.pad(batch["response_BR"], ((0, 0), (0, 1)))


def response_logprobs(
    apply: Apply, params: Any, batch: dict[str, jax.Array], temperature: float
) -> jax.Array:
    """[B, R] log-probabilities of the response's tokens at the sampling temperature (greedy counts as 1)."""
    output = apply(params, *inputs(batch))
    x_BTD = output.x_BTD[:, before_response(batch) :]
    logp_BT = hidden_logprobs(x_BTD, output.unembed_DV, response_labels(batch), temperature or 1.0)
    return logp_BT[:, :-1]


def response_values(apply: Apply, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """[B, R] values of the states in which the response's tokens were emitted."""
    scalars_BT = apply(params, *inputs(batch)).scalars_BT
    return scalars_BT[:, -batch["response_BR"].shape[1] - 1 : -1]


def entropy(logits_BTV: jax.Array) -> jax.Array:
    """-sum_v p_v log p_v of the next token's distribution, [B, T] in nats."""
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    return -(jnp.exp(logp_BTV) * logp_BTV).sum(-1)


def clipped_surrogate(
    logp_BR: jax.Array,
    batch: dict[str, jax.Array],
    clip: float,
    clip_high: float,
    log_ratio: Callable[[jax.Array, jax.Array], jax.Array] = lambda change_BR, mask_BR: change_BR,
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """`clipped_policy_loss` against `old_logp_BR`, [B, R], not masked yet; metrics of how far the policy has moved.

    `log_ratio` takes the tokens' own log-ratios, 0 at padding, and the mask.
    """
    mask_BR = batch["mask_BR"]
    # Padding gets ratio 1, so that nothing there can overflow before it is masked.
    change_BR = (logp_BR - batch["old_logp_BR"]) * mask_BR
    log_ratio_BR = log_ratio(change_BR, mask_BR)
    losses_BR = clipped_policy_loss(log_ratio_BR, 0.0, batch["advantages_BR"], clip, clip_high)
    ratio_BR, tokens = jnp.exp(log_ratio_BR), mask_BR.sum()
    clipped_BR = ((ratio_BR < 1 - clip) | (ratio_BR > 1 + clip_high)) * mask_BR
    return losses_BR, {
        "approx_kl": (0.5 * jnp.square(change_BR).sum(), tokens),
        "clipped": (clipped_BR.sum(), tokens),
        "surprise": (-(logp_BR * mask_BR).sum(), tokens),
    }


def policy_objective(
    apply: Apply,
    params: Any,
    batch: dict[str, jax.Array],
    *,
    clip: float,
    temperature: float,
    entropy_coef: float = 0.0,
):
    """PPO's clipped surrogate less `entropy_coef` times the entropy (Schulman et al. 2017, eq. 9), over responses.

    With a "text" in the batch (`with_text`), plus its negative log-likelihood: PPO-ptx (Ouyang et al. 2022, eq. 2).
    """
    mask_BR = batch["mask_BR"]
    if entropy_coef:
        logits_BTV = response_logits(apply, params, batch, temperature)
        logp_BR = label_logprobs(logits_BTV, response_labels(batch))[:, :-1]
    else:
        logp_BR = response_logprobs(apply, params, batch, temperature)
    losses_BR, metrics = clipped_surrogate(logp_BR, batch, clip, clip)
    tokens = mask_BR.sum()
    loss = (losses_BR * mask_BR).sum()
    if entropy_coef:
        bonus = (entropy(logits_BTV)[:, :-1] * mask_BR).sum()
        loss, metrics["entropy"] = loss - entropy_coef * bonus, (bonus, tokens)
    if "text" in batch:
        nll, (weight, _) = likelihood_objective(apply, params, batch["text"])
        loss, metrics["text_nll"] = loss + nll, (nll, weight)
    return loss, (tokens, metrics)


def with_text(
    batch: dict[str, Any], text: dict[str, jax.Array], coefficient: float
) -> dict[str, Any]:
    """`batch` with pre-training rows whose mean loss per token counts `coefficient` times the policy's.

    The loss mask carries the weight, of the whole batch's counts of tokens, so that the objective stays a sum.
    """
    weight = coefficient * batch["mask_BR"].sum() / text["loss_mask_BT"].sum()
    return {**batch, "text": {**text, "loss_mask_BT": weight * text["loss_mask_BT"]}}


def value_objective(apply: Apply, params: Any, batch: dict[str, jax.Array], *, clip: float):
    """Clipped square error of the values, summed over response tokens."""
    mask_BR = batch["value_mask_BR"]
    values_BR = response_values(apply, params, batch)
    losses_BR = (
        clipped_value_loss(values_BR, batch["old_values_BR"], batch["returns_BR"], clip) * mask_BR
    )
    error_BR = jnp.square(values_BR - batch["returns_BR"]) * mask_BR
    tokens = mask_BR.sum()
    return losses_BR.sum(), (tokens, {"square_error": (error_BR.sum(), tokens)})
