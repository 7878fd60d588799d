"""Reports: one self-contained HTML page for a run, and one for the whole alignment pipeline."""

import html
import json
import math
import pathlib
from typing import Any

from runtime.figures import panels, reward_against_kl
from runtime.rows import read_rows
from runtime.run_folder import load_config
from runtime.samples import last_samples
from runtime.terminal import printable

STAGES = {"base": "Base", "sft": "SFT", "ppo": "PPO"}
CRITERIA = ("helpful", "honest", "harmless")
WHY = {
    "criteria": "Share of responses to held-out prompts that pass each criterion of the gold "
    "program, with 95 % intervals. No trainer ever saw these scores.",
    "kinds": "Share passing all three, by what was asked: an average can hide a kind that got "
    "worse.",
    "ppo": "The policy against the reward model, iteration by iteration.",
    "before": "Pre-training, supervised fine-tuning and the reward model.",
    "samples": "The same prompts, one response from each model, marked by the gold program.",
}


# --- pages


def run_report(run: str) -> str:
    """Write `<run>/report.html`: curves, last samples and config; return its path.

    `run`: its folder. Raises UserError where it is no run, and OSError where the page cannot be
    written.
    """
    # The run's own files are all that it needs.
    config = load_config(run)
    rows = read_rows(run)
    # A page is a list of sections.
    script = str(config.get("script", "run"))
    body = [
        f"<header><p class=kicker>{_e(script)}</p><h1>{_e(run)}</h1>"
        f"<p class=lead>{' '.join(_facts(rows))}</p>",
        "</header>",
        _section("Curves", _grid(panels(rows)) or "<p>No metrics were recorded.</p>"),
    ]
    samples = last_samples(run)
    if samples:
        cards = "".join(_sample_card(sample) for sample in samples)
        body.append(_section("Last samples", f"<div class=grid>{cards}</div>"))
    body.append(_section("Configuration", _config_table(config)))
    return _page(pathlib.Path(run), f"{script}: {run}", body)


def _facts(rows: list[dict[str, Any]]) -> list[str]:
    """Return sentences on how long a run of these rows of metrics took."""
    if not rows:
        return []
    last = rows[-1]
    duration = _duration(last.get("seconds") or 0)
    facts = [f"{last['step']:,} steps in {duration}."]
    speed = last.get("tokens_per_second")
    if speed:
        facts.append(f"{speed:,.0f} tokens a second at the end.")
    return facts


def alignment_report(
    out_folder: str,
    lm_run: str,
    sft_run: str,
    rm_run: str,
    ppo_run: str,
    summary: dict[str, Any],
    samples: list[dict[str, Any]],
) -> str:
    """Write `<out_folder>/report.html` on the four runs of an alignment; return its path.

    `summary`: per stage (base, sft, ppo) the shares helpful, honest, harmless, all, then kl,
    length and n, each with `<name>_ci`, and `kinds`; optionally `reward_model`. `samples`: prompt,
    kind, and per stage a response with its criteria.
    """
    # The curves of the four runs.
    lm_rows = read_rows(lm_run)
    sft_rows = read_rows(sft_run)
    rm_rows = read_rows(rm_run)
    ppo_rows = read_rows(ppo_run)
    stages = [stage for stage in STAGES if stage in summary]
    before = [
        *panels(lm_rows, only="loss", title="Pre-training: loss"),
        *panels(sft_rows, only="loss", title="SFT: loss"),
        *panels(rm_rows, only="accuracy", title="Reward model: accuracy"),
        *panels(rm_rows, only="loss", title="Reward model: loss"),
    ]
    ppo = [*reward_against_kl(ppo_rows), *panels(ppo_rows, "iteration")]
    reward_model = _reward_model(summary.get("reward_model"))
    side_by_side = "".join(_comparison(sample, stages) for sample in samples)
    # The settings of each run, folded.
    configs = ""
    for run in (lm_run, sft_run, rm_run, ppo_run):
        table = _config_table(load_config(run))
        configs += f"<details><summary>{_e(run)}</summary>{table}</details>"
    body = [
        _headline(summary, stages),
        _section("Criteria", _criteria_table(summary, stages), WHY["criteria"]),
        _section("Kinds of request", _kinds_table(summary, stages), WHY["kinds"]),
        _section("PPO", _grid(ppo), WHY["ppo"]),
        _section("Before PPO", _grid(before) + reward_model, WHY["before"]),
        _section("Side by side", side_by_side, WHY["samples"]),
        _section("Configuration", configs),
    ]
    return _page(pathlib.Path(out_folder), "Alignment report", body)


