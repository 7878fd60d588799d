"""Record schemas: rows in the layouts people publish, adapted by content to one form a schema.

text        {"text": str}
chat        {"messages": [{"role", "content"}, ...]}, ending with an assistant's turn
comparison  {"prompt": messages, "responses": [str, ...], "ranking": [1 = best, ...; equal = tie]}
            and where the row has them "margin": float >= 0, "criterion": str
unpaired    {"prompt": messages, "response": str, "desirable": bool}
prompt      {"prompt": messages[, "answer": str]} or, to be continued as raw text, {"text": str}
steps       {"prompt": messages, "steps": [str, ...],
            "labels": [one of STEP_LABELS, a share from 0 to 1, or None, ...]}

Messages that are a prompt end with the user's turn; an assistant's turn with "weight": 0 is not
trained on. Every string holds something beside space.

Each function `<schema>_record` takes a row as JSON gives it, and raises FieldError for one that
does not fit. LAYOUTS says which layouts each schema takes. A field that is null counts as absent.
A field that nothing reads is left out, and refused where it would change what is trained on
(data/fields.py).
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from data.fields import (
    JUDGEMENTS,
    LARGEST,
    FieldError,
    Row,
    an_object,
    answer_text,
    get,
    is_empty,
    is_number,
    missing,
    refuse_unread,
    shown,
    text_of,
    whole_number,
)
from data.messages import (
    MESSAGE_KEYS,
    Message,
    continued,
    conversation_of,
    is_trained,
    last_and_before,
    messages_of,
    prompt_of,
    tools_text,
    turn,
)

Record = dict[str, Any]
"""A row adapted to one schema; its keys are those of the table above."""
Schema = Literal["text", "chat", "comparison", "unpaired", "prompt", "steps"]
STEP_LABELS = ("positive", "neutral", "negative")


class Layout(NamedTuple):
    """One way to write a row: it is known by its fields, all of which must be there."""

    fields: tuple[str, ...]
    """By which the layout is known."""
    read: Callable[..., Record]
    """read(row, *fields): the row as a record."""
    more: tuple[str, ...] = ()
    """Fields that are read too, where they are there."""


CONVERSATIONS = "messages conversations conversation"
"""Names of a whole conversation."""
OTHER_REQUESTS = "question problem query instruction inputs"
REQUESTS = f"prompt {OTHER_REQUESTS}"
"""Names of what is asked."""
ANSWERS = (
    "answer ground_truth expected_answer final_answer reward_model solution response completion "
    "output target targets label"
)
"""Names of the answer to check, beside a prompt; the first that says something is taken."""
INPUTS = "input context"
"""Names of the input of an instruction, which goes below it."""
SYSTEM = ("system", "system_prompt")
OPENING = (*SYSTEM, "tools", "history")
"""Fields that stand before the first turn of a conversation, whatever its layout."""


# ---- Conversations ----


def opened(row: Row, messages: list[Message]) -> list[Message]:
    """Put before `messages` what the row has in OPENING: one system's turn, and earlier turns."""
    # The system's text, which the messages may have themselves.
    said = _texts(row, SYSTEM)
    if messages[0]["role"] == "system":
        first, *messages = messages
        said.append(first["content"])
    if len(set(said)) > 1:
        raise FieldError("system", "says another thing than the system's turn; keep one of them")
    tools = "" if is_empty(row.get("tools")) else tools_text(row["tools"], "tools")
    texts = [text for text in (*said[:1], tools) if text]
    system = [turn("system", "\n\n".join(texts))] if texts else []
    return [*system, *_history(row), *messages]


