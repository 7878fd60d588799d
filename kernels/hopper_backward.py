"""The backward pass of kernels/hopper.py: dQ by blocks of queries, dK and dV by blocks of keys.

As in kernels/flash.py the weights are computed again from the log-sum-exp and nothing is added
atomically, so results are deterministic. The two consumers take no turns here: their products are
long enough for either's softmax to hide.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import flash
from kernels.hopper import (
    CONSUMERS,
    ROWS,
    Bounds,
    Options,
    Place,
    Plan,
    Ring,
    SeenRefs,
    base2,
    call,
    drain,
    fill,
    leave,
    matrices,
    meet,
    per_row,
    plan_of,
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

# Registers that hold a number per column of a product.
COLUMN = plgpu.Layout.WGMMA.reduce(0)


class Inputs(NamedTuple):
    """Arrays, padded, or references in global memory."""

    q: Any
    """[B, T, N, H]."""
    k: Any
    """[B, S, K, H]."""
    v: Any
    """[B, S, K, H]."""
    do: Any
    """Gradient of the output, [B, T, N, H]."""
    lse: Any
    """Log-sum-exp, base 2, [B, N, T]."""
    delta: Any
    """Sum over H of output times its gradient, [B, N, T]."""


def again(index: Any) -> jax.Array:
    """Return `index` such that addresses made of it in a loop are computed anew in each step.

    Otherwise the compiler keeps those of all of a matrix's tiles in registers, and spills sums.
    """
    return lax.optimization_barrier(jnp.int32(index))


# ---- dQ ----


class DqOutputs(NamedTuple):
    """Shape, or reference in global memory: dq like q."""

    dq: Any


class DqMemory(NamedTuple):
    """Shared memory of a program of the dQ kernel."""

    dos: Any
    """The output's gradient of each consumer's queries."""
    full: Any
    """Barrier: queries and gradients have arrived."""
    ks: Ring
    qs: Any
    """The queries of each consumer; at the end, their dQ."""
    vs: Ring


def dq_body(
    seen: SeenRefs,
    inputs: Inputs,
    outputs: DqOutputs,
    memory: DqMemory,
    options: Options,
) -> None:
    """Compute dQ of a block of queries over their keys: dQ = scale dS K, dS = P (dP - delta)."""
    ks, vs = memory.ks, memory.vs
    place = program(CONSUMERS, options.group, seen.bounds.shape[1])
    bounds = place.bounds(seen)
    count = bounds.end - bounds.begin
    _, block, width = ks.tiles[0].shape

    def produce():
        for part in range(CONSUMERS):
            q = inputs.q.at[place.b, place.rows(part), place.n]
            plgpu.copy_gmem_to_smem(q, memory.qs.at[part], memory.full)
            do = inputs.do.at[place.b, place.rows(part), place.n]
            plgpu.copy_gmem_to_smem(do, memory.dos.at[part], memory.full)
        k = inputs.k.at[place.b, :, place.kv]
        v = inputs.v.at[place.b, :, place.kv]
        produce_keys(bounds.begin, count, k, v, ks, vs)

    def consume(me):
        rows = place.rows(me)
        first = per_row(seen.first, place.b, rows)
        last = per_row(seen.last, place.b, rows)
        lse = per_row(inputs.lse, place.b, place.n, rows)
        delta = per_row(inputs.delta, place.b, place.n, rows)
        plgpu.barrier_wait(memory.full)

        def over_keys(acc):
            @pl.loop(0, count)
            def _(step):
                (keys,) = take(ks, step)
                q_mine = memory.qs.at[again(me)]
                do_mine = memory.dos.at[again(me)]

                def products(s_ref, dp_ref):
                    # S = Q K^T, and P from the log-sum-exp.
                    plgpu.wgmma(s_ref, q_mine, keys.T)
                    x, c = base2(s_ref[...], options.scale, options.soft_cap)
                    p = jnp.exp2(x * c - spread(lse, x.shape))
                    p = where_seen(p, bounds.begin + step, bounds, (first, last), 0.0)
                    # The slope of the soft cap.
                    if options.soft_cap is not None:
                        p = p * (1 - x * x)
                    # dP = dO V^T.
                    plgpu.wgmma(dp_ref, do_mine, take(vs, step)[0].T)
                    return p * (dp_ref[...] - spread(delta, p.shape))

                tile = plgpu.ACC((ROWS, block), jnp.float32)
                ds = pl.run_scoped(products, tile, tile)
                leave(vs, step)
                # dQ += dS K.
                plgpu.wgmma(acc, ds.astype(jnp.bfloat16), keys)
                plgpu.wgmma_wait(0)
                leave(ks, step)

            return acc[...]

        dq = pl.run_scoped(over_keys, plgpu.ACC((ROWS, width), jnp.float32))
        target = outputs.dq.at[place.b, rows, place.n]
        store(dq * options.scale, memory.qs.at[me], target)

    roles(produce, consume)


# ---- dK and dV ----


class DkvOutputs(NamedTuple):
    """Shapes, or references in global memory: dk and dv like k and v."""

    dk: Any
    dv: Any


class DkvMemory(NamedTuple):
    """Shared memory of a program of the dK/dV kernel."""

    done: Any
    """Barrier: both consumers read no keys and values any more."""
    dos: Ring
    """Slots of (gradients of the output, their delta)."""
    full: Any
    """Barrier: keys and values have arrived."""
    ks: Any
    """The keys of each part of the block; at the end, a result."""
    qs: Ring
    """Slots of (queries, their log-sum-exp)."""
    vs: Any
    """The values of each part of the block; at the end, a result."""


class KeyRows(NamedTuple):
    """A consumer's rows of the block of keys."""

    part: jax.Array | int
    """Which part of the block they are."""
    bounds: Bounds
    """Tiles of queries that the block visits."""
    seen: tuple[jax.Array, jax.Array]
    """First and last query that sees each row."""


