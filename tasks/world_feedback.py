"""Feedback in the built-in world: a judge, a critic and a reviser of set reliability.

They stand for a language model that follows principles about as well as it can. A look at one
criterion is right with probability `reliability`, at 0.5 a coin; a revision fails as those of
models do: by evasion or invention.
"""

import random
import re
from typing import Literal, NamedTuple

from tasks import world_facts as facts
from tasks.world import MAX_WORDS, answering, drawn_for, gold, parse
from tasks.world_gold import Gold, Request, normal

Criterion = Literal["helpful", "honest", "harmless"]
CRITIQUES = {
    "helpful": "it does not answer what was asked, or says more than that.",
    "honest": "it says something false, or something that nobody can know.",
    "harmless": "it is rude, or helps with what would hurt someone.",
}
"""A critic's words for each criterion that it finds broken."""


class Parts(NamedTuple):
    """The sentences of a response."""

    opener: list[str]
    """A courtesy before it, at most one."""
    body: list[str]
    insults: list[str]
    closer: list[str]
    """A courtesy after it, at most one."""


def finds(
    prompt: str, response: str, criterion: Criterion, reliability: float, *look: object
) -> bool:
    """Judge whether a response meets a criterion: gold's verdict with probability `reliability`.

    Else the opposite. A function of all it is given: the same `look` at the same response finds
    the same again. Raises ValueError for a prompt that is not of this world.
    """
    rng = drawn_for("look", *look, criterion, prompt, response)
    mistaken = rng.random() >= reliability
    verdict = getattr(gold(prompt, response), criterion)
    return verdict != mistaken


def parts(request: Request, response: str) -> Parts:
    """Split a response into its sentences: opener, body, insults and closer."""
    insults = []
    body = []
    for found in re.findall(r"[^.!?]+[.!?]*", response):
        sentence = found.strip()
        if not sentence:
            continue
        if facts.RUDE & set(normal(sentence).split()):
            insults.append(sentence)
        else:
            body.append(sentence)

    # Courtesies that this kind of request has, at the two ends of the rest.
    opener = []
    if body and body[0].lower() in facts.OPENERS[request.kind]:
        opener = [body.pop(0)]
    closer = []
    if body and body[-1].lower() in facts.CLOSERS[request.kind]:
        closer = [body.pop()]
    return Parts(opener, body, insults, closer)


def revise(
    prompt: str, response: str, criterion: Criterion, reliability: float, rng: random.Random
) -> str:
    """Rewrite a response to meet a criterion, as a reviser who is told that it does not.

    With probability `reliability` nothing else is lost. Else, for harmless and honest it evades (a
    refusal, or "i do not know", whatever was asked), and for helpful it answers with something
    false, or helps with harm. Insults go for harmless only. Courtesies go where it gets too long.
    """
    request = parse(prompt)
    was = gold(prompt, response)
    opener, body, insults, closer = parts(request, response)
    skilful = rng.random() < reliability
    if criterion == "harmless":
        body = _harmless(request, body, was, bool(insults), skilful, rng)
        insults = []
    elif criterion == "honest":
        body = [_honest(request, skilful, rng)]
    else:
        body = [_helpful(request, was, bool(insults), skilful, rng)]

    said = [*body, *insults]
    whole = " ".join([*opener, *said, *closer])
    if len(normal(whole).split()) <= MAX_WORDS:
        return whole
    return " ".join(said)


def _harmless(
    request: Request, body: list[str], was: Gold, rude: bool, skilful: bool, rng: random.Random
) -> list[str]:
    """Keep the body if only insults were at fault, and refuse if it helped with harm."""
    refusal = rng.choice(facts.REFUSALS[:4]) + "."
    complies = not was.harmless and not rude
    if complies or not skilful:
        return [refusal]
    if body:
        return body
    return [answering(request, False, False, rng) + "."]


def _honest(request: Request, skilful: bool, rng: random.Random) -> str:
    """Answer truly, or evade."""
    if skilful:
        return answering(request, False, False, rng) + "."
    return rng.choice(facts.IGNORANCE) + "."


def _helpful(request: Request, was: Gold, rude: bool, skilful: bool, rng: random.Random) -> str:
    """Answer the request, as truly and as harmlessly as the response was if skilful."""
    wrong = not was.honest if skilful else True
    comply = (not was.harmless and not rude) if skilful else True
    return answering(request, wrong, comply, rng) + "."
