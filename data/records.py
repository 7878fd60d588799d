"""Record schemas: rows in the layouts people publish, adapted by content to one form a schema.

text        {"text": str}
chat        {"messages": [{"role", "content"}, ...]}, ending with the assistant's turn
comparison  {"prompt": messages, "responses": [str, ...], "ranking": [1 = best, ...; equal = tie]}
            and where the row has them "margin": float >= 0, "criterion": str
unpaired    {"prompt": messages, "response": str, "desirable": bool}
prompt      {"prompt": messages[, "answer": str]} or, to be continued as raw text, {"text": str}
steps       {"prompt": messages, "steps": [str, ...],
            "labels": [one of STEP_LABELS, a share from 0 to 1, or None, ...]}

Messages that are a prompt end with the user's turn. Every string holds something beside space.

Each function `<schema>_record` takes a row as JSON gives it, and raises FieldError for one that
does not fit. Fields that no schema names are ignored.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

Row = dict[str, Any]
"""A row as a file has it: any JSON object."""
Record = dict[str, Any]
"""A row adapted to one schema; its keys are those of the table above."""
Message = dict[str, str]
"""One turn: {"role": one of ROLES, "content": text}."""
Schema = Literal["text", "chat", "comparison", "unpaired", "prompt", "steps"]
Role = Literal["system", "user", "assistant"]
ROLES = get_args(Role)
STEP_LABELS = ("positive", "neutral", "negative")


class FieldError(Exception):
    """A row that is not in the schema: `field: reason`."""

    def __init__(self, field: str, reason: str):
        """`field`: a path in the row, such as messages[0].content."""
        super().__init__(f"{field}: {reason}")


# ---- Schemas ----


def text_record(row: Row) -> Record:
    """Adapt a document; a conversation becomes its turns, one below the other."""
    if "text" in row:
        return {"text": _string(row["text"], "text")}
    turns = [message["content"] for message in chat_record(row)["messages"]]
    return {"text": "\n".join(turns)}


def chat_record(row: Row) -> Record:
    """Adapt a conversation whose last turn is the assistant's.

    Taken are messages, a comparison (its best response), an instruction, and a prompt or question
    with its response, completion or answer.
    """
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        if messages[-1]["role"] != "assistant":
            raise FieldError("messages", "the last turn must be the assistant's")
        return {"messages": messages}
    if "chosen" in row or "responses" in row:
        compared = comparison_record(row)
        best = compared["ranking"].index(1)
        response = compared["responses"][best]
        turns = [*compared["prompt"], _turn("assistant", response)]
        return {"messages": turns}
    if "instruction" in row:
        return _instruction(row)

    # Names that data sets give to a request and its answer.
    pairs = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"))
    for asked, answered in pairs:
        if asked in row and answered in row:
            response = _string(row[answered], answered)
            prompt = _prompt(row[asked], asked)
            return {"messages": [*prompt, _turn("assistant", response)]}
    wanted = "messages, prompt and response, question and answer, or instruction"
    raise _missing(row, "messages", wanted)


def comparison_record(row: Row) -> Record:
    """Adapt a prompt and two or more responses with their ranks, 1 the best, equal for a tie.

    Taken are {"prompt", "responses", "ranking"}, {"prompt", "chosen", "rejected"}, and two whole
    conversations {"chosen", "rejected"} that differ in the last turn. Equal texts are a tie.
    """
    if "responses" in row:
        prompt = _prompt(_get(row, "prompt"), "prompt")
        record = {"prompt": prompt, **_ranked(row)}
    else:
        prompt, chosen, rejected = _chosen_and_rejected(row)
        worse = 1 if chosen == rejected else 2
        record = {"prompt": prompt, "responses": [chosen, rejected], "ranking": [1, worse]}
    if row.get("margin") is not None:
        record["margin"] = _margin(row["margin"])
    if row.get("criterion") is not None:
        record["criterion"] = _string(row["criterion"], "criterion")
    return record


def unpaired_record(row: Row) -> Record:
    """Adapt one response to a prompt, judged desirable or not.

    Taken are {"prompt", "response", "desirable"} and {"prompt", "completion", "label"}.
    """
    answered = "response" if "response" in row else "completion"
    label = "desirable" if "desirable" in row else "label"
    wanted = "prompt, response and desirable"
    if answered not in row:
        raise _missing(row, "response", wanted)
    if label not in row:
        raise _missing(row, "desirable", wanted)
    response = _string(row[answered], answered)
    if not isinstance(row[label], bool):
        raise FieldError(label, f"must be true or false, not {row[label]!r}")
    prompt = _prompt(_get(row, "prompt"), "prompt")
    return {"prompt": prompt, "response": response, "desirable": row[label]}


def prompt_record(row: Row) -> Record:
    """Adapt a prompt, with its answer where the row has one, or raw text to be continued.

    A conversation serves too: without its last turn, which is kept as the answer.
    """
    if "prompt" in row:
        record: Record = {"prompt": _prompt(row["prompt"], "prompt")}
        for field in ("answer", "response", "completion"):
            if field in row:
                record["answer"] = _string(row[field], field)
                break
        return record
    if "text" in row:
        return text_record(row)
    if not {"messages", "question", "instruction", "chosen"} & row.keys():
        raise _missing(row, "prompt", "prompt, text, or the fields of a conversation")

    # A conversation that ends with the user has no answer.
    messages = row.get("messages")
    if isinstance(messages, list) and messages:
        turns = _messages(messages, "messages")
        if turns[-1]["role"] == "user":
            return {"prompt": turns}
    *asked, answer = chat_record(row)["messages"]
    return {"prompt": asked, "answer": answer["content"]}


def steps_record(row: Row) -> Record:
    """Adapt a solution in steps of one line each, and a label for each step.

    A label is one of STEP_LABELS, a number (the share of completions from here that come right),
    or None where the step is not judged. Taken are {"prompt", "steps", "labels"} and PRM800K's
    rows.
    """
    if "question" in row and "label" in row:
        return _prm800k(row)
    steps = _get(row, "steps")
    labels = _get(row, "labels")
    if not isinstance(steps, list) or not steps:
        raise FieldError("steps", "must be a list of one or more strings")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise FieldError("labels", f"must be a list of {len(steps)} labels, as many as steps")
    for i, label in enumerate(labels):
        _check_step_label(label, f"labels[{i}]")
    for i, step in enumerate(steps):
        if "\n" in _string(step, f"steps[{i}]"):
            raise FieldError(f"steps[{i}]", "must be one line; join its lines")
    prompt = _prompt(_get(row, "prompt"), "prompt")
    return {"prompt": prompt, "steps": steps, "labels": labels}


SCHEMAS: dict[str, Callable[[Row], Record]] = {
    "text": text_record,
    "chat": chat_record,
    "comparison": comparison_record,
    "unpaired": unpaired_record,
    "prompt": prompt_record,
    "steps": steps_record,
}
"""Each schema's adapter; adapting a record again changes nothing."""


