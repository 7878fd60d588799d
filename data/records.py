"""Record schemas: rows in the layouts people publish, adapted by content to one form a schema.

text        {"text": str}
chat        {"messages": [{"role", "content"}, ...]}, ending with the assistant's turn
comparison  {"prompt": messages, "responses": [str, ...], "ranking": [1 = best, ...; equal = tie]}
            and where the row has them "margin": float >= 0, "criterion": str
unpaired    {"prompt": messages, "response": str, "desirable": bool}
prompt      {"prompt": messages[, "answer": str]} or, to be continued as raw text, {"text": str}
steps       {"prompt": messages, "steps": [str, ...], "labels": [one of STEP_LABELS, 0 to 1, or None, ...]}
"""

import math
import re
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
ROLES = ("system", "user", "assistant")
STEP_LABELS = ("positive", "neutral", "negative")


class FieldError(Exception):
    """A row that is not in the schema: `field: reason`."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}")


def text(row: Row) -> Row:
    """A document; of a conversation, its turns one below the other."""
    if "text" in row:
        return {"text": _string(row["text"], "text")}
    return {"text": "\n".join(message["content"] for message in chat(row)["messages"])}


def chat(row: Row) -> Row:
    """A conversation whose last turn is the assistant's; of a comparison, the best response's."""
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        if messages[-1]["role"] != "assistant":
            raise FieldError("messages", "the last turn must be the assistant's")
        return {"messages": messages}
    if "chosen" in row or "responses" in row:
        pair = comparison(row)
        best = pair["ranking"].index(1)
        return {"messages": [*pair["prompt"], _turn("assistant", pair["responses"][best])]}
    if "instruction" in row:
        return _instruction(row)
    for asked, answered in (
        ("prompt", "response"),
        ("prompt", "completion"),
        ("question", "answer"),
    ):
        if asked in row and answered in row:
            answer = _turn("assistant", _string(row[answered], answered))
            return {"messages": [*_prompt(row[asked], asked), answer]}
    raise _missing(
        row, "messages", "messages, prompt and response, question and answer, or instruction"
    )


def comparison(row: Row) -> Row:
    """A prompt and two or more responses with their ranks."""
    if "responses" in row:
        record = {"prompt": _prompt(_get(row, "prompt"), "prompt"), **_ranked(row)}
    else:
        pair = [_get(row, "chosen"), _get(row, "rejected")]
        if "prompt" in row and isinstance(pair[0], str):
            prompt = _prompt(row["prompt"], "prompt")
            responses = [
                _string(r, field) for r, field in zip(pair, ("chosen", "rejected"), strict=True)
            ]
        else:
            prompt, responses = _transcripts(*pair)
        record = {
            "prompt": prompt,
            "responses": responses,
            "ranking": [1, 1 if responses[0] == responses[1] else 2],
        }
    if row.get("margin") is not None:
        margin = row["margin"]
        if (
            isinstance(margin, bool)
            or not isinstance(margin, int | float)
            or not 0 <= margin < math.inf
        ):
            raise FieldError("margin", f"must be a number of at least 0, not {margin!r}")
        record["margin"] = float(margin)
    if row.get("criterion") is not None:
        record["criterion"] = _string(row["criterion"], "criterion")
    return record


def unpaired(row: Row) -> Row:
    """One response to a prompt, judged desirable or not; also {"prompt", "completion", "label"}."""
    answered = "response" if "response" in row else "completion"
    label = "desirable" if "desirable" in row else "label"
    if answered not in row or label not in row:
        raise _missing(
            row,
            "response" if answered not in row else "desirable",
            "prompt, response and desirable",
        )
    response = _string(row[answered], answered)
    if not isinstance(row[label], bool):
        raise FieldError(label, f"must be true or false, not {row[label]!r}")
    return {
        "prompt": _prompt(_get(row, "prompt"), "prompt"),
        "response": response,
        "desirable": row[label],
    }


def prompt(row: Row) -> Row:
    """What a response is asked to. A conversation serves too: without its last turn, kept as the answer."""
    if "prompt" in row:
        answer = next(
            (field for field in ("answer", "response", "completion") if field in row), None
        )
        record = {"prompt": _prompt(row["prompt"], "prompt")}
        return record if answer is None else {**record, "answer": _string(row[answer], answer)}
    if "text" in row:
        return text(row)
    if not {"messages", "question", "instruction", "chosen"} & row.keys():
        raise _missing(row, "prompt", "prompt, text, or the fields of a conversation")
    if isinstance(row.get("messages"), list) and row["messages"]:
        messages = _messages(row["messages"], "messages")
        if messages[-1]["role"] == "user":
            return {"prompt": messages}
    *asked, answer = chat(row)["messages"]
    return {"prompt": asked, "answer": answer["content"]}


def steps(row: Row) -> Row:
    """A solution in steps; a number is the share of completions that come right, None no label. Also PRM800K's rows."""
    if "question" in row and "label" in row:
        return _prm800k(row)
    steps, labels = _get(row, "steps"), _get(row, "labels")
    if not isinstance(steps, list) or not steps:
        raise FieldError("steps", "must be a list of one or more strings")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise FieldError("labels", f"must be a list of {len(steps)} labels, as many as steps")
    for i, label in enumerate(labels):
        share = isinstance(label, int | float) and not isinstance(label, bool) and 0 <= label <= 1
        if not share and label is not None and label not in STEP_LABELS:
            raise FieldError(
                f"labels[{i}]", f"must be {', '.join(STEP_LABELS)}, 0 to 1, or null, not {label!r}"
            )
    for i, step in enumerate(steps):
        if "\n" in _string(step, f"steps[{i}]"):
            raise FieldError(f"steps[{i}]", "must be one line; join its lines")
    return {"prompt": _prompt(_get(row, "prompt"), "prompt"), "steps": steps, "labels": labels}


