"""PPO's mathematics: KL estimates, rewards per token, advantages, the clipped losses.

Arrays in, arrays out, float32. Index t of a [B, R] array is response token t: its log-probability,
the value of the state it was emitted in, the reward for having emitted it.

A row of a batch is a left-padded prompt of P tokens and a response of R, T = P + R. Position s of
a model's output [B, T] is computed from tokens 0 to s. So it is position P - 1 + t that predicts
response token t, and that gives the value of the state in which token t was emitted:

    position        0     1     2     3     4     5     6     7         P = 4, R = 4
    tokens_BT     pad   bos    is    it   yes     .   eos   pad
    predicts                         t=0   t=1   t=2   t=3     -        response_states, [B, R + 1]
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from model import Params, unembed
from objectives.likelihood import (
    Apply,
    LossSum,
    Metrics,
    TokenBatch,
    hidden_logprobs,
    label_logprobs,
    likelihood_objective,
    without_auxiliary,
)
from objectives.unpadded import run_model

Array = jax.Array
KlEstimator = Literal["k1", "k2", "k3"]
MissingEos = Literal["lowest", "replace", "penalty", "none"]
ScoreAt = Literal["last", "after"]
Combine = Literal["mean", "weighted", "minimum", "gated"]
"""How several rewards make one score; see `combined`."""
Responses = Mapping[str, Any]
"""A rollout.Rollout, or a minibatch of its rows. [B, P + R]: `tokens_BT`, `segment_ids_BT`,
`positions_BT`, int32; [B, R]: `response_BR`, the last R columns of `tokens_BT`, and `mask_BR`,
float32, 1 for a response's actions: the tokens that the policy drew, its end included. Between
them the mask may have holes, tokens that something else wrote. What else a function reads, it
names."""


# ---- Rewards: one score a response, a KL penalty at each token, the score at the end ----


def masked(x: Array, mask: Array | float) -> Array:
    """Return `x` where `mask` is above 0, else 0: whatever else is there, infinite or nan.

    `mask`, numbers or bools, broadcasts against `x`; it selects, it does not scale. The gradient
    to what is left out is 0.
    """
    return jnp.where(mask > 0, x, 0.0)


def kl_estimate(
    logp: Array, reference_logp: Array, estimator: KlEstimator, mask: Array | float = 1.0
) -> Array:
    """Estimate KL(policy || reference) at each token in nats, from tokens of the policy.

    Schulman 2020. k1 = logp - reference_logp: unbiased. k2 = k1^2 / 2. k3 = exp(-k1) - 1 + k1:
    unbiased and never negative. Log-probabilities of the tokens, nats; all arrays have the same
    shape. 0 where `mask` is 0. Raises ValueError for another estimator.
    """
    # Of tokens that the policy drew, so that means over them are expectations under it. Masked
    # before the exponential, which can overflow at padding.
    k1 = masked(logp - reference_logp, mask)
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return 0.5 * k1 * k1
    if estimator == "k3":
        return jnp.expm1(-k1) + k1
    raise ValueError(f"no estimator of the KL: {estimator!r}")


def lowest(score_B: Array, passes_B: Array) -> Array:
    """Return the scores [B], one value below all of them in place of those that do not pass.

    The value is the lowest of all B scores less their standard deviation, by B; where all are
    equal, less 1 or a thousandth of their size, whichever is more. So no scale of rewards pays for
    not passing. Where they differ, adding a constant or multiplying by one above 0 changes no
    proportion between the results. `passes_B`: bool.
    """
    # In units of the largest, so that no square overflows; zeros have any unit.
    size = jnp.abs(score_B).max()
    spread = size * (score_B / jnp.where(size > 0, size, 1.0)).std()
    # Scores that differ by rounding are equal.
    step = jnp.where(spread > 1e-6 * size, spread, jnp.maximum(1.0, 1e-3 * size))
    return jnp.where(passes_B, score_B, score_B.min() - step)


def missing_eos(score_B: Array, ended_B: Array, rule: MissingEos, score: float = 0.0) -> Array:
    """Return the scores [B] after the rule on responses without an end.

    `ended_B`, bool: True for a response with its end-of-turn token; its score stays. Other scores:
    "lowest" puts below all in the batch (`lowest`), "replace" sets to `score`, "penalty" adds
    `score` to (below 0 it lowers them), "none" leaves. KeyError for another rule.
    """
    # Its score after each rule.
    without = {
        "lowest": lowest(score_B, ended_B),
        "replace": jnp.full_like(score_B, score),
        "penalty": score_B + score,
        "none": score_B,
    }[rule]
    return jnp.where(ended_B, score_B, without)


def combined(
    scores: Sequence[Array],
    how: Combine,
    *,
    weights: Sequence[float] = (),
    gate: float = 0.0,
    floor: float | None = None,
) -> Array:
    """Combine several scores of each response, [B] each, into one, [B].

    `how`: "mean"; "weighted", the sum of scores times `weights`, which must be as many (not
    checked) and are not normalised; "minimum"; "gated", the first score where all others are at
    least `gate`, elsewhere `floor`, or with None a value below all first scores (`lowest`). Raises
    ValueError for another. A reward a criterion: Glaese et al. 2022 (a preference beside rules);
    Touvron et al. 2023, section 3.2.3 (Llama 2: helpfulness counts where safety reaches a
    threshold).
    """
    # C here: criteria.
    scores_BC = jnp.stack(list(scores), axis=1)
    if how == "mean":
        return scores_BC.mean(1)
    if how == "weighted":
        return (scores_BC * jnp.array(weights, jnp.float32)).sum(1)
    if how == "minimum":
        return scores_BC.min(1)
    if how == "gated":
        passes_B = (scores_BC[:, 1:] >= gate).all(1)
        first_B = scores_BC[:, 0]
        return lowest(first_B, passes_B) if floor is None else jnp.where(passes_B, first_B, floor)
    raise ValueError(f"no way to combine scores: {how!r}")


def last_places(real_BT: Array) -> Array:
    """Return [B, T] bool: True at the last true place of each row of `real_BT`, bool.

    In a row without one it is True at T - 1.
    """
    length = real_BT.shape[1]
    from_the_end_B = jnp.argmax(jnp.flip(real_BT, axis=1), axis=1)
    last_B = length - 1 - from_the_end_B
    return jnp.arange(length) == last_B[:, None]


def last_token(scalars_BT: Array, segment_ids_BT: Array) -> Array:
    """Return the scalar at each row's last real token, [B], on whichever side the padding is.

    Segment id 0 is padding. A row of padding alone gives the scalar at T - 1: mask it.
    """
    is_last_BT = last_places(segment_ids_BT > 0)
    # A compare-and-sum, for the backward pass of a gather is a scatter, slow on every platform.
    return jnp.where(is_last_BT, scalars_BT, 0.0).sum(1)


def score_position(mask_BR: Array, at: ScoreAt) -> tuple[Array, Array]:
    """Return the index at which a response's score is added, [B] int, and the value mask, [B, R].

    The value mask, float32, is 1 for states that have a value. "last": the score is added at the
    last action, -1 for a response without any, and the value mask is `mask_BR`. "after": one
    position later, 0 for a response without any, and the state there has a value too; at the last
    action if no position is left. Raises ValueError for another `at`.
    """
    # Not its length less one: a mask may have holes.
    place_R = jnp.arange(mask_BR.shape[1])
    last_B = jnp.where(mask_BR > 0, place_R, -1).max(1)
    if at == "last":
        return last_B, mask_BR
    if at == "after":
        # A response of the longest length has no position after it.
        at_B = jnp.minimum(last_B + 1, place_R[-1])
        has_value_BR = (mask_BR > 0) | (place_R == at_B[:, None])
        return at_B, has_value_BR.astype(jnp.float32)
    raise ValueError(f"no place for the score: {at!r}")


def token_rewards(
    score_B: Array,
    kl_BR: Array,
    mask_BR: Array,
    beta: Array | float,
    at_B: Array,
) -> Array:
    """Return -beta KL at each response token, plus the response's score at index `at_B`, [B, R].

    Ziegler et al. 2019, eq. 2. `kl_BR`: from `kl_estimate`, counted where `mask_BR` is 1. `at_B`:
    int, from `score_position`; the score is added where the mask is 0 too, and nowhere at -1.
    """
    penalty_BR = -beta * masked(kl_BR, mask_BR)
    # The score at one place of each row.
    is_place_BR = jnp.arange(mask_BR.shape[1]) == at_B[:, None]
    score_BR = jnp.where(is_place_BR, score_B[:, None], 0.0)
    return penalty_BR + score_BR


def adapt_kl(beta: Array, kl: Array, target: float, horizon: float, episodes: int) -> Array:
    """Return beta, a scalar, moved by proportional control of the KL towards `target`.

    Ziegler et al. 2019, 2.2: beta x (1 + error x episodes / horizon). The error, kl / target - 1,
    counts at most a fifth either way. `kl`, a scalar, and `target`, above 0, are in nats a
    response. `episodes`: responses since the last call; `horizon`: over how many beta moves by the
    error.
    """
    # The relative error, at most a fifth.
    error = kl / target - 1.0
    error = jnp.clip(error, -0.2, 0.2)
    # In proportion to the responses that it was measured on.
    factor = 1.0 + error * episodes / horizon
    return beta * factor


# ---- Advantages ----


def masked_mean(x: Array, mask: Array) -> Array:
    """Return the mean of `x` where `mask`, 0 or 1, of its shape, is 1: a scalar; 0 if nowhere."""
    # At least 1: an empty mask has mean 0, not nan.
    count = jnp.maximum(mask.sum(), 1.0)
    return masked(x, mask).sum() / count


def whiten(x: Array, mask: Array, *, shift_mean: bool = True, unbiased: bool = False) -> Array:
    """Return (x - mean) / sqrt(var + 1e-8) under the mask, 0 elsewhere, of the shape of `x`.

    Mean and variance are over all axes where `mask` is 1. Without `shift_mean` the mean is added
    back: the result has the mean of `x` and deviation 1. `unbiased` divides the variance by n - 1,
    at least 1, not by n.
    """
    # Mean and variance of what is under the mask.
    mean = masked_mean(x, mask)
    square = masked(jnp.square(x - mean), mask)
    count = jnp.maximum(mask.sum() - unbiased, 1.0)
    variance = square.sum() / count

    # The small constant keeps equal values finite.
    white = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    if not shift_mean:
        white = white + mean
    return masked(white, mask)


def gae(
    rewards_BR: Array,
    values_BR: Array,
    mask_BR: Array | None = None,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Array, Array]:
    """Return generalised advantage estimates A, and returns A + V, [B, R] each.

    Schulman et al. 2016, eq. 16: delta_t = r_t + gamma V_{t+1} - V_t, and A_t = delta_t + gamma
    gae_lambda A_{t+1}, where t + 1 is the next state under `mask_BR`; both are 0 outside it, where
    rewards and values are not read. None: all are states. V after a row's last state is 0, so a
    response that was cut off counts as one that ended.
    """
    is_state_BR = jnp.ones_like(rewards_BR) if mask_BR is None else mask_BR

    # From the last token back; the carry is of the state after, kept over what is no state.
    def earlier(carry, now):
        next_advantage, next_value = carry
        reward, value, is_state = now
        advantage = reward + gamma * next_value - value + gamma * gae_lambda * next_advantage
        own = (advantage, value)
        carry = jax.tree.map(partial(jnp.where, is_state > 0), own, carry)
        return carry, masked(advantage, is_state)

    # The scan runs over the first axis, so arrays are turned for it and back.
    zero_B = jnp.zeros_like(rewards_BR[:, 0])
    steps = (rewards_BR.T, values_BR.T, is_state_BR.T)
    _, advantages_RB = jax.lax.scan(earlier, (zero_B, zero_B), steps, reverse=True)
    return advantages_RB.T, masked(advantages_RB.T + values_BR, is_state_BR)


def explained_variance(values_BR: Array, returns_BR: Array, mask_BR: Array) -> Array:
    """Return 1 - var(returns - values) / var(returns) over the masked states, a scalar.

    1: values are the returns, up to a constant; 0: as good as the returns' mean; below 0: worse.
    `mask_BR`: 1 for states that count. A variance of returns below 1e-8 counts as 1e-8.
    """

    def variance(x_BR: Array) -> Array:
        return masked_mean(jnp.square(x_BR - masked_mean(x_BR, mask_BR)), mask_BR)

    # Equal returns leave nothing to explain.
    return 1.0 - variance(returns_BR - values_BR) / jnp.maximum(variance(returns_BR), 1e-8)


# ---- Losses of a token ----


def clipped_policy_loss(
    log_ratio: Array, advantage: Array, clip: float, clip_high: float
) -> Array:
    """Return max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high)), elementwise: a loss.

    Schulman et al. 2017, eq. 7, where `clip_high` is `clip` (apart: Yu et al. 2025, eq. 10).
    `log_ratio`: log pi - log pi_old, nats, of the shape of `advantage`, A; ratio is its exp.
    Infinite clips leave REINFORCE's weighted loss.
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip_high)
    # The worse of the two: beyond a clip there is no gain, and no gradient.
    return jnp.maximum(-advantage * ratio, -advantage * clipped)


