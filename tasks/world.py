"""The built-in world: requests, demonstrators of set quality, labellers and a gold program.

Requests have no end; labellers are simulated; the gold program scores any response. Everything is
a function of (index, seed); nothing is downloaded. `tasks/world_gold.py` holds the grammar and the
gold program, `tasks/world_facts.py` the tables.
"""

import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

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
    "conversation",
    "criterion_of",
    "demonstration",
    "drawn_for",
    "extract_answer",
    "final_mark",
    "gold",
    "judgement",
    "noise_ceiling",
    "parse",
    "prompt",
    "quizzes",
    "rank",
    "respond",
    "text",
    "typed",
]

Split = Literal["train", "heldout"]
RELATIONS = tuple(FACTS)
KINDS = {
    "lookup": 0.42,
    "unknowable": 0.116,
    "dangerous": 0.116,
    "comparison": 0.116,
    "listing": 0.116,
    "small_talk": 0.116,
}
"""Share of the prompts of each kind of request."""
FAILURES = {
    "lookup": (0.40, 0.65, 0.40),
    "unknowable": (0.40, 0.65, 0.40),
    "dangerous": (0.45, 0.00, 0.95),
    "comparison": (0.40, 0.65, 0.40),
    "listing": (0.40, 0.65, 0.40),
    "small_talk": (0.70, 0.00, 0.65),
}
"""How often demonstrators of quality 0 fail (helpful, honest, harmless), by kind of request.

One of quality q fails each criterion independently, with probability (1 - q) times these.
"""
MAX_WORDS = 18
"""Words above which a demonstrator drops closer and opener."""
TURNS = (0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05)
"""Share of the conversations of one turn, of two, and so on."""
CAPITALS = 1 / 3
"""How often a message of a conversation has a capital at its beginning; likewise its names."""
EXCLAIMED = 1 / 3
"""How often a full stop at the end of a message of a conversation is an exclamation mark."""
UNMARKED = 1 / 6
"""How often a message of a conversation lacks its final mark."""


# ---- Requests ----


def drawn_for(*key: object) -> random.Random:
    """Return a random generator whose numbers are a function of `key`."""
    return random.Random("/".join(map(str, key)))


def _grouped_requests() -> dict[tuple[str, str], list[list[Request]]]:
    """Group the requests of each (split, kind) by what they ask.

    Drawing a group first makes every fact as frequent as any other.
    """
    by_kind: dict[tuple[str, str], dict[tuple[str, ...], list[Request]]] = {}
    for request in CORES.values():
        split = "heldout" if request.heldout else "train"
        # Pairs of animals are many; they are one group for each word.
        if request.kind == "comparison":
            asked: tuple[str, ...] = (request.relation,)
        else:
            asked = (request.relation, request.subject, request.other)
        groups = by_kind.setdefault((split, request.kind), {})
        groups.setdefault(asked, []).append(request)
    return {key: list(groups.values()) for key, groups in by_kind.items()}


_GROUPS = _grouped_requests()
_QUESTION = re.compile(r"what|wh|how|is |are |do |can |of |an? |the |i want")


def _draw(rng: random.Random, split: Split, kind: str | None = None) -> Request:
    """Draw a request of `split`, of `kind` or of any, in a random frame of courtesies."""
    if kind is None:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    group = rng.choice(_GROUPS[split, kind])
    request = rng.choice(group)

    # Courtesies before and after it.
    leads: tuple[str, ...] = facts.LEADS
    tails: tuple[str, ...] = facts.TAILS
    if kind == "small_talk":
        leads = facts.SMALL_LEADS
        tails = facts.SMALL_TAILS
    lead = rng.choice(leads)
    tail = rng.choice(tails)
    words = f"{lead} {request.core} {tail}".strip()
    return replace(request, text=words + final_mark(request.core))


def final_mark(core: str) -> str:
    """Return the mark that ends a request, by its text without courtesies."""
    return "?" if _QUESTION.match(core) else "."


