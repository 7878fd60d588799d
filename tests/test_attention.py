"""Every implementation of attention against float64 numpy, on inputs that no run has seen before.

A failing test prints its seed; `SEED=<n> pytest tests/test_attention.py` repeats it.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import flash
from kernels.attention import AUTO, BACKENDS, attention, chosen, decode_attention
from runtime.errors import UserError
from sharding import BATCH, MeshConfig, make_mesh

# Memory linear in the length. On a CPU the Pallas kernels are interpreted; elsewhere each runs
# where it belongs.
BACKEND = jax.default_backend()
LINEAR = (
    "xla_chunked",
    *(f"pallas_{name}" for name in ("tpu", "gpu") if BACKEND in ("cpu", name)),
)
# cuDNN takes no float32.
ALL = ("reference", *LINEAR, *(["library"] if BACKEND == "cpu" else []))
# Of the largest magnitude in the array.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


# ---- Inputs, and the answer in float64 ----


def packed(rng, batch, length):
    """Draw segment ids [batch, length]: runs of random length and id, of which one may come back.

    0 is padding.
    """
    segments = np.zeros((batch, length), np.int32)
    for row in segments:
        # Not all may be padding or single tokens: the controls could not fail.
        start = length // 3
        row[:start] = 1
        while start < length:
            end = start + rng.integers(1, length // 2 + 2)
            row[start:end] = rng.integers(0, 4)
            start = end
    return np.roll(segments, rng.integers(length), axis=1)


def visible(batch, length, segments, causal, window):
    """Return [B, T, S]: whether a query sees a key, from the definition."""
    query = np.arange(length)[:, None]
    key = np.arange(length)[None, :]
    seen = np.ones((batch, length, length), bool)
    if causal:
        seen &= key <= query
    if window is not None:
        seen &= query - key < window
    if segments is not None:
        changes = np.diff(segments, axis=1, prepend=-1) != 0
        run = np.cumsum(changes, axis=1)
        seen &= run[:, :, None] == run[:, None, :]
        seen &= (segments > 0)[:, :, None]
    return seen


def exact_head(query, key, value, dout, seen, scale, soft_cap):
    """Return output, dq, dk, dv of one head, all [T, H], from the formulas."""
    scores = scale * query @ key.T
    slope = 1.0
    if soft_cap is not None:
        bent = np.tanh(scores / soft_cap)
        scores = soft_cap * bent
        slope = 1 - bent**2

    # Softmax over what is seen; zeros where that is nothing.
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(1, keepdims=True)
    weights /= np.where(total > 0, total, 1)

    dweights = dout @ value.T
    mean = (weights * dweights).sum(1, keepdims=True)
    dscores = weights * (dweights - mean) * slope * scale
    return weights @ value, dscores @ key, dscores.T @ query, weights.T @ dout


def exact(q, k, v, dout, segments, *, causal=True, window=None, soft_cap=None, scale=None):
    """Return output and gradients of q, k, v for the cotangent `dout`, in float64."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    batch, length, heads, width = q.shape
    seen = visible(batch, length, segments, causal, window)
    group = heads // k.shape[2]
    if scale is None:
        scale = width**-0.5
    out, dq, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
    for b, n in np.ndindex(batch, heads):
        kv = n // group
        arrays = q[b, :, n], k[b, :, kv], v[b, :, kv], dout[b, :, n]
        head = exact_head(*arrays, seen[b], scale, soft_cap)
        out[b, :, n] = head[0]
        dq[b, :, n] = head[1]
        dk[b, :, kv] += head[2]
        dv[b, :, kv] += head[3]
    return out, dq, dk, dv


def drawn(rng, batch, length, heads, kv_heads, width, dtype="float32"):
    """Draw q, k, v and a cotangent of the output."""
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(
    jax.jit, static_argnames=("causal", "window", "soft_cap", "scale", "implementation")
)
def computed(q, k, v, dout, segments, **options):
    """Return output and gradients of the implementation."""

    def run(q, k, v):
        return attention(q, k, v, segment_ids=segments, **options)

    out, pull = jax.vjp(run, q, k, v)
    return (out, *pull(dout))


def assert_close(got, want, dtype):
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert one.dtype == dtype
        error = np.abs(np.asarray(one, np.float64) - other).max() / np.abs(other).max()
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e} of the largest magnitude"


# ---- Equal to float64 ----


