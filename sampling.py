"""Decoding under one jit: how tokens are drawn, the plain loop, and the loop whose slots are refilled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from config import UserError
from model import KVCache, ModelConfig, Params, empty_cache

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
        limits = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "max_new_tokens": self.max_new_tokens >= 1,
        }
        for name, holds in limits.items():
            if not holds:
                raise UserError(f"--{name}={getattr(self, name)}: out of range (see --help)")


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
        inside_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < top_p  # the token that crosses p stays in
        smallest_B1 = jnp.min(jnp.where(inside_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    return logits_BV


def draw(
    logits_BV: jax.Array, key: jax.Array, row_B: jax.Array, t_B: jax.Array, sampling: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """Token `t_B` of each response `row_B`, int32, and its log-probability; what is drawn depends on these two alone.

    So a response is the same in whatever company and slot it is made.
    """
    logits_BV = logits_BV / (sampling.temperature or 1.0)
    if sampling.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        key_of = jax.vmap(lambda row, t: jax.random.fold_in(jax.random.fold_in(key, row), t))
        kept_BV = truncate(logits_BV, sampling.top_k, sampling.top_p)
        token_B = jax.vmap(jax.random.categorical)(key_of(row_B, t_B), kept_BV)
    logp_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=-1)[:, 0]
    return token_B.astype(jnp.int32), logp_B


def prefill(apply: Apply, config: ModelConfig, params: Params, prompts: dict[str, jax.Array], more: int):
    """(logits of the token after each prompt, the cache with the prompts and room for `more` tokens)."""
    rows, length = prompts["tokens_BT"].shape
    inputs = (prompts["tokens_BT"], prompts["segment_ids_BT"], prompts["positions_BT"])
    logits_B1V, cache = apply(params, *inputs, empty_cache(config, rows, length + more), logits_from=length - 1)
    return logits_B1V[:, 0], cache


def generate(
    apply: Apply,
    config: ModelConfig,
    params: Params,
    prompts: dict[str, jax.Array],
    key: jax.Array,
    sampling: SamplingConfig,
    *,
    eos: int,
    pad: int,
    n: int = 1,
    slots: int | None = None,
) -> Samples:
    """`n` responses to each left-padded prompt (rows in order, n a prompt); traceable, prompts prefilled once.

    The loop ends when every row has ended or `max_new_tokens` is reached. `prompts` as from prompt_batches. `slots`:
    only so many responses are decoded at a time, and where one ends the next begins (`refilled_slots`); what is
    generated is the same.
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
    row_B = jnp.arange(rows)
    token_B, logp_B = draw(jnp.repeat(logits_PV, n, axis=0), key, row_B, jnp.zeros_like(row_B), sampling)
    zeros_BR = jnp.zeros((rows, new), jnp.float32)
    samples = Samples(
        response_BR=jnp.full((rows, new), pad, jnp.int32).at[:, 0].set(token_B),
        mask_BR=zeros_BR.at[:, 0].set(1.0),
        logp_BR=zeros_BR.at[:, 0].set(logp_B),
    )
    last_B = jnp.repeat(prompts["positions_BT"][:, -1], n, axis=0)

    def step(cache: KVCache, token_B: jax.Array, last_B: jax.Array, row_B: jax.Array, t_B: jax.Array):
        """Token t of each row, from token t - 1 and the cache of those before; `last_B`: where the prompt ends."""
        at_B1 = (last_B + t_B)[:, None]
        logits_B1V, cache = apply(params, token_B[:, None], jnp.ones_like(at_B1), at_B1, cache)
        return cache, *draw(logits_B1V[:, 0], key, row_B, t_B, sampling)

    if slots is not None and slots < rows:
        return refilled_slots(config, step, cache, last_B, samples, eos, slots, n)

    def one_more(carry):
        t, token_B, done_B, cache, samples = carry
        cache, token_B, logp_B = step(cache, token_B, last_B, row_B, jnp.full_like(row_B, t))
        put = lambda out_BR, x_B: jax.lax.dynamic_update_slice(out_BR, x_B[:, None], (0, t))  # noqa: E731
        samples = Samples(
            response_BR=put(samples.response_BR, jnp.where(done_B, pad, token_B)),
            mask_BR=put(samples.mask_BR, jnp.float32(~done_B)),
            logp_BR=put(samples.logp_BR, jnp.where(done_B, 0.0, logp_B)),
        )
        return t + 1, token_B, done_B | (token_B == eos), cache, samples

    start = (jnp.int32(1), token_B, token_B == eos, cache, samples)
    return jax.lax.while_loop(lambda c: (c[0] < new) & ~jnp.all(c[2]), one_more, start)[-1]


