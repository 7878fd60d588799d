"""Results of searches: the numbers of samples that are shown, and one JSON file a search."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from evaluation.intervals import Interval
from runtime.errors import require
from runtime.foreign import refuse_other_object
from runtime.writes import atomic_text, disk_faults, refuse_taken

RESULT = ("config", "tokens", "accuracy", "hits")
"""What a search's JSON file holds."""


def powers_of_two(n: int) -> list[int]:
    """Return 1, 2, 4, ... up to `n`, and `n` itself, in order, each once; `n` is at least 1."""
    powers = {1 << k for k in range(n.bit_length())}
    return sorted(powers | {n})


def as_json(interval: Interval) -> list[Any]:
    """Return [value, [low, high]], floats, as JSON files have an interval."""
    return [interval.value, interval.ends]


def refuse_other_files(out: str | None, solutions: str | None = None) -> None:
    """Raise UserError where a search would write over what is none of its files.

    To be called before the search. `out`: place of `write_result`, where a search's result may be,
    and nothing else. `solutions`: that of another file.
    """
    if out is None:
        return
    # One place has many names, as `a` and `./a`.
    require(
        solutions is None or os.path.realpath(out) != os.path.realpath(solutions),
        f"--out={out}: names the file of --solutions too; give each a place of its own",
    )
    with disk_faults(pathlib.Path(out)):
        refuse_taken(pathlib.Path(out), anew=False)
        refuse_other_object(pathlib.Path(out), RESULT)


def write_result(
    path: str,
    config: Any,
    tokens: float,
    accuracy: Any,
    hits: Sequence[float] | dict[str, list[float]],
) -> None:
    """Write a search's JSON file, one line: `config`, `tokens`, `accuracy`, `hits`.

    `path`: an earlier result there is replaced (`refuse_other_files`). `config`: the command's
    dataclass. `tokens`: sampled tokens a problem. `accuracy`: of `as_json`, or several by name.
    `hits`: 1 where a problem is solved, else 0, or the chance of it, in the order of the problems;
    or such lists of several ways by name. Raises UserError where the file cannot be made.
    """
    values = (dataclasses.asdict(config), tokens, accuracy, hits)
    content = dict(zip(RESULT, values, strict=True))
    with atomic_text(path) as file:
        file.write(json.dumps(content) + "\n")
