"""Files that others made: looked for inside their folder, read as JSON, values held to a table.

A mistake in them is one line that names the file, the field and what is wanted.
"""

import json
import pathlib
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from runtime.errors import UserError

LONGEST_LINE = 200
"""Characters of a library's message that are shown."""


# --- kinds of values


class Kind(NamedTuple):
    """The values that a field may hold."""

    words: str
    """As a message says it: `a number above 0`."""
    holds: Callable[[Any], bool]
    """True for a value of the kind; takes any value that JSON has."""


def whole(least: int, most: int) -> Kind:
    """Return the kind of whole numbers from `least` to `most`; true and 1.0 are none."""

    def holds(value: Any) -> bool:
        return type(value) is int and least <= value <= most

    return Kind(f"a whole number from {least:,} to {most:,}", holds)


def number(above: float, most: float) -> Kind:
    """Return the kind of numbers above `above` and at most `most`."""

    def holds(value: Any) -> bool:
        # NaN is never between two numbers.
        return type(value) in (int, float) and above < value <= most

    return Kind(f"a number above {above:g} and at most {most:g}", holds)


def one_of(*values: str) -> Kind:
    """Return the kind of the texts `values`."""

    def holds(value: Any) -> bool:
        return type(value) is str and value in values

    return Kind(f"one of {', '.join(values)}", holds)


def object_of(kind: Kind) -> Kind:
    """Return the kind of objects, of one field or more, whose values are of `kind`."""

    def holds(value: Any) -> bool:
        if type(value) is not dict or not value:
            return False
        return all(map(kind.holds, value.values()))

    return Kind(f"an object whose values are {kind.words}", holds)


def list_of(kind: Kind) -> Kind:
    """Return the kind of lists, of one value or more, each of `kind`."""

    def holds(value: Any) -> bool:
        if type(value) is not list or not value:
            return False
        return all(map(kind.holds, value))

    return Kind(f"a list of {kind.words}", holds)


def either(*kinds: Kind) -> Kind:
    """Return the kind of values that are of one of `kinds`."""

    def holds(value: Any) -> bool:
        return any(kind.holds(value) for kind in kinds)

    words = " or ".join(kind.words for kind in kinds)
    return Kind(words, holds)


FLAG = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("a text", lambda value: type(value) is str)
OBJECT = Kind("an object", lambda value: type(value) is dict)


def check_values(path: pathlib.Path, content: Mapping[str, Any], kinds: dict[str, Kind]) -> None:
    """Raise UserError for a field of `content`, read from `path`, that is not of its kind.

    `kinds`: {field: its kind}. A null, or a field that is missing, passes; so does one that
    `kinds` does not name.
    """
    for name, kind in kinds.items():
        value = content.get(name)
        if value is None or kind.holds(value):
            continue
        # Shortened, in depth too: it may be the whole of a file.
        shown = reprlib.repr(value)
        raise UserError(f"{path}: {name} is {shown}, not {kind.words}; restore the file")


# --- files


def file_in(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Return the path of the file `name` of `folder`; raise UserError where it lies outside.

    A link may lead anywhere in the folder, and from a snapshot of Hugging Face's cache to the
    cache's own files, `blobs` beside `snapshots`.
    """
    # Where the file must be when all links are followed.
    inside = folder.resolve()
    if inside.parent.name == "snapshots":
        inside = inside.parents[1]

    # Where it is.
    path = folder / name
    shown = reprlib.repr(name)
    try:
        target = path.resolve()
    except (OSError, ValueError, RuntimeError) as fault:
        raise UserError(f"{folder}: {shown}: {one_line(fault)}; restore it") from None

    # A name with a folder in it is refused too, wherever it leads.
    is_name = pathlib.PurePath(name).name == name
    if not is_name or not target.is_relative_to(inside):
        raise UserError(f"{folder}: {shown} lies outside the folder; put the file itself there")
    return path


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Read the JSON object in the file `path`, of the folder that it lies in.

    Raises UserError for what is no such object, for a name that stands twice in one, and where a
    link leads out of the folder (`file_in`); FileNotFoundError where there is no file.
    """
    path = file_in(path.parent, path.name)
    # A missing file is the caller's to judge; any other fault is the file's.
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_without_twins)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as fault:
        raise UserError(
            f"{path}: not readable as a JSON object ({one_line(fault)}); restore the file"
        ) from None
    if type(content) is not dict:
        raise UserError(f"{path}: not readable as a JSON object; restore the file")
    return content


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; raise ValueError for a name that stands twice in it."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"{reprlib.repr(first_twin(pairs))} stands twice")
    return content


def first_twin(pairs: list[tuple[str, Any]]) -> str:
    """Return the first name of `pairs` that stands there more than once.

    `pairs`: (name, value) each. Raises StopIteration where there is none.
    """
    names = [name for name, _ in pairs]
    return next(name for name in names if names.count(name) > 1)


def read_object_if_there(path: pathlib.Path) -> dict[str, Any]:
    """Read the JSON object in the file `path`; return {} where there is no file.

    Raises UserError as `read_object` does.
    """
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}


def refuse_other_object(path: pathlib.Path, names: Collection[str]) -> bool:
    """Raise UserError for a file that is no JSON object with `names`: it is not replaced.

    Returns True for such an object, False for no file or an empty one. Raises OSError for a name
    that no file can have.
    """
    if not path.exists() or not path.stat().st_size:
        return False
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if type(content) is not dict or not content.keys() >= set(names):
        raise UserError(f"{path}: exists, and is not of this command; name another place")
    return True


def one_line(fault: Exception) -> str:
    """Return a fault's message in one line of at most 200 characters, or its type's name."""
    words = " ".join(str(fault).split())
    return words[:LONGEST_LINE] or type(fault).__name__
