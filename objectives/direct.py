"""Direct preference methods: losses on log-probabilities of responses, and how they bind to a policy.

Log-probabilities are of whole responses given their prompts, in nats: sums over tokens, or where a loss says
so means per token. All losses are elementwise, so that [B] arrays, or any that broadcast, give one loss each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from objectives.likelihood import Apply, following, hidden_logprobs, shifted
from objectives.reward import better_pairs, first_best, pair_means, pair_metrics

Array = jax.Array
USUAL = {"beta": 0.1}
PAPERS = {"simpo": {"beta": 2.0}}
"""Where a paper's settings are not the usual ones."""

# ---- On pairs, against a reference ----


def log_ratio_gap(
    policy_chosen: Array,
    policy_rejected: Array,
    reference_chosen: Array,
    reference_rejected: Array,
):
    """h = log [pi(y_w) / ref(y_w)] - log [pi(y_l) / ref(y_l)]: beta h is the gap of implicit rewards."""
    return (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)


def dpo(
    policy_chosen_logps: Array, policy_rejected_logps: Array,
    reference_chosen_logps: Array, reference_rejected_logps: Array, *, beta: float,
) -> Array:  # fmt: skip
    """Direct preference optimisation (Rafailov et al. 2023). [B] log-probabilities to [B] losses."""
    h = log_ratio_gap(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return -jax.nn.log_sigmoid(beta * h)  # Rafailov et al. 2023, eq. 7


def cdpo(
    policy_chosen_logps: Array, policy_rejected_logps: Array,
    reference_chosen_logps: Array, reference_rejected_logps: Array, *, beta: float, label_smoothing: float = 0.1,
) -> Array:  # fmt: skip
    """Conservative DPO (Mitchell 2023): each label is taken to be wrong with probability `label_smoothing`."""
    h = log_ratio_gap(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    right, wrong = -jax.nn.log_sigmoid(beta * h), -jax.nn.log_sigmoid(-beta * h)
    return (
        1 - label_smoothing
    ) * right + label_smoothing * wrong  # Mitchell 2023: smoothed cross-entropy


def robust_dpo(
    policy_chosen_logps: Array, policy_rejected_logps: Array,
    reference_chosen_logps: Array, reference_rejected_logps: Array, *, beta: float, label_smoothing: float = 0.1,
) -> Array:  # fmt: skip
    """DPO whose mean over labels flipped with probability `label_smoothing` (< 1/2) is that over true ones."""
    h = log_ratio_gap(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    right, wrong = -jax.nn.log_sigmoid(beta * h), -jax.nn.log_sigmoid(-beta * h)
    # Chowdhury et al. 2024: the unbiased estimate of the loss without noise
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def ipo(
    policy_chosen_logps: Array, policy_rejected_logps: Array,
    reference_chosen_logps: Array, reference_rejected_logps: Array, *, beta: float,
) -> Array:  # fmt: skip
    """Identity preference optimisation: the gap is drawn to 1 / (2 beta), not to infinity; `beta` is its tau."""
    h = log_ratio_gap(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return jnp.square(h - 1 / (2 * beta))  # Azar et al. 2024, eq. 17


def slic(
    policy_chosen_logps: Array, policy_rejected_logps: Array,
    reference_chosen_logps: Array, reference_rejected_logps: Array, *, beta: float, delta: float = 1.0,
) -> Array:  # fmt: skip
    """SLiC's hinge on log-ratios to the reference: no loss beyond a gap of `delta` / `beta`."""
    h = log_ratio_gap(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return jax.nn.relu(delta - beta * h)  # Liu et al. 2024 (RSO), hinge-norm loss


def kto_unpaired(
    policy_logps: Array, reference_logps: Array, desirable: Array, *, beta: float, kl: Array | float = 0.0,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> Array:  # fmt: skip
    """Kahneman-Tversky optimisation on single responses, `desirable` (1) or not (0).

    `kl` estimates KL(policy || reference) in nats: see `mismatched_kl`.
    """
    z0 = jax.lax.stop_gradient(
        jnp.maximum(kl, 0.0)
    )  # Ethayarajh et al. 2024: clamped, without gradient
    r = policy_logps - reference_logps
    value = jax.nn.sigmoid(beta * jnp.where(desirable, r - z0, z0 - r))
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weight - weight * value  # Ethayarajh et al. 2024, eq. 7: lambda_y - v(x, y)


def kto(
    policy_chosen_logps: Array, policy_rejected_logps: Array,
    reference_chosen_logps: Array, reference_rejected_logps: Array, *, beta: float, kl: Array | float = 0.0,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> Array:  # fmt: skip
    """KTO where each pair is a desirable and an undesirable response: the mean of their two losses."""
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    good = kto_unpaired(
        policy_chosen_logps, reference_chosen_logps, True, beta=beta, kl=kl, **weights
    )
    bad = kto_unpaired(
        policy_rejected_logps, reference_rejected_logps, False, beta=beta, kl=kl, **weights
    )
    return 0.5 * (good + bad)


# ---- Without a reference ----


def log_complement(logp: Array) -> Array:
    """log(1 - p) from log p; p counts as at most 1 - 1e-6, for at 1 both value and gradient are infinite.

    The gradient there is that at 1 - 1e-6, not 0: of what a model is sure it must be able to unlearn.
    """
    at_most = logp + jax.lax.stop_gradient(jnp.minimum(logp, -1e-6) - logp)
    return jnp.log(-jnp.expm1(at_most))


def orpo(chosen_mean_logps: Array, rejected_mean_logps: Array, *, beta: float) -> Array:
    """Odds-ratio preference optimisation; log-probabilities are means per token, `beta` is the paper's lambda."""
    odds_chosen = chosen_mean_logps - log_complement(chosen_mean_logps)
    odds_rejected = rejected_mean_logps - log_complement(rejected_mean_logps)
    odds_ratio_loss = -jax.nn.log_sigmoid(odds_chosen - odds_rejected)  # Hong et al. 2024, eq. 7
    return -chosen_mean_logps + beta * odds_ratio_loss  # Hong et al. 2024, eq. 6


def simpo(
    chosen_mean_logps: Array, rejected_mean_logps: Array, *, beta: float, gamma: float
) -> Array:
    """Simple preference optimisation: log-probabilities are means per token, `gamma` is the margin asked for."""
    return -jax.nn.log_sigmoid(
        beta * (chosen_mean_logps - rejected_mean_logps) - gamma
    )  # Meng et al. 2024, eq. 6


def cpo(
    chosen_logps: Array, rejected_logps: Array, *, beta: float, nll_weight: float = 1.0
) -> Array:
    """Contrastive preference optimisation: DPO under a uniform reference, plus the chosen response's NLL."""
    preference = -jax.nn.log_sigmoid(beta * (chosen_logps - rejected_logps))
    return preference - nll_weight * chosen_logps  # Xu et al. 2024, eq. 3: L_prefer + L_NLL


def slic_hf(
    chosen_logps: Array,
    rejected_logps: Array,
    target_logps: Array | None = None,
    *,
    delta: float,
    weight: float,
) -> Array:
    """Sequence likelihood calibration: a hinge, and `weight` times the NLL of a target (default: the chosen)."""
    target_logps = chosen_logps if target_logps is None else target_logps
    hinge = jax.nn.relu(delta - chosen_logps + rejected_logps)
    return (
        hinge - weight * target_logps
    )  # Zhao et al. 2023, section 2: calibration loss and regulariser


# ---- On rankings: [B, C] log-probabilities, ranks (1 is best, 0 absent) and numbers of tokens to [B] losses ----


def rrhf(logps_BC: Array, ranks_BC: Array, tokens_BC: Array) -> Array:
    """Rank responses: hinges on per-token means over all pairs, plus the best response's NLL (its first, if tied)."""
    mean_BC = logps_BC / jnp.maximum(tokens_BC, 1.0)  # Yuan et al. 2023, section 3: p_i
    wrong_BCC = jax.nn.relu(mean_BC[:, None, :] - mean_BC[:, :, None])
    rank_loss_B = (wrong_BCC * better_pairs(ranks_BC)).sum((1, 2))  # Yuan et al. 2023, L_rank
    nll_B = -(logps_BC * best(ranks_BC)).sum(1)  # Yuan et al. 2023, L_ft
    return rank_loss_B + nll_B


# ---- Binding to a policy ----


def best(ranks_BC: Array) -> Array:
    """[B, C] float32: 1 at the first of the best candidates."""
    return jax.nn.one_hot(first_best(ranks_BC), ranks_BC.shape[1])


def extreme_pair(ranks_BC: Array) -> Array:
    """[B, C, C] float32 as of `better_pairs`, but only the first of the best and the first of the worst."""
    worst_BC = jax.nn.one_hot(jnp.argmax(ranks_BC, axis=1), ranks_BC.shape[1])
    return best(ranks_BC)[:, :, None] * worst_BC[:, None, :] * better_pairs(ranks_BC)


def candidate_token_logprobs(
    apply: Apply, params: Any, batch: dict[str, Array], temperature: float = 1.0
) -> Array:
    """[B, C, T]: log-probabilities of all candidates' tokens, 0 outside the loss mask; one pass over them."""
    shape = batch["tokens_BCT"].shape
    flat = [
        batch[k].reshape(-1, shape[-1]) for k in ("tokens_BCT", "segment_ids_BCT", "positions_BCT")
    ]
    output = apply(params, *flat)
    logp_BT = hidden_logprobs(output.x_BTD, output.unembed_DV, following(flat[0]), temperature)
    return shifted(logp_BT).reshape(shape) * batch["loss_mask_BCT"]


def candidate_logprobs(
    apply: Apply, params: Any, batch: dict[str, Array], temperature: float = 1.0
) -> Array:
    """[B, C]: log-probability of each candidate."""
    return candidate_token_logprobs(apply, params, batch, temperature).sum(-1)


def mismatched_kl(policy_logps: Array, reference_logps: Array) -> Array:
    """KTO's estimate of the KL, from responses to other prompts (Ethayarajh et al. 2024, estimate of z0)."""
    return jnp.mean(policy_logps - reference_logps)


def preference_objective(
    apply: Apply,
    params: Any,
    batch: dict[str, Array],
    *,
    loss: Callable[..., Array],
    per_token: bool = False,
    extremes: bool = False,
    temperature: float = 1.0,
):
    """Per-prompt mean of `loss` over the ranking's pairs, summed over prompts; ties form no pair.

    `loss` takes chosen, rejected and, where the batch has `reference_BC`, the reference's of both. Log-probabilities
    are sums over tokens, or with `per_token` means. `extremes`: one pair a prompt, the best and the worst.
    `temperature`: by which the logits are divided.
    Metrics are in nats of log-ratio to the reference, or of log-probability where there is none.
    """
    ranks_BC, tokens_BC = batch["ranks_BC"], batch["loss_mask_BCT"].sum(-1)
    logp_BC = candidate_logprobs(apply, params, batch, temperature)
    logp_BC /= jnp.maximum(tokens_BC, 1.0) if per_token else 1.0
    logp_BC = jnp.where(
        ranks_BC > 0, logp_BC, -1.0
    )  # an absent candidate's 0 would be a certainty
    policy_and_reference = [logp_BC] + ([batch["reference_BC"]] if "reference_BC" in batch else [])
    pairs_BCC = extreme_pair(ranks_BC) if extremes else better_pairs(ranks_BC)
    loss_BCC = loss(
        *(side for x in policy_and_reference for side in (x[:, :, None], x[:, None, :]))
    )
    losses_B, valid_B = pair_means(loss_BCC, pairs_BCC)
    score_BC = logp_BC - batch["reference_BC"] if "reference_BC" in batch else logp_BC
    return losses_B.sum(), (valid_B.sum(), pair_metrics(score_BC, pairs_BCC))


def kto_objective(apply: Apply, params: Any, batch: dict[str, Array], **options: Any):
    """KTO's losses summed over judged responses: rank 1 is desirable, 2 is not, 0 is not judged.

    The batch has `reference_BC` and `kl_B` (one estimate for the whole batch, in each row); `options` as of
    `kto_unpaired`.
    """
    ranks_BC, kl_B = batch["ranks_BC"], batch["kl_B"]
    judged_BC = (ranks_BC > 0).astype(jnp.float32)
    logp_BC = candidate_logprobs(apply, params, batch)
    losses_BC = kto_unpaired(
        logp_BC, batch["reference_BC"], ranks_BC == 1, kl=kl_B[:, None], **options
    )
    score_BC, judged = logp_BC - batch["reference_BC"], judged_BC.sum()
    sides = {"desirable": ranks_BC == 1, "undesirable": ranks_BC == 2}
    metrics = {
        name: ((score_BC * side).sum(), side.sum().astype(jnp.float32))
        for name, side in sides.items()
    }
    metrics["kl"] = (
        kl_B.sum(),
        jnp.float32(kl_B.size),
    )  # as estimated: where it is below 0 the loss takes 0
    if ranks_BC.shape[1] > 1:
        metrics |= pair_metrics(score_BC, better_pairs(ranks_BC))
    return (losses_BC * judged_BC).sum(), (judged, metrics)


def ranked_objective(
    apply: Apply,
    params: Any,
    batch: dict[str, Array],
    *,
    loss: Callable[..., Array],
    per_token: bool = False,
):
    """`loss` of whole rankings (`rrhf`, `contrastive`), summed over the prompts that have a pair.

    `per_token`: the metrics too compare means over tokens, as the loss does.
    """
    ranks_BC, tokens_BC = batch["ranks_BC"], batch["loss_mask_BCT"].sum(-1)
    logp_BC = candidate_logprobs(apply, params, batch)
    pairs_BCC = better_pairs(ranks_BC)
    valid_B = (pairs_BCC.sum((1, 2)) > 0).astype(jnp.float32)
    losses_B = loss(logp_BC, ranks_BC, tokens_BC)
    score_BC = logp_BC / jnp.maximum(tokens_BC, 1.0) if per_token else logp_BC
    first_B = (score_BC * best(ranks_BC)).sum(1) >= jnp.where(
        ranks_BC > 0, score_BC, -jnp.inf
    ).max(1)
    metrics = {
        "first": ((first_B * valid_B).sum(), valid_B.sum()),
        **pair_metrics(score_BC, pairs_BCC),
    }
    return jnp.where(valid_B > 0, losses_B, 0.0).sum(), (valid_B.sum(), metrics)


def kto_kl_estimate(apply: Apply, policy: Any, batch: dict[str, Array]) -> dict[str, Array]:
    per_candidate = {name: x for name, x in batch.items() if name != "margin_B"}
    last = {name: x[:, -1:] for name, x in per_candidate.items()}
    judged = {name: x[:, :-1] for name, x in per_candidate.items()}
    kl = mismatched_kl(candidate_logprobs(apply, policy, last), last["reference_BC"])
    return {**judged, "kl_B": jnp.broadcast_to(kl, batch["margin_B"].shape)}
