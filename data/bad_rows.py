"""What a bad row does: it ends the command or, with --on_bad_row=skip, is left out and listed.

Rows of files are found bad when a file is first read (data/sources.py). Of good rows some cannot
be written for a model: its chat template refuses them. That shows when they are encoded.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from data.messages import Message
from runtime.errors import UserError

OnBadRow = Literal["stop", "skip"]
SHOWN = 40
"""Characters of a record by which a message names it."""

_on_bad_row: OnBadRow = "stop"
_refused: dict[str, None] = {}
"""What is wrong with each record refused so far, in order; of a dict each is there once."""


class RecordRefused(UserError):
    """A conversation that the model's chat template does not take; the template is in order."""


def set_on_bad_row(choice: OnBadRow) -> None:
    """Stop at a bad row from now on, as at first, or skip it; forget what was refused so far."""
    global _on_bad_row
    _on_bad_row = choice
    _refused.clear()


def are_bad_rows_skipped() -> bool:
    """Tell whether bad rows are left out, as `set_on_bad_row` says."""
    return _on_bad_row == "skip"


def refused_records() -> list[str]:
    """Return what is wrong with each record that was left out since `set_on_bad_row`."""
    return list(_refused)


def refuse_record(name: str, record: Mapping[str, Any], fault: RecordRefused) -> None:
    """Leave a record of the source `name` out, and list it; or raise UserError for it.

    It is named by how its messages, or those of its prompt, begin. The first that is left out is
    told on stderr.
    """
    messages: Sequence[Message] = record.get("messages") or record.get("prompt") or ()
    which = "a record"
    if messages:
        which = f"the record that begins {messages[0]['content'][:SHOWN]!r}"
    line = f"{name}: {which}: {fault}"
    if not are_bad_rows_skipped():
        raise UserError(f"{line}; --on_bad_row=skip leaves such records out") from None
    # The other processes would say the same.
    if not _refused and jax.process_index() == 0:
        print(f"note: left out, and so will be others like it: {line}", file=sys.stderr)
    _refused[line] = None
