"""AI feedback by written principles: comparisons by a judge, and revisions after a critique.

Reinforcement learning from AI feedback, Constitutional AI, and imitation of the best refinement:

    python -m collect.feedback --write=comparisons --init=runs/align/sft --out=runs/ai/rlaif.jsonl
    python -m collect.feedback --write=revisions --init=runs/align/sft --out=runs/ai/revised.jsonl
    python -m collect.feedback --write=revisions --samples=4 --rounds=1 --reward=runs/align/rm \
        --out=runs/ai/ilf.jsonl

Comparisons are for `train_rm.py --data` (then train_ppo.py) and `train_dpo.py --data`, revisions
for `train_sft.py --data`. The world's judge, critic and reviser are simulated, of set reliability;
elsewhere, or with --judge=RUN, a language model is asked.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal, TypedDict

import jax
import numpy as np

from data.bad_rows import OnBadRow, set_on_bad_row
from data.batches import cut_left
from data.sources import Source, open_source
from evaluation.gold import CRITERIA
from evaluation.tables import cells
from responses import LoadedRun, in_parts, load_run, make_sampler, split_evenly
from rewards.judges import (
    Messages,
    Prefer,
    Revise,
    make_prefer,
    make_revise,
    make_simulated,
    read_principles,
)
from rewards.models import make_text_scorer, refuse_nan
from runtime import flags
from runtime.errors import UserError, refuse_unread, require
from runtime.run_folder import atomic_text
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks import world

# Prompts a call.
ROWS = 128
Pick = Callable[[Sequence[Messages], Sequence[list[str]]], list[str]]
"""pick(prompts, candidates of each) -> one of each prompt's candidates."""


class ComparisonRow(TypedDict):
    """A line of comparisons: the distinct responses to a prompt."""

    prompt: Messages
    responses: list[str]
    ranking: list[int]
    """1 is best, equal is a tie."""


class RevisionRow(TypedDict):
    """A line of revisions: the last one, and the way to it."""

    prompt: Messages
    revisions: list[str]
    """The first response, then one of each round."""
    critiques: list[str]
    """One of each round; empty where the critic found nothing."""
    response: str
    """The last of `revisions`."""