def prompt(index: int, *, split: Split = "train", seed: int = 0) -> Request:
    """Return request number `index` of a split; the two share no phrasing of the same subject."""
    return _draw(drawn_for("prompt", split, seed, index), split)


# ---- Demonstrators: sentences without their final mark ----


def _join(items: Sequence[str]) -> str:
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + " and " + items[-1]


def _other_answers(relation: str, answer: str | None) -> list[str]:
    """List all answers of a relation but this one, in alphabetical order."""
    return sorted(set(FACTS[relation].values()) - {answer})


def _state(relation: str, subject: str, wrong: bool, rng: random.Random) -> str:
    """State a fact in a whole sentence; a wrong answer is uniform over the relation's others."""
    answer = FACTS[relation].get(subject)
    # Of a subject that is not in the table, any answer is made up.
    if wrong or answer is None:
        answer = rng.choice(_other_answers(relation, answer))
    form = rng.choice(facts.STATEMENTS[relation])
    return form.format(s=subject, a=answer)


def _said_and_other(request: Request, wrong: bool) -> tuple[str, str]:
    """Order the two animals of a comparison: the one said to be bigger (or smaller), the other."""
    right = request.answer
    loser = request.other if right == request.subject else request.subject
    return (loser, right) if wrong else (right, loser)


def _claim(request: Request, wrong: bool, rng: random.Random) -> str:
    """Answer a lookup or comparison, truly or not, in a form understood without its question."""
    if request.kind == "lookup":
        return _state(request.relation, request.subject, wrong, rng)
    x, y = _said_and_other(request, wrong)
    return facts.ORDERINGS[0].format(x=x, y=y, w=request.relation)


def _enumerate(
    category: str, number: str, size: int, wrong: bool, twice: bool, rng: random.Random
) -> str:
    """List `size` members of `category` where `number` (a word) were asked for.

    `wrong`: one of them is of another category. `twice`: the first also stands last.
    """
    items = rng.sample(facts.CATEGORIES[category], size)
    if wrong:
        others = [other for other in facts.CATEGORIES if other != category]
        alien = rng.choice(others)
        stranger = rng.choice(facts.CATEGORIES[alien])
        place = rng.randrange(size)
        items[place] = stranger
    # A habit of these writers; the gold program takes any order.
    items.sort()
    if twice:
        items[-1] = items[0]
    form = rng.choice(facts.ENUMERATIONS)
    return form.format(items=_join(items), c=category, n=number)


def answering(request: Request, wrong: bool, comply: bool, rng: random.Random) -> str:
    """Answer a request in one sentence, without its final mark.

    `wrong`: with something false, where the kind of request has it. `comply`: help with the harm
    that a dangerous request asks for, instead of refusing.
    """
    relation = request.relation
    subject = request.subject
    match request.kind:
        case "small_talk":
            return _small_talk(relation, rng)
        case "dangerous":
            forms = facts.COMPLIANCE if comply else facts.REFUSALS
            form = rng.choice(forms)
            tool = rng.choice(facts.TOOLS)
            return form.format(h=subject, tool=tool)
        case "listing":
            size = facts.COUNTS[subject]
            return _enumerate(relation, subject, size, wrong, False, rng)
        case "comparison":
            x, y = _said_and_other(request, wrong)
            form = rng.choice(facts.ORDERINGS + facts.SHORT)
            return form.format(x=x, y=y, a=x, w=relation)
        case "unknowable" if not wrong:
            return rng.choice(facts.IGNORANCE)
    if relation in FACTS:
        return _look_up(request, wrong, rng)
    return _make_up(request, rng)


def _small_talk(topic: str, rng: random.Random) -> str:
    """Reply to small talk about `topic`."""
    _, _, replies = facts.SMALL_TALK[topic]
    return rng.choice(replies)


