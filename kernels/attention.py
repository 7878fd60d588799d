"""Attention: public functions, the reference in plain JAX, and which implementation `auto` is."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels import chunked, library
from kernels.layouts import SharedRows
from kernels.masks import MASKED, Ranges, mask_of, visible_ranges
from kernels.ring import ring_backward, ring_forward
from runtime.errors import UserError
from sharding import BATCH, along, platform

Implementation = Literal[
    "auto", "reference", "xla_chunked", "pallas_tpu", "pallas_gpu", "pallas_hopper", "library"
]


# ---- Which implementation `auto` is ----


class Line(NamedTuple):
    """A line of the table: up to `longest` tokens on `platform`, `auto` is `implementation`."""

    platform: str
    """ "cpu", "gpu" or "tpu"; empty: any."""
    longest: float | Callable[[int, int], int]
    """Tokens of a sequence; or a function of the head width and the bytes of a number."""
    implementation: Implementation
    why: str


def late(module: str, name: str) -> Callable[..., Any]:
    """Return the function `name` of `module`, imported when it is called: Pallas loads slowly."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **options)

    return call


ANY_LENGTH = float("inf")
# The first line that fits holds; the last always does. No implementation has been timed on a GPU:
# benchmarks/gpu/1_attention.sh does it, and its results fill the lines of "gpu", which
# tests/test_benchmarks.py holds to what was fastest; until then pallas_gpu, pallas_hopper and
# cuDNN (library) are in none.
AUTO = (
    Line(
        platform="cpu",
        longest=64,
        implementation="reference",
        why="one tile of xla_chunked: nothing to skip",
    ),
    Line(
        platform="tpu",
        longest=127,
        implementation="reference",
        why="shorter than one tile",
    ),
    Line(
        platform="tpu",
        longest=late("kernels.flash", "longest_on_tpu"),
        implementation="pallas_tpu",
        why="compiled for v5e, v5p and v6e; not yet timed on one",
    ),
    Line(
        platform="gpu",
        longest=1024,
        implementation="reference",
        why="nothing has been timed on a GPU yet",
    ),
    Line(
        platform="",
        longest=ANY_LENGTH,
        implementation="xla_chunked",
        why="memory; no kernel fits here, or none has been measured",
    ),
)


def chosen(platform: str, length: int, width: int, itemsize: int) -> Implementation:
    """Return what `auto` is for `length` tokens and heads of `width` numbers of so many bytes."""
    for line in AUTO:
        longest = line.longest
        if callable(longest):
            longest = longest(width, itemsize)
        if line.platform in ("", platform) and length <= longest:
            return line.implementation
    raise AssertionError("the table's last line fits everything")


# ---- The reference ----


