"""Comparisons for a reward model: sample a policy several times a prompt and have simulated labellers rank.

    python -m collect.rank --init=runs/align/sft --out=runs/align/comparisons.jsonl

Writes JSON Lines as `train_rm.py --data` reads them; with your own prompts and labels, write such a file instead.
"""

import dataclasses
import json
import random
from itertools import combinations
from typing import Literal

import jax

from responses import in_parts, load_run, make_sampler
from runtime import flags
from runtime.errors import UserError
from runtime.run_folder import atomic_text
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks import world


@dataclasses.dataclass(frozen=True)
class Config:
    init: str = "runs/align/sft"
    """Run whose responses are compared."""
    out: str = "runs/align/comparisons.jsonl"
    """File to write."""
    split: Literal["train", "heldout"] = "train"
    """Of the world's prompts."""
    prompts: int = 10000
    samples: int = 4
    """Responses to a prompt, ranked together."""
    pairs: bool = False
    """Write each untied pair on a line of its own, with the criterion in which its two differ (for evaluation)."""
    noise: float = 0.0
    """Labellers prefer a to b with probability sigmoid((gold a - gold b) / noise); equal gold is a tie."""
    temperature: float = 1.0
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    seed: int = 0


def main(config: Config) -> dict[str, float]:
    """Writes the file whole or not at all; returns counts."""
    if config.prompts < 1 or config.samples < 2 or config.noise < 0:
        raise UserError(
            "--prompts must be at least 1, --samples at least 2 and --noise at least 0"
        )
    make_mesh(MeshConfig())
    model, tokenizer, params = load_run(config.init)
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    respond = make_sampler(model, sampling, tokenizer, config.samples, slots=256)
    counts = {"lines": 0, "prompts": config.prompts}
    key, rng, rows = jax.random.key(config.seed), random.Random(config.seed), 500
    with atomic_text(config.out, anew=True) as file:
        for start in in_parts(config.prompts, rows, "collect"):
            numbers = range(start, min(start + rows, config.prompts))
            texts = [world.prompt(i, split=config.split, seed=config.seed).text for i in numbers]
            tokens = respond(
                params,
                [tokenizer.prompt(text) for text in texts],
                jax.random.fold_in(key, start),
                rows,
            )
            for i, prompt in enumerate(texts):
                mine = tokens[i * config.samples : (i + 1) * config.samples]
                responses = list(
                    dict.fromkeys(text for text in tokenizer.ended(mine) if text.strip())
                )
                for row in comparisons(prompt, responses, config, rng):
                    file.write(json.dumps(row) + "\n")
                    counts["lines"] += 1
    print(f"{config.out}: {counts['lines']} lines from {config.prompts} prompts")
    return counts


def comparisons(
    prompt: str, responses: list[str], config: Config, rng: random.Random
) -> list[dict]:
    """Rows for distinct, ended responses: one ranking, or all untied pairs; none where nothing differs."""
    if config.pairs:
        pairs = [(a, b, world.criterion_of(prompt, a, b)) for a, b in combinations(responses, 2)]
        ranked = [
            (pair, world.rank(prompt, pair[:2], noise=config.noise, rng=rng))
            for pair in pairs
            if pair[2] != "none"
        ]
        return [
            {
                "prompt": prompt,
                "responses": [a, b],
                "ranking": [r + 1 for r in ranks],
                "criterion": criterion,
            }
            for (a, b, criterion), ranks in ranked
            if ranks[0] != ranks[1]
        ]
    ranks = (
        world.rank(prompt, responses, noise=config.noise, rng=rng) if len(responses) > 1 else []
    )
    if len(set(ranks)) < 2:
        return []
    return [{"prompt": prompt, "responses": responses, "ranking": [r + 1 for r in ranks]}]


if __name__ == "__main__":
    flags.run(main, Config)
