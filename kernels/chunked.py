"""Attention in plain JAX with memory linear in the length, by tiles under an online softmax.

FlashAttention-2 (Dao 2023) as XLA loops, for platforms and shapes that no kernel serves. Tiles
outside every row's range are never visited. In names, R is a tile's rows: the queries of a block
times the G query heads that share its keys. Scores are in base 2; statistics and sums are float32.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.masks import MASKED, Ranges, block_bounds, pad_ranges
from sharding import platform

LOG2E = math.log2(math.e)
einsum_float32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Sizes(NamedTuple):
    """Sizes of a call of attention, for the loops over its tiles."""

    length: int
    """Tokens of a sequence, T."""
    padded: int
    """Tokens after padding to whole blocks."""
    block: int
    """Queries, and keys, of a tile."""
    heads: int
    """Query heads, N."""
    kv_heads: int
    """Key/value heads, K."""

    @property
    def group(self) -> int:
        """Query heads that share a key/value head, G."""
        return self.heads // self.kv_heads


class RowTiles(NamedTuple):
    """The tiles of an array of queries, and what each sees; the leading axis is scanned."""

    tiles: tuple[jax.Array, ...]
    """Arrays [T / block, B, K, R, H or 1]."""
    first: jax.Array
    """First key that each row sees, [T / block, B, 1, R, 1]."""
    last: jax.Array
    """Last key that each row sees, likewise."""
    bounds: jax.Array
    """Column blocks to visit, [T / block, 2]: from the first until before the second."""


def block_size(length: int) -> int:
    """Return the rows, and columns, of a tile for sequences of `length` tokens."""
    # On a CPU small tiles stay in cache and skip more; elsewhere matmuls should be large.
    largest = 64 if platform() == "cpu" else 512
    power_of_two = 1 << (length - 1).bit_length()
    return min(largest, max(16, power_of_two))


def sizes_of(q_BTNH: jax.Array, k_BSKH: jax.Array) -> Sizes:
    """Return the sizes of attention between these queries and keys."""
    length, heads = q_BTNH.shape[1:3]
    block = block_size(length)
    padded = -(-length // block) * block
    return Sizes(length, padded, block, heads, k_BSKH.shape[2])


def heads_first(x_BTNH: jax.Array, length: int) -> jax.Array:
    """Return [B, T, N, H] as [B, N, length, H], padded with zeros at the end."""
    extra = length - x_BTNH.shape[1]
    x_BNTH = x_BTNH.swapaxes(1, 2)
    return jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, extra), (0, 0)))


def query_tiles(x_BNTH: jax.Array, kv_heads: int, block: int) -> jax.Array:
    """Return [B, N, T, H] as [T / block, B, K, R, H]: a group's queries are rows of one matmul."""
    batch, heads, length, width = x_BNTH.shape
    group = heads // kv_heads
    count = length // block
    x = x_BNTH.reshape(batch, kv_heads, group, count, block, width)
    x = jnp.moveaxis(x, 3, 0)
    return x.reshape(count, batch, kv_heads, -1, width)


def from_query_tiles(x: jax.Array, heads: int, length: int) -> jax.Array:
    """Return [T / block, B, K, R, H] as [B, T, N, H], cut to `length`: undo `query_tiles`."""
    count, batch, kv_heads, _, width = x.shape
    group = heads // kv_heads
    x = x.reshape(count, batch, kv_heads, group, -1, width)
    x = jnp.moveaxis(x, 0, 3)
    x_BNTH = x.reshape(batch, heads, -1, width)
    return x_BNTH[:, :, :length].swapaxes(1, 2)


