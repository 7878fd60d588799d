"""FlashAttention in Pallas: one body for TPU (Mosaic), GPU (Triton) and, interpreted, CPU.

Dao 2023 (FlashAttention-2): an online softmax over tiles of keys; backward, the weights are computed again from
the log-sum-exp, in one kernel for dQ (over blocks of queries) and one for dK and dV (over blocks of keys, looping
over the queries of the group). No atomics, so results are deterministic. Masks are ranges (kernels/masks.py): a
program loops from the first to the last tile that its rows see, and leaves out the mask between. In the kernels
scores are in base 2, statistics and sums are float32, and a block of K or V is a matrix [rows, H].
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from config import UserError
from kernels.masks import MASKED, Ranges, block_bounds, pad_ranges

LOG2E = math.log2(math.e)
WIDTHS = (64, 128, 256)
VMEM = 60 * 2**20  # bytes of a TPU core's vector memory that a kernel may take; v5p has 64 MiB, v5e and v6e 128


class Blocks(NamedTuple):
    """Rows of a tile: queries by keys in the forward and dQ kernels, and in the dK/dV kernel; warps on a GPU."""

    forward: tuple[int, int]
    dq: tuple[int, int]
    dkv: tuple[int, int]
    warps: int = 4


def blocks_of(platform: str, length: int, width: int, bits: int) -> Blocks:
    """Tiles for TPU are limited by its 128-wide lanes and matrix unit, those for GPU by registers.

    GPU: not tuned, for want of a measurement; 128 x 64 forward and 64 x 64 backward suit an H100 at bfloat16.
    """
    shortest = max(16 if platform == "gpu" else 128, 1 << (length - 1).bit_length())
    if platform == "tpu":
        forward = dq = dkv = (512, 512)
        if bits > 16 or width > 128:
            dq = dkv = (256, 256)
        warps = 0
    else:
        forward, dq, dkv = ((128, 64), (64, 64), (64, 64)) if bits <= 16 else ((64, 32), (32, 32), (32, 32))
        warps = 4 if width <= 64 else 8
    return Blocks(*(tuple(min(size, shortest) for size in pair) for pair in (forward, dq, dkv)), warps)


# The bodies. `lo` and `hi` are the ranges of the block's own rows, [rows, 1].


def column(row_ref: Any) -> jax.Array:
    """A [1, rows] block as [rows, 1]."""
    return row_ref[...].reshape(row_ref.shape[-1], 1)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """a and b contracted over the named axes, summed in float32; float32 inputs are not rounded to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def base2_scores(a: jax.Array, b: jax.Array, scale: float, soft_cap: float | None) -> tuple[jax.Array, Any]:
    """a b^T scaled, capped and in base 2; and tanh of the capped scores (None without soft cap)."""
    if soft_cap is None:
        return dot(a, b, (1, 1)) * (scale * LOG2E), None
    bent = jnp.tanh(dot(a, b, (1, 1)) * (scale / soft_cap))
    return bent * (soft_cap * LOG2E), bent


def masked(scores: jax.Array, start: jax.Array, lo: jax.Array, hi: jax.Array) -> jax.Array:
    """`scores` [rows, columns], MASKED where the column (from `start` on) is outside its row's range."""
    at = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return jnp.where((at >= lo) & (at <= hi), scores, MASKED)


def over_tiles(bounds_ref: Any, tile: Any, carry: Any) -> Any:
    """`tile(j, carry, mask=...)` over a block's tiles in order: at both ends masked, between them not."""
    begin, full_begin, full_end, end = (bounds_ref[0, i] for i in range(4))
    carry = jax.lax.fori_loop(begin, full_begin, functools.partial(tile, mask=True), carry)
    carry = jax.lax.fori_loop(full_begin, full_end, functools.partial(tile, mask=False), carry)
    return jax.lax.fori_loop(full_end, end, functools.partial(tile, mask=True), carry)


