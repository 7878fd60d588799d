"""A source: records by random access, and the order in which training draws them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import grain
import numpy as np

from data.records import Record

ENDLESS = 1 << 30
"""Records a split of what is built in is said to have: more than any run reads."""


class Order(Protocol):
    """An endless order of a source's records: `order[i]` is the index of the i-th drawn."""

    def __getitem__(self, i: int, /) -> int: ...


@dataclass(frozen=True)
class Source:
    """`len(source)` records; `source[i]` is a dict in the schema asked for, from i = 0."""

    name: str
    """For messages: the path or the catalogue name."""
    rows: Sequence[int] | np.ndarray
    """For each record, its index where it is stored."""
    read: Callable[[int], Record]
    """The record stored at an index."""
    candidates: int = 2
    """The most responses that a comparison has."""

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, most: int) -> list[Record]:
        """Return the first `most` records, or all where there are fewer."""
        return [self[i] for i in range(min(most, len(self)))]

    def __getitem__(self, i: int) -> Record:
        return self.read(int(self.rows[i]))

    # --- what a mixture has another way (data/mixture.py)

    @property
    def is_endless(self) -> bool:
        """True for what is built in, of which no run sees the end."""
        return len(self) == ENDLESS

    def order(self, seed: int, stage: int = 0) -> Order:
        """Return the order in which a stage draws the records, shuffled by `seed`.

        Indices past the end are those of the next pass, in another order.
        """
        return grain.MapDataset.range(len(self)).seed(seed).shuffle()

    def passes(self, draws: float, stage: int = 0) -> float:
        """Return how often so many draws of a stage pass over the records."""
        return draws / len(self)

    def stage_ends(self, batch_tokens: int | None) -> list[int]:
        """Return after how many batches each stage but the last ends; [] for a single stage.

        `batch_tokens`: tokens of a batch; None where they differ.
        """
        return []

    def label_of(self, i: int) -> str | None:
        """Return which part of a mixture the record at `i` is of; None for other sources."""
        return None

    def alone(self) -> list["Source"]:
        """Return the parts of a mixture, each a source by itself; of other sources itself."""
        return [self]

    def weighed(self, tokens_of: Callable[[Record], int]) -> Self:
        """Return the source with the shares of its parts, where they are of tokens, in records.

        `tokens_of(record)`: the tokens that are trained on.
        """
        return self

    def describe_shares(self, batch_tokens: int | None) -> str:
        """Return the shares of a mixture's parts as text; "" for other sources."""
        return ""
