"""A mixture: several sources as one, drawn from in set shares, in stages.

Which source and which of its rows a draw takes is a pure function of the seed and the number of
the draw. So a mixture has no state: a run resumes from its position, and hosts take turns along
the one order, as with any source. --data says what is mixed (runtime/mixtures.py, docs/data.md).
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from data.records import Message, Record
from data.source import Order, Source
from runtime.errors import UserError
from runtime.mixtures import Stage

WHOLE = 1 << 30
"""All shares together: shares are whole numbers, so that every machine counts alike."""
BLOCK = 1024
"""Draws that are shuffled together: in each block of so many a source has its share, to a row."""
WEIGHED = 500
"""Records of a source, its first, whose mean length turns shares of tokens into shares of rows."""
LEAST = 1e-12
"""Least share of a source, of the largest: a small temperature leaves none without any."""


class Part(NamedTuple):
    """One source of a mixture."""

    label: str
    """As it stands in --data, for metrics and messages."""
    source: Source
    in_order: bool
    """Rows are drawn in the source's own order; else shuffled."""


@dataclass(frozen=True, kw_only=True)
class Mixture(Source):
    """All records of its parts, each once, spread evenly by their shares; see `mixed`.

    Where a part ends the others go on alone. That is the order of evaluations; training draws
    without an end, stage by stage (`order`).
    """

    parts: tuple[Part, ...]
    stages: tuple[Stage, ...]
    """As --data has them."""
    shares_SP: tuple[tuple[int, ...], ...]
    """For each stage the share of each part in its draws, of about WHOLE; 0: not in the stage."""
    spread_P: tuple[int, ...]
    """The share of each part by which the records lie; all stages count alike."""

    @property
    def is_endless(self) -> bool:
        return all(part.source.is_endless for part in self.parts)

    def order(self, seed: int, stage: int = 0) -> Order:
        # A source that wraps this one must have its records, at their places.
        if len(self.rows) != sum(len(part.source) for part in self.parts):
            raise ValueError(f"{self.name}: rows were taken out of a mixture, which has no order")
        return Draws(self, seed, stage)

    def passes(self, draws: float, stage: int = 0) -> float:
        passes = [0.0]
        total = sum(self.shares_SP[stage])
        for part, share in zip(self.parts, self.shares_SP[stage], strict=True):
            if not part.source.is_endless:
                passes.append(draws * share / total / len(part.source))
        return max(passes)

    def stage_ends(self, batch_tokens: int | None) -> list[int]:
        ends = []
        batches = 0
        for stage in self.stages[:-1]:
            batches += _batches_of(stage, batch_tokens)
            ends.append(batches)
        return ends

    def label_of(self, i: int) -> str:
        part, _ = placed(i, self.spread_P, sizes_of(self.parts))
        return self.parts[part].label

    def alone(self) -> list[Source]:
        # Through this source, which another may wrap.
        sizes = sizes_of(self.parts)

        def read(part: int, row: int) -> Record:
            return self[place_of(part, row, self.spread_P, sizes)]

        found = []
        for number, part in enumerate(self.parts):
            rows = range(len(part.source))
            found.append(Source(part.source.name, rows, functools.partial(read, number)))
        return found

    def weighed(self, tokens_of: Callable[[Record], int]) -> Self:
        if not any(stage.by_tokens for stage in self.stages):
            return self
        # Mean tokens of a record of each part, at least one.
        means = []
        for source in self.alone():
            tokens = [tokens_of(record) for record in source.first(WEIGHED)]
            means.append(max(float(np.mean(tokens)), 1.0))

        # A share of tokens is a share of records over the tokens of each.
        shares_SP = []
        for stage, shares_P in zip(self.stages, self.shares_SP, strict=True):
            if stage.by_tokens:
                records = [share / mean for share, mean in zip(shares_P, means, strict=True)]
                shares_P = tuple(whole(records))
            shares_SP.append(shares_P)
        return dataclasses.replace(self, shares_SP=tuple(shares_SP))

    def describe_shares(self, batch_tokens: int | None) -> str:
        # What each stage draws.
        lines = []
        for number, shares_P in enumerate(self.shares_SP):
            total = sum(shares_P)
            named = []
            for part, share in zip(self.parts, shares_P, strict=True):
                if share:
                    named.append(f"{share / total:.1%} {part.label}")
            line = f"{', '.join(named)} of the records drawn"
            if len(self.shares_SP) > 1:
                line = f"stage {number + 1}: {line}"
            lines.append(line)
        # And where it ends.
        for number, end in enumerate(self.stage_ends(batch_tokens)):
            lines[number] += f", to batch {end:,}"
        return "; ".join(lines)


