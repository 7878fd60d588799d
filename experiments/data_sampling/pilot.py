"""Try learning rates on a seed that the study does not use, side by side.

    python -m experiments.data_sampling.pilot

Writes a line a rate to pilot.jsonl: gold with all of the clean pool, and with a tenth at random.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json

import jax
import numpy as np

from experiments.data_sampling import pools
from experiments.data_sampling.court import make_court
from experiments.data_sampling.runs import (
    BATCH,
    HERE,
    Run,
    loaded,
    order_of_run,
    pool_of,
    settings,
    steps_of,
)
from experiments.data_sampling.runs import Config as StudyConfig
from experiments.data_sampling.side_by_side import make_step, stacked_batches, start
from model import Params
from runtime import flags
from runtime.writes import atomic_text
from sharding import MeshConfig, make_mesh

Line = dict[str, float | str]


@dataclasses.dataclass(frozen=True)
class Config:
    study: StudyConfig = StudyConfig()
    """As of experiments.data_sampling.runs."""
    rates: tuple[float, ...] = (3e-5, 6e-5, 1e-4, 2e-4, 4e-4)
    """Peak learning rates."""
    seed: int = 100
    """Seed of pool, order and held-out prompts."""
    out: str = str(HERE / "pilot.jsonl")
    """File to write."""


def trained(config: Config, run: Run) -> Params:
    """Train one run at all rates side by side; return their parameters, [rates, ...]."""
    study = config.study
    model = loaded(study.init)
    own = settings(run, model.config, study.pairs)
    longest = steps_of(run._replace(budget=100), study.pairs)
    parts = []
    for rate in config.rates:
        at_rate = dataclasses.replace(own.optimizer, lr=rate)
        own_at_rate = dataclasses.replace(own, optimizer=at_rate)
        parts.append(start(own_at_rate, model.params, 1, longest))
    states = jax.tree.map(lambda *x: np.concatenate(x), *parts)

    # The same rows in the same order for each rate.
    count = len(config.rates)
    rows = pool_of(study, run.pool, run.aligner, run.seed).rows
    order = order_of_run(study, run)
    step = make_step(own)
    for batch in stacked_batches([rows] * count, [order] * count):
        states, _ = step(states, batch)
    return states.params


def main(config: Config) -> list[Line]:
    """Try all rates by both aligners; write and return a line each."""
    make_mesh(MeshConfig(), jax.devices()[:1])
    study = config.study
    model = loaded(study.init)
    judge = make_court(model.config, model.tokenizer, study.prompts, pools.NEW_TOKENS)
    lines: list[Line] = []
    for aligner in BATCH:
        for budget, sampler in ((10, "random"), (100, "all")):
            run = Run("clean", aligner, sampler, budget, "own", config.seed)
            verdicts = judge(trained(config, run), [config.seed] * len(config.rates))
            for rate, verdict in zip(config.rates, verdicts, strict=True):
                line: Line = {
                    "aligner": aligner,
                    "budget": budget,
                    "rate": rate,
                    "gold": verdict.gold,
                }
                lines.append(line)
                print(line, flush=True)
    with atomic_text(config.out) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return lines


if __name__ == "__main__":
    flags.run(main, Config)
