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

import functools
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
    leave_out,
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
from data.trees import best_path, ranked_replies, ranks_of

Record = dict[str, Any]
"""A row adapted to one schema; its keys are those of the table above."""
Schema = Literal["text", "chat", "comparison", "unpaired", "prompt", "steps"]
STEP_LABELS = ("positive", "neutral", "negative")
MOST_KINDS_OF_ROWS = 1024
"""Sets of fields whose layouts are kept in mind."""


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
RESPONSES = (
    "chosen rejected response_0 response_1 response_a response_b human_ref_A human_ref_B "
    "inputs_pretokenized targets_pretokenized"
)
"""Names of texts in comparisons and demonstrations that no other schema has."""
INPUTS = "input context"
"""Names of the input of an instruction, which goes below it."""
PAIRS = (
    ("response_0", "response_1", "better_response_id"),
    ("response_0", "response_1", "safer_response_id"),
    ("response_a", "response_b", "winner"),
)
"""Names of two responses to a request, and of the better one. PKU's rows say too which is safer:
that is read where nothing says which is better."""
BATTLE = ("conversation_a", "conversation_b", "winner")
SHP = ("history", "human_ref_A", "human_ref_B", "labels")
SUMMARIES = ("info", "summaries", "choice")
TREE = ("message_tree_id", "prompt")
WINNERS: dict[str, int | None] = {
    "model_a": 0,
    "model_b": 1,
    "a": 0,
    "b": 1,
    "tie": None,
    "tie (bothbad)": None,
}
"""Names of the better of two in an arena."""
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
        raise FieldError("system", "differs from the system's turn; keep one of them")

    # The tools go below it, in the same turn.
    texts = said[:1]
    if not is_empty(row.get("tools")):
        texts.append(tools_text(row["tools"], "tools"))
    texts = [text for text in texts if text]
    system = []
    if texts:
        system.append(turn("system", "\n\n".join(texts)))
    return [*system, *_history(row), *messages]


def _history(row: Row) -> list[Message]:
    """Read the earlier turns of a row: [[what was asked, what was answered], ...], or messages."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list):
        raise FieldError("history", "must be a list of pairs, [asked, answered]")
    # Its first item tells which of the two it is.
    if pairs and isinstance(pairs[0], dict):
        return messages_of(pairs, "history")
    turns = []
    for i, pair in enumerate(pairs):
        place = f"history[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise FieldError(place, "must be a pair, [asked, answered]")
        asked = text_of(pair[0], f"{place}[0]")
        answered = text_of(pair[1], f"{place}[1]")
        turns.append(turn("user", asked))
        turns.append(turn("assistant", answered))
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
    # An assistant may greet first, but somebody must ask.
    if turns[0]["role"] == "assistant" and len(turns) < 3:
        raise FieldError(field, "nobody asks anything; begin with the user's turn")
    # Turns that are not trained on serve only those behind them.
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
    instance = found[0]
    place = "instances[0]."

    # The instruction, its input below it where there is one, and the output.
    texts = [text_of(row[instruction], instruction)]
    texts += _texts(instance, ["input"], place)
    output = get(instance, "output", place)
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
    # Such a conversation repeats one of the two, which are whole conversations then.
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
    return _two(prompt, chosen, rejected, 0)


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


def read_scored(row: Row, asked: str, completions: str) -> Record:
    """Read UltraFeedback's own row: responses with scores; the highest is the best."""
    prompt = opened(row, _request(row, asked))
    given = row[completions]
    if not isinstance(given, list) or len(given) < 2:
        raise FieldError(completions, "must be a list of two or more objects with a response")
    responses = []
    scores: list[float] = []
    for i, completion in enumerate(given):
        place = f"{completions}[{i}]"
        if not isinstance(completion, dict):
            raise FieldError(place, "must be an object with response and overall_score")
        responses.append(text_of(completion.get("response"), f"{place}.response"))
        # Where the overall score is missing, the mean of its four aspects serves.
        score: Any = completion.get("overall_score", completion.get("fine-grained_score"))
        if not is_number(score):
            raise FieldError(f"{place}.overall_score", f"must be a number, not {shown(score)}")
        scores.append(score)
    return {"prompt": prompt, "responses": responses, "ranking": ranks_of(scores)}


