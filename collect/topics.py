"""Instructions on given topics, where a writer left alone repeats a few.

Each round the writer is asked for one instruction on each topic, unlike those that it has already,
and answers it; what rules drop is not made up for (topics as in Ding et al. 2023, UltraChat; Zhao
et al. 2024, section 5.1.1). With topics of harm, `refusals` makes a risky request and a harmless
one that looks like it, and answers that refuse the first and help with the second.
"""

import itertools
from collections.abc import Iterator, Sequence

from collect.instructions import (
    MOST_SIMILAR,
    NO_REPLY,
    Made,
    Object,
    answer_fault,
    ask_verdicts,
    dropped,
    pair_of,
    staying,
    until_idle,
    with_outputs,
    without_heading,
    without_objections,
)
from collect.writers import Ask, question
from data.rouge import SimilarTexts

SHOWN = 4
"""Instructions on a topic that the writer sees, the last ones."""
ON_TOPIC = """Write one instruction or question that an assistant may be given.
Topic: {topic}
It must ask for another thing than these:
{shown}
Write the instruction only."""
IS_ABOUT = """Instruction: {instruction}
Is it about the topic {topic}? Answer with yes or no."""
RISKY = """To teach an assistant what it must decline, write one request whose answer would help
with harm.
Harm: {topic}
Write the request only."""
LOOKS_RISKY = """To teach an assistant not to decline too much, write one harmless request that
has words in common with a harmful one.
Harm: {topic}
Write the request only."""
IS_HARMFUL = """Request: {instruction}
Would an answer to it help with harm? Answer with yes or no."""
REFUSE = """Decline the request below politely, in one sentence, and give no help with it. Write
the answer only.

{instruction}"""
DECLINES = """Request: {request}
Response: {response}
Does the response decline to help? Answer with yes or no."""


def topics(names: Sequence[str], ask: Ask, object_to: Object) -> Iterator[list[Made]]:
    """Yield what each round wrote on every topic, kept and dropped, without end.

    A row has instruction, input (empty) and output. Rules: `unreadable`, `similar`, `off_topic`
    (as the writer finds), `answer`, `principle`.
    """
    similar = SimilarTexts(MOST_SIMILAR)
    written: dict[str, list[str]] = {name: [] for name in names}
    for number in itertools.count():
        questions = []
        for name in names:
            shown = "\n".join(written[name][-SHOWN:]) or "none yet"
            questions.append(question("on_topic", ON_TOPIC, topic=name, shown=shown))
        made = _requests(names, ask(questions), "topics", number, similar)

        # The right topic, an answer, no principle broken.
        questions = [
            question("about", IS_ABOUT, instruction=one.row["instruction"], topic=one.of[0])
            for one in staying(made)
        ]
        reasons = []
        for verdict in ask_verdicts(ask, questions):
            reasons.append("" if verdict == "yes" else "is about another topic")
        made = dropped(made, "off_topic", reasons)
        made = _answered(made, ask)
        made = without_objections(made, object_to)
        for one in staying(made):
            written[one.of[0]].append(one.row["instruction"])
        yield made


def refusals(harms: Sequence[str], ask: Ask, object_to: Object) -> Iterator[list[Made]]:
    """Yield what each round wrote on every harm: a risky request, and one that looks like it.

    What stays is as many of the one as of the other, in turn. It ends after IDLE_ROUNDS rounds
    without a row that stays. Rows as of `topics`, by `risky` and `looks_risky`. Rules:
    `unreadable`, `similar` (to one of its sort), `harm` (the request is not what was asked for, as
    the writer finds), `answer`, `refusal` (of a harmless request, or none of a risky one),
    `principle`, `alone` (at the end, without one of the other sort).
    """
    waiting: dict[str, list[Made]] = {"risky": [], "looks_risky": []}
    yield from until_idle(_paired(harms, ask, object_to, waiting))
    reason = "no request of the other sort is left"
    left = [*waiting["risky"], *waiting["looks_risky"]]
    yield [one._replace(rule="alone", reason=reason) for one in left]


def _paired(
    harms: Sequence[str], ask: Ask, object_to: Object, waiting: dict[str, list[Made]]
) -> Iterator[list[Made]]:
    """Yield the rounds of `refusals`, without end.

    `waiting`: by sort the rows that stay and have no other yet; changed in place.
    """
    # Two that differ in one word are the point: only requests of one sort must differ more.
    similar_risky = SimilarTexts(MOST_SIMILAR)
    similar_alike = SimilarTexts(MOST_SIMILAR)
    for number in itertools.count():
        risky = ask([question("risky", RISKY, topic=name) for name in harms])
        alike = ask([question("looks_risky", LOOKS_RISKY, topic=name) for name in harms])
        made = _requests(harms, risky, "risky", number, similar_risky)
        made += _requests(harms, alike, "looks_risky", number, similar_alike)

        # Harm where there should be some, and none elsewhere.
        questions = [
            question("harmful", IS_HARMFUL, instruction=one.row["instruction"])
            for one in staying(made)
        ]
        made = dropped(made, "harm", _as_meant(made, ask_verdicts(ask, questions)))

        # Refusals of the one, answers to the other.
        made = _answered(made, ask)
        questions = []
        for one in staying(made):
            request, response = pair_of(one)
            questions.append(question("declines", DECLINES, request=request, response=response))
        made = dropped(made, "refusal", _as_meant(made, ask_verdicts(ask, questions)))
        made = without_objections(made, object_to)

        # As many of the one as of the other: what has no other yet waits for one.
        for one in staying(made):
            waiting[one.by].append(one)
        pairs: list[Made] = []
        while all(waiting.values()):
            pairs += [waiting["risky"].pop(0), waiting["looks_risky"].pop(0)]
        yield [*(one for one in made if one.rule), *pairs]


def _as_meant(made: Sequence[Made], verdicts: Sequence[str | None]) -> list[str]:
    """Return what is against those that stay: yes is right of what is risky, no of the others."""
    reasons = []
    for one, verdict in zip(staying(made), verdicts, strict=True):
        wanted = "yes" if one.by == "risky" else "no"
        reasons.append("" if verdict == wanted else f"{verdict}, where {wanted} is meant")
    return reasons


def _requests(
    names: Sequence[str], replies: Sequence[str], by: str, number: int, similar: SimilarTexts
) -> list[Made]:
    """Read one request on each topic; those that stay are added to `similar`."""
    made: list[Made] = []
    for name, reply in zip(names, replies, strict=True):
        text = without_heading(reply, "instruction", "request", "question")
        row = {"instruction": text, "input": ""}
        one = Made(f"{by} {number}.{len(made)}", row, by, (name,))
        found = similar.nearest(text)
        if not text:
            one = one._replace(rule="unreadable", reason=NO_REPLY)
        elif found is not None:
            one = one._replace(rule="similar", reason=f"{found[1]:.2f} of one before it")
        else:
            similar.add(text)
        made.append(one)
    return made


def _answered(made: Sequence[Made], ask: Ask) -> list[Made]:
    """Have the requests that stay answered, or refused where they are risky."""
    questions = []
    for one in staying(made):
        step, template = ("answer", "{instruction}")
        if one.by == "risky":
            step, template = ("refuse", REFUSE)
        questions.append(question(step, template, instruction=one.row["instruction"]))
    answers = ask(questions)
    # A refusal may be sorry.
    reasons = []
    for one, text in zip(staying(made), answers, strict=True):
        fault = answer_fault(text)
        reasons.append("" if one.by == "risky" and fault == "is sorry" else fault)
    return dropped(with_outputs(made, answers), "answer", reasons)
