"""samples.md of a run: a section a step, a fenced block a text. Written, read and cut here."""

import os
import pathlib
import re
from collections.abc import Sequence

from runtime.terminal import printable

SampleRow = dict[str, str]
"""A row of samples.md: `prompt` and `response`, texts; further keys are shown as they are."""

PARTS = re.compile(
    rb"^## Step (?P<step>\d+)$"
    rb"|^\*\*(?P<name>[^\n]+)\*\*\n\n(?P<fence>`{3,})text\n(?P<text>.*?)\n(?P=fence)$"
    rb"|^(?P<rule>---)$",
    re.MULTILINE | re.DOTALL,
)
"""A step's heading, a text under its name, or the rule after a row. A text is matched whole, so
that nothing in it is taken for one of the others."""


def append_samples(path: pathlib.Path, step: int, rows: Sequence[SampleRow]) -> None:
    """Append a section of `rows`, {name: text} each, to the file, whole or not at all.

    The file is made where it is missing. `step`: the section's heading. Raises OSError.
    """
    parts = [f"## Step {step}\n\n"]
    for row in rows:
        parts += [f"**{name}**\n\n{_fenced(str(text))}\n\n" for name, text in row.items()]
        parts.append("---\n\n")
    with path.open("ab") as file:
        end = file.tell()
        try:
            file.write("".join(parts).encode())
            file.flush()
        except OSError:
            # Half a section would swallow the next one.
            os.truncate(path, end)
            raise


def last_samples(run: str) -> list[SampleRow]:
    """Return the rows of the last section of samples.md in the folder `run`, {name: text} each.

    [] without the file. Control characters are spelled out in it.
    """
    rows: list[SampleRow] = [{}]
    for part in PARTS.finditer(_content(pathlib.Path(run) / "samples.md")):
        if part["step"]:
            # Another section begins.
            rows = [{}]
        elif part["rule"]:
            rows.append({})
        else:
            name, text = (part[group].decode(errors="replace") for group in ("name", "text"))
            rows[-1][name] = text
    return [row for row in rows if row]


def cut_samples(path: pathlib.Path, last: int) -> None:
    """Remove the sections after step `last` from the file, if it is there; raises OSError."""
    for part in PARTS.finditer(_content(path)):
        if part["step"] and int(part["step"]) > last:
            os.truncate(path, part.start())
            return


def _content(path: pathlib.Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _fenced(text: str) -> str:
    """Return `text` in a Markdown block that nothing in it can close."""
    # A fence longer than any run of ticks inside.
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{printable(text)}\n{fence}"
