"""metrics.jsonl of a run: a row of metrics a line, and what tells that rows were damaged.

Each checkpoint holds the sum of the rows written before it (`Rows.seal`), so that a resumed run
knows whether it still has them.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import sys
from typing import Any, TypedDict

from runtime.errors import UserError
from runtime.writes import disk_faults

Row = dict[str, Any]
"""Metrics by name, numbers or None; `step` and `seconds` among them."""


class Seal(TypedDict):
    """The sum of a file's beginning."""

    size: int
    """Bytes."""
    rows: int
    sha256: str


def read_rows(run: str, quiet: bool = False) -> list[Row]:
    """Read metrics.jsonl of the folder `run`, a dict a line, in order; [] without the file.

    A line that is no row is left out, with a warning on stderr unless `quiet`.
    """
    path = pathlib.Path(run) / "metrics.jsonl"
    rows = []
    for number, line in enumerate(_lines(path), 1):
        row = _row_of(line)
        if row is not None:
            rows.append(row)
        elif not quiet:
            _warn(path, number)
    return rows


class Rows:
    """metrics.jsonl of a run that goes on after a step, open for more rows."""

    def __init__(self, path: pathlib.Path, last: int, seal: Seal | None = None):
        """Open the file without the rows after step `last`, which are to be done again.

        `seal`: of the rows up to `last`; None where it is not known. A line that is no row stays
        where it is, with a warning. Raises UserError where rows up to `last` have changed or are
        missing otherwise.
        """
        self.path = path
        kept = _kept(path, last, seal)
        last_row = _last_row(kept)
        self.seconds: float = last_row.get("seconds") or 0.0
        """Time of the last row that is kept."""
        self.tokens_seen: float = last_row.get("tokens_seen") or 0
        """Tokens that were trained on up to there."""
        self._sum = hashlib.sha256(kept)
        self._size = len(kept)
        self._count = kept.count(b"\n")
        # What stays is not written anew: no fault can lose it.
        with disk_faults(path):
            self._file = path.open("ab")
            if self._file.tell() < self._size:
                # The last newline is missing.
                self._file.write(b"\n")
                self._file.flush()
            self._file.truncate(self._size)

    def write(self, row: Row) -> None:
        """Append a row, {name: number or None}; raise UserError where the disk is full."""
        # JSON's own letters, so that a line is ASCII.
        line = json.dumps(row).encode() + b"\n"
        with disk_faults(self.path):
            self._file.write(line)
            self._file.flush()
        self._sum.update(line)
        self._size += len(line)
        self._count += 1

    def seal(self) -> Seal:
        """Put all rows so far on the disk; return their sum, for a checkpoint."""
        with disk_faults(self.path):
            os.fsync(self._file.fileno())
        return {"size": self._size, "rows": self._count, "sha256": self._sum.hexdigest()}

    def close(self) -> None:
        """Close the file, which has all rows already."""
        # A row that `write` could not write, and has told of, may be left over.
        with contextlib.suppress(OSError):
            self._file.close()


def _kept(path: pathlib.Path, last: int, seal: Seal | None) -> bytes:
    """Return the lines up to step `last`, each with its newline; see `Rows`."""
    # As they were when the checkpoint was written.
    if seal is not None and path.exists():
        content = path.read_bytes()[: seal["size"]]
        if hashlib.sha256(content).hexdigest() == seal["sha256"]:
            return content

    # Else line by line. What follows the row of step `last` is to be done again.
    kept: list[bytes] = []
    damaged = []
    step = 0
    for number, line in enumerate(_lines(path), 1):
        row = _row_of(line)
        if step >= last or (row is not None and row["step"] > last):
            break
        if row is None:
            damaged.append(number)
        else:
            step = row["step"]
        kept.append(line + b"\n")

    # What is damaged is told; what has changed or gone without a trace is not gone on with.
    if seal is not None and not (damaged and len(kept) == seal["rows"]):
        _refuse_other_rows(path, last)
    for number in damaged:
        _warn(path, number)
    return b"".join(kept)


def _last_row(kept: bytes) -> Row:
    """Return the last row of these lines; {} where there is none."""
    for line in reversed(kept.split(b"\n")):
        row = _row_of(line)
        if row is not None:
            return row
    return {}


def _refuse_other_rows(path: pathlib.Path, last: int) -> None:
    if path.exists():
        raise UserError(
            f"{path}: rows up to step {last} have changed or are missing since that step was "
            "saved; restore the file, or remove it to go on without them"
        )
    print(f"warning: {path}: missing; rows up to step {last} are lost", file=sys.stderr)


def _lines(path: pathlib.Path) -> list[bytes]:
    """Return the lines of the file without their newlines; [] where there is none."""
    content = path.read_bytes() if path.exists() else b""
    return content.removesuffix(b"\n").split(b"\n") if content else []


def _row_of(line: bytes) -> Row | None:
    """Return the row that a line holds; None where it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if is_row and all(map(_is_number, row.values())) else None


def _is_number(value: Any) -> bool:
    """Tell whether `value` is None, a float, or an integer that a float can hold."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, float)


def _warn(path: pathlib.Path, number: int) -> None:
    print(f"warning: {path}:{number}: damaged; its row is left out", file=sys.stderr)
