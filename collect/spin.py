"""Comparisons for SPIN: each demonstration is preferred to what the policy says to its prompt.

    python -m collect.spin --init=runs/align/sft --data=world --out=runs/spin/1.jsonl
    python train_dpo.py --init=runs/align/sft --data=runs/spin/1.jsonl --beta=0.1 --run=runs/spin/1

The next round samples, and starts, from the run of the last one: its opponent and its reference.
SPIN's loss (Chen et al. 2024, the logistic one) is DPO's, lambda its beta.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
from typing import Literal

import jax

from data.bad_rows import OnBadRow, set_on_bad_row
from data.batches import cut_left
from data.sources import open_source
from data.tokenizer import Message
from responses import in_parts, load_run, make_sampler
from runtime import flags
from runtime.errors import UserError
from runtime.run_folder import atomic_text
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh

# Prompts a call.
ROWS = 256


@dataclasses.dataclass(frozen=True)
class Config:
    init: str = "runs/align/sft"
    """Run that plays against the demonstrations."""
    data: str = "world"
    """Demonstrations: world, arithmetic, files, or tfds:<name>."""
    split: Literal["train", "heldout"] = "train"
    """Part of the demonstrations."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, with a note."""
    out: str = "runs/spin/1.jsonl"
    """File to write."""
    prompts: int = 10000
    """Prompts that are responded to, at most."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    seed: int = 0
    """Seed of the built-in data and samples."""


def main(config: Config) -> dict[str, int]:
    """Write the file whole or not at all; return the counts of `lines` and `prompts`."""
    if config.prompts < 1:
        raise UserError(f"--prompts={config.prompts}: must be at least 1")
    # The opponent.
    set_on_bad_row(config.on_bad_row)
    make_mesh(MeshConfig())
    model, tokenizer, params = load_run(config.init)
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    respond = make_sampler(model, sampling, tokenizer)
    room = model.context - config.max_new_tokens

    # Its responses to a part of the demonstrations' prompts at a time.
    source = open_source(config.data, "chat", config.split, seed=config.seed)
    count = min(config.prompts, len(source))
    key = jax.random.key(config.seed)
    lines = 0
    with atomic_text(config.out, anew=True) as file:
        for start in in_parts(count, ROWS, "collect"):
            # One response to what each conversation says before its last turn.
            chats = [source[i]["messages"] for i in range(start, min(start + ROWS, count))]
            prompts = [cut_left(tokenizer.prompt(chat[:-1]), room, tokenizer) for chat in chats]
            responses = respond(params, prompts, jax.random.fold_in(key, start), ROWS)

            # A response that never ended is no answer.
            for chat, response in zip(chats, responses, strict=True):
                for text in tokenizer.ended([response]):
                    row = comparison(chat, text)
                    if row is not None:
                        file.write(json.dumps(row) + "\n")
                        lines += 1
    print(f"{config.out}: {lines} lines from {count} prompts")
    return {"lines": lines, "prompts": count}


def comparison(chat: list[Message], response: str) -> dict[str, object] | None:
    """Return the row that prefers the chat's last turn to `response`.

    Keys: `prompt` (the messages before), `chosen`, `rejected`. None for an empty response, and
    where the two do not differ.
    """
    *prompt, demonstrated = chat
    chosen = demonstrated["content"]
    if not response.strip() or response == chosen:
        return None
    return {"prompt": prompt, "chosen": chosen, "rejected": response}


if __name__ == "__main__":
    flags.run(main, Config)
