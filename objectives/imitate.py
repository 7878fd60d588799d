"""Sample, rank, imitate: which of a policy's own responses it is trained on, and what best-of-n costs in KL.

Rows are responses, those to one prompt next to one another, `group` of them. A score of -inf says that a row holds
no response: it is never chosen and counts nowhere. Among equal scores the first row wins, but for `quantiles`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model import unembed
from objectives.distill import kl
from objectives.likelihood import Apply, inputs, response_mask, token_logprobs

Array = jax.Array
Batch = dict[str, Array]

# What a paper sets, in fields of train_raft.py (explained there); 4 rounds stand for "all earlier ones".
RAFT = {
    "select": "best",
    "samples_per_prompt": 8,
    "distinct": False,
    "replay_rounds": 0,
    "kl_coef": 0.0,
}
PAPERS: dict[str, dict[str, Any]] = {
    "raft": RAFT,  # Dong et al. 2023, algorithm 1
    "rejection": RAFT
    | {
        "replay_rounds": 4
    },  # Touvron et al. 2023, section 3.2.3: the best of all iterations so far
    # Yuan et al. 2023: all distinct right answers. They start over from the pretrained model each time; we go on.
    "rft": RAFT | {"select": "above_threshold", "distinct": True, "replay_rounds": 4},
    "expert": RAFT
    | {
        "select": "above_threshold"
    },  # as STaR's filter (Zelikman et al. 2022, algorithm 1), but it starts over
    # Lu et al. 2022: beta and the number of quantiles, five, as their program has them against toxicity.
    "quark": RAFT
    | {"select": "quantiles", "samples_per_prompt": 1, "replay_rounds": 4, "kl_coef": 0.05},
}

# ---- Selection: booleans [B] ----


def filled(scores_B: Array) -> Array:
    """Whether a row holds a response."""
    return scores_B > -jnp.inf


def best_of_n(scores_B: Array, group: int) -> Array:
    """y = argmax_j r(x, y_j) among the `group` responses to each prompt (Dong et al. 2023, RAFT, algorithm 1)."""
    best_P1 = scores_B.reshape(-1, group).argmax(1)[:, None]
    return (best_P1 == jnp.arange(group)).reshape(-1) & filled(scores_B)


def top_fraction(scores_B: Array, one_in: int) -> Array:
    """The best 1 / `one_in` of all responses, rounded up, whatever their prompts (RAFT's acceptance ratio, global)."""
    rank_B = jnp.argsort(jnp.argsort(-scores_B))  # both sorts are stable
    return (rank_B < -(-filled(scores_B).sum() // one_in)) & filled(scores_B)


def passing(scores_B: Array, threshold: float) -> Array:
    """r(x, y) >= threshold: the right answers, where a program checks them (STaR, algorithm 1; RFT, section 3.3)."""
    return (scores_B >= threshold) & filled(scores_B)


def first_of_equal(tokens_BT: Array, group: int) -> Array:
    """False for a response whose tokens are those of an earlier one to its prompt (RFT compares equations)."""
    tokens_PCT = tokens_BT.reshape(-1, group, tokens_BT.shape[1])
    equal_PCC = (tokens_PCT[:, :, None] == tokens_PCT[:, None]).all(-1)
    return ~jnp.tril(equal_PCC, -1).any(2).reshape(-1)


def quantiles(scores_B: Array, count: int, key: Array) -> Array:
    """The quantile of each response, 1 (worst) to `count`, equally filled to within one; 0 for rows without one.

    All responses sorted by reward and cut into `count` equal parts (Lu et al. 2022, Quark, algorithm 1). Equal
    scores are ordered at random, lest their quantile say which came first.
    """
    ties_B = jax.random.uniform(key, scores_B.shape)
    rank_B = jnp.argsort(jnp.lexsort((ties_B, scores_B)))
    total, empty = filled(scores_B).sum(), (~filled(scores_B)).sum()
    return jnp.where(filled(scores_B), 1 + (rank_B - empty) * count // jnp.maximum(total, 1), 0)


# ---- The pool: samples of several rounds ----


def empty_pool(rows: int, prompt: int, response: int, pad: int) -> Batch:
    """Room for `rows` responses: what `added` writes, all scores -inf."""
    zeros_BT = jnp.zeros((rows, prompt + response), jnp.int32)
    return {
        "tokens_BT": zeros_BT + pad,
        "segment_ids_BT": zeros_BT,
        "positions_BT": zeros_BT,
        "loss_mask_BT": zeros_BT.astype(jnp.float32),
        "score_B": jnp.full(rows, -jnp.inf),
    }


def added(pool: Batch, batch: Batch, number: Array) -> Batch:
    """`pool` with a round's judged rollouts in the place of the oldest ones; `number`: rounds before this one."""
    rows = batch["score_B"].shape[0]
    batch = {**batch, "loss_mask_BT": response_mask(batch)}
    start = number % (pool["score_B"].shape[0] // rows) * rows
    return {
        name: jax.lax.dynamic_update_slice_in_dim(x, batch[name], start, 0)
        for name, x in pool.items()
    }


def drawn(pool: Batch, chosen_B: Array, key: Array, parts: int, rows: int) -> list[Batch]:
    """`parts` minibatches of `rows` of the chosen rows, in random order, over and over."""
    order_B = jnp.argsort(jnp.where(chosen_B, jax.random.uniform(key, chosen_B.shape), 2.0))
    picked = order_B[jnp.arange(parts * rows) % jnp.maximum(chosen_B.sum(), 1)]
    return [
        {name: x[picked[i * rows : (i + 1) * rows]] for name, x in pool.items()}
        for i in range(parts)
    ]


# ---- Quark: a system turn of one token names the quantile ----


def conditioned(batch: Batch, system: int, word: Array | int) -> Batch:
    """Left-padded rows with the turn `system word` after their bos, two columns wider; `word`: a token, or one a row.

    Users cannot ask in that way: no text spells the control token `system`.
    """
    names = ("tokens_BT", "segment_ids_BT", "positions_BT")
    tokens_BT, segments_BT, positions_BT = (
        jnp.pad(batch[name], ((0, 0), (2, 0))) for name in names
    )
    bos_B1 = jnp.argmax(segments_BT > 0, axis=1)[
        :, None
    ]  # its column before; it moves two to the left
    at_BT = jnp.arange(tokens_BT.shape[1]) - (bos_B1 - 2)
    first_B1 = jnp.take_along_axis(tokens_BT, bos_B1, axis=1)
    new_BT = jnp.where(
        at_BT == 0, first_B1, jnp.where(at_BT == 1, system, jnp.reshape(word, (-1, 1)))
    )
    prefix_BT = (at_BT >= 0) & (at_BT < 3)
    shown = {
        "tokens_BT": jnp.where(prefix_BT, new_BT, tokens_BT).astype(jnp.int32),
        "segment_ids_BT": jnp.where(prefix_BT, 1, segments_BT),
        "positions_BT": jnp.where(at_BT < 3, jnp.maximum(at_BT, 0), positions_BT + 2),
    }
    if "loss_mask_BT" in batch:
        shown["loss_mask_BT"] = jnp.pad(batch["loss_mask_BT"], ((0, 0), (2, 0)))
    return shown


def imitation_objective(
    apply: Apply, params: Any, batch: Batch, *, condition: Callable[[Batch], Batch], kl_coef: float
):
    """-log p(y | x, r_k) + beta sum_t KL(p_0(. | x, y_<t) || p(. | x, y_<t, r_k)) in nats, summed over the loss mask.

    Lu et al. 2022 (Quark); their program takes the KL the other way round and adds an entropy bonus. With a
    `condition` that changes nothing and beta 0 this is supervised fine-tuning.
    `params`: {"policy", "reference"}; the reference p_0 sees the rows as they are.
    """
    shown = condition(batch)
    mask_BT = shown["loss_mask_BT"]
    policy = apply(params["policy"], *inputs(shown))
    logits_BTV = unembed(policy.x_BTD, policy.unembed_DV)
    loss, tokens, metrics = (
        -(token_logprobs(logits_BTV, shown["tokens_BT"]) * mask_BT).sum(),
        mask_BT.sum(),
        {},
    )
    if kl_coef:
        reference = apply(jax.lax.stop_gradient(params["reference"]), *inputs(batch))
        reference_BTV = unembed(reference.x_BTD, reference.unembed_DV)
        ours_BTV = logits_BTV[:, -reference_BTV.shape[1] :]
        kl_BT = kl(jax.nn.log_softmax(reference_BTV), jax.nn.log_softmax(ours_BTV))
        total = (
            kl_BT[:, :-1] * batch["loss_mask_BT"][:, 1:]
        ).sum()  # position t predicts token t + 1
        metrics = {"nll": (loss, tokens), "reference_kl": (total, tokens)}
        loss += kl_coef * total
    return loss, (tokens, metrics)


# ---- Best-of-n as inference ----


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n in nats: the most that KL(best of n || policy) can be (Stiennon et al. 2020, appendix G.3).

    An upper bound (Beirami et al. 2024), nearly reached where no response is likely and no rewards tie.
    """
    return math.log(n) - (n - 1) / n