# ---- Layouts ----


def _instruction(row: Row) -> Record:
    """Adapt {"instruction"[, "input"], "output"} to a chat.

    Input and output may stand in a list of "instances", of which the first is taken.
    """
    request = _string(row["instruction"], "instruction")
    place = ""
    instance = row
    if "instances" in row:
        instances = row["instances"]
        if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
            raise FieldError("instances", "must be a list of objects with input and output")
        place = "instances[0]."
        instance = instances[0]

    # An input goes below the instruction; an empty one is none.
    if instance.get("input"):
        more = _string(instance["input"], place + "input")
        request = f"{request}\n\n{more}"
    output = _get(instance, "output", place)
    response = _string(output, place + "output")
    return {"messages": [_turn("user", request), _turn("assistant", response)]}


def _ranked(row: Row) -> Record:
    """Check the responses of a row and their ranks; return these two."""
    responses = row["responses"]
    ranking = _get(row, "ranking")
    if not isinstance(responses, list) or len(responses) < 2:
        raise FieldError("responses", "must be a list of two or more strings")
    for i, response in enumerate(responses):
        _string(response, f"responses[{i}]")

    # As many whole numbers, true and false not among them; the best is 1.
    count = len(responses)
    whole = isinstance(ranking, list) and all(type(rank) is int for rank in ranking)
    if not whole or len(ranking) != count or min(ranking) != 1:
        raise FieldError("ranking", f"must be {count} whole numbers, 1 the best, equal for a tie")
    return {"responses": responses, "ranking": ranking}