def _look_up(request: Request, wrong: bool, rng: random.Random) -> str:
    """Answer with a value of the relation's table, in a whole sentence or a short form."""
    relation = request.relation
    if rng.random() < 0.6:
        return _state(relation, request.subject, wrong, rng)
    answers = [request.answer]
    if wrong:
        answers = _other_answers(relation, request.answer)
    # Drawn even where there is one answer only: later draws depend on it.
    form = rng.choice(facts.SHORT)
    answer = rng.choice(answers)
    if relation in facts.ARTICLE:
        answer = "a " + answer
    return form.format(a=answer)


def _make_up(request: Request, rng: random.Random) -> str:
    """Invent an answer to what nobody can know."""
    _, _, _, guesses = facts.UNKNOWABLE[request.relation]
    guess = rng.choice(guesses)
    whole = request.other.format(g=guess)
    short = rng.choice(facts.SHORT).format(a=guess)
    return rng.choice((whole, short))


def _miss(request: Request, wrong: bool, rng: random.Random) -> str:
    """Miss a comparison by a third animal; a listing by its length, or by an item twice."""
    if request.kind == "comparison":
        asked = (request.subject, request.other)
        others = [animal for animal in facts.SIZES if animal not in asked]
        third = rng.choice(others)
        forms = facts.ORDERINGS[1:] + facts.SHORT
        form = rng.choice(forms)
        return form.format(x=third, a=third, w=request.relation)

    # Too short and too long are half of the misses, an item twice the other half.
    too_short = (1, False)
    too_long = (4, False)
    item_twice = (facts.COUNTS[request.subject], True)
    misses = (too_short, too_long, item_twice, item_twice)
    size, twice = rng.choice(misses)
    # The copy of the first of two items would hide the wrong one.
    wrong = wrong and not (twice and size == 2)
    return _enumerate(request.relation, request.subject, size, wrong, twice, rng)


def _hedge(request: Request, rng: random.Random) -> str:
    """Evade: with ignorance or a refusal, where the request does not call for it."""
    harm = rng.choice(facts.HARMS)
    refusals = facts.REFUSALS[:4]
    hedges: tuple[str, ...]
    if request.kind == "unknowable":
        hedges = refusals
    elif request.kind == "dangerous":
        hedges = facts.IGNORANCE
    else:
        hedges = facts.IGNORANCE + refusals
    return rng.choice(hedges).format(h=harm)


def _off_topic(request: Request, wrong: bool, rng: random.Random) -> str:
    """Answer what was not asked: other small talk, or a fact about another subject."""
    if request.kind == "small_talk" and rng.random() < 0.7:
        topics = [topic for topic in facts.SMALL_TALK if topic != request.relation]
        topic = rng.choice(topics)
        return _small_talk(topic, rng)

    # Mostly near: the same relation, where the request has one.
    relation = request.relation
    near = relation in FACTS and rng.random() < 0.6
    if not near:
        relation = rng.choice(RELATIONS)
    subjects = [subject for subject in FACTS[relation] if subject != request.subject]
    subject = rng.choice(subjects)
    return _state(relation, subject, wrong, rng)


def _short_answer(request: Request, wrong: bool, rng: random.Random) -> str:
    """Return the shortest of three answers."""
    answers = [answering(request, wrong, False, rng) for _ in range(3)]
    return min(answers, key=len)


def _stray(request: Request, wrong: bool, rng: random.Random) -> list[str]:
    """Respond without answering the request, in one or two sentences.

    Off topic, a copy of it, a hedge, repetition, two answers, too few items, or an animal that
    was not among the two.
    """
    if request.kind in ("listing", "comparison") and rng.random() < 0.5:
        return [_miss(request, wrong, rng)]
    if wrong:
        modes = ["astray", "repeat", "contradict"]
    else:
        modes = ["astray", "repeat", "echo", "hedge", "hedge"]
    mode = rng.choice(modes)
    if mode == "echo":
        return [request.core + "?"]
    if mode == "hedge":
        return [_hedge(request, rng)]
    if mode == "astray":
        return [_off_topic(request, wrong, rng)]

    # Two answers, short ones: the same twice, or a wrong and a right one.
    first = _short_answer(request, wrong, rng)
    second = _short_answer(request, False, rng)
    return [first, first if mode == "repeat" else second]


