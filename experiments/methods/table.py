"""Write the tables and the plot of the study into README.md and frontier.png.

They are made from results.jsonl, tuning.jsonl and memory.json.

    python -m experiments.methods.table
"""

import collections
import itertools
import json
import pathlib
from typing import Any

import numpy as np

from experiments.seeds import half

HERE = pathlib.Path(__file__).parent
GAIN = 0.20
DIRECT = (
    "dpo",
    "cdpo",
    "robust_dpo",
    "ipo",
    "slic",
    "kto",
    "orpo",
    "simpo",
    "cpo",
    "slic_hf",
    "rrhf",
    "contrastive",
)
DIRECT += ("unlikelihood", "figa", "hindsight")
FAMILIES = {
    "SFT": ("sft",),
    "best of n at inference": ("best_of_16",),
    "PPO": ("ppo",),
    "direct, without a reward model": DIRECT,
    "online, without a critic": (
        "grpo",
        "rloo",
        "dr_grpo",
        "dapo",
        "gspo",
        "reinforce_pp",
        "online_dpo",
        "gated",
        "rules",
    ),
    "sample, rank, imitate": ("raft", "rejection", "expert", "quark"),
}
COLOURS = dict(
    zip(
        FAMILIES,
        ("black", "dimgrey", "tab:red", "tab:blue", "tab:green", "tab:orange"),
        strict=True,
    )
)
UPPER = 0.7
"""The plot's second panel shows the shares above this."""
MUST = ("dpo", "kto", "grpo", "rloo", "raft", "best_of_16", "ppo")

Rows = dict[str, dict[int, dict[str, Any]]]


def read(name: str) -> list[dict[str, Any]]:
    """Read a file of JSON Lines beside this one."""
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def by_method(rows: list[dict[str, Any]]) -> Rows:
    """Return method -> seed -> row, in the order of FAMILIES."""
    # The methods in their order, then those that have rows, by seed.
    found: Rows = {method: {} for names in FAMILIES.values() for method in names}
    for row in rows:
        if row["method"] in found:
            found[row["method"]][row["seed"]] = row
    return {method: dict(sorted(of_seed.items())) for method, of_seed in found.items() if of_seed}


def over(rows: Rows, method: str, other: str) -> str:
    """Return how much more of `method` passes everything than of `other`.

    It is the mean over the seeds that both have, with half of its interval; empty without any.
    """
    common = [] if method == other else rows[method].keys() & rows[other].keys()
    gaps = [rows[method][seed]["all"] - rows[other][seed]["all"] for seed in common]
    if not gaps:
        return ""
    spread = f" ±{half(gaps):.3f}" if len(gaps) > 1 else ""
    return f"{np.mean(gaps):+.3f}{spread}"


def mean(
    of_seed: dict[int, dict[str, Any]], name: str, scale: float = 1.0, digits: int = 1
) -> str:
    """Return the mean over seeds of what differs between them by rounding only, times `scale`."""
    values = [row[name] * scale for row in of_seed.values() if row.get(name)]
    return f"{np.mean(values):.{digits}f}" if values else ""


def cell(of_seed: dict[int, dict[str, Any]], name: str, digits: int = 3) -> str:
    """Return the mean over seeds, with half of its interval if there are several; or nothing."""
    values = [row[name] for row in of_seed.values() if name in row]
    if not values:
        return ""
    spread = f" ±{half(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):z.{digits}f}{spread}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, a line a row."""
    rule = ["---"] * len(head)
    text = ""
    for cells in (head, rule, *rows):
        joined = " | ".join(cells)
        text += f"| {joined} |\n"
    return text


