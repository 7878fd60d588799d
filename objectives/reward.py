"""Reward models: losses on scalar rewards of ranked candidates, and on the steps of one response.

Ranks are [B, C]: 1 is best, equal ranks tie, 0 marks an absent candidate. A process reward model's
scalar at a step's last token is the log-odds that the step is right.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from model import Params
from objectives.likelihood import (
    Apply,
    LossSum,
    Metrics,
    TokenBatch,
    following,
    hidden_logprobs,
    shifted,
)
from objectives.policy import last_places, last_token
from objectives.unpadded import run_model

Candidates = dict[str, Array]
"""C responses to each prompt, of data.batches.comparison_batches, on the mesh. As in a TokenBatch,
[B, C, T] each: `tokens_BCT`, prompt and response; `segment_ids_BCT`, `positions_BCT`;
`loss_mask_BCT`, 1 on the response, its end token included. And `ranks_BC`, int32: 1 is best, equal
ranks tie, 0 marks an absent candidate; `margin_B`, float32: how much better the best is."""
StepScore = Literal["product", "minimum", "last"]
"""How the probabilities of a response's steps make its score; see `running_score`."""

# ---- Rankings ----


def bradley_terry(chosen: Array, rejected: Array, margin: Array | float = 0.0) -> Array:
    """Return -log sigmoid(r_chosen - r_rejected - margin), elementwise, in nats.

    Rewards and margin, in the reward's units, may be of any shapes that broadcast. Stiennon et al.
    2020; with the margin Touvron et al. 2023, eq. 2.
    """
    # Stiennon et al. 2020; with the margin, Touvron et al. 2023, eq. 2
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def center_rewards(chosen: Array, rejected: Array) -> Array:
    """Return (r_chosen + r_rejected)^2, elementwise: a penalty that holds rewards near 0.

    Rewards may be of any shapes that broadcast. Eisenstein et al. 2023, eq. 2.
    """
    # Eisenstein et al. 2023, eq. 2
    return jnp.square(chosen + rejected)


def better_pairs(ranks_BC: Array) -> Array:
    """Return [B, C, C] float32: 1 at [b, i, j] where candidate i has a better rank than j, else 0.

    `ranks_BC`: int, lower is better, 1 is best. Rank 0, an absent candidate, forms no pair; equal
    ranks form none.
    """
    # Candidate i in rows against candidate j in columns.
    i = ranks_BC[:, :, None]
    j = ranks_BC[:, None, :]
    both_present = (i > 0) & (j > 0)
    return (both_present & (i < j)).astype(jnp.float32)


def first_best(ranks_BC: Array) -> Array:
    """Return the index of the first candidate of the best (lowest) rank, [B] int32, from 0.

    `ranks_BC`: int, 1 is best. Rank 0 marks an absent candidate, never the best; a row where all
    are absent gives 0.
    """
    # Absent candidates stand behind all others.
    last = jnp.iinfo(jnp.int32).max
    absent_last_BC = jnp.where(ranks_BC > 0, ranks_BC, last)
    return jnp.argmin(absent_last_BC, axis=1)


def pair_means(loss_BCC: Array, pairs_BCC: Array) -> tuple[Array, Array]:
    """Return the mean of `loss_BCC` over each prompt's pairs, [B], and 1.0 where it has one, [B].

    Without a pair both are 0. `loss_BCC`: at [b, i, j] the loss of candidate i as the better, j as
    the worse, finite off the pairs too. `pairs_BCC`: 1 for a pair, else 0, as `better_pairs`
    returns.
    """
    # Ouyang et al. 2022, eq. 1: all pairs of a prompt weigh as much as one
    count_B = pairs_BCC.sum((1, 2))
    total_B = (loss_BCC * pairs_BCC).sum((1, 2))
    mean_B = total_B / jnp.maximum(count_B, 1.0)
    return mean_B, (count_B > 0).astype(jnp.float32)