# Type, longest sequence, key/value heads, most queries per key, packed, options.
CASES = {
    "window": ("float32", 600, 2, 2, False, {"window": 250, "scale": 0.2}),
    "both ways": (
        "float32",
        400,
        1,
        8,
        True,
        {"causal": False, "window": 40, "soft_cap": 2.0},
    ),
    "bfloat16": ("bfloat16", 600, 1, 3, True, {}),
}


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case, implementation, rng):
    dtype, longest, kv_heads, most, is_packed, options = CASES[case]
    if implementation == "library" and "soft_cap" in options:
        pytest.skip("jax.nn.dot_product_attention has no soft cap")
    length = int(rng.integers(longest * 2 // 3, longest))
    group = int(rng.integers(1, most + 1))
    arrays = drawn(rng, 1, length, kv_heads * group, kv_heads, 64, dtype)
    segments = packed(rng, 1, length) if is_packed else None

    got = computed(*arrays, segments, implementation=implementation, **options)
    assert_close(got, exact(*arrays, segments, **options), dtype)
    if implementation != "reference":
        return

    # Controls: another result without an option, or without the segments.
    controls = [
        ({"causal": not options.get("causal", True)}, segments),
        ({"window": 2}, segments),
        ({"soft_cap": 1.0}, segments),
        ({"scale": 0.5}, segments),
    ]
    if is_packed:
        controls.append(({}, None))
    for changed, ids in controls:
        other = exact(*arrays, ids, **{**options, **changed})
        with pytest.raises(AssertionError):
            assert_close(got, other, dtype)


@pytest.mark.parametrize("implementation", ALL)
def test_rows_that_see_nothing_give_zero_and_finite_gradients(implementation, rng):
    q, k, v, dout = drawn(rng, 2, 40, 4, 2, 64)
    segments = np.repeat([[0, 1, 0, 2, 0], [0] * 5], 8, axis=1)
    pad = (segments == 0)[..., None, None]

    # Huge values at the padding: nothing of them arrives, forwards or backwards.
    huge = [jnp.asarray(np.where(pad, 1e17, x), jnp.float32) for x in (q, k, v)]
    got = computed(q, k, v, dout, segments, implementation=implementation)
    same = computed(*huge, dout, segments, implementation=implementation)
    for one, other in zip(got, same, strict=True):
        assert np.isfinite(one).all()
        assert (np.where(pad, one, 0) == 0).all()
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6 * np.abs(one).max())


@pytest.mark.parametrize("implementation", ALL)
def test_bfloat16_inputs_keep_their_type_and_float32_statistics(implementation):
    # 512 equal keys: weights of 1/512 summed in bfloat16 would stall; v is 1, so the output is 1.
    ones = jnp.ones((1, 512, 2, 64), jnp.bfloat16)
    run = jax.jit(functools.partial(attention, causal=False, implementation=implementation))
    out = run(ones, ones, ones)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=1e-2)


@pytest.mark.parametrize("window", [None, 3])
def test_decoding_one_token_equals_the_last_row_of_self_attention(window, rng):
    q, k, v, _ = drawn(rng, 3, 9, 6, 2, 4)
    left_padding = np.array([[0], [2], [5]])
    valid = (np.arange(9) >= left_padding).astype(np.int32)
    full = attention(q, k, v, segment_ids=valid, window=window)

    # The same in a ring of 13 slots that begins anywhere; four are not written yet.
    turn = int(rng.integers(13))
    stale = rng.normal(size=(2, 3, 4, 2, 4)).astype(np.float32)
    k_ring = np.roll(np.concatenate((k, stale[0]), axis=1), turn, axis=1)
    v_ring = np.roll(np.concatenate((v, stale[1]), axis=1), turn, axis=1)
    decode = jax.jit(functools.partial(decode_attention, window=window))

    def run(valid):
        at = jnp.int32((8 + turn) % 13)
        valid_ring = np.roll(valid, turn, axis=1)
        return decode(q[:, -1:], k_ring.swapaxes(1, 2), v_ring.swapaxes(1, 2), valid_ring, at)

    written = np.pad(valid, ((0, 0), (0, 4)))
    np.testing.assert_allclose(run(written), full[:, -1:], atol=2e-6)

    # Control: a slot too many or too few shows.
    wrong = written.copy()
    wrong[:, 6] ^= 1
    assert np.abs(run(wrong) - full[:, -1:]).max() > 1e-2


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("implementation", ["reference", "xla_chunked"])
def test_padding_hides_infinity_and_nan(implementation, fault, rng):
    q, k, v, dout = drawn(rng, 2, 9, 4, 2, 4)
    real = np.arange(9) >= np.array([[4], [0]])
    run = functools.partial(
        attention, segment_ids=real.astype(np.int32), implementation=implementation
    )
    faulty = [np.where(real[:, :, None, None], x, np.float32(fault)) for x in (q, k, v)]
    want, want_pull = jax.vjp(run, q, k, v)
    got, pull = jax.vjp(run, *faulty)
    np.testing.assert_array_equal(got, want)
    for ours, plain in zip(pull(dout), want_pull(dout), strict=True):
        np.testing.assert_array_equal(ours, plain)
    # Control: where it is seen, it shows.
    seen = functools.partial(attention, implementation=implementation)
    assert not np.isfinite(seen(*faulty)).all()


# ---- On a mesh ----


# Tensor axis, query heads, key/value heads, rows; over the eight simulated devices.
MESHES = {
    "heads split": (2, 4, 2, 4),
    "key heads replicated": (4, 8, 2, 4),
    "one key head": (2, 2, 1, 4),
    "heads that do not split": (4, 6, 3, 2),
    "rows that do not split": (2, 4, 2, 3),
}


