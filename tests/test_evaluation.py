"""Statistics of evaluations, against loops and definitions; tables that fit a terminal."""

import math
import random

import numpy as np
import pytest

from evaluation.alignment import STAGES, gold_table, summarise_alignment
from evaluation.gold import SampledResponse, distinct_answers
from evaluation.intervals import Interval, mean_interval, share_interval
from evaluation.reward_model import as_comparisons, comparison_table
from evaluation.win_rate import win_rate_table, wins
from tasks import world


@pytest.fixture(scope="module")
def comparisons():
    """Return rewards, ranks, lengths and criteria of 60 prompts, some of whose candidates tie."""
    rng = np.random.default_rng(0)
    ranks_NC = rng.integers(0, 4, size=(60, 4))
    rewards_NC = np.where(ranks_NC > 0, rng.normal(size=(60, 4)) - ranks_NC, 0.0)
    lengths_NC = rng.integers(1, 30, size=(60, 4))
    criteria = [("helpful", "honest", None)[n % 3] for n in range(60)]
    return rewards_NC, ranks_NC, lengths_NC, criteria


def pairs_by_loop(rewards_NC, ranks_NC, criteria):
    """Return (gap, criterion) of each pair of candidates with different ranks."""
    pairs = []
    for rewards, ranks, criterion in zip(rewards_NC, ranks_NC, criteria, strict=True):
        for i in range(4):
            for j in range(4):
                if ranks[i] > 0 and ranks[i] < ranks[j]:
                    pairs.append((rewards[i] - rewards[j], criterion))
    return pairs


def test_accuracies_and_margin_are_those_of_a_loop_over_pairs(comparisons):
    rewards_NC, ranks_NC, _, criteria = comparisons
    table = comparison_table(*comparisons)
    pairs = pairs_by_loop(rewards_NC, ranks_NC, criteria)
    gaps = [gap for gap, _ in pairs]
    assert table["pairs"] == len(pairs) > 100
    assert table["accuracy"] == pytest.approx(np.mean([gap > 0 for gap in gaps]))
    assert table["margin"] == pytest.approx(np.mean(gaps))
    for name in ("helpful", "honest"):
        own = [gap > 0 for gap, criterion in pairs if criterion == name]
        assert table[f"accuracy/{name}"] == pytest.approx(np.mean(own))
        assert table[f"pairs/{name}"] == len(own)
    assert "accuracy/None" not in table


def test_length_correlation_is_of_candidates_alone(comparisons):
    rewards_NC, ranks_NC, lengths_NC, _ = comparisons
    real = [(n, c) for n in range(60) for c in range(4) if ranks_NC[n, c] > 0]
    rewards = [rewards_NC[at] for at in real]
    lengths = [lengths_NC[at] for at in real]
    expected = np.corrcoef(rewards, lengths)[0, 1]
    assert comparison_table(*comparisons)["length_correlation"] == pytest.approx(expected)
    same = comparison_table(*comparisons[:2], np.ones((60, 4)), comparisons[3])
    assert "length_correlation" not in same  # lengths that do not differ correlate with nothing


def test_a_calibrated_reward_has_no_calibration_error():
    """Pairs that are right as often as sigmoid(gap) says; one that is too sure has an error."""
    rng = np.random.default_rng(1)
    gap_N = np.abs(rng.normal(size=20_000)) * 2
    flips_N = rng.uniform(size=20_000) > 1 / (1 + np.exp(-gap_N))
    rewards_NC = np.stack([gap_N * np.where(flips_N, -1, 1), np.zeros(20_000)], 1)
    ranks_NC = np.tile([1, 2], (20_000, 1))
    lengths_NC = np.ones((20_000, 2))
    criteria = [None] * 20_000
    calibrated = comparison_table(rewards_NC, ranks_NC, lengths_NC, criteria)
    too_sure = comparison_table(3 * rewards_NC, ranks_NC, lengths_NC, criteria)
    assert calibrated["calibration_error"] < 0.01
    assert too_sure["calibration_error"] > 0.1


def test_rankings_of_different_lengths_lie_in_one_array():
    class Letters:
        def encode(self, text):
            return list(text)

    records = [
        {"prompt": "p", "responses": ["a", "bb"], "ranking": [2, 1]},
        {"prompt": "q", "responses": ["c", "dd", "eee"], "ranking": [1, 1, 2], "criterion": "all"},
    ]
    found = as_comparisons(records, Letters())
    assert found.ranks_NC.tolist() == [[2, 1, 0], [1, 1, 2]]
    assert found.lengths_NC.tolist() == [[1, 2, 0], [1, 2, 3]]
    assert found.prompts == ["p", "p", "q", "q", "q"]
    assert found.responses == ["a", "bb", "c", "dd", "eee"]
    assert found.criteria == [None, "all"]


@pytest.mark.parametrize("hits, count", [(0, 10), (3, 10), (10, 10), (500, 1000)])
def test_a_shares_interval_holds_what_wilson_says(hits, count):
    """Its ends are the shares p of which the observed one is 1.96 standard errors away."""
    found = share_interval([True] * hits + [False] * (count - hits))
    assert found.value == hits / count
    for end in found.ends:
        if 0 < end < 1:
            error = math.sqrt(end * (1 - end) / count)
            assert abs(found.value - end) == pytest.approx(1.96 * error, rel=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(2)
    shares = [share_interval(rng.uniform(size=50) < 0.3) for _ in range(2000)]
    means = [mean_interval(rng.normal(1.0, 2.0, size=50)) for _ in range(2000)]
    assert np.mean([found.low < 0.3 < found.high for found in shares]) == pytest.approx(
        0.95, abs=0.02
    )
    assert np.mean([found.low < 1.0 < found.high for found in means]) == pytest.approx(
        0.95, abs=0.02
    )


def test_an_interval_shows_its_half_width():
    interval = Interval(0.5, 0.4, 0.6)
    assert str(interval) == "0.500 ±0.100"
    assert f"{interval:>14}" == "  0.500 ±0.100"
    assert share_interval([]).ends == [0.0, 1.0]


def test_ties_are_half_a_win():
    assert wins([1, 2, 3], [2, 2, 2]).tolist() == [0, 0.5, 1]
    table = win_rate_table(np.array([1.0, 2, 3, 4]), np.array([2.0, 2, 2, 2]))
    assert table["win_rate"] == 0.625 and table["n"] == 4
    assert table["reward"] == 2.5 and table["reward_against"] == 2.0


def test_a_collapsed_policy_gives_few_distinct_answers():
    requests = [world.prompt(i, split="heldout") for i in range(300)]
    lookups = [request for request in requests if request.kind == "lookup"]
    right = [world.respond(request, 1.0, random.Random(0)) for request in lookups]
    assert distinct_answers(lookups, right) == 1.0
    assert distinct_answers(lookups, [right[0]] * len(right)) < 0.1


def test_the_table_of_an_alignment_fits_a_terminal():
    requests = [world.prompt(i, split="heldout") for i in range(40)]
    sampled = {
        stage: [SampledResponse("i do not know.", 6, 0.1)] * len(requests) for stage in STAGES
    }
    metrics = {"step": 9.0, "eval/accuracy": 0.7, "eval/accuracy/honest": 0.8}
    summary, rows = summarise_alignment(requests, sampled, metrics)
    assert summary["ppo"]["win_rate"] == 0.5  # the same responses
    assert summary["reward_model"]["by_criterion"] == {"honest": 0.8}
    assert [len(rows[stage]) for stage in STAGES] == [40] * 3
    lines = gold_table(summary).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("0.700" in line for line in lines)
