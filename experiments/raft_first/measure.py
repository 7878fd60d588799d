"""How soon PPO reaches a gold share from the SFT policy and from RAFT's: prints both curves, writes summary.json.

python experiments/raft_first/measure.py --run=runs/raft_first
"""

import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # the root's modules, from wherever this is started

import config as flags
from metrics import read_rows

STARTS = ("sft", "raft")


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/raft_first"
    """What run.sh made."""
    targets: tuple[float, ...] = (0.75, 0.8, 0.85)
    """Shares of the evaluation's prompts that pass all criteria."""


def main(config: Config) -> dict[str, dict[str, int | None]]:
    """Start -> target -> the first evaluated iteration at or above it; None where there is none."""
    table: dict[str, dict[str, int | None]] = {}
    for start in STARTS:
        rows = read_rows(f"{config.run}/from_{start}")
        curve = {row["step"]: row["gold/all"] for row in rows if "gold/all" in row}
        print(f"from {start:5}" + " ".join(f"{step}: {x:.3f}" for step, x in curve.items()))
        table[start] = {str(x): next((step for step, y in curve.items() if y >= x), None) for x in config.targets}
    print(table)
    (pathlib.Path(config.run) / "summary.json").write_text(json.dumps(table, indent=1) + "\n")
    return table


if __name__ == "__main__":
    flags.run(main, Config)