def mixed(
    name: str,
    stages: Sequence[Stage],
    sources: Sequence[Source],
    labels: Sequence[str],
    rows_P: Sequence[int] | None = None,
) -> Mixture:
    """Make one source of several, each named by a label of the stages' shares.

    `rows_P`: how many rows of each its weight is multiplied by, where the weight counts rows;
    None: all of the source. Raises UserError where a weight counts the rows of a source without
    an end.
    """
    # Each part once, however many stages name it.
    in_order = {}
    for stage in stages:
        for share in stage.shares:
            in_order[share.label] = share.in_order
    parts = []
    for source, label in zip(sources, labels, strict=True):
        parts.append(Part(label, source, in_order[label]))
    sizes = sizes_of(parts)
    if rows_P is None:
        rows_P = sizes
    shares_SP = tuple(tuple(shares_of(stage, parts, rows_P)) for stage in stages)

    # Records lie in the order of `place_of`, by the shares of all stages together.
    together = [sum(shares_S) for shares_S in zip(*shares_SP, strict=True)]
    spread_P = tuple(whole(together))

    def read(i: int) -> Record:
        part, row = placed(i, spread_P, sizes)
        return parts[part].source[row]

    return Mixture(
        name,
        range(sum(sizes)),
        read,
        max(source.candidates for source in sources),
        parts=tuple(parts),
        stages=tuple(stages),
        shares_SP=shares_SP,
        spread_P=spread_P,
    )


def first_conversations(source: Source, most: int) -> list[list[Message]]:
    """Return the messages of the first conversations of a source, of a mixture's parts in turns.

    `source`: records of the schema `chat`; a mixture may have parts that are documents too, which
    are passed over.
    """
    # A part is of one schema.
    parts = [part for part in source.alone() if "messages" in part[0]]
    found: list[list[Message]] = []
    for row in range(most):
        for part in parts:
            if row < len(part):
                found.append(part[row]["messages"])
    return found[:most]


def _batches_of(stage: Stage, batch_tokens: int | None) -> int:
    """Return the batches of a stage; UserError for tokens that are no whole number of batches."""
    if stage.steps is not None:
        return stage.steps
    assert stage.tokens is not None, "only the last stage has no end"
    if batch_tokens is None:
        raise UserError(
            f"mixture: tokens={stage.tokens}: batches of these records differ in their tokens; "
            "end the stage by steps=N"
        )
    batches, rest = divmod(stage.tokens, batch_tokens)
    if rest or not batches:
        nearest = max(round(stage.tokens / batch_tokens), 1) * batch_tokens
        raise UserError(
            f"mixture: tokens={stage.tokens}: must be a multiple of the {batch_tokens} tokens of "
            f"a batch; the nearest is {nearest}"
        )
    return batches


# --- shares


def shares_of(stage: Stage, parts: Sequence[Part], rows_P: Sequence[int]) -> list[int]:
    """Return the share of each part in the draws of a stage, of about WHOLE.

    It is proportional to weight, or to weight * min(rows, cap) (Raffel et al. 2020, section
    3.5.2), to the power 1 / temperature; at least LEAST of the largest.
    """
    by_label = {share.label: share for share in stage.shares}
    weights = []
    for part, rows in zip(parts, rows_P, strict=True):
        share = by_label.get(part.label)
        if share is None:
            weights.append(0.0)
            continue
        if share.by_rows and share.cap is None and part.source.is_endless:
            raise UserError(
                f"mixture: {share.data}: has no end, so its rows do not count; add @cap=ROWS"
            )
        counted = min(rows, share.cap or rows) if share.by_rows else 1
        weights.append(share.weight * counted)

    # Each over the largest, so that no power overflows.
    largest = max(weights)
    shares = []
    for weight in weights:
        share = (weight / largest) ** (1 / stage.temperature)
        shares.append(max(share, LEAST) if weight else 0.0)
    return whole(shares)


def whole(weights: Sequence[float]) -> list[int]:
    """Return weights as whole numbers, WHOLE in all but for rounding; what is above 0 stays so."""
    total = sum(weights)
    shares = []
    for weight in weights:
        least = 1 if weight > 0 else 0
        shares.append(max(round(weight / total * WHOLE), least))
    return shares


def sizes_of(parts: Sequence[Part]) -> tuple[int, ...]:
    """Return the number of rows of each part."""
    return tuple(len(part.source) for part in parts)


# --- where a row lies among all


