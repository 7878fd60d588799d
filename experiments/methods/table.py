"""Write the tables and the plot of the study into README.md and frontier.png.

They are made from results.jsonl, tuning.jsonl and memory.json.

    python -m experiments.methods.table
"""

import collections
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
UPPER = 0.7  # the plot's second panel shows the shares above this
MUST = ("dpo", "kto", "grpo", "rloo", "raft", "best_of_16", "ppo")

Rows = dict[str, dict[int, dict[str, Any]]]


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def by_method(rows: list[dict[str, Any]]) -> Rows:
    """Return method -> seed -> row, in the order of FAMILIES."""
    found = {
        m: {r["seed"]: r for r in rows if r["method"] == m}
        for names in FAMILIES.values()
        for m in names
    }
    return {method: dict(sorted(of_seed.items())) for method, of_seed in found.items() if of_seed}


def over(rows: Rows, method: str, other: str) -> str:
    """Return how much more of `method` passes everything than of `other`.

    It is the mean over the seeds that both have, with half of its interval; empty without any.
    """
    common = [] if method == other else rows[method].keys() & rows[other].keys()
    gaps = [rows[method][seed]["all"] - rows[other][seed]["all"] for seed in common]
    spread = f" ±{half(gaps):.3f}" if len(gaps) > 1 else ""
    return f"{np.mean(gaps):+.3f}{spread}" if gaps else ""


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
    return (
        "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
        + "\n"
    )


def quality(rows: Rows) -> str:
    """Tabulate shares, KL and length, and which of MUST gain what is asked for."""
    lines, verdicts = [], []
    for method, of_seed in rows.items():
        gains = [
            row["all"] - rows["sft"][seed]["all"]
            for seed, row in of_seed.items()
            if method != "sft"
        ]
        shares = [cell(of_seed, name) for name in ("all", "helpful", "honest", "harmless")]
        against = [
            over(rows, method, "sft"),
            ", ".join(f"{gain:+.3f}" for gain in gains),
            over(rows, method, "ppo"),
        ]
        shown = [cell(of_seed, "kl", 2), cell(of_seed, "length", 1)]
        lines.append([method, ", ".join(map(str, of_seed)), *shares, *against, *shown])
        if method in MUST:
            # Rounded: 0.6 - 0.4 is a little below 0.2.
            reached = sum(round(gain, 9) >= GAIN for gain in gains)
            verdicts.append(f"{method} {reached} of {len(gains)}")
    head = ["method", "seeds", "all", "helpful", "honest", "harmless"]
    head += ["over SFT", "by seed", "over PPO", "KL", "tokens"]
    return table(head, lines) + f"\nSeeds that gain {GAIN:.2f} or more: {', '.join(verdicts)}.\n"


def kinds(rows: Rows) -> str:
    """Tabulate the share that passes everything by kind of request, mean over seeds."""
    names = list(next(iter(rows["sft"].values()))["kinds"])
    shares = {
        m: [np.mean([row["kinds"][name]["all"] for row in s.values()]) for name in names]
        for m, s in rows.items()
    }
    head = ["all criteria, by kind", *(name.replace("_", " ") for name in names)]
    return table(
        head,
        [[method, *(f"{share:.2f}" for share in of_kind)] for method, of_kind in shares.items()],
    )


def cost(rows: Rows) -> str:
    lines = []
    for method, of_seed in rows.items():
        totals = {
            s: {"total": r.get("training_flops", 0.0) + r["reward_model_flops"]}
            for s, r in of_seed.items()
        }
        flops = [mean(of_seed, "training_flops", 1e-12), mean(totals, "total", 1e-12)]
        flops.append(mean(of_seed, "response_flops", 1e-6, 0))
        lines.append(
            [method, *flops, *(cell(of_seed, name, 0) for name in ("cpu_seconds", "peak_mb"))]
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
    rows = sorted(read("tuning.jsonl"), key=lambda row: row["method"])
    counts = collections.Counter(row["method"] for row in rows)
    lines = [
        [row["method"], f"`{row['flags']}`", f"{row['all']:.3f}", f"{row['kl']:.2f}"]
        for row in rows
    ]
    told = ", ".join(f"{method} {count}" for method, count in counts.items())
    return (
        table(["method", "flags", "all", "KL"], lines) + f"\n{len(rows)} configurations: {told}.\n"
    )


def memory() -> str:
    path = HERE / "memory.json"
    rows = json.loads(path.read_text()) if path.exists() else {}  # memory.py writes it
    lines = [
        [name, f"{row['cpu_seconds']:.1f}", f"{row['peak_mb']:.0f}"] for name, row in rows.items()
    ]
    return table(["32 million parameters", "CPU seconds a step", "peak, MB"], lines)


def named(axes: Any, points: dict[str, list[float]], colours: dict[str, str]) -> None:
    """Write each name into the nearest free place around its point, with a line to it."""
    # Settle the layout, so that data have their places in pixels.
    axes.figure.draw_without_rendering()
    scale = axes.figure.dpi / 72
    centres = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [np.array([*(xy - 4 * scale), *(xy + 4 * scale)]) for xy in centres.values()]
    frame = axes.get_window_extent()
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    for name, xy in sorted(centres.items(), key=lambda item: -item[1][1]):
        size = scale * np.array([4.8 * len(name), 9.0])
        for radius, angle in ((radius, angle) for radius in range(6, 300, 4) for angle in angles):
            middle = xy + np.array([np.cos(angle), np.sin(angle)]) * (radius * scale + size / 2)
            box = np.array([*(middle - size / 2), *(middle + size / 2)])
            inside = (box[:2] > frame.min).all() and (box[2:] < frame.max).all()
            if inside and not any(
                (box[:2] < other[2:]).all() and (other[:2] < box[2:]).all() for other in taken
            ):
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
    means = {
        m: [np.mean([row[name] for row in s.values()]) for name in ("kl", "all")]
        for m, s in rows.items()
    }
    high = {m: point for m, point in means.items() if point[1] > UPPER}
    colours = {m: COLOURS[family] for family, methods in FAMILIES.items() for m in methods}
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
    lowest = min(share for _, share in high.values())
    upper.set(ylim=(lowest - 0.02, None), xlim=(0, 1.1 * max(kl for kl, _ in high.values())))
    named(upper, high, colours)
    named(whole, {m: point for m, point in means.items() if m not in high}, colours)
    figure.savefig(HERE / "frontier.png")


def main() -> None:
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
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{part}{rest[rest.index('<!-- end -->') :]}"
    readme.write_text(text, "utf-8")
    plot(rows)


if __name__ == "__main__":
    main()
