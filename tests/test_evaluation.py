"""Statistics of evaluations, against loops and definitions; tables that fit a terminal."""

import math
import random

import numpy as np
import pytest

from evaluation.alignment import STAGES, gold_table, summarise_alignment
from evaluation.gold import SampledResponse, distinct_answers
from evaluation.intervals import Interval, mean_interval, share_interval
from evaluation.reward_model import (
    accuracy,
    as_comparisons,
    calibration_error,
    comparison_table,
    criterion_table,
    length_correlation,
    ordered_pairs,
)
from evaluation.steps import first_error, step_table
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


@pytest.mark.parametrize("hits", [[0.0], [1.0] * 3, [0.5] * 7, [0, 0.5, 0, 0], [0.001] * 200])
def test_an_interval_of_values_in_0_to_1_lies_in_0_to_1(hits):
    for interval in (share_interval(hits), win_rate_table(np.array(hits), np.zeros(len(hits)))):
        low, high = interval["win_rate_ci"] if isinstance(interval, dict) else interval.ends
        value = interval["win_rate"] if isinstance(interval, dict) else interval.value
        assert 0 <= low <= value <= high <= 1


def test_values_between_0_and_1_count_as_so_many_more():
    """Their interval is that of as many hits as have their standard error."""
    rng = np.random.default_rng(3)
    values = rng.choice([0.0, 0.5, 0.5, 0.5, 1.0], size=100)
    found = share_interval(values)
    as_many = 100 * found.value * (1 - found.value) / values.var()
    for end in found.ends:
        error = math.sqrt(end * (1 - end) / as_many)
        assert abs(found.value - end) == pytest.approx(1.96 * error, rel=1e-9)
    # Control: hits of the same mean, and a mean of values anywhere.
    assert np.diff(share_interval([True] * 50 + [False] * 50).ends) > np.diff(found.ends)
    assert np.diff(mean_interval(values).ends) == pytest.approx(np.diff(found.ends), rel=0.05)


def test_a_mean_has_the_standard_error_of_its_values():
    # 1.96 x the deviation by n - 1, over the root of n: sqrt(5/3) / 2.
    half = 1.96 * math.sqrt(5 / 3) / 2
    interval = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert interval == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert mean_interval([7.0]) == (7.0, 7.0, 7.0)


def test_calibration_by_hand():
    """Two pairs of confidence sigmoid(1), one of them right; one sure pair; one tie."""
    sure = 1 / (1 + math.exp(-30.0))
    medium = 1 / (1 + math.exp(-1.0))
    gap_P = np.array([1.0, -1.0, 30.0, 0.0])
    expected = 0.5 * abs(medium - 0.5) + 0.25 * abs(sure - 1.0) + 0.25 * abs(0.5 - 0.5)
    assert calibration_error(gap_P) == pytest.approx(expected)
    # Another sign, and confidences of different bins do not cancel.
    assert calibration_error(-gap_P) == pytest.approx(
        0.5 * abs(medium - 0.5) + 0.25 * abs(sure - 0.0)
    )
    gap_P = np.array([0.3, -2.0])
    low, high = (1 / (1 + math.exp(-x)) for x in (0.3, 2.0))
    assert calibration_error(gap_P) == pytest.approx((abs(low - 1) + abs(high - 0)) / 2)


def test_pairs_are_of_one_prompt_and_the_better_one_comes_first():
    rewards_NC = np.array([[5.0, 1.0, 9.0], [0.0, 2.0, 4.0]])
    ranks_NC = np.array([[2, 1, 0], [1, 1, 2]])
    gap_P, prompt_P = ordered_pairs(rewards_NC, ranks_NC)
    assert gap_P.tolist() == [-4.0, -4.0, -2.0] and prompt_P.tolist() == [0, 1, 1]
    assert accuracy(np.array([1.0, 0.0, -1.0, 2.0])) == 2.5 / 4
    table = criterion_table(np.array([1.0, -1.0, 0.0]), np.array(["a", "b", "b"], object))
    assert table == {"accuracy/a": 1, "pairs/a": 1, "accuracy/b": 0.25, "pairs/b": 2}
    lengths = np.array([1.0, 2.0, 3.0])
    assert length_correlation(np.array([3.0, 2.0, 1.0]), lengths) == pytest.approx(-1)
    assert length_correlation(np.array([1.0, 1.0, 1.0]), lengths) is None
    assert length_correlation(np.array([1.0, 2.0]), lengths[:2]) is None


def test_a_solution_without_a_doubted_step_finds_no_error():
    """Of three with a wrong step one finds it; the fourth has none."""
    wrong = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    doubted = np.array([[0, 0, 0], [0, 1, 1], [0, 1, 0], [1, 0, 0]], bool)
    assert first_error(wrong, doubted) == pytest.approx(1 / 3)
    assert math.isnan(first_error(wrong[3:], doubted[3:]))


def test_a_logit_of_0_is_half_right():
    logits = np.array([[0.0, 0.0, 1.0, -1.0]])
    targets = np.array([[1.0, 0.0, 1.0, 1.0]])
    table = step_table(logits, targets, np.ones((1, 4)))
    assert table["accuracy"] == (0.5 + 0.5 + 1 + 0) / 4
    assert table["auc"] == pytest.approx((0.5 + 1 + 0) / 3)


def test_an_interval_shows_its_half_width():
    interval = Interval(0.5, 0.4, 0.6)
    assert str(interval) == "0.500 ±0.100"
    assert f"{interval:>14}" == "  0.500 ±0.100"
    assert share_interval([]).ends == [0.0, 1.0]


def test_what_is_not_finite_has_no_accuracy_and_wins_nothing():
    """A reward of nan is neither above another nor below it: not 0 of all pairs, but no number."""
    gaps = np.array([1.0, np.nan, 0.0])
    assert np.isnan(accuracy(gaps)) and np.isnan(calibration_error(gaps))
    assert accuracy(gaps[[0, 2]]) == 0.75
    np.testing.assert_array_equal(wins([np.nan, 2, 1], [0, 1, np.nan]), [np.nan, 1, np.nan])
    assert np.isnan(win_rate_table(np.array([np.nan, 2.0]), np.array([0.0, 1.0]))["win_rate"])


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


def test_an_alignment_says_how_often_ppo_is_better_than_sft():
    """By gold, prompt by prompt: better, worse, and two ties of which one is of good responses."""
    request = world.parse("what is the capital of sweden?")
    right, wrong = "it is stockholm.", "it is paris."
    said = {
        "base": [wrong, wrong, wrong, wrong],
        "sft": [wrong, right, right, wrong],
        "ppo": [right, right, right, wrong],
    }
    sampled = {}
    for stage, texts in said.items():
        sampled[stage] = [SampledResponse(text, 3, 0.5) for text in texts]
    summary, _ = summarise_alignment([request] * 4, sampled, {"eval/accuracy": 0.7})
    assert summary["ppo"]["win_rate"] == (1 + 0.5 * 3) / 4
    assert [summary[stage]["all"] for stage in STAGES] == [0, 0.5, 0.75]
    assert summary["ppo"]["distinct_answers"] == 2
    # A column a stage, in their order.
    (row,) = [line for line in gold_table(summary).splitlines() if line.startswith("lookup")]
    assert row.split() == ["lookup", "0.000", "0.500", "0.750", "4"]


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
