"""Draw one metric of several runs over their steps, in one figure.

    python -m experiments.curves --runs=runs/less/all,runs/less/random --metric=gold/all \
        --out=runs/less/curves.svg
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib

from runtime import flags
from runtime.errors import UserError, require
from runtime.rows import read_rows


@dataclasses.dataclass(frozen=True)
class Config:
    runs: str = "runs/align/sft"
    """Folders of runs, parted by commas; a curve is called as its folder."""
    metric: str = "gold/all"
    """Name of the metric, as in metrics.jsonl."""
    share: bool = False
    """Draw over the share of each run's own steps, where these differ."""
    out: str = "runs/curves.svg"
    """File to write, .svg or .png."""


def series(run: str, metric: str) -> tuple[list[int], list[float]]:
    """Return the steps at which the run in folder `run` recorded `metric`, and its values."""
    path = pathlib.Path(run) / "metrics.jsonl"
    require(path.is_file(), f"{path}: missing; name the folder of a run")
    rows = read_rows(run)
    # A value that was not finite is null.
    known = [row for row in rows if row.get(metric) is not None]
    steps = [int(row["step"]) for row in known]
    values = [row[metric] for row in known]
    if not steps:
        # Those alone that a curve can be drawn of.
        names = sorted({name for row in rows for name in row if row[name] is not None})
        told = ", ".join(names) or "no rows"
        raise UserError(f"{path}: has no finite {metric}; it has {told}")
    return steps, values


class Series(NamedTuple):
    """Points of one curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float] | None = None
    """Half of each point's interval; None: points have none."""


def draw(
    curves: Sequence[Series], xlabel: str, ylabel: str, out: str, *, log: bool = False
) -> None:
    """Write a figure, .svg or .png, of curves; `log`: over the logarithm of x."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for points in curves:
        style: dict[str, Any] = {"marker": ".", "capsize": 2, "label": points.name}
        axes.errorbar(points.x, points.y, points.half, **style)
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    pyplot.close(figure)


def main(config: Config) -> dict[str, float]:
    """Write the figure; return the last value of each run's curve, by the run's folder."""
    require(config.out.endswith((".svg", ".png")), f"--out={config.out}: must end in .svg or .png")
    last = {}
    curves = []
    for run in config.runs.split(","):
        steps, values = series(run, config.metric)
        places: list[float] = [*steps]
        if config.share:
            places = [step / steps[-1] for step in steps]
        curves.append(Series(pathlib.Path(run).name, places, values))
        last[run] = values[-1]
    draw(curves, "share of the run's steps" if config.share else "step", config.metric, config.out)
    print(config.out)
    return last


if __name__ == "__main__":
    flags.run(main, Config)