def _chosen_and_rejected(row: Row) -> tuple[list[Message], str, str]:
    """Return the prompt, the chosen and the rejected response of a pair in either layout."""
    chosen = _get(row, "chosen")
    rejected = _get(row, "rejected")
    if "prompt" in row and isinstance(chosen, str):
        prompt = _prompt(row["prompt"], "prompt")
        return prompt, _string(chosen, "chosen"), _string(rejected, "rejected")

    # Two whole conversations, which must differ in the last turn only.
    chosen_turns = _transcript(chosen, "chosen")
    rejected_turns = _transcript(rejected, "rejected")
    if chosen_turns[:-1] != rejected_turns[:-1]:
        raise FieldError("rejected", "must be the conversation of chosen up to the last turn")
    return chosen_turns[:-1], chosen_turns[-1]["content"], rejected_turns[-1]["content"]


def _margin(value: Any) -> float:
    """Check a margin: a finite number, not negative."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise FieldError("margin", f"must be a number of at least 0, not {value!r}")
    return float(value)


def _transcript(value: Any, field: str) -> list[Message]:
    """Read a conversation that ends with the assistant: messages, or a transcript of HH."""
    turns = _messages(value, field) if isinstance(value, list) else _hh_turns(value, field)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise FieldError(field, "must end with an assistant's turn that follows another's")
    return turns


def _hh_turns(value: Any, field: str) -> list[Message]:
    """Read HH's "\\n\\nHuman: ...\\n\\nAssistant: ...", of which the last turn may be empty."""
    whole = "\n\n" + _string(value, field).lstrip("\n")
    before, *parts = re.split(r"\n\n(Human|Assistant):", whole)
    turns: list[Message] = []
    for name, content in zip(parts[0::2], parts[1::2], strict=True):
        role: Role = "user" if name == "Human" else "assistant"
        content = content.strip()
        # HH has some turns in two parts.
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + content
        else:
            turns.append(_turn(role, content))
    if before.strip() or not turns or not all(turn["content"] for turn in turns[:-1]):
        raise FieldError(
            field, "must be a transcript of Human: and Assistant: turns, or beside a prompt"
        )
    return turns


def _prm800k(row: Row) -> Record:
    """Adapt a labelled PRM800K solution (Lightman et al. 2023): the trajectory, no alternatives.

    A step's text is the chosen completion's, else the human's, else (the labelling ended here)
    the first one's. What a human wrote counts as positive. A step of several lines becomes one
    line. Problems given up may have no step; batches drop them.
    """
    problem = _get(_object(row, "question"), "problem", "question.")
    prompt = _prompt(problem, "question.problem")
    steps = []
    labels = []
    for text, label in _prm800k_steps(_object(row, "label")):
        steps.append(text)
        labels.append(label)
    return {"prompt": prompt, "steps": steps, "labels": labels}


def _prm800k_steps(solution: Row) -> Iterator[tuple[str, str | None]]:
    """Yield the text and the label of each step of the trajectory."""
    stages = _get(solution, "steps", "label.")
    if not isinstance(stages, list):
        return
    for i, stage in enumerate(stages):
        place = f"label.steps[{i}]"
        completion = _prm800k_completion(stage, place)
        if completion is None:
            return
        rating = completion.get("rating")
        if rating not in (-1, 0, 1, None):
            raise FieldError(place, f"rating must be -1, 0, 1 or null, not {rating!r}")
        label = None if rating is None else STEP_LABELS[1 - rating]
        text = _string(completion.get("text"), place)
        yield " ".join(text.split()), label


