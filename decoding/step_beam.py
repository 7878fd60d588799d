"""Step-level beam search: a model of steps keeps the best partial solutions as they are written (Snell et al. 2024).

    python -m decoding.step_beam --policy=runs/maths --model=runs/prm --beams=4 --branch=4

Compare with as many answers of decoding/rerank.py, --n = beams x branch: both print the tokens sampled a problem. What is found
with --split=train can be imitated, and searched from again: expert iteration (Anthony et al. 2017), as
experiments/arithmetic/search.sh does.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np

from data.sources import open_source
from data.steps import problems
from evaluation.intervals import Interval, mean
from model_config import check_fit
from responses import load_run, make_sampler
from rewards.scorer import load_function, make_step_scorer
from runtime import flags
from runtime.errors import require
from runtime.run_folder import atomic_text
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh

Tokens = list[int]


@dataclasses.dataclass(frozen=True)
class Config:
    policy: str = "runs/maths"
    """Run to sample from."""
    model: str = "runs/prm"
    """Run of train_prm.py that scores partial solutions."""
    how: Literal["product", "minimum", "last"] = "product"
    """What makes the score of the steps so far (objectives/reward.py)."""
    data: str = "arithmetic"
    """Problems with answers of: arithmetic, a .jsonl file, or tfds:<name>."""
    split: Literal["heldout", "train"] = "heldout"
    """Of these problems."""
    check: str = "tasks.answers:number"
    """module:function that is 1 where a response (first argument) has its record's answer."""
    beams: int = 4
    """Partial solutions kept after each step."""
    branch: int = 4
    """Next steps sampled for each of them; for the first step, beams times as many for the problem."""
    prompts: int = 500
    out: str | None = None
    """JSON file for what is printed, with the result on each problem."""
    solutions: str | None = None
    """File for the solutions that are right, as conversations for train_sft.py."""
    temperature: float = 1.0
    max_prompt: int = 16
    """Longest prompt, in tokens."""
    max_new_tokens: int = 48
    """Longest solution, in tokens."""
    seed: int = 0


def search(
    prompts: list[Tokens],
    extend: Callable[[list[Tokens], int], list[Tokens]],
    score: Callable[[list[Tokens], list[Tokens]], np.ndarray],
    eos: int,
    *,
    beams: int,
    branch: int,
    longest: int,
) -> tuple[list[Tokens], int]:
    """The best-scored solution to each prompt that the search finds, and the tokens sampled in all.

    `extend(contexts, round)`: `branch` next steps for each context, in order. A solution is finished when it ends in
    `eos`, and stays among the candidates; one of `longest` tokens without an end goes no further.
    """
    kept = [[[] for _ in range(beams)] for _ in prompts]
    open_ = lambda tokens: (not tokens or tokens[-1] != eos) and len(tokens) < longest
    sampled, number = 0, 0
    while any(open_(tokens) for of_one in kept for tokens in of_one):
        # All are extended, and the finished ones' steps ignored: so each round has one shape to compile.
        steps = iter(
            extend(
                [
                    [*prompt, *t]
                    for prompt, of_one in zip(prompts, kept, strict=True)
                    for t in of_one
                ],
                number,
            )
        )
        candidates = []
        for of_one in kept:
            mine: list[Tokens] = []
            for tokens in of_one:
                new = [next(steps) for _ in range(branch)]
                if open_(tokens):
                    sampled += sum(map(len, new))
                    mine += [[*tokens, *step][:longest] for step in new]
                else:
                    mine += [tokens] * branch  # so that all problems have equally many
            candidates.append(mine)
        asked = [prompt for prompt in prompts for _ in range(beams * branch)]
        scores_PN = score(asked, [t for mine in candidates for t in mine]).reshape(
            len(prompts), -1
        )
        kept = [
            best(mine, scores, beams) for mine, scores in zip(candidates, scores_PN, strict=True)
        ]
        number += 1
    return [of_one[0] for of_one in kept], sampled


def best(candidates: list[Tokens], scores: np.ndarray, beams: int) -> list[Tokens]:
    """The `beams` best-scored, each kept once while others are left, best first."""
    order = sorted(range(len(candidates)), key=lambda i: -scores[i])
    distinct = list({tuple(candidates[i]): candidates[i] for i in order}.values())
    return [*distinct, *(candidates[i] for i in order)][:beams]


def main(config: Config) -> tuple[Interval, float]:
    """Prints and returns the accuracy with its 95 % interval over problems, and the tokens sampled a problem."""
    require(
        min(config.beams, config.branch, config.prompts) >= 1,
        f"--beams={config.beams}, --branch={config.branch}, --prompts={config.prompts}: must be at least 1",
    )
    mesh = make_mesh(MeshConfig())
    model, tokenizer, params = load_run(config.policy)
    length = config.max_prompt + config.max_new_tokens
    check_fit(model, tokenizer.size, length)
    check, score = (
        load_function(config.check),
        make_step_scorer(config.model, tokenizer, mesh, length),
    )
    source = open_source(config.data, "prompt", config.split, seed=config.seed)
    records = [source[i] for i in range(min(config.prompts, len(source)))]
    prompts = problems(records, tokenizer, config.max_prompt)
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    respond = make_sampler(model, sampling, tokenizer, config.branch, ends=tokenizer.newlines())
    key = jax.random.key(config.seed)

    def extend(contexts: list[Tokens], number: int) -> list[Tokens]:
        return respond(
            params, contexts, jax.random.fold_in(key, number), max(1, 512 // config.branch)
        )

    found, sampled = search(
        prompts, extend, lambda *pair: score(*pair)[config.how], tokenizer.eos,
        beams=config.beams, branch=config.branch, longest=config.max_new_tokens,
    )  # fmt: skip
    right = [
        check(tokenizer.decode(tokens), record)
        for tokens, record in zip(found, records, strict=True)
    ]
    accuracy, (low, high) = mean(right)
    tokens = sampled / len(records)
    print(
        f"{len(records)} problems: {accuracy:.3f} ±{(high - low) / 2:.3f} right, {tokens:.0f} tokens each"
    )
    if config.out is not None:
        content = {
            "config": dataclasses.asdict(config),
            "tokens": tokens,
            "accuracy": [accuracy, [low, high]],
        }
        with atomic_text(config.out) as file:
            file.write(json.dumps({**content, "hits": right}) + "\n")
    if config.solutions is not None:
        with atomic_text(config.solutions) as file:
            for record, solution, hit in zip(records, found, right, strict=True):
                if hit and solution[-1] == tokenizer.eos:
                    said = {"role": "assistant", "content": tokenizer.decode(solution)}
                    file.write(json.dumps({"messages": [*record["prompt"], said]}) + "\n")
    return (accuracy, [low, high]), tokens


if __name__ == "__main__":
    flags.run(main, Config)
