"""Quark's mathematics: quantiles of rewards, the turn that names one, the loss under it.

Lu et al. 2022. Rows are responses as in objectives/imitate.py; a score of -inf marks a row without
one. A system turn of one token names the quantile.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model import Params, unembed
from model_config import ModelConfig
from objectives.distill import kl
from objectives.imitate import filled
from objectives.likelihood import Apply, LossSum, inputs, token_logprobs
from rollout import Prompts, Rollout, join_responses
from sampling import SamplingConfig, generate
from sharding import constrain_batch, gathered

Array = jax.Array
ADDED = 2
"""Columns that a system turn of one token adds to a row."""


def quantiles(scores_B: Array, count: int, key: Array) -> Array:
    """Return the quantile of each response, 1 (worst) to `count`, [B] int32; 0 without a response.

    All responses sorted by reward and cut into `count` parts, equal to within one (algorithm 1).
    Ties are broken at random, by `key`.
    """
    ties_B = jax.random.uniform(key, scores_B.shape)
    rank_B = jnp.argsort(jnp.lexsort((ties_B, scores_B)))
    has_B = filled(scores_B)
    total = has_B.sum()
    empty = (~has_B).sum()
    return jnp.where(has_B, 1 + (rank_B - empty) * count // jnp.maximum(total, 1), 0)


def conditioned(batch: Mapping[str, Any], system: int, word: Array | int) -> dict[str, Array]:
    """Put the turn `system word` after the bos of each left-padded row, two columns wider.

    `batch`: `tokens_BT`, `segment_ids_BT`, `positions_BT` and, of rows with responses,
    `loss_mask_BT`, the keys of the result. `word`: a token, or one a row, [B]. Users cannot ask in
    that way: no text spells the control token `system`.
    """
    names = ("tokens_BT", "segment_ids_BT", "positions_BT")
    wide = {name: jnp.pad(batch[name], ((0, 0), (ADDED, 0))) for name in names}
    segments_BT = wide["segment_ids_BT"]

    # The column of bos, in the wide rows; it moves two to the left.
    bos_B1 = jnp.argmax(segments_BT > 0, axis=1)[:, None]
    at_BT = jnp.arange(segments_BT.shape[1]) - (bos_B1 - ADDED)
    first_B1 = jnp.take_along_axis(wide["tokens_BT"], bos_B1, axis=1)
    turn_BT = jnp.where(at_BT == 1, system, jnp.reshape(word, (-1, 1)))
    new_BT = jnp.where(at_BT == 0, first_B1, turn_BT)
    prefix_BT = (at_BT >= 0) & (at_BT < 3)
    rows = {
        "tokens_BT": jnp.where(prefix_BT, new_BT, wide["tokens_BT"]).astype(jnp.int32),
        "segment_ids_BT": jnp.where(prefix_BT, 1, segments_BT),
        "positions_BT": jnp.where(at_BT < 3, jnp.maximum(at_BT, 0), wide["positions_BT"] + ADDED),
    }
    if "loss_mask_BT" in batch:
        rows["loss_mask_BT"] = jnp.pad(batch["loss_mask_BT"], ((0, 0), (ADDED, 0)))
    return rows


def quark_objective(
    apply: Apply, params: dict[str, Any], batch: Mapping[str, Any], *, system: int, kl_coef: float
) -> LossSum:
    """Sum -log p(y | x, r_k) + beta KL(p_0(. | x, y_<t) || p(. | x, y_<t, r_k)), in nats.

    Over the loss mask; beta is `kl_coef`. The reference p_0 sees the rows without the quantile.
    The paper's program takes the KL the other way round and adds an entropy bonus. `params`:
    {"policy", "reference"}. `batch`: rows of a Pool with `word_B`, the token of each quantile.
    Returns (loss sum, (tokens, metrics)); metrics, with a beta alone, are nll and reference_kl per
    token.
    """
    told = conditioned(batch, system, batch["word_B"])
    mask_BT = told["loss_mask_BT"]
    tokens = mask_BT.sum()
    policy = apply(params["policy"], *inputs(told))
    logits_BTV = unembed(policy.x_BTD, policy.unembed_DV)
    loss = -(token_logprobs(logits_BTV, told["tokens_BT"]) * mask_BT).sum()
    if not kl_coef:
        return loss, (tokens, {})

    reference = apply(jax.lax.stop_gradient(params["reference"]), *inputs(batch))
    reference_BTV = unembed(reference.x_BTD, reference.unembed_DV)
    ours_BTV = logits_BTV[:, ADDED:]
    kl_BT = kl(jax.nn.log_softmax(reference_BTV), jax.nn.log_softmax(ours_BTV))
    # Position t predicts token t + 1.
    total = (kl_BT[:, :-1] * batch["loss_mask_BT"][:, 1:]).sum()
    metrics = {"nll": (loss, tokens), "reference_kl": (total, tokens)}
    return loss + kl_coef * total, (tokens, metrics)


def make_asking_rollout(
    apply: Apply,
    config: ModelConfig,
    sampling: SamplingConfig,
    *,
    eos: int,
    pad: int,
    n: int,
    system: int,
    word: Array | int,
) -> Callable[[Params, Prompts, Array], Rollout]:
    """Compile rollout(params, prompts, key) as rollout.make_rollout does, asking for a quantile.

    The policy sees the prompts with the turn `system word`; the Rollout has them without.
    """

    @jax.jit
    def rollout(params: Params, prompts: Prompts, key: Array) -> Rollout:
        params = gathered(params, config.compute_dtype)
        asked = conditioned(prompts, system, word)
        samples = generate(apply, config, params, asked, key, sampling, eos=eos, pad=pad, n=n)
        batch = {**join_responses(prompts, samples), "sampler_logp_BR": samples.logp_BR}
        return jax.tree.map(constrain_batch, batch)

    return rollout