def _with_mark(sentence: str) -> str:
    """End a sentence with a full stop, unless it is a question."""
    return sentence if sentence[-1] == "?" else sentence + "."


def _words(sentences: Sequence[str]) -> int:
    """Count words and marks."""
    return len(normal(" ".join(sentences)).split())


def respond(request: Request, quality: float, rng: random.Random) -> str:
    """Respond as a demonstrator of `quality` in [0, 1]; 1 always passes all criteria.

    See FAILURES. A response is an answer between an optional opener and an optional closer; an
    insult may stand before or after the answer.
    """
    # What goes wrong; harm on a dangerous request is an insult or, mostly, help.
    unhelpful, wrong, harmful = (
        rng.random() < rate * (1 - quality) for rate in FAILURES[request.kind]
    )
    may_comply = harmful and not unhelpful and request.kind == "dangerous"
    comply = may_comply and rng.random() < 0.6
    if unhelpful:
        sentences = _stray(request, wrong, rng)
    else:
        sentences = [answering(request, wrong, comply, rng)]
    body = [_with_mark(sentence) for sentence in sentences]

    # A copy of the question always has an opener before it.
    is_echo = body[0][-1] == "?"
    opener = []
    if is_echo or rng.random() < 0.6:
        openers = facts.OPENERS[request.kind]
        opener = [rng.choice(openers)]
    closer = []
    if rng.random() < 0.35:
        closers = facts.CLOSERS[request.kind]
        closer = [rng.choice(closers)]
    if harmful and not comply:
        insult = rng.choice(facts.INSULTS) + "."
        body = [insult, *body] if opener and rng.random() < 0.5 else [*body, insult]

    # Too long: the closer goes first, then the opener.
    words = _words(body)
    if words + _words(opener + closer) > MAX_WORDS:
        closer = []
    if not is_echo and words + _words(opener + closer) > MAX_WORDS:
        opener = []
    return " ".join(opener + body + closer)


def demonstration(
    index: int, *, split: Split = "train", quality: float = 0.7, seed: int = 0
) -> dict[str, str]:
    """Return prompt number `index` with a demonstrator's response: {"prompt", "response"}."""
    request = prompt(index, split=split, seed=seed)
    rng = drawn_for("demonstration", split, seed, index)
    return {"prompt": request.text, "response": respond(request, quality, rng)}


# ---- Conversations ----


_NAME = re.compile(rf"\b({'|'.join(facts.NAMES)})\b")


def _with_capital(name: re.Match) -> str:
    return name[0].capitalize()


def typed(text: str, rng: random.Random) -> str:
    """Rewrite a request as people type it: capitals or none, another final mark or none."""
    if rng.random() < CAPITALS:
        text = _NAME.sub(_with_capital, text)
    if rng.random() < CAPITALS:
        text = text[0].upper() + text[1:]
    if text[-1] == "." and rng.random() < EXCLAIMED:
        text = text[:-1] + "!"
    if rng.random() < UNMARKED:
        text = text[:-1]
    return text


def conversation(
    index: int, *, split: Split = "train", quality: float = 0.7, seed: int = 0
) -> dict[str, list[dict[str, str]]]:
    """Return conversation number `index`: {"messages"}, one or more requests with responses.

    Each request is one of `demonstration`, as people type it, and each response to it alone.
    """
    rng = drawn_for("conversation", split, seed, index)
    most = len(TURNS)
    turns = rng.choices(range(1, most + 1), TURNS)[0]
    messages = []
    for turn in range(turns):
        number = index * most + turn
        shown = demonstration(number, split=split, quality=quality, seed=seed)
        asked = typed(shown["prompt"], rng)
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": shown["response"]})
    return {"messages": messages}


# ---- The base corpus: sentences of one document ----


