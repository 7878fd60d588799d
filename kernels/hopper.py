"""FlashAttention for Hopper GPUs, in Pallas' Mosaic GPU dialect; its backward pass is kernels/hopper_backward.py.

Not yet measured on a GPU: compiled for an H200 (no spilled register, no serialised product: tests/test_compile.py) and
within 1e-2 of float64 in JAX's interpreter, whose products are not asynchronous (tests/test_hopper.py), but never run
on a chip. So `auto` does not choose it.

The mathematics is that of kernels/flash.py, and so are the ranges that stand for masks; this file is about keeping
the tensor cores busy (Shah et al. 2024, FlashAttention-3, section 3). A program has three warpgroups of 128 threads.
The third, the producer, only starts bulk copies of tiles into rings of slots in shared memory. The first two, the
consumers, own 64 rows each and multiply the same tiles, each at its own pace. Of each slot, one barrier says that it is
full (the copy's bytes have arrived), another that it is free (both consumers are through). A product (wgmma) takes a
tile of shared memory on its right, on its left another one or registers, and adds to registers while its warpgroup goes
on; reading the sum, or `wgmma_wait`, waits for it. Registers limit tiles: a thread of a consumer has 240, and a sum
[64, W] takes W / 2 of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import flash
from kernels.flash_bodies import LOG2E
from kernels.masks import MASKED, Ranges, block_bounds, pad_ranges
from runtime.errors import UserError

CONSUMERS = 2
ROWS = 64  # of a consumer: those of a wgmma
ROW = plgpu.Layout.WGMMA.reduce(1)  # registers that hold a number per row of a product


class Tiles(NamedTuple):
    """Sizes for a head width, from registers and from 227 KiB of shared memory; none has been timed."""

    keys: int  # of a tile in the forward kernel; in the others tiles are 64 x 64
    forward: int  # slots of the ring of K and of that of V
    dq: tuple[int, int]  # slots of K and of V in the dQ kernel
    dkv: int  # slots of Q and of dO in the dK/dV kernel
    shared: bool  # in it both consumers have the same keys, and one sums dV, the other dK


TILES = {
    64: Tiles(128, 4, (4, 4), 4, False),
    128: Tiles(128, 2, (3, 3), 3, False),
    256: Tiles(64, 2, (2, 1), 2, True),  # dK and dV together would take all registers
}


class Ring(NamedTuple):
    """Slots in shared memory that the producer fills in turn; step i uses slot i modulo their number."""

    tiles: tuple[Any, ...]  # what a slot holds, each [slots, ...]
    full: Any
    free: Any


def matrices(count: int, rows: int, width: int) -> Any:
    """`count` matrices in shared memory, laid out as wgmma wants them: 8 x 64 tiles, their banks permuted."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((count, rows, width), jnp.bfloat16, transforms=transforms)


def ring(slots: int, *tiles: Any) -> Ring:
    """A ring to allocate. A slot is full when each of its `tiles` has arrived, free when each consumer says so."""
    full = plgpu.Barrier(num_arrivals=len(tiles), num_barriers=slots)
    return Ring(tiles, full, plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots))


def slot_of(at: Ring, step: jax.Array) -> jax.Array:
    return lax.rem(step, jnp.int32(at.tiles[0].shape[0]))


def fill(at: Ring, step: jax.Array, *sources: Any) -> None:
    """The producer's part: waits until the slot is free, and starts the copies."""
    slot = slot_of(at, step)
    pl.when(step >= at.tiles[0].shape[0])(lambda: plgpu.barrier_wait(at.free.at[slot]))
    for source, tile in zip(sources, at.tiles, strict=True):
        plgpu.copy_gmem_to_smem(source, tile.at[slot], at.full.at[slot])


def drain(at: Ring, steps: jax.Array) -> None:
    """The producer's part after `steps`: sees the last slots free too, so that no barrier is left half used."""

    @pl.loop(lax.max(steps - at.tiles[0].shape[0], 0), steps)
    def _(step):
        plgpu.barrier_wait(at.free.at[slot_of(at, step)])


def take(at: Ring, step: jax.Array) -> list[Any]:
    """A consumer's part: waits until the slot is full, and returns its tiles."""
    slot = slot_of(at, step)
    plgpu.barrier_wait(at.full.at[slot])
    return [tile.at[slot] for tile in at.tiles]


def leave(at: Ring, step: jax.Array) -> None:
    """A consumer's part: it has read the slot, and no product that reads it is under way."""
    plgpu.barrier_arrive(at.free.at[slot_of(at, step)])


