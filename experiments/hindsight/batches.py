"""Chains of hindsight: comparisons as conversations, and past tokens that cannot be looked at."""

import dataclasses
from typing import Any

import numpy as np

from data.batches import Batch
from data.preferences import best_and_worst_response
from data.sources import Source

HELPFUL = "A helpful answer:"
UNHELPFUL = "An unhelpful answer:"
"""Words before a response; at generation, HELPFUL follows the prompt on a line of its own."""


def hindsight_chains(source: Source) -> Source:
    """Turn comparisons into conversations {"messages"}: best and worst response, each judged.

    The first user's turn is the prompt's last one, a newline, and the words that judge the first
    response; the second user's turn is the words that judge the other. Every second chain has the
    worst response first; one whose responses all tie has the best alone. Trained on as any
    conversation, so the loss is on the responses only (Liu et al. 2023).
    """

    def read(i: int) -> dict[str, Any]:
        record = source[i]
        best, worst = best_and_worst_response(record)
        chain = [(HELPFUL, best)]
        if worst is not None:
            chain.append((UNHELPFUL, worst))
        if i % 2:
            chain.reverse()

        # The first words end the prompt's last turn; the second are a turn of their own.
        *before, question = record["prompt"]
        messages = list(before)
        for place, (words, response) in enumerate(chain):
            if place == 0:
                turn = {**question, "content": f"{question['content']}\n{words}"}
            else:
                turn = {"role": "user", "content": words}
            messages += [turn, {"role": "assistant", "content": response}]
        return {"messages": messages}

    return dataclasses.replace(source, rows=range(len(source)), read=read)


def hide_past_tokens(batch: Batch, share: float, rng: np.random.Generator) -> Batch:
    """Hide a random `share` of the tokens of packed rows from later ones (Liu et al. 2023).

    Hidden tokens leave their segment (segment 0). The first token of each segment stays, and what
    would be predicted from a hidden token has no loss.
    """
    # The first token of a segment stays: something must be looked at.
    random_BT = rng.random(batch["tokens_BT"].shape)
    hidden_BT = (random_BT < share) & (batch["positions_BT"] > 0)
    mask_BT = batch["loss_mask_BT"].copy()
    mask_BT[:, 1:] *= ~hidden_BT[:, :-1]
    return {
        **batch,
        "loss_mask_BT": mask_BT,
        "segment_ids_BT": np.where(hidden_BT, 0, batch["segment_ids_BT"]),
    }