# --- tables


def _headline(summary: dict[str, Any], stages: list[str]) -> str:
    # The share that passes all three criteria, a stage each.
    numbers = ""
    for stage in stages:
        share = _percent(summary[stage].get("all"))
        numbers += f"<div class=stat><b>{share}</b><span>{STAGES[stage]}</span></div>"
    return (
        "<header><p class=kicker>Plumb</p><h1>Alignment report</h1><p class=lead>Held-out prompts"
        " answered helpfully, honestly and harmlessly, all three at once:</p>"
        f"<div class=stats>{numbers}</div></header>"
    )


def _criteria_table(summary: dict[str, Any], stages: list[str]) -> str:
    lines = [f"<tr><th></th>{_heads(stages)}</tr>"]
    # First the shares, then what is no share.
    shares = {criterion: criterion for criterion in CRITERIA} | {"all": "all three"}
    for name, label in shares.items():
        cells = [_share(summary[stage], name, stage) for stage in stages]
        lines.append(_table_row(label, cells, css=name))
    values = {"kl": "KL to SFT, nats", "length": "length, tokens", "n": "responses"}
    for name, label in values.items():
        cells = [_value(summary[stage], name) for stage in stages]
        lines.append(_table_row(label, cells))
    return _table(lines)


def _kinds_table(summary: dict[str, Any], stages: list[str]) -> str:
    by_stage = {stage: summary[stage].get("kinds", {}) for stage in stages}
    kinds = sorted(set().union(*by_stage.values()))
    if not kinds:
        return "<p>Not measured.</p>"
    # A row a kind, a column a stage.
    lines = [f"<tr><th></th>{_heads(stages)}<th scope=col>n</th></tr>"]
    for kind in kinds:
        cells = []
        for stage in stages:
            entry = by_stage[stage].get(kind, {})
            cells.append(_share(entry, "all", stage))
        # All stages answer the same prompts: the last one's count is theirs too.
        cells.append(_e(entry.get("n", "")))
        lines.append(_table_row(_e(kind), cells))
    return _table(lines)


def _table(lines: list[str]) -> str:
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def _table_row(label: str, cells: list[str], css: str = "") -> str:
    """Return a row of a table; `css`: its class in the style sheet."""
    opening = f"<tr class={css}>" if css else "<tr>"
    columns = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"{opening}<th scope=row>{label}</th>{columns}</tr>"


def _heads(stages: list[str]) -> str:
    return "".join(f"<th scope=col>{STAGES[stage]}</th>" for stage in stages)


def _share(entry: dict[str, Any], name: str, stage: str) -> str:
    """Return a share as a number and a bar on which its interval is drawn."""
    share = entry.get(name)
    if share is None:
        return "–"
    # Without an interval the bar ends in a point.
    low, high = entry.get(f"{name}_ci") or (share, share)
    interval = f"{_percent(low)} to {_percent(high)}"
    bar = f"<i style='width:{100 * share:.1f}%'></i>"
    bar += f"<u style='left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%'></u>"
    return (
        f"<b>{_percent(share)}</b> <small>{interval}</small>"
        f"<div class='bar {stage}' aria-hidden=true>{bar}</div>"
    )


