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


Curve = dict[int, dict[str, Any]]
"""{step: its row of metrics}, of the steps with a gold evaluation, in order."""


def curve_of(run: str) -> Curve:
    """Read the gold evaluations of a run."""
    curve = {}
    for row in read_rows(run):
        if "gold/all" in row:
            curve[row["step"]] = row
    return curve


def first_step(curve: Curve, target: float) -> int | None:
    """Return the first step at which the share `target` passes; None where it never does."""
    for step, row in curve.items():
        if row["gold/all"] >= target:
            return step
    return None


def most_within(curve: Curve, limit: float) -> float | None:
    """Return the most that passes at a KL of at most `limit`; None where no step has so little."""
    shares = [row["gold/all"] for row in curve.values() if row["gold/kl"] <= limit]
    return max(shares, default=None)


def show(curves: dict[str, Curve]) -> None:
    """Print all runs' shares and KL, a line a step."""
    head = "".join(f"{name:>16}" for name in curves)
    print(f"share (KL to where it began)\nstep {head}")
    for step in sorted(set().union(*curves.values())):
        cells = []
        for curve in curves.values():
            row = curve.get(step)
            cells.append(f"{row['gold/all']:.3f} ({row['gold/kl']:.2f})" if row else "")
        line = "".join(f"{cell:>16}" for cell in cells)
        print(f"{step:4} {line}")


def main(config: Config) -> dict[str, Any]:
    """Find each run's first step at or above each target; return and print what was found.

    For the runs from SFT it also finds the most that passes within each limit of KL.
    """
    curves = {}
    for name in ("from_sft", "from_raft", "raft"):
        run = f"{config.run}/{name}"
        curves[name] = curve_of(run)
        require(
            bool(curves[name]),
            f"{run}: has no metrics of gold; name the folder that run.sh made",
        )
    show(curves)

    # How soon each share is reached.
    reached = {}
    for name, curve in curves.items():
        reached[name] = {str(target): first_step(curve, target) for target in config.targets}
        print(f"{name}: first step at a share {reached[name]}")

    # How much passes at which KL; PPO from RAFT has its KL to RAFT's policy.
    within = {}
    for name in ("from_sft", "raft"):
        within[name] = {str(limit): most_within(curves[name], limit) for limit in config.limits}
        rounded = {limit: x and round(x, 3) for limit, x in within[name].items()}
        print(f"{name}: most within a KL {rounded}")
    found = {"reached": reached, "within": within}
    summary = pathlib.Path(config.run) / "summary.json"
    summary.write_text(json.dumps(found) + "\n")
    return found


if __name__ == "__main__":
    flags.run(main, Config)
