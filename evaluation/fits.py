"""Curves through scores at budgets of data or compute: least squares, R^2, AIC, bootstrap.

    rate = plateau(percent, score).b                       # r - (r - a) exp(-b x), one curve
    best = min(compare(percent, score), key=lambda fit: fit.aic)

A curve is linear in most of its parameters. So the few others alone are searched for, and the
linear ones are solved for at each trial (Golub and Pereyra 1973, variable projection): no start
has to be guessed.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from evaluation.intervals import Interval
from runtime.errors import UserError

Array = np.ndarray
Bounds = tuple[float, float]
# Trials along each searched parameter, evenly in its logarithm, before the best is refined.
TRIALS = 32
# Draws of a bootstrap.
DRAWS = 1000
# A searched parameter within this share of its bound, in logarithms, is said to lie at it.
AT_BOUND = 1e-3


class Curve(NamedTuple):
    """A form of curve: y = basis(x) @ linear parameters, its basis bent by the searched ones."""

    name: str
    basis: Callable[..., Array]
    """basis(x_N, *searched) -> [N, linear parameters]."""
    bounds: Callable[[Array], list[Bounds]]
    """bounds(x_N) -> the least and the most of each searched parameter, all above 0."""
    named: Callable[..., dict[str, float]]
    """named(*linear, *searched) -> the parameters by the names that papers give them."""
    value: Callable[..., Array]
    """value(x_N, **parameters): the curve as papers print it."""


class Fit(NamedTuple):
    """A curve fitted to points."""

    name: str
    parameters: dict[str, float]
    r_squared: float
    aic: float
    """Akaike's criterion: the lower, the better; comparable between fits to the same points."""
    at_bound: bool
    """A searched parameter ran to its bound: the points do not tell it."""


class Plateau(NamedTuple):
    """Parameters of r - (r - a) exp(-b x)."""

    r: float
    """The score that it approaches."""
    a: float
    """The score at x = 0."""
    b: float
    """Rate, per unit of x."""


# --- the curves: as printed, and as bases


def plateau_value(x: Array, r: float, a: float, b: float) -> Array:
    """Return r - (r - a) exp(-b x) (arXiv 2411.10545, eq. 1)."""
    return r - (r - a) * np.exp(-b * x)


def power_value(x: Array, floor: float, scale: float, exponent: float) -> Array:
    """Return floor + scale (1 + x)^-exponent; the 1 gives x = 0 a value."""
    return floor + scale * (1 + x) ** -exponent


def logarithm_value(x: Array, start: float, slope: float) -> Array:
    """Return start + slope log(1 + x)."""
    return start + slope * np.log1p(x)


def line_value(x: Array, start: float, slope: float) -> Array:
    """Return start + slope x."""
    return start + slope * x


def sigmoid_value(x: Array, low: float, high: float, middle: float, exponent: float) -> Array:
    """Return low + (high - low) / (1 + (middle / x)^exponent), in x = compute above 0.

    Khatri et al. 2025, eq. 1: a sigmoid of log x; `middle` is where half of the gain is had.
    """
    return low + (high - low) * _risen(x, middle, exponent)


def _risen(x: Array, middle: float, exponent: float) -> Array:
    """Return the share of a sigmoid's rise at x; 0 at x = 0."""
    power = x**exponent
    return power / (power + middle**exponent)


def _beside_ones(x: Array) -> Array:
    """Return the basis of start + slope x, [N, 2]."""
    return np.stack([np.ones_like(x), x], axis=1)


def _rate_bounds(x: Array) -> list[Bounds]:
    # From nearly a line over all points, to risen before the first.
    return [(0.01 / x.max(), 100 / x[x > 0].min())]


def _sigmoid_bounds(x: Array) -> list[Bounds]:
    return [(x[x > 0].min() / 10, x.max() * 10), (0.1, 10.0)]


