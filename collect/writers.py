"""Questions to a writer, and its replies, each of which is kept until the file is whole.

A writer is a language model of any run, or in a built-in world a simulated one. What a method asks
is a Question; what it makes of the replies follows from them alone. So a command that was killed
goes on where it was: it takes the replies that it has from their file, and asks for the others.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import jax
from tqdm import tqdm

from data.bad_rows import RecordRefused
from data.tokenizer import is_ended
from responses import load_run, split_evenly
from rewards.judges import make_ask, make_probability_of_a, turn
from runtime.errors import UserError, require
from runtime.writes import disk_faults
from sampling import SamplingConfig
from tasks import arithmetic_writer, world, world_writer

QUESTIONS = 64
"""Questions a call: so many replies are lost at most where a command is killed."""


VERDICTS = frozenset(["kind", "principle", "same", "means", "about", "harmful", "declines"])
"""Steps that are answered with yes or no."""
SCORES = frozenset(["score", "score_instruction"])
"""Steps that are answered with a score."""
JUDGEMENTS = VERDICTS | SCORES
"""Steps that judge what was written, instead of writing."""
GREEDY = SCORES | {"input_first", "label_first"}
"""Steps that are answered with the likeliest tokens. Self-Instruct too has temperature 0 here."""


class Question(NamedTuple):
    """A question to a writer."""

    step: str
    """The name of the step that asks, by which the simulated writers know it."""
    text: str
    """The whole question, for a language model."""
    given: dict[str, str]
    """The values that fill the text's template, by name."""
    item: str = ""
    """The regular expression with which an item of the reply begins; empty where it is no list."""


Reply = Callable[[Sequence[Question], int], list[str]]
"""reply(questions, number of the call) -> a text to each, empty where it came to no end."""
Ask = Callable[[Sequence[Question]], list[str]]
"""ask(questions) -> a text to each, as Reply; calls are numbered in their order."""


def question(step: str, template: str, **given: str) -> Question:
    """Return the question that `template` asks of what is given."""
    return Question(step, template.format(**given), given)


def whole_items(text: str, item: str) -> str:
    """Return a reply that came to no end without its last item, or "" where it is no list.

    `item`: the regular expression with which an item begins, "" for a reply that is no list.
    """
    if not item:
        return ""
    starts = [found.start() for found in re.finditer(item, text)]
    return text[: starts[-1]].strip() if starts else ""


# ---- Writers ----


def run_writer(
    run: str, temperature: float, max_new_tokens: int, seed: int, flag: str = "--init"
) -> Reply:
    """Make the language model of `run`, which `flag` names, a writer.

    Verdicts are yes where it is likelier than no, by one look at both; what is GREEDY is the
    likeliest reply, all else is sampled. A question that does not fit the model's context has no
    reply, nor has what comes to no end, but for the whole items of a list. Raises UserError as
    load_run and make_probability_of_a do, and where the context has no room for a question.
    """
    loaded = load_run(run)
    tokenizer = loaded.tokenizer
    context = loaded.config.context
    require(
        max_new_tokens < context,
        f"--max_new_tokens={max_new_tokens}: leaves no room for a question in the context of "
        f"{context} of {flag}={run}",
    )
    probability_of_yes = make_probability_of_a(loaded, "yes", "no", flag)
    sampled = make_ask(loaded, SamplingConfig(temperature, max_new_tokens=max_new_tokens), 1)
    greedy = make_ask(loaded, SamplingConfig(0.0, max_new_tokens=max_new_tokens), 1)

    def answers(questions: Sequence[Question], number: int) -> list[str]:
        """Answer questions that fit, which are all verdicts, or all greedy, or neither."""
        step = questions[0].step
        if step in VERDICTS:
            chances_N = probability_of_yes([one.text for one in questions])
            return ["yes" if chance > 0.5 else "no" for chance in chances_N.tolist()]
        chats = [[turn("user", one.text)] for one in questions]
        key = jax.random.fold_in(jax.random.key(seed), number)
        said = greedy(chats, key) if step in GREEDY else sampled(chats, key)
        texts = []
        for asked, tokens in zip(questions, said, strict=True):
            if is_ended(tokens, tokenizer.ends):
                texts.append(tokenizer.decode(tokens).strip())
            else:
                texts.append(whole_items(tokenizer.decode(tokens), asked.item))
        return texts

    def has_room(text: str, room: int) -> bool:
        """Tell if a question can be asked; one that spells a control token cannot."""
        try:
            return len(tokenizer.prompt(text)) <= room
        except RecordRefused:
            return False

    def reply(questions: Sequence[Question], number: int) -> list[str]:
        room = context if questions[0].step in VERDICTS else context - max_new_tokens
        fits = [has_room(one.text, room) for one in questions]
        fitting = list(itertools.compress(questions, fits))
        gone = len(questions) - len(fitting)
        if gone:
            tqdm.write(
                f"{run}: {gone} of {len(questions)} questions have over {room} tokens, "
                "or are refused by the chat template"
            )
        answer = iter(answers(fitting, number) if fitting else [])
        return [next(answer) if is_asked else "" for is_asked in fits]

    return reply