def softmax_where(
    mask: jax.Array,
    scores: jax.Array,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """Return the softmax of the scaled and capped scores over the last axis; 0 outside `mask`.

    Where `mask` is empty along that axis, all weights are 0.
    """
    scores *= scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
    return jnp.where(mask, weights, 0.0)


def masked_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Return softmax(q k / sqrt(H)) v over the keys where `mask_BTS` holds, [B, T, N, H].

    This is the reference: quadratic in memory, statistics in float32. `scale` and `soft_cap` are
    as in `attention`.
    """
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    group = heads // kv_heads
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, group, width)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    if scale is None:
        scale = width**-0.5
    weights_BKGTS = softmax_where(mask_BTS[:, None, None], scores_BKGTS, scale, soft_cap)
    weights_BKGTS = weights_BKGTS.astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(q_BTNH.shape)


# ---- Implementations whose memory is linear in the length ----


class Backend(NamedTuple):
    """The two passes of an implementation; kernels/chunked.py has their arguments and results."""

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


BACKENDS = {
    "xla_chunked": Backend(chunked.forward, chunked.backward),
    "pallas_tpu": Backend(
        functools.partial(late("kernels.flash", "forward"), platform="tpu"),
        functools.partial(late("kernels.flash", "backward"), platform="tpu"),
    ),
    "pallas_gpu": Backend(
        functools.partial(late("kernels.flash", "forward"), platform="gpu"),
        functools.partial(late("kernels.flash", "backward"), platform="gpu"),
    ),
    "pallas_hopper": Backend(
        late("kernels.hopper", "forward"), late("kernels.hopper_backward", "backward")
    ),
}


class Options(NamedTuple):
    """Settings of attention besides its arrays."""

    implementation: str
    """A key of BACKENDS."""
    ring: int
    """Devices of the sequence axis; 1: no ring around the implementation."""
    scale: float
    soft_cap: float | None
    hides_padding: bool = False
    """Set q, k and v to 0 where a token sees nothing."""


def passes(options: Options) -> Backend:
    """Return the two passes of the implementation, or of a ring of several devices around it."""
    backend = BACKENDS[options.implementation]
    if options.ring == 1:
        return backend
    return Backend(
        functools.partial(ring_forward, backend.forward, options.ring),
        functools.partial(ring_backward, backend.backward, options.ring),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def bounded_attention(
    options: Options,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    keys: Ranges,
    queries: Ranges,
) -> jax.Array:
    """Return [B, T, N, H] by an implementation of BACKENDS, for the ranges of `visible_ranges`.

    Saves for its derivative its inputs, its output and the log-sum-exp: nothing quadratic.
    """
    out_BTNH, _ = _bounded_forward(options, q_BTNH, k_BSKH, v_BSKH, keys, queries)
    return out_BTNH


def _bounded_forward(options, *inputs):
    forward = passes(options).forward
    if options.hides_padding:
        # Before they are saved: the backward pass then needs no mask of its own.
        q_BTNH, k_BSKH, v_BSKH, keys, queries = inputs
        inputs = (*without_padding(keys, q_BTNH, k_BSKH, v_BSKH), keys, queries)
    out_BTNH, lse_BNT = forward(*inputs, scale=options.scale, soft_cap=options.soft_cap)
    return out_BTNH, (inputs, out_BTNH, lse_BNT)


def _bounded_backward(options, saved, dout_BTNH):
    backward = passes(options).backward
    inputs, out_BTNH, lse_BNT = saved
    dq, dk, dv = backward(
        *inputs,
        out_BTNH,
        lse_BNT,
        dout_BTNH,
        scale=options.scale,
        soft_cap=options.soft_cap,
    )
    # The ranges have no derivative.
    return dq, dk, dv, None, None


bounded_attention.defvjp(_bounded_forward, _bounded_backward)


# ---- On a mesh ----


def on_each_device(
    run: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *tokens: Any,
    ring: int = 1,
) -> jax.Array:
    """Return `run(q, k, v, *tokens)`, run under shard_map on each device's own part.

    Rows are split over data and fsdp, heads over tensor, tokens over sequence in a `ring` of more
    than one. `tokens` are trees of [B, T] arrays, which are not cut by tokens. Without a mesh, or
    inside a shard_map over these axes, it is just `run`. Key/value heads that the tensor axis cuts
    are replicated, and each device takes the one that its queries share; where its queries do not
    share one, heads are not split at all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # In a pipeline its stages are manual already.
    axes = set(mesh.axis_names) - set(mesh.manual_axes)
    if mesh.empty or along(mesh, *axes) == 1:
        return run(q_BTNH, k_BSKH, v_BSKH, *tokens)

    # What the mesh can split: rows, all heads, or query heads that share a key head.
    batch, _, heads, _ = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    group = heads // kv_heads
    parts = mesh.shape["tensor"]
    heads_here = heads // parts
    whole = kv_heads % parts == 0
    shared = not whole and heads % parts == 0 and group % heads_here == 0
    row_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = BATCH[0] if batch % row_devices == 0 else None
    sequence = "sequence" if ring > 1 else None
    query_spec = P(rows, sequence, "tensor" if whole or shared else None, None)
    key_spec = P(rows, sequence, "tensor" if whole else None, None)

    def local(q_BTNH, k_BSKH, v_BSKH, *tokens):
        if shared:
            mine = jax.lax.axis_index("tensor") * heads_here // group
            k_BSKH = jax.lax.dynamic_slice_in_dim(k_BSKH, mine, 1, axis=2)
            v_BSKH = jax.lax.dynamic_slice_in_dim(v_BSKH, mine, 1, axis=2)
        return run(q_BTNH, k_BSKH, v_BSKH, *tokens)

    token_specs = [P(rows, None) for _ in tokens]
    # Pallas calls do not say over which axes their results vary, so that cannot be checked.
    on_mesh = jax.shard_map(
        local,
        in_specs=(query_spec, key_spec, key_spec, *token_specs),
        out_specs=query_spec,
        axis_names=axes,
        check_vma=False,
    )
    return on_mesh(q_BTNH, k_BSKH, v_BSKH, *tokens)


# ---- The public functions ----


def check_shapes(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> None:
    """Raise ValueError unless these are q, k and v of one self-attention with grouped queries."""
    batch, length, heads, _ = q_BTNH.shape
    keys_fit = k_BSKH.shape[:2] == (batch, length) and heads % k_BSKH.shape[2] == 0
    if k_BSKH.shape != v_BSKH.shape or not keys_fit:
        raise ValueError(
            f"q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}: not one self-attention"
        )


def without_padding(keys: Ranges, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return `arrays`, [B, T, ...] each, with zeros at padding: the tokens that see nothing."""
    is_real_BT11 = (keys.first_BT <= keys.last_BT)[:, :, None, None]
    return tuple(jnp.where(is_real_BT11, x, 0) for x in arrays)


def resolve(implementation: Implementation, q_BTNH: jax.Array, ring: int) -> Implementation:
    """Return the implementation meant by `auto`, or the one asked for.

    Raises UserError for an unknown one, and for one that does not run on this platform or in a
    ring of `ring` devices.
    """
    if implementation == "auto":
        length, _, width = q_BTNH.shape[1:]
        implementation = chosen(platform(), length // ring, width, q_BTNH.dtype.itemsize)
        if ring > 1 and implementation == "reference":
            implementation = "xla_chunked"
    if ring > 1 and implementation not in BACKENDS:
        raise UserError(
            f"attention {implementation!r}: not over a sequence axis; choose one of "
            f"{', '.join(BACKENDS)}"
        )
    names = ("auto", "reference", *BACKENDS, "library")
    if implementation not in names:
        raise UserError(f"attention {implementation!r}: unknown; choose one of {', '.join(names)}")
    if implementation == "pallas_hopper" and platform() != "gpu":
        raise UserError(f"pallas_hopper: runs on Hopper GPUs only, not on {platform()}; use auto")
    return implementation


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segment_ids: jax.Array | SharedRows | None = None,
    causal: bool = True,
    window: int | jax.Array | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
    ring: int = 1,
    finite_padding: bool = False,
) -> jax.Array:
    """Return self-attention (T = S) with grouped queries, [B, T, N, H] in q's type.

    `segment_ids` [B, T]: a token sees its own segment only, an unbroken run of one id (the same id
    again is another segment); 0 is padding, which sees nothing and is not seen. SharedRows in
    their place: of the rows, for tokens in slots (kernels/layouts.py), causal only. `window`: a
    token sees itself and the window - 1 tokens before it; every implementation but `library` takes
    it as an array too. `soft_cap`: scores become soft_cap * tanh(scores / soft_cap) (Gemma 2).
    `scale` defaults to 1/sqrt(H). A row that sees nothing gives zeros. Under a mesh every
    implementation but the reference runs on each device's own rows and heads. `ring`: devices of
    the mesh's sequence axis over which the tokens of q, k, v and the result, though not of
    `segment_ids`, are striped (kernels/ring.py). Infinity and NaN at padding reach no other token
    in `reference` and `xla_chunked`, for q, k and v are set to 0 there; with `finite_padding` the
    caller says that there is none, which saves that pass.

    Raises UserError where the implementation asked for does not serve the shape.
    """
    check_shapes(q_BTNH, k_BSKH, v_BSKH)
    if isinstance(segment_ids, SharedRows):
        # Tokens in slots are laid out in rows, and what these see goes back.
        shared = segment_ids
        out_BTNH = attention(
            shared.rows(q_BTNH),
            shared.rows(k_BSKH),
            shared.rows(v_BSKH),
            segment_ids=shared.segment_ids_BT,
            window=window,
            soft_cap=soft_cap,
            scale=scale,
            implementation=implementation,
            finite_padding=True,
        )
        return shared.slots(out_BTNH)

    batch, length, _, width = q_BTNH.shape
    implementation = resolve(implementation, q_BTNH, ring)
    if scale is None:
        scale = width**-0.5

    if implementation == "library":
        run = functools.partial(
            library.attention, causal=causal, window=window, soft_cap=soft_cap, scale=scale
        )
        return on_each_device(run, q_BTNH, k_BSKH, v_BSKH, segment_ids)

    # Weights of 0 hide numbers, but neither infinity nor NaN.
    keys, queries = visible_ranges(batch, length, segment_ids, causal, window)
    hides_padding = segment_ids is not None and not finite_padding
    if implementation == "reference":
        if hides_padding:
            q_BTNH, k_BSKH, v_BSKH = without_padding(keys, q_BTNH, k_BSKH, v_BSKH)
        return masked_attention(q_BTNH, k_BSKH, v_BSKH, mask_of(keys), scale, soft_cap)

    is_chunked = implementation == "xla_chunked" and ring == 1
    options = Options(implementation, ring, scale, soft_cap, hides_padding and is_chunked)
    run = functools.partial(bounded_attention, options)
    return on_each_device(run, q_BTNH, k_BSKH, v_BSKH, keys, queries, ring=ring)


def slot_distances(length: int, slots: int, at: jax.Array) -> jax.Array:
    """Return [T, S]: how many tokens before each of `length` new ones the slots' tokens stand.

    The new tokens are in the slots from `at`, a scalar, on; `slots` are a ring. A slot before the
    oldest token, or of a newer one, is as far as the ring is long from there.
    """
    # Rows are left-padded, so distances between slots are distances between tokens.
    query_T = at + jnp.arange(length)
    return (query_T[:, None] - jnp.arange(slots)) % slots


def seen_slots(
    valid_BS: jax.Array, length: int, at: jax.Array, window: int | jax.Array | None = None
) -> jax.Array:
    """Return [B, T, S] bool: the slots that each of `length` new tokens sees, its own among them.

    `valid_BS` is above 0 where a slot holds a token; the new ones are in those from `at` on. A
    token sees none after itself, and with a `window` itself and the window - 1 before it.
    """
    slots = valid_BS.shape[1]
    distance_TS = slot_distances(length, slots, at)
    # Token t has length - 1 - t newer ones, which the ring has furthest back.
    newer_T = length - 1 - jnp.arange(length)
    seen_TS = distance_TS < slots - newer_T[:, None]
    if window is not None:
        seen_TS &= distance_TS < window
    return (valid_BS > 0)[:, None] & seen_TS


def decode_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    valid_BS: jax.Array,
    at: jax.Array,
    *,
    window: int | jax.Array | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Return the attention of T new queries a row to cached keys, [B, T, N, H].

    Keys and values are in a ring of S slots; those with `valid_BS` > 0 hold tokens. The queries
    are the tokens in the slots from `at`, a scalar, on, and see one another causally. `window`,
    `soft_cap` and `scale` are as in `attention`.
    """
    batch, length, _, width = q_BTNH.shape
    kv_heads = k_BKSH.shape[1]
    mask_BTS = seen_slots(valid_BS, length, at, window)
    if scale is None:
        scale = width**-0.5

    # M queries a key/value head: G of each of T tokens, as one axis.
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, -1, width)
    group = q_BTKGH.shape[3]
    q_BKTGH = q_BTKGH.transpose(0, 2, 1, 3, 4)
    q_BKMH = q_BKTGH.reshape(batch, kv_heads, length * group, width)
    mask_BMS = jnp.repeat(mask_BTS, group, axis=1)

    # C is an axis of one: with it XLA multiplies by a kernel that takes a third to a fifth of the
    # time on a CPU (benchmarks/decode.py).
    k_BKCSH = k_BKSH[:, :, None]
    v_BKCSH = v_BKSH[:, :, None]
    scores_BKCMS = jnp.einsum(
        "BKMH,BKCSH->BKCMS", q_BKMH, k_BKCSH, preferred_element_type=jnp.float32
    )
    weights_BKCMS = softmax_where(mask_BMS[:, None, None], scores_BKCMS, scale, soft_cap)
    weights_BKCMS = weights_BKCMS.astype(v_BKSH.dtype)
    out_BKMH = jnp.einsum("BKCMS,BKCSH->BKMH", weights_BKCMS, v_BKCSH)

    # Back to the tokens' order.
    out_BKTGH = out_BKMH.reshape(q_BKTGH.shape)
    return out_BKTGH.transpose(0, 2, 1, 3, 4).reshape(q_BTNH.shape)
