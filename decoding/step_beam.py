"""Step-level beam search: a model of steps keeps the best partial solutions as they are written.

    python -m decoding.step_beam --policy=runs/maths --model=runs/prm --beams=4 --branch=4

Snell et al. 2024. Compare with as many answers of decoding/rerank.py, --n = beams x branch: both
print the tokens sampled a problem. What is found with --split=train can be imitated, and searched
from again: expert iteration (Anthony et al. 2017), as experiments/arithmetic/search.sh does.
"""

import runtime.interrupt  # noqa: F401

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Literal, TextIO

import jax
import numpy as np

from data.bad_rows import OnBadRow, set_on_bad_row
from data.records import Record
from data.sources import Split, evaluated_split, open_source
from data.steps import problems
from data.tokenizer import Tokenizer, is_ended
from decoding.report import as_json, refuse_other_files, write_result
from evaluation.intervals import Interval, share_interval
from model_config import check_fit
from objectives.policy import MissingEos, missing_eos
from objectives.reward import StepScore
from responses import Tokens, has_ended, load_run, make_sampler, split_evenly
from rewards.models import make_step_scorer
from rewards.scorer import load_check
from runtime import flags
from runtime.errors import require
from runtime.run_folder import atomic_text
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh

# Steps a call.
ROWS = 512


