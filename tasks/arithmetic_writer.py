"""Arithmetic's simulated writer: problems that grow by an operation, of set reliability.

It answers the questions of collect/synthesise.py --method=evol_instruct, by the name of the step
that asks. What it writes is right with a set probability; else it fails as models do: words of the
question copied, the same problem again, a refusal, an answer that says nothing or is wrong.
"""

import random
import re
from collections.abc import Callable

from tasks import arithmetic
from tasks.answers import last_number
from tasks.world_writer import Given, yes_or_no

PRINCIPLES = ("right",)
"""Names of the principles by which it can judge: a response ends in the right answer."""


def _deepen(given: Given, reliability: float, rng: random.Random) -> str:
    """Add an operation to a problem; else copy the question's words, or nothing new."""
    problem = given["instruction"]
    if rng.random() >= reliability:
        return rng.choice([f"The given prompt is {problem}", problem, f"0{problem}"])
    value = int(last_number(arithmetic.truth(problem)[-1]) or 0)
    # As in a problem of its own: no step leaves two digits, none is of the held-out split.
    while True:
        change = rng.choice([*range(-9, -1), *range(2, 10)])
        longer = f"{problem}{change:+d}"
        stays = arithmetic.LOW <= value + change <= arithmetic.HIGH
        if stays and not arithmetic.is_held_out(longer):
            return longer


def _broaden(given: Given, reliability: float, rng: random.Random) -> str:
    """Write another problem of any length; else the same once more."""
    if rng.random() >= reliability:
        return given["instruction"]
    return arithmetic.problem(rng.randrange(1 << 30))


def _judge_same(given: Given, reliability: float, rng: random.Random) -> str:
    """Say whether two problems are the same, but for leading zeros."""
    first, second = (re.sub(r"\b0+(?=\d)", "", given[name]) for name in ("first", "second"))
    return yes_or_no(first == second, reliability, rng)


def _answer(given: Given, reliability: float, rng: random.Random) -> str:
    """Solve a problem; else refuse, say nothing, or make the usual mistakes."""
    problem = given["instruction"]
    if rng.random() < reliability:
        return "\n".join(arithmetic.solve(problem, 1.0, rng))
    wrong = "\n".join(arithmetic.solve(problem, 0.0, rng))
    return rng.choice(["Sorry, I cannot do that.", "It is so.", wrong])


def _judge_principle(given: Given, reliability: float, rng: random.Random) -> str:
    """Say whether a response ends in the right answer."""
    verdict = arithmetic.solved(given["request"], given["response"])
    return yes_or_no(verdict, reliability, rng)


STEPS: dict[str, Callable[[Given, float, random.Random], str]] = {
    "depth": _deepen,
    "breadth": _broaden,
    "same": _judge_same,
    "answer": _answer,
    "principle": _judge_principle,
}
