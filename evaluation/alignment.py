"""Base, SFT and PPO side by side in the world: summary.json, and its table for a terminal."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.gold import (
    CRITERIA,
    GoldRow,
    SampledResponse,
    distinct_answers,
    gold_rows,
    summarise,
)
from evaluation.intervals import Interval
from evaluation.tables import cells
from evaluation.win_rate import wins
from tasks import world

STAGES = ("base", "sft", "ppo")
# Prompts whose responses the report shows.
SHOWN = 40
Rows = dict[str, list[GoldRow]]
"""Stage -> a row for each request."""


def summarise_alignment(
    requests: Sequence[world.Request],
    sampled: dict[str, list[SampledResponse]],
    reward_metrics: dict[str, float],
) -> tuple[dict[str, Any], Rows]:
    """Return (summary, rows): what summary.json holds, and each stage's gold rows.

    `sampled`: for each of STAGES a response to each request. `reward_metrics`: the reward model's
    last row of metrics.jsonl. The summary has an entry for each stage (`summarise`, and
    `distinct_answers`; of ppo also `win_rate`, over SFT by gold) and `reward_model`.
    """
    # Each stage by itself.
    summary: dict[str, Any] = {}
    rows: Rows = {}
    for stage, responses in sampled.items():
        texts, lengths, kls = zip(*responses, strict=True)
        rows[stage] = gold_rows(requests, texts)
        summary[stage] = summarise(rows[stage], lengths, kls)
        summary[stage]["distinct_answers"] = distinct_answers(requests, texts)

    # PPO beside SFT, prompt by prompt.
    ppo = [row["all"] for row in rows["ppo"]]
    sft = [row["all"] for row in rows["sft"]]
    win_rate = np.mean(wins(ppo, sft))
    summary["ppo"]["win_rate"] = float(win_rate)
    summary["reward_model"] = summarise_reward_model(reward_metrics)
    return summary, rows


def summarise_reward_model(metrics: dict[str, float]) -> dict[str, Any]:
    """Keep the `eval/` metrics without that prefix, and accuracies again as `by_criterion`."""
    measured = with_prefix(metrics, "eval/")
    return {**measured, "by_criterion": with_prefix(measured, "accuracy/")}


def with_prefix(values: dict[str, float], prefix: str) -> dict[str, float]:
    """Return the entries whose names begin with `prefix`, without it."""
    found = {}
    for name, value in values.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = value
    return found


def sample_rows(requests: Sequence[world.Request], rows: Rows) -> list[dict[str, Any]]:
    """Return for each of the first requests its prompt and kind, and each stage's gold row."""
    samples = []
    for i, request in enumerate(requests[:SHOWN]):
        sample: dict[str, Any] = {"prompt": request.text, "kind": request.kind}
        for stage, own in rows.items():
            sample[stage] = own[i]
        samples.append(sample)
    return samples


# ---- The table: text of at most 80 columns ----


def gold_table(summary: dict[str, Any]) -> str:
    """Show the summary of an alignment: criteria, kinds of requests, the reward model."""
    lines = [
        *criteria_lines(summary),
        "",
        *kind_lines(summary),
        "",
        *reward_model_lines(summary["reward_model"]),
    ]
    return "\n".join(lines)


def criteria_lines(summary: dict[str, Any]) -> list[str]:
    """Show a row for each stage: criteria with intervals, KL, length."""
    header = cells(CRITERIA, ">14")
    lines = [f"{'':8}{header}{'KL':>8}{'length':>8}"]
    for stage in STAGES:
        row = summary[stage]
        shares = []
        for name in CRITERIA:
            low, high = row[f"{name}_ci"]
            shares.append(Interval(row[name], low, high))
        # `z`: a KL that rounds to 0 has no sign.
        rest = f"{row['kl']:>z8.2f}{row['length']:>8.1f}"
        lines.append(f"{stage:8}{cells(shares, '>14')}{rest}")
    count = summary["sft"]["n"]
    lines.append(
        f"share of {count} held-out prompts, 95 % intervals; KL to sft in nats a response"
    )
    return lines


def kind_lines(summary: dict[str, Any]) -> list[str]:
    """Show a row for each kind of request: the share that passes all criteria, stage by stage."""
    header = cells(STAGES, ">10")
    lines = [f"{'passes all, by kind':22}{header}{'n':>8}"]
    for kind in summary["sft"]["kinds"]:
        entries = [summary[stage]["kinds"][kind] for stage in STAGES]
        shares = [entry["all"] for entry in entries]
        count = entries[0]["n"]
        lines.append(f"{kind:22}{cells(shares, '>10.3f')}{count:>8}")

    # The last row: a policy that has collapsed shows here.
    ratios = [summary[stage]["distinct_answers"] for stage in STAGES]
    lines.append(f"{'distinct answers':22}{cells(ratios, '>10.3f')}")
    return lines


def reward_model_lines(measured: dict[str, Any]) -> list[str]:
    """Show the reward model's accuracy on held-out pairs, over all and by criterion."""
    accuracy = measured.get("accuracy", float("nan"))
    parts = []
    for name, value in measured["by_criterion"].items():
        parts.append(f"{name} {value:.3f}")
    return [
        f"reward model on held-out pairs: {accuracy:.3f}",
        "  " + ", ".join(parts),
    ]
