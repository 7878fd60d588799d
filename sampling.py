"""Decoding under one jit: how a token is drawn, and the loop that generates responses.

`generate` decodes all rows together until the last has ended, in stages of fewer rows where many
have. slots.py has another loop, of a fixed number of rows: where one ends the next begins.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from layers import unstack_cache, unstack_params
from model import KVCache, LanguageOutput, Params, empty_cache, unembed
from model_config import ModelConfig
from runtime.errors import require
from runtime.ranges import AT_LEAST_0, AT_LEAST_1, Range, check_ranges
from sharding import batch_devices, platform

Apply = Callable[..., LanguageOutput]
"""apply(params, tokens_BT, segment_ids_BT, positions_BT, cache=None) -> LanguageOutput, of a
LanguageModel (model.init_and_apply)."""
Prompts = dict[str, jax.Array]
"""Left-padded prompts [B, P] as data.batches.prompt_batches yields them: `tokens_BT`,
`segment_ids_BT` and `positions_BT`, int32."""
Ends = int | Sequence[int] | jax.Array
"""Ids of the tokens that end a response, or the one id."""
Step = Callable[..., tuple[KVCache, jax.Array, jax.Array]]
"""step(cache, token_B, last_B, row_B, t_B) -> (cache, next token_B, its logp_B), of
`make_step`."""


RANGES = {
    "temperature": AT_LEAST_0,
    "top_p": Range(low=0, high=1, without_low=True),
    "max_new_tokens": AT_LEAST_1,
}
"""Ranges of SamplingConfig's numbers (runtime/ranges.py)."""
COLDEST = 1e-6
"""A temperature below is 0."""
SHORTEST = 64
"""Tokens of a response from which on `stages_of` takes more than one stage."""
HALVINGS = 3
"""How often `stages_of` halves the rows at most."""
FEWEST = {"cpu": 2, "gpu": 16, "tpu": 16}
"""Rows of a device that `stages_of` leaves at least. Elsewhere than on a CPU, where this has not
yet been measured, so few make no step faster: it reads the weights all the same."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    temperature: float = 1.0
    """Logits are divided by this; 0, and what is below 1e-6, takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together hold this probability (nucleus)."""
    max_new_tokens: int = 24
    """Longest response, its end-of-turn token included."""
    int8: bool = False
    """Decode with the layers' weights in int8 (layers.py); prompts are read with whole ones."""

    def __post_init__(self):
        check_ranges(self, RANGES)
        # So near to 0 that float32 has no noise beside the logits, or no quotient at all.
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)


def check_temperature(temperature: float) -> None:
    """Raise UserError unless --temperature, `temperature`, is 0 or at least COLDEST, 1e-6.

    `draw` would take one between for 0, and a loss would divide by it.
    """
    require(
        temperature == 0 or temperature >= COLDEST,
        f"--temperature={temperature}: give 0, or at least {COLDEST:g}",
    )


@flax.struct.dataclass
class Samples:
    """Responses: index t is response token t. `generate` gives B rows, n neighbours a prompt."""

    response_BR: jax.Array
    """Token ids, int32; pad after the end."""
    mask_BR: jax.Array
    """1 for the response's tokens, its end-of-turn token included; float32."""
    logp_BR: jax.Array
    """Log-probability of each token in nats, at the sampling temperature and before top-k and
    top-p; 0 after the end."""


# --- one token


