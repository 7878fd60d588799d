"""Files of all formats as numbered rows: JSON Lines, JSON arrays, CSV, Parquet and Arrow.

Each reader takes a path and yields (number, row), or (number, FieldError) for a row that cannot be
read while those after it can. Where nothing more can be read it raises UserError. No reader holds
more of a file than a piece of it. Rows are numbered from 1, lines with the blank ones; in CSV the
header is row 1, as in a spreadsheet. JSON Lines and Parquet can be cut into parts.
"""

import contextlib
import csv
import gzip
import json
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TextIO

from data.fields import FieldError, Row, unlike_keys
from data.records import ANSWERS, INPUTS, REQUESTS, RESPONSES, SYSTEM
from runtime.errors import UserError
from runtime.foreign import one_line

if TYPE_CHECKING:
    import pyarrow

NumberedRow = tuple[int, Row | FieldError]
"""A row's number in its file, and the row or what is wrong with it."""

CHUNK = 1 << 20
"""Characters of a JSON array that are read at a time."""
ROWS = 256
"""Rows of a Parquet file that are decoded at a time, at most."""
BUFFER = 1 << 20
"""Bytes of a column that are read from a Parquet file at a time."""
LONGEST_TOKEN = 16
"""Characters of JSON that are judged together, such as \\uD83D\\uDE00 and -Infinity."""


class Part(NamedTuple):
    """Rows of a file that follow each other, and can be read without those before them."""

    path: pathlib.Path
    size: int
    """Bytes of the file that it takes, about."""
    start: int = 0
    """Where it begins: a byte of JSON Lines, a row group of Parquet."""
    end: int | None = None
    """Where it ends, likewise; None: with the file."""
    before: int = 0
    """Rows of the file before it; of JSON Lines, lines."""


def whole(path: pathlib.Path) -> Part:
    """Return all of a file as one part; raises OSError."""
    return Part(path, path.stat().st_size)


def parts_of(path: pathlib.Path, size: int) -> list[Part]:
    """Cut a file into parts of about `size` bytes, in order; one part where it cannot be cut.

    Parquet is cut between its row groups. Raises OSError, or UserError for a Parquet file that is
    none.
    """
    uncut = [whole(path)]
    if uncut[0].size <= size:
        return uncut
    if is_lines(path) and path.suffix != ".gz":
        return _parts_of_lines(path, size)
    if path.suffix == ".parquet":
        return _parts_of_parquet(path, size)
    return uncut


def read_part(part: Part) -> Iterator[NumberedRow]:
    """Yield the rows of a part with their numbers in the file; raises as the readers do."""
    if is_lines(part.path):
        return read_lines(part.path, part.start, part.end, part.before)
    if part.path.suffix == ".parquet":
        return read_parquet(part.path, part.start, part.end, part.before)
    return READERS[part.path.suffix](part.path)


def is_lines(path: pathlib.Path) -> bool:
    """Tell whether a file is JSON Lines: by its name, and of `.json` by its first character."""
    if path.suffix != ".json":
        return path.name.endswith((".jsonl", ".jsonl.gz"))
    with path.open("rb") as file:
        # Many data sets call their JSON Lines `.json`.
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


# ---- JSON Lines ----


def read_lines(
    path: pathlib.Path, start: int = 0, end: int | None = None, before: int = 0
) -> Iterator[NumberedRow]:
    """Yield (number, row) of each line of a .jsonl[.gz] file, from 1, blank lines skipped.

    `start`, `end`, `before`: see Part; of a file that is not compressed. A line that is no JSON
    object yields (number, FieldError). Raises UserError for a broken gzip file and OSError for a
    file that cannot be opened.
    """
    for number, line in enumerate(_lines(path, start, end), before + 1):
        if not line.strip():
            continue
        try:
            yield number, _row(line)
        except FieldError as fault:
            yield number, fault


def _lines(path: pathlib.Path, start: int, end: int | None) -> Iterator[bytes]:
    """Yield the lines of a .jsonl[.gz] file between two bytes at which lines begin."""
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rb") as lines:
            lines.seek(start)
            at = start
            for line in lines:
                yield line
                number += 1
                at += len(line)
                if end is not None and at >= end:
                    return
    except (EOFError, gzip.BadGzipFile, zlib.error) as fault:
        raise UserError(
            f"{path}:{number + 1}: broken gzip file ({fault}); compress it again"
        ) from None


def _parts_of_lines(path: pathlib.Path, size: int) -> list[Part]:
    """Cut JSON Lines at the first line that ends at or after each multiple of `size` bytes."""
    parts: list[Part] = []
    with path.open("rb") as file:
        start = before = 0
        while True:
            lines = _pass(file, size)
            end = file.tell()
            if end == start:
                return parts
            parts.append(Part(path, end - start, start, end, before))
            start, before = end, before + lines


