"""Step labels: sample solutions, and label their steps by a program, the outcome, or completions.

    python -m collect.steps --init=runs/maths --out=runs/steps.jsonl
    python -m collect.steps --init=runs/maths --labels=outcome --out=runs/outcomes.jsonl
    python -m collect.steps --init=runs/gsm8k --data=tfds:gsm8k --labels=completions \
        --completions=8 --out=auto.jsonl

The first asks arithmetic's own checker, the second labels the last step alone, the third asks how
often a step's completions come right. Writes JSON Lines as `train_prm.py --data` reads them. With
the same seed the solutions are the same ones.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import numpy as np

from data.bad_rows import OnBadRow, set_on_bad_row
from data.records import Record
from data.sources import open_source
from data.steps import lines_of, problems
from data.tokenizer import Tokenizer
from model import Params
from model_config import check_fit
from responses import (
    Respond,
    Tokens,
    has_ended,
    in_parts,
    load_run,
    make_sampler,
    split_evenly,
)
from rewards.scorer import Check, load_check
from runtime import flags
from runtime.errors import refuse_unread, require
from runtime.run_folder import atomic_text
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks import arithmetic

# Responses a call, and problems whose solutions are labelled together.
ROWS = 512
PROBLEMS = 256
Label = str | float | None
"""A step's: positive, neutral or negative, a share of right completions, or None."""
Complete = Callable[[list[Tokens]], list[Tokens]]
"""complete(contexts) -> continuations, equally many of each context, in order."""


class Solution(NamedTuple):
    """A sampled solution to one problem."""

    prompt: Tokens
    """The problem's prompt."""
    record: Record
    """The problem's record."""
    lines: list[tuple[str, str]]
    """Its steps, each with the newlines that end it (data.steps.lines_of)."""

    @property
    def steps(self) -> list[str]:
        """Return the steps alone."""
        return [step for step, _ in self.lines]


class State(NamedTuple):
    """A solution's beginning: what has been written so far."""

    prompt: Tokens
    text: str
    record: Record


@dataclasses.dataclass(frozen=True)
class Config:
    init: str = "runs/maths"
    """Run whose solutions are labelled, and which completes them."""
    out: str = "runs/steps.jsonl"
    """File to write."""
    data: str = "arithmetic"
    """Problems with answers: arithmetic, files, or tfds:<name>."""
    split: Literal["train", "heldout"] = "train"
    """Part of the problems."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, with a note."""
    labels: Literal["gold", "outcome", "completions"] = "gold"
    """gold: by the program, up to the first wrong step (arithmetic only). outcome: the last step,
    by --check. completions: each step, by the share of its completions that pass --check (Wang et
    al. 2024, Math-Shepherd)."""
    check: str = "tasks.answers:number"
    """module:function that is 1 where a response (first argument) has its record's answer."""
    completions: int = 8
    """Samples from each step; a share's standard error is sqrt(p (1 - p) / n)."""
    prompts: int = 4000
    """Problems, at most."""
    samples: int = 4
    """Solutions to a problem; equal ones count once."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_prompt: int = 16
    """Longest prompt, in tokens."""
    max_new_tokens: int = 48
    """Longest solution, in tokens."""
    seed: int = 0
    """Seed of the built-in problems and samples."""


# ---- Solutions ----


def solutions(
    tokens: Sequence[Tokens],
    prompts: Sequence[Tokens],
    records: Sequence[Record],
    tokenizer: Tokenizer,
) -> Iterator[Solution]:
    """Yield the distinct solutions that ended and have a step, problem by problem.

    `tokens`: equally many responses to each prompt, in order.
    """
    by_problem = split_evenly(tokens, len(tokens) // len(prompts))
    for prompt, record, own in zip(prompts, records, by_problem, strict=True):
        distinct = {}
        for text in tokenizer.ended(own):
            lines = lines_of(text)
            distinct.setdefault(tuple(step for step, _ in lines), lines)
        for steps, lines in distinct.items():
            if steps:
                yield Solution(prompt, record, lines)


# ---- Labels: one for each step of each solution ----


def gold_labels(found: Sequence[Solution]) -> list[list[Label]]:
    """Label steps by arithmetic's checker, up to the first wrong one; None after it."""
    labels: list[list[Label]] = []
    for solution in found:
        problem = solution.record["prompt"][-1]["content"]
        verdicts = arithmetic.verdicts(problem, solution.steps)
        labels.append([*arithmetic.until_wrong(verdicts)])
    return labels


def outcome(solution: Solution, check: Check) -> float:
    """Return `check` of the whole solution: 1 where it has the record's answer."""
    return float(check("\n".join(solution.steps), solution.record))


def outcome_labels(found: Sequence[Solution], check: Check) -> list[list[Label]]:
    """Label the last step by the outcome, and the others None."""
    labels: list[list[Label]] = []
    for solution in found:
        unlabelled: list[Label] = [None] * (len(solution.steps) - 1)
        labels.append([*unlabelled, outcome(solution, check)])
    return labels