def clipped_value_loss(value: Array, old_value: Array, returns: Array, clip: float) -> Array:
    """Return half the larger square error of the value and of the clipped value, elementwise.

    The value is clipped to within `clip` of the old one. All arrays have the same shape.
    """
    change = jnp.clip(value - old_value, -clip, clip)
    clipped = old_value + change

    # The larger error counts: a value beyond the clip gets no gradient from being closer.
    own_error = jnp.square(value - returns)
    clipped_error = jnp.square(clipped - returns)
    return 0.5 * jnp.maximum(own_error, clipped_error)


def entropy(logits_BTV: Array) -> Array:
    """Return -sum_v p_v log p_v, p = softmax(logits), of each next token, [B, T] in nats.

    Logits must be finite: -inf gives nan.
    """
    # One term a token of the vocabulary.
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    terms_BTV = jnp.exp(logp_BTV) * logp_BTV
    return -terms_BTV.sum(-1)


# ---- A model's outputs for the response ----


def response_states(batch: Responses, x_BT: Array) -> Array:
    """Select the positions from the prompt's last on, [B, R + 1, ...], of [B, T, ...].

    `x_BT`: a model's output, one entry a token of `batch`, whose shapes alone are read. Index t
    predicts response token t, from the state in which it was emitted; index R predicts nothing.
    """
    # P = T - R; position P - 1 is the prompt's last.
    length = batch["tokens_BT"].shape[1]
    response_length = batch["response_BR"].shape[1]
    prompt_length = length - response_length
    return x_BT[:, prompt_length - 1 :]


