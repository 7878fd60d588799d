"""Batches: records to arrays of fixed shapes, and an endless iterator over them.

A record (data/records.py) is encoded as rows of tokens; rows are padded or packed into a batch.
The iterator resumes exactly where it stopped. Every host reads a disjoint part of one shuffled
order. Lengths are counted in tokens throughout.
"""

import bisect
import functools
import math
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NotRequired, Required, Self, TypedDict, Unpack

import jax
import numpy as np

from data.bad_rows import RecordRefused, refuse_record
from data.lengths import MEASURED, NO_LIMIT, Encode, Encoded, lengths_line, trained_tokens_of
from data.packing import at_a_space, pack, split_document
from data.records import Message, Record
from data.source import Source
from data.tokenizer import Tokenizer
from runtime.errors import UserError

Batch = dict[str, np.ndarray]
"""Arrays by name. B rows, T tokens, C candidates (responses to one prompt).

Examples and prompts [B, T]; comparisons the same four, [B, C, T], named `tokens_BCT` and so on:

    tokens_BT        int32    token ids
    loss_mask_BT     float32  1 where a token is predicted and counts; prompts have none
    segment_ids_BT   int32    0 is padding; 1, 2, ... number the examples packed in a row
    positions_BT     int32    0 at the first token of each segment

Comparisons also:

    ranks_BC         int32    1 is the best; equal ranks are a tie; 0 is no candidate
    margin_B         float32  how much better the best is, as the record says; 0 where it does not

Solutions in steps also:

    targets_BT       float32  in [0, 1], counts where loss_mask_BT is 1
"""
Row = dict[str, Any]
"""A record as its encoder returns it; each encoder says which keys. Tokens are lists of ids."""
PACKING_WINDOW = 512
"""Consecutive examples that are packed together."""
SHORTEST_PROMPT = 8
"""Tokens of a prompt longer than this that must be left of it, or the record is dropped."""
Pad = Callable[..., Batch]
"""pad(rows, length, pad, fixed=False): rows as one batch; `pad` is the id of the padding."""


# ---- One record to rows: how examples are tokenised and cut ----


def encode_text(record: Record, tokenizer: Tokenizer, length: int) -> Encoded:
    """Encode a document as rows {"tokens", "mask"}: bos, its text, eos, split every `length`.

    Every token but bos is predicted exactly once. No document is cut or dropped, and no word goes
    on in another row where a space is near.
    """
    rows: list[Row] = []
    document = tokenizer.document(record["text"])
    for tokens, mask in split_document(document, length, tokenizer.word_starts):
        rows.append({"tokens": tokens, "mask": mask})
    return Encoded(rows, False)


def encode_chat(record: Record, tokenizer: Tokenizer, length: int) -> Encoded:
    """Encode a conversation as one row {"tokens", "mask"}; see `Tokenizer.chat`.

    The mask is 1 on the assistant's tokens and the eos after each of its turns. Cut on the right
    to `length` tokens, between words where a space is near; dropped if no token that counts is
    left.
    """
    tokens, mask = tokenizer.chat(record["messages"])

    # Cut only where it is too long, and between words.
    end = length
    if len(tokens) > length:
        end = at_a_space(tokens, length, tokenizer.word_starts, -1, length)
    row = {"tokens": tokens[:end], "mask": mask[:end]}
    # The cut may have taken all of the assistant's turns.
    rows = [row] if any(row["mask"]) else []
    return Encoded(rows, len(tokens) > length)


def encode_chat_or_text(record: Record, tokenizer: Tokenizer, length: int) -> Encoded:
    """Encode a conversation as `encode_chat`, a document mixed among them as `encode_text`."""
    encode = encode_text if "text" in record else encode_chat
    return encode(record, tokenizer, length)


