"""Attention: the public functions, the reference in plain JAX, and the table of which implementation serves what."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from config import UserError
from kernels import chunked, flash
from kernels.masks import MASKED, Ranges, visible_ranges
from sharding import BATCH

Implementation = Literal[
    "auto", "reference", "xla_chunked", "pallas_tpu", "pallas_gpu", "library"
]  # fmt: skip


class Line(NamedTuple):
    """A line of the table: where it holds, `implementation` is what `auto` means."""

    platform: str
    longest: float
    """Tokens of a sequence."""
    widths: tuple[int, ...] | None
    """Head widths; None: all."""
    implementation: str
    why: str


ANY = float("inf")
AUTO = (  # the first line that fits; the last always does
    Line("cpu", 1024, None, "reference", "as fast up to here, and simplest"),
    Line("cpu", ANY, None, "xla_chunked", "memory"),
    Line("tpu", 127, None, "reference", "shorter than one tile"),
    Line("tpu", 32768, flash.WIDTHS, "pallas_tpu", "compiled for v5e, v5p and v6e; not yet timed on one"),
    Line("gpu", 1024, None, "reference", "the kernels have not yet been seen on a GPU"),
    Line("", ANY, None, "xla_chunked", "no kernel fits, or none has been measured"),
)


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Self-attention (T = S) with grouped queries; returns [B, T, N, H] in q's type.

    `segment_ids` [B, T]: a token sees its own segment only, an unbroken run of one id (the same id again is another
    segment); 0 is padding, which sees nothing and is not seen. `window`: a token sees itself and the window - 1
    tokens before it. `soft_cap`: scores become soft_cap * tanh(scores / soft_cap) (Gemma 2). `scale` defaults to
    1/sqrt(H). A row that sees nothing gives zeros. Under a mesh the kernels run on each device's own rows and heads.
    Raises UserError where the implementation asked for does not serve the shape.
    """
    batch, length, heads, width = q_BTNH.shape
    if k_BSKH.shape != v_BSKH.shape or k_BSKH.shape[:2] != (batch, length) or heads % k_BSKH.shape[2]:
        raise ValueError(f"q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}: not one self-attention")
    if implementation == "auto":
        implementation = chosen(jax.default_backend(), length, width)
    if implementation == "library":
        return library(
            q_BTNH, k_BSKH, v_BSKH, segment_ids=segment_ids, causal=causal, window=window, soft_cap=soft_cap, scale=scale
        )
    scale = width**-0.5 if scale is None else scale
    keys, queries = visible_ranges(batch, length, segment_ids, causal, window)
    if implementation == "reference":
        return masked_attention(q_BTNH, k_BSKH, v_BSKH, mask_of(keys), scale, soft_cap)
    if implementation not in BACKENDS:
        raise UserError(f"attention {implementation!r}: unknown; choose one of auto, reference, {', '.join(BACKENDS)}")
    run = functools.partial(bounded_attention, implementation, scale, soft_cap)
    if implementation == "xla_chunked":
        return run(q_BTNH, k_BSKH, v_BSKH, keys, queries)
    if width not in flash.WIDTHS:
        raise UserError(f"{implementation}: head width {width} is none of {flash.WIDTHS}; use xla_chunked")
    return on_each_device(run, q_BTNH, k_BSKH, v_BSKH, keys, queries)


def chosen(platform: str, length: int, width: int) -> str:
    """What `auto` means for sequences of `length` tokens and heads of `width`."""
    for line in AUTO:
        fits = line.platform in ("", platform) and length <= line.longest
        if fits and (line.widths is None or width in line.widths):
            return line.implementation
    raise AssertionError("the table's last line fits everything")


def decode_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    valid_BS: jax.Array,
    at: jax.Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """One query a row (T = 1), at slot `at` of a cache whose slots with `valid_BS` > 0 hold tokens."""
    slots = jnp.arange(k_BSKH.shape[1])
    mask_BS = (valid_BS > 0) & (slots <= at)
    if window is not None:  # rows are left-padded, so distances between slots are distances between tokens
        mask_BS &= at - slots < window
    return masked_attention(q_BTNH, k_BSKH, v_BSKH, mask_BS[:, None, :], scale, soft_cap)


def masked_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """The reference: softmax(q k / sqrt(H)) v over the keys where `mask_BTS` holds; statistics in float32."""
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS *= width**-0.5 if scale is None else scale
    if soft_cap is not None:
        scores_BKGTS = soft_cap * jnp.tanh(scores_BKGTS / soft_cap)
    mask_BKGTS = mask_BTS[:, None, None]
    weights_BKGTS = jax.nn.softmax(jnp.where(mask_BKGTS, scores_BKGTS, MASKED), axis=-1)
    weights_BKGTS = jnp.where(mask_BKGTS, weights_BKGTS, 0.0).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(q_BTNH.shape)


def mask_of(keys: Ranges) -> jax.Array:
    """[B, T, S]: whether a query sees a key."""
    key = jnp.arange(keys.first_BT.shape[1], dtype=jnp.int32)
    return (key >= keys.first_BT[:, :, None]) & (key <= keys.last_BT[:, :, None])