SCHEMAS: dict[str, Callable[[Row], Row]] = {
    "text": text,
    "chat": chat,
    "comparison": comparison,
    "unpaired": unpaired,
    "prompt": prompt,
    "steps": steps,
}


# ---- Layouts ----


def _instruction(row: Row) -> Row:
    """{"instruction"[, "input"], "output"}, or with "instances" of these two, of which the first is taken."""
    request = _string(row["instruction"], "instruction")
    place, instance = "", row
    if "instances" in row:
        instances = row["instances"]
        if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
            raise FieldError("instances", "must be a list of objects with input and output")
        place, instance = "instances[0].", instances[0]
    if instance.get("input"):
        request += "\n\n" + _string(instance["input"], place + "input")
    output = _string(_get(instance, "output", place), place + "output")
    return {"messages": [_turn("user", request), _turn("assistant", output)]}


def _ranked(row: Row) -> Row:
    responses, ranking = row["responses"], _get(row, "ranking")
    if not isinstance(responses, list) or len(responses) < 2:
        raise FieldError("responses", "must be a list of two or more strings")
    responses = [_string(r, f"responses[{i}]") for i, r in enumerate(responses)]
    whole = isinstance(ranking, list) and all(type(rank) is int for rank in ranking)
    if not whole or len(ranking) != len(responses) or min(ranking) != 1:
        raise FieldError(
            "ranking", f"must be {len(responses)} whole numbers, 1 the best, equal for a tie"
        )
    return {"responses": responses, "ranking": ranking}


def _transcripts(chosen: Any, rejected: Any) -> tuple[list[Row], list[str]]:
    """Two whole conversations that differ in the assistant's last turn."""
    one, other = _transcript(chosen, "chosen"), _transcript(rejected, "rejected")
    if one[:-1] != other[:-1]:
        raise FieldError("rejected", "must be the conversation of chosen up to the last turn")
    return one[:-1], [one[-1]["content"], other[-1]["content"]]


