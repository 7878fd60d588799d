"""Is a mixture of kinds of rows the best? Claim 6 of README.md.

    python -m experiments.instruct.run --study=kinds

Lookups, small talk and written rows (the filtered ones of quality.py), alone, in pairs and all
three, at equal rows.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from evaluation.gold import gold_shares
from experiments.instruct.quality import FILTERED_ROWS, PRINCIPLES, written_rows
from experiments.instruct.study import (
    Comparison,
    Config,
    Line,
    Study,
    Training,
    all_above,
    held_out_requests,
    judged,
    kept_rows,
    paired,
    scaled,
)
from tasks import world

QUALITY = 0.7
"""The demonstrators', as in the world's conversations."""
NAMES = ("lookup", "small_talk", "written")
PARTS = [part for size in (1, 2, 3) for part in itertools.combinations(NAMES, size)]
ALL_THREE = " + ".join(NAMES)


def rows_of_kind(kind: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield the first `count` demonstrations to requests of one kind."""
    numbers = itertools.count()
    found = 0
    while found < count:
        number = next(numbers)
        request = world.prompt(number, seed=seed)
        if request.kind == kind:
            rng = world.drawn_for("kinds", seed, number)
            yield request.text, world.respond(request, QUALITY, rng)
            found += 1


def data_of(config: Config, seed: int, name: str, count: int) -> str:
    """Return the file of `count` rows of one name."""
    if name == "written":
        return written_rows(config, seed, principles=PRINCIPLES, rows=count)
    made = rows_of_kind(name, scaled(config, count), seed)
    return kept_rows(config, f"kind-{name}-{count}", seed, made)


def arm(config: Config, seed: int, *, names: Sequence[str]) -> Training:
    """Return an arm: FILTERED_ROWS rows in all, as many of each name."""
    count = FILTERED_ROWS // len(names)
    files = [data_of(config, seed, name, count) for name in names]
    if len(files) == 1:
        return Training(files[0])
    return Training(" ".join(f"{file}:1" for file in files))


ARMS = {" + ".join(part): partial(arm, names=part) for part in PARTS}


def measure(config: Config, arm: str, run: str, seed: int) -> dict[str, Any]:
    """Return the share of held-out requests of each kind that pass, and of all of them."""
    rows = judged(run, held_out_requests(config, seed), seed)
    shares = {"all": gold_shares(rows)["all"].value}
    for kind in world.KINDS:
        own = [row["all"] for row in rows if row["kind"] == kind]
        shares[kind] = float(np.mean(own)) if own else float("nan")
    return shares


def mean_ranks(results: Sequence[Line]) -> dict[str, dict[int, float]]:
    """Return each arm's mean rank over the kinds of requests, by seed; 1 is the best.

    A seed counts where all arms have run.
    """
    ranks: dict[str, dict[int, float]] = {name: {} for name in ARMS}
    for seed in sorted({line["seed"] for line in results}):
        lines = {line["arm"]: line for line in results if line["seed"] == seed}
        if lines.keys() != ARMS.keys():
            continue
        shares_AK = np.array([[lines[name][kind] for kind in world.KINDS] for name in ARMS])
        ranks_A = stats.rankdata(-shares_AK, axis=0).mean(1)
        for name, rank in zip(ARMS, ranks_A.tolist(), strict=True):
            ranks[name][seed] = rank
    return ranks


def compare(results: Sequence[Line]) -> list[Comparison]:
    """Compare the mean rank of each other arm with that of all three, which should be smaller."""
    ranks = mean_ranks(results)
    best = ranks[ALL_THREE]
    others = [name for name in ARMS if name != ALL_THREE]
    return [paired(f"rank of {name} less all three's", ranks[name], best) for name in others]


STUDY = Study(
    name="kinds",
    claim="6. a mixture of kinds is best",
    arms=ARMS,
    measure=measure,
    compare=compare,
    decide=all_above,
    measures=("all", *world.KINDS),
)
