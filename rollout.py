"""What online methods share: sampled responses as a batch, what is logged of them, minibatches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batches import Batches
from data.tokenizer import Tokenizer
from model import Params
from objectives.policy import kl_estimate, masked_mean
from sampling import Samples, SamplingConfig, generate
from sharding import constrain_batch, gathered, to_host, to_mesh

Batch = dict[str, jax.Array]
Condition = Callable[[Batch], Batch]


def make_rollout(
    config: Any,
    apply: Any,
    tokenizer: Tokenizer,
    n: int = 1,
    *,
    eos: int | None = None,
    condition: Condition = lambda batch: batch,
):
    """rollout(policy, prompts, key): prompts and `n` sampled responses to each as one batch, [B, T] with T = P + R.

    `config`: a script's, with `temperature` and `max_new_tokens`, and `model`, whose `apply` it is. `eos`: the token
    that ends a response, if not the tokenizer's. `condition`: the prompts as the policy sees them, where that is not
    how they come back.
    """
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    ends = {"eos": tokenizer.eos if eos is None else eos, "pad": tokenizer.pad}

    @jax.jit
    def rollout(policy: Params, prompts: Batch, key: jax.Array) -> Batch:
        policy = gathered(policy, config.model.compute_dtype)
        samples = generate(
            apply, config.model, policy, condition(prompts), key, sampling, **ends, n=n
        )
        batch = {**join_responses(prompts, samples), "sampler_logp_BR": samples.logp_BR}
        return jax.tree.map(
            constrain_batch, batch
        )  # or XLA decides how rollouts lie, and may replicate them

    return rollout


def ended(batch: Batch, eos: int) -> jax.Array:
    """[B]: whether the response has an end of turn."""
    return jnp.any((batch["response_BR"] == eos) & (batch["mask_BR"] > 0), axis=1)


def rollout_metrics(
    logp_BR: jax.Array, reference_BR: jax.Array, batch: Batch, eos: int
) -> dict[str, jax.Array]:
    """What to watch in responses: KL in nats a response, entropy a token, lengths, ends, repeats, the sampler's gap."""
    mask_BR, response_BR = batch["mask_BR"], batch["response_BR"]
    repeats_BR = (response_BR[:, 1:] == response_BR[:, :-1]) * mask_BR[:, 1:]
    return {
        "kl": ((logp_BR - reference_BR) * mask_BR).sum(1).mean(),
        "kl_k3": (kl_estimate(logp_BR, reference_BR, "k3") * mask_BR).sum(1).mean(),
        "entropy": -masked_mean(logp_BR, mask_BR),
        "length": mask_BR.sum(1).mean(),
        "ended": ended(batch, eos).mean(),
        "repeats": masked_mean(repeats_BR, mask_BR[:, 1:]),
        "sampler_gap": jnp.max(jnp.abs(logp_BR - batch["sampler_logp_BR"]) * mask_BR),
    }


