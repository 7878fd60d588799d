"""GPUs that need not be here, described for XLA's compiler."""

import pathlib
import string
from typing import NamedTuple

TEMPLATE = string.Template((pathlib.Path(__file__).parent / "gpu.txtpb").read_text())
"""A GpuTargetConfigProto of XLA: what all GPUs share, and places for what sets each apart."""


class Gpu(NamedTuple):
    """What sets a GPU apart from others."""

    name: str
    """As CUDA names it."""
    capability: str
    """CUDA's compute capability, as in 9.0a."""
    memory_clock: int
    """Kilohertz."""
    numbers: dict[str, float]
    """By the names of XLA's DeviceDescription: bytes, bytes a second, and counts."""


# As XLA's own descriptions have them (openxla/xla, Apache-2.0, xla/backends/gpu/target_config):
# a100_sxm_80, h100_sxm, h200, b200. Cores are streaming multiprocessors. XLA says nothing of an
# A100's way to its host.
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        "8.0",
        1_593_000,
        {
            "shared_memory_per_core": 167936,
            "shared_memory_per_block_optin": 166912,
            "core_count": 108,
            "fpus_per_core": 64,
            "memory_bandwidth": 2039040000000,
            "l2_cache_size": 41943040,
            "clock_rate_ghz": 1.41,
            "device_memory_size": 85100068864,
        },
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3",
        "9.0a",
        2_619_000,
        {
            "shared_memory_per_core": 233472,
            "shared_memory_per_block_optin": 232448,
            "core_count": 132,
            "fpus_per_core": 128,
            "memory_bandwidth": 3352320000000,
            "l2_cache_size": 52428800,
            "clock_rate_ghz": 1.98,
            "device_memory_size": 84942979072,
            "pcie_bandwidth": 34359738368,
        },
    ),
    "h200": Gpu(
        "NVIDIA H200 141GB HBM3e",
        "9.0a",
        3_750_000,
        {
            "shared_memory_per_core": 233472,
            "shared_memory_per_block_optin": 232448,
            "core_count": 132,
            "fpus_per_core": 128,
            "memory_bandwidth": 4800000000000,
            "l2_cache_size": 52428800,
            "clock_rate_ghz": 1.98,
            "device_memory_size": 151397597184,
            "pcie_bandwidth": 34359738368,
        },
    ),
    "b200": Gpu(
        "NVIDIA B200",
        "10.0a",
        3_996_000,
        {
            "shared_memory_per_core": 233472,
            "shared_memory_per_block_optin": 232448,
            "core_count": 148,
            "fpus_per_core": 128,
            "memory_bandwidth": 7672320000000,
            "l2_cache_size": 132644864,
            "clock_rate_ghz": 1.965,
            "device_memory_size": 191514411008,
            "pcie_bandwidth": 68719476736,
        },
    ),
}
"""By the names that --topology takes."""


def describe_gpu(gpu: Gpu) -> str:
    """Write the description of `gpu` that XLA compiles for, a GpuTargetConfigProto as text."""
    numbers = gpu.numbers
    lines = [f"  {field}: {value}" for field, value in numbers.items()]
    clock = round(numbers["clock_rate_ghz"] * 1e6)
    return TEMPLATE.substitute(
        name=gpu.name,
        capability=gpu.capability,
        major=gpu.capability.partition(".")[0],
        extension="ACCELERATED_FEATURES" if gpu.capability.endswith("a") else "NONE",
        numbers="\n".join(lines),
        model=(
            f"sm_{gpu.capability} with {numbers['device_memory_size']}B RAM, "
            f"{numbers['core_count']} cores, {clock}KHz clock, {gpu.memory_clock}KHz mem clock, "
            f"{numbers['l2_cache_size']}B L2$"
        ),
    )
