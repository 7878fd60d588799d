"""Measures of a reward model on held-out comparisons: accuracy, calibration, length."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data.batches import encode_comparison
from data.records import Record
from data.sources import Source
from data.tokenizer import Tokenizer
from evaluation.tables import evaluated_records
from model import Params
from model_config import ModelConfig
from rewards.models import Prompt, make_text_scorer
from runtime.errors import require

# Of confidence between 1/2 and 1, in the calibration error.
BINS = 10


# ---- Statistics: arrays in, numbers out. N prompts, C candidates, P pairs ----


def ordered_pairs(rewards_NC: np.ndarray, ranks_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (gaps [P], prompts [P]) of all pairs of candidates to one prompt, ties left out.

    A gap is the better candidate's reward less the worse one's; ranks as in `comparison_table`.
    """
    first_NC1 = ranks_NC[:, :, None]
    second_N1C = ranks_NC[:, None, :]
    # Both are candidates, and the first has the better (lower) rank.
    ordered_NCC = (first_NC1 > 0) & (first_NC1 < second_N1C)
    prompt_P, better_P, worse_P = np.nonzero(ordered_NCC)
    better_reward_P = rewards_NC[prompt_P, better_P]
    worse_reward_P = rewards_NC[prompt_P, worse_P]
    return better_reward_P - worse_reward_P, prompt_P


def right_order(gap_P: np.ndarray) -> np.ndarray:
    """Return [P]: 1 where the better candidate has the higher reward, 1/2 for a tie, else 0.

    A gap of nan has nan.
    """
    right_P = (gap_P > 0) + 0.5 * (gap_P == 0)
    return np.where(np.isnan(gap_P), np.nan, right_P)


def accuracy(gap_P: np.ndarray) -> float:
    """Return the share of pairs in the right order, equal rewards a half: 1/2 for a constant."""
    return float(right_order(gap_P).mean())


def criterion_table(gap_P: np.ndarray, criterion_P: np.ndarray) -> dict[str, float]:
    """Return `accuracy/<criterion>` and `pairs/<criterion>`, the number of its pairs."""
    table = {}
    for name in sorted({name for name in criterion_P if name}):
        gaps = gap_P[criterion_P == name]
        table[f"accuracy/{name}"] = accuracy(gaps)
        table[f"pairs/{name}"] = float(len(gaps))
    return table


def calibration_error(gap_P: np.ndarray) -> float:
    """Return the mean distance of confidence from accuracy, over bins of equal confidence.

    Confidence is sigmoid(|gap|), the probability that Bradley-Terry gives the pair's own order.
    nan where a gap is.
    """
    if np.isnan(gap_P).any():
        return float("nan")
    right_P = right_order(gap_P)
    size_P = np.abs(gap_P)
    confidence_P = 1 / (1 + np.exp(-size_P))
    # Confidence lies in [1/2, 1]; 1 itself belongs to the last bin.
    bin_P = ((confidence_P - 0.5) * 2 * BINS).astype(int)
    bin_P = np.minimum(bin_P, BINS - 1)

    # Each bin counts by its share of the pairs.
    errors = []
    for number in set(bin_P.tolist()):
        inside_P = bin_P == number
        confidence = confidence_P[inside_P].mean()
        distance = abs(confidence - right_P[inside_P].mean())
        errors.append(distance * inside_P.mean())
    return float(sum(errors))


def length_correlation(rewards: np.ndarray, lengths: np.ndarray) -> float | None:
    """Return the correlation of rewards and lengths; None where it is not defined."""
    if len(rewards) <= 2:
        return None
    if rewards.std() == 0 or lengths.std() == 0:
        return None
    return float(np.corrcoef(rewards, lengths)[0, 1])


