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


def ngrams(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, and the pairs of neighbours among them."""
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    pairs = []
    for first, second in itertools.pairwise(words):
        pairs.append(f"{first} {second}")
    return [*words, *pairs]


def features(texts: Sequence[str]) -> scipy.sparse.csr_matrix:
    """Return how often each text has each n-gram, [N, FEATURES], each row of length 1."""
    # The feature of each n-gram, text after text; text n's begin at starts[n].
    places: list[int] = []
    starts = [0]
    for text in texts:
        for ngram in ngrams(text):
            hashed = zlib.crc32(ngram.encode())
            places.append(hashed % FEATURES)
        starts.append(len(places))

    # An n-gram that a text has twice counts twice.
    ones = np.ones(len(places))
    shape = (len(texts), FEATURES)
    counts = scipy.sparse.csr_matrix((ones, places, starts), shape)
    counts.sum_duplicates()

    # To length 1, so that a long text weighs no more than a short one; an empty one stays zero.
    squares = counts.multiply(counts)
    lengths = np.sqrt(squares.sum(1))
    lengths_N = np.asarray(lengths).ravel()
    scale_N = 1 / np.maximum(lengths_N, 1e-9)
    return scipy.sparse.diags(scale_N) @ counts


class TextClassifier:
    """Tells good texts from bad ones by their words; trained when it is made."""

    def __init__(self, good: Sequence[str], bad: Sequence[str]):
        """Fit the weights to texts of both kinds, each kind counting as much as the other."""
        matrix = features([*good, *bad])

        # +1 for a good text, -1 for a bad one; each kind weighs one half.
        signs_N = np.ones(len(good) + len(bad))
        signs_N[len(good) :] = -1
        weights_N = np.where(signs_N > 0, 0.5 / len(good), 0.5 / len(bad))

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            """Return the loss and its gradient; the bias is the last of theta."""
            theta_F = theta[:-1]
            bias = theta[-1]

            # The logistic loss, -log sigmoid(margin), and the decay.
            margins_N = signs_N * (matrix @ theta_F + bias)
            value = weights_N @ np.logaddexp(0, -margins_N)
            decay = DECAY / 2 * theta_F @ theta_F

            # Their slopes: of each text's logit, then of theta.
            slopes_N = -weights_N * signs_N * scipy.special.expit(-margins_N)
            slopes_F = matrix.T @ slopes_N + DECAY * theta_F
            gradient = np.append(slopes_F, slopes_N.sum())
            return value + decay, gradient

        # The loss is convex: any start leads to the same weights.
        start = np.zeros(FEATURES + 1)
        found = scipy.optimize.minimize(
            loss, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS}
        )
        self._theta_F = found.x[:-1]
        self._bias = found.x[-1]

    def chances(self, texts: Sequence[str]) -> np.ndarray:
        """Return the chance that each text is a good one, [N], in [0, 1]."""
        logits_N = features(texts) @ self._theta_F + self._bias
        return scipy.special.expit(logits_N)
