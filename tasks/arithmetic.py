"""Arithmetic written out step by step: an endless task in which a program checks every step.

    27+8-6
    27+8=35
    so 35
    35-6=29
    answer 29

Demonstrators of set quality forget carries and borrows, so that their mistakes are of one kind (the commonest answer
is then not always the right one), undo one another at times (a right answer by wrong steps), and rarely slip by one.
"""

import random
import re
from collections.abc import Sequence

from tasks.answers import last_number

Row = dict[str, str | list[str | None]]

LOW, HIGH = 10, 99
"""Every value on the way has two digits."""
LENGTHS = (2, 3, 4)
"""Numbers of operations, equally often."""
RESTATED = 0.2
"""Share of solutions with one line that only says where one is: a neutral step."""
SLIP = 0.05
"""A demonstrator of quality q forgets each carry with probability 1 - q, and slips by one with this times 1 - q."""
POSITIVE, NEUTRAL, NEGATIVE = "positive", "neutral", "negative"


# ---- Problems ----


def _rng(*key: object) -> random.Random:
    return random.Random("/".join(map(str, key)))


def _held_out(text: str) -> bool:
    return _rng("held out", text).random() < 0.1


def problem(index: int, *, split: str = "train", seed: int = 0) -> str:
    """Problem number `index` of a split, train or heldout, such as 27+8-6; no problem is in both."""
    rng = _rng("arithmetic", split, seed, index)
    while True:
        value = rng.randint(LOW, HIGH)
        text = str(value)
        for _ in range(rng.choice(LENGTHS)):
            change = rng.choice(
                [c for c in range(-9, 10) if abs(c) > 1 and LOW <= value + c <= HIGH]
            )
            value += change
            text += f"{change:+d}"
        if _held_out(text) == (split == "heldout"):
            return text


def truth(text: str) -> list[str]:
    """The steps of a problem's solution, right and without restatements; the last says the answer."""
    numbers = [int(n) for n in re.findall(r"[+-]?\d+", text)]
    value, steps = numbers[0], []
    for change in numbers[1:]:
        steps.append(f"{value}{change:+d}={value + change}")
        value += change
    return [*steps, f"answer {value}"]


# ---- Demonstrators ----


def forgetful(value: int, change: int) -> int:
    """value + change with a carry or a borrow forgotten; the true sum where there is none."""
    tens, units = divmod(value, 10)
    return 10 * tens + (units + change) % 10


def solve(text: str, quality: float, rng: random.Random) -> list[str]:
    """A solution by a demonstrator of `quality` in [0, 1]; 1 is always right. Goes on from its own wrong values."""
    numbers = [int(n) for n in re.findall(r"[+-]?\d+", text)]
    value, steps = numbers[0], []
    restated = rng.randrange(1, len(numbers)) if rng.random() < RESTATED else 0
    for number, change in enumerate(numbers[1:], 1):
        result = forgetful(value, change) if rng.random() < 1 - quality else value + change
        if rng.random() < SLIP * (1 - quality):
            result += rng.choice((-1, 1))
        result = max(result, 0)  # several mistakes can lead this far down
        steps.append(f"{value}{change:+d}={result}")
        value = result
        if number == restated:
            steps.append(f"so {value}")
    return [*steps, f"answer {value}"]


# ---- The checker ----


def verdicts(text: str, steps: Sequence[str]) -> list[str]:
    """positive, neutral or negative for each step of a solution to the problem `text`.

    Positive is the next step of the true solution, or its answer; neutral a restatement of the true value so far;
    negative everything else: what goes on from a wrong value too, until the true step is made after all.
    """
    wanted = truth(text)
    done, value, out = 0, re.match(r"\d+", text).group(), []
    for step in steps:
        if done < len(wanted) - 1 and step == wanted[done]:
            done, value = done + 1, step.partition("=")[2]
            out.append(POSITIVE)
        elif step == wanted[-1]:
            out.append(POSITIVE)
        else:
            out.append(NEUTRAL if step == f"so {value}" else NEGATIVE)
    return out


def solved(text: str, response: str) -> bool:
    """Whether a response ends in the problem's answer, by whatever steps."""
    return last_number(response) == last_number(truth(text)[-1])


def until_wrong(labels: Sequence[str | None]) -> list[str | None]:
    """Labels up to the first negative one, then None: what follows a mistake is not judged (Lightman et al. 2023)."""
    end = labels.index(NEGATIVE) + 1 if NEGATIVE in labels else len(labels)
    return [*labels[:end], *[None] * (len(labels) - end)]


# ---- Records ----


def demonstration(
    index: int, *, split: str = "train", quality: float = 0.5, seed: int = 0
) -> dict[str, str]:
    """Problem number `index` with a demonstrator's solution."""
    text = problem(index, split=split, seed=seed)
    steps = solve(text, quality, _rng("demonstration", split, seed, index))
    return {"prompt": text, "response": "\n".join(steps)}


def labelled(index: int, *, split: str = "train", quality: float = 0.5, seed: int = 0) -> Row:
    """Demonstration number `index` in steps, labelled up to the first wrong one."""
    shown = demonstration(index, split=split, quality=quality, seed=seed)
    steps = shown["response"].split("\n")
    return {
        "prompt": shown["prompt"],
        "steps": steps,
        "labels": until_wrong(verdicts(shown["prompt"], steps)),
    }


def prompt(index: int, *, split: str = "train", seed: int = 0) -> dict[str, str]:
    """Problem number `index` and its answer, as `tasks.answers` compares it."""
    text = problem(index, split=split, seed=seed)
    return {"prompt": text, "answer": truth(text)[-1].removeprefix("answer ")}


def document(index: int, *, seed: int = 0) -> str:
    """Three problems and their solutions as one text, for pre-training."""
    shown = (demonstration(3 * index + i, seed=seed) for i in range(3))
    return "\n\n".join(f"{row['prompt']}\n{row['response']}" for row in shown)
