"""Curves through scores at budgets: planted parameters, the paper's own tables, intervals."""

import numpy as np
import pytest

from evaluation import fits
from runtime.errors import UserError

# arXiv 2411.10545, its table 2: percent of the data, and the scores of three data sets.
PERCENT = np.array([0.0, 10, 25, 50, 75, 100])
PRINTED = {
    "hh": (
        [18.2663, 78.7257, 81.3208, 81.5986, 83.1681, 82.7093],
        {"r": 83.1681, "a": 18.2681, "b": 0.3},
    ),
    "oa": (
        [8.4452, 15.2327, 10.4157, 17.5105, 21.6901, 24.6601],
        {"r": 24.6601, "a": 8.4452, "b": 0.02},
    ),
    "uf": (
        [7.6038, 17.1336, 23.7403, 23.9798, 27.4849, 26.869],
        {"r": 27.4849, "a": 7.6038, "b": 0.055},
    ),
}


@pytest.mark.parametrize(("name", "expected"), [("hh", 0.998), ("uf", 0.971), ("oa", 0.793)])
def test_the_papers_own_parameters_on_its_own_table(name, expected):
    scores, parameters = PRINTED[name]
    printed = fits.plateau_value(PERCENT, **parameters)
    assert fits.r_squared(np.array(scores), printed) == pytest.approx(expected, abs=5e-4)


def test_the_slowest_of_the_papers_curves_is_a_line():
    """On OpenAssistant a line fits better than the printed plateau, and least squares says so."""
    scores, _ = PRINTED["oa"]
    line = fits.fit(fits.LINE, PERCENT, scores)
    assert line.r_squared == pytest.approx(0.861, abs=5e-4)
    slow = fits.fit(fits.PLATEAU, PERCENT, scores)
    assert slow.at_bound
    assert slow.r_squared == pytest.approx(line.r_squared, abs=2e-3)
    assert line.aic < slow.aic
    # Control: where there is a plateau, it is told.
    scores, _ = PRINTED["hh"]
    assert not fits.fit(fits.PLATEAU, PERCENT, scores).at_bound
    kin = fits.compare(PERCENT, scores, curves=(fits.LINE, fits.LOGARITHM, fits.PLATEAU))
    assert [fit.name for fit in kin] == ["plateau", "logarithm", "line"]
    scores, _ = PRINTED["uf"]
    assert fits.fit(fits.LOGARITHM, PERCENT, scores).r_squared == pytest.approx(0.976, abs=5e-4)


PLANTED = {
    fits.PLATEAU: {"r": 80.0, "a": 20.0, "b": 0.07},
    fits.POWER: {"floor": 1.5, "scale": 4.0, "exponent": 0.6},
    fits.LOGARITHM: {"start": 3.0, "slope": 2.0},
    fits.LINE: {"start": 3.0, "slope": -0.2},
    fits.SIGMOID: {"low": 0.1, "high": 0.8, "middle": 12.0, "exponent": 1.7},
}


@pytest.mark.parametrize("curve", PLANTED, ids=lambda curve: curve.name)
def test_planted_parameters_are_recovered(curve, rng):
    x = np.linspace(0, 100, 60)
    y = curve.value(x, **PLANTED[curve])
    exact = fits.fit(curve, x, y)
    assert exact.parameters == pytest.approx(PLANTED[curve], rel=1e-3)
    assert not exact.at_bound

    # With noise of a hundredth of the curve's height, and it stays the best of all.
    height = np.ptp(y)
    noisy = fits.compare(x, y + rng.normal(0, height / 100, x.shape))
    by_name = {fit.name: fit for fit in noisy}
    assert by_name[curve.name].parameters == pytest.approx(PLANTED[curve], rel=0.25)
    assert by_name[curve.name].aic < noisy[0].aic + 6
    wrong = "line" if curve is not fits.LINE else "logarithm"
    assert by_name[wrong].aic > by_name[curve.name].aic + 10


def test_a_plateau_is_r_a_b():
    r, a, b = fits.plateau(PERCENT, fits.plateau_value(PERCENT, 50.0, 10.0, 0.1))
    assert (r, a, b) == pytest.approx((50, 10, 0.1), rel=1e-4)


def test_weights_are_repeated_points(rng):
    x = np.array([0.0, 5, 10, 20, 40, 80])
    y = fits.plateau_value(x, 9, 2, 0.05) + rng.normal(0, 0.5, x.shape)
    counts = np.array([1, 4, 2, 1, 3, 1])
    weighted = fits.fit(fits.PLATEAU, x, y, counts)
    repeated = fits.fit(fits.PLATEAU, np.repeat(x, counts), np.repeat(y, counts))
    assert weighted.parameters == pytest.approx(repeated.parameters, rel=1e-3)
    assert weighted.r_squared == pytest.approx(repeated.r_squared, rel=1e-6)
    plain = fits.fit(fits.PLATEAU, x, y)
    assert plain.parameters != pytest.approx(weighted.parameters, rel=1e-3)


def test_criterion_is_twice_the_parameters_less_the_log_likelihood(rng):
    """AIC up to a constant: by the normal likelihood at its best width."""
    error = rng.normal(0, 2, 40)
    width = np.sqrt(np.mean(error**2))
    log_likelihood = -np.log(width * np.sqrt(2 * np.pi)) - error**2 / (2 * width**2)
    constant = 40 * (1 + np.log(2 * np.pi))
    assert fits.aic(error, 3) + constant == pytest.approx(2 * 4 - 2 * log_likelihood.sum())


def test_intervals_over_seeds_hold_the_planted_rate(rng):
    x = np.array([0.0, 2, 5, 10, 25, 50, 100])
    clean = fits.plateau_value(x, 80, 20, 0.1)
    shift = rng.normal(0, 0.5, (8, 1))
    scores = clean + shift + rng.normal(0, 1.0, (8, len(x)))
    wide = fits.bootstrap(fits.PLATEAU, x, scores, draws=200)
    rate = wide["b"]
    assert rate.low < rate.value < rate.high
    # Over 3.3 half widths: false once in a thousand runs.
    reach = 3.3 / 1.96 * (rate.high - rate.low) / 2
    assert abs(rate.value - 0.1) < reach < 0.05
    # Seeds that agree have narrow intervals.
    narrow = fits.bootstrap(fits.PLATEAU, x, clean + 0.01 * shift, draws=50)["b"]
    assert narrow.high - narrow.low < (rate.high - rate.low) / 10


@pytest.mark.parametrize(
    ("x", "y", "weights", "told"),
    [
        ([1, 2], [1, 2, 3], None, "one score a budget"),
        ([3, 3, 3], [1, 2, 3], None, "not all the same"),
        ([-1, 3, 4], [1, 2, 3], None, "at least 0"),
        ([0, 3, 4], [1, float("nan"), 3], None, "must be numbers"),
        ([0, 3, 4], [1, 2, 3], [1, 0, 1], "weights above 0"),
        ([0, 3], [1, 2], None, "2 points, and a plateau has 3 parameters"),
    ],
)
def test_points_that_cannot_be_fitted_are_refused(x, y, weights, told):
    with pytest.raises(UserError, match=told):
        fits.fit(fits.PLATEAU, x, y, weights)


def test_one_seed_has_no_interval():
    with pytest.raises(UserError, match="two or more"):
        fits.bootstrap(fits.LINE, PERCENT, [[1.0, 2, 3, 4, 5, 6]])