def comparison_table(
    rewards_NC: np.ndarray,
    ranks_NC: np.ndarray,
    lengths_NC: np.ndarray,
    criteria: Sequence[str | None],
) -> dict[str, float]:
    """Measure the rewards of ranked candidates.

    Ranks: 1 is best, equal ones are a tie, 0 is no candidate. `lengths_NC`: tokens of each.
    `criteria`: for each prompt the name of what its candidates differ in, or None. Returns
    `accuracy`, `pairs` (how many), `margin` (mean gap), accuracy and pairs by criterion,
    `calibration_error`, and `length_correlation` where it is defined.
    """
    # Statistics of pairs.
    gap_P, prompt_P = ordered_pairs(rewards_NC, ranks_NC)
    criterion_P = np.array([criteria[n] for n in prompt_P], object)
    table = {
        "accuracy": accuracy(gap_P),
        "pairs": float(len(gap_P)),
        "margin": float(gap_P.mean()),
        **criterion_table(gap_P, criterion_P),
        "calibration_error": calibration_error(gap_P),
    }
    # A statistic of single responses.
    real_NC = ranks_NC > 0
    correlation = length_correlation(rewards_NC[real_NC], lengths_NC[real_NC])
    if correlation is not None:
        table["length_correlation"] = correlation
    return table


# ---- A reward model on records ----


class Comparisons(NamedTuple):
    """Ranked responses as arrays, and as the flat lists that a scorer of texts takes."""

    prompts: list[Prompt]
    """The prompt of each response, in the order of `ranks_NC[ranks_NC > 0]`."""
    responses: list[str]
    ranks_NC: np.ndarray
    lengths_NC: np.ndarray
    """Tokens of each response, without an end token; 0 where there is none."""
    criteria: list[str | None]


def as_comparisons(records: Sequence[Record], tokenizer: Tokenizer) -> Comparisons:
    """Lay out comparison records (data/records.py) of any number of responses each."""
    prompts: list[Prompt] = []
    responses: list[str] = []
    # As wide as the longest ranking; a rank of 0 says that there is no candidate.
    most = max(len(record["responses"]) for record in records)
    shape = (len(records), most)
    ranks_NC = np.zeros(shape, np.int64)
    lengths_NC = np.zeros(shape, np.int64)
    for n, record in enumerate(records):
        texts = record["responses"]
        ranks_NC[n, : len(texts)] = record["ranking"]
        for c, text in enumerate(texts):
            lengths_NC[n, c] = len(tokenizer.encode(text))
        prompts += [record["prompt"]] * len(texts)
        responses += texts
    criteria = [record.get("criterion") for record in records]
    return Comparisons(prompts, responses, ranks_NC, lengths_NC, criteria)


def make_comparison_evaluation(
    config: ModelConfig, source: Source, tokenizer: Tokenizer, length: int, most: int
) -> Callable[[Params], dict[str, float]]:
    """Make the evaluation of a reward model of shape `config` on comparisons.

    It reads the first `most` records of `source`. Returns evaluate(params) -> `comparison_table`
    with names prefixed by `eval/`. Records whose responses do not fit into `length` tokens are
    left out, with a note; raises UserError where none is left, or all of them tie.
    """
    # The records, and what of them does not depend on parameters.
    records = evaluated_records(source, encode_comparison, tokenizer, length, most)
    prompts, responses, ranks_NC, lengths_NC, criteria = as_comparisons(records, tokenizer)
    gap_P, _ = ordered_pairs(np.zeros(ranks_NC.shape), ranks_NC)
    require(gap_P.size > 0, f"{source.name}: its responses tie; give comparisons that differ")
    score_texts = make_text_scorer(config, tokenizer, length)

    def evaluate(params: Params) -> dict[str, float]:
        rewards_NC = np.zeros(ranks_NC.shape)
        rewards_NC[ranks_NC > 0] = score_texts(params, prompts, responses)
        table = comparison_table(rewards_NC, ranks_NC, lengths_NC, criteria)
        return {f"eval/{name}": value for name, value in table.items()}

    return evaluate
