"""Flags of a benchmark from its dataclass, with the standard library alone.

The benchmarks must start on machines without tyro (benchmarks/absent.py), so that they do not
read their flags as the scripts do.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from benchmarks.absent import standing_in
from benchmarks.rows import is_whole

with standing_in():
    from runtime import flags

ConfigT = TypeVar("ConfigT")


def described(cls: type) -> dict[str, str]:
    """Return the text under each field of a dataclass, by the field's name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore
    texts = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            texts[field.target.id] = ast.literal_eval(text.value)  # type: ignore
    return texts


def parse(cls: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Fill the dataclass `cls` from flags, `--rounds=3 --lengths 512 1024`.

    `argv` None: the command line's. Of a flag that comes twice the last holds. A field is text, a
    number, or a tuple of one kind. Ends the program with code 2 for a flag that does not fit.
    """
    about = (sys.modules[cls.__module__].__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    texts = described(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        several = isinstance(field.default, tuple)
        shown = " ".join(map(str, field.default)) if several else field.default
        parser.add_argument(
            f"--{field.name}",
            type=type(field.default[0] if several else field.default),
            nargs="*" if several else None,
            default=field.default,
            help=f"{texts[field.name]} (default: {shown})".replace("%", "%%"),
        )
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    return cls(**given)


def run(main: Callable[[Any], dict[str, Any]], cls: type) -> None:
    """Run a benchmark as a command; a mistake ends in one line and exit code 2.

    `main` returns what `rows.run_rows` does. Where a row's first side was not timed, or the sides
    did not do the same, the exit code is 1.
    """

    def start() -> None:
        result = main(parse(cls))
        if not all(map(is_whole, result["rows"])):
            sys.exit(1)

    flags.ending_in_one_line(start)
