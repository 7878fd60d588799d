"""Tables and the plot of results.jsonl, tuning.jsonl and memory.json: writes them into README.md and frontier.png.

python experiments/methods/table.py
"""

import collections
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # the root's modules, from wherever this is started

import numpy as np
from scipy import stats

HERE = pathlib.Path(__file__).parent
GAIN = 0.20
DIRECT = ("dpo", "cdpo", "robust_dpo", "ipo", "slic", "kto", "orpo", "simpo", "cpo", "slic_hf", "rrhf", "contrastive")
DIRECT += ("unlikelihood", "figa", "hindsight")
FAMILIES = {
    "SFT": ("sft",),
    "best of n at inference": ("best_of_16",),
    "PPO": ("ppo",),
    "direct, without a reward model": DIRECT,
    "online, without a critic": ("grpo", "rloo", "dr_grpo", "dapo", "gspo", "reinforce_pp", "online_dpo"),
    "sample, rank, imitate": ("raft", "expert", "quark"),
}
COLOURS = dict(zip(FAMILIES, ("black", "dimgrey", "tab:red", "tab:blue", "tab:green", "tab:orange"), strict=True))
MUST = ("dpo", "kto", "grpo", "rloo", "raft", "best_of_16", "ppo")

Rows = dict[str, dict[int, dict[str, Any]]]


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def by_method(rows: list[dict[str, Any]]) -> Rows:
    """method -> seed -> row, in the order of FAMILIES."""
    found = {m: {r["seed"]: r for r in rows if r["method"] == m} for names in FAMILIES.values() for m in names}
    return {method: dict(sorted(of_seed.items())) for method, of_seed in found.items() if of_seed}


