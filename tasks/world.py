"""The built-in world: an endless stream of requests, demonstrators of set quality, simulated labellers, and a
gold program that scores any response. Everything is a function of (index, seed); nothing is downloaded.
"""

import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tasks import world_facts as facts
from tasks.world_facts import FACTS
from tasks.world_gold import CORES, Gold, Request, extract_answer, gold, normal, parse

__all__ = [
    "FACTS",
    "FAILURES",
    "KINDS",
    "RELATIONS",
    "Gold",
    "Request",
    "answering",
    "comparison",
    "criterion_of",
    "demonstration",
    "drawn_for",
    "extract_answer",
    "gold",
    "judgement",
    "noise_ceiling",
    "parse",
    "prompt",
    "rank",
    "respond",
    "text",
]

RELATIONS = tuple(FACTS)
# Kind of request -> its share of the prompts.
KINDS = {
    "lookup": 0.42,
    "unknowable": 0.116,
    "dangerous": 0.116,
    "comparison": 0.116,
    "listing": 0.116,
    "small_talk": 0.116,
}
# A demonstrator of quality q fails each criterion independently, with probability (1 - q) times:
FAILURES = {  # (helpful, honest, harmless)
    "lookup": (0.40, 0.65, 0.40),
    "unknowable": (0.40, 0.65, 0.40),
    "dangerous": (0.45, 0.00, 0.95),
    "comparison": (0.40, 0.65, 0.40),
    "listing": (0.40, 0.65, 0.40),
    "small_talk": (0.70, 0.00, 0.65),
}
MAX_WORDS = 18  # above this a demonstrator drops closer and opener


# ---- Requests ----


def drawn_for(*key) -> random.Random:
    """Random numbers that are a function of `key`."""
    return random.Random("/".join(map(str, key)))


def _groups() -> dict[tuple[str, str], list[list[Request]]]:
    """(split, kind) -> requests grouped by what they ask, so that every fact is as frequent as any other."""
    groups: dict = {}
    for request in CORES.values():
        split = "heldout" if request.heldout else "train"
        pair = request.kind == "comparison"
        about = (request.relation, *(() if pair else (request.subject, request.other)))
        groups.setdefault((split, request.kind), {}).setdefault(about, []).append(request)
    return {key: list(members.values()) for key, members in groups.items()}


_GROUPS = _groups()


def _draw(rng: random.Random, split: str, kind: str | None = None) -> Request:
    kind = kind or rng.choices(list(KINDS), KINDS.values())[0]
    request = rng.choice(rng.choice(_GROUPS[split, kind]))
    small = kind == "small_talk"
    lead = rng.choice(facts.SMALL_LEADS if small else facts.LEADS)
    tail = rng.choice(facts.SMALL_TAILS if small else facts.TAILS)
    mark = (
        "?"
        if re.match(r"what|wh|how|is |are |do |can |of |an? |the |i want", request.core)
        else "."
    )
    return replace(request, text=f"{lead} {request.core} {tail}".strip() + mark)


def prompt(index: int, *, split: str = "train", seed: int = 0) -> Request:
    """Request number `index` of a split, train or heldout; the two share no phrasing of the same subject."""
    return _draw(drawn_for("prompt", split, seed, index), split)


# ---- Demonstrators ----


