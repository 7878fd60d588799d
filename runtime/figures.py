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
    "policy/loss": "PPO's clipped objective; it hovers near zero and is no measure of progress.",
    "value/loss": "Squared error of the critic on the returns.",
    "policy/approx_kl": "How far one iteration's updates move the policy, in nats a token.",
    "policy/clipped": "Share of tokens whose probability ratio is out of the clip's range.",
    "policy/clip_active": "Share of tokens that lose their gradient by the clip.",
    "explained_variance": "Of the returns by the critic's values; 1 is all of it.",
    "sampler_gap": "Largest difference between the sampler's and the trainer's log-probabilities.",
    "sampler_gap_mean": "Mean difference of the two, per token.",
    "sampler_k3": "KL between sampler and trainer in nats a token, by the k3 estimator.",
    "score_with_eos_rule": "The score after the rule on responses without an end.",
    "kl_coef": "Weight of the KL penalty.",
    "entropy": "Of the policy's next-token distribution, in nats; near zero it no longer "
    "explores.",
    "grad_norm": "Global norm of the gradient before clipping.",
    "learning_rate": "Of the update, as the schedule has it.",
    "data/truncated": "Records so far of which a part was cut off, on the first host.",
    "data/dropped": "Records so far that were too long to be used, on the first host.",
    "data/refused": "Records so far that the chat template refuses, on the first host.",
    "data/epoch": "Passes over the data so far; of a mixture since its stage began.",
    "skipped": "Updates so far whose loss or gradient was not finite: they changed nothing.",
    "left_out": "Updates so far in whose batch nothing counted: they changed nothing.",
}
OF_SOURCES = {
    "data/share/": "Its share of the examples read so far, on the first host.",
    "data/token_share/": "Its share of the tokens read so far that are trained on, on the first "
    "host.",
}
"""By the beginning of a name, whose rest is a source of a mixture."""
HIDDEN = ("step", "seconds", "tokens_per_second", "updates", "tokens_seen", "peak_memory")
FAULTS = ("skipped", "left_out", "truncated", "dropped", "refused")
"""Counts of updates that were not taken and of records that were cut, of which a figure is drawn
where there are any."""
# Colours that matplotlib draws with; in the page they become the style sheet's, light or dark.
COLOURS = {"#010101": "--muted", "#020202": "--rule", "#030303": "--first", "#040404": "--second"}
MUTED, RULE, FIRST, SECOND = COLOURS


MOST_POINTS = 400
"""Points of a curve at most: a page must stay small after a million steps."""
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": MUTED,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
}
"""Settings of matplotlib."""

Curve = tuple[str, np.ndarray, np.ndarray]
"""(label, x, y)."""


# --- figures


def panels(
    rows: list[dict[str, Any]], unit: str = "step", only: str = "", title: str = ""
) -> list[str]:
    """Return a figure (HTML) for each metric in `rows` of metrics.jsonl, known ones first.

    `eval/x` is drawn over `x`. `unit`: the word under the axis. `only`: this metric alone; "":
    all. `title`: instead of the metric's name, where it is not "".
    """
    # The metrics in the order in which they appear; a dict keeps it.
    names: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            # Of one model of several: policy/updates.
            own_name = name.rpartition("/")[2]
            is_no_fault = own_name in FAULTS and not value
            if own_name not in HIDDEN and not is_no_fault:
                names[name.removeprefix("eval/")] = None
    known = [name for name in EXPLAINED if name in names]
    others = [name for name in names if name not in known]
    figures = []
    for name in [*known, *others]:
        if only not in ("", name):
            continue
        # Training and held-out values, where there are any.
        curves = []
        for label, key in (("training", name), ("held out", f"eval/{name}")):
            steps, values = _series(rows, key)
            if len(steps):
                curves.append((label, steps, values))
        if curves:
            drawn = _draw(curves, unit, legend=len(curves) > 1)
            figures.append(_figure(title or name, drawn, _explanation(name)))
    return figures


