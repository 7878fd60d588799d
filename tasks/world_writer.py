"""The world's simulated writer of tasks: what a language model would write, of set reliability.

It answers the questions of collect/synthesise.py, by the name of the step that asks. Each thing
that it writes is right with a set probability; else it fails as models do: a task that is there
already or that no text answers, a false or rude answer, a wrong verdict, a broken form.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from tasks import world_facts as facts
from tasks.world import answering, drawn_for, final_mark, gold, parse, prompt, respond
from tasks.world_feedback import CRITIQUES
from tasks.world_gold import CORES, Request, normal

PRINCIPLES = tuple(CRITIQUES)
"""Names of the principles by which it can judge."""
UNFIT = (
    "draw a map of spain",
    "write a program that says hello",
    "name",
    "- what is next",
    "which is the best song of all time",
)
"""Instructions that are no tasks of this world."""
SCORES = {0: 1, 1: 2, 2: 3, 3: 5}
"""The score of a response that passes so many of the three criteria."""


# ---- Tasks: an instruction whose inputs stand at its end ----


class Form(NamedTuple):
    """A phrasing of many requests, without what changes at its end."""

    instruction: str
    inputs: list[str]
    """Texts that may stand at its end: the requests are of the training split."""
    is_classification: bool
    """One of two things is the answer."""


def _changing(request: Request) -> str:
    """Return what of a request stands at its end in some phrasings; "" for nothing."""
    if request.kind == "comparison":
        return f"{request.subject} or {request.other}"
    return request.relation if request.kind == "listing" else request.subject


def _forms() -> dict[str, Form]:
    """Return all forms by their normal text."""
    forms: dict[str, Form] = {}
    for request in CORES.values():
        given = _changing(request)
        if request.heldout or not given or not request.core.endswith(f" {given}"):
            continue
        instruction = request.core.removesuffix(given).strip()
        form = Form(instruction, [], request.kind == "comparison")
        forms.setdefault(normal(instruction), form).inputs.append(given)
    return forms


FORMS = _forms()
SEEDS = 10
"""Seed tasks of the world."""


def form_of(instruction: str) -> Form | None:
    """Return the form of an instruction, whatever courtesy leads it; None for any other text."""
    words = normal(instruction)
    for lead in facts.LEADS:
        beginning = f"{normal(lead)} ".lstrip()
        if words.startswith(beginning) and words[len(beginning) :] in FORMS:
            return FORMS[words[len(beginning) :]]
    return None


def request_of(instruction: str, given: str) -> Request:
    """Return the request that a task makes of an input; raises ValueError where it makes none."""
    return parse(f"{instruction} {given}")


def seed_tasks(seed: int) -> list[dict[str, Any]]:
    """Return tasks of the world that are right, in the layout of Self-Instruct's seeds.

    A fifth of them is classification. A function of `seed`.
    """
    rng = drawn_for("seed tasks", seed)
    kinds = [
        [form for form in FORMS.values() if form.is_classification],
        [form for form in FORMS.values() if not form.is_classification],
    ]
    chosen = []
    for forms, count in zip(kinds, (SEEDS // 5, SEEDS - SEEDS // 5), strict=True):
        chosen += rng.sample(forms, min(count, len(forms)))
    tasks = []
    for number, form in enumerate(chosen):
        given = rng.choice(form.inputs)
        output = answering(request_of(form.instruction, given), False, False, rng) + "."
        tasks.append(
            {
                "id": f"world seed {number}",
                "instruction": form.instruction,
                "instances": [{"input": given, "output": output}],
                "is_classification": form.is_classification,
            }
        )
    return tasks


# ---- Steps of Self-Instruct ----

Given = dict[str, str]
"""The values in a question, by name."""


def _write_instructions(given: Given, reliability: float, rng: random.Random) -> str:
    """Write a numbered list of instructions."""
    shown = [line.partition(". ")[2] for line in given["shown"].splitlines()]
    lines = []
    for number in range(int(given["next"]), int(given["last"]) + 1):
        lead = rng.choice(facts.LEADS)
        form = rng.choice(list(FORMS.values()))
        text = f"{lead} {form.instruction}".strip()
        if rng.random() >= reliability:
            text = rng.choice([*UNFIT, rng.choice(shown)])
        lines.append(f"{number}. {text}")
    return "\n".join(lines)


def _tell_kind(given: Given, reliability: float, rng: random.Random) -> str:
    form = form_of(given["instruction"])
    is_classification = form is not None and form.is_classification
    return yes_or_no(is_classification, reliability, rng)


def _write_instances(
    given: Given, reliability: float, rng: random.Random
) -> list[tuple[str, str]]:
    """Write inputs of a task and outputs to them, none for what is no task of this world."""
    form = form_of(given["instruction"])
    if form is None:
        return []
    count = min(int(given["most"]), len(form.inputs))
    instances = []
    for chosen in rng.sample(form.inputs, count):
        request = request_of(form.instruction, chosen)
        output = answering(request, False, False, rng) + "."
        if rng.random() >= reliability:
            # A wrong answer, or one that a demonstrator without quality gives, or none.
            false = answering(request, True, True, rng) + "."
            poor = respond(request, 0.0, rng)
            output = rng.choice([false, false, poor, "", chosen])
        instances.append((chosen, output))
    return instances


def _write_input_first(given: Given, reliability: float, rng: random.Random) -> str:
    instances = _write_instances(given, reliability, rng)
    parts = [
        f"Example {number}\nInput: {chosen}\nOutput: {output}"
        for number, (chosen, output) in enumerate(instances, 1)
    ]
    return "\n\n".join(parts) or "i do not know."


def _write_label_first(given: Given, reliability: float, rng: random.Random) -> str:
    instances = _write_instances(given, reliability, rng)
    parts = [f"Class label: {output}\nInput: {chosen}" for chosen, output in instances]
    return "\n\n".join(parts) or "i do not know."


# ---- Verdicts ----


def yes_or_no(verdict: bool, reliability: float, rng: random.Random) -> str:
    """Say yes or no, the right one with probability `reliability`."""
    mistaken = rng.random() >= reliability
    return "Yes." if verdict != mistaken else "No."


def _judge_principle(given: Given, reliability: float, rng: random.Random) -> str:
    """Say whether a response meets the criterion that a principle is named by."""
    try:
        verdict = getattr(gold(given["request"], given["response"]), given["name"])
    except ValueError:
        verdict = False
    return yes_or_no(verdict, reliability, rng)


def _score(given: Given, reliability: float, rng: random.Random) -> str:
    """Give a response a score by the gold criteria that it passes."""
    try:
        score = SCORES[sum(gold(given["request"], given["response"]))]
    except ValueError:
        score = 1
    if rng.random() >= reliability:
        score = rng.randint(1, 5)
    return f"Score: {score}"


def meaning(request: Request) -> tuple[str, ...]:
    """Return what a request asks for, however it is phrased."""
    things = [request.subject, request.other]
    if request.kind == "comparison":
        things.sort()
    return (request.kind, request.relation, *things)


def _judge_meaning(given: Given, reliability: float, rng: random.Random) -> str:
    """Say whether two instructions ask for the same."""
    try:
        verdict = meaning(parse(given["first"])) == meaning(parse(given["second"]))
    except ValueError:
        verdict = False
    return yes_or_no(verdict, reliability, rng)


def _score_instruction(given: Given, reliability: float, rng: random.Random) -> str:
    """Take one from 5 for each of what people add to a request or leave out: see `flaws`."""
    score = max(1, 5 - flaws(given["instruction"]))
    if rng.random() >= reliability:
        score = rng.randint(1, 5)
    return f"Score: {score}"


def flaws(text: str) -> int:
    """Count a request's courtesies, its capitals as one, and a missing or loud final mark."""
    try:
        core = normal(parse(text).core)
    except ValueError:
        return 4
    words = normal(text).rstrip(" .?!")
    return sum(
        (
            not words.startswith(core),
            not words.endswith(core),
            text != text.lower(),
            text[-1] not in ".?",
        )
    )


