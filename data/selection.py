"""Choose k of N rows: pure functions of one signature, over embeddings or scores.

    indices = select(embeddings, scores, labels, k, key)

    embeddings  [N, D], float; may be memory-mapped, and is read in parts
    scores      [N], float; nan where a row has none, and is then never chosen
    labels      [N], any values that can be compared, such as desirable or not
    k           rows to choose, 1 to N
    key         a jax.random key; the same one chooses the same rows
    indices     [k], int64, distinct, in the order in which they were chosen

A function reads what it needs and takes None for the rest. Where scores come from is no concern
of this file: collect/ computes those of a model. What a paper names a method may be a score and a
rule here: perplexity, IFD, length, margins and a judge's score are `at_rank`; Ask-LLM is
`first_yes`, or `at_rank` of P(yes); Density is `kernel_sums` and `inverse_propensity`.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from scipy import special

from runtime.errors import UserError, require

Array = np.ndarray
Select = Callable[[Array | None, Array | None, Array | None, int, jax.Array], Array]

# Rows read at a time.
PART = 8192
# Methods that compare every row with every other do so within random blocks of this many rows, so
# that their cost is linear in N.
BLOCK = 4096
# Stochastic greedy: with chance 1 - MISSED one of the best N / k rows is among those it looks at,
# and it looks at FEWEST at least.
MISSED = 0.1
FEWEST = 64
# The sketch of kernel sums.
REPEATS = 256
BUCKETS = 1 << 14


def generator(key: jax.Array) -> np.random.Generator:
    """Make NumPy's generator of a jax key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def count_of(k: int, *arrays: Array | None) -> int:
    """Return N, the rows of the arrays that are not None; UserError unless k is in 1..N.

    Raises ValueError for no array, and for arrays of different lengths.
    """
    lengths = {len(array) for array in arrays if array is not None}
    if len(lengths) != 1:
        raise ValueError(f"arrays of {sorted(lengths)} rows: give at least one, all of one length")
    (count,) = lengths
    require(1 <= k <= count, f"{k} rows of {count}: choose at least 1 and at most all of them")
    return count


def given(array: Array | None, name: str) -> Array:
    """Return an array that a selection needs; UserError, which calls it `name`, for None."""
    if array is None:
        raise UserError(f"rows have no {name} to choose by")
    return array


