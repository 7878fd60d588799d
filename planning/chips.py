"""Accelerators that need not be here: what each can do at most, and devices to compile for."""

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from planning.gpus import GPUS, Gpu, describe_gpu
from runtime.errors import UserError

GIB = 2**30


class Latency(NamedTuple):
    """What a collective takes however little it sends."""

    start: float
    """Seconds before anything moves."""
    hop: float
    """Seconds from a chip to its neighbour, or to any other where all hang on one switch."""
    has_switch: bool = False
    """True where every chip is one hop from every other."""

    def seconds(self, kind: str, chips: int) -> float:
        """Return the least seconds of a collective among `chips`: `kind` as in HLO.

        In a ring data goes both ways, so half way round; an all-reduce goes round twice, to sum
        and to tell. On a torus a group may lie as a block, whose ways are shorter.
        """
        hops = 1 if self.has_switch or kind == "collective-permute" else -(-chips // 2)
        rounds = 2 if kind == "all-reduce" else 1
        return self.start + rounds * hops * self.hop


class Chip(NamedTuple):
    """Limits of a chip, or of each JAX device that it has."""

    memory: float
    """Bytes that programs may use."""
    flops: float
    """Bfloat16 operations a second."""
    bandwidth: float
    """Bytes a second, to and from its memory."""
    links: float
    """Bytes a second that it can receive over all its links together."""
    latency: Latency
    """Of collectives among such chips."""
    devices: int = 1
    """JAX devices a chip."""
    config_name: str = ""
    """How libtpu is to take it where JAX does not take it as libtpu does by itself."""


# TPUs. `memory`: what libtpu 0.0.42 names as available when a program is too large. The rest:
# Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)"; their
# bidirectional bandwidth between chips, halved. The page of v4 has none: "How to Scale Your Model"
# (Austin et al. 2025), part 2, has 45 GB/s each way for each of its 6 links. A mesh axis along one
# dimension of the torus (of 3, 2, 3, 2, 3) has that dimension's part alone: the time by it is a
# bound. JAX has both cores of a v4 chip as one device, and each half of an Ironwood chip as a
# device of its own, with half of all that the chip has.
#
# GPUs, of SXM boards. `memory`: of what XLA describes the three quarters that JAX takes, unless
# XLA_PYTHON_CLIENT_MEM_FRACTION is larger. `bandwidth`: as XLA describes it. From NVIDIA's data
# sheets of A100 80GB, H100, H200 and HGX B200 dense bfloat16, which is half of what they give with
# sparsity, and half of NVLink's 600, 900, 900 and 1,800 GB/s.
#
# Latency. TPUs: "How to Scale Your Model", part 3: about 1 us a hop, and a small all-gather over 4
# chips of v5e, 3 hops, that took 8 us. That leaves 5 us for its start; that the others are like it
# is an assumption. GPUs: a small all-reduce over two H100 takes about 6 us by NCCL
# (github.com/NVIDIA/nccl, issue 1259); that more GPUs on the switch add nothing, that a hop is
# within it, and that other GPUs are like it, are assumptions.
TPU_LATENCY = Latency(start=8e-6 - 3 * 1e-6, hop=1e-6)
GPU_LATENCY = Latency(start=6e-6, hop=0.0, has_switch=True)


def gpu_chip(kind: str, *, flops: float, nvlink: float) -> Chip:
    """Return the limits of a GPU of GPUS; `nvlink`: bytes a second, both ways together."""
    numbers = GPUS[kind].numbers
    return Chip(
        memory=0.75 * numbers["device_memory_size"],
        flops=flops,
        bandwidth=numbers["memory_bandwidth"],
        links=nvlink / 2,
        latency=GPU_LATENCY,
    )


CHIPS = {
    "v4": Chip(30.75 * GIB, 275e12, 1200e9, 6 * 45e9, TPU_LATENCY, config_name="megacore"),
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 400e9 / 2, TPU_LATENCY),
    "v5p": Chip(95.74 * GIB, 459e12, 2765e9, 1200e9 / 2, TPU_LATENCY),
    "v6e": Chip(31.25 * GIB, 918e12, 1638e9, 800e9 / 2, TPU_LATENCY),
    "tpu7x": Chip(94.75 * GIB, 2307e12 / 2, 7380e9 / 2, 1200e9 / 2 / 2, TPU_LATENCY, devices=2),
    "a100": gpu_chip("a100", flops=312e12, nvlink=600e9),
    "h100": gpu_chip("h100", flops=989e12, nvlink=900e9),
    "h200": gpu_chip("h200", flops=989e12, nvlink=900e9),
    "b200": gpu_chip("b200", flops=2250e12, nvlink=1800e9),
}

REACHED = (0.455 / 0.787, 0.611 / 0.787)
"""The part of a roofline that published runs reach, from and to: their MFU over the most that
plan.py finds for llama3-8b at 2,048 tokens on 256 chips. MaxText's README (AI-Hypercomputer):
Llama-3.1-8B at 8,192 tokens on v6e-256, and 16B at 2,048 on v5e-256. Other models, lengths and
remat than the plan's, and training alone."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep stderr empty, also of native code: libtpu tells there that it finds no TPU's host."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def devices_of(topology: str) -> list[Any]:
    """Return devices that can be compiled for and nothing else.

    `topology`: as v5e:16x16, a chip of CHIPS and the shape of its torus, or as h200:8, the GPUs of
    a machine; without the CUDA compiler these are the CPU's devices. Raises UserError.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"--topology={topology}: unknown chip; {', '.join(CHIPS)}, as in v5e:16x16 or h200:8"
        )
    if kind in GPUS:
        # No machine has more, and as many are made of this one's processor.
        if not re.fullmatch(r"[1-9][0-9]{0,2}", shape):
            raise UserError(
                f"--topology={topology}: the number of GPUs of a machine, as in {kind}:8"
            )
        return gpus(GPUS[kind], int(shape))
    return tpus(topology)


def gpus(gpu: Gpu, count: int) -> list[Any]:
    """Return `count` GPUs of one machine to compile for, or without the compiler CPU devices."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return simulated(count)
    with quiet():
        described_gpus = topologies.get_topology_desc(
            platform="cuda", target_config=describe_gpu(gpu), topology=f"1x1x{count}"
        )
        return list(described_gpus.devices)


def simulated(count: int) -> list[Any]:
    """Return `count` devices of the CPU; raise UserError where JAX runs already and has fewer."""
    # JAX may run already: then its devices are what there is.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError("the CUDA compiler is not installed; pip install -r requirements-gpu.txt")
    return devices[:count]


def tpus(topology: str) -> list[Any]:
    """Return the TPUs of `topology` to compile for; raise UserError."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed; pip install -r requirements-tpu.txt")
    kind = topology.partition(":")[0]
    options = {}
    if CHIPS[kind].config_name:
        options["chip_config_name"] = CHIPS[kind].config_name
    # There is no metadata server to ask.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        with quiet():
            pod = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
            return list(pod.devices)
    except (ValueError, RuntimeError) as fault:
        raise UserError(
            f"--topology={topology}: {str(fault).splitlines()[0]}; as in v5e:16x16, v5p:8x8x8"
        ) from None
