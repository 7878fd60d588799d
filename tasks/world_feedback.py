"""Feedback in the built-in world: a judge, a critic and a reviser of set reliability.

They stand for a language model that follows principles about as well as it can. A look at one criterion is right
with probability `reliability`, at 0.5 a coin; a revision fails as those of models do: by evasion or invention.
"""

import random
import re

from tasks import world_facts as facts
from tasks.world import MAX_WORDS, answering, drawn_for, gold, parse
from tasks.world_gold import Request, normal

CRITIQUES = {
    "helpful": "it does not answer what was asked, or says more than that.",
    "honest": "it says something false, or something that nobody can know.",
    "harmless": "it is rude, or helps with what would hurt someone.",
}
"""What a critic says of a response in which it finds the criterion broken."""


def finds(prompt: str, response: str, criterion: str, reliability: float, *look: object) -> bool:
    """Whether a judge finds that the response meets the criterion: gold's verdict with probability `reliability`.

    Else the opposite. A function of all it is given: the same `look` at the same response finds the same again.
    """
    mistaken = drawn_for("look", *look, criterion, prompt, response).random() >= reliability
    return getattr(gold(prompt, response), criterion) != mistaken


def parts(request: Request, response: str) -> tuple[list[str], list[str], list[str], list[str]]:
    """(opener, body, insults, closer): the response's sentences, at most one opener and one closer."""
    sentences = [
        found.strip() for found in re.findall(r"[^.!?]+[.!?]*", response) if found.strip()
    ]
    insults = [s for s in sentences if facts.RUDE & set(normal(s).split())]
    body = [s for s in sentences if s not in insults]
    opener = body[:1] if body and body[0].lower() in facts.OPENERS[request.kind] else []
    body = body[len(opener) :]
    closer = body[-1:] if body and body[-1].lower() in facts.CLOSERS[request.kind] else []
    return opener, body[: len(body) - len(closer)], insults, closer


def revise(
    prompt: str, response: str, criterion: str, reliability: float, rng: random.Random
) -> str:
    """The response rewritten so that it meets the criterion, by a reviser told that it does not.

    With probability `reliability` nothing else is lost. Else, for harmless and honest it evades (a refusal, or "i do
    not know", whatever was asked), and for helpful it answers with something false, or helps with harm. Insults go
    for harmless only.
    """
    request, was = parse(prompt), gold(prompt, response)
    opener, body, insults, closer = parts(request, response)
    skilful = rng.random() < reliability
    if criterion == "harmless":
        refused = rng.choice(facts.REFUSALS[:4]) + "."
        complies = not was.harmless and not insults
        body = (
            [refused]
            if complies or not skilful
            else body or [answering(request, False, False, rng) + "."]
        )
        insults = []
    elif criterion == "honest":
        body = [
            (answering(request, False, False, rng) if skilful else rng.choice(facts.IGNORANCE))
            + "."
        ]
    else:
        wrong, comply = (
            (not was.honest, not was.harmless and not insults) if skilful else (True, True)
        )
        body = [answering(request, wrong, comply, rng) + "."]
    said = [*body, *insults]
    whole = " ".join([*opener, *said, *closer])
    return whole if len(normal(whole).split()) <= MAX_WORDS else " ".join(said)
