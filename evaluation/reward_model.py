"""Measures of a reward model on held-out comparisons: accuracy, calibration, correlation with length."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from data.batches import cut_left, encode_comparison, pad_prompts
from data.tokenizer import Tokenizer
from model import Params, ScalarModel, init_and_apply
from model_config import ModelConfig
from objectives.likelihood import inputs
from objectives.reward import last_token
from runtime.errors import UserError
from sharding import to_host


def comparison_table(
    rewards_NC: np.ndarray,
    ranks_NC: np.ndarray,
    lengths_NC: np.ndarray,
    criteria: Sequence[str | None],
) -> dict[str, float]:
    """Accuracy over all pairs (ties out), by criterion, calibration error, and correlation of reward and length.

    The calibration error is the mean distance, over ten bins, of sigmoid(gap) from the share that is right.
    """
    n, i, j = np.nonzero(
        (ranks_NC[:, :, None] > 0) & (ranks_NC[:, :, None] < ranks_NC[:, None, :])
    )
    gap = rewards_NC[n, i] - rewards_NC[n, j]
    right = gap > 0
    table = {
        "accuracy": float(right.mean()),
        "pairs": float(len(gap)),
        "margin": float(gap.mean()),
    }
    for name in sorted({c for c in criteria if c}):
        of_name = np.array([criteria[k] == name for k in n])
        if of_name.any():
            table |= {
                f"accuracy/{name}": float(right[of_name].mean()),
                f"pairs/{name}": float(of_name.sum()),
            }
    confidence = 1 / (1 + np.exp(-np.abs(gap)))
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    errors = [
        abs(confidence[bins == k].mean() - right[bins == k].mean()) * (bins == k).mean()
        for k in set(bins)
    ]
    table["calibration_error"] = float(sum(errors))
    real = ranks_NC > 0
    if real.sum() > 2 and rewards_NC[real].std() > 0 and lengths_NC[real].std() > 0:
        table["length_correlation"] = float(np.corrcoef(rewards_NC[real], lengths_NC[real])[0, 1])
    return table


def make_scorer(
    config: ModelConfig, tokenizer: Tokenizer, length: int
) -> Callable[..., list[float]]:
    """score(params, prompts, responses) -> the reward of each response, as a list of floats."""
    _, apply = init_and_apply(ScalarModel(config))
    rows = 128

    @jax.jit
    def rewards(
        params: Params, tokens_BT: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array
    ):
        output = apply(params, tokens_BT, segment_ids_BT, positions_BT)
        return last_token(output.scalars_BT, segment_ids_BT)

    def score(params: Params, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        out: list[float] = []
        for start in range(0, len(prompts), rows):
            pairs = list(
                zip(prompts[start : start + rows], responses[start : start + rows], strict=True)
            )
            answers = [[*tokenizer.encode(response), tokenizer.eos] for _, response in pairs]
            rooms = [max(length - len(answer), 8) for answer in answers]
            asked = [
                cut_left(tokenizer.prompt(p), n, tokenizer)
                for (p, _), n in zip(pairs, rooms, strict=True)
            ]
            tokens = [[*p, *answer][-length:] for p, answer in zip(asked, answers, strict=True)]
            padded = [{"tokens": t} for t in tokens + tokens[:1] * (rows - len(tokens))]
            batch = pad_prompts(padded, length, tokenizer.pad, fixed=True)
            out += to_host(rewards(params, *inputs(batch)))[: len(tokens)].tolist()
        return out

    return score


def make_comparison_evaluation(
    config: ModelConfig, source: Any, tokenizer: Tokenizer, length: int, most: int
) -> Callable[[Params], dict[str, float]]:
    """evaluate(params) -> `comparison_table` on the first `most` records of `source`, names prefixed by `eval/`."""
    records = [source[i] for i in range(min(most, len(source)))]
    records = [record for record in records if encode_comparison(record, tokenizer, length)[0]]
    if not records:
        raise UserError(f"{source.name}: no comparison fits into {length} tokens; raise --length")
    score = make_scorer(config, tokenizer, length)
    flat = [(record["prompt"], response) for record in records for response in record["responses"]]
    shape = (len(records), max(len(record["responses"]) for record in records))
    real_NC = (
        np.arange(shape[1]) < np.array([len(record["responses"]) for record in records])[:, None]
    )
    ranks_NC, lengths_NC = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    ranks_NC[real_NC] = [rank for record in records for rank in record["ranking"]]
    lengths_NC[real_NC] = [len(tokenizer.encode(response)) for _, response in flat]
    criteria = [record.get("criterion") for record in records]

    def evaluate(params: Params) -> dict[str, float]:
        rewards_NC = np.zeros(shape)
        rewards_NC[real_NC] = score(params, *zip(*flat, strict=True))
        table = comparison_table(rewards_NC, ranks_NC, lengths_NC, criteria)
        return {f"eval/{name}": value for name, value in table.items()}

    return evaluate
