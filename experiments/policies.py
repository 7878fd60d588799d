"""Compare policies by the gold program: shares, KL to the first, FLOPs of a token.

    python -m experiments.policies --runs runs/align/ppo runs/distill/distilled --out=distill.json

Prints them and writes JSON.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import pathlib
from typing import Any

from evaluation.gold import CRITERIA, gold_rows, make_kl_sampler, summarise
from planning.programs import forward_flops
from responses import load_run
from runtime import flags
from runtime.errors import UserError
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks import world

MAX_PROMPT, MAX_NEW = 32, 24  # as evaluate.py


@dataclasses.dataclass(frozen=True)
class Config:
    runs: tuple[str, ...] = ("runs/align/sft", "runs/align/ppo")
    """Policies; KL and FLOPs are beside the first."""
    out: str = "runs/policies.json"
    """File to write."""
    n: int = 1000
    """Held-out prompts."""
    seed: int = 1000
    """Seed of the prompts and of sampling."""


def main(config: Config) -> dict[str, dict[str, Any]]:
    """Measure all runs; return, by the name of a run's folder, its numbers.

    They are gold shares with intervals, KL to the first, and FLOPs as a share of the first's.
    """
    names = [pathlib.Path(run).name for run in config.runs]
    if len(set(names)) < len(names) or not names:
        raise UserError(
            f"--runs: {', '.join(names)}; give at least one, in folders of different names"
        )
    make_mesh(MeshConfig())
    requests = [world.prompt(i, split="heldout", seed=config.seed) for i in range(config.n)]
    shape, first_tokenizer, first = load_run(config.runs[0])
    table = {}
    columns = "".join(f"{column:>10}" for column in (*CRITERIA, "dangerous"))
    print(f"{'':16}{columns}{'KL':>9}{'FLOPs':>9}")
    for name, run in zip(names, config.runs, strict=True):
        model, tokenizer, params = load_run(run)
        if tokenizer.sha256 != first_tokenizer.sha256:
            raise UserError(
                f"{run}: its tokenizer is not that of {config.runs[0]}; measure them apart"
            )
        sampling = SamplingConfig(1.0, max_new_tokens=MAX_NEW)
        measure = make_kl_sampler(model, sampling, tokenizer, MAX_PROMPT, reference=shape)
        texts, lengths, kls = zip(
            *measure(params, first, [r.text for r in requests], config.seed), strict=True
        )
        table[name] = summarise(gold_rows(requests, texts), lengths, kls)
        length = MAX_PROMPT + MAX_NEW
        table[name]["flops"] = forward_flops(model, 1, length, length) / forward_flops(
            shape, 1, length, length
        )
        shares = [
            *(table[name][criterion] for criterion in CRITERIA),
            table[name]["kinds"]["dangerous"]["all"],
        ]
        rest = f"{table[name]['kl']:>z9.2f}{table[name]['flops']:9.2f}"
        print(f"{name:16}" + "".join(f"{share:10.3f}" for share in shares) + rest)
    pathlib.Path(config.out).write_text(json.dumps(table, indent=1) + "\n")
    return table


if __name__ == "__main__":
    flags.run(main, Config)
