"""Accelerators that need not be here: what each can do at most, and devices of a topology to compile for."""

import contextlib
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from runtime.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """What a chip can do at most."""

    memory: float
    """Bytes that programs may use."""
    flops: float
    """Bfloat16 a second."""
    bandwidth: float
    """Of its memory, bytes a second."""
    links: float
    """Bytes a second that it can receive over all its links together."""


H200 = (pathlib.Path(__file__).parent / "h200.txtpb").read_text()
"""What XLA's compiler must know of the chip (openxla/xla, Apache-2.0)."""


def described(name: str) -> float:
    """A number of H200's description."""
    return float(re.search(rf"{name}: (\d+)", H200)[1])


# `memory`: what libtpu 0.0.42 names as available when a program is too large. The rest: Google Cloud's pages "TPU v5e",
# "TPU v5p" and "TPU v6e"; their bidirectional bandwidth between chips, halved. A mesh axis along one dimension of the
# torus (of 2, 3, 2) has that dimension's part alone: the time by it is a bound. H200: of the memory that XLA
# describes the three quarters that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION is larger; from NVIDIA's data sheet
# dense bfloat16 and half of NVLink's 900 GB/s.
CHIPS = {
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 400e9 / 2),
    "v5p": Chip(95.74 * GIB, 459e12, 2765e9, 1200e9 / 2),
    "v6e": Chip(31.25 * GIB, 918e12, 1638e9, 800e9 / 2),
    "h200": Chip(
        0.75 * described("device_memory_size"), 989e12, described("memory_bandwidth"), 900e9 / 2
    ),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing on stderr: libtpu looks for a TPU's host there, and says that it finds none."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def simulated(count: int) -> list[Any]:
    """`count` devices of the CPU; raises UserError where JAX runs already and has fewer."""
    with contextlib.suppress(RuntimeError):  # JAX runs already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError("the CUDA compiler is not installed; pip install -r requirements-gpu.txt")
    return devices[:count]


def devices_of(topology: str) -> list[Any]:
    """Devices that can be compiled for and nothing else; raises UserError."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"--topology={topology}: unknown chip; {', '.join(CHIPS)}, as in v5e:16x16 or h200:8"
        )
    if kind == "h200":
        if not shape.isdecimal() or int(shape) < 1:
            raise UserError(
                f"--topology={topology}: the number of GPUs of a machine, as in h200:8"
            )
        if importlib.util.find_spec("jax_cuda13_plugin") is None:
            return simulated(int(shape))
        with quiet():
            gpus = {"target_config": H200, "topology": f"1x1x{int(shape)}"}
            return list(topologies.get_topology_desc(platform="cuda", **gpus).devices)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed; pip install -r requirements-tpu.txt")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    try:
        with quiet():
            return list(
                topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
            )
    except (ValueError, RuntimeError) as fault:
        raise UserError(
            f"--topology={topology}: {str(fault).splitlines()[0]}; as in v5e:16x16, v5p:8x8x8"
        ) from None
