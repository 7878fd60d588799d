"""ISA, information sampling for alignment (arXiv 2411.10545): rows by their entropy's change.

A published patent application covers this method. Whoever must not use it can delete this file:
nothing else of the project needs it, and `collect.select --method=isa` then says so in one line.

As printed: fit two Gaussians to the embeddings (eq. 2), scale each row's log-likelihood to [0, 1],
take p = exp of that, and rank rows by D = H(all) - H(all but this row), H = -sum p log p (eq. 3).
But p is then in [1, e] and no probability, and the paper does not say whether anything is
normalised. Four readings follow, and they choose opposite rows:

    A  as printed: D = -p log p                       the rows of the lowest likelihood, outliers
    B  the largest change, |D| = p log p              the rows of the highest likelihood
    C  q = p / sum p, D = -q log q                    the rows of the highest likelihood
    D  q, and H' of the rows that are left, which     the rows of average probability, q near 1 / N
       are normalised anew

No loop over rows is needed: each D is a function of the row's own likelihood.
"""

from typing import Literal, NamedTuple

import jax
import numpy as np
from scipy import linalg

from data.selection import Array, generator, highest, parts

Reading = Literal["A", "B", "C", "D"]
# Rows that the two Gaussians are fitted to, drawn at random from more.
FITTED = 16_384
# The fit ends when the mean log-likelihood rises by less, in nats, or after as many rounds.
TOLERANCE = 1e-3
ROUNDS = 100
# Added to variances, as a share of the mean variance, so that no Gaussian collapses.
FLOOR = 1e-6
# Added to sums that are divided by, or whose logarithm is taken: they may be 0.
TINY = np.finfo(float).tiny


class Mixture(NamedTuple):
    """Gaussians with full covariances; K of them, over D numbers."""

    log_share_K: Array
    mean_KD: Array
    root_KDD: Array
    """Lower Cholesky factors of the covariances."""


def isa(embeddings: Array, k: int, *, reading: Reading = "A", key: jax.Array) -> Array:
    """Choose k of N rows [N, D] by the change of entropy, in one reading of the paper; [k] int64.

    Rows come in order of D, the largest first. `key`: of the mixture's start.
    """
    change_N = entropy_changes(log_likelihoods(embeddings, key), reading)
    return highest(None, change_N, None, k, key)


def entropy_changes(log_likelihood_N: Array, reading: Reading) -> Array:
    """Return D of each row, [N] (eq. 3 and algorithm 1, by the readings above)."""
    # To [0, 1]; rows that are all equally likely are all 0.
    low = log_likelihood_N.min()
    span = np.ptp(log_likelihood_N)
    scaled_N = log_likelihood_N - low
    if span > 0:
        scaled_N = scaled_N / span

    # As printed, where log p is the scaled log-likelihood.
    p_N = np.exp(scaled_N)
    if reading == "A":
        return -p_N * scaled_N
    if reading == "B":
        return p_N * scaled_N

    # What a row adds to the entropy of a distribution over rows.
    q_N = p_N / p_N.sum()
    term_N = -q_N * np.log(q_N)
    if reading == "C":
        return term_N

    # The entropy of the rest, normalised by 1 - q: H' = (H - term) / (1 - q) + log(1 - q).
    whole = term_N.sum()
    rest_N = (whole - term_N) / (1 - q_N) + np.log1p(-q_N)
    return whole - rest_N


# --- two Gaussians


def log_likelihoods(embeddings: Array, key: jax.Array) -> Array:
    """Return the log-likelihood of each row under a mixture of two Gaussians, [N] (eq. 2).

    The mixture is fitted to all rows, or to FITTED drawn at random where there are more.
    """
    count = len(embeddings)
    fitted = np.arange(count)
    if count > FITTED:
        fitted = np.sort(generator(key).choice(count, FITTED, replace=False))
    fitted_ND = np.asarray(embeddings[fitted], float)
    mixture = fit_mixture(fitted_ND, key)

    # Part by part, as the embeddings may lie on a disk.
    total_N = np.empty(count)
    for rows in parts(count):
        x_ND = np.asarray(embeddings[rows], float)
        joint_NK = log_joint(mixture, x_ND)
        total_N[rows] = np.logaddexp.reduce(joint_NK, axis=1)
    return total_N


