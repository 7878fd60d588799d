"""FlashAttention for Hopper GPUs, in Pallas' Mosaic GPU dialect: forward pass and common parts.

The backward pass is kernels/hopper_backward.py.

Not yet measured on a GPU: compiled for an H200 (no spilled register, no serialised product:
tests/test_compile.py) and within 1e-2 of float64 in JAX's interpreter, whose products are not
asynchronous (tests/test_hopper.py), but never run on a chip. So `auto` does not choose it.

The mathematics is that of kernels/flash.py, and so are the ranges that stand for masks; this file
is about keeping the tensor cores busy (Shah et al. 2024, FlashAttention-3, section 3). A program
has three warpgroups of 128 threads. The third, the producer, only starts bulk copies of tiles
into rings of slots in shared memory. The first two, the consumers, own 64 rows each and multiply
the same tiles, each at its own pace. Each slot has one barrier that says that it is full (the
copy's bytes have arrived), and one that says that it is free (both consumers are through). A
product (wgmma) takes a tile of shared memory on its right, on its left another one or registers,
and adds to registers while its warpgroup goes on; reading the sum, or `wgmma_wait`, waits for it.
Registers limit tiles: a thread of a consumer has 240, and a sum [64, W] takes W / 2 of them.
"""

from collections.abc import Callable
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
# Rows of a consumer: those of a wgmma.
ROWS = 64
# Registers that hold a number per row of a product.
ROW = plgpu.Layout.WGMMA.reduce(1)


# ---- Tiles ----


class Tiles(NamedTuple):
    """Sizes for a head width, from registers and 227 KiB of shared memory; none has been timed."""

    keys: int
    """Keys of a tile in the forward kernel; in the others tiles are 64 x 64."""
    forward: int
    """Slots of the ring of K and of that of V in the forward kernel."""
    dq: tuple[int, int]
    """Slots of K and of V in the dQ kernel."""
    dkv: int
    """Slots of Q and of dO in the dK/dV kernel."""
    shared: bool
    """In the dK/dV kernel both consumers have the same keys, and one sums dV, the other dK."""


TILES = {
    64: Tiles(keys=128, forward=4, dq=(4, 4), dkv=4, shared=False),
    128: Tiles(keys=128, forward=2, dq=(3, 3), dkv=3, shared=False),
    # dK and dV together would take all registers.
    256: Tiles(keys=64, forward=2, dq=(2, 1), dkv=2, shared=True),
}


class Options(NamedTuple):
    """Options that all bodies take."""

    group: int
    """Query heads that share a key/value head, G."""
    scale: float
    """Factor of the scores."""
    soft_cap: float | None
    """Scores become soft_cap * tanh(scores / soft_cap)."""


class Plan(NamedTuple):
    """How the kernels serve one shape."""

    tiles: Tiles
    padded: int
    """Tokens after padding to whole blocks."""
    width: int
    """Head width, H."""
    options: Options


