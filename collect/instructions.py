"""Tasks and rows of synthesis: what is read, what is made, and what several methods share."""

import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from collect.writers import Ask, Question, question
from data.fields import FieldError, Row, get, text_of
from data.formats import read_lines
from data.near_duplicates import normal
from data.text_rules import STOP_WORDS
from rewards.judges import KEEPS
from runtime.errors import UserError

YES_OR_NO = "Answer with yes or no."
INSTRUCTION_OF = """Write the instruction to which the text below is the answer. Write the
instruction only.

{answer}"""
"""Asked by back_translate, and in the rows of invert."""
SCORE = """Request: {request}
Response: {response}
How well does the response do what the request asks, as an assistant's answer? 5 is perfect, 4 is
good, 3 is fair, 2 has faults, 1 is no answer to it. Reply with one line, as in "Score: 3"."""
IDLE_ROUNDS = 3
"""So many rounds without a row that stays, one after the other, are the last ones of methods that
have no last one by themselves."""
MOST_SIMILAR = 0.7
"""An instruction goes whose ROUGE-L with one before it is above this."""
NO_REPLY = "came to no end, or the question did not fit"
"""The reason given for dropping an empty reply."""
WORDS_OF_A_REFUSAL = 80
"""An answer of fewer words that has a sorry in it is a refusal (WizardLM, section 3.2)."""
MORE_STOP_WORDS = frozenset(
    ["a", "an", "in", "is", "it", "this", "on", "for", "as", "at", "by", "or", "not", "so", "i"]
)


class Instance(NamedTuple):
    """An input of a task, empty where it needs none, and the output to it."""

    input: str
    output: str


class Task(NamedTuple):
    """An instruction and examples of it."""

    id: str
    instruction: str
    instances: tuple[Instance, ...]
    is_classification: bool
    """The output is one of a few labels."""


class Made(NamedTuple):
    """A row that a method made; `rule` says why it goes."""

    id: str
    """That of the task or the row, among all that is made."""
    row: dict[str, str]
    """The fields to write: instruction, input and output; of a dropped row those it got so far."""
    by: str
    """The method, or the operation of a method, that made the row."""
    of: tuple[str, ...]
    """Ids of what it was made from."""
    rule: str = ""
    """Name of the rule that drops it; empty for a row that stays."""
    reason: str = ""
    """The rule's objection; empty for a row that stays."""


Rounds = Iterator[list[Made]]
"""The rows of a method, a list a round."""
Object = Callable[[Sequence[tuple[str, str]]], list[str]]
"""object_to(pairs of prompt and response) -> of each the principle that it breaks, "" for none."""


# ---- Seeds: the layout of Self-Instruct's seed_tasks.jsonl ----


def read_seeds(path: str) -> list[Task]:
    """Read seed tasks from a JSON Lines file.

    Fields: `instruction`, `instances`, a list of {"input", "output"}, and where there are
    `is_classification` and `id`. Raises UserError for a file that cannot be read, and for a row
    that does not fit, as `file:line: field: reason`.
    """
    tasks = []
    try:
        for number, row in read_lines(pathlib.Path(path)):
            if isinstance(row, FieldError):
                raise row
            tasks.append(task_of(row, f"seed {number}"))
    except FieldError as fault:
        raise UserError(f"{path}:{number}: {fault}") from None
    except OSError as fault:
        raise UserError(f"--seed_tasks={path}: cannot be read ({fault})") from None
    if not tasks:
        raise UserError(f"--seed_tasks={path}: holds no task; write one a line")
    return tasks


def task_of(row: Row, number: str) -> Task:
    """Return a row of the seeds' layout as a task, called `number` where it has no id."""
    instruction = text_of(get(row, "instruction"), "instruction")
    found = get(row, "instances")
    if not isinstance(found, list) or not found:
        raise FieldError("instances", "must be a list of objects with input and output")
    instances = []
    for i, one in enumerate(found):
        place = f"instances[{i}]"
        if not isinstance(one, dict):
            raise FieldError(place, "must be an object with input and output")
        given = one.get("input") or ""
        if not isinstance(given, str):
            raise FieldError(f"{place}.input", "must be a text")
        output = text_of(get(one, "output", f"{place}."), f"{place}.output")
        instances.append(Instance(given.strip(), output.strip()))
    is_classification = row.get("is_classification", False)
    if not isinstance(is_classification, bool):
        raise FieldError("is_classification", "must be true or false")
    name = str(row.get("id") or number)
    return Task(name, instruction.strip(), tuple(instances), is_classification)


def prompt_text(instruction: str, given: str = "") -> str:
    """Return an instruction with its input below it, as training reads the two."""
    return f"{instruction}\n\n{given}" if given else instruction


# ---- Replies that all methods read ----


def read_verdict(reply: str) -> str | None:
    """Return which of yes and no a reply says first; None where it says neither."""
    found = re.search(r"\b(yes|no)\b", reply.casefold())
    return found[1] if found else None