def fit_mixture(x_ND: Array, key: jax.Array, components: int = 2) -> Mixture:
    """Fit Gaussians with full covariances by expectation-maximisation (Dempster et al. 1977).

    It starts from k-means; TOLERANCE and ROUNDS say when it ends.
    """
    nearest_N = k_means(x_ND, components, generator(key))
    weight_NK = np.eye(components)[nearest_N]
    reached = -np.inf
    for _ in range(ROUNDS):
        # M step: each Gaussian from its share of every row.
        mixture = of_weights(x_ND, weight_NK)
        # E step: the Gaussians' shares of each row.
        joint_NK = log_joint(mixture, x_ND)
        total_N = np.logaddexp.reduce(joint_NK, axis=1)
        weight_NK = np.exp(joint_NK - total_N[:, None])
        mean = total_N.mean()
        if mean - reached < TOLERANCE:
            break
        reached = mean
    return mixture


def of_weights(x_ND: Array, weight_NK: Array) -> Mixture:
    """Return the mixture in which row n belongs to Gaussian k by its weight (the M step)."""
    dimension = x_ND.shape[1]
    floor = FLOOR * x_ND.var(0).mean() + TINY
    floor_DD = floor * np.eye(dimension)
    means = []
    roots = []
    for weight_N in weight_NK.T:
        # The weighted mean and covariance of the rows.
        total = weight_N.sum() + TINY
        mean_D = weight_N @ x_ND / total
        centred_ND = x_ND - mean_D
        weighted_ND = centred_ND * weight_N[:, None]
        covariance_DD = weighted_ND.T @ centred_ND / total
        root_DD = np.linalg.cholesky(covariance_DD + floor_DD)
        means.append(mean_D)
        roots.append(root_DD)
    share_K = weight_NK.mean(0) + TINY
    return Mixture(np.log(share_K), np.array(means), np.array(roots))


def log_joint(mixture: Mixture, x_ND: Array) -> Array:
    """Return log(share_k N(x_n; mean_k, covariance_k)), [N, K]."""
    dimension = x_ND.shape[1]
    columns = []
    for log_share, mean_D, root_DD in zip(*mixture, strict=True):
        # The squared distance in units of the covariance: |L^-1 (x - mean)|^2.
        centred_DN = (x_ND - mean_D).T
        white_DN = linalg.solve_triangular(root_DD, centred_DN, lower=True)
        distance_N = np.square(white_DN).sum(0)
        # The logarithm of the determinant's root, and of (2 pi)^(D / 2).
        log_root = np.log(np.diag(root_DD)).sum()
        normaliser = dimension / 2 * np.log(2 * np.pi) + log_root
        columns.append(log_share - distance_N / 2 - normaliser)
    return np.stack(columns, axis=1)


def k_means(x_ND: Array, components: int, rng: np.random.Generator, rounds: int = 10) -> Array:
    """Return the nearest of `components` centres of each row, [N] (Lloyd 1982).

    The first centre is a random row; the next ones are drawn far from those before (k-means++).
    """
    # Rows are drawn in proportion to the squared distance to the nearest centre so far.
    count = len(x_ND)
    first = rng.integers(count)
    centres = [x_ND[first]]
    while len(centres) < components:
        distance_NK = square_distances(x_ND, np.array(centres))
        distance_N = distance_NK.min(1) + TINY
        chance_N = distance_N / distance_N.sum()
        drawn = rng.choice(count, p=chance_N)
        centres.append(x_ND[drawn])

    # Each centre moves to the mean of the rows nearest to it; one without rows stays.
    centre_KD = np.array(centres)
    for _ in range(rounds):
        nearest_N = square_distances(x_ND, centre_KD).argmin(1)
        for k in range(components):
            own_ND = x_ND[nearest_N == k]
            if len(own_ND):
                centre_KD[k] = own_ND.mean(0)
    return square_distances(x_ND, centre_KD).argmin(1)


def square_distances(x_ND: Array, centre_KD: Array) -> Array:
    """Return the squared distance of each row to each centre, [N, K]."""
    columns = []
    for centre_D in centre_KD:
        columns.append(np.square(x_ND - centre_D).sum(1))
    return np.stack(columns, axis=1)