def read_battle(row: Row, first: str, second: str, winner: str) -> Record:
    """Read two whole conversations of an arena, and which of them won."""
    first_turns = conversation_of(row[first], first)
    second_turns = conversation_of(row[second], second)
    prompt, one = last_and_before(opened(row, first_turns), first)
    other_prompt, other = last_and_before(opened(row, second_turns), second)
    if prompt != other_prompt:
        raise FieldError(
            second, f"must be the conversation of {first} up to the last turn; remove the row"
        )
    _refuse_unasked(prompt, first)
    return _two(prompt, one, other, _winner(row, winner))


def read_two(row: Row, asked: str, first: str, second: str, better: str) -> Record:
    """Read two responses to a request, and which of them is better: by number, or by name."""
    # SHP calls a request `history`, which elsewhere holds earlier turns.
    earlier = {name: value for name, value in row.items() if name != asked}
    request = prompt_of(row[asked], asked) if asked == "history" else _request(row, asked)
    one = text_of(row[first], first)
    other = text_of(row[second], second)
    prompt = opened(earlier, request)
    return _two(prompt, one, other, _winner(row, better))


def read_summaries(row: Row, info: str, summaries: str, choice: str) -> Record:
    """Read two summaries of a post or an article, and which was chosen (Stiennon et al. 2020).

    A post is asked about in the words of the authors' code, an article by TL;DR alone.
    """
    about = an_object(row, info)
    said = row[summaries]
    if not (isinstance(said, list) and len(said) == 2):
        raise FieldError(summaries, f"must be a list of two, not {shown(said)}")
    texts = []
    for number, summary in enumerate(said):
        place = f"{summaries}[{number}]"
        if not isinstance(summary, dict) or "text" not in summary:
            raise FieldError(place, f"must be an object with a text, not {shown(summary)}")
        texts.append(text_of(summary["text"], f"{place}.text"))

    # What is summarised; columns of the other kind are null.
    if about.get("post") is not None:
        fields = ("subreddit", "title", "post")
        subreddit, title, post = (text_of(about.get(name), f"{info}.{name}") for name in fields)
        asked = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    else:
        asked = text_of(about.get("article"), f"{info}.article") + "\n\nTL;DR:"
    first, second = texts
    return _two([{"role": "user", "content": asked}], first, second, _winner(row, choice))


def _winner(row: Row, field: str) -> int | None:
    """Return the number of the better of two, 0 or 1; None for a tie."""
    said = row[field]
    if isinstance(said, str) and said.lower() in WINNERS:
        return WINNERS[said.lower()]
    number = whole_number(said)
    if number is None or number not in (0, 1):
        words = ", ".join(WINNERS)
        raise FieldError(field, f"must be 0, 1, or one of {words}, not {shown(said)}")
    # In SHP 1 says that the first is better.
    return 1 - number if field == "labels" else number


def _two(prompt: list[Message], first: str, second: str, better: int | None) -> Record:
    """Return two responses as a comparison.

    `better`: the number of the better one, 0 or 1; None for a tie. Equal texts tie, whatever it
    says.
    """
    ranking = [1, 1]
    if better is not None and first != second:
        ranking[1 - better] = 2
    return {"prompt": prompt, "responses": [first, second], "ranking": ranking}


def read_tree(row: Row, name: str, root: str) -> Record:
    """Read a tree of OASST as the conversation of its best replies."""
    turns = best_path(an_object(row, root), root)
    return _chat(opened(row, turns), root)


def read_tree_replies(row: Row, name: str, root: str) -> Record:
    """Read a tree of OASST as its first message and the ranked replies to that."""
    prompt, responses, ranking = ranked_replies(an_object(row, root), root)
    return {"prompt": opened(row, prompt), "responses": responses, "ranking": ranking}


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
    turns = conversation_of(row[field], field)
    return _judged(row, turns, field, label)


