"""Self-Instruct: a pool of tasks that grows from seeds (Wang et al. 2023, arXiv 2212.10560).

Each round, the writer sees some tasks of the pool and writes further instructions. Those that are
unfit or too similar to one before them go. Of the others it says whether they are classification,
and writes instances: of classification the label first, so that all labels come up, of other tasks
the input first. A task with an instance that is left joins the pool, and is shown in later rounds.
"""

import itertools
import random
import re
import string
from collections.abc import Iterator, Sequence

from collect.instructions import (
    MOST_SIMILAR,
    Instance,
    Made,
    Object,
    Task,
    ask_verdicts,
    without_objections,
)
from collect.writers import Ask, question
from data.rouge import SimilarTexts
from tasks.world import drawn_for

# What the paper has, and its code where the paper is silent.
SHOWN = 8
"""Instructions that the writer sees."""
SHOWN_OF_MADE = 2
"""The writer's own instructions among these, at most."""
WORDS = (4, 150)
"""Fewest and most words of an instruction."""
INSTANCES = 5
"""Most instances of a task."""
NOT_OF_TEXT = re.compile(
    r"\b(images?|pictures?|graphs?|files?|maps?|draw|plot|go to)\b", re.IGNORECASE
)
"""Words of what a language model cannot do."""

LISTS = 8
"""Lists of instructions a round."""
WRITTEN = 8
"""Instructions that are asked for in a list."""
LABELLED_SHOWN = 4
"""Tasks of each kind that are shown where the kind of a new one is asked."""

INSTRUCTIONS = """Here are tasks that an assistant may be given:
{shown}
Write more tasks, each of another kind, numbered from {next} to {last}, one a line."""
KIND = """A classification task has a small set of possible outputs.
{shown}
Task: {instruction}
Is it classification? Answer with yes or no."""
INPUT_FIRST = """Write up to {most} examples of the task below, each with an input and the right
output. Where the task needs no input, write the output alone.

Example 1
Input: what the task is done to
Output: the right output

Task: {instruction}"""
LABEL_FIRST = """Write up to {most} examples of the classification task below: first a possible
class label, another one each time, then an input that has it.

Class label: one of the possible outputs
Input: what has this label

Task: {instruction}"""


# ---- Replies ----

ITEM = r"(?:^|\n)[ \t]*\d+[ \t]*[.)][ \t]+"
"""How an item of a numbered list begins."""
EXAMPLE = r"(?:^|\n)[#*\s]*Example[ \t]*\d+[*.:]*"
"""How an example begins that has the input first."""
LABEL = r"(?:^|\n)[ \t]*Class label[ \t]*:"
"""How an example begins that has the label first."""
INPUT = r"(?:^|\n)[ \t]*Input[ \t]*\d*[ \t]*:"


def read_list(reply: str) -> list[str]:
    """Return the items of a numbered list, each in one line; what stands before it is none."""
    pieces = re.split(ITEM, reply)
    items = [" ".join(piece.split()) for piece in pieces[1:]]
    return [item for item in items if item]


def read_instances(reply: str) -> list[Instance]:
    """Return the instances of a reply that has the input first.

    An example without `Output:` is skipped; a reply without `Example` is one instance.
    """
    found = []
    for piece in re.split(EXAMPLE, reply):
        head, *outputs = re.split(r"(?:^|\n)[ \t]*Output[ \t]*\d*[ \t]*:", piece)
        if not outputs:
            continue
        # Behind the output another input begins an example without a number, which is left out.
        output = re.split(INPUT, outputs[0])[0]
        found.append(Instance(_input_of(head), output.strip()))
    return found


def _input_of(text: str) -> str:
    """Return what stands behind the last `Input:`; "" without one, and where it says none."""
    _, *inputs = re.split(INPUT, text)
    given = inputs[-1].strip() if inputs else ""
    is_none = given.strip("().[]<>").casefold() in ("none", "n/a", "no input")
    return "" if is_none else given


