"""Comparisons for SPIN: each demonstration is preferred to what the policy says to the same prompt.

    python -m collect.spin --init=runs/align/sft --data=world --out=runs/spin/1.jsonl
    python train_dpo.py --init=runs/align/sft --data=runs/spin/1.jsonl --beta=0.1 --run=runs/spin/1

The next round samples, and starts, from the run of the last one: its opponent and its reference. SPIN's loss (Chen et
al. 2024, the logistic one) is DPO's, lambda its beta.
"""

import dataclasses
import json
from typing import Literal

import jax

from data.batches import cut_left
from data.sources import open_source
from model_config import check_fit
from responses import in_parts, load_run, make_sampler
from runtime import flags
from runtime.errors import UserError
from runtime.run_folder import atomic_text
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Config:
    init: str = "runs/align/sft"
    """Run that plays against the demonstrations."""
    data: str = "world"
    """Demonstrations: world, arithmetic, a .jsonl file, or tfds:<name>."""
    split: Literal["train", "heldout"] = "train"
    out: str = "runs/spin/1.jsonl"
    """File to write."""
    prompts: int = 10000
    temperature: float = 1.0
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    seed: int = 0


def main(config: Config) -> dict[str, int]:
    """Writes the file whole or not at all; returns counts. Left out: responses that never end, or equal the other."""
    if config.prompts < 1:
        raise UserError(f"--prompts={config.prompts}: must be at least 1")
    make_mesh(MeshConfig())
    model, tokenizer, params = load_run(config.init)
    check_fit(model, tokenizer.size, 1 + config.max_new_tokens)
    sampling, rows = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens), 256
    room = model.context - config.max_new_tokens
    respond = make_sampler(model, sampling, tokenizer, 1)
    source = open_source(config.data, "chat", config.split, seed=config.seed)
    count, key, lines = min(config.prompts, len(source)), jax.random.key(config.seed), 0
    with atomic_text(config.out, anew=True) as file:
        for start in in_parts(count, rows, "collect"):
            chats = [source[i]["messages"] for i in range(start, min(start + rows, count))]
            asked = [
                cut_left(tokenizer.prompt(messages[:-1]), room, tokenizer) for messages in chats
            ]
            tokens = respond(params, asked, jax.random.fold_in(key, start), rows)
            for (*prompt, demonstrated), own in zip(chats, tokens, strict=True):
                chosen = demonstrated["content"]
                for rejected in tokenizer.ended([own]):
                    if rejected.strip() and rejected != chosen:
                        file.write(
                            json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected})
                            + "\n"
                        )
                        lines += 1
    print(f"{config.out}: {lines} lines from {count} prompts")
    return {"lines": lines, "prompts": count}


if __name__ == "__main__":
    flags.run(main, Config)