def truncate(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Return the logits [B, V], -inf for all but the top k tokens, and all outside the nucleus p.

    `logits_BV`: divided by the temperature. `top_k`, an int, and `top_p`, a float in (0, 1]:
    static. `top_k` 0, or V and more, and `top_p` 1 leave all tokens in. The nucleus is of what the
    top k leave, by its softmax: the likeliest tokens that together hold `top_p`, the one that
    crosses it among them. Tokens as likely as the last one kept, of either, stay too.
    """
    # All below the k-th likeliest.
    if top_k:
        count = min(top_k, logits_BV.shape[-1])
        highest_BK, _ = jax.lax.top_k(logits_BV, count)
        kth_B1 = highest_BK[:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    # All below the least likely token inside the nucleus.
    if top_p < 1:
        sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # The token that crosses p stays in.
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        inside_BV = before_BV < top_p
        kept_BV = jnp.where(inside_BV, sorted_BV, jnp.inf)
        smallest_B1 = jnp.min(kept_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    return logits_BV


def draw(
    logits_BV: jax.Array,
    key: jax.Array,
    row_B: jax.Array,
    t_B: jax.Array,
    sampling: SamplingConfig,
) -> tuple[jax.Array, jax.Array]:
    """Draw token `t_B` of each response `row_B`; return it [B] int32, and its log-probability [B].

    `logits_BV`: before the temperature. `row_B`: numbers of the responses, `t_B`: indices of the
    tokens, from 0, int32. The noise depends on `key` and these two alone, so a response is the
    same in whatever company and slot it is made. The log-probability, float32, is in nats, at the
    temperature (at 0, where the likeliest token is taken, at 1), before top-k and top-p.
    """
    # What the token is the maximum of.
    logits_BV = logits_BV / (sampling.temperature or 1.0)
    if sampling.temperature == 0:
        score_BV = logits_BV
    else:
        # The maximum of logits and Gumbel noise is a draw from their softmax.
        def noise_of(row: jax.Array, t: jax.Array) -> jax.Array:
            row_key = jax.random.fold_in(key, row)
            own_key = jax.random.fold_in(row_key, t)
            return jax.random.gumbel(own_key, logits_BV.shape[-1:])

        noise_BV = jax.vmap(noise_of)(row_B, t_B)
        score_BV = truncate(logits_BV, sampling.top_k, sampling.top_p) + noise_BV

    # The first maximum, as argmax has it, which on a CPU takes several times as long.
    best_BV = score_BV == jnp.max(score_BV, axis=-1, keepdims=True)
    vocab = best_BV.shape[-1]
    place_BV = jnp.where(best_BV, jnp.arange(vocab), vocab)
    token_B = jnp.min(place_BV, axis=-1)

    # Its log-probability, without noise and truncation.
    logp_BV = jax.nn.log_softmax(logits_BV)
    logp_B1 = jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)
    logp_B = logp_B1[:, 0]
    return token_B.astype(jnp.int32), logp_B


def ends(token_B: jax.Array, eos: Ends) -> jax.Array:
    """Return bools of the shape of `token_B`, token ids: True where one is among `eos`.

    `eos`: an id, or several.
    """
    # One id is taken as a list of one.
    return jnp.isin(token_B, jnp.asarray(eos).reshape(-1))


# --- what every loop does


def prefill(
    apply: Apply, config: ModelConfig, params: Params, prompts: Prompts, room: int
) -> tuple[jax.Array, KVCache]:
    """Run the left-padded prompts [B, P] through the model of shape `config`, into an empty cache.

    Returns the logits [B, V], float32, of the token after each prompt, and the cache, stacked,
    with the prompts in its first P slots and `room` (a Python int) free slots behind them.
    `apply`, `params`: of a LanguageModel; the parameters stacked too (not of
    layers.unstack_params).
    """
    # All prompts in one pass, into an empty cache.
    rows, length = prompts["tokens_BT"].shape
    cache = empty_cache(config, rows, length + room)
    output = apply(
        params, prompts["tokens_BT"], prompts["segment_ids_BT"], prompts["positions_BT"], cache
    )

    # Prompts are left-padded, so each one's last token is in the last column.
    last_B1D = output.x_BTD[:, -1:]
    logits_B1V = unembed(last_B1D, output.unembed_DV)
    assert output.cache is not None
    return logits_B1V[:, 0], output.cache


def first_tokens(
    logits_BV: jax.Array, key: jax.Array, sampling: SamplingConfig, pad: int
) -> Samples:
    """Draw the first token, t = 0, of each response; return Samples [B, R], the rest padding yet.

    R is `sampling.max_new_tokens`; padding has id `pad`, mask and log-probability 0. `logits_BV`:
    row b is of response b's first token, before the temperature (see `draw`).
    """
    # Token 0 of every response.
    rows = logits_BV.shape[0]
    row_B = jnp.arange(rows)
    t_B = jnp.zeros_like(row_B)
    token_B, logp_B = draw(logits_BV, key, row_B, t_B, sampling)

    # Room for the rest.
    shape = (rows, sampling.max_new_tokens)
    zeros_BR = jnp.zeros(shape, jnp.float32)
    pads_BR = jnp.full(shape, pad, jnp.int32)
    return Samples(
        response_BR=pads_BR.at[:, 0].set(token_B),
        mask_BR=zeros_BR.at[:, 0].set(1.0),
        logp_BR=zeros_BR.at[:, 0].set(logp_B),
    )


def make_step(apply: Apply, params: Params, key: jax.Array, sampling: SamplingConfig) -> Step:
    """Make step(cache, token_B, last_B, row_B, t_B) -> (cache, next token_B, its logp_B), all [B].

    It puts `token_B`, token t - 1 of each response `row_B`, into the cache's next slot, at
    position last + t, and draws token `t_B` (see `draw`). `params` and cache: both stacked or both
    unstacked (layers.py). `last_B`: position, from 0, of the last token of each response's prompt.
    """

    def step(cache, token_B, last_B, row_B, t_B):
        # Token t - 1 stands t behind the prompt's last one.
        position_B = last_B + t_B
        position_B1 = position_B[:, None]
        token_B1 = token_B[:, None]
        real_B1 = jnp.ones_like(position_B1)
        output = apply(params, token_B1, real_B1, position_B1, cache)
        logits_B1V = unembed(output.x_BTD, output.unembed_DV)
        logits_BV = logits_B1V[:, 0]
        token_B, logp_B = draw(logits_BV, key, row_B, t_B, sampling)
        return output.cache, token_B, logp_B

    return step


# --- all rows together


class Stage(NamedTuple):
    """A part of `generate`'s loop, compiled for so many rows and columns of the cache."""

    rows: int
    """Responses decoded together: all that go on, and some that have ended."""
    room: int
    """Columns of the cache behind the prompts."""


def stages_of(rows: int, prompt: int, limit: int) -> list[Stage]:
    """Choose the stages of `generate`, for `rows` responses of at most `limit` tokens: a list.

    `rows`: all responses, of all prompts; `prompt`: columns of the prompts. Each stage is one more
    program to compile, so responses of fewer than SHORTEST tokens have a single one, of all rows
    and room for all tokens but the last. Otherwise the first stage has half of the cache's
    columns, if these hold the prompts and a quarter of a response, and the next has all; the last
    ones have half of the rows, a quarter and so on, rounded down on each device, HALVINGS times at
    most and no fewer than FEWEST of the platform. Devices are those that the current mesh splits
    rows over.
    """
    # All rows and all columns: what every response fits into. The last token is not read.
    room = limit - 1
    whole = Stage(rows, room)
    if limit < SHORTEST:
        return [whole]

    # Half of the columns.
    half = (prompt + limit) // 2 - prompt
    stages = [whole]
    if half >= limit // 4:
        stages.insert(0, Stage(rows, half))

    # Fewer rows, equally many on each device.
    devices = batch_devices(rows)
    for halving in range(1, HALVINGS + 1):
        own = rows // devices // 2**halving
        if own >= FEWEST[platform()]:
            stages.append(Stage(devices * own, room))
    return stages


@flax.struct.dataclass
class Decoded:
    """State of each of B responses in the making; arrays are int32 but for `done_B`, bool."""

    row_B: jax.Array
    """Its number among all responses."""
    last_B: jax.Array
    """Position of its prompt's last token."""
    token_B: jax.Array
    """Its last token."""
    done_B: jax.Array
    """True where it has ended."""
    samples: Samples


@flax.struct.dataclass
class Decoding:
    """Where `generate` stands."""

    t: jax.Array
    """Index of the next token of every response."""
    cache: KVCache
    rows: Decoded


def generate(
    apply: Apply,
    config: ModelConfig,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    sampling: SamplingConfig,
    *,
    eos: Ends,
    pad: int,
    n: int = 1,
    stages: Sequence[Stage] | None = None,
) -> Samples:
    """Sample `n` responses to each of the left-padded prompts, [B / n, P]; call it under jit.

    `apply`, `params`: of a LanguageModel of shape `config`. A response ends with `eos`, an id, or
    with any of several; the loop when every row has ended. `pad`: the id behind a response.
    Samples are [B, max_new_tokens], in the order of the prompts, n to each; a prompt is prefilled
    once. What row b draws depends on its prompt, `key` and b alone, but for rounding. Arguments
    that are not arrays are static.

    `stages`: stages_of(B, P, max_new_tokens), or others: first all rows, whose columns grow until
    there is room for all tokens but the last; then fewer and fewer rows (else AssertionError).
    None: one stage. They change the time that it takes, and log-probabilities by rounding.
    """
    # Prefill, and the first token of each response, which may be its last.
    last_B = jnp.repeat(prompts["positions_BT"][:, -1], n, axis=0)
    if stages is None:
        stages = [Stage(last_B.size, sampling.max_new_tokens - 1)]
    logits_BV, cache = prefill(apply, config, params, prompts, stages[0].room)
    logits_BV = jnp.repeat(logits_BV, n, axis=0)
    samples = first_tokens(logits_BV, key, sampling, pad)
    if sampling.max_new_tokens == 1:
        return samples

    # A copy of each prompt's cache for each of its responses.
    cache = KVCache(
        k_LBKSH=jnp.repeat(cache.k_LBKSH, n, axis=1),
        v_LBKSH=jnp.repeat(cache.v_LBKSH, n, axis=1),
        valid_BS=jnp.repeat(cache.valid_BS, n, axis=0),
        length=cache.length,
    )
    cache = unstack_cache(cache)
    params = unstack_params(params, config.compute_dtype, int8=sampling.int8)
    token_B = samples.response_BR[:, 0]
    rows = Decoded(
        row_B=jnp.arange(last_B.size),
        last_B=last_B,
        token_B=token_B,
        done_B=ends(token_B, eos),
        samples=samples,
    )

    # Then one more for all rows.
    step = make_step(apply, params, key, sampling)

    def one_more(state: Decoding) -> Decoding:
        # All rows are at the same token.
        rows = state.rows
        t_B = jnp.full_like(rows.row_B, state.t)
        cache, token_B, logp_B = step(state.cache, rows.token_B, rows.last_B, rows.row_B, t_B)

        def put(out_BR: jax.Array, x_B: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(out_BR, x_B[:, None], (0, state.t))

        # Rows that have ended are decoded on; what they give is padding.
        samples = Samples(
            response_BR=put(rows.samples.response_BR, jnp.where(rows.done_B, pad, token_B)),
            mask_BR=put(rows.samples.mask_BR, jnp.float32(~rows.done_B)),
            logp_BR=put(rows.samples.logp_BR, jnp.where(rows.done_B, 0.0, logp_B)),
        )
        done_B = rows.done_B | ends(token_B, eos)
        rows = dataclasses.replace(rows, token_B=token_B, done_B=done_B, samples=samples)
        return Decoding(state.t + 1, cache, rows)

    return in_stages(one_more, Decoding(jnp.int32(1), cache, rows), stages)


def in_stages(
    one_more: Callable[[Decoding], Decoding], state: Decoding, stages: Sequence[Stage]
) -> Samples:
    """Repeat `one_more` until all responses have ended or are full; return Samples in their order.

    one_more(state) -> state after one more token of each row. `state`: of as many rows and columns
    as the first of `stages`, its cache unstacked. A stage ends when its columns are full, or when
    on each device the responses that go on fit into the rows of a later one; a response is full
    when the last stage's columns are. Raises AssertionError for a stage of fewer rows before all
    columns.
    """
    # The next smaller number of rows, at which this stage may end; 0: when all have ended.
    stage, *later = stages
    fewer = max((other.rows for other in later if other.rows < stage.rows), default=0)
    devices = batch_devices(stage.rows)

    # Responses stay on their device, so the one with the most that go on decides.
    def open_rows(state: Decoding) -> jax.Array:
        return ~state.rows.done_B.reshape(devices, -1)

    def going(state: Decoding) -> jax.Array:
        most = jnp.max(jnp.sum(open_rows(state), axis=1))
        return (state.t <= stage.room) & (most > fewer // devices)

    state = jax.lax.while_loop(going, one_more, state)
    if not later:
        return state.rows.samples

    # The columns of the next stage.
    following = later[0]
    cache = with_columns(state.cache, following.room - stage.room)
    state = dataclasses.replace(state, cache=cache)
    if following.rows == stage.rows:
        return in_stages(one_more, state, later)

    # Its rows: those that go on, and as many others as there is room for. Rows decrease last: a
    # stage whose columns are full may have all its rows open.
    assert following.room == stage.room, (
        f"{stage}, then {following}: fewer rows before all columns"
    )
    order_DB = jnp.argsort(~open_rows(state), axis=1, stable=True)
    places_DB = order_DB[:, : following.rows // devices]
    chosen = jax.tree.map(partial(take_rows, places_DB), (state.rows, rows_of(cache)))
    rows, in_cache = chosen
    fewer_state = Decoding(state.t, dataclasses.replace(cache, **in_cache), rows)
    samples = in_stages(one_more, fewer_state, later)

    # Back to their places, among those that had ended before.
    return jax.tree.map(partial(put_rows, places_DB), state.rows.samples, samples)


def rows_of(cache: KVCache) -> dict[str, Any]:
    """Return the fields of an unstacked cache that have response rows, {name: field}.

    They are `k_LBKSH` and `v_LBKSH`, a tuple of arrays [B, K, S, H] each, and `valid_BS`.
    """
    # The length is one number for all rows: they advance together.
    return {"k_LBKSH": cache.k_LBKSH, "v_LBKSH": cache.v_LBKSH, "valid_BS": cache.valid_BS}


def take_rows(places_DB: jax.Array, x: jax.Array) -> jax.Array:
    """Return rows of `x` [A, ...], B of each of D devices, as [D B, ...].

    Device d holds rows d A / D to (d + 1) A / D - 1; D must divide A. `places_DB`: int numbers of
    rows on their own device, from 0 and below A / D.
    """
    # Each device takes from the rows that it holds, so that none is sent.
    devices, _ = places_DB.shape
    x_DA = x.reshape(devices, -1, *x.shape[1:])
    taken = jax.vmap(lambda own, places_B: own[places_B])(x_DA, places_DB)
    return taken.reshape(-1, *x.shape[1:])


def put_rows(places_DB: jax.Array, x: jax.Array, rows: jax.Array) -> jax.Array:
    """Return `x` [A, ...] with `rows` [D B, ...] in place of those that `take_rows` takes.

    `places_DB`: as there, none twice on a device. `x` itself is not changed.
    """
    # Each device puts its rows back among those that it holds.
    devices, _ = places_DB.shape
    x_DA = x.reshape(devices, -1, *x.shape[1:])
    rows_DB = rows.reshape(devices, -1, *x.shape[1:])
    put = jax.vmap(lambda own, places_B, rows_B: own.at[places_B].set(rows_B))
    return put(x_DA, places_DB, rows_DB).reshape(x.shape)


def with_columns(cache: KVCache, more: int) -> KVCache:
    """Return `cache` with `more` free columns, of 0, behind those it has: `valid_BS` too.

    `cache`: unstacked, with a tuple of one array [B, K, S, H] a layer. `more`: a Python int, 0 or
    above.
    """

    def wider(x: jax.Array, axis: int) -> jax.Array:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, more)
        return jnp.pad(x, padding)

    # The new columns are not valid, so attention passes them over until they are filled.
    return dataclasses.replace(
        cache,
        k_LBKSH=tuple(wider(k_BKSH, 2) for k_BKSH in cache.k_LBKSH),
        v_LBKSH=tuple(wider(v_BKSH, 2) for v_BKSH in cache.v_LBKSH),
        valid_BS=wider(cache.valid_BS, 1),
    )