def encode_comparison(record: Record, tokenizer: Tokenizer, length: int) -> Encoded:
    """Encode a comparison as one row {"prompts", "responses", "ranking", "margin", "record"}.

    `prompts` holds the prompt's tokens once for each response, `responses` each one's tokens with
    eos, `ranking` the rank of each (1 is the best). Responses are never cut. The prompt is cut on
    the left (see `without_beginning`) to fit beside the longest of them in `length` tokens; the
    record is dropped where fewer than SHORTEST_PROMPT tokens would be left of a longer prompt.
    """
    prompt = tokenizer.prompt(record["prompt"])
    responses = []
    for response in record["responses"]:
        responses.append(tokenizer.answer(response))

    # One cut of the prompt for all responses, so that they are compared on equal terms.
    room = length - max(len(response) for response in responses)
    if room < min(len(prompt), SHORTEST_PROMPT):
        return Encoded([], True)
    row = {
        "prompts": [without_beginning(prompt, room, tokenizer)] * len(responses),
        "responses": responses,
        "record": record,
        "ranking": record["ranking"],
        "margin": record.get("margin", 0.0),
    }
    return Encoded([row], len(prompt) > room)


def encode_prompt(record: Record, tokenizer: Tokenizer, length: int) -> Encoded:
    """Encode a prompt as one row {"tokens", "record"}, ready for generation.

    Messages end with the assistant's role token. A record of raw text is bos and its tokens, to
    be continued. Cut on the left to `length` tokens (see `without_beginning`).
    """
    if "prompt" in record:
        tokens = tokenizer.prompt(record["prompt"])
    else:
        # Raw text, to be continued.
        tokens = [tokenizer.bos, *tokenizer.encode(record["text"])]
    row = {"tokens": without_beginning(tokens, length, tokenizer), "record": record}
    return Encoded([row], len(tokens) > length)


def encode_or_leave_out(
    encode: Encode, name: str, record: Record, tokenizer: Tokenizer, length: int
) -> Encoded:
    """Encode a record of the source `name` by `encode`, or leave it out as data.bad_rows does.

    A model's chat template may refuse a conversation, or a message may spell a control token. With
    --on_bad_row=skip such a record is refused; else UserError says how it begins.
    """
    try:
        return encode(record, tokenizer, length)
    except RecordRefused as fault:
        refuse_record(name, record, fault)
        return Encoded([], truncated=False, is_refused=True)


def is_refused(prompt: Sequence[Message], tokenizer: Tokenizer, name: str) -> bool:
    """Tell whether a prompt of the source `name` must be left out, as by `encode_or_leave_out`.

    For prompts that are not read in batches. Raises UserError as that does.
    """
    record = {"prompt": prompt}
    return encode_or_leave_out(encode_prompt, name, record, tokenizer, NO_LIMIT).is_refused


def cut_left(tokens: list[int], length: int, tokenizer: Tokenizer) -> list[int]:
    """Cut a prompt as `without_beginning` does, and say so on stderr, once a process.

    For commands; what batches cut is counted (`Batches.truncated`).
    """
    kept = without_beginning(tokens, length, tokenizer)
    if len(kept) < len(tokens):
        say_cut()
    return kept


@functools.cache
def say_cut() -> None:
    """Say once, on process 0 alone, that prompts lose their beginning."""
    if jax.process_index() > 0:
        return
    limits = "--max_prompt, --length, or the model's context"
    print(f"note: some prompts are too long and lose their beginning ({limits})", file=sys.stderr)


