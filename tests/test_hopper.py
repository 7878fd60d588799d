"""The Hopper kernels against float64: on a GPU as they are, elsewhere in JAX's interpreter.

The interpreter of Mosaic GPU runs every warpgroup as a thread and has its barriers, bulk copies
and shared memory, so that a wrong index, mask or order shows, and a barrier that nobody completes
hangs. It knows no products with a factor in registers and, at JAX 0.10, no layouts; `in_python`
says in terms that it knows what those mean. What it cannot show: a sum read while a product still
adds to it (tests/test_compile.py sees that ptxas has no wait to insert), and rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import params, shared_memory
from jax._src.state.primitives import ref_set
from jax.experimental import pallas as pl  # noqa: F401  (mosaic_gpu needs it)
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_attention import assert_close, drawn, exact, packed

from kernels import hopper
from kernels.attention import attention

ON_GPU = jax.default_backend() == "gpu"
pytestmark = pytest.mark.skipif(
    ON_GPU and jax.devices()[0].compute_capability != "9.0", reason="not a Hopper GPU"
)
JAX_10 = jax.__version_info__ < (0, 11)


def matrix(x):
    """Return the value of a factor: registers, shared memory, or shared memory transposed."""
    if isinstance(x, jax.Array):
        return x
    if type(x.transforms[-1]).__name__ == "TransposeTransform":
        return type(x)(x.ref, x.transforms[:-1])[...].T
    return x[...]


def in_python(patch):
    """Replace what the interpreter does not know by what it means."""

    def wgmma(total, a, b):
        product = jnp.dot(matrix(a), matrix(b), preferred_element_type=jnp.float32)
        # Products read as copies do; ordered among themselves without this.
        plgpu.commit_smem()
        ref_set(total, (), plgpu.wgmma_accumulator_load(total) + product)

    def store_sum(ref, value):
        return ref_set(ref, (), value)

    def load(ref, at, **_):
        value = ref[at] if at else ref[...]
        # The barrier that frees the slot is held to be enough (CUTLASS does), but not here.
        plgpu.commit_smem()
        return value

    def layout_cast(x, _):
        return x

    def broadcasted_iota(dtype, shape, axis, **_):
        return jax.lax.broadcasted_iota(dtype, shape, axis)

    patch.setattr(plgpu, "wgmma", wgmma)
    patch.setattr(primitives, "wgmma_accumulator_store", store_sum)
    patch.setattr(plgpu, "load", load)
    patch.setattr(plgpu, "layout_cast", layout_cast)
    patch.setattr(plgpu, "broadcasted_iota", broadcasted_iota)
    patch.setattr("kernels.attention.platform", lambda: "gpu")


def results(arrays, segments, patch, races=False, **options):
    """Return output and gradients, through the public function."""
    q, k, v, dout = arrays
    run = functools.partial(
        attention, segment_ids=segments, implementation="pallas_hopper", **options
    )
    if ON_GPU:
        out, pull = jax.vjp(jax.jit(run), q, k, v)
        return out, *pull(dout)
    in_python(patch)
    with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=races)):
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(dout)


def test_equals_float64(rng, monkeypatch):
    """One program each of two heads that share a key head; two segments and some padding."""
    arrays = drawn(rng, 1, 128, 2, 1, 64, "bfloat16")
    segments = np.repeat([[1, 0, 2]], [50, 18, 60], axis=1)
    got = results(arrays, segments, monkeypatch)
    assert_close(got, exact(*arrays, segments), "bfloat16")

    # Controls: another result with another mask, or without the segments.
    for changed, ids in (({"causal": False}, segments), ({"window": 2}, segments), ({}, None)):
        other = exact(*arrays, ids, **changed)
        with pytest.raises(AssertionError):
            assert_close(got, other, "bfloat16")


# Tokens, query heads, key/value heads, width, packed, options.
CASES = {
    "width 64, both ways": (300, 2, 1, 64, True, {"causal": False, "window": 40}),
    # More tiles than slots of any ring.
    "width 128": (300, 1, 1, 128, False, {"causal": False}),
    "width 256": (300, 1, 1, 256, True, {}),
    "capped": (200, 3, 1, 128, False, {"soft_cap": 2.0, "scale": 0.3, "window": 150}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_cases_equal_float64(case, rng, monkeypatch):
    length, heads, kv_heads, width, is_packed, options = CASES[case]
    batch = 2 if width == 64 else 1
    arrays = drawn(rng, batch, length, heads, kv_heads, width, "bfloat16")
    segments = packed(rng, batch, length) if is_packed else None
    got = results(arrays, segments, monkeypatch, **options)
    assert_close(got, exact(*arrays, segments, **options), "bfloat16")


@pytest.mark.slow
@pytest.mark.skipif(JAX_10, reason="JAX 0.10's interpreter sees races in part only")
@pytest.mark.skipif(ON_GPU, reason="the interpreter looks for races")
@pytest.mark.parametrize("width", [128, 256])
def test_nothing_is_read_before_it_is_written_or_written_while_it_is_read(
    width, rng, monkeypatch, capfd
):
    arrays = drawn(rng, 1, 300, 1, 1, width, "bfloat16")

    def races():
        capfd.readouterr()
        results(arrays, None, monkeypatch, races=True)
        blocks = capfd.readouterr().out.split("RACE DETECTED")[1:]
        # Registers of one program and of the next have the same name here, but are not the same.
        registers = f"memory_space_id={shared_memory.get_memory_space_idx(plgpu.REGS)},"
        return [block for block in blocks if registers not in block]

    assert not races()

    # Control: in the forward kernel consumers say that they are through with a slot before they
    # have read it.
    take = hopper.take
    leave = hopper.leave

    def take_and_leave(*at):
        tiles = take(*at)
        leave(*at)
        return tiles

    monkeypatch.setattr(hopper, "take", take_and_leave)
    monkeypatch.setattr(hopper, "leave", lambda *_: None)
    assert races()


@pytest.mark.skipif(not ON_GPU, reason="the order of additions is the GPU's")
def test_repeats_bit_for_bit(rng, monkeypatch):
    arrays = drawn(rng, 2, 2048, 8, 2, 128, "bfloat16")
    for one, other in zip(*(results(arrays, None, monkeypatch) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
