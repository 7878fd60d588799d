"""FlashAttention in Pallas: one body for TPU (Mosaic), GPU (Triton) and, interpreted, CPU.

Dao 2023 (FlashAttention-2): an online softmax over tiles of keys. Backward, the weights are
computed again from the log-sum-exp, in one kernel for dQ (over blocks of queries) and one for dK
and dV (over blocks of keys, looping over the queries of the group). No atomics, so results are
deterministic. Masks are ranges (kernels/masks.py): a program loops from the first to the last
tile that its rows see, and leaves out the mask between. The bodies are in
kernels/flash_bodies.py; here are the tiles, the layouts and the calls.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from kernels.flash_bodies import BodyOptions, dkv_body, dq_body, forward_body
from kernels.masks import MASKED, Ranges, block_bounds, pad_ranges
from runtime.errors import UserError

Platform = Literal["tpu", "gpu"]
# Head widths that the kernels serve.
WIDTHS = (64, 128, 256)
# Bytes of a TPU core's vector memory that a kernel may take; v5p has 64 MiB, v5e and v6e 128.
VMEM = 60 * 2**20


# ---- Tiles ----


class Blocks(NamedTuple):
    """Rows of a tile, the kernel's own side first: (queries, keys) but in the dK/dV kernel too."""

    forward: tuple[int, int]
    dq: tuple[int, int]
    dkv: tuple[int, int]
    warps: int = 4
    """Warps of a program on a GPU."""


class Plan(NamedTuple):
    """How the kernels serve one shape."""

    platform: Platform
    blocks: Blocks
    padded: int
    """Tokens after padding to whole tiles."""
    width: int
    """Head width, H."""
    group: int
    """Query heads that share a key/value head, G."""
    buffers: int | None
    """Buffers for a whole K or V in a TPU's memory; None: the compiler's choice, two."""


def blocks_of(platform: Platform, length: int, width: int, bits: int) -> Blocks:
    """Return the tiles for `length` tokens, heads of `width` numbers and `bits` a number.

    TPU: limited by its 128-wide lanes and matrix unit. GPU: limited by registers; not tuned, for
    want of a measurement; 128 x 64 forward and 64 x 64 backward suit an H100 at bfloat16.
    """
    if platform == "tpu":
        forward = backward = (512, 512)
        if bits > 16 or width > 128:
            backward = (256, 256)
        smallest = 128
        warps = 0
    else:
        forward, backward = (128, 64), (64, 64)
        if bits > 16:
            forward, backward = (64, 32), (32, 32)
        smallest = 16
        warps = 4 if width <= 64 else 8

    # A short sequence takes a smaller tile, a power of two.
    largest = max(smallest, 1 << (length - 1).bit_length())

    def limited(tile: tuple[int, int]) -> tuple[int, int]:
        return min(tile[0], largest), min(tile[1], largest)

    return Blocks(limited(forward), limited(backward), limited(backward), warps)


def longest_on_tpu(width: int, itemsize: int) -> int:
    """Return the tokens for which a head's K and V, or Q and dO, fit into 3/4 of VMEM.

    `itemsize` is the bytes of a number. 0 for a width that is not served.
    """
    if width not in WIDTHS:
        return 0
    tokens = VMEM * 3 // 4 // (2 * width * itemsize)
    return tokens // 512 * 512


