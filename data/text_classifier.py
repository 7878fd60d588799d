"""A linear classifier of texts, by the words and pairs of words in them: good ones from bad ones.

Joulin et al. 2017, without the hidden layer: logistic regression on hashed n-grams. GPT-3's filter
of web pages was of this kind (Brown et al. 2020, appendix A).
"""

import itertools
import re
import zlib
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.special

FEATURES = 1 << 16
"""Places that n-grams are hashed to."""
DECAY = 1e-4
"""Weight of half the squared weights, beside the mean loss."""
STEPS = 50
"""Iterations of L-BFGS, at most."""


def features(texts: Sequence[str]) -> scipy.sparse.csr_matrix:
    """Return how often each text has each n-gram, [N, FEATURES], each row of length 1."""
    starts = [0]
    places: list[int] = []
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]", text.casefold())
        pairs = [f"{one} {two}" for one, two in itertools.pairwise(words)]
        places += [zlib.crc32(gram.encode()) % FEATURES for gram in (*words, *pairs)]
        starts.append(len(places))
    counts = np.ones(len(places))
    matrix = scipy.sparse.csr_matrix((counts, places, starts), (len(texts), FEATURES))
    matrix.sum_duplicates()
    norms = np.sqrt(matrix.multiply(matrix).sum(1))
    scale = 1 / np.maximum(np.asarray(norms).ravel(), 1e-9)
    return scipy.sparse.diags(scale) @ matrix


class TextClassifier:
    """Tells good texts from bad ones by their words; trained when it is made."""

    def __init__(self, good: Sequence[str], bad: Sequence[str]):
        """Fit the weights to texts of both kinds, each kind counting as much as the other."""
        matrix = features([*good, *bad])
        signs_N = np.array([1.0] * len(good) + [-1.0] * len(bad))
        weights_N = np.where(signs_N > 0, 0.5 / len(good), 0.5 / len(bad))

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            """Return the loss and its gradient; the bias is the last of theta."""
            margins_N = signs_N * (matrix @ theta[:-1] + theta[-1])
            value = weights_N @ np.logaddexp(0, -margins_N)
            slopes_N = -weights_N * signs_N * scipy.special.expit(-margins_N)
            gradient = np.append(matrix.T @ slopes_N, slopes_N.sum())
            gradient[:-1] += DECAY * theta[:-1]
            return value + DECAY / 2 * theta[:-1] @ theta[:-1], gradient

        start = np.zeros(FEATURES + 1)
        found = scipy.optimize.minimize(
            loss, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS}
        )
        self._theta = found.x

    def chances(self, texts: Sequence[str]) -> np.ndarray:
        """Return the chance that each text is a good one, [N], in [0, 1]."""
        return scipy.special.expit(features(texts) @ self._theta[:-1] + self._theta[-1])
