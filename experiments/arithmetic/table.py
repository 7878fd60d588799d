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
    """Read a JSON file."""
    return json.loads(path.read_text())


def lines(path: pathlib.Path) -> list[Any]:
    """Read a file of JSON Lines."""
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
        "seeds": [round(float(gap.mean()), 4) for gap in gaps],
    }


def agreement(run: pathlib.Path) -> dict[str, float]:
    """Compare Monte Carlo labels with the program's, on the steps that the program judges.

    The last step of each solution is left out. Returns the number of labels, their AUC and shares.
    """
    # Of each judged step: if it is right, and the share of its completions that come right.
    # Completions were sampled for fewer solutions than the program judged.
    is_right = []
    shares = []
    rows = zip(lines(run / "gold.jsonl"), lines(run / "completions.jsonl"), strict=False)
    for one, other in rows:
        for gold, completed in zip(one["labels"][:-1], other["labels"][:-1], strict=True):
            if gold is not None:
                is_right.append(gold != "negative")
                shares.append(completed)
    right = np.array(is_right)
    share = np.array(shares)
    return {
        "labels": len(right),
        "auc": auc(share, right),
        "agree, any completion right": float(((share > 0) == right).mean()),
        "agree, half of them right": float(((share >= 0.5) == right).mean()),
        "wrong steps with a right completion": float((share[~right] > 0).mean()),
        "right steps without one": float((share[right] == 0).mean()),
    }


# ---- The tables, each {row: its numbers over the seeds} ----


Hits = dict[str, list[list[float]]]
"""{way to choose: for each seed, 1 for each problem that it gets right, else 0}."""


def hits_of(ranked: list[Any], runs: list[pathlib.Path]) -> Hits:
    """Return the hits of each of WAYS that all runs have, from their `ranked`, rerank.json."""
    hits = {}
    for way, name in WAYS.items():
        of_seeds = []
        for table, run in zip(ranked, runs, strict=True):
            of_seeds.append(table["hits"].get(name.format(r=run)))
        if None not in of_seeds:
            hits[way] = of_seeds
    return hits


def accuracies(hits: Hits) -> dict[str, Any]:
    """Tabulate the share of problems that each way gets right."""
    found = {}
    for way, of_seeds in hits.items():
        found[way] = over_seeds([float(np.mean(of_seed)) for of_seed in of_seeds])
    return found


def differences(hits: Hits) -> dict[str, Any]:
    """Tabulate the differences of PAIRS."""
    found = {}
    for better, worse in PAIRS:
        if better in hits and worse in hits:
            found[f"{better} - {worse}"] = paired(hits[better], hits[worse])
    return found


def step_measures(ranked: list[Any], runs: list[pathlib.Path]) -> dict[str, Any]:
    """Tabulate how well each of MODELS that all runs have judged steps at the end of training."""
    found = {}
    for model in MODELS:
        has_all = True
        for table, run in zip(ranked, runs, strict=True):
            has_all &= f"{run}/{model} last" in table["hits"]
        if not has_all:
            continue
        last = [lines(run / model / "metrics.jsonl")[-1] for run in runs]
        for what in ("auc", "first_error"):
            found[f"{model}: {what}"] = over_seeds([row[f"eval/{what}"] for row in last])
    return found


def agreements(runs: list[pathlib.Path]) -> dict[str, Any]:
    """Tabulate `agreement`."""
    of_seeds = [agreement(run) for run in runs]
    found = {}
    for name in of_seeds[0]:
        found[name] = over_seeds([of_seed[name] for of_seed in of_seeds])
    return found


def best_of_n(ranked: list[Any], runs: list[pathlib.Path]) -> dict[str, Any]:
    """Tabulate best of n by the process model's product, and what it samples."""
    found = {}
    for n in ranked[0]["accuracy"]["one drawn at random"]:
        right = []
        tokens = []
        for table, run in zip(ranked, runs, strict=True):
            right.append(table["accuracy"][f"{run}/gold product"][n][0])
            tokens.append(table["tokens"] * int(n) / table["config"]["n"])
        found[f"n={n}"] = {"accuracy": over_seeds(right), "tokens": over_seeds(tokens)}
    return found


def step_beams(runs: list[pathlib.Path], common: set[str]) -> dict[str, Any]:
    """Tabulate the step beams whose files all runs have, `common` among them."""
    found = {}
    for name in sorted(common):
        if not name.startswith("beam"):
            continue
        beams = [read(run / name) for run in runs]
        found[name.removesuffix(".json")] = {
            "accuracy": over_seeds([beam["accuracy"][0] for beam in beams]),
            "tokens": over_seeds([beam["tokens"] for beam in beams]),
        }
    return found


def one_sample(ranked: list[Any], runs: list[pathlib.Path], common: set[str]) -> dict[str, Any]:
    """Tabulate single answers by the policies that come after SFT, and by SFT."""
    tables = {"SFT": ranked}
    after = {"PPO on step rewards": "ppo.json"}
    for k in (1, 2, 3):
        after[f"search imitated, round {k}"] = f"search{k}.json"
    for name, file in after.items():
        if file in common:
            tables[name] = [read(run / file) for run in runs]
    found = {}
    for name, of_seeds in tables.items():
        right = [table["accuracy"]["one drawn at random"]["1"][0] for table in of_seeds]
        found[name] = over_seeds(right)
    return found


def show(name: str, rows: dict[str, Any]) -> None:
    """Print a table: a row's numbers with their intervals, and the first one's seeds."""
    print(f"\n| {name} | | seeds |\n|---|---|---|")
    for row, value in rows.items():
        cells = {"": value} if "mean" in value else value
        texts = []
        for what, cell in cells.items():
            texts.append(f"{what} {cell['mean']:.3f} ±{cell['half']:.3f}".strip())
        first, *_ = cells.values()
        seeds = ", ".join(f"{seed:.3f}" for seed in first["seeds"])
        print(f"| {row} | {', '.join(texts)} | {seeds} |")


def main(runs: list[pathlib.Path]) -> dict[str, Any]:
    """Print the tables of what all `runs` have; return the content of results.json."""
    ranked = [read(run / "rerank.json") for run in runs]
    hits = hits_of(ranked, runs)

    # The names of the files that all runs have.
    common = {path.name for path in runs[0].glob("*.json")}
    for run in runs:
        common &= {path.name for path in run.glob("*.json")}

    problems = len(hits["majority"][0])
    tables = {
        "accuracy": accuracies(hits),
        "differences": differences(hits),
        "steps": step_measures(ranked, runs),
        "completions": agreements(runs),
        "best of n, product": best_of_n(ranked, runs),
        "step beam, product": step_beams(runs, common),
        "one sample": one_sample(ranked, runs, common),
    }
    print(f"\nproblems: {problems}")
    for name, rows in tables.items():
        show(name, rows)
    return {"problems": problems, **tables}


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
