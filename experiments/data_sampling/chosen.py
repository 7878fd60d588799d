"""Count how many of the rows that a sampler chooses for KTO are desirable; half of the pool are.

    python -m experiments.data_sampling.chosen

Writes a line a sampler, budget and seed to chosen.jsonl. Nothing is trained.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json

import jax
import numpy as np

from experiments.data_sampling import pools
from experiments.data_sampling.runs import BUDGETS, HERE, SEEDS, Run, pool_of, rows_of, seen_of
from experiments.data_sampling.runs import Config as StudyConfig
from runtime import flags
from runtime.writes import atomic_text
from sharding import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Config:
    study: StudyConfig = StudyConfig()
    """As of experiments.data_sampling.runs."""
    samplers: tuple[str, ...] = ("random", "isa_A", "isa_B", "isa_D")
    """Names of pools.SAMPLERS."""
    pool: str = "clean"
    """Name of pools.POOLS."""
    seeds: int = SEEDS
    """Pools looked at, of the first seeds."""
    out: str = str(HERE / "chosen.jsonl")
    """File to write."""


def main(config: Config) -> list[dict[str, str | float]]:
    """Choose, count, write; return the lines."""
    make_mesh(MeshConfig(), jax.devices()[:1])
    study = config.study
    lines: list[dict[str, str | float]] = []
    for seed in range(config.seeds):
        # Rank 1 is desirable.
        is_desirable_N = pool_of(study, config.pool, "kto", seed).rows["ranks_BC"][:, 0] == 1
        for sampler in config.samplers:
            seen = seen_of(study, config.pool, "kto", sampler, seed)
            for budget in BUDGETS[:-1]:
                run = Run(config.pool, "kto", sampler, budget, "own", seed)
                chosen = pools.choose(seen, rows_of(run, study.pairs))
                share = float(np.mean(is_desirable_N[chosen]))
                line = {"sampler": sampler, "budget": budget, "seed": seed, "desirable": share}
                lines.append(line)
    with atomic_text(config.out) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    print(f"{config.out}: {len(lines)} choices")
    return lines


if __name__ == "__main__":
    flags.run(main, Config)