@dataclasses.dataclass(frozen=True)
class Config:
    write: Literal["comparisons", "revisions"] = "comparisons"
    """comparisons: several responses to each prompt, ranked. revisions: one, rewritten."""
    init: str = "runs/align/sft"
    """Run whose responses are judged."""
    out: str = "runs/ai/feedback.jsonl"
    """File to write."""
    principles: str = str(pathlib.Path(__file__).parents[1] / "tasks" / "principles.txt")
    """A principle a line."""
    judge: str | None = None
    """Run that judges, criticises and revises; None: the world's simulated one."""
    reliability: float = 0.9
    """The chance that the simulated judge, critic or reviser is right, each time."""
    reward: str | None = None
    """A run of train_rm.py that picks the best of each round's revisions (ILF)."""
    data: str = "world"
    """Prompts: world, files, or tfds:<name>."""
    split: Literal["train", "heldout"] = "train"
    """Part of the prompts."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, with a note."""
    prompts: int = 10000
    """Prompts that are responded to, at most."""
    samples: int | None = None
    """Responses to a prompt that are ranked (None: 4), or revisions in each round (None: 1)."""
    rounds: int = 3
    """Revisions one after the other, each by a principle drawn at random."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_new_tokens: int = 24
    """Longest response, critique or revision, in tokens."""
    seed: int = 0
    """Seed of the built-in prompts, samples and the simulated judge."""

    @property
    def comparing(self) -> bool:
        return self.write == "comparisons"

    @property
    def count(self) -> int:
        """Return --samples, or its default."""
        if self.samples is not None:
            return self.samples
        return 4 if self.comparing else 1


# ---- Comparisons ----


def comparison_rows(
    prefer: Prefer, prompts: Sequence[Messages], responses: Sequence[list[str]]
) -> list[ComparisonRow]:
    """Rank each prompt's distinct responses by `prefer`, the mean over its principles.

    A prompt has no row where all its responses tie, or there is one alone.
    """
    # All pairs of all prompts are asked at once.
    distinct = [list(dict.fromkeys(texts)) for texts in responses]
    questions = []
    for prompt, texts in zip(prompts, distinct, strict=True):
        for first, second in combinations(texts, 2):
            questions.append((prompt, first, second))
    answers = iter(prefer(questions).mean(1))

    # The answers come in the order of the questions.
    rows: list[ComparisonRow] = []
    for prompt, texts in zip(prompts, distinct, strict=True):
        count = len(texts)
        prefer_CC = np.full((count, count), 0.5)
        for i, j in combinations(range(count), 2):
            prefer_CC[i, j] = next(answers)
            prefer_CC[j, i] = 1 - prefer_CC[i, j]
        ranks = rank_by_preference(prefer_CC)
        if len(set(ranks)) > 1:
            rows.append({"prompt": prompt, "responses": texts, "ranking": ranks})
    return rows


def rank_by_preference(prefer_CC: np.ndarray) -> list[int]:
    """Rank C responses by their mean preference over the others: 1 is best, equal is a tie.

    prefer_CC[i, j] is P(i is better than j).
    """
    # Rounded, so that equal preferences added in another order are a tie.
    points = np.round(prefer_CC.sum(1), 6)
    return [1 + int((points > own).sum()) for own in points]


def agreement(rows: Sequence[ComparisonRow]) -> list[float]:
    """Compare rankings with the gold program, pair by pair.

    1 where the ranking prefers the same one, 1/2 where it has a tie, 0 where it prefers the other.
    Pairs with equal gold totals are left out.
    """
    right = []
    for row in rows:
        request = row["prompt"][-1]["content"]
        ranking = row["ranking"]
        gold = [world.gold(request, response).total for response in row["responses"]]
        for i, j in combinations(range(len(gold)), 2):
            if gold[i] == gold[j]:
                continue
            # Positive where the ranking prefers the one that gold prefers.
            gap = ranking[j] - ranking[i]
            if gold[i] < gold[j]:
                gap = -gap
            right.append(0.5 if gap == 0 else float(gap > 0))
    return right


def report_comparisons(rows: Sequence[ComparisonRow]) -> dict[str, float]:
    """Print and return the rows' agreement with the gold program, and the number of pairs.

    What the judge finds equal altogether is not written, and does not count: with two samples the
    agreement is above that over all pairs.
    """
    right = agreement(rows)
    share = sum(right) / max(len(right), 1)
    print(
        f"gold's order in {share:.3f} of {len(right)} untied pairs that were written (ties half)"
    )
    return {"agreement": share, "pairs": float(len(right))}


# ---- Revisions ----


def revision_rows(
    names: Sequence[str],
    revise: Revise,
    pick: Pick,
    prompts: Sequence[Messages],
    responses: Sequence[str],
    rounds: int,
    key: jax.Array,
) -> list[RevisionRow]:
    """Revise each response `rounds` times, each time by one of the principles `names` at random.

    Of a round's revisions `pick` keeps one. Rows whose last revision is empty are left out.
    """
    rows: list[RevisionRow] = [
        {"prompt": prompt, "revisions": [response], "critiques": [], "response": response}
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    for round_key in jax.random.split(key, rounds):
        # A principle for each response.
        numbers = jax.random.randint(round_key, (len(rows),), 0, len(names))
        drawn = [names[i] for i in numbers.tolist()]

        # Its critique and revisions, of which one goes on.
        current = [row["response"] for row in rows]
        critiques, candidates = revise(prompts, current, drawn, round_key)
        picked = pick(prompts, candidates)
        for row, critique, response in zip(rows, critiques, picked, strict=True):
            row["critiques"].append(critique)
            row["revisions"].append(response)
            row["response"] = response
    return [row for row in rows if row["response"].strip()]


def pick_first(prompts: Sequence[Messages], candidates: Sequence[list[str]]) -> list[str]:
    """Pick the first candidate of each prompt."""
    return [texts[0] for texts in candidates]


def make_pick(reward: str | None) -> Pick:
    """Make what picks one of a round's revisions: the best by the reward model of run `reward`.

    Scheurer et al. 2023 (ILF). Of equal scores the first wins. None: the first is picked. Raises
    UserError for a run that is no reward model's.
    """
    if reward is None:
        return pick_first
    model, tokenizer, params = load_run(reward, reward=True)
    score_texts = make_text_scorer(model, tokenizer, model.context)

    def pick(prompts: Sequence[Messages], candidates: Sequence[list[str]]) -> list[str]:
        # All candidates of all prompts are scored at once.
        repeated: list[Messages] = []
        flat: list[str] = []
        for prompt, texts in zip(prompts, candidates, strict=True):
            repeated += [prompt] * len(texts)
            flat += texts
        flat_scores = score_texts(params, repeated, flat)
        refuse_nan(reward, flat_scores)
        scores = iter(flat_scores)
        return [max(texts, key=lambda _: next(scores)) for texts in candidates]

    return pick


def report_revisions(rows: Sequence[RevisionRow], rounds: int) -> dict[str, float]:
    """Print and return the share that violates each criterion, before and after each round.

    Keys: `violated/<criterion>/<round>`, from round 0, the first response.
    """
    table = {}
    columns = [*CRITERIA[:3], "any"]
    print(f"{'violated':12}{cells(columns, '>10')}")
    for number in range(rounds + 1):
        verdicts = []
        for row in rows:
            request = row["prompt"][-1]["content"]
            verdicts.append(world.gold(request, row["revisions"][number]))
        shares = []
        for name in CRITERIA:
            violated = [not getattr(verdict, name) for verdict in verdicts]
            share = float(np.mean(violated))
            table[f"violated/{name}/{number}"] = share
            shares.append(share)
        print(f"revision {number:<3}{cells(shares, '10.3f')}")
    return table


# ---- The command ----


def check(config: Config) -> None:
    """Raise UserError for settings that cannot run together."""
    least = 2 if config.comparing else 1
    require(
        min(config.prompts, config.rounds) >= 1,
        f"--prompts={config.prompts}, --rounds={config.rounds}: must be at least 1",
    )
    require(config.count >= least, f"--samples={config.count}: must be at least {least}")
    require(
        config.comparing or config.count == 1 or config.reward is not None,
        f"--samples={config.count}: several revisions need a --reward that picks one",
    )
    require(
        config.reward is None or not config.comparing,
        f"--reward={config.reward}: picks revisions; give --write=revisions",
    )
    refuse_unread(
        config,
        {
            "rounds": (not config.comparing, "--write=revisions"),
            "reliability": (config.judge is None, "the simulated judge"),
        },
    )
    require(
        config.judge is not None or config.data == "world",
        f"--data={config.data}: name a run that judges (--judge); "
        "the simulated judge knows the world only",
    )


def make_judge(
    config: Config, principles: dict[str, str], sampling: SamplingConfig
) -> tuple[Prefer, Revise]:
    """Make what compares and what revises: of the run --judge, else simulated."""
    if config.judge is None:
        return make_simulated(list(principles), config.reliability, config.count, config.seed)
    judge = load_run(config.judge)
    prefer = make_prefer(judge, list(principles.values()))
    return prefer, make_revise(judge, principles, sampling, config.count)


def make_answer(
    policy: LoadedRun, sampling: SamplingConfig, n: int
) -> Callable[[list[Messages], jax.Array], tuple[list[Messages], list[list[str]]]]:
    """Make the sampler of `n` responses to each prompt by the language model `policy`.

    Returns answer(prompts, key) -> (prompts, texts of each), without responses that are empty or
    never ended, and without the prompts that then have none.
    """
    model, tokenizer, params = policy
    respond = make_sampler(model, sampling, tokenizer, n)
    room = model.context - sampling.max_new_tokens

    def answer(prompts: list[Messages], key: jax.Array) -> tuple[list[Messages], list[list[str]]]:
        # What exceeds the context is forgotten, the oldest turns first.
        asked = [cut_left(tokenizer.prompt(prompt), room, tokenizer) for prompt in prompts]
        tokens = respond(params, asked, key, ROWS)
        answered = []
        responses = []
        for prompt, own in zip(prompts, split_evenly(tokens, n), strict=True):
            # A response that never ended is no answer.
            texts = [text for text in tokenizer.ended(own) if text.strip()]
            if texts:
                answered.append(prompt)
                responses.append(texts)
        return answered, responses

    return answer


def prompts_of(source: Source, numbers: range, data: str) -> list[Messages]:
    """Return the prompts of these records; raises UserError for the raw text of --data."""
    records = [source[i] for i in numbers]
    if any("prompt" not in record for record in records):
        raise UserError(f"--data={data}: holds raw text; feedback is on answers to prompts")
    return [record["prompt"] for record in records]


def main(config: Config) -> dict[str, float]:
    """Write the file whole or not at all.

    Returns the counts of `lines` and `prompts` and, in the world, what the gold program says
    (`report_comparisons`, `report_revisions`).
    """
    check(config)
    principles = read_principles(config.principles)
    set_on_bad_row(config.on_bad_row)
    make_mesh(MeshConfig())
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    # Who answers, who judges, and who picks among revisions.
    policy = load_run(config.init)
    answer = make_answer(policy, sampling, config.count if config.comparing else 1)
    prefer, revise = make_judge(config, principles, sampling)
    pick = make_pick(config.reward)

    # The rows, part by part. The file is opened at once: a place that cannot be written shows.
    source = open_source(config.data, "prompt", config.split, seed=config.seed)
    count = min(config.prompts, len(source))
    rows: list[Any] = []
    with atomic_text(config.out, anew=True) as file:
        for start in in_parts(count, ROWS, config.write):
            numbers = range(start, min(start + ROWS, count))
            key = jax.random.fold_in(jax.random.key(config.seed), start)
            prompts, responses = answer(prompts_of(source, numbers, config.data), key)
            if config.comparing:
                rows += comparison_rows(prefer, prompts, responses)
            elif responses:
                first = [texts[0] for texts in responses]
                key = jax.random.fold_in(key, 1)
                names = list(principles)
                rows += revision_rows(names, revise, pick, prompts, first, config.rounds, key)
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{config.out}: {len(rows)} lines from {count} prompts")

    # In the world the gold program knows how good they are.
    counts: dict[str, float] = {"lines": len(rows), "prompts": count}
    if config.data != "world" or not rows:
        return counts
    if config.comparing:
        return counts | report_comparisons(rows)
    return counts | report_revisions(rows, config.rounds)


if __name__ == "__main__":
    flags.run(main, Config)