def reward_against_kl(rows: list[dict[str, Any]]) -> list[str]:
    """Return [a figure (HTML) of score against KL, a dot a row]; [] where no row has both.

    `rows`: of metrics.jsonl.
    """
    both = []
    for row in rows:
        if row.get("kl") is not None and row.get("score") is not None:
            both.append(row)
    if not both:
        return []
    _, kl = _series(both, "kl")
    _, score = _series(both, "score")
    why = (
        "What each nat of distance from SFT buys; the stronger the colour, the later the "
        "iteration."
    )
    drawn = _draw([("", kl, score)], "KL to SFT, nats", dots=True)
    return [_figure("Reward against KL", drawn, why)]


def _series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps that have the metric, and its values; means of parts of long series."""
    # Rows without the metric are left out: not every step is evaluated.
    having = [row for row in rows if row.get(name) is not None]
    steps = np.array([row["step"] for row in having], float)
    values = np.array([row[name] for row in having], float)
    if len(steps) > MOST_POINTS:
        steps = _part_means(steps)
        values = _part_means(values)
    return steps, values


def _part_means(series: np.ndarray) -> np.ndarray:
    return np.array([part.mean() for part in np.array_split(series, MOST_POINTS)])


# --- drawing


def _draw(curves: list[Curve], xlabel: str, legend: bool = False, dots: bool = False) -> str:
    """Draw up to two curves; return the SVG, its colours the style sheet's."""
    # Imported at its first use: it takes half a second.
    import matplotlib
    from matplotlib.figure import Figure

    # For this figure alone: the caller's settings stay.
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for curve, colour in zip(curves, (FIRST, SECOND), strict=False):
            if dots:
                _draw_dots(axes, curve, colour)
            else:
                _draw_line(axes, curve, colour)
        # The scale, and what is around the curves.
        everything = np.concatenate([values for _, _, values in curves])
        low = everything.min()
        high = everything.max()
        if high - low < 1e-6 * abs(high):
            # A constant: its rounding is no curve.
            axes.set_ylim(0.5 * low, 1.5 * high)
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=0)
        axes.set_xlabel(xlabel)
        if legend:
            place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0}
            axes.legend(frameon=False, ncols=2, **place)
        # Without a date, so that the same curves make the same page.
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _for_a_page(file.getvalue())


def _draw_dots(axes: Any, curve: Curve, colour: str) -> None:
    """Draw a dot a point, a sixth of them at a time, each stronger than the one before."""
    _, x, y = curve
    for sixth, part in enumerate(np.array_split(np.arange(len(x)), 6), 1):
        style = {"color": colour, "alpha": sixth / 6, "markersize": 4, "mew": 0}
        axes.plot(x[part], y[part], "o", **style)


def _draw_line(axes: Any, curve: Curve, colour: str) -> None:
    """Draw a line: of many points their running mean, and the points themselves paler."""
    label, x, y = curve
    if len(x) > 40:
        axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(x, _smooth(y), color=colour, linewidth=1.8, label=label)
    else:
        axes.plot(x, y, "o-", color=colour, linewidth=1.8, markersize=3, label=label)


def _for_a_page(svg: str) -> str:
    """Return matplotlib's SVG without its header and size, with the style sheet's colours."""
    # XML's header and the metadata say nothing in a page; its width is the page's.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    opening = r'<svg [^>]*?viewBox="([^"]*)"[^>]*>'
    return re.sub(opening, r'<svg viewBox="\1" role="img">', svg, count=1)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean over a window of a tenth around each value, shorter towards the ends."""
    # At least the neighbours.
    half = max(1, len(values) // 20)
    # Sums of windows as differences of running totals.
    totals = np.concatenate([[0], np.cumsum(values)])
    at = np.arange(len(values))
    low = np.maximum(at - half, 0)
    high = np.minimum(at + half + 1, len(values))
    return (totals[high] - totals[low]) / (high - low)


def _explanation(name: str) -> str:
    """Return what is said under the figure of a metric; "" for one that is not known."""
    for start, text in OF_SOURCES.items():
        if name.startswith(start):
            return text
    return EXPLAINED.get(name, "")


def _figure(title: str, svg: str, explanation: str) -> str:
    caption = f"<figcaption>{html.escape(explanation)}</figcaption>" if explanation else ""
    return f"<figure><h3>{html.escape(title)}</h3>{svg}{caption}</figure>"
