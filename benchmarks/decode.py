"""Sampling beside transformers' generate with the same weights; slot refill beside fixed batches.

    python -m benchmarks.decode

Prints a table and writes benchmarks/results/decode-<platform>.json.
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
    Call,
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
from slots import generate_in_slots

# No token is this: responses have full length, as the peer's.
NEVER = -1


@dataclasses.dataclass(frozen=True)
class Config:
    batches: tuple[int, ...] = (16, 1) if on_cpu() else (64, 1)
    """Rows sampled together, a row of the table each."""
    prompt: int = 64 if on_cpu() else 1024
    """Tokens of a prompt."""
    new: int = 64 if on_cpu() else 256
    """Tokens sampled after it."""
    requests: int = 128 if on_cpu() else 512
    """Prompts of the comparison of refilled slots, the first of `batches`, with fixed batches."""
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


# ---- Sampling, beside transformers ----


def our_sampler(config: Config, params: Params, prompts: dict[str, Any], new: int) -> Call:
    """Return a call that samples `new` tokens after each prompt, at temperature 1 from all."""
    _, apply = init_and_apply(LanguageModel(config.model))
    sampling = SamplingConfig(max_new_tokens=new)

    @jax.jit
    def sample(params, prompts, key):
        samples = generate(apply, config.model, params, prompts, key, sampling, eos=NEVER, pad=0)
        return samples.response_BR

    key = jax.random.key(0)

    def call() -> None:
        response_BR = sample(params, prompts, key).block_until_ready()
        assert response_BR.shape[1] == new

    return call


def fixed_rows(config: Config, params: Params) -> list[dict[str, Any]]:
    """Return two rows for each batch size: sampling, and its prefill, in this order."""
    rows = []
    asked = []
    for batch in config.batches:
        prompts = jax.device_put(plain_batch(config.model, batch, config.prompt))
        for what, new in (("generate", config.new), ("  of this, prefill", 1)):
            row = {
                "what": f"{what} {batch} x {config.prompt}+{new}",
                "calls": {"plumb": our_sampler(config, params, prompts, new)},
                "batch": batch,
                "tokens": batch * new,
            }
            rows.append(row)
            asked.append((np.asarray(prompts["tokens_BT"]), new))
    if config.peer:
        from benchmarks import peers

        samplers = apart(peers.samplers, config.model, asked)
        for row, sampler in zip(rows, samplers, strict=True):
            row["calls"]["transformers"] = sampler
    return rows


# ---- Refilled slots, beside fixed batches ----


def ending_tokens(vocab: int, limit: int) -> np.ndarray:
    """Return the tokens that end a response, so many that its mean length is a quarter of `limit`.

    The weights are random, so each token of the vocabulary is about as likely; pad, 0, is no end.
    """
    number = max(1, 4 * vocab // limit)
    return np.random.default_rng(0).choice(np.arange(1, vocab), number, replace=False)


def refill_row(config: Config, params: Params) -> dict[str, Any]:
    """Return a row that samples by refilled slots, beside fixed batches.

    The lengths of responses are geometric, a quarter of the limit on average.
    """
    _, apply = init_and_apply(LanguageModel(config.model))
    sampling = SamplingConfig(max_new_tokens=config.limit)
    eos = ending_tokens(config.model.vocab, config.limit)

    slots = config.batches[0]
    key = jax.random.key(0)

    @jax.jit
    def refilled(prompts, key):
        return generate_in_slots(
            apply, config.model, params, prompts, key, sampling, eos=eos, pad=0, slots=slots
        )

    @jax.jit
    def fixed(prompts, key):
        return generate(apply, config.model, params, prompts, key, sampling, eos=eos, pad=0)

    prompts = plain_batch(config.model, config.requests, config.prompt)
    parts = []
    for start in range(0, config.requests, slots):
        parts.append({name: x[start : start + slots] for name, x in prompts.items()})

    def one_by_one():
        return [fixed(part, jax.random.fold_in(key, i)) for i, part in enumerate(parts)]

    # Refilled slots sample what one batch of all requests does, but for rounding.
    mine, whole = jax.device_get([refilled(prompts, key), fixed(prompts, key)])
    equal = (mine.response_BR == whole.response_BR).mean()
    assert equal > (1 if on_cpu() else 0.5) - 1e-3

    tokens = float(mine.mask_BR.sum())
    fixed_tokens = sum(float(part.mask_BR.sum()) for part in one_by_one())
    return {
        "what": f"refill {slots}, {config.requests} x up to {config.limit}",
        "calls": {
            "plumb": lambda: jax.block_until_ready(refilled(prompts, key)),
            "fixed batches": lambda: jax.block_until_ready(one_by_one()),
        },
        "tokens": tokens,
        "fixed_tokens": fixed_tokens,
        "mean_length": tokens / config.requests,
    }


# ---- One token against a long cache ----


def split_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    valid_BS: jax.Array,
    at: jax.Array,
    parts: int = 8,
) -> jax.Array:
    """Return what `decode_attention` does, with the keys in C parts that are worked on apart.

    The softmaxes of the parts are joined afterwards.
    """
    batch, kv_heads, slots, width = k_BKSH.shape
    apart_shape = (batch, kv_heads, parts, slots // parts, width)
    q_BKGH = q_BTNH.reshape(batch, kv_heads, -1, width) * width**-0.5
    k_BKCSH = k_BKSH.reshape(apart_shape)
    v_BKCSH = v_BKSH.reshape(apart_shape)

    # Each part by itself.
    scores_BKCGS = jnp.einsum(
        "BKGH,BKCSH->BKCGS", q_BKGH, k_BKCSH, preferred_element_type=jnp.float32
    )
    seen = (valid_BS > 0).reshape(batch, 1, parts, 1, -1)
    top = jnp.max(jnp.where(seen, scores_BKCGS, -1e30), axis=-1, keepdims=True)
    weights_BKCGS = jnp.where(seen, jnp.exp(scores_BKCGS - top), 0.0)
    out_BKCGH = jnp.einsum("BKCGS,BKCSH->BKCGH", weights_BKCGS.astype(v_BKSH.dtype), v_BKCSH)

    # All parts at the scale of the greatest score.
    kept = jnp.exp(top - jnp.max(top, axis=2, keepdims=True))
    out_BKGH = (out_BKCGH * kept).sum(2)
    total_BKG1 = (weights_BKCGS.sum(-1, keepdims=True) * kept).sum(2)
    return (out_BKGH / total_BKG1).astype(q_BTNH.dtype).reshape(q_BTNH.shape)


def long_cache_row(config: Config, batch: int, slots: int = 8192) -> dict[str, Any]:
    """Return a row of one token against a long cache, whole and split over the keys.

    Eight query heads share two key heads.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(batch, 1, 8, 64), (batch, 2, slots, 64), (batch, 2, slots, 64)]
    arrays = []
    for key, shape in zip(keys, shapes, strict=True):
        arrays.append(jax.random.normal(key, shape, config.model.compute_dtype))
    arrays += [jnp.ones((batch, slots), jnp.int32), jnp.int32(slots - 1)]

    def call(run):
        run(*arrays).block_until_ready()

    runs = {
        "plumb": jax.jit(decode_attention),
        "8 parts": jax.jit(split_attention),
        "1 part": jax.jit(partial(split_attention, parts=1)),
    }
    want = runs["plumb"](*arrays)
    for run in runs.values():
        np.testing.assert_allclose(run(*arrays), want, atol=1e-5 if on_cpu() else 1e-2)
    return {
        "what": f"attention, {batch} x cache of {slots}",
        "calls": {name: partial(call, run) for name, run in runs.items()},
        "tokens": batch,
    }