def _pass(file: BinaryIO, size: int) -> int:
    """Go forward by `size` bytes and to the end of the line there; return the lines passed."""
    lines = 0
    while size > 0:
        block = file.read(min(size, BUFFER))
        if not block:
            break
        size -= len(block)
        lines += block.count(b"\n")
    rest = file.readline()
    return lines + bool(rest)


def _row(line: bytes) -> Row:
    """Read a line as a JSON object; raises FieldError for the field `line`."""
    if not line.strip(b"\0 \r\n\t"):
        raise FieldError("line", "holds NULs alone, as a crash leaves them; remove it")
    try:
        # Without its newline, at which the parser would say the fault is.
        text = line.decode("utf-8-sig").rstrip()
        row = json.loads(text, object_pairs_hook=unlike_keys)
    except UnicodeDecodeError as fault:
        raise FieldError(
            "line", f"is not UTF-8 (byte {fault.start + 1}); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as fault:
        reason = f"{fault.msg}, column {fault.colno}"
        raise FieldError("line", f"is not JSON ({reason}); write one object a line") from None
    except RecursionError:
        raise FieldError("line", "is not JSON that can be read (it nests too deep)") from None
    except ValueError:
        raise FieldError("line", "holds a number of too many digits; write a string") from None
    if not isinstance(row, dict):
        raise FieldError(
            "line",
            f"must be a JSON object, not {type(row).__name__}; write one object a line, or name a "
            "file that is an array .json",
        )
    return row


# ---- JSON arrays ----


def read_json_array(path: pathlib.Path) -> Iterator[NumberedRow]:
    """Yield the objects of a file that is one JSON array."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for item in _items(file):
                number += 1
                yield number, item
    except UnicodeDecodeError:
        raise UserError(
            f"{path}:{number + 1}: line: is not UTF-8; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as fault:
        raise UserError(f"{path}:{number + 1}: line: is not JSON ({fault.msg})") from None
    except RecursionError:
        raise UserError(
            f"{path}:{number + 1}: line: is not JSON that can be read (it nests too deep)"
        ) from None


def _items(file: TextIO) -> Iterator[Row | FieldError]:
    """Yield the items of an array; raises JSONDecodeError where it is none, or broken."""
    text = _Text(file)
    text.expect("[", "an array of objects must begin with [")
    if text.next_character() == "]":
        return
    while True:
        yield text.item()
        if text.next_character() == "]":
            break
        text.expect(",", "Expecting ',' or ']'")
    text.expect("]", "Expecting ']'")
    if text.next_character():
        raise json.JSONDecodeError("something stands behind the array", "", 0)


class _Text:
    """The text of a file, of which only what is not read yet is kept."""

    def __init__(self, file: TextIO):
        """Begin at the beginning of `file`."""
        self._file = file
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder(object_pairs_hook=unlike_keys)

    def _more(self) -> bool:
        """Read more, as much as there is of an item already; False at the end of the file."""
        rest = self._text[self._at :]
        more = self._file.read(max(CHUNK, len(rest)))
        self._text = rest + more
        self._at = 0
        return bool(more)

    def next_character(self) -> str:
        """Return the next character that is no space, and stay before it; "" at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def expect(self, character: str, fault: str) -> None:
        """Go behind `character`, which must be next."""
        if self.next_character() != character:
            raise json.JSONDecodeError(fault, "", 0)
        self._at += 1

    def item(self) -> Row | FieldError:
        """Read one item and go behind it."""
        self.next_character()
        while True:
            try:
                item, self._at = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as fault:
                # It may only be cut off, where the text that is here ends.
                is_cut = fault.msg.startswith("Unterminated string")
                is_cut |= fault.pos > len(self._text) - LONGEST_TOKEN
                if is_cut and self._more():
                    continue
                raise
            except FieldError as fault:
                # A key stands twice. The item's end is found without looking at keys.
                _, self._at = self._without_hook()
                return fault
            except ValueError:
                _, self._at = self._without_hook()
                return FieldError("line", "holds a number of too many digits; write a string")
            if not isinstance(item, dict):
                return FieldError("line", f"must be an object, not {type(item).__name__}")
            return item

    def _without_hook(self) -> tuple[Any, int]:
        """Decode an item whatever its keys and numbers, of which there may be more to read."""
        decoder = json.JSONDecoder(parse_int=float)
        while True:
            try:
                return decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise


# ---- CSV ----

TEXTS = frozenset(
    f"text {REQUESTS} {INPUTS} {ANSWERS} {RESPONSES} criterion".split() + list(SYSTEM)
) - {"reward_model", "label"}
"""Columns whose cells are texts, whatever they look like; others may hold JSON."""


def read_csv(path: pathlib.Path) -> Iterator[NumberedRow]:
    """Yield the rows of a CSV file with a header; an empty cell is no value.

    Cells of columns that are no TEXTS are read as JSON where they are JSON: numbers, true and
    false, lists. Pandas writes True and False.
    """
    csv.field_size_limit(sys.maxsize)
    number = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = _header(path, next(reader, []))
            for cells in reader:
                number += 1
                # A blank line is no row.
                if cells:
                    yield number, _row_of_cells(header, cells)
    except UnicodeDecodeError:
        raise UserError(
            f"{path}:{number + 1}: row: is not UTF-8; save the file as UTF-8"
        ) from None
    except csv.Error as fault:
        raise UserError(
            f"{path}:{number + 1}: row: is not CSV ({fault}); put texts in double quotes, and "
            "double those in them"
        ) from None


def _header(path: pathlib.Path, names: list[str]) -> list[str]:
    """Check the names of columns."""
    if not names:
        raise UserError(f"{path}: has no rows; the first must name the columns")
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        raise UserError(f"{path}:1: row: has one column, {names[0]!r}; part columns by commas")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}:1: {name or 'row'}: names two columns; rename one")
    return names