def pair_metrics(score_BC: Array, pairs_BCC: Array) -> Metrics:
    """Return four (sum, weight) metrics by name over all pairs; the weight is their number.

    accuracy: share of pairs whose better candidate has the higher score, equal scores count half.
    margin: the better's score less the worse's. chosen, rejected: the better's score and the
    worse's. `score_BC`: what candidates are compared by. `pairs_BCC`: 1 at [b, i, j] where i is
    better than j, else 0, as `better_pairs` returns.
    """
    # Each measure at [b, i, j], of candidate i as the better of the two.
    pairs = pairs_BCC.sum()
    better_BCC = score_BC[:, :, None]
    worse_BCC = score_BC[:, None, :]
    parts = {
        "accuracy": (better_BCC > worse_BCC) + 0.5 * (better_BCC == worse_BCC),
        "margin": better_BCC - worse_BCC,
        "chosen": better_BCC,
        "rejected": worse_BCC,
    }
    metrics = {}
    for name, part_BCC in parts.items():
        total = (part_BCC * pairs_BCC).sum()
        metrics[name] = (total, pairs)
    return metrics


def ranking_loss(
    rewards_BC: Array,
    ranks_BC: Array,
    margin_B: Array,
    center_rewards_coef: float = 0.0,
) -> tuple[Array, Array]:
    """Return each prompt's mean loss over its pairs, [B] in nats, and 1.0 where it has one, [B].

    Without a pair both are 0. The loss of a pair is `bradley_terry` with the prompt's margin,
    `margin_B` (zeros for none), plus `center_rewards_coef` times `center_rewards`. `ranks_BC`:
    int, 1 is best, equal ranks form no pair, 0 marks an absent candidate.
    """
    # Every candidate against every other; `better_pairs` picks those that form a pair.
    better = rewards_BC[:, :, None]
    worse = rewards_BC[:, None, :]
    loss_BCC = bradley_terry(better, worse, margin_B[:, None, None])
    loss_BCC += center_rewards_coef * center_rewards(better, worse)
    return pair_means(loss_BCC, better_pairs(ranks_BC))


def flat_candidates(batch: Candidates) -> dict[str, Any]:
    """Return the candidates of a batch as rows of a TokenBatch, [B * C, T], for `run_model`.

    It has `tokens_BT`, `segment_ids_BT` and `positions_BT`, and, as it is, `batch`'s `room`
    (objectives.unpadded.Room) if it has one. Candidate c of prompt b is row b * C + c.
    """
    length = batch["tokens_BCT"].shape[-1]
    rows: dict[str, Any] = {}
    for name in ("tokens", "segment_ids", "positions"):
        rows[f"{name}_BT"] = batch[f"{name}_BCT"].reshape(-1, length)
    if "room" in batch:
        rows["room"] = batch["room"]
    return rows


