"""Accelerators that need not be here: what each can do at most, and devices of a topology to compile for."""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.experimental import topologies

from config import UserError

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
    """Bytes a second that it can receive over the links of one mesh axis."""


# `memory`: what libtpu 0.0.42 names as available when a program is too large. The rest: Google Cloud's pages "TPU v5e",
# "TPU v5p" and "TPU v6e"; their bidirectional bandwidth between chips, halved, over the dimensions of the torus (2, 3,
# 2), as if each mesh axis were laid along one dimension. H200: NVIDIA's data sheet, NVLink's 900 GB/s halved; memory as
# in XLA's description of the chip.
CHIPS = {
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 400e9 / 2 / 2),
    "v5p": Chip(95.74 * GIB, 459e12, 2765e9, 1200e9 / 2 / 3),
    "v6e": Chip(31.25 * GIB, 918e12, 1638e9, 800e9 / 2 / 2),
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


def devices_of(topology: str) -> list[Any]:
    """Devices that can be compiled for and nothing else; raises UserError."""
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise UserError(f"--topology={topology}: unknown chip; {', '.join(CHIPS)}, as in v5e:16x16")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed; pip install -r requirements-tpu.txt")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    try:
        with quiet():
            return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except (ValueError, RuntimeError) as fault:
        raise UserError(f"--topology={topology}: {str(fault).splitlines()[0]}; as in v5e:16x16, v5p:8x8x8") from None
