"""Every implementation of attention against float64 numpy, on inputs that no run has seen before.

A failing test prints its seed; `SEED=<n> pytest tests/test_attention.py` repeats it.
"""

import functools
import math
import os
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

# Memory linear in the length. On a CPU the Pallas kernels are interpreted; elsewhere each runs where it belongs.
BACKEND = jax.default_backend()
LINEAR = (
    "xla_chunked",
    *(f"pallas_{name}" for name in ("tpu", "gpu") if BACKEND in ("cpu", name)),
)
ALL = ("reference", *LINEAR, *(["library"] if BACKEND == "cpu" else []))  # cuDNN takes no float32
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # of the largest magnitude in the array


@pytest.fixture
def rng():
    seed = int(os.environ.get("SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"SEED={seed}")
    return np.random.default_rng(seed)


def packed(rng, batch, length):
    """Segment ids [batch, length] of runs of random length and id; 0 is padding, and an id may come back."""
    segments = np.zeros((batch, length), np.int32)
    for row in segments:
        row[: length // 3] = (
            1  # not all may be padding or single tokens: the controls could not fail
        )
        at = length // 3
        while at < length:
            end = at + rng.integers(1, length // 2 + 2)
            row[at:end] = rng.integers(0, 4)
            at = end
    return np.roll(segments, rng.integers(length), axis=1)


def visible(batch, length, segments, causal, window):
    """[B, T, S]: whether a query sees a key, from the definition."""
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    seen = np.ones((batch, length, length), bool)
    if causal:
        seen &= key <= query
    if window is not None:
        seen &= query - key < window
    if segments is not None:
        run = np.cumsum(np.diff(segments, axis=1, prepend=-1) != 0, axis=1)
        seen &= (run[:, :, None] == run[:, None, :]) & (segments > 0)[:, :, None]
    return seen


def exact(q, k, v, dout, segments, *, causal=True, window=None, soft_cap=None, scale=None):
    """Output and gradients of q, k, v for the cotangent `dout`, in float64, from the formulas."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    seen = visible(*q.shape[:2], segments, causal, window)
    scale, group = q.shape[-1] ** -0.5 if scale is None else scale, q.shape[2] // k.shape[2]
    out, dq, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        query, key, value, do = q[b, :, n], k[b, :, n // group], v[b, :, n // group], dout[b, :, n]
        scores, slope = scale * query @ key.T, 1.0
        if soft_cap is not None:
            bent = np.tanh(scores / soft_cap)
            scores, slope = soft_cap * bent, 1 - bent**2
        scores = np.where(seen[b], scores, -np.inf)
        top = scores.max(1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
        total = weights.sum(1, keepdims=True)
        weights /= np.where(total > 0, total, 1)
        out[b, :, n] = weights @ value
        dweights = do @ value.T
        dscores = weights * (dweights - (weights * dweights).sum(1, keepdims=True)) * slope * scale
        dq[b, :, n] = dscores @ key
        dk[b, :, n // group] += dscores.T @ query
        dv[b, :, n // group] += weights.T @ do
    return out, dq, dk, dv


def drawn(rng, batch, length, heads, kv_heads, width, dtype="float32"):
    """q, k, v and a cotangent of the output."""
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(
    jax.jit, static_argnames=("causal", "window", "soft_cap", "scale", "implementation")
)
def computed(q, k, v, dout, segments, **options):
    """Output and gradients of the implementation."""
    out, pull = jax.vjp(lambda *x: attention(*x, segment_ids=segments, **options), q, k, v)
    return (out, *pull(dout))


def assert_close(got, want, dtype):
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert one.dtype == dtype
        error = np.abs(np.asarray(one, np.float64) - other).max() / np.abs(other).max()
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e} of the largest magnitude"


CASES = {  # type, rows, longest sequence, key/value heads, most queries per key, options
    "window": ("float32", 1, 600, 2, 2, {"window": 250, "scale": 0.2}),
    "both ways": (
        "float32",
        1,
        400,
        1,
        8,
        {"packed": True, "causal": False, "window": 40, "soft_cap": 2.0},
    ),
    "bfloat16": ("bfloat16", 1, 600, 1, 3, {"packed": True}),
}


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case, implementation, rng):
    dtype, batch, longest, kv_heads, most, options = CASES[case]
    options = dict(options)
    if implementation == "library" and "soft_cap" in options:
        pytest.skip("jax.nn.dot_product_attention has no soft cap")
    length, group = int(rng.integers(longest * 2 // 3, longest)), int(rng.integers(1, most + 1))
    arrays = drawn(rng, batch, length, kv_heads * group, kv_heads, 64, dtype)
    segments = packed(rng, batch, length) if options.pop("packed", False) else None
    got = computed(*arrays, segments, implementation=implementation, **options)
    assert_close(got, exact(*arrays, segments, **options), dtype)
    if implementation != "reference":
        return
    controls = [
        {"causal": not options.get("causal", True)},
        {"window": 2},
        {"soft_cap": 1.0},
        {"scale": 0.5},
    ]
    for changed, ids in [
        *((control, segments) for control in controls),
        *([({}, None)] if segments is not None else []),
    ]:
        with pytest.raises(
            AssertionError
        ):  # another result without the option, or without the segments
            assert_close(got, exact(*arrays, ids, **{**options, **changed}), dtype)


@pytest.mark.parametrize("implementation", ALL)
def test_rows_that_see_nothing_give_zero_and_finite_gradients(implementation, rng):
    arrays = drawn(rng, 2, 40, 4, 2, 64)
    segments = np.repeat([[0, 1, 0, 2, 0], [0] * 5], 8, axis=1)
    pad = (segments == 0)[..., None, None]
    # Huge values at the padding: nothing of them arrives, forwards or backwards.
    huge = [jnp.asarray(np.where(pad, 1e17, x), jnp.float32) for x in arrays[:3]]
    got, same = (
        computed(*x, arrays[3], segments, implementation=implementation)
        for x in (arrays[:3], huge)
    )
    for one, other in zip(got, same, strict=True):
        assert (
            np.isfinite(one).all() and (np.where(pad, one, 0) == 0).all() and np.abs(one).max() > 0
        )
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6 * np.abs(one).max())


@pytest.mark.parametrize("implementation", ALL)
def test_bfloat16_inputs_keep_their_type_and_float32_statistics(implementation):
    # 512 equal keys: weights of 1/512 summed in bfloat16 would stall; v is 1, so the output is 1.
    ones = jnp.ones((1, 512, 2, 64), jnp.bfloat16)
    out = jax.jit(functools.partial(attention, causal=False, implementation=implementation))(
        ones, ones, ones
    )
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=1e-2)


@pytest.mark.parametrize("window", [None, 3])
def test_decoding_one_token_equals_the_last_row_of_self_attention(window, rng):
    q, k, v, _ = drawn(rng, 3, 9, 6, 2, 4)
    valid = (np.arange(9) >= np.array([[0], [2], [5]])).astype(np.int32)  # left padding
    full = attention(q, k, v, segment_ids=valid, window=window)
    stale = rng.normal(size=(2, 3, 4, 2, 4)).astype(np.float32)  # slots not written yet
    # As a ring of 13 slots that begins anywhere, keys and values as [B, K, S, H].
    turn = int(rng.integers(13))
    ring = lambda x: np.roll(x, turn, axis=1)
    k2, v2 = (
        ring(np.concatenate(pair, axis=1)).swapaxes(1, 2)
        for pair in ((k, stale[0]), (v, stale[1]))
    )
    decode = jax.jit(functools.partial(decode_attention, window=window))
    run = lambda valid: decode(q[:, -1:], k2, v2, ring(valid), jnp.int32((8 + turn) % 13))
    np.testing.assert_allclose(run(np.pad(valid, ((0, 0), (0, 4)))), full[:, -1:], atol=2e-6)
    wrong = np.pad(valid, ((0, 0), (0, 4)))
    wrong[:, 6] ^= 1  # control: a slot too many or too few shows
    assert np.abs(run(wrong) - full[:, -1:]).max() > 1e-2


MESHES = {  # tensor axis, query heads, key/value heads, rows; over the eight simulated devices
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
    arrays, segments = drawn(rng, rows, 50, heads, kv_heads, 64), packed(rng, rows, 50)
    made = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=tensor))
    assert made.size == 8
    got = computed(*arrays, segments, implementation=implementation)
    assert_close(got, exact(*arrays, segments), "float32")
    if mesh == "heads split":  # each device has its rows and heads only, and no others travel
        sharding = NamedSharding(made, P(BATCH[0], None, "tensor"))
        placed = [jax.device_put(x, sharding) for x in arrays]
        run = jax.jit(functools.partial(attention, implementation=implementation))
        assert run(*placed[:3]).sharding.is_equivalent_to(sharding, 4)
        text = run.lower(*placed[:3]).compile().as_text()
        assert "all-gather" not in text and "all-reduce" not in text


def described(length):
    """Shapes of the arguments of `computed`."""
    shapes = [jax.ShapeDtypeStruct((1, length, n, 64), jnp.float32) for n in (2, 1, 1, 2)]
    return *shapes, jax.ShapeDtypeStruct((1, length), jnp.int32)


def temporaries(implementation, length):
    """Bytes of temporaries of one forward and backward pass."""
    compiled = computed.lower(*described(length), implementation=implementation).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_temporaries_grow_linearly_and_those_of_the_reference_quadratically():
    short, long = (temporaries("xla_chunked", length) for length in (4096, 8192))
    quadratic_short, quadratic_long = (temporaries("reference", length) for length in (4096, 8192))
    assert (
        long < 2.2 * short and quadratic_long > 3.5 * quadratic_short and long < quadratic_long / 8
    )


@pytest.mark.parametrize("implementation", ALL)
def test_no_matrix_of_scores_is_made(implementation):
    traced = computed.trace(*described(8192), implementation=implementation)
    sizes = [
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"\w\[([\d,]+)\]", str(traced.jaxpr))
    ]
    assert (max(sizes) < 8192**2 / 8) == (implementation in LINEAR)


@pytest.mark.parametrize("implementation", LINEAR)
def test_only_inputs_output_and_log_sum_exp_are_saved_for_the_derivative(implementation, rng):
    (q, k, v, _), segments = drawn(rng, 2, 64, 4, 2, 64), packed(rng, 2, 64)
    run = lambda *x: attention(*x, segment_ids=segments, implementation=implementation)
    saved = sorted(
        x.shape for x in jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(run, *x)[1], q, k, v))
    )
    ranges, log_sum_exp = [(2, 64)] * 4, (2, 4, 64)
    assert saved == sorted([q.shape, k.shape, v.shape, q.shape, log_sum_exp, *ranges])


def test_auto_is_a_table():
    assert chosen("cpu", 64, 32, 4) == chosen("tpu", 100, 128, 2) == "reference"
    assert chosen("cpu", 257, 32, 4) == "xla_chunked"
    assert chosen("tpu", 32768, 128, 2) == "pallas_tpu"
    assert chosen("tpu", 2048, 80, 2) == "xla_chunked" == chosen("tpu", 10**6, 128, 2)
    assert {line.implementation for line in AUTO} <= {"reference", *BACKENDS}
    for length in (64, 65):
        auto, named = (
            str(computed.trace(*described(length), implementation=name).jaxpr)
            for name in ("auto", chosen(BACKEND, length, 64, 4))
        )
        assert auto == named


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
    with pytest.raises(UserError, match=words):
        jax.eval_shape(functools.partial(attention, implementation=implementation), *shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", flash.WIDTHS)
def test_lowers_for_cuda_without_a_gpu(width, dtype):
    shapes = [jax.ShapeDtypeStruct((2, 1024, n, width), dtype) for n in (6, 2, 2, 6)]
    segments = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    h200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=h200)):
        traced = computed.trace(
            *shapes, segments, implementation="pallas_gpu", window=256, soft_cap=30.0
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"flash_{name}" in text for name in ("forward", "dq", "dkv"))