PLATEAU = Curve(
    "plateau",
    basis=lambda x, b: _beside_ones(np.exp(-b * x)),
    bounds=_rate_bounds,
    named=lambda r, drop, b: {"r": r, "a": r + drop, "b": b},
    value=plateau_value,
)
POWER = Curve(
    "power law",
    basis=lambda x, exponent: _beside_ones((1 + x) ** -exponent),
    bounds=lambda x: [(0.01, 10.0)],
    named=lambda floor, scale, exponent: {"floor": floor, "scale": scale, "exponent": exponent},
    value=power_value,
)
LOGARITHM = Curve(
    "logarithm",
    basis=lambda x: _beside_ones(np.log1p(x)),
    bounds=lambda x: [],
    named=lambda start, slope: {"start": start, "slope": slope},
    value=logarithm_value,
)
LINE = Curve(
    "line",
    basis=_beside_ones,
    bounds=lambda x: [],
    named=lambda start, slope: {"start": start, "slope": slope},
    value=line_value,
)
SIGMOID = Curve(
    "sigmoid",
    basis=lambda x, middle, exponent: _beside_ones(_risen(x, middle, exponent)),
    bounds=_sigmoid_bounds,
    named=lambda low, rise, middle, exponent: {
        "low": low,
        "high": low + rise,
        "middle": middle,
        "exponent": exponent,
    },
    value=sigmoid_value,
)
CURVES = (PLATEAU, POWER, LOGARITHM, LINE, SIGMOID)


# --- one fit


def fit(
    curve: Curve,
    x: Sequence[float] | Array,
    y: Sequence[float] | Array,
    weights: Sequence[float] | Array | None = None,
) -> Fit:
    """Fit a curve to the points (x, y), N of each, by least squares.

    `x` is at least 0. `weights`: of the squared errors, 1 / variance of each point; None: equal.
    Raises UserError for fewer points than parameters, and where all x are the same.
    """
    x_N, y_N, weight_N = _checked(x, y, weights)
    root_N = np.sqrt(weight_N)

    def solved(log_searched: Array) -> tuple[Array, Array]:
        """Return the best linear parameters beside these, and the weighted errors [N]."""
        basis = curve.basis(x_N, *np.exp(log_searched))
        weighted = basis * root_N[:, None]
        linear, *_ = np.linalg.lstsq(weighted, y_N * root_N, rcond=None)
        return linear, (basis @ linear - y_N) * root_N

    def errors(log_searched: Array) -> Array:
        _, error_N = solved(log_searched)
        return error_N

    def squared_error(log_searched: Array) -> float:
        return float(np.square(errors(log_searched)).sum())

    # Trials on a grid, the best of them refined. Without searched parameters it is one trial.
    limits = np.log(np.array(curve.bounds(x_N)).reshape(-1, 2))
    axes = [np.linspace(low, high, TRIALS) for low, high in limits]
    trials = [np.array(trial) for trial in itertools.product(*axes)]
    searched = min(trials, key=squared_error)
    if axes:
        bounds = (limits[:, 0], limits[:, 1])
        found = optimize.least_squares(errors, searched, bounds=bounds)
        searched = found.x

    # The best linear parameters beside them.
    linear, error_N = solved(searched)
    count = linear.size + searched.size
    if len(x_N) < count:
        raise UserError(
            f"{len(x_N)} points, and a {curve.name} has {count} parameters; give more points"
        )

    # How good it is, and whether the points tell what was searched for.
    span = limits[:, 1] - limits[:, 0]
    from_bound = np.minimum(searched - limits[:, 0], limits[:, 1] - searched)
    return Fit(
        curve.name,
        curve.named(*linear.tolist(), *np.exp(searched).tolist()),
        r_squared(y_N, y_N + error_N / root_N, weight_N),
        aic(error_N, count),
        bool((from_bound < AT_BOUND * span).any()),
    )


def plateau(
    x: Sequence[float] | Array,
    y: Sequence[float] | Array,
    weights: Sequence[float] | Array | None = None,
) -> Plateau:
    """Fit r - (r - a) exp(-b x) to points; return (r, a, b). Arguments as of `fit`."""
    return Plateau(**fit(PLATEAU, x, y, weights).parameters)