@pytest.mark.parametrize(
    ("implementation", "mesh"),
    [*(("xla_chunked", mesh) for mesh in MESHES), ("pallas_tpu", "heads split")],
)
def test_sharded_equals_float64(implementation, mesh, rng):
    tensor, heads, kv_heads, rows = MESHES[mesh]
    arrays = drawn(rng, rows, 50, heads, kv_heads, 64)
    segments = packed(rng, rows, 50)
    made = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=tensor))
    assert made.size == 8
    got = computed(*arrays, segments, implementation=implementation)
    assert_close(got, exact(*arrays, segments), "float32")
    if mesh != "heads split":
        return

    # Each device has its rows and heads only, and no others travel.
    sharding = NamedSharding(made, P(BATCH[0], None, "tensor"))
    q, k, v, _ = (jax.device_put(x, sharding) for x in arrays)
    run = jax.jit(functools.partial(attention, implementation=implementation))
    assert run(q, k, v).sharding.is_equivalent_to(sharding, 4)
    text = run.lower(q, k, v).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" not in text


# ---- Memory ----


def described(length):
    """Return shapes of the arguments of `computed`."""
    shapes = [jax.ShapeDtypeStruct((1, length, n, 64), jnp.float32) for n in (2, 1, 1, 2)]
    return *shapes, jax.ShapeDtypeStruct((1, length), jnp.int32)


def temporaries(implementation, length):
    """Return bytes of temporaries of one forward and backward pass."""
    compiled = computed.lower(*described(length), implementation=implementation).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_temporaries_grow_linearly_and_those_of_the_reference_quadratically():
    linear = [temporaries("xla_chunked", length) for length in (4096, 8192)]
    quadratic = [temporaries("reference", length) for length in (4096, 8192)]
    assert linear[1] < 2.2 * linear[0]
    assert quadratic[1] > 3.5 * quadratic[0]
    assert linear[1] < quadratic[1] / 8


@pytest.mark.parametrize("implementation", ALL)
def test_no_matrix_of_scores_is_made(implementation):
    traced = computed.trace(*described(8192), implementation=implementation)
    sizes = []
    for shape in re.findall(r"\w\[([\d,]+)\]", str(traced.jaxpr)):
        sizes.append(math.prod(map(int, shape.split(","))))
    makes_no_matrix = max(sizes) < 8192**2 / 8
    assert makes_no_matrix == (implementation in LINEAR)


@pytest.mark.parametrize("implementation", LINEAR)
def test_only_inputs_output_and_log_sum_exp_are_saved_for_the_derivative(implementation, rng):
    q, k, v, _ = drawn(rng, 2, 64, 4, 2, 64)
    segments = packed(rng, 2, 64)

    def saved(q, k, v):
        run = functools.partial(attention, segment_ids=segments, implementation=implementation)
        return jax.vjp(run, q, k, v)[1]

    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(saved, q, k, v))]
    ranges = [(2, 64)] * 4
    log_sum_exp = (2, 4, 64)
    assert sorted(shapes) == sorted([q.shape, k.shape, v.shape, q.shape, log_sum_exp, *ranges])


# ---- What `auto` is, and what is refused ----


def test_auto_is_a_table():
    assert chosen("cpu", 64, 32, 4) == chosen("tpu", 100, 128, 2) == "reference"
    assert chosen("cpu", 257, 32, 4) == "xla_chunked"
    assert chosen("tpu", 32768, 128, 2) == "pallas_tpu"
    assert chosen("tpu", 2048, 80, 2) == chosen("tpu", 10**6, 128, 2) == "xla_chunked"
    assert {line.implementation for line in AUTO} <= {"reference", *BACKENDS}


@pytest.mark.parametrize("length", [64, 65])
def test_auto_makes_the_program_of_the_implementation_that_it_chooses(length):
    auto = computed.trace(*described(length), implementation="auto")
    named = computed.trace(*described(length), implementation=chosen(BACKEND, length, 64, 4))
    assert str(auto.jaxpr) == str(named.jaxpr)


@pytest.mark.parametrize(
    ("implementation", "length", "width", "words"),
    [
        ("flash", 16, 64, "choose one of auto, reference, xla_chunked"),
        ("pallas_gpu", 16, 80, "head width 80"),
        ("pallas_hopper", 16, 80, "Hopper GPUs only|head widths"),
        ("pallas_tpu", 2**16, 256, "at most"),
    ],
)
def test_what_an_implementation_does_not_serve_is_one_line(implementation, length, width, words):
    shapes = [jax.ShapeDtypeStruct((1, length, 1, width), jnp.bfloat16)] * 3
    run = functools.partial(attention, implementation=implementation)
    with pytest.raises(UserError, match=words):
        jax.eval_shape(run, *shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", flash.WIDTHS)
def test_lowers_for_cuda_without_a_gpu(width, dtype):
    shapes = [jax.ShapeDtypeStruct((2, 1024, n, width), dtype) for n in (6, 2, 2, 6)]
    segments = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    options = {"implementation": "pallas_gpu", "window": 256, "soft_cap": 30.0}
    h200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=h200)):
        traced = computed.trace(*shapes, segments, **options)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("forward", "dq", "dkv"):
        assert f"flash_{name}" in text
