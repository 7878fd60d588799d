"""The bodies of kernels/flash.py's kernels, the same for TPU (Mosaic), GPU (Triton) and interpreted on CPU.

In them scores are in base 2, statistics and sums are float32, and a block of K or V is a matrix [rows, H]. `lo` and
`hi` are the ranges of the block's own rows, [rows, 1].
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.masks import MASKED

LOG2E = math.log2(math.e)
LANES = 128  # numbers in a row of a TPU's registers


def column(row_ref: Any) -> jax.Array:
    """A [1, rows] block as [rows, 1]."""
    return row_ref[...].reshape(row_ref.shape[-1], 1)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """a and b contracted over the named axes, summed in float32; float32 inputs are not rounded to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def base2_scores(
    a: jax.Array, b: jax.Array, scale: float, soft_cap: float | None
) -> tuple[jax.Array, Any]:
    """a b^T scaled, capped and in base 2; and tanh of the capped scores (None without soft cap)."""
    if soft_cap is None:
        return dot(a, b, (1, 1)) * (scale * LOG2E), None
    bent = jnp.tanh(dot(a, b, (1, 1)) * (scale / soft_cap))
    return bent * (soft_cap * LOG2E), bent


def masked(scores: jax.Array, start: jax.Array, lo: jax.Array, hi: jax.Array) -> jax.Array:
    """`scores` [rows, columns], MASKED where the column (from `start` on) is outside its row's range."""
    at = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return jnp.where((at >= lo) & (at <= hi), scores, MASKED)


def over_tiles(bounds_ref: Any, tile: Any, carry: Any, in_memory: bool) -> Any:
    """`tile(j, carry, mask=...)` over a block's tiles in order: at both ends masked, between them not.

    `in_memory`: for a TPU, whose registers do not hold the carry beside a tile. Its compiler keeps it in memory and at
    both ends of every tile copies it there, with the matrix unit at rest; what is in memory from the first stays put.
    """

    def loops(tile, carry):
        begin, full_begin, full_end, end = (bounds_ref[0, i] for i in range(4))
        carry = jax.lax.fori_loop(begin, full_begin, functools.partial(tile, mask=True), carry)
        carry = jax.lax.fori_loop(full_begin, full_end, functools.partial(tile, mask=False), carry)
        return jax.lax.fori_loop(full_end, end, functools.partial(tile, mask=True), carry)

    def stored(*refs):
        def write(values):
            for ref, value in zip(refs, values, strict=True):
                ref[...] = value

        write(carry)
        loops(lambda j, _, mask: write(tile(j, [ref[...] for ref in refs], mask)), None)
        return [ref[...] for ref in refs]

    return (
        pl.run_scoped(stored, *(pltpu.VMEM(x.shape, x.dtype) for x in carry))
        if in_memory
        else loops(tile, carry)
    )


