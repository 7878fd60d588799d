"""Run the studies of this folder: a line a run, and the decision on each claim.

    python -m experiments.instruct.run                    # all that is left
    python -m experiments.instruct.run --study=few_good   # of one study

What the files of results have is not run again: stop and start it at will.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import pathlib
from typing import Any, Literal

from experiments.data_sampling.runs import append, init_sum, whole_lines
from experiments.instruct import descriptions, families, few_good, kinds, quality, replay
from experiments.instruct.study import HERE, Line, Study, outcomes, told, trained
from experiments.instruct.study import Config as StudyConfig
from runtime import flags
from runtime.errors import require

STUDIES = (
    families.STUDY,
    descriptions.STUDY,
    few_good.STUDY,
    quality.STUDY,
    kinds.STUDY,
    replay.STUDY,
)


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    study: Literal["all", "families", "descriptions", "few_good", "quality", "kinds", "replay"] = (
        "all"
    )
    """The study that is run."""
    out: str = str(HERE)
    """Folder of the files of results, one a study; the runs that they have are not run again."""


def setting_of(config: Config) -> dict[str, Any]:
    """Return what runs must share that are compared."""
    return {"share": config.share, "prompts": config.prompts, "init": init_sum(config.init)}


def results_file(config: Config, name: str) -> pathlib.Path:
    """Return the file that has a study's lines."""
    return pathlib.Path(config.out) / f"{name}.jsonl"


def read_results(config: Config, name: str) -> list[Line]:
    """Return the whole lines of a study; UserError where one is of another setting."""
    path = results_file(config, name)
    results = whole_lines(str(path))
    for setting, value in setting_of(config).items():
        others = {line[setting] for line in results} - {value}
        require(
            not others,
            f"{path}: has runs of another {setting} ({others}, and now {value}); name another "
            "folder by --out, or the same setting",
        )
    return results


def run_study(config: Config, study: Study) -> str:
    """Run what is left of a study; print and return the decision on all that there is."""
    results = read_results(config, study.name)
    done = {(line["arm"], line["seed"]) for line in results}
    out = results_file(config, study.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    for seed in config.seeds:
        for name, arm in study.arms.items():
            if (name, seed) in done:
                continue
            words = name.replace(",", "").replace(" %", "").replace(" ", "-")
            run = f"{study.name}-{words}-{config.share:g}-{seed}"
            run = trained(config, run, arm(config, seed), seed)
            measured = study.measure(config, name, run, seed)
            line = {"arm": name, "seed": seed, **setting_of(config), **measured}
            results.append(line)
            append(str(out), [line])

    found = outcomes(study.compare(results))
    decision = study.decide(found, results)
    print(f"{len(results)} runs in {out}")
    for line in told(found):
        print(line)
    print(f"{study.claim}: {decision}")
    return decision


def main(config: Config) -> dict[str, str]:
    """Run what is left; return the decision on each study that was asked for."""
    chosen = [one for one in STUDIES if config.study in ("all", one.name)]
    return {one.name: run_study(config, one) for one in chosen}


if __name__ == "__main__":
    flags.run(main, Config)
