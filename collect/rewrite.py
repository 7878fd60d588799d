"""Rewriting: instructions or answers of rows that are there, where they get better by it.

The other rows are written as they were. Of an instruction the writer must find that it asks for
the same as before, and of a pair that its score is higher. So none is made worse, as far as the
writer can tell.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from collect.instructions import (
    NO_REPLY,
    Made,
    Object,
    ask_scores,
    ask_verdicts,
    dropped,
    pair_of,
    read_score,
    staying,
    without_heading,
    without_objections,
)
from collect.writers import Ask, question

ROWS_A_ROUND = 64
REWRITE_INSTRUCTION = """Rewrite the instruction below so that it is clear, complete and correctly
written, and asks for the same as before. Write the new instruction only.

{instruction}"""
REWRITE_ANSWER = """Request: {instruction}
Response: {output}
Rewrite the response so that it does better what the request asks. Write the new response only."""
MEANS = """First: {first}
Second: {second}
Do both ask for the same? Answer with yes or no."""
SCORE_INSTRUCTION = """Instruction: {instruction}
How clear, complete and correctly written is the instruction? 5 is perfect, 4 is good, 3 is fair,
2 has faults, 1 cannot be understood. Reply with one line, as in "Score: 3"."""
"""Asked of an instruction by itself."""
AS_IT_WAS = "as_it_was"
"""The `by` of a row that no rewriting made better."""

Part = Literal["instruction", "output"]
"""The part of a row that is rewritten."""


def rewrite(
    pairs: Sequence[tuple[str, str, str]], ask: Ask, object_to: Object, part: Part
) -> Iterator[list[Made]]:
    """Yield the rows of each round, their instruction or output rewritten, kept and dropped, and
    those as they were (`AS_IT_WAS`) whose rewriting went.

    `pairs`: (id, instruction, output). A row has instruction, input (empty) and output. Rules:
    `unreadable`, `unchanged`, `meaning` (it asks for another thing), `no_better` (by its score),
    `principle`.
    """
    for start in range(0, len(pairs), ROWS_A_ROUND):
        before = pairs[start : start + ROWS_A_ROUND]
        rewritten = _rewritten(before, ask, part)
        if part == "instruction":
            rewritten = _meaning_the_same(before, rewritten, ask)
        rewritten = without_objections(_better(before, rewritten, ask, part), object_to)

        # Where the rewriting goes the row stays as it was.
        left = []
        for (name, instruction, output), made in zip(before, rewritten, strict=True):
            if made.rule:
                row = {"instruction": instruction, "input": "", "output": output}
                left.append(Made(f"{AS_IT_WAS} {name}", row, AS_IT_WAS, (name,)))
        yield [*rewritten, *without_objections(left, object_to)]


def _rewritten(before: Sequence[tuple[str, str, str]], ask: Ask, part: Part) -> list[Made]:
    """Have one part of each pair rewritten."""
    questions = []
    for _, instruction, output in before:
        if part == "instruction":
            questions.append(
                question("rewrite_instruction", REWRITE_INSTRUCTION, instruction=instruction)
            )
        else:
            given = {"instruction": instruction, "output": output}
            questions.append(question("rewrite_output", REWRITE_ANSWER, **given))
    rewritten = []
    for (name, instruction, output), reply in zip(before, ask(questions), strict=True):
        row = {"instruction": instruction, "input": "", "output": output}
        text = without_heading(reply, part, "response", "new instruction", "new response")
        made = Made(f"rewrite {name}", {**row, part: text}, f"rewrite_{part}", (name,))
        if not text:
            made = made._replace(rule="unreadable", reason=NO_REPLY)
        elif text == row[part]:
            made = made._replace(rule="unchanged", reason="is as it was")
        rewritten.append(made)
    return rewritten


def _meaning_the_same(
    before: Sequence[tuple[str, str, str]], rewritten: Sequence[Made], ask: Ask
) -> list[Made]:
    """Drop instructions that ask for another thing than before, as the writer finds."""
    questions = []
    for (_, instruction, _), made in zip(before, rewritten, strict=True):
        if not made.rule:
            given = {"first": instruction, "second": made.row["instruction"]}
            questions.append(question("means", MEANS, **given))
    reasons = []
    for verdict in ask_verdicts(ask, questions):
        reasons.append("" if verdict == "yes" else "asks for another thing")
    return dropped(rewritten, "meaning", reasons)


def _better(
    before: Sequence[tuple[str, str, str]], rewritten: Sequence[Made], ask: Ask, part: Part
) -> list[Made]:
    """Drop what has no higher score than before."""
    old = []
    for (_, instruction, output), made in zip(before, rewritten, strict=True):
        if not made.rule:
            old.append((instruction, output))
    new = [pair_of(made) for made in staying(rewritten)]
    if part == "instruction":
        scores = _instruction_scores(ask, [text for text, _ in [*old, *new]])
    else:
        scores = ask_scores(ask, [*old, *new])

    reasons = []
    for first, second in zip(scores[: len(old)], scores[len(old) :], strict=True):
        is_better = first is not None and second is not None and second > first
        reasons.append("" if is_better else f"from {first} to {second}")
    return dropped(rewritten, "no_better", reasons)


def _instruction_scores(ask: Ask, instructions: Sequence[str]) -> list[int | None]:
    """Ask for a score from 1 to 5 of each instruction by itself."""
    questions = [
        question("score_instruction", SCORE_INSTRUCTION, instruction=text) for text in instructions
    ]
    return [read_score(reply) for reply in ask(questions)]