def make_experience(
    config: Any,
    prompts: Batches,
    mesh: jax.sharding.Mesh,
    pad: int,
    rollout: Callable,
    score: Callable,
    judge: Callable,
    most: int = 1,
):
    """experience(policy, reference, key) -> (judged rollouts, metrics, records and responses to show).

    Up to `most` rollouts are made, until no group is under an empty mask (`refilled`).
    """
    refill = jax.jit(partial(refill_groups, group=config.samples_per_prompt))

    def widened(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Prompts of one width, so that all rollouts have one shape."""
        wide = ((0, 0), (config.max_prompt - batch["tokens_BT"].shape[1], 0))
        return {
            k: np.pad(x, wide, constant_values=pad if k == "tokens_BT" else 0)
            for k, x in batch.items()
        }

    def experience(policy: Params, reference: Params, key: jax.Array):
        batch, rounds = None, []
        for number in range(most):
            asked = to_mesh(widened(next(prompts)), mesh)
            sampled = rollout(policy, asked, jax.random.fold_in(key, number))
            judged, metrics = judge(policy, reference, sampled, *score(sampled, prompts.records))
            rounds.append(metrics)
            batch = judged if batch is None else refill(batch, judged)
            kept = batch["mask_BR"].any(1).mean()
            if number + 1 < most and kept == 1:
                break
        means = jax.tree.map(lambda *values: sum(values) / len(values), *rounds)
        shown = prompts.records, sampled["response_BR"]
        return batch, means | {"rounds": float(len(rounds)), "kept": kept}, shown

    return experience


@partial(jax.jit, static_argnames="parts")
def shuffled(batch: Batch, key: jax.Array, parts: int) -> list[Batch]:
    """The rows of `batch` in random order, cut into `parts` minibatches."""
    order_B = jax.random.permutation(key, jax.tree.leaves(batch)[0].shape[0])
    cut = {name: x[order_B].reshape(parts, -1, *x.shape[1:]) for name, x in batch.items()}
    return [{name: constrain_batch(x[i]) for name, x in cut.items()} for i in range(parts)]


def check_first_update(
    update: dict[str, Any], metrics: dict[str, Any], config: Any, start: int
) -> None:
    """Before a run's first update policy = old policy = reference; a breach is a bug, not a setting.

    In bfloat16 a product over other rows may be tiled, and so rounded, otherwise: by hundredths of a nat a token.
    """
    kl, gap, exact = (
        float(metrics["kl"]),
        float(metrics["sampler_gap"]),
        config.model.compute_dtype == jnp.float32,
    )
    near = 1e-4 if exact else 1e-2
    if "approx_kl" in update:
        changed, clipped = float(update["approx_kl"]), float(update["clipped"])
        assert changed < (1e-9 if exact else 1e-3), (
            f"ratio is not 1: mean square log ratio {2 * changed}"
        )
        assert clipped == 0 or not exact, f"clipped of the first update is {clipped}"
    else:  # online DPO: no ratio to the old policy, but a margin over the reference
        assert start > 0 or abs(float(update["margin"])) < near, (
            f"margin starts at {update['margin']}"
        )
    assert start > 0 or abs(kl) < near, f"KL to the reference starts at {kl}"
    assert gap < 1e-4 or not exact, f"sampler and trainer disagree by {gap} nats"


def sample_rows(
    records: list[dict[str, Any]], response_BR: jax.Array, tokenizer: Tokenizer, n: int
) -> list[dict[str, str]]:
    """A row for each of the records' prompts and the first of its `n` responses; right on the first host alone."""
    texts = [
        tokenizer.decode(tokens.tolist()) for tokens in to_host(response_BR)[::n][: len(records)]
    ]
    prompts = [
        record["text"] if "text" in record else record["prompt"][-1]["content"]
        for record in records
    ]
    return [{"prompt": p, "response": r} for p, r in zip(prompts, texts, strict=True)]


def join_responses(prompts: dict[str, jax.Array], samples: Samples) -> dict[str, jax.Array]:
    """Prompts and responses as one batch [B, T + R], with the responses alone as `response_BR` and `mask_BR`.

    Prompts are repeated where there are several samples of each.
    """
    n = samples.mask_BR.shape[0] // prompts["tokens_BT"].shape[0]
    prompts = {name: jnp.repeat(x, n, axis=0) for name, x in prompts.items()}
    real_BR = samples.mask_BR.astype(jnp.int32)
    after_BR = prompts["positions_BT"][:, -1:] + jnp.cumsum(real_BR, axis=1)
    parts = {"tokens_BT": samples.response_BR, "segment_ids_BT": real_BR, "positions_BT": after_BR}
    batch = {name: jnp.concatenate([prompts[name], part], axis=1) for name, part in parts.items()}
    return {**batch, "response_BR": samples.response_BR, "mask_BR": samples.mask_BR}


def refill_groups(pool: Batch, fresh: Batch, group: int) -> Batch:
    """The rows of `pool`, its groups under an empty mask replaced by those of `fresh` that have one (DAPO, eq. 11)."""
    both = {name: jnp.concatenate([pool[name], fresh[name]]) for name in pool}
    useful_P = both["mask_BR"].reshape(-1, group * both["mask_BR"].shape[1]).any(1)
    order_P = jnp.argsort(~useful_P, stable=True)[: useful_P.size // 2]
    rows_B = (order_P[:, None] * group + jnp.arange(group)).reshape(-1)
    return {name: x[rows_B] for name, x in both.items()}
