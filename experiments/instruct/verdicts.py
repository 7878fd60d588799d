"""Write the tables and verdicts of README.md from the results of the studies.

python -m experiments.instruct.verdicts
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import pathlib
from collections.abc import Sequence

from experiments.data_sampling.runs import whole_lines
from experiments.data_sampling.verdicts import cell_of
from experiments.instruct.run import STUDIES
from experiments.instruct.study import HERE, Line, Study, by_seed, outcomes, told
from experiments.methods.table import table
from runtime import flags
from runtime.writes import atomic_text

MARK = "<!-- written by python -m experiments.instruct.verdicts -->"
"""What stands below it in README.md is written by this."""


@dataclasses.dataclass(frozen=True)
class Config:
    results: str = str(HERE)
    """Folder of the studies' results."""
    readme: str = str(HERE / "README.md")
    """Page whose end is written."""


def arms_table(study: Study, results: Sequence[Line]) -> str:
    """Tabulate a study's arms by their measures, means over seeds."""
    rows = []
    for arm in study.arms:
        own = [list(by_seed(results, arm, measure).values()) for measure in study.measures]
        rows.append([arm, str(len(own[0])), *map(cell_of, own)])
    return table(["arm", "seeds", *study.measures], rows).strip()


def section(study: Study, folder: str) -> str:
    """Return what README.md says of one study: its verdict, its comparisons, its arms."""
    results = whole_lines(str(pathlib.Path(folder) / f"{study.name}.jsonl"))
    if not results:
        return f"### {study.claim}: not run\n"
    found = outcomes(study.compare(results))
    compared = "\n".join(f"- {line}" for line in told(found))
    decision = study.decide(found, results)
    return f"### {study.claim}: {decision}\n\n{arms_table(study, results)}\n\n{compared}\n"


def main(config: Config) -> None:
    """Write README.md's end."""
    page = pathlib.Path(config.readme).read_text()
    beginning, mark, _ = page.partition(MARK)
    sections = [section(study, config.results) for study in STUDIES]
    with atomic_text(config.readme) as file:
        file.write("\n".join([f"{beginning}{mark}\n", *sections]))


if __name__ == "__main__":
    flags.run(main, Config)
