"""Write docs/methods: a page for each method, an index, and a figure for each family.

    python -m experiments.methods.pages
    python -m experiments.methods.pages --out=runs/pages

Numbers come from results.jsonl, words and commands from methods.toml. No training curves were
recorded for this study, so the figures show final policies, one dot a method.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import io
import pathlib
import re
import tomllib
from typing import Any, NamedTuple

import numpy as np

from experiments.methods.table import COLOURS, FAMILIES, Rows, by_method, cell, mean, over, read
from experiments.methods.table import named as write_names
from experiments.methods.table import table as markdown_table
from experiments.seeds import half
from runtime import flags

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
NEAR = -0.1
"""The right panel of a figure shows the methods that gain more than this."""

Source = dict[str, str]
"""A method's entries in methods.toml: title, idea, equation, paper, needs, code, command; perhaps
notes, found and study."""


@dataclasses.dataclass(frozen=True)
class Config:
    out: str = str(ROOT / "docs" / "methods")
    """Folder that the pages are written into."""


class Point(NamedTuple):
    """A method in a figure, as the mean over its seeds."""

    gain: float
    """Share of prompts that pass all criteria, less that of SFT on the same seed."""
    interval: float
    """Half of the 95 % interval of the gain."""
    kl: float
    """KL to the SFT model, in nats a response."""


def sources() -> dict[str, Source]:
    """Read methods.toml: the entries of each method, in the order of the file."""
    return tomllib.loads((HERE / "methods.toml").read_text("utf-8"))


def family_of(method: str) -> str:
    """Name the family of a measured method; raise KeyError for one that the study has not run."""
    for family, methods in FAMILIES.items():
        if method in methods:
            return family
    raise KeyError(method)


def figure_name(family: str) -> str:
    """Name the figure's file of a family."""
    words = family.replace(",", "").lower().split()
    return "_".join(words) + ".svg"


# --- numbers


def points(rows: Rows) -> dict[str, Point]:
    """Return each method's point, but SFT's, by falling gain."""
    found = {}
    for method, by_seed in rows.items():
        if method == "sft":
            continue
        # Gains are of the same seed, so of the same SFT model and prompts.
        gains = [row["all"] - rows["sft"][seed]["all"] for seed, row in by_seed.items()]
        kls = [row["kl"] for row in by_seed.values()]
        gain = float(np.mean(gains))
        kl = float(np.mean(kls))
        found[method] = Point(gain, half(gains), kl)

    # The best first: the order of the ranking and of the figures' rows.
    return dict(sorted(found.items(), key=lambda item: -item[1].gain))


def total_flops(by_seed: dict[int, dict[str, Any]]) -> str:
    """Format the TFLOPs of training with those of the reward models, mean over seeds."""
    # Nothing is trained for best of n, and direct methods see no reward model.
    totals = {}
    for seed, row in by_seed.items():
        training = row.get("training_flops", 0.0)
        totals[seed] = {"total": training + row["reward_model_flops"]}
    return mean(totals, "total", 1e-12)


def numbers(rows: Rows, method: str) -> str:
    """Format what was measured of `method` as a table with a row a quantity."""
    by_seed = rows[method]
    lines = [
        # What the policy says.
        ["passes all criteria", cell(by_seed, "all")],
        ["helpful", cell(by_seed, "helpful")],
        ["honest", cell(by_seed, "honest")],
        ["harmless", cell(by_seed, "harmless")],
        # Beside others, on the same seeds.
        ["all criteria, over SFT", over(rows, method, "sft")],
        ["all criteria, over PPO", over(rows, method, "ppo")],
        ["KL to SFT, nats per response", cell(by_seed, "kl", 2)],
        ["length, tokens", cell(by_seed, "length", 1)],
        # What it costs.
        ["training, TFLOPs", mean(by_seed, "training_flops", 1e-12)],
        ["with the reward models' training, TFLOPs", total_flops(by_seed)],
        ["an answer, MFLOPs", mean(by_seed, "response_flops", 1e-6, 0)],
        ["training, CPU seconds", cell(by_seed, "cpu_seconds", 0)],
        ["seeds", ", ".join(map(str, by_seed))],
    ]
    # Where no row has a quantity its cell is empty.
    measured = [line for line in lines if line[1]]
    return markdown_table(["measured", "mean over seeds, 95 % interval"], measured)


