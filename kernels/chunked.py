"""Attention in plain JAX with memory linear in the length: tiles of scores under an online softmax.

The algorithm of FlashAttention-2 (Dao 2023) as XLA loops, for platforms and shapes that no kernel serves. Tiles
outside every row's range are never visited. R is a tile's rows: the block's queries times the group G.
"""

import math

import jax
import jax.numpy as jnp

from kernels.masks import MASKED, Ranges, block_bounds, pad_ranges
from sharding import platform

LOG2E = math.log2(math.e)


def block_size(length: int) -> int:
    """Rows and columns of a tile. On a CPU small ones, which stay in cache and skip more; else large matmuls."""
    largest = 64 if platform() == "cpu" else 512
    return min(largest, max(16, 1 << (length - 1).bit_length()))


def heads_first(x_BTNH: jax.Array, length: int) -> jax.Array:
    """[B, T, N, H] as [B, N, length, H], zeros at the end."""
    return jnp.pad(x_BTNH.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - x_BTNH.shape[1]), (0, 0)))


def query_tiles(x_BNTH: jax.Array, kv_heads: int, block: int) -> jax.Array:
    """[B, N, T, H] as [T / block, B, K, R, H]: the queries of a group become rows of one matmul."""
    batch, heads, length, width = x_BNTH.shape
    x = x_BNTH.reshape(batch, kv_heads, heads // kv_heads, length // block, block, width)
    return jnp.moveaxis(x, 3, 0).reshape(length // block, batch, kv_heads, -1, width)


def from_query_tiles(x: jax.Array, heads: int, length: int) -> jax.Array:
    """[T / block, B, K, R, H] as [B, T, N, H], cut to `length`."""
    tiles, batch, kv_heads, _, width = x.shape
    x = x.reshape(tiles, batch, kv_heads, heads // kv_heads, -1, width)
    return jnp.moveaxis(x, 0, 3).reshape(batch, heads, -1, width)[:, :, :length].swapaxes(1, 2)


def row_tiles(seen: Ranges, group: int, block: int) -> tuple[jax.Array, jax.Array]:
    """The ranges as [T / block, B, 1, R, 1], repeated for each query of a group."""
    batch = seen.first_BT.shape[0]
    tiles = [jnp.tile(x.reshape(batch, 1, -1, 1, block), (1, 1, 1, group, 1)) for x in seen]
    first, last = (jnp.moveaxis(x, 2, 0).reshape(-1, batch, 1, group * block, 1) for x in tiles)
    return first, last


def common_bounds(seen: Ranges, block: int) -> jax.Array:
    """[T / block, 2]: the column blocks that any row of the batch must visit; one loop serves the whole batch."""
    bounds = block_bounds(seen, block, block)
    begin, end = bounds[:, :, 0], bounds[:, :, 3]
    begin = jnp.where(begin == end, seen.first_BT.shape[1], begin).min(
        0
    )  # rows that see nothing do not count
    return jnp.stack(
        [begin, jnp.maximum(jnp.where(bounds[:, :, 0] == end, 0, end).max(0), begin)], axis=-1
    )


def tile_scores(q, k_tile, first, last, j, block, scale, soft_cap):
    """Masked scores [B, K, R, block] in base 2, and tanh of the capped ones (None without soft cap)."""
    scores = jnp.einsum("BKRH,BKSH->BKRS", q, k_tile, preferred_element_type=jnp.float32) * scale
    bent = None
    if soft_cap is not None:
        bent = jnp.tanh(scores / soft_cap)
        scores = bent * soft_cap
    key = j * block + jnp.arange(block, dtype=jnp.int32)
    return jnp.where((key >= first) & (key <= last), scores * LOG2E, MASKED), bent


def forward(q_BTNH, k_BSKH, v_BSKH, keys: Ranges, queries: Ranges, *, scale, soft_cap):
    """Output [B, T, N, H] in q's type and the base-2 log-sum-exp [B, N, T] float32 (+1e30 where nothing is seen)."""
    length, heads, kv_heads = q_BTNH.shape[1], q_BTNH.shape[2], k_BSKH.shape[2]
    block = block_size(length)
    padded, group = -(-length // block) * block, heads // kv_heads
    k_BKSH, v_BKSH = heads_first(k_BSKH, padded), heads_first(v_BSKH, padded)
    keys = pad_ranges(keys, padded)

    def rows(inputs):
        q, first, last, bounds = inputs

        def tile(j, carry):
            top, total, out = carry
            k, v = (
                jax.lax.dynamic_slice_in_dim(x, j * block, block, axis=2) for x in (k_BKSH, v_BKSH)
            )
            scores, _ = tile_scores(q, k, first, last, j, block, scale, soft_cap)
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, kept = jnp.exp2(scores - new_top), jnp.exp2(top - new_top)
            seen = jnp.einsum(
                "BKRS,BKSH->BKRH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
            return new_top, total * kept + weights.sum(-1, keepdims=True), out * kept + seen

        # Above MASKED: the weight of a masked score is then exactly 0, also in a row that has seen nothing.
        start = (
            jnp.full((*q.shape[:3], 1), MASKED / 2),
            jnp.zeros((*q.shape[:3], 1)),
            jnp.zeros(q.shape, jnp.float32),
        )
        top, total, out = jax.lax.fori_loop(bounds[0], bounds[1], tile, start)
        some = total > 0
        lse = jnp.where(some, top + jnp.log2(jnp.where(some, total, 1.0)), -MASKED)
        return (out / jnp.where(some, total, 1.0)).astype(q.dtype), lse

    tiles = query_tiles(heads_first(q_BTNH, padded), kv_heads, block)
    out, lse = jax.lax.map(
        rows, (tiles, *row_tiles(keys, group, block), common_bounds(keys, block))
    )
    lse_BTN1 = from_query_tiles(lse, heads, length)
    return from_query_tiles(out, heads, length), lse_BTN1[..., 0].swapaxes(1, 2)


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
    """Gradients of q, k, v in their types; the weights are computed again from the log-sum-exp."""
    length, heads, kv_heads = q_BTNH.shape[1], q_BTNH.shape[2], k_BSKH.shape[2]
    block = block_size(length)
    padded, group = -(-length // block) * block, heads // kv_heads
    k_BKSH, v_BKSH = heads_first(k_BSKH, padded), heads_first(v_BSKH, padded)
    keys = pad_ranges(keys, padded)
    delta_BNT = jnp.einsum(
        "BTNH,BTNH->BNT", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32
    )

    def rows(carry, inputs):
        q, dout, lse, delta, first, last, bounds = inputs

        def tile(j, carry):
            dq, dk_BKSH, dv_BKSH = carry
            k, v = (
                jax.lax.dynamic_slice_in_dim(x, j * block, block, axis=2) for x in (k_BKSH, v_BKSH)
            )
            scores, bent = tile_scores(q, k, first, last, j, block, scale, soft_cap)
            weights = jnp.exp2(scores - lse)
            dweights = jnp.einsum("BKRH,BKSH->BKRS", dout, v, preferred_element_type=jnp.float32)
            dscores = weights * (dweights - delta)
            if soft_cap is not None:
                dscores *= 1 - bent * bent
            weights, dscores = weights.astype(q.dtype), dscores.astype(q.dtype)
            dq += jnp.einsum("BKRS,BKSH->BKRH", dscores, k, preferred_element_type=jnp.float32)
            dk = jnp.einsum("BKRS,BKRH->BKSH", dscores, q, preferred_element_type=jnp.float32)
            dv = jnp.einsum("BKRS,BKRH->BKSH", weights, dout, preferred_element_type=jnp.float32)
            return dq, add_slice(dk_BKSH, dk, j * block), add_slice(dv_BKSH, dv, j * block)

        start = (jnp.zeros(q.shape, jnp.float32), *carry)
        dq, *carry = jax.lax.fori_loop(bounds[0], bounds[1], tile, start)
        return tuple(carry), (dq * scale).astype(q.dtype)

    extra = ((0, 0), (0, 0), (0, padded - length))
    stats = [
        jnp.pad(x, extra, constant_values=c)[..., None]
        for x, c in ((lse_BNT, -MASKED), (delta_BNT, 0.0))
    ]
    arrays = (heads_first(q_BTNH, padded), heads_first(dout_BTNH, padded), *stats)
    tiles = [query_tiles(x, kv_heads, block) for x in arrays]
    zeros_BKSH = jnp.zeros(k_BKSH.shape, jnp.float32)
    scanned = (*tiles, *row_tiles(keys, group, block), common_bounds(keys, block))
    (dk_BKSH, dv_BKSH), dq = jax.lax.scan(rows, (zeros_BKSH, zeros_BKSH), scanned)
    dk_BSKH, dv_BSKH = (x[:, :, :length].swapaxes(1, 2) for x in (dk_BKSH * scale, dv_BKSH))
    return (
        from_query_tiles(dq, heads, length),
        dk_BSKH.astype(k_BSKH.dtype),
        dv_BSKH.astype(v_BSKH.dtype),
    )


def add_slice(x_BKSH: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
    """`x_BKSH` with `part` added from key `at` on."""
    part += jax.lax.dynamic_slice_in_dim(x_BKSH, at, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(x_BKSH, part, at, axis=2)
