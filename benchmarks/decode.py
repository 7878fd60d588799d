"""Sampling beside transformers' generate and CTranslate2; slot refill beside fixed batches.

    python -m benchmarks.decode

All have the same weights. Prints a table and writes benchmarks/results/decode-<platform>.json
after every row.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command
from benchmarks.absent import standing_in
from benchmarks.rows import RESULTS, Built, Row, Side, run_rows, within
from benchmarks.side_by_side import count, model_of, peaks, plain_batch, random_params

with standing_in():
    from kernels.attention import decode_attention
    from model import LanguageModel, init_and_apply
    from model_config import ModelConfig
    from sampling import SamplingConfig, generate, stages_of
    from slots import generate_in_slots

# No token is this: responses have full length, as the peers'.
NEVER = -1
PREFILL = "  of this, prefill"
LONG_CACHE = 8192
"""Slots of the cache in the rows of attention."""


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "small"
    """Name of a model of side_by_side.MODELS."""
    rows: tuple[str, ...] = ("full", "geometric", "rollout", "attention")
    """Kinds to time: full (responses as long as they may be), geometric (lengths that differ),
    rollout (such lengths, in stages as in training), attention (one token, a long cache)."""
    batches: tuple[int, ...] = (16, 1)
    """Rows sampled together, a row of the table each."""
    prompt: int = 64
    """Tokens of a prompt."""
    new: int = 64
    """Tokens sampled after it."""
    requests: int = 128
    """Prompts of the geometric row, the first of `batches` at a time."""
    rollouts: int = 64
    """Prompts of the rollout row, sampled together."""
    longest: int = 256
    """Most tokens of a response in these two; their mean length is a quarter of it."""
    peers: tuple[str, ...] = ("transformers", "compiled", "ctranslate2")
    """Peers: transformers, compiled (with a static cache and a compiled step), ctranslate2."""
    rounds: int = 5
    """Timings of each side; medians are reported."""
    seconds: float = 1.0
    """Least duration of a timing, in seconds."""
    cores: int = 0
    """Cores that each side is held to, whose own seconds are then counted; 0: all, and the seconds
    that pass. On a shared CPU take 1."""
    row_limits: tuple[float, ...] = (300.0,)
    """Most seconds of each row, start and compilation included; the last is for the rest too."""
    out: str = RESULTS
    """Folder of the results."""


# ---- Responses of full length ----


def our_sampler(config: Config, batch: int) -> Built:
    """Return a side that samples `new` tokens after each prompt, and one that samples one."""
    model = model_of(config.model)
    _, apply = init_and_apply(LanguageModel(model))
    params = random_params(model)
    prompts = jax.device_put(plain_batch(model, batch, config.prompt))
    key = jax.random.key(0)

    def sampler(new: int) -> Callable[[], None]:
        sampling = SamplingConfig(max_new_tokens=new)

        @jax.jit
        def sample(params, prompts, key):
            samples = generate(apply, model, params, prompts, key, sampling, eos=NEVER, pad=0)
            return samples.response_BR

        def call() -> None:
            response_BR = sample(params, prompts, key).block_until_ready()
            assert response_BR.shape[1] == new

        return call

    return Built({generated(config, batch): sampler(config.new), PREFILL: sampler(1)}, "jax")


def torch_sampler(config: Config, batch: int, compiled: bool) -> Built:
    """Return the side of transformers' generate; as `our_sampler`."""
    from benchmarks import peers

    model = model_of(config.model)
    tokens_BT = plain_batch(model, batch, config.prompt)["tokens_BT"]
    whole, first = peers.samplers(model, tokens_BT, (config.new, 1), compiled)
    return Built({generated(config, batch): whole, PREFILL: first}, "torch", ("transformers",))


def ctranslate2_sampler(config: Config, batch: int) -> Built:
    """Return the side of CTranslate2; as `our_sampler`."""
    from benchmarks import peers

    model = model_of(config.model)
    tokens_BT = plain_batch(model, batch, config.prompt)["tokens_BT"]
    sampler = peers.ctranslate2_sampler(model)
    calls = {
        generated(config, batch): partial(sampler, tokens_BT, config.new),
        PREFILL: partial(sampler, tokens_BT, 1),
    }
    return Built(calls, "ctranslate2")


