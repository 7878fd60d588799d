"""Results of searches: the numbers of samples that are shown, and one JSON file a search."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from evaluation.intervals import Interval
from runtime.run_folder import atomic_text


def powers_of_two(n: int) -> list[int]:
    """Return 1, 2, 4, ... up to `n`, and `n` itself, in order, each once; `n` is at least 1."""
    powers = {1 << k for k in range(n.bit_length())}
    return sorted(powers | {n})


def as_json(interval: Interval) -> list[Any]:
    """Return [value, [low, high]], floats, as JSON files have an interval."""
    return [interval.value, interval.ends]


def write_result(
    path: str,
    config: Any,
    tokens: float,
    accuracy: Any,
    hits: Sequence[float] | dict[str, list[float]],
) -> None:
    """Write a search's JSON file, one line: `config`, `tokens`, `accuracy`, `hits`.

    `path`: replaced where it exists. `config`: the command's dataclass. `tokens`: sampled tokens a
    problem. `accuracy`: of `as_json`, or several by name. `hits`: 1 where a problem is solved,
    else 0, or the chance of it, in the order of the problems; or such lists of several ways by
    name. Raises UserError where the file cannot be made.
    """
    content = {
        "config": dataclasses.asdict(config),
        "tokens": tokens,
        "accuracy": accuracy,
        "hits": hits,
    }
    with atomic_text(path) as file:
        file.write(json.dumps(content) + "\n")
