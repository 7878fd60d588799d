"""Put several examples in one row: first-fit packing, in numpy. Segment ids keep them apart."""

from collections.abc import Collection, Sequence

import numpy as np

Example = tuple[Sequence[int], Sequence[int]]
"""Token ids and their loss mask (1 where the token is predicted), of the same length."""


NEAR = 16
"""Tokens in which a cut looks for a space, at most; in short rows a quarter of the row."""


def at_a_space(
    tokens: Sequence[int], cut: int, word_starts: Collection[int], way: int, length: int
) -> int:
    """Move a cut before token `cut` to the next place where a word begins; none near: leave it.

    `way`: -1 to look to the left, 1 to the right. `word_starts`: ids of tokens that begin with a
    space (Tokenizer.word_starts). `length`: tokens of a row.
    """
    near = min(NEAR, length // 4)
    for place in range(cut, cut + way * near, way):
        if 0 < place < len(tokens) and tokens[place] in word_starts:
            return place
    return cut


def split_document(
    tokens: Sequence[int], length: int, word_starts: Collection[int] = ()
) -> list[Example]:
    """Cut a document into pieces of at most `length` tokens (2 or more), with their loss masks.

    Each piece starts with the last token of the one before, which is not predicted again. So
    every token but the document's first is predicted exactly once. No word is cut where one ends
    near the end of a piece, by `word_starts` (see at_a_space).
    """
    examples: list[Example] = []
    start = 0
    while True:
        end = start + length
        if end < len(tokens):
            end = at_a_space(tokens, end, word_starts, -1, length)
        piece = tokens[start:end]
        mask = [0] + [1] * (len(piece) - 1)
        examples.append((piece, mask))
        if end >= len(tokens):
            return examples
        start = end - 1


def first_fit(lengths: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Return (row, offset) of each example: the first row with room for it, else a new row.

    `lengths`: tokens of each example, 1 to `length`; raises ValueError for others. `length`:
    tokens a row holds. Rows and offsets count from 0.
    """
    # Room left in each row; rows are opened in order, so only the first `rows` count.
    free = np.zeros(len(lengths), np.int64)
    rows = 0
    places = []
    for size in lengths:
        if not 0 < size <= length:
            raise ValueError(f"an example of {size} tokens in rows of {length}")
        with_room = np.flatnonzero(free[:rows] >= size)
        if len(with_room):
            row = int(with_room[0])
        else:
            # Open another row.
            row = rows
            rows += 1
            free[row] = length
        room = int(free[row])
        places.append((row, length - room))
        free[row] = room - size
    return places


def pack(examples: Sequence[Example], length: int, pad: int = 0) -> dict[str, np.ndarray]:
    """Pack all `examples` into as few rows of `length` tokens as first fit finds.

    Returns arrays [B, T], B rows of T = `length`: tokens_BT int32 (`pad` after the last
    example), loss_mask_BT float32, segment_ids_BT int32 (1, 2, ... number the examples of a row,
    0 is padding) and positions_BT int32 (from 0 in each example). The first token of an example
    is never predicted, whatever its mask says. Raises ValueError for an example longer than
    `length`.
    """
    # Where each example goes.
    lengths = [len(tokens) for tokens, _ in examples]
    places = first_fit(lengths, length)
    opened = {row for row, _ in places}
    rows = len(opened)

    # Empty rows: all padding.
    shape = (rows, length)
    tokens_BT = np.full(shape, pad, np.int32)
    mask_BT = np.zeros(shape, np.float32)
    segments_BT = np.zeros(shape, np.int32)
    positions_BT = np.zeros(shape, np.int32)

    # Examples packed into each row so far: the number of the next segment there.
    packed_B = np.zeros(rows, np.int32)
    for (tokens, mask), (row, start) in zip(examples, places, strict=True):
        size = len(tokens)
        here = slice(start, start + size)
        packed_B[row] += 1
        tokens_BT[row, here] = tokens
        mask_BT[row, here] = mask
        # Its context would be the example before.
        mask_BT[row, start] = 0
        segments_BT[row, here] = packed_B[row]
        positions_BT[row, here] = np.arange(size)
    return {
        "tokens_BT": tokens_BT,
        "loss_mask_BT": mask_BT,
        "segment_ids_BT": segments_BT,
        "positions_BT": positions_BT,
    }