# --- figures


def draw(found: dict[str, Point], family: str, path: pathlib.Path) -> None:
    """Write the figure of `family`: gains of all methods, gain against KL; its own in colour."""
    import matplotlib
    from matplotlib.figure import Figure

    # The family in its colour, all others grey.
    colours = {}
    for method in found:
        colours[method] = COLOURS[family] if family_of(method) == family else "silver"

    # Text stays text, and neither date nor random names enter: the same input, the same file.
    # SVG has 72 dots an inch, which the placing of names goes by.
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": family,
        "font.size": 8,
        "font.sans-serif": ["DejaVu Sans"],
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(10, 5.5), layout="constrained", dpi=72)
        left, right = figure.subplots(1, 2)
        draw_gains(left, found, colours)
        draw_frontier(right, found, colours)
        # Names of the family's points alone: those of all would overlap.
        own = {}
        for method, point in found.items():
            if colours[method] != "silver" and point.gain > NEAR:
                own[method] = [point.kl, point.gain]
        write_names(right, own, colours)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    path.write_text(compact(text.getvalue()), "utf-8")


def compact(svg: str) -> str:
    """Shorten an SVG file to a third: no metadata and comments, coordinates with one decimal."""
    # The order matters: ids go before the styles, and blank lines last.
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<!DOCTYPE.*?>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number.group()):.1f}", svg)
    svg = re.sub(r' id="(text|line2d|patch|[xy]tick)_\d+"', "", svg)
    svg = re.sub(r"; (stroke-width: 0\.\d|stroke-linejoin: miter|stroke-linecap: \w+)", "", svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip() + "\n"


def draw_gains(axes: Any, found: dict[str, Point], colours: dict[str, str]) -> None:
    """Draw a row a method: its gain over SFT with its interval, the best on top."""
    # A line from end to end of each interval, a dot at the mean.
    places = np.arange(len(found))
    gains = [point.gain for point in found.values()]
    intervals = [point.interval for point in found.values()]
    axes.hlines(
        places,
        np.subtract(gains, intervals),
        np.add(gains, intervals),
        colors=list(colours.values()),
    )
    axes.scatter(gains, places, s=12, c=list(colours.values()))
    axes.axvline(0.0, color="black", linewidth=0.5)
    # Names of methods in place of ticks.
    axes.set_yticks(places, list(found), fontsize=7)
    axes.tick_params(axis="y", length=0)
    for label, colour in zip(axes.get_yticklabels(), colours.values(), strict=True):
        label.set_color("grey" if colour == "silver" else colour)
    axes.invert_yaxis()
    axes.set_xlabel("gain over SFT, all criteria")
    axes.spines[["top", "right"]].set_visible(False)


def draw_frontier(axes: Any, found: dict[str, Point], colours: dict[str, str]) -> None:
    """Draw gain against KL, KL on a logarithmic axis; methods that lose much are left out."""
    shown = {method: point for method, point in found.items() if point.gain > NEAR}
    kls = [point.kl for point in shown.values()]
    gains = [point.gain for point in shown.values()]
    axes.scatter(kls, gains, s=16, c=[colours[method] for method in shown])
    axes.set_xscale("log")
    axes.set_xticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    axes.minorticks_off()
    axes.set_xlabel("KL to the SFT model, nats per response")
    axes.set_ylabel("gain over SFT")
    axes.spines[["top", "right"]].set_visible(False)


# --- pages


def page(method: str, source: Source, rows: Rows) -> str:
    """Write the page of `method` as Markdown."""
    # What it is, and how to run it.
    facts = [f"- {name.title()}: {source[name]}." for name in ("paper", "needs", "code")]
    parts = [
        f"# {source['title']}",
        source["idea"],
        indented(source["equation"]),
        "\n".join(facts),
        "## Command",
        indented(source["command"]),
    ]
    if "notes" in source:
        parts.append(joined(source["notes"]))

    # What came of it: numbers, words, figure, and the study if it is another one.
    parts.append("## What was found")
    if method in rows:
        parts.append(
            "In the built-in world, from the same SFT model and comparisons as all others, on "
            "1,000 fresh prompts per seed (`experiments/methods/run.py`):"
        )
        parts.append(numbers(rows, method).strip())
    if "found" in source:
        parts.append(joined(source["found"]))
    if method in rows and method != "sft":
        parts.append(figure_text(method, rows))
    if "study" in source:
        parts.append(source["study"])
    parts.append("[All methods](README.md)")
    return "\n\n".join(parts) + "\n"


def figure_text(method: str, rows: Rows) -> str:
    """Write the line that shows the figure of the method's family, and says what it shows."""
    family = family_of(method)
    text = (
        f"![gain over SFT, and gain against KL]({figure_name(family)})\n\n"
        f"Final policies, means over seeds; in colour: {family}. "
        "No training curves were recorded in this study."
    )
    gain, _, kl = points(rows)[method]
    if gain <= NEAR:
        text += (
            f" Not in the right panel: {method}, with a gain of {gain:.2f} at a KL of {kl:.0f}."
        )
    return text


def indented(text: str) -> str:
    """Format lines as a Markdown code block."""
    return "\n".join(f"    {line}" for line in text.strip().splitlines())


def joined(text: str) -> str:
    """Join the wrapped lines of each paragraph; code blocks keep theirs."""
    paragraphs = []
    for paragraph in text.strip("\n").split("\n\n"):
        is_code = paragraph.startswith("    ")
        paragraphs.append(paragraph if is_code else " ".join(paragraph.split("\n")))
    return "\n\n".join(paragraphs)


def index(texts: dict[str, Source], rows: Rows) -> str:
    """Write the index: the ranking of measured methods, then the others."""
    # Measured methods, by their gain.
    ranked = []
    for method, point in points(rows).items():
        ranked.append(
            [
                f"[{method}]({method}.md)",
                family_of(method),
                f"{point.gain:+.3f} ±{point.interval:.3f}",
                cell(rows[method], "all"),
                f"{point.kl:.2f}",
                total_flops(rows[method]),
                texts[method]["needs"],
            ]
        )
    head = ["method", "family", "gain over SFT", "all criteria", "KL", "TFLOPs", "needs"]
    # The others, in the order of methods.toml.
    others = []
    for method, source in texts.items():
        if method not in rows:
            others.append([f"[{method}]({method}.md)", source["title"], source["needs"]])
    parts = [
        "# Methods",
        "One page per method: what it does, its equation and paper, what it needs, the command, "
        "and what was found. Written by `python -m experiments.methods.pages` from "
        "`experiments/methods/results.jsonl` and `methods.toml`: edit those, not these pages. "
        "How the comparison was made: [experiments/methods](../../experiments/methods/README.md).",
        "## Ranking",
        "Gain in the share of 1,000 held-out prompts of the built-in world that pass all three "
        "criteria, over the [SFT](sft.md) model that each starts from; about the same training "
        "FLOPs each; means over five to seven seeds with 95 % intervals (Student's t). KL to SFT "
        "is in nats per response; TFLOPs include the training of the reward models. A difference "
        "within its interval counts as none.",
        markdown_table(head, ranked).strip(),
        "## Methods outside the comparison",
        "They use other data or another starting point, or go with any method.",
        markdown_table(["page", "method", "needs"], others).strip(),
        "## Notation",
        "`x` is a prompt and `y` a response; `y_w` is the chosen one and `y_l` the rejected one. "
        "`pi` is the policy, `pi_old` the policy that sampled, `pi_ref` the reference. `r` is a "
        "reward. `logp(y)` is the log-probability of a whole response in nats; where a loss says "
        "so, its mean per token. The mathematics is in `objectives/`, each function with its "
        "paper.",
    ]
    return "\n\n".join(parts) + "\n"


def main(config: Config) -> None:
    """Write all pages and figures into `config.out`; pages there are overwritten."""
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = by_method(read("results.jsonl"))
    texts = sources()

    # A page for every method of methods.toml, measured or not.
    for method, source in texts.items():
        (out / f"{method}.md").write_text(page(method, source, rows), "utf-8")
    (out / "README.md").write_text(index(texts, rows), "utf-8")
    # SFT is what all are measured against, and has no figure.
    for family in FAMILIES:
        if family != "SFT":
            draw(points(rows), family, out / figure_name(family))
    print(f"{len(texts)} pages: {out}")


if __name__ == "__main__":
    flags.run(main, Config)
