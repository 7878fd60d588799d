"""Near duplicates: texts that share most of their word n-grams, found without comparing all pairs.

Each text is the set of hashes of its n-grams. How alike two sets are is their Jaccard similarity:
the size of their intersection over that of their union. MinHash (Broder 1997) estimates it: map
all hashes by one random function, and the least value in each of two sets is the same with a
probability equal to their similarity. ROWS such values make a key, and a text has BANDS keys; only
texts that share a key are compared (locality-sensitive hashing, Leskovec et al. 2020, section
3.4). So two texts of similarity s are compared with probability 1 - (1 - s^ROWS)^BANDS: 0.996 at
0.75, 0.80 at 0.6, 0.05 at 0.3. Their sets themselves then decide whether they are near.
"""

import hashlib
import re
from collections.abc import Callable

import numpy as np

WORDS = 3
"""Words of an n-gram; a shorter text is a single n-gram."""
BANDS = 20
ROWS = 5
LEAST_NEAR = 0.6
"""Similarity below which too few are found."""
PRIME = (1 << 31) - 1
"""Hashes are numbers below it; a product of two fits in 64 bits."""


def normal(text: str) -> str:
    """Return a text in lower case, its words alone, parted by single spaces."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def ngrams(text: str) -> np.ndarray:
    """Return the hashes of a text's distinct n-grams of words, sorted, uint64 below PRIME."""
    words = normal(text).split()
    # A text of fewer than WORDS words has one n-gram: all of it.
    count = max(len(words) - WORDS + 1, 1)
    hashes = set()
    for start in range(count):
        gram = " ".join(words[start : start + WORDS])
        digest = hashlib.blake2b(gram.encode(), digest_size=8).digest()
        hashes.add(int.from_bytes(digest) % PRIME)
    return np.array(sorted(hashes), np.uint64)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Return the similarity of two sets of hashes: the shared part of all, in [0, 1]."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    union = len(one) + len(other) - shared
    return shared / union


class NearDuplicates:
    """Texts seen so far, each to be asked for among those before it.

    `text_at(row)` reads a text again, where its key is that of another. About 1.5 kB a text
    are kept.
    """

    def __init__(self, text_at: Callable[[int], str], least: float, seed: int = 0):
        """Call texts near whose n-grams have a similarity of at least `least`."""
        self._text_at = text_at
        self._least = least

        # One random function for each of V values: x -> (a x + b) mod PRIME.
        rng = np.random.default_rng(seed)
        values = BANDS * ROWS
        self._a_V1 = rng.integers(1, PRIME, (values, 1), np.uint64)
        self._b_V1 = rng.integers(0, PRIME, (values, 1), np.uint64)

        # The first row that had each key.
        self._rows: dict[bytes, int] = {}

    def before(self, row: int) -> tuple[int, float] | None:
        """Return an earlier row that is near `row`, and their similarity; None without one.

        A row that has none is kept for those to come. A text without a word is near no other.
        """
        text = self._text_at(row)
        if not normal(text):
            return None
        hashes_N = ngrams(text)
        keys = self._keys(hashes_N)

        # Only rows that share a key are read again and compared.
        candidates = set()
        for key in keys:
            if key in self._rows:
                candidates.add(self._rows[key])

        # The nearest of them; of equally near ones the first.
        nearest = None
        most = 0.0
        for other in sorted(candidates):
            other_text = self._text_at(other)
            similarity = jaccard(hashes_N, ngrams(other_text))
            if similarity >= self._least and (nearest is None or similarity > most):
                nearest = other
                most = similarity
        if nearest is not None:
            return nearest, most

        # Near none: later rows may be near this one.
        for key in keys:
            self._rows.setdefault(key, row)
        return None

    def _keys(self, hashes_N: np.ndarray) -> list[bytes]:
        """Return the keys of a set of hashes, one a band."""
        # The least value of each random function over the set.
        values_VN = (self._a_V1 * hashes_N + self._b_V1) % np.uint64(PRIME)
        least_V = values_VN.min(1)
        bands = least_V.reshape(BANDS, ROWS)

        # The band is hashed too, so that equal values in two bands are two keys.
        keys = []
        for band, values in enumerate(bands):
            digest = hashlib.blake2b(values.tobytes(), digest_size=8, salt=bytes([band]))
            keys.append(digest.digest())
        return keys