def quality(rows: Rows) -> str:
    """Tabulate shares, KL and length, and which of MUST gain what is asked for."""
    lines = []
    verdicts = []
    for method, of_seed in rows.items():
        # The gain of each seed over SFT, which itself has none.
        gains = []
        if method != "sft":
            gains = [row["all"] - rows["sft"][seed]["all"] for seed, row in of_seed.items()]
        seeds = ", ".join(map(str, of_seed))
        shares = [cell(of_seed, name) for name in ("all", "helpful", "honest", "harmless")]
        by_seed = ", ".join(f"{gain:+.3f}" for gain in gains)
        against = [over(rows, method, "sft"), by_seed, over(rows, method, "ppo")]
        shown = [cell(of_seed, "kl", 2), cell(of_seed, "length", 1)]
        lines.append([method, seeds, *shares, *against, *shown])
        if method in MUST:
            # Rounded: 0.6 - 0.4 is a little below 0.2.
            reached = sum(round(gain, 9) >= GAIN for gain in gains)
            verdicts.append(f"{method} {reached} of {len(gains)}")
    head = ["method", "seeds", "all", "helpful", "honest", "harmless"]
    head += ["over SFT", "by seed", "over PPO", "KL", "tokens"]
    return table(head, lines) + f"\nSeeds that gain {GAIN:.2f} or more: {', '.join(verdicts)}.\n"


def kinds(rows: Rows) -> str:
    """Tabulate the share that passes everything by kind of request, mean over seeds."""
    # The kinds are those of any row.
    any_row, *_ = rows["sft"].values()
    names = list(any_row["kinds"])
    lines = []
    for method, of_seed in rows.items():
        line = [method]
        for name in names:
            shares = [row["kinds"][name]["all"] for row in of_seed.values()]
            line.append(f"{np.mean(shares):.2f}")
        lines.append(line)
    head = ["all criteria, by kind", *(name.replace("_", " ") for name in names)]
    return table(head, lines)


def cost(rows: Rows) -> str:
    """Tabulate FLOPs, CPU seconds and memory."""
    lines = []
    for method, of_seed in rows.items():
        # With what the reward models of the seed took.
        totals = {}
        for seed, row in of_seed.items():
            total = row.get("training_flops", 0.0) + row["reward_model_flops"]
            totals[seed] = {"total": total}
        lines.append(
            [
                method,
                mean(of_seed, "training_flops", 1e-12),
                mean(totals, "total", 1e-12),
                mean(of_seed, "response_flops", 1e-6, 0),
                cell(of_seed, "cpu_seconds", 0),
                cell(of_seed, "peak_mb", 0),
            ]
        )
    head = [
        "method",
        "training, TFLOPs",
        "with the reward models'",
        "an answer, MFLOPs",
        "CPU seconds",
        "peak, MB",
    ]
    return table(head, lines)


def tuning() -> str:
    """Tabulate the settings that were tried, by method."""
    rows = sorted(read("tuning.jsonl"), key=lambda row: row["method"])
    lines = []
    for row in rows:
        flags = f"`{row['flags']}`"
        lines.append([row["method"], flags, f"{row['all']:.3f}", f"{row['kl']:.2f}"])
    counts = collections.Counter(row["method"] for row in rows)
    told = ", ".join(f"{method} {count}" for method, count in counts.items())
    tried = table(["method", "flags", "all", "KL"], lines)
    return f"{tried}\n{len(rows)} configurations: {told}.\n"


def memory() -> str:
    """Tabulate what memory.py has written, if it has."""
    path = HERE / "memory.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    lines = []
    for name, row in rows.items():
        lines.append([name, f"{row['cpu_seconds']:.1f}", f"{row['peak_mb']:.0f}"])
    return table(["32 million parameters", "CPU seconds a step", "peak, MB"], lines)