def refilled_slots(
    config: ModelConfig,
    step: Callable[..., Any],
    prompts: KVCache,
    last_N: jax.Array,
    samples: Samples,
    eos: int,
    slots: int,
    n: int,
) -> Samples:
    """The responses to more prompts than there are slots: when one ends, its slot takes the next.

    `prompts`: their keys and values; `last_N`: of all N responses, where the prompt ends; `samples`: theirs, with the
    first tokens in place. The slots' cache is a ring of columns, into which all write at the same place, wherever in
    its response each may be: a prompt that enters is turned to end just there. An eighth of the slots enter at once,
    for an entry is a copy.
    """
    (total, new), width = samples.mask_BR.shape, prompts.valid_BS.shape[1]
    ring, several = width + new, max(1, slots // 8)

    def turned(x: jax.Array, axis: int, at: jax.Array) -> jax.Array:
        """Columns of a prompt as columns of the ring, the last of them just before `at`."""
        before = [(0, 0)] * x.ndim
        before[axis] = (ring - width, 0)
        return jnp.roll(jnp.pad(x, before), at, axis)

    def some_wait(carry) -> jax.Array:
        _, _, _, _, busy_B, following, _ = carry
        return (following < total) & (jnp.sum(~busy_B) >= jnp.minimum(several, total - following))

    def enter(carry):
        cache, token_B, row_B, t_B, busy_B, following, samples = carry
        row_E = following + jnp.arange(several)
        slot_E = jnp.where(row_E < total, jnp.argsort(busy_B)[:several], slots)  # those past the end are dropped
        prompt_E = jnp.minimum(row_E, total - 1) // n
        put = lambda x_B, x_E: x_B.at[slot_E].set(x_E, mode="drop")  # noqa: E731
        k, v = (turned(x[:, prompt_E], 3, cache.length) for x in (prompts.k_LBKSH, prompts.v_LBKSH))
        cache = cache.replace(
            k_LBKSH=cache.k_LBKSH.at[:, slot_E].set(k, mode="drop"),
            v_LBKSH=cache.v_LBKSH.at[:, slot_E].set(v, mode="drop"),
            valid_BS=put(cache.valid_BS, turned(prompts.valid_BS[prompt_E], 1, cache.length)),
        )
        token_E = samples.response_BR[jnp.minimum(row_E, total - 1), 0]
        busy_B = put(busy_B, (token_E != eos) & (new > 1))
        carry = (cache, put(token_B, token_E), put(row_B, row_E), put(t_B, jnp.ones_like(row_E)), busy_B)
        return (*carry, jnp.minimum(following + several, total), samples)

    def one_more(carry):
        cache, token_B, row_B, t_B, busy_B, following, samples = carry
        cache, token_B, logp_B = step(cache, token_B, last_N[row_B], row_B, t_B)
        cache = cache.replace(length=cache.length % ring)
        at = (jnp.where(busy_B, row_B, total), t_B)  # past the last: dropped
        samples = Samples(
            response_BR=samples.response_BR.at[at].set(token_B, mode="drop"),
            mask_BR=samples.mask_BR.at[at].set(1.0, mode="drop"),
            logp_BR=samples.logp_BR.at[at].set(logp_B, mode="drop"),
        )
        busy_B &= (token_B != eos) & (t_B + 1 < new)
        return all_enter((cache, token_B, row_B, t_B + 1, busy_B, following, samples))

    all_enter = functools.partial(jax.lax.while_loop, some_wait, enter)
    zeros_B = jnp.zeros(slots, jnp.int32)
    carry = (empty_cache(config, slots, ring), zeros_B, zeros_B, zeros_B, zeros_B > 0, jnp.int32(0), samples)
    return jax.lax.while_loop(lambda c: jnp.any(c[4]), one_more, all_enter(carry))[-1]
