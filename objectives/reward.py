"""Reward models: losses on scalar rewards of ranked candidates, and on the steps of one response.

A process reward model's scalar at a step's last token is the log-odds that the step is right.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from objectives.likelihood import Apply, following, hidden_logprobs, inputs, shifted


def bradley_terry(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0
) -> jax.Array:
    """-log sigmoid(r_chosen - r_rejected - margin) (Stiennon et al. 2020; margin: Touvron et al. 2023, eq. 2)."""
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def centring(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """(r_chosen + r_rejected)^2: holds rewards near 0 (Eisenstein et al. 2023, eq. 2)."""
    return jnp.square(chosen + rejected)


def better_pairs(ranks_BC: jax.Array) -> jax.Array:
    """[B, C, C] float32: 1 where candidate i has a better (lower) rank than j; rank 0 is an absent one."""
    i, j = ranks_BC[:, :, None], ranks_BC[:, None, :]
    return ((i > 0) & (j > 0) & (i < j)).astype(jnp.float32)


def first_best(ranks_BC: jax.Array) -> jax.Array:
    """[B]: the first of the best candidates."""
    return jnp.argmin(jnp.where(ranks_BC > 0, ranks_BC, jnp.iinfo(jnp.int32).max), axis=1)


def pair_means(loss_BCC: jax.Array, pairs_BCC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean over each prompt's pairs (Ouyang et al. 2022, eq. 1), [B]; and 1.0 where it has a pair at all, [B]."""
    count_B = pairs_BCC.sum((1, 2))
    return (loss_BCC * pairs_BCC).sum((1, 2)) / jnp.maximum(count_B, 1.0), (count_B > 0).astype(
        jnp.float32
    )


