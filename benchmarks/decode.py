"""Sampling beside transformers' generate with the same weights, and slot refill beside a fixed batch.

python -m benchmarks.decode                    # prints a table, writes benchmarks/results/decode-<platform>.json
"""

import dataclasses
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.side_by_side import (
    RESULTS,
    SMALL,
    apart,
    count,
    interleaved,
    on_cpu,
    peaks,
    plain_batch,
    random_params,
    report,
)
from kernels.attention import decode_attention
from model import LanguageModel, Params, init_and_apply
from model_config import PRESETS, ModelConfig
from runtime import flags
from sampling import SamplingConfig, generate

NEVER = -1  # no token is this: responses have full length, as the peer's


@dataclasses.dataclass(frozen=True)
class Config:
    batches: tuple[int, ...] = (16, 1) if on_cpu() else (64, 1)
    """Rows sampled together, a row of the table each."""
    prompt: int = 64 if on_cpu() else 1024
    """Tokens of a prompt."""
    new: int = 64 if on_cpu() else 256
    """Tokens sampled after it."""
    requests: int = 128 if on_cpu() else 512
    """Prompts of the comparison of refilled slots with fixed batches; the slots are the first of `batches`."""
    limit: int = 256 if on_cpu() else 1024
    """Most tokens of a response there; their mean length is a quarter of it."""
    rounds: int = 5
    """Timings of each row; the median is reported."""
    peer: bool = True
    """Time transformers too, in the same run."""
    model: ModelConfig = SMALL if on_cpu() else PRESETS["llama3.2-1b"]
    """Default by platform."""
    out: str = RESULTS
    """Folder of the results."""


def our_sampler(config: Config, params: Params, prompts: dict[str, Any], new: int) -> Any:
    """A call that samples `new` tokens after each prompt, at temperature 1 from all tokens."""
    apply, sampling = (
        init_and_apply(LanguageModel(config.model))[1],
        SamplingConfig(max_new_tokens=new),
    )
    sample = jax.jit(
        lambda *args: generate(apply, config.model, *args, sampling, eos=NEVER, pad=0).response_BR
    )
    key = jax.random.key(0)

    def call() -> None:
        assert sample(params, prompts, key).block_until_ready().shape[1] == new

    return call


def fixed_rows(config: Config, params: Params) -> list[dict[str, Any]]:
    """A row for each batch size, and one for its prefill."""
    rows, asked = [], []
    for batch in config.batches:
        prompts = jax.device_put(plain_batch(config.model, batch, config.prompt))
        for what, new in (("generate", config.new), ("  of this, prefill", 1)):
            calls, asked = (
                {"plumb": our_sampler(config, params, prompts, new)},
                [*asked, (prompts["tokens_BT"], new)],
            )
            what = f"{what} {batch} x {config.prompt}+{new}"
            rows.append({"what": what, "calls": calls, "batch": batch, "tokens": batch * new})
    if config.peer:
        from benchmarks import peers

        samplers = apart(
            peers.samplers,
            config.model,
            [(np.asarray(tokens_BT), new) for tokens_BT, new in asked],
        )
        for row, sampler in zip(rows, samplers, strict=True):
            row["calls"]["transformers"] = sampler
    return rows


