"""Decoding a fixed number of responses at a time, under one jit: where one ends the next begins.

For more responses than a cache has room for. Where there is room for all, `sampling.generate` in
stages takes fewer steps: there the last responses are not decoded alone in slots made for many.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from layers import unstack_cache, unstack_params
from model import KVCache, Params, empty_cache
from model_config import ModelConfig
from sampling import (
    Apply,
    Ends,
    Prompts,
    Samples,
    SamplingConfig,
    ends,
    first_tokens,
    generate,
    make_step,
    prefill,
)


@flax.struct.dataclass
class Slots:
    """Responses in the making, one in each of B slots, out of A; int32 but for `busy_B`, bool."""

    cache: KVCache
    """Unstacked. A ring of columns: all slots write at the same one, wherever in its response each
    may be."""
    token_B: jax.Array
    """The last token of each."""
    row_B: jax.Array
    """Number of the response in the slot, 0 to A - 1, in the order of the prompts."""
    t_B: jax.Array
    """Index of its next token, from 0."""
    busy_B: jax.Array
    """True while it has not ended."""
    following: jax.Array
    """Number of the response that enters next, a scalar; A when all have."""


def generate_in_slots(
    apply: Apply,
    config: ModelConfig,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    sampling: SamplingConfig,
    *,
    eos: Ends,
    pad: int,
    slots: int,
    n: int = 1,
) -> Samples:
    """Sample what `generate` does, `slots` responses at a time: where one ends the next begins.

    The other arguments and the result, Samples [A, max_new_tokens], are as in `generate`, whose
    tokens these are but for rounding; call it under jit. Faster than `generate` where responses
    are of unequal length. `slots`: a Python int; ValueError below 1. Takes a cache of `slots` rows
    of P + max_new_tokens, and until the end that of all prompts, [A / n, P], which are prefilled
    together. With as many slots as responses, or more, it is `generate`.
    """
    if slots < 1:
        raise ValueError(f"slots={slots}: must be at least 1")
    # Nothing to refill with: all start at once.
    total = prompts["tokens_BT"].shape[0] * n
    if slots >= total:
        return generate(apply, config, params, prompts, key, sampling, eos=eos, pad=pad, n=n)

    # Prefill all prompts, and draw the first token of every response.
    logits_BV, prompt_cache = prefill(apply, config, params, prompts, 0)
    prompt_cache = unstack_cache(prompt_cache)
    params = unstack_params(params, config.compute_dtype, int8=sampling.int8)
    logits_AV = jnp.repeat(logits_BV, n, axis=0)
    samples = first_tokens(logits_AV, key, sampling, pad)
    first_A = samples.response_BR[:, 0]

    # One more token for the response in each slot.
    last_A = jnp.repeat(prompts["positions_BT"][:, -1], n, axis=0)
    step = make_step(apply, params, key, sampling)
    limit = sampling.max_new_tokens

    # An eighth of the slots is refilled at once: each refill copies the prompts' cache.
    entering = max(1, slots // 8)

    def must_enter(state: Slots) -> jax.Array:
        # The last few enter together, however few they are.
        waiting = total - state.following
        free = jnp.sum(~state.busy_B)
        return (waiting > 0) & (free >= jnp.minimum(entering, waiting))

    def enter_next(state: Slots) -> Slots:
        return enter(state, prompt_cache, first_A, eos, limit, entering)

    def refill(state: Slots) -> Slots:
        return jax.lax.while_loop(must_enter, enter_next, state)

    def one_more(carry: tuple[Slots, Samples]) -> tuple[Slots, Samples]:
        # The next token of the response in each slot.
        state, samples = carry
        last_B = last_A[state.row_B]
        cache, token_B, logp_B = step(state.cache, state.token_B, last_B, state.row_B, state.t_B)
        # Slots that are not busy write past the last row: dropped.
        at = (jnp.where(state.busy_B, state.row_B, total), state.t_B)
        samples = Samples(
            response_BR=samples.response_BR.at[at].set(token_B, mode="drop"),
            mask_BR=samples.mask_BR.at[at].set(1.0, mode="drop"),
            logp_BR=samples.logp_BR.at[at].set(logp_B, mode="drop"),
        )
        # The ring's columns are used again; a response that has ended leaves its slot free.
        column = cache.length % cache.valid_BS.shape[1]
        state = dataclasses.replace(
            state,
            cache=dataclasses.replace(cache, length=column),
            token_B=token_B,
            t_B=state.t_B + 1,
            busy_B=state.busy_B & ~ends(token_B, eos) & (state.t_B + 1 < limit),
        )
        return refill(state), samples

    # Start with empty slots, whose ring has a column for each token of a prompt and a response.
    # The loop's first tokens already see prompts in it.
    columns = prompt_cache.valid_BS.shape[1] + limit
    none_B = jnp.zeros(slots, jnp.int32)
    ring = dataclasses.replace(empty_cache(config, slots, columns), is_empty=False)
    empty = Slots(
        cache=unstack_cache(ring),
        token_B=none_B,
        row_B=none_B,
        t_B=none_B,
        busy_B=none_B > 0,
        following=jnp.int32(0),
    )

    # Decode until no slot is busy.
    def going(carry: tuple[Slots, Samples]) -> jax.Array:
        return jnp.any(carry[0].busy_B)

    start = (refill(empty), samples)
    _, samples = jax.lax.while_loop(going, one_more, start)
    return samples


def enter(
    slots: Slots,
    prompts: KVCache,
    first_A: jax.Array,
    eos: Ends,
    limit: int,
    entering: int,
) -> Slots:
    """Put the next `entering` of the A responses, or the fewer that are left, into free slots.

    Returns the new Slots. As many slots as enter must be free (not checked). `prompts`: the
    unstacked cache of all prompts, A / n rows, of which row a // n is response a's. A prompt's
    columns are rolled so that it ends where the ring is written next. `first_A`: first token of
    each response, int32; where it is among `eos`, or `limit` is 1, the response has ended and its
    slot is free again. Tokens are for the caller to keep: Slots have the last of each alone.
    `limit`: most tokens of a response, the first included. `limit` and `entering` are Python ints.
    """
    total = first_A.shape[0]
    count, width = prompts.valid_BS.shape
    ring = slots.cache.valid_BS.shape[1]

    # Which responses enter, and where. Past the last there is no slot: dropped.
    row_E = slots.following + jnp.arange(entering)
    free_E = jnp.argsort(slots.busy_B)[:entering]
    slot_E = jnp.where(row_E < total, free_E, slots.row_B.size)

    # Their prompts and first tokens.
    known_E = jnp.minimum(row_E, total - 1)
    prompt_E = known_E // (total // count)
    token_E = first_A[known_E]

    # Into their slots; the cache's columns, rolled to end where the ring stands.
    def put(x_B: jax.Array, x_E: jax.Array) -> jax.Array:
        return x_B.at[slot_E].set(x_E, mode="drop")

    def rolled(x: jax.Array, axis: int) -> jax.Array:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (ring - width, 0)
        columns = jnp.pad(x[prompt_E], padding)
        return jnp.roll(columns, slots.cache.length, axis)

    def with_prompts(layers: Any, prompt_layers: Any) -> tuple[jax.Array, ...]:
        renewed = []
        for ours_BKSH, theirs in zip(layers, prompt_layers, strict=True):
            renewed.append(put(ours_BKSH, rolled(theirs, 2)))
        return tuple(renewed)

    # The slots that they enter now hold their prompt, their first token, and t = 1.
    cache = KVCache(
        k_LBKSH=with_prompts(slots.cache.k_LBKSH, prompts.k_LBKSH),
        v_LBKSH=with_prompts(slots.cache.v_LBKSH, prompts.v_LBKSH),
        valid_BS=put(slots.cache.valid_BS, rolled(prompts.valid_BS, 1)),
        length=slots.cache.length,
    )
    return Slots(
        cache=cache,
        token_B=put(slots.token_B, token_E),
        row_B=put(slots.row_B, row_E),
        t_B=put(slots.t_B, jnp.ones_like(row_E)),
        busy_B=put(slots.busy_B, ~ends(token_E, eos) & (limit > 1)),
        following=jnp.minimum(slots.following + entering, total),
    )