def dkv_tile(
    step: jax.Array,
    tile: jax.Array,
    mine: KeyRows,
    memory: DkvMemory,
    options: Options,
    dk_sum: Any,
    dv_sum: Any,
) -> None:
    """Add a tile of queries to dV (P^T dO) and dK (dS^T Q), or to the one that is not None.

    `step` counts all tiles of the program, `tile` is the tile's number among those of its head.
    Products are transposed, [keys, queries]: P and dS go from registers into the next product as
    they are. That of dP begins after the softmax and is waited for together with dV's: begun
    earlier, it takes registers that spill.
    """
    queries, lse_ref = take(memory.qs, step)
    k_mine = memory.ks.at[again(mine.part)]
    v_mine = memory.vs.at[again(mine.part)]
    shape = (ROWS, lse_ref.shape[0])

    def products(s_ref, dp_ref=None):
        # S^T = K Q^T, and P^T from the log-sum-exp.
        plgpu.wgmma(s_ref, k_mine, queries.T)
        douts, delta_ref = take(memory.dos, step)
        x, c = base2(s_ref[...], options.scale, options.soft_cap)
        s = x * c
        lse = plgpu.load(lse_ref, (), layout=COLUMN)
        p = jnp.exp2(s - spread(lse, shape, 1))
        p = where_seen(p, tile, mine.bounds, mine.seen, 0.0)
        # dP^T = V dO^T and dV += P^T dO are under way together.
        if dk_sum is not None:
            plgpu.wgmma(dp_ref, v_mine, douts.T)
        if dv_sum is not None:
            plgpu.wgmma(dv_sum, p.astype(jnp.bfloat16), douts)
        if dk_sum is None:
            plgpu.wgmma_wait(0)
            return None
        # dS^T, with the slope of the soft cap.
        if options.soft_cap is not None:
            p = p * (1 - x * x)
        dp = dp_ref[...]
        delta = plgpu.load(delta_ref, (), layout=COLUMN)
        return p * (dp - spread(delta, shape, 1))

    # S, and where dK is summed dP too, are sums in registers.
    sums = 1 if dk_sum is None else 2
    ds = pl.run_scoped(products, *[plgpu.ACC(shape, jnp.float32)] * sums)
    leave(memory.dos, step)
    # dK += dS^T Q.
    if dk_sum is not None:
        plgpu.wgmma(dk_sum, ds.astype(jnp.bfloat16), queries)
        plgpu.wgmma_wait(0)
    leave(memory.qs, step)


