"""Masks as ranges [first, last]: the keys that each query sees, the queries that see each key.

Segments are unbroken runs, so causality, packing and a sliding window all leave a range. Ranges
let every implementation skip blocks that no row sees, and drop the mask where a block is seen
whole.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row without a visible key gives no NaN.
MASKED = -1e30


class Ranges(NamedTuple):
    """First and last position that each row sees, [B, T] int32; first > last where none."""

    first_BT: jax.Array
    last_BT: jax.Array


def segment_runs(segment_ids: jax.Array) -> Ranges:
    """Return first and last position of the run of equal ids that each token [B, T] is in."""
    batch, length = segment_ids.shape
    changes_BT = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge_B1 = jnp.ones_like(changes_BT, shape=(batch, 1))
    position_T = jnp.arange(length, dtype=jnp.int32)

    # The positions where a run starts or ends; the positions between take the nearest one.
    is_start_BT = jnp.concatenate([edge_B1, changes_BT], axis=1)
    starts_BT = jnp.where(is_start_BT, position_T, 0)
    is_end_BT = jnp.concatenate([changes_BT, edge_B1], axis=1)
    ends_BT = jnp.where(is_end_BT, position_T, length)
    first_BT = jax.lax.cummax(starts_BT, axis=1)
    last_BT = jax.lax.cummin(ends_BT, axis=1, reverse=True)
    return Ranges(first_BT, last_BT)


def visible_ranges(
    batch: int,
    length: int,
    segment_ids: jax.Array | None,
    causal: bool,
    window: int | jax.Array | None,
) -> tuple[Ranges, Ranges]:
    """Return (the keys that each query sees, the queries that see each key), both [B, T].

    `segment_ids` is [B, T] int; tokens of segment 0 neither see nor are seen. `window` bounds the
    past only: a query at t sees keys from t - window + 1 on, up to t if `causal`.
    """
    position_T = jnp.arange(length, dtype=jnp.int32)
    position_BT = jnp.broadcast_to(position_T, (batch, length))

    # Without a mask a token sees its whole segment.
    run = Ranges(jnp.zeros_like(position_BT), jnp.full_like(position_BT, length - 1))
    if segment_ids is not None:
        run = segment_runs(segment_ids)

    # A window cuts the keys on the left and the queries on the right.
    first_key_BT = run.first_BT
    last_query_BT = run.last_BT
    if window is not None:
        first_key_BT = jnp.maximum(first_key_BT, position_BT - (window - 1))
        last_query_BT = jnp.minimum(last_query_BT, position_BT + (window - 1))

    # Causality cuts the keys on the right and the queries on the left.
    keys = Ranges(first_key_BT, position_BT if causal else run.last_BT)
    queries = Ranges(position_BT if causal else run.first_BT, last_query_BT)
    if segment_ids is None:
        return keys, queries
    keys = hide_padding(keys, segment_ids)
    queries = hide_padding(queries, segment_ids)
    return keys, queries


def hide_padding(seen: Ranges, segment_ids: jax.Array) -> Ranges:
    """Return the ranges [B, T], empty where the segment is 0."""
    length = segment_ids.shape[1]
    hidden_BT = segment_ids <= 0
    first_BT = jnp.where(hidden_BT, length, seen.first_BT)
    last_BT = jnp.where(hidden_BT, -1, seen.last_BT)
    return Ranges(first_BT, last_BT)


def mask_of(keys: Ranges) -> jax.Array:
    """Return [B, T, S] bool: whether a query sees a key, from the keys that each query sees."""
    length = keys.first_BT.shape[1]
    key_S = jnp.arange(length, dtype=jnp.int32)
    after_first_BTS = key_S >= keys.first_BT[:, :, None]
    before_last_BTS = key_S <= keys.last_BT[:, :, None]
    return after_first_BTS & before_last_BTS


def pad_ranges(seen: Ranges, length: int) -> Ranges:
    """Return `seen` lengthened at the end to `length` rows; the new rows see nothing."""
    extra = ((0, 0), (0, length - seen.first_BT.shape[1]))
    first_BT = jnp.pad(seen.first_BT, extra, constant_values=length)
    last_BT = jnp.pad(seen.last_BT, extra, constant_values=-1)
    return Ranges(first_BT, last_BT)


def block_bounds(seen: Ranges, block: int, other: int) -> jax.Array:
    """Return which blocks of `other` columns each block of `block` rows must visit.

    The result is [B, T / block, 4] int32. With bounds b, the rows see something in the column
    blocks b0 <= j < b3; all rows see all of every column block b1 <= j < b2, which need no mask.
    A block of rows that see nothing has b0 = b3.
    """
    batch, length = seen.first_BT.shape
    blocks = (batch, length // block, block)
    first = seen.first_BT.reshape(blocks)
    last = seen.last_BT.reshape(blocks)

    # The blocks that any row sees.
    begin = jnp.minimum(first.min(-1), length) // other
    end = (last.max(-1) + other) // other
    end = jnp.maximum(end, begin)

    # Among them those that every row sees whole.
    full_begin = (first.max(-1) + other - 1) // other
    full_begin = jnp.clip(full_begin, begin, end)
    full_end = (last.min(-1) + 1) // other
    full_end = jnp.clip(full_end, full_begin, end)
    return jnp.stack([begin, full_begin, full_end, end], axis=-1)
