"""Responses as batches and as token lists (sampling.py makes them); and, run directly, text from a run.

python generate.py --run=runs/align/ppo --prompt="what is the capital of sweden?"
python generate.py --run=runs/align/ppo --chat
"""

import dataclasses
from collections.abc import Callable

import jax

from data.tokenizer import Tokenizer
from responses import load_run, make_sampler
from runtime import flags
from runtime.errors import UserError
from sampling import SamplingConfig


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
    sampling = SamplingConfig(
        config.temperature, config.top_k, config.top_p, config.max_new_tokens
    )
    if config.n < 1:
        raise UserError(f"--n={config.n}: must be at least 1")
    model, tokenizer, params = load_run(config.run)
    respond = make_sampler(model, sampling, tokenizer, 1 if config.chat else config.n)
    key = jax.random.key(config.seed)

    room = model.context - config.max_new_tokens
    tokens = (
        [tokenizer.bos, *tokenizer.encode(config.prompt)]
        if config.raw
        else tokenizer.prompt(config.prompt)
    )
    if len(tokens) > room:
        raise UserError(
            f"--prompt: {len(tokens)} tokens and --max_new_tokens={config.max_new_tokens} exceed the model's "
            f"context of {model.context}; shorten one of them"
        )
    if config.chat:
        return [
            chat(lambda tokens, turn: respond(params, [tokens], turn)[0], tokenizer, key, room)
        ]
    shown = tokens if config.raw else []  # decoded together: a space where the two meet is kept
    texts = [tokenizer.decode(shown + response) for response in respond(params, [tokens], key)]
    print("\n".join(texts))
    return texts


def chat(
    reply: Callable[[list[int], jax.Array], list[int]],
    tokenizer: Tokenizer,
    key: jax.Array,
    room: int,
) -> str:
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
