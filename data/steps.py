"""Batches of solutions in steps, for a process reward model: a target at each labelled step.

A step is a line that holds something. Its last token, where the target stands, is the newline
that ends it; the last step ends in eos instead. objectives.reward.step_ends is the same rule for
tokens.
"""

import re
from collections.abc import Sequence
from typing import Unpack

import numpy as np

from data.batches import (
    Batch,
    Batches,
    BatchOptions,
    Encoded,
    Layout,
    Record,
    Row,
    encode_prompt,
    pad_examples,
    say_cut,
)
from data.sources import Source
from data.tokenizer import Tokenizer
from runtime.errors import UserError

TARGETS = {"positive": 1.0, "neutral": 1.0, "negative": 0.0}
"""Neutral counts as right: the default of Lightman et al. 2023 (section 2.4, appendix F)."""


def lines_of(text: str) -> list[tuple[str, str]]:
    """Return the steps of a solution, and the newlines after each, blank lines among them.

    Lines that hold nothing are no steps: several newlines end a step as one does.
    """
    first, *parts = re.split(r"(\n(?:[^\S\n]*\n)*)", text)
    lines = [first, *parts[1::2]]
    ends = [*parts[0::2], ""]
    return [(line, end) for line, end in zip(lines, ends, strict=True) if line.strip()]


def target_of(label: str | float | None) -> float:
    """Return the target in [0, 1] of a step's label; 0 without a label, where no loss is."""
    if label is None:
        return 0.0
    if isinstance(label, str):
        return TARGETS[label]
    return float(label)


def encode_steps(record: Record, tokenizer: Tokenizer, length: int) -> Encoded:
    """Encode a record of the schema `steps` as one row {"tokens", "mask", "targets"}.

    The tokens are the prompt's, then each step's and its newline, at the end eos. The mask is 1
    at the last token of each labelled step, where `targets` holds the label's number. Cut on the
    right to `length` tokens; dropped where no label is left.
    """
    # Nothing is predicted in the prompt.
    tokens = tokenizer.prompt(record["prompt"])
    mask = [0] * len(tokens)
    targets = [0.0] * len(tokens)
    last = len(record["steps"]) - 1
    for i, (step, label) in enumerate(zip(record["steps"], record["labels"], strict=True)):
        # As a policy samples it: a newline after each step, eos after the last.
        end = [tokenizer.turn_end] if i == last else tokenizer.encode("\n")
        step_tokens = [*tokenizer.encode(step), *end]
        before_last = len(step_tokens) - 1
        tokens += step_tokens
        mask += [0] * before_last + [int(label is not None)]
        targets += [0.0] * before_last + [target_of(label)]

    # Cut on the right; a solution without a label left is dropped.
    row: Row = {"tokens": tokens[:length], "mask": mask[:length], "targets": targets[:length]}
    rows = [row] if any(row["mask"]) else []
    return Encoded(rows, len(tokens) > length)


def problems(records: Sequence[Record], tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Return the prompt tokens of each record, ready for generation.

    Each has at most `length` tokens, cut on the left (see `without_beginning`). Raises UserError
    for records of raw text, which have no answer to check.
    """
    if any("prompt" not in record for record in records):
        raise UserError("--data: holds raw text; give rows with prompt and answer")
    prompts = []
    for record in records:
        encoded = encode_prompt(record, tokenizer, length)
        if encoded.truncated:
            say_cut()
        prompts.append(encoded.rows[0]["tokens"])
    return prompts


def pad_steps(rows: Sequence[Row], length: int, pad: int, fixed: bool = False) -> Batch:
    """Pad rows of `encode_steps` on the right: the arrays of `pad_examples`, and targets_BT.

    targets_BT float32 is in [0, 1] and counts where loss_mask_BT is 1.
    """
    batch = pad_examples(rows, length, pad, fixed)
    targets_BT = np.zeros_like(batch["loss_mask_BT"])
    for b, row in enumerate(rows):
        targets_BT[b, : len(row["targets"])] = row["targets"]
    return {**batch, "targets_BT": targets_BT}


def steps_batches(
    source: Source, tokenizer: Tokenizer, **options: Unpack[BatchOptions]
) -> Batches:
    """Iterate over solutions with labelled steps, one a row; arrays as of `pad_steps`.

    `source`: records of the schema `steps`. Solutions longer than `length` are cut on the right,
    and dropped where no label is left.
    """
    return Batches(Layout(encode_steps, pad_steps), source, tokenizer, **options)
