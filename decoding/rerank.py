"""Re-ranking: of N answers the one that a model of steps or outcomes, or the majority, prefers.

    python -m decoding.rerank --policy=runs/maths --models runs/orm runs/prm
    python -m decoding.rerank --policy=runs/gsm8k --data=tfds:gsm8k --models runs/prm \
        --max_prompt=256 --max_new_tokens=256

Prints how often each way to choose is right. A row is a way, a column the number of answers chosen
from, always the first of the same samples. A score that knows nothing draws one of the distinct
answers: equal answers have equal scores.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data.bad_rows import OnBadRow, set_on_bad_row
from data.records import Record
from data.sources import Split, evaluated_split, open_source
from data.steps import problems
from decoding.report import as_json, powers_of_two, refuse_other_files, write_result
from evaluation.intervals import Interval, share_interval
from evaluation.steps import majority
from evaluation.tables import cells
from model_config import check_fit
from objectives.imitate import first_of_equal
from objectives.policy import missing_eos
from responses import has_ended, load_run, make_sampler, split_evenly
from rewards.models import make_step_scorer
from rewards.scorer import Check, load_check
from runtime import flags
from runtime.errors import require
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks.answers import last_number

# Answers a call.
ROWS = 512
Hits = dict[str, np.ndarray]
"""Way to choose -> [P]: 1 where its choice is right, else 0, or the chance of that."""


@dataclasses.dataclass(frozen=True)
class Config:
    policy: str = "runs/maths"
    """Run to sample from."""
    models: tuple[str, ...] = ("runs/prm",)
    """Runs of train_prm.py. Each gives three scores: `product` and `minimum` over the steps, and
    `last`, as an outcome model's is read."""
    data: str = "arithmetic"
    """Problems with answers of: arithmetic, files, or tfds:<name>."""
    split: Split | None = None
    """Part of --data; None: all of a file, else what is held out."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, with a note."""
    check: str = "tasks.answers:number"
    """module:function that is 1 where a response (first argument) has its record's answer."""
    n: int = 16
    """Answers to a problem."""
    prompts: int = 500
    """Problems, at most."""
    out: str | None = None
    """JSON file for what is printed, with the result on each problem."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_prompt: int = 16
    """Longest prompt, in tokens."""
    max_new_tokens: int = 48
    """Longest answer, in tokens."""
    missing_eos: Literal["lowest", "none"] = "lowest"
    """Rule for an answer without an end. lowest: it is wrong, has no vote, and is chosen only
    where none ended; none: as any."""
    seed: int = 0
    """Seed of the built-in problems and samples."""


class Answers(NamedTuple):
    """N answers to each of P problems, and what may choose among them."""

    texts: list[list[str]]
    """P lists of N."""
    right_PN: np.ndarray
    """1 where the answer is right, else 0."""
    finals: list[list[Any]]
    """P lists of N final answers; None does not vote."""
    scores: dict[str, np.ndarray]
    """Way to score -> [P, N], the higher the better."""
    tokens: float
    """Sampled tokens a problem."""


def sample_answers(config: Config, records: Sequence[Record], mesh: jax.sharding.Mesh) -> Answers:
    """Sample `config.n` answers to the problem of each record; check them and score them.

    `records`: at least one. Under --missing_eos=lowest an answer without an end counts as wrong,
    has no final answer, and is scored below all that have one. Raises UserError for runs, a check
    or lengths that cannot be used. Waits for the device.
    """
    # The policy, the check and the models that score.
    model, tokenizer, params = load_run(config.policy)
    length = config.max_prompt + config.max_new_tokens
    check_fit(model, tokenizer.size, length)
    check = load_check(config.check)
    scorers = {}
    for run in config.models:
        scorers[run] = make_step_scorer(run, tokenizer, mesh, length)

    # The answers, all to a problem next to one another.
    prompts = problems(records, tokenizer, config.max_prompt)
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    respond = make_sampler(model, sampling, tokenizer, config.n)
    rows = max(1, ROWS // config.n)
    responses = respond(params, prompts, jax.random.key(config.seed), rows)
    flat = [tokenizer.decode(response) for response in responses]
    texts = split_evenly(flat, config.n)
    shape = (len(records), config.n)
    ended_PN = has_ended(responses, tokenizer.ends).reshape(shape)
    counts_PN = ended_PN | (config.missing_eos == "none")

    # The scores of each model, in each of its ways.
    asked = [prompt for prompt in prompts for _ in range(config.n)]
    scores = {}
    for run, score_steps in scorers.items():
        for way, score_M in score_steps(asked, responses).items():
            ruled_PN = missing_eos(score_M.reshape(shape), ended_PN, config.missing_eos)
            scores[f"{run} {way}"] = np.asarray(ruled_PN)

    # Whether each is right, and what it votes for.
    right_PN = check_answers(check, texts, records) * counts_PN
    finals: list[list[Any]] = []
    for own, counts_N in zip(texts, counts_PN, strict=True):
        pairs = zip(own, counts_N, strict=True)
        finals.append([last_number(text) if counts else None for text, counts in pairs])

    tokens = sum(map(len, responses)) / len(records)
    return Answers(texts, right_PN, finals, scores, tokens)


def check_answers(
    check: Check, texts: Sequence[Sequence[str]], records: Sequence[Record]
) -> np.ndarray:
    """Return [P, N] float: `check`(text, record) of each text with its problem's record.

    `texts`: P lists of N. `records`: P.
    """
    right = []
    for record, own in zip(records, texts, strict=True):
        right.append([check(text, record) for text in own])
    return np.array(right)


def first_of_equal_texts(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Return [P, N] bool: False for a text that equals an earlier one to its problem.

    `texts`: P lists of N, P at least 1.
    """
    n = len(texts[0])
    # Equal numbers for equal texts, one a row.
    _, number_PN = np.unique(np.array(texts), return_inverse=True)
    number_B1 = jnp.asarray(number_PN.reshape(-1, 1))
    return np.asarray(first_of_equal(number_B1, n)).reshape(-1, n)


