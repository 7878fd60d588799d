"""Put several examples in one row: first-fit packing, in numpy. Segment ids keep them apart."""

from collections.abc import Sequence

import numpy as np

Example = tuple[Sequence[int], Sequence[int]]
"""Token ids and their loss mask (1 where the token is predicted), of the same length."""


def split_document(tokens: Sequence[int], length: int) -> list[Example]:
    """Cut a document into pieces of at most `length` tokens (2 or more), with their loss masks.

    Each piece starts with the last token of the one before, which is not predicted again. So
    every token but the document's first is predicted exactly once.
    """
    examples: list[Example] = []
    # A document of one token is one piece too, though it has none to predict.
    to_predict = max(len(tokens) - 1, 1)
    for start in range(0, to_predict, length - 1):
        piece = tokens[start : start + length]
        mask = [0] + [1] * (len(piece) - 1)
        examples.append((piece, mask))
    return examples


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