def forward_body(bounds_ref, lo_ref, hi_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, *, block, scale, soft_cap):
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
        p, kept = jnp.exp2(s - m_new), jnp.exp2(m - m_new)
        acc = acc * kept + dot(p.astype(v.dtype), v, (1, 0))
        return m_new, l * kept + p.sum(axis=1, keepdims=True), acc

    # Above MASKED: the weight of a masked score is then exactly 0, also in a row that has seen nothing.
    rows = (q.shape[0], 1)
    start = (jnp.full(rows, MASKED / 2, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros(q.shape, jnp.float32))
    m, l, acc = over_tiles(bounds_ref, tile, start)
    l_or_1 = jnp.where(l > 0, l, 1.0)
    o_ref[...] = (acc / l_or_1).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(l > 0, m + jnp.log2(l_or_1), -MASKED).reshape(lse_ref.shape)


def dq_body(
    bounds_ref, lo_ref, hi_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref, *, block, scale, soft_cap
):
    """One block of queries over its keys: dQ = scale dS K, dS = P (dP - delta)."""
    q, do, lo, hi = q_ref[...], do_ref[...], column(lo_ref), column(hi_ref)
    lse, delta = column(lse_ref), column(delta_ref)

    def tile(j, dq, mask):
        start = pl.multiple_of(j * block, block)
        k, v = k_ref[pl.ds(start, block), :], v_ref[pl.ds(start, block), :]
        s, bent = base2_scores(q, k, scale, soft_cap)
        if mask:
            s = masked(s, start, lo, hi)
        ds = jnp.exp2(s - lse) * (dot(do, v, (1, 1)) - delta)
        if soft_cap is not None:
            ds *= 1 - bent * bent
        return dq + dot(ds.astype(k.dtype), k, (1, 0))

    dq = over_tiles(bounds_ref, tile, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def dkv_body(
    bounds_ref, lo_ref, hi_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref,
    *, block, scale, soft_cap, heads_axis, add,
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
            return dk + dot(ds.astype(q.dtype), q, (1, 0)), dv + dot(p.astype(do.dtype), do, (1, 0))

        return over_tiles(bounds_ref, tile, carry)

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


# The calls. Index maps are written for the grid (batch, head, block[, head of the group]) and for arrays as TPU holds
# them, [B, heads, rows, H], since its tiles are the last two axes. A GPU reads [B, rows, heads, H] where it lies, and
# its fastest axis of the grid is the first, so that programs that run together share their K and V.


def matrix(platform: str, block: tuple[int | None, ...], index: Any, buffers: int | None = None) -> pl.BlockSpec:
    """A block of an array [B, heads, rows, H]; `buffers` of it in a TPU's memory (None: two)."""
    if platform == "gpu":
        b, n, i, h = block
        return pl.BlockSpec((b, i, n, h), lambda *ids: tuple(index(*ids[::-1])[axis] for axis in (0, 2, 1, 3)))
    return pl.BlockSpec(block, index, pipeline_mode=buffers and pl.Buffered(buffers))


def vector(platform: str, block: tuple[int | None, ...], index: Any, memory: Any = None) -> pl.BlockSpec:
    """A block of an array of numbers per row or per block, laid out alike everywhere."""
    if platform == "gpu":
        return pl.BlockSpec(block, lambda *ids: index(*ids[::-1]))
    return pl.BlockSpec(block, index, memory_space=memory)


def call(body: Any, platform: str, grid: tuple[int, ...], warps: int, name: str, specs: Any, out: Any, *arrays: Any):
    """`body` over the grid, compiled for its platform; on a CPU interpreted. `out`: (shapes, their specs)."""
    if platform == "gpu":
        grid, params = grid[::-1], plgpu.CompilerParams(num_warps=warps, num_stages=2)
    else:
        semantics = ("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
        params = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM)
    shapes, out_specs = out
    make = functools.partial(pl.pallas_call, body, out_shape=shapes, grid=grid, in_specs=specs, out_specs=out_specs)
    compiled, interpreted = make(compiler_params=params, name=name), make(interpret=True, name=name)
    return jax.lax.platform_dependent(*arrays, cpu=interpreted, default=compiled)


def prepare(platform: str, x_BTNH: jax.Array, length: int) -> jax.Array:
    """`x_BTNH` padded with zeros to `length`, in the layout of `matrix`."""
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, length - x_BTNH.shape[1]), (0, 0), (0, 0)))
    return x_BTNH if platform == "gpu" else x_BTNH.swapaxes(1, 2)


