"""Measure how soon PPO reaches a gold share from the SFT policy and from RAFT's.

And what PPO and RAFT reach at which KL.

    python -m experiments.raft_first.measure --run=runs/raft_first

Prints the curves, of the runs' own evaluations, and writes summary.json.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import pathlib
from typing import Any

from runtime import flags
from runtime.errors import require
from runtime.rows import read_rows


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/raft_first"
    """Folder that run.sh made."""
    targets: tuple[float, ...] = (0.75, 0.8, 0.85)
    """Shares of the evaluation's prompts that pass all criteria."""
    limits: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    """Limits of the KL to the SFT policy, in nats a response."""


def main(config: Config) -> dict[str, Any]:
    """Find each run's first step at or above each target; return and print what was found.

    For the runs from SFT it also finds the most that passes within each limit of KL.
    """
    curves = {}
    for name in ("from_sft", "from_raft", "raft"):
        curves[name] = {
            row["step"]: row for row in read_rows(f"{config.run}/{name}") if "gold/all" in row
        }
        require(
            bool(curves[name]),
            f"{config.run}/{name}: has no metrics of gold; name the folder that run.sh made",
        )
    reached = {
        name: {
            str(target): next(
                (step for step, row in curve.items() if row["gold/all"] >= target), None
            )
            for target in config.targets
        }
        for name, curve in curves.items()
    }
    within = {
        name: {
            str(most): max(
                (row["gold/all"] for row in curves[name].values() if row["gold/kl"] <= most),
                default=None,
            )
            for most in config.limits
        }
        for name in ("from_sft", "raft")
    }
    print("share (KL to where it began)\nstep " + "".join(f"{name:>16}" for name in curves))
    for step in sorted(set().union(*curves.values())):
        rows = (curve.get(step) for curve in curves.values())
        cells = (f"{row['gold/all']:.3f} ({row['gold/kl']:.2f})" if row else "" for row in rows)
        print(f"{step:4} " + "".join(f"{cell:>16}" for cell in cells))
    for name in curves:
        print(f"{name}: first step at a share {reached[name]}")
    for name in within:
        rounded = {most: x and round(x, 3) for most, x in within[name].items()}
        print(f"{name}: most within a KL {rounded}")
    (pathlib.Path(config.run) / "summary.json").write_text(
        json.dumps({"reached": reached, "within": within}) + "\n"
    )
    return {"reached": reached, "within": within}


if __name__ == "__main__":
    flags.run(main, Config)