def _history(row: Row) -> list[Message]:
    """Read the earlier turns of a row, [[what was asked, what was answered], ...]."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list):
        raise FieldError("history", "must be a list of pairs, [asked, answered]")
    turns = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise FieldError(f"history[{i}]", "must be a pair, [asked, answered]")
        turns.append(turn("user", text_of(pair[0], f"history[{i}][0]")))
        turns.append(turn("assistant", text_of(pair[1], f"history[{i}][1]")))
    return turns


def _texts(row: Row, names: Iterable[str], place: str = "") -> list[str]:
    """Return the texts of those fields of `names` that say something."""
    texts = []
    for name in names:
        if not is_empty(row.get(name)):
            texts.append(text_of(row[name], place + name))
    return texts


def _request(row: Row, asked: str) -> list[Message]:
    """Read what is asked: the prompt in field `asked`; an instruction with its input below it."""
    if asked != "instruction":
        return prompt_of(row[asked], asked)
    texts = [text_of(row[asked], asked), *_texts(row, INPUTS.split())]
    return [turn("user", "\n\n".join(texts))]


def _chat(turns: list[Message], field: str) -> Record:
    """Return a conversation as a record, without what follows the last turn trained on."""
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise FieldError(field, "must end with an assistant's turn, after another's")
    if turns[0]["role"] == "assistant" and len(turns) < 3:
        raise FieldError(field, "nobody asks anything; begin with the user's turn")
    while turns and not is_trained(turns[-1]):
        turns = turns[:-1]
    if len(turns) < 2:
        raise FieldError(field, "no assistant's turn is trained on; remove the row")
    return {"messages": turns}


def read_conversation(row: Row, field: str) -> Record:
    """Read a whole conversation."""
    turns = messages_of(row[field], field)
    if turns[-1]["role"] != "assistant":
        raise FieldError(field, "the last turn must be the assistant's")
    return _chat(opened(row, turns), field)


def read_best(row: Row, *fields: str) -> Record:
    """Read a comparison as the conversation that ends with its best response."""
    compared = comparison_record(row)
    best = compared["ranking"].index(1)
    response = compared["responses"][best]
    return {"messages": [*compared["prompt"], turn("assistant", response)]}


def read_instances(row: Row, instruction: str, instances: str) -> Record:
    """Read Self-Instruct's row: an instruction, and one instance with input and output."""
    found = row[instances]
    if not isinstance(found, list) or not found or not isinstance(found[0], dict):
        raise FieldError("instances", "must be a list of objects with input and output")
    if len(found) > 1:
        raise FieldError("instances", "must be one; write each of them in a row of its own")
    place = "instances[0]."
    texts = [text_of(row[instruction], instruction), *_texts(found[0], ["input"], place)]
    output = get(found[0], "output", place)
    response = text_of(output, f"{place}output")
    turns = [turn("user", "\n\n".join(texts)), turn("assistant", response)]
    return _chat(opened(row, turns), "instances")


def read_answered(row: Row, asked: str, answered: str) -> Record:
    """Read a request and its answer, which may be a number where it is called so."""
    said = row[answered]
    if answered == "answer" and is_number(said):
        said = answer_text(said, answered)
    turns = continued(_request(row, asked), said, answered)
    return _chat(opened(row, turns), answered)


# ---- Texts ----


def read_text(row: Row, field: str) -> Record:
    """Read a document."""
    return {"text": text_of(row[field], field)}


# ---- Comparisons ----


def read_pair(row: Row, asked: str, chosen: str, rejected: str) -> Record:
    """Read a pair of responses to a request; each may be a text, turns or a whole conversation."""
    request = _request(row, asked)
    better = opened(row, continued(request, row[chosen], chosen))
    worse = opened(row, continued(request, row[rejected], rejected))
    return _pair(better, worse)


def read_pair_after_messages(row: Row, asked: str, chosen: str, rejected: str) -> Record:
    """Read a pair of responses to a conversation; one that is answered already says nothing."""
    turns = messages_of(row[asked], asked)
    if turns[-1]["role"] == "assistant":
        return read_whole_pair(row, chosen, rejected)
    better = opened(row, continued(turns, row[chosen], chosen))
    worse = opened(row, continued(turns, row[rejected], rejected))
    return _pair(better, worse)


def read_whole_pair(row: Row, chosen: str, rejected: str) -> Record:
    """Read two whole conversations, as messages or HH's transcripts."""
    better = opened(row, conversation_of(row[chosen], chosen))
    worse = opened(row, conversation_of(row[rejected], rejected))
    return _pair(better, worse)


def _pair(better: list[Message], worse: list[Message]) -> Record:
    """Return two conversations that differ in the last turn only as a comparison."""
    prompt, chosen = last_and_before(better, "chosen")
    other_prompt, rejected = last_and_before(worse, "rejected")
    if prompt != other_prompt:
        raise FieldError(
            "rejected", "must be the conversation of chosen up to the last turn; remove the row"
        )
    _refuse_unasked(prompt, "chosen")
    rank = 1 if chosen == rejected else 2
    return {"prompt": prompt, "responses": [chosen, rejected], "ranking": [1, rank]}


