"""Rows of tables for a terminal, and notes on what is not in them."""

import sys
from collections.abc import Iterable

import jax

from runtime.errors import require


def cells(values: Iterable[object], spec: str) -> str:
    """Format each value by `spec`, as in an f-string, and join: cells([1, 2], ">4")."""
    return "".join(format(value, spec) for value in values)


def note_left_out(name: str, left_out: int, count: int, length: int) -> None:
    """Say on stderr how many of `count` records do not fit; raise UserError where none does.

    `name`: of their source. `length`: tokens that hold one, --length.
    """
    require(left_out < count, f"{name}: no record fits into {length} tokens; raise --length")
    # The other processes would say the same.
    if left_out and jax.process_index() == 0:
        print(
            f"note: {name}: {left_out} of {count} records are not evaluated: "
            f"they have no part that counts in {length} tokens",
            file=sys.stderr,
        )