def plan_of(platform: Platform, q_BTNH: jax.Array, k_BSKH: jax.Array) -> Plan:
    """Return how the kernels serve these shapes; raise UserError where they do not."""
    length, heads, width = q_BTNH.shape[1:]
    itemsize = q_BTNH.dtype.itemsize
    blocks = blocks_of(platform, length, width, 8 * itemsize)

    # Refuse what does not fit.
    if width not in WIDTHS:
        raise UserError(
            f"pallas_{platform}: head width {width} is none of {WIDTHS}; use xla_chunked"
        )
    if platform == "tpu" and length > longest_on_tpu(width, itemsize):
        raise UserError(
            f"pallas_tpu: at most {longest_on_tpu(width, itemsize)} tokens of width {width} fit "
            f"into VMEM, not {length}; use xla_chunked"
        )

    # Pad to whole tiles of every kernel. K and V, or Q and dO, of one head are in memory together.
    largest = max(*blocks.forward, *blocks.dq, *blocks.dkv)
    padded = -(-length // largest) * largest
    both_matrices = 2 * padded * width * itemsize
    buffers = 1 if 2 * both_matrices > VMEM // 2 else None
    group = heads // k_BSKH.shape[2]
    return Plan(platform, blocks, padded, width, group, buffers)


# ---- Layouts ----
#
# Index maps are written for the grid (batch, head, block[, head of the group]) and for arrays as
# TPU holds them, [B, heads, rows, H], since its tiles are the last two axes. A GPU reads [B,
# rows, heads, H] where it lies, and its fastest axis of the grid is the first, so that programs
# that run together share their K and V.

Index = Callable[..., tuple[Any, ...]]
Shape = tuple[int | None, ...]


class Operand(NamedTuple):
    """An input or output of a kernel: the array, or its shape and type, and a program's block."""

    array: Any
    spec: pl.BlockSpec


def matrix(platform: Platform, block: Shape, index: Index, buffers: int | None = None) -> Any:
    """Return the spec of a block of an array [B, heads, rows, H], with `buffers` on a TPU."""
    if platform == "tpu":
        return pl.BlockSpec(block, index, pipeline_mode=buffers and pl.Buffered(buffers))
    b, n, i, h = block

    def gpu_index(*ids):
        at = index(*ids[::-1])
        return at[0], at[2], at[1], at[3]

    return pl.BlockSpec((b, i, n, h), gpu_index)


def vector(platform: Platform, block: Shape, index: Index, memory: Any = None) -> Any:
    """Return the spec of a block of numbers per row or per block, laid out alike everywhere."""
    if platform == "tpu":
        return pl.BlockSpec(block, index, memory_space=memory)
    return pl.BlockSpec(block, lambda *ids: index(*ids[::-1]))


def prepare(platform: Platform, x_BTNH: jax.Array, length: int) -> jax.Array:
    """Return `x_BTNH` padded with zeros to `length` tokens, in the layout of `matrix`."""
    extra = length - x_BTNH.shape[1]
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, extra), (0, 0), (0, 0)))
    return x_BTNH if platform == "gpu" else x_BTNH.swapaxes(1, 2)


def restore(platform: Platform, x: jax.Array, length: int) -> jax.Array:
    """Return [B, length, N, H] from the layout of `matrix`: undo `prepare`."""
    x_BTNH = x if platform == "gpu" else x.swapaxes(1, 2)
    return x_BTNH[:, :length]


def row_inputs(
    platform: Platform,
    seen: Ranges,
    block: int,
    other: int,
    at: Index,
) -> list[Operand]:
    """Return the bounds and ranges of each block of rows, the first three inputs of each body.

    `seen` are the padded rows' ranges; blocks have `block` rows, tiles `other` columns. `at` maps
    a program's place in the grid to its batch row and block.
    """
    bounds = block_bounds(seen, block, other)[:, :, None]
    first = seen.first_BT[:, None]
    last = seen.last_BT[:, None]

    def bounds_index(*ids):
        return (*at(*ids), 0, 0)

    def range_index(*ids):
        row, place = at(*ids)
        return row, 0, place

    memory = pltpu.SMEM if platform == "tpu" else None
    bounds_spec = vector(platform, (None, None, 1, 4), bounds_index, memory)
    range_spec = vector(platform, (None, 1, block), range_index)
    return [
        Operand(bounds, bounds_spec),
        Operand(first, range_spec),
        Operand(last, range_spec),
    ]


class QuerySpecs(NamedTuple):
    """Specs of the kernels over blocks of queries."""

    place: Callable[[Any], Any]
    """The block that the i-th program of a head works on."""
    block: pl.BlockSpec
    """A block of queries: Q, O, dO, dQ."""
    whole: pl.BlockSpec
    """All keys or values of the head."""
    stats: pl.BlockSpec
    """A number per query of the block: log-sum-exp, delta."""


def query_specs(plan: Plan, block_q: int) -> QuerySpecs:
    """Return the specs of a kernel over blocks of `block_q` queries."""
    count = plan.padded // block_q

    # On a GPU the last block of queries goes first: under a causal mask it is the longest, and
    # none waits for it.
    def place(i):
        return count - 1 - i if plan.platform == "gpu" else i

    def block_index(b, n, i):
        return b, n, place(i), 0

    def whole_index(b, n, i):
        return b, n // plan.group, 0, 0

    def stats_index(b, n, i):
        return b, n, 0, place(i)

    block = (None, None, block_q, plan.width)
    whole = (None, None, plan.padded, plan.width)
    stats = (None, None, 1, block_q)
    return QuerySpecs(
        place,
        matrix(plan.platform, block, block_index),
        matrix(plan.platform, whole, whole_index, plan.buffers),
        vector(plan.platform, stats, stats_index),
    )