def refill_row(config: Config, params: Params) -> dict[str, Any]:
    """Requests whose lengths are geometric, a quarter of the limit on average: refilled slots beside fixed batches."""
    _, apply = init_and_apply(LanguageModel(config.model))
    sampling = SamplingConfig(max_new_tokens=config.limit)

    # The weights are random, so of the vocabulary's tokens 4 in `limit` end a response at those odds.
    count = max(1, 4 * config.model.vocab // config.limit)
    tokens = np.arange(1, config.model.vocab)  # all but the pad token
    eos = np.random.default_rng(0).choice(tokens, count, replace=False)

    def sampler(slots: int | None):
        how = {"eos": eos, "pad": 0, "slots": slots}
        return jax.jit(
            lambda prompts, key: generate(
                apply, config.model, params, prompts, key, sampling, **how
            )
        )

    slots, key = config.batches[0], jax.random.key(0)
    refilled, fixed = sampler(slots), sampler(None)
    prompts = plain_batch(config.model, config.requests, config.prompt)
    parts = [
        {k: x[i : i + slots] for k, x in prompts.items()} for i in range(0, config.requests, slots)
    ]
    one_by_one = lambda: [fixed(part, jax.random.fold_in(key, i)) for i, part in enumerate(parts)]
    mine, whole = jax.device_get([refilled(prompts, key), fixed(prompts, key)])
    assert (mine.response_BR == whole.response_BR).mean() > (
        1 if on_cpu() else 0.5
    ) - 1e-3  # equal but for rounding
    tokens, theirs = mine.mask_BR.sum(), sum(float(part.mask_BR.sum()) for part in one_by_one())
    return {
        "what": f"refill {slots}, {config.requests} x up to {config.limit}",
        "calls": {
            "plumb": lambda: jax.block_until_ready(refilled(prompts, key)),
            "fixed batches": lambda: jax.block_until_ready(one_by_one()),
        },
        "tokens": float(tokens),
        "fixed_tokens": theirs,
        "mean_length": float(tokens) / config.requests,
    }


def split_attention(q_BTNH, k_BKSH, v_BKSH, valid_BS, at, parts: int = 8):
    """`decode_attention` with the keys in C parts that are worked on apart, their softmaxes joined afterwards."""
    batch, kv_heads, slots, width = k_BKSH.shape
    q_BKGH = q_BTNH.reshape(batch, kv_heads, -1, width) * width**-0.5
    k_BKCSH, v_BKCSH = (
        x.reshape(batch, kv_heads, parts, slots // parts, width) for x in (k_BKSH, v_BKSH)
    )
    scores_BKCGS = jnp.einsum(
        "BKGH,BKCSH->BKCGS", q_BKGH, k_BKCSH, preferred_element_type=jnp.float32
    )
    seen = (valid_BS > 0).reshape(batch, 1, parts, 1, -1)
    top = jnp.max(jnp.where(seen, scores_BKCGS, -1e30), axis=-1, keepdims=True)
    weights_BKCGS = jnp.where(seen, jnp.exp(scores_BKCGS - top), 0.0)
    kept = jnp.exp(top - jnp.max(top, axis=2, keepdims=True))
    out = jnp.einsum("BKCGS,BKCSH->BKCGH", weights_BKCGS.astype(v_BKSH.dtype), v_BKCSH) * kept
    total = (weights_BKCGS.sum(-1, keepdims=True) * kept).sum(2)
    return (out.sum(2) / total).astype(q_BTNH.dtype).reshape(q_BTNH.shape)


def long_cache_rows(config: Config) -> list[dict[str, Any]]:
    """One token against a long cache, by the einsum and split over the keys; eight query heads on two."""
    rows = []
    for batch in (1, 16):
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = [(batch, 1, 8, 64), *[(batch, 2, 8192, 64)] * 2]
        arrays = [
            jax.random.normal(k, s, config.model.compute_dtype)
            for k, s in zip(keys, shapes, strict=True)
        ]
        arrays += [jnp.ones((batch, 8192), jnp.int32), jnp.int32(8191)]
        runs = {
            "plumb": decode_attention,
            "8 parts": split_attention,
            "1 part": partial(split_attention, parts=1),
        }
        runs = {name: jax.jit(run) for name, run in runs.items()}
        for run in runs.values():
            np.testing.assert_allclose(
                run(*arrays), runs["plumb"](*arrays), atol=1e-5 if on_cpu() else 1e-2
            )
        calls = {
            name: partial(lambda run, args: run(*args).block_until_ready(), run, arrays)
            for name, run in runs.items()
        }
        rows.append(
            {"what": f"attention, {batch} x cache of 8192", "calls": calls, "tokens": batch}
        )
    return rows


def add_roofline(config: Config, params: Params, rows: list[dict[str, Any]]) -> None:
    """Share of the memory's speed at which a decode step reads what it must: weights once, and each row's cache."""
    c, width = config.model, config.model.compute_dtype.itemsize
    weights = count(params) - c.vocab * c.width * (
        not c.tied
    )  # untied, of the embedding only some rows are read
    for whole, prefill in zip(rows[::2], rows[1::2], strict=True):
        cache = (
            whole["batch"]
            * 2
            * c.layers
            * c.kv_heads
            * c.head_dim
            * (config.prompt + config.new / 2)
        )
        whole["bytes_per_step"] = width * (weights + cache)
        spent = np.median(whole["seconds"]["plumb"]) - np.median(prefill["seconds"]["plumb"])
        whole["ms_per_step"] = 1e3 * spent / (config.new - 1)
        if peaks():
            whole["of_roofline"] = (
                1e3 * whole["bytes_per_step"] / peaks()[1] / whole["ms_per_step"]
            )


def main(config: Config) -> None:
    """Times, prints and writes."""
    loads, params = [os.getloadavg()[0]], random_params(config.model)
    rows = fixed_rows(config, params)
    refill = refill_row(config, params)
    others = [refill, *long_cache_rows(config)]
    interleaved([*rows, *others], config.rounds)
    add_roofline(config, params, rows)
    per_token = (
        refill["tokens"] / refill["fixed_tokens"]
    )  # of other random numbers: seconds for as many tokens
    refill["seconds"]["fixed batches"] = [
        per_token * x for x in refill["seconds"]["fixed batches"]
    ]
    report(
        "decode", config, [*rows, *others], ("torch", "transformers") if config.peer else (), loads
    )


if __name__ == "__main__":
    flags.run(main, Config)