def _transcript(value: Any, field: str) -> list[Row]:
    """Messages, or HH's "\\n\\nHuman: ...\\n\\nAssistant: ...", whose last turn may be empty (4 in 1,800)."""
    if isinstance(value, list):
        turns = _messages(value, field)
    else:
        parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + _string(value, field).lstrip("\n"))
        turns: list[Row] = []
        for name, content in zip(parts[1::2], parts[2::2], strict=True):
            role, content = "user" if name == "Human" else "assistant", content.strip()
            if turns and turns[-1]["role"] == role:  # HH has some turns in two parts
                turns[-1]["content"] += "\n\n" + content
            else:
                turns.append(_turn(role, content))
        if parts[0].strip() or not turns or not all(turn["content"] for turn in turns[:-1]):
            raise FieldError(
                field, "must be a transcript of Human: and Assistant: turns, or beside a prompt"
            )
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise FieldError(field, "must end with an assistant's turn that follows another's")
    return turns


def _prm800k(row: Row) -> Row:
    """The trajectory of a labelled PRM800K solution (Lightman et al. 2023); alternatives to its steps are left out.

    A step's text is the chosen completion's, else the human's, else (the labelling ended here) the first one's. What
    a human wrote counts as positive. A step of several lines becomes one line. Problems given up may have no step;
    batches drop them.
    """
    record: Row = {
        "prompt": _prompt(
            _get(_object(row, "question"), "problem", "question."), "question.problem"
        )
    }
    chosen = []
    stages = _get(_object(row, "label"), "steps", "label.")
    for i, stage in enumerate(stages if isinstance(stages, list) else []):
        place = f"label.steps[{i}]"
        if not isinstance(stage, dict) or not isinstance(stage.get("completions"), list):
            raise FieldError(place, "must be an object with completions")
        number, human, offered = (
            stage.get("chosen_completion"),
            stage.get("human_completion"),
            stage["completions"],
        )
        if number is None and human is not None:
            completion = {"rating": 1, **{name: x for name, x in human.items() if x is not None}}
        elif not offered:
            break
        elif number is None or (type(number) is int and 0 <= number < len(offered)):
            completion = offered[number or 0]
        else:
            raise FieldError(
                place + ".chosen_completion", f"must be one of {len(offered)} completions"
            )
        rating = completion.get("rating")
        if rating not in (-1, 0, 1, None):
            raise FieldError(place, f"rating must be -1, 0, 1 or null, not {rating!r}")
        label = None if rating is None else STEP_LABELS[1 - rating]
        chosen.append((" ".join(_string(completion.get("text"), place).split()), label))
    return record | {
        "steps": [text for text, _ in chosen],
        "labels": [label for _, label in chosen],
    }


def _object(row: Row, field: str) -> Row:
    if not isinstance(row[field], dict):
        raise FieldError(field, "must be an object")
    return row[field]


# ---- Values ----


def _turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def _get(row: Row, field: str, place: str = "") -> Any:
    if field not in row:
        raise _missing(row, place + field, place + field)
    return row[field]


def _missing(row: Row, field: str, wanted: str) -> FieldError:
    found = ", ".join(map(str, list(row)[:8])) or "nothing"
    return FieldError(field, f"missing; the row needs {wanted} and has {found}")


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise FieldError(field, f"must be a string, not {type(value).__name__}")
    if not value.strip():
        raise FieldError(field, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FieldError(field, "holds half a surrogate pair, which is not text") from None
    return value


def _prompt(value: Any, field: str) -> list[Row]:
    """A prompt as messages: a string is one user's turn."""
    if not isinstance(value, list):
        return [_turn("user", _string(value, field))]
    messages = _messages(value, field)
    if messages[-1]["role"] != "user":
        raise FieldError(field, "the last turn must be the user's")
    return messages


def _messages(value: Any, field: str) -> list[Row]:
    if not isinstance(value, list) or not value:
        raise FieldError(field, "must be a list of one or more messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise FieldError(f"{field}[{i}]", "must be an object with role and content")
        if message.get("role") not in ROLES or (message["role"] == "system" and i > 0):
            raise FieldError(
                f"{field}[{i}].role", "must be user or assistant; the first may be system"
            )
        _string(message.get("content"), f"{field}[{i}].content")
    return [_turn(message["role"], message["content"]) for message in value]