def spread(x: jax.Array, shape: tuple[int, int], axis: int = 0) -> jax.Array:
    """Numbers per row (axis 0) or per column (1) as a matrix."""
    return lax.broadcast_in_dim(x, shape, [axis])


def base2(products: jax.Array, scale: float, soft_cap: float | None) -> tuple[jax.Array, float]:
    """x and c such that x c are the scores in base 2; with a soft cap, x is the tanh.

    Written with exp2: tanh.approx errs by up to 2^-11 (PTX ISA), which a cap of 50 makes 0.02 of a score.
    """
    if soft_cap is None:
        return products, scale * LOG2E
    return 1 - 2 / (1 + jnp.exp2(products * (2 * LOG2E * scale / soft_cap))), soft_cap * LOG2E


def where_seen(
    x: jax.Array, tile: jax.Array, bounds: list[jax.Array], seen: tuple, otherwise: float
) -> jax.Array:
    """`x` where its row sees the column, else `otherwise`; tiles that all rows see whole are left as they are."""

    def mask():
        at = tile * x.shape[1] + plgpu.broadcasted_iota(
            jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA
        )
        first, last = (spread(end, x.shape) for end in seen)
        return jnp.where((at >= first) & (at <= last), x, otherwise)

    return lax.cond((tile >= bounds[1]) & (tile < bounds[2]), lambda: x, mask)


def per_row(ref: Any, *at: Any) -> jax.Array:
    """A number per row, from global memory."""
    return plgpu.load(ref, at, layout=ROW, optimized=False)


def store(value: jax.Array, tile: Any, target: Any) -> None:
    """`value` through `tile` in shared memory to `target` in global memory."""
    tile[...] = value.astype(tile.dtype)
    plgpu.commit_smem()  # so that the copy sees what the threads wrote
    plgpu.copy_smem_to_gmem(tile, target)
    plgpu.wait_smem_to_gmem(0)