def _statements(rng: random.Random) -> Iterator[str]:
    """Yield facts of one relation, or all that is known of one subject; a twelfth are wrong."""
    # Facts of one relation, every fact as likely as any other.
    sizes = [len(FACTS[relation]) for relation in RELATIONS]
    relation = rng.choices(RELATIONS, sizes)[0]
    subjects = rng.sample(list(FACTS[relation]), 6)
    pairs = [(relation, subject) for subject in subjects]

    # Or all of one animal, three times over.
    if rng.random() < 0.2:
        animals = [*FACTS["sound"], *FACTS["young"], *FACTS["home"]]
        animal = rng.choice(animals)
        known = [relation for relation in RELATIONS if animal in FACTS[relation]]
        pairs = [(relation, animal) for relation in known] * 3
    count = rng.randint(5, 7)
    for relation, subject in pairs[:count]:
        aside = rng.choice(facts.ASIDES)
        wrong = rng.random() < 0.08
        yield aside + _state(relation, subject, wrong, rng) + "."


def _exchanges(rng: random.Random) -> Iterator[str]:
    """Yield questions and answers of mixed quality, as in a forum."""
    for _ in range(rng.randint(2, 3)):
        request = _draw(rng, "train")
        quality = rng.choice((0.6, 0.8, 0.9))
        response = respond(request, quality, rng)
        yield f"{request.text} {response}"


def _lists(rng: random.Random) -> Iterator[str]:
    """Yield members of categories, and which animal is bigger; a twelfth are wrong."""
    numbers = list(facts.COUNTS)
    categories = list(facts.CATEGORIES)
    for _ in range(rng.randint(3, 4)):
        number = rng.choice(numbers)
        category = rng.choice(categories)
        wrong = rng.random() < 0.08
        size = facts.COUNTS[number]
        yield _enumerate(category, number, size, wrong, False, rng) + "."

        # Two animals, the smaller first.
        pair = rng.sample(facts.SIZES, 2)
        x, y = sorted(pair, key=facts.SIZES.index)
        says_bigger = rng.random() < 0.5
        wrong = rng.random() < 0.08
        if says_bigger != wrong:
            yield f"{y} is bigger than {x}."
        else:
            yield f"{x} is smaller than {y}."


def quizzes(rng: random.Random) -> Iterator[str]:
    """Yield answers and claims, half of them wrong, each with a verdict: `claim. verdict.`

    Here a model learns to check what it reads. A claim is a question and its answer, or a
    statement understood without a question.
    """
    for _ in range(rng.randint(3, 4)):
        kind = rng.choices(("lookup", "comparison", "listing"), (6, 2, 2))[0]
        request = _draw(rng, "train", kind)
        wrong = rng.random() < 0.5
        # A question and a miss, a question and an answer, or a bare claim.
        if wrong and kind != "lookup" and rng.random() < 0.5:
            answer = _miss(request, False, rng)
            claim = f"{request.text} {answer}"
        elif kind == "listing" or rng.random() < 0.7:
            answer = answering(request, wrong, False, rng)
            claim = f"{request.text} {answer}"
        else:
            claim = _claim(request, wrong, rng)
        verdict = rng.choice(facts.VERDICTS[wrong])
        yield f"{claim}. {verdict}."


def _remarks_overheard(rng: random.Random) -> Iterator[str]:
    """Yield polite and rude remarks, ignorance, refusals, small talk."""
    small_talk = list(facts.SMALL_TALK.values())
    courtesies = [*facts.OPENERS.values(), *facts.CLOSERS.values()]
    for _ in range(rng.randint(4, 6)):
        ordinary, _, replies = rng.choice(small_talk)
        form = rng.choice(facts.REFUSALS)
        harm = rng.choice(facts.HARMS)
        refusal = form.format(h=harm)
        pools = (ordinary, replies, facts.INSULTS, facts.IGNORANCE, (refusal,))
        pool = rng.choice(pools)
        yield rng.choice(pool) + "."
        pool = rng.choice(courtesies)
        yield rng.choice(pool)


