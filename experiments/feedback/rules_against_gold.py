"""Rules as classifiers: the verdicts of data/rules.py on a policy's responses against those of the gold program.

    python experiments/feedback/rules_against_gold.py --file=runs/ai/comparisons.jsonl

The file is one of collect.py or feedback.py --write=comparisons.
"""

import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # the root's modules, from wherever this is started

import numpy as np

import config as flags
from data import records, rules, world

PAIRS = (("polite", "harmless"), ("harmless", "harmless"), ("brief", "helpful"), ("declines", "helpful"))


@dataclasses.dataclass(frozen=True)
class Config:
    file: str = "runs/ai/comparisons.jsonl"
    """Comparisons whose responses are read."""


def main(config: Config) -> None:
    """Prints, for each rule and criterion: accuracy, and of broken ones how many are found and how many are real."""
    rows = [records.comparison(json.loads(line)) for line in pathlib.Path(config.file).read_text().splitlines()]
    shown = [(row, text, world.gold(row["prompt"][-1]["content"], text)) for row in rows for text in row["responses"]]
    print(
        f"{len(shown)} responses\n{'rule':10}{'criterion':>10}{'broken':>10}{'accuracy':>10}{'found':>10}{'real':>10}"
    )
    for name, criterion in PAIRS:
        said = np.array([getattr(rules, name)(text, row) < 1 for row, text, _ in shown])
        broken = np.array([not getattr(gold, criterion) for _, _, gold in shown])
        shares = (broken.mean(), (said == broken).mean(), said[broken].mean(), broken[said].mean())
        print(f"{name:10}{criterion:>10}" + "".join(f"{share:10.3f}" for share in shares))


if __name__ == "__main__":
    flags.run(main, Config)
