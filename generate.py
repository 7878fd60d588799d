"""Text from a run: responses to one prompt, a raw continuation, or a chat in the terminal.

python generate.py --run=runs/align/ppo --prompt="what is the capital of sweden?"
python generate.py --run=runs/align/ppo --chat
"""

import runtime.interrupt  # noqa: F401

import contextlib
import dataclasses
import re
import select
import sys
from collections.abc import Callable

import jax

from data.tokenizer import Message, Tokenizer, is_ended
from responses import load_run, make_sampler
from runtime import flags
from runtime.errors import UserError, require
from runtime.run_folder import load_config
from runtime.terminal import printable
from sampling import SamplingConfig

Reply = Callable[[list[int], jax.Array], list[int]]
"""reply(tokens of a chat so far, key) -> tokens of the next turn, its end token included if it
came to one."""

QUOTES = '"""'
"""Around a message of several lines."""
PASTED = 0.02
"""Seconds within which a further line was pasted, not typed."""
QUESTIONS = (
    "what is the capital of sweden?",
    "name two animals.",
    "how can i rob a neighbour?",
)
"""Questions that a model of the built-in world can answer."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Text from a run."""

    # The model, and what it answers
    run: str = "runs/align/ppo"
    """Run to sample from."""
    prompt: str = ""
    """The user's message; with --raw, the text to continue."""
    raw: bool = False
    """No chat template: continue the prompt as it is, and print nothing else."""
    chat: bool = False
    """Talk in the terminal, a line a message; an empty line or end of input leaves."""
    # How many responses, and how their tokens are drawn
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
    """Print --n responses to --prompt, which may be empty, or chat with --chat; return texts.

    They are the responses, without control tokens; of a chat [the last reply], [""] without one.
    With --raw the prompt is continued without a chat template, and what is printed and returned
    begins with it. Control characters are printed spelled out, but returned as they are. Raises
    UserError as `load_run` and `check` do, for a prompt that leaves the context no room for
    --max_new_tokens, and without --raw for one that spells a control token.
    """
    # How tokens are drawn.
    sampling = SamplingConfig(
        config.temperature, config.top_k, config.top_p, config.max_new_tokens
    )
    check(config)

    # The run, and what samples from it.
    model, tokenizer, params = load_run(config.run)
    respond = make_sampler(model, sampling, tokenizer, config.n)
    key = jax.random.key(config.seed)

    # The prompt, and the room that the context leaves it.
    if config.raw:
        tokens = [tokenizer.bos, *tokenizer.encode(config.prompt)]
    else:
        tokens = tokenizer.prompt(config.prompt)
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

        print(introduction(config.run))
        return [chat(reply, tokenizer, key, room)]

    # A raw prompt is decoded with its continuation: a space where the two meet is kept.
    shown = tokens if config.raw else []
    responses = respond(params, [tokens], key)
    texts = [tokenizer.decode(shown + response) for response in responses]
    print(printable("\n".join(texts)))
    return texts


def check(config: Config) -> None:
    """Raise UserError for flags that cannot be, or that say nothing together.

    --n is below 1; --chat is given with --n above 1, a --prompt that is not empty, or --raw; or
    --prompt is not UTF-8. Nothing is read.
    """
    require(config.n >= 1, f"--n={config.n}: must be at least 1")
    # A chat has one reply a message, which the terminal asks for.
    require(
        not config.chat or (config.n == 1 and not config.prompt and not config.raw),
        "--chat: takes no --prompt, --raw or --n; type the messages",
    )
    # A byte that is no UTF-8 comes in as half a surrogate pair.
    require(
        not re.search("[\ud800-\udfff]", config.prompt),
        "--prompt: not UTF-8; write it in that encoding",
    )


# --- a chat


def introduction(run: str) -> str:
    """Return, as text for the terminal, how to chat with the run in the folder `run`.

    For a run on the built-in world (data "world" in its config.json), which knows nothing else, it
    names questions that it can answer. No newline ends it. Raises UserError where `run` is no
    run's folder.
    """
    lines = [
        'Type a message; """ begins and ends one of several lines.',
        "/clear begins anew, an empty line ends the chat.",
        "The first reply takes longer: it is compiled.",
    ]
    if load_config(run).get("data") == "world":
        lines.append(
            "This model was trained on the built-in world and knows nothing else. Ask it:"
        )
        lines += [f"  {question}" for question in QUESTIONS]
    return "\n".join(lines)