def ranking_objective(
    apply: Apply,
    params: Params,
    batch: Candidates,
    *,
    center_rewards_coef: float = 0.0,
    lm_coef: float = 0.0,
) -> LossSum:
    """Sum `ranking_loss` over prompts; with `lm_coef`, add that times the best response's NLL.

    `apply` and `params`: of a ScalarModel; a candidate's reward is the scalar at its last token.
    Margins are the batch's `margin_B`. `center_rewards_coef` times (r_better + r_worse)^2 is added
    to a pair's loss, to hold rewards near 0. The NLL is of the first best candidate of each prompt
    that has a pair, its mean over the tokens under `loss_mask_BCT`, in nats; unembedded by the
    embedding's transpose from the same pass, it keeps the reward model fluent in what it judges
    (Askell et al. 2021). `lm_coef` is a Python number. The weight is the number of prompts with a
    pair; others add nothing. Metrics: those of `pair_metrics` on rewards, and with `lm_coef`
    `nll`, its mean over those prompts.
    """
    # The reward of a candidate is the scalar at its last token.
    ranks_BC = batch["ranks_BC"]
    rows = flat_candidates(batch)
    output = run_model(apply, params, rows)
    rewards_M = last_token(output.scalars_BT, rows["segment_ids_BT"])
    rewards_BC = rewards_M.reshape(ranks_BC.shape)

    # All pairs of each ranking.
    losses_B, valid_B = ranking_loss(rewards_BC, ranks_BC, batch["margin_B"], center_rewards_coef)
    loss = (losses_B * valid_B).sum()
    metrics = pair_metrics(rewards_BC, better_pairs(ranks_BC))
    if not lm_coef:
        return loss, (valid_B.sum(), metrics)

    # The best candidate of each prompt, as a row of the flat batch, read as a language model.
    prompts, candidates = ranks_BC.shape
    first_of_prompt_B = jnp.arange(prompts) * candidates
    best_B = first_best(ranks_BC) + first_of_prompt_B
    labels_BT = following(rows["tokens_BT"][best_B])
    logp_BT = hidden_logprobs(output.x_BTD[best_B], output.unembed_DV, labels_BT)
    mask_MT = batch["loss_mask_BCT"].reshape(rows["tokens_BT"].shape)
    mask_BT = mask_MT[best_B]
    logp_B = (shifted(logp_BT) * mask_BT).sum(1)
    nll_B = -logp_B / jnp.maximum(mask_BT.sum(1), 1.0)
    nll = (nll_B * valid_B).sum()
    metrics["nll"] = (nll, valid_B.sum())
    return loss + lm_coef * nll, (valid_B.sum(), metrics)


# ---- Steps ----


def step_loss(logits: Array, targets: Array) -> Array:
    """Return the cross-entropy of sigmoid(logit) to a target in [0, 1], elementwise, in nats.

    Wang et al. 2024 (Math-Shepherd).
    """
    # Wang et al. 2024 (Math-Shepherd)
    log_right = jax.nn.log_sigmoid(logits)
    log_wrong = jax.nn.log_sigmoid(-logits)
    return -targets * log_right - (1 - targets) * log_wrong


def process_objective(apply: Apply, params: Params, batch: TokenBatch) -> LossSum:
    """Sum `step_loss` over the last tokens of labelled steps; the weight is their number.

    `apply` and `params`: of a ScalarModel, whose scalars are log-odds. `batch`: of
    data.steps.steps_batches; at those tokens `loss_mask_BT` is 1, and `targets_BT`, float32 in [0,
    1], is the label. Metric: `accuracy`, the share of steps whose probability and label are on one
    side of 1/2; a label of 1/2 counts as above, a probability of 1/2 as half right.

    With a label on the last step only, this is an outcome reward model's loss; Lightman et al.
    2023 (section 2.5) too read its score at the last token, but trained it at every one.
    """
    mask_BT = batch["loss_mask_BT"]
    targets_BT = batch["targets_BT"]
    logits_BT = run_model(apply, params, batch).scalars_BT
    steps = mask_BT.sum()
    losses_BT = step_loss(logits_BT, targets_BT) * mask_BT
    # Right where both are on the same side of 1/2.
    is_right_BT = targets_BT >= 0.5
    same_side_BT = (logits_BT > 0) == is_right_BT
    right_BT = jnp.where(logits_BT == 0, 0.5, same_side_BT) * mask_BT
    metrics = {"accuracy": (right_BT.sum(), steps)}
    return losses_BT.sum(), (steps, metrics)