def _refuse_unasked(prompt: list[Message], field: str) -> None:
    """Raise FieldError for a prompt that does not end with the user's turn."""
    if not prompt or prompt[-1]["role"] != "user":
        raise FieldError(field, "must answer a user's turn")


def read_ranked(row: Row, asked: str, responses: str, ranking: str) -> Record:
    """Read two or more responses to a request, and their ranks."""
    prompt = opened(row, _request(row, asked))
    given = row[responses]
    ranks = row[ranking]
    if not isinstance(given, list) or len(given) < 2:
        raise FieldError("responses", "must be a list of two or more strings")
    for i, response in enumerate(given):
        text_of(response, f"responses[{i}]")

    # As many whole numbers, true and false not among them; the best is 1.
    count = len(given)
    whole = isinstance(ranks, list) and all(type(rank) is int for rank in ranks)
    if not whole or len(ranks) != count or min(ranks) != 1 or max(ranks) > LARGEST:
        raise FieldError("ranking", f"must be {count} whole numbers, 1 the best, equal for a tie")
    return {"prompt": prompt, "responses": given, "ranking": ranks}


def _margin(value: Any) -> float:
    """Check a margin: a finite number, not negative, that float32 holds."""
    if not is_number(value) or not 0 <= value <= LARGEST:
        raise FieldError("margin", f"must be a number from 0 to {LARGEST}, not {shown(value)}")
    return float(value)


# ---- Judged responses ----


def read_judged(row: Row, asked: str, answered: str, label: str) -> Record:
    """Read one response to a request, and whether it is desirable."""
    turns = continued(_request(row, asked), row[answered], answered)
    return _judged(row, turns, answered, label)


def read_judged_conversation(row: Row, field: str, label: str) -> Record:
    """Read a whole conversation, and whether its last turn is desirable."""
    return _judged(row, conversation_of(row[field], field), field, label)


def _judged(row: Row, turns: list[Message], field: str, label: str) -> Record:
    if not isinstance(row[label], bool):
        raise FieldError(label, f"must be true or false, not {shown(row[label])}")
    prompt, response = last_and_before(opened(row, turns), field)
    _refuse_unasked(prompt, field)
    return {"prompt": prompt, "response": response, "desirable": row[label]}


# ---- Prompts ----


def read_prompt(row: Row, asked: str) -> Record:
    """Read a prompt, with the answer to check where the row has one."""
    prompt = opened(row, _request(row, asked))
    # A response that was judged bad is no answer.
    if any(row.get(name) is False for name in JUDGEMENTS):
        return {"prompt": prompt}
    for name in ANSWERS.split():
        field, value = _answer(row, name)
        if isinstance(value, list | dict) and value:
            # A response in turns: what its last one says.
            _, value = last_and_before(continued(prompt, value, field), field)
        if not is_empty(value) and str(value).strip():
            return {"prompt": prompt, "answer": answer_text(value, field)}
    return {"prompt": prompt}


def _answer(row: Row, name: str) -> tuple[str, Any]:
    """Return where the answer called `name` stands in a row, and what stands there."""
    value = row.get(name)
    if name == "reward_model":
        truth = value.get("ground_truth") if isinstance(value, dict) else None
        return "reward_model.ground_truth", truth
    # A judgement is no answer.
    return name, None if name in JUDGEMENTS and isinstance(value, bool) else value


def read_prompt_of_conversation(row: Row, field: str) -> Record:
    """Read a conversation as its prompt: the last turn, where the assistant's, is the answer."""
    turns = messages_of(row[field], field)
    if turns[-1]["role"] == "user":
        return {"prompt": opened(row, turns)}
    return _asked_and_answer(read_conversation(row, field), field)


def read_prompt_of_chat(row: Row, *fields: str) -> Record:
    """Read another layout of a conversation as its prompt; the last turn is the answer."""
    return _asked_and_answer(chat_record(row), fields[0])


def _asked_and_answer(chat: Record, field: str) -> Record:
    *asked, answer = chat["messages"]
    _refuse_unasked(asked, field)
    return {"prompt": asked, "answer": answer["content"]}


# ---- Solutions in steps ----


