"""Choosing rows: brute force, closed forms, planted noise; each with a control."""

import itertools
import json
import queue
from functools import partial

import jax
import numpy as np
import pytest
from running import run

from benchmarks import select_rows
from data import selection, selection_isa
from evaluation.steps import auc
from runtime.errors import UserError

KEY = jax.random.key(3)
ONE_MINUS_1_OVER_E = 1 - np.exp(-1)


# --- one signature


@pytest.mark.parametrize("name", selection.SELECTIONS)
def test_every_selection_has_one_signature_and_chooses_distinct_rows(name, rng):
    embeddings = rng.normal(size=(300, 6)).astype(np.float32)
    scores = 0.6 + rng.random(300)
    labels = rng.integers(2, size=300)
    select = selection.SELECTIONS[name]
    for k in (1, 37, 300):
        chosen = select(embeddings, scores, labels, k, KEY)
        assert chosen.shape == (k,) and len(set(chosen.tolist())) == k
        assert chosen.min() >= 0 and chosen.max() < 300
        np.testing.assert_array_equal(chosen, select(embeddings, scores, labels, k, KEY))
    for k in (0, 301):
        with pytest.raises(UserError, match=f"{k} rows of 300"):
            select(embeddings, scores, labels, k, KEY)


def test_random_rows_are_uniform():
    counts = np.zeros(10)
    for i in range(2000):
        key = jax.random.key(i)
        counts[selection.random_rows(None, np.zeros(10), None, 3, key)] += 1
    # 600 each, with a standard deviation of 20.5.
    assert np.abs(counts - 600).max() < 4.5 * 20.5


def test_scores_are_ranked_and_bands_are_exact(rng):
    scores = rng.permutation(100).astype(float)
    by_value = np.argsort(scores)
    np.testing.assert_array_equal(selection.highest(None, scores, None, 5, KEY), by_value[:-6:-1])
    np.testing.assert_array_equal(selection.lowest(None, scores, None, 5, KEY), by_value[:5])
    band = selection.middle(None, scores, None, 20, KEY)
    assert sorted(scores[band]) == list(range(40, 60))
    fifth = selection.at_rank(None, scores, None, 20, KEY, rank=0.25)
    assert sorted(scores[fifth]) == list(range(20, 40))

    # Rows without a score are never chosen, and equal ones come as they stand.
    scores[by_value[-3:]] = np.nan
    assert selection.highest(None, scores, None, 1, KEY) == by_value[-4]
    with pytest.raises(UserError, match="98 rows of 97 that have a score"):
        selection.highest(None, scores, None, 98, KEY)
    same = np.ones(50)
    np.testing.assert_array_equal(selection.highest(None, same, None, 9, KEY), np.arange(9))


def test_the_first_yes_depends_on_the_order_and_p_of_yes_does_not(rng):
    scores = rng.random(200)
    shuffled = rng.permutation(200)
    first = selection.first_yes(None, scores, None, 20, KEY)
    np.testing.assert_array_equal(first, np.flatnonzero(scores > 0.5)[:20])
    again = shuffled[selection.first_yes(None, scores[shuffled], None, 20, KEY)]
    assert set(first.tolist()) != set(again.tolist())
    best = selection.highest(None, scores, None, 20, KEY)
    again = shuffled[selection.highest(None, scores[shuffled], None, 20, KEY)]
    assert set(best.tolist()) == set(again.tolist())
    with pytest.raises(UserError, match="0 are answered yes"):
        selection.first_yes(None, np.full(4, 0.5), None, 1, KEY)


def test_labels_keep_their_shares(rng):
    labels = np.array(["no"] * 70 + ["yes"] * 30)
    scores = np.arange(100.0)
    select = selection.within_labels(selection.highest)
    chosen = select(None, scores, labels, 10, KEY)
    assert sorted(chosen.tolist()) == [*range(63, 70), *range(97, 100)]
    # Control: alone it takes the highest of all.
    assert sorted(selection.highest(None, scores, labels, 10, KEY)) == list(range(90, 100))
    assert selection.whole_parts(np.array([1.5, 1.5, 7.0]), 10) == [2, 1, 7]


# --- Density


def exact_kernel_sums(x, width, hashes):
    distance = np.linalg.norm(x[:, None] - x[None], axis=2)
    return (selection.collision_probability(distance, width) ** hashes).sum(1)