def roles(produce: Any, consume: Any) -> None:
    """Gives the warpgroups their parts, and most of the producer's registers to the consumers."""
    me = lax.axis_index("warpgroup")

    @pl.when(me < CONSUMERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        consume(me)

    @pl.when(me == CONSUMERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        produce()


def program(parts: int, group: int, last_first: int | None = None) -> tuple[Any, ...]:
    """Batch row, head, key/value head and block of this program, and the rows of each of the block's `parts`.

    The last of `last_first` blocks goes first: the longest under a causal mask, which else all would wait for.
    """
    b, n, i = (lax.axis_index(name) for name in ("batch", "head", "block"))
    i = i if last_first is None else last_first - 1 - i
    return (
        b,
        n,
        lax.div(n, jnp.int32(group)),
        i,
        lambda part: pl.ds((i * parts + part) * ROWS, ROWS),
    )


def produce_keys(begin, count, k, v, ks: Ring, vs: Ring) -> None:
    """The producer over a block's tiles of keys and values."""
    block = ks.tiles[0].shape[1]

    @pl.loop(0, count)
    def _(step):
        keys = pl.ds((begin + step) * block, block)
        fill(ks, step, k.at[keys])
        fill(vs, step, v.at[keys])

    drain(ks, count)
    drain(vs, count)


def meet(barrier: Any) -> None:
    """Waits until both consumers are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def call(
    body: Any,
    name: str,
    seen: Ranges,
    block: int,
    other: int,
    heads: int,
    scratch: dict,
    out: Any,
    *arrays: Any,
):
    """`body` over blocks of `block` rows and tiles of `other` columns, for each of `heads` and each row of the batch.

    The grid's first axis is the fastest: programs that run together share their keys.
    """
    batch, length = seen.first_BT.shape
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(heads, length // block, batch),
        grid_names=("head", "block", "batch"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        # Of functions that are used, this makes exp2 and log approximate; their errors are below 2^-22 (PTX ISA).
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(block_bounds(seen, block, other), *seen, *arrays)


def plan(q_BTNH: jax.Array, k_BSKH: jax.Array, scale: float) -> tuple[Tiles, int, int]:
    """Tiles, padded length, group G; raises UserError where the kernels do not fit."""
    length, heads, width = q_BTNH.shape[1:]
    if width not in TILES or q_BTNH.dtype != jnp.bfloat16 or scale <= 0:
        raise UserError(
            f"pallas_hopper: serves bfloat16, head widths {tuple(TILES)} and a scale above 0, not {q_BTNH.dtype}, "
            f"{width} and {scale}; use xla_chunked"
        )
    return (
        TILES[width],
        -(-length // (CONSUMERS * ROWS)) * CONSUMERS * ROWS,
        heads // k_BSKH.shape[2],
    )


def forward_body(
    bounds, lo, hi, q, k, v, o, lse, qs, totals, ks, vs, full, turn, *, group, scale, soft_cap
):
    """Queries of a block over their keys.

    The consumers take turns, so that one multiplies while the other computes its softmax, without a tensor core:

        first   S0 | softmax 0 | O0 S1     | softmax 1 | O1 S2 | ...
        second     | S0        | softmax 0 | O0 S1     | softmax 1 | ...

    S = Q K^T and O += P V; a | is a meeting at the barrier `turn`, once S has begun and before O begins.
    """
    b, n, kv, i, rows_of = program(CONSUMERS, group, bounds.shape[1])
    bounds = [bounds[b, i, x] for x in range(4)]
    count, (_, block, width) = bounds[3] - bounds[0], ks.tiles[0].shape

    def produce():
        for part in range(CONSUMERS):
            plgpu.copy_gmem_to_smem(q.at[b, rows_of(part), n], qs.at[part], full)
        produce_keys(bounds[0], count, k.at[b, :, kv], v.at[b, :, kv], ks, vs)

    def consume(me):
        rows, mine = rows_of(me), qs.at[me]
        seen = per_row(lo, b, rows), per_row(hi, b, rows)
        plgpu.barrier_wait(full)
        pl.when(me == 1)(lambda: meet(turn))

        def over_keys(acc):
            def tile(step, carry):
                m, l = carry

                def product(sum_ref):
                    plgpu.wgmma(sum_ref, mine, take(ks, step)[0].T)
                    meet(turn)
                    return sum_ref[...]

                x, c = base2(
                    pl.run_scoped(product, plgpu.ACC((ROWS, block), jnp.float32)), scale, soft_cap
                )
                leave(ks, step)
                x = where_seen(x, bounds[0] + step, bounds, seen, MASKED)
                m_new = jnp.maximum(m, x.max(axis=1))
                p, kept = jnp.exp2(x * c - spread(m_new * c, x.shape)), jnp.exp2((m - m_new) * c)
                l = l * kept + p.sum(axis=1)
                acc[...] = acc[...] * spread(kept, acc.shape)
                p, l, m_new = lax.optimization_barrier((p.astype(jnp.bfloat16), l, m_new))
                plgpu.barrier_arrive(turn)
                (values,) = take(vs, step)
                plgpu.barrier_wait(turn)
                plgpu.wgmma(acc, p, values)
                plgpu.wgmma_wait(0)
                leave(vs, step)
                return m_new, l

            # Above MASKED: the weight of a masked score is then exactly 0, also in a row that has seen nothing.
            start = (
                plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), ROW)
                for x in (MASKED / 2, 0.0)
            )
            return *lax.fori_loop(0, count, tile, tuple(start)), acc[...]

        m, l, acc = pl.run_scoped(over_keys, plgpu.ACC((ROWS, width), jnp.float32))
        pl.when(me == 0)(lambda: meet(turn))
        l_or_1, c = jnp.where(l > 0, l, 1.0), LOG2E * (scale if soft_cap is None else soft_cap)
        store(
            jnp.where(l > 0, m * c + jnp.log(l_or_1) * LOG2E, -MASKED),
            totals.at[me],
            lse.at[b, n, rows],
        )
        store(acc * spread(1 / l_or_1, acc.shape), mine, o.at[b, rows, n])

    roles(produce, consume)


def forward(q_BTNH, k_BSKH, v_BSKH, keys: Ranges, queries: Ranges, *, scale, soft_cap):
    """Output [B, T, N, H] and the base-2 log-sum-exp [B, N, T] float32 (+1e30 where nothing is seen)."""
    batch, length, heads, width = q_BTNH.shape
    tiles, padded, group = plan(q_BTNH, k_BSKH, scale)
    q, k, v = (flash.prepare("gpu", x, padded) for x in (q_BTNH, k_BSKH, v_BSKH))
    scratch = {
        "qs": matrices(CONSUMERS, ROWS, width),
        "totals": plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        "ks": ring(tiles.forward, matrices(tiles.forward, tiles.keys, width)),
        "vs": ring(tiles.forward, matrices(tiles.forward, tiles.keys, width)),
        "full": plgpu.Barrier(num_arrivals=CONSUMERS),
        "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
    out = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
    )
    body, seen = (
        functools.partial(forward_body, group=group, scale=scale, soft_cap=soft_cap),
        pad_ranges(keys, padded),
    )
    o, lse = call(
        body, "hopper_forward", seen, CONSUMERS * ROWS, tiles.keys, heads, scratch, out, q, k, v
    )
    return flash.restore("gpu", o, length), lse[:, :, :length]
