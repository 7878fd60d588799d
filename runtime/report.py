"""Reports: one self-contained HTML page for a run, and one for the whole alignment pipeline."""

import html
import json
import math
import pathlib
import re
from typing import Any

from runtime.figures import panels, reward_against_kl
from runtime.run_folder import load_config, read_rows

STAGES = {"base": "Base", "sft": "SFT", "ppo": "PPO"}
CRITERIA = ("helpful", "honest", "harmless")
WHY = {
    "criteria": "Share of responses to held-out prompts that pass each criterion of the gold program, with "
    "95 % intervals. No trainer ever saw these scores.",
    "kinds": "Share passing all three, by what was asked: an average can hide a kind that got worse.",
    "ppo": "The policy against the reward model, iteration by iteration.",
    "before": "Pre-training, supervised fine-tuning and the reward model.",
    "samples": "The same prompts, one response from each model, marked by the gold program.",
}


def run_report(run: str) -> str:
    """Writes `<run>/report.html`: curves, last samples and config; returns its path."""
    config, rows = load_config(run), read_rows(run)
    script = str(config.get("script", "run"))
    facts = []
    if rows:
        facts.append(f"{rows[-1]['step']:,} steps in {_duration(rows[-1].get('seconds') or 0)}.")
        if speed := rows[-1].get("tokens_per_second"):
            facts.append(f"{speed:,.0f} tokens a second at the end.")
    body = [
        f"<header><p class=kicker>{_e(script)}</p><h1>{_e(run)}</h1><p class=lead>{' '.join(facts)}</p>",
        "</header>",
        _section("Curves", _grid(panels(rows)) or "<p>No metrics were recorded.</p>"),
    ]
    if samples := last_samples(run):
        cards = "".join(
            f"<article class=card>{''.join(_labelled(n, v) for n, v in s.items())}</article>"
            for s in samples
        )
        body.append(_section("Last samples", f"<div class=grid>{cards}</div>"))
    body.append(_section("Configuration", _config_table(config)))
    return _page(pathlib.Path(run), f"{script}: {run}", body)


def alignment_report(
    out_folder: str,
    lm_run: str,
    sft_run: str,
    rm_run: str,
    ppo_run: str,
    summary: dict[str, Any],
    samples: list[dict[str, Any]],
) -> str:
    """Writes `<out_folder>/report.html` for pre-training, SFT, reward model and PPO; returns its path.

    `summary`: per stage (base, sft, ppo) the shares helpful, honest, harmless, all, then kl, length and n,
    each with `<name>_ci`, and `kinds`; optionally `reward_model`. `samples`: prompt, kind, and per stage
    a response with its criteria.
    """
    rows = {
        name: read_rows(run) for name, run in (("lm", lm_run), ("sft", sft_run), ("rm", rm_run))
    }
    ppo = read_rows(ppo_run)
    stages = [stage for stage in STAGES if stage in summary]
    criteria, kinds = _criteria_table(summary, stages), _kinds_table(summary, stages)
    before = (
        panels(rows["lm"], only="loss", title="Pre-training: loss")
        + panels(rows["sft"], only="loss", title="SFT: loss")
        + panels(rows["rm"], only="accuracy", title="Reward model: accuracy")
        + panels(rows["rm"], only="loss", title="Reward model: loss")
    )
    configs = "".join(
        f"<details><summary>{_e(run)}</summary>{_config_table(load_config(run))}</details>"
        for run in (lm_run, sft_run, rm_run, ppo_run)
    )
    body = [
        _headline(summary, stages),
        _section("Criteria", criteria, WHY["criteria"]),
        _section("Kinds of request", kinds, WHY["kinds"]),
        _section("PPO", _grid(reward_against_kl(ppo) + panels(ppo, "iteration")), WHY["ppo"]),
        _section(
            "Before PPO", _grid(before) + _reward_model(summary.get("reward_model")), WHY["before"]
        ),
        _section("Side by side", "".join(_comparison(s, stages) for s in samples), WHY["samples"]),
        _section("Configuration", configs),
    ]
    return _page(pathlib.Path(out_folder), "Alignment report", body)


def last_samples(run: str) -> list[dict[str, str]]:
    """The rows of the last section of samples.md."""
    path = pathlib.Path(run) / "samples.md"
    text = path.read_text() if path.exists() else ""
    section = re.split(r"^## Step \d+\n", text, flags=re.MULTILINE)[-1]
    blocks = re.findall(
        r"^\*\*(.+?)\*\*\n\n(`{3,})text\n(.*?)\n\2$|^(---)$", section, re.MULTILINE | re.DOTALL
    )
    rows: list[dict[str, str]] = [{}]
    for name, _, value, rule in blocks:
        if rule:
            rows.append({})
        else:
            rows[-1][name] = value
    return [row for row in rows if row]


# --- pieces of a page


def _headline(summary: dict[str, Any], stages: list[str]) -> str:
    numbers = "".join(
        f"<div class=stat><b>{_percent(summary[s].get('all'))}</b><span>{STAGES[s]}</span></div>"
        for s in stages
    )
    return (
        "<header><p class=kicker>Plumb</p><h1>Alignment report</h1><p class=lead>Held-out prompts answered"
        " helpfully, honestly and harmlessly, all three at once:</p>"
        f"<div class=stats>{numbers}</div></header>"
    )


