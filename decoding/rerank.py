"""Re-ranking: of N answers the one that models of steps or outcomes, or the majority, prefer; how often it is right.

    python -m decoding.rerank --policy=runs/maths --models runs/orm runs/prm
    python -m decoding.rerank --policy=runs/gsm8k --data=tfds:gsm8k --models runs/prm --max_prompt=256 --max_new_tokens=256

A row is a way to choose, a column the number of answers chosen from, always the first of the same samples. A score
that knows nothing draws one of the distinct answers, for equal ones score equal.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from data.sources import open_source
from data.steps import problems
from evaluation.intervals import Interval, mean
from evaluation.steps import majority
from model_config import check_fit
from objectives.imitate import first_of_equal
from responses import load_run, make_sampler
from rewards.scorer import load_function, make_step_scorer
from runtime import flags
from runtime.errors import require
from runtime.run_folder import atomic_text
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks.answers import last_number


@dataclasses.dataclass(frozen=True)
class Config:
    policy: str = "runs/maths"
    """Run to sample from."""
    models: tuple[str, ...] = ("runs/prm",)
    """Runs of train_prm.py. A score is `product` or `minimum` over steps, or `last`, as an outcome model's is read."""
    data: str = "arithmetic"
    """Held-out problems with answers of: arithmetic, a .jsonl file, or tfds:<name>."""
    check: str = "tasks.answers:number"
    """module:function that is 1 where a response (first argument) has its record's answer."""
    n: int = 16
    """Answers to a problem."""
    prompts: int = 500
    out: str | None = None
    """JSON file for what is printed, with the result on each problem."""
    temperature: float = 1.0
    max_prompt: int = 16
    """Longest prompt, in tokens."""
    max_new_tokens: int = 48
    """Longest answer, in tokens."""
    seed: int = 0


def choices(
    n: int, scores: dict[str, np.ndarray], answers: list[list[Any]]
) -> dict[str, np.ndarray]:
    """Of each way to choose, the index [P] of its choice among the first `n` answers; scores [P, N], answers P x N."""
    voted = np.array([majority(of_one[:n]) for of_one in answers])
    return {"majority": voted, **{name: x[:, :n].argmax(1) for name, x in scores.items()}}


def main(config: Config) -> dict[str, dict[int, Interval]]:
    """Prints and returns accuracies with 95 % intervals over problems; {way: {n: (share, interval)}}."""
    require(
        min(config.n, config.prompts) >= 1,
        f"--n={config.n}, --prompts={config.prompts}: must be at least 1",
    )
    mesh = make_mesh(MeshConfig())
    model, tokenizer, params = load_run(config.policy)
    length = config.max_prompt + config.max_new_tokens
    check_fit(model, tokenizer.size, length)
    check = load_function(config.check)
    scorers = {run: make_step_scorer(run, tokenizer, mesh, length) for run in config.models}
    source = open_source(config.data, "prompt", "heldout", seed=config.seed)
    records = [source[i] for i in range(min(config.prompts, len(source)))]
    prompts = problems(records, tokenizer, config.max_prompt)

    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    respond, key = make_sampler(model, sampling, tokenizer, config.n), jax.random.key(config.seed)
    responses = respond(params, prompts, key, max(1, 512 // config.n))
    texts, shape = [tokenizer.decode(r) for r in responses], (len(records), config.n)
    right_PN = np.reshape(
        [check(text, records[i // config.n]) for i, text in enumerate(texts)], shape
    )
    answers = [
        [last_number(t) for t in texts[i : i + config.n]] for i in range(0, len(texts), config.n)
    ]
    numbers = np.unique(texts, return_inverse=True)[1]  # equal ones of equal texts
    new_PN = np.reshape(first_of_equal(numbers[:, None], config.n), shape)
    asked = [prompt for prompt in prompts for _ in range(config.n)]
    scores = {
        f"{run} {how}": x.reshape(shape)
        for run, score in scorers.items()
        for how, x in score(asked, responses).items()
    }
    sizes = sorted({*(1 << k for k in range(config.n.bit_length())), config.n})
    hits: dict[str, dict[int, np.ndarray]] = {}
    for n in sizes:
        of_n = {"one drawn at random": right_PN[:, :n].mean(1)}
        of_n["a score that knows nothing"] = np.average(right_PN[:, :n], 1, new_PN[:, :n])
        of_n |= {
            way: right_PN[np.arange(len(records)), at]
            for way, at in choices(n, scores, answers).items()
        }
        for way, hit_P in (of_n | {"one of them is right": right_PN[:, :n].max(1)}).items():
            hits.setdefault(way, {})[n] = hit_P
    table = {way: {n: mean(hit_P) for n, hit_P in row.items()} for way, row in hits.items()}
    tokens = sum(map(len, responses)) / len(records)
    report(config, table, len(records), tokens)
    if config.out is not None:
        last = {way: row[config.n].round(4).tolist() for way, row in hits.items()}
        content = {
            "config": dataclasses.asdict(config),
            "tokens": tokens,
            "accuracy": table,
            "hits": last,
        }
        with atomic_text(config.out) as file:
            file.write(json.dumps(content) + "\n")
    return table


def report(
    config: Config, table: dict[str, dict[int, Interval]], problems: int, tokens: float
) -> None:
    """The table for a terminal."""
    wide = max(map(len, table)) + 2
    print(" " * wide + "".join(f"{f'n={n}':>15}" for n in table["majority"]))
    for way, row in table.items():
        cells = (f"{value:.3f} ±{(high - low) / 2:.3f}" for value, (low, high) in row.values())
        print(f"{way:{wide}}" + "".join(f"{cell:>15}" for cell in cells))
    print(
        f"{problems} held-out problems, 95 % intervals; {tokens:.0f} tokens a problem for n={config.n}"
    )


if __name__ == "__main__":
    flags.run(main, Config)