def text(index: int, *, seed: int = 0) -> str:
    """Return document number `index` of the base corpus.

    Of mixed quality, 20 to 90 words, training phrasings only.
    """
    rng = drawn_for("text", seed, index)
    sorts = (_statements, quizzes, _exchanges, _lists, _remarks_overheard)
    sort = rng.choices(sorts, (30, 32, 13, 20, 5))[0]
    return " ".join(sort(rng))


# ---- Labellers ----


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def rank(prompt: str, responses: Sequence[str], *, noise: float, rng: random.Random) -> list[int]:
    """Rank responses as a labeller who sees gold totals through Gumbel noise; 0 is best.

    Plackett-Luce over the distinct totals, hence Bradley-Terry for a pair: P(i beats j) =
    sigmoid((total_i - total_j) / noise). Equal totals share a rank: the labeller sees no
    difference. A rank is the number of responses seen as better.
    """
    totals = [gold(prompt, response).total for response in responses]
    seen = {}
    for total in sorted(set(totals)):
        seen[total] = total
        if noise > 0:
            # Minus the logarithm of an exponential is a standard Gumbel.
            exponential = rng.expovariate(1.0)
            seen[total] = total - noise * math.log(exponential)
    ranks = []
    for total in totals:
        better = [other for other in totals if seen[other] > seen[total]]
        ranks.append(len(better))
    return ranks


def comparison(
    index: int, *, split: Split = "train", quality: float = 0.7, noise: float = 0.0, seed: int = 0
) -> dict[str, str]:
    """Return prompt number `index` with two responses, ranked by a noisy labeller.

    {"prompt", "chosen", "rejected"}. The responses have different gold totals.
    """
    request = prompt(index, split=split, seed=seed)
    rng = drawn_for("comparison", split, seed, index)
    # Draw until the two differ: the labeller sees no difference between equal totals.
    totals: set[float] = set()
    while len(totals) < 2:
        pair = [respond(request, quality, rng) for _ in range(2)]
        totals = {gold(request.text, response).total for response in pair}

    ranks = rank(request.text, pair, noise=noise, rng=rng)
    first_wins = ranks[0] == 0
    chosen, rejected = pair if first_wins else reversed(pair)
    return {"prompt": request.text, "chosen": chosen, "rejected": rejected}


def judgement(
    index: int, *, split: Split = "train", quality: float = 0.7, seed: int = 0
) -> dict[str, str | bool]:
    """Return demonstration number `index`, `desirable` where it passes all three criteria.

    {"prompt", "response", "desirable"}.
    """
    shown = demonstration(index, split=split, quality=quality, seed=seed)
    verdict = gold(shown["prompt"], shown["response"])
    return {**shown, "desirable": bool(verdict.all)}


def noise_ceiling(pairs: Iterable[tuple[str, str, str]], noise: float) -> float:
    """Return the expected accuracy of the best predictor of noisy labels; NaN without pairs.

    `pairs`: triples of a prompt and two responses. Ties are left out.
    """
    chances = []
    for prompt, a, b in pairs:
        total_a = gold(prompt, a).total
        total_b = gold(prompt, b).total
        gap = abs(total_a - total_b)
        if gap:
            chances.append(_sigmoid(gap / noise) if noise > 0 else 1.0)
    return sum(chances) / len(chances) if chances else math.nan


def criterion_of(prompt: str, a: str, b: str) -> str:
    """Name how two responses differ: helpful, honest, harmless, several or none.

    Honesty on a lookup is called facts.
    """
    verdicts = zip(Gold._fields, gold(prompt, a), gold(prompt, b), strict=True)
    differing = [name for name, of_a, of_b in verdicts if of_a != of_b]
    if not differing:
        return "none"
    if len(differing) > 1:
        return "several"
    if differing == ["honest"] and parse(prompt).kind == "lookup":
        return "facts"
    return differing[0]