def _join(items: Sequence[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]


def _state(relation: str, subject: str, wrong: bool, rng: random.Random) -> str:
    """A statement of a fact; a wrong answer is uniform over the relation's others."""
    answer = FACTS[relation].get(subject)
    if wrong or answer is None:
        answer = rng.choice(sorted(set(FACTS[relation].values()) - {answer}))
    return rng.choice(facts.STATEMENTS[relation]).format(s=subject, a=answer)


def _claim(request: Request, wrong: bool, rng: random.Random) -> str:
    """A true or false answer to a lookup or comparison that is understood without its question."""
    if request.kind == "lookup":
        return _state(request.relation, request.subject, wrong, rng)
    loser = request.other if request.answer == request.subject else request.subject
    x, y = (loser, request.answer) if wrong else (request.answer, loser)
    return facts.ORDERINGS[0].format(x=x, y=y, w=request.relation)


def _enumerate(
    category: str, number: str, size: int, wrong: bool, twice: bool, rng: random.Random
) -> str:
    items = rng.sample(facts.CATEGORIES[category], size)
    if wrong:
        alien = rng.choice([other for other in facts.CATEGORIES if other != category])
        items[rng.randrange(size)] = rng.choice(facts.CATEGORIES[alien])
    items.sort()  # a habit of these writers; the gold program takes any order
    if twice:
        items[-1] = items[0]
    return rng.choice(facts.ENUMERATIONS).format(items=_join(items), c=category, n=number)


def answering(request: Request, wrong: bool, comply: bool, rng: random.Random) -> str:
    """A sentence that answers the request: rightly, or with something false, or by helping with harm."""
    kind, relation, subject = request.kind, request.relation, request.subject
    if kind == "small_talk":
        return rng.choice(facts.SMALL_TALK[relation][2])
    if kind == "dangerous":
        form = rng.choice(facts.COMPLIANCE if comply else facts.REFUSALS)
        return form.format(h=subject, tool=rng.choice(facts.TOOLS))
    if kind == "listing":
        return _enumerate(relation, subject, facts.COUNTS[subject], wrong, False, rng)
    if kind == "unknowable" and not wrong:
        return rng.choice(facts.IGNORANCE)
    if kind == "comparison":
        loser = request.other if request.answer == subject else request.subject
        x, y = (loser, request.answer) if wrong else (request.answer, loser)
        return rng.choice(facts.ORDERINGS + facts.SHORT).format(x=x, y=y, a=x, w=relation)
    if relation not in FACTS:  # a made-up answer
        guess = rng.choice(facts.UNKNOWABLE[relation][3])
        return rng.choice((request.other.format(g=guess), rng.choice(facts.SHORT).format(a=guess)))
    if rng.random() < 0.6:
        return _state(relation, subject, wrong, rng)
    answers = (
        sorted(set(FACTS[relation].values()) - {request.answer}) if wrong else [request.answer]
    )
    article = "a " if relation in facts.ARTICLE else ""
    return rng.choice(facts.SHORT).format(a=article + rng.choice(answers))


def _miss(request: Request, wrong: bool, rng: random.Random) -> str:
    """An animal that was not among the two; a listing too short, too long, or with an item twice."""
    if request.kind == "comparison":
        third = rng.choice(
            [animal for animal in facts.SIZES if animal not in (request.subject, request.other)]
        )
        return rng.choice(facts.ORDERINGS[1:] + facts.SHORT).format(
            x=third, a=third, w=request.relation
        )
    size, twice = rng.choice(
        ((1, False), (4, False), *((facts.COUNTS[request.subject], True),) * 2)
    )
    wrong = wrong and not (twice and size == 2)
    return _enumerate(request.relation, request.subject, size, wrong, twice, rng)


def _stray(request: Request, wrong: bool, rng: random.Random) -> list[str]:
    """Sentences that do not answer the request: off topic, a copy of it, a hedge, repetition,
    two answers, too few items, or an animal that was not among the two."""
    modes = ["astray", "repeat"] + (["contradict"] if wrong else ["echo", "hedge", "hedge"])
    if request.kind in ("listing", "comparison") and rng.random() < 0.5:
        return [_miss(request, wrong, rng)]
    mode = rng.choice(modes)
    if mode == "echo":
        return [request.core + "?"]
    if mode == "hedge":
        harm = rng.choice(facts.HARMS)
        hedges = {"unknowable": facts.REFUSALS[:4], "dangerous": facts.IGNORANCE}
        return [
            rng.choice(hedges.get(request.kind, facts.IGNORANCE + facts.REFUSALS[:4])).format(
                h=harm
            )
        ]
    if mode == "astray":
        if request.kind == "small_talk" and rng.random() < 0.7:
            topic = rng.choice([topic for topic in facts.SMALL_TALK if topic != request.relation])
            return [rng.choice(facts.SMALL_TALK[topic][2])]
        near = request.relation in FACTS and rng.random() < 0.6
        relation = request.relation if near else rng.choice(RELATIONS)
        subject = rng.choice(
            [subject for subject in FACTS[relation] if subject != request.subject]
        )
        return [_state(relation, subject, wrong, rng)]
    first, second = (
        min((answering(request, false, False, rng) for _ in range(3)), key=len)  # twice: short
        for false in (wrong, False)
    )
    return [first, first if mode == "repeat" else second]


def respond(request: Request, quality: float, rng: random.Random) -> str:
    """A response by a demonstrator of `quality` in [0, 1]; 1 always passes all criteria (see FAILURES)."""
    unhelpful, wrong, harmful = (
        rng.random() < rate * (1 - quality) for rate in FAILURES[request.kind]
    )
    comply = harmful and not unhelpful and request.kind == "dangerous" and rng.random() < 0.6
    body = _stray(request, wrong, rng) if unhelpful else [answering(request, wrong, comply, rng)]
    body = [sentence if sentence[-1] == "?" else sentence + "." for sentence in body]
    echo = body[0][-1] == "?"
    opener = [rng.choice(facts.OPENERS[request.kind])] if echo or rng.random() < 0.6 else []
    closer = [rng.choice(facts.CLOSERS[request.kind])] if rng.random() < 0.35 else []
    if harmful and not comply:
        insult = rng.choice(facts.INSULTS) + "."
        body = [insult, *body] if opener and rng.random() < 0.5 else [*body, insult]
    words = len(normal(" ".join(body)).split())
    for courtesy in (closer, [] if echo else opener):
        if words + len(normal(" ".join(opener + closer)).split()) > MAX_WORDS:
            courtesy.clear()
    return " ".join(opener + body + closer)


def demonstration(
    index: int, *, split: str = "train", quality: float = 0.7, seed: int = 0
) -> dict[str, str]:
    """Prompt number `index` with a demonstrator's response."""
    request = prompt(index, split=split, seed=seed)
    response = respond(request, quality, drawn_for("demonstration", split, seed, index))
    return {"prompt": request.text, "response": response}


# ---- The base corpus ----


def _statements(rng: random.Random) -> Iterator[str]:
    """Facts of one relation, or all that is known of one subject; a twelfth of them wrong."""
    relation = rng.choices(RELATIONS, [len(FACTS[relation]) for relation in RELATIONS])[0]
    pairs = [(relation, subject) for subject in rng.sample(list(FACTS[relation]), 6)]
    if rng.random() < 0.2:
        subject = rng.choice([*FACTS["sound"], *FACTS["young"], *FACTS["home"]])
        pairs = [(relation, subject) for relation in RELATIONS if subject in FACTS[relation]] * 3
    for relation, subject in pairs[: rng.randint(5, 7)]:
        yield rng.choice(facts.ASIDES) + _state(relation, subject, rng.random() < 0.08, rng) + "."


def _exchanges(rng: random.Random) -> Iterator[str]:
    """Questions and answers of mixed quality, as in a forum."""
    for _ in range(rng.randint(2, 3)):
        request = _draw(rng, "train")
        yield f"{request.text} {respond(request, rng.choice((0.6, 0.8, 0.9)), rng)}"


def _lists(rng: random.Random) -> Iterator[str]:
    """Members of categories, and which animal is bigger."""
    for _ in range(rng.randint(3, 4)):
        number = rng.choice(list(facts.COUNTS))
        category, wrong = rng.choice(list(facts.CATEGORIES)), rng.random() < 0.08
        yield _enumerate(category, number, facts.COUNTS[number], wrong, False, rng) + "."
        x, y = sorted(rng.sample(facts.SIZES, 2), key=facts.SIZES.index)
        if (rng.random() < 0.5) != (rng.random() < 0.08):
            yield f"{y} is bigger than {x}."
        else:
            yield f"{x} is smaller than {y}."


def _quizzes(rng: random.Random) -> Iterator[str]:
    """Answers and claims, half of them wrong, each with a verdict: here a model learns to check what it reads."""
    for _ in range(rng.randint(3, 4)):
        request = _draw(
            rng, "train", rng.choices(("lookup", "comparison", "listing"), (6, 2, 2))[0]
        )
        wrong = rng.random() < 0.5
        if wrong and request.kind != "lookup" and rng.random() < 0.5:
            claim = f"{request.text} {_miss(request, False, rng)}"
        elif request.kind == "listing" or rng.random() < 0.7:
            claim = f"{request.text} {answering(request, wrong, False, rng)}"
        else:
            claim = _claim(request, wrong, rng)
        yield f"{claim}. {rng.choice(facts.VERDICTS[wrong])}."


def _remarks_overheard(rng: random.Random) -> Iterator[str]:
    """Polite and rude remarks, ignorance, refusals, small talk."""
    for _ in range(rng.randint(4, 6)):
        row = rng.choice(list(facts.SMALL_TALK.values()))
        refusal = rng.choice(facts.REFUSALS).format(h=rng.choice(facts.HARMS))
        pools = (row[0], row[2], facts.INSULTS, facts.IGNORANCE, (refusal,))
        yield rng.choice(rng.choice(pools)) + "."
        yield rng.choice(rng.choice(list(facts.OPENERS.values()) + list(facts.CLOSERS.values())))


def text(index: int, *, seed: int = 0) -> str:
    """Document number `index` of the base corpus: mixed quality, 20 to 90 words, training phrasings only."""
    rng = drawn_for("text", seed, index)
    sort = rng.choices(
        (_statements, _quizzes, _exchanges, _lists, _remarks_overheard), (30, 32, 13, 20, 5)
    )[0]
    return " ".join(sort(rng))


# ---- Labellers ----


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def rank(prompt: str, responses: Sequence[str], *, noise: float, rng: random.Random) -> list[int]:
    """Rank of each response (0 is best) by a labeller who sees gold totals through Gumbel noise:
    Plackett-Luce over the distinct totals, hence Bradley-Terry for a pair, P(i beats j) =
    sigmoid((total_i - total_j) / noise). Equal totals share a rank: the labeller sees no difference."""
    totals = [gold(prompt, response).total for response in responses]
    seen = {
        t: t - noise * math.log(rng.expovariate(1.0)) if noise > 0 else t
        for t in sorted(set(totals))
    }
    return [sum(seen[other] > seen[total] for other in totals) for total in totals]


def comparison(
    index: int, *, split: str = "train", quality: float = 0.7, noise: float = 0.0, seed: int = 0
) -> dict[str, str]:
    """Prompt number `index` with two responses of different gold totals, ranked by a noisy labeller."""
    request = prompt(index, split=split, seed=seed)
    rng = drawn_for("comparison", split, seed, index)
    pair = [respond(request, quality, rng) for _ in range(2)]
    while gold(request.text, pair[0]).total == gold(request.text, pair[1]).total:
        pair = [respond(request, quality, rng) for _ in range(2)]
    first = rank(request.text, pair, noise=noise, rng=rng)[0] == 0
    chosen, rejected = pair if first else pair[::-1]
    return {"prompt": request.text, "chosen": chosen, "rejected": rejected}


def judgement(
    index: int, *, split: str = "train", quality: float = 0.7, seed: int = 0
) -> dict[str, str | bool]:
    """Demonstration number `index`, desirable where it passes all three criteria."""
    shown = demonstration(index, split=split, quality=quality, seed=seed)
    return shown | {"desirable": bool(gold(shown["prompt"], shown["response"]).all)}


def noise_ceiling(pairs: Iterable[tuple[str, str, str]], noise: float) -> float:
    """Expected accuracy of the best predictor of noisy labels over (prompt, a, b) triples, ties left out."""
    gaps = [abs(gold(text, a).total - gold(text, b).total) for text, a, b in pairs]
    chances = [_sigmoid(gap / noise) if noise > 0 else 1.0 for gap in gaps if gap]
    return sum(chances) / len(chances) if chances else float("nan")


def criterion_of(prompt: str, a: str, b: str) -> str:
    """How two responses differ: helpful, honest, harmless, several or none; facts for honesty on a lookup."""
    verdicts = zip(Gold._fields, gold(prompt, a), gold(prompt, b), strict=True)
    differ = [name for name, x, y in verdicts if x != y]
    if differ == ["honest"] and parse(prompt).kind == "lookup":
        return "facts"
    return "none" if not differ else differ[0] if len(differ) == 1 else "several"
