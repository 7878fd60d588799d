"""Time the implementations of attention on the device at hand, in turns.

    python -m benchmarks.attention
    python -m benchmarks.attention --lengths 512 1024 --rounds=3 --out=runs/benchmarks

Writes benchmarks/results/attention-<platform>.json after every row, and README.md beside it from
all of them.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import command
from benchmarks.absent import standing_in
from benchmarks.rows import RESULTS, Built, Row, Side, run_rows, within
from benchmarks.side_by_side import measured_on

with standing_in():
    from kernels.attention import attention
    from model_config import ModelConfig

RUNS_ON = {
    "cpu": ("reference", "xla_chunked", "library"),
    "gpu": ("reference", "xla_chunked", "library", "pallas_gpu", "pallas_hopper"),
    "tpu": ("reference", "xla_chunked", "library", "pallas_tpu"),
}
# Matmuls of a head's scores that the mathematics needs, without what is computed again.
MATMULS = {"forward": 2, "forward and backward": 7}


@dataclasses.dataclass(frozen=True)
class Config:
    implementations: tuple[str, ...] = ("xla_chunked", "library", "reference")
    """Implementations; the first is compared with the others. library is what JAX offers: cuDNN
    on a GPU, splash attention on a TPU."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Tokens of a sequence."""
    tokens: int = 4096
    """Tokens of a batch, so that each length has as many."""
    heads: int = 4
    """Query heads."""
    group: int = 2
    """Query heads that share a key/value head."""
    width: int = 64
    """Head width."""
    segments: tuple[int, ...] = (1, 4)
    """Equal parts packed in a sequence, of which none sees another; 1: it is not packed."""
    rounds: int = 5
    """Timings of each side; medians are reported."""
    seconds: float = 0.2
    """Least duration of a timing, in seconds."""
    cores: int = 0
    """Cores that each side is held to, whose own seconds are then counted; 0: all, and the seconds
    that pass. On a shared CPU take 1."""
    row_limits: tuple[float, ...] = (120.0,)
    """Most seconds of each row, start and compilation included; the last is for the rest too."""
    out: str = RESULTS
    """Folder of the results."""


# ---- What is timed ----


