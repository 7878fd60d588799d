"""Memory: what a tree of arrays takes of a device, and a refusal of what cannot fit."""

import math
import pathlib
import re
from typing import Any

import jax

from runtime.errors import UserError


def bytes_per_device(tree: Any) -> int:
    """Return the largest share of a tree that one device holds.

    `tree`: of arrays, or of ShapeDtypeStructs with their shardings.
    """
    # An array without a sharding lies whole on each device; a key has no item size.
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
        total += math.prod(shape) * getattr(leaf.dtype, "itemsize", 8)
    return total


def size(count: float) -> str:
    """Return a number of bytes in words, as `4.8 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def refuse_too_large(state: dict[str, Any]) -> None:
    """Raise UserError where a device has no room for `state`, and for gradients of its "params".

    `state`: what a checkpoint holds, abstract, and not allocated yet. Activations are not counted:
    what passes may still be too large.
    """
    needed = bytes_per_device(state) + bytes_per_device(state.get("params"))
    free = free_bytes()
    if free is None or needed <= free:
        return
    parts = -(-needed // max(free, 1))
    raise UserError(
        f"parameters, gradients and optimiser take {size(needed)} a device, of which {size(free)} "
        f"are free: take at least {parts} times the devices, with --mesh.fsdp={parts} times what "
        "it is, or train adapters (--lora.rank), or a smaller --model"
    )


def free_bytes() -> int | None:
    """Return the memory that is free on a device of this process; None where nobody says."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    # Simulated devices share the host's memory.
    free = _free_on_host()
    return None if free is None else free // jax.local_device_count()


def _free_on_host() -> int | None:
    """Return what the system, and a container's limit, leave; None where nobody says."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text()
    except OSError:
        return None
    sizes = re.findall(r"^(?:MemAvailable|SwapFree): +(\d+) kB$", lines, re.MULTILINE)
    free = 1024 * sum(map(int, sizes))
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    stated = limit.read_text().strip() if limit.exists() else ""
    return min(free, int(stated)) if stated.isdecimal() else free