def response_labels(batch: Responses) -> Array:
    """Return the response's token ids and a 0, [B, R + 1]: the labels of `response_states`.

    The last is never used. It saves cutting the last logits off, which would copy the others.
    """
    return jnp.pad(batch["response_BR"], ((0, 0), (0, 1)))


def response_logits(apply: Apply, params: Params, batch: Responses, temperature: float) -> Array:
    """Return the logits at `response_states`, [B, R + 1, V] float32, divided by the temperature.

    `apply` and `params`: of a LanguageModel. Response token t was drawn from the softmax of index
    t; index R predicts nothing. A temperature of 0 counts as 1. Padding has logits too.
    """
    output = run_model(apply, params, batch)
    # Cut before the unembedding, which is dear: T is R + 1 from here on.
    x_BTD = response_states(batch, output.x_BTD)
    logits_BTV = unembed(x_BTD, output.unembed_DV)
    return logits_BTV / (temperature or 1.0)


def response_logprobs(apply: Apply, params: Params, batch: Responses, temperature: float) -> Array:
    """Return the log-probability of each response token, [B, R] nats, at the sampling temperature.

    `apply` and `params`: of a LanguageModel. Padding has values too: mask them. A temperature of 0
    counts as 1.
    """
    output = run_model(apply, params, batch)
    # T is R + 1 from here on.
    x_BTD = response_states(batch, output.x_BTD)
    # The last position predicts nothing: its log-probability is cut off.
    labels_BT = response_labels(batch)
    logp_BT = hidden_logprobs(x_BTD, output.unembed_DV, labels_BT, temperature or 1.0)
    return logp_BT[:, :-1]


