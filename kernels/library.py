"""What JAX itself offers, as a baseline: splash attention on TPU, cuDNN on GPU, plain XLA elsewhere."""

import jax
import jax.numpy as jnp

from kernels.masks import mask_of, segment_runs, visible_ranges
from runtime.errors import UserError
from sharding import platform


def attention(
    q_BTNH, k_BSKH, v_BSKH, segment_ids, *, causal, window, soft_cap, scale
) -> jax.Array:
    """As kernels.attention.attention; raises UserError for what the library does not offer."""
    if platform() == "tpu":
        return splash(q_BTNH, k_BSKH, v_BSKH, segment_ids, causal, window, soft_cap, scale)
    if soft_cap is not None:
        raise UserError("library: jax.nn.dot_product_attention has no soft cap; use xla_chunked")
    batch, length = q_BTNH.shape[:2]
    options = {"scale": scale, "implementation": "cudnn" if platform() == "gpu" else "xla"}
    if segment_ids is None:
        past_and_future = None if window is None else (window - 1, 0 if causal else length - 1)
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, is_causal=causal, local_window_size=past_and_future, **options
        )
    keys, _ = visible_ranges(
        batch, length, segment_ids, causal, window
    )  # packed rows only as a dense mask
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_of(keys)[:, None], **options
    )
    return zeros_at_padding(out_BTNH, segment_ids)


def splash(q_BTNH, k_BSKH, v_BSKH, segment_ids, causal, window, soft_cap, scale) -> jax.Array:
    """JAX's splash attention for TPU: lengths that are multiples of 128."""
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    batch, length, heads, width = q_BTNH.shape
    kv_heads, shape = k_BSKH.shape[2], (length, length)
    if length % 128:
        raise UserError(
            f"library: splash attention serves multiples of 128 tokens, not {length}; use pallas_tpu"
        )
    mask = lib.CausalMask(shape) if causal else lib.FullMask(shape)
    if window is not None:
        mask = lib.LocalMask(shape, (window - 1, 0 if causal else None), 0)
    block = next(size for size in (512, 256, 128) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = lib.BlockSizes(**{f"block_{name}": block for name in names})
    kernel = lib.make_splash_mqa_single_device(
        lib.MultiHeadMask([mask] * (heads // kv_heads)),
        block_sizes=blocks,
        attn_logits_soft_cap=soft_cap,
    )
    q_BKGTH = (q_BTNH * scale).reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    segments = None
    if segment_ids is not None:
        run_BT = segment_runs(segment_ids).first_BT
        segments = lib.SegmentIds(run_BT, run_BT)
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out_BKGTH = jax.vmap(over_heads)(
        q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), segments
    )
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape).astype(q_BTNH.dtype)
    return out_BTNH if segments is None else zeros_at_padding(out_BTNH, segment_ids)


def zeros_at_padding(out_BTNH: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """`out_BTNH`, zero where the segment is 0."""
    return jnp.where((segment_ids > 0)[:, :, None, None], out_BTNH, 0)
