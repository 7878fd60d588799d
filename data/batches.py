"""Batches: records to fixed-shape arrays, and an endless iterator over them that resumes exactly.

Every host reads a disjoint part of one shuffled order. Prefetching never shows in the state.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grain
import numpy as np

from data.packing import pack, split_document
from data.sources import Source
from data.tokenizer import Tokenizer
from runtime.errors import UserError

Batch = dict[str, np.ndarray]
Row = dict[str, Any]
PACKING_WINDOW = 512
"""Examples packed together."""


# ---- One record to rows: how examples are tokenised and cut ----


def encode_text(record: Row, tokenizer: Tokenizer, length: int) -> tuple[list[Row], bool]:
    """Rows {"tokens", "mask"}, and whether anything was lost (never: long documents are split)."""
    pieces = split_document(tokenizer.document(record["text"]), length)
    return [{"tokens": tokens, "mask": mask} for tokens, mask in pieces], False


def encode_chat(record: Row, tokenizer: Tokenizer, length: int) -> tuple[list[Row], bool]:
    """As `encode_text`; too long ones are cut on the right, and dropped if no answer is left."""
    tokens, mask = tokenizer.chat(record["messages"])
    lost = len(tokens) > length
    rows = [{"tokens": tokens[:length], "mask": mask[:length]}]
    return rows if any(mask[:length]) else [], lost


def encode_comparison(record: Row, tokenizer: Tokenizer, length: int) -> tuple[list[Row], bool]:
    """{"prompts", "responses", "ranking", "margin", "record"}; a prompt too long is cut on the left, and the
    record dropped where the responses leave no room."""
    prompt = tokenizer.prompt(record["prompt"])
    responses = [[*tokenizer.encode(response), tokenizer.eos] for response in record["responses"]]
    room = length - max(map(len, responses))
    if room < min(len(prompt), 8):  # so little of a prompt says nothing
        return [], True
    row = {
        "prompts": [cut_left(prompt, room, tokenizer)] * len(responses),
        "responses": responses,
        "record": record,
        "ranking": record["ranking"],
        "margin": record.get("margin", 0.0),
    }
    return [row], len(prompt) > room


def encode_prompt(record: Row, tokenizer: Tokenizer, length: int) -> tuple[list[Row], bool]:
    """{"tokens", "record"}: a prompt ready for generation, or bos and raw text; cut on the left."""
    if "prompt" in record:
        tokens = tokenizer.prompt(record["prompt"])
    else:
        tokens = [tokenizer.bos, *tokenizer.encode(record["text"])]
    return [{"tokens": cut_left(tokens, length, tokenizer), "record": record}], len(
        tokens
    ) > length


def cut_left(tokens: list[int], length: int, tokenizer: Tokenizer) -> list[int]:
    """At most `length` of `tokens`: bos, the role whose turn is cut into, and the end, from after a newline
    if its first half has one. Raises UserError below 3 tokens, which hold no prompt."""
    if len(tokens) <= length:
        return tokens
    if length < 3:
        raise UserError(
            f"{length} tokens hold no prompt; raise --max_prompt or --length, or lower --max_new_tokens"
        )
    roles = {tokenizer.system, tokenizer.user, tokenizer.assistant} - {None}
    cut = len(tokens) - length + (2 if tokens[1] in roles else 1)
    newline = tokenizer.encode("\n")[-1]
    cut = next(
        (t + 1 for t in range(cut - 1, (cut + len(tokens)) // 2) if tokens[t] == newline), cut
    )
    role = next((token for token in reversed(tokens[:cut]) if token in roles), None)
    return [tokens[0], *([] if role is None or tokens[cut] in roles else [role]), *tokens[cut:]]


# ---- Rows to arrays ----


def bucket(n: int, length: int, fixed: bool = False) -> int:
    """The least of 1/4, 1/2, 3/4 (multiples of 8) and all of `length` that holds `n` tokens: few shapes, few
    compilations. `fixed` is for several hosts, whose shapes must agree: always `length`."""
    sizes = [min(-(-length * quarter // 32) * 8, length) for quarter in (1, 2, 3, 4)]
    return length if fixed else next(size for size in sizes if size >= n)


def pad_examples(rows: Sequence[Row], length: int, pad: int, fixed: bool = False) -> Batch:
    """One example a row, padded on the right: tokens_BT, loss_mask_BT, segment_ids_BT, positions_BT."""
    shape = (len(rows), bucket(max(len(row["tokens"]) for row in rows), length, fixed))
    batch = {
        "tokens_BT": np.full(shape, pad, np.int32),
        "loss_mask_BT": np.zeros(shape, np.float32),
        "segment_ids_BT": np.zeros(shape, np.int32),
        "positions_BT": np.zeros(shape, np.int32),
    }
    for b, row in enumerate(rows):
        n = len(row["tokens"])
        batch["tokens_BT"][b, :n] = row["tokens"]
        batch["loss_mask_BT"][b, :n] = row["mask"]
        batch["segment_ids_BT"][b, :n] = 1
        batch["positions_BT"][b, :n] = np.arange(n)
    return batch


def pad_comparisons(
    rows: Sequence[Row], length: int, pad: int, fixed: bool = False, candidates: int = 2
) -> Batch:
    """tokens_BCT, loss_mask_BCT (responses with eos), segment_ids_BCT, positions_BCT, padded on the right;
    ranks_BC (1 the best, equal a tie, 0 no candidate); margin_B. C is `candidates`."""
    widest = max(
        len(p) + len(r)
        for row in rows
        for p, r in zip(row["prompts"], row["responses"], strict=True)
    )
    shape = (len(rows), candidates, bucket(widest, length, fixed))
    batch = {
        "tokens_BCT": np.full(shape, pad, np.int32),
        "loss_mask_BCT": np.zeros(shape, np.float32),
        "segment_ids_BCT": np.zeros(shape, np.int32),
        "positions_BCT": np.zeros(shape, np.int32),
        "ranks_BC": np.zeros(shape[:2], np.int32),
        "margin_B": np.array([row["margin"] for row in rows], np.float32),
    }
    for b, row in enumerate(rows):
        if len(row["responses"]) > candidates:
            raise UserError(
                f"a comparison has {len(row['responses'])} responses, more than {candidates}"
            )
        for c, (prompt, response) in enumerate(zip(row["prompts"], row["responses"], strict=True)):
            start, n = len(prompt), len(prompt) + len(response)
            batch["tokens_BCT"][b, c, :n] = [*prompt, *response]
            batch["loss_mask_BCT"][b, c, start:n] = 1
            batch["segment_ids_BCT"][b, c, :n] = 1
            batch["positions_BCT"][b, c, :n] = np.arange(n)
            batch["ranks_BC"][b, c] = row["ranking"][c]
    return batch


def pad_prompts(rows: Sequence[Row], length: int, pad: int, fixed: bool = False) -> Batch:
    """tokens_BT, segment_ids_BT, positions_BT (0 at the first token), padded on the left."""
    shape = (len(rows), bucket(max(len(row["tokens"]) for row in rows), length, fixed))
    batch = {
        "tokens_BT": np.full(shape, pad, np.int32),
        "segment_ids_BT": np.zeros(shape, np.int32),
        "positions_BT": np.zeros(shape, np.int32),
    }
    for b, row in enumerate(rows):
        start = shape[1] - len(row["tokens"])
        batch["tokens_BT"][b, start:] = row["tokens"]
        batch["segment_ids_BT"][b, start:] = 1
        batch["positions_BT"][b, start:] = np.arange(len(row["tokens"]))
    return batch


def collate(
    encode: Callable, pad: Callable, records: Sequence[Row], tokenizer: Tokenizer, length: int
) -> Batch:
    """One batch of these records, as for evaluation: `collate(encode_chat, pad_examples, records, ...)`.

    What `encode` drops is missing from it, so give a `length` that holds them if rows must match records.
    """
    rows = [row for record in records for row in encode(record, tokenizer, length)[0]]
    return pad(rows, length, tokenizer.pad)


# ---- The iterator ----


class Batches:
    """Endless batches; `state` and `restore` make them go on exactly where they stopped.

    The shuffled order is cut into windows of consecutive examples, each a function of (seed, number): with
    packing the examples packed together, else a batch. `batch_size` counts rows over all `processes` (hosts).
    `without`: numbers, from 1, of batches that are passed over.
    """

    def __init__(
        self,
        encode: Callable,
        pad: Callable,
        source: Source,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        length: int,
        packing: bool = False,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
        without: Collection[int] = (),
    ):
        if batch_size % processes:
            raise UserError(
                f"--batch_size={batch_size}: must be a multiple of the {processes} hosts"
            )
        if len(source) < batch_size and process == 0:
            print(
                f"note: {source.name} has {len(source)} records, fewer than a batch of {batch_size}: "
                "they repeat within a batch",
                file=sys.stderr,
            )
        self._encode, self._pad, self._source, self._tokenizer = encode, pad, source, tokenizer
        self._rows, self._length, self._packing = batch_size // processes, length, packing
        self._window = PACKING_WINDOW if packing else self._rows
        self._process, self._processes, self._without = process, processes, without
        # Indices past its end are those of the next epoch, in another order.
        self._order = grain.MapDataset.range(len(source)).seed(seed).shuffle()
        self._made: tuple[int, list[Row], dict[str, int]] = (-1, [], {})  # the last window made
        self._pool = ThreadPoolExecutor(1, "batches")
        self.records: list[Row] = []
        """Of the last prompt or comparison batch, the record of each row on this host."""
        self.restore(
            {
                "batches": 0,
                "window": 0,
                "row": 0,
                "truncated": 0,
                "dropped": 0,
                "processes": processes,
            }
        )

    @property
    def state(self) -> dict[str, int]:
        """What the batches to come depend on beside the arguments, as JSON; hosts that pack differ in it."""
        return dict(self._state)

    def restore(self, state: dict[str, int]) -> None:
        """Go on after the batch at which `state` was read."""
        if state["processes"] != self._processes:
            raise UserError(
                f"the data's position was saved on {state['processes']} hosts, these are "
                f"{self._processes}; resume on as many"
            )
        self._state, self._next = dict(state), None

    @property
    def epoch(self) -> float:
        """Passes over the source so far."""
        return self._state["window"] * self._window * self._processes / len(self._source)

    @property
    def truncated(self) -> int:
        """Examples of which a part was cut off so far, on this host."""
        return self._state["truncated"]

    @property
    def dropped(self) -> int:
        """Examples left out as too long so far, on this host."""
        return self._state["dropped"]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        future = self._next or self._pool.submit(self._make, self._state)
        batch, self.records, self._state = future.result()
        self._next = self._pool.submit(
            self._make, self._state
        )  # one ahead, while the device works
        return batch

    def _make(self, state: dict[str, int]) -> tuple[Batch, list[Row], dict[str, int]]:
        """The batch after `state` that is not left out, its records, and the state after it."""
        made = self._make_any(state)
        while made[2]["batches"] in self._without:
            made = self._make_any(made[2])
        return made

    def _make_any(self, state: dict[str, int]) -> tuple[Batch, list[Row], dict[str, int]]:
        state, rows, empty = state | {"batches": state["batches"] + 1}, [], 0
        while len(rows) < self._rows:
            made, counts = self._make_window(state["window"])
            taken = made[state["row"] : state["row"] + self._rows - len(rows)]
            rows += taken
            state["row"] += len(taken)
            empty = 0 if made else empty + self._window
            if empty > min(len(self._source), 10_000):
                raise UserError(
                    f"{self._source.name}: no record fits {self._length} tokens; raise length"
                )
            if state["row"] == len(made):
                done = {name: state[name] + count for name, count in counts.items()}
                state |= {**done, "window": state["window"] + 1, "row": 0}
        if self._packing:
            batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        else:
            batch = self._pad(rows, self._length, self._tokenizer.pad, fixed=self._processes > 1)
        if any(key.startswith("loss_mask") and not mask.any() for key, mask in batch.items()):
            raise UserError(
                f"{self._source.name}: a batch whose loss mask is all zero; raise the length"
            )
        return batch, [row["record"] for row in rows if "record" in row], state

    def _make_window(self, number: int) -> tuple[list[Row], dict[str, int]]:
        """The rows of a window, and how many of its examples were truncated and dropped."""
        if self._made[0] != number:
            rows, counts = [], {"truncated": 0, "dropped": 0}
            for i in range(number * self._window, (number + 1) * self._window):
                record = self._source[self._order[i * self._processes + self._process]]
                encoded, lost = self._encode(record, self._tokenizer, self._length)
                rows += encoded
                counts["truncated"] += lost and bool(encoded)
                counts["dropped"] += not encoded
            if self._packing:
                examples = [(row["tokens"], row["mask"]) for row in rows]
                packed = pack(examples, self._length, self._tokenizer.pad)
                rows = [
                    dict(zip(packed, row, strict=True))
                    for row in zip(*packed.values(), strict=True)
                ]
            self._made = (number, rows, counts)
        return self._made[1:]


text_batches = partial(Batches, encode_text, pad_examples, packing=True)
"""Documents, every token predicted; `text_batches(source, tokenizer, batch_size=, length=, ...)`."""
chat_batches = partial(Batches, encode_chat, pad_examples, packing=True)
"""Conversations, the assistant's tokens predicted."""
prompt_batches = partial(Batches, encode_prompt, pad_prompts)
"""Prompts to generate from, padded on the left."""


def comparison_batches(
    source: Source, tokenizer: Tokenizer, encode: Callable = encode_comparison, **options: Any
) -> Batches:
    """Prompts with `source.candidates` responses each; options as of `Batches`."""
    pad = partial(pad_comparisons, candidates=source.candidates)
    return Batches(encode, pad, source, tokenizer, **options)