def _row_of_cells(header: list[str], cells: list[str]) -> Row | FieldError:
    if len(cells) != len(header):
        return FieldError("row", f"has {len(cells)} cells, and the header {len(header)}")
    row = {}
    for name, cell in zip(header, cells, strict=True):
        # Pandas writes the index of rows into a column without a name.
        if name and cell:
            row[name] = cell if name in TEXTS else _value(cell)
    return row


def _value(cell: str) -> Any:
    """Return what a cell says as JSON; the cell itself where it is no JSON."""
    words = {"True": True, "False": False}
    if cell in words:
        return words[cell]
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


# ---- Parquet and Arrow ----


def read_parquet(
    path: pathlib.Path, start: int = 0, end: int | None = None, before: int = 0
) -> Iterator[NumberedRow]:
    """Yield the rows of a Parquet file, of which a piece of one row group is held at a time.

    `start`, `end`, `before`: see Part.
    """
    with _parquet(path) as file:
        groups = range(start, file.num_row_groups if end is None else end)
        yield from _rows_of(file.iter_batches(ROWS, row_groups=groups), before)


@contextlib.contextmanager
def _parquet(path: pathlib.Path) -> "Iterator[pyarrow.parquet.ParquetFile]":
    """Open a Parquet file; its faults are UserErrors."""
    # Slow to import, as below.
    import pyarrow.parquet

    # By default the columns of a row group are read whole, and kept until the last one.
    options = {"buffer_size": BUFFER, "pre_buffer": False}
    with _in_one_line(path), pyarrow.parquet.ParquetFile(path, **options) as file:
        yield file


def _parts_of_parquet(path: pathlib.Path, size: int) -> list[Part]:
    """Cut a Parquet file between row groups, into parts of about `size` bytes."""
    with _parquet(path) as file:
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    # Groups are taken to be alike: a part has as many.
    parts_wanted = -(-path.stat().st_size // size)
    together = -(-len(rows) // parts_wanted)
    parts = []
    before = 0
    for start in range(0, len(rows), together):
        end = min(start + together, len(rows))
        share = path.stat().st_size * (end - start) // len(rows)
        parts.append(Part(path, share, start, end, before))
        before += sum(rows[start:end])
    return parts


def read_arrow(path: pathlib.Path) -> Iterator[NumberedRow]:
    """Yield the rows of an Arrow file: a stream, as `datasets` writes it."""
    import pyarrow.ipc

    with _in_one_line(path), pyarrow.OSFile(str(path)) as file:
        yield from _rows_of(pyarrow.ipc.open_stream(file))


@contextlib.contextmanager
def _in_one_line(path: pathlib.Path) -> Iterator[None]:
    """Turn what pyarrow raises while a file is read into one line."""
    import pyarrow

    try:
        yield
    # Its errors are ValueErrors and OSErrors too.
    except (pyarrow.ArrowException, OSError) as fault:
        raise UserError(f"{path}: cannot be read ({one_line(fault)})") from None


def _rows_of(batches: "Iterable[pyarrow.RecordBatch]", before: int = 0) -> Iterator[NumberedRow]:
    number = before
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, _without_filling(row)


def _without_filling(value: Any) -> Any:
    """Return a value without the nulls in its objects.

    A column has one type, so that each object in it has the fields of all others, as nulls.
    """
    if isinstance(value, dict):
        return {name: _without_filling(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_filling(item) for item in value]
    return value


READERS: dict[str, Callable[[pathlib.Path], Iterator[NumberedRow]]] = {
    ".json": read_json_array,
    ".csv": read_csv,
    ".arrow": read_arrow,
}
"""The reader of each format that cannot be cut, by the ending of a file's name."""