def compare(
    x: Sequence[float] | Array,
    y: Sequence[float] | Array,
    weights: Sequence[float] | Array | None = None,
    curves: Sequence[Curve] = CURVES,
) -> list[Fit]:
    """Fit each of `curves` to the same points; the one with the lowest AIC comes first."""
    fits = [fit(curve, x, y, weights) for curve in curves]
    return sorted(fits, key=lambda fitted: fitted.aic)


# --- how good a fit is


def r_squared(y: Array, fitted: Array, weights: Array | float = 1.0) -> float:
    """Return 1 - (squared errors) / (squared distances from the mean), weighted; [N] each."""
    weight_N = np.broadcast_to(weights, y.shape)
    mean = np.average(y, weights=weight_N)
    errors = (weight_N * (y - fitted) ** 2).sum()
    distances = (weight_N * (y - mean) ** 2).sum()
    return float(1 - errors / distances)


def aic(error_N: Array, parameters: int) -> float:
    """Return Akaike's criterion of weighted errors with a normal distribution of unknown width.

    N log(mean squared error) + 2 (parameters + 1), the 1 for the width; -inf for no error at all.
    """
    with np.errstate(divide="ignore"):
        log_error = np.log(np.mean(error_N**2))
    return float(len(error_N) * log_error + 2 * (parameters + 1))


# --- intervals


def bootstrap(
    curve: Curve, x: Sequence[float] | Array, y_SN: Array, *, seed: int = 0, draws: int = DRAWS
) -> dict[str, Interval]:
    """Return each parameter of a curve with its 95 % interval over seeds.

    `y_SN`: the scores of S seeds at the N budgets `x`. Each draw takes S seeds with replacement
    and fits all their points (Efron 1979; percentiles 2.5 and 97.5). Raises UserError for fewer
    than 2 seeds.
    """
    y_SN = np.asarray(y_SN, float)
    seeds = len(y_SN)
    if seeds < 2:
        raise UserError(f"a bootstrap over {seeds} seeds has no width; run two or more")
    rng = np.random.default_rng(seed)

    def parameters_of(own_SN: Array) -> list[float]:
        # Each budget has as many points as any other: their means have the same fit.
        return list(fit(curve, x, own_SN.mean(0)).parameters.values())

    # The fits to draws, then the fit to all seeds.
    rows = []
    for _ in range(draws):
        drawn = rng.integers(seeds, size=seeds)
        rows.append(parameters_of(y_SN[drawn]))
    lows, highs = np.percentile(np.array(rows), [2.5, 97.5], axis=0).tolist()
    whole = fit(curve, x, y_SN.mean(0)).parameters
    intervals = {}
    for (name, value), low, high in zip(whole.items(), lows, highs, strict=True):
        intervals[name] = Interval(value, low, high)
    return intervals


def _checked(
    x: Sequence[float] | Array, y: Sequence[float] | Array, weights: Sequence[float] | Array | None
) -> tuple[Array, Array, Array]:
    """Return points and weights as arrays [N]; raise UserError where nothing can be fitted."""
    x_N = np.asarray(x, float)
    y_N = np.asarray(y, float)
    weight_N = np.ones_like(y_N) if weights is None else np.asarray(weights, float)
    if not x_N.shape == y_N.shape == weight_N.shape or x_N.ndim != 1:
        raise UserError(f"{x_N.size} budgets, {y_N.size} scores: give one score a budget")
    if not (np.isfinite(x_N).all() and np.isfinite(y_N).all() and (weight_N > 0).all()):
        raise UserError("budgets and scores must be numbers, and weights above 0")
    if x_N.min(initial=0) < 0 or len(set(x_N.tolist())) < 2:
        raise UserError("budgets must be at least 0, and not all the same")
    return x_N, y_N, weight_N
