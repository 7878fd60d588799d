"""Attention: the public functions, the reference in plain JAX, and the table of which implementation serves what."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels import chunked, flash, library
from kernels.masks import MASKED, Ranges, mask_of, visible_ranges
from kernels.ring import ring_backward, ring_forward
from runtime.errors import UserError
from sharding import BATCH, along, platform

Implementation = Literal[
    "auto", "reference", "xla_chunked", "pallas_tpu", "pallas_gpu", "pallas_hopper", "library"
]


class Line(NamedTuple):
    """A line of the table: up to `longest` tokens on `platform`, `auto` means `implementation`."""

    platform: str
    longest: float | Callable[[int, int], int]
    """Tokens of a sequence; or a function of the head width and of a number's bytes that gives them."""
    implementation: str
    why: str


ANY = float("inf")
# pallas_gpu and pallas_hopper are in no line: not yet measured on GPU.
AUTO = (  # the first line that fits; the last always does
    Line("cpu", 64, "reference", "one tile of xla_chunked: nothing to skip"),
    Line("tpu", 127, "reference", "shorter than one tile"),
    Line(
        "tpu",
        flash.longest_on_tpu,
        "pallas_tpu",
        "compiled for v5e, v5p and v6e; not yet timed on one",
    ),
    Line("gpu", 1024, "reference", "the kernels have not yet been seen on a GPU"),
    Line("", ANY, "xla_chunked", "memory; no kernel fits here, or none has been measured"),
)


def chosen(platform: str, length: int, width: int, itemsize: int) -> str:
    """What `auto` means for `length` tokens and heads of `width` numbers of `itemsize` bytes."""
    for line in AUTO:
        longest = line.longest(width, itemsize) if callable(line.longest) else line.longest
        if line.platform in ("", platform) and length <= longest:
            return line.implementation
    raise AssertionError("the table's last line fits everything")


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
    ring: int = 1,
) -> jax.Array:
    """Self-attention (T = S) with grouped queries; returns [B, T, N, H] in q's type.

    `segment_ids` [B, T]: a token sees its own segment only, an unbroken run of one id (the same id again is another
    segment); 0 is padding, which sees nothing and is not seen. `window`: a token sees itself and the window - 1
    tokens before it. `soft_cap`: scores become soft_cap * tanh(scores / soft_cap) (Gemma 2). `scale` defaults to
    1/sqrt(H). A row that sees nothing gives zeros. Under a mesh every implementation but the reference runs on each
    device's own rows and heads. `ring`: devices of the mesh's sequence axis over which the tokens of q, k, v and the
    result, though not of `segment_ids`, are striped (kernels/ring.py). Raises UserError where the implementation asked
    for does not serve the shape.
    """
    batch, length, heads, width = q_BTNH.shape
    if (
        k_BSKH.shape != v_BSKH.shape
        or k_BSKH.shape[:2] != (batch, length)
        or heads % k_BSKH.shape[2]
    ):
        raise ValueError(
            f"q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}: not one self-attention"
        )
    if implementation == "auto":
        implementation = chosen(platform(), length // ring, width, q_BTNH.dtype.itemsize)
        if ring > 1 and implementation == "reference":
            implementation = "xla_chunked"
    if ring > 1 and implementation not in BACKENDS:
        raise UserError(
            f"attention {implementation!r}: not over a sequence axis; choose one of {', '.join(BACKENDS)}"
        )
    scale = width**-0.5 if scale is None else scale
    if implementation == "library":
        options = {"causal": causal, "window": window, "soft_cap": soft_cap, "scale": scale}
        return on_each_device(
            functools.partial(library.attention, **options), q_BTNH, k_BSKH, v_BSKH, segment_ids
        )
    keys, queries = visible_ranges(batch, length, segment_ids, causal, window)
    if implementation == "reference":
        return masked_attention(q_BTNH, k_BSKH, v_BSKH, mask_of(keys), scale, soft_cap)
    if implementation not in BACKENDS:
        names = ", ".join(("auto", "reference", *BACKENDS, "library"))
        raise UserError(f"attention {implementation!r}: unknown; choose one of {names}")
    if implementation == "pallas_hopper" and platform() != "gpu":
        raise UserError(f"pallas_hopper: runs on Hopper GPUs only, not on {platform()}; use auto")
    run = functools.partial(bounded_attention, (implementation, ring), scale, soft_cap)
    return on_each_device(run, q_BTNH, k_BSKH, v_BSKH, keys, queries, ring=ring)


def decode_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    valid_BS: jax.Array,
    at: jax.Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """One query a row (T = 1), at slot `at` of a ring of slots, of which those with `valid_BS` > 0 hold tokens."""
    slots, width = k_BKSH.shape[2:]
    mask_BS = valid_BS > 0
    if (
        window is not None
    ):  # rows are left-padded, so distances between slots are distances between tokens
        mask_BS &= (at - jnp.arange(slots)) % slots < window
    q_BKGH = q_BTNH.reshape(*k_BKSH.shape[:2], -1, width)
    scores_BKGS = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32)
    weights_BKGS = softmax_where(
        mask_BS[:, None, None], scores_BKGS, width**-0.5 if scale is None else scale, soft_cap
    )
    return jnp.einsum("BKGS,BKSH->BKGH", weights_BKGS.astype(v_BKSH.dtype), v_BKSH).reshape(
        q_BTNH.shape
    )


