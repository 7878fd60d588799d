"""Several examples in one row: first-fit packing, in numpy. Segment ids keep the examples apart."""

from collections.abc import Sequence

import numpy as np

Example = tuple[Sequence[int], Sequence[int]]  # tokens and their loss mask, of one length


def split_document(tokens: Sequence[int], length: int) -> list[Example]:
    """Pieces of at most `length` tokens, each starting with the last token of the one before.

    So every token but the first is predicted exactly once (a piece's first token has no context).
    """
    starts = range(0, max(len(tokens) - 1, 1), length - 1)
    pieces = [tokens[start : start + length] for start in starts]
    return [(piece, [0] + [1] * (len(piece) - 1)) for piece in pieces]


def first_fit(lengths: Sequence[int], length: int) -> list[tuple[int, int]]:
    """(row, offset) of each example: the first row with room for it, else a new one."""
    free = np.zeros(len(lengths), np.int64)  # the room left in each row; rows are opened in order
    rows, places = 0, []
    for n in lengths:
        if not 0 < n <= length:
            raise ValueError(f"an example of {n} tokens in rows of {length}")
        open_rows = np.flatnonzero(free[:rows] >= n)
        if len(open_rows):
            row = int(open_rows[0])
        else:
            row, rows = rows, rows + 1
            free[row] = length
        places.append((row, length - int(free[row])))
        free[row] -= n
    return places


def pack(examples: Sequence[Example], length: int, pad: int = 0) -> dict[str, np.ndarray]:
    """Rows of `length` tokens holding all `examples`: tokens_BT, loss_mask_BT, segment_ids_BT, positions_BT.

    No example is longer than `length` (ValueError). The first token of a segment is never predicted.
    """
    places = first_fit([len(tokens) for tokens, _ in examples], length)
    shape = (max((row for row, _ in places), default=-1) + 1, length)
    tokens_BT, mask_BT = np.full(shape, pad, np.int32), np.zeros(shape, np.float32)
    segments_BT, positions_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    used = np.zeros(shape[0], np.int32)
    for (tokens, mask), (row, start) in zip(examples, places, strict=True):
        here = slice(start, start + len(tokens))
        used[row] += 1
        tokens_BT[row, here] = tokens
        mask_BT[row, here] = mask
        mask_BT[row, start] = 0
        segments_BT[row, here] = used[row]
        positions_BT[row, here] = np.arange(len(tokens))
    return {
        "tokens_BT": tokens_BT,
        "loss_mask_BT": mask_BT,
        "segment_ids_BT": segments_BT,
        "positions_BT": positions_BT,
    }