def both_passes(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Return a function of q, k, v and a cotangent that gives the output and the gradients."""

    def run(q_BTNH, k_BSKH, v_BSKH, dout_BTNH):
        out, pull = jax.vjp(function, q_BTNH, k_BSKH, v_BSKH)
        return (out, *pull(dout_BTNH))

    return run


def random_arrays(config: Config, batch: int, length: int) -> list[jax.Array]:
    """Return q, k, v and a cotangent of the output, in the compute type of models."""
    kv_heads = config.heads // config.group
    heads = (config.heads, kv_heads, kv_heads, config.heads)
    keys = jax.random.split(jax.random.key(length), len(heads))
    dtype = ModelConfig().compute_dtype
    arrays = []
    for key, n in zip(keys, heads, strict=True):
        arrays.append(jax.random.normal(key, (batch, length, n, config.width), dtype))
    return arrays


def side(config: Config, what: str, length: int, segments: int, name: str) -> Built:
    """Return a side: one implementation, one pass, one shape."""
    batch = max(1, config.tokens // length)
    arrays = random_arrays(config, batch, length)
    packed = {}
    if segments > 1:
        ids_T = np.arange(length)[None] // (length // segments)
        packed["segment_ids"] = ids_T + np.ones((batch, 1), int)
    run = functools.partial(attention, implementation=name, **packed)
    if what == "forward":
        arrays = arrays[:3]
    else:
        run = both_passes(run)

    start = time.perf_counter()
    compiled = jax.jit(run).lower(*arrays).compile()
    facts = {
        "compile_s": time.perf_counter() - start,
        "temporary_MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
    # On an accelerator it is waited for seldom: launches overlap.
    repeats = 1 if jax.default_backend() == "cpu" else 16

    def call() -> None:
        for _ in range(repeats):
            result = compiled(*arrays)
        jax.block_until_ready(result)

    return Built({what: call}, "jax", repeats=repeats, facts=facts)


def rows(config: Config) -> list[Row]:
    """Return a row for each length, packing and pass, the plain ones first."""
    found = []
    for segments, length, what in itertools.product(config.segments, config.lengths, MATMULS):
        batch = max(1, config.tokens // length)
        part = length // segments
        parts = f"{part}" if segments == 1 else f"{segments} x {part}"
        sides = {}
        for name in config.implementations:
            sides[name] = Side(side, (config, what, length, segments, name))

        # A token sees those of its own part up to itself: pairs of a sequence, in one head. In a
        # matmul each pair takes a product and a sum for each number of the head's width.
        seen = segments * part * (part + 1) // 2
        matmul_flops = 2 * batch * config.heads * config.width * seen
        facts = {
            "parts": parts,
            "length": length,
            "segments": segments,
            "batch": batch,
            "pass": what,
            "flops": MATMULS[what] * matmul_flops,
        }
        found.append(Row(f"{what}, {parts}", sides, tokens={what: batch * length}, facts=facts))
    return within(found, config.row_limits)


def add_tflops(result: dict[str, Any]) -> None:
    """Add the median ms and TFLOP/s of every side, in rows that count FLOPs."""
    for row in result["rows"]:
        for one in row["sides"].values():
            if one.get("seconds") and "flops" in row:
                seconds = statistics.median(one["seconds"][row["pass"]])
                one["ms"] = 1e3 * seconds
                one["tflops"] = row["flops"] / seconds / 1e12


def fastest(result: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Return the ms of each implementation by length: of both passes over rows that are plain.

    What a training step takes; the table AUTO of kernels/attention.py is to have the fastest.
    """
    found: dict[int, dict[str, float]] = {}
    for row in result["rows"]:
        if row["pass"] == "forward and backward" and row["segments"] == 1:
            timed = {name: one["ms"] for name, one in row["sides"].items() if "ms" in one}
            found[row["length"]] = timed
    return found


# ---- Tables ----


def setting(result: dict[str, Any]) -> str:
    """Return the sentences over a platform's table: where, when and what was timed."""
    config = result["config"]
    kv_heads = config["heads"] // config["group"]
    dtype = "float32" if result["platform"] == "cpu" else "bfloat16"
    return (
        f"{measured_on(result)} A batch has {config['tokens']} tokens, {config['heads']} query "
        f"heads on {kv_heads} key heads of width {config['width']}, {dtype}, causal. "
        f"Median of {config['rounds']} interleaved rounds (fastest to slowest)."
    )


def cells(row: dict[str, Any], name: str) -> str:
    """Return the line of one implementation in a row."""
    start = f"| {row['parts']} | {row['pass']} | {name} |"
    one = row["sides"].get(name, {})
    if "ms" not in one:
        why = row["left_out"].get(name) or f"over the row's limit of {row['limit_s']:g} s"
        return f"{start} {why} | | | |"

    # The median with the fastest and the slowest round, in ms, and beside the library's median.
    ms = one["ms"]
    seconds = one["seconds"][row["pass"]]
    least = 1e3 * min(seconds)
    greatest = 1e3 * max(seconds)
    spread = f"{ms:.3g} ({least:.3g} to {greatest:.3g})"
    library_ms = row["sides"].get("library", {}).get("ms")
    ratio = "" if library_ms is None else f"{ms / library_ms:.2f}"
    return f"{start} {spread} | {one['tflops']:.3g} | {ratio} | {one['temporary_MiB']:.0f} |"


def table(platform: str, folder: pathlib.Path) -> str:
    """Return one platform's results as Markdown, or a table that says that there are none."""
    path = folder / f"attention-{platform}.json"
    lines = [f"## {platform.upper()}", ""]
    if not path.exists():
        lines += ["| implementation | |", "|---|---|"]
        for name in RUNS_ON[platform]:
            lines.append(f"| {name} | not yet measured on {platform.upper()} |")
        return "\n".join(lines)

    result = json.loads(path.read_text())
    lines += [
        setting(result),
        "",
        "| tokens | pass | implementation | ms | TFLOP/s | time of library | temporaries, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines += [cells(row, name) for name in (*row["sides"], *row["left_out"])]
    return "\n".join(lines)


def schedule_table(folder: pathlib.Path) -> str:
    """Return what benchmarks/tpu_schedule.py has counted, as Markdown."""
    path = folder / "tpu_schedule.json"
    result = {"topology": "a TPU", "rows": [], "versions": {}}
    if path.exists():
        result = json.loads(path.read_text())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "## Inner loops as compiled for a TPU",
        "",
        f"{result['topology']}, bfloat16, {versions}; "
        "`python -m benchmarks.tpu_schedule`. Ideal: the cycles that a tile's products take the "
        "matrix units at peak rate; share: of the bundles. Waiting is not counted, so that a "
        "share can be above 1. Slots: the fullest. A product of width 64 leaves half of a matrix "
        "unit empty; half is then about the most that a share can be.",
        "",
        "| width | kernel | tile | bundles | ideal | share | slots filled |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        queries, keys = row["tile"]
        fullest = sorted(row["slots"].items(), key=lambda slot: -slot[1])[:4]
        slots = ", ".join(f"{name} {share:.2f}" for name, share in fullest)
        start = f"| {row['width']} | {row['kernel']} | {queries} x {keys} |"
        numbers = f"{row['bundles']} | {row['ideal']:.0f} | {row['share']:.2f}"
        lines.append(f"{start} {numbers} | {slots} |")
    return "\n".join(lines)


def write_readme(folder: pathlib.Path) -> None:
    """Write the folder's README.md: all tables, from the JSON files beside it."""
    parts = [
        "# Attention: results",
        "Written by `python -m benchmarks.attention` and `python -m benchmarks.tpu_schedule`; "
        "not edited by hand.",
    ]
    for platform in RUNS_ON:
        parts.append(table(platform, folder))
    parts.append(schedule_table(folder))
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", "utf-8")


def main(config: Config) -> dict[str, Any]:
    """Measure, write the JSON and all platforms' tables; return what is written."""
    result = run_rows("attention", config, rows(config), add_tflops)
    write_readme(pathlib.Path(config.out))
    return result


if __name__ == "__main__":
    command.run(main, Config)