def test_the_kernel_is_the_chance_to_meet_in_a_bucket(rng):
    """By simulation of the hash itself, at five distances."""
    draws = 200_000
    for distance in (0.1, 0.5, 1.0, 2.0, 5.0):
        first = rng.random(draws)
        second = first + rng.normal(size=draws) * distance / 1.5
        share = np.mean(np.floor(first) == np.floor(second))
        expected = float(selection.collision_probability(np.array(distance), 1.5))
        assert abs(share - expected) < 4.5 * (expected * (1 - expected) / draws) ** 0.5


def test_the_sketch_nears_the_kernel_sums_as_one_over_the_root_of_its_tables(rng):
    x = np.concatenate([rng.normal(size=(200, 5)), 0.2 * rng.normal(size=(100, 5)) + 3])
    exact = exact_kernel_sums(x, 2.0, 2)
    errors = []
    for repeats in (16, 64, 256, 1024):
        runs = []
        for i in range(4):
            found = selection.kernel_sums(x, jax.random.key(i), repeats=repeats, width=2.0)
            runs.append(np.mean((found - exact) ** 2))
        errors.append(np.mean(runs) ** 0.5)
    slope = np.polyfit(np.log([16, 64, 256, 1024]), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.12)
    assert errors[-1] < 0.03 * exact.mean()
    # Control: another kernel is not what it estimates.
    other = exact_kernel_sums(x, 2.0, 1)
    assert np.mean((found - other) ** 2) ** 0.5 > 5 * errors[-1]


def test_few_buckets_do_not_shift_the_sums(rng):
    x = rng.normal(size=(400, 4))
    exact = exact_kernel_sums(x, 1.0, 2)
    found = selection.kernel_sums(x, KEY, repeats=2048, width=1.0, buckets=64)
    assert found.mean() == pytest.approx(exact.mean(), rel=0.02)


def test_a_planted_crowd_is_drawn_less(rng):
    spread = 4 * rng.normal(size=(500, 8))
    crowd = 0.05 * rng.normal(size=(500, 8)) + 2
    x = np.concatenate([spread, crowd])
    sums = selection.kernel_sums(x, KEY)
    chosen = selection.inverse_propensity(None, sums, None, 100, KEY)
    assert np.mean(chosen >= 500) < 0.35
    assert (1 / sums[500:]).sum() < 0.25 * (1 / sums).sum()
    # Control: at random it is half.
    assert np.mean(selection.random_rows(x, None, None, 100, KEY) >= 500) > 0.35


def test_chances_are_inverse_to_scores():
    scores = np.array([1.0, 2.0, 4.0, 8.0])
    counts = np.zeros(4)
    for i in range(4000):
        counts[selection.inverse_propensity(None, scores, None, 1, jax.random.key(i))] += 1
    expected = (1 / scores) / (1 / scores).sum()
    assert np.abs(counts / 4000 - expected).max() < 4.5 * 0.5 / 4000**0.5


# --- greedy, against all sets of 4 of 12


def information(x, chosen, noise=0.1):
    unit = selection.unit_rows(x[list(chosen)]).astype(float)
    return np.linalg.slogdet(np.eye(len(unit)) + unit @ unit.T / noise)[1] / 2


def coverage(x, chosen):
    unit = selection.unit_rows(x)
    return ((1 + unit @ unit[list(chosen)].T) / 2).max(1).sum()


def radius(x, chosen):
    distance = np.linalg.norm(x[:, None] - x[list(chosen)][None], axis=2)
    return distance.min(1).max()


@pytest.mark.parametrize(
    ("select", "value"),
    [(selection.log_det, information), (selection.facility_location, coverage)],
    ids=["log_det", "facility"],
)
def test_greedy_reaches_its_bound_and_is_greedy(select, value, rng):
    for _ in range(5):
        x = rng.normal(size=(12, 3)).astype(np.float32)
        x[6:] = x[:6] + 0.01 * x[6:]
        best = max(value(x, chosen) for chosen in itertools.combinations(range(12), 4))
        chosen = select(x, None, None, 4, KEY)
        assert value(x, chosen) >= ONE_MINUS_1_OVER_E * best
        # Each step's gain is the largest there is: by computing the whole value anew.
        for step in range(4):
            before = chosen[:step]
            rest = [i for i in range(12) if i not in before]
            largest = max(value(x, [*before, i]) for i in rest)
            assert value(x, chosen[: step + 1]) == pytest.approx(largest, rel=1e-4)


