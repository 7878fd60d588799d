"""AI feedback by written principles: comparisons labelled by a judge, and responses revised after a critique.

    python -m collect.feedback --write=comparisons --init=runs/align/sft --out=runs/ai/comparisons.jsonl       # RLAIF
    python -m collect.feedback --write=revisions --init=runs/align/sft --out=runs/ai/revisions.jsonl           # constitutional
    python -m collect.feedback --write=revisions --samples=4 --rounds=1 --reward=runs/align/rm --out=runs/ai/ilf.jsonl   # ILF

Comparisons are for `train_rm.py --data` (then train_ppo.py) and `train_dpo.py --data`, revisions for `train_sft.py
--data`. The world's judge, critic and reviser are simulated, of set reliability; elsewhere, or with --judge=RUN, a
language model is asked.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal

import jax
import numpy as np

from data.batches import cut_left
from data.sources import open_source
from evaluation.gold import CRITERIA
from evaluation.reward_model import make_scorer
from responses import in_parts, load_run, make_sampler
from rewards.judges import Messages, make_prefer, make_revise, make_simulated, read_principles
from runtime import flags
from runtime.errors import UserError, require
from runtime.run_folder import atomic_text
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks import world


@dataclasses.dataclass(frozen=True)
class Config:
    write: Literal["comparisons", "revisions"] = "comparisons"
    """comparisons: several responses to each prompt, ranked. revisions: one, criticised and rewritten."""
    init: str = "runs/align/sft"
    """Run whose responses are judged."""
    out: str = "runs/ai/feedback.jsonl"
    """File to write."""
    principles: str = str(pathlib.Path(__file__).parents[1] / "tasks" / "principles.txt")
    """A principle a line."""
    judge: str | None = None
    """Run that judges, criticises and revises; None: the world's simulated one."""
    reliability: float = 0.9
    """Of the simulated judge, critic and reviser: the chance that a look at a criterion, or a revision, is right."""
    reward: str | None = None
    """A run of train_rm.py that picks the best of each round's revisions (ILF)."""
    data: str = "world"
    """Prompts: world, a .jsonl file, or tfds:<name>."""
    split: Literal["train", "heldout"] = "train"
    prompts: int = 10000
    samples: int | None = None
    """Responses to a prompt that are ranked (default 4), or revisions in each round (default 1)."""
    rounds: int = 3
    """Revisions one after the other, each by a principle drawn at random."""
    temperature: float = 1.0
    max_new_tokens: int = 24
    """Longest response, critique or revision, in tokens."""
    seed: int = 0


# ---- Rows ----


def ranking(prefer_CC: np.ndarray) -> list[int]:
    """Ranks (1 is best, equal a tie) by the mean preference over the others; prefer_CC[i, j] = P(i better than j)."""
    points = np.round(prefer_CC.sum(1), 6)
    return [1 + int((points > own).sum()) for own in points]


def agreement(rows: Sequence[dict[str, Any]]) -> list[float]:
    """For each pair of which the gold program prefers one: 1 where the ranking does too, 0.5 a tie, 0 the other."""
    right = []
    for row in rows:
        gold = [
            world.gold(row["prompt"][-1]["content"], response).total
            for response in row["responses"]
        ]
        for i, j in combinations(range(len(gold)), 2):
            if gold[i] != gold[j]:
                order = (row["ranking"][j] - row["ranking"][i]) * (1 if gold[i] > gold[j] else -1)
                right.append(0.5 if order == 0 else float(order > 0))
    return right


def comparisons(
    prefer: Callable, prompts: Sequence[Messages], responses: Sequence[list[str]]
) -> list[dict[str, Any]]:
    """Rows: each prompt's distinct responses, ranked; none where nothing differs."""
    distinct = [list(dict.fromkeys(texts)) for texts in responses]
    asked = [
        (p, a, b)
        for p, texts in zip(prompts, distinct, strict=True)
        for a, b in combinations(texts, 2)
    ]
    answers, rows = iter(prefer(asked).mean(1)), []
    for prompt, texts in zip(prompts, distinct, strict=True):
        prefer_CC = np.full((len(texts), len(texts)), 0.5)
        for i, j in combinations(range(len(texts)), 2):
            prefer_CC[i, j] = next(answers)
            prefer_CC[j, i] = 1 - prefer_CC[i, j]
        ranks = ranking(prefer_CC)
        if len(set(ranks)) > 1:
            rows.append({"prompt": prompt, "responses": texts, "ranking": ranks})
    return rows


def revisions(
    config: Config,
    names: Sequence[str],
    revise: Callable,
    pick: Callable,
    prompts: Sequence[Messages],
    responses: Sequence[str],
    key: jax.Array,
) -> list[dict[str, Any]]:
    """Rows: each response's last revision, and the way to it; `names`: principles, of which each round draws one."""
    rows = [
        {"prompt": p, "revisions": [r], "critiques": []}
        for p, r in zip(prompts, responses, strict=True)
    ]
    for now in jax.random.split(key, config.rounds):
        drawn = [names[i] for i in jax.random.randint(now, len(rows), 0, len(names)).tolist()]
        critiques, candidates = revise(prompts, [row["revisions"][-1] for row in rows], drawn, now)
        for row, critique, response in zip(
            rows, critiques, pick(prompts, candidates), strict=True
        ):
            row["critiques"].append(critique)
            row["revisions"].append(response)
    return [
        {**row, "response": row["revisions"][-1]} for row in rows if row["revisions"][-1].strip()
    ]


