"""What the studies of this folder share: arms trained seed by seed, and how a claim is decided.

A study trains each of its arms on each seed, measures the runs, and keeps a line a run. What is
compared is paired by seed; a comparison is written so that the claim expects it to be above 0.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

import train_sft
from evaluation.gold import GoldRow, gold_rows, gold_shares, make_kl_sampler
from experiments.data_sampling.verdicts import holm
from experiments.seeds import half
from responses import load_run
from runtime import flags
from runtime.writes import atomic_text
from sampling import SamplingConfig
from tasks import world
from tasks.world_gold import Request

HERE = pathlib.Path(__file__).parent
STEPS = 200
"""Steps of an arm, unless a claim says otherwise."""
SEEDS = 5
"""Seeds that a claim is decided on, at least."""
LEVEL = 0.05
"""Chance of any false difference among the comparisons of a claim."""
HELD_OUT = 1000
"""Added to a run's seed: that of its held-out prompts."""
MAX_PROMPT = 32
MAX_NEW_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Config:
    init: str = "runs/data_sampling/lm"
    """Run of the pre-trained model."""
    work: str = "runs/instruct"
    """Folder of the rows and the runs."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds: of the rows, of their order, of the held-out prompts."""
    prompts: int = 1000
    """Held-out prompts that a run is judged by."""
    share: float = 1.0
    """Share of the rows and steps of each arm; less than 1 to try the study out."""


class Training(NamedTuple):
    """What an arm trains on with a seed."""

    data: str
    """As --data of train_sft.py has it."""
    steps: int = STEPS


Line = dict[str, Any]
Arm = Callable[[Config, int], Training]
"""Writes the rows of a seed, unless they are there."""
Measure = Callable[[Config, str, str, int], dict[str, Any]]
"""Measures an arm's run of a seed: what its line has beside arm and seed."""


class Comparison(NamedTuple):
    """Differences by seed that a claim expects to be above 0."""

    what: str
    gaps: list[float]


class Found(NamedTuple):
    """A comparison's outcome."""

    what: str
    seeds: int
    mean: float
    half: float
    """Half of the 95 % interval of the mean over seeds."""
    p: float
    """Of a two-sided paired t-test, corrected for all comparisons of the claim; nan below two
    seeds."""


class Study(NamedTuple):
    """A claim put to the test."""

    name: str
    """Of its file of results."""
    claim: str
    arms: Mapping[str, Arm]
    measure: Measure
    compare: Callable[[Sequence[Line]], list[Comparison]]
    decide: Callable[[Sequence[Found], Sequence[Line]], str]
    measures: tuple[str, ...]
    """Those that README.md has of each arm."""


# ---- Rows ----


def scaled(config: Config, count: float) -> int:
    """Return a number of rows or steps, by the share that is tried."""
    return max(1, round(config.share * count))


def kept_rows(config: Config, name: str, seed: int, rows: Iterable[tuple[str, str]]) -> str:
    """Write (prompt, response) rows as a file of conversations, unless it is there; return it."""
    path = pathlib.Path(config.work) / f"{name}-{config.share:g}-{seed}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_text(str(path)) as file:
            for prompt, response in rows:
                messages = [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": response},
                ]
                file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


# ---- Runs and what is measured of them ----


def trained(config: Config, run: str, training: Training, seed: int) -> str:
    """Fine-tune into the folder `run` of --work, to the end; return the run."""
    path = f"{config.work}/{run}"
    argv = [
        f"--run={path}",
        f"--init={config.init}",
        f"--data={training.data}",
        f"--steps={scaled(config, training.steps)}",
        f"--seed={seed}",
        "--eval_every=0",
    ]
    train_sft.main(flags.parse(train_sft.Config, argv))
    return path


def judged(
    run: str, requests: Sequence[Request], seed: int, prompts: Sequence[str] | None = None
) -> list[GoldRow]:
    """Return what the gold program says of a run's responses at temperature 1.

    `prompts`: what the run is shown of each request; None: its text.
    """
    if prompts is None:
        prompts = [request.text for request in requests]
    model, tokenizer, params = load_run(run)
    sampling = SamplingConfig(1.0, max_new_tokens=MAX_NEW_TOKENS)
    sample = make_kl_sampler(model, sampling, tokenizer, MAX_PROMPT)
    responses = sample(params, params, prompts, seed)
    return gold_rows(requests, [response.text for response in responses])


def held_out_requests(config: Config, seed: int) -> list[Request]:
    """Return the held-out requests that a run of `seed` is judged by."""
    prompts = range(config.prompts)
    return [world.prompt(i, split="heldout", seed=HELD_OUT + seed) for i in prompts]


def gold_of_run(config: Config, arm: str, run: str, seed: int) -> dict[str, float]:
    """Return the shares of held-out requests that pass each criterion, and all of them."""
    rows = judged(run, held_out_requests(config, seed), seed)
    return {name: interval.value for name, interval in gold_shares(rows).items()}


# ---- Results ----


def by_seed(results: Sequence[Line], arm: str, measure: str = "all") -> dict[int, float]:
    """Return an arm's measure by seed."""
    return {line["seed"]: line[measure] for line in results if line["arm"] == arm}


def paired(what: str, more: Mapping[int, float], less: Mapping[int, float]) -> Comparison:
    """Compare two arms over the seeds that both have: `more` less `less`."""
    return Comparison(what, [more[seed] - less[seed] for seed in more if seed in less])


def outcomes(comparisons: Sequence[Comparison]) -> list[Found]:
    """Return the mean, interval and corrected p of each comparison."""
    if min(len(one.gaps) for one in comparisons) < 2:
        corrected = np.full(len(comparisons), np.nan)
    else:
        corrected = holm([p_value(one.gaps) for one in comparisons])
    found = []
    for one, p in zip(comparisons, corrected.tolist(), strict=True):
        mean = float(np.mean(one.gaps)) if one.gaps else float("nan")
        found.append(Found(one.what, len(one.gaps), mean, half(one.gaps), p))
    return found


def p_value(gaps: Sequence[float]) -> float:
    """Return the p-value of a two-sided t-test against 0; 1 where no gap differs from it."""
    return float(stats.ttest_1samp(gaps, 0.0).pvalue) if any(gaps) else 1.0


def too_few(found: Sequence[Found]) -> str | None:
    """Return what is said of a claim that too few seeds have run; None for enough."""
    seeds = min(one.seeds for one in found)
    return None if seeds >= SEEDS else f"undecided: {seeds} of {SEEDS} seeds"


def all_above(found: Sequence[Found], results: Sequence[Line]) -> str:
    """Decide a claim that holds where every comparison is above 0.

    Held where each is, by its corrected p; refuted where one is below; not supported else.
    """
    undecided = too_few(found)
    if undecided:
        return undecided
    if any(one.p < LEVEL and one.mean < 0 for one in found):
        return "refuted"
    held = all(one.p < LEVEL and one.mean > 0 for one in found)
    return "held" if held else "not supported"


def told(found: Sequence[Found]) -> list[str]:
    """Return a line on each comparison."""
    lines = []
    for one in found:
        p = "p < 0.001" if one.p < 0.001 else f"p {one.p:.3f}"
        lines.append(f"{one.what}: {one.mean:+.3f} ±{one.half:.3f}, {p}")
    return lines
