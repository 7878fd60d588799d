"""ROUGE-L: how much of two texts is one sequence of words (Lin 2004, section 3.1).

The longest common subsequence of two texts, words in their order with gaps between them, over the
number of words of the one is precision, over that of the other recall. ROUGE-L is here their
harmonic mean, as Self-Instruct takes it. Words are of lower case and without marks, not stemmed.
"""

import collections
import re
from collections.abc import Sequence


def words_of(text: str) -> list[str]:
    """Return a text's words in lower case; a mark between two letters, `_` too, parts words."""
    return re.findall(r"[^\W_]+", text.casefold())


def common_words(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two lists of words.

    A row of the usual table is one integer, a bit a word of `one`: 0 where the length rises by one
    there (Hyyrö 2004). So a row costs a few operations, whatever the length of `one`.
    """
    places_of: dict[str, int] = collections.defaultdict(int)
    for place, word in enumerate(one):
        places_of[word] |= 1 << place

    ones = (1 << len(one)) - 1
    row = ones
    for word in other:
        hits = row & places_of.get(word, 0)
        row = ((row + hits) | (row - hits)) & ones
    return len(one) - row.bit_count()


def rouge_l(one: str, other: str) -> float:
    """Return ROUGE-L of two texts, in [0, 1]; 0 where one of them has no word."""
    return _score(words_of(one), words_of(other))


def _score(one: Sequence[str], other: Sequence[str]) -> float:
    # 2 p r / (p + r), with p and r written out.
    return 2 * common_words(one, other) / max(len(one) + len(other), 1)


class SimilarTexts:
    """Texts seen so far, each to be compared with all of them before it is added.

    Only those are compared that share enough words for the similarity asked for, in any order:
    nothing is missed by it.
    """

    def __init__(self, most: float):
        """Call texts similar whose ROUGE-L is above `most`."""
        self._most = most
        self._texts: list[list[str]] = []
        self._places_of: dict[str, list[int]] = collections.defaultdict(list)

    def add(self, text: str) -> None:
        """Add a text, similar to others or not."""
        words = words_of(text)
        for word in set(words):
            self._places_of[word].append(len(self._texts))
        self._texts.append(words)

    def nearest(self, text: str) -> tuple[int, float] | None:
        """Return the number of the most similar text, from 0, and its ROUGE-L; None where none is
        similar.

        Of equally similar ones the first.
        """
        words = words_of(text)
        # A common subsequence has at most the words that both have.
        shared: collections.Counter[int] = collections.Counter()
        for word, count in collections.Counter(words).items():
            for place in self._places_of.get(word, ()):
                shared[place] += count

        best: tuple[int, float] | None = None
        highest = self._most
        for place in sorted(shared):
            other = self._texts[place]
            bound = 2 * shared[place] / (len(words) + len(other))
            if bound <= highest:
                continue
            score = _score(words, other)
            if score > highest:
                best = place, score
                highest = score
        return best
