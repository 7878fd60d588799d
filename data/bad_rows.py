"""Bad rows: they end the command or, with --on_bad_row=skip, are left out and listed.

Rows of files are found bad when a file is first read (data/preparing.py). Of good rows some cannot
be written for a model: its chat template refuses them. That shows when they are encoded.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax

from data.messages import Message
from runtime.errors import UserError

OnBadRow = Literal["stop", "skip"]
SHOWN = 40
"""Characters of a record by which a message names it."""

_on_bad_row: OnBadRow = "stop"
_unreadable: dict[str, None] = {}
"""Faults of the bad rows of the files opened so far, in order."""
_refused: dict[str, str] = {}
"""Faults of the first refused record of each prompt so far, by the prompt, in order."""


class RecordRefused(UserError):
    """A conversation that the model's chat template does not take; the template is in order."""


def set_on_bad_row(choice: OnBadRow) -> None:
    """Stop at a bad row from now on, as at first, or skip it; forget what was left out so far."""
    global _on_bad_row
    _on_bad_row = choice
    _unreadable.clear()
    _refused.clear()


def are_bad_rows_skipped() -> bool:
    """Tell whether bad rows are left out, as `set_on_bad_row` says."""
    return _on_bad_row == "skip"


def list_bad_rows(faults: Iterable[str]) -> None:
    """Note what is wrong with each row of a file that was left out when it was read."""
    _unreadable.update(dict.fromkeys(faults))


def bad_rows() -> list[str]:
    """Return what is wrong with each row left out of the files opened since `set_on_bad_row`."""
    return list(_unreadable)


def refused_records() -> list[str]:
    """Return what is wrong with each record that was refused since `set_on_bad_row`."""
    return list(_refused.values())


def refuse_record(name: str, record: Mapping[str, Any], fault: RecordRefused) -> None:
    """Leave a record of the source `name` out, and list it; or raise UserError for it.

    It is named by how its first turn but a system's begins. The first that is left out is told on
    stderr.
    """
    messages: Sequence[Message] = record.get("messages") or record.get("prompt") or ()
    turns = [message["content"] for message in messages if message["role"] != "system"]
    which = f"the record that begins {turns[0][:SHOWN]!r}" if turns else "a record"
    line = f"{name}: {which}: {fault}"
    if not are_bad_rows_skipped():
        raise UserError(f"{line}; --on_bad_row=skip leaves such records out") from None
    # One line is enough: skipped.txt has those of all hosts.
    if not _refused and jax.process_index() == 0:
        print(f"note: left out, and so will be others like it: {line}", file=sys.stderr)
    # A conversation may be met again as a prompt, without its answer.
    is_answered = bool(messages) and messages[-1]["role"] == "assistant"
    asked = messages[:-1] if is_answered else messages
    _refused.setdefault(json.dumps(asked or line), line)