def read_steps(row: Row, asked: str, steps: str, labels: str) -> Record:
    """Read a solution in steps, and a label for each of them."""
    given = row[steps]
    judged = row[labels]
    if not isinstance(given, list) or not given:
        raise FieldError(steps, "must be a list of one or more strings")
    if not isinstance(judged, list) or len(judged) != len(given):
        raise FieldError(labels, f"must be a list of {len(given)} labels, as many as {steps}")
    for i, label in enumerate(judged):
        _check_step_label(label, f"{labels}[{i}]")
    for i, step in enumerate(given):
        if "\n" in text_of(step, f"{steps}[{i}]"):
            raise FieldError(f"{steps}[{i}]", "must be one line; join its lines")
    prompt = opened(row, _request(row, asked))
    return {"prompt": prompt, "steps": given, "labels": judged}


def read_stepwise(row: Row, asked: str, steps: str, labels: str) -> Record:
    """Read TRL's stepwise supervision: steps, and whether each is right; lines are joined."""
    told = row[labels]
    if isinstance(told, list):
        words = {True: "positive", False: "negative"}
        told = [words[label] if isinstance(label, bool) else label for label in told]
    joined = row[steps]
    if isinstance(joined, list):
        joined = [_one_line(step, f"{steps}[{i}]") for i, step in enumerate(joined)]
    return read_steps({**row, steps: joined, labels: told}, asked, steps, labels)


def _one_line(value: Any, field: str) -> str:
    return " ".join(text_of(value, field).split())


def _check_step_label(label: Any, field: str) -> None:
    """Check a step's label: a word of STEP_LABELS, a share, or null."""
    if label is None or label in STEP_LABELS:
        return
    if not is_number(label) or not 0 <= label <= 1:
        words = ", ".join(STEP_LABELS)
        raise FieldError(field, f"must be {words}, 0 to 1, or null, not {shown(label)}")


def read_math_shepherd(row: Row, solution: str, marked: str) -> Record:
    """Read Math-Shepherd's row: `label` is the solution with + or - at the end of each step."""
    said = text_of(row[marked], marked)
    first = re.search(r"\bStep 1:", said)
    if first is None or not said[: first.start()].strip():
        raise FieldError(marked, "must be a problem and its steps, from 'Step 1:' on")
    steps = []
    labels = []
    for line in said[first.start() :].strip().split("\n"):
        step = re.fullmatch(r"(.*\S)\s*([+-])\s*", line)
        if step is None:
            raise FieldError(marked, f"each step must end with + or -, not {shown(line)}")
        steps.append(step[1])
        labels.append("positive" if step[2] == "+" else "negative")
    prompt = [turn("user", said[: first.start()].strip())]
    return {"prompt": opened(row, prompt), "steps": steps, "labels": labels}


def read_prm800k(row: Row, question: str, label: str) -> Record:
    """Read a labelled PRM800K solution (Lightman et al. 2023): the trajectory, no alternatives.

    A step's text is the chosen completion's, else the human's, else (the labelling ended here)
    the first one's. What a human wrote counts as positive. A step of several lines becomes one
    line. Problems given up may have no step; batches drop them.
    """
    problem = get(an_object(row, question), "problem", "question.")
    prompt = prompt_of(problem, "question.problem")
    steps = []
    labels = []
    for text, judged in _prm800k_steps(an_object(row, label)):
        steps.append(text)
        labels.append(judged)
    return {"prompt": prompt, "steps": steps, "labels": labels}


def _prm800k_steps(solution: Row) -> Iterator[tuple[str, str | None]]:
    """Yield the text and the label of each step of the trajectory."""
    stages = get(solution, "steps", "label.")
    if not isinstance(stages, list | None):
        raise FieldError("label.steps", "must be a list")
    for i, stage in enumerate(stages or []):
        place = f"label.steps[{i}]"
        completion = _prm800k_completion(stage, place)
        if completion is None:
            return
        label = _prm800k_label(completion.get("rating"), place)
        yield _one_line(completion.get("text"), place), label


def _prm800k_label(rating: Any, place: str) -> str | None:
    """Return the label of a rating: 1 is positive, 0 neutral, -1 negative, null none."""
    if rating is None:
        return None
    number = whole_number(rating)
    if number not in (-1, 0, 1):
        raise FieldError(place, f"rating must be -1, 0, 1 or null, not {shown(rating)}")
    return STEP_LABELS[1 - number]


