"""Sample, rank, imitate: which of a policy's own responses it is trained on; what best-of-n costs.

Rows are responses, those to one prompt next to one another, `group` of them. A score of -inf marks
a row without a response: it is never chosen and counts nowhere. Among equal scores the first row
wins.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model import unembed
from objectives.distill import kl
from objectives.likelihood import Apply, LossSum, response_mask, token_logprobs
from objectives.unpadded import run_model

Array = jax.Array
Pool = dict[str, Array]
"""Responses of several rounds, in the rows that `added` gives them: `tokens_BT`, `segment_ids_BT`
and `positions_BT`, int32, as in a Rollout; `loss_mask_BT`, 1 for the response's tokens, the
end-of-turn token included; `score_B`, -inf for a row without a response."""

# What a paper sets, in fields of train_raft.py, which explains them; "paper" is its citation. Four
# rounds stand for "all earlier ones".
RAFT = {
    "paper": "Dong et al. 2023, algorithm 1",
    "select": "best",
    "samples_per_prompt": 8,
    "distinct": False,
    "replay_rounds": 0,
    "kl_coef": 0.0,
}
# The best of all iterations so far.
REJECTION = {"paper": "Touvron et al. 2023, section 3.2.3", "replay_rounds": 4}
# All distinct right answers. The paper starts over from the pretrained model each time; we go on.
RFT = {
    "paper": "Yuan et al. 2023",
    "select": "above_threshold",
    "distinct": True,
    "replay_rounds": 4,
}
# STaR's filter; STaR starts over from the pretrained model each time.
EXPERT = {"paper": "Zelikman et al. 2022, algorithm 1", "select": "above_threshold"}
PAPERS: dict[str, dict[str, Any]] = {
    "raft": RAFT,
    "rejection": RAFT | REJECTION,
    "rft": RAFT | RFT,
    "expert": RAFT | EXPERT,
}

# ---- Selection: booleans [B] from scores [B] ----


def filled(scores_B: Array) -> Array:
    """Return [B] bool: True for rows that hold a response, whose score is not -inf."""
    return scores_B > -jnp.inf


def best_of_n(scores_B: Array, group: int) -> Array:
    """Return [B] bool: True at argmax_j r(x, y_j) of the `group` responses to each prompt.

    RAFT, algorithm 1. `scores_B`: r, a prompt's responses next to each other; -inf marks a row
    without a response. Of equal scores the first wins; a group without a response has no True.
    `group` must divide B.
    """
    scores_QC = scores_B.reshape(-1, group)
    best_Q = scores_QC.argmax(1)
    is_best_QC = best_Q[:, None] == jnp.arange(group)
    # The best of a group without responses is none.
    return is_best_QC.reshape(-1) & filled(scores_B)


def top_fraction(scores_B: Array, one_in: int) -> Array:
    """Return [B] bool: True for the best 1 / `one_in` of all responses, whatever their prompts.

    RAFT's acceptance ratio. `scores_B`: -inf marks a row without a response, which is neither
    counted nor chosen. Of N responses exactly N / `one_in`, rounded up, are chosen; of equal
    scores the first rows. `one_in`: an int, 1 or above.
    """
    # Both sorts are stable, so the first of equal rows ranks first.
    order_B = jnp.argsort(-scores_B)
    rank_B = jnp.argsort(order_B)
    has_B = filled(scores_B)
    count = -(-has_B.sum() // one_in)
    return (rank_B < count) & has_B


def passing(scores_B: Array, threshold: float) -> Array:
    """Return [B] bool: True where r(x, y) >= threshold: right answers, where a program checks.

    `scores_B`: -inf marks a row without a response, never True. STaR, algorithm 1; RFT, section
    3.3.
    """
    return (scores_B >= threshold) & filled(scores_B)


def first_of_equal(tokens_BT: Array, group: int) -> Array:
    """Return [B] bool: False for a row whose tokens are those of an earlier row of its group.

    `tokens_BT`: ids; rows are compared whole, prompt and padding too, with a response or without,
    within each `group` of neighbouring rows. `group` must divide B. (RFT compares equations.)
    """
    tokens_QCT = tokens_BT.reshape(-1, group, tokens_BT.shape[1])
    equal_QCC = (tokens_QCT[:, :, None] == tokens_QCT[:, None]).all(-1)
    has_earlier_QC = jnp.tril(equal_QCC, -1).any(2)
    return ~has_earlier_QC.reshape(-1)


# ---- The pool: samples of several rounds ----


def empty_pool(rows: int, prompt: int, response: int, pad: int) -> Pool:
    """Return a pool of `rows` empty rows, each of `prompt` + `response` tokens.

    All tokens are `pad`, the id of padding; segment ids, positions and loss masks, [B, T] all, are
    0, scores [B] are -inf. The sizes are Python numbers.
    """
    zeros_BT = jnp.zeros((rows, prompt + response), jnp.int32)
    return {
        "tokens_BT": zeros_BT + pad,
        "segment_ids_BT": zeros_BT,
        "positions_BT": zeros_BT,
        "loss_mask_BT": zeros_BT.astype(jnp.float32),
        "score_B": jnp.full(rows, -jnp.inf),
    }


def added(pool: Pool, batch: Mapping[str, Any], number: Array | int) -> Pool:
    """Return the pool with a round's rollout, `batch`, in place of its oldest rows.

    `batch`: a Rollout with `score_B` [B] float32, of the prompt's and response's lengths that
    `empty_pool` was given; its `mask_BR`, behind zeros for the prompt, becomes the pool's
    `loss_mask_BT`. B, the same in all rounds, must divide the pool's rows. `number`: rounds before
    this one, 0 in the first; a Python number or an int scalar. `pool` is not changed.
    """
    # The rows of the oldest round, in a ring.
    rows = batch["score_B"].shape[0]
    rounds = pool["score_B"].shape[0] // rows
    start = number % rounds * rows

    fresh = {**batch, "loss_mask_BT": response_mask(batch)}
    renewed = {}
    for name, x in pool.items():
        renewed[name] = jax.lax.dynamic_update_slice_in_dim(x, fresh[name], start, 0)
    return renewed


def drawn(pool: Pool, chosen_B: Array, key: Array, parts: int, rows: int) -> list[Pool]:
    """Return `parts` minibatches of `rows` rows: the chosen ones in a random order, over and over.

    The order is drawn once, from the PRNG key `key`; of it the first parts x rows are taken, and
    where that exceeds the number of chosen rows it is repeated from its beginning. `chosen_B`:
    bool, one a row of `pool`; where none is True row 0 is repeated, its loss mask as it is: do not
    train on that. Minibatches have the keys of `pool`. `parts` and `rows` are static under jit.
    """
    # Chosen rows first, in random order.
    random_B = jax.random.uniform(key, chosen_B.shape)
    order_B = jnp.argsort(jnp.where(chosen_B, random_B, 2.0))

    # Over and over, as often as is asked for.
    count = jnp.maximum(chosen_B.sum(), 1)
    places = jnp.arange(parts * rows) % count
    picked = order_B[places]
    minibatches = []
    for start in range(0, parts * rows, rows):
        rows_B = picked[start : start + rows]
        minibatches.append({name: x[rows_B] for name, x in pool.items()})
    return minibatches


# ---- Imitation ----


def imitation_objective(
    apply: Apply, params: dict[str, Any], batch: Pool, *, kl_coef: float
) -> LossSum:
    """Sum -log p(y | x) + beta KL(p_0(. | x, y_<t) || p(. | x, y_<t)) over the loss mask, in nats.

    `params`: {"policy", "reference"}, whole parameters of two LanguageModels of one `apply`; no
    gradient reaches the reference, p_0. `kl_coef` is beta, a Python number; 0 leaves supervised
    fine-tuning: then "reference" is not read and may be absent, and there are no metrics. `batch`:
    rows of a Pool, whose scores are not read, and perhaps a `room`. The weight is the number of
    tokens under the loss mask. Metrics: nll and reference_kl, per token, the KL without beta.
    """
    mask_BT = batch["loss_mask_BT"]
    tokens = mask_BT.sum()
    policy = run_model(apply, params["policy"], batch)
    logits_BTV = unembed(policy.x_BTD, policy.unembed_DV)
    loss = -(token_logprobs(logits_BTV, batch["tokens_BT"]) * mask_BT).sum()
    if not kl_coef:
        return loss, (tokens, {})

    reference = run_model(apply, jax.lax.stop_gradient(params["reference"]), batch)
    reference_BTV = unembed(reference.x_BTD, reference.unembed_DV)
    kl_BT = kl(jax.nn.log_softmax(reference_BTV), jax.nn.log_softmax(logits_BTV))
    # Position t predicts token t + 1.
    total = (kl_BT[:, :-1] * mask_BT[:, 1:]).sum()
    metrics = {"nll": (loss, tokens), "reference_kl": (total, tokens)}
    return loss + kl_coef * total, (tokens, metrics)


# ---- Best-of-n as inference ----


def best_of_n_kl(n: int) -> float:
    """Return log n - (n - 1) / n, the most that KL(best of n || policy) can be, in nats.

    `n`: 1 or above. Stiennon et al. 2020, appendix G.3. An upper bound (Beirami et al. 2024),
    nearly reached where no response is likely and no rewards tie.
    """
    return math.log(n) - (n - 1) / n
