"""Count the instructions of the attention kernels' inner loops on a TPU, without having one.

    python -m benchmarks.tpu_schedule
    python -m benchmarks.tpu_schedule --forward 256 1024

Needs `pip install -r requirements-tpu.txt`; the second command tries another tile (queries, keys).
A TPU core issues one bundle of instructions a cycle; the compiler's last listing has them all. Of
each kernel's loop over whole tiles (no mask) this reports how many there are, the cycles that the
tile's products take the matrix units at their peak rate (`ideal`), the one by the other (`share`),
and how much of each kind of slot the bundles fill. Waiting is not in the listing: the share is an
upper bound of what a chip reaches, and can be above 1.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import tempfile
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.attention import write_readme
from kernels import flash
from kernels.attention import attention
from runtime import flags
from runtime.errors import UserError

# Multiply-adds a cycle: four matrix units of 128 x 128; 197 TFLOP/s at 1.5 GHz.
MULTIPLY_ADDS = {"v5e": 4 * 128 * 128}
# Matrix products of a tile.
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}
# The columns of the listing of how full bundles are.
SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "fill", "VSTORE", "spill", "SALU")


@dataclasses.dataclass(frozen=True)
class Config:
    topology: str = "v5e:2x2"
    """Chip and arrangement, as libtpu names them."""
    widths: tuple[int, ...] = (64, 128, 256)
    """Head widths."""
    length: int = 4096
    """Tokens of a sequence."""
    forward: tuple[int, int] | None = None
    """Queries and keys of the forward kernel's tile; None: the kernel's own choice."""
    dq: tuple[int, int] | None = None
    """The same of the dQ kernel."""
    dkv: tuple[int, int] | None = None
    """The same of the dK/dV kernel."""
    out: str = str(pathlib.Path(__file__).parent / "results")
    """Folder of the result."""


def compile_kernels(config: Config, width: int) -> None:
    """Compile the three kernels in bfloat16, two query heads on one key head, for one chip."""
    described = topologies.get_topology_desc(platform="tpu", topology_name=config.topology)
    mesh = Mesh(np.array(described.devices[:1]), "data")
    # The mesh tells JAX which chip it lowers for.
    jax.set_mesh(mesh)
    here = NamedSharding(mesh, P())
    q, kv = (
        jax.ShapeDtypeStruct((1, config.length, n, width), jnp.bfloat16, sharding=here)
        for n in (2, 1)
    )
    run = functools.partial(attention, implementation="pallas_tpu")

    def both_passes(q, k, v, dout):
        out, pull = jax.vjp(run, q, k, v)
        return (out, *pull(dout))

    jax.jit(both_passes).lower(q, kv, kv, q).compile()


# ---- The compiler's listings ----


def inner_loops(listing: str) -> list[tuple[int, int]]:
    """Return the loops in a loop of a listing, in the order of the program.

    Each is (header, closing branch), as numbers of bundles.
    """
    loops = []
    start = None
    for line in listing.splitlines():
        bundle = re.match(r"\s*(0x[0-9a-f]+)\s+(\w\w)?\s*: ([> ]*)\{", line)
        if not bundle:
            continue
        number, label, depth = bundle.groups()
        if label == "LB":
            start = int(number, 16) if depth.count(">") == 2 else None
        # Back to the header, until the loop is done.
        elif start is not None and "sbr.rel (!%" in line:
            loops.append((start, int(number, 16)))
            start = None
    return loops


def newest_lines(dump: pathlib.Path, kernel: str, end: str) -> str:
    """Return the text of the newest listing of a kernel whose name ends with `end`, a pattern."""
    return max(dump.glob(f"*-{kernel}.*{end}")).read_text()


def schedule_of(dump: pathlib.Path, kernel: str) -> dict[str, Any]:
    """Return "bundles" of the unmasked inner loop of a kernel, and the share of "slots" they fill.

    `dump` is the folder of the compiler's listings.
    """
    loops = inner_loops(newest_lines(dump, kernel, "[0-9]-final_bundles.txt"))
    if len(loops) != 3:
        raise RuntimeError(
            f"{kernel}: {len(loops)} inner loops in the listing, not masked, whole, masked"
        )
    _, (first, last), _ = loops

    # The listing of how full bundles are: capacities in the third line, then a line a bundle.
    text = newest_lines(dump, kernel, "-final_hlo-static-per-bundle-utilization.txt")
    lines = text.splitlines()
    capacities = [int(x) for x in lines[2].split()]
    bundles = []
    for line in lines[4:]:
        if line.strip():
            bundles.append([int(x) for x in line.split()])
    used = np.sum(bundles[first : last + 1], axis=0)
    count = last + 1 - first
    shares = {}
    for name, filled, capacity in zip(SLOTS, used, capacities, strict=True):
        shares[name] = round(float(filled) / (count * capacity), 3)
    return {"bundles": count, "slots": shares}


# ---- The benchmark ----


def blocks_of(config: Config, width: int) -> flash.Blocks:
    """Return the kernels' tiles: their own choice but for those that the flags name."""
    own = flash.blocks_of("tpu", config.length, width, 16)
    named = {}
    for kernel in PRODUCTS:
        if getattr(config, kernel):
            named[kernel] = getattr(config, kernel)
    return own._replace(**named)


def rows_of(config: Config, multiply_adds: int, dump: pathlib.Path) -> list[dict[str, Any]]:
    """Compile for each width, into the folder `dump` of listings; return a row for each kernel."""
    rows = []
    for width in config.widths:
        blocks = blocks_of(config, width)
        # The kernels take their tiles from here.
        with mock.patch.object(flash, "blocks_of", lambda *_, blocks=blocks: blocks):
            compile_kernels(config, width)
        for kernel, products in PRODUCTS.items():
            queries, keys = getattr(blocks, kernel)
            ideal = products * queries * keys * width / multiply_adds
            counts = schedule_of(dump, f"flash_{kernel}")
            row = {
                "width": width,
                "kernel": kernel,
                "tile": [queries, keys],
                "ideal": ideal,
                "share": round(ideal / counts["bundles"], 3),
                **counts,
            }
            rows.append(row)
            print_row(row)
    return rows


def print_row(row: dict[str, Any]) -> None:
    """Print what a kernel's inner loop takes."""
    queries, keys = row["tile"]
    print(
        f"{row['kernel']:8} width {row['width']}, {queries} x {keys}: "
        f"{row['bundles']} bundles, share {row['share']:.2f}"
    )
    print(" " * 8, ", ".join(f"{slot} {filled:.2f}" for slot, filled in row["slots"].items()))


def main(config: Config) -> None:
    """Print the table, write the JSON and the README beside it."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed; pip install -r requirements-tpu.txt")
    chip = config.topology.partition(":")[0]
    if chip not in MULTIPLY_ADDS:
        raise UserError(
            f"--topology={config.topology}: the peak rate of {chip} is not known here, only of v5e"
        )
    with tempfile.TemporaryDirectory() as dump:
        # Read as libtpu loads.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        # There is no metadata server to ask.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        rows = rows_of(config, MULTIPLY_ADDS[chip], pathlib.Path(dump))
    result = {
        "topology": config.topology,
        "length": config.length,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "rows": rows,
    }
    folder = pathlib.Path(config.out)
    (folder / "tpu_schedule.json").write_text(json.dumps(result, indent=1) + "\n")
    write_readme(folder)


if __name__ == "__main__":
    flags.run(main, Config)
