"""Measure how well outcome models tell right solutions from wrong ones.

    python -m experiments.arithmetic.outcome POLICY LABELLED.jsonl MODEL...

Prints the AUC over all solutions, and between solutions to one problem. LABELLED is made by
`collect/steps.py --labels=outcome`, with --split=heldout and a --seed of its own for held-out
problems.
"""

import runtime.interrupt  # noqa: F401

import collections
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
    of_problem = collections.defaultdict(list)
    for i, problem in enumerate(problems):
        of_problem[problem].append(i)
    gaps = [
        scores[i] - scores[j]
        for own in of_problem.values()
        for i in own
        for j in own
        if right[i] > right[j]
    ]
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
    rows = [source[i] for i in range(len(source))]
    right = np.array([row["labels"][-1] for row in rows]) > 0.5
    prompts = [tokenizer.prompt(row["prompt"]) for row in rows]
    responses = [tokenizer.answer("\n".join(row["steps"])) for row in rows]
    verdicts = [arithmetic.verdicts(row["prompt"][-1]["content"], row["steps"]) for row in rows]
    faulty = np.array([arithmetic.NEGATIVE in of_one for of_one in verdicts])
    told = f"{right.mean():.3f} right, of those with a wrong step {right[faulty].mean():.3f}"
    print(f"{labelled}: {len(rows)} distinct solutions, {told}")
    for model in models:
        scores = make_step_scorer(model, tokenizer, mesh, LENGTH)(prompts, responses)["last"]
        inside = within(scores, right, [json.dumps(row["prompt"]) for row in rows])
        print(f"{model}: AUC {auc(scores, right):.3f}, within a problem {inside:.3f}")


if __name__ == "__main__":
    ending_in_one_line(main)