def row_ranges(seen: Ranges, group: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Return first and last [T / block, B, 1, R, 1], repeated for each query head of a group."""
    batch = seen.first_BT.shape[0]
    repeated = []
    for x_BT in seen:
        x = x_BT.reshape(batch, 1, -1, 1, block)
        repeated.append(jnp.tile(x, (1, 1, 1, group, 1)))
    scanned = []
    for x in repeated:
        x = jnp.moveaxis(x, 2, 0)
        scanned.append(x.reshape(-1, batch, 1, group * block, 1))
    first, last = scanned
    return first, last


def common_bounds(seen: Ranges, block: int) -> jax.Array:
    """Return [T / block, 2]: begin and end of the column blocks that any row of the batch visits.

    One loop serves the whole batch.
    """
    length = seen.first_BT.shape[1]
    bounds = block_bounds(seen, block, block)
    begin = bounds[:, :, 0]
    end = bounds[:, :, 3]

    # Blocks of rows that see nothing do not count.
    empty = begin == end
    first = jnp.where(empty, length, begin).min(0)
    last = jnp.where(empty, 0, end).max(0)
    return jnp.stack([first, jnp.maximum(last, first)], axis=-1)


def row_tiles(arrays_BNTH: tuple[jax.Array, ...], keys: Ranges, sizes: Sizes) -> RowTiles:
    """Cut arrays of queries and the keys that these see into the tiles that a loop scans."""
    block = sizes.block
    tiles = []
    for x_BNTH in arrays_BNTH:
        tiles.append(query_tiles(x_BNTH, sizes.kv_heads, block))
    first, last = row_ranges(keys, sizes.group, block)
    return RowTiles(tuple(tiles), first, last, common_bounds(keys, block))


def key_tile(x_BKSH: jax.Array, j: jax.Array, block: int) -> jax.Array:
    """Return the `j`-th block of keys or values, [B, K, block, H]."""
    return jax.lax.dynamic_slice_in_dim(x_BKSH, j * block, block, axis=2)


def tile_scores(
    q: jax.Array,
    k_tile: jax.Array,
    rows: RowTiles,
    j: jax.Array,
    scale: float,
    soft_cap: float | None,
) -> tuple[jax.Array, Any]:
    """Return masked scores [B, K, R, S] in base 2, and tanh of the capped ones or None.

    q [B, K, R, H] are the queries of one entry of `rows`, k_tile [B, K, S, H] the `j`-th block of
    keys. The second result is None without a soft cap.
    """
    scores = einsum_float32("BKRH,BKSH->BKRS", q, k_tile) * scale
    bent = None
    if soft_cap is not None:
        bent = jnp.tanh(scores / soft_cap)
        scores = bent * soft_cap

    # The mask: the keys of this tile that are within each row's range.
    block = k_tile.shape[2]
    key = j * block + jnp.arange(block, dtype=jnp.int32)
    seen = (key >= rows.first) & (key <= rows.last)
    return jnp.where(seen, scores * LOG2E, MASKED), bent


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
    """Return the output [B, T, N, H] in q's type, and the log-sum-exp [B, N, T].

    The log-sum-exp is float32 and in base 2; it is +1e30 where a row sees nothing. `keys` are the
    keys that each query sees; `queries` is not used here, and other implementations use it.
    """
    sizes = sizes_of(q_BTNH, k_BSKH)
    k_BKSH = heads_first(k_BSKH, sizes.padded)
    v_BKSH = heads_first(v_BSKH, sizes.padded)
    keys = pad_ranges(keys, sizes.padded)

    def block_of_rows(rows: RowTiles):
        """Attend from one block of queries: output [B, K, R, H], log-sum-exp [B, K, R, 1]."""
        (q,) = rows.tiles

        # m, l, acc: running maximum, sum and output (Dao 2023, algorithm 1).
        def tile(j, carry):
            m, l, acc = carry
            k = key_tile(k_BKSH, j, sizes.block)
            v = key_tile(v_BKSH, j, sizes.block)
            s, _ = tile_scores(q, k, rows, j, scale, soft_cap)
            # What was summed before is scaled to the new maximum.
            m_new = jnp.maximum(m, s.max(-1, keepdims=True))
            p = jnp.exp2(s - m_new)
            kept = jnp.exp2(m - m_new)
            pv = einsum_float32("BKRS,BKSH->BKRH", p.astype(v.dtype), v)
            l_new = l * kept + p.sum(-1, keepdims=True)
            return m_new, l_new, acc * kept + pv

        # Above MASKED, so that the weight of a masked score is exactly 0, also in a row that has
        # seen nothing.
        one_number = (*q.shape[:3], 1)
        m = jnp.full(one_number, MASKED / 2)
        l = jnp.zeros(one_number)
        acc = jnp.zeros(q.shape, jnp.float32)
        begin, end = rows.bounds[0], rows.bounds[1]
        m, l, acc = jax.lax.fori_loop(begin, end, tile, (m, l, acc))

        # A row that saw nothing gives zeros.
        some = l > 0
        lse = m + jnp.log2(jnp.where(some, l, 1.0))
        lse = jnp.where(some, lse, -MASKED)
        out = acc / jnp.where(some, l, 1.0)
        return out.astype(q.dtype), lse

    q_BNTH = heads_first(q_BTNH, sizes.padded)
    scanned = row_tiles((q_BNTH,), keys, sizes)
    out, lse = jax.lax.map(block_of_rows, scanned)
    lse_BTN1 = from_query_tiles(lse, sizes.heads, sizes.length)
    out_BTNH = from_query_tiles(out, sizes.heads, sizes.length)
    return out_BTNH, lse_BTN1[..., 0].swapaxes(1, 2)


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

    `out_BTNH` and `lse_BNT` are the results of `forward`, `dout_BTNH` the gradient of its output.
    The weights are computed again from the log-sum-exp.
    """
    sizes = sizes_of(q_BTNH, k_BSKH)
    k_BKSH = heads_first(k_BSKH, sizes.padded)
    v_BKSH = heads_first(v_BSKH, sizes.padded)
    keys = pad_ranges(keys, sizes.padded)
    delta_BNT = einsum_float32("BTNH,BTNH->BNT", out_BTNH, dout_BTNH)

    def block_of_rows(carry, rows: RowTiles):
        """Add a block of queries to (dk, dv) [B, K, S, H]; also return its dq [B, K, R, H]."""
        q, dout, lse, delta = rows.tiles

        # dS = P (dP - delta); dQ = dS K, dK = dS^T Q, dV = P^T dO (Dao 2023, algorithm 2).
        def tile(j, carry):
            dq, dk_BKSH, dv_BKSH = carry
            k = key_tile(k_BKSH, j, sizes.block)
            v = key_tile(v_BKSH, j, sizes.block)
            # P from the log-sum-exp, and dS with the slope of the soft cap.
            s, bent = tile_scores(q, k, rows, j, scale, soft_cap)
            p = jnp.exp2(s - lse)
            dp = einsum_float32("BKRH,BKSH->BKRS", dout, v)
            ds = p * (dp - delta)
            if soft_cap is not None:
                ds *= 1 - bent * bent
            # Products take the inputs' type and are summed in float32.
            p = p.astype(q.dtype)
            ds = ds.astype(q.dtype)
            dq += einsum_float32("BKRS,BKSH->BKRH", ds, k)
            dk = einsum_float32("BKRS,BKRH->BKSH", ds, q)
            dv = einsum_float32("BKRS,BKRH->BKSH", p, dout)
            dk_BKSH = add_slice(dk_BKSH, dk, j * sizes.block)
            dv_BKSH = add_slice(dv_BKSH, dv, j * sizes.block)
            return dq, dk_BKSH, dv_BKSH

        dq = jnp.zeros(q.shape, jnp.float32)
        begin, end = rows.bounds[0], rows.bounds[1]
        dq, dk_BKSH, dv_BKSH = jax.lax.fori_loop(begin, end, tile, (dq, *carry))
        return (dk_BKSH, dv_BKSH), (dq * scale).astype(q.dtype)

    # The arrays of queries, padded; new rows have the log-sum-exp of rows that see nothing.
    extra = ((0, 0), (0, 0), (0, sizes.padded - sizes.length))
    lse = jnp.pad(lse_BNT, extra, constant_values=-MASKED)[..., None]
    delta = jnp.pad(delta_BNT, extra, constant_values=0.0)[..., None]
    q_BNTH = heads_first(q_BTNH, sizes.padded)
    dout_BNTH = heads_first(dout_BTNH, sizes.padded)

    # Over blocks of queries: dq is of each block, dk and dv are summed.
    zeros_BKSH = jnp.zeros(k_BKSH.shape, jnp.float32)
    scanned = row_tiles((q_BNTH, dout_BNTH, lse, delta), keys, sizes)
    start = (zeros_BKSH, zeros_BKSH)
    (dk_BKSH, dv_BKSH), dq = jax.lax.scan(block_of_rows, start, scanned)

    dk_BSKH = (dk_BKSH * scale)[:, :, : sizes.length].swapaxes(1, 2)
    dv_BSKH = dv_BKSH[:, :, : sizes.length].swapaxes(1, 2)
    dq_BTNH = from_query_tiles(dq, sizes.heads, sizes.length)
    return dq_BTNH, dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype)


def add_slice(x_BKSH: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """Return `x_BKSH` with `part` [B, K, block, H] added to it from key `start` on."""
    part += jax.lax.dynamic_slice_in_dim(x_BKSH, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(x_BKSH, part, start, axis=2)
