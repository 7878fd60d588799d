"""Curves of a run as SVG inside a page: text stays text, and colours follow the reader's theme."""

import html
import io
import re
from typing import Any

import numpy as np

EXPLAINED = {
    "loss": "Cross-entropy, or the stage's own loss; lower is better.",
    "accuracy": "Share of pairs in which the chosen response scores above the rejected one.",
    "score": "What the reward model gives the policy's responses, on average.",
    "kl": "How far the policy has moved from the SFT model, in nats a response.",
    "length": "Tokens a response, on average; a steady climb would be a sign of gaming.",
    "ended": "Share of responses that end by themselves before the limit.",
    "gold": "Share of responses that the gold program passes; the trainer never sees it.",
    "perplexity": "exp of the held-out loss; lower is better.",
    "loss/policy": "PPO's clipped objective; it hovers near zero and is no measure of progress.",
    "loss/value": "Squared error of the critic on the returns.",
    "loss/approx_kl": "How far one iteration's updates move the policy, in nats a token.",
    "loss/clipped": "Share of tokens whose probability ratio was clipped.",
    "sampler_gap": "Largest difference between the sampler's and the trainer's log-probabilities.",
    "kl_coef": "Weight of the KL penalty.",
    "entropy": "Of the policy's next-token distribution, in nats; near zero it no longer explores.",
    "grad_norm": "Global norm of the gradient before clipping.",
    "lr": "Learning rate.",
}
HIDDEN = ("step", "seconds", "tokens_per_second", "skipped")
# Colours that matplotlib draws with; in the page they become the style sheet's, light or dark.
COLOURS = {"#010101": "--muted", "#020202": "--rule", "#030303": "--first", "#040404": "--second"}
MUTED, RULE, FIRST, SECOND = COLOURS


def panels(
    rows: list[dict[str, Any]], unit: str = "step", only: str = "", title: str = ""
) -> list[str]:
    """A figure a metric; `eval/x` is drawn over `x`."""
    names = dict.fromkeys(
        name.removeprefix("eval/") for row in rows for name in row if name not in HIDDEN
    )
    first = [name for name in EXPLAINED if name in names]
    figures = []
    for name in [*first, *(n for n in names if n not in first)]:
        keys = {"training": name, "held out": f"eval/{name}"}
        curves = [(label, *_series(rows, key)) for label, key in keys.items()]
        curves = [curve for curve in curves if len(curve[1])]
        if curves and only in ("", name):
            drawn = _draw(curves, unit, legend=len(curves) > 1)
            figures.append(_figure(title or name, drawn, EXPLAINED.get(name, "")))
    return figures


def _series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    steps, values = np.array(points, float).reshape(-1, 2).T
    if len(steps) > 400:  # means of equal parts: a page must stay small after a million steps
        steps, values = (
            np.array([p.mean() for p in np.array_split(x, 400)]) for x in (steps, values)
        )
    return steps, values


def reward_against_kl(rows: list[dict[str, Any]]) -> list[str]:
    both = [row for row in rows if row.get("kl") is not None and row.get("score") is not None]
    if not both:
        return []
    kl, score = _series(both, "kl")[1], _series(both, "score")[1]
    why = "What each nat of distance from SFT buys; the stronger the colour, the later the iteration."
    drawn = _draw([("", kl, score)], "KL to SFT, nats", dots=True)
    return [_figure("Reward against KL", drawn, why)]


def _draw(
    curves: list[tuple[str, Any, Any]], xlabel: str, legend: bool = False, dots: bool = False
) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": MUTED,
             "axes.labelcolor": MUTED, "axes.edgecolor": RULE, "xtick.color": MUTED, "ytick.color": MUTED,
             "grid.color": RULE, "axes.spines.top": False, "axes.spines.right": False,
             "axes.formatter.useoffset": False}  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for (label, x, y), colour in zip(curves, (FIRST, SECOND), strict=False):
            if dots:
                for sixth, part in enumerate(np.array_split(np.arange(len(x)), 6), 1):
                    axes.plot(
                        x[part], y[part], "o", color=colour, alpha=sixth / 6, markersize=4, mew=0
                    )
            elif len(x) > 40:
                axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
                axes.plot(x, _smooth(y), color=colour, linewidth=1.8, label=label)
            else:
                axes.plot(x, y, "o-", color=colour, linewidth=1.8, markersize=3, label=label)
        low, high = min(y.min() for _, _, y in curves), max(y.max() for _, _, y in curves)
        if high - low < 1e-6 * abs(high):  # a constant: rounding is no curve
            axes.set_ylim(0.5 * low, 1.5 * high)
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=0)
        axes.set_xlabel(xlabel)
        if legend:
            axes.legend(
                frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0
            )
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1
    )


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of a window of a tenth, shorter towards the ends."""
    half = max(1, len(values) // 20)
    total = np.concatenate([[0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _figure(title: str, svg: str, explanation: str) -> str:
    caption = f"<figcaption>{html.escape(explanation)}</figcaption>" if explanation else ""
    return f"<figure><h3>{html.escape(title)}</h3>{svg}{caption}</figure>"