def _prm800k_completion(stage: Any, place: str) -> Row | None:
    """Return the completion that was taken at a stage; None where the solution ends before it."""
    if not isinstance(stage, dict) or not isinstance(stage.get("completions"), list):
        raise FieldError(place, "must be an object with completions")
    chosen = stage.get("chosen_completion")
    human = stage.get("human_completion")
    completions = stage["completions"]
    if chosen is None and human is not None:
        written = {"text": human} if isinstance(human, str) else human
        if not isinstance(written, dict):
            raise FieldError(f"{place}.human_completion", "must be an object with text")
        given = {name: value for name, value in written.items() if value is not None}
        return {"rating": 1, **given}
    if not completions:
        return None

    # None is chosen where the labelling ended.
    number = 0 if chosen is None else whole_number(chosen)
    if isinstance(chosen, bool) or number is None or not 0 <= number < len(completions):
        raise FieldError(
            f"{place}.chosen_completion", f"must be one of {len(completions)} completions"
        )
    completion = completions[number]
    if not isinstance(completion, dict):
        raise FieldError(f"{place}.completions[{number}]", "must be an object with text")
    return completion


# ---- Layouts: of several that fit a row, the first one reads it ----


def _each(read: Callable[..., Record], *names: str, more: str = "") -> list[Layout]:
    """Return a layout for each choice of one of the names that each field goes by.

    Names are parted by spaces; so are those in `more`.
    """
    choices = itertools.product(*(name.split() for name in names))
    return [Layout(fields, read, tuple(more.split())) for fields in choices]


ASKED = f"{REQUESTS} {INPUTS}"
JUDGED = " ".join(JUDGEMENTS)
LAYOUTS: dict[Schema, list[Layout]] = {
    "text": _each(read_text, "text"),
    "chat": [
        *_each(read_conversation, CONVERSATIONS),
        # The best response of a comparison.
        *_each(read_best, "chosen", "rejected", more=f"{CONVERSATIONS} {ASKED}"),
        *_each(read_best, "responses", "ranking", more=ASKED),
        # Self-Instruct; Alpaca and Dolly; what answers a prompt or a question elsewhere.
        *_each(read_instances, "instruction", "instances"),
        *_each(read_answered, "instruction", "output response completion", more=INPUTS),
        *_each(read_answered, "prompt query", "response completion"),
        *_each(read_answered, "question", "answer response"),
        *_each(read_answered, "problem", "solution"),
        *_each(read_answered, "inputs", "targets"),
    ],
    "comparison": [
        *_each(read_ranked, REQUESTS, "responses", "ranking", more=INPUTS),
        *_each(read_pair, REQUESTS, "chosen", "rejected", more=INPUTS),
        *_each(read_pair_after_messages, CONVERSATIONS, "chosen", "rejected"),
        *_each(read_whole_pair, "chosen", "rejected"),
    ],
    "unpaired": [
        *_each(read_judged, REQUESTS, "response completion", JUDGED, more=INPUTS),
        *_each(read_judged_conversation, CONVERSATIONS, JUDGED),
    ],
    "prompt": [
        *_each(read_prompt, "prompt", more=f"{ANSWERS} {JUDGED}"),
        # A conversation, whose last turn is the answer.
        *_each(read_prompt_of_conversation, CONVERSATIONS),
        *_each(read_prompt_of_chat, "chosen", "rejected", more=ASKED),
        *_each(read_prompt_of_chat, "instruction", "instances"),
        *_each(read_prompt, OTHER_REQUESTS, more=f"{ANSWERS} {INPUTS} {JUDGED}"),
        *_each(read_text, "text"),
    ],
    "steps": [
        *_each(read_prm800k, "question", "label"),
        *_each(read_steps, REQUESTS, "steps", "labels"),
        # TRL's stepwise supervision, and Math-Shepherd.
        *_each(read_stepwise, REQUESTS, "completions", "labels"),
        *_each(read_math_shepherd, "input", "label"),
    ],
}
"""The layouts of each schema; a text may also be a conversation of any layout of chat."""
WANTED: dict[Schema, tuple[str, str]] = {
    "text": ("text", "text, or the fields of a conversation"),
    "chat": ("messages", "messages, prompt and response, or instruction and output"),
    "comparison": ("chosen", "prompt, chosen and rejected, or prompt, responses and ranking"),
    "unpaired": ("response", "prompt, response and desirable"),
    "prompt": ("prompt", "prompt, text, or the fields of a conversation"),
    "steps": ("steps", "prompt, steps and labels"),
}
"""Field to name as missing, and fields to ask for, in a row that is near no layout."""