def parts(count: int, size: int = PART) -> Iterator[slice]:
    """Yield slices of at most `size` rows that cover 0 to `count`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


# --- without a model


def random_rows(
    embeddings: Array | None, scores: Array | None, labels: Array | None, k: int, key: jax.Array
) -> Array:
    """Choose k rows at random, all sets of k equally likely."""
    count = count_of(k, embeddings, scores, labels)
    return generator(key).permutation(count)[:k]


def within_labels(select: Select) -> Select:
    """Make a selection that applies `select` to the rows of each label alone.

    Each label keeps its share of the rows, to within one row (largest remainders).
    """

    def select_within(
        embeddings: Array | None,
        scores: Array | None,
        labels: Array | None,
        k: int,
        key: jax.Array,
    ) -> Array:
        count = count_of(k, embeddings, scores, labels)
        labels = given(labels, "labels")

        # How many rows of each label are chosen, in proportion to how many there are.
        names, label_N = np.unique(labels, return_inverse=True)
        shares = k * np.bincount(label_N) / count
        chosen = []
        for label, own_k in enumerate(whole_parts(shares, k)):
            own = np.flatnonzero(label_N == label)
            if own_k == 0:
                continue
            own_embeddings = None if embeddings is None else embeddings[own]
            own_scores = None if scores is None else scores[own]
            own_key = jax.random.fold_in(key, label)
            picked = select(own_embeddings, own_scores, names[label_N[own]], own_k, own_key)
            chosen.append(own[picked])
        return np.concatenate(chosen)

    return select_within


def whole_parts(shares: Array, total: int) -> list[int]:
    """Round shares, which add up to `total`, to whole numbers that do (largest remainders)."""
    whole = np.floor(shares).astype(int)
    # What rounding down leaves goes, one each, to those that lost most by it.
    left = total - int(whole.sum())
    by_remainder = np.argsort(whole - shares, kind="stable")
    whole[by_remainder[:left]] += 1
    return whole.tolist()


# --- by a score


def at_rank(
    embeddings: Array | None,
    scores: Array | None,
    labels: Array | None,
    k: int,
    key: jax.Array,
    *,
    rank: float,
) -> Array:
    """Choose the k rows around a place in the order of scores: a band of neighbouring ranks.

    `rank`: 0 for the k lowest, 1 for the k highest, highest first; 1/2 for the middle, which keeps
    what is neither trivial nor broken (data of moderate perplexity). Of equal scores the earlier
    row counts as the higher one.
    """
    count_of(k, embeddings, scores, labels)
    scores = given(scores, "scores")
    order = scored_in_order(scores)
    require(k <= len(order), f"{k} rows of {len(order)} that have a score: choose fewer")

    # The highest come first: a `rank` of 1 starts at the first of them.
    spare = len(order) - k
    start = round((1 - rank) * spare)
    band = order[start : start + k]
    # The lowest are returned lowest first.
    return band[::-1] if rank == 0 else band


def scored_in_order(scores: Array) -> Array:
    """Return the indices of rows that have a score, the highest first, equal ones as they come."""
    scored = np.flatnonzero(~np.isnan(scores))
    order = np.argsort(-scores[scored], kind="stable")
    return scored[order]


def highest(
    embeddings: Array | None, scores: Array | None, labels: Array | None, k: int, key: jax.Array
) -> Array:
    """Choose the k rows of the highest scores, the highest first."""
    return at_rank(embeddings, scores, labels, k, key, rank=1.0)


def lowest(
    embeddings: Array | None, scores: Array | None, labels: Array | None, k: int, key: jax.Array
) -> Array:
    """Choose the k rows of the lowest scores, the lowest first."""
    return at_rank(embeddings, scores, labels, k, key, rank=0.0)


def middle(
    embeddings: Array | None, scores: Array | None, labels: Array | None, k: int, key: jax.Array
) -> Array:
    """Choose the k rows around the median score."""
    return at_rank(embeddings, scores, labels, k, key, rank=0.5)


def first_yes(
    embeddings: Array | None, scores: Array | None, labels: Array | None, k: int, key: jax.Array
) -> Array:
    """Choose the first k rows, as they stand in the file, whose score P(yes) is above 1/2.

    arXiv 2411.10545, A.5.2, as printed: the order of the file decides, where there are more.
    Raises UserError where there are fewer than k.
    """
    count_of(k, embeddings, scores, labels)
    scores = given(scores, "P(yes)")
    accepted = np.flatnonzero(scores > 0.5)
    require(k <= len(accepted), f"{k} rows, and {len(accepted)} are answered yes: choose fewer")
    return accepted[:k]


def inverse_propensity(
    embeddings: Array | None, scores: Array | None, labels: Array | None, k: int, key: jax.Array
) -> Array:
    """Draw k rows without replacement, each with a chance in proportion to 1 / its score.

    Sachdeva et al. 2024, section 3.2, with `kernel_sums` as scores: rows in a crowd are drawn
    less. One draw after the other, by Efraimidis and Spirakis 2006. Scores must be above 0.
    """
    count = count_of(k, embeddings, scores, labels)
    scores = given(scores, "scores")
    # Waiting times with rates 1 / score: the k that come first are such a draw.
    waiting_N = generator(key).exponential(size=count) * scores
    return np.argsort(waiting_N, kind="stable")[:k]


# --- kernel sums, for Density


def collision_probability(distance: Array, width: float) -> Array:
    """Return the chance that two points fall into one bucket of a p-stable hash.

    Datar et al. 2004, section 3.2, for the normal distribution: the hash of x is
    floor((w x + b) / width), w standard normal, b uniform. 1 at distance 0.
    """
    ratio = width / np.maximum(distance, 1e-12)
    tails = 2 * special.ndtr(-ratio)
    fall = 1 - np.exp(-(ratio**2) / 2)
    return 1 - tails - np.sqrt(2 / np.pi) / ratio * fall


def typical_distance(embeddings: Array, key: jax.Array, pairs: int = 1000) -> float:
    """Return the median distance of `pairs` pairs of rows drawn at random; 1 where it is 0."""
    first, second = generator(key).integers(len(embeddings), size=(2, pairs))
    difference = as_float(embeddings[first]) - as_float(embeddings[second])
    distances = np.linalg.norm(difference, axis=1)
    return float(np.median(distances)) or 1.0


def kernel_sums(
    embeddings: Array,
    key: jax.Array,
    *,
    repeats: int = REPEATS,
    hashes: int = 2,
    width: float | None = None,
    buckets: int = BUCKETS,
) -> Array:
    """Estimate for each row the sum of a kernel over all rows, itself among them; [N], float64.

    The kernel is `collision_probability(distance, width)` to the power `hashes`. Sachdeva et al.
    2024, algorithm 2: a first pass counts the rows in each bucket of `repeats` tables, a second
    one looks up where each row falls (Coleman and Shrivastava 2020). The error falls as
    1 / sqrt(repeats). `width`: of a hash; None: `typical_distance`. `buckets`: of a table; rows
    that meet in one by chance are taken off.
    """
    count, dimension = embeddings.shape
    width_key, key = jax.random.split(key)
    width = width or typical_distance(embeddings, width_key)
    rng = generator(key)

    # A hash is the strip between parallel planes that a row falls in (Datar et al. 2004).
    total = repeats * hashes
    planes = rng.standard_normal((dimension, total), dtype=np.float32) / width
    shifts = rng.random(total, dtype=np.float32)

    # A table's hashes are mixed into one bucket: by odd multipliers, and the highest bits.
    halves = rng.integers(1 << 63, size=(repeats, hashes), dtype=np.uint64)
    odd = halves * np.uint64(2) + np.uint64(1)
    first_bucket = np.arange(repeats) * buckets

    def places(rows: slice) -> Array:
        """Return [rows, repeats]: where each row falls in all tables, laid end to end."""
        # The strips that a row falls in, [rows, repeats, hashes].
        shifted = as_float(embeddings[rows]) @ planes + shifts
        strips = np.floor(shifted).astype(np.int64)
        strips = strips.reshape(-1, repeats, hashes).astype(np.uint64)

        # From them a table's bucket; what overflows is meant to.
        mixed = (strips * odd).sum(2, dtype=np.uint64)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        highest_bits = mixed >> np.uint64(40)
        return highest_bits.astype(np.int64) % buckets + first_bucket

    # First pass: count the rows in each bucket.
    table = np.zeros(repeats * buckets, np.int64)
    for rows in parts(count):
        found = places(rows).ravel()
        table += np.bincount(found, minlength=len(table))

    # Second pass: look up each row's buckets.
    sums = np.empty(count)
    for rows in parts(count):
        sums[rows] = table[places(rows)].mean(1)

    # Any other row falls into the same bucket by chance once in `buckets` tables.
    chance = 1 / buckets
    by_chance = count * chance
    return np.maximum((sums - by_chance) / (1 - chance), 1.0)


# --- greedy, over embeddings


def log_det(
    embeddings: Array | None,
    scores: Array | None,
    labels: Array | None,
    k: int,
    key: jax.Array,
    *,
    noise: float = 0.1,
) -> Array:
    """Choose k rows that tell the most together: 1/2 log det(I + K / noise), greedily.

    K are the inner products of the chosen rows, each scaled to length 1: so this is the mutual
    information of a Gaussian process with a linear kernel and its noisy values, and D-optimal
    design. A duplicate adds little. The gain of row x is 1/2 log(1 + x A^-1 x / noise), A the sum
    over chosen rows of x x^T / noise, and I.

    By `stochastic_greedy`, over all rows: the cost is N D^2 and does not grow with k.
    """
    count = count_of(k, embeddings, scores, labels)
    rows_ND = given(embeddings, "embeddings")
    inverse_DD = np.eye(rows_ND.shape[1], dtype=np.float32)

    def gains(rows: Array) -> Array:
        # Half the logarithm of 1 + this / noise grows with it.
        x_CD = unit_rows(rows_ND[rows])
        solved_CD = x_CD @ inverse_DD
        return np.einsum("CD,CD->C", solved_CD, x_CD)

    def take(row: int) -> None:
        # A grows by x x^T / noise: its inverse by Sherman and Morrison.
        x_D = unit_rows(rows_ND[row][None])[0]
        solved_D = inverse_DD @ x_D
        scale = noise + solved_D @ x_D
        inverse_DD[:] -= np.outer(solved_D, solved_D / scale)

    return np.array(stochastic_greedy(count, k, gains, take, generator(key)))


def facility_location(
    embeddings: Array | None, scores: Array | None, labels: Array | None, k: int, key: jax.Array
) -> Array:
    """Choose k rows that stand for all: the sum over rows of the similarity to the nearest.

    Similarity is (1 + cosine) / 2. By `stochastic_greedy`, within each random block of BLOCK rows
    (see `in_blocks`).
    """
    count_of(k, embeddings, scores, labels)

    def best_of_block(x_ND: Array, own_k: int, rng: np.random.Generator) -> list[int]:
        unit_ND = unit_rows(x_ND)
        similar_NN = (1 + unit_ND @ unit_ND.T) / 2
        nearest_N = np.zeros(len(x_ND), np.float32)

        def gains(rows: Array) -> Array:
            return np.maximum(similar_NN[rows], nearest_N).sum(1)

        def take(row: int) -> None:
            np.maximum(nearest_N, similar_NN[row], out=nearest_N)

        return stochastic_greedy(len(x_ND), own_k, gains, take, rng)

    return in_blocks(best_of_block, given(embeddings, "embeddings"), k, key)


def k_center(
    embeddings: Array | None, scores: Array | None, labels: Array | None, k: int, key: jax.Array
) -> Array:
    """Choose k rows so that no row is far from all of them: the farthest row comes next.

    Gonzalez 1985: the largest distance of a row to the nearest chosen one is at most twice the
    least possible, within each random block of BLOCK rows (see `in_blocks`). The first is random.
    """
    count_of(k, embeddings, scores, labels)

    def farthest_first(x_ND: Array, own_k: int, rng: np.random.Generator) -> list[int]:
        square_N = np.einsum("ND,ND->N", x_ND, x_ND)
        chosen = [int(rng.integers(len(x_ND)))]
        nearest_N = np.full(len(x_ND), np.inf, np.float32)
        while len(chosen) < own_k:
            # Squared distances to the one that came last; rounding takes none below 0.
            last = chosen[-1]
            product_N = x_ND @ x_ND[last]
            distance_N = square_N + square_N[last] - 2 * product_N
            distance_N = np.maximum(distance_N, 0)
            np.minimum(nearest_N, distance_N, out=nearest_N)
            # A chosen row is never chosen again.
            nearest_N[last] = -1
            chosen.append(int(nearest_N.argmax()))
        return chosen

    return in_blocks(farthest_first, given(embeddings, "embeddings"), k, key)


def stochastic_greedy(
    count: int,
    k: int,
    gains: Callable[[Array], Array],
    take: Callable[[int], None],
    rng: np.random.Generator,
) -> list[int]:
    """Choose k of `count` rows one by one, each the best of a random few (Mirzasoleiman 2015).

    `gains(rows)` gives what each would add, or what grows with it; `take(row)` adds one. For a
    monotone submodular value the expected one is at least 1 - 1/e - MISSED of the best set's. Up
    to FEWEST rows all are looked at, which makes it at least 1 - 1/e (Nemhauser et al. 1978).
    """
    # So many that, with chance 1 - MISSED, a row of the best set is among them.
    few = math.ceil(count / k * math.log(1 / MISSED))
    few = max(FEWEST, few)

    # The first `left` of `rest` are the rows not chosen yet.
    rest = rng.permutation(count)
    chosen = []
    for left in range(count, count - k, -1):
        # Of the rows looked at, the one that adds most.
        places = np.arange(left) if left <= few else rng.integers(left, size=few)
        gain = gains(rest[places])
        place = places[int(gain.argmax())]
        row = int(rest[place])
        chosen.append(row)
        take(row)
        # The last of those that are left takes its place.
        rest[place] = rest[left - 1]
    return chosen


def in_blocks(
    choose: Callable[[Array, int, np.random.Generator], list[int]],
    embeddings: Array,
    k: int,
    key: jax.Array,
) -> Array:
    """Split the rows at random into blocks of at most BLOCK, and choose each block's share.

    `choose(rows [n, D], its k, generator)` -> places in the block. Random blocks are alike, so a
    block's rows stand for all; what `choose` guarantees holds of each block by itself. N rows up
    to BLOCK are one block. Chosen rows come block by block.
    """
    # The rows of each block; a single one is not shuffled.
    count = len(embeddings)
    rng = generator(key)
    blocks = math.ceil(count / BLOCK)
    order = rng.permutation(count) if blocks > 1 else np.arange(count)
    rows_of_blocks = np.array_split(order, blocks)

    # A block's share of the k chosen rows is its share of all rows.
    shares = np.array([k * len(rows) / count for rows in rows_of_blocks])
    chosen = []
    for rows, own_k in zip(rows_of_blocks, whole_parts(shares, k), strict=True):
        if own_k == 0:
            continue
        # In the file's order, as a disk reads it.
        rows = np.sort(rows)
        picked = choose(as_float(embeddings[rows]), own_k, rng)
        chosen.append(rows[picked])
    return np.concatenate(chosen)


# --- embeddings


def as_float(x: Array) -> Array:
    """Return an array in float32; one that is, is not copied."""
    return np.asarray(x, np.float32)


def unit_rows(x_ND: Array) -> Array:
    """Scale each row to length 1, in float32; a row of zeros stays."""
    x_ND = as_float(x_ND)
    length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND / np.where(length_N1 > 0, length_N1, 1)


def projected(embeddings: Array, width: int, key: jax.Array) -> Array:
    """Project rows [N, D] at random to [N, width], which keeps their distances to 1 / sqrt(width).

    Johnson and Lindenstrauss 1984. Rows of `width` numbers or fewer are returned as they are.
    """
    count, dimension = embeddings.shape
    if dimension <= width:
        return embeddings
    rng = generator(key)
    matrix = rng.standard_normal((dimension, width), dtype=np.float32) / width**0.5
    out = np.empty((count, width), np.float32)
    for rows in parts(count):
        out[rows] = as_float(embeddings[rows]) @ matrix
    return out


SELECTIONS: dict[str, Any] = {
    "random": random_rows,
    "highest": highest,
    "lowest": lowest,
    "middle": middle,
    "first": first_yes,
    "density": inverse_propensity,
    "log_det": log_det,
    "facility": facility_location,
    "k_center": k_center,
}
"""Selections by the names that collect/select.py gives them."""