# Implementations whose memory is linear in the length: (forward, backward) each, under one derivative rule.
BACKENDS: dict[str, tuple[Callable, Callable]] = {
    "xla_chunked": (chunked.forward, chunked.backward),
    **{
        f"pallas_{name}": tuple(functools.partial(f, platform=name) for f in (flash.forward, flash.backward))
        for name in ("tpu", "gpu")
    },
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def bounded_attention(implementation, scale, soft_cap, q_BTNH, k_BSKH, v_BSKH, keys: Ranges, queries: Ranges):
    """Attention that saves for its derivative its inputs, its output and the log-sum-exp, nothing quadratic."""
    forward, _ = BACKENDS[implementation]
    return forward(q_BTNH, k_BSKH, v_BSKH, keys, queries, scale=scale, soft_cap=soft_cap)[0]


def _bounded_forward(implementation, scale, soft_cap, *inputs):
    forward, _ = BACKENDS[implementation]
    out_BTNH, lse_BNT = forward(*inputs, scale=scale, soft_cap=soft_cap)
    return out_BTNH, (inputs, out_BTNH, lse_BNT)


def _bounded_backward(implementation, scale, soft_cap, saved, dout_BTNH):
    _, backward = BACKENDS[implementation]
    inputs, out_BTNH, lse_BNT = saved
    dq, dk, dv = backward(*inputs, out_BTNH, lse_BNT, dout_BTNH, scale=scale, soft_cap=soft_cap)
    return dq, dk, dv, None, None


bounded_attention.defvjp(_bounded_forward, _bounded_backward)


def on_each_device(run: Callable, q_BTNH, k_BSKH, v_BSKH, keys: Ranges, queries: Ranges) -> jax.Array:
    """`run` under shard_map: rows over data and fsdp, heads over tensor. Without a mesh, or inside one, just `run`.

    Key/value heads that the tensor axis cuts are replicated, and each device takes the one its queries share; where
    its queries do not share one, heads are not split at all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return run(q_BTNH, k_BSKH, v_BSKH, keys, queries)
    (batch, _, heads, _), kv_heads = q_BTNH.shape, k_BSKH.shape[2]
    parts, group = mesh.shape["tensor"], heads // kv_heads
    rows = BATCH[0] if batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    shared = heads % parts == 0 and kv_heads % parts != 0 and group % (heads // parts) == 0
    split = shared or kv_heads % parts == 0
    query = P(rows, None, "tensor" if split else None, None)
    key = P(rows, None, "tensor" if split and not shared else None, None)

    def local(q_BTNH, k_BSKH, v_BSKH, keys, queries):
        if shared:
            mine = jax.lax.axis_index("tensor") * (heads // parts) // group
            k_BSKH, v_BSKH = (jax.lax.dynamic_slice_in_dim(x, mine, 1, axis=2) for x in (k_BSKH, v_BSKH))
        return run(q_BTNH, k_BSKH, v_BSKH, keys, queries)

    ranges = Ranges(P(rows, None), P(rows, None))
    # Pallas calls do not say over which axes their results vary, so that cannot be checked.
    mapped = jax.shard_map(local, in_specs=(query, key, key, ranges, ranges), out_specs=query, check_vma=False)
    return mapped(q_BTNH, k_BSKH, v_BSKH, keys, queries)


def library(q_BTNH, k_BSKH, v_BSKH, *, segment_ids, causal, window, soft_cap, scale) -> jax.Array:
    """What JAX itself offers here: splash attention on TPU, cuDNN on GPU, plain XLA elsewhere. A baseline."""
    batch, length, heads, width = q_BTNH.shape
    scale = width**-0.5 if scale is None else scale
    if jax.default_backend() == "tpu":
        return splash(q_BTNH * scale, k_BSKH, v_BSKH, segment_ids, causal, window, soft_cap)
    if soft_cap is not None:
        raise UserError("library: jax.nn.dot_product_attention has no soft cap; use xla_chunked")
    name = "cudnn" if jax.default_backend() == "gpu" else "xla"
    options = {"scale": scale, "implementation": name}
    if segment_ids is None:
        past_and_future = None if window is None else (window - 1, 0 if causal else length - 1)
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, is_causal=causal, local_window_size=past_and_future, **options
        )
    keys, _ = visible_ranges(batch, length, segment_ids, causal, window)  # cuDNN takes packed rows as a dense mask only
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_of(keys)[:, None], **options)
    return jnp.where((keys.first_BT <= keys.last_BT)[:, :, None, None], out_BTNH, 0).astype(q_BTNH.dtype)


def splash(q_BTNH, k_BSKH, v_BSKH, segment_ids, causal, window, soft_cap) -> jax.Array:
    """JAX's splash attention for TPU, for lengths that are multiples of 128."""
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    length, heads = q_BTNH.shape[1:3]
    shape = (length, length)
    mask = lib.CausalMask(shape) if causal else lib.FullMask(shape)
    if window is not None:
        mask = lib.LocalMask(shape, (window - 1, 0 if causal else None), 0)
    kernel = lib.make_splash_mha(
        lib.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, attn_logits_soft_cap=soft_cap
    )
    group = heads // k_BSKH.shape[2]
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTNH, jnp.repeat(k_BSKH, group, 2), jnp.repeat(v_BSKH, group, 2)))
    if segment_ids is None:
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)
    out_BTNH = jax.vmap(kernel)(q, k, v, lib.SegmentIds(segment_ids, segment_ids)).swapaxes(1, 2)
    return jnp.where((segment_ids > 0)[:, :, None, None], out_BTNH, 0).astype(q_BTNH.dtype)
