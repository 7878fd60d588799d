"""Values of a row's fields: what they must be, and which fields change what is trained on.

Everything here raises FieldError, which names the field; data/preparing.py adds file and line.
"""

import functools
import math
import re
from typing import Any

from runtime.foreign import first_twin

Row = dict[str, Any]
"""A row as a file has it: any JSON object."""
LARGEST = 2**31 - 1
"""Largest rank, and largest margin, that a batch holds."""
ON = ("weight", "train", "loss", "trainable")
OFF = ("masked", "mask", "ignore", "skip")
"""Keys of a message that say, by 1 or 0, whether it is trained on, and whether it is not."""
JUDGEMENTS = ("desirable", "label")
"""Fields that say by true or false whether a response is good."""


def _words(text: str) -> frozenset[str]:
    """Return the words of a text, which are parted by spaces."""
    return frozenset(text.split())


SWITCH_ON = _words("weight weights train trained training trainable loss learn")
SWITCH_OFF = _words("mask masked ignore ignored exclude excluded")
"""Words in other fields' names that say the same as ON and OFF."""
CONTENT = _words(
    "system developer history tool tools function functions call calls input context contexts "
    "document documents passage passages choices options hint hints reasoning thinking thought "
    "thoughts think thinks rationale cot refusal prefix suffix image images audio audios video "
    "videos media tie"
)
"""Words that end the name of a field which belongs to what is read or trained on."""
OTHERS_TURNS = _words("input inputs prompt prompts user system")
"""Words for what is never trained on: train_on_input."""
FORMS = _words("content text prompt message messages data list url urls path file")
"""Words that may stand behind them: reasoning_content, image_url."""
FACTS = _words(
    "id ids name names count number num index type kind source tokens length size version hash "
    "language lang date time timestamp score scores model"
)
"""Words that, first or last, make a field a fact about the row instead: image_id, num_tools."""


class FieldError(Exception):
    """A row that is not in the schema: `field: reason`."""

    def __init__(self, field: str, reason: str):
        """`field`: a path in the row, such as messages[0].content."""
        super().__init__(f"{field}: {reason}")


class LeftOut(FieldError):
    """A row that says itself that it is not trained on."""


def shown(value: Any) -> str:
    """Return a value for a message: in one line, at most 60 characters, printable."""
    text = repr(value)
    if len(text) > 60:
        text = f"{text[:57]}..."
    return text


def name_shown(name: str) -> str:
    """Return a field's name for a message: as it is, or escaped where it is not printable."""
    return name if name.isprintable() else shown(name)


def missing(row: Row, field: str, wanted: str) -> FieldError:
    """Make the error for a row without `field`, which says what is needed and what is there."""
    # A table may have hundreds of columns.
    names = list(row)[:8]
    found = ", ".join(map(name_shown, names)) or "nothing"
    return FieldError(field, f"missing; the row needs {wanted} and has {found}")


def get(row: Row, field: str, place: str = "") -> Any:
    """Return a field that must be there; `place` is where `row` is in the whole row."""
    if field not in row:
        raise missing(row, place + field, place + field)
    return row[field]


def unlike_keys(pairs: list[tuple[str, Any]]) -> Row:
    """Return the pairs of a JSON object as a dict; raise FieldError for a key that repeats."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise FieldError(name_shown(first_twin(pairs)), "stands twice in one object; keep one")
    return row


def an_object(row: Row, field: str) -> Row:
    """Return a field that must be a JSON object."""
    if not isinstance(row[field], dict):
        raise FieldError(field, "must be an object")
    return row[field]


def text_of(value: Any, field: str) -> str:
    """Check a string that holds something beside space and NULs, and can be written as UTF-8."""
    if not isinstance(value, str):
        raise FieldError(field, f"must be a string, not {type(value).__name__}")
    if not value.replace("\0", " ").strip():
        raise FieldError(field, "is empty; remove the row, or fill it in")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FieldError(field, "holds half a surrogate pair, which is not text") from None
    return value


def whole_number(value: Any) -> int | None:
    """Return a whole number, also one that was written as 1.0; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    # True and False count: Python's and JSON's booleans are numbers to those who write them.
    return int(value) if isinstance(value, int) else None


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)


def answer_text(value: Any, field: str) -> str:
    """Check an answer, a string or a finite number, and return it as text."""
    if is_number(value):
        return str(value)
    if isinstance(value, str):
        return text_of(value, field)
    raise FieldError(field, f"must be a string or a number, not {shown(value)}")


# ---- Fields that change what is trained on ----


def is_empty(value: Any) -> bool:
    """Return whether a field says nothing: null, or an empty string, list or object."""
    return value is None or value in ("", [], {})


def switch(row: Row, place: str) -> bool | None:
    """Return whether a message is trained on, as its own keys ON and OFF say; None without any.

    `place`: where the message is in the row.
    """
    # What each key says: 1 of ON, or 0 of OFF, is yes.
    answers = set()
    for name in (*ON, *OFF):
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise FieldError(f"{place}.{name}", f"must be 0 or 1, not {shown(value)}")
        answers.add(bool(value) == (name in ON))
    if len(answers) > 1:
        raise FieldError(place, f"its {', '.join(ON)} and {', '.join(OFF)} disagree; keep one")
    return answers.pop() if answers else None


@functools.lru_cache(4096)
def _words_of(name: str) -> tuple[list[str], bool]:
    """Return the words in a name without FORMS at its end, and if one is of OTHERS_TURNS."""
    # camelCase is parted where a capital letter begins a word.
    separate = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()
    words = re.findall(r"[a-z]+", separate)
    on_others = not OTHERS_TURNS.isdisjoint(words)
    while len(words) > 1 and words[-1] in FORMS:
        words.pop()
    return words, on_others


def leave_out(row: Row) -> None:
    """Raise LeftOut for a row whose own weight is 0, or whose train is false."""
    for name in ("weight", "train"):
        value = row.get(name)
        if isinstance(value, int | float) and value == 0:
            raise LeftOut(name, f"is {shown(value)}: the row is not trained on")


def changes_training(name: str, value: Any, switches_only: bool = False) -> bool:
    """Return whether a field that nothing reads would change what is read or trained on.

    Judged by the words in its name, in snake_case or camelCase, and by its value: a weight of 1
    changes nothing, nor does a null. `switches_only`: only fields that say whether to train.
    """
    words, on_others = _words_of(name)
    if is_empty(value) or not words or {words[0], words[-1]} & FACTS:
        return False

    # Switches: what they say when they change nothing is also the default.
    if not SWITCH_ON.isdisjoint(words):
        default = 0 if on_others else 1
        return value != default
    if name in OFF or not SWITCH_OFF.isdisjoint(words):
        return value != 0

    # A response judged bad would be trained on as if it were good.
    if name in JUDGEMENTS:
        return value is False
    return not switches_only and value is not False and words[-1] in CONTENT


def refuse_unread(
    row: Row, read: frozenset[str], place: str = "", switches_only: bool = False
) -> None:
    """Raise FieldError for a field not in `read` that would change what is trained on.

    `place` is where `row` is in the whole row; `switches_only` is that of `changes_training`.
    """
    for name, value in row.items():
        if name not in read and changes_training(name, value, switches_only=switches_only):
            raise FieldError(
                place + name_shown(name),
                "is not read here, and would change what is trained on; "
                "write it into the text, or remove it",
            )
