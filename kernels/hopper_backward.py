"""The backward pass of kernels/hopper.py: dQ over blocks of queries, dK and dV over blocks of keys.

As in kernels/flash.py the weights are computed again from the log-sum-exp and nothing is added atomically, so results
are deterministic. The two consumers take no turns here: their products are long enough for either's softmax to hide.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import flash
from kernels.hopper import (
    CONSUMERS,
    ROWS,
    Ring,
    base2,
    call,
    drain,
    fill,
    leave,
    matrices,
    meet,
    per_row,
    plan,
    produce_keys,
    program,
    ring,
    roles,
    spread,
    store,
    take,
    where_seen,
)
from kernels.masks import MASKED, Ranges, pad_ranges

COLUMN = plgpu.Layout.WGMMA.reduce(0)  # registers that hold a number per column of a product


def again(index: Any) -> jax.Array:
    """`index` in a loop, such that addresses made of it are computed anew in each step.

    Otherwise the compiler keeps those of all of a matrix's tiles in registers, and spills sums.
    """
    return lax.optimization_barrier(jnp.int32(index))


def dq_body(
    bounds, lo, hi, q, k, v, do, lse, delta, dq, qs, dos, ks, vs, full, *, group, scale, soft_cap
):
    """Queries of a block over their keys: dQ = scale dS K, dS = P (dP - delta)."""
    b, n, kv, i, rows_of = program(CONSUMERS, group, bounds.shape[1])
    bounds = [bounds[b, i, x] for x in range(4)]
    count, (_, block, width) = bounds[3] - bounds[0], ks.tiles[0].shape

    def produce():
        for part in range(CONSUMERS):
            plgpu.copy_gmem_to_smem(q.at[b, rows_of(part), n], qs.at[part], full)
            plgpu.copy_gmem_to_smem(do.at[b, rows_of(part), n], dos.at[part], full)
        produce_keys(bounds[0], count, k.at[b, :, kv], v.at[b, :, kv], ks, vs)

    def consume(me):
        rows = rows_of(me)
        seen = per_row(lo, b, rows), per_row(hi, b, rows)
        total, correction = per_row(lse, b, n, rows), per_row(delta, b, n, rows)
        plgpu.barrier_wait(full)

        def over_keys(acc):
            @pl.loop(0, count)
            def _(step):
                (keys,) = take(ks, step)
                q_mine, do_mine = (x.at[again(me)] for x in (qs, dos))

                def products(s_ref, dp_ref):
                    plgpu.wgmma(s_ref, q_mine, keys.T)
                    x, c = base2(s_ref[...], scale, soft_cap)
                    p = jnp.exp2(x * c - spread(total, x.shape))
                    p = where_seen(p, bounds[0] + step, bounds, seen, 0.0)
                    p = p if soft_cap is None else p * (1 - x * x)
                    plgpu.wgmma(dp_ref, do_mine, take(vs, step)[0].T)
                    return p * (dp_ref[...] - spread(correction, p.shape))

                ds = pl.run_scoped(products, *[plgpu.ACC((ROWS, block), jnp.float32)] * 2)
                leave(vs, step)
                plgpu.wgmma(acc, ds.astype(jnp.bfloat16), keys)
                plgpu.wgmma_wait(0)
                leave(ks, step)

            return acc[...]

        total_dq = pl.run_scoped(over_keys, plgpu.ACC((ROWS, width), jnp.float32))
        store(total_dq * scale, qs.at[me], dq.at[b, rows, n])

    roles(produce, consume)


def dkv_tile(
    step, tile, bounds, seen, part, ks, vs, qs: Ring, dos: Ring, dk_sum, dv_sum, scale, soft_cap
) -> None:
    """Adds a tile of queries to dV (P^T dO) and dK (dS^T Q), or to the one of them that is not None.

    Products are transposed, [keys, queries]: P and dS go from registers into the next product as they are. That of
    dP begins after the softmax and is waited for together with dV's: begun earlier, it takes registers that spill.
    """
    queries, totals = take(qs, step)
    k_mine, v_mine = (x.at[again(part)] for x in (ks, vs))
    shape = (ROWS, totals.shape[0])

    def products(s_ref, dp_ref=None):
        plgpu.wgmma(s_ref, k_mine, queries.T)
        douts, corrections = take(dos, step)
        x, c = base2(s_ref[...], scale, soft_cap)
        p = jnp.exp2(x * c - spread(plgpu.load(totals, (), layout=COLUMN), shape, 1))
        p = where_seen(p, tile, bounds, seen, 0.0)
        if dk_sum is not None:
            plgpu.wgmma(dp_ref, v_mine, douts.T)
        if dv_sum is not None:
            plgpu.wgmma(dv_sum, p.astype(jnp.bfloat16), douts)
        if dk_sum is None:
            plgpu.wgmma_wait(0)
            return None
        p = p if soft_cap is None else p * (1 - x * x)
        return p * (dp_ref[...] - spread(plgpu.load(corrections, (), layout=COLUMN), shape, 1))

    ds = pl.run_scoped(products, *[plgpu.ACC(shape, jnp.float32)] * (1 if dk_sum is None else 2))
    leave(dos, step)
    if dk_sum is not None:
        plgpu.wgmma(dk_sum, ds.astype(jnp.bfloat16), queries)
        plgpu.wgmma_wait(0)
    leave(qs, step)


def dkv_body(
    bounds,
    lo,
    hi,
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    ks,
    vs,
    qs,
    dos,
    full,
    done,
    *,
    group,
    scale,
    soft_cap,
):
    """Keys of a block over the queries that see them, of each head of the group.

    Where a block has keys for one consumer only, the first sums dV and the second dK.
    """
    parts, _, width = ks.shape
    b, n, _, i, rows_of = program(parts, 1)
    bounds = [bounds[b, i, x] for x in range(4)]
    count, block = bounds[3] - bounds[0], qs.tiles[0].shape[1]

    def over_queries(run):
        @pl.loop(0, group * count)
        def _(step):
            g = lax.div(step, count)
            run(step, bounds[0] + step - g * count, n * group + g)

    def produce():
        for part in range(parts):
            plgpu.copy_gmem_to_smem(k.at[b, rows_of(part), n], ks.at[part], full)
            plgpu.copy_gmem_to_smem(v.at[b, rows_of(part), n], vs.at[part], full)

        @over_queries
        def _(step, tile, head):
            queries = pl.ds(tile * block, block)
            fill(qs, step, q.at[b, queries, head], lse.at[b, head, queries])
            fill(dos, step, do.at[b, queries, head], delta.at[b, head, queries])

        drain(qs, group * count)
        drain(dos, group * count)

    def consume(me):
        part = me if parts > 1 else 0
        rows, k_mine, v_mine = rows_of(part), ks.at[part], vs.at[part]
        seen, total = (
            (per_row(lo, b, rows), per_row(hi, b, rows)),
            plgpu.ACC((ROWS, width), jnp.float32),
        )
        plgpu.barrier_wait(full)

        def sums(dk_sum=None, dv_sum=None):
            @over_queries
            def _(step, tile, head):
                dkv_tile(
                    step,
                    tile,
                    bounds,
                    seen,
                    part,
                    ks,
                    vs,
                    qs,
                    dos,
                    dk_sum,
                    dv_sum,
                    scale,
                    soft_cap,
                )

            return [x[...] for x in (dk_sum, dv_sum) if x is not None]

        if parts > 1:
            dk_mine, dv_mine = pl.run_scoped(sums, total, total)
            store(dk_mine * scale, k_mine, dk.at[b, rows, n])
            store(dv_mine, v_mine, dv.at[b, rows, n])
            return

        @pl.when(me == 0)
        def _():
            (dv_mine,) = pl.run_scoped(lambda x: sums(dv_sum=x), total)
            meet(done)  # the other reads K no more
            store(dv_mine, k_mine, dv.at[b, rows, n])

        @pl.when(me == 1)
        def _():
            (dk_mine,) = pl.run_scoped(sums, total)
            meet(done)
            store(dk_mine * scale, v_mine, dk.at[b, rows, n])

    roles(produce, consume)


def backward(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    keys: Ranges,
    queries: Ranges,
    out_BTNH,
    lse_BNT,
    dout_BTNH,
    *,
    scale,
    soft_cap,
):
    """Gradients of q, k, v in their types."""
    (_, length, heads, width), kv_heads = q_BTNH.shape, k_BSKH.shape[2]
    tiles, padded, group = plan(q_BTNH, k_BSKH, scale)
    delta_BNT = jnp.einsum(
        "BTNH,BTNH->BNT", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32
    )
    extra = ((0, 0), (0, 0), (0, padded - length))
    arrays = [flash.prepare("gpu", x, padded) for x in (q_BTNH, k_BSKH, v_BSKH, dout_BTNH)]
    arrays += [
        jnp.pad(x, extra, constant_values=c) for x, c in ((lse_BNT, -MASKED), (delta_BNT, 0.0))
    ]
    q, k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:2])
    how = {"group": group, "scale": scale, "soft_cap": soft_cap}
    k_slots, v_slots = tiles.dq
    scratch = {
        "qs": matrices(CONSUMERS, ROWS, width),
        "dos": matrices(CONSUMERS, ROWS, width),
        "ks": ring(k_slots, matrices(k_slots, ROWS, width)),
        "vs": ring(v_slots, matrices(v_slots, ROWS, width)),
        "full": plgpu.Barrier(num_arrivals=2 * CONSUMERS),
    }
    body, seen = functools.partial(dq_body, **how), pad_ranges(keys, padded)
    dq = call(body, "hopper_dq", seen, CONSUMERS * ROWS, ROWS, heads, scratch, q, *arrays)
    parts, slots = 1 if tiles.shared else CONSUMERS, tiles.dkv
    scratch = {
        "ks": matrices(parts, ROWS, width),
        "vs": matrices(parts, ROWS, width),
        "qs": ring(slots, matrices(slots, ROWS, width), plgpu.SMEM((slots, ROWS), jnp.float32)),
        "dos": ring(slots, matrices(slots, ROWS, width), plgpu.SMEM((slots, ROWS), jnp.float32)),
        "full": plgpu.Barrier(num_arrivals=2 * parts),
        "done": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
    body, seen = functools.partial(dkv_body, **how), pad_ranges(queries, padded)
    dk, dv = call(body, "hopper_dkv", seen, parts * ROWS, ROWS, kv_heads, scratch, (k, k), *arrays)
    return tuple(flash.restore("gpu", x, length) for x in (dq, dk, dv))
