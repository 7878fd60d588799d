"""Do more written rows without quality control hurt? Claim 4 of README.md.

    python -m experiments.instruct.run --study=quality

The rows are back-translations of the world's conversations, whose answers have faults of their
own: the filter drops instructions that do not fit and poor answers alike.
"""

import pathlib
from collections.abc import Sequence
from functools import partial

from collect import synthesise
from experiments.instruct.study import (
    STEPS,
    Comparison,
    Config,
    Line,
    Study,
    Training,
    all_above,
    by_seed,
    gold_of_run,
    paired,
    scaled,
)
from runtime.errors import require

FILTERED_ROWS = 1500
RATIO = 4.2
"""Rows of the arms without quality control, for each row of the filtered one."""
RELIABILITY = 0.7
"""That of the simulated writer, as a writer and as the judge of what it wrote."""
READ = 10
"""Answers that are read for each row, at most."""
PRINCIPLES = "tasks/principles.txt"
"""File of the principles that rows are filtered by."""
FILTERED = "filtered"


def written_rows(config: Config, seed: int, *, principles: str | None, rows: int) -> str:
    """Return a file of back-translations, filtered or not, which is written unless it is there."""
    rows = scaled(config, rows)
    sort = "filtered" if principles else "all"
    out = pathlib.Path(config.work) / f"rows-{sort}-{rows}-{seed}.jsonl"
    if not out.exists():
        made = synthesise.Config(
            method="back_translate",
            out=str(out),
            rows=rows,
            most=READ * rows,
            reliability=RELIABILITY,
            least_score=1,
            principles=principles,
            seed=seed,
        )
        counts = synthesise.main(made)
        require(
            counts["rows"] == rows,
            f"{out}: has {counts['rows']} rows of {rows}; remove it, and read more than {READ} "
            "answers for each",
        )
    return str(out)


def written(
    config: Config, seed: int, *, principles: str | None, rows: int, steps: int
) -> Training:
    """Return an arm: so many written rows, filtered by principles or not, for so many steps."""
    return Training(written_rows(config, seed, principles=principles, rows=rows), steps)


ALL_ROWS = round(RATIO * FILTERED_ROWS)
ARMS = {
    FILTERED: partial(written, principles=PRINCIPLES, rows=FILTERED_ROWS, steps=STEPS),
    "all, equal steps": partial(written, principles=None, rows=ALL_ROWS, steps=STEPS),
    "all, equal passes": partial(
        written, principles=None, rows=ALL_ROWS, steps=round(RATIO * STEPS)
    ),
}


def compare(results: Sequence[Line]) -> list[Comparison]:
    """Compare the filtered rows with all, by gold: with equal steps and with equal passes."""
    filtered = by_seed(results, FILTERED)
    return [
        paired(f"filtered less {arm}", filtered, by_seed(results, arm))
        for arm in ARMS
        if arm != FILTERED
    ]


STUDY = Study(
    name="quality",
    claim="4. more rows without quality control hurt",
    arms=ARMS,
    measure=gold_of_run,
    compare=compare,
    decide=all_above,
    measures=("all", "helpful", "honest", "harmless"),
)
