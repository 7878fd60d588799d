"""Direct preference methods: losses on log-probabilities of responses, and their objectives.

A `logps` argument is log p(response | prompt) in nats: a sum over the response's tokens, its end
token included, or where the name says `mean` the mean per token. All losses are elementwise: [B]
arrays, or any that broadcast, give one loss each. `beta` h is the gap of the implicit rewards of
chosen and rejected, with h of `log_ratio_gap`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from model import Params
from objectives.likelihood import Apply, LossSum, following, hidden_logprobs, shifted
from objectives.reward import (
    Candidates,
    better_pairs,
    first_best,
    flat_candidates,
    pair_means,
    pair_metrics,
)
from objectives.unpadded import run_model

USUAL = {"beta": 0.1}
PAPERS: dict[str, dict[str, Any]] = {"simpo": {"beta": 2.0, "paper": "Meng et al. 2024"}}
"""Settings by loss where a paper's are not the usual ones, and the paper's name."""

# ---- On pairs, against a reference ----


def log_ratio_gap(
    policy_chosen: Array,
    policy_rejected: Array,
    reference_chosen: Array,
    reference_rejected: Array,
) -> Array:
    """Return h = log [pi(y_w) / ref(y_w)] - log [pi(y_l) / ref(y_l)], elementwise, in nats.

    Arguments: log p(response | prompt) in nats under the policy pi and under the reference ref, of
    the chosen response y_w and of the rejected one y_l; [B], or shapes that broadcast. Gradients
    reach all four.
    """
    return (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)


def dpo(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    *,
    beta: float,
) -> Array:
    """Return DPO's losses, [B] (direct preference optimisation, Rafailov et al. 2023, eq. 7).

    The loss is -log sigmoid(beta h), beta > 0, h as in `log_ratio_gap`. Log-probabilities: sums
    over a response's tokens, in nats; [B], or shapes that broadcast.
    """
    h = log_ratio_gap(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    # Rafailov et al. 2023, eq. 7
    return -jax.nn.log_sigmoid(beta * h)


def cdpo(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    *,
    beta: float,
    label_smoothing: float = 0.1,
) -> Array:
    """Return conservative DPO's losses, [B] (Mitchell 2023).

    With e = `label_smoothing`, the probability that a label is wrong, in [0, 1/2) (not checked),
    the loss is (1 - e) dpo(h) + e dpo(-h): `dpo`'s loss at the gap h of `log_ratio_gap`, and at
    the swapped pair's. Log-probabilities: sums over a response's tokens, in nats; [B], or shapes
    that broadcast.
    """
    h = log_ratio_gap(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    # DPO's losses of the pair as it is labelled, and swapped.
    right = -jax.nn.log_sigmoid(beta * h)
    wrong = -jax.nn.log_sigmoid(-beta * h)
    # Mitchell 2023: smoothed cross-entropy
    return (1 - label_smoothing) * right + label_smoothing * wrong


def robust_dpo(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    *,
    beta: float,
    label_smoothing: float = 0.1,
) -> Array:
    """Return robust DPO's losses, [B] (Chowdhury et al. 2024).

    With e = `label_smoothing`, the probability that a label is flipped, in [0, 1/2) (not checked),
    the loss is ((1 - e) dpo(h) - e dpo(-h)) / (1 - 2 e), dpo(h) being `dpo`'s loss at the gap h of
    `log_ratio_gap`: its mean over flips is `dpo`'s of the true label. For e > 0 it has no lower
    bound. Log-probabilities: sums over a response's tokens, in nats; [B], or shapes that
    broadcast.
    """
    h = log_ratio_gap(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    # DPO's losses of the pair as it is labelled, and swapped.
    right = -jax.nn.log_sigmoid(beta * h)
    wrong = -jax.nn.log_sigmoid(-beta * h)
    # Chowdhury et al. 2024: the unbiased estimate of the loss without noise
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def ipo(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    *,
    beta: float,
) -> Array:
    """Return IPO's losses, [B] (identity preference optimisation, Azar et al. 2024, eq. 17).

    The loss is (h - 1 / (2 beta))^2, h as in `log_ratio_gap`: it draws the gap to 1 / (2 beta),
    not to infinity; `beta` is the paper's tau. Log-probabilities: sums over a response's tokens,
    as in the paper, in nats; [B], or shapes that broadcast.
    """
    h = log_ratio_gap(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    # Azar et al. 2024, eq. 17
    return jnp.square(h - 1 / (2 * beta))


def slic(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    *,
    beta: float,
    delta: float = 1.0,
) -> Array:
    """Return SLiC's hinge on log-ratios to the reference, [B] (Liu et al. 2024).

    The loss is max(0, delta - beta h), h as in `log_ratio_gap`: 0 for gaps of at least delta /
    beta nats. Log-probabilities: sums over a response's tokens, in nats; [B], or shapes that
    broadcast.
    """
    h = log_ratio_gap(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    # Liu et al. 2024 (RSO), hinge-norm loss
    return jax.nn.relu(delta - beta * h)


# ---- On judged responses, against a reference ----


def kto_unpaired(
    policy_logps: Array,
    reference_logps: Array,
    desirable: Array | bool,
    *,
    beta: float,
    kl: Array | float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    """Return KTO's losses of single responses, [B] (Ethayarajh et al. 2024, eq. 7).

    With r = policy_logps - reference_logps a desirable response's loss is its weight times 1 -
    sigmoid(beta (r - kl)); an undesirable one's has kl - r. Log-probabilities: sums over a
    response's tokens, in nats, [B]. `desirable`: bool, [B] or one for all. `kl`: an estimate of
    KL(policy || reference) in nats, [B] or one for all, as `mismatched_kl` returns; below 0 it
    counts as 0, and no gradient passes through it.
    """
    # Ethayarajh et al. 2024: z0, clamped and without gradient
    z0 = jax.lax.stop_gradient(jnp.maximum(kl, 0.0))
    r = policy_logps - reference_logps
    value = jax.nn.sigmoid(beta * jnp.where(desirable, r - z0, z0 - r))
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    # Ethayarajh et al. 2024, eq. 7: lambda_y - v(x, y)
    return weight - weight * value


def kto(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    *,
    beta: float,
    kl: Array | float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    """Return KTO's losses of pairs, [B]: the mean of the chosen and the rejected response's loss.

    Half their sum, whatever the weights. `kto_unpaired` gives both: the chosen response is
    desirable, the rejected one is not. Log-probabilities: sums over a response's tokens, in nats;
    [B], or shapes that broadcast. `kl`: an estimate of KL(policy || reference) in nats, [B] or one
    for all; below 0 it counts as 0, and no gradient passes through it. The weights multiply the
    chosen and the rejected one's loss.
    """
    # Each response is judged by itself; both share the estimate of the KL.
    good = kto_unpaired(
        policy_chosen_logps,
        reference_chosen_logps,
        True,
        beta=beta,
        kl=kl,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    bad = kto_unpaired(
        policy_rejected_logps,
        reference_rejected_logps,
        False,
        beta=beta,
        kl=kl,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    # A pair weighs as much as one response.
    return 0.5 * (good + bad)


def mismatched_kl(
    policy_logps: Array, reference_logps: Array, where: Array | None = None
) -> Array:
    """Return KTO's estimate of KL(policy || reference), a scalar in nats; it may be below 0.

    It is the mean of policy_logps - reference_logps: log-probabilities of the same responses, each
    paired with another prompt than its own (z0 of Ethayarajh et al. 2024), summed over tokens, in
    nats. `where`: bool, True for entries that count; None: all count. All arrays have one shape,
    any. The result is nan where no entry counts. Gradients pass; the KTO losses stop them.
    """
    return jnp.mean(policy_logps - reference_logps, where=where)


# ---- On pairs, without a reference ----


def log_complement(logp: Array) -> Array:
    """Return log(1 - p) from log p, elementwise, in nats; p counts as at most 1 - 1e-6.

    At p = 1 value and gradient would be infinite. Above the bound, even above 1, the gradient in
    log p is the one at 1 - 1e-6, not 0, so that a certain token can still be unlearned.
    """
    # The value is clamped; its gradient there reaches logp unclamped.
    at_most = logp + jax.lax.stop_gradient(jnp.minimum(logp, -1e-6) - logp)
    return jnp.log(-jnp.expm1(at_most))


def orpo(chosen_mean_logps: Array, rejected_mean_logps: Array, *, beta: float) -> Array:
    """Return ORPO's losses, [B] (Hong et al. 2024, eq. 6); `beta` is the paper's lambda.

    The loss is the chosen response's NLL per token plus beta times -log sigmoid(o_chosen -
    o_rejected), with the log odds o = log p - log(1 - p), the latter by `log_complement`.
    Log-probabilities: means over a response's tokens, in nats; [B], or shapes that broadcast.
    """
    odds_chosen = chosen_mean_logps - log_complement(chosen_mean_logps)
    odds_rejected = rejected_mean_logps - log_complement(rejected_mean_logps)
    # Hong et al. 2024, eq. 7, then eq. 6
    odds_ratio_loss = -jax.nn.log_sigmoid(odds_chosen - odds_rejected)
    return -chosen_mean_logps + beta * odds_ratio_loss


def simpo(
    chosen_mean_logps: Array, rejected_mean_logps: Array, *, beta: float, gamma: float
) -> Array:
    """Return SimPO's losses, [B] (Meng et al. 2024, eq. 6).

    The loss is -log sigmoid(beta (chosen - rejected) - gamma): `gamma` is a margin on the gap
    after `beta` has scaled it. Log-probabilities: means over a response's tokens, in nats; [B], or
    shapes that broadcast.
    """
    gap = chosen_mean_logps - rejected_mean_logps
    # Meng et al. 2024, eq. 6
    return -jax.nn.log_sigmoid(beta * gap - gamma)


def cpo(
    chosen_logps: Array, rejected_logps: Array, *, beta: float, nll_weight: float = 1.0
) -> Array:
    """Return CPO's losses, [B]: DPO under a uniform reference, plus the chosen response's NLL.

    Xu et al. 2024, eq. 3: -log sigmoid(beta (chosen - rejected)) - nll_weight chosen.
    Log-probabilities: sums over a response's tokens, in nats; [B], or shapes that broadcast. The
    NLL is a sum over tokens too, as in the paper; the authors' program takes a mean.
    """
    # The reference, uniform, drops out of the gap.
    preference = -jax.nn.log_sigmoid(beta * (chosen_logps - rejected_logps))
    # Xu et al. 2024, eq. 3: L_prefer + L_NLL
    return preference - nll_weight * chosen_logps


def slic_hf(
    chosen_logps: Array,
    rejected_logps: Array,
    target_logps: Array | None = None,
    *,
    delta: float,
    weight: float,
) -> Array:
    """Return SLiC-HF's losses, [B]: a hinge of margin `delta`, plus `weight` times a target's NLL.

    Zhao et al. 2023, section 2: max(0, delta - chosen + rejected) - weight target.
    Log-probabilities: sums over a response's tokens, in nats; [B], or shapes that broadcast.
    `target_logps`: the same of the response to imitate; None: the chosen one. `delta` is in nats.
    """
    if target_logps is None:
        target_logps = chosen_logps
    # Zhao et al. 2023, section 2: calibration loss and regulariser
    hinge = jax.nn.relu(delta - chosen_logps + rejected_logps)
    return hinge - weight * target_logps


# ---- On rankings: ranks are [B, C], 1 the best, equal a tie, 0 an absent candidate ----


def rrhf(logps_BC: Array, ranks_BC: Array, tokens_BC: Array) -> Array:
    """Return RRHF's losses, [B] (Yuan et al. 2023): hinges summed over pairs, plus the best's NLL.

    `logps_BC`: log-probabilities summed over a candidate's tokens, in nats. `ranks_BC`: int, 1 is
    best, equal ranks tie, 0 marks an absent candidate. `tokens_BC`: numbers of tokens, 0 counts as
    1. A pair's hinge is max(0, worse - better) of means per token, without a margin; ties have
    none. The NLL, summed over tokens, is that of the first candidate of the lowest rank there; in
    a row without a candidate the loss has no meaning: mask it.
    """
    # Yuan et al. 2023, section 3: p_i, L_rank and L_ft
    mean_BC = logps_BC / jnp.maximum(tokens_BC, 1.0)
    wrong_BCC = jax.nn.relu(mean_BC[:, None, :] - mean_BC[:, :, None])
    rank_loss_B = (wrong_BCC * better_pairs(ranks_BC)).sum((1, 2))
    nll_B = -(logps_BC * best(ranks_BC)).sum(1)
    return rank_loss_B + nll_B


def best(ranks_BC: Array) -> Array:
    """Return [B, C] float32: 1 at the first candidate of the best (lowest) rank, else 0.

    `ranks_BC`: int, 1 is best. Rank 0 marks an absent candidate, never the best; in a row where
    all are absent index 0 gets the 1.
    """
    return jax.nn.one_hot(first_best(ranks_BC), ranks_BC.shape[1])


def extreme_pair(ranks_BC: Array) -> Array:
    """Return [B, C, C] float32: 1 at [b, i, j] where i is the first best and j the first worst.

    Elsewhere it is 0. `ranks_BC`: int, 1 is best, the highest rank is worst; 0 marks an absent
    candidate, which is neither. A row whose candidates all tie, or with fewer than two, is all 0.
    """
    # An absent candidate, rank 0, is never the worst.
    worst_BC = jax.nn.one_hot(jnp.argmax(ranks_BC, axis=1), ranks_BC.shape[1])
    return best(ranks_BC)[:, :, None] * worst_BC[:, None, :] * better_pairs(ranks_BC)


# ---- Binding to a policy ----


def candidate_token_logprobs(
    apply: Apply, params: Params, batch: Candidates, temperature: float = 1.0
) -> Array:
    """Return the log-probability of each candidate's tokens, [B, C, T] float32 nats.

    `apply` and `params`: of a LanguageModel; its whole parameters, not adapters alone. One pass
    over all candidates. Index t is token t of `tokens_BCT`; index 0, which nothing predicts, and
    tokens off `loss_mask_BCT` have 0. Logits are divided by `temperature`, above 0. Ranks and
    margins of `batch` are not read.
    """
    # M = B * C rows for the model.
    rows = flat_candidates(batch)
    output = run_model(apply, params, rows)
    labels_MT = following(rows["tokens_BT"])
    logp_MT = hidden_logprobs(output.x_BTD, output.unembed_DV, labels_MT, temperature)
    # Back to candidates; what is not of the response adds nothing to its sum.
    logp_BCT = shifted(logp_MT).reshape(batch["tokens_BCT"].shape)
    return logp_BCT * batch["loss_mask_BCT"]


def candidate_logprobs(
    apply: Apply, params: Params, batch: Candidates, temperature: float = 1.0
) -> Array:
    """Return the log-probability of each candidate response, [B, C] nats, summed over its tokens.

    It is float32. `apply` and `params`: of a LanguageModel; its whole parameters. The tokens are
    those under `loss_mask_BCT`; logits are divided by `temperature`, above 0. An absent candidate
    has 0, a certainty: mask it by its rank.
    """
    return candidate_token_logprobs(apply, params, batch, temperature).sum(-1)


def preference_objective(
    apply: Apply,
    params: Params,
    batch: Candidates,
    *,
    loss: Callable[..., Array],
    per_token: bool = False,
    extremes: bool = False,
    temperature: float = 1.0,
) -> LossSum:
    """Sum over prompts the mean of `loss` over each ranking's pairs; ties form no pair.

    `apply` and `params`: of a LanguageModel; its whole parameters. `loss(chosen, rejected)` takes
    the policy's log-probabilities, sums over tokens in nats, of shapes that broadcast to
    [B, C, C], and returns losses of that shape, finite also where there is no pair, for they are
    multiplied by 0. Where `batch` has the reference's, `reference_BC` [B, C], it is
    `loss(chosen, rejected, reference_chosen, reference_rejected)`. `per_token`: the policy's are
    means over tokens (the reference's are used as they are). `extremes`: one pair a prompt, first
    best against first worst. `temperature`, above 0, divides the logits. Margins are not read.

    The weight is the number of prompts with a pair. Metrics, means over all pairs that the loss is
    of: accuracy, margin, chosen and rejected (`pair_metrics`), of log-ratios to the reference, or
    without one of the log-probabilities that `loss` takes.
    """
    # Log-probabilities of the candidates; an absent one's 0 would be a certainty.
    ranks_BC = batch["ranks_BC"]
    logp_BC = candidate_logprobs(apply, params, batch, temperature)
    if per_token:
        logp_BC /= jnp.maximum(batch["loss_mask_BCT"].sum(-1), 1.0)
    logp_BC = jnp.where(ranks_BC > 0, logp_BC, -1.0)

    # Chosen in rows against rejected in columns, the policy's and the reference's.
    sides = [logp_BC[:, :, None], logp_BC[:, None, :]]
    score_BC = logp_BC
    if "reference_BC" in batch:
        reference_BC = batch["reference_BC"]
        sides += [reference_BC[:, :, None], reference_BC[:, None, :]]
        score_BC = logp_BC - reference_BC
    pairs_BCC = extreme_pair(ranks_BC) if extremes else better_pairs(ranks_BC)
    losses_B, valid_B = pair_means(loss(*sides), pairs_BCC)
    return losses_B.sum(), (valid_B.sum(), pair_metrics(score_BC, pairs_BCC))


def kto_kl_estimate(apply: Apply, policy: Params, batch: Candidates) -> Candidates:
    """Return `batch` without its last candidate, and with `kl_B` [B] float32, estimated from it.

    `batch`: of comparison_batches over the records of data.preferences.with_mismatched, where a
    row's last candidate answers another prompt, `margin_B` included, with `reference_BC` [B, C]
    added, the reference's log-probabilities in nats, and no `room`. Returns a new dict: arrays
    [B, C, ...], `reference_BC` too, become [B, C - 1, ...]; `margin_B`, which KTO does not use, is
    left out. `kl_B` holds `mismatched_kl`, perhaps below 0, over the last candidates of all B
    rows, whatever their rank, but for rows that only fill the batch up (without tokens), nan where
    all do; it is the same in each row. Gradients pass: the KTO losses stop them. `apply` and
    `policy`: of a LanguageModel; its whole parameters, not adapters alone.
    """
    # All arrays of the batch but the margin have a candidate axis.
    per_candidate = {name: x for name, x in batch.items() if name != "margin_B"}
    judged = {name: x[:, :-1] for name, x in per_candidate.items()}
    mismatched = {name: x[:, -1:] for name, x in per_candidate.items()}
    policy_logps = candidate_logprobs(apply, policy, mismatched)
    # Rows that only fill the batch up have no response.
    there_B1 = mismatched["segment_ids_BCT"].any(-1)
    kl = mismatched_kl(policy_logps, mismatched["reference_BC"], there_B1)
    return {**judged, "kl_B": jnp.broadcast_to(kl, batch["margin_B"].shape)}


def kto_objective(
    apply: Apply,
    params: Params,
    batch: Candidates,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossSum:
    """Sum `kto_unpaired` over judged responses: rank 1 is desirable, 2 is not, 0 is not judged.

    `apply` and `params`: of a LanguageModel; its whole parameters. `batch`: as `kto_kl_estimate`
    returns, with no other ranks, `reference_BC` [B, C], nats, and `kl_B` [B]. The weight is the
    number of judged responses. Metrics: `desirable` and `undesirable`, the mean log-ratio to the
    reference of such responses; `kl`, the estimate, which may be below 0 (the loss then takes 0);
    with more than one candidate a prompt, also those of `pair_metrics` on log-ratios.
    """
    ranks_BC = batch["ranks_BC"]
    kl_B = batch["kl_B"]
    logp_BC = candidate_logprobs(apply, params, batch)

    # One loss a judged response; all share the batch's estimate of the KL.
    losses_BC = kto_unpaired(
        logp_BC,
        batch["reference_BC"],
        ranks_BC == 1,
        beta=beta,
        kl=kl_B[:, None],
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )

    # Implicit rewards, over beta.
    score_BC = logp_BC - batch["reference_BC"]
    metrics = {}
    for name, side_BC in (("desirable", ranks_BC == 1), ("undesirable", ranks_BC > 1)):
        metrics[name] = ((score_BC * side_BC).sum(), side_BC.sum().astype(jnp.float32))
    # The estimate is the same in all rows; those that only fill the batch up do not count.
    there_B = batch["segment_ids_BCT"].any((1, 2)).astype(jnp.float32)
    metrics["kl"] = ((kl_B * there_B).sum(), there_B.sum())
    if ranks_BC.shape[1] > 1:
        metrics |= pair_metrics(score_BC, better_pairs(ranks_BC))

    # Rank 0 is not judged.
    judged_BC = (ranks_BC > 0).astype(jnp.float32)
    return (losses_BC * judged_BC).sum(), (judged_BC.sum(), metrics)


def ranked_objective(
    apply: Apply,
    params: Params,
    batch: Candidates,
    *,
    loss: Callable[..., Array],
    per_token: bool = False,
) -> LossSum:
    """Sum `loss` of whole rankings over the prompts that have a pair; the weight is their number.

    `apply` and `params`: of a LanguageModel; its whole parameters.
    `loss(logps_BC, ranks_BC, tokens_BC) -> [B]`, such as `rrhf`: log-probabilities are sums over
    tokens, in nats; losses of prompts without a pair are masked. Metrics: `first`, the share of
    the prompts with a pair whose first best candidate is the likeliest, or as likely, and those of
    `pair_metrics`, on log-probabilities. `per_token` makes all these metrics, not the loss, go by
    means over tokens.
    """
    # A loss for each ranking; it counts where one candidate is better than another.
    ranks_BC = batch["ranks_BC"]
    tokens_BC = batch["loss_mask_BCT"].sum(-1)
    logp_BC = candidate_logprobs(apply, params, batch)
    losses_B = loss(logp_BC, ranks_BC, tokens_BC)
    pairs_BCC = better_pairs(ranks_BC)
    valid_B = (pairs_BCC.sum((1, 2)) > 0).astype(jnp.float32)

    # How often the best candidate is the likeliest of those that are there.
    score_BC = logp_BC / jnp.maximum(tokens_BC, 1.0) if per_token else logp_BC
    best_score_B = (score_BC * best(ranks_BC)).sum(1)
    highest_B = jnp.where(ranks_BC > 0, score_BC, -jnp.inf).max(1)
    first_B = best_score_B >= highest_B
    metrics = {
        "first": ((first_B * valid_B).sum(), valid_B.sum()),
        **pair_metrics(score_BC, pairs_BCC),
    }
    return jnp.where(valid_B > 0, losses_B, 0.0).sum(), (valid_B.sum(), metrics)