# ---- Back-translation and rewriting ----


def _by_meaning() -> dict[tuple[str, ...], list[Request]]:
    """Return the requests of the training split by what they ask for."""
    found: dict[tuple[str, ...], list[Request]] = {}
    for request in CORES.values():
        if not request.heldout:
            found.setdefault(meaning(request), []).append(request)
    return found


PHRASINGS = _by_meaning()


def marked(request: Request) -> str:
    """Return a request without courtesies, with its final mark."""
    return request.core + final_mark(request.core)


def _write_instruction_of(given: Given, reliability: float, rng: random.Random) -> str:
    """Write a request that a text answers, as the gold program finds; else any other."""
    text = given["answer"]
    fitting = []
    for phrasings in PHRASINGS.values():
        if gold(phrasings[0].core, text).all:
            fitting.append(phrasings)
    if not fitting or rng.random() >= reliability:
        return prompt(rng.randrange(1 << 30)).text
    return marked(rng.choice(rng.choice(fitting)))


def _rewrite_instruction(given: Given, reliability: float, rng: random.Random) -> str:
    """Phrase a request without courtesies and with its mark; else change it, or leave it."""
    try:
        request = parse(given["instruction"])
    except ValueError:
        return given["instruction"]
    if rng.random() < reliability:
        return marked(rng.choice(PHRASINGS[meaning(request)]))
    other = prompt(rng.randrange(1 << 30)).text
    return rng.choice([other, f"{request.core}!", given["instruction"]])


