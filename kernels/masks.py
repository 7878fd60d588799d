"""Masks as ranges: of each query the keys it sees, of each key the queries that see it, both as [first, last].

Segments are unbroken runs, so causality, packing and a sliding window all leave a range. Ranges let every
implementation skip blocks that nothing sees and leave out the mask where a whole block is seen.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row with no visible key gives no NaN


class Ranges(NamedTuple):
    """[first, last] of what each row sees, [B, T] int32; first > last where it sees nothing."""

    first_BT: jax.Array
    last_BT: jax.Array


def segment_runs(segment_ids: jax.Array) -> Ranges:
    """First and last position of the run of equal ids that each token of [B, T] lies in."""
    length = segment_ids.shape[1]
    changes_BT = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge_B1 = jnp.ones_like(changes_BT, shape=(segment_ids.shape[0], 1))
    at_T = jnp.arange(length, dtype=jnp.int32)
    starts_BT = jnp.where(jnp.concatenate([edge_B1, changes_BT], axis=1), at_T, 0)
    ends_BT = jnp.where(jnp.concatenate([changes_BT, edge_B1], axis=1), at_T, length)
    return Ranges(jax.lax.cummax(starts_BT, axis=1), jax.lax.cummin(ends_BT, axis=1, reverse=True))


def visible_ranges(
    batch: int, length: int, segment_ids: jax.Array | None, causal: bool, window: int | None
) -> tuple[Ranges, Ranges]:
    """The keys that each query sees, and the queries that see each key. Tokens of segment 0 neither see nor are seen.

    `window` bounds the past only: a query at t sees keys from t - window + 1 on, up to t if `causal`.
    """
    at_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    run = Ranges(jnp.zeros_like(at_BT), jnp.full_like(at_BT, length - 1))
    if segment_ids is not None:
        run = segment_runs(segment_ids)
    first_key_BT = (
        run.first_BT if window is None else jnp.maximum(run.first_BT, at_BT - (window - 1))
    )
    last_query_BT = (
        run.last_BT if window is None else jnp.minimum(run.last_BT, at_BT + (window - 1))
    )
    keys = Ranges(first_key_BT, at_BT if causal else run.last_BT)
    queries = Ranges(at_BT if causal else run.first_BT, last_query_BT)
    if segment_ids is None:
        return keys, queries
    return tuple(
        Ranges(*_nothing_where(segment_ids <= 0, seen, length)) for seen in (keys, queries)
    )


def _nothing_where(hidden_BT: jax.Array, seen: Ranges, length: int) -> tuple[jax.Array, jax.Array]:
    return jnp.where(hidden_BT, length, seen.first_BT), jnp.where(hidden_BT, -1, seen.last_BT)


def mask_of(keys: Ranges) -> jax.Array:
    """[B, T, S]: whether a query sees a key."""
    key = jnp.arange(keys.first_BT.shape[1], dtype=jnp.int32)
    return (key >= keys.first_BT[:, :, None]) & (key <= keys.last_BT[:, :, None])


def pad_ranges(seen: Ranges, length: int) -> Ranges:
    """`seen` lengthened to `length` rows; the new ones see nothing."""
    extra = ((0, 0), (0, length - seen.first_BT.shape[1]))
    return Ranges(
        jnp.pad(seen.first_BT, extra, constant_values=length),
        jnp.pad(seen.last_BT, extra, constant_values=-1),
    )


def block_bounds(seen: Ranges, block: int, other: int) -> jax.Array:
    """For each block of `block` rows the blocks of `other` columns that it must visit: [B, T / block, 4] int32.

    Bounds b: rows see something in blocks b0 <= j < b3, and all of them see all of every block b1 <= j < b2, so
    that no mask is needed there. A block of rows that see nothing has b0 = b3.
    """
    batch, length = seen.first_BT.shape
    first = seen.first_BT.reshape(batch, length // block, block)
    last = seen.last_BT.reshape(batch, length // block, block)
    begin = jnp.minimum(first.min(-1), length) // other
    end = jnp.maximum((last.max(-1) + other) // other, begin)
    full_begin = jnp.clip((first.max(-1) + other - 1) // other, begin, end)
    full_end = jnp.clip((last.min(-1) + 1) // other, full_begin, end)
    return jnp.stack([begin, full_begin, full_end, end], axis=-1)
