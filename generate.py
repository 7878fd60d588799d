"""Sampling: prefill and a decode loop under one jit; and, run directly, text from a run.

python generate.py --run=runs/align/ppo --prompt="what is the capital of sweden?"
python generate.py --run=runs/align/ppo --chat
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

import config as flags
from checkpoint import load_params
from config import UserError, load_config
from data.batches import pad_prompts
from data.tokenizer import Tokenizer
from model import LanguageModel, ModelConfig, Params, empty_cache, pure
from sharding import to_host


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


def generate(
    apply: Callable[..., Any],
    config: ModelConfig,
    params: Params,
    prompts: dict[str, jax.Array],
    key: jax.Array,
    sampling: SamplingConfig,
    *,
    eos: int,
    pad: int,
    n: int = 1,
) -> Samples:
    """`n` responses to each left-padded prompt (rows in order, n a prompt); traceable, prompts prefilled once.

    The loop ends when every row has ended or `max_new_tokens` is reached. `prompts` as from prompt_batches.
    """
    rows, length = prompts["tokens_BT"].shape
    new = sampling.max_new_tokens
    cache = empty_cache(config, rows, length + new)
    inputs = (prompts["tokens_BT"], prompts["segment_ids_BT"], prompts["positions_BT"])
    logits_B1V, cache = apply(params, *inputs, cache, logits_from=length - 1)
    cache = cache.replace(
        k_LBSKH=jnp.repeat(cache.k_LBSKH, n, axis=1),
        v_LBSKH=jnp.repeat(cache.v_LBSKH, n, axis=1),
        valid_BS=jnp.repeat(cache.valid_BS, n, axis=0),
    )
    logits_BV = jnp.repeat(logits_B1V[:, 0], n, axis=0)
    position_B = jnp.repeat(prompts["positions_BT"][:, -1], n, axis=0)
    rows *= n
    ones_B1 = jnp.ones((rows, 1), jnp.int32)
    temperature = sampling.temperature or 1.0

    def step(carry):
        t, key, logits_BV, cache, done_B, samples = carry
        key, now = jax.random.split(key)
        logits_BV = logits_BV / temperature
        if sampling.temperature == 0:
            token_B = jnp.argmax(logits_BV, axis=-1)
        else:
            token_B = jax.random.categorical(now, truncate(logits_BV, sampling.top_k, sampling.top_p))
        logp_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=-1)[:, 0]
        token_B = jnp.where(done_B, pad, token_B).astype(jnp.int32)
        write = lambda out_BR, x_B: jax.lax.dynamic_update_slice(out_BR, x_B[:, None], (0, t))  # noqa: E731
        samples = Samples(
            response_BR=write(samples.response_BR, token_B),
            mask_BR=write(samples.mask_BR, jnp.float32(~done_B)),
            logp_BR=write(samples.logp_BR, jnp.where(done_B, 0.0, logp_B)),
        )
        done_B |= token_B == eos
        logits_B1V, cache = apply(params, token_B[:, None], ones_B1, (position_B + 1 + t)[:, None], cache)
        return t + 1, key, logits_B1V[:, 0], cache, done_B, samples

    zeros_BR = jnp.zeros((rows, new), jnp.float32)
    samples = Samples(jnp.full((rows, new), pad, jnp.int32), zeros_BR, zeros_BR)
    carry = (jnp.int32(0), key, logits_BV, cache, jnp.zeros(rows, bool), samples)
    return jax.lax.while_loop(lambda c: (c[0] < new) & ~jnp.all(c[4]), step, carry)[-1]


def join(prompts: dict[str, jax.Array], samples: Samples) -> dict[str, jax.Array]:
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


def make_sampler(config: ModelConfig, sampling: SamplingConfig, tokenizer: Tokenizer, n: int = 1):
    """respond(params, prompts: token lists, key) -> n responses a prompt, in order, as token lists.

    Prompts are padded to a power of two in length and to `rows` a call, so that few shapes are compiled.
    """
    _, apply = pure(LanguageModel(config))

    @jax.jit
    def sample(params: Params, prompts: dict[str, jax.Array], key: jax.Array) -> Samples:
        return generate(apply, config, params, prompts, key, sampling, eos=tokenizer.eos, pad=tokenizer.pad, n=n)

    def respond(params: Params, prompts: Sequence[list[int]], key: jax.Array, rows: int = 256):
        length = max(len(tokens) for tokens in prompts)
        length = max(16, 1 << (length - 1).bit_length())
        rows = min(rows, len(prompts))
        out: list[list[int]] = []
        for start in range(0, len(prompts), rows):
            part = list(prompts[start : start + rows])
            padded = [{"tokens": tokens} for tokens in part + [part[0]] * (rows - len(part))]
            batch = pad_prompts(padded, length, tokenizer.pad, fixed=True)
            samples = to_host(sample(params, batch, jax.random.fold_in(key, start)))
            lengths = samples.mask_BR.sum(1).astype(int)[: len(part) * n]
            out += [row[:end].tolist() for row, end in zip(samples.response_BR, lengths, strict=False)]
        return out

    return respond


@dataclasses.dataclass(frozen=True)
class Config:
    """Text from a run."""

    run: str = "runs/align/ppo"
    """Run to sample from."""
    prompt: str = ""
    """The user's message; with --raw, the text to continue."""
    raw: bool = False
    """No chat template: continue the prompt as it is, and print nothing else."""
    chat: bool = False
    """Talk in the terminal; an empty line or end of input leaves."""
    n: int = 1
    """Samples for the prompt."""
    temperature: float = 1.0
    """Logits are divided by this; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together hold this probability."""
    max_new_tokens: int = 64
    """Longest response, in tokens."""
    seed: int = 0


