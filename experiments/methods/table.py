"""Tables and the plot of results.jsonl, tuning.jsonl and memory.json: prints what README.md shows, draws frontier.png.

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
FAMILIES = {
    "SFT": ("sft",),
    "best of n at inference": ("best_of_16",),
    "PPO": ("ppo",),
    "direct, without a reward model": ("dpo", "kto", "ipo", "cdpo", "orpo", "simpo"),
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


def cell(of_seed: dict[int, dict[str, Any]], name: str, digits: int = 3, scale: float = 1.0) -> str:
    """Mean over seeds, with half of its interval where there are several; nothing where no row has it."""
    values = [row[name] * scale for row in of_seed.values() if name in row]
    if not values:
        return ""
    spread = f" ±{half(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def quality(rows: Rows) -> None:
    head = "seeds | all | helpful | honest | harmless | KL | tokens | gain over SFT, by seed"
    print(f"\n| method | {head} |\n" + "|---" * 9 + "|")
    for method, of_seed in rows.items():
        shares = " | ".join(cell(of_seed, name) for name in ("all", "helpful", "honest", "harmless"))
        gains = [row["all"] - rows["sft"][seed]["all"] for seed, row in of_seed.items() if method != "sft"]
        shown = f"{cell(of_seed, 'kl', 2)} | {cell(of_seed, 'length', 1)} | {', '.join(f'{g:+.3f}' for g in gains)}"
        print(f"| {method} | {len(of_seed)} | {shares} | {shown} |")
    for method in (m for m in MUST if m in rows):
        gains = [row["all"] - rows["sft"][seed]["all"] for seed, row in rows[method].items()]
        print(f"{method}: {sum(g >= GAIN for g in gains)} of {len(gains)} seeds gain {GAIN} or more")


def kinds(rows: Rows) -> None:
    """Share that passes everything by kind of request, mean over seeds."""
    names = list(next(iter(rows["sft"].values()))["kinds"])
    head = " | ".join(name.replace("_", " ") for name in names)
    print(f"\n| method | {head} |\n" + "|---" * (len(names) + 1) + "|")
    for method, of_seed in rows.items():
        shares = [np.mean([row["kinds"][name]["all"] for row in of_seed.values()]) for name in names]
        print(f"| {method} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")


def cost(rows: Rows) -> None:
    head = "training, TFLOPs | with the reward models' | an answer, MFLOPs | seconds | CPU seconds | peak, MB"
    print(f"\n| method | {head} |\n" + "|---" * 7 + "|")
    for method, of_seed in rows.items():
        totals = {s: {"total": r.get("training_flops", 0.0) + r["reward_model_flops"]} for s, r in of_seed.items()}
        cells = [cell({0: next(iter(of_seed.values()))}, "training_flops", 1, 1e-12)]
        cells += [cell({0: next(iter(totals.values()))}, "total", 1, 1e-12)]
        cells += [cell({0: next(iter(of_seed.values()))}, "response_flops", 0, 1e-6)]
        cells += [cell(of_seed, "seconds", 0), cell(of_seed, "cpu_seconds", 0), cell(of_seed, "peak_mb", 0)]
        print(f"| {method} | " + " | ".join(cells) + " |")


def tuning() -> None:
    print("\n| method | flags | all | KL |\n|---|---|---|---|")
    rows = sorted(read("tuning.jsonl"), key=lambda row: row["method"])
    for row in rows:
        print(f"| {row['method']} | `{row['flags']}` | {row['all']:.3f} | {row['kl']:.2f} |")
    counts = collections.Counter(row["method"] for row in rows)
    print(f"{len(rows)} configurations: " + ", ".join(f"{m} {n}" for m, n in counts.items()))


def memory() -> None:
    print("\n| method | seconds a step | peak, MB |\n|---|---|---|")
    for name, row in json.loads((HERE / "memory.json").read_text()).items():
        print(f"| {name} | {row['seconds']:.2f} | {row['peak_mb']:.0f} |")


def plot(rows: Rows) -> None:
    """frontier.png: share that passes everything against KL; means over seeds, faint dots each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="KL to the SFT model, nats a response", ylabel="share that passes all criteria")
    for family, methods in FAMILIES.items():
        for method in (m for m in methods if m in rows):
            kl, share = (np.array([row[name] for row in rows[method].values()]) for name in ("kl", "all"))
            axes.plot(kl, share, ".", color=COLOURS[family], alpha=0.3, markersize=5)
            axes.plot(kl.mean(), share.mean(), "o", color=COLOURS[family], markersize=6, label=family)
            axes.annotate(method, (kl.mean(), share.mean()), xytext=(5, 3), textcoords="offset points", fontsize=8)
    curves = np.mean([row["curve"] for row in rows["best_of_16"].values()], axis=0)
    axes.plot(*curves.T, "--", color=COLOURS["best of n at inference"], linewidth=1, zorder=0)
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(handles.values(), handles, fontsize=8, frameon=False, loc="lower right")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "frontier.png", dpi=110)


def main() -> None:
    rows = by_method(read("results.jsonl"))
    quality(rows)
    kinds(rows)
    cost(rows)
    tuning()
    memory()
    plot(rows)


if __name__ == "__main__":
    main()
