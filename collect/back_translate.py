"""Back-translation: instructions to answers that are there (Li et al. 2023, Humpback).

arXiv 2308.06259. The writer reads a text that people wrote and writes the instruction that it
answers; then it scores each pair, and only the best stay (self-curation). Pairs turned round
(collect/by_template.py) teach a model to be such a writer, asked in the same words. Of the paper
one round is here, by a judge of your choice: there is no second one with the model that the first
one's pairs were trained on, and no tag that tells rows that people wrote from these.
"""

from collections.abc import Iterator, Sequence

from collect.examples import folded
from collect.instructions import (
    INSTRUCTION_OF,
    NO_REPLY,
    Made,
    Object,
    ask_scores,
    dropped,
    pair_of,
    staying,
    without_heading,
    without_objections,
)
from collect.writers import Ask, question

ANSWERS_A_ROUND = 64


def back_translate(
    answers: Sequence[tuple[str, str]], ask: Ask, object_to: Object, least_score: int
) -> Iterator[list[Made]]:
    """Yield the pairs made of each part of the answers, ids and texts, kept and dropped.

    A row has instruction, input (empty) and output, the answer as it stands. Rules: `unreadable`,
    `copied` (the instruction is the answer), `score` (below `least_score` of 5, or none),
    `principle`.
    """
    for start in range(0, len(answers), ANSWERS_A_ROUND):
        part = answers[start : start + ANSWERS_A_ROUND]
        replies = ask(
            [question("instruction_of", INSTRUCTION_OF, answer=text) for _, text in part]
        )
        pairs = []
        for (name, text), reply in zip(part, replies, strict=True):
            instruction = without_heading(reply, "instruction")
            row = {"instruction": instruction, "input": "", "output": text}
            made = Made(f"back_translate {name}", row, "back_translate", (name,))
            if not instruction:
                made = made._replace(rule="unreadable", reason=NO_REPLY)
            elif folded(instruction) == folded(text):
                made = made._replace(rule="copied", reason="the instruction is the answer")
            pairs.append(made)
        yield without_objections(_curated(pairs, ask, least_score), object_to)


def _curated(pairs: Sequence[Made], ask: Ask, least_score: int) -> list[Made]:
    """Drop the pairs to which the writer gives a score below `least_score`, or none."""
    reasons = []
    for score in ask_scores(ask, [pair_of(made) for made in staying(pairs)]):
        if score is None:
            reasons.append("no score can be read")
        else:
            reasons.append("" if score >= least_score else f"{score} of 5")
    return dropped(pairs, "score", reasons)
