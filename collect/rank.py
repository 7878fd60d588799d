"""Comparisons for a reward model: sample a policy, and have simulated labellers rank.

    python -m collect.rank --init=runs/align/sft --out=runs/align/comparisons.jsonl

Writes JSON Lines as `train_rm.py --data` reads them. With your own prompts and labels, write such
a file instead.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import random
from itertools import combinations
from typing import Any, Literal

import jax

from data.batches import cut_left
from responses import in_parts, load_run, make_sampler, split_evenly
from runtime import flags
from runtime.errors import UserError
from runtime.run_folder import atomic_text
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks import world

# Prompts a call, and responses decoded at a time.
ROWS = 500
SLOTS = 256


@dataclasses.dataclass(frozen=True)
class Config:
    init: str = "runs/align/sft"
    """Run whose responses are compared."""
    out: str = "runs/align/comparisons.jsonl"
    """File to write."""
    split: Literal["train", "heldout"] = "train"
    """Part of the world's prompts."""
    prompts: int = 10000
    """Prompts of the world."""
    samples: int = 4
    """Responses to a prompt, ranked together."""
    pairs: bool = False
    """Write each untied pair on a line of its own, with the criterion in which its two differ."""
    noise: float = 0.0
    """P(a is preferred to b) is sigmoid((gold a - gold b) / noise); equal gold is a tie."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    seed: int = 0
    """Seed of the prompts, samples and noise."""


def main(config: Config) -> dict[str, int]:
    """Write the file whole or not at all; return the counts of `lines` and `prompts`."""
    if config.prompts < 1 or config.samples < 2 or config.noise < 0:
        raise UserError(
            "--prompts must be at least 1, --samples at least 2 and --noise at least 0"
        )
    # The policy.
    make_mesh(MeshConfig())
    model, tokenizer, params = load_run(config.init)
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    respond = make_sampler(model, sampling, tokenizer, config.samples, slots=SLOTS)
    room = model.context - config.max_new_tokens

    # Responses to a part of the prompts at a time.
    lines = 0
    key = jax.random.key(config.seed)
    rng = random.Random(config.seed)
    with atomic_text(config.out, anew=True) as file:
        for start in in_parts(config.prompts, ROWS, "collect"):
            numbers = range(start, min(start + ROWS, config.prompts))
            texts = [world.prompt(i, split=config.split, seed=config.seed).text for i in numbers]
            prompts = [cut_left(tokenizer.prompt(text), room, tokenizer) for text in texts]
            tokens = respond(params, prompts, jax.random.fold_in(key, start), ROWS)

            # Of each prompt the distinct responses that came to their end, ranked.
            by_prompt = split_evenly(tokens, config.samples)
            for prompt, own in zip(texts, by_prompt, strict=True):
                ended = [text for text in tokenizer.ended(own) if text.strip()]
                responses = list(dict.fromkeys(ended))
                to_rows = pair_rows if config.pairs else ranking_rows
                for row in to_rows(prompt, responses, config.noise, rng):
                    file.write(json.dumps(row) + "\n")
                    lines += 1
    print(f"{config.out}: {lines} lines from {config.prompts} prompts")
    return {"lines": lines, "prompts": config.prompts}


def ranking_rows(
    prompt: str, responses: list[str], noise: float, rng: random.Random
) -> list[dict[str, Any]]:
    """Rank distinct responses together: one row, or none where nothing differs.

    A row has `prompt`, `responses` and `ranking` (1 is best, equal is a tie). `noise`: the
    labellers', as in Config.
    """
    if len(responses) < 2:
        return []
    ranks = world.rank(prompt, responses, noise=noise, rng=rng)
    if len(set(ranks)) < 2:
        return []
    ranking = [rank + 1 for rank in ranks]
    return [{"prompt": prompt, "responses": responses, "ranking": ranking}]


def pair_rows(
    prompt: str, responses: list[str], noise: float, rng: random.Random
) -> list[dict[str, Any]]:
    """Rank each pair of distinct responses: a row for each that is untied.

    Rows as in `ranking_rows`, with `criterion`: how the two differ (`world.criterion_of`). Pairs
    that do not differ are left out.
    """
    rows = []
    for pair in combinations(responses, 2):
        criterion = world.criterion_of(prompt, *pair)
        if criterion == "none":
            continue
        ranks = world.rank(prompt, pair, noise=noise, rng=rng)
        if ranks[0] != ranks[1]:
            rows.append(
                {
                    "prompt": prompt,
                    "responses": list(pair),
                    "ranking": [rank + 1 for rank in ranks],
                    "criterion": criterion,
                }
            )
    return rows


if __name__ == "__main__":
    flags.run(main, Config)