class QueryTiles(NamedTuple):
    """The tiles of queries that a block of keys visits, of each query head of the group."""

    place: Place
    bounds: Bounds
    count: jax.Array
    """Tiles of one head."""
    group: int
    """Query heads."""

    def loop(self, function: Callable[[Any, Any, Any], None]) -> None:
        """Run `function(step, tile, head)` for each tile; `step` counts them over all heads."""

        @pl.loop(0, self.group * self.count)
        def _(step):
            g = lax.div(step, self.count)
            tile = self.bounds.begin + step - g * self.count
            function(step, tile, self.place.n * self.group + g)


def produce_queries(tiles: QueryTiles, inputs: Inputs, memory: DkvMemory) -> None:
    """Copy, as the producer, the block's keys and values and all tiles of queries."""
    place = tiles.place
    qs, dos = memory.qs, memory.dos
    block = qs.tiles[0].shape[1]

    # The block's keys and values, once.
    for part in range(place.parts):
        k = inputs.k.at[place.b, place.rows(part), place.n]
        plgpu.copy_gmem_to_smem(k, memory.ks.at[part], memory.full)
        v = inputs.v.at[place.b, place.rows(part), place.n]
        plgpu.copy_gmem_to_smem(v, memory.vs.at[part], memory.full)

    # Queries, as slots become free.
    @tiles.loop
    def _(step, tile, head):
        at = pl.ds(tile * block, block)
        fill(qs, step, inputs.q.at[place.b, at, head], inputs.lse.at[place.b, head, at])
        fill(dos, step, inputs.do.at[place.b, at, head], inputs.delta.at[place.b, head, at])

    drain(qs, tiles.group * tiles.count)
    drain(dos, tiles.group * tiles.count)


def dkv_body(
    seen: SeenRefs,
    inputs: Inputs,
    outputs: DkvOutputs,
    memory: DkvMemory,
    options: Options,
) -> None:
    """Compute dK and dV of a block of keys, over the queries that see them.

    The queries are those of each head of the group. Where a block has keys for one consumer only,
    the first sums dV and the second dK.
    """
    parts, _, width = memory.ks.shape
    place = program(parts, 1)
    bounds = place.bounds(seen)
    tiles = QueryTiles(place, bounds, bounds.end - bounds.begin, options.group)

    def produce():
        produce_queries(tiles, inputs, memory)

    def consume(me):
        part = me if parts > 1 else 0
        rows = place.rows(part)
        k_mine = memory.ks.at[part]
        v_mine = memory.vs.at[part]
        first = per_row(seen.first, place.b, rows)
        last = per_row(seen.last, place.b, rows)
        mine = KeyRows(part, bounds, (first, last))
        total = plgpu.ACC((ROWS, width), jnp.float32)
        dk = outputs.dk.at[place.b, rows, place.n]
        dv = outputs.dv.at[place.b, rows, place.n]
        plgpu.barrier_wait(memory.full)

        def sums(dk_sum=None, dv_sum=None):
            @tiles.loop
            def _(step, tile, head):
                dkv_tile(step, tile, mine, memory, options, dk_sum, dv_sum)

            return [x[...] for x in (dk_sum, dv_sum) if x is not None]

        # Each consumer has keys of its own and sums both.
        if parts > 1:
            dk_mine, dv_mine = pl.run_scoped(sums, total, total)
            store(dk_mine * options.scale, k_mine, dk)
            store(dv_mine, v_mine, dv)
            return

        # Both have the same keys; results go where these were, once neither reads them any more.
        @pl.when(me == 0)
        def _():
            (dv_mine,) = pl.run_scoped(lambda x: sums(dv_sum=x), total)
            meet(memory.done)
            store(dv_mine, k_mine, dv)

        @pl.when(me == 1)
        def _():
            (dk_mine,) = pl.run_scoped(sums, total)
            meet(memory.done)
            store(dk_mine * options.scale, v_mine, dk)

    roles(produce, consume)