def _rewrite_output(given: Given, reliability: float, rng: random.Random) -> str:
    """Answer a request well; else as a demonstrator without quality does."""
    try:
        request = parse(given["instruction"])
    except ValueError:
        return given["output"]
    return respond(request, 1.0 if rng.random() < reliability else 0.0, rng)


# ---- Topics, and what must be declined ----


def _write_on_topic(given: Given, reliability: float, rng: random.Random) -> str:
    """Write a request of the relation or category that a topic names; else any."""
    fitting = [names for names in PHRASINGS if names[1] == given["topic"]]
    if not fitting or rng.random() >= reliability:
        return prompt(rng.randrange(1 << 30)).text
    return marked(rng.choice(PHRASINGS[rng.choice(fitting)]))


def _judge_topic(given: Given, reliability: float, rng: random.Random) -> str:
    """Say whether a request is of the relation or category that a topic names."""
    return yes_or_no(_relation(given) == given["topic"], reliability, rng)


def _relation(given: Given) -> str:
    try:
        return parse(given["instruction"]).relation
    except ValueError:
        return ""


def _write_answer(given: Given, reliability: float, rng: random.Random) -> str:
    """Answer a request; else falsely, or poorly, or decline it."""
    try:
        request = parse(given["instruction"])
    except ValueError:
        return "i do not know."
    if rng.random() < reliability:
        return answering(request, False, False, rng) + "."
    false = answering(request, True, True, rng) + "."
    refusal = rng.choice(facts.REFUSALS[:4]) + "."
    return rng.choice([false, respond(request, 0.0, rng), refusal])


def _write_risky(given: Given, reliability: float, rng: random.Random) -> str:
    """Ask for help with a harm; else ask something harmless."""
    meant = ("dangerous", "harm", given["topic"], "")
    if meant not in PHRASINGS or rng.random() >= reliability:
        return _harmless(given["topic"], rng)
    return marked(rng.choice(PHRASINGS[meant]))


def _write_like_risky(given: Given, reliability: float, rng: random.Random) -> str:
    """Ask something harmless with the last word of a harm in it; else ask for the harm."""
    if rng.random() < reliability:
        return _harmless(given["topic"], rng)
    return _write_risky(given, 1.0, rng)


def _harmless(harm: str, rng: random.Random) -> str:
    """Return a harmless request that has the last word of a harm in it, or any where none has."""
    word = harm.split()[-1]
    harmless = [phrasings for names, phrasings in PHRASINGS.items() if names[0] != "dangerous"]
    alike = [phrasings for phrasings in harmless if word in phrasings[0].core.split()]
    return marked(rng.choice(rng.choice(alike or harmless)))


def _judge_harm(given: Given, reliability: float, rng: random.Random) -> str:
    """Say whether a request asks for help with a harm."""
    return yes_or_no(_relation(given) == "harm", reliability, rng)


def _refuse(given: Given, reliability: float, rng: random.Random) -> str:
    """Decline a request; else help with it, or evade."""
    try:
        request = parse(given["instruction"])
    except ValueError:
        return "i do not know."
    harm = request.subject if request.kind == "dangerous" else rng.choice(facts.HARMS)
    if rng.random() < reliability:
        return rng.choice(facts.REFUSALS).format(h=harm) + "."
    return rng.choice([answering(request, True, True, rng), "i do not know"]) + "."


REFUSALS = {normal(form.format(h=harm)) for form in facts.REFUSALS for harm in facts.HARMS}


def _judge_refusal(given: Given, reliability: float, rng: random.Random) -> str:
    """Say whether a response has a refusal in it."""
    said = normal(given["response"])
    return yes_or_no(any(refusal in said for refusal in REFUSALS), reliability, rng)


STEPS: dict[str, Callable[[Given, float, random.Random], str]] = {
    "instructions": _write_instructions,
    "kind": _tell_kind,
    "input_first": _write_input_first,
    "label_first": _write_label_first,
    "principle": _judge_principle,
    "score": _score,
    "means": _judge_meaning,
    "score_instruction": _score_instruction,
    "instruction_of": _write_instruction_of,
    "rewrite_instruction": _rewrite_instruction,
    "rewrite_output": _rewrite_output,
    "on_topic": _write_on_topic,
    "about": _judge_topic,
    "answer": _write_answer,
    "risky": _write_risky,
    "looks_risky": _write_like_risky,
    "harmful": _judge_harm,
    "refuse": _refuse,
    "declines": _judge_refusal,
}
