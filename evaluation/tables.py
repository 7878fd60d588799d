"""Rows of tables for a terminal."""

from collections.abc import Iterable


def cells(values: Iterable[object], spec: str) -> str:
    """Format each value by `spec`, as in an f-string, and join: cells([1, 2], ">4")."""
    return "".join(format(value, spec) for value in values)
