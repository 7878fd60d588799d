"""Rows of tables for a terminal, and notes on what is not in them."""

import sys
from collections.abc import Iterable, Sequence

import jax

from data.batches import encode_or_leave_out
from data.lengths import Encode, Encoded
from data.records import Record
from data.source import Source
from data.tokenizer import Tokenizer
from runtime.errors import require


def cells(values: Iterable[object], spec: str) -> str:
    """Format each value by `spec`, as in an f-string, and join: cells([1, 2], ">4")."""
    return "".join(format(value, spec) for value in values)


def evaluated_records(
    source: Source, encode: Encode, tokenizer: Tokenizer, length: int, most: int
) -> list[Record]:
    """Return those of the first `most` records of `source` that `encode` makes rows of.

    A note on stderr counts the others: too long for `length` tokens, or refused by the chat
    template. Raises UserError where none is left, and for a refused one as data.bad_rows does.
    """
    read = source.first(most)
    found = []
    for record in read:
        found.append(encode_or_leave_out(encode, source.name, record, tokenizer, length))
    _note_left_out(source.name, found, length)
    return [record for record, encoded in zip(read, found, strict=True) if encoded.rows]


def _note_left_out(name: str, found: Sequence[Encoded], length: int) -> None:
    """Say on stderr how many of the records `found` have no rows; raise UserError where none has.

    `name`: of their source. `length`: tokens that hold one, --length.
    """
    count = len(found)
    refused = sum(encoded.is_refused for encoded in found)
    left_out = sum(encoded.is_dropped for encoded in found)
    require(refused < count, f"{name}: the chat template refuses every record ({count:,})")
    also = f"; the chat template refuses {refused} more" if refused else ""
    require(
        left_out + refused < count,
        f"{name}: no record fits into {length} tokens; raise --length{also}",
    )
    # The other processes would say the same.
    if (left_out or refused) and jax.process_index() == 0:
        print(
            f"note: {name}: {left_out} of {count} records are not evaluated: "
            f"they have no part that counts in {length} tokens{also}",
            file=sys.stderr,
        )