def _judged(row: Row, turns: list[Message], field: str, label: str) -> Record:
    """Return `turns`, of `field`, as a prompt and a response that field `label` judges."""
    desirable = row[label]
    if not isinstance(desirable, bool):
        raise FieldError(label, f"must be true or false, not {shown(desirable)}")
    prompt, response = last_and_before(opened(row, turns), field)
    _refuse_unasked(prompt, field)
    return {"prompt": prompt, "response": response, "desirable": desirable}


# ---- Prompts ----


def read_prompt(row: Row, asked: str) -> Record:
    """Read a prompt, with the answer to check where the row has one."""
    prompt = opened(row, _request(row, asked))
    # A response that was judged bad is no answer.
    if any(row.get(name) is False for name in JUDGEMENTS):
        return {"prompt": prompt}

    # The first field that says something.
    for name in ANSWERS.split():
        field, value = _answer(row, name)
        if isinstance(value, list | dict) and value:
            # A response in turns: what its last one says.
            turns = continued(prompt, value, field)
            _, value = last_and_before(turns, field)
        if not is_empty(value) and str(value).strip():
            return {"prompt": prompt, "answer": answer_text(value, field)}
    return {"prompt": prompt}


def _answer(row: Row, name: str) -> tuple[str, Any]:
    """Return where the answer called `name` stands in a row, and what stands there."""
    value = row.get(name)
    if name == "reward_model":
        truth = value.get("ground_truth") if isinstance(value, dict) else None
        return "reward_model.ground_truth", truth
    # `label` may be an answer; true and false are judgements.
    if name in JUDGEMENTS and isinstance(value, bool):
        value = None
    return name, value


def read_prompt_of_conversation(row: Row, field: str) -> Record:
    """Read a conversation as its prompt: the last turn, where the assistant's, is the answer.

    A `ground_truth` beside the conversation, as in RLVR's sets, is the answer in its place.
    """
    turns = messages_of(row[field], field)
    if turns[-1]["role"] == "user":
        record: Record = {"prompt": opened(row, turns)}
    else:
        record = _asked_and_answer(read_conversation(row, field), field)
    truth = row.get("ground_truth")
    if not is_empty(truth):
        record["answer"] = answer_text(truth, "ground_truth")
    return record


def read_prompt_of_chat(row: Row, *fields: str) -> Record:
    """Read another layout of a conversation as its prompt; the last turn is the answer."""
    return _asked_and_answer(chat_record(row), fields[0])


def _asked_and_answer(chat: Record, field: str) -> Record:
    """Return a conversation, of `field`, as a prompt and the answer that its last turn is."""
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
    # True and false become words. What is no list is left to `read_steps` to refuse.
    told = row[labels]
    if isinstance(told, list):
        words = {True: "positive", False: "negative"}
        told = [words[label] if isinstance(label, bool) else label for label in told]
    joined = row[steps]
    if isinstance(joined, list):
        joined = [_one_line(step, f"{steps}[{i}]") for i, step in enumerate(joined)]
    adapted = {**row, steps: joined, labels: told}
    return read_steps(adapted, asked, steps, labels)


def _one_line(value: Any, field: str) -> str:
    """Return the text of `field` with all space in it single."""
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
    # The problem, up to the first step.
    said = text_of(row[marked], marked)
    first = re.search(r"\bStep 1:", said)
    problem = "" if first is None else said[: first.start()].strip()
    if first is None or not problem:
        raise FieldError(marked, "must be a problem and its steps, from 'Step 1:' on")

    # A step a line, its mark at the end.
    solved = said[first.start() :].strip()
    steps = []
    labels = []
    for line in solved.split("\n"):
        found = re.fullmatch(r"(.*\S)\s*([+-])\s*", line)
        if found is None:
            raise FieldError(marked, f"each step must end with + or -, not {shown(line)}")
        step, mark = found.groups()
        steps.append(step)
        labels.append("positive" if mark == "+" else "negative")
    prompt = opened(row, [turn("user", problem)])
    return {"prompt": prompt, "steps": steps, "labels": labels}