def main(config: Config) -> list[str]:
    """Print `n` responses, or chat; returns what was generated last."""
    sampling = SamplingConfig(config.temperature, config.top_k, config.top_p, config.max_new_tokens)
    if config.n < 1:
        raise UserError(f"--n={config.n}: must be at least 1")
    model = ModelConfig(**load_config(config.run)["model"])
    tokenizer = Tokenizer.load(config.run)
    params = load_params(config.run)
    respond = make_sampler(model, sampling, tokenizer, 1 if config.chat else config.n)
    key = jax.random.key(config.seed)

    def fits(tokens: list[int]) -> list[int]:
        if len(tokens) + config.max_new_tokens > model.context:
            raise UserError(
                f"--prompt: {len(tokens)} tokens and --max_new_tokens={config.max_new_tokens} exceed the model's "
                f"context of {model.context}; shorten one of them"
            )
        return tokens

    if config.chat:
        return [chat(lambda tokens, turn: respond(params, [fits(tokens)], turn)[0], tokenizer, key)]
    tokens = [tokenizer.bos, *tokenizer.encode(config.prompt)] if config.raw else tokenizer.prompt(config.prompt)
    shown = tokens if config.raw else []  # decoded together: a space where the two meet is kept
    texts = [tokenizer.decode(shown + response) for response in respond(params, [fits(tokens)], key)]
    print("\n".join(texts))
    return texts


def chat(reply: Callable[[list[int], jax.Array], list[int]], tokenizer: Tokenizer, key: jax.Array) -> str:
    """Alternate turns with the person at the terminal; returns the last reply."""
    messages: list[dict[str, str]] = []
    print("Type a message; an empty line ends the chat.")
    while True:
        try:
            text = input("> ")
        except EOFError:
            text = ""
        if not text.strip():
            return messages[-1]["content"] if messages else ""
        messages.append({"role": "user", "content": text})
        key, turn = jax.random.split(key)
        response = reply(tokenizer.prompt(messages), turn)
        messages.append({"role": "assistant", "content": tokenizer.decode(response)})
        print(messages[-1]["content"])


if __name__ == "__main__":
    flags.run(main, Config)
