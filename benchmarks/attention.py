"""Time the implementations of attention on the device at hand, interleaved in one run.

    python -m benchmarks.attention
    python -m benchmarks.attention --lengths 512 1024 --rounds=3 --out=runs/benchmarks

Writes benchmarks/results/attention-<platform>.json, and README.md beside it from all of them.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jaxlib
import numpy as np

from kernels.attention import attention
from model_config import ModelConfig
from runtime import flags

RUNS_ON = {
    "cpu": ("reference", "xla_chunked", "library"),
    "gpu": ("reference", "xla_chunked", "library", "pallas_gpu", "pallas_hopper"),
    "tpu": ("reference", "xla_chunked", "library", "pallas_tpu"),
}
# Matmuls of a head's scores that the mathematics needs, without what is computed again.
MATMULS = {"forward": 2, "forward and backward": 7}


@dataclasses.dataclass(frozen=True)
class Config:
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Tokens of a sequence."""
    tokens: int = 0
    """Tokens of a batch, so that each length has as many; 0: 4096 on CPU, 16384 elsewhere."""
    heads: int = 0
    """Query heads; 0: 4 on CPU, 16 elsewhere."""
    group: int = 2
    """Query heads that share a key/value head."""
    width: int = 0
    """Head width; 0: 64 on CPU, 128 elsewhere."""
    segments: tuple[int, ...] = (1, 4)
    """Equal parts packed in a sequence, of which none sees another; 1: it is not packed."""
    causal: bool = True
    """Each token sees those before it only."""
    rounds: int = 5
    """Timings of each row; the median is reported."""
    seconds: float = 0.2
    """Least duration of a timing, in seconds; shorter calls are repeated."""
    out: str = str(pathlib.Path(__file__).parent / "results")
    """Folder of the results."""


# ---- What is timed ----


@dataclasses.dataclass
class Timed:
    """A row of the results and, unless it failed, the compiled call that it times."""

    row: dict[str, Any]
    call: Callable[[], Any] | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)


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


def compiled_call(timed: Timed, function: Callable[..., Any], args: list[jax.Array]) -> None:
    """Compile `function` of `args` and run it once; note its costs, or its failure, in the row."""
    try:
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*args).compile()
        timed.row["compile_s"] = time.perf_counter() - start
        temporary = compiled.memory_analysis().temp_size_in_bytes
        timed.row["temporary_MiB"] = temporary / 2**20
        timed.call = functools.partial(compiled, *args)
        jax.block_until_ready(timed.call())
    # A shape that one implementation cannot serve must not end the others' run.
    except Exception as error:
        timed.row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        timed.call = None


