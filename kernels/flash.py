"""FlashAttention in Pallas: one body for TPU (Mosaic), GPU (Triton) and, interpreted, CPU.

Dao 2023 (FlashAttention-2): an online softmax over tiles of keys; backward, the weights are computed again from
the log-sum-exp, in one kernel for dQ (over blocks of queries) and one for dK and dV (over blocks of keys, looping
over the queries of the group). No atomics, so results are deterministic. Masks are ranges (kernels/masks.py): a
program loops from the first to the last tile that its rows see, and leaves out the mask between. The bodies are in
kernels/flash_bodies.py; here are the tiles, the layouts and the calls.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from kernels.flash_bodies import dkv_body, dq_body, forward_body
from kernels.masks import MASKED, Ranges, block_bounds, pad_ranges
from runtime.errors import UserError

WIDTHS = (64, 128, 256)
VMEM = (
    60 * 2**20
)  # bytes of a TPU core's vector memory that a kernel may take; v5p has 64 MiB, v5e and v6e 128


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
        forward, dq, dkv = (
            ((128, 64), (64, 64), (64, 64)) if bits <= 16 else ((64, 32), (32, 32), (32, 32))
        )
        warps = 4 if width <= 64 else 8
    return Blocks(
        *(tuple(min(size, shortest) for size in pair) for pair in (forward, dq, dkv)), warps
    )


# Index maps are written for the grid (batch, head, block[, head of the group]) and for arrays as TPU holds
# them, [B, heads, rows, H], since its tiles are the last two axes. A GPU reads [B, rows, heads, H] where it lies, and
# its fastest axis of the grid is the first, so that programs that run together share their K and V.


def matrix(
    platform: str, block: tuple[int | None, ...], index: Any, buffers: int | None = None
) -> pl.BlockSpec:
    """A block of an array [B, heads, rows, H]; `buffers` of it in a TPU's memory (None: two)."""
    if platform == "gpu":
        b, n, i, h = block
        return pl.BlockSpec(
            (b, i, n, h), lambda *ids: tuple(index(*ids[::-1])[axis] for axis in (0, 2, 1, 3))
        )
    return pl.BlockSpec(block, index, pipeline_mode=buffers and pl.Buffered(buffers))


def vector(
    platform: str, block: tuple[int | None, ...], index: Any, memory: Any = None
) -> pl.BlockSpec:
    """A block of an array of numbers per row or per block, laid out alike everywhere."""
    if platform == "gpu":
        return pl.BlockSpec(block, lambda *ids: index(*ids[::-1]))
    return pl.BlockSpec(block, index, memory_space=memory)


def call(
    body: Any,
    platform: str,
    grid: tuple[int, ...],
    warps: int,
    name: str,
    specs: Any,
    out: Any,
    *arrays: Any,
):
    """`body` over the grid, compiled for its platform; on a CPU interpreted. `out`: (shapes, their specs)."""
    if platform == "gpu":
        grid, params = grid[::-1], plgpu.CompilerParams(num_warps=warps, num_stages=2)
    else:
        semantics = ("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
        params = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM)
    shapes, out_specs = out
    make = functools.partial(
        pl.pallas_call, body, out_shape=shapes, grid=grid, in_specs=specs, out_specs=out_specs
    )
    compiled, interpreted = (
        make(compiler_params=params, name=name),
        make(interpret=True, name=name),
    )
    return jax.lax.platform_dependent(*arrays, cpu=interpreted, default=compiled)


def prepare(platform: str, x_BTNH: jax.Array, length: int) -> jax.Array:
    """`x_BTNH` padded with zeros to `length`, in the layout of `matrix`."""
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, length - x_BTNH.shape[1]), (0, 0), (0, 0)))
    return x_BTNH if platform == "gpu" else x_BTNH.swapaxes(1, 2)


def restore(platform: str, x: jax.Array, length: int) -> jax.Array:
    """The inverse of `prepare`."""
    return (x if platform == "gpu" else x.swapaxes(1, 2))[:, :length]