def pair_metrics(
    score_BC: jax.Array, pairs_BCC: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Over all pairs: share in the right order, mean gap, means of the better and of the worse score."""
    better_BCC, worse_BCC, pairs = score_BC[:, :, None], score_BC[:, None, :], pairs_BCC.sum()
    parts = {"accuracy": better_BCC > worse_BCC, "margin": better_BCC - worse_BCC}
    parts |= {"chosen": better_BCC, "rejected": worse_BCC}
    return {name: ((part * pairs_BCC).sum(), pairs) for name, part in parts.items()}


def ranking_loss(
    rewards_BC: jax.Array,
    ranks_BC: jax.Array,
    margin_B: jax.Array,
    center_rewards_coef: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """`pair_means` of the pair loss over all pairs in the ranking. Two candidates: the plain Bradley-Terry loss.

    Rewards [B, C], ranks [B, C] (1 is best; ties and absent candidates form no pair).
    """
    better, worse = rewards_BC[:, :, None], rewards_BC[:, None, :]
    loss_BCC = bradley_terry(better, worse, margin_B[:, None, None])
    loss_BCC += center_rewards_coef * centring(better, worse)
    return pair_means(loss_BCC, better_pairs(ranks_BC))


def last_token(scalars_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """[B]: the scalar at each row's last real token, on whichever side the padding is."""
    length = segment_ids_BT.shape[1]
    last_B = length - 1 - jnp.argmax(jnp.flip(segment_ids_BT > 0, axis=1), axis=1)
    # A compare-and-sum, for the backward pass of a gather is a scatter, slow on every platform.
    return jnp.where(jnp.arange(length) == last_B[:, None], scalars_BT, 0.0).sum(1)


def ranking_objective(
    apply: Apply,
    params: Any,
    batch: dict[str, jax.Array],
    *,
    center_rewards_coef: float = 0.0,
    lm_coef: float = 0.0,
):
    """Ranking loss (sum over prompts); with `lm_coef`, plus the NLL of the best response per token.

    The second keeps the reward model fluent in what it judges (Askell et al. 2021), from the same pass.
    """
    ranks_BC = batch["ranks_BC"]
    flat = [
        batch[k].reshape(-1, batch[k].shape[-1])
        for k in ("tokens_BCT", "segment_ids_BCT", "positions_BCT")
    ]
    best_B = (
        first_best(ranks_BC) + jnp.arange(ranks_BC.shape[0]) * ranks_BC.shape[1]
    )  # a row of the flat batch
    output = apply(params, *flat)
    rewards_BC = last_token(output.scalars_BT, flat[1]).reshape(ranks_BC.shape)
    losses_B, valid_B = ranking_loss(rewards_BC, ranks_BC, batch["margin_B"], center_rewards_coef)
    loss = (losses_B * valid_B).sum()
    metrics = pair_metrics(rewards_BC, better_pairs(ranks_BC))
    if lm_coef:
        labels_BT = following(flat[0][best_B])
        logp_BT = hidden_logprobs(output.x_BTD[best_B], output.unembed_DV, labels_BT)
        mask_BT = batch["loss_mask_BCT"].reshape(flat[0].shape)[best_B]
        nll_B = -(shifted(logp_BT) * mask_BT).sum(1) / jnp.maximum(mask_BT.sum(1), 1.0)
        loss += lm_coef * (nll_B * valid_B).sum()
        metrics["nll"] = ((nll_B * valid_B).sum(), valid_B.sum())
    return loss, (valid_B.sum(), metrics)


def combined(
    scores: Sequence[jax.Array],
    how: str,
    *,
    weights: Sequence[float] = (),
    gate: float = 0.0,
    floor: float = -1.0,
) -> jax.Array:
    """One score a response, [B], from several. `gated`: the first where all others reach `gate`, else `floor`.

    A reward a criterion: Glaese et al. 2022 (a preference beside rules); Touvron et al. 2023, section 3.2.3 (Llama 2:
    helpfulness counts where safety reaches a threshold; below it, there, the safety score).
    """
    scores_BC = jnp.stack(list(scores), axis=1)  # C here: criteria
    return {
        "mean": lambda: scores_BC.mean(1),
        "weighted": lambda: (scores_BC * jnp.array(weights, jnp.float32)).sum(1),
        "minimum": lambda: scores_BC.min(1),
        "gated": lambda: jnp.where((scores_BC[:, 1:] >= gate).all(1), scores_BC[:, 0], floor),
    }[how]()


# ---- Steps ----


def step_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of sigmoid(logit) to a target in [0, 1], in nats (Wang et al. 2024, Math-Shepherd)."""
    return -targets * jax.nn.log_sigmoid(logits) - (1 - targets) * jax.nn.log_sigmoid(-logits)


def process_objective(apply: Apply, params: Any, batch: dict[str, jax.Array]):
    """`step_loss` at the last token of each labelled step, summed over steps; of `data.steps.steps_batches`.

    With a label on the last step only, an outcome reward model's, whose score Lightman et al. 2023 (section 2.5) too
    read at the last token; they trained it at every one.
    """
    mask_BT, targets_BT = batch["loss_mask_BT"], batch["targets_BT"]
    logits_BT = apply(params, *inputs(batch)).scalars_BT
    steps = mask_BT.sum()
    right_BT = ((logits_BT > 0) == (targets_BT >= 0.5)) * mask_BT
    return (step_loss(logits_BT, targets_BT) * mask_BT).sum(), (
        steps,
        {"accuracy": (right_BT.sum(), steps)},
    )


def step_ends(tokens_BT: jax.Array, mask_BT: jax.Array, newlines: list[int]) -> jax.Array:
    """[B, T] bool: the last token of each step: of `newlines`, or the last one, of what `mask_BT` has of a row."""
    length = tokens_BT.shape[1]
    last_B = length - 1 - jnp.argmax(jnp.flip(mask_BT > 0, axis=1), axis=1)
    return (mask_BT > 0) & (
        jnp.isin(tokens_BT, jnp.array(newlines)) | (jnp.arange(length) == last_B[:, None])
    )


def running_score(logits_BT: jax.Array, ends_BT: jax.Array, how: str) -> jax.Array:
    """[B, T]: log of the score of the steps that have ended by t; -inf before the first has.

    product: the probability that all are right (Lightman et al. 2023, section 2.6). minimum: the least of theirs
    (their appendix F). last: the latest alone, as of an outcome model, or of one that says how often it comes right.
    """
    logp_BT = jnp.where(ends_BT, jax.nn.log_sigmoid(logits_BT), 0.0)
    if how == "last":
        at_BT = jax.lax.cummax(jnp.where(ends_BT, jnp.arange(ends_BT.shape[1]), 0), axis=1)
        score_BT = jnp.take_along_axis(logp_BT, at_BT, axis=1)
    else:
        score_BT = {"product": jnp.cumsum, "minimum": jax.lax.cummin}[how](logp_BT, axis=1)
    return jnp.where(jnp.cumsum(ends_BT, axis=1) > 0, score_BT, -jnp.inf)


def step_rewards(logits_BT: jax.Array, ends_BT: jax.Array, how: str) -> jax.Array:
    """[B, T]: at each step's last token, by how much that step changes the response's score; 0 elsewhere.

    They sum to the score that re-ranking goes by, so a response gains nothing from having more steps, as it would
    if the steps' probabilities were summed. `how` as of `running_score`.
    """
    return jnp.diff(jnp.exp(running_score(logits_BT, ends_BT, how)), axis=1, prepend=0.0)
