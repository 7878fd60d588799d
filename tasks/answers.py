"""Rewards that check an answer: function(response, record) -> float, for train_grpo.py's --reward=tasks.answers:number.

`record` is the prompt's, {"prompt": messages, "answer": str}. Write your own in any module; the name is all it needs.
"""

import re
from typing import Any

from runtime.errors import UserError

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def answer(record: dict[str, Any]) -> str:
    """The record's answer; raises UserError where it has none."""
    if "answer" not in record:
        raise UserError(
            "--data: its prompts have no answer to check; give rows with prompt and answer"
        )
    return record["answer"]


def last_number(text: str) -> float | None:
    """The last number in `text`, thousands' commas left out."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def number(response: str, record: dict[str, Any]) -> float:
    """1 where the response's last number is the answer's last (of GSM8K: the one after ####), else 0."""
    wanted = last_number(answer(record))
    return float(wanted is not None and last_number(response) == wanted)


def exact(response: str, record: dict[str, Any]) -> float:
    """1 where the response is the answer, but for case and space, else 0."""
    return float(" ".join(response.lower().split()) == " ".join(answer(record).lower().split()))
