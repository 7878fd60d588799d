"""Evaluation: gold criteria and KL in the world; perplexity, reward-model accuracy and win rate on any data.

    python evaluate.py --run=runs/align                     # base, sft and ppo of `make align`: table and report
    python evaluate.py --measure=perplexity --policy=runs/sft --data=my_chats.jsonl
    python evaluate.py --measure=accuracy --reward=runs/rm --data=my_comparisons.jsonl
    python evaluate.py --measure=win_rate --policy=runs/ppo --against=runs/sft --reward=runs/rm --data=my.jsonl
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

import config as flags
from checkpoint import load_params
from config import UserError, load_config
from data import world
from data.batches import chat_batches, encode_comparison, pad_comparisons, pad_prompts
from data.sources import open_source
from data.tokenizer import Tokenizer
from generate import SamplingConfig, generate, join
from model import LanguageModel, ModelConfig, Params, ScalarModel, pure
from objectives.likelihood import likelihood_objective
from objectives.policy import response_logprobs
from objectives.reward import last_token
from report import alignment_report
from sharding import MeshConfig, make_mesh
from train_step import make_evaluation

CRITERIA = ("helpful", "honest", "harmless", "all")
Interval = tuple[float, list[float]]


# --- statistics


def share(hits: Sequence[bool]) -> Interval:
    """A share and its 95 % interval (Wilson 1927)."""
    n, z = len(hits), 1.96
    if not n:
        return float("nan"), [0.0, 1.0]
    p = float(np.mean(hits))
    centre, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return p, [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]


def mean(values: Sequence[float]) -> Interval:
    """A mean and its 95 % interval (normal)."""
    m, half = float(np.mean(values)), 1.96 * float(np.std(values)) / max(len(values) - 1, 1) ** 0.5
    return m, [m - half, m + half]


# --- the world


def make_measure(config: ModelConfig, sampling: SamplingConfig, tokenizer: Tokenizer, prompt_length: int) -> Callable:
    """measure(params, reference, prompts: texts, seed) -> one (response, length, KL to reference in nats) each."""
    _, apply = pure(LanguageModel(config))
    rows = 256

    @jax.jit
    def sample(params: Params, reference: Params, prompts: dict[str, jax.Array], key: jax.Array):
        samples = generate(apply, config, params, prompts, key, sampling, eos=tokenizer.eos, pad=tokenizer.pad)
        reference_BR = response_logprobs(apply, reference, join(prompts, samples), sampling.temperature)
        return samples, ((samples.logp_BR - reference_BR) * samples.mask_BR).sum(1)

    def measure(params: Params, reference: Params, prompts: Sequence[str], seed: int) -> list[tuple[str, int, float]]:
        out = []
        for start in range(0, len(prompts), rows):
            part = list(prompts[start : start + rows])
            padded = [{"tokens": tokenizer.prompt(text)} for text in part + part[:1] * (rows - len(part))]
            batch = pad_prompts(padded, prompt_length, tokenizer.pad, fixed=True)
            key = jax.random.fold_in(jax.random.key(seed), start)
            samples, kl_B = jax.device_get(sample(params, reference, batch, key))
            for b in range(len(part)):
                length = int(samples.mask_BR[b].sum())
                out.append((tokenizer.decode(samples.response_BR[b, :length].tolist()), length, float(kl_B[b])))
        return out

    return measure


def judged(requests: Sequence[world.Request], responses: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each response: the request's text and kind, the response, and what the gold program says."""
    rows = []
    for request, response in zip(requests, responses, strict=True):
        gold = world.gold(request.text, response)
        rows.append({"prompt": request.text, "kind": request.kind, "response": response, "all": bool(gold.all)})
        rows[-1] |= {name: bool(getattr(gold, name)) for name in CRITERIA[:3]}
    return rows


def distinct_answers(requests: Sequence[world.Request], responses: Sequence[str]) -> float:
    """Distinct answers given to lookups, as a share of the distinct right ones: below 1 where a policy collapses."""
    pairs = [(r.answer, world.extract_answer(r, t)) for r, t in zip(requests, responses, strict=True) if r.kind == "lookup"]
    right, given = {a for a, _ in pairs}, {g for _, g in pairs if g is not None}
    return len(given) / max(len(right), 1)


