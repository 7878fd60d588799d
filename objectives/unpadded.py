"""Run a model over the real tokens of a batch alone: rows packed into fewer, and outputs put back.

Rows of a rollout are padded on both sides: with responses of a quarter of the longest length,
most of a batch is padding. Here each row's real tokens become a segment of a packed row (as
data/packing.py packs text), the model runs over the packed rows, and what it gives for a token is
put back where the token stood. So objectives keep their arrays [B, ...], and what they compute is
equal but for rounding.

A program needs the number of packed rows when it is compiled. `find_room` measures a batch, and
waits for the device; what it finds travels with the batch as `room`, and `run_model` reads it.
A batch without one is run as it is. Batches of data are measured a step ahead (`measured_ahead`),
so that the device always has work.

B rows of T tokens, of which each of G groups has its own B / G: those that one device holds, of
one micro-batch. A group is packed for itself, so nothing crosses devices. N packed rows a group.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, get_abstract_mesh

from data.batches import Batches
from model import Params
from objectives.likelihood import Apply, TokenBatch, inputs
from sharding import along, batch_devices, constrain_batch, in_microbatches, to_mesh

Array = jax.Array
HostBatch = dict[str, np.ndarray]
Rows = TypeVar("Rows", bound=Mapping[str, Any])
"""A batch: arrays by name, and perhaps a `room`."""

# Each new room compiles a script's programs again, so there are but few: so many between one and
# its half. Lengths of rollouts drift while a policy learns; those of data stay as they are.
OF_ROLLOUTS = 2
OF_DATA = 8


@flax.struct.dataclass
class Room:
    """How many packed rows hold a batch's real tokens; it is part of a program, not an array."""

    share: float = flax.struct.field(pytree_node=False)
    """Packed rows over rows, at most 1."""

    def rows(self, rows: int) -> int:
        """Return the packed rows of a group of `rows`."""
        return math.ceil(rows * self.share)


# --- where each row goes


class Places(NamedTuple):
    """Where first fit puts each row of a group."""

    row_B: Array
    """The packed row, int32."""
    start_B: Array
    """The column of its first token there."""
    rank_B: Array
    """Its place in the order of lengths, the longest first: 0, 1, ..."""
    fits_B: Array
    """False where no packed row had room for it."""