def named(axes: Any, points: dict[str, list[float]], colours: dict[str, str]) -> None:
    """Write each name into the nearest free place around its point, with a line to it."""
    # Settle the layout, so that data have their places in pixels.
    axes.figure.draw_without_rendering()
    scale = axes.figure.dpi / 72
    centres = {name: axes.transData.transform(point) for name, point in points.items()}

    # Boxes [left, bottom, right, top] in pixels: no name may cover a point or another name.
    taken = [np.array([*(xy - 4 * scale), *(xy + 4 * scale)]) for xy in centres.values()]
    frame = axes.get_window_extent()

    def is_free(box: np.ndarray) -> bool:
        inside = (box[:2] > frame.min).all() and (box[2:] < frame.max).all()
        if not inside:
            return False
        for other in taken:
            if (box[:2] < other[2:]).all() and (other[:2] < box[2:]).all():
                return False
        return True

    # The highest first; for each, circles around its point, from the smallest on.
    radii = range(6, 300, 4)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    for name, xy in sorted(centres.items(), key=lambda item: -item[1][1]):
        size = scale * np.array([4.8 * len(name), 9.0])
        for radius, angle in itertools.product(radii, angles):
            direction = np.array([np.cos(angle), np.sin(angle)])
            middle = xy + direction * (radius * scale + size / 2)
            box = np.array([*(middle - size / 2), *(middle + size / 2)])
            if is_free(box):
                break
        taken.append(box)
        options = {
            "xycoords": "data",
            "textcoords": "figure pixels",
            "ha": "center",
            "va": "center",
            "fontsize": 8,
        }
        line = {
            "arrowstyle": "-",
            "color": colours[name],
            "linewidth": 0.5,
            "shrinkA": 0,
            "shrinkB": 2,
        }
        axes.annotate(
            name, points[name], xytext=middle, color=colours[name], arrowprops=line, **options
        )


def plot(rows: Rows) -> None:
    """Draw frontier.png: the share that passes everything against KL, all and the upper part.

    Dots are means over seeds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained", dpi=110)
    whole, upper = figure.subplots(1, 2, width_ratios=(1, 2.4))

    # Each method's point, KL and share, and its family's colour.
    means = {}
    for method, of_seed in rows.items():
        kl = np.mean([row["kl"] for row in of_seed.values()])
        share = np.mean([row["all"] for row in of_seed.values()])
        means[method] = [kl, share]
    colours = {}
    for family, methods in FAMILIES.items():
        for method in methods:
            colours[method] = COLOURS[family]

    # Both panels show all of them, and the curve of best of n.
    curve = np.mean([row["curve"] for row in rows["best_of_16"].values()], axis=0)
    for axes in (whole, upper):
        axes.plot(*curve.T, "--", color=COLOURS["best of n at inference"], linewidth=1, zorder=0)
        for family, methods in FAMILIES.items():
            points = np.array([means[m] for m in methods if m in rows])
            axes.plot(*points.T, "o", color=COLOURS[family], markersize=5, label=family)
        axes.set_xlabel("KL to the SFT model, nats a response")
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    whole.set_ylabel("share that passes all criteria")
    figure.legend(
        *whole.get_legend_handles_labels(),
        fontsize=8,
        frameon=False,
        loc="outside lower center",
        ncols=6,
    )

    # The second panel is cut to the highest, which have their names there.
    high = {method: point for method, point in means.items() if point[1] > UPPER}
    low = {method: point for method, point in means.items() if method not in high}
    lowest = min(share for _, share in high.values())
    farthest = max(kl for kl, _ in high.values())
    upper.set(ylim=(lowest - 0.02, None), xlim=(0, 1.1 * farthest))
    named(upper, high, colours)
    named(whole, low, colours)
    figure.savefig(HERE / "frontier.png")


def main() -> None:
    """Write the tables between the page's marks, and the plot."""
    rows = by_method(read("results.jsonl"))
    readme = HERE / "README.md"
    parts = {
        "quality": quality(rows),
        "kinds": kinds(rows),
        "cost": cost(rows),
        "memory": memory(),
        "tuning": tuning(),
    }
    text = readme.read_text("utf-8")
    for name, part in parts.items():
        mark = f"<!-- {name} -->\n"
        before, _, rest = text.partition(mark)
        after = rest[rest.index("<!-- end -->") :]
        text = f"{before}{mark}{part}{after}"
    readme.write_text(text, "utf-8")
    plot(rows)


if __name__ == "__main__":
    main()
