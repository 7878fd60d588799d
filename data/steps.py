"""Solutions in steps as batches: a target at the last token of each labelled step; and how well a model tells them.

A step is a line: training adds the newline that ends it to its tokens, and eos to the last one's.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from data.batches import Batch, Batches, Row, encode_prompt, pad_examples
from data.tokenizer import Tokenizer
from runtime.errors import UserError

TARGETS = {"positive": 1.0, "neutral": 1.0, "negative": 0.0}
"""Neutral counts as right: the default of Lightman et al. 2023 (section 2.4, appendix F)."""


def encode_steps(record: Row, tokenizer: Tokenizer, length: int) -> tuple[list[Row], bool]:
    """{"tokens", "mask", "targets"}: mask 1 at each labelled step's last token. Cut on the right, and dropped where
    no label is left."""
    tokens = tokenizer.prompt(record["prompt"])
    mask, targets = [0] * len(tokens), [0.0] * len(tokens)
    last = len(record["steps"]) - 1
    for i, (step, label) in enumerate(zip(record["steps"], record["labels"], strict=True)):
        end = [tokenizer.eos] if i == last else tokenizer.encode("\n")
        ids = [*tokenizer.encode(step), *end]
        tokens += ids
        mask += [0] * (len(ids) - 1) + [int(label is not None)]
        targets += [0.0] * (len(ids) - 1) + [
            0.0 if label is None else float(TARGETS.get(label, label))
        ]
    row = {"tokens": tokens[:length], "mask": mask[:length], "targets": targets[:length]}
    return [row] if any(row["mask"]) else [], len(tokens) > length


def problems(records: Sequence[Row], tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """The tokens of each record's prompt, at most `length`; raises UserError for raw text, which has no answer."""
    if any("prompt" not in record for record in records):
        raise UserError("--data: holds raw text; give rows with prompt and answer")
    return [encode_prompt(record, tokenizer, length)[0][0]["tokens"] for record in records]


def pad_steps(rows: Sequence[Row], length: int, pad: int, fixed: bool = False) -> Batch:
    """As `pad_examples`, with targets_BT in [0, 1], which counts where loss_mask_BT is 1."""
    batch = pad_examples(rows, length, pad, fixed)
    targets_BT = np.zeros_like(batch["loss_mask_BT"])
    for b, row in enumerate(rows):
        targets_BT[b, : len(row["targets"])] = row["targets"]
    return {**batch, "targets_BT": targets_BT}


steps_batches = partial(Batches, encode_steps, pad_steps)
"""Solutions with labelled steps; `steps_batches(source, tokenizer, batch_size=, length=, ...)`."""