def _criteria_table(summary: dict[str, Any], stages: list[str]) -> str:
    heads = "".join(f"<th scope=col>{STAGES[stage]}</th>" for stage in stages)
    lines = []
    for name, label in (*((c, c) for c in CRITERIA), ("all", "all three")):
        cells = "".join(f"<td>{_share(summary[stage], name, stage)}</td>" for stage in stages)
        lines.append(f"<tr class={name}><th scope=row>{label}</th>{cells}</tr>")
    for name, label in (
        ("kl", "KL to SFT, nats"),
        ("length", "length, tokens"),
        ("n", "responses"),
    ):
        cells = "".join(f"<td>{_value(summary[stage], name)}</td>" for stage in stages)
        lines.append(f"<tr><th scope=row>{label}</th>{cells}</tr>")
    return f"<div class=scroll><table><tr><th></th>{heads}</tr>{''.join(lines)}</table></div>"


def _kinds_table(summary: dict[str, Any], stages: list[str]) -> str:
    kinds = sorted({kind for stage in stages for kind in summary[stage].get("kinds", {})})
    if not kinds:
        return "<p>Not measured.</p>"
    lines = []
    for kind in kinds:
        entries = [summary[stage].get("kinds", {}).get(kind, {}) for stage in stages]
        cells = "".join(
            f"<td>{_share(e, 'all', s)}</td>" for e, s in zip(entries, stages, strict=True)
        )
        lines.append(
            f"<tr><th scope=row>{_e(kind)}</th>{cells}<td>{_e(entries[-1].get('n', ''))}</td></tr>"
        )
    heads = "".join(f"<th scope=col>{STAGES[stage]}</th>" for stage in stages)
    lines.insert(0, f"<tr><th></th>{heads}<th scope=col>n</th></tr>")
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def _share(entry: dict[str, Any], name: str, stage: str) -> str:
    """A share as a number and a bar on which the interval is drawn."""
    if (share := entry.get(name)) is None:
        return "–"
    low, high = entry.get(f"{name}_ci") or (share, share)
    interval = f"{_percent(low)} to {_percent(high)}"
    return (
        f"<b>{_percent(share)}</b> <small>{interval}</small><div class='bar {stage}' aria-hidden=true>"
        f"<i style='width:{100 * share:.1f}%'></i>"
        f"<u style='left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%'></u></div>"
    )


def _value(entry: dict[str, Any], name: str) -> str:
    if (value := entry.get(name)) is None:
        return "–"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:z.2f}"
    ci = entry.get(f"{name}_ci")
    return f"<b>{shown}</b>" + (f" <small>{ci[0]:z.2f} to {ci[1]:z.2f}</small>" if ci else "")


def _reward_model(entry: dict[str, Any] | None) -> str:
    if not entry:
        return ""
    parts = {"all pairs": entry.get("accuracy"), **(entry.get("by_criterion") or {})}
    cells = "".join(
        f"<div class=stat><b>{_percent(share)}</b><span>{_e(name)}</span></div>"
        for name, share in parts.items()
        if isinstance(share, int | float)
    )
    why = "Reward model: share of held-out pairs ranked as the gold program ranks them."
    return f"<p>{why}</p><div class='stats few'>{cells}</div>"


def _comparison(sample: dict[str, Any], stages: list[str]) -> str:
    cards = []
    for stage in (s for s in stages if s in sample):
        passed = {c: bool(sample[stage].get(c)) for c in CRITERIA}
        marks = "".join(
            f"<li class={'pass' if ok else 'fail'}>{'✓' if ok else '✗'} {c}</li>"
            for c, ok in passed.items()
        )
        text = _e(sample[stage]["response"]) or "<i>(empty)</i>"
        card = f"<h4>{STAGES[stage]}</h4><p class=text>{text}</p><ul class=marks>{marks}</ul>"
        cards.append(f"<article class='card {stage}'>{card}</article>")
    kind = f"<span class=kind>{_e(sample.get('kind', ''))}</span>"
    return f"<h3 class=text>{_e(sample['prompt'])} {kind}</h3><div class='grid three'>{''.join(cards)}</div>"


def _labelled(name: str, value: str) -> str:
    return f"<h4>{_e(name)}</h4><p class=text>{_e(value)}</p>"


def _config_table(config: dict[str, Any], prefix: str = "") -> str:
    lines = []
    for name, value in config.items():
        if isinstance(value, dict):
            lines.append(_config_table(value, f"{prefix}{name}."))
        else:
            shown = f"<td><code>{_e(json.dumps(value))}</code></td>"
            lines.append(f"<tr><th scope=row>{_e(prefix + name)}</th>{shown}</tr>")
    return (
        "".join(lines)
        if prefix
        else f"<div class=scroll><table class=config>{''.join(lines)}</table></div>"
    )


def _section(title: str, content: str, explanation: str = "") -> str:
    why = f"<p class=why>{explanation}</p>" if explanation else ""
    return f"<section><h2>{title}</h2>{why}{content}</section>"


def _grid(figures: list[str]) -> str:
    return f"<div class=grid>{''.join(figures)}</div>" if figures else ""


def _page(folder: pathlib.Path, title: str, body: list[str]) -> str:
    path = folder / "report.html"
    style = (pathlib.Path(__file__).with_name("report.css")).read_text()
    text = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{_e(title)}</title>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<style>{style}</style></head><body><main>{''.join(body)}</main></body></html>"
    )
    path.write_text(text, encoding="utf-8")
    return str(path)


def _e(value: Any) -> str:
    return html.escape(str(value))


def _percent(share: Any) -> str:
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
    )
