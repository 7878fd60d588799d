"""Do more kinds of tasks help, and then less and less? Claim 1 of README.md.

    python -m experiments.instruct.run --study=families

A family of requests is a kind with one relation, such as lookups of capitals. Of each seed five
are held out, and the same number of rows is drawn from 1, 2, 4, 8 or 16 of the others.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from evaluation import fits
from evaluation.gold import gold_shares
from experiments.data_sampling.verdicts import held_out_aic
from experiments.instruct.study import (
    HELD_OUT,
    Comparison,
    Config,
    Found,
    Line,
    Study,
    Training,
    all_above,
    by_seed,
    judged,
    kept_rows,
    paired,
    scaled,
)
from tasks import world
from tasks.world_gold import CORES, Request

Family = tuple[str, str]
FAMILIES: list[Family] = sorted({(request.kind, request.relation) for request in CORES.values()})
"""Kind and relation of each."""
COUNTS = (1, 2, 4, 8, 16)
LEFT_OUT = 5
"""Families that are judged by, and not trained on."""
ROWS = 1500
QUALITY = 1.0
"""The demonstrators', so that families differ in what they ask alone."""


def families_of(seed: int) -> tuple[list[Family], list[Family]]:
    """Return the families held out with a seed, and the others in the order they are taken."""
    mixed = random.Random(f"families/{seed}").sample(FAMILIES, len(FAMILIES))
    return mixed[:LEFT_OUT], mixed[LEFT_OUT:]


def requests_of(
    families: Sequence[Family], count: int, split: world.Split, seed: int
) -> Iterator[Request]:
    """Yield `count` requests of a split, as many of each family, in the order of their numbers."""
    left = {family: count // len(families) for family in families}
    for extra in families[: count % len(families)]:
        left[extra] += 1
    number = 0
    while any(left.values()):
        request = world.prompt(number, split=split, seed=seed)
        family = (request.kind, request.relation)
        if left.get(family, 0):
            left[family] -= 1
            yield request
        number += 1


def rows(families: Sequence[Family], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield requests of the families with demonstrations."""
    for number, request in enumerate(requests_of(families, count, "train", seed)):
        rng = world.drawn_for("families", seed, number)
        yield request.text, world.respond(request, QUALITY, rng)


def arm(config: Config, seed: int, *, count: int) -> Training:
    """Return an arm: ROWS rows of so many families."""
    _, taken = families_of(seed)
    made = rows(taken[:count], scaled(config, ROWS), seed)
    return Training(kept_rows(config, f"families-{count}", seed, made))


ARMS = {str(count): partial(arm, count=count) for count in COUNTS}


def measure(config: Config, arm: str, run: str, seed: int) -> dict[str, Any]:
    """Return the share of requests of the families held out that pass all criteria."""
    left_out, _ = families_of(seed)
    requests = list(requests_of(left_out, config.prompts, "heldout", HELD_OUT + seed))
    verdicts = judged(run, requests, seed)
    return {"all": gold_shares(verdicts)["all"].value}


def compare(results: Sequence[Line]) -> list[Comparison]:
    """Compare the most families with one."""
    most, one = (by_seed(results, str(count)) for count in (COUNTS[-1], COUNTS[0]))
    return [paired(f"{COUNTS[-1]} families less one", most, one)]


def decide(found: Sequence[Found], results: Sequence[Line]) -> str:
    """Decide by the comparison and, where it holds, by the shape of the curve."""
    decision = all_above(found, results)
    if decision != "held":
        return decision
    shares = [by_seed(results, str(count)) for count in COUNTS]
    seeds = sorted(set.intersection(*(set(of_seeds) for of_seeds in shares)))
    y_NS = np.array([[of_seeds[seed] for seed in seeds] for of_seeds in shares])
    x_N = np.array(COUNTS, float)
    plateau, _ = held_out_aic(fits.PLATEAU, x_N, y_NS)
    line, _ = held_out_aic(fits.LINE, x_N, y_NS)
    shape = f"AIC of the plateau {plateau:.1f}, of the line {line:.1f}"
    return f"held: {shape}" if plateau < line else f"not supported: {shape}"


STUDY = Study(
    name="families",
    claim="1. more kinds of tasks help, and then less and less",
    arms=ARMS,
    measure=measure,
    compare=compare,
    decide=decide,
    measures=("all",),
)
