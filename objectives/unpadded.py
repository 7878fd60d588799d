"""Run a model over only the tokens that a batch needs, and put its outputs back in the rows.

Rows of a rollout are padded on both sides: with responses of a quarter of the longest length,
most of a batch is padding. And all responses to a prompt begin with it: with eight of them, seven
of its eight copies are computed for nothing. So tokens are laid out anew in N rows of slots, the
model runs over these, and its output for a token is put back wherever the token stands.
Objectives keep their arrays [B, ...], and their results change by rounding alone.

packed: a row's real tokens become a segment of a packed row, as data/packing.py packs text.
shared: a beginning that rows have in common is held once (objectives/beginnings.py). Attention
still runs over the rows as they are, so this is used only where it saves enough besides.

A program needs the layout and the number of rows when it is compiled. `find_room` measures a
batch, which waits for the device; the result travels with the batch as `room`, and `run_model`
reads it. A batch without one is run as it is. Batches of data are measured a step ahead
(`measured_ahead`), so that the device always has work.

There are B rows of T tokens, in G groups of B / G: the rows of one micro-batch that one device
holds. Each group has N rows of slots for itself, so nothing crosses devices.
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
from kernels.layouts import SharedRows, each_group, moved
from model import Params
from objectives.beginnings import is_own, owners, share_slots
from objectives.likelihood import Apply, TokenBatch, inputs
from sharding import along, batch_devices, constrain_batch, in_microbatches, to_mesh

Array = jax.Array
HostBatch = dict[str, np.ndarray]
Rows = TypeVar("Rows", bound=Mapping[str, Any])
"""A batch: arrays by name, and perhaps a `room`."""

# Each new room compiles a script's programs again, so there are few: this many between a share and
# its half. Lengths of rollouts drift while a policy learns; those of data stay as they are.
OF_ROLLOUTS = 2
OF_DATA = 8

# What shared rows cost even without a token, as a share of a padded pass: attention, and laying
# rows out for it. Measured with the world's model on a CPU (benchmarks/README.md); less in a wider
# model.
LAID_OUT = 0.4


@flax.struct.dataclass
class Room:
    """How a batch is laid out, in how many rows; it is part of a program, not an array."""

    share: float = flax.struct.field(pytree_node=False)
    """Rows of slots over rows, at most 1."""
    is_shared: bool = flax.struct.field(pytree_node=False, default=False)
    """Beginnings that rows have in common are held once; else rows are packed."""

    def rows(self, rows: int) -> int:
        """Return the number of rows of slots for a group of `rows` rows, rounded up."""
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

    There are `rows` packed rows of `longest` tokens, two static ints; no length is above
    `longest`. As many packed rows as rows to pack are always enough, and with fewer the places are
    the same down to the number used then. With still fewer, rows without room are False in
    `fits_B`, and the rest of the result means nothing for them. Equal lengths keep their order.
    """

    def put(free_N: Array, length: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        has_room_N = free_N >= length
        row = jnp.argmax(has_room_N)
        start = longest - free_N[row]
        return free_N.at[row].add(-length), (row, start, has_room_N[row])

    # The longest first, which leaves the least room unused.
    order_B = jnp.argsort(-length_B, stable=True)
    empty_N = jnp.full(rows, longest, length_B.dtype)
    _, (row_B, start_B, fits_B) = jax.lax.scan(put, empty_N, length_B[order_B])

    # Back from that order into the rows' own.
    rank_B = jnp.argsort(order_B)
    return Places(row_B[rank_B], start_B[rank_B], rank_B, fits_B[rank_B])


def rows_used(segment_ids_BT: Array) -> Array:
    """Return how many packed rows `first_fit` uses for the rows of a group, an int32 scalar.

    `segment_ids_BT`: of the rows as they are, not packed yet; 0 is padding. Packed rows have T
    tokens too. At least 1, also where all is padding.
    """
    # As many packed rows as rows are always enough; the last one used tells how many are needed.
    rows, longest = segment_ids_BT.shape
    length_B = (segment_ids_BT > 0).sum(1)
    places = first_fit(length_B, longest, rows)
    return places.row_B.max() + 1


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
    """Give each real token of a group a slot in `rows` packed rows of T.

    `segment_ids_BT`: int, 0 for padding; a row's real tokens lie next to one another, as one
    example. `rows` is static. A row that finds no room gets no slots, and False in `fits_B`.
    """
    # A row's real tokens lie next to one another, in their order.
    count, length = segment_ids_BT.shape
    real_BT = segment_ids_BT > 0
    places = first_fit(real_BT.sum(1), length, rows)
    first_B = places.row_B * length + places.start_B
    index_BT = jnp.cumsum(real_BT, axis=1) - 1
    slot_BT = first_B[:, None] + index_BT

    # Padding has no slot, nor has a row that found no room.
    has_slot_BT = real_BT & places.fits_B[:, None]
    of_token_BT = jnp.where(has_slot_BT, slot_BT, -1)

    # The other way round: the token in each of M slots. What has no slot goes past the last one,
    # where it is dropped.
    slots = rows * length
    none_M = jnp.full(slots, -1, jnp.int32)
    token_BT = jnp.arange(count * length, dtype=jnp.int32).reshape(count, length)
    known_BT = jnp.where(has_slot_BT, slot_BT, slots)
    of_slot_M = none_M.at[known_BT].set(token_BT, mode="drop")

    # Ranks differ within a packed row, so each row is a segment of its own there.
    row_M = of_slot_M // length
    rank_M = places.rank_B[row_M]
    segment_M = jnp.where(of_slot_M < 0, 0, 1 + rank_M)
    return Slots(
        of_token_BT=of_token_BT.astype(jnp.int32),
        of_slot_NT=of_slot_M.reshape(rows, length),
        segment_ids_NT=segment_M.reshape(rows, length).astype(jnp.int32),
        fits_B=places.fits_B,
    )


# --- the model


class Layout(NamedTuple):
    """How a batch is laid out for a model, and its outputs back in rows."""

    slots: Callable[[Array], Array]
    """[B, T] of the rows as [N, T]."""
    rows: Callable[[Array], Array]
    """[N, T, ...] as [B, T, ...], 0 at padding."""
    segment_ids: Array | SharedRows
    """What the model takes for them."""
    fits_B: Array
    """False for a row that found no room."""


def layout_of(batch: TokenBatch) -> Layout:
    """Lay out the rows of `batch` as its `room`, a Room, says: packed or shared.

    `batch`: rows of one example each, padded on the left, on the right or on both; it must have a
    `room` (`with_room`; KeyError). Each device of the current mesh lays out its own rows. Rows for
    which the room is too small are False in `fits_B` of the result; nothing is raised.
    """
    # Each device has slots for its own rows.
    count, length = batch["tokens_BT"].shape
    groups = batch_devices(count)
    rows_GBT = (groups, count // groups, length)
    by_group = [x_BT.reshape(rows_GBT) for x_BT in inputs(batch)]
    room = batch["room"]
    rows = room.rows(count // groups)

    # Shared: beginnings are held once, and attention runs over the rows as they are.
    if room.is_shared:
        owner_GBT = jax.vmap(owners)(*by_group)
        assign_shared = jax.vmap(partial(share_slots, rows=rows))
        shared = assign_shared(owner_GBT)
        seen = SharedRows(batch["segment_ids_BT"], shared.slot_BT, owner_GBT, shared.token_NT)
        return Layout(seen.slots, seen.rows, seen, shared.fits_B.reshape(-1))

    # Packed: attention runs over the packed rows, in which each row is a segment.
    _, segment_ids_GBT, _ = by_group
    assign_packed = jax.vmap(partial(assign_slots, rows=rows))
    slots = assign_packed(segment_ids_GBT)
    segment_ids_NT = slots.segment_ids_NT.reshape(-1, length)
    return Layout(
        slots=lambda x: each_group(moved, x, slots.of_slot_NT, slots.of_token_BT),
        rows=lambda x: each_group(moved, x, slots.of_token_BT, slots.of_slot_NT),
        segment_ids=constrain_batch(segment_ids_NT),
        fits_B=slots.fits_B.reshape(-1),
    )


def run_model(apply: Apply, params: Params, batch: TokenBatch) -> Any:
    """Return apply(params, ...) of the rows of `batch`, [B, T] each, as if they were run as rows.

    Where `batch` has no `room` (`find_room`) they are. Else each row holds one example, padded on
    either side or both, and real tokens alone are run, packed or shared; then `x_BTD` and
    `scalars_BT` are 0 at padding. Where the room, found for other rows, is too small, rows without
    a place are NaN throughout. The output's other fields are as apply returns them.
    """
    if "room" not in batch:
        return apply(params, *inputs(batch))

    # Into the slots, and through the model.
    tokens_BT, _, positions_BT = inputs(batch)
    layout = layout_of(batch)
    tokens_NT = layout.slots(tokens_BT)
    positions_NT = layout.slots(positions_BT)
    output = apply(params, tokens_NT, layout.segment_ids, positions_NT)

    # Each token's outputs, back to where the token stands. A room that is too small is the
    # caller's fault: what depends on it is not a number, rather than wrong.
    per_token = {}
    for name in ("x_BTD", "scalars_BT"):
        if not hasattr(output, name):
            continue
        back = layout.rows(getattr(output, name))
        other_axes = [1] * (back.ndim - 1)
        fits = layout.fits_B.reshape(-1, *other_axes)
        per_token[name] = jnp.where(fits, back, jnp.nan)
    return output.replace(**per_token)


# --- how much room a batch needs


def can_pack() -> bool:
    """Return True unless the current mesh, if any, splits a row's tokens or has stages."""
    mesh = get_abstract_mesh()
    return mesh.empty or along(mesh, "sequence", "stage") == 1


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokens, segment ids and positions of a batch by name: [B, T], or [B, C, T].

    In that order, `tokens_BT`, `segment_ids_BT`, `positions_BT`, or with candidates `tokens_BCT`
    and so on; the batch must have them.
    """
    axes = "BCT" if "tokens_BCT" in batch else "BT"
    names = [f"{name}_{axes}" for name in ("tokens", "segment_ids", "positions")]
    return {name: batch[name] for name in names}


@partial(jax.jit, static_argnames="microbatches")
def rows_needed(arrays: tuple[Array, ...], microbatches: int) -> Array:
    """Return the most rows of T slots that a group of this batch needs, [2] int32: packed, shared.

    Packed, real tokens of whole rows lie side by side; shared, beginnings in common are held once.
    A group: the rows of one micro-batch (sharding.in_microbatches) that one device of
    the current mesh holds, or all of the micro-batch without a mesh, or where data x fsdp does not
    divide its rows. `arrays`: the values of `model_inputs`, in its order, [B, T], or [B, C, T],
    which are B C rows. `microbatches`, static, must divide B, with candidates too.
    """
    *rows, length = arrays[0].shape
    rows_of_one = math.prod(rows) // microbatches
    groups = microbatches * batch_devices(rows_of_one)

    def by_group(x: Array) -> Array:
        return in_microbatches(x, microbatches).reshape(groups, -1, length)

    tokens_GBT, segment_ids_GBT, positions_GBT = map(by_group, arrays)

    # Packed: by packing them.
    packed_G = jax.vmap(rows_used)(segment_ids_GBT)

    # Shared: as many rows as distinct tokens fill, rounded up; at least 1, also without a token.
    owner_GBT = jax.vmap(owners)(tokens_GBT, segment_ids_GBT, positions_GBT)
    is_own_GBT = jax.vmap(is_own)(owner_GBT)
    distinct_G = is_own_GBT.sum((1, 2))
    shared_G = -(-distinct_G // length)
    shared = jnp.maximum(shared_G.max(), 1)
    return jnp.stack([packed_G.max(), shared])


class Measured(NamedTuple):
    """Batches whose rows are being counted; `room_of` waits for the count."""

    needed: Array | None
    """As of `rows_needed`, the most over the batches; None where no layout can be used."""
    rows: int
    """The rows of a group."""


def measure(*batches: Mapping[str, Any], microbatches: int = 1) -> Measured:
    """Count the rows that each of these batches needs, for `room_of`. Does not wait.

    Arguments are those of `find_room`; all processes must call it.
    """
    of_batches = []
    for batch in batches:
        arrays = model_inputs(batch)
        of_batches.append(tuple(arrays.values()))

    # The rows of a group, alike in all batches.
    tokens, _, _ = of_batches[0]
    rows = tokens.size // tokens.shape[-1] // microbatches
    own = rows // batch_devices(rows)
    if not can_pack():
        return Measured(None, own)

    # One room serves all: the most that any of them needs.
    needed = [rows_needed(arrays, microbatches) for arrays in of_batches]
    return Measured(jnp.stack(needed).max(0), own)


def room_of(measured: Measured, sizes: int) -> Room | None:
    """Return the least room that holds `measured`, or None where it would save nothing.

    Shares of rooms are 2^(-k / `sizes`), k = 1, 2, ...; packed or shared, whichever takes less.
    None too where `measured` says that no layout can be used. Waits for the device; the same on
    every process.
    """
    if measured.needed is None:
        return None
    packed, distinct = measured.needed.tolist()

    # What each would cost, in rows: attention is over all rows where beginnings are shared.
    shared = LAID_OUT * measured.rows + (1 - LAID_OUT) * distinct
    is_shared = shared < packed
    needed = distinct if is_shared else packed
    share = needed / measured.rows

    # The largest k for which 2 to the power of -k / sizes is no less than the share.
    k = math.floor(-sizes * math.log2(share) + 1e-9)
    if k == 0:
        return None
    return Room(2 ** (-k / sizes), is_shared)


def find_room(
    *batches: Mapping[str, Any], microbatches: int = 1, sizes: int = OF_ROLLOUTS
) -> Room | None:
    """Return the one room that all these batches fit in; None where a layout would save nothing.

    `batches`: each has rows [B, T] or candidates [B, C, T], all of one shape, as `model_inputs`
    reads them, on the current mesh. They are later cut into `microbatches`, which must divide B,
    with candidates too. A row or candidate holds one example (not checked). `sizes`: rooms between
    one and its half, from which the least that fits is taken. Waits for the device; all processes
    must call it. None too where the mesh splits a row's tokens, or has stages.
    """
    return room_of(measure(*batches, microbatches=microbatches), sizes)


def with_room(batch: Rows, room: Room | None) -> Rows:
    """Return a copy of `batch` with `room` in place of one that it has; None takes it out."""
    fields: dict[str, Any] = {name: x for name, x in batch.items() if name != "room"}
    if room is not None:
        fields["room"] = room
    return cast(Rows, fields)


def unpadded(batch: Rows, microbatches: int = 1, sizes: int = OF_DATA) -> Rows:
    """Return `batch` with the `room` that its real tokens need, or with none if it saves nothing.

    `batch`: rows [B, T] or candidates [B, C, T], on the current mesh, of one example each (not
    checked), later cut into `microbatches`, which must divide B, with candidates too. A copy is
    returned, in which a `room` that it has is replaced or taken out. `sizes`: rooms to choose from
    between one and its half (`find_room`). Waits for the device; all processes must call it.
    """
    return with_room(batch, find_room(batch, microbatches=microbatches, sizes=sizes))


def measured_ahead(
    batches: Batches,
    mesh: Mesh,
    steps: int,
    microbatches: int = 1,
    trained_on: Callable[[HostBatch], Mapping[str, Any]] = model_inputs,
) -> Iterator[tuple[HostBatch, Room | None]]:
    """Yield the next `steps` batches of data, each with the room that it needs on the mesh.

    `mesh`: the current one. What is yielded is as `next(batches)` gives it, not on the mesh yet
    and without a `room` in it; no batch is read beyond `steps`. A batch is measured one step
    ahead, before the one that precedes it is trained on, so to ask for its room waits for no
    update that has just been dispatched. The data's position is that of what has been yielded.
    trained_on(a host's batch) -> the `model_inputs` of those of its rows that are trained on,
    which `microbatches` cut. All processes must call it.
    """

    def measure_next() -> Measured:
        # Peeked at: the data's position stays before what has not been yielded.
        rows = to_mesh(dict(trained_on(batches.peek())), mesh)
        return measure(rows, microbatches=microbatches)

    measured = measure_next()
    for left in reversed(range(steps)):
        batch = next(batches)
        room = room_of(measured, OF_DATA)
        if left:
            measured = measure_next()
        yield batch, room