def plan(
    platform: str, q_BTNH: jax.Array, k_BSKH: jax.Array
) -> tuple[Blocks, int, int, int | None]:
    """Tiles, padded length, group G, and buffers for a whole K or V; raises UserError where the kernel does not fit."""
    length, heads, width = q_BTNH.shape[1:]
    size = q_BTNH.dtype.itemsize
    blocks = blocks_of(platform, length, width, 8 * size)
    largest = max(*blocks.forward, *blocks.dq, *blocks.dkv)
    padded = -(-length // largest) * largest
    if width not in WIDTHS:
        raise UserError(
            f"pallas_{platform}: head width {width} is none of {WIDTHS}; use xla_chunked"
        )
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


def row_inputs(
    platform: str, seen: Ranges, length: int, block: int, other: int, at: Any
) -> tuple[list, list]:
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
    row_arrays, row_specs = row_inputs(
        platform, keys, padded, block_q, block_k, lambda b, n, i: (b, place(i))
    )
    mine = matrix(platform, (None, None, block_q, width), lambda b, n, i: (b, n, place(i), 0))
    whole = matrix(
        platform, (None, None, padded, width), lambda b, n, i: (b, n // group, 0, 0), buffers
    )
    stats = vector(platform, (None, None, 1, block_q), lambda b, n, i: (b, n, 0, place(i)))
    body = functools.partial(
        forward_body, block=block_k, in_memory=platform == "tpu", scale=scale, soft_cap=soft_cap
    )
    shapes = (
        jax.ShapeDtypeStruct(q.shape, dtype),
        jax.ShapeDtypeStruct((batch, heads, 1, padded), jnp.float32),
    )
    specs, out = [*row_specs, mine, whole, whole], (shapes, (mine, stats))
    grid = (batch, heads, count)
    o, lse = call(
        body, platform, grid, blocks.warps, "flash_forward", specs, out, *row_arrays, q, k, v
    )
    return restore(platform, o, length), lse[:, :, 0, :length]


def last_first(platform: str, count: int) -> Any:
    """On a GPU the last block of queries goes first: under a causal mask it is the longest, and none waits for it."""
    return lambda i: count - 1 - i if platform == "gpu" else i


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
    platform,
):
    """Gradients of q, k, v in their types."""
    length = q_BTNH.shape[1]
    blocks, padded, group, buffers = plan(platform, q_BTNH, k_BSKH)
    delta_BNT = jnp.einsum(
        "BTNH,BTNH->BNT", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32
    )
    extra = ((0, 0), (0, 0), (0, padded - length))
    lse, delta = (
        jnp.pad(x, extra, constant_values=c)[:, :, None]
        for x, c in ((lse_BNT, -MASKED), (delta_BNT, 0.0))
    )
    arrays = [
        *(prepare(platform, x, padded) for x in (q_BTNH, k_BSKH, v_BSKH, dout_BTNH)),
        lse,
        delta,
    ]
    how = {"in_memory": platform == "tpu", "scale": scale, "soft_cap": soft_cap}
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
    row_arrays, row_specs = row_inputs(
        platform, keys, padded, block_q, block_k, lambda b, n, i: (b, place(i))
    )
    mine = matrix(platform, (None, None, block_q, width), lambda b, n, i: (b, n, place(i), 0))
    whole = matrix(
        platform, (None, None, padded, width), lambda b, n, i: (b, n // group, 0, 0), buffers
    )
    stats = vector(platform, (None, None, 1, block_q), lambda b, n, i: (b, n, 0, place(i)))
    specs = [*row_specs, mine, whole, whole, mine, stats, stats]
    out = (jax.ShapeDtypeStruct(q.shape, q.dtype), mine)
    body = functools.partial(dq_body, block=block_k, **how)
    return call(
        body,
        platform,
        (batch, heads, count),
        blocks.warps,
        "flash_dq",
        specs,
        out,
        *row_arrays,
        *arrays,
    )


def call_dkv(
    platform, blocks, group, buffers, queries: Ranges, arrays, how
) -> tuple[jax.Array, jax.Array]:
    """dK and dV, over blocks of keys; where several programs add to a block, as float32."""
    k, lse = arrays[1], arrays[4]
    (batch, heads, _, padded), width = lse.shape, k.shape[-1]
    block_q, block_k = blocks.dkv
    # A TPU holds the Q and dO of one head at a time; to a GPU a block that is not read costs nothing.
    heads_at_once = 1 if platform == "tpu" else group
    steps = group // heads_at_once
    row_arrays, row_specs = row_inputs(
        platform, queries, padded, block_k, block_q, lambda b, n, i, *g: (b, i)
    )
    mine = matrix(platform, (None, None, block_k, width), lambda b, n, i, *g: (b, n, i, 0))
    head = lambda n, g: n * steps + (g[0] if g else 0)
    whole_block = (None, heads_at_once, padded, width)
    whole = matrix(platform, whole_block, lambda b, n, i, *g: (b, head(n, g), 0, 0), buffers)
    stats = vector(
        platform, (None, heads_at_once, 1, padded), lambda b, n, i, *g: (b, head(n, g), 0, 0)
    )
    specs = [*row_specs, whole, mine, mine, whole, stats, stats]
    shape = jax.ShapeDtypeStruct(k.shape, jnp.float32 if steps > 1 else k.dtype)
    heads_axis = 1 if platform == "gpu" else 0
    body = functools.partial(dkv_body, block=block_q, heads_axis=heads_axis, add=steps > 1, **how)
    grid = (batch, heads // group, padded // block_k, *([steps] if steps > 1 else []))
    out = ((shape, shape), (mine, mine))
    return call(body, platform, grid, blocks.warps, "flash_dkv", specs, out, *row_arrays, *arrays)