def first_fit(length_B: Array, longest: int, rows: int) -> Places:
    """Put rows of `length_B` tokens, the longest first, each into the first packed row with room.

    There are `rows` packed rows of `longest` tokens, the most that a row has. As many as there are
    rows to pack are always enough; with fewer, down to those that are used then, the places are
    the same.
    """

    # The longest first, which leaves the least room unused.
    def put(free_N: Array, length: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        has_room_N = free_N >= length
        row = jnp.argmax(has_room_N)
        start = longest - free_N[row]
        return free_N.at[row].add(-length), (row, start, has_room_N[row])

    order_B = jnp.argsort(-length_B, stable=True)
    empty_N = jnp.full(rows, longest, length_B.dtype)
    _, (row_B, start_B, fits_B) = jax.lax.scan(put, empty_N, length_B[order_B])

    # Back from that order into the rows' own.
    rank_B = jnp.argsort(order_B)
    return Places(row_B[rank_B], start_B[rank_B], rank_B, fits_B[rank_B])


def rows_used(segment_ids_BT: Array) -> Array:
    """Return how many packed rows `first_fit` would use for the rows of a group, a scalar.

    `segment_ids_BT`: of the rows as they are, not packed yet; 0 is padding.
    """
    rows, longest = segment_ids_BT.shape
    length_B = (segment_ids_BT > 0).sum(1)
    return first_fit(length_B, longest, rows).row_B.max() + 1


class Slots(NamedTuple):
    """Which slot of the packed rows holds which token of the rows; -1: none does."""

    of_token_BT: Array
    """The slot of each token: its packed row times T plus its column, int32; -1 for padding."""
    of_slot_NT: Array
    """The token in each slot: its row times T plus its column; -1 where none is."""
    segment_ids_NT: Array
    """Another number, 1 or above, for each row in a packed row; 0 where no token is."""
    fits_B: Array
    """False for a row that found no room."""


def assign_slots(segment_ids_BT: Array, rows: int) -> Slots:
    """Give each real token of a group a slot in `rows` packed rows of T."""
    # A row's real tokens lie next to one another, in their order.
    count, length = segment_ids_BT.shape
    real_BT = segment_ids_BT > 0
    places = first_fit(real_BT.sum(1), length, rows)
    first_B = places.row_B * length + places.start_B
    index_BT = jnp.cumsum(real_BT, axis=1) - 1
    slot_BT = first_B[:, None] + index_BT

    # The other way round; what is padding goes past the last slot: dropped.
    none_N = jnp.full(rows * length, -1, jnp.int32)
    token_BT = jnp.arange(count * length, dtype=jnp.int32).reshape(count, length)
    known_BT = jnp.where(real_BT, slot_BT, rows * length)
    of_slot_N = none_N.at[known_BT].set(token_BT, mode="drop")

    # Ranks differ within a packed row, so each row is a segment of its own there.
    row_N = of_slot_N // length
    segment_N = jnp.where(of_slot_N < 0, 0, 1 + places.rank_B[row_N])
    return Slots(
        of_token_BT=jnp.where(real_BT, slot_BT, -1).astype(jnp.int32),
        of_slot_NT=of_slot_N.reshape(rows, length),
        segment_ids_NT=segment_N.reshape(rows, length).astype(jnp.int32),
        fits_B=places.fits_B,
    )


# --- tokens into slots, and what the model gives for them back


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


def run_model(apply: Apply, params: Params, batch: TokenBatch) -> Any:
    """Return apply(params, ...) of the rows of `batch`, [B, T] each, as if they were run as rows.

    Where `batch` has a `room` (`find_room`) its real tokens alone are run, in packed rows; then
    `x_BTD` and `scalars_BT` of padding are 0. Rows hold one example each, on either side of which
    there may be padding.
    """
    if "room" not in batch:
        return apply(params, *inputs(batch))

    # Each device packs its own rows.
    groups = batch_devices(len(batch["tokens_BT"]))

    def split(x: Array) -> Array:
        return x.reshape(groups, -1, *x.shape[1:])

    def joined(x: Array) -> Array:
        return constrain_batch(x.reshape(-1, *x.shape[2:]))

    tokens_GBT, segment_ids_GBT, positions_GBT = map(split, inputs(batch))
    rows = batch["room"].rows(tokens_GBT.shape[1])
    slots = jax.vmap(partial(assign_slots, rows=rows))(segment_ids_GBT)

    # Into the slots, and through the model.
    def packed(x_GBT: Array) -> Array:
        return joined(jax.vmap(moved)(x_GBT, slots.of_slot_NT, slots.of_token_BT))

    output = apply(params, packed(tokens_GBT), joined(slots.segment_ids_NT), packed(positions_GBT))

    # What it gave for each token, back to where the token stands. A room that is too small is a
    # fault of the caller's: what depends on it is not a number, rather than wrong.
    fits_B = slots.fits_B.reshape(-1)

    def put_back(x: Array) -> Array:
        back = joined(jax.vmap(moved)(split(x), slots.of_token_BT, slots.of_slot_NT))
        fits = fits_B.reshape(-1, *[1] * (back.ndim - 1))
        return jnp.where(fits, back, jnp.nan)

    per_token = {
        name: put_back(getattr(output, name))
        for name in ("x_BTD", "scalars_BT")
        if hasattr(output, name)
    }
    return output.replace(**per_token)


# --- how much room a batch needs


def can_pack() -> bool:
    """True unless the mesh splits a row's tokens, or hands rows from stage to stage."""
    mesh = get_abstract_mesh()
    return mesh.empty or along(mesh, "sequence", "stage") == 1


@partial(jax.jit, static_argnames="microbatches")
def rows_needed(segment_ids: Array, microbatches: int) -> Array:
    """Return the most packed rows that a group of this batch needs, a scalar.

    A group: the rows of one micro-batch that one device of the current mesh holds. `segment_ids`:
    [B, T], or [B, C, T] of C candidates each, in B C rows.
    """
    *rows, length = segment_ids.shape
    parts = in_microbatches(segment_ids, microbatches)
    groups = microbatches * batch_devices(math.prod(rows) // microbatches)
    segment_ids_GBT = parts.reshape(groups, -1, length)
    return jax.vmap(rows_used)(segment_ids_GBT).max()


class Measured(NamedTuple):
    """Batches whose packed rows are being counted; `room_of` waits for the count."""

    needed: Array | None
    """The most packed rows that a group needs, a scalar; None where nothing can be packed."""
    rows: int
    """The rows of a group."""


def measure(*segment_ids: Array, microbatches: int = 1) -> Measured:
    """Count the packed rows that each of these batches needs; see `find_room`. Does not wait."""
    *shape, _ = segment_ids[0].shape
    rows = math.prod(shape) // microbatches
    own = rows // batch_devices(rows)
    if not can_pack():
        return Measured(None, own)
    needed = jnp.stack([rows_needed(ids, microbatches) for ids in segment_ids])
    return Measured(needed.max(), own)


def room_of(measured: Measured, sizes: int) -> Room | None:
    """Return the least of the rooms, `sizes` between one and its half, that holds `measured`."""
    if measured.needed is None:
        return None
    share = int(measured.needed) / measured.rows
    # The largest k for which 2 to the power of -k / sizes is no less than the share.
    steps = math.floor(-sizes * math.log2(share) + 1e-9)
    return Room(2 ** (-steps / sizes)) if steps else None


def find_room(*segment_ids: Array, microbatches: int = 1, sizes: int = OF_ROLLOUTS) -> Room | None:
    """Return the room that each of these batches fits in; None where packing would save nothing.

    Each is [B, T] or [B, C, T], 0 for padding, and is later cut into `microbatches` and over the
    devices of the mesh. `sizes`: rooms between one and its half, from which the least that fits is
    taken. Waits for the device. None too where the mesh splits a row's tokens.
    """
    return room_of(measure(*segment_ids, microbatches=microbatches), sizes)


def with_room(batch: Rows, room: Room | None) -> Rows:
    """Return `batch` with `room` in place of one that it has; None takes it out."""
    fields: dict[str, Any] = {name: x for name, x in batch.items() if name != "room"}
    if room is not None:
        fields["room"] = room
    return cast(Rows, fields)


def segment_ids_of(batch: Mapping[str, Any]) -> Any:
    """Return the segments of rows [B, T] or of candidates [B, C, T]."""
    return batch["segment_ids_BCT" if "segment_ids_BCT" in batch else "segment_ids_BT"]


def unpadded(batch: Rows, microbatches: int = 1, sizes: int = OF_DATA) -> Rows:
    """Return `batch` with the room that its real tokens need, measured on the mesh.

    `batch`: rows [B, T] or candidates [B, C, T]; see `find_room`. Waits for the device.
    """
    room = find_room(segment_ids_of(batch), microbatches=microbatches, sizes=sizes)
    return with_room(batch, room)


def measured_ahead(
    batches: Batches,
    mesh: Mesh,
    steps: int,
    microbatches: int = 1,
    segments: Callable[[HostBatch], np.ndarray] = segment_ids_of,
) -> Iterator[tuple[HostBatch, Room | None]]:
    """Yield the next `steps` batches of data, each with the room that it needs on the mesh.

    A batch is measured before the step before it is run, so to ask for its room waits for no
    update that has just been dispatched. The data's position is that of what has been yielded.
    `segments`: of a host's batch, the segments of those of its rows that are trained on.
    """

    def measure_next() -> Measured:
        own = {"segment_ids": segments(batches.peek())}
        on_mesh = to_mesh(own, mesh)["segment_ids"]
        return measure(on_mesh, microbatches=microbatches)

    measured = measure_next()
    for left in reversed(range(steps)):
        batch = next(batches)
        room = room_of(measured, OF_DATA)
        if left:
            measured = measure_next()
        yield batch, room
