"""Rewards that check an answer: function(response, record) -> float.

For train_grpo.py's --reward=tasks.answers:number. `record` is the prompt's,
{"prompt": messages, "answer": str}. Write your own in any module; the name is all it needs.
"""

import re
from typing import Any

from runtime.errors import UserError

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
"""A decimal number, with or without commas between thousands."""


def answer(record: dict[str, Any]) -> str:
    """Return the record's answer; raise UserError where it has none."""
    if "answer" not in record:
        raise UserError(
            "--data: its prompts have no answer to check; give rows with prompt and answer"
        )
    return record["answer"]


def last_number(text: str) -> float | None:
    """Return the last number in `text`, commas between thousands left out; None without one."""
    found = NUMBER.findall(text)
    if not found:
        return None
    return float(found[-1].replace(",", ""))


def number(response: str, record: dict[str, Any]) -> float:
    """Return 1 where the response's last number is the answer's last, else 0.

    The last number of a GSM8K answer is the one after ####.
    """
    wanted = last_number(answer(record))
    if wanted is None:
        return 0.0
    return float(last_number(response) == wanted)


def exact(response: str, record: dict[str, Any]) -> float:
    """Return 1 where the response is the answer, but for case and space, else 0."""
    given = response.lower().split()
    wanted = answer(record).lower().split()
    return float(given == wanted)