def generated(config: Config, batch: int) -> str:
    """Return the name of a row of full responses."""
    return f"generate {batch} x {config.prompt}+{config.new}"


def full_row(config: Config, batch: int) -> Row:
    """Return the row of responses of full length, and of its prefill."""
    every = {
        "transformers": Side(torch_sampler, (config, batch, False)),
        "compiled": Side(torch_sampler, (config, batch, True)),
        "ctranslate2": Side(ctranslate2_sampler, (config, batch)),
    }
    name = generated(config, batch)
    sides = {"plumb": Side(our_sampler, (config, batch))}
    for peer in config.peers:
        sides[peer] = every[peer]
    return Row(
        what=name,
        sides=sides,
        tokens={name: batch * config.new, PREFILL: batch},
        facts={"batch": batch, "bytes_per_step": bytes_per_step(config, batch)},
    )


# ---- Responses whose lengths differ ----


def ending_tokens(vocab: int, limit: int) -> np.ndarray:
    """Return the tokens that end a response, so many that its mean length is a quarter of `limit`.

    The weights are random, so each token of the vocabulary is about as likely; pad, 0, is no end.
    """
    number = max(1, 4 * vocab // limit)
    candidates = np.arange(1, vocab)
    rng = np.random.default_rng(0)
    return rng.choice(candidates, number, replace=False)


def geometric(config: Config) -> str:
    """Return the name of the row of responses whose lengths differ."""
    return f"refill {config.batches[0]}, {config.requests} x up to {config.longest}"


def our_geometric(config: Config, in_slots: bool) -> Built:
    """Return a side that samples by refilled slots, or in fixed batches.

    The lengths of responses are geometric, a quarter of the limit on average. A call returns how
    many tokens it sampled, so that other random numbers are no advantage.
    """
    model = model_of(config.model)
    _, apply = init_and_apply(LanguageModel(model))
    params = random_params(model)
    sampling = SamplingConfig(max_new_tokens=config.longest)
    options = {"eos": ending_tokens(model.vocab, config.longest), "pad": 0}
    slots = config.batches[0]
    key = jax.random.key(0)
    prompts = plain_batch(model, config.requests, config.prompt)

    @jax.jit
    def refilled(params, prompts, key):
        return generate_in_slots(
            apply, model, params, prompts, key, sampling, slots=slots, **options
        )

    @jax.jit
    def fixed(params, prompts, key):
        return generate(apply, model, params, prompts, key, sampling, **options)

    # Fixed batches, each with a key of its own.
    parts = []
    for start in range(0, config.requests, slots):
        part = {name: x[start : start + slots] for name, x in prompts.items()}
        parts.append((part, jax.random.fold_in(key, len(parts))))

    def call() -> float:
        if in_slots:
            every = [refilled(params, prompts, key)]
        else:
            every = [fixed(params, part, own_key) for part, own_key in parts]
        return sum(float(samples.mask_BR.sum()) for samples in every)

    tokens = call()
    return Built({geometric(config): call}, "jax", facts={"mean_length": tokens / config.requests})


def torch_geometric(config: Config) -> Built:
    """Return the side of transformers in fixed batches; as `our_geometric`."""
    from benchmarks import peers

    model = model_of(config.model)
    tokens_BT = plain_batch(model, config.requests, config.prompt)["tokens_BT"]
    eos = ending_tokens(model.vocab, config.longest)
    call = peers.ending_sampler(model, tokens_BT, config.longest, config.batches[0], eos)
    return Built({geometric(config): call}, "torch", ("transformers",))


def ctranslate2_geometric(config: Config) -> Built:
    """Return the side of CTranslate2, which drops rows that have ended; as `our_geometric`."""
    from benchmarks import peers

    model = model_of(config.model)
    tokens_BT = plain_batch(model, config.requests, config.prompt)["tokens_BT"]
    eos = ending_tokens(model.vocab, config.longest)
    sampler = peers.ctranslate2_sampler(model)
    call = partial(sampler, tokens_BT, config.longest, eos, config.batches[0])
    return Built({geometric(config): call}, "ctranslate2")


def geometric_row(config: Config) -> Row:
    """Return the row of responses whose lengths differ."""
    sides = {
        "plumb": Side(our_geometric, (config, True)),
        "fixed batches": Side(our_geometric, (config, False)),
    }
    if "transformers" in config.peers:
        sides["transformers"] = Side(torch_geometric, (config,))
    if "ctranslate2" in config.peers:
        sides["ctranslate2"] = Side(ctranslate2_geometric, (config,))
    return Row(geometric(config), sides, tokens={})


# ---- Rollouts of training ----


def our_rollout(config: Config, what: str, in_stages: bool) -> Built:
    """Return a side that samples in the stages of training, or in one loop over all rows."""
    model = model_of(config.model)
    _, apply = init_and_apply(LanguageModel(model))
    params = random_params(model)
    sampling = SamplingConfig(max_new_tokens=config.longest)
    eos = ending_tokens(model.vocab, config.longest)
    prompts = jax.device_put(plain_batch(model, config.rollouts, config.prompt))
    stages = stages_of(config.rollouts, config.prompt, config.longest) if in_stages else None

    @jax.jit
    def sample(params, prompts, key):
        return generate(
            apply, model, params, prompts, key, sampling, eos=eos, pad=0, stages=stages
        )

    def call() -> float:
        return float(sample(params, prompts, jax.random.key(0)).mask_BR.sum())

    facts = {"mean_length": call() / config.rollouts}
    response_BR = sample(params, prompts, jax.random.key(0)).response_BR
    return Built({what: call}, "jax", check=np.asarray(response_BR), facts=facts)


def same_tokens(responses: dict[str, np.ndarray]) -> None:
    """Assert that the sides sampled the same tokens."""
    first, *others = responses.values()
    for other in others:
        np.testing.assert_array_equal(first, other)


def rollout_row(config: Config) -> Row:
    """Return the row of rollouts in stages beside one loop."""
    what = f"rollout {config.rollouts} x {config.prompt}+up to {config.longest}"
    sides = {
        "plumb": Side(our_rollout, (config, what, True)),
        "one loop": Side(our_rollout, (config, what, False)),
    }
    return Row(what, sides, tokens={}, agree=same_tokens)


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
    # Queries in groups that share a key head; keys and values cut into parts.
    batch, kv_heads, slots, width = k_BKSH.shape
    apart_shape = (batch, kv_heads, parts, slots // parts, width)
    q_BKGH = q_BTNH.reshape(batch, kv_heads, -1, width) * width**-0.5
    k_BKCSH = k_BKSH.reshape(apart_shape)
    v_BKCSH = v_BKSH.reshape(apart_shape)

    # Each part by itself.
    scores_BKCGS = jnp.einsum(
        "BKGH,BKCSH->BKCGS", q_BKGH, k_BKCSH, preferred_element_type=jnp.float32
    )
    seen_B1C1S = (valid_BS > 0).reshape(batch, 1, parts, 1, -1)
    masked_BKCGS = jnp.where(seen_B1C1S, scores_BKCGS, -1e30)
    top_BKCG1 = masked_BKCGS.max(-1, keepdims=True)
    weights_BKCGS = jnp.where(seen_B1C1S, jnp.exp(scores_BKCGS - top_BKCG1), 0.0)
    total_BKCG1 = weights_BKCGS.sum(-1, keepdims=True)
    out_BKCGH = jnp.einsum("BKCGS,BKCSH->BKCGH", weights_BKCGS.astype(v_BKSH.dtype), v_BKCSH)

    # All parts at the scale of the greatest score.
    greatest_BK1G1 = top_BKCG1.max(2, keepdims=True)
    kept_BKCG1 = jnp.exp(top_BKCG1 - greatest_BK1G1)
    out_BKGH = (out_BKCGH * kept_BKCG1).sum(2)
    total_BKG1 = (total_BKCG1 * kept_BKCG1).sum(2)
    mean_BKGH = out_BKGH / total_BKG1
    return mean_BKGH.astype(q_BTNH.dtype).reshape(q_BTNH.shape)


ATTENTIONS = {
    "plumb": decode_attention,
    "8 parts": split_attention,
    "1 part": partial(split_attention, parts=1),
}


def long_cache_side(what: str, batch: int, name: str) -> Built:
    """Return a side of ATTENTIONS. Eight query heads share two key heads."""
    # Queries, keys and values.
    cached = (batch, 2, LONG_CACHE, 64)
    shapes = ((batch, 1, 8, 64), cached, cached)
    keys = jax.random.split(jax.random.key(0), 3)
    dtype = ModelConfig().compute_dtype
    arrays = []
    for key, shape in zip(keys, shapes, strict=True):
        arrays.append(jax.random.normal(key, shape, dtype))

    # All slots are valid, and the new token stands in the last one.
    arrays.append(jnp.ones((batch, LONG_CACHE), jnp.int32))
    arrays.append(jnp.int32(LONG_CACHE - 1))
    run = jax.jit(ATTENTIONS[name])

    def call() -> None:
        run(*arrays).block_until_ready()

    return Built({what: call}, "jax", check=np.asarray(run(*arrays), np.float32))


def same_outputs(outputs: dict[str, np.ndarray]) -> None:
    """Raise AssertionError unless all sides give the same, to the rounding of bfloat16."""
    first, *_ = outputs.values()
    for side, out in outputs.items():
        np.testing.assert_allclose(out, first, atol=1e-2, err_msg=side)


def long_cache_row(batch: int) -> Row:
    """Return a row of one token against a long cache, whole and split over the keys."""
    what = f"attention, {batch} x cache of {LONG_CACHE}"
    sides = {name: Side(long_cache_side, (what, batch, name)) for name in ATTENTIONS}
    return Row(what, sides, tokens={what: batch}, agree=same_outputs)


# ---- The benchmark ----


def bytes_per_step(config: Config, batch: int) -> float:
    """Return what a step must read: the weights once, and each row's cache, half grown."""
    model = model_of(config.model)
    weights = count(model)
    # Of an embedding that is not also the unembedding only some rows are read.
    if not model.tied:
        weights -= model.vocab * model.width
    # Keys and values of a token, in all layers.
    per_token = 2 * model.layers * model.kv_heads * model.head_dim
    mean_length = config.prompt + config.new / 2
    cache = batch * per_token * mean_length
    return model.compute_dtype.itemsize * (weights + cache)


def add_roofline(result: dict[str, Any]) -> None:
    """Add the share of the memory's speed at which a decode step reads what it must."""
    peak = peaks(result["device"])
    # The first token comes with the prefill.
    steps = result["config"]["new"] - 1
    for row in result["rows"]:
        if "bytes_per_step" not in row or not row.get("lines"):
            continue
        whole, prefill = row["lines"]
        whole["ms_per_step"] = (whole["ms"] - prefill["ms"]) / steps
        if peak:
            _, bytes_per_s = peak
            least_ms = 1e3 * row["bytes_per_step"] / bytes_per_s
            whole["of_roofline"] = least_ms / whole["ms_per_step"]


def rows(config: Config) -> list[Row]:
    """Return the rows that are asked for."""
    every = {
        "full": [full_row(config, batch) for batch in config.batches],
        "geometric": [geometric_row(config)],
        "rollout": [rollout_row(config)],
        "attention": [long_cache_row(batch) for batch in config.batches[::-1]],
    }
    asked = [row for name in config.rows for row in every[name]]
    return within(asked, config.row_limits)


def main(config: Config) -> dict[str, Any]:
    """Time all rows, print the table, write the JSON; return what is written."""
    return run_rows("decode", config, rows(config), add_roofline)


if __name__ == "__main__":
    command.run(main, Config)