def summarise(rows: list[dict[str, Any]], lengths: Sequence[int], kls: Sequence[float]) -> dict[str, Any]:
    """Shares, mean length and KL of one model's responses, each with its interval as `<name>_ci`."""
    parts = {name: share([row[name] for row in rows]) for name in CRITERIA}
    parts |= {"kl": mean(kls), "length": mean(lengths)}
    out: dict[str, Any] = {"n": len(rows), "n_ci": [len(rows), len(rows)]}
    for name, (value, interval) in parts.items():
        out |= {name: value, f"{name}_ci": interval}
    kinds = {kind: [row["all"] for row in rows if row["kind"] == kind] for kind in world.KINDS}
    tables = {kind: (share(hits), len(hits)) for kind, hits in kinds.items()}
    return out | {"kinds": {kind: {"all": p, "all_ci": ci, "n": n} for kind, ((p, ci), n) in tables.items()}}


# --- reward models


def comparison_table(
    rewards_NC: np.ndarray, ranks_NC: np.ndarray, lengths_NC: np.ndarray, criteria: Sequence[str | None]
) -> dict[str, float]:
    """Accuracy over all pairs (ties out), by criterion, calibration error, and correlation of reward and length.

    The calibration error is the mean distance, over ten bins, of sigmoid(gap) from the share that is right.
    """
    n, i, j = np.nonzero((ranks_NC[:, :, None] > 0) & (ranks_NC[:, :, None] < ranks_NC[:, None, :]))
    gap = rewards_NC[n, i] - rewards_NC[n, j]
    right = gap > 0
    table = {"accuracy": float(right.mean()), "pairs": float(len(gap)), "margin": float(gap.mean())}
    for name in sorted({c for c in criteria if c}):
        of_name = np.array([criteria[k] == name for k in n])
        if of_name.any():
            table |= {f"accuracy/{name}": float(right[of_name].mean()), f"pairs/{name}": float(of_name.sum())}
    confidence = 1 / (1 + np.exp(-np.abs(gap)))
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    errors = [abs(confidence[bins == k].mean() - right[bins == k].mean()) * (bins == k).mean() for k in set(bins)]
    table["calibration_error"] = float(sum(errors))
    real = ranks_NC > 0
    if real.sum() > 2 and rewards_NC[real].std() > 0 and lengths_NC[real].std() > 0:
        table["length_correlation"] = float(np.corrcoef(rewards_NC[real], lengths_NC[real])[0, 1])
    return table


def make_comparison_evaluation(
    config: ModelConfig, source: Any, tokenizer: Tokenizer, length: int, most: int
) -> Callable[[Params], dict[str, float]]:
    """evaluate(params) -> `comparison_table` on the first `most` records of `source`, names prefixed by `eval/`."""
    _, apply = pure(ScalarModel(config))
    records = [source[i] for i in range(min(most, len(source)))]
    rows = [row for record in records for row in encode_comparison(record, tokenizer, length)[0]]
    if not rows:
        raise UserError(f"{source.name}: no comparison fits into {length} tokens; raise --length")
    size = min(128, len(rows))

    @jax.jit
    def rewards(params: Params, tokens_BT: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array):
        return last_token(apply(params, tokens_BT, segment_ids_BT, positions_BT), segment_ids_BT)

    def evaluate(params: Params) -> dict[str, float]:
        parts = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = pad_comparisons(
                part + part[:1] * (size - len(part)), length, tokenizer.pad, fixed=True, candidates=source.candidates
            )
            names = ("tokens_BCT", "segment_ids_BCT", "positions_BCT")
            flat = [batch[name].reshape(-1, length) for name in names]
            parts.append(np.asarray(rewards(params, *flat)).reshape(size, -1)[: len(part)])
        ranks_NC, lengths_NC = (np.zeros((len(rows), source.candidates), np.int64) for _ in range(2))
        for k, row in enumerate(rows):
            ranks_NC[k, : len(row["ranking"])] = row["ranking"]
            lengths_NC[k, : len(row["responses"])] = [len(tokens) for tokens in row["responses"]]
        criteria = [row["record"].get("criterion") for row in rows]
        table = comparison_table(np.concatenate(parts), ranks_NC, lengths_NC, criteria)
        return {f"eval/{name}": value for name, value in table.items()}

    return evaluate
