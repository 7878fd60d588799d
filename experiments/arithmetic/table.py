"""Make the tables of the arithmetic study from its runs, seed by seed.

Writes results.json and prints what README.md shows.

    python -m experiments.arithmetic.table runs/arithmetic0 runs/arithmetic1 runs/arithmetic2
"""

import runtime.interrupt  # noqa: F401

import json
import pathlib
import sys
from typing import Any

import numpy as np

from evaluation.steps import auc
from experiments.seeds import half
from runtime.errors import UserError
from runtime.flags import ending_in_one_line

HERE = pathlib.Path(__file__).parent
WAYS = {  # what the table calls a way to choose -> its name in rerank.json, {r} the run
    "one drawn at random": "one drawn at random",
    "a score that knows nothing": "a score that knows nothing",
    "majority": "majority",
    "outcome model, last step": "{r}/outcome last",
    "process model, product": "{r}/gold product",
    "process model, minimum": "{r}/gold minimum",
    "process model of completions, product": "{r}/completions product",
    "process model of completions, minimum": "{r}/completions minimum",
    "process model of completions, last step": "{r}/completions last",
    "one of them is right": "one of them is right",
}
PAIRS = (
    ("process model, product", "outcome model, last step"),
    ("process model, minimum", "outcome model, last step"),
    ("process model of completions, product", "process model of completions, last step"),
    ("process model of completions, last step", "outcome model, last step"),
    ("outcome model, last step", "majority"),
    ("outcome model, last step", "a score that knows nothing"),
    ("process model, product", "majority"),
    ("process model, minimum", "majority"),
)
MODELS = ("gold", "outcome", "completions")


def read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text())


def lines(path: pathlib.Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Return the mean, half of its 95 % interval (Student's t over seeds), and the values."""
    return {
        "mean": float(np.mean(values)),
        "half": half(values),
        "seeds": [round(v, 4) for v in values],
    }


def paired(better: list[list[float]], worse: list[list[float]]) -> dict[str, Any]:
    """Return the mean difference over all problems, half of its 95 % interval, and each seed's."""
    gaps = [np.subtract(a, b) for a, b in zip(better, worse, strict=True)]
    every = np.concatenate(gaps)
    width = 1.96 * every.std(ddof=1) / len(every) ** 0.5
    return {
        "mean": float(every.mean()),
        "half": float(width),
        "seeds": [round(float(g.mean()), 4) for g in gaps],
    }


def agreement(run: pathlib.Path) -> dict[str, float]:
    """Compare Monte Carlo labels with the program's, on the steps that the program judges.

    The last step of each solution is left out. Returns the number of labels, their AUC and shares.
    """
    pairs = [
        (gold != "negative", share)
        # Completions were sampled for fewer solutions.
        for one, other in zip(
            lines(run / "gold.jsonl"), lines(run / "completions.jsonl"), strict=False
        )
        for gold, share in zip(one["labels"][:-1], other["labels"][:-1], strict=True)
        if gold is not None
    ]
    right, share = (np.array(column) for column in zip(*pairs, strict=True))
    return {
        "labels": len(pairs),
        "auc": auc(share, right),
        "agree, any completion right": float(((share > 0) == right).mean()),
        "agree, half of them right": float(((share >= 0.5) == right).mean()),
        "wrong steps with a right completion": float((share[~right] > 0).mean()),
        "right steps without one": float((share[right] == 0).mean()),
    }


def main(runs: list[pathlib.Path]) -> dict[str, Any]:
    """Print the tables of what all `runs` have; return the content of results.json."""
    ranked = [read(run / "rerank.json") for run in runs]
    pairs = list(zip(ranked, runs, strict=True))
    hits = {
        way: [table["hits"][name.format(r=run)] for table, run in pairs]
        for way, name in WAYS.items()
        if all(name.format(r=run) in table["hits"] for table, run in pairs)
    }
    models = [
        name
        for name in MODELS
        if all(f"{run}/{name} last" in table["hits"] for table, run in pairs)
    ]
    last = {name: [lines(run / name / "metrics.jsonl")[-1] for run in runs] for name in models}
    agreements = [agreement(run) for run in runs]
    common = set.intersection(*({path.name for path in run.glob("*.json")} for run in runs))
    sizes = ranked[0]["accuracy"]["one drawn at random"]
    out = {
        "problems": len(hits["majority"][0]),
        "accuracy": {
            way: over_seeds([float(np.mean(h)) for h in of_way]) for way, of_way in hits.items()
        },
        "differences": {
            f"{a} - {b}": paired(hits[a], hits[b]) for a, b in PAIRS if {a, b} <= hits.keys()
        },
        "steps": {
            f"{name}: {what}": over_seeds([row[f"eval/{what}"] for row in rows])
            for name, rows in last.items()
            for what in ("auc", "first_error")
        },
        "completions": {name: over_seeds([a[name] for a in agreements]) for name in agreements[0]},
        "best of n, product": {
            f"n={n}": {
                "accuracy": over_seeds(
                    [t["accuracy"][f"{r}/gold product"][n][0] for t, r in pairs]
                ),
                "tokens": over_seeds([t["tokens"] * int(n) / t["config"]["n"] for t in ranked]),
            }
            for n in sizes
        },
        "step beam, product": {
            name.removesuffix(".json"): {
                "accuracy": over_seeds([read(run / name)["accuracy"][0] for run in runs]),
                "tokens": over_seeds([read(run / name)["tokens"] for run in runs]),
            }
            for name in sorted(common)
            if name.startswith("beam")
        },
        "one sample": {
            "SFT": over_seeds([t["accuracy"]["one drawn at random"]["1"][0] for t in ranked])
        },
    }
    after = {"PPO on step rewards": "ppo"} | {
        f"search imitated, round {k}": f"search{k}" for k in (1, 2, 3)
    }
    for name, file in after.items():
        if f"{file}.json" in common:
            right = [
                read(run / f"{file}.json")["accuracy"]["one drawn at random"]["1"][0]
                for run in runs
            ]
            out["one sample"][name] = over_seeds(right)
    for name, rows in out.items():
        print(
            f"\n{name}: {rows}"
            if isinstance(rows, int)
            else f"\n| {name} | | seeds |\n|---|---|---|"
        )
        for row, value in rows.items() if isinstance(rows, dict) else ():
            cells = value if "mean" not in value else {"": value}
            text = ", ".join(
                f"{k} {v['mean']:.3f} ±{v['half']:.3f}".strip() for k, v in cells.items()
            )
            first = next(iter(cells.values()))
            seeds = ", ".join(f"{seed:.3f}" for seed in first["seeds"])
            print(f"| {row} | {text} | {seeds} |")
    return out


def start() -> None:
    """Write results.json for the runs that the command names."""
    if len(sys.argv) < 3:
        raise UserError(
            "name two runs of run.sh or more, one a seed: "
            "table.py runs/arithmetic0 runs/arithmetic1"
        )
    try:
        results = main([pathlib.Path(argument) for argument in sys.argv[1:]])
    except OSError as fault:
        raise UserError(
            f"{fault.filename}: {fault.strerror}; finish the run with run.sh"
        ) from None
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    ending_in_one_line(start)