def response_values(apply: Apply, params: Params, batch: Responses) -> Array:
    """Return the value of the state in which each response token was emitted, [B, R].

    `apply` and `params`: of a ScalarModel. Padding has values too: mask them.
    """
    # A state's value is read at the same position that predicts its token.
    scalars_BT = run_model(apply, params, batch).scalars_BT
    return response_states(batch, scalars_BT)[:, :-1]


# ---- Objectives: sums over a minibatch, for train_step.make_train_step ----


def own_log_ratio(change_BR: Array, mask_BR: Array) -> Array:
    """Return `change_BR` as it is: each token's own log-ratio, PPO's importance ratio.

    Both are [B, R]; `mask_BR` is not read: other methods' ratios need it (group.log_ratio).
    """
    return change_BR


def clipped_surrogate(
    logp_BR: Array,
    batch: Responses,
    clip: float,
    clip_high: float,
    log_ratio: Callable[[Array, Array], Array] = own_log_ratio,
) -> tuple[Array, Metrics]:
    """Return `clipped_policy_loss` of each token, [B, R], not masked yet, and metrics.

    `logp_BR`: the policy's, nats. `batch`: `mask_BR`, `old_logp_BR` and `advantages_BR`, [B, R],
    and perhaps `is_first_B`, bool, True for rows of the first minibatch trained on since they were
    sampled: their ratio is 1, its gradient as ever. `log_ratio(change_BR, mask_BR)` makes the
    importance ratio's log [B, R] from the tokens' log-ratios, 0 at padding. Metrics, (sum, tokens)
    each: approx_kl, half the mean square log-ratio to `old_logp_BR`, in those rows too;
    nll_per_token, minus the mean log-probability; those of `clip_metrics`.
    """
    # Log-ratios of the tokens: padding gets 0, so that nothing there can overflow.
    mask_BR = batch["mask_BR"]
    tokens = mask_BR.sum()
    old_BR = batch["old_logp_BR"]
    moved_BR = masked(logp_BR - old_BR, mask_BR)
    if "is_first_B" in batch:
        old_BR = jnp.where(batch["is_first_B"][:, None], jax.lax.stop_gradient(logp_BR), old_BR)
    change_BR = masked(logp_BR - old_BR, mask_BR)

    # From them those of the method, and its loss.
    log_ratio_BR = log_ratio(change_BR, mask_BR)
    advantages_BR = masked(batch["advantages_BR"], mask_BR)
    losses_BR = clipped_policy_loss(log_ratio_BR, advantages_BR, clip, clip_high)
    metrics = {
        "approx_kl": (0.5 * jnp.square(moved_BR).sum(), tokens),
        "nll_per_token": (-masked(logp_BR, mask_BR).sum(), tokens),
        **clip_metrics(log_ratio_BR, advantages_BR, mask_BR, clip, clip_high),
    }
    return losses_BR, metrics