def layout_of(row: Row, schema: Schema) -> Layout:
    """Return the first layout of `schema` that fits a row; FieldError names what is missing."""
    layouts = LAYOUTS[schema]
    for layout in layouts:
        if row.keys() >= set(layout.fields):
            return layout
    # The one of which most is there, the first of equals; more than half of it.
    nearest = max(layouts, key=lambda layout: len(row.keys() & set(layout.fields)))
    absent = [name for name in nearest.fields if name not in row]
    if 2 * len(absent) >= len(nearest.fields):
        raise missing(row, *WANTED[schema])
    raise missing(row, absent[0], ", ".join(nearest.fields))


def fields_read(layout: Layout) -> frozenset[str]:
    """Return the names of all fields that a layout reads where they are there."""
    return frozenset((*layout.fields, *layout.more, *OPENING, "margin", "criterion"))


def without_nulls(row: Row) -> Row:
    """Return a row without the columns that are null in it, as writers of tables fill them."""
    return {name: value for name, value in row.items() if value is not None}


def _adapted(row: Row, schema: Schema) -> Record:
    """Adapt a row by the layout of `schema` that fits it."""
    layout = layout_of(row, schema)
    refuse_unread(row, fields_read(layout), switches_only=layout.read is read_text)
    return layout.read(row, *layout.fields)


# ---- Schemas ----


def text_record(row: Row) -> Record:
    """Adapt a document; a conversation becomes its turns, one below the other."""
    row = without_nulls(row)
    if "text" in row:
        return _adapted(row, "text")
    messages = _adapted(row, "chat")["messages"]
    for i, message in enumerate(messages):
        if "weight" in message:
            raise FieldError(
                f"messages[{i}]", "is not trained on, but a text is, all of it; remove the row"
            )
    return {"text": "\n".join(message["content"] for message in messages)}


def chat_record(row: Row) -> Record:
    """Adapt a conversation whose last turn is the assistant's.

    A comparison serves too: its best response is the last turn.
    """
    return _adapted(without_nulls(row), "chat")


def comparison_record(row: Row) -> Record:
    """Adapt a prompt and two or more responses with their ranks, 1 the best, equal for a tie.

    Equal texts of a pair are a tie.
    """
    row = without_nulls(row)
    record = _adapted(row, "comparison")
    if "margin" in row:
        record["margin"] = _margin(row["margin"])
    if "criterion" in row:
        record["criterion"] = text_of(row["criterion"], "criterion")
    return record


def unpaired_record(row: Row) -> Record:
    """Adapt one response to a prompt, judged desirable or not."""
    return _adapted(without_nulls(row), "unpaired")


def prompt_record(row: Row) -> Record:
    """Adapt a prompt, with its answer where the row has one, or raw text to be continued.

    A conversation serves too: without its last turn, which is kept as the answer.
    """
    return _adapted(without_nulls(row), "prompt")


def steps_record(row: Row) -> Record:
    """Adapt a solution in steps of one line each, and a label for each step.

    A label is one of STEP_LABELS, a number (the share of completions from here that come right),
    or None where the step is not judged.
    """
    return _adapted(without_nulls(row), "steps")


SCHEMAS: dict[Schema, Callable[[Row], Record]] = {
    "text": text_record,
    "chat": chat_record,
    "comparison": comparison_record,
    "unpaired": unpaired_record,
    "prompt": prompt_record,
    "steps": steps_record,
}
"""Each schema's adapter; adapting a record again changes nothing."""


def unread_fields(row: Row, schema: Schema) -> frozenset[str]:
    """Return the names of the fields of a row of `schema` that nothing reads, also in messages."""
    row = without_nulls(row)
    if schema == "text" and "text" not in row:
        schema = "chat"
    read = fields_read(layout_of(row, schema))
    unread = row.keys() - read
    for name in row.keys() & read:
        for message in _messages_in(row[name]):
            unread |= {f"{name}[].{key}" for key in message.keys() - MESSAGE_KEYS}
    return frozenset(unread)


def _messages_in(value: Any) -> list[Row]:
    """Return the messages in a field's value, none where it is no list."""
    if not isinstance(value, list):
        return []
    return [item for item in value if isinstance(item, dict) and item.keys() & {"role", "from"}]
