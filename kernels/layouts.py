"""Two layouts of a batch's tokens: rows, and slots that hold each distinct token once.

A hidden state follows from the tokens up to it. So where rows begin alike, as all responses
to one prompt do, their common beginning need be computed once. What a decoder does with each token
by itself (embedding, norms, projections, feed-forward) runs over slots, [N, T] of them, each
with a token that no other slot has. Attention alone needs rows: queries, keys and values are laid
out in the B rows for it, a beginning's in each row that has it, and what it gives goes back into
the slots. So no implementation of attention knows of it, and windows are right as they are.

G groups of rows and slots, one a device: a group's rows find their tokens in its own slots.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sharding import constrain_batch

Array = jax.Array


# ---- One group ----


@jax.custom_vjp
def moved(x: Array, there: Array, back: Array) -> Array:
    """Return x[`there`], [B, T, ...] from [N, T, ...], 0 where `there` is -1.

    `there` [B, T] numbers the places of `x`, and `back` [N, T] those of the result: each place is
    taken from at most one, and `back` says by which. So the derivative is a move as well, where
    autodiff's would be a scatter, slow on every platform.
    """
    flat = x.reshape(-1, *x.shape[2:])
    taken = flat[jnp.maximum(there, 0)]
    is_there = (there >= 0).reshape(*there.shape, *[1] * (x.ndim - 2))
    return jnp.where(is_there, taken, 0)


def _moved_forward(x: Array, there: Array, back: Array) -> tuple[Array, tuple[Array, Array]]:
    return moved(x, there, back), (there, back)


def _moved_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None]:
    there, back = saved
    return moved(cotangent, back, there), None, None


moved.defvjp(_moved_forward, _moved_backward)


@jax.custom_vjp
def spread(x: Array, there: Array, back: Array, owner_BT: Array) -> Array:
    """Return x[`there`], [B, T, ...] from [N, T, ...], 0 where `there` is -1.

    As `moved`, but several rows may take from a place, all in the same column: `owner_BT` is the
    row among them that `back` names. The derivative is their sum.
    """
    return moved(x, there, back)


def _spread_forward(x: Array, there: Array, back: Array, owner_BT: Array):
    return spread(x, there, back, owner_BT), (there, back, owner_BT)


def _spread_backward(saved: tuple[Array, Array, Array], cotangent: Array):
    # A product with zeros and ones sums the rows, in one order always, where a scatter would add
    # in any. C are the owners among the rows B.
    there, back, owner_BT = saved
    is_owner_CBT = owner_BT == jnp.arange(len(owner_BT))[:, None, None]
    cotangent_BTM = cotangent.reshape(*there.shape, -1)
    summed_CTM = jnp.einsum(
        "CBT,BTM->CTM",
        is_owner_CBT.astype(cotangent.dtype),
        cotangent_BTM,
        precision="highest",
    )
    return moved(summed_CTM.reshape(cotangent.shape), back, there), None, None, None


spread.defvjp(_spread_forward, _spread_backward)


# ---- All groups ----


def each_group(move: Callable[..., Array], x: Array, *places_G: Array) -> Array:
    """Return `move(x, *places)` of each group, joined; `x` and the result lie by rows."""
    groups = len(places_G[0])
    x_G = x.reshape(groups, -1, *x.shape[1:])
    moved_G = jax.vmap(move)(x_G, *places_G)
    return constrain_batch(moved_G.reshape(-1, *moved_G.shape[2:]))


class SharedRows(NamedTuple):
    """Rows whose tokens lie in slots, for a model in place of the slots' segment ids."""

    segment_ids_BT: Array
    """Of the rows, those of all groups."""
    slot_GBT: Array
    """The slot that a row's token is computed in: its row of slots times T plus its column; -1 for
    padding."""
    owner_GBT: Array
    """The first row of the group with this beginning; any number else for padding."""
    token_GNT: Array
    """The token in each slot: its owner times T plus its column; -1 where none is."""

    def rows(self, x: Array) -> Array:
        """Return [B, T, ...] of the tokens in slots, [N, T, ...]; 0 at padding."""
        return each_group(spread, x, self.slot_GBT, self.token_GNT, self.owner_GBT)

    def slots(self, x: Array) -> Array:
        """Return [N, T, ...] of the rows, [B, T, ...]: of a beginning its owner's alone."""
        row_B1 = jnp.arange(self.owner_GBT.shape[1])[:, None]
        own_GBT = jnp.where(self.owner_GBT == row_B1, self.slot_GBT, -1)
        return each_group(moved, x, self.token_GNT, own_GBT)