def across(x: jax.Array, columns: int) -> jax.Array:
    """`x` [rows, LANES], alike in all columns, as [rows, columns]; [rows, 1] as it is, since that is broadcast."""
    return (
        x if x.shape[1] == 1 else jnp.concatenate([x] * -(-columns // LANES), axis=1)[:, :columns]
    )


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
    block,
    in_memory,
    scale,
    soft_cap,
):
    """One block of queries over its keys. m, l: running maximum and sum (Dao 2023, algorithm 1)."""
    q, lo, hi = q_ref[...], column(lo_ref), column(hi_ref)

    def tile(j, carry, mask):
        m, l, acc = carry
        start = pl.multiple_of(j * block, block)
        k, v = k_ref[pl.ds(start, block), :], v_ref[pl.ds(start, block), :]
        s, _ = base2_scores(q, k, scale, soft_cap)
        if mask:
            s = masked(s, start, lo, hi)
        m_new = jnp.maximum(m, s.max(axis=1, keepdims=True))
        p, kept = jnp.exp2(s - across(m_new, block)), jnp.exp2(m - m_new)
        acc = acc * across(kept, acc.shape[1]) + dot(p.astype(v.dtype), v, (1, 0))
        return m_new, l * kept + p.sum(axis=1, keepdims=True), acc

    # Above MASKED: the weight of a masked score is then exactly 0, also in a row that has seen nothing.
    # In memory a row's number is in all lanes: from one lane, every tile would have to spread it over the others.
    rows = (q.shape[0], LANES if in_memory else 1)
    start = (
        jnp.full(rows, MASKED / 2, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    m, l, acc = over_tiles(bounds_ref, tile, start, in_memory)
    m, l = m[:, :1], l[:, :1]
    l_or_1 = jnp.where(l > 0, l, 1.0)
    o_ref[...] = (acc / l_or_1).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(l > 0, m + jnp.log2(l_or_1), -MASKED).reshape(lse_ref.shape)


def dq_body(
    bounds_ref, lo_ref, hi_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref,
    *, block, in_memory, scale, soft_cap,
):  # fmt: skip
    """One block of queries over its keys: dQ = scale dS K, dS = P (dP - delta)."""
    q, do, lo, hi = q_ref[...], do_ref[...], column(lo_ref), column(hi_ref)
    lse, delta = column(lse_ref), column(delta_ref)

    def tile(j, carry, mask):
        start = pl.multiple_of(j * block, block)
        k, v = k_ref[pl.ds(start, block), :], v_ref[pl.ds(start, block), :]
        s, bent = base2_scores(q, k, scale, soft_cap)
        if mask:
            s = masked(s, start, lo, hi)
        ds = jnp.exp2(s - lse) * (dot(do, v, (1, 1)) - delta)
        if soft_cap is not None:
            ds *= 1 - bent * bent
        return (carry[0] + dot(ds.astype(k.dtype), k, (1, 0)),)

    (dq,) = over_tiles(bounds_ref, tile, (jnp.zeros(q.shape, jnp.float32),), in_memory)
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def dkv_body(
    bounds_ref, lo_ref, hi_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref,
    *, block, in_memory, scale, soft_cap, heads_axis, add,
):  # fmt: skip
    """One block of keys over the queries that see it, for each query head of the block: dV = P^T dO, dK = dS^T Q.

    Scores are computed transposed, [keys, queries], so that the log-sum-exp is a row and no tile is transposed.
    `add`: the last axis of the grid steps through the group's heads while the output's block stays in place.
    """
    k, v, lo, hi = k_ref[...], v_ref[...], column(lo_ref), column(hi_ref)

    def head(g, carry):
        def tile(j, carry, mask):
            dk, dv = carry
            start = pl.multiple_of(j * block, block)
            at = (g, pl.ds(start, block)) if heads_axis == 0 else (pl.ds(start, block), g)
            q, do = q_ref[(*at, slice(None))], do_ref[(*at, slice(None))]
            lse, delta = lse_ref[g, :, pl.ds(start, block)], delta_ref[g, :, pl.ds(start, block)]
            s, bent = base2_scores(k, q, scale, soft_cap)
            if mask:
                s = masked(s, start, lo, hi)
            p = jnp.exp2(s - lse)
            ds = p * (dot(v, do, (1, 1)) - delta)
            if soft_cap is not None:
                ds *= 1 - bent * bent
            return dk + dot(ds.astype(q.dtype), q, (1, 0)), dv + dot(
                p.astype(do.dtype), do, (1, 0)
            )

        return over_tiles(bounds_ref, tile, carry, in_memory)

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    heads = q_ref.shape[heads_axis]
    dk, dv = head(0, start) if heads == 1 else jax.lax.fori_loop(0, heads, head, start)
    dk, dv = (dk * scale).astype(dk_ref.dtype), dv.astype(dv_ref.dtype)
    if not add:
        dk_ref[...], dv_ref[...] = dk, dv
        return

    @pl.when(pl.program_id(3) == 0)
    def _():
        dk_ref[...], dv_ref[...] = dk, dv

    @pl.when(pl.program_id(3) > 0)
    def _():
        dk_ref[...] += dk
        dv_ref[...] += dv