# ---- Both kernels ----


def call_dq(plan: Plan, keys: Ranges, inputs: Inputs) -> jax.Array:
    """Return dQ like inputs.q; `keys` are the padded keys that each query sees."""
    width = plan.width
    # Queries and their gradients stay, keys and values pass through rings.
    k_slots, v_slots = plan.tiles.dq
    memory = DqMemory(
        qs=matrices(CONSUMERS, ROWS, width),
        dos=matrices(CONSUMERS, ROWS, width),
        ks=ring(k_slots, matrices(k_slots, ROWS, width)),
        vs=ring(v_slots, matrices(v_slots, ROWS, width)),
        full=plgpu.Barrier(num_arrivals=2 * CONSUMERS),
    )
    (dq,) = call(
        dq_body,
        name="hopper_dq",
        options=plan.options,
        seen=keys,
        block=CONSUMERS * ROWS,
        other=ROWS,
        heads=inputs.q.shape[2],
        memory=memory,
        inputs=inputs,
        outputs=DqOutputs(jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype)),
    )
    return dq


def call_dkv(plan: Plan, queries: Ranges, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Return dK and dV like inputs.k; `queries` are the padded queries that see each key."""
    width = plan.width
    # Keys and values stay, queries and their gradients pass through rings.
    slots = plan.tiles.dkv
    parts = 1 if plan.tiles.shared else CONSUMERS
    numbers = plgpu.SMEM((slots, ROWS), jnp.float32)
    memory = DkvMemory(
        ks=matrices(parts, ROWS, width),
        vs=matrices(parts, ROWS, width),
        qs=ring(slots, matrices(slots, ROWS, width), numbers),
        dos=ring(slots, matrices(slots, ROWS, width), numbers),
        full=plgpu.Barrier(num_arrivals=2 * parts),
        done=plgpu.Barrier(num_arrivals=CONSUMERS),
    )
    shape = jax.ShapeDtypeStruct(inputs.k.shape, inputs.k.dtype)
    return call(
        dkv_body,
        name="hopper_dkv",
        options=plan.options,
        seen=queries,
        block=parts * ROWS,
        other=ROWS,
        heads=inputs.k.shape[2],
        memory=memory,
        inputs=inputs,
        outputs=DkvOutputs(shape, shape),
    )


def backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    keys: Ranges,
    queries: Ranges,
    out_BTNH: jax.Array,
    lse_BNT: jax.Array,
    dout_BTNH: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, k and v, in their shapes and types.

    `keys` are the keys that each query sees, `queries` the queries that see each key; `out_BTNH`
    and `lse_BNT` are the results of `forward`, `dout_BTNH` the gradient of its output.
    """
    length = q_BTNH.shape[1]
    plan = plan_of(q_BTNH, k_BSKH, scale, soft_cap)
    delta_BNT = jnp.einsum(
        "BTNH,BTNH->BNT", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32
    )

    # Padded rows have the log-sum-exp of rows that see nothing.
    extra = ((0, 0), (0, 0), (0, plan.padded - length))
    inputs = Inputs(
        q=flash.prepare("gpu", q_BTNH, plan.padded),
        k=flash.prepare("gpu", k_BSKH, plan.padded),
        v=flash.prepare("gpu", v_BSKH, plan.padded),
        do=flash.prepare("gpu", dout_BTNH, plan.padded),
        lse=jnp.pad(lse_BNT, extra, constant_values=-MASKED),
        delta=jnp.pad(delta_BNT, extra, constant_values=0.0),
    )
    dq = call_dq(plan, pad_ranges(keys, plan.padded), inputs)
    dk, dv = call_dkv(plan, pad_ranges(queries, plan.padded), inputs)
    dq_BTNH = flash.restore("gpu", dq, length)
    dk_BSKH = flash.restore("gpu", dk, length)
    dv_BSKH = flash.restore("gpu", dv, length)
    return dq_BTNH, dk_BSKH, dv_BSKH
