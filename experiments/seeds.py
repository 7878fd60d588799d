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
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], float]:
    """Return the numbers of nested dictionaries by their paths.

    Lists, which are intervals over prompts, are left out.
    """
    if isinstance(tree, dict):
        return {
            key: x for name, part in tree.items() for key, x in leaves(part, (*path, name)).items()
        }
    return {path: float(tree)} if isinstance(tree, int | float) else {}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("seeds.py: name runs that have a summary.json, one a seed")
    seeds = [
        leaves(json.loads((pathlib.Path(run) / "summary.json").read_text()))
        for run in sys.argv[1:]
    ]
    for path, _ in seeds[0].items():
        values = [of_seed[path] for of_seed in seeds]
        shown = ", ".join(f"{x:.3f}" for x in values)
        print(f"| {', '.join(path)} | {np.mean(values):.3f} ±{half(values):.3f} | {shown} |")