def restore(platform: str, x: jax.Array, length: int) -> jax.Array:
    """The inverse of `prepare`."""
    return (x if platform == "gpu" else x.swapaxes(1, 2))[:, :length]


def plan(platform: str, q_BTNH: jax.Array, k_BSKH: jax.Array) -> tuple[Blocks, int, int, int | None]:
    """Tiles, padded length, group G, and buffers for a whole K or V; raises UserError where the kernel does not fit."""
    length, heads, width = q_BTNH.shape[1:]
    size = q_BTNH.dtype.itemsize
    blocks = blocks_of(platform, length, width, 8 * size)
    largest = max(*blocks.forward, *blocks.dq, *blocks.dkv)
    padded = -(-length // largest) * largest
    if width not in WIDTHS:
        raise UserError(f"pallas_{platform}: head width {width} is none of {WIDTHS}; use xla_chunked")
    if platform == "tpu" and length > longest_on_tpu(width, size):
        raise UserError(
            f"pallas_tpu: at most {longest_on_tpu(width, size)} tokens of width {width} fit into VMEM, not {length}; "
            "use xla_chunked"
        )
    whole = 2 * padded * width * size  # K and V, or Q and dO, of one head
    return blocks, padded, heads // k_BSKH.shape[2], 1 if 2 * whole > VMEM // 2 else None


def longest_on_tpu(width: int, itemsize: int) -> int:
    """Tokens for which a head's K and V, or Q and dO, fit into three quarters of VMEM; 0 for a width not served."""
    return VMEM * 3 // 4 // (2 * width * itemsize) // 512 * 512 if width in WIDTHS else 0


def row_inputs(platform: str, seen: Ranges, length: int, block: int, other: int, at: Any) -> tuple[list, list]:
    """Bounds and ranges of each block of rows with their specs; `at` gives a program's batch row and block."""
    seen = pad_ranges(seen, length)
    bounds = block_bounds(seen, block, other)[:, :, None]
    lo, hi = (x[:, None] for x in seen)
    memory = pltpu.SMEM if platform == "tpu" else None
    scalars = vector(platform, (None, None, 1, 4), lambda *ids: (*at(*ids), 0, 0), memory)
    range_spec = vector(platform, (None, 1, block), lambda *ids: (at(*ids)[0], 0, at(*ids)[1]))
    return [bounds, lo, hi], [scalars, range_spec, range_spec]


def forward(q_BTNH, k_BSKH, v_BSKH, keys: Ranges, queries: Ranges, *, scale, soft_cap, platform):
    """Output [B, T, N, H] in q's type and the base-2 log-sum-exp [B, N, T] float32 (+1e30 where nothing is seen)."""
    (batch, length, heads, width), dtype = q_BTNH.shape, q_BTNH.dtype
    blocks, padded, group, buffers = plan(platform, q_BTNH, k_BSKH)
    block_q, block_k = blocks.forward
    count = padded // block_q
    place = last_first(platform, count)
    q, k, v = (prepare(platform, x, padded) for x in (q_BTNH, k_BSKH, v_BSKH))
    row_arrays, row_specs = row_inputs(platform, keys, padded, block_q, block_k, lambda b, n, i: (b, place(i)))
    mine = matrix(platform, (None, None, block_q, width), lambda b, n, i: (b, n, place(i), 0))
    whole = matrix(platform, (None, None, padded, width), lambda b, n, i: (b, n // group, 0, 0), buffers)
    stats = vector(platform, (None, None, 1, block_q), lambda b, n, i: (b, n, 0, place(i)))
    body = functools.partial(forward_body, block=block_k, scale=scale, soft_cap=soft_cap)
    shapes = (jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((batch, heads, 1, padded), jnp.float32))
    specs, out = [*row_specs, mine, whole, whole], (shapes, (mine, stats))
    grid = (batch, heads, count)
    o, lse = call(body, platform, grid, blocks.warps, "flash_forward", specs, out, *row_arrays, q, k, v)
    return restore(platform, o, length), lse[:, :, 0, :length]


def last_first(platform: str, count: int) -> Any:
    """On a GPU the last block of queries goes first: under a causal mask it is the longest, and none waits for it."""
    return lambda i: count - 1 - i if platform == "gpu" else i


def backward(
    q_BTNH, k_BSKH, v_BSKH, keys: Ranges, queries: Ranges, out_BTNH, lse_BNT, dout_BTNH, *, scale, soft_cap, platform
):
    """Gradients of q, k, v in their types."""
    length = q_BTNH.shape[1]
    blocks, padded, group, buffers = plan(platform, q_BTNH, k_BSKH)
    delta_BNT = jnp.einsum("BTNH,BTNH->BNT", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32)
    extra = ((0, 0), (0, 0), (0, padded - length))
    lse, delta = (jnp.pad(x, extra, constant_values=c)[:, :, None] for x, c in ((lse_BNT, -MASKED), (delta_BNT, 0.0)))
    arrays = [*(prepare(platform, x, padded) for x in (q_BTNH, k_BSKH, v_BSKH, dout_BTNH)), lse, delta]
    how = {"scale": scale, "soft_cap": soft_cap}
    dq = call_dq(platform, blocks, group, buffers, pad_ranges(keys, padded), arrays, how)
    dk, dv = call_dkv(platform, blocks, group, buffers, pad_ranges(queries, padded), arrays, how)
    dk, dv = dk.astype(k_BSKH.dtype), dv.astype(v_BSKH.dtype)
    return tuple(restore(platform, x, length) for x in (dq, dk, dv))


def call_dq(platform, blocks, group, buffers, keys: Ranges, arrays, how) -> jax.Array:
    """dQ, over blocks of queries."""
    q, lse = arrays[0], arrays[4]
    (batch, heads, _, padded), width = lse.shape, q.shape[-1]
    block_q, block_k = blocks.dq
    count = padded // block_q
    place = last_first(platform, count)
    row_arrays, row_specs = row_inputs(platform, keys, padded, block_q, block_k, lambda b, n, i: (b, place(i)))
    mine = matrix(platform, (None, None, block_q, width), lambda b, n, i: (b, n, place(i), 0))
    whole = matrix(platform, (None, None, padded, width), lambda b, n, i: (b, n // group, 0, 0), buffers)
    stats = vector(platform, (None, None, 1, block_q), lambda b, n, i: (b, n, 0, place(i)))
    specs = [*row_specs, mine, whole, whole, mine, stats, stats]
    out = (jax.ShapeDtypeStruct(q.shape, q.dtype), mine)
    body = functools.partial(dq_body, block=block_k, **how)
    return call(body, platform, (batch, heads, count), blocks.warps, "flash_dq", specs, out, *row_arrays, *arrays)


def call_dkv(platform, blocks, group, buffers, queries: Ranges, arrays, how) -> tuple[jax.Array, jax.Array]:
    """dK and dV, over blocks of keys; where several programs add to a block, as float32."""
    k, lse = arrays[1], arrays[4]
    (batch, heads, _, padded), width = lse.shape, k.shape[-1]
    block_q, block_k = blocks.dkv
    # A TPU holds the Q and dO of one head at a time; to a GPU a block that is not read costs nothing.
    heads_at_once = 1 if platform == "tpu" else group
    steps = group // heads_at_once
    row_arrays, row_specs = row_inputs(platform, queries, padded, block_k, block_q, lambda b, n, i, *g: (b, i))
    mine = matrix(platform, (None, None, block_k, width), lambda b, n, i, *g: (b, n, i, 0))
    head = lambda n, g: n * steps + (g[0] if g else 0)  # noqa: E731
    whole_block = (None, heads_at_once, padded, width)
    whole = matrix(platform, whole_block, lambda b, n, i, *g: (b, head(n, g), 0, 0), buffers)
    stats = vector(platform, (None, heads_at_once, 1, padded), lambda b, n, i, *g: (b, head(n, g), 0, 0))
    specs = [*row_specs, whole, mine, mine, whole, stats, stats]
    shape = jax.ShapeDtypeStruct(k.shape, jnp.float32 if steps > 1 else k.dtype)
    heads_axis = 1 if platform == "gpu" else 0
    body = functools.partial(dkv_body, block=block_q, heads_axis=heads_axis, add=steps > 1, **how)
    grid = (batch, heads // group, padded // block_k, *([steps] if steps > 1 else []))
    out = ((shape, shape), (mine, mine))
    return call(body, platform, grid, blocks.warps, "flash_dkv", specs, out, *row_arrays, *arrays)
