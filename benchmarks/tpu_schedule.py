"""Count the instructions of the attention kernels' inner loops on a TPU, on a machine that has none.

    python -m benchmarks.tpu_schedule                       # needs `pip install -r requirements-tpu.txt`
    python -m benchmarks.tpu_schedule --forward 256 1024    # another tile: queries, keys

A TPU core issues one bundle of instructions a cycle; the compiler's last listing has them all. Of each kernel's loop
over whole tiles (no mask) this reports how many there are, the cycles that the tile's products take the matrix units at
their peak rate (`ideal`), the one by the other (`share`), and how much of each kind of slot the bundles fill. Waiting
is not in the listing: the share is an upper bound of what a chip reaches, and can be above 1.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import tempfile

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
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # matrix products of a tile
SLOTS = (
    "MXU",
    "XLU",
    "VALU",
    "VPOP",
    "EUP",
    "VLOAD",
    "fill",
    "VSTORE",
    "spill",
    "SALU",
)  # the listing's columns


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
    """The three kernels in bfloat16 with two query heads on one key head, compiled for one chip."""
    mesh = Mesh(
        np.array(
            topologies.get_topology_desc(platform="tpu", topology_name=config.topology).devices[:1]
        ),
        "data",
    )
    jax.set_mesh(mesh)  # tells JAX which chip it lowers for
    here = NamedSharding(mesh, P())
    q, kv = (
        jax.ShapeDtypeStruct((1, config.length, n, width), jnp.bfloat16, sharding=here)
        for n in (2, 1)
    )

    def both_passes(q, k, v, dout):
        out, pull = jax.vjp(lambda *x: attention(*x, implementation="pallas_tpu"), q, k, v)
        return (out, *pull(dout))

    jax.jit(both_passes).lower(q, kv, kv, q).compile()


def inner_loops(listing: str) -> list[tuple[int, int]]:
    """Header and closing branch of each loop in a loop, as numbers of bundles, in the order of the program."""
    loops, start = [], None
    for line in listing.splitlines():
        bundle = re.match(r"\s*(0x[0-9a-f]+)\s+(\w\w)?\s*: ([> ]*)\{", line)
        if bundle and bundle[2] == "LB":
            start = int(bundle[1], 16) if bundle[3].count(">") == 2 else None
        elif (
            bundle and start is not None and "sbr.rel (!%" in line
        ):  # back to the header, until the loop is done
            loops.append((start, int(bundle[1], 16)))
            start = None
    return loops


def schedule_of(dump: str, kernel: str) -> dict:
    """Bundles of the unmasked inner loop of a kernel, and the share of each kind of slot that they fill."""
    newest = lambda end: max(pathlib.Path(dump).glob(f"*-{kernel}.*{end}"))
    loops = inner_loops(newest("[0-9]-final_bundles.txt").read_text())
    if len(loops) != 3:
        raise RuntimeError(
            f"{kernel}: {len(loops)} inner loops in the listing, not masked, whole, masked"
        )
    first, last = loops[1]
    lines = newest("-final_hlo-static-per-bundle-utilization.txt").read_text().splitlines()
    capacity = [int(x) for x in lines[2].split()]
    rows = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
    used = np.sum(rows[first : last + 1], axis=0)
    count = last + 1 - first
    shares = {
        name: round(float(n) / (count * c), 3)
        for name, n, c in zip(SLOTS, used, capacity, strict=True)
    }
    return {"bundles": count, "slots": shares}


def main(config: Config) -> None:
    """Prints the table, writes the JSON, and the README beside it anew."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed; pip install -r requirements-tpu.txt")
    chip = config.topology.partition(":")[0]
    if chip not in MULTIPLY_ADDS:
        raise UserError(
            f"--topology={config.topology}: the peak rate of {chip} is not known here, only of v5e"
        )
    own = {name: getattr(config, name) for name in PRODUCTS if getattr(config, name)}
    usual, rows = flash.blocks_of, []
    flash.blocks_of = lambda *args: usual(*args)._replace(**own)
    with tempfile.TemporaryDirectory() as dump:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"  # read as libtpu loads
        )
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
        for width in config.widths:
            compile_kernels(config, width)
            for name, products in PRODUCTS.items():
                queries, keys = getattr(flash.blocks_of("tpu", config.length, width, 16), name)
                ideal = products * queries * keys * width / MULTIPLY_ADDS[chip]
                counts = schedule_of(dump, f"flash_{name}")
                share = round(ideal / counts["bundles"], 3)
                row = {
                    "width": width,
                    "kernel": name,
                    "tile": [queries, keys],
                    "ideal": ideal,
                    "share": share,
                }
                rows.append({**row, **counts})
                print(
                    f"{name:8} width {width}, {queries} x {keys}: {counts['bundles']} bundles, share {share:.2f}"
                )
                print(
                    "         "
                    + ", ".join(f"{slot} {filled:.2f}" for slot, filled in counts["slots"].items())
                )
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    result = {
        "topology": config.topology,
        "length": config.length,
        "versions": versions,
        "rows": rows,
    }
    pathlib.Path(config.out, "tpu_schedule.json").write_text(json.dumps(result, indent=1) + "\n")
    write_readme(pathlib.Path(config.out))


if __name__ == "__main__":
    flags.run(main, Config)
