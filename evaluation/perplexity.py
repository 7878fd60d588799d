"""Perplexity of a language model on conversations, each of them once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from data.batches import Batches, Layout, encode_chat, pad_examples
from data.sources import Source
from data.tokenizer import Tokenizer
from model import Params
from objectives.likelihood import Apply, likelihood_objective
from train_step import make_evaluation

# Conversations a call, one a row.
ROWS = 32


def make_perplexity_evaluation(
    apply: Apply, source: Source, tokenizer: Tokenizer, length: int, most: int
) -> Callable[[Params], dict[str, float]]:
    """Make the measure of a language model on the first `most` conversations of `source`.

    Returns evaluate(params) -> {"tokens", "loss", "perplexity"}: the assistant's tokens (its ends
    of turn included), their mean negative log-probability in nats, and exp of that. `apply`: of
    the LanguageModel. Conversations are cut on the right to `length` tokens; raises UserError
    where none has an assistant's token left.
    """
    # A row each: so no conversation counts twice, or hangs on its neighbours.
    layout = Layout(encode_chat, pad_examples)
    rows = Batches(layout, source, tokenizer, batch_size=ROWS, length=length)
    batches: list[Any] = rows.once(records=most)
    tokens = sum(float(batch["loss_mask_BT"].sum()) for batch in batches)
    means_of = make_evaluation(partial(likelihood_objective, apply))

    def evaluate(params: Params) -> dict[str, float]:
        # Without what a model adds to its loss beside the likelihood.
        means = means_of(params, batches)
        loss = means["eval/loss"] - means.get("eval/auxiliary_loss", 0.0)
        return {"tokens": tokens, "loss": loss, "perplexity": float(np.exp(loss))}

    return evaluate
