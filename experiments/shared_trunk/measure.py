"""PPO with two models and with one trunk from the same start: gold shares, and KL to it.

    python -m experiments.shared_trunk.measure --seeds 0 1 2 3 4

Trains with every seed both ways and adds a line to results.jsonl for each; what that has already
is not run again, and a run that was stopped goes on. Prints the table of all lines.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np

from evaluation.gold import CRITERIA, gold_rows, make_kl_sampler, summarise
from experiments.child import check_ended
from experiments.seeds import half
from responses import load_run
from runtime import flags
from runtime.errors import require
from runtime.rows import read_rows
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks import world

SCRIPTS = {
    "two models": "train_ppo.py",
    "one trunk": "experiments/shared_trunk/train_ppo.py",
}
SIZES = ("--batch_size=128", "--steps=24", "--eval_every=0", "--save_every=12")
"""Flags of both, beside their defaults: half of the rollouts that `make align` takes."""
MAX_PROMPT, MAX_NEW = 32, 24  # as evaluate.py
NUMBERS = (*CRITERIA, "kl", "score", "explained_variance")


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the training, both ways; what they start from is the same."""
    init: str = "runs/align/sft"
    """Run of train_sft.py that policies start from."""
    reward: str = "runs/align/rm"
    """Run of train_rm.py."""
    runs: str = "runs/shared_trunk"
    """Folder for the runs."""
    out: str = "experiments/shared_trunk/results.jsonl"
    """JSON Lines file that results are added to."""
    n: int = 1000
    """Held-out prompts of the evaluation, which no choice has seen."""


Result = dict[str, Any]
"""`way`, `seed` and NUMBERS, of which score and explained variance are the last iteration's."""


def train(config: Config, way: str, seed: int, run: str) -> None:
    """Run the script, or go on with what a stopped start of it has done.

    Raises UserError where it fails; SystemExit, with its code, where it was stopped by a signal or
    the same command may succeed (runtime.errors.TryAgain).
    """
    command = [sys.executable, SCRIPTS[way], *SIZES, f"--seed={seed}", f"--run={run}"]
    command += [f"--init={config.init}", f"--reward={config.reward}"]
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}).returncode
    check_ended(code, f"{run}: {SCRIPTS[way]} ended with code {code}, as it says above")


def judge(config: Config, seed: int, run: str) -> Result:
    """Sample one response to each held-out prompt; return shares, and KL to the start."""
    model, tokenizer, params = load_run(run)
    _, _, start = load_run(config.init)
    sampling = SamplingConfig(1.0, max_new_tokens=MAX_NEW)
    measure = make_kl_sampler(model, sampling, tokenizer, MAX_PROMPT)
    requests = [world.prompt(i, split="heldout", seed=1000 + seed) for i in range(config.n)]
    responses = measure(params, start, [request.text for request in requests], 1000 + seed)
    summary = summarise(
        gold_rows(requests, [response.text for response in responses]),
        [response.length for response in responses],
        [response.kl for response in responses],
    )
    return {name: summary[name] for name in (*CRITERIA, "kl")}


def table(results: list[Result]) -> str:
    """Return a Markdown table: both ways by seed, then the mean differences with intervals."""
    lines = ["| way, seed | " + " | ".join(NUMBERS) + " |", "|---|" + "---|" * len(NUMBERS)]
    by_way: dict[str, dict[int, Result]] = {way: {} for way in SCRIPTS}
    for result in sorted(results, key=lambda result: (result["seed"], result["way"])):
        by_way[result["way"]][result["seed"]] = result
        cells = " | ".join(f"{result[name]:.3f}" for name in NUMBERS)
        lines.append(f"| {result['way']}, {result['seed']} | {cells} |")

    # Of the seeds that both ways have, trunk less two models.
    seeds = sorted(by_way["one trunk"].keys() & by_way["two models"].keys())
    if not seeds:
        return "\n".join(lines)
    cells = []
    for name in NUMBERS:
        differences = [
            by_way["one trunk"][seed][name] - by_way["two models"][seed][name] for seed in seeds
        ]
        cells.append(f"{np.mean(differences):+.3f} ±{half(differences):.3f}")
    lines.append(f"| one trunk less two models, {len(seeds)} seeds | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(config: Config) -> dict[str, float]:
    """Train and judge what is not in the results yet; print the table of all; return {}."""
    require(bool(config.seeds), "--seeds: name at least one")
    make_mesh(MeshConfig())
    path = pathlib.Path(config.out)
    results: list[Result] = []
    if path.exists():
        results = [json.loads(line) for line in path.read_text().splitlines()]
    done = {(result["way"], result["seed"]) for result in results}
    for seed in config.seeds:
        for way in SCRIPTS:
            if (way, seed) in done:
                continue
            run = f"{config.runs}/{way.replace(' ', '_')}-{seed}"
            train(config, way, seed, run)
            last = read_rows(run)[-1]
            result = {
                "way": way,
                "seed": seed,
                **judge(config, seed, run),
                "score": last["score"],
                "explained_variance": last["explained_variance"],
            }
            results.append(result)
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
    print(table(results))
    return {}


if __name__ == "__main__":
    flags.run(main, Config)