def softmax_where(
    mask: jax.Array, scores: jax.Array, scale: float, soft_cap: float | None
) -> jax.Array:
    """Softmax of the scaled and capped scores over the last axis, where `mask` holds; 0 elsewhere."""
    scores *= scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1), 0.0)


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
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    scale = width**-0.5 if scale is None else scale
    weights_BKGTS = softmax_where(mask_BTS[:, None, None], scores_BKGTS, scale, soft_cap).astype(
        v_BSKH.dtype
    )
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(q_BTNH.shape)


def _hopper(module: str, name: str) -> Callable:
    """The function `name` of the module, which is imported when it is called: few do, and Mosaic GPU loads slowly."""
    return lambda *args, **options: getattr(importlib.import_module(module), name)(
        *args, **options
    )


# Implementations whose memory is linear in the length: (forward, backward) each, under one derivative rule.
BACKENDS: dict[str, tuple[Callable, Callable]] = {
    "xla_chunked": (chunked.forward, chunked.backward),
    **{
        f"pallas_{name}": tuple(
            functools.partial(f, platform=name) for f in (flash.forward, flash.backward)
        )
        for name in ("tpu", "gpu")
    },
    "pallas_hopper": (
        _hopper("kernels.hopper", "forward"),
        _hopper("kernels.hopper_backward", "backward"),
    ),
}


def passes(implementation: str, ring: int) -> tuple[Callable, Callable]:
    """(forward, backward) of the implementation, or of a ring of several devices around it."""
    forward, backward = BACKENDS[implementation]
    if ring == 1:
        return forward, backward
    return functools.partial(ring_forward, forward, ring), functools.partial(
        ring_backward, backward, ring
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def bounded_attention(how, scale, soft_cap, q_BTNH, k_BSKH, v_BSKH, keys: Ranges, queries: Ranges):
    """Attention that saves for its derivative its inputs, its output and the log-sum-exp, nothing quadratic."""
    forward, _ = passes(*how)
    return forward(q_BTNH, k_BSKH, v_BSKH, keys, queries, scale=scale, soft_cap=soft_cap)[0]


def _bounded_forward(how, scale, soft_cap, *inputs):
    forward, _ = passes(*how)
    out_BTNH, lse_BNT = forward(*inputs, scale=scale, soft_cap=soft_cap)
    return out_BTNH, (inputs, out_BTNH, lse_BNT)


def _bounded_backward(how, scale, soft_cap, saved, dout_BTNH):
    _, backward = passes(*how)
    inputs, out_BTNH, lse_BNT = saved
    dq, dk, dv = backward(*inputs, out_BTNH, lse_BNT, dout_BTNH, scale=scale, soft_cap=soft_cap)
    return dq, dk, dv, None, None


bounded_attention.defvjp(_bounded_forward, _bounded_backward)


def on_each_device(
    run: Callable,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *tokens: Any,
    ring: int = 1,
) -> jax.Array:
    """`run` under shard_map: rows over data and fsdp, heads over tensor, tokens over sequence in a `ring`.

    Without a mesh, or inside a shard_map over these axes, just `run`. `tokens`: trees of [B, T] arrays, which are not
    cut by tokens. Key/value heads that the tensor axis cuts are replicated, and each device takes
    the one that its queries share; where its queries do not share one, heads are not split at all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = set(mesh.axis_names) - set(
        mesh.manual_axes
    )  # in a pipeline, its stages are manual already
    if mesh.empty or along(mesh, *axes) == 1:
        return run(q_BTNH, k_BSKH, v_BSKH, *tokens)
    (batch, _, heads, _), kv_heads = q_BTNH.shape, k_BSKH.shape[2]
    parts, group = mesh.shape["tensor"], heads // kv_heads
    rows = BATCH[0] if batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    whole = kv_heads % parts == 0
    shared = not whole and heads % parts == 0 and group % (heads // parts) == 0
    sequence = "sequence" if ring > 1 else None
    query = P(rows, sequence, "tensor" if whole or shared else None, None)
    key = P(rows, sequence, "tensor" if whole else None, None)

    def local(q_BTNH, k_BSKH, v_BSKH, *tokens):
        if shared:
            mine = jax.lax.axis_index("tensor") * (heads // parts) // group
            k_BSKH, v_BSKH = (
                jax.lax.dynamic_slice_in_dim(x, mine, 1, axis=2) for x in (k_BSKH, v_BSKH)
            )
        return run(q_BTNH, k_BSKH, v_BSKH, *tokens)

    specs = (query, key, key, *(P(rows, None) for _ in tokens))
    # Pallas calls do not say over which axes their results vary, so that cannot be checked.
    options = {"in_specs": specs, "out_specs": query, "axis_names": axes, "check_vma": False}
    return jax.shard_map(local, **options)(q_BTNH, k_BSKH, v_BSKH, *tokens)
