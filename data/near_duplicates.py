"""Near duplicates: texts that share most of their word n-grams, found without comparing all pairs.

Each text is the set of its n-grams, as hashes. Two sets are alike by their Jaccard similarity, the
size of the intersection over that of the union. MinHash (Broder 1997) estimates it: of a random
function over hashes, the least value over a set is the same for two sets with a chance of just
that. BANDS groups of ROWS such values each are keys; texts that share a key are compared (locality
sensitive hashing, Leskovec et al. 2020, section 3.4). So two texts of similarity s are compared
with a chance of 1 - (1 - s^ROWS)^BANDS: 0.996 at 0.75, 0.80 at 0.6, 0.05 at 0.3. Whether they are
alike is then decided by their sets themselves.
"""

import hashlib
import re
from collections.abc import Callable

import numpy as np

WORDS = 3
"""Words of an n-gram. Of shorter texts all words are one."""
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
    return shared / (len(one) + len(other) - shared)


class NearDuplicates:
    """Texts seen so far, each to be asked for among those before it.

    `text_at(row)` reads a text again, where its key is that of another. About 1.5 kB a text
    are kept.
    """

    def __init__(self, text_at: Callable[[int], str], least: float, seed: int = 0):
        """Call texts near whose n-grams have a similarity of at least `least`."""
        self._text_at = text_at
        self._least = least
        rng = np.random.default_rng(seed)
        # One random function a value: x -> (a * x + b) mod PRIME.
        values = BANDS * ROWS
        self._a_V1 = rng.integers(1, PRIME, (values, 1), np.uint64)
        self._b_V1 = rng.integers(0, PRIME, (values, 1), np.uint64)
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
        # The nearest of those that share a key; of equally near ones the first.
        best: tuple[int, float] | None = None
        for other in sorted({self._rows[key] for key in keys if key in self._rows}):
            similarity = jaccard(hashes_N, ngrams(self._text_at(other)))
            if similarity >= self._least and (best is None or similarity > best[1]):
                best = other, similarity
        if best is None:
            for key in keys:
                self._rows.setdefault(key, row)
        return best

    def _keys(self, hashes_N: np.ndarray) -> list[bytes]:
        """Return the keys of a set of hashes, one a band."""
        values_VN = (self._a_V1 * hashes_N + self._b_V1) % np.uint64(PRIME)
        least_V = values_VN.min(1)
        keys = []
        for band, values in enumerate(least_V.reshape(BANDS, ROWS)):
            digest = hashlib.blake2b(values.tobytes(), digest_size=8, salt=bytes([band]))
            keys.append(digest.digest())
        return keys
