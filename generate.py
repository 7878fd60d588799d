"""Text from a run: responses to one prompt, a raw continuation, or a chat in the terminal.

python generate.py --run=runs/align/ppo --prompt="what is the capital of sweden?"
python generate.py --run=runs/align/ppo --chat
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from collections.abc import Callable

import jax

from data.tokenizer import Message, Tokenizer
from responses import load_run, make_sampler
from runtime import flags
from runtime.errors import UserError
from sampling import SamplingConfig

Reply = Callable[[list[int], jax.Array], list[int]]
"""reply(tokens of a chat so far, key) -> tokens of the next turn, its end token included."""


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
    """Seed of the samples."""


def main(config: Config) -> list[str]:
    """Print `n` responses, or chat; return the responses, or the last of the chat's, as texts.

    Raises UserError for a run that is not a language model's, and for a prompt that leaves the
    context no room for a response.
    """
    # How tokens are drawn.
    sampling = SamplingConfig(
        config.temperature, config.top_k, config.top_p, config.max_new_tokens
    )
    if config.n < 1:
        raise UserError(f"--n={config.n}: must be at least 1")

    # The run, and what samples from it.
    model, tokenizer, params = load_run(config.run)
    respond = make_sampler(model, sampling, tokenizer, 1 if config.chat else config.n)
    key = jax.random.key(config.seed)

    # The prompt, and the room that the context leaves it.
    tokens = tokenizer.prompt(config.prompt)
    if config.raw:
        tokens = [tokenizer.bos, *tokenizer.encode(config.prompt)]
    room = model.context - config.max_new_tokens
    if len(tokens) > room:
        raise UserError(
            f"--prompt: {len(tokens)} tokens and --max_new_tokens={config.max_new_tokens} "
            f"exceed the model's context of {model.context}; shorten one of them"
        )

    # A chat: each reply is a response to all that was said.
    if config.chat:

        def reply(so_far: list[int], turn_key: jax.Array) -> list[int]:
            return respond(params, [so_far], turn_key)[0]

        return [chat(reply, tokenizer, key, room)]

    # A raw prompt is decoded with its continuation: a space where the two meet is kept.
    shown = tokens if config.raw else []
    responses = respond(params, [tokens], key)
    texts = [tokenizer.decode(shown + response) for response in responses]
    print("\n".join(texts))
    return texts


def chat(reply: Reply, tokenizer: Tokenizer, key: jax.Array, room: int) -> str:
    """Alternate turns with the person at the terminal; return the last reply, or an empty text.

    `room`: most tokens that a chat may have before a reply. What exceeds it is forgotten, the
    oldest pair of turns first. A message that alone exceeds it is refused, and the chat begins
    anew. An empty line or the end of input leaves. `key`: split for each turn.
    """
    # Until there is nothing more to say.
    messages: list[Message] = []
    print("Type a message; an empty line ends the chat.")
    while True:
        text = read_line()
        if not text.strip():
            return messages[-1]["content"] if messages else ""
        messages.append({"role": "user", "content": text})
        key, turn_key = jax.random.split(key)

        # The oldest turns are forgotten, a message and its reply at a time.
        tokens = tokenizer.prompt(messages)
        while len(tokens) > room and len(messages) > 1:
            del messages[:2]
            tokens = tokenizer.prompt(messages)
        if len(tokens) > room:
            print(f"[too long: a message may have {room} tokens]")
            messages.clear()
            continue

        # The answer, which belongs to the next prompt too.
        response = tokenizer.decode(reply(tokens, turn_key))
        messages.append({"role": "assistant", "content": response})
        print(response)


def read_line() -> str:
    """Read a line from the terminal behind "> ", without its end; "" at the end of input too."""
    try:
        return input("> ")
    except EOFError:
        return ""


if __name__ == "__main__":
    flags.run(main, Config)