# ---- Calls ----


def call(
    body: Callable[..., None],
    name: str,
    plan: Plan,
    grid: tuple[int, ...],
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
) -> list[jax.Array]:
    """Run `body` over the grid, compiled for its platform, interpreted on a CPU.

    The body gets the references of the inputs, then of the outputs, of which `array` gives shape
    and type. Returns the outputs.
    """
    if plan.platform == "gpu":
        grid = grid[::-1]
        params = plgpu.CompilerParams(num_warps=plan.blocks.warps, num_stages=2)
    else:
        semantics = ("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
        params = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM)
    make = functools.partial(
        pl.pallas_call,
        body,
        name=name,
        grid=grid,
        in_specs=[x.spec for x in inputs],
        out_specs=[x.spec for x in outputs],
        out_shape=[x.array for x in outputs],
    )
    compiled = make(compiler_params=params)
    interpreted = make(interpret=True)
    arrays = [x.array for x in inputs]
    return jax.lax.platform_dependent(*arrays, cpu=interpreted, default=compiled)


def forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    keys: Ranges,
    queries: Ranges,
    *,
    scale: float,
    soft_cap: float | None,
    platform: Platform,
) -> tuple[jax.Array, jax.Array]:
    """Return the output [B, T, N, H] in q's type, and the log-sum-exp [B, N, T].

    The log-sum-exp is float32 and in base 2; it is +1e30 where a row sees nothing. `keys` are the
    keys that each query sees; `queries` is used by the backward pass only. Raises UserError where
    the kernel does not serve the shape.
    """
    batch, length, heads, _ = q_BTNH.shape
    plan = plan_of(platform, q_BTNH, k_BSKH)
    block_q, block_k = plan.blocks.forward
    specs = query_specs(plan, block_q)

    # A program reads a block of queries, what its rows see, and all keys and values of its head.
    q = prepare(platform, q_BTNH, plan.padded)
    k = prepare(platform, k_BSKH, plan.padded)
    v = prepare(platform, v_BSKH, plan.padded)

    def at(b, n, i):
        return b, specs.place(i)

    keys = pad_ranges(keys, plan.padded)
    inputs = [
        *row_inputs(platform, keys, block_q, block_k, at),
        Operand(q, specs.block),
        Operand(k, specs.whole),
        Operand(v, specs.whole),
    ]

    # It writes a block of the output and of the log-sum-exp.
    out_shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    lse_shape = jax.ShapeDtypeStruct((batch, heads, 1, plan.padded), jnp.float32)
    outputs = [Operand(out_shape, specs.block), Operand(lse_shape, specs.stats)]
    options = BodyOptions(platform == "tpu", scale, soft_cap)
    body = functools.partial(forward_body, block=block_k, options=options)
    grid = (batch, heads, plan.padded // block_q)
    out, lse = call(body, "flash_forward", plan, grid, inputs, outputs)
    return restore(platform, out, length), lse[:, :, 0, :length]


class Saved(NamedTuple):
    """Inputs of the backward kernels, padded: matrices in the layout of `matrix`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    do: jax.Array
    """Gradient of the output."""
    lse: jax.Array
    """Log-sum-exp, [B, N, 1, T]."""
    delta: jax.Array
    """Sum over H of output times its gradient, [B, N, 1, T]."""


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
    platform: Platform,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, k and v, in their shapes and types.

    `keys` are the keys that each query sees, `queries` the queries that see each key; `out_BTNH`
    and `lse_BNT` are the results of `forward`, `dout_BTNH` the gradient of its output.
    """
    length = q_BTNH.shape[1]
    plan = plan_of(platform, q_BTNH, k_BSKH)
    delta_BNT = jnp.einsum(
        "BTNH,BTNH->BNT", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32
    )

    # Padded rows have the log-sum-exp of rows that see nothing.
    extra = ((0, 0), (0, 0), (0, plan.padded - length))
    lse = jnp.pad(lse_BNT, extra, constant_values=-MASKED)[:, :, None]
    delta = jnp.pad(delta_BNT, extra, constant_values=0.0)[:, :, None]
    saved = Saved(
        prepare(platform, q_BTNH, plan.padded),
        prepare(platform, k_BSKH, plan.padded),
        prepare(platform, v_BSKH, plan.padded),
        prepare(platform, dout_BTNH, plan.padded),
        lse,
        delta,
    )

    options = BodyOptions(platform == "tpu", scale, soft_cap)
    dq = call_dq(plan, pad_ranges(keys, plan.padded), saved, options)
    dk, dv = call_dkv(plan, pad_ranges(queries, plan.padded), saved, options)
    dk = dk.astype(k_BSKH.dtype)
    dv = dv.astype(v_BSKH.dtype)
    dq_BTNH = restore(platform, dq, length)
    dk_BSKH = restore(platform, dk, length)
    dv_BSKH = restore(platform, dv, length)
    return dq_BTNH, dk_BSKH, dv_BSKH


def call_dq(plan: Plan, keys: Ranges, saved: Saved, options: BodyOptions) -> jax.Array:
    """Return dQ like saved.q, by a kernel over blocks of queries; `keys` are padded."""
    batch, heads, _, _ = saved.lse.shape
    block_q, block_k = plan.blocks.dq
    specs = query_specs(plan, block_q)

    def at(b, n, i):
        return b, specs.place(i)

    inputs = [
        *row_inputs(plan.platform, keys, block_q, block_k, at),
        Operand(saved.q, specs.block),
        Operand(saved.k, specs.whole),
        Operand(saved.v, specs.whole),
        Operand(saved.do, specs.block),
        Operand(saved.lse, specs.stats),
        Operand(saved.delta, specs.stats),
    ]
    shape = jax.ShapeDtypeStruct(saved.q.shape, saved.q.dtype)
    body = functools.partial(dq_body, block=block_k, options=options)
    grid = (batch, heads, plan.padded // block_q)
    (dq,) = call(body, "flash_dq", plan, grid, inputs, [Operand(shape, specs.block)])
    return dq


def call_dkv(
    plan: Plan,
    queries: Ranges,
    saved: Saved,
    options: BodyOptions,
) -> tuple[jax.Array, jax.Array]:
    """Return dK and dV like saved.k, by a kernel over blocks of keys; `queries` are padded.

    They are float32 where several programs add to a block.
    """
    platform = plan.platform
    batch, heads, _, _ = saved.lse.shape
    block_q, block_k = plan.blocks.dkv

    # A TPU holds the Q and dO of one head at a time, and steps through the group's heads in the
    # grid's last axis; to a GPU a block that is not read costs nothing.
    heads_at_once = 1 if platform == "tpu" else plan.group
    steps = plan.group // heads_at_once

    def at(b, n, i, *step):
        return b, i

    def block_index(b, n, i, *step):
        return b, n, i, 0

    def heads_index(b, n, i, *step):
        return b, n * steps + (step[0] if step else 0), 0, 0

    block = matrix(platform, (None, None, block_k, plan.width), block_index)
    whole_shape = (None, heads_at_once, plan.padded, plan.width)
    whole = matrix(platform, whole_shape, heads_index, plan.buffers)
    stats = vector(platform, (None, heads_at_once, 1, plan.padded), heads_index)

    inputs = [
        *row_inputs(platform, queries, block_k, block_q, at),
        Operand(saved.q, whole),
        Operand(saved.k, block),
        Operand(saved.v, block),
        Operand(saved.do, whole),
        Operand(saved.lse, stats),
        Operand(saved.delta, stats),
    ]
    dtype = jnp.float32 if steps > 1 else saved.k.dtype
    shape = jax.ShapeDtypeStruct(saved.k.shape, dtype)
    outputs = [Operand(shape, block), Operand(shape, block)]
    body = functools.partial(
        dkv_body,
        block=block_q,
        options=options,
        heads_axis=1 if platform == "gpu" else 0,
        add=steps > 1,
    )
    grid = (batch, heads // plan.group, plan.padded // block_k)
    if steps > 1:
        grid = (*grid, steps)
    dk, dv = call(body, "flash_dkv", plan, grid, inputs, outputs)
    return dk, dv