def _value(entry: dict[str, Any], name: str) -> str:
    """Return a number with its interval, if it has one."""
    value = entry.get(name)
    if value is None:
        return "–"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:z.2f}"
    text = f"<b>{shown}</b>"
    interval = entry.get(f"{name}_ci")
    if interval:
        low, high = interval
        text += f" <small>{low:z.2f} to {high:z.2f}</small>"
    return text


def _reward_model(entry: dict[str, Any] | None) -> str:
    if not entry:
        return ""
    # Of all pairs, then by what decided them.
    shares = {"all pairs": entry.get("accuracy"), **(entry.get("by_criterion") or {})}
    # Numbers only: what was not measured is left out.
    cells = ""
    for name, share in shares.items():
        if isinstance(share, int | float):
            cells += f"<div class=stat><b>{_percent(share)}</b><span>{_e(name)}</span></div>"
    why = "Reward model: share of held-out pairs ranked as the gold program ranks them."
    return f"<p>{why}</p><div class='stats few'>{cells}</div>"


def _config_table(config: dict[str, Any]) -> str:
    return f"<div class=scroll><table class=config>{_config_rows(config, '')}</table></div>"


def _config_rows(config: dict[str, Any], prefix: str) -> str:
    # One table, however deep the settings are nested.
    rows = ""
    for name, value in config.items():
        # Nested settings by their dotted names, as flags have them.
        if isinstance(value, dict):
            rows += _config_rows(value, f"{prefix}{name}.")
        else:
            text = _e(json.dumps(value))
            rows += _table_row(_e(prefix + name), [f"<code>{text}</code>"])
    return rows


# --- samples


def _sample_card(sample: dict[str, str]) -> str:
    texts = ""
    for name, value in sample.items():
        texts += f"<h4>{_e(name)}</h4><p class=text>{_e(value)}</p>"
    return f"<article class=card>{texts}</article>"


def _comparison(sample: dict[str, Any], stages: list[str]) -> str:
    """Return a prompt and each stage's response to it, side by side."""
    cards = ""
    for stage in stages:
        if stage in sample:
            cards += _response_card(sample[stage], stage)
    kind = f"<span class=kind>{_e(sample.get('kind', ''))}</span>"
    heading = f"<h3 class=text>{_e(sample['prompt'])} {kind}</h3>"
    return f"{heading}<div class='grid three'>{cards}</div>"


def _response_card(response: dict[str, Any], stage: str) -> str:
    """Return a stage's response and a mark for each criterion."""
    # What the gold program says of it.
    marks = ""
    for criterion in CRITERIA:
        passed = bool(response.get(criterion))
        verdict, mark = ("pass", "✓") if passed else ("fail", "✗")
        marks += f"<li class={verdict}>{mark} {criterion}</li>"
    text = _e(response["response"]) or "<i>(empty)</i>"
    card = f"<h4>{STAGES[stage]}</h4><p class=text>{text}</p>"
    card += f"<ul class=marks>{marks}</ul>"
    return f"<article class='card {stage}'>{card}</article>"


# --- pieces of a page


def _section(title: str, content: str, explanation: str = "") -> str:
    why = f"<p class=why>{explanation}</p>" if explanation else ""
    return f"<section><h2>{title}</h2>{why}{content}</section>"


def _grid(figures: list[str]) -> str:
    return f"<div class=grid>{''.join(figures)}</div>" if figures else ""


def _page(folder: pathlib.Path, title: str, body: list[str]) -> str:
    """Write the page with its style sheet inside; return its path."""
    path = folder / "report.html"
    style = pathlib.Path(__file__).with_name("report.css").read_text()
    # One file: styles and figures are inside.
    text = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{_e(title)}</title>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<style>{style}</style></head><body><main>{''.join(body)}</main></body></html>"
    )
    path.write_text(text, encoding="utf-8")
    return str(path)


def _e(value: Any) -> str:
    """Return the text of `value`, escaped for HTML, its control characters spelled out."""
    return html.escape(printable(str(value)))


def _percent(share: Any) -> str:
    if share is None or not math.isfinite(share):
        return "–"
    return f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    # To the minute from an hour on.
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {seconds} s"
