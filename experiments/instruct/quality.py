"""Do more written rows without quality control hurt? Claim 4 of README.md, a line a run.

    sh experiments/data_sampling/run.sh             # its first step makes the pre-trained model
    python -m experiments.instruct.quality          # rows, runs, results.jsonl, the verdict

What results.jsonl has is not run again: stop and start it at will.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

import train_sft
from collect import synthesise
from evaluation.gold import CRITERIA, gold_rows, gold_shares, make_kl_sampler
from experiments.seeds import half
from responses import load_run
from runtime import flags
from sampling import SamplingConfig
from tasks import world

HERE = pathlib.Path(__file__).parent
FILTERED_ROWS = 1500
RATIO = 4.2
"""Rows of the arms without quality control, for each row of the filtered one."""
STEPS = 200
RELIABILITY = 0.7
"""That of the simulated writer, as a writer and as the judge of what it wrote."""
HELD_OUT = 1000
"""Added to a run's seed: that of its held-out prompts."""
MAX_PROMPT = 32
MAX_NEW_TOKENS = 24


class Arm(NamedTuple):
    """Rows that are written by back-translation, and how long is trained on them."""

    least_score: int
    """5: only pairs of the best score. 1: all that can be read."""
    rows: int
    steps: int


ARMS = {
    "filtered": Arm(5, FILTERED_ROWS, STEPS),
    "all, equal steps": Arm(1, round(RATIO * FILTERED_ROWS), STEPS),
    "all, equal passes": Arm(1, round(RATIO * FILTERED_ROWS), round(RATIO * STEPS)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    init: str = "runs/data_sampling/lm"
    """Run of the pre-trained model."""
    work: str = "runs/instruct"
    """Folder of the rows and the runs."""
    out: str = str(HERE / "results.jsonl")
    """File with a line a run; those it has are not run again."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds: of the rows, of their order, of the held-out prompts."""
    prompts: int = 1000
    """Held-out prompts that a run is judged by."""
    share: float = 1.0
    """Share of the rows and steps of each arm; less than 1 to try the study out."""


def rows_of(config: Config, arm: Arm, seed: int) -> str:
    """Return the file of an arm's rows, which is written unless it is there."""
    rows = round(config.share * arm.rows)
    out = pathlib.Path(config.work) / f"rows-{arm.least_score}-{rows}-{seed}.jsonl"
    if not out.exists():
        made = synthesise.Config(
            method="back_translate",
            out=str(out),
            rows=rows,
            most=5 * rows,
            reliability=RELIABILITY,
            least_score=arm.least_score,
            seed=seed,
        )
        synthesise.main(made)
    return str(out)


def trained(config: Config, name: str, seed: int) -> str:
    """Return the run of an arm and a seed, trained to its end."""
    arm = ARMS[name]
    run = f"{config.work}/{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    argv = [
        f"--run={run}",
        f"--init={config.init}",
        f"--data={rows_of(config, arm, seed)}",
        f"--steps={max(1, round(config.share * arm.steps))}",
        f"--seed={seed}",
        "--eval_every=0",
    ]
    train_sft.main(flags.parse(train_sft.Config, argv))
    return run


def judged(run: str, seed: int, prompts: int) -> dict[str, float]:
    """Return the shares of held-out prompts that pass each criterion."""
    model, tokenizer, params = load_run(run)
    sampling = SamplingConfig(1.0, max_new_tokens=MAX_NEW_TOKENS)
    sample = make_kl_sampler(model, sampling, tokenizer, MAX_PROMPT)
    requests = [world.prompt(i, split="heldout", seed=HELD_OUT + seed) for i in range(prompts)]
    responses = sample(params, params, [request.text for request in requests], seed)
    rows = gold_rows(requests, [response.text for response in responses])
    return {name: interval.value for name, interval in gold_shares(rows).items()}


def verdict(results: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return of each arm without quality control its mean paired difference to the filtered one,
    and half of its 95 % interval over the seeds that both have.
    """
    gold = {(line["arm"], line["seed"]): line["all"] for line in results}
    found = {}
    for name in list(ARMS)[1:]:
        gaps = [
            gold[name, seed] - gold["filtered", seed]
            for arm, seed in gold
            if arm == name and ("filtered", seed) in gold
        ]
        found[name] = (float(np.mean(gaps)) if gaps else float("nan"), half(gaps))
    return found


def main(config: Config) -> dict[str, tuple[float, float]]:
    """Run what is left, and return the verdict on all that there is."""
    out = pathlib.Path(config.out)
    results = []
    if out.exists():
        results = [json.loads(line) for line in out.read_text().splitlines()]
    done = {(line["arm"], line["seed"]) for line in results}
    for seed in config.seeds:
        for name in ARMS:
            if (name, seed) in done:
                continue
            run = trained(config, name, seed)
            line = {"arm": name, "seed": seed, **judged(run, seed, config.prompts)}
            results.append(line)
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")

    # The claim holds where both differences are below 0.
    shares = ", ".join(CRITERIA)
    print(f"{len(results)} runs ({shares} in {out})")
    found = verdict(results)
    for name, (gap, width) in found.items():
        print(f"{name}: {gap:+.3f} ±{width:.3f} against filtered")
    return found


if __name__ == "__main__":
    flags.run(main, Config)
