"""Find the beginnings that rows have in common, and give each distinct token a slot.

A row is a path down the prefix tree of a batch: a token is told from another by the tokens up to
it. The first row with a beginning owns its tokens, and the others find them in the owner's slots.
kernels/layouts.py says what for; objectives/unpadded.py runs models so.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


def owners(tokens_BT: Array, segment_ids_BT: Array, positions_BT: Array) -> Array:
    """Return the first row, by index, that begins as a row does up to each token, [B, T] int32.

    Rows begin alike up to column t where all three arrays, ints [B, T], are equal in columns 0 to
    t. B for padding, segment id 0.
    """
    rows = len(tokens_BT)

    # From column to column: rows that have parted never meet again.
    def column(first_B: Array, entries: tuple[Array, ...]) -> tuple[Array, Array]:
        is_alike_BB = first_B[:, None] == first_B
        for x_B in entries:
            is_alike_BB &= x_B[:, None] == x_B
        first_B = jnp.argmax(is_alike_BB, axis=1).astype(jnp.int32)
        return first_B, first_B

    columns = tuple(x_BT.T for x_BT in (tokens_BT, segment_ids_BT, positions_BT))
    _, first_TB = jax.lax.scan(column, jnp.zeros(rows, jnp.int32), columns)
    return jnp.where(segment_ids_BT > 0, first_TB.T, rows)


def is_own(owner_BT: Array) -> Array:
    """Return [B, T] bool: True for the distinct tokens, those that their own row owns.

    `owner_BT`: of `owners`. False for padding.
    """
    # A row owns a token where no earlier row begins alike.
    row_B1 = jnp.arange(len(owner_BT))[:, None]
    return owner_BT == row_B1


class Shared(NamedTuple):
    """Which slot holds which token of a group of rows; see kernels.layouts.SharedRows."""

    slot_BT: Array
    """The slot of each token, its owner's: its row of slots times T plus its column; -1 for
    padding."""
    token_NT: Array
    """The token in each slot: its owner times T plus its column; -1 where none is."""
    fits_B: Array
    """False for a row with a token that found no slot."""


def share_slots(owner_BT: Array, rows: int) -> Shared:
    """Give each distinct token of B rows of T a slot, in `rows` rows of T slots; return Shared.

    `owner_BT`: of `owners`, [B, T]. Slots are filled one after the other in the order of the
    tokens, row by row, so a row's own tokens may go on in the next row of slots. `rows`: a Python
    int. Tokens past the last slot get none: nothing is raised, but their `slot_BT` is rows x T or
    above, and `fits_B` [B] is False for each row that has one. `slot_BT`: [B, T], `token_NT`:
    [rows, T], int32.
    """
    # Distinct tokens are numbered row by row; a token's number is its slot.
    count, length = owner_BT.shape
    is_own_BT = is_own(owner_BT)
    number_BT = jnp.cumsum(is_own_BT.reshape(-1)).reshape(count, length) - 1

    # The other way round; what has no slot goes past the last: dropped.
    slots = rows * length
    token_BT = jnp.arange(count * length, dtype=jnp.int32).reshape(count, length)
    known_BT = jnp.where(is_own_BT, number_BT, slots)
    token_M = jnp.full(slots, -1, jnp.int32).at[known_BT].set(token_BT, mode="drop")

    # Of each token that of its owner, which stands in the same column.
    is_real_BT = owner_BT < count
    owner_or_0_BT = jnp.where(is_real_BT, owner_BT, 0)
    slot_BT = jnp.take_along_axis(number_BT, owner_or_0_BT, axis=0)
    return Shared(
        slot_BT=jnp.where(is_real_BT, slot_BT, -1).astype(jnp.int32),
        token_NT=token_M.reshape(rows, length),
        fits_B=(~is_real_BT | (slot_BT < slots)).all(1),
    )