def without_beginning(tokens: list[int], length: int, tokenizer: Tokenizer) -> list[int]:
    """Cut a prompt on the left to at most `length` tokens: bos, a role, and the prompt's end.

    The role is that of the turn which the cut goes through. The cut moves on to just after a
    newline where one is in the first half of what is kept, else to a space where one is near. A
    prompt that fits is returned as it is. Raises UserError for a `length` below 3.
    """
    if len(tokens) <= length:
        return tokens
    if length < 3:
        raise UserError(
            f"{length} tokens hold no prompt; "
            "raise --max_prompt or --length, or lower --max_new_tokens"
        )
    roles = {tokenizer.system, tokenizer.user, tokenizer.assistant} - {None}

    # Leave room for bos, and for a role where the prompt has turns.
    leading = 2 if tokens[1] in roles else 1
    cut = len(tokens) - length + leading

    # Rather start after the end of a line.
    newline = tokenizer.encode("\n")[-1]
    for t in range(cut - 1, (cut + len(tokens)) // 2):
        if tokens[t] == newline:
            cut = t + 1
            break
    else:
        cut = at_a_space(tokens, cut, tokenizer.word_starts, 1, length)

    # Say whose turn it is that goes on here, unless a turn begins here.
    turn = []
    if tokens[cut] not in roles:
        earlier_roles = [token for token in tokens[:cut] if token in roles]
        turn = earlier_roles[-1:]
    return [tokens[0], *turn, *tokens[cut:]]


# ---- Rows to arrays ----


def bucket(size: int, length: int, fixed: bool = False) -> int:
    """Return the width of a batch whose longest row has `size` tokens, at most `length`.

    It is the least that fits of 1/4, 1/2 and 3/4 of `length` (rounded up to multiples of 8) and
    `length` itself: few shapes, so few compilations. `fixed`: always `length`, for several hosts,
    whose shapes must agree.
    """
    if fixed:
        return length
    for quarters in (1, 2, 3):
        width = -(-length * quarters // 32) * 8
        if size <= width < length:
            return width
    return length


def blank(shape: tuple[int, ...], pad: int, masked: bool) -> Batch:
    """Make the arrays of an empty batch, keyed by what they hold: tokens, segments, positions.

    `masked`: with a loss mask.
    """
    # The keys of `Batch`, such as segment_ids_BCT.
    letters = "BCT" if len(shape) == 3 else "BT"
    batch = {f"tokens_{letters}": np.full(shape, pad, np.int32)}
    if masked:
        batch[f"loss_mask_{letters}"] = np.zeros(shape, np.float32)
    batch[f"segment_ids_{letters}"] = np.zeros(shape, np.int32)
    batch[f"positions_{letters}"] = np.zeros(shape, np.int32)
    return batch


def pad_examples(rows: Sequence[Row], length: int, pad: int, fixed: bool = False) -> Batch:
    """Make a batch [B, T] of rows {"tokens", "mask"}, one example a row, padded on the right.

    Rows have at most `length` tokens; `pad` is the id of the padding. T is
    `bucket(longest row, length, fixed)`.
    """
    longest = max(len(row["tokens"]) for row in rows)
    shape = (len(rows), bucket(longest, length, fixed))
    batch = blank(shape, pad, masked=True)
    for b, row in enumerate(rows):
        size = len(row["tokens"])
        batch["tokens_BT"][b, :size] = row["tokens"]
        batch["loss_mask_BT"][b, :size] = row["mask"]
        batch["segment_ids_BT"][b, :size] = 1
        batch["positions_BT"][b, :size] = np.arange(size)
    return batch


def pad_comparisons(
    rows: Sequence[Row], length: int, pad: int, fixed: bool = False, candidates: int = 2
) -> Batch:
    """Make a batch [B, C, T] of rows of `encode_comparison`, padded on the right.

    Each candidate is its prompt and then its response with eos; the loss mask is 1 on the
    response and eos. C is `candidates`; places without a response are all padding, of rank 0. T
    is `bucket(longest candidate, length, fixed)`. Raises UserError for a row with more responses.
    """
    # The shape: as wide as the longest candidate needs.
    longest = 0
    for row in rows:
        for prompt, response in zip(row["prompts"], row["responses"], strict=True):
            longest = max(longest, len(prompt) + len(response))
    shape = (len(rows), candidates, bucket(longest, length, fixed))
    batch = blank(shape, pad, masked=True)
    batch["ranks_BC"] = np.zeros(shape[:2], np.int32)
    batch["margin_B"] = np.array([row["margin"] for row in rows], np.float32)

    # Candidate by candidate: its prompt, then its response.
    for b, row in enumerate(rows):
        count = len(row["responses"])
        if count > candidates:
            raise UserError(f"a comparison has {count} responses, more than {candidates}")
        batch["ranks_BC"][b, :count] = row["ranking"]
        # Places from `count` on stay padding.
        for c in range(count):
            prompt = row["prompts"][c]
            tokens = [*prompt, *row["responses"][c]]
            start = len(prompt)
            end = len(tokens)
            batch["tokens_BCT"][b, c, :end] = tokens
            batch["loss_mask_BCT"][b, c, start:end] = 1
            batch["segment_ids_BCT"][b, c, :end] = 1
            batch["positions_BCT"][b, c, :end] = np.arange(end)
    return batch


def pad_prompts(rows: Sequence[Row], length: int, pad: int, fixed: bool = False) -> Batch:
    """Make a batch [B, T] of rows {"tokens"}, padded on the LEFT, so that all rows end together.

    It has no loss mask; positions are 0 at a row's first token. T is
    `bucket(longest row, length, fixed)`.
    """
    longest = max(len(row["tokens"]) for row in rows)
    width = bucket(longest, length, fixed)
    batch = blank((len(rows), width), pad, masked=False)
    for b, row in enumerate(rows):
        size = len(row["tokens"])
        start = width - size
        batch["tokens_BT"][b, start:] = row["tokens"]
        batch["segment_ids_BT"][b, start:] = 1
        batch["positions_BT"][b, start:] = np.arange(size)
    return batch


def collate(
    encode: Encode, pad: Pad, records: Sequence[Record], tokenizer: Tokenizer, length: int
) -> Batch:
    """Make one batch of these records, in their order, as for evaluation.

    `collate(encode_chat, pad_examples, records, tokenizer, 128)`. Records that `encode` drops
    are missing from it: give a `length` that holds them if rows must match records.
    """
    rows: list[Row] = []
    for record in records:
        rows += encode(record, tokenizer, length).rows
    return pad(rows, length, tokenizer.pad)


def filled_up(array: np.ndarray, size: int) -> np.ndarray:
    """Return an array of a batch with rows of zeros after its own, `size` rows in all.

    Zeros are padding: no segment, no rank, nothing that counts.
    """
    missing = size - len(array)
    return np.concatenate([array, np.zeros_like(array, shape=(missing, *array.shape[1:]))])


# ---- The iterator ----


@dataclass(frozen=True)
class Layout:
    """A kind of batch: how a record becomes rows, and how rows become arrays."""

    encode: Encode
    pad: Pad
    packed: bool = False
    """Pack rows {"tokens", "mask"} into rows of exactly `length` tokens, instead of `pad`."""
    flag: str = "--length"
    """The flag of scripts that sets `length`, for messages."""


PROMPTS = Layout(encode_prompt, pad_prompts, flag="--max_prompt")
"""Prompts to generate from."""


class BatchOptions(TypedDict, total=False):
    """Arguments that every `*_batches` function takes by name."""

    batch_size: Required[int]
    """Rows of a batch over all hosts; a multiple of `processes`."""
    length: Required[int]
    """Tokens of a row, at most; packed rows have exactly as many."""
    seed: int
    """Seed of the order of records; 0 if left out."""
    process: int
    """Which part of the order this host reads, from 0 (see sharding.data_shard)."""
    processes: int
    """Number of parts; 1 if left out."""
    without: Collection[int]
    """Numbers, from 1, of batches that are passed over."""


Read = dict[str, tuple[int, int]]
"""By the source of a mixture: its examples that gave rows, and their tokens."""


class Position(TypedDict):
    """Where a `Batches` stands: all that the batches to come depend on beside its arguments."""

    batches: int
    """Batches made so far, those passed over too."""
    window: int
    """Windows used up, of the stage at hand."""
    row: int
    """Rows used of the window at hand."""
    truncated: int
    """Examples of which a part was cut off, on this host."""
    dropped: int
    """Examples left out as too long, on this host."""
    refused: NotRequired[int]
    """Examples that the model's chat template refuses, on this host."""
    processes: int
    """Hosts that the batches are for."""
    read: NotRequired[Read]
    """Counts of what each source of a mixture gave so far on this host."""


class Window(NamedTuple):
    """The rows that a window of consecutive examples gives on this host."""

    stage: int
    number: int
    rows: list[Row]
    truncated: int
    dropped: int
    refused: int
    read: Read


class Made(NamedTuple):
    """A batch, the records of its rows, and the position and the windows used after it."""

    batch: Batch
    records: list[Record]
    position: Position
    windows: float
    """The share of the current window's rows that is used."""


class Batches:
    """An endless iterator over the batches of a source, in a shuffled order, epoch after epoch.

    `next(batches)` returns a `Batch` of batch_size / processes rows in numpy, and raises
    UserError where no record fits or nothing in a batch is predicted. `records` then holds the
    records of its rows. `state` is a position as JSON; `restore(state)` on a `Batches` of the
    same arguments goes on exactly after the batch at which it was read. The next batch is made
    ahead, on a thread; that never shows in `state`.

    The order is cut into windows of consecutive examples, each a function of (seed, number):
    with packing the PACKING_WINDOW examples packed together, else those of one batch. A mixture
    may have stages, each with an order and windows of its own.
    """

    def __init__(
        self,
        layout: Layout,
        source: Source,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        length: int,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
        without: Collection[int] = (),
    ):
        """Take what `BatchOptions` describes; raise UserError for hosts that do not divide it."""
        if batch_size % processes:
            raise UserError(
                f"--batch_size={batch_size}: must be a multiple of the {processes} hosts"
            )
        self._batch_size = batch_size
        self._layout = layout
        self._encode = partial(encode_or_leave_out, layout.encode, source.name)
        self._tokenizer = tokenizer
        self._length = length
        self._process = process
        self._processes = processes
        self._without = without
        self._rows = batch_size // processes
        self._window_size = PACKING_WINDOW if layout.packed else self._rows

        # Shares of a mixture are of tokens as they are trained on.
        self._source = source.weighed(self._tokens_of)
        # The stages of a mixture; other sources have one. Each has an order of its own.
        self._batch_tokens = batch_size * length if layout.packed else None
        self._stage_ends = source.stage_ends(self._batch_tokens)
        stages = range(len(self._stage_ends) + 1)
        self._orders = [self._source.order(seed, stage) for stage in stages]
        # The last window made: several batches are cut from it.
        self._window = Window(0, -1, [], 0, 0, 0, {})
        # One thread makes the next batch while this one is used.
        self._thread = ThreadPoolExecutor(1, "batches")
        self._ahead: Future[Made] | None = None
        self.records: list[Record] = []
        """The record of each row of the last prompt or comparison batch, on this host."""
        self._position: Position = {
            "batches": 0,
            "window": 0,
            "row": 0,
            "truncated": 0,
            "dropped": 0,
            "processes": processes,
        }
        self._windows = 0.0

    @property
    def state(self) -> Position:
        """A copy of the position, as JSON; hosts that pack differ in it."""
        return self._position.copy()

    def restore(self, state: Position) -> None:
        """Go on after the batch at which `state` was read.

        Raises UserError for a state that was saved on another number of hosts.
        """
        if state["processes"] != self._processes:
            raise UserError(
                f"the data's position was saved on {state['processes']} hosts, but this run has "
                f"{self._processes}; resume on as many"
            )
        self._position = state.copy()
        self._windows = float(state["window"])
        self._ahead = None

    @property
    def epoch(self) -> float:
        """Passes over the source so far; after a restore those of whole windows, until `next`.

        Of a mixture, of the source that is seen most often, in the stage at hand.
        """
        draws = self._windows * self._window_size * self._processes
        return self._source.passes(draws, self._stage(max(self._position["batches"] - 1, 0)))

    @property
    def is_endless(self) -> bool:
        """True for what is built in, of which no run sees the end."""
        return self._source.is_endless

    @property
    def shares(self) -> dict[str, tuple[float, float]]:
        """Shares of a mixture's sources in what was read so far, on this host: {} of others.

        By source: its share of the examples, and of their tokens that are trained on.
        """
        read = self._position.get("read", {})
        all_examples = sum(examples for examples, _ in read.values())
        all_tokens = sum(tokens for _, tokens in read.values())
        shares = {}
        for label, (examples, tokens) in read.items():
            shares[label] = (examples / all_examples, tokens / all_tokens)
        return shares

    @property
    def truncated(self) -> int:
        """Examples of which a part was cut off so far, on this host."""
        return self._position["truncated"]

    @property
    def dropped(self) -> int:
        """Examples left out as too long so far, on this host."""
        return self._position["dropped"]

    @property
    def refused(self) -> int:
        """Examples that the model's chat template refused so far, on this host."""
        return self._position.get("refused", 0)

    def lengths_line(self, records: int = MEASURED) -> str:
        """Say how many rows the source has, how long they are, and what of them is lost.

        Of a mixture, of each of its sources, after their shares.
        """
        lines = []
        shares = self._source.describe_shares(self._batch_tokens)
        if shares:
            lines.append(shares)
        for source in self._source.alone():
            line = lengths_line(
                source,
                partial(encode_or_leave_out, self._layout.encode, source.name),
                self._tokenizer,
                self._length,
                flag=self._layout.flag,
                records=records,
            )
            lines.append(line)
        return "; ".join(lines)

    def stage_beyond(self, batches: int) -> tuple[int, int]:
        """Return the first stage of a mixture, from 1, that so many batches do not come to.

        Also the number of batches before it. (0, 0) where they come to all.
        """
        for number, end in enumerate(self._stage_ends, 2):
            if end >= batches:
                return number, end
        return 0, 0

    def peek(self) -> Batch:
        """Return the batch that `next` will return."""
        if self._ahead is None:
            self._ahead = self._thread.submit(self._make, self._position)
        return self._ahead.result().batch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._position["batches"] == 0:
            self._note_repetition()
        ahead = self._ahead or self._thread.submit(self._make, self._position)
        batch, self.records, self._position, self._windows = ahead.result()
        # Make the next one while the device works on this.
        self._ahead = self._thread.submit(self._make, self._position)
        return batch

    def _note_repetition(self) -> None:
        """Say on stderr, once over all processes, that the source is smaller than a batch."""
        records = len(self._source)
        if records < self._batch_size and self._process == 0:
            print(
                f"note: {self._source.name} has {records} records, "
                f"fewer than a batch of {self._batch_size}: they repeat within a batch",
                file=sys.stderr,
            )

    def once(self, records: int | None = None, batches: int | None = None) -> list[Batch]:
        """Make the batches of an evaluation: each record once, in the source's order.

        At most the first `records`, and at most so many `batches`; None: no limit. The last batch
        is filled up with rows of padding, which count nothing. A note says what is cut, left out
        as too long, or refused. The iterator stays where it is. Raises UserError where no record
        fits.
        """
        # Rows of all hosts, until the batches can hold no more tokens.
        packed = self._layout.packed
        most = None if batches is None else batches * self._batch_size
        room = math.inf if most is None else most * self._length
        rows: list[Row] = []
        cut = 0
        left_out = 0
        refused = 0
        for i in range(len(self._source))[:records]:
            if room <= 0:
                break
            encoded = self._encode(self._source[i], self._tokenizer, self._length)
            rows += encoded.rows
            room -= sum(len(row["tokens"]) if packed else self._length for row in encoded.rows)
            cut += encoded.is_cut
            left_out += encoded.is_dropped
            refused += encoded.is_refused
        if (cut or left_out or refused) and self._process == 0:
            also = f"; the chat template refuses {refused} more" if refused else ""
            print(
                f"note: {self._source.name}: of the records evaluated, {cut} are cut and "
                f"{left_out} left out, longer than {self._length} tokens{also}",
                file=sys.stderr,
            )
        if not rows:
            raise self._nothing_left(left_out, refused, "raise --length")
        if packed:
            rows = self._packed(rows)
        rows = rows[:most]

        # A batch at a time, of which this host takes its part.
        made = []
        first = self._process * self._rows
        for start in range(0, len(rows), self._batch_size):
            batch = self._stacked(rows[start : start + self._batch_size])
            own = {}
            for name, array in batch.items():
                whole = filled_up(array, self._batch_size)
                own[name] = whole[first : first + self._rows]
            made.append(own)
        return made

    def _stacked(self, rows: list[Row]) -> Batch:
        """Lay rows, packed or not, into one batch."""
        if self._layout.packed:
            return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        # Hosts must agree on one shape.
        fixed = self._processes > 1
        return self._layout.pad(rows, self._length, self._tokenizer.pad, fixed=fixed)

    def _tokens_of(self, record: Record) -> int:
        """Count the tokens of a record that are trained on, cut to the rows' length."""
        return trained_tokens_of(self._encode(record, self._tokenizer, self._length).rows)

    def _stage(self, batches: int) -> int:
        """Return the stage that the batch after so many is in, from 0."""
        return bisect.bisect_right(self._stage_ends, batches)

    def _make(self, position: Position) -> Made:
        """Make the next batch after `position` that is not passed over."""
        made = self._make_batch(position)
        while made.position["batches"] in self._without:
            made = self._make_batch(made.position)
        return made

    def _make_batch(self, position: Position) -> Made:
        """Make the batch after `position`."""
        rows, after = self._take_rows(position)
        batch = self._stacked(rows)

        # Nothing to learn from is an error, never a silent zero.
        for name, array in batch.items():
            if name.startswith("loss_mask") and not array.any():
                raise UserError(
                    f"{self._source.name}: a batch whose loss mask is all zero; raise the length"
                )
        records = [row["record"] for row in rows if "record" in row]
        # Of a window that is begun, which is still at hand, a part is used.
        used = after["row"] / len(self._window.rows) if after["row"] else 0.0
        return Made(batch, records, after, after["window"] + used)

    def _take_rows(self, position: Position) -> tuple[list[Row], Position]:
        """Take the rows of one batch from as many windows as it needs; also the position after."""
        after = position.copy()
        # A stage begins with its own first window.
        stage = self._stage(position["batches"])
        if position["batches"] in self._stage_ends:
            after["window"] = 0
            after["row"] = 0
        after["batches"] += 1
        rows: list[Row] = []
        # Examples in a row that gave nothing.
        fruitless = 0
        while len(rows) < self._rows:
            window = self._make_window(stage, after["window"])
            # What is cut, and what is read of each source, counts with the window's first rows.
            if after["row"] == 0:
                after["truncated"] += window.truncated
                after["dropped"] += window.dropped
                if window.refused:
                    after["refused"] = after.get("refused", 0) + window.refused
                if window.read:
                    after["read"] = added(after.get("read", {}), window.read)
            missing = self._rows - len(rows)
            taken = window.rows[after["row"] : after["row"] + missing]
            rows += taken
            after["row"] += len(taken)

            fruitless = 0 if window.rows else fruitless + self._window_size
            if fruitless > min(len(self._source), 10_000):
                raise self._nothing_left(after["dropped"], after.get("refused", 0), "raise length")
            if after["row"] == len(window.rows):
                after["window"] += 1
                after["row"] = 0
        return rows, after

    def _nothing_left(self, dropped: int, refused: int, remedy: str) -> UserError:
        """Make the UserError of a source of which no record can be used."""
        name = self._source.name
        if refused and not dropped:
            return UserError(f"{name}: the chat template refuses every record read ({refused:,})")
        fault = f"no record fits {self._length} tokens"
        if refused:
            fault = f"the chat template refuses {refused:,} records; of the others {fault}"
        return UserError(f"{name}: {fault}; {remedy}")

    def _make_window(self, stage: int, number: int) -> Window:
        """Encode, and where the layout says so pack, the examples of a window of a stage."""
        if (self._window.stage, self._window.number) == (stage, number):
            return self._window
        rows: list[Row] = []
        truncated = 0
        dropped = 0
        refused = 0
        read: Read = {}
        first = number * self._window_size
        for i in range(first, first + self._window_size):
            # Hosts take turns along the one order.
            index = self._orders[stage][i * self._processes + self._process]
            record = self._source[index]
            encoded = self._encode(record, self._tokenizer, self._length)
            rows += encoded.rows
            truncated += encoded.is_cut
            dropped += encoded.is_dropped
            refused += encoded.is_refused
            label = self._source.label_of(index)
            if label is not None and encoded.rows:
                read = added(read, {label: (1, trained_tokens_of(encoded.rows))})
        if self._layout.packed:
            rows = self._packed(rows)
        self._window = Window(stage, number, rows, truncated, dropped, refused, read)
        return self._window

    def _packed(self, rows: list[Row]) -> list[Row]:
        """Pack rows {"tokens", "mask"}; each row of the result holds its part of every array."""
        examples = [(row["tokens"], row["mask"]) for row in rows]
        arrays = pack(examples, self._length, self._tokenizer.pad)
        packed_rows = []
        for b in range(len(arrays["tokens_BT"])):
            packed_rows.append({name: array[b] for name, array in arrays.items()})
        return packed_rows


def added(read: Read, more: Read) -> Read:
    """Return the sums of two counts of what was read."""
    sums = dict(read)
    for label, (examples, tokens) in more.items():
        before = sums.get(label, (0, 0))
        sums[label] = (before[0] + examples, before[1] + tokens)
    return sums


def text_batches(source: Source, tokenizer: Tokenizer, **options: Unpack[BatchOptions]) -> Batches:
    """Iterate over packed documents, every token but the first of each predicted.

    `source`: records of the schema `text`. Rows [B, T] have T = `length`; documents that are
    longer go on in another row (see `encode_text`). Options are those of `BatchOptions`.
    """
    return Batches(Layout(encode_text, pad_examples, packed=True), source, tokenizer, **options)


def chat_batches(source: Source, tokenizer: Tokenizer, **options: Unpack[BatchOptions]) -> Batches:
    """Iterate over packed conversations, the assistant's tokens and their eos predicted.

    `source`: records of the schema `chat`, among them documents where a mixture has them, of which
    every token is predicted. Rows [B, T] have T = `length`; conversations that are longer are cut
    on the right. Options are those of `BatchOptions`.
    """
    layout = Layout(encode_chat_or_text, pad_examples, packed=True)
    return Batches(layout, source, tokenizer, **options)


def prompt_batches(
    source: Source, tokenizer: Tokenizer, **options: Unpack[BatchOptions]
) -> Batches:
    """Iterate over prompts to generate from, [B, T] padded on the left, with their `.records`.

    `source`: records of the schema `prompt`. Longer prompts are cut on the left to `length`
    tokens. Options are those of `BatchOptions`.
    """
    return Batches(PROMPTS, source, tokenizer, **options)


def comparison_batches(
    source: Source,
    tokenizer: Tokenizer,
    encode: Encode = encode_comparison,
    **options: Unpack[BatchOptions],
) -> Batches:
    """Iterate over prompts with C = `source.candidates` responses each, with their `.records`.

    `source`: records of the schema `comparison`, or others that `encode` makes rows of
    `encode_comparison`'s form from. A candidate, its prompt and response, has at most `length`
    tokens. Options are those of `BatchOptions`.
    """
    pad = partial(pad_comparisons, candidates=source.candidates)
    return Batches(Layout(encode, pad), source, tokenizer, **options)