def step_ends(
    tokens_BT: Array,
    mask_BT: Array,
    newlines: Sequence[int],
    eos: int | Sequence[int] | Array = (),
) -> Array:
    """Return [B, T] bool: True at the last token of each step, among the tokens under `mask_BT`.

    `tokens_BT`: ids. `mask_BT`: above 0 for the response's tokens; all others, also those that
    stand between these, are passed over, and False in the result. `newlines`: ids of tokens that
    end a line. `eos`: id or ids that end a turn, perhaps none. A step is a line with a token, if
    only of spaces: it ends at the first newline after it, or, the last line, at the row's last
    token, its `eos` included. Further newlines are no steps, nor is an `eos` straight after a
    newline; an `eos` that is the whole response is a step. data.steps.lines_of has the same rule
    for texts, but takes lines of spaces, and an empty text, for no steps.
    """
    is_real_BT = mask_BT > 0
    is_newline_BT = is_real_BT & jnp.isin(tokens_BT, jnp.asarray(newlines))
    # What stands before a token, holes passed over: a newline, or the text of a line.
    after_newline_BT = _at_last_before(is_newline_BT, is_real_BT)
    after_text_BT = _at_last_before(~is_newline_BT, is_real_BT)

    ends_line_BT = is_newline_BT & after_text_BT
    is_eos_BT = jnp.isin(tokens_BT, jnp.asarray(eos, jnp.int32).reshape(-1))
    is_last_BT = is_real_BT & last_places(is_real_BT) & ~is_newline_BT
    return ends_line_BT | (is_last_BT & ~(is_eos_BT & after_newline_BT))


def _at_last_before(x_BT: Array, is_real_BT: Array) -> Array:
    """Return `x_BT`, bool, at the last real token before each; False where there is none."""
    # The index of the last real token up to each place, then of that before it; -1: none.
    index_T = jnp.arange(x_BT.shape[1])
    last_BT = jax.lax.cummax(jnp.where(is_real_BT, index_T, -1), axis=1)
    before_BT = jnp.pad(last_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    at_BT = jnp.take_along_axis(x_BT, jnp.maximum(before_BT, 0), axis=1)
    return (before_BT >= 0) & at_BT


def running_score(logits_BT: Array, ends_BT: Array, how: StepScore) -> Array:
    """Return the log of the score of the steps that have ended by t, [B, T]; -inf before any has.

    A step that ends at t counts. `logits_BT`: log-odds that a step is right, read where `ends_BT`,
    bool, marks a step's last token (`step_ends`). `how`: "product", the probability that all steps
    are right (Lightman et al. 2023, section 2.6); "minimum", the least of the steps' probabilities
    (their appendix F); "last", the latest step's probability, for models of outcomes. Raises
    ValueError for another.
    """
    # A step's log-probability stands at its end; 0, a factor of 1, everywhere else.
    logp_BT = jnp.where(ends_BT, jax.nn.log_sigmoid(logits_BT), 0.0)
    if how == "product":
        score_BT = jnp.cumsum(logp_BT, axis=1)
    elif how == "minimum":
        score_BT = jax.lax.cummin(logp_BT, axis=1)
    elif how == "last":
        places_T = jnp.arange(ends_BT.shape[1])
        latest_BT = jax.lax.cummax(jnp.where(ends_BT, places_T, 0), axis=1)
        # The place of the latest end, at every place after it.
        score_BT = jnp.take_along_axis(logp_BT, latest_BT, axis=1)
    else:
        raise ValueError(f"no way to score steps: {how!r}")
    ended_BT = jnp.cumsum(ends_BT, axis=1) > 0
    return jnp.where(ended_BT, score_BT, -jnp.inf)


def step_rewards(logits_BT: Array, ends_BT: Array, how: StepScore) -> Array:
    """Return each step's change of the response's score, at its last token, [B, T]; 0 elsewhere.

    `logits_BT`: log-odds that a step is right, read where `ends_BT`, bool, marks a step's last
    token. `how`: "product", "minimum" or "last" of the steps' probabilities is the score
    (`running_score`, whose ValueError it raises for another), in [0, 1]; before the first step it
    is 0. A row's changes sum to its final score, which re-ranking goes by, so a response gains
    nothing from having more steps.
    """
    # Of the score itself, not its log: 0 before the first step has ended.
    log_score_BT = running_score(logits_BT, ends_BT, how)
    score_BT = jnp.exp(log_score_BT)
    return jnp.diff(score_BT, axis=1, prepend=0.0)