def judged_by(write: Reply, judge: Reply) -> Reply:
    """Make a Reply of two: `judge` is asked what judges, `write` all else.

    The questions of one call all judge, or all write.
    """

    def reply(questions: Sequence[Question], number: int) -> list[str]:
        is_judgement = questions[0].step in JUDGEMENTS
        return judge(questions, number) if is_judgement else write(questions, number)

    return reply


SIMULATED = {"world": world_writer.STEPS, "arithmetic": arithmetic_writer.STEPS}
"""The writer of each built-in world, by step: write(given, reliability, rng) -> a text."""


def simulated_writer(name: str, reliability: float, seed: int) -> Reply:
    """Make the simulated writer of the world `name`: each thing it writes is right with
    probability `reliability`, else wrong in one of the ways in which models' are.

    What it writes is a function of the question, the call's number and the seed.
    """
    steps = SIMULATED[name]

    def reply(questions: Sequence[Question], number: int) -> list[str]:
        texts = []
        for place, asked in enumerate(questions):
            rng = world.drawn_for("writer", seed, number, place)
            texts.append(steps[asked.step](asked.given, reliability, rng))
        return texts

    return reply


# ---- Replies on the disk ----


@contextlib.contextmanager
def kept_replies(path: str, settings: dict[str, Any], reply: Reply) -> Iterator[Ask]:
    """Keep all replies of a writer in the file `path`, and take those that it has from there.

    A context manager, which yields ask(questions). The file begins with `settings`, what the
    replies depend on; who has used the last one removes it. Raises UserError where it was begun
    with other settings, or another process writes it. A fault before the first reply leaves none.
    """
    place = pathlib.Path(path)
    with disk_faults(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.open("a+", encoding="utf-8")
    with file:
        _lock(file, place)
        kept = _read_kept(file, place, json.loads(json.dumps(settings)))
        number = 0

        def ask_part(questions: Sequence[Question]) -> list[str]:
            nonlocal number
            asked = _sum([one.text for one in questions])
            if number == len(kept):
                kept.append({"asked": asked, "replies": reply(questions, number)})
                _append(file, place, kept[number])
            line = kept[number]
            require(
                line["asked"] == asked,
                f"{path}: has replies to other questions, of another version; remove it",
            )
            number += 1
            return line["replies"]

        def ask(questions: Sequence[Question]) -> list[str]:
            replies = []
            for part in split_evenly(questions, QUESTIONS):
                replies += ask_part(part)
            return replies

        try:
            yield ask
        finally:
            if not kept:
                place.unlink()


def _sum(texts: Sequence[str]) -> str:
    """Return a short sum of texts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _lock(file: TextIO, place: pathlib.Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{place}: another process writes it; wait, or name another --out"
        ) from None
    # Some file systems have no locks.
    except OSError:
        pass


def _append(file: TextIO, place: pathlib.Path, line: dict[str, Any]) -> None:
    with disk_faults(place):
        file.write(json.dumps(line) + "\n")
        file.flush()


def _read_kept(
    file: TextIO, place: pathlib.Path, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the calls in the file, without a last one that was cut off, which goes.

    A new file gets its first line.
    """
    file.seek(0)
    whole = file.read()
    end = whole.rfind("\n") + 1
    if end < len(whole):
        file.truncate(len(whole[:end].encode()))
    if end == 0:
        _append(file, place, settings)
        return []
    try:
        first, *calls = map(json.loads, whole[:end].splitlines())
    except ValueError:
        raise UserError(f"{place}: is damaged; remove it") from None
    for name in {**settings, **first}:
        require(
            first.get(name) == settings.get(name),
            f"{place}: was begun with another {name} ({first.get(name)}, and now "
            f"{settings.get(name)}); give the same again, or remove the file",
        )
    return calls