def clip_metrics(
    log_ratio_BR: Array, advantages_BR: Array, mask_BR: Array, clip: float, clip_high: float
) -> Metrics:
    """Return (sum, weight) metrics of `clipped_policy_loss`: shares of the tokens under the mask.

    clipped: those with a ratio outside 1 - `clip` to 1 + `clip_high`; clip_active: those that also
    lose their gradient by it, as the ratio has moved the way that their advantage pushes (TRL's
    clip ratio). `log_ratio_BR`: log pi - log pi_old. `mask_BR`: float32, 1 for what counts.
    """
    ratio_BR = jnp.exp(log_ratio_BR)
    above_BR = ratio_BR > 1 + clip_high
    below_BR = ratio_BR < 1 - clip
    active_BR = (above_BR & (advantages_BR > 0)) | (below_BR & (advantages_BR < 0))
    metrics = {}
    for name, is_so_BR in {"clipped": above_BR | below_BR, "clip_active": active_BR}.items():
        metrics[name] = ((is_so_BR * mask_BR).sum(), mask_BR.sum())
    return metrics


def policy_objective(
    apply: Apply,
    params: Params,
    batch: Responses,
    *,
    clip: float,
    temperature: float,
    entropy_coef: float = 0.0,
) -> LossSum:
    """Sum PPO's clipped surrogate less `entropy_coef` times the entropy over response tokens.

    Schulman et al. 2017, eq. 9. `apply`: of a LanguageModel. `batch` also has `old_logp_BR` and
    `advantages_BR`, [B, R], perhaps `is_first_B` (`clipped_surrogate`) and "text", of `with_text`,
    whose negative log-likelihood is added: PPO-ptx (Ouyang et al. 2022, eq. 2). `clip`: on both
    sides. `temperature`: the sampler's; 0 counts as 1. The weight is the count of response tokens.
    Metrics: `clipped_surrogate`'s; with a coefficient entropy, with a text its text_nll.
    """
    # The entropy needs whole distributions; without it the logits are never held at once.
    mask_BR = batch["mask_BR"]
    tokens = mask_BR.sum()
    if entropy_coef:
        logits_BTV = response_logits(apply, params, batch, temperature)
        logp_BR = label_logprobs(logits_BTV, response_labels(batch))[:, :-1]
    else:
        logp_BR = response_logprobs(apply, params, batch, temperature)
    losses_BR, metrics = clipped_surrogate(logp_BR, batch, clip, clip)
    loss = masked(losses_BR, mask_BR).sum()

    # The terms beside the surrogate, where they are asked for.
    if entropy_coef:
        bonus = masked(entropy(logits_BTV)[:, :-1], mask_BR).sum()
        loss -= entropy_coef * bonus
        metrics["entropy"] = (bonus, tokens)
    if "text" in batch:
        added, (weight, beside) = likelihood_objective(apply, params, batch["text"])
        loss += added
        metrics["text_nll"] = (without_auxiliary(added, beside), weight)
    return loss, (tokens, metrics)