def plan_of(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    scale: float,
    soft_cap: float | None,
) -> Plan:
    """Return how the kernels serve these shapes; raise UserError where they do not."""
    length, heads, width = q_BTNH.shape[1:]
    if width not in TILES or q_BTNH.dtype != jnp.bfloat16 or scale <= 0:
        raise UserError(
            f"pallas_hopper: serves bfloat16, head widths {tuple(TILES)} and a scale above 0, "
            f"not {q_BTNH.dtype}, {width} and {scale}; use xla_chunked"
        )
    block = CONSUMERS * ROWS
    padded = -(-length // block) * block
    options = Options(heads // k_BSKH.shape[2], scale, soft_cap)
    return Plan(TILES[width], padded, width, options)


# ---- Rings of slots in shared memory ----


class Ring(NamedTuple):
    """Slots that the producer fills in turn; step i uses slot i modulo their number."""

    tiles: tuple[Any, ...]
    """Buffers of the slots, each [slots, ...]."""
    full: Any
    free: Any


def matrices(count: int, rows: int, width: int) -> Any:
    """Describe `count` matrices in shared memory as wgmma wants them: 8 x 64 tiles, swizzled."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((count, rows, width), jnp.bfloat16, transforms=transforms)


def ring(slots: int, *tiles: Any) -> Ring:
    """Describe a ring, of whose slots each holds `tiles`, [slots, ...] as `matrices` makes them.

    A slot is full when each tile has arrived, free when each consumer says so.
    """
    full = plgpu.Barrier(num_arrivals=len(tiles), num_barriers=slots)
    free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots)
    return Ring(tiles, full, free)


def slot_of(at: Ring, step: jax.Array) -> jax.Array:
    """Return the slot that a step uses."""
    slots = at.tiles[0].shape[0]
    return lax.rem(step, jnp.int32(slots))


def fill(at: Ring, step: jax.Array, *sources: Any) -> None:
    """Wait, as the producer, until the slot is free, and start the copies into it."""
    slot = slot_of(at, step)

    @pl.when(step >= at.tiles[0].shape[0])
    def _():
        plgpu.barrier_wait(at.free.at[slot])

    for source, tile in zip(sources, at.tiles, strict=True):
        plgpu.copy_gmem_to_smem(source, tile.at[slot], at.full.at[slot])


def drain(at: Ring, steps: jax.Array) -> None:
    """See, as the producer after `steps`, the last slots free: no barrier is left half used."""
    slots = at.tiles[0].shape[0]

    @pl.loop(lax.max(steps - slots, 0), steps)
    def _(step):
        plgpu.barrier_wait(at.free.at[slot_of(at, step)])


def take(at: Ring, step: jax.Array) -> list[Any]:
    """Wait, as a consumer, until the slot is full; return its tiles."""
    slot = slot_of(at, step)
    plgpu.barrier_wait(at.full.at[slot])
    return [tile.at[slot] for tile in at.tiles]


def leave(at: Ring, step: jax.Array) -> None:
    """Say, as a consumer, that no product reads the slot any more."""
    plgpu.barrier_arrive(at.free.at[slot_of(at, step)])


# ---- What a block visits and its rows see ----


class SeenRefs(NamedTuple):
    """References that say which tiles a block of rows visits, and what each row sees."""

    bounds: Any
    """[B, blocks, 4]: `block_bounds` of kernels/masks.py."""
    first: Any
    """First column that each row sees, [B, T]."""
    last: Any
    """Last column that each row sees, [B, T]."""


class Bounds(NamedTuple):
    """The tiles that a block of rows visits, and among them those that need no mask."""

    begin: jax.Array
    full_begin: jax.Array
    full_end: jax.Array
    end: jax.Array


# ---- Steps of a consumer ----


def spread(x: jax.Array, shape: tuple[int, int], axis: int = 0) -> jax.Array:
    """Return numbers per row (axis 0) or per column (1) as a matrix of `shape`."""
    return lax.broadcast_in_dim(x, shape, [axis])


def base2(products: jax.Array, scale: float, soft_cap: float | None) -> tuple[jax.Array, float]:
    """Return x and c such that x c are the scores in base 2; with a soft cap, x is the tanh.

    Written with exp2: tanh.approx errs by up to 2^-11 (PTX ISA), which a cap of 50 makes 0.02 of a
    score.
    """
    if soft_cap is None:
        return products, scale * LOG2E
    exponent = products * (2 * LOG2E * scale / soft_cap)
    return 1 - 2 / (1 + jnp.exp2(exponent)), soft_cap * LOG2E


def where_seen(
    x: jax.Array,
    tile: jax.Array,
    bounds: Bounds,
    seen: tuple[jax.Array, jax.Array],
    otherwise: float,
) -> jax.Array:
    """Return `x` where its row sees the column, else `otherwise`.

    x [64, columns] is the `tile`-th tile of its rows; `seen` are first and last column that each
    row sees. Tiles that all rows see whole are left as they are.
    """

    def mask():
        start = tile * x.shape[1]
        at = start + plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
        first, last = (spread(end, x.shape) for end in seen)
        return jnp.where((at >= first) & (at <= last), x, otherwise)

    whole = (tile >= bounds.full_begin) & (tile < bounds.full_end)
    return lax.cond(whole, lambda: x, mask)


def per_row(ref: Any, *at: Any) -> jax.Array:
    """Load a number per row of a product from global memory."""
    return plgpu.load(ref, at, layout=ROW, optimized=False)


def store(value: jax.Array, tile: Any, target: Any) -> None:
    """Store `value` through `tile` in shared memory to `target` in global memory."""
    tile[...] = value.astype(tile.dtype)
    # So that the copy sees what the threads wrote.
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, target)
    plgpu.wait_smem_to_gmem(0)


def meet(barrier: Any) -> None:
    """Wait until both consumers are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


# ---- Programs ----


class Place(NamedTuple):
    """The block that a program works on."""

    b: jax.Array
    """Batch row."""
    n: jax.Array
    """Head of the grid."""
    kv: jax.Array
    """Key/value head."""
    i: jax.Array
    """Block of rows."""
    parts: int
    """Parts of 64 rows that the block has."""

    def rows(self, part: jax.Array | int) -> Any:
        """Return the rows of a part of the block."""
        return pl.ds((self.i * self.parts + part) * ROWS, ROWS)

    def bounds(self, seen: SeenRefs) -> Bounds:
        """Load the bounds of this program's block."""
        return Bounds(*(seen.bounds[self.b, self.i, x] for x in range(4)))


def program(parts: int, group: int, last_first: int | None = None) -> Place:
    """Return the place of this program, whose block has `parts` parts.

    The last of `last_first` blocks goes first: the longest under a causal mask, which else all
    would wait for.
    """
    b = lax.axis_index("batch")
    n = lax.axis_index("head")
    i = lax.axis_index("block")
    if last_first is not None:
        i = last_first - 1 - i
    return Place(b, n, lax.div(n, jnp.int32(group)), i, parts)


def roles(produce: Callable[[], None], consume: Callable[[Any], None]) -> None:
    """Give the warpgroups their parts, and most of the producer's registers to the consumers."""
    me = lax.axis_index("warpgroup")

    @pl.when(me < CONSUMERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        consume(me)

    @pl.when(me == CONSUMERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        produce()


def produce_keys(begin: Any, count: Any, k: Any, v: Any, ks: Ring, vs: Ring) -> None:
    """Copy, as the producer, a block's `count` tiles of keys and values from tile `begin` on."""
    block = ks.tiles[0].shape[1]

    @pl.loop(0, count)
    def _(step):
        keys = pl.ds((begin + step) * block, block)
        fill(ks, step, k.at[keys])
        fill(vs, step, v.at[keys])

    drain(ks, count)
    drain(vs, count)


def call(
    body: Callable[..., None],
    *,
    name: str,
    options: Options,
    seen: Ranges,
    block: int,
    other: int,
    heads: int,
    memory: NamedTuple,
    inputs: NamedTuple,
    outputs: NamedTuple,
) -> Any:
    """Run `body` over blocks of `block` rows, for each of `heads` and each row of the batch.

    Tiles have `other` columns; `seen` are the padded rows' ranges. `inputs` holds arrays,
    `outputs` shapes, `memory` what to allocate in shared memory; the body gets `(seen, inputs,
    outputs, memory, options)` with references in their place. Returns the outputs as a tuple.
    """
    batch, length = seen.first_BT.shape

    def kernel(bounds, first, last, *refs, memory):
        input_refs = type(inputs)(*refs[: len(inputs)])
        output_refs = type(outputs)(*refs[len(inputs) :])
        body(SeenRefs(bounds, first, last), input_refs, output_refs, memory, options)

    # Of functions that are used, approx_math makes exp2 and log approximate; their errors are
    # below 2^-22 (PTX ISA).
    params = plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )
    # The grid's first axis is the fastest: programs that run together share their keys.
    run = plgpu.kernel(
        kernel,
        out_type=tuple(outputs),
        scratch_types={"memory": memory},
        grid=(heads, length // block, batch),
        grid_names=("head", "block", "batch"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=params,
    )
    return run(block_bounds(seen, block, other), *seen, *inputs)


# ---- Forward ----


class ForwardInputs(NamedTuple):
    """Arrays, or references in global memory: q [B, T, N, H], k and v [B, S, K, H]."""

    q: Any
    k: Any
    v: Any


class ForwardOutputs(NamedTuple):
    """Shapes, or references in global memory: out like q, log-sum-exp [B, N, T]."""

    o: Any
    lse: Any


class ForwardMemory(NamedTuple):
    """Shared memory of a program of the forward kernel."""

    full: Any
    """Barrier: the queries have arrived."""
    ks: Ring
    qs: Any
    """The queries of each consumer; at the end, their outputs."""
    totals: Any
    """The log-sum-exp of each consumer's rows."""
    turn: Any
    """Barrier where the consumers meet."""
    vs: Ring


def forward_body(
    seen: SeenRefs,
    inputs: ForwardInputs,
    outputs: ForwardOutputs,
    memory: ForwardMemory,
    options: Options,
) -> None:
    """Attend from the queries of a block to their keys.

    The consumers take turns, so that one multiplies while the other computes its softmax, without
    a tensor core:

        first   S0 | softmax 0 | O0 S1     | softmax 1 | O1 S2 | ...
        second     | S0        | softmax 0 | O0 S1     | softmax 1 | ...

    S = Q K^T and O += P V; a | is a meeting at the barrier `turn`, once S has begun and before O
    begins.
    """
    scale, soft_cap = options.scale, options.soft_cap
    ks, vs, turn = memory.ks, memory.vs, memory.turn
    place = program(CONSUMERS, options.group, seen.bounds.shape[1])
    bounds = place.bounds(seen)
    count = bounds.end - bounds.begin
    _, block, width = ks.tiles[0].shape

    def produce():
        for part in range(CONSUMERS):
            q = inputs.q.at[place.b, place.rows(part), place.n]
            plgpu.copy_gmem_to_smem(q, memory.qs.at[part], memory.full)
        k = inputs.k.at[place.b, :, place.kv]
        v = inputs.v.at[place.b, :, place.kv]
        produce_keys(bounds.begin, count, k, v, ks, vs)

    def consume(me):
        rows = place.rows(me)
        mine = memory.qs.at[me]
        first = per_row(seen.first, place.b, rows)
        last = per_row(seen.last, place.b, rows)
        plgpu.barrier_wait(memory.full)
        pl.when(me == 1)(lambda: meet(turn))

        # m, l, acc: running maximum, sum and output (Dao 2023, algorithm 1); m is in units of x.
        def over_keys(acc):
            def tile(step, carry):
                m, l = carry

                # S = Q K^T; meet once it has begun.
                def scores(sum_ref):
                    plgpu.wgmma(sum_ref, mine, take(ks, step)[0].T)
                    meet(turn)
                    return sum_ref[...]

                s = pl.run_scoped(scores, plgpu.ACC((ROWS, block), jnp.float32))
                x, c = base2(s, scale, soft_cap)
                leave(ks, step)

                # The online softmax.
                x = where_seen(x, bounds.begin + step, bounds, (first, last), MASKED)
                m_new = jnp.maximum(m, x.max(axis=1))
                p = jnp.exp2(x * c - spread(m_new * c, x.shape))
                kept = jnp.exp2((m - m_new) * c)
                l = l * kept + p.sum(axis=1)
                acc[...] = acc[...] * spread(kept, acc.shape)
                p, l, m_new = lax.optimization_barrier((p.astype(jnp.bfloat16), l, m_new))

                # O += P V, when the other consumer has begun its S.
                plgpu.barrier_arrive(turn)
                (values,) = take(vs, step)
                plgpu.barrier_wait(turn)
                plgpu.wgmma(acc, p, values)
                plgpu.wgmma_wait(0)
                leave(vs, step)
                return m_new, l

            # Above MASKED, so that the weight of a masked score is exactly 0, also in a row that
            # has seen nothing.
            m = plgpu.layout_cast(jnp.full((ROWS,), MASKED / 2, jnp.float32), ROW)
            l = plgpu.layout_cast(jnp.full((ROWS,), 0.0, jnp.float32), ROW)
            m, l = lax.fori_loop(0, count, tile, (m, l))
            return m, l, acc[...]

        m, l, acc = pl.run_scoped(over_keys, plgpu.ACC((ROWS, width), jnp.float32))
        pl.when(me == 0)(lambda: meet(turn))

        # A row that saw nothing gives zeros.
        l_or_1 = jnp.where(l > 0, l, 1.0)
        c = LOG2E * (scale if soft_cap is None else soft_cap)
        lse = jnp.where(l > 0, m * c + jnp.log(l_or_1) * LOG2E, -MASKED)
        store(lse, memory.totals.at[me], outputs.lse.at[place.b, place.n, rows])
        out = acc * spread(1 / l_or_1, acc.shape)
        store(out, mine, outputs.o.at[place.b, rows, place.n])

    roles(produce, consume)


def forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    keys: Ranges,
    queries: Ranges,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Return the output [B, T, N, H] in bfloat16, and the log-sum-exp [B, N, T].

    The log-sum-exp is float32 and in base 2; it is +1e30 where a row sees nothing. `keys` are the
    keys that each query sees; `queries` is used by the backward pass only. Raises UserError where
    the kernel does not serve the shape, the type or the scale.
    """
    batch, length, heads, _ = q_BTNH.shape
    plan = plan_of(q_BTNH, k_BSKH, scale, soft_cap)
    padded, width = plan.padded, plan.width
    slots, block = plan.tiles.forward, plan.tiles.keys
    inputs = ForwardInputs(*(flash.prepare("gpu", x, padded) for x in (q_BTNH, k_BSKH, v_BSKH)))
    memory = ForwardMemory(
        qs=matrices(CONSUMERS, ROWS, width),
        totals=plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        ks=ring(slots, matrices(slots, block, width)),
        vs=ring(slots, matrices(slots, block, width)),
        full=plgpu.Barrier(num_arrivals=CONSUMERS),
        turn=plgpu.Barrier(num_arrivals=CONSUMERS),
    )
    outputs = ForwardOutputs(
        o=jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
        lse=jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
    )
    out, lse = call(
        forward_body,
        name="hopper_forward",
        options=plan.options,
        seen=pad_ranges(keys, padded),
        block=CONSUMERS * ROWS,
        other=block,
        heads=heads,
        memory=memory,
        inputs=inputs,
        outputs=outputs,
    )
    return flash.restore("gpu", out, length), lse[:, :, :length]
