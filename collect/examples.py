"""Rows of any data that training reads, as prompt and response; and chosen rows as they stand."""

import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from data.batches import SHORTEST_PROMPT, Batch, cut_left, pad_examples
from data.preferences import best_and_worst_response
from data.records import Record, Schema
from data.sources import Source, first_row, is_file, open_source, reads, rows_of
from data.tokenizer import Tokenizer
from responses import SHORTEST_WIDTH, full_parts
from runtime.errors import UserError, require
from sharding import to_host

ORDER: tuple[Schema, ...] = ("comparison", "unpaired", "steps", "chat", "text", "prompt")
"""In which schema a file is read: the first of these that reads its first row."""
# Examples a call.
ROWS = 64


class Example(NamedTuple):
    """One prompt and what answers it, as tokens."""

    prompt: list[int]
    """From bos up to the assistant's role; bos alone before a text."""
    response: list[int]
    """With the end token, unless it is a prompt that is continued."""

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.response]

    @property
    def mask(self) -> list[int]:
        """1 on the response's tokens."""
        return [0] * len(self.prompt) + [1] * len(self.response)


# --- records as examples


def schema_of(data: str, schema: Schema | None) -> Schema:
    """Return `schema`, or the one in which `data` is read where none is given.

    Raises UserError for a file whose first row no schema reads.
    """
    if schema is not None:
        return schema
    if not is_file(data):
        return "comparison"
    row = first_row(data)
    for name in ORDER:
        if reads(row, name):
            return name
    raise UserError(f"{data}: no schema reads its first row; name one with --schema to see why")


def labels_of(source: Source, schema: Schema) -> np.ndarray | None:
    """Return whether each row is desirable, [N] bool; None for rows without such a label."""
    if schema != "unpaired":
        return None
    return np.array([source[i]["desirable"] for i in range(len(source))])


def texts_to_judge(record: Record) -> tuple[str | list[Any], str]:
    """Return the prompt of a record, and its response: of a comparison the best one.

    A text, or a prompt without an answer, is a response to no prompt: "".
    """
    if "messages" in record:
        *before, last = record["messages"]
        return before, last["content"]
    if "responses" in record:
        best, _ = best_and_worst_response(record)
        return record["prompt"], best
    if "steps" in record:
        return record["prompt"], "\n".join(record["steps"])
    if "response" in record:
        return record["prompt"], record["response"]
    if "answer" in record:
        return record["prompt"], record["answer"]
    if "prompt" in record:
        return "", "\n\n".join(message["content"] for message in record["prompt"])
    return "", record["text"]


def example_of(
    prompt: str | Sequence[Any], response: str, tokenizer: Tokenizer, length: int
) -> Example:
    """Encode a prompt and its response in at most `length` tokens, for the measure of a response.

    An empty prompt is bos alone. Cut on the left: the prompt first, down to SHORTEST_PROMPT
    tokens, then the response.
    """
    answer = tokenizer.answer(response)
    asked = [tokenizer.bos]
    if prompt:
        room = max(length - len(answer), SHORTEST_PROMPT)
        asked = cut_left(tokenizer.prompt(prompt), room, tokenizer)
    return Example(asked, answer[-(length - len(asked)) :])


def record_example(record: Record, tokenizer: Tokenizer, length: int) -> Example:
    """Encode what `texts_to_judge` finds in a record of any schema; see `example_of`."""
    return example_of(*texts_to_judge(record), tokenizer, length)


def length_within(length: int | None, context: int, whose: str = "the model's") -> int:
    """Return `length`, the most tokens of an example, or where it is None the whole `context`.

    Raises UserError for a --length that is no length, naming the context as `whose`.
    """
    if length is None:
        return context
    require(
        SHORTEST_PROMPT < length <= context,
        f"--length={length}: must be above {SHORTEST_PROMPT} and at most {whose} context of "
        f"{context}",
    )
    return length


def padded_parts(examples: Sequence[Example], length: int, pad: int) -> Iterator[Batch]:
    """Yield the examples in batches of ROWS, padded on the right; the last one is filled up.

    A batch is as wide as a power of two that holds its longest example, at most `length`.
    """
    for _, part in full_parts(examples, ROWS):
        rows = [{"tokens": example.tokens, "mask": example.mask} for example in part]
        longest = max(len(row["tokens"]) for row in rows)
        width = max(SHORTEST_WIDTH, 1 << (longest - 1).bit_length())
        yield pad_examples(rows, min(width, length), pad, fixed=True)


def over_examples(
    measure: Callable[[Batch], jax.Array], examples: Sequence[Example], length: int, pad: int
) -> np.ndarray:
    """Return `measure(batch)`, [B, ...], of all examples, in their order, on the host.

    Raises UserError for a number that is not finite: rows would be chosen by it.
    """
    found = [to_host(measure(batch)) for batch in padded_parts(examples, length, pad)]
    values = np.concatenate(found)[: len(examples)]
    require(
        bool(np.isfinite(values).all()),
        "the model's numbers on these rows are not finite; name a run whose training went well",
    )
    return values


# --- the rows themselves


def open_rows(data: str, schema: Schema, seed: int) -> Source:
    """Open the records that are chosen among: all of a file, else the training split."""
    return open_source(data, schema, "all" if is_file(data) else "train", seed=seed)


def rows_as_written(data: str, schema: Schema, source: Source) -> Iterator[str]:
    """Yield the rows of `source`, of `open_rows`, as lines of JSON: of files with all their keys.

    What is no file has no rows: its records are written, which every script reads as they are.
    """
    rows: Iterator[Any] = (source[i] for i in range(len(source)))
    if is_file(data):
        rows = itertools.islice(rows_of(data, schema), len(source))
    for row in rows:
        yield as_line(row)


def as_line(row: Any) -> str:
    """Return a row as a line of JSON that UTF-8 can hold."""
    # Parquet has dates, which JSON has as texts.
    line = json.dumps(row, ensure_ascii=False, default=str)
    try:
        line.encode()
    # Half of a surrogate pair is no letter: it stays an escape.
    except UnicodeEncodeError:
        return json.dumps(row, default=str)
    return line


def folded(value: Any) -> Any:
    """Return a record, or what it holds, with its texts in lower case and single spaces."""
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, dict):
        return {key: folded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [folded(item) for item in value]
    return value


# --- files of lines


def lines_in(flag: str, path: str) -> list[str]:
    """Return the distinct lines of the file `path` of a flag, without spaces around them.

    Raises UserError for a file that cannot be read or has none.
    """
    try:
        text = pathlib.Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"--{flag}={path}: cannot be read as text ({fault})") from None
    found = dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())
    require(bool(found), f"--{flag}={path}: has none; write one a line")
    return list(found)
