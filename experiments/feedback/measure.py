"""Measure by gold what the world's judge, critic and reviser of set reliability do to responses.

    python -m experiments.feedback.measure --file=runs/align/comparisons.jsonl

The file is made by collect/rank.py: the responses are read, not their ranking. Rules are measured
as classifiers too, and with --judge=RUN a language model that is asked whether a response keeps a
principle (`make_keeps`).
"""

import runtime.interrupt  # noqa: F401

import dataclasses

import jax
import numpy as np
from tqdm import tqdm

from collect import feedback
from data.sources import open_source
from evaluation.gold import CRITERIA
from responses import load_run
from rewards.judges import make_keeps, make_simulated, read_principles
from runtime import flags
from runtime.errors import UserError
from tasks import rules, world, world_feedback

RULES = (
    ("polite", "harmless"),
    ("harmless", "harmless"),
    ("brief", "helpful"),
    ("declines", "helpful"),
)
NAMES = CRITERIA[:3]


@dataclasses.dataclass(frozen=True)
class Config:
    file: str = "runs/align/comparisons.jsonl"
    """Comparisons whose responses are read."""
    prompts: int = 1000
    """Rows of the file that are read."""
    judge: str | None = None
    """Run of a language model as a classifier."""
    reliabilities: tuple[float, ...] = (0.5, 0.7, 0.9, 1.0)
    """Reliabilities of the simulated judge that are measured."""
    seed: int = 0
    """Seed of the judge and samples."""


def labels(config: Config, rows: list[dict], reliability: float) -> None:
    """Print the share of looks that are right, and of untied pairs that are ranked by gold."""
    # A look at each criterion of each response: right where it says what gold says.
    looks = []
    for row in rows:
        request = row["prompt"][-1]["content"]
        for text in row["responses"]:
            gold = world.gold(request, text)
            for name in NAMES:
                said = world_feedback.finds(request, text, name, reliability, config.seed)
                looks.append(said == getattr(gold, name))

    # Pairs as the looks at all criteria rank them.
    prefer, _ = make_simulated(NAMES, reliability, 1, config.seed)
    prompts = [row["prompt"] for row in rows]
    responses = [row["responses"] for row in rows]
    ranked = feedback.comparison_rows(prefer, prompts, responses)
    right = feedback.agreement(ranked)
    print(
        f"{reliability:11}{np.mean(looks):12.3f}{len(looks):9}{np.mean(right):12.3f}{len(right):9}"
    )


def revisions(config: Config, rows: list[dict], reliability: float) -> None:
    """Print the shares violated before and after each of three revisions."""
    rounds = feedback.Config.rounds
    _, revise = make_simulated(NAMES, reliability, 1, config.seed)
    prompts = [row["prompt"] for row in rows]
    first = [row["responses"][0] for row in rows]
    key = jax.random.key(config.seed)
    made = feedback.revision_rows(NAMES, revise, feedback.pick_first, prompts, first, rounds, key)
    print(f"reliability {reliability}, {len(made)} responses")
    feedback.report_revisions(made, rounds)


def classifiers(config: Config, rows: list[dict]) -> None:
    """Print the accuracy of each rule on its criterion, and how well it finds broken responses.

    "found": the share of broken ones that it finds; "real": the share of finds that are broken.
    """
    # Every response with its row and what gold says of it.
    shown = []
    for row in rows:
        for text in row["responses"]:
            gold = world.gold(row["prompt"][-1]["content"], text)
            shown.append((row, text, gold))

    # Rules by their name and the criterion that each stands for.
    tried = [(name, criterion, getattr(rules, name)) for name, criterion in RULES]
    if config.judge is not None:
        judge = load_run(config.judge)
        principles = read_principles(feedback.Config.principles)
        for name, principle in principles.items():
            tried.append((config.judge, name, make_keeps(judge, principle)))

    names = ("criterion", "broken", "accuracy", "found", "real")
    columns = "".join(f"{name:>10}" for name in names)
    print(f"{'rule':20}{columns}   n={len(shown)}")
    for name, criterion, keeps in tried:
        # What the rule calls broken, and what is.
        said = np.array(
            [keeps(text, row) < 0.5 for row, text, _ in tqdm(shown, name, leave=False)]
        )
        broken = np.array([not getattr(gold, criterion) for _, _, gold in shown])
        shares = (broken.mean(), (said == broken).mean(), said[broken].mean(), broken[said].mean())
        cells = "".join(f"{share:10.3f}" for share in shares)
        print(f"{name:20}{criterion:>10}{cells}")


def main(config: Config) -> None:
    """Print the three tables."""
    source = open_source(config.file, "comparison", "all")
    rows = source.first(config.prompts)
    # The gold program knows the world's prompts alone.
    try:
        for row in rows:
            world.gold(row["prompt"][-1]["content"], row["responses"][0])
    except ValueError as fault:
        raise UserError(f"{config.file}: {fault}; give a file of collect.rank") from None
    print(f"{'reliability':>11}{'looks right':>12}{'looks':>9}{'pairs right':>12}{'pairs':>9}")
    for reliability in config.reliabilities:
        labels(config, rows, reliability)
    for reliability in config.reliabilities:
        revisions(config, rows, reliability)
    classifiers(config, rows)


if __name__ == "__main__":
    flags.run(main, Config)
