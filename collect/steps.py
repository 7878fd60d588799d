"""Step labels: sample solutions and judge their steps by a program, by the outcome, or by how often they come right.

    python -m collect.steps --init=runs/maths --out=runs/steps.jsonl                      # arithmetic's own checker
    python -m collect.steps --init=runs/maths --labels=outcome --out=runs/outcomes.jsonl  # the last step alone
    python -m collect.steps --init=runs/gsm8k --data=tfds:gsm8k --labels=completions --completions=8 --out=auto.jsonl

Writes JSON Lines as `train_prm.py --data` reads them. With the same seed the solutions are the same ones.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from data.sources import open_source
from data.steps import problems
from data.tokenizer import Tokenizer
from model_config import check_fit
from responses import in_parts, load_run, make_sampler
from rewards.scorer import Check, load_function
from runtime import flags
from runtime.errors import require
from runtime.run_folder import atomic_text
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks import arithmetic

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    init: str = "runs/maths"
    """Run whose solutions are labelled, and which completes them."""
    out: str = "runs/steps.jsonl"
    """File to write."""
    data: str = "arithmetic"
    """Problems with answers: arithmetic, a .jsonl file, or tfds:<name>."""
    split: Literal["train", "heldout"] = "train"
    """Of the problems."""
    labels: Literal["gold", "outcome", "completions"] = "gold"
    """gold: by the program, up to the first wrong step (arithmetic only). outcome: the last step, by --check.
    completions: each step, by the share of its completions that pass --check (Wang et al. 2024, Math-Shepherd)."""
    check: str = "tasks.answers:number"
    """module:function that is 1 where a response (first argument) has its record's answer."""
    completions: int = 8
    """Samples from each step; a share's standard error is sqrt(p (1 - p) / n)."""
    prompts: int = 4000
    samples: int = 4
    """Solutions to a problem; equal ones count once."""
    temperature: float = 1.0
    max_prompt: int = 16
    """Longest prompt, in tokens."""
    max_new_tokens: int = 48
    """Longest solution, in tokens."""
    seed: int = 0


def success_shares(
    complete: Callable[[list[list[int]]], list[list[int]]],
    check: Check,
    tokenizer: Tokenizer,
    states: Sequence[tuple[list[int], str, Row]],
) -> list[float]:
    """For each state (prompt's tokens, text so far, record) the share of completions that `check` finds right.

    `complete`: token lists to equally many continuations of each, in order. Unbiased for the probability that the
    policy comes right from there (Wang et al. 2024: soft estimation).
    """
    written = [tokenizer.encode(text) for _, text, _ in states]
    tokens = complete(
        [[*prompt, *so_far] for (prompt, _, _), so_far in zip(states, written, strict=True)]
    )
    n = len(tokens) // len(states)
    rights = [
        [check(tokenizer.decode([*so_far, *more]), record) for more in tokens[i * n : (i + 1) * n]]
        for i, (so_far, (_, _, record)) in enumerate(zip(written, states, strict=True))
    ]
    return np.mean(rights, axis=1).tolist()


def solutions(
    config: Config,
    respond: Callable,
    prompts: list[list[int]],
    key: jax.Array,
    tokenizer: Tokenizer,
):
    """Of each prompt the distinct solutions that ended and have no empty line, each a list of steps."""
    tokens = respond(prompts, key)
    for i in range(len(prompts)):
        mine = tokens[i * config.samples : (i + 1) * config.samples]
        steps = (text.split("\n") for text in dict.fromkeys(tokenizer.ended(mine)))
        yield [lines for lines in steps if all(line.strip() for line in lines)]


def main(config: Config) -> dict[str, float]:
    """Writes the file whole or not at all; returns counts."""
    require(
        min(config.prompts, config.samples, config.completions) >= 1,
        "--prompts, --samples, --completions: must be at least 1",
    )
    require(
        config.labels != "gold" or config.data == "arithmetic",
        f"--labels=gold: no program checks the steps of {config.data}; take outcome or completions",
    )
    make_mesh(MeshConfig())
    model, tokenizer, params = load_run(config.init)
    written = (
        2 if config.labels == "completions" else 1
    )  # a completion may begin near a solution's end, and be as long
    check_fit(model, tokenizer.size, config.max_prompt + written * config.max_new_tokens)
    check = load_function(config.check)
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)

    def sampler(n: int) -> Callable:
        respond = make_sampler(model, sampling, tokenizer, n)
        return lambda prompts, key: respond(params, prompts, key, max(1, 512 // n))

    respond, complete = sampler(config.samples), sampler(config.completions)
    source = open_source(config.data, "prompt", config.split, seed=config.seed)
    count, part = min(config.prompts, len(source)), 256
    counts = {"lines": 0, "steps": 0, "completions": 0}
    with atomic_text(config.out, anew=True) as file:
        for start in in_parts(count, part, "collect"):
            records = [source[i] for i in range(start, min(start + part, count))]
            prompts = problems(records, tokenizer, config.max_prompt)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), start))
            solved = solutions(config, respond, prompts, keys[0], tokenizer)
            rows = [(i, steps) for i, of_one in enumerate(solved) for steps in of_one]
            labels = judged(
                config,
                rows,
                prompts,
                records,
                check,
                lambda t, k=keys[1]: complete(t, k),
                tokenizer,
            )
            for (i, steps), given in zip(rows, labels, strict=True):
                file.write(
                    json.dumps({"prompt": records[i]["prompt"], "steps": steps, "labels": given})
                    + "\n"
                )
                counts["steps"] += sum(label is not None for label in given)
            counts["lines"] += len(rows)
            if config.labels == "completions":
                counts["completions"] += config.completions * sum(
                    len(steps) - 1 for _, steps in rows
                )
    print(
        f"{config.out}: {counts['lines']} solutions, {counts['steps']} labels, {counts['completions']} completions"
    )
    return counts


def judged(
    config: Config,
    rows: list[tuple[int, list[str]]],
    prompts: list[list[int]],
    records: list[Row],
    check: Check,
    complete: Callable,
    tokenizer: Tokenizer,
) -> list[list[str | float | None]]:
    """The labels of each solution, (number of its problem, steps); the last step's is the outcome but for gold."""
    if config.labels == "gold":
        texts = [record["prompt"][-1]["content"] for record in records]
        return [arithmetic.until_wrong(arithmetic.verdicts(texts[i], steps)) for i, steps in rows]
    outcomes = [float(check("\n".join(steps), records[i])) for i, steps in rows]
    if config.labels == "outcome":
        return [
            [*[None] * (len(steps) - 1), end]
            for (_, steps), end in zip(rows, outcomes, strict=True)
        ]
    states = [
        (prompts[i], "".join(f"{step}\n" for step in steps[:end]), records[i])
        for i, steps in rows
        for end in range(1, len(steps))
    ]
    shares = iter(success_shares(complete, check, tokenizer, states) if states else [])
    return [
        [*[next(shares) for _ in steps[1:]], end]
        for (_, steps), end in zip(rows, outcomes, strict=True)
    ]


if __name__ == "__main__":
    flags.run(main, Config)
