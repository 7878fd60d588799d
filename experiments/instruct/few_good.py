"""Are a few good rows enough? Claim 3 of README.md.

    python -m experiments.instruct.run --study=few_good

A good response passes all criteria, a poor one fails at least one; both are the world's
demonstrators'.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from experiments.instruct.study import (
    LEVEL,
    Comparison,
    Config,
    Found,
    Line,
    Study,
    Training,
    by_seed,
    gold_of_run,
    kept_rows,
    paired,
    scaled,
    too_few,
)
from tasks import world
from tasks.world_gold import Request, gold

FEW, MANY = 1000, 8000
POOR = (0, 10, 20, 30, 40, 50)
"""Percent of the many rows that do not pass."""
POOR_QUALITY = 0.3
"""That of the demonstrator of poor responses, of which those that pass are drawn again."""
GOOD = "1,000 good"


def response_to(request: Request, is_good: bool, seed: int, number: int) -> str:
    """Draw a response that passes all criteria, or one that does not."""
    rng = world.drawn_for("few good", seed, number)
    while True:
        response = world.respond(request, 1.0 if is_good else POOR_QUALITY, rng)
        if gold(request.text, response).all == is_good:
            return response


def rows(count: int, poor: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield prompts with responses, of which `poor` percent do not pass: each tenth's first."""
    for number in range(count):
        request = world.prompt(number, seed=seed)
        is_good = number % 10 >= poor // 10
        yield request.text, response_to(request, is_good, seed, number)


def arm(config: Config, seed: int, *, count: int, poor: int) -> Training:
    """Return an arm: so many rows, of which `poor` percent do not pass."""
    made = rows(scaled(config, count), poor, seed)
    return Training(kept_rows(config, f"good-{count}-{poor}", seed, made))


def many(poor: int) -> str:
    """Return the name of the arm of many rows."""
    return f"8,000, {poor} % poor"


ARMS = {GOOD: partial(arm, count=FEW, poor=0)} | {
    many(poor): partial(arm, count=MANY, poor=poor) for poor in POOR
}


def compare(results: Sequence[Line]) -> list[Comparison]:
    """Compare the few good rows with the many, by gold, at each share of poor ones."""
    few = by_seed(results, GOOD)
    return [
        paired(f"{GOOD} less {many(poor)}", few, by_seed(results, many(poor))) for poor in POOR
    ]


def decide(found: Sequence[Found], results: Sequence[Line]) -> str:
    """Say from which share of poor rows on the few good ones are better.

    Held where there is one; refuted where they are worse at the largest; not supported else.
    """
    undecided = too_few(found)
    if undecided:
        return undecided
    better = [one.p < LEVEL and one.mean > 0 for one in found]
    if better[-1]:
        # The smallest share from which on all are better.
        first = max((i + 1 for i, is_better in enumerate(better) if not is_better), default=0)
        return f"held, from {POOR[first]} % on"
    last = found[-1]
    return "refuted" if last.p < LEVEL and last.mean < 0 else "not supported"


STUDY = Study(
    name="few_good",
    claim="3. a few good rows are enough",
    arms=ARMS,
    measure=gold_of_run,
    compare=compare,
    decide=decide,
    measures=("all", "helpful", "honest", "harmless"),
)
