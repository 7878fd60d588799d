"""The attention kernels through compilers for chips that are not here: libtpu's, and XLA's CUDA.

They need `pip install -r requirements-tpu.txt`, or the CUDA plugin and its ptxas; without them
they are skipped.
"""

import functools
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.attention import attention
from planning.gpus import GPUS, describe_gpu
from sharding import BATCH

HEADS = P(BATCH[0], None, "tensor", None)
# Forward; dQ; dK and dV.
KERNELS = 3


def installed(*modules):
    return all(importlib.util.find_spec(module) for module in modules)


needs_tpu = pytest.mark.skipif(not installed("libtpu"), reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(
    not installed("jax_cuda13_plugin"), reason="jax_cuda13_plugin is not installed"
)


def set_mesh(devices, data, fsdp, tensor):
    """Return a mesh of devices that can only be compiled for; it becomes the current one."""
    axes = ("data", "fsdp", "tensor")
    shaped = np.array(devices).reshape(data, fsdp, tensor)
    mesh = Mesh(shaped, axes, axis_types=(AxisType.Auto,) * 3)
    jax.set_mesh(mesh)
    return mesh


def tpus(topology):
    """Return the devices of a TPU topology, to compile for."""
    # There is no metadata server to ask.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def h200():
    """Return a mesh of one H200, to compile for."""
    h200 = describe_gpu(GPUS["h200"])
    described = topologies.get_topology_desc(platform="cuda", target_config=h200, topology="1x1x1")
    return set_mesh(described.devices[:1], 1, 1, 1)


def compiled(mesh, length, width, dtype, batch=1, heads=2, kv_heads=1, **options):
    """Return the forward and backward pass of attention, compiled for the mesh."""
    sharding = NamedSharding(mesh, HEADS)
    kv_sharding = NamedSharding(mesh, HEADS if kv_heads % mesh.shape["tensor"] == 0 else BATCH)
    q_shape = (batch, length, heads, width)
    kv_shape = (batch, length, kv_heads, width)
    q = jax.ShapeDtypeStruct(q_shape, dtype, sharding=sharding)
    kv = jax.ShapeDtypeStruct(kv_shape, dtype, sharding=kv_sharding)
    segments = jax.ShapeDtypeStruct((batch, length), np.int32, sharding=NamedSharding(mesh, BATCH))

    def both(q, k, v, dout, segments):
        run = functools.partial(attention, segment_ids=segments, **options)
        out, pull = jax.vjp(run, q, k, v)
        return (out, *pull(dout))

    return jax.jit(both).trace(q, kv, kv, q, segments).lower().compile()


def kernels_in(result, custom_call):
    """Return how many kernels the compiled program calls."""
    return result.as_text().count(f'custom_call_target="{custom_call}"')


def makes_no_scores(result, length):
    """Return whether temporaries are less than a matrix of scores of one head.

    For short lengths that says nothing, and it is True.
    """
    return length < 4096 or result.memory_analysis().temp_size_in_bytes < length * length * 4


HOPPER = tuple(itertools.product((64, 128, 256), (None, 30.0)))
CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


@needs_tpu
def test_auto_compiles_for_a_tpu_mesh_with_replicated_key_heads():
    mesh = set_mesh(tpus("v5e:2x2"), 1, 2, 2)
    result = compiled(mesh, 1024, 128, "bfloat16", batch=2, heads=4, kv_heads=1)
    assert kernels_in(result, "tpu_custom_call") >= KERNELS
    assert "all-gather" not in result.as_text()


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("length", [512, 2048, 8192, 32768])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_tpus(chip, width, length):
    mesh = set_mesh(tpus(chip)[:1], 1, 1, 1)
    result = compiled(mesh, length, width, "bfloat16", window=length // 2)
    assert kernels_in(result, "tpu_custom_call") >= KERNELS
    assert makes_no_scores(result, length)


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_tpus_in_float32_with_a_soft_cap(chip, width):
    mesh = set_mesh(tpus(chip)[:1], 1, 1, 1)
    result = compiled(mesh, 2048, width, "float32", soft_cap=30.0)
    assert kernels_in(result, "tpu_custom_call") >= KERNELS


@needs_tpu
@pytest.mark.slow
def test_the_inner_loops_keep_the_matrix_units_of_a_v5e_busy(tmp_path):
    # In a process of its own: libtpu reads once, as it is loaded, where its listings go.
    command = [
        sys.executable,
        "-m",
        "benchmarks.tpu_schedule",
        "--widths",
        "128",
        f"--out={tmp_path}",
    ]
    # Optimised, unlike all else that tests compile; and beside this process, which may have libtpu
    # loaded itself.
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    subprocess.run(
        command, cwd=pathlib.Path(__file__).parents[1], env=environment, check=True, timeout=300
    )
    rows = json.loads((tmp_path / "tpu_schedule.json").read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["forward", "dq", "dkv"]
    for row in rows:
        queries, keys = row["tile"]
        products = {"forward": 2, "dq": 3, "dkv": 4}[row["kernel"]]
        # A v5e has four matrix units.
        cycles = products * queries * keys * 128 / (4 * 128 * 128)
        assert row["bundles"] <= 1.15 * cycles, row


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["library", "xla_chunked"])
def test_the_alternatives_compile_for_tpus(implementation):
    mesh = set_mesh(tpus("v5e:2x2"), 1, 2, 2)
    compiled(
        mesh, 2048, 128, "bfloat16", batch=2, heads=4, kv_heads=2, implementation=implementation
    )


@needs_cuda
@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (128, "bfloat16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product((64, 128, 256), ("bfloat16", "float32"))
            if case != (128, "bfloat16")
        ),
    ],
)
def test_compiles_for_an_h200(width, dtype):
    mesh = h200()
    result = compiled(
        mesh, 2048, width, dtype, window=1024, soft_cap=30.0, implementation="pallas_gpu"
    )
    assert kernels_in(result, "__gpu$xla.gpu.triton") >= KERNELS


@needs_cuda
@pytest.mark.parametrize(
    ("width", "soft_cap"),
    [
        (128, None),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in HOPPER if case != (128, None)),
    ],
)
def test_hopper_kernels_spill_nothing_and_serialise_no_product(
    width, soft_cap, monkeypatch, capfd
):
    # ptxas -v and its warnings, on stderr or stdout.
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    mesh = h200()
    options = {"window": 1024, "soft_cap": soft_cap, "implementation": "pallas_hopper"}
    result = compiled(mesh, 2048, width, "bfloat16", heads=4, kv_heads=2, **options)
    assert kernels_in(result, "mosaic_gpu_v2") >= KERNELS
    said = "".join(capfd.readouterr())
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said
    )
    entries = re.findall("Compiling entry function 'hopper_(forward|dq|dkv)", said)
    assert len(entries) == KERNELS
    assert len(spills) == KERNELS
    assert set(spills) == {("0", "0", "0")}, said
    # C7510 and others: products that wait for one another.
    assert "serialized" not in said, said
    # A sum that the kernel reads without waiting for it.
    assert "C7517" not in said, said
