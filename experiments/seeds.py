"""Print the mean over seeds of every number in the runs' summary.json, with its interval.

python -m experiments.seeds runs/distill0 runs/distill1 runs/distill2
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


def half(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of the mean over seeds (Student's t); nan of one seed."""
    count = len(values)
    if count < 2:
        return float("nan")
    # So many standard errors to either side.
    errors = stats.t.ppf(0.975, count - 1)
    deviation = np.std(values, ddof=1)
    return float(errors * deviation / count**0.5)


def leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], float]:
    """Return the numbers of nested dictionaries by their paths.

    Lists, which are intervals over prompts, are left out.
    """
    if isinstance(tree, int | float):
        return {path: float(tree)}
    found: dict[tuple[str, ...], float] = {}
    if isinstance(tree, dict):
        for name, part in tree.items():
            found |= leaves(part, (*path, name))
    return found


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("seeds.py: name runs that have a summary.json, one a seed")
    seeds = []
    for run in sys.argv[1:]:
        summary = pathlib.Path(run) / "summary.json"
        seeds.append(leaves(json.loads(summary.read_text())))
    # A row a number: its name, the mean with its interval, and each seed's.
    for path in seeds[0]:
        values = [of_seed[path] for of_seed in seeds]
        name = ", ".join(path)
        shown = ", ".join(f"{x:.3f}" for x in values)
        print(f"| {name} | {np.mean(values):.3f} ±{half(values):.3f} | {shown} |")