def place_of(part: int, row: Any, shares: Sequence[int], sizes: Sequence[int]) -> Any:
    """Return the index at which a mixture has a row of a part.

    Row r of a part with share w comes at the time (2r + 1) / 2w, before a row of the same time
    of a later part. `row` is an int, or an array of rows, int64, and the index then is one too.
    """
    place = row
    for other, (share, size) in enumerate(zip(shares, sizes, strict=True)):
        if other == part:
            continue
        # How many rows r' of the other come first: (2r' + 1) * w < (2r + 1) * w'.
        ahead = (2 * row + 1) * share - shares[part]
        twice = 2 * shares[part]
        count = -(-ahead // twice) if other > part else ahead // twice + 1
        # At least none of them, at most all.
        if isinstance(count, int):
            place = place + min(max(count, 0), size)
        else:
            place = place + np.clip(count, 0, size)
    return place


# A record is read, and asked for its source, one after the other.
@functools.lru_cache(4096)
def placed(i: int, shares: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, int]:
    """Return the part and the row that `place_of` puts at the index `i`."""
    # What lies before it of parts that have ended, and which parts share the rest.
    rest = i
    going_on = []
    for part, last in enumerate(last_places(shares, sizes)):
        if last < i:
            rest -= sizes[part]
        else:
            going_on.append(part)

    # A part's row is near its share of the rest: look for it there.
    total = sum(shares[part] for part in going_on)
    for part in going_on:
        place = functools.partial(place_of, part, shares=shares, sizes=sizes)
        near = rest * shares[part] // total
        start = max(near - len(sizes), 0)
        rows = range(start, min(near + len(sizes) + 1, sizes[part]))
        row = start + bisect.bisect_left(rows, i, key=place)
        if row < rows.stop and place(row) == i:
            return part, row
    raise IndexError(i)


@functools.cache
def last_places(shares: tuple[int, ...], sizes: tuple[int, ...]) -> list[int]:
    """Return the index of each part's last row."""
    return [place_of(part, size - 1, shares, sizes) for part, size in enumerate(sizes)]


# --- draws


def counts(draws: int, shares: Sequence[int]) -> list[int]:
    """Return how many of the first `draws` are of each part: its share of them, rounded.

    No count falls while `draws` grows, and together they are `draws`.
    """
    found = []
    remaining = sum(shares)
    # A part's share of the draws that those before it leave.
    for share in shares:
        count = draws * share // remaining if remaining else 0
        found.append(count)
        draws -= count
        remaining -= share
    return found


class Draws:
    """The order of a stage: `draws[i]` is the index in the mixture of the i-th record drawn.

    Of each BLOCK of draws every part has its share, in an order shuffled by the seed. A part's
    draws go through its rows one after the other: in its own order, shuffled anew each pass, or
    as the rows stand.
    """

    def __init__(self, mixture: Mixture, seed: int, stage: int):
        self._shares = mixture.shares_SP[stage]
        self._seed = [seed, stage]
        self._spread_P = mixture.spread_P
        self._sizes = sizes_of(mixture.parts)
        self._orders: list[Order | None] = []
        for part in mixture.parts:
            # Another stage goes through the rows in another order.
            order = None if part.in_order else part.source.order(seed + stage)
            self._orders.append(order)
        # The block at hand: draws are asked for one after the other.
        self._block = -1
        self._indices_N = np.zeros(0, np.int64)

    def __getitem__(self, i: int) -> int:
        block, place = divmod(i, BLOCK)
        if block != self._block:
            self._indices_N = self._indices(block)
            self._block = block
        return int(self._indices_N[place])

    def _indices(self, block: int) -> np.ndarray:
        """Return the indices of a block of draws, int64 [BLOCK]."""
        # The part of each draw: as many of each as the block has of it, shuffled.
        before_P = counts(block * BLOCK, self._shares)
        after_P = counts((block + 1) * BLOCK, self._shares)
        numbers_P = np.subtract(after_P, before_P)
        parts_N = np.repeat(np.arange(len(numbers_P)), numbers_P)
        rng = np.random.default_rng([*self._seed, block])
        rng.shuffle(parts_N)

        # The row of each draw: a part's draws go through its rows.
        indices_N = np.zeros(BLOCK, np.int64)
        for part, (before, after) in enumerate(zip(before_P, after_P, strict=True)):
            rows = [self._row(part, draw) for draw in range(before, after)]
            indices_N[parts_N == part] = place_of(
                part, np.array(rows, np.int64), self._spread_P, self._sizes
            )
        return indices_N

    def _row(self, part: int, draw: int) -> int:
        """Return the row that the draw of this number takes of a part."""
        order = self._orders[part]
        return draw % self._sizes[part] if order is None else order[draw]
