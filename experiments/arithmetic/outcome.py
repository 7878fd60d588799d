"""Measure how well outcome models tell right solutions from wrong ones.

    python -m experiments.arithmetic.outcome POLICY LABELLED.jsonl MODEL...

Prints the AUC over all solutions, and between solutions to one problem. LABELLED is made by
`collect/steps.py --labels=outcome`, with --split=heldout and a --seed of its own for held-out
problems.
"""

import runtime.interrupt  # noqa: F401

import collections
import itertools
import json
import sys

import numpy as np

from data.sources import open_source
from data.tokenizer import Tokenizer
from evaluation.steps import auc
from rewards.models import make_step_scorer
from runtime.errors import UserError
from runtime.flags import ending_in_one_line
from sharding import MeshConfig, make_mesh
from tasks import arithmetic

LENGTH = 64  # of prompt and solution, as train_prm.py's


def within(scores: np.ndarray, right: np.ndarray, problems: list[str]) -> float:
    """Return the share of pairs that `scores` orders as they should be, ties a half.

    Pairs are a right and a wrong solution to one problem.
    """
    # The rows of each problem.
    of_problem = collections.defaultdict(list)
    for i, problem in enumerate(problems):
        of_problem[problem].append(i)

    # The right solution's score less the wrong one's, for each such pair.
    gaps = []
    for own in of_problem.values():
        for i, j in itertools.product(own, own):
            if right[i] > right[j]:
                gaps.append(scores[i] - scores[j])
    return float(np.mean(0.5 * (np.sign(gaps) + 1)))


def main() -> None:
    if len(sys.argv) < 4:
        raise UserError(
            "usage: python -m experiments.arithmetic.outcome POLICY LABELLED.jsonl MODEL..."
        )
    policy, labelled, *models = sys.argv[1:]
    mesh = make_mesh(MeshConfig())
    tokenizer = Tokenizer.load(policy)
    source = open_source(labelled, "steps", "all")

    # Solutions, which of them are right, and which have a wrong step.
    prompts = []
    responses = []
    problems = []
    is_right = []
    is_faulty = []
    for row in source.first(len(source)):
        prompts.append(tokenizer.prompt(row["prompt"]))
        responses.append(tokenizer.answer("\n".join(row["steps"])))
        problems.append(json.dumps(row["prompt"]))
        is_right.append(row["labels"][-1] > 0.5)
        verdicts = arithmetic.verdicts(row["prompt"][-1]["content"], row["steps"])
        is_faulty.append(arithmetic.NEGATIVE in verdicts)
    right = np.array(is_right)
    faulty = np.array(is_faulty)
    told = f"{right.mean():.3f} right, of those with a wrong step {right[faulty].mean():.3f}"
    print(f"{labelled}: {len(right)} distinct solutions, {told}")

    # How well each model tells them apart.
    for model in models:
        score = make_step_scorer(model, tokenizer, mesh, LENGTH)
        scores = score(prompts, responses)["last"]
        inside = within(scores, right, problems)
        print(f"{model}: AUC {auc(scores, right):.3f}, within a problem {inside:.3f}")


if __name__ == "__main__":
    ending_in_one_line(main)
