"""Does a little of the pre-training text limit forgetting? Claim 7 of README.md.

    python -m experiments.instruct.run --study=replay

Conversations with 0, 1, 5 and 20 % documents among the examples.
"""

import itertools
from collections.abc import Sequence
from functools import partial

from data.batches import text_batches
from data.sources import open_source
from experiments.instruct.study import (
    Comparison,
    Config,
    Line,
    Study,
    Training,
    all_above,
    by_seed,
    gold_of_run,
    paired,
)
from model import LanguageModel, init_and_apply
from objectives.likelihood import likelihood_objective
from responses import load_run
from train_step import make_evaluation

SHARES = (0, 1, 5, 20)
"""Percent of the examples that are documents."""
LITTLE = 5
MOST_FALL = 0.02
"""What gold may fall by at LITTLE."""
BATCHES, ROWS, LENGTH = 8, 32, 64
"""Held-out documents that the loss is measured on, as train_lm.py packs them."""


def name_of(share: int) -> str:
    """Return the name of the arm with a share of documents."""
    return f"{share} %"


def arm(config: Config, seed: int, *, share: int) -> Training:
    """Return an arm: the world's conversations, and a share of its documents."""
    return Training(f"world:{100 - share} world:{share}@text" if share else "world")


ARMS = {name_of(share): partial(arm, share=share) for share in SHARES}


def measure(config: Config, arm: str, run: str, seed: int) -> dict[str, float]:
    """Return a run's gold, and its loss on held-out documents in nats a token."""
    model, tokenizer, params = load_run(run)
    _, apply = init_and_apply(LanguageModel(model))
    texts = open_source("world", "text", "heldout", seed=seed)
    packed = text_batches(texts, tokenizer, batch_size=ROWS, length=LENGTH)
    means = make_evaluation(partial(likelihood_objective, apply))(
        params, packed.once(batches=BATCHES)
    )
    return {**gold_of_run(config, arm, run, seed), "document_loss": means["eval/loss"]}


def compare(results: Sequence[Line]) -> list[Comparison]:
    """Compare the loss at each share with the next one's, and the fall of gold with its limit."""
    losses = {share: by_seed(results, name_of(share), "document_loss") for share in SHARES}
    falls = [
        paired(f"loss on documents at {less} % less that at {more} %", losses[less], losses[more])
        for less, more in itertools.pairwise(SHARES)
    ]
    kept = paired("", by_seed(results, name_of(LITTLE)), by_seed(results, name_of(0)))
    within = [gap + MOST_FALL for gap in kept.gaps]
    return [*falls, Comparison(f"gold at {LITTLE} % less gold at 0 %, plus {MOST_FALL}", within)]


STUDY = Study(
    name="replay",
    claim="7. 5 % of the pre-training text limits forgetting",
    arms=ARMS,
    measure=measure,
    compare=compare,
    decide=all_above,
    measures=("all", "document_loss"),
)
