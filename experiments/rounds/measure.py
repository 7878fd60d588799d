"""Measure the reward models of two rounds on pairs sampled from the policy of each.

Prints the accuracies and writes summary.json.

    python -m experiments.rounds.measure --align=runs/align --run=runs/rounds
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import pathlib

from data.sources import open_source
from evaluation.reward_model import make_comparison_evaluation
from responses import load_run
from runtime import flags
from sharding import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Config:
    align: str = "runs/align"
    """Run of `make align`."""
    run: str = "runs/rounds"
    """Folder that run.sh made of it."""
    length: int = 32
    """As of train_rm.py."""


def main(config: Config) -> dict[str, dict[str, float]]:
    """Return reward model -> policy -> accuracy on held-out pairs without label noise."""
    make_mesh(MeshConfig())
    models = {
        "first round": f"{config.align}/round1/rm",
        "second, both rounds' comparisons": f"{config.align}/rm",
        "second, its own comparisons alone": f"{config.run}/rm",
    }
    pairs = {
        "SFT's": f"{config.align}/held_out.jsonl",
        "the first PPO's": f"{config.run}/pairs.jsonl",
    }
    table = {}
    for name, run in models.items():
        model, tokenizer, params = load_run(run, reward=True)
        table[name] = {}
        for policy, path in pairs.items():
            source = open_source(path, "comparison", "all")
            evaluate = make_comparison_evaluation(
                model, source, tokenizer, config.length, len(source)
            )
            table[name][policy] = evaluate(params)["eval/accuracy"]
        print(
            f"{name:34} "
            + ", ".join(f"{policy} pairs {x:.3f}" for policy, x in table[name].items())
        )
    (pathlib.Path(config.run) / "summary.json").write_text(json.dumps(table, indent=1) + "\n")
    return table


if __name__ == "__main__":
    flags.run(main, Config)