def half(values: list[float]) -> float:
    """Half of the 95 % interval of the mean over seeds (Student's t); nan of one seed."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def over(rows: Rows, method: str, other: str) -> str:
    """Mean over common seeds of how much more passes everything than of `other`, with half of its interval."""
    common = [] if method == other else rows[method].keys() & rows[other].keys()
    gaps = [rows[method][seed]["all"] - rows[other][seed]["all"] for seed in common]
    spread = f" ±{half(gaps):.3f}" if len(gaps) > 1 else ""
    return f"{np.mean(gaps):+.3f}{spread}" if gaps else ""


def mean(of_seed: dict[int, dict[str, Any]], name: str, scale: float = 1.0, digits: int = 1) -> str:
    """Of what differs between seeds by rounding only."""
    values = [row[name] * scale for row in of_seed.values() if row.get(name)]
    return f"{np.mean(values):.{digits}f}" if values else ""


def cell(of_seed: dict[int, dict[str, Any]], name: str, digits: int = 3) -> str:
    """Mean over seeds, with half of its interval where there are several; nothing where no row has it."""
    values = [row[name] for row in of_seed.values() if name in row]
    if not values:
        return ""
    spread = f" ±{half(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):z.{digits}f}{spread}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def quality(rows: Rows) -> str:
    """Shares, KL and length, and which of MUST gain what is asked for."""
    lines, verdicts = [], []
    for method, of_seed in rows.items():
        gains = [row["all"] - rows["sft"][seed]["all"] for seed, row in of_seed.items() if method != "sft"]
        shares = [cell(of_seed, name) for name in ("all", "helpful", "honest", "harmless")]
        against = [over(rows, method, "sft"), ", ".join(f"{gain:+.3f}" for gain in gains), over(rows, method, "ppo")]
        shown = [cell(of_seed, "kl", 2), cell(of_seed, "length", 1)]
        lines.append([method, ", ".join(map(str, of_seed)), *shares, *against, *shown])
        if method in MUST:
            verdicts.append(f"{method} {sum(gain >= GAIN for gain in gains)} of {len(gains)}")
    head = ["method", "seeds", "all", "helpful", "honest", "harmless"]
    head += ["over SFT", "by seed", "over PPO", "KL", "tokens"]
    return table(head, lines) + f"\nSeeds that gain {GAIN:.2f} or more: {', '.join(verdicts)}.\n"


def kinds(rows: Rows) -> str:
    """Share that passes everything by kind of request, mean over seeds."""
    names = list(next(iter(rows["sft"].values()))["kinds"])
    shares = {
        m: [np.mean([row["kinds"][name]["all"] for row in s.values()]) for name in names] for m, s in rows.items()
    }
    head = ["all criteria, by kind", *(name.replace("_", " ") for name in names)]
    return table(head, [[method, *(f"{share:.2f}" for share in of_kind)] for method, of_kind in shares.items()])


def cost(rows: Rows) -> str:
    lines = []
    for method, of_seed in rows.items():
        totals = {s: {"total": r.get("training_flops", 0.0) + r["reward_model_flops"]} for s, r in of_seed.items()}
        flops = [mean(of_seed, "training_flops", 1e-12), mean(totals, "total", 1e-12)]
        flops.append(mean(of_seed, "response_flops", 1e-6, 0))
        lines.append([method, *flops, *(cell(of_seed, name, 0) for name in ("cpu_seconds", "peak_mb"))])
    head = ["method", "training, TFLOPs", "with the reward models'", "an answer, MFLOPs", "CPU seconds", "peak, MB"]
    return table(head, lines)


def tuning() -> str:
    rows = sorted(read("tuning.jsonl"), key=lambda row: row["method"])
    counts = collections.Counter(row["method"] for row in rows)
    lines = [[row["method"], f"`{row['flags']}`", f"{row['all']:.3f}", f"{row['kl']:.2f}"] for row in rows]
    told = ", ".join(f"{method} {count}" for method, count in counts.items())
    return table(["method", "flags", "all", "KL"], lines) + f"\n{len(rows)} configurations: {told}.\n"


def memory() -> str:
    path = HERE / "memory.json"
    rows = json.loads(path.read_text()) if path.exists() else {}  # memory.py writes it
    lines = [[name, f"{row['cpu_seconds']:.1f}", f"{row['peak_mb']:.0f}"] for name, row in rows.items()]
    return table(["32 million parameters", "CPU seconds a step", "peak, MB"], lines)


def plot(rows: Rows) -> None:
    """frontier.png: share that passes everything against KL; means over seeds, faint dots each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="KL to the SFT model, nats a response", ylabel="share that passes all criteria")
    means = {m: [np.mean([row[name] for row in s.values()]) for name in ("kl", "all")] for m, s in rows.items()}
    for family, methods in FAMILIES.items():
        for method in (m for m in methods if m in rows):
            each = np.array([(row["kl"], row["all"]) for row in rows[method].values()])
            axes.plot(*each.T, ".", color=COLOURS[family], alpha=0.3, markersize=4)
            axes.plot(*means[method], "o", color=COLOURS[family], markersize=6, label=family)
    curves = np.mean([row["curve"] for row in rows["best_of_16"].values()], axis=0)
    axes.plot(*curves.T, "--", color=COLOURS["best of n at inference"], linewidth=1, zorder=0)
    # Names in a column beside the axes, in the order of the shares, for most points lie close together.
    family_of = {m: family for family, methods in FAMILIES.items() for m in methods}
    ordered = sorted(rows, key=lambda m: means[m][1])
    for method, height in zip(ordered, np.linspace(0.02, 0.98, len(rows)), strict=True):
        axes.annotate(
            f"{method} {means[method][1]:.2f}", means[method], xytext=(1.03, height), textcoords="axes fraction",
            va="center", fontsize=8, color=COLOURS[family_of[method]], annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": COLOURS[family_of[method]], "linewidth": 0.5, "alpha": 0.5},
        )  # fmt: skip
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(handles.values(), handles, fontsize=8, frameon=False, loc="lower right")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "frontier.png", dpi=120)


def main() -> None:
    rows, readme = by_method(read("results.jsonl")), HERE / "README.md"
    parts = {"quality": quality(rows), "kinds": kinds(rows), "cost": cost(rows), "memory": memory(), "tuning": tuning()}
    text = readme.read_text()
    for name, part in parts.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{part}{rest[rest.index('<!-- end -->') :]}"
    readme.write_text(text)
    plot(rows)


if __name__ == "__main__":
    main()
