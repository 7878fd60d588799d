"""The attention kernels through the real compilers of chips that are not here: libtpu's, and XLA's for an H200.

They need `pip install -r requirements-tpu.txt`, or the CUDA plugin and its ptxas; without them they are skipped.
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
from planning.chips import H200
from sharding import BATCH

HEADS = P(BATCH[0], None, "tensor", None)


def installed(*modules):
    return all(importlib.util.find_spec(module) for module in modules)


needs_tpu = pytest.mark.skipif(not installed("libtpu"), reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(
    not installed("jax_cuda13_plugin"), reason="jax_cuda13_plugin is not installed"
)


def set_mesh(devices, data, fsdp, tensor):
    """A mesh of devices that can be compiled for and nothing else, set as the current one."""
    axes = ("data", "fsdp", "tensor")
    mesh = Mesh(
        np.array(devices).reshape(data, fsdp, tensor), axes, axis_types=(AxisType.Auto,) * 3
    )
    jax.set_mesh(mesh)
    return mesh


def tpus(topology):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compiled(mesh, length, width, dtype, batch=1, heads=2, kv_heads=1, **options):
    """Forward and backward pass of attention, compiled for the mesh."""
    sharding = NamedSharding(mesh, HEADS)
    kv_sharding = NamedSharding(mesh, HEADS if kv_heads % mesh.shape["tensor"] == 0 else BATCH)
    q, kv = (
        jax.ShapeDtypeStruct((batch, length, n, width), dtype, sharding=s)
        for n, s in ((heads, sharding), (kv_heads, kv_sharding))
    )
    segments = jax.ShapeDtypeStruct((batch, length), np.int32, sharding=NamedSharding(mesh, BATCH))

    def both(q, k, v, dout, segments):
        out, pull = jax.vjp(functools.partial(attention, segment_ids=segments, **options), q, k, v)
        return (out, *pull(dout))

    return jax.jit(both).trace(q, kv, kv, q, segments).lower().compile()


def check(result, length, custom_call):
    text = result.as_text()
    assert text.count(f'custom_call_target="{custom_call}"') >= 3  # forward, dQ, dK and dV
    # Less than a matrix of scores of one head would take; for short lengths that says nothing.
    assert length < 4096 or result.memory_analysis().temp_size_in_bytes < length * length * 4


HOPPER = tuple(itertools.product((64, 128, 256), (None, 30.0)))
CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


@needs_tpu
def test_auto_compiles_for_a_tpu_mesh_with_replicated_key_heads():
    mesh = set_mesh(tpus("v5e:2x2"), 1, 2, 2)
    result = compiled(mesh, 1024, 128, "bfloat16", batch=2, heads=4, kv_heads=1)
    check(result, 1024, "tpu_custom_call")
    assert "all-gather" not in result.as_text()


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("length", [512, 2048, 8192, 32768])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_tpus(chip, width, length):
    mesh = set_mesh(tpus(chip)[:1], 1, 1, 1)
    check(compiled(mesh, length, width, "bfloat16", window=length // 2), length, "tpu_custom_call")


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_tpus_in_float32_with_a_soft_cap(chip, width):
    mesh = set_mesh(tpus(chip)[:1], 1, 1, 1)
    check(compiled(mesh, 2048, width, "float32", soft_cap=30.0), 2048, "tpu_custom_call")


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
    # Optimised, unlike all else that tests compile; and beside this process, which may have libtpu loaded itself.
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
        cycles = products * queries * keys * 128 / (4 * 128 * 128)  # four matrix units
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
    described = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = set_mesh(described.devices[:1], 1, 1, 1)
    result = compiled(
        mesh, 2048, width, dtype, window=1024, soft_cap=30.0, implementation="pallas_gpu"
    )
    check(result, 2048, "__gpu$xla.gpu.triton")


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
    monkeypatch.setenv(
        "MOSAIC_GPU_DUMP_PTXAS", "1"
    )  # ptxas -v and its warnings, on stderr or stdout
    described = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = set_mesh(described.devices[:1], 1, 1, 1)
    options = {"window": 1024, "soft_cap": soft_cap, "implementation": "pallas_hopper"}
    result = compiled(mesh, 2048, width, "bfloat16", heads=4, kv_heads=2, **options)
    check(result, 2048, "mosaic_gpu_v2")
    said = "".join(capfd.readouterr())
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said
    )
    assert (
        len(re.findall("Compiling entry function 'hopper_(forward|dq|dkv)", said))
        == len(spills)
        == 3
    )
    assert set(spills) == {("0", "0", "0")}, said
    # C7510 and others: products that wait for one another. C7517: a sum that the kernel reads without waiting for it.
    assert "serialized" not in said and "C7517" not in said, said
