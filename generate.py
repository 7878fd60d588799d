"""Responses as batches and as token lists (sampling.py makes them); and, run directly, text from a run.

python generate.py --run=runs/align/ppo --prompt="what is the capital of sweden?"
python generate.py --run=runs/align/ppo --chat
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

import config as flags
from checkpoint import load_params
from config import UserError, load_config
from data.batches import pad_prompts
from data.tokenizer import Tokenizer
from model import LanguageModel, ModelConfig, Params, pure
from sampling import Samples, SamplingConfig, generate, truncate
from sharding import to_host

__all__ = ["Samples", "SamplingConfig", "generate", "join", "load_run", "make_sampler", "truncate"]


def load_run(run: str, reward: bool = False) -> tuple[ModelConfig, Tokenizer, Params]:
    """Model, tokenizer and parameters of a language model's run, or of a `reward` model's; UserError for the other."""
    config, params = load_config(run), load_params(run)
    if ("head" in params) != reward:
        kinds = ("language model", "reward model")
        raise UserError(f"{run}: a {kinds[not reward]} (of {config['script']}); name the run of a {kinds[reward]}")
    return ModelConfig(**config["model"]), Tokenizer.load(run), params


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


def make_sampler(
    config: ModelConfig,
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    n: int = 1,
    *,
    slots: int | None = None,
    ends: Sequence[int] = (),
):
    """respond(params, prompts: token lists, key) -> n responses a prompt, in order, as token lists.

    Prompts are padded to a power of two in length and to `rows` a call, so that few shapes are compiled. `slots`:
    responses decoded at a time (`generate`). `ends`: tokens that end a response beside the tokenizer's.
    """
    _, apply = pure(LanguageModel(config))
    how = {"pad": tokenizer.pad, "n": n, "slots": slots}

    @jax.jit
    def sample(params: Params, prompts: dict[str, jax.Array], key: jax.Array) -> Samples:
        return generate(apply, config, params, prompts, key, sampling, eos=jnp.array([tokenizer.eos, *ends]), **how)

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
    model, tokenizer, params = load_run(config.run)
    respond = make_sampler(model, sampling, tokenizer, 1 if config.chat else config.n)
    key = jax.random.key(config.seed)

    room = model.context - config.max_new_tokens
    tokens = [tokenizer.bos, *tokenizer.encode(config.prompt)] if config.raw else tokenizer.prompt(config.prompt)
    if len(tokens) > room:
        raise UserError(
            f"--prompt: {len(tokens)} tokens and --max_new_tokens={config.max_new_tokens} exceed the model's "
            f"context of {model.context}; shorten one of them"
        )
    if config.chat:
        return [chat(lambda tokens, turn: respond(params, [tokens], turn)[0], tokenizer, key, room)]
    shown = tokens if config.raw else []  # decoded together: a space where the two meet is kept
    texts = [tokenizer.decode(shown + response) for response in respond(params, [tokens], key)]
    print("\n".join(texts))
    return texts


def chat(reply: Callable[[list[int], jax.Array], list[int]], tokenizer: Tokenizer, key: jax.Array, room: int) -> str:
    """Alternate turns with the person at the terminal; returns the last reply.

    What exceeds `room` tokens is forgotten, the oldest turns first.
    """
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
        while len(tokens := tokenizer.prompt(messages)) > room and len(messages) > 1:
            del messages[:2]
        if len(tokens) > room:
            print(f"[too long: a message may have {room} tokens]")
            messages.clear()
            continue
        response = reply(tokens, turn)
        messages.append({"role": "assistant", "content": tokenizer.decode(response)})
        print(messages[-1]["content"])


if __name__ == "__main__":
    flags.run(main, Config)