# ---- The benchmark ----


def add_roofline(config: Config, params: Params, rows: list[dict[str, Any]]) -> None:
    """Add the share of the memory's speed at which a decode step reads what it must.

    `rows` are those of `fixed_rows`, timed. A step reads the weights once, and each row's cache.
    """
    model = config.model
    itemsize = model.compute_dtype.itemsize
    weights = count(params)
    # Of an embedding that is not also the unembedding only some rows are read.
    if not model.tied:
        weights -= model.vocab * model.width

    for whole, prefill in zip(rows[::2], rows[1::2], strict=True):
        mean_length = config.prompt + config.new / 2
        per_token = 2 * model.layers * model.kv_heads * model.head_dim
        cache = whole["batch"] * per_token * mean_length
        whole["bytes_per_step"] = itemsize * (weights + cache)
        all_seconds = np.median(whole["seconds"]["plumb"])
        prefill_seconds = np.median(prefill["seconds"]["plumb"])
        whole["ms_per_step"] = 1e3 * (all_seconds - prefill_seconds) / (config.new - 1)
        if peaks():
            _, bytes_per_second = peaks()
            least_ms = 1e3 * whole["bytes_per_step"] / bytes_per_second
            whole["of_roofline"] = least_ms / whole["ms_per_step"]


def main(config: Config) -> None:
    """Time all rows, print the table, write the JSON."""
    loads = [os.getloadavg()[0]]
    params = random_params(config.model)
    rows = fixed_rows(config, params)
    refill = refill_row(config, params)
    others = [refill, long_cache_row(config, 1), long_cache_row(config, 16)]
    interleaved([*rows, *others], config.rounds)
    add_roofline(config, params, rows)

    # Fixed batches draw other random numbers: compare seconds for as many tokens.
    ratio = refill["tokens"] / refill["fixed_tokens"]
    seconds = refill["seconds"]
    seconds["fixed batches"] = [ratio * x for x in seconds["fixed batches"]]
    packages = ("torch", "transformers") if config.peer else ()
    report("decode", config, [*rows, *others], packages, loads)


if __name__ == "__main__":
    flags.run(main, Config)
