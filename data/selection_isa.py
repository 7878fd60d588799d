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
    low = log_likelihood_N.min()
    span = np.ptp(log_likelihood_N)
    scaled_N = (log_likelihood_N - low) / span if span > 0 else np.zeros_like(log_likelihood_N)
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
    # The rest, normalised by 1 - q: H' = (H - term) / (1 - q) + log(1 - q).
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
    mixture = fit_mixture(np.asarray(embeddings[fitted], float), key)
    found_N = np.empty(count)
    for rows in parts(count):
        joint_NK = log_joint(mixture, np.asarray(embeddings[rows], float))
        found_N[rows] = np.logaddexp.reduce(joint_NK, axis=1)
    return found_N


def fit_mixture(x_ND: Array, key: jax.Array, components: int = 2) -> Mixture:
    """Fit Gaussians with full covariances by expectation-maximisation (Dempster et al. 1977).

    It starts from k-means, and ends as TOLERANCE and ROUNDS say.
    """
    nearest_N = k_means(x_ND, components, generator(key))
    weight_NK = np.eye(components)[nearest_N]
    reached = -np.inf
    for _ in range(ROUNDS):
        # Each Gaussian from its share of every row, then every row's shares.
        mixture = of_weights(x_ND, weight_NK)
        joint_NK = log_joint(mixture, x_ND)
        total_N = np.logaddexp.reduce(joint_NK, axis=1)
        weight_NK = np.exp(joint_NK - total_N[:, None])
        if total_N.mean() - reached < TOLERANCE:
            break
        reached = total_N.mean()
    return mixture


def of_weights(x_ND: Array, weight_NK: Array) -> Mixture:
    """Return the mixture in which row n belongs to Gaussian k by its weight (the M step)."""
    dimension = x_ND.shape[1]
    floor = FLOOR * x_ND.var(0).mean() + np.finfo(float).tiny
    means = []
    roots = []
    for weight_N in weight_NK.T:
        total = weight_N.sum() + np.finfo(float).tiny
        mean_D = weight_N @ x_ND / total
        centred_ND = x_ND - mean_D
        covariance_DD = (centred_ND * weight_N[:, None]).T @ centred_ND / total
        means.append(mean_D)
        roots.append(np.linalg.cholesky(covariance_DD + floor * np.eye(dimension)))
    share_K = weight_NK.mean(0) + np.finfo(float).tiny
    return Mixture(np.log(share_K), np.array(means), np.array(roots))


def log_joint(mixture: Mixture, x_ND: Array) -> Array:
    """Return log(share_k N(x_n; mean_k, covariance_k)), [N, K]."""
    dimension = x_ND.shape[1]
    columns = []
    for log_share, mean_D, root_DD in zip(*mixture, strict=True):
        # The squared distance in units of the covariance: |L^-1 (x - mean)|^2.
        white_DN = linalg.solve_triangular(root_DD, (x_ND - mean_D).T, lower=True)
        log_root = np.log(np.diag(root_DD)).sum()
        normaliser = dimension / 2 * np.log(2 * np.pi) + log_root
        columns.append(log_share - np.square(white_DN).sum(0) / 2 - normaliser)
    return np.stack(columns, axis=1)


def k_means(x_ND: Array, components: int, rng: np.random.Generator, rounds: int = 10) -> Array:
    """Return the nearest of `components` centres of each row, [N] (Lloyd 1982).

    The first centre is a random row, the next ones are far from those before (k-means++).
    """
    centres = [x_ND[rng.integers(len(x_ND))]]
    while len(centres) < components:
        distance_N = square_distances(x_ND, np.array(centres)).min(1) + np.finfo(float).tiny
        centres.append(x_ND[rng.choice(len(x_ND), p=distance_N / distance_N.sum())])
    centre_KD = np.array(centres)
    for _ in range(rounds):
        nearest_N = square_distances(x_ND, centre_KD).argmin(1)
        for k in range(components):
            if (nearest_N == k).any():
                centre_KD[k] = x_ND[nearest_N == k].mean(0)
    return square_distances(x_ND, centre_KD).argmin(1)


def square_distances(x_ND: Array, centre_KD: Array) -> Array:
    """Return the squared distance of each row to each centre, [N, K]."""
    return np.stack([np.square(x_ND - centre_D).sum(1) for centre_D in centre_KD], axis=1)