def with_text(batch: Responses, text: TokenBatch, coefficient: float) -> dict[str, Any]:
    """Return `batch` with packed pre-training rows beside it, as "text"; neither is changed.

    `text`: of data.batches.text_batches, on the mesh, with a `loss_mask_BT` that is not all 0. Its
    mean loss per token counts `coefficient` times the policy's: that mask is multiplied by
    coefficient x (tokens under `mask_BR`) / (tokens under it), counted over the whole batch, so
    that the objective stays a sum over micro-batches, whose number must divide the text's rows
    too.
    """
    # The text's weight in the sum that the loss is; its mask carries it.
    response_mask_BR = batch["mask_BR"]
    text_mask_BT = text["loss_mask_BT"]
    weight = coefficient * response_mask_BR.sum() / text_mask_BT.sum()
    weighted = {**text, "loss_mask_BT": weight * text_mask_BT}
    return {**batch, "text": weighted}


def value_objective(apply: Apply, params: Params, batch: Responses, *, clip: float) -> LossSum:
    """Sum half the clipped square error of the values (`clipped_value_loss`) over their states.

    `apply`: of a ScalarModel. `batch` also has `value_mask_BR`, `old_values_BR` and `returns_BR`,
    [B, R]. `clip`: how far a value may move from the old one, in the reward's unit. The weight is
    the number of states under the value mask. Metric: square_error, a mean, not clipped or halved.
    """
    # Values of all states, and how many count.
    mask_BR = batch["value_mask_BR"]
    states = mask_BR.sum()
    values_BR = masked(response_values(apply, params, batch), mask_BR)
    returns_BR = masked(batch["returns_BR"], mask_BR)
    old_BR = masked(batch["old_values_BR"], mask_BR)

    # The loss, and the error that it bounds: 0 outside the mask, as all of these are.
    losses_BR = clipped_value_loss(values_BR, old_BR, returns_BR, clip)
    error_BR = jnp.square(values_BR - returns_BR)
    metrics = {"square_error": (error_BR.sum(), states)}
    return losses_BR.sum(), (states, metrics)
