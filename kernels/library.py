"""Attention as JAX itself offers it, a baseline: splash on TPU, cuDNN on GPU, XLA elsewhere."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels.masks import mask_of, segment_runs, visible_ranges
from runtime.errors import UserError
from sharding import platform


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    scale: float,
) -> jax.Array:
    """Return [B, T, N, H], as kernels.attention.attention does.

    Raises UserError for what the library does not offer: a soft cap but on TPU, and on TPU a
    length that 128 does not divide.
    """
    options = {"causal": causal, "window": window}
    if platform() == "tpu":
        options |= {"soft_cap": soft_cap, "scale": scale}
        return splash(q_BTNH, k_BSKH, v_BSKH, segment_ids, **options)
    if soft_cap is not None:
        raise UserError("library: jax.nn.dot_product_attention has no soft cap; use xla_chunked")

    # Causality and a window are options of the library.
    batch, length = q_BTNH.shape[:2]
    implementation = "cudnn" if platform() == "gpu" else "xla"
    if segment_ids is None:
        past_and_future = None
        if window is not None:
            past_and_future = (window - 1, 0 if causal else length - 1)
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            is_causal=causal,
            local_window_size=past_and_future,
            scale=scale,
            implementation=implementation,
        )

    # Packed rows are served as a dense mask only.
    keys, _ = visible_ranges(batch, length, segment_ids, causal, window)
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=mask_of(keys)[:, None],
        scale=scale,
        implementation=implementation,
    )
    return zeros_at_padding(out_BTNH, segment_ids)


def splash_mask(lib: Any, length: int, causal: bool, window: int | None) -> Any:
    """Return the mask of one head in the splash library's terms."""
    shape = (length, length)
    if window is not None:
        past_and_future = (window - 1, 0 if causal else None)
        return lib.LocalMask(shape, past_and_future, 0)
    return lib.CausalMask(shape) if causal else lib.FullMask(shape)


def splash(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    scale: float,
) -> jax.Array:
    """Return [B, T, N, H] by JAX's splash attention for TPU.

    Raises UserError for lengths that are not multiples of 128.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    group = heads // kv_heads
    if length % 128:
        raise UserError(
            f"library: splash attention serves multiples of 128 tokens, not {length}; "
            "use pallas_tpu"
        )

    # The kernel of the query heads that share a key head.
    block = next(size for size in (512, 256, 128) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    mask = splash_mask(lib, length, causal, window)
    kernel = lib.make_splash_mqa_single_device(
        lib.MultiHeadMask([mask] * group),
        block_sizes=lib.BlockSizes(**{f"block_{name}": block for name in names}),
        attn_logits_soft_cap=soft_cap,
    )

    # It has no scale, and takes segments as one number a token.
    q_BTKGH = (q_BTNH * scale).reshape(batch, length, kv_heads, group, width)
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    segments = None
    if segment_ids is not None:
        run_BT = segment_runs(segment_ids).first_BT
        segments = lib.SegmentIds(run_BT, run_BT)

    # Over rows and key heads.
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    over_rows = jax.vmap(over_heads)
    out_BKGTH = over_rows(q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), segments)
    out_BTKGH = out_BKGTH.transpose(0, 3, 1, 2, 4)
    out_BTNH = out_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)
    if segment_ids is None:
        return out_BTNH
    return zeros_at_padding(out_BTNH, segment_ids)


def zeros_at_padding(out_BTNH: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Return `out_BTNH`, zero where the segment is 0."""
    real_BT = segment_ids > 0
    return jnp.where(real_BT[:, :, None, None], out_BTNH, 0)