def completion_labels(
    found: Sequence[Solution], check: Check, complete: Complete, tokenizer: Tokenizer
) -> list[list[Label]]:
    """Label each step by the share of its completions that come right, the last by the outcome."""
    # After each step but the last the policy goes on, all of them at once.
    states = []
    for solution in found:
        for end in range(1, len(solution.lines)):
            # As the policy wrote it, blank lines too.
            written = "".join(step + newlines for step, newlines in solution.lines[:end])
            states.append(State(solution.prompt, written, solution.record))
    shares = iter(success_shares(complete, check, tokenizer, states) if states else [])

    # The shares come in the order of the states.
    labels: list[list[Label]] = []
    for solution in found:
        own: list[Label] = [next(shares) for _ in solution.steps[1:]]
        labels.append([*own, outcome(solution, check)])
    return labels


def success_shares(
    complete: Complete, check: Check, tokenizer: Tokenizer, states: Sequence[State]
) -> list[float]:
    """Return for each state the share of its completions that end and that `check` finds right.

    A completion is decoded together with what was written before it; one without an end is no
    solution, as in `solutions`. Unbiased for the probability that the policy comes right from
    there (Wang et al. 2024: soft estimation).
    """
    written = [tokenizer.encode(state.text) for state in states]
    contexts = [[*state.prompt, *so_far] for state, so_far in zip(states, written, strict=True)]

    # n completions of each state, next to one another.
    tokens = complete(contexts)
    by_state = split_evenly(tokens, len(tokens) // len(states))
    rights = []
    for state, so_far, own in zip(states, written, by_state, strict=True):
        ended = has_ended(own, tokenizer.ends)
        texts = [tokenizer.decode([*so_far, *more]) for more in own]
        rights.append(ended * [check(text, state.record) for text in texts])
    return np.mean(rights, axis=1).tolist()


# ---- The command ----


def check_config(config: Config) -> None:
    """Raise UserError for settings that cannot run."""
    require(
        min(config.prompts, config.samples, config.completions) >= 1,
        "--prompts, --samples, --completions: must be at least 1",
    )
    require(
        config.labels != "gold" or config.data == "arithmetic",
        f"--labels=gold: no program checks the steps of {config.data}; "
        "take outcome or completions",
    )
    refuse_unread(
        config,
        {
            "completions": (config.labels == "completions", "--labels=completions"),
            "check": (config.labels != "gold", "--labels=outcome or completions"),
        },
    )


def respond_in_rows(
    respond: Respond, params: Params, n: int, prompts: list[Tokens], key: jax.Array
) -> list[Tokens]:
    """Sample `n` responses to each prompt, ROWS responses a call."""
    return respond(params, prompts, key, max(1, ROWS // n))


def main(config: Config) -> dict[str, int]:
    """Write the file whole or not at all.

    Returns the counts of `lines` (solutions), `steps` (labels but None) and `completions`.
    """
    check_config(config)
    set_on_bad_row(config.on_bad_row)
    make_mesh(MeshConfig())
    model, tokenizer, params = load_run(config.init)
    # A completion may begin near a solution's end, and be as long.
    written = 2 if config.labels == "completions" else 1
    check_fit(model, tokenizer.size, config.max_prompt + written * config.max_new_tokens)
    check = load_check(config.check)

    # Samplers of solutions and of completions.
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    solve = partial(
        respond_in_rows,
        make_sampler(model, sampling, tokenizer, config.samples),
        params,
        config.samples,
    )
    complete = partial(
        respond_in_rows,
        make_sampler(model, sampling, tokenizer, config.completions),
        params,
        config.completions,
    )

    # Solutions to a part of the problems at a time.
    source = open_source(config.data, "prompt", config.split, seed=config.seed)
    count = min(config.prompts, len(source))
    counts = {"lines": 0, "steps": 0, "completions": 0}
    with atomic_text(config.out, anew=True) as file:
        for start in in_parts(count, PROBLEMS, "collect"):
            records = [source[i] for i in range(start, min(start + PROBLEMS, count))]
            prompts = problems(records, tokenizer, config.max_prompt)
            key = jax.random.fold_in(jax.random.key(config.seed), start)
            solving_key, completing_key = jax.random.split(key)
            found = list(solutions(solve(prompts, solving_key), prompts, records, tokenizer))

            # The labels.
            if config.labels == "gold":
                labels = gold_labels(found)
            elif config.labels == "outcome":
                labels = outcome_labels(found, check)
            else:
                labels = completion_labels(
                    found, check, partial(complete, key=completing_key), tokenizer
                )
                steps = sum(len(solution.steps) - 1 for solution in found)
                counts["completions"] += config.completions * steps

            for solution, given in zip(found, labels, strict=True):
                row = {
                    "prompt": solution.record["prompt"],
                    "steps": solution.steps,
                    "labels": given,
                }
                file.write(json.dumps(row) + "\n")
                counts["steps"] += sum(label is not None for label in given)
            counts["lines"] += len(found)
    print(
        f"{config.out}: {counts['lines']} solutions, {counts['steps']} labels, "
        f"{counts['completions']} completions"
    )
    return counts


if __name__ == "__main__":
    flags.run(main, Config)