@dataclasses.dataclass(frozen=True)
class Config:
    policy: str = "runs/maths"
    """Run to sample from."""
    model: str = "runs/prm"
    """Run of train_prm.py that scores partial solutions."""
    how: StepScore = "product"
    """How the steps so far make one score (objectives/reward.py)."""
    data: str = "arithmetic"
    """Problems with answers of: arithmetic, files, or tfds:<name>."""
    split: Split | None = None
    """Part of these problems; None: all of a file, else what is held out."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, with a note."""
    check: str = "tasks.answers:number"
    """module:function that is 1 where a response (first argument) has its record's answer."""
    beams: int = 4
    """Partial solutions kept after each step."""
    branch: int = 4
    """Next steps sampled of each of them; the first step is sampled beams x branch times."""
    prompts: int = 500
    """Problems, at most."""
    out: str | None = None
    """JSON file for what is printed, with the result on each problem."""
    solutions: str | None = None
    """File for the solutions that are right, as conversations for train_sft.py."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_prompt: int = 16
    """Longest prompt, in tokens."""
    max_new_tokens: int = 48
    """Longest solution, in tokens."""
    missing_eos: Literal["lowest", "none"] = "lowest"
    """Rule for a solution that is full without an end. lowest: it is wrong, and kept only where
    all are; none: as any."""
    seed: int = 0
    """Seed of the built-in problems and samples."""


def search(
    prompts: Sequence[Tokens],
    extend: Callable[[list[Tokens], int], list[Tokens]],
    score: Callable[[list[Tokens], list[Tokens]], np.ndarray],
    ends: Sequence[int],
    *,
    beams: int,
    branch: int,
    longest: int,
    rule: MissingEos = "lowest",
) -> tuple[list[Tokens], int]:
    """Search a solution to each prompt, step by step.

    Prompts, solutions and steps are lists of token ids. `extend(contexts, round)` returns `branch`
    sampled next steps of each context (a prompt and a partial solution), in order; rounds count
    from 0. `score(prompts, solutions)` returns [N], the higher the better, of partial solutions
    too. Returns (the best-scored solution to each prompt, without the prompt; the number of tokens
    sampled in all).

    A solution is finished when it ends in one of `ends`, and stays among the candidates; one of
    `longest` tokens without an end goes no further, and is scored by `rule`. With the rule
    "lowest", where none of the last beams came to an end, the latest finished one that fell out of
    them is returned, if there is one.
    """

    def is_open(tokens: Tokens) -> bool:
        return not is_ended(tokens, ends) and len(tokens) < longest

    # Of each problem the beams: partial solutions, best first; at first all are empty.
    kept: list[list[Tokens]] = [[[] for _ in range(beams)] for _ in prompts]
    # And the best that is finished, in the beams or out of them by now.
    finished: list[Tokens] = [[] for _ in prompts]
    sampled = 0
    number = 0
    while any(is_open(tokens) for own in kept for tokens in own):
        # All are extended, and the steps of finished ones ignored: each round has one shape.
        contexts = []
        for prompt, own in zip(prompts, kept, strict=True):
            for tokens in own:
                contexts.append([*prompt, *tokens])
        steps = iter(extend(contexts, number))

        # A finished solution is repeated: all problems have beams x branch candidates.
        candidates: list[Tokens] = []
        for own in kept:
            for tokens in own:
                new = [next(steps) for _ in range(branch)]
                if is_open(tokens):
                    sampled += sum(map(len, new))
                    candidates += [[*tokens, *step][:longest] for step in new]
                else:
                    candidates += [tokens] * branch

        # The best of them go on.
        each = beams * branch
        asked = [prompt for prompt in prompts for _ in range(each)]
        ended_N = has_ended(candidates, ends)
        goes_on_N = ended_N | np.array([is_open(tokens) for tokens in candidates])
        scores_N = np.asarray(missing_eos(score(asked, candidates), goes_on_N, rule))
        by_problem = split_evenly(candidates, each)
        scored = list(zip(by_problem, scores_N.reshape(-1, each), strict=True))
        kept = [best(*pair, beams) for pair in scored]
        ended = ended_N.reshape(-1, each)
        found = [best_finished(*pair, own) for pair, own in zip(scored, ended, strict=True)]
        finished = [new or before for new, before in zip(found, finished, strict=True)]
        number += 1

    # The best of the beams; by `lowest` what has an end, where anything has.
    firsts = [own[0] for own in kept]
    if rule == "lowest":
        firsts = [whole or first for whole, first in zip(finished, firsts, strict=True)]
    return firsts, sampled


def best_finished(candidates: Sequence[Tokens], scores: np.ndarray, ended_N: np.ndarray) -> Tokens:
    """Return the best-scored candidate where `ended_N`, bool, is True; [] where it is nowhere.

    `candidates`: N lists of token ids. `scores`: [N]; of equal ones the first wins.
    """
    if not ended_N.any():
        return []
    return candidates[np.where(ended_N, scores, -np.inf).argmax()]


def best(candidates: Sequence[Tokens], scores: np.ndarray, beams: int) -> list[Tokens]:
    """Return the `beams` candidates with the highest `scores` [N], best first.

    Of equal scores the first comes first. Candidates, lists of token ids, that are equal are
    repeated only where there are fewer than `beams` distinct ones.
    """
    order = sorted(range(len(candidates)), key=lambda i: -scores[i])
    in_order = [candidates[i] for i in order]
    distinct = {tuple(tokens): tokens for tokens in in_order}
    return [*distinct.values(), *in_order][:beams]


def search_problems(
    config: Config, records: Sequence[Record], mesh: jax.sharding.Mesh
) -> tuple[list[Tokens], int, Tokenizer]:
    """Search a solution to the problem of each record by the models that `config` names.

    Returns (solutions, lists of token ids; tokens sampled in all; the policy's tokenizer). Raises
    UserError for runs or lengths that cannot be used.
    """
    # The policy, what scores its steps, and the problems.
    model, tokenizer, params = load_run(config.policy)
    length = config.max_prompt + config.max_new_tokens
    check_fit(model, tokenizer.size, length)
    score_steps = make_step_scorer(config.model, tokenizer, mesh, length)
    prompts = problems(records, tokenizer, config.max_prompt)

    # A sampler of one step: a newline ends it too.
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    respond = make_sampler(model, sampling, tokenizer, config.branch, ends=tokenizer.newlines())
    key = jax.random.key(config.seed)
    rows = max(1, ROWS // config.branch)

    def extend(contexts: list[Tokens], number: int) -> list[Tokens]:
        return respond(params, contexts, jax.random.fold_in(key, number), rows)

    def score(prompts: list[Tokens], solutions: list[Tokens]) -> np.ndarray:
        return score_steps(prompts, solutions)[config.how]

    found, sampled = search(
        prompts,
        extend,
        score,
        tokenizer.ends,
        beams=config.beams,
        branch=config.branch,
        longest=config.max_new_tokens,
        rule=config.missing_eos,
    )
    return found, sampled, tokenizer


def main(config: Config) -> tuple[Interval, float]:
    """Print and return the share of problems solved and the tokens sampled a problem, their mean.

    With --out and --solutions it also writes files. Raises UserError for settings, runs or a check
    that cannot be used.
    """
    require(
        min(config.beams, config.branch, config.prompts) >= 1,
        f"--beams={config.beams}, --branch={config.branch}, --prompts={config.prompts}: "
        "must be at least 1",
    )
    refuse_other_files(config.out, config.solutions)
    # Made before the search: where it cannot be, nothing is searched in vain.
    opened: contextlib.AbstractContextManager[TextIO | None] = contextlib.nullcontext()
    if config.solutions is not None:
        opened = atomic_text(config.solutions, anew=True)
    with opened as solutions:
        set_on_bad_row(config.on_bad_row)
        mesh = make_mesh(MeshConfig())
        check = load_check(config.check)
        split = config.split or evaluated_split(config.data)
        source = open_source(config.data, "prompt", split, seed=config.seed)
        records = source.first(config.prompts)
        found, sampled, tokenizer = search_problems(config, records, mesh)

        # How many are right.
        texts = [tokenizer.decode(tokens) for tokens in found]
        ended_N = has_ended(found, tokenizer.ends)
        counts_N = ended_N | (config.missing_eos == "none")
        checked_N = np.array([check(*pair) for pair in zip(texts, records, strict=True)])
        right = (checked_N * counts_N).tolist()

        # Those that are right and came to their end.
        if solutions is not None:
            for record, text, hit, end in zip(records, texts, right, ended_N, strict=True):
                if hit and end:
                    said = {"role": "assistant", "content": text}
                    row = {"messages": [*record["prompt"], said]}
                    solutions.write(json.dumps(row) + "\n")

    accuracy = share_interval(right)
    tokens = sampled / len(records)
    which = f"{len(records)} problems ({config.data}, {split})"
    print(f"{which}: {accuracy} right, {tokens:.0f} tokens each")
    if config.out is not None:
        write_result(config.out, config, tokens, as_json(accuracy), right)
    return accuracy, tokens


if __name__ == "__main__":
    flags.run(main, Config)