def read_prm800k(row: Row, question: str, label: str) -> Record:
    """Read a labelled PRM800K solution (Lightman et al. 2023): the trajectory, no alternatives.

    A step's text is the chosen completion's, else the human's, else, where the labelling ended,
    the first completion's. What a human wrote counts as positive. A step of several lines becomes
    one line. Problems that were given up may have no step; batches drop them.
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

    # None was good enough: a human wrote one, as a text or as an object, and may have rated it.
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

    Names are parted by spaces; so are those in `more`. A request other than an instruction has no
    INPUTS: they are taken out of its `more`.
    """
    # Requests whose input is part of what they ask.
    whole_requests = set(REQUESTS.split()) - {"instruction"}
    choices = [name.split() for name in names]
    layouts = []
    for fields in itertools.product(*choices):
        read_too = more.split()
        if not whole_requests.isdisjoint(fields):
            read_too = [name for name in read_too if name not in INPUTS.split()]
        layouts.append(Layout(fields, read, tuple(read_too)))
    return layouts


def _pairs(read: Callable[..., Record], request: str) -> list[Layout]:
    """Return the layouts of two responses to a request with the names of PAIRS."""
    layouts = []
    for names in PAIRS:
        layouts += _each(read, request, *names, more=f"{INPUTS} safer_response_id")
    return layouts


