"""Do more written rows without quality control hurt? Claim 4 of README.md, a line a run.

    python train_lm.py --run=runs/data_sampling/lm --model.width=64 --model.mlp_width=224 \
        --model.head_dim=16                         # the pre-trained model
    python -m experiments.instruct.quality          # rows, runs, results.jsonl, the decision

What results.jsonl has is not run again: stop and start it at will. The rows are back-translations
of the world's conversations, whose answers have faults of their own: the filter drops instructions
that do not fit and poor answers alike.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

import train_sft
from collect import synthesise
from evaluation.gold import CRITERIA, gold_rows, gold_shares, make_kl_sampler
from experiments.data_sampling.runs import append, whole_lines
from experiments.data_sampling.verdicts import holm
from experiments.seeds import half
from responses import load_run
from runtime import flags
from runtime.errors import require
from runtime.inputs import at_newest
from sampling import SamplingConfig
from tasks import world

HERE = pathlib.Path(__file__).parent
FILTERED_ROWS = 1500
RATIO = 4.2
"""Rows of the arms without quality control, for each row of the filtered one."""
STEPS = 200
RELIABILITY = 0.7
"""That of the simulated writer, as a writer and as the judge of what it wrote."""
READ = 10
"""Answers that are read for each row, at most."""
LEVEL = 0.05
"""Chance of any false difference among the comparisons."""
HELD_OUT = 1000
"""Added to a run's seed: that of its held-out prompts."""
MAX_PROMPT = 32
MAX_NEW_TOKENS = 24


class Arm(NamedTuple):
    """Rows that are written by back-translation, and how long is trained on them."""

    principles: str | None
    """File of the principles that rows are filtered by."""
    rows: int
    steps: int


ARMS = {
    "filtered": Arm("tasks/principles.txt", FILTERED_ROWS, STEPS),
    "all, equal steps": Arm(None, round(RATIO * FILTERED_ROWS), STEPS),
    "all, equal passes": Arm(None, round(RATIO * FILTERED_ROWS), round(RATIO * STEPS)),
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
    sort = "filtered" if arm.principles else "all"
    out = pathlib.Path(config.work) / f"rows-{sort}-{rows}-{seed}.jsonl"
    if not out.exists():
        made = synthesise.Config(
            method="back_translate",
            out=str(out),
            rows=rows,
            most=READ * rows,
            reliability=RELIABILITY,
            least_score=1,
            principles=arm.principles,
            seed=seed,
        )
        counts = synthesise.main(made)
        require(
            counts["rows"] == rows,
            f"{out}: has {counts['rows']} rows of {rows}; remove it, and read more than {READ} "
            "answers for each",
        )
    return str(out)


def trained(config: Config, name: str, seed: int) -> str:
    """Return the run of an arm and a seed, trained to its end."""
    arm = ARMS[name]
    steps = max(1, round(config.share * arm.steps))
    run = f"{config.work}/{name.replace(', ', '-').replace(' ', '-')}-{steps}-{seed}"
    argv = [
        f"--run={run}",
        f"--init={config.init}",
        f"--data={rows_of(config, arm, seed)}",
        f"--steps={steps}",
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


class Difference(NamedTuple):
    """The gold of an arm without quality control less that of the filtered one, paired by seed."""

    mean: float
    half: float
    """Half of the 95 % interval of the mean."""
    p: float
    """The p-value of a two-sided paired t-test, corrected for both comparisons; nan below two
    seeds."""


def differences(results: Sequence[dict[str, Any]]) -> dict[str, Difference]:
    """Return the difference of each arm without quality control, over the seeds of both arms."""
    gold = {(line["arm"], line["seed"]): line["all"] for line in results}
    gaps = {}
    for name in list(ARMS)[1:]:
        gaps[name] = [
            gold[name, seed] - gold["filtered", seed]
            for arm, seed in gold
            if arm == name and ("filtered", seed) in gold
        ]
    if min(map(len, gaps.values())) < 2:
        corrected = np.full(len(gaps), np.nan)
    else:
        corrected = holm([float(stats.ttest_1samp(gap, 0.0).pvalue) for gap in gaps.values()])
    found = {}
    for (name, gap), p in zip(gaps.items(), corrected.tolist(), strict=True):
        found[name] = Difference(float(np.mean(gap)) if gap else float("nan"), half(gap), p)
    return found


def decision(found: dict[str, Difference]) -> str:
    """Return what becomes of the claim: held where both arms are below the filtered one, refuted
    where one is above it, by their corrected p; not supported else, and not run below two seeds.
    """
    if any(np.isnan(one.p) for one in found.values()):
        return "not run"
    if any(one.p < LEVEL and one.mean > 0 for one in found.values()):
        return "refuted"
    held = all(one.p < LEVEL and one.mean < 0 for one in found.values())
    return "held" if held else "not supported"


def setting_of(config: Config) -> dict[str, Any]:
    """Return what runs must share that are compared."""
    init = at_newest(config.init).sha256[:12]
    return {"share": config.share, "prompts": config.prompts, "init": init}


def read_results(config: Config) -> list[dict[str, Any]]:
    """Return the whole lines of --out; UserError where one is of another setting."""
    results = whole_lines(config.out)
    for name, value in setting_of(config).items():
        others = {line[name] for line in results} - {value}
        require(
            not others,
            f"--out={config.out}: has runs of another {name} ({others}, and now {value}); name "
            "another file, or the same",
        )
    return results


def main(config: Config) -> str:
    """Run what is left, and return the decision on all that there is."""
    results = read_results(config)
    done = {(line["arm"], line["seed"]) for line in results}
    out = pathlib.Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for seed in config.seeds:
        for name in ARMS:
            if (name, seed) in done:
                continue
            run = trained(config, name, seed)
            shares = judged(run, seed, config.prompts)
            line = {"arm": name, "seed": seed, **setting_of(config), **shares}
            results.append(line)
            append(config.out, [line])

    found = differences(results)
    print(f"{len(results)} runs ({', '.join(CRITERIA)} in {out})")
    for name, one in found.items():
        print(f"{name}: {one.mean:+.3f} ±{one.half:.3f} against filtered, p {one.p:.3f}")
    told = decision(found)
    print(f"more rows without quality control hurt: {told}")
    return told


if __name__ == "__main__":
    flags.run(main, Config)