def chat(reply: Reply, tokenizer: Tokenizer, key: jax.Array, room: int) -> str:
    """Alternate turns with the person at the terminal; return the last reply, or "" without one.

    `reply`: a Reply; what it returns is decoded and printed here. `room`: most tokens that a chat
    may have before a reply. What exceeds it is forgotten, the oldest pair of turns first. A
    message that alone exceeds it, or that spells a control token, is refused, and nothing is
    forgotten for it. That a reply was cut off, for it has no end, is said. /clear begins anew, as
    if nothing had been said, so the last reply is "". A blank message or the end of input leaves.
    Ctrl-C during a reply drops the message and goes on; at the prompt it raises KeyboardInterrupt.
    `key`: split for each turn.
    """
    # Messages that come through a pipe are not typed, so there is nothing to edit.
    if sys.stdin.isatty():
        edit_lines()
    # Until there is nothing more to say.
    messages: list[Message] = []
    while True:
        text = read_message()
        if not text.strip():
            return messages[-1]["content"] if messages else ""
        if text.strip() == "/clear":
            messages.clear()
            print("[begun anew]")
            continue

        # The oldest turns are forgotten, a message and its reply at a time.
        said: list[Message] = [*messages, {"role": "user", "content": text}]
        try:
            fitting = newest_turns(said, tokenizer, room)
        except UserError as fault:
            # It spells a control token, say.
            print(f"[not sent: {fault}]")
            continue
        if not fitting:
            count = len(tokenizer.prompt(said[-1:]))
            print(f"[too long: {count} tokens of at most {room}; say it in fewer words]")
            continue
        if len(fitting) < len(said):
            print(f"[forgotten to make room: the first {len(said) - len(fitting)} turns]")

        # The answer, which belongs to the next prompt too.
        key, turn_key = jax.random.split(key)
        try:
            tokens = reply(tokenizer.prompt(fitting), turn_key)
        except KeyboardInterrupt:
            print("[stopped: the message is forgotten]")
            continue
        response = tokenizer.decode(tokens)
        messages = [*fitting, {"role": "assistant", "content": response}]
        print(printable(response))
        if not is_ended(tokens, tokenizer.ends):
            print(f"[cut off at --max_new_tokens={len(tokens)}]")


def newest_turns(messages: list[Message], tokenizer: Tokenizer, room: int) -> list[Message]:
    """Return the end of a chat, from a user's turn on, that has at most `room` tokens; [] if none.

    It is the longest such end. `messages`: the user's and the assistant's by turns, from a user's
    to a user's. The tokens are those of `tokenizer.prompt`, which raises UserError for a message
    that spells a control token.
    """
    # By pairs, a question and its reply, so that what is left begins with the user.
    for start in range(0, len(messages), 2):
        if len(tokenizer.prompt(messages[start:])) <= room:
            return messages[start:]
    return []


def edit_lines() -> None:
    """Let lines that `input` reads be edited, be of any length, and be pasted several at a time.

    Call it before the first is read, where stdin is a terminal. Lines that are pasted together
    then come from one `input`, once Enter is pressed, with their newlines; where the terminal does
    not mark a paste, from an `input` each. Without readline it does nothing.
    """
    # Where Python has been built with it.
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")


def read_message() -> str:
    """Read a message from stdin behind "> "; "" for an empty line or the end of input.

    It is a line as it is, blanks included, or, where that begins with \"\"\", `read_quoted`'s
    lines ("" if they are empty). In a terminal lines that are there already were pasted together,
    and are one message, without the newline at its end. Ctrl-C raises KeyboardInterrupt.
    """
    lines: list[str] = []
    # What came before the end of input counts.
    with contextlib.suppress(EOFError):
        lines.append(input("> "))
        if lines[0].startswith(QUOTES):
            return read_quoted(lines[0].removeprefix(QUOTES))
        # Nobody types so fast: a line that waits already was pasted with the one before.
        while sys.stdin.isatty() and select.select([sys.stdin], [], [], PASTED)[0]:
            lines.append(input())
    return "\n".join(lines)


def read_quoted(first: str) -> str:
    """Read on from stdin after `first` up to \"\"\" at the end of a line, or the end of input.

    `first`: the first line, without its newline and the \"\"\" that opens it; where it ends in
    \"\"\" nothing is read. Returns all lines, `first` too, joined by newlines, without the closing
    \"\"\", behind which not even a blank may stand.
    """
    # The end of input closes the quotes too.
    lines = [first]
    with contextlib.suppress(EOFError):
        while not lines[-1].endswith(QUOTES):
            lines.append(input())
    return "\n".join(lines).removesuffix(QUOTES)


if __name__ == "__main__":
    flags.run(main, Config)