ASKED = f"{REQUESTS} {INPUTS}"
JUDGED = " ".join(JUDGEMENTS)
LAYOUTS: dict[Schema, list[Layout]] = {
    "text": _each(read_text, "text"),
    "chat": [
        *_each(read_conversation, CONVERSATIONS),
        *_each(read_tree, *TREE),
        # The best response of a comparison.
        *_each(read_best, "chosen", "rejected", more=f"{CONVERSATIONS} {ASKED}"),
        *_each(read_best, "responses", "ranking", more=ASKED),
        *_each(read_best, "instruction prompt", "completions", more=INPUTS),
        *_each(read_best, *BATTLE),
        *_pairs(read_best, REQUESTS),
        *_each(read_best, *SHP),
        *_each(read_best, *SUMMARIES),
        # Self-Instruct; Alpaca and Dolly; what answers a prompt or a question elsewhere.
        *_each(read_instances, "instruction", "instances"),
        *_each(read_answered, "instruction", "output response completion", more=INPUTS),
        *_each(read_answered, "prompt query", "response completion"),
        *_each(read_answered, "question", "answer response"),
        *_each(read_answered, "problem", "solution"),
        *_each(read_answered, "inputs_pretokenized", "targets_pretokenized"),
        *_each(read_answered, "inputs", "targets"),
        *_each(read_answered, "input", "output response"),
    ],
    "comparison": [
        *_each(read_ranked, REQUESTS, "responses", "ranking", more=INPUTS),
        *_each(read_pair, REQUESTS, "chosen", "rejected", more=INPUTS),
        *_each(read_pair_after_messages, CONVERSATIONS, "chosen", "rejected"),
        *_each(read_pair, "input", "chosen", "rejected"),
        *_each(read_whole_pair, "chosen", "rejected"),
        # UltraFeedback as it was published, arenas, PKU, SHP, summaries, OASST.
        *_each(read_scored, "instruction prompt", "completions", more=INPUTS),
        *_each(read_battle, *BATTLE),
        *_pairs(read_two, REQUESTS),
        *_each(read_two, *SHP),
        *_each(read_summaries, *SUMMARIES),
        *_each(read_tree_replies, *TREE),
    ],
    "unpaired": [
        *_each(read_judged, REQUESTS, "response completion", JUDGED, more=INPUTS),
        *_each(read_judged_conversation, CONVERSATIONS, JUDGED),
    ],
    "prompt": [
        *_each(read_prompt_of_chat, *TREE),
        *_each(read_prompt, "prompt", more=f"{ANSWERS} {JUDGED}"),
        # A conversation, whose last turn is the answer.
        *_each(read_prompt_of_conversation, CONVERSATIONS, more="ground_truth"),
        *_each(read_prompt_of_chat, "chosen", "rejected", more=ASKED),
        *_each(read_prompt_of_chat, "instruction", "instances"),
        *_each(read_prompt_of_chat, *BATTLE),
        *_each(read_prompt_of_chat, *SHP),
        *_each(read_prompt_of_chat, *SUMMARIES),
        *_each(read_prompt_of_chat, "inputs_pretokenized", "targets_pretokenized"),
        *_each(read_prompt, OTHER_REQUESTS, more=f"{ANSWERS} {INPUTS} {JUDGED}"),
        *_each(read_prompt, "input", more=ANSWERS),
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
    fitting = fitting_layouts(schema, frozenset(row))
    if fitting:
        return fitting[0]

    # The layout that most fields of the row belong to; the first of equals.
    def known(layout: Layout) -> int:
        return len(row.keys() & set(layout.fields))

    nearest = max(LAYOUTS[schema], key=known)
    absent = [name for name in nearest.fields if name not in row]
    # With half of it missing the row may be meant as something else.
    if 2 * len(absent) >= len(nearest.fields):
        raise missing(row, *WANTED[schema])
    raise missing(row, absent[0], ", ".join(nearest.fields))


@functools.lru_cache(MOST_KINDS_OF_ROWS)
def fitting_layouts(schema: Schema, names: frozenset[str]) -> tuple[Layout, ...]:
    """Return the layout of `schema` that reads a row with these fields, and its rivals behind it.

    Rivals are read as the first one is, by other names: they may differ from it. Nothing is
    returned where no layout fits.
    """
    fitting = [layout for layout in LAYOUTS[schema] if names >= set(layout.fields)]
    if not fitting:
        return ()
    first, *others = fitting
    # What the first one reads beside its fields is no second choice: the input of an instruction.
    known = {*first.fields, *first.more}
    rivals = []
    for other in others:
        if other.read is first.read and not known >= set(other.fields):
            rivals.append(other)
    return (first, *rivals)


def _refuse_ambiguous(row: Row, schema: Schema, record: Record) -> None:
    """Raise FieldError for a row in which two fields say different things for one."""
    first, *rivals = fitting_layouts(schema, frozenset(row))
    for rival in rivals:
        try:
            other = rival.read(row, *rival.fields)
        # What cannot be read says nothing: an empty field, P3's numbers of tokens.
        except FieldError:
            continue
        if other != record:
            # Named by the fields in which they differ.
            ours = " and ".join(name for name in first.fields if name not in rival.fields)
            theirs = " and ".join(name for name in rival.fields if name not in first.fields)
            raise FieldError(theirs, f"differs from {ours}; keep one of them")


def fields_read(layout: Layout) -> frozenset[str]:
    """Return the names of all fields that a layout reads where they are there."""
    return frozenset((*layout.fields, *layout.more, *OPENING, "margin", "criterion"))


def without_nulls(row: Row) -> Row:
    """Return a row without the columns that are null in it, as writers of tables fill them."""
    return {name: value for name, value in row.items() if value is not None}


def _adapted(row: Row, schema: Schema) -> Record:
    """Adapt a row by the layout of `schema` that fits it."""
    leave_out(row)
    layout = layout_of(row, schema)
    refuse_unread(row, fields_read(layout), switches_only=layout.read is read_text)
    record = layout.read(row, *layout.fields)
    _refuse_ambiguous(row, schema, record)
    return record


# ---- Schemas ----


def text_record(row: Row) -> Record:
    """Adapt a document; a conversation becomes its turns, one below the other."""
    row = without_nulls(row)
    if "text" in row:
        return _adapted(row, "text")
    # All of a text is trained on, so no turn of a conversation may ask not to be.
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
    # A text may be a conversation.
    if schema == "text" and "text" not in row:
        schema = "chat"
    read = fields_read(layout_of(row, schema))
    unread = row.keys() - read
    # Keys of messages are read by name too.
    for name in row.keys() & read:
        for message in _messages_in(row[name]):
            unread |= {f"{name}[].{key}" for key in message.keys() - MESSAGE_KEYS}
    return frozenset(unread)


def _messages_in(value: Any) -> list[Row]:
    """Return the messages in a field's value, none where it is no list."""
    if not isinstance(value, list):
        return []
    return [item for item in value if isinstance(item, dict) and item.keys() & {"role", "from"}]