def rows_of(config: Config) -> list[Timed]:
    """Compile each combination of length, packing, pass and implementation."""
    rows = []
    for length, segments in itertools.product(config.lengths, config.segments):
        batch = max(1, config.tokens // length)
        arrays = random_arrays(config, batch, length)

        # Scores that a row computes, and the ids of its segments.
        part = length // segments
        seen = part * (part + 1) // 2 if config.causal else part**2
        packed = {}
        if segments > 1:
            ids_T = np.arange(length)[None] // part
            packed["segment_ids"] = ids_T + np.ones((batch, 1), int)

        for what, name in itertools.product(MATMULS, RUNS_ON[jax.default_backend()]):
            matmuls = 2 * MATMULS[what] * batch * config.heads * config.width
            timed = Timed(
                {
                    "length": length,
                    "segments": segments,
                    "batch": batch,
                    "pass": what,
                    "implementation": name,
                    "flops": matmuls * segments * seen,
                }
            )
            function = functools.partial(
                attention, causal=config.causal, implementation=name, **packed
            )
            if what == "forward":
                compiled_call(timed, function, arrays[:3])
            else:
                compiled_call(timed, both_passes(function), arrays)
            rows.append(timed)
    return rows


# ---- Timing ----


def seconds_of(call: Callable[[], Any], at_least: float) -> float:
    """Return the seconds of one call, averaged over as many as fill `at_least`."""
    on_cpu = jax.default_backend() == "cpu"
    count = 0
    spent = 0.0
    start = time.perf_counter()
    while spent < at_least:
        result = call()
        count += 1
        # On an accelerator wait seldom, when the count is a power of two: launches overlap.
        if on_cpu or count & (count - 1) == 0:
            jax.block_until_ready(result)
            spent = time.perf_counter() - start
    return spent / count


def measure(config: Config) -> dict[str, Any]:
    """Time every row once a round, in an order that turns with the rounds; return all results."""
    rows = rows_of(config)
    load_before = os.getloadavg()[0]
    served = [timed for timed in rows if timed.call is not None]
    for turn in range(config.rounds):
        for timed in served[turn:] + served[:turn]:
            timed.seconds.append(seconds_of(timed.call, config.seconds))
    for timed in served:
        median = statistics.median(timed.seconds)
        timed.row["ms"] = 1e3 * median
        timed.row["ms_every"] = [1e3 * one for one in timed.seconds]
        timed.row["tflops"] = timed.row["flops"] / median / 1e12

    # What a reader needs to judge the numbers.
    described = dataclasses.asdict(config)
    del described["out"]
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device.device_kind,
        "platform_version": device.client.platform_version.splitlines()[0],
        "cores": os.cpu_count(),
        "dtype": ModelConfig().compute_dtype.name,
        "load_average": [load_before, os.getloadavg()[0]],
        "versions": {
            "python": sys.version.split()[0],
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        "config": described,
        "rows": [timed.row for timed in rows],
    }


# ---- Tables ----


def setting(result: dict[str, Any]) -> str:
    """Return the sentence over a platform's table: where, when and what was timed."""
    config = result["config"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    before, after = result["load_average"]
    kv_heads = config["heads"] // config["group"]
    mask = "causal" if config["causal"] else "not causal"
    return (
        f"{result['device']} ({result['cores']} CPU cores), {result['date']}, {versions}; "
        f"load {before:.1f} before and {after:.1f} after. "
        f"A batch has {config['tokens']} tokens, {config['heads']} query heads on "
        f"{kv_heads} key heads of width {config['width']}, {result['dtype']}, {mask}. "
        f"Median of {config['rounds']} interleaved rounds (fastest to slowest)."
    )


def cells(row: dict[str, Any], reference_ms: float | None) -> str:
    """Return a row of the table; `reference_ms` is the reference's time, if it did not fail."""
    part = row["length"] // row["segments"]
    tokens = f"{part}" if row["segments"] == 1 else f"{row['segments']} x {part}"
    start = f"| {tokens} | {row['pass']} | {row['implementation']} |"
    if "failed" in row:
        return f"{start} {row['failed']} | | | |"
    ratio = f"{row['ms'] / reference_ms:.2f}" if reference_ms else ""
    fastest, slowest = min(row["ms_every"]), max(row["ms_every"])
    spread = f"{row['ms']:.3g} ({fastest:.3g} to {slowest:.3g})"
    memory = f"{row['temporary_MiB']:.0f}"
    return f"{start} {spread} | {row['tflops']:.3g} | {ratio} | {memory} |"


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
        "| tokens | pass | implementation | ms | TFLOP/s | time of reference | temporaries, MiB |",
        "|---|---|---|---|---|---|---|",
    ]

    def shape(row):
        return row["length"], row["segments"], row["pass"]

    reference_ms = {}
    for row in result["rows"]:
        if row["implementation"] == "reference":
            reference_ms[shape(row)] = row.get("ms")
    for row in result["rows"]:
        lines.append(cells(row, reference_ms[shape(row)]))
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
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


def with_defaults(config: Config) -> Config:
    """Fill the fields left at 0 with the platform's values."""
    on_cpu = jax.default_backend() == "cpu"
    return dataclasses.replace(
        config,
        tokens=config.tokens or (4096 if on_cpu else 16384),
        heads=config.heads or (4 if on_cpu else 16),
        width=config.width or (64 if on_cpu else 128),
    )


def main(config: Config) -> None:
    """Measure, write the JSON and all platforms' tables, print this platform's."""
    folder = pathlib.Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    result = measure(with_defaults(config))
    platform = jax.default_backend()
    text = json.dumps(result, indent=1)
    (folder / f"attention-{platform}.json").write_text(text + "\n")
    write_readme(folder)
    print(table(platform, folder))


if __name__ == "__main__":
    flags.run(main, Config)
