"""The bodies of kernels/flash.py: the same for TPU (Mosaic), GPU (Triton) and interpreted on CPU.

Scores are in base 2, statistics and sums are float32, and a block of K or V is a matrix [rows, H].
`lo` and `hi` are the first and last column that each of the block's own rows sees, [rows, 1].
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.masks import MASKED

LOG2E = math.log2(math.e)
# Numbers in a row of a TPU's registers.
LANES = 128


class BodyOptions(NamedTuple):
    """Options that all bodies take."""

    in_memory: bool
    """Keep what goes from tile to tile in a TPU's memory (`over_tiles`)."""
    scale: float
    """Factor of the scores."""
    soft_cap: float | None
    """Scores become soft_cap * tanh(scores / soft_cap)."""


def column(row_ref: Any) -> jax.Array:
    """Return a [1, rows] block as [rows, 1]."""
    return row_ref[...].reshape(row_ref.shape[-1], 1)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contract these axes of a and b, summed in float32; float32 inputs keep their precision."""
    precision = jax.lax.Precision.DEFAULT
    if a.dtype == jnp.float32:
        precision = jax.lax.Precision.HIGHEST
    a_axis, b_axis = contract
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def base2_scores(
    a: jax.Array,
    b: jax.Array,
    scale: float,
    soft_cap: float | None,
) -> tuple[jax.Array, Any]:
    """Return a b^T scaled, capped and in base 2; and tanh of the capped scores, or None."""
    if soft_cap is None:
        return dot(a, b, (1, 1)) * (scale * LOG2E), None
    bent = jnp.tanh(dot(a, b, (1, 1)) * (scale / soft_cap))
    return bent * (soft_cap * LOG2E), bent


def masked(scores: jax.Array, start: jax.Array, lo: jax.Array, hi: jax.Array) -> jax.Array:
    """Return `scores` [rows, columns], MASKED where a row does not see the column.

    The first column is number `start` of its sequence.
    """
    at = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    seen = (at >= lo) & (at <= hi)
    return jnp.where(seen, scores, MASKED)


def over_tiles(bounds_ref: Any, tile: Callable, carry: Any, in_memory: bool) -> Any:
    """Run `tile(j, carry, mask=...)` over a block's tiles in order; return the last carry.

    At both ends tiles need a mask, between them not. `in_memory` is for a TPU, whose registers do
    not hold the carry beside a tile. Its compiler keeps it in memory and at both ends of every
    tile copies it there, with the matrix unit at rest; what is in memory from the first stays put.
    """

    # The three ranges of tiles of kernels/masks.py, block_bounds.
    def loops(tile, carry):
        begin, full_begin, full_end, end = (bounds_ref[0, i] for i in range(4))
        with_mask = functools.partial(tile, mask=True)
        without_mask = functools.partial(tile, mask=False)
        carry = jax.lax.fori_loop(begin, full_begin, with_mask, carry)
        carry = jax.lax.fori_loop(full_begin, full_end, without_mask, carry)
        return jax.lax.fori_loop(full_end, end, with_mask, carry)

    # The same with the carry in `refs` between tiles.
    def loops_in_memory(*refs):
        def read():
            return [ref[...] for ref in refs]

        def write(values):
            for ref, value in zip(refs, values, strict=True):
                ref[...] = value

        def stored_tile(j, _, mask):
            write(tile(j, read(), mask))

        write(carry)
        loops(stored_tile, None)
        return read()

    if not in_memory:
        return loops(tile, carry)
    memory = [pltpu.VMEM(x.shape, x.dtype) for x in carry]
    return pl.run_scoped(loops_in_memory, *memory)


def across(x: jax.Array, columns: int) -> jax.Array:
    """Return `x` [rows, LANES], alike in all columns, as [rows, columns].

    An x of [rows, 1] is returned as it is, since it is broadcast.
    """
    if x.shape[1] == 1:
        return x
    copies = -(-columns // LANES)
    return jnp.concatenate([x] * copies, axis=1)[:, :columns]


def tile_pair(a_ref: Any, b_ref: Any, j: jax.Array, block: int) -> tuple[Any, Any, Any]:
    """Return the first row of the `j`-th tile, and that tile of both [rows, H] references."""
    start = pl.multiple_of(j * block, block)
    tile = pl.ds(start, block)
    return start, a_ref[tile, :], b_ref[tile, :]


def forward_body(
    bounds_ref,
    lo_ref,
    hi_ref,
    q_ref,
    k_ref,
    v_ref,
    o_ref,
    lse_ref,
    *,
    block: int,
    options: BodyOptions,
) -> None:
    """Attend from one block of queries to its keys, in tiles of `block` keys.

    m, l, acc: running maximum, sum and output (Dao 2023, algorithm 1).
    """
    q = q_ref[...]
    lo = column(lo_ref)
    hi = column(hi_ref)

    def tile(j, carry, mask):
        m, l, acc = carry
        start, k, v = tile_pair(k_ref, v_ref, j, block)
        s, _ = base2_scores(q, k, options.scale, options.soft_cap)
        if mask:
            s = masked(s, start, lo, hi)
        # The online softmax: what was summed before is scaled to the new maximum.
        m_new = jnp.maximum(m, s.max(axis=1, keepdims=True))
        p = jnp.exp2(s - across(m_new, block))
        kept = jnp.exp2(m - m_new)
        acc = acc * across(kept, acc.shape[1]) + dot(p.astype(v.dtype), v, (1, 0))
        l_new = l * kept + p.sum(axis=1, keepdims=True)
        return m_new, l_new, acc

    # In memory a row's number is in all lanes: from one lane, every tile would have to spread it
    # over the others.
    rows = (q.shape[0], LANES if options.in_memory else 1)
    # Above MASKED, so that the weight of a masked score is exactly 0, also in a row that has seen
    # nothing.
    m = jnp.full(rows, MASKED / 2, jnp.float32)
    l = jnp.zeros(rows, jnp.float32)
    acc = jnp.zeros(q.shape, jnp.float32)
    m, l, acc = over_tiles(bounds_ref, tile, (m, l, acc), options.in_memory)

    # A row that saw nothing gives zeros.
    m = m[:, :1]
    l = l[:, :1]
    l_or_1 = jnp.where(l > 0, l, 1.0)
    o_ref[...] = (acc / l_or_1).astype(o_ref.dtype)
    lse = jnp.where(l > 0, m + jnp.log2(l_or_1), -MASKED)
    lse_ref[...] = lse.reshape(lse_ref.shape)


def dq_body(
    bounds_ref,
    lo_ref,
    hi_ref,
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    lse_ref,
    delta_ref,
    dq_ref,
    *,
    block: int,
    options: BodyOptions,
) -> None:
    """Compute dQ of one block of queries, over its keys in tiles of `block`.

    dQ = scale dS K, dS = P (dP - delta) (Dao 2023, algorithm 2).
    """
    q = q_ref[...]
    do = do_ref[...]
    lo = column(lo_ref)
    hi = column(hi_ref)
    lse = column(lse_ref)
    delta = column(delta_ref)

    def tile(j, carry, mask):
        (dq,) = carry
        start, k, v = tile_pair(k_ref, v_ref, j, block)
        s, bent = base2_scores(q, k, options.scale, options.soft_cap)
        if mask:
            s = masked(s, start, lo, hi)
        p = jnp.exp2(s - lse)
        dp = dot(do, v, (1, 1))
        ds = p * (dp - delta)
        if options.soft_cap is not None:
            ds *= 1 - bent * bent
        return (dq + dot(ds.astype(k.dtype), k, (1, 0)),)

    zeros = jnp.zeros(q.shape, jnp.float32)
    (dq,) = over_tiles(bounds_ref, tile, (zeros,), options.in_memory)
    dq_ref[...] = (dq * options.scale).astype(dq_ref.dtype)


def dkv_body(
    bounds_ref,
    lo_ref,
    hi_ref,
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    lse_ref,
    delta_ref,
    dk_ref,
    dv_ref,
    *,
    block: int,
    options: BodyOptions,
    heads_axis: int,
    add: bool,
) -> None:
    """Compute dK and dV of one block of keys, over the queries that see it in tiles of `block`.

    dV = P^T dO, dK = scale dS^T Q, summed over the query heads of q_ref, which are its axis
    `heads_axis`. Scores are computed transposed, [keys, queries], so that the log-sum-exp is a row
    and no tile is transposed. `add`: the last axis of the grid steps through the group's heads
    while the output's block stays in place.
    """
    k = k_ref[...]
    v = v_ref[...]
    lo = column(lo_ref)
    hi = column(hi_ref)

    def head(g, carry):
        def tile(j, carry, mask):
            dk, dv = carry
            # This head's tile of queries, their gradients and statistics.
            start = pl.multiple_of(j * block, block)
            queries = pl.ds(start, block)
            at = (g, queries) if heads_axis == 0 else (queries, g)
            q = q_ref[(*at, slice(None))]
            do = do_ref[(*at, slice(None))]
            lse = lse_ref[g, :, queries]
            delta = delta_ref[g, :, queries]

            # P and dS, transposed.
            s, bent = base2_scores(k, q, options.scale, options.soft_cap)
            if mask:
                s = masked(s, start, lo, hi)
            p = jnp.exp2(s - lse)
            dp = dot(v, do, (1, 1))
            ds = p * (dp - delta)
            if options.soft_cap is not None:
                ds *= 1 - bent * bent
            dk += dot(ds.astype(q.dtype), q, (1, 0))
            dv += dot(p.astype(do.dtype), do, (1, 0))
            return dk, dv

        return over_tiles(bounds_ref, tile, carry, options.in_memory)

    # Sum over the heads that this program has.
    dk = jnp.zeros(k.shape, jnp.float32)
    dv = jnp.zeros(v.shape, jnp.float32)
    heads = q_ref.shape[heads_axis]
    if heads == 1:
        dk, dv = head(0, (dk, dv))
    else:
        dk, dv = jax.lax.fori_loop(0, heads, head, (dk, dv))
    dk = (dk * options.scale).astype(dk_ref.dtype)
    dv = dv.astype(dv_ref.dtype)
    if not add:
        dk_ref[...] = dk
        dv_ref[...] = dv
        return

    # Sum over the programs that share this block: the first writes, the others add.
    @pl.when(pl.program_id(3) == 0)
    def _():
        dk_ref[...] = dk
        dv_ref[...] = dv

    @pl.when(pl.program_id(3) > 0)
    def _():
        dk_ref[...] += dk
        dv_ref[...] += dv