def read_score(reply: str) -> int | None:
    """Return the score from 1 to 5 that a reply gives; None where it gives none, or another.

    That is the last number right behind the word score, as in `Score: 4` or `**Score:** 4/5`; or a
    reply that is a number alone, as `4`, `4/5` and `4 out of 5` are. No score are 10 and 4.5, nor
    what a scale is told with: `Score (1-5)`, `out of 5`.
    """
    behind = re.findall(r"score[\s:*_]*([1-5])\b(?![.,-]\d)", reply, re.IGNORECASE)
    alone = re.fullmatch(r"[\s*]*([1-5])(?:\s*(?:/|out of)\s*5)?[\s*.]*", reply, re.IGNORECASE)
    if behind:
        return int(behind[-1])
    return int(alone[1]) if alone else None


def answer_fault(answer: str) -> str:
    """Say what is wrong with an answer: "" for nothing, a refusal, or no word that says any."""
    words = normal(answer).split()
    if "sorry" in words and len(words) < WORDS_OF_A_REFUSAL:
        return "is sorry"
    if set(words) <= STOP_WORDS | MORE_STOP_WORDS:
        return "says nothing" if answer else NO_REPLY
    return ""


def without_heading(reply: str, *headings: str) -> str:
    """Return a reply without a heading at its beginning, such as `Instruction:`, and quotes around
    all of it.
    """
    text = reply.strip()
    for heading in headings:
        text = re.sub(rf"^[#*\s]*{heading}[*\s]*:[*\s]*", "", text, flags=re.IGNORECASE)
    text = text.strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]
    return text[1:-1].strip() if is_quoted else text


# ---- Judgements ----


def ask_verdicts(ask: Ask, questions: Sequence[Question]) -> list[str | None]:
    """Ask questions that are answered with yes or no; None where neither can be read."""
    return [read_verdict(reply) for reply in ask(questions)]


def ask_scores(ask: Ask, pairs: Sequence[tuple[str, str]]) -> list[int | None]:
    """Ask for a score from 1 to 5 of each (prompt, response); None where none can be read."""
    questions = [question("score", SCORE, request=p, response=r) for p, r in pairs]
    return [read_score(reply) for reply in ask(questions)]


def no_objections(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Object to nothing; an Object."""
    return [""] * len(pairs)


def principled(ask: Ask, principles: dict[str, str]) -> Object:
    """Make an Object of written principles, {name: text}: of each pair the writer is asked whether
    the response keeps each of them (Sun et al. 2023, Self-Align; Bai et al. 2022).

    A reply that says neither yes nor no objects too.
    """

    def object_to(pairs: Sequence[tuple[str, str]]) -> list[str]:
        questions = []
        for request, response in pairs:
            for name, rule in principles.items():
                given = {"request": request, "response": response, "rule": rule, "name": name}
                questions.append(question("principle", KEEPS + YES_OR_NO, **given))
        verdicts = iter(ask_verdicts(ask, questions))
        objections = []
        for _ in pairs:
            broken = [name for name in principles if next(verdicts) != "yes"]
            objections.append(", ".join(broken))
        return objections

    return object_to


def pair_of(made: Made) -> tuple[str, str]:
    """Return the prompt and the response of a row with instruction, input and output."""
    row = made.row
    return prompt_text(row["instruction"], row.get("input", "")), row["output"]


def staying(rows: Sequence[Made]) -> list[Made]:
    """Return the rows that no rule has dropped."""
    return [made for made in rows if not made.rule]


def with_outputs(rows: Sequence[Made], outputs: Sequence[str]) -> list[Made]:
    """Return all rows, of which those that stay so far get the outputs, in their order."""
    output_of = iter(outputs)
    answered = []
    for made in rows:
        if not made.rule:
            made = made._replace(row={**made.row, "output": next(output_of)})
        answered.append(made)
    return answered


def dropped(rows: Sequence[Made], rule: str, reasons: Sequence[str]) -> list[Made]:
    """Return all rows, of which those go by `rule` that have a reason against them.

    `reasons`: one for each row that stays so far, in their order; "" for none.
    """
    reason_of = iter(reasons)
    judged = []
    for made in rows:
        reason = "" if made.rule else next(reason_of)
        judged.append(made._replace(rule=rule, reason=reason) if reason else made)
    return judged


def without_objections(rows: Sequence[Made], object_to: Object) -> list[Made]:
    """Drop the rows that break a principle, of those that stay so far."""
    return dropped(rows, "principle", object_to([pair_of(made) for made in staying(rows)]))


# ---- Rounds ----


def until_idle(rounds: Rounds) -> Rounds:
    """Yield rounds until IDLE_ROUNDS of them, one after the other, have no row that stays."""
    idle = 0
    for made in rounds:
        yield made
        idle = 0 if staying(made) else idle + 1
        if idle == IDLE_ROUNDS:
            return