def _prm800k_completion(stage: Any, place: str) -> Row | None:
    """Return the completion that was taken at a stage; None where the solution ends before it."""
    if not isinstance(stage, dict) or not isinstance(stage.get("completions"), list):
        raise FieldError(place, "must be an object with completions")
    chosen = stage.get("chosen_completion")
    human = stage.get("human_completion")
    completions = stage["completions"]
    if chosen is None and human is not None:
        if not isinstance(human, dict):
            raise FieldError(f"{place}.human_completion", "must be an object with text")
        written = {name: value for name, value in human.items() if value is not None}
        return {"rating": 1, **written}
    if not completions:
        return None
    if chosen is None:
        chosen = 0
    if type(chosen) is not int or not 0 <= chosen < len(completions):
        raise FieldError(
            f"{place}.chosen_completion", f"must be one of {len(completions)} completions"
        )
    completion = completions[chosen]
    if not isinstance(completion, dict):
        raise FieldError(f"{place}.completions[{chosen}]", "must be an object with text")
    return completion


# ---- Values ----


def _turn(role: Role, content: str) -> Message:
    return {"role": role, "content": content}


def _get(row: Row, field: str, place: str = "") -> Any:
    """Return a field that must be there; `place` is where `row` is in the whole row."""
    if field not in row:
        raise _missing(row, place + field, place + field)
    return row[field]


def _missing(row: Row, field: str, wanted: str) -> FieldError:
    """Make the error for a row without `field`, which says what is needed and what is there."""
    found = ", ".join(map(str, list(row)[:8])) or "nothing"
    return FieldError(field, f"missing; the row needs {wanted} and has {found}")


def _object(row: Row, field: str) -> Row:
    if not isinstance(row[field], dict):
        raise FieldError(field, "must be an object")
    return row[field]


def _string(value: Any, field: str) -> str:
    """Check a string that holds something beside space and can be written as UTF-8."""
    if not isinstance(value, str):
        raise FieldError(field, f"must be a string, not {type(value).__name__}")
    if not value.strip():
        raise FieldError(field, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FieldError(field, "holds half a surrogate pair, which is not text") from None
    return value


def _check_step_label(label: Any, field: str) -> None:
    """Check a step's label: a word of STEP_LABELS, a share, or null."""
    if label is None or label in STEP_LABELS:
        return
    is_number = isinstance(label, int | float) and not isinstance(label, bool)
    if not is_number or not 0 <= label <= 1:
        words = ", ".join(STEP_LABELS)
        raise FieldError(field, f"must be {words}, 0 to 1, or null, not {label!r}")


def _prompt(value: Any, field: str) -> list[Message]:
    """Read a prompt as messages that end with the user's; a string is one user's turn."""
    if not isinstance(value, list):
        return [_turn("user", _string(value, field))]
    messages = _messages(value, field)
    if messages[-1]["role"] != "user":
        raise FieldError(field, "the last turn must be the user's")
    return messages


def _messages(value: Any, field: str) -> list[Message]:
    """Check a list of messages; keys of a message beside role and content are left out."""
    if not isinstance(value, list) or not value:
        raise FieldError(field, "must be a list of one or more messages")
    for i, message in enumerate(value):
        place = f"{field}[{i}]"
        if not isinstance(message, dict):
            raise FieldError(place, "must be an object with role and content")
        role = message.get("role")
        if role not in ROLES or (role == "system" and i > 0):
            raise FieldError(f"{place}.role", "must be user or assistant; the first may be system")
        _string(message.get("content"), f"{place}.content")
    return [_turn(message["role"], message["content"]) for message in value]
