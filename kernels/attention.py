"""Attention: the reference in plain JAX behind the public functions that faster kernels will serve."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row with no visible key gives no NaN


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Self-attention (T = S) with grouped queries; returns [B, T, N, H] in q's type.

    `segment_ids` [B, T]: a token sees its own segment only; 0 is padding, which sees nothing and is not
    seen. `window`: a token sees itself and the window - 1 tokens before it. `scale` defaults to 1/sqrt(H).
    A row that sees nothing gives zeros.
    """
    length = q_BTNH.shape[1]
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    mask_BTS = jnp.ones((1, length, length), bool)
    if causal:
        mask_BTS &= key <= query
    if window is not None:
        mask_BTS &= query - key < window
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask_BTS = mask_BTS & same & (segment_ids > 0)[:, :, None]
    return masked_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale)


def decode_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    valid_BS: jax.Array,
    at: jax.Array,
    *,
    window: int | None = None,
) -> jax.Array:
    """One query a row (T = 1), at slot `at` of a cache whose slots with `valid_BS` > 0 hold tokens."""
    slots = jnp.arange(k_BSKH.shape[1])
    mask_BS = (valid_BS > 0) & (slots <= at)
    if window is not None:  # rows are left-padded, so distances between slots are distances between tokens
        mask_BS &= at - slots < window
    return masked_attention(q_BTNH, k_BSKH, v_BSKH, mask_BS[:, None, :])


def masked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, scale: float | None = None
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the keys where `mask_BTS` holds; statistics in float32."""
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS *= width**-0.5 if scale is None else scale
    mask_BKGTS = mask_BTS[:, None, None]
    weights_BKGTS = jax.nn.softmax(jnp.where(mask_BKGTS, scores_BKGTS, MASKED), axis=-1)
    weights_BKGTS = jnp.where(mask_BKGTS, weights_BKGTS, 0.0).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(q_BTNH.shape)
