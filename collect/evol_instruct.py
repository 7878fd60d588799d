"""Evol-Instruct: instructions that grow harder, or give rise to others (Xu et al. 2023).

WizardLM, arXiv 2304.12244. Each round takes every instruction one step on, by an operation drawn
at random: in depth (a constraint more, a deeper question, a concrete case, more steps of
reasoning, a more complicated input), or in breadth (a new one of the same domain). The writer
answers what it wrote. What stays takes the place of the instruction that it was made from; where
it failed that one is tried again in the next round.
"""

import re
from collections.abc import Iterator, Sequence

from collect.examples import folded
from collect.instructions import (
    NO_REPLY,
    Made,
    Object,
    answer_fault,
    ask_verdicts,
    dropped,
    staying,
    with_outputs,
    without_heading,
    without_objections,
)
from collect.writers import Ask, question
from tasks.world import drawn_for

DEPTH = {
    "constraints": "It has one more constraint or requirement.",
    "deepen": "It asks for more depth and breadth in what it asks.",
    "concrete": "General concepts in it are replaced by more specific ones.",
    "reasoning": "It takes more steps of reasoning to answer.",
    "input": "It has a more complicated input, such as data, code or a formula.",
}
"""Operations in depth, and what each says."""
BREADTH = "breadth"
"""The operation that writes another instruction of the same domain."""
OPERATIONS = (*DEPTH, BREADTH)
ROUNDS = 4
"""So many steps is an instruction taken on at most, as in the paper."""

IN_DEPTH = """Rewrite the instruction below into a more complex one that people still understand
and an assistant can answer. {how} Keep what it is about, and add at most some twenty words. Write
the new instruction only.

{instruction}"""
IN_BREADTH = """Write an instruction that is new, of the same domain as the one below, rarer than
it, about as long and about as hard. Write the new instruction only.

{instruction}"""
SAME = """First: {first}
Second: {second}
Do both ask for the same, with the same constraints, and to the same depth? Answer with yes or
no."""
WORDS_OF_THE_QUESTION = re.compile(
    r"\b(?:given|rewritten|created) (?:prompt|instruction)s?\b", re.IGNORECASE
)
"""Phrases by which a writer talks about its task instead of doing it (WizardLM, section 3.2)."""


def evol_instruct(
    seeds: Sequence[tuple[str, str]], ask: Ask, object_to: Object, seed: int
) -> Iterator[list[Made]]:
    """Yield what each of the rounds made of the instructions, kept and dropped.

    `seeds`: ids and instructions. A row has instruction, input (empty) and output. Rules: `copied`
    (words of the question), `repeated`, `unchanged` (the writer finds no information gained),
    `answer`, `principle`.
    """
    pool = list(seeds)
    seen = {folded(instruction) for _, instruction in seeds}
    for number in range(ROUNDS):
        rng = drawn_for("evol_instruct", seed, number)
        operations = [rng.choice(OPERATIONS) for _ in pool]
        evolved = _evolved(pool, operations, ask, seen, number)
        evolved = _gaining(pool, evolved, ask)
        evolved = without_objections(_answered(evolved, ask), object_to)
        yield evolved

        # What evolved takes the place of what it was made from, in breadth too (the paper's code).
        for place, made in enumerate(evolved):
            if not made.rule:
                pool[place] = (made.id, made.row["instruction"])
                seen.add(folded(made.row["instruction"]))


def _evolved(
    pool: Sequence[tuple[str, str]],
    operations: Sequence[str],
    ask: Ask,
    seen: set[str],
    number: int,
) -> list[Made]:
    """Have every instruction rewritten; those whose form is wrong, or seen before, are dropped.

    `seen`: instructions that stay, folded. What fails later does not stand in the way of the same.
    """
    seen = set(seen)
    questions = []
    for (_, instruction), operation in zip(pool, operations, strict=True):
        if operation == BREADTH:
            questions.append(question("breadth", IN_BREADTH, instruction=instruction))
        else:
            given = {"instruction": instruction, "how": DEPTH[operation]}
            questions.append(question("depth", IN_DEPTH, **given))

    evolved = []
    replies = ask(questions)
    for place, ((name, _), operation) in enumerate(zip(pool, operations, strict=True)):
        text = without_heading(
            replies[place], "instruction", "new instruction", "rewritten prompt"
        )
        row = {"instruction": text, "input": ""}
        made = Made(f"evol_instruct {number}.{place}", row, operation, (name,))
        copied = WORDS_OF_THE_QUESTION.search(text)
        if not text:
            made = made._replace(rule="unreadable", reason=NO_REPLY)
        elif copied:
            made = made._replace(rule="copied", reason=f"has {copied[0]!r}")
        elif folded(text) in seen:
            made = made._replace(rule="repeated", reason="stands there before")
        else:
            seen.add(folded(text))
        evolved.append(made)
    return evolved


def _gaining(pool: Sequence[tuple[str, str]], evolved: Sequence[Made], ask: Ask) -> list[Made]:
    """Drop what asks for the same as what it was made from, as the writer finds."""
    questions = []
    for (_, before), made in zip(pool, evolved, strict=True):
        if not made.rule:
            questions.append(question("same", SAME, first=before, second=made.row["instruction"]))
    reasons = []
    for verdict in ask_verdicts(ask, questions):
        reasons.append("" if verdict == "no" else "asks for the same")
    return dropped(evolved, "unchanged", reasons)


def _answered(evolved: Sequence[Made], ask: Ask) -> list[Made]:
    """Have the writer answer what it wrote; drop what it cannot answer."""
    left = [made.row["instruction"] for made in staying(evolved)]
    answers = ask([question("answer", "{instruction}", instruction=text) for text in left])
    faults = [answer_fault(text) for text in answers]
    return dropped(with_outputs(evolved, answers), "answer", faults)