def read_labelled(reply: str) -> list[Instance]:
    """Return the instances of a reply that has the label first; without a label there are none."""
    found = []
    for piece in re.split(LABEL, reply)[1:]:
        label, _, rest = piece.partition("\n")
        # Writers often leave the heading out.
        given = _input_of(rest) if re.search(INPUT, rest) else rest.strip()
        found.append(Instance(given, label.strip()))
    return found


# ---- Rules: (name, reason) of what goes ----

Fault = tuple[str, str]


def unfit(instruction: str) -> Fault | None:
    """Object to an instruction by heuristics; None where there is nothing against it.

    The paper's code also drops what does not begin with an ASCII letter, as not English: not here.
    """
    count = len(instruction.split())
    fewest, most = WORDS
    if not fewest <= count <= most:
        return "length", f"{count} words"
    found = NOT_OF_TEXT.search(instruction)
    if found:
        return "not_of_text", f"has {found[0]!r}"
    if instruction.casefold().startswith("write a program"):
        return "program", "asks for a program"
    if instruction[0] in string.punctuation:
        return "beginning", f"begins with {instruction[0]!r}"
    return None


def faults_of(instances: Sequence[Instance]) -> list[Fault | None]:
    """Object to instances of one task; None for each that stays.

    Rules: `empty`, `copied` (the output is the input), `unfinished` (ends in a colon); of those
    that are left `contradicted` (an input with two outputs, and then all), `repeated`, `surplus`.
    """
    faults = [_fault_of_form(one) for one in instances]
    outputs_of: dict[str, set[str]] = {}
    for one, fault in zip(instances, faults, strict=True):
        if fault is None and one.input:
            outputs_of.setdefault(one.input, set()).add(one.output)
    contradicted = [given for given, outputs in outputs_of.items() if len(outputs) > 1]

    kept: set[Instance] = set()
    for place, one in enumerate(instances):
        if faults[place] is not None:
            continue
        if contradicted:
            faults[place] = "contradicted", f"two outputs to {contradicted[0][:40]!r}"
        elif one in kept:
            faults[place] = "repeated", "stands there before"
        elif len(kept) == INSTANCES:
            faults[place] = "surplus", f"more than {INSTANCES} instances"
        else:
            kept.add(one)
    return faults


def _fault_of_form(instance: Instance) -> Fault | None:
    """Object to an instance by itself."""
    if not instance.output:
        return "empty", "has no output"
    if instance.output == instance.input:
        return "copied", "the output is the input"
    if instance.output.endswith(":") or instance.input.endswith(":"):
        return "unfinished", "ends in a colon"
    return None


# ---- The method ----


def self_instruct(
    seeds: Sequence[Task], ask: Ask, object_to: Object, seed: int
) -> Iterator[list[Made]]:
    """Yield what each round made, kept and dropped, without end. A function of what is asked for.

    `object_to` judges instances before their task joins the pool. A row has instruction, input and
    output.
    """
    made: list[Task] = []
    similar = SimilarTexts(MOST_SIMILAR)
    for task in seeds:
        similar.add(task.instruction)
    for number in itertools.count():
        rng = drawn_for("self_instruct", seed, number)
        fresh, gone = _instructions(seeds, made, similar, ask, rng, number)
        kinds = _kinds(seeds, fresh, ask, rng)
        tasks, rows = _instances(kinds, ask, object_to)
        made += tasks
        yield [*gone, *rows]


def _shown(seeds: Sequence[Task], made: Sequence[Task], rng: random.Random) -> list[Task]:
    """Draw the tasks that the writer sees, in any order."""
    own = rng.sample(made, min(SHOWN_OF_MADE, len(made)))
    shown = [*own, *rng.sample(seeds, min(SHOWN - len(own), len(seeds)))]
    rng.shuffle(shown)
    return shown


