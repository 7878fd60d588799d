"""Decoding under one jit: how tokens are drawn, the plain loop, and the loop whose slots are refilled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from model import KVCache, Params, empty_cache, unembed
from model_config import ModelConfig
from runtime.errors import require
from sharding import path_name

Apply = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    temperature: float = 1.0
    """Logits are divided by this; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together hold this probability (nucleus)."""
    max_new_tokens: int = 24
    """Longest response, its end-of-turn token included."""

    def __post_init__(self):
        require(self.temperature >= 0, f"--temperature={self.temperature}: must be at least 0")
        require(self.top_k >= 0, f"--top_k={self.top_k}: must be at least 0")
        require(0 < self.top_p <= 1, f"--top_p={self.top_p}: must be above 0 and at most 1")
        require(
            self.max_new_tokens >= 1, f"--max_new_tokens={self.max_new_tokens}: must be at least 1"
        )


@flax.struct.dataclass
class Samples:
    """Responses: index t is response token t."""

    response_BR: jax.Array
    """Token ids; pad after the end."""
    mask_BR: jax.Array
    """1 for the response's tokens, its end-of-turn token included."""
    logp_BR: jax.Array
    """Log-probability of each token at the sampling temperature, before top-k and top-p; 0 after the end."""


def truncate(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits with all but the top k tokens, and all outside the nucleus p, at -inf."""
    if top_k:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p < 1:
        sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        inside_BV = (
            jnp.cumsum(probs_BV, axis=-1) - probs_BV < top_p
        )  # the token that crosses p stays in
        smallest_B1 = jnp.min(jnp.where(inside_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    return logits_BV


def draw(
    logits_BV: jax.Array,
    key: jax.Array,
    row_B: jax.Array,
    t_B: jax.Array,
    sampling: SamplingConfig,
) -> tuple[jax.Array, jax.Array]:
    """Token `t_B` of each response `row_B`, int32, and its log-probability; what is drawn depends on these two alone.

    So a response is the same in whatever company and slot it is made.
    """
    logits_BV = logits_BV / (sampling.temperature or 1.0)
    if sampling.temperature == 0:
        score_BV = logits_BV
    else:  # Gumbel's maximum
        key_of = jax.vmap(lambda row, t: jax.random.fold_in(jax.random.fold_in(key, row), t))
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[-1:]))(
            key_of(row_B, t_B)
        )
        score_BV = truncate(logits_BV, sampling.top_k, sampling.top_p) + noise_BV
    # The first maximum, as argmax has it, which on a CPU takes several times as long.
    best_BV = score_BV == jnp.max(score_BV, axis=-1, keepdims=True)
    token_B = jnp.min(
        jnp.where(best_BV, jnp.arange(best_BV.shape[-1]), best_BV.shape[-1]), axis=-1
    )
    logp_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=-1)[:, 0]
    return token_B.astype(jnp.int32), logp_B


def prefill(
    apply: Apply, config: ModelConfig, params: Params, prompts: dict[str, jax.Array], more: int
):
    """(logits of the token after each prompt, the cache with the prompts and room for `more` tokens)."""
    rows, length = prompts["tokens_BT"].shape
    inputs = (prompts["tokens_BT"], prompts["segment_ids_BT"], prompts["positions_BT"])
    output = apply(params, *inputs, empty_cache(config, rows, length + more))
    logits_B1V = unembed(output.x_BTD[:, -1:], output.unembed_DV)
    return logits_B1V[:, 0], output.cache


def layers_apart(config: ModelConfig, params: Params, cache: KVCache) -> tuple[Params, KVCache]:
    """Weights and cache for a loop over tokens: tuples of layers, for of a stack each step would copy every slice.

    Weights are cast once to the type that they are multiplied in; norms are not multiplied and stay float32.
    """

    def leaf(path: Any, w: jax.Array) -> Any:
        name = path_name(path)
        w = w if name.endswith("norm") else w.astype(config.compute_dtype)
        return tuple(w) if "/layers/" in name else w

    apart = jax.tree_util.tree_map_with_path(leaf, params)
    return apart, cache.replace(k_LBKSH=tuple(cache.k_LBKSH), v_LBKSH=tuple(cache.v_LBKSH))


def ends(token_B: jax.Array, eos: Any) -> jax.Array:
    """Whether each token is `eos`, or one of several."""
    return jnp.isin(token_B, jnp.atleast_1d(eos))


def generate(
    apply: Apply,
    config: ModelConfig,
    params: Params,
    prompts: dict[str, jax.Array],
    key: jax.Array,
    sampling: SamplingConfig,
    *,
    eos: int | jax.Array,
    pad: int,
    n: int = 1,
    slots: int | None = None,
) -> Samples:
    """`n` responses to each left-padded prompt (rows in order, n a prompt); traceable, prompts prefilled once.

    A response ends with `eos`, or with any of several; the loop when every row has. `prompts` as from prompt_batches.
    `slots`: only so many responses are decoded at a time, and where one ends the next begins; what is generated is
    the same.
    """
    rows, new = prompts["tokens_BT"].shape[0] * n, sampling.max_new_tokens
    if slots is not None and slots < rows:
        logits_PV, cache = prefill(apply, config, params, prompts, 0)
    else:
        logits_PV, cache = prefill(apply, config, params, prompts, new - 1)
        cache = cache.replace(
            k_LBKSH=jnp.repeat(cache.k_LBKSH, n, axis=1),
            v_LBKSH=jnp.repeat(cache.v_LBKSH, n, axis=1),
            valid_BS=jnp.repeat(cache.valid_BS, n, axis=0),
        )
    params, cache = layers_apart(config, params, cache)
    row_B = jnp.arange(rows)
    token_B, logp_B = draw(
        jnp.repeat(logits_PV, n, axis=0), key, row_B, jnp.zeros_like(row_B), sampling
    )
    zeros_BR = jnp.zeros((rows, new), jnp.float32)
    pads_BR = jnp.full((rows, new), pad, jnp.int32)
    samples = Samples(
        *(x.at[:, 0].set(y) for x, y in ((pads_BR, token_B), (zeros_BR, 1.0), (zeros_BR, logp_B)))
    )
    last_B = jnp.repeat(prompts["positions_BT"][:, -1], n, axis=0)

    def step(cache: KVCache, token_B: jax.Array, row_B: jax.Array, t_B: jax.Array):
        """Token t of each row, from token t - 1 and the cache of those before."""
        at_B1 = (last_B[row_B] + t_B)[:, None]
        output = apply(params, token_B[:, None], jnp.ones_like(at_B1), at_B1, cache)
        logits_B1V = unembed(output.x_BTD, output.unembed_DV)
        return output.cache, *draw(logits_B1V[:, 0], key, row_B, t_B, sampling)

    if slots is not None and slots < rows:
        return refilled(config, step, cache, samples, eos, slots)

    def one_more(carry):
        t, token_B, done_B, cache, samples = carry
        cache, token_B, logp_B = step(cache, token_B, row_B, jnp.full_like(row_B, t))
        put = lambda out_BR, x_B: jax.lax.dynamic_update_slice(out_BR, x_B[:, None], (0, t))
        samples = Samples(
            response_BR=put(samples.response_BR, jnp.where(done_B, pad, token_B)),
            mask_BR=put(samples.mask_BR, jnp.float32(~done_B)),
            logp_BR=put(samples.logp_BR, jnp.where(done_B, 0.0, logp_B)),
        )
        return t + 1, token_B, done_B | ends(token_B, eos), cache, samples

    start = (jnp.int32(1), token_B, ends(token_B, eos), cache, samples)
    return jax.lax.while_loop(lambda c: (c[0] < new) & ~jnp.all(c[2]), one_more, start)[-1]


@flax.struct.dataclass
class Slots:
    """Responses in the making, one a slot."""

    cache: KVCache
    """A ring of columns, into which all slots write at the same place, wherever in its response each may be."""
    token_B: jax.Array
    """Its last token."""
    row_B: jax.Array
    """Which response it is."""
    t_B: jax.Array
    """Index of its next token."""
    busy_B: jax.Array
    """Whether it has not ended."""
    following: jax.Array
    """The response that enters next."""


def entered(
    slots: Slots, prompts: KVCache, first_N: jax.Array, eos: Any, limit: int, several: int
) -> Slots:
    """The next `several` of N responses in slots that are free; a prompt is turned to end where the ring is written."""
    (total,), (count, width), ring = (
        first_N.shape,
        prompts.valid_BS.shape,
        slots.cache.valid_BS.shape[1],
    )
    row_E = slots.following + jnp.arange(several)
    slot_E = jnp.where(
        row_E < total, jnp.argsort(slots.busy_B)[:several], slots.row_B.size
    )  # past the end: dropped
    known_E = jnp.minimum(row_E, total - 1)
    prompt_E, token_E = known_E // (total // count), first_N[known_E]
    put = lambda x_B, x_E: x_B.at[slot_E].set(x_E, mode="drop")

    def turned(x: jax.Array, axis: int) -> jax.Array:
        before = [(ring - width, 0) if i == axis else (0, 0) for i in range(x.ndim)]
        return jnp.roll(jnp.pad(x[prompt_E], before), slots.cache.length, axis)

    copied = lambda ours, theirs: tuple(
        put(x, turned(y, 2)) for x, y in zip(ours, theirs, strict=True)
    )
    return Slots(
        cache=slots.cache.replace(
            k_LBKSH=copied(slots.cache.k_LBKSH, prompts.k_LBKSH),
            v_LBKSH=copied(slots.cache.v_LBKSH, prompts.v_LBKSH),
            valid_BS=put(slots.cache.valid_BS, turned(prompts.valid_BS, 1)),
        ),
        token_B=put(slots.token_B, token_E),
        row_B=put(slots.row_B, row_E),
        t_B=put(slots.t_B, jnp.ones_like(row_E)),
        busy_B=put(slots.busy_B, ~ends(token_E, eos) & (limit > 1)),
        following=jnp.minimum(slots.following + several, total),
    )


def refilled(
    config: ModelConfig,
    step: Callable[..., Any],
    prompts: KVCache,
    samples: Samples,
    eos: Any,
    count: int,
) -> Samples:
    """The responses to more prompts than the `count` of slots: where one ends, the next begins.

    `samples`: with their first tokens. An eighth of the slots enter at once, for to enter is to copy the prompt.
    """
    (total, limit), several = samples.mask_BR.shape, max(1, count // 8)
    enter = functools.partial(
        entered,
        prompts=prompts,
        first_N=samples.response_BR[:, 0],
        eos=eos,
        limit=limit,
        several=several,
    )

    def wait(slots: Slots) -> jax.Array:
        waiting = total - slots.following
        return (waiting > 0) & (jnp.sum(~slots.busy_B) >= jnp.minimum(several, waiting))

    def one_more(carry):
        slots, samples = carry
        cache, token_B, logp_B = step(slots.cache, slots.token_B, slots.row_B, slots.t_B)
        at = (jnp.where(slots.busy_B, slots.row_B, total), slots.t_B)  # past the last: dropped
        samples = Samples(
            response_BR=samples.response_BR.at[at].set(token_B, mode="drop"),
            mask_BR=samples.mask_BR.at[at].set(1.0, mode="drop"),
            logp_BR=samples.logp_BR.at[at].set(logp_B, mode="drop"),
        )
        slots = slots.replace(
            cache=cache.replace(length=cache.length % cache.valid_BS.shape[1]),
            token_B=token_B,
            t_B=slots.t_B + 1,
            busy_B=slots.busy_B & ~ends(token_B, eos) & (slots.t_B + 1 < limit),
        )
        return jax.lax.while_loop(wait, enter, slots), samples

    _, cache = layers_apart(
        config, {}, empty_cache(config, count, prompts.valid_BS.shape[1] + limit)
    )
    none_B = jnp.zeros(count, jnp.int32)
    slots = jax.lax.while_loop(
        wait, enter, Slots(cache, none_B, none_B, none_B, none_B > 0, jnp.int32(0))
    )
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0].busy_B), one_more, (slots, samples))[
        1
    ]