def choices(
    n: int, scores: dict[str, np.ndarray], answers: Sequence[Sequence[Any]]
) -> dict[str, np.ndarray]:
    """Choose among the first `n` answers to each problem by majority and by each of `scores`.

    `scores`: {way: [P, N]}, the highest wins, of equal ones the first. `answers`: P lists of N
    final answers; None does not vote. Returns {way: [P] int, the index of its choice, from 0}; the
    vote's way is called "majority".
    """
    voted = [majority(own[:n]) for own in answers]
    chosen = {"majority": np.array(voted)}
    for way, score_PN in scores.items():
        chosen[way] = score_PN[:, :n].argmax(1)
    return chosen


def hits_of_first(n: int, answers: Answers) -> Hits:
    """Return how often each way to choose among the first `n` answers is right, by problem.

    Ways: "one drawn at random", "a score that knows nothing" (which draws one of the distinct
    answers), those of `choices`, and "one of them is right", the most that any can reach.
    """
    # Of the first n answers.
    right_PN = answers.right_PN[:, :n]
    new_PN = first_of_equal_texts(answers.texts)[:, :n]
    problem_P = np.arange(len(right_PN))

    # Ways that choose at random: the chance to be right.
    hits = {
        "one drawn at random": right_PN.mean(1),
        "a score that knows nothing": np.average(right_PN, 1, new_PN),
    }
    # Ways that choose one, and the best that any of them could do.
    for way, chosen_P in choices(n, answers.scores, answers.finals).items():
        hits[way] = right_PN[problem_P, chosen_P]
    hits["one of them is right"] = right_PN.max(1)
    return hits


def main(config: Config) -> dict[str, dict[int, Interval]]:
    """Print and return the share of problems solved: {way: {n: share with its interval}}.

    n is 1, 2, 4, ... and --n. With --out it also writes a file. Raises UserError for settings,
    runs or a check that cannot be used.
    """
    require(
        min(config.n, config.prompts) >= 1,
        f"--n={config.n}, --prompts={config.prompts}: must be at least 1",
    )
    refuse_other_files(config.out)
    # Problems, and the answers to them.
    set_on_bad_row(config.on_bad_row)
    mesh = make_mesh(MeshConfig())
    split = config.split or evaluated_split(config.data)
    source = open_source(config.data, "prompt", split, seed=config.seed)
    records = source.first(config.prompts)
    answers = sample_answers(config, records, mesh)

    # Each way to choose, for each number of answers that it chooses from.
    hits_by_n = {n: hits_of_first(n, answers) for n in powers_of_two(config.n)}
    ways = hits_by_n[config.n]
    table: dict[str, dict[int, Interval]] = {}
    for way in ways:
        table[way] = {n: share_interval(hits[way]) for n, hits in hits_by_n.items()}
    print_table(table)
    print(
        f"{len(records)} problems ({config.data}, {split}), 95 % intervals; "
        f"{answers.tokens:.0f} tokens a problem for n={config.n}"
    )

    # The same as a file, with the result on each problem for all n answers.
    if config.out is not None:
        accuracy = {}
        hits_of_all = {}
        for way, row in table.items():
            accuracy[way] = {n: as_json(interval) for n, interval in row.items()}
            hits_of_all[way] = ways[way].round(4).tolist()
        write_result(config.out, config, answers.tokens, accuracy, hits_of_all)
    return table


def print_table(table: dict[str, dict[int, Interval]]) -> None:
    """Print a row for each way to choose, a column for each number of answers.

    `table`: as `main` returns it.
    """
    width = max(map(len, table)) + 2
    sizes = [f"n={n}" for n in table["majority"]]
    print(" " * width + cells(sizes, ">15"))
    for way, row in table.items():
        print(f"{way:{width}}{cells(row.values(), '>15')}")


if __name__ == "__main__":
    flags.run(main, Config)