def _instructions(
    seeds: Sequence[Task],
    made: Sequence[Task],
    similar: SimilarTexts,
    ask: Ask,
    rng: random.Random,
    number: int,
) -> tuple[list[Made], list[Made]]:
    """Have instructions written; return those that are new and fit, and those that go.

    The new ones are added to `similar`, whatever becomes of their instances.
    """
    lists = [_shown(seeds, made, rng) for _ in range(LISTS)]
    questions = []
    for shown in lists:
        text = "\n".join(f"{i}. {task.instruction}" for i, task in enumerate(shown, 1))
        numbers = {"next": str(len(shown) + 1), "last": str(len(shown) + WRITTEN)}
        asked = question("instructions", INSTRUCTIONS, shown=text, **numbers)
        questions.append(asked._replace(item=ITEM))

    fresh: list[Made] = []
    gone: list[Made] = []
    for shown, reply in zip(lists, ask(questions), strict=True):
        of = tuple(task.id for task in shown)
        # A reply that is no list is told as one that goes.
        items = read_list(reply)
        for item in items or [reply]:
            name = f"self_instruct {number}.{len(fresh) + len(gone)}"
            one = Made(name, {"instruction": item}, "self_instruct", of)
            if not items:
                fault: Fault | None = ("unreadable", "no numbered list")
            else:
                fault = unfit(item) or _too_similar(item, similar)
            if fault is None:
                similar.add(item)
                fresh.append(one)
            else:
                gone.append(one._replace(rule=fault[0], reason=fault[1]))
    return fresh, gone


def _too_similar(instruction: str, similar: SimilarTexts) -> Fault | None:
    found = similar.nearest(instruction)
    if found is None:
        return None
    place, score = found
    return "similar", f"{score:.2f} of instruction {place + 1}"


def _kinds(
    seeds: Sequence[Task], fresh: Sequence[Made], ask: Ask, rng: random.Random
) -> list[tuple[Made, bool]]:
    """Ask of each new instruction whether it is classification; what is not said to be is not."""
    examples = []
    for is_classification in (True, False):
        alike = [task for task in seeds if task.is_classification == is_classification]
        examples += rng.sample(alike, min(LABELLED_SHOWN, len(alike)))
    rng.shuffle(examples)
    answers = {True: "yes", False: "no"}
    shown = "\n".join(
        f"Task: {task.instruction}\nIs it classification? {answers[task.is_classification]}"
        for task in examples
    )
    questions = [
        question("kind", KIND, shown=shown, instruction=one.row["instruction"]) for one in fresh
    ]
    verdicts = ask_verdicts(ask, questions)
    return [(one, verdict == "yes") for one, verdict in zip(fresh, verdicts, strict=True)]


def _instances(
    kinds: Sequence[tuple[Made, bool]], ask: Ask, object_to: Object
) -> tuple[list[Task], list[Made]]:
    """Have instances written; return the tasks that join the pool, and all rows, kept or not."""
    questions = []
    for one, is_classification in kinds:
        instruction = one.row["instruction"]
        given = {"instruction": instruction, "most": str(INSTANCES)}
        if is_classification:
            asked = question("label_first", LABEL_FIRST, **given)._replace(item=LABEL)
        else:
            asked = question("input_first", INPUT_FIRST, **given)._replace(item=EXAMPLE)
        questions.append(asked)

    # What can be read of each reply, by the rules on its form.
    rows: list[Made] = []
    for (one, is_classification), reply in zip(kinds, ask(questions), strict=True):
        read = read_labelled if is_classification else read_instances
        found = read(reply)
        if not found:
            row = {**one.row, "reply": reply}
            told = "no instance with an output"
            rows.append(one._replace(row=row, rule="unreadable", reason=told))
        for instance, fault in zip(found, faults_of(found), strict=True):
            rule, reason = fault or ("", "")
            row = {**one.row, "input": instance.input, "output": instance.output}
            rows.append(one._replace(row=row, rule=rule, reason=reason))

    rows = without_objections(rows, object_to)
    is_kind = {one.id: is_classification for one, is_classification in kinds}
    kept: dict[str, list[Instance]] = {}
    instruction_of = {}
    for made in rows:
        if not made.rule:
            instance = Instance(made.row["input"], made.row["output"])
            kept.setdefault(made.id, []).append(instance)
            instruction_of[made.id] = made.row["instruction"]
    tasks = [
        Task(name, instruction_of[name], tuple(instances), is_kind[name])
        for name, instances in kept.items()
    ]
    return tasks, rows