def make_pick(config: Config) -> Callable[[Sequence[Messages], list[list[str]]], list[str]]:
    """pick(prompts, revisions of each): those that the reward model scores highest (Scheurer et al. 2023, ILF)."""
    if config.reward is None:
        return lambda prompts, revisions: [texts[0] for texts in revisions]
    model, tokenizer, params = load_run(config.reward, reward=True)
    score = make_scorer(model, tokenizer, model.context)

    def pick(prompts: Sequence[Messages], revisions: list[list[str]]) -> list[str]:
        flat = [
            (prompt, text)
            for prompt, texts in zip(prompts, revisions, strict=True)
            for text in texts
        ]
        scores = iter(score(params, *zip(*flat, strict=True)))
        return [max(texts, key=lambda _: next(scores)) for texts in revisions]

    return pick


def report(config: Config, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the gold program says of the rows (world only): agreement, or violations at each revision.

    What the judge finds equal is not written, and does not count: with two samples agreement is above that of all.
    """
    if config.write == "comparisons":
        right = agreement(rows)
        table = {"agreement": sum(right) / max(len(right), 1), "pairs": float(len(right))}
        print(
            f"gold's order in {table['agreement']:.3f} of {len(right)} untied pairs that were written (ties half)"
        )
        return table
    table = {}
    print(f"{'violated':12}" + "".join(f"{name:>10}" for name in CRITERIA[:3]) + f"{'any':>10}")
    for k in range(config.rounds + 1):
        verdicts = [world.gold(row["prompt"][-1]["content"], row["revisions"][k]) for row in rows]
        shares = {
            name: float(np.mean([not getattr(v, name) for v in verdicts])) for name in CRITERIA
        }
        table |= {f"violated/{name}/{k}": share for name, share in shares.items()}
        print(f"revision {k:<3}" + "".join(f"{share:10.3f}" for share in shares.values()))
    return table


# ---- The script ----


def check(c: Config, n: int) -> None:
    """Raises UserError for settings that cannot run together."""
    comparing = c.write == "comparisons"
    require(
        min(c.prompts, c.rounds) >= 1,
        f"--prompts={c.prompts}, --rounds={c.rounds}: must be at least 1",
    )
    require(n >= 1 + comparing, f"--samples={n}: must be at least {1 + comparing}")
    require(
        comparing or n == 1 or c.reward is not None,
        f"--samples={n}: several revisions need a --reward that picks one",
    )
    require(
        c.reward is None or not comparing,
        f"--reward={c.reward}: picks revisions; give --write=revisions",
    )
    require(0 <= c.reliability <= 1, f"--reliability={c.reliability}: must be in 0..1")
    require(
        c.judge is not None or c.data == "world",
        f"--data={c.data}: name a run that judges (--judge); the simulated judge knows the world only",
    )


def main(config: Config) -> dict[str, float]:
    """Writes the file whole or not at all; returns counts and, in the world, what the gold program says."""
    comparing = config.write == "comparisons"
    n = config.samples if config.samples is not None else 4 if comparing else 1
    check(config, n)
    principles = read_principles(config.principles)
    make_mesh(MeshConfig())
    model, tokenizer, params = load_run(config.init)
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    respond = make_sampler(model, sampling, tokenizer, n if comparing else 1)
    if config.judge is None:
        prefer, revise = make_simulated(list(principles), config.reliability, n, config.seed)
    else:
        judge = load_run(config.judge)
        prefer, revise = (
            make_prefer(judge, list(principles.values())),
            make_revise(judge, principles, sampling, n),
        )
    pick = make_pick(config)
    source = open_source(config.data, "prompt", config.split, seed=config.seed)
    count, rows, made = min(config.prompts, len(source)), 128, []
    with atomic_text(
        config.out, anew=True
    ) as file:  # opened at once, so that a place that cannot be written shows
        for start in in_parts(count, rows, config.write):
            records = [source[i] for i in range(start, min(start + rows, count))]
            if any("prompt" not in record for record in records):
                raise UserError(
                    f"--data={config.data}: holds raw text; feedback is on answers to prompts"
                )
            prompts = [record["prompt"] for record in records]
            room = model.context - config.max_new_tokens
            asked = [cut_left(tokenizer.prompt(prompt), room, tokenizer) for prompt in prompts]
            key = jax.random.fold_in(jax.random.key(config.seed), start)
            tokens = respond(params, asked, key, rows)
            per = len(tokens) // len(prompts)
            texts = [tokenizer.ended(tokens[i * per :][:per]) for i in range(len(prompts))]
            answered = [
                (p, [t for t in mine if t.strip()]) for p, mine in zip(prompts, texts, strict=True)
            ]
            prompts = [prompt for prompt, ended in answered if ended]
            responses = [ended for _, ended in answered if ended]
            if comparing:
                made += comparisons(prefer, prompts, responses)
            elif responses:
                first, key = [ended[0] for ended in responses], jax.random.fold_in(key, 1)
                made += revisions(config, list(principles), revise, pick, prompts, first, key)
        file.writelines(json.dumps(row) + "\n" for row in made)
    print(f"{config.out}: {len(made)} lines from {count} prompts")
    return {"lines": len(made), "prompts": count} | (
        report(config, made) if config.data == "world" and made else {}
    )


if __name__ == "__main__":
    flags.run(main, Config)
