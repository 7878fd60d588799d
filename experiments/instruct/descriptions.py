"""Does tuning collapse without descriptions of the tasks? Claim 2 of README.md.

    python -m experiments.instruct.run --study=descriptions

A task is a family of requests whose input stands at the end, such as `what is the capital of` and
`spain`. One arm is tuned and asked with a description before each input, drawn from the family's
wordings (collect/by_template.py), the other with the inputs alone. Of each seed three families are
held out; of the other tasks each fifth input is asked, and not trained on.
"""

import random
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from collect.by_template import describe
from evaluation.gold import gold_shares
from experiments.instruct.study import (
    HELD_OUT,
    Comparison,
    Config,
    Line,
    Study,
    Training,
    all_above,
    by_seed,
    judged,
    kept_rows,
    paired,
    scaled,
)
from tasks import world
from tasks.world_gold import Request
from tasks.world_writer import FORMS, request_of

LEFT_OUT = 3
"""Families that are asked, and not trained on."""
ROWS = 1500
QUALITY = 1.0
"""The demonstrators', so that rows differ in their descriptions alone."""
DESCRIBED, ALONE = "described", "inputs alone"


APART = 5
"""Of so many inputs of a task one is asked, and not trained on."""


class Task(NamedTuple):
    """A family of requests: what may stand before an input, and the inputs."""

    descriptions: list[str]
    inputs: list[str]

    def inputs_of(self, split: world.Split) -> list[str]:
        """Return the inputs that are trained on, or those that are asked."""
        apart = self.inputs[::APART]
        if split == "heldout":
            return apart
        return [given for given in self.inputs if given not in apart]


class Asked(NamedTuple):
    """One input of a task, with a description drawn for it."""

    request: Request
    given: str
    """The input alone."""


def all_tasks() -> dict[str, Task]:
    """Return the tasks by kind and relation; all lists of things are one task."""
    tasks: dict[str, Task] = {}
    for form in FORMS.values():
        request = request_of(form.instruction, form.inputs[0])
        name = request.kind if request.kind == "listing" else f"{request.kind} {request.relation}"
        task = tasks.setdefault(name, Task([], []))
        task.descriptions.append(form.instruction)
        task.inputs.extend(given for given in form.inputs if given not in task.inputs)
    return tasks


TASKS = all_tasks()


def tasks_of(seed: int) -> tuple[list[str], list[str]]:
    """Return the names of the tasks held out with a seed, and of those trained on."""
    mixed = random.Random(f"descriptions/{seed}").sample(sorted(TASKS), len(TASKS))
    return mixed[:LEFT_OUT], mixed[LEFT_OUT:]


def asked(names: Sequence[str], count: int, split: world.Split, seed: int) -> list[Asked]:
    """Draw `count` inputs of a split, in turn of each task, with a description for each."""
    pairs_of: dict[str, list[tuple[str, str, str]]] = {name: [] for name in names}
    for number in range(count):
        name = names[number % len(names)]
        given = world.drawn_for("input", seed, number).choice(TASKS[name].inputs_of(split))
        # The number keeps an input apart that is drawn again.
        pairs_of[name].append((str(number), given, str(number)))
    found = []
    for name, pairs in pairs_of.items():
        for made in describe(pairs, TASKS[name].descriptions, seed):
            given = made.row["input"]
            found.append(Asked(request_of(made.row["instruction"], given), given))
    return found


def shown(one: Asked, is_described: bool) -> str:
    """Return the prompt of an input, with its description or alone."""
    return one.request.text if is_described else one.given


def arm(config: Config, seed: int, *, is_described: bool) -> Training:
    """Return an arm: ROWS inputs of the tasks trained on, described or alone, with answers."""
    _, taken = tasks_of(seed)
    rows = []
    for number, one in enumerate(asked(taken, scaled(config, ROWS), "train", seed)):
        rng = world.drawn_for("descriptions", seed, number)
        rows.append((shown(one, is_described), world.respond(one.request, QUALITY, rng)))
    sort = "described" if is_described else "alone"
    return Training(kept_rows(config, sort, seed, rows))


ARMS = {
    DESCRIBED: partial(arm, is_described=True),
    ALONE: partial(arm, is_described=False),
}


def measure(config: Config, arm: str, run: str, seed: int) -> dict[str, float]:
    """Return the shares of inputs that pass, of tasks trained on and of those held out.

    A run is asked as it was tuned.
    """
    is_described = arm == DESCRIBED
    shares = {}
    left_out, taken = tasks_of(seed)
    for name, tasks in (("trained on", taken), ("held out", left_out)):
        inputs = asked(tasks, config.prompts, "heldout", HELD_OUT + seed)
        prompts = [shown(one, is_described) for one in inputs]
        rows = judged(run, [one.request for one in inputs], seed, prompts)
        shares[name] = gold_shares(rows)["all"].value
    return shares


def falls(results: Sequence[Line], measure: str) -> dict[int, float]:
    """Return by seed what the inputs alone lose of a measure."""
    described = by_seed(results, DESCRIBED, measure)
    alone = by_seed(results, ALONE, measure)
    return {seed: described[seed] - alone[seed] for seed in described if seed in alone}


def compare(results: Sequence[Line]) -> list[Comparison]:
    """Compare the fall on tasks held out with that on those trained on."""
    held_out, trained_on = (falls(results, name) for name in ("held out", "trained on"))
    return [paired("fall on tasks held out less that on those trained on", held_out, trained_on)]


STUDY = Study(
    name="descriptions",
    claim="2. without descriptions of the task it collapses",
    arms=ARMS,
    measure=measure,
    compare=compare,
    decide=all_above,
    measures=("trained on", "held out"),
)