def test_centres_are_within_twice_the_best_radius(rng):
    for i in range(5):
        x = rng.normal(size=(12, 3)).astype(np.float32)
        best = min(radius(x, chosen) for chosen in itertools.combinations(range(12), 4))
        chosen = selection.k_center(x, None, None, 4, jax.random.key(i))
        assert radius(x, chosen) <= 2 * best + 1e-5


@pytest.mark.parametrize("name", ["log_det", "facility", "k_center"])
def test_duplicates_are_never_picked_first(name, rng):
    x = np.repeat(rng.normal(size=(8, 16)), 4, axis=0)
    chosen = selection.SELECTIONS[name](x, None, None, 8, KEY)
    assert len(set((chosen // 4).tolist())) == 8
    # Control: at random some come twice.
    assert len(set((selection.random_rows(x, None, None, 8, KEY) // 4).tolist())) < 8


@pytest.mark.parametrize("name", ["log_det", "facility", "k_center"])
def test_blocks_and_few_candidates_lose_little(name, rng, monkeypatch):
    """At 1,200 rows in blocks of 200 against one block, or against all candidates."""
    x = rng.normal(size=(1200, 3)).astype(np.float32)
    value = {
        "log_det": information,
        "facility": coverage,
        "k_center": lambda x, chosen: 1 / radius(x, chosen),
    }[name]
    select = selection.SELECTIONS[name]
    monkeypatch.setattr(selection, "FEWEST", 1200)
    whole = value(x, select(x, None, None, 60, KEY))
    monkeypatch.setattr(selection, "FEWEST", 1)
    monkeypatch.setattr(selection, "BLOCK", 200)
    some = value(x, select(x, None, None, 60, KEY))
    at_random = value(x, selection.random_rows(x, None, None, 60, KEY))
    assert at_random < some
    # The radius is that of the one worst row.
    lost = 0.6 if name == "k_center" else selection.MISSED
    assert some >= (1 - lost) * whole


# --- ISA, in all readings


def left_out_one_by_one(log_likelihood, reading):
    """Return D by the loop that the paper prints."""
    low, high = log_likelihood.min(), log_likelihood.max()
    p = np.exp((log_likelihood - low) / (high - low))
    if reading in "CD":
        p = p / p.sum()

    def entropy(terms):
        return -(terms * np.log(terms)).sum()

    changes = []
    for i in range(len(p)):
        rest = np.delete(p, i)
        if reading == "D":
            rest = rest / rest.sum()
        changes.append(entropy(p) - entropy(rest))
    changes = np.array(changes)
    return np.abs(changes) if reading == "B" else changes


@pytest.mark.parametrize("reading", "ABCD")
def test_each_reading_is_the_loop_over_rows(reading, rng):
    log_likelihood = rng.normal(-20, 5, size=200)
    closed = selection_isa.entropy_changes(log_likelihood, reading)
    np.testing.assert_allclose(closed, left_out_one_by_one(log_likelihood, reading), atol=1e-10)


def test_readings_choose_opposite_rows(rng):
    x = np.concatenate([rng.normal(size=(600, 3)), 2 * rng.normal(size=(400, 3)) + 3])
    likelihood = selection_isa.log_likelihoods(x, KEY)
    order = np.argsort(likelihood)
    chosen = {r: selection_isa.isa(x, 100, reading=r, key=KEY) for r in "ABCD"}
    assert set(chosen["A"]) == set(order[:100])
    assert set(chosen["B"]) == set(chosen["C"]) == set(order[-100:])
    # D takes rows whose probability is about the mean's, far from both ends.
    assert not set(chosen["D"]) & (set(order[:100]) | set(order[-100:]))
    p = np.exp((likelihood - likelihood.min()) / np.ptp(likelihood))
    from_mean = np.abs(p / p.mean() - 1)
    assert from_mean[chosen["D"]].mean() < 0.3 * from_mean.mean()


@pytest.mark.parametrize("dimension", [2, 16, 64])
def test_the_printed_reading_chooses_planted_noise(dimension, rng):
    """A pool with 5 % of noise, 5 % chosen: reading A takes mostly noise, B and D hardly any."""
    count = 2000
    noisy = count // 20
    clean = np.concatenate(
        [rng.normal(size=(950, dimension)), rng.normal(size=(950, dimension)) + 4]
    )
    noise = 6 * rng.normal(size=(noisy, dimension)) + 2
    x = np.concatenate([clean, noise])
    share = {}
    for reading in "ABD":
        chosen = selection_isa.isa(x, noisy, reading=reading, key=KEY)
        share[reading] = np.mean(chosen >= count - noisy)
    assert share["A"] > 0.6
    assert max(share["B"], share["D"]) < 0.1


def test_the_mixture_is_found_and_its_likelihood_is_the_densitys(rng):
    first = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=3000)
    second = rng.multivariate_normal([5, -3], [[2, 0], [0, 0.3]], size=1000)
    mixture = selection_isa.fit_mixture(np.concatenate([first, second]), KEY)
    large = int(mixture.log_share_K.argmax())
    assert np.exp(mixture.log_share_K[large]) == pytest.approx(0.75, abs=0.03)
    np.testing.assert_allclose(mixture.mean_KD[large], [0, 0], atol=0.1)
    root = mixture.root_KDD[large]
    np.testing.assert_allclose(root @ root.T, [[1, 0.8], [0.8, 1]], atol=0.15)

    # At one point, written out with the inverse and the determinant.
    point = np.array([[0.5, -0.7]])
    total = 0.0
    for log_share, mean, root in zip(*mixture, strict=True):
        covariance = root @ root.T
        away = point[0] - mean
        square = away @ np.linalg.inv(covariance) @ away
        total += np.exp(log_share - square / 2) / (2 * np.pi * np.linalg.det(covariance) ** 0.5)
    joint = selection_isa.log_joint(mixture, point)
    assert np.logaddexp.reduce(joint, axis=1)[0] == pytest.approx(np.log(total))


def test_a_mixture_of_a_sample_ranks_as_that_of_all(rng, monkeypatch):
    x = np.concatenate([rng.normal(size=(3000, 4)), 2 * rng.normal(size=(1000, 4)) + 3])
    whole = selection_isa.log_likelihoods(x, KEY)
    monkeypatch.setattr(selection_isa, "FITTED", 1000)
    sampled = selection_isa.log_likelihoods(x, KEY)
    lowest = whole < np.quantile(whole, 0.1)
    assert auc(-sampled, lowest) > 0.97


# --- projection


def test_a_projection_keeps_distances(rng):
    x = rng.normal(size=(300, 2000))
    small = selection.projected(x, 256, KEY)
    assert small.shape == (300, 256)
    pairs = rng.integers(300, size=(2, 200))
    pairs = pairs[:, pairs[0] != pairs[1]]
    before = np.linalg.norm(x[pairs[0]] - x[pairs[1]], axis=1)
    after = np.linalg.norm(small[pairs[0]] - small[pairs[1]], axis=1)
    assert np.abs(after / before - 1).max() < 0.25
    assert selection.projected(x, 2000, KEY) is x


def test_bound_arguments_are_by_name():
    assert partial(selection.at_rank, rank=1.0)(None, np.arange(5.0), None, 1, KEY) == [4]


# --- the benchmark


def test_the_benchmark_writes_every_row_and_keeps_what_is_there(tmp_path, monkeypatch):
    def here(*arguments):
        results = queue.SimpleQueue()
        select_rows.timed(*arguments, results)
        return results.get()

    monkeypatch.setattr(select_rows, "in_a_process", here)
    flags = ["--rows=500", "--width=4", f"--out={tmp_path}", "--shares", "0.1"]
    first = run(select_rows, *flags, "--methods=random")["rows"]
    both = run(select_rows, *flags, "--methods=random,density", "--missing")["rows"]
    assert both[0] == first[0] and [row["method"] for row in both] == ["random", "density"]
    assert all(row["k"] == 50 and row["peak_mib"] >= row["before_mib"] > 0 for row in both)
    written = json.loads((tmp_path / "select-cpu.json").read_text())
    assert written["rows"] == both
    table = select_rows.table_of(written).splitlines()
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| random", "| density"]
