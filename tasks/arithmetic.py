"""Arithmetic written out step by step: an endless task in which a program checks every step.

    27+8-6
    27+8=35
    so 35
    35-6=29
    answer 29

Demonstrators of set quality forget carries and borrows, so that their mistakes are of one kind
(the commonest answer is then not always the right one), undo one another at times (a right answer
by wrong steps), and rarely slip by one. Everything is a function of (index, split, seed).
"""

import random
import re
from collections.abc import Sequence
from typing import Literal, TypedDict

from tasks.answers import last_number

Split = Literal["train", "heldout"]
Label = Literal["positive", "neutral", "negative"]
POSITIVE: Label = "positive"
NEUTRAL: Label = "neutral"
NEGATIVE: Label = "negative"

LOW = 10
HIGH = 99
"""Every value on the way is from LOW to HIGH: it has two digits."""
LENGTHS = (2, 3, 4)
"""Numbers of operations, equally often."""
RESTATED = 0.2
"""Share of solutions with one line that only says where one is: a neutral step."""
SLIP = 0.05
"""A demonstrator of quality q slips by one with this times 1 - q at each step."""


class LabelledSteps(TypedDict):
    """A row of the schema `steps` (data/records.py)."""

    prompt: str
    steps: list[str]
    labels: list[Label | None]


# ---- Problems ----


def _rng(*key: object) -> random.Random:
    """Return a random generator whose numbers are a function of `key`."""
    return random.Random("/".join(map(str, key)))


def is_held_out(text: str) -> bool:
    """Return whether a problem is of the held-out split."""
    return _rng("held out", text).random() < 0.1


def problem(index: int, *, split: Split = "train", seed: int = 0) -> str:
    """Return problem number `index` of a split, such as 27+8-6; no problem is in both splits."""
    rng = _rng("arithmetic", split, seed, index)
    # Draw until one falls into this split.
    while True:
        text = _draw(rng)
        if is_held_out(text) == (split == "heldout"):
            return text


def _draw(rng: random.Random) -> str:
    """Draw a problem of either split."""
    value = rng.randint(LOW, HIGH)
    text = str(value)
    for _ in range(rng.choice(LENGTHS)):
        # No change by 0 or 1, and none that leaves two digits.
        changes = []
        for change in range(-9, 10):
            result = value + change
            if abs(change) > 1 and LOW <= result <= HIGH:
                changes.append(change)
        change = rng.choice(changes)
        value += change
        text += f"{change:+d}"
    return text


def _terms(text: str) -> list[int]:
    """Return a problem's first value and the signed changes to it."""
    return [int(term) for term in re.findall(r"[+-]?\d+", text)]


def truth(text: str) -> list[str]:
    """Return the right steps of a problem, without restatements; the last says the answer."""
    value, *changes = _terms(text)
    steps = []
    for change in changes:
        steps.append(f"{value}{change:+d}={value + change}")
        value += change
    return [*steps, f"answer {value}"]


# ---- Demonstrators ----


def forgetful(value: int, change: int) -> int:
    """Add with a carry or a borrow forgotten; the true sum where there is none."""
    tens, units = divmod(value, 10)
    return 10 * tens + (units + change) % 10


def solve(text: str, quality: float, rng: random.Random) -> list[str]:
    """Solve a problem as a demonstrator of `quality` in [0, 1]; 1 is always right.

    Each carry is forgotten with probability 1 - quality, and each step slips by one with
    SLIP (1 - quality). The solution goes on from its own wrong values. Returns the steps.
    """
    value, *changes = _terms(text)
    failing = 1 - quality
    # After which change, counted from 1, the value is said once more; 0: never.
    restated = 0
    if rng.random() < RESTATED:
        restated = rng.randrange(1, len(changes) + 1)

    steps = []
    for number, change in enumerate(changes, 1):
        result = value + change
        # The mistakes: a carry forgotten, a slip by one, or both.
        if rng.random() < failing:
            result = forgetful(value, change)
        if rng.random() < SLIP * failing:
            result += rng.choice((-1, 1))
        # Several mistakes can lead below 0.
        result = max(result, 0)
        steps.append(f"{value}{change:+d}={result}")
        value = result
        if number == restated:
            steps.append(f"so {value}")
    return [*steps, f"answer {value}"]


# ---- The checker ----


def verdicts(text: str, steps: Sequence[str]) -> list[Label]:
    """Judge each step of a solution to the problem `text`: positive, neutral or negative.

    Positive is the next step of the true solution, or its answer; neutral a restatement of the
    true value so far; negative everything else: what goes on from a wrong value too, until the
    true step is made after all.
    """
    *sums, answer = truth(text)
    first_value, *_ = _terms(text)
    # Where the true steps made so far lead, and how many they are.
    value = str(first_value)
    done = 0
    labels = []
    for step in steps:
        if done < len(sums) and step == sums[done]:
            label = POSITIVE
            value = step.partition("=")[2]
            done += 1
        elif step == answer:
            label = POSITIVE
        elif step == f"so {value}":
            label = NEUTRAL
        else:
            label = NEGATIVE
        labels.append(label)
    return labels


def solved(text: str, response: str) -> bool:
    """Tell whether a response ends in the problem's answer, by whatever steps."""
    return last_number(response) == last_number(truth(text)[-1])


def until_wrong(labels: Sequence[Label | None]) -> list[Label | None]:
    """Keep labels up to the first negative one, and put None after it.

    What follows a mistake is not judged (Lightman et al. 2023).
    """
    if NEGATIVE not in labels:
        return list(labels)
    judged = labels.index(NEGATIVE) + 1
    return [*labels[:judged], *[None] * (len(labels) - judged)]


# ---- Records: rows as data/records.py adapts them ----


def demonstration(
    index: int, *, split: Split = "train", quality: float = 0.5, seed: int = 0
) -> dict[str, str]:
    """Return {"prompt", "response"}: problem number `index` and a demonstrator's solution."""
    text = problem(index, split=split, seed=seed)
    rng = _rng("demonstration", split, seed, index)
    steps = solve(text, quality, rng)
    return {"prompt": text, "response": "\n".join(steps)}


def labelled(
    index: int, *, split: Split = "train", quality: float = 0.5, seed: int = 0
) -> LabelledSteps:
    """Return demonstration number `index` in steps, labelled up to the first wrong one."""
    shown = demonstration(index, split=split, quality=quality, seed=seed)
    steps = shown["response"].split("\n")
    labels = until_wrong(verdicts(shown["prompt"], steps))
    return {"prompt": shown["prompt"], "steps": steps, "labels": labels}


def prompt(index: int, *, split: Split = "train", seed: int = 0) -> dict[str, str]:
    """Return {"prompt", "answer"}: problem number `index`, and what `tasks.answers` compares."""
    text = problem(index, split=split, seed=seed)
    answer = truth(text)[-1]
    return {"prompt": text, "answer": answer.removeprefix("answer ")}


def document(index: int, *, seed: int = 0) -> str:
    """Return three training problems and their solutions as one text, for pre-training."""
    parts = []
    for i in range(3 * index, 3 * index + 3):
        shown = demonstration(i, seed=seed)
        parts.append(f"{shown['prompt']}\n{shown['response']}")
    return "\n\n".join(parts)
