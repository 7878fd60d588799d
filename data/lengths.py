"""How long the records of a source are, and what a limit on their tokens would lose of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.records import Record
from data.source import Source
from data.tokenizer import Tokenizer

Row = dict[str, Any]
MEASURED = 500
"""Records of a source that are measured at a start."""
MUCH = 0.05
"""Share of records cut or dropped from which a line names the flag to raise."""
NO_LIMIT = 1 << 40
"""Tokens, more than any record has."""


class Encoded(NamedTuple):
    """A record as rows."""

    rows: list[Row]
    """Usually one; none where the record is dropped."""
    truncated: bool
    """True where tokens were cut off, or everything dropped."""
    is_refused: bool = False
    """True where the model's chat template refuses the record, which has no rows then."""

    @property
    def is_cut(self) -> bool:
        """True where a part is left; a record that is dropped does not also count as cut."""
        return self.truncated and bool(self.rows)

    @property
    def is_dropped(self) -> bool:
        """True where nothing is left; a record that is refused does not also count as dropped."""
        return not self.rows and not self.is_refused


Encode = Callable[[Record, Tokenizer, int], Encoded]
"""encode(record, tokenizer, length): one record as rows of at most `length` tokens."""


class Lengths(NamedTuple):
    """Lengths of the first records of a source, and what is lost of them at a limit."""

    tokens_N: np.ndarray
    """Tokens of each record before any cut, int64 [N], but of those refused; of a comparison those
    of its longest candidate, prompt and response."""
    cut: int
    """Records of which a part is cut off."""
    dropped: int
    """Records left out as too long."""
    refused: int
    """Records that the model's chat template refuses."""
    lost: float
    """Share of all their tokens that is cut off or dropped."""


def tokens_of(rows: Sequence[Row]) -> int:
    """Count the tokens of rows, prompts once for each of their responses."""
    count = 0
    for row in rows:
        count += len(row.get("tokens", ()))
        count += sum(map(len, (*row.get("prompts", ()), *row.get("responses", ()))))
    return count


def trained_tokens_of(rows: Sequence[Row]) -> int:
    """Count the tokens of rows that are trained on.

    They are those of the mask; without one the responses', and all of a prompt to generate from.
    """
    count = 0
    for row in rows:
        if "mask" in row:
            count += int(np.sum(row["mask"]))
        else:
            count += len(row.get("tokens", ())) + sum(map(len, row.get("responses", ())))
    return count


def longest_of(rows: Sequence[Row]) -> int:
    """Return the tokens of the longest sequence in rows; 0 without any."""
    longest = 0
    for row in rows:
        longest = max(longest, len(row.get("tokens", ())))
        for prompt, response in zip(row.get("prompts", ()), row.get("responses", ()), strict=True):
            longest = max(longest, len(prompt) + len(response))
    return longest


def measure_lengths(
    source: Source, encode: Encode, tokenizer: Tokenizer, length: int, records: int = MEASURED
) -> Lengths:
    """Measure the first `records` of a source, or all where there are fewer.

    `length`: tokens that a row may have, as `encode` takes it.
    """
    sizes = []
    cut = 0
    dropped = 0
    refused = 0
    tokens = 0
    kept = 0
    for i in range(min(records, len(source))):
        record = source[i]
        whole = encode(record, tokenizer, NO_LIMIT)
        if whole.is_refused:
            refused += 1
            continue
        sizes.append(longest_of(whole.rows))
        # Few records are cut: only those are encoded twice.
        fits = whole if sizes[-1] <= length else encode(record, tokenizer, length)
        cut += fits.is_cut
        dropped += fits.is_dropped
        count = tokens_of(whole.rows)
        tokens += count
        # A document that goes on in another row repeats a token there.
        kept += min(count, tokens_of(fits.rows))
    lost = 1 - kept / max(tokens, 1)
    return Lengths(np.array(sizes, np.int64), cut, dropped, refused, lost)


def lengths_line(
    source: Source,
    encode: Encode,
    tokenizer: Tokenizer,
    length: int,
    *,
    flag: str = "--length",
    records: int = MEASURED,
) -> str:
    """Say in a line how many rows a source has, how long they are and what is lost of them.

    `flag`: sets `length`; it is named where more than MUCH of the records are cut or dropped.
    """
    found = measure_lengths(source, encode, tokenizer, length, records)
    measured = len(found.tokens_N)
    rows = "endless" if source.is_endless else f"{len(source):,} rows"
    refused = ""
    part = "" if measured == len(source) else f" of the first {measured:,}"
    if found.refused:
        first = measured + found.refused
        refused = f"; of the first {first:,} the chat template refuses {found.refused:,}"
        part = f" of the other {measured:,}"
    if measured == 0:
        return f"{source.name}: {rows}{refused}"
    median, high = np.percentile(found.tokens_N, [50, 95])
    line = (
        f"{source.name}: {rows}{refused}; {median:,.0f} tokens at the median{part}, {high:,.0f} "
        f"at the 95th percentile; at {flag}={length} {found.cut / measured:.1%} are cut and "
        f"{found.dropped / measured:.1%} dropped, {found.lost:.1%} of the tokens lost"
    )
    if found.cut + found.dropped > MUCH * measured:
        line += f": raise {flag}"
    return line
