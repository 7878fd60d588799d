"""Time the implementations of attention against one another on the device at hand, interleaved in one run.

python -m benchmarks.attention                 # writes benchmarks/results/attention-<platform>.json and README.md
python -m benchmarks.attention --lengths 512 1024 --rounds=3 --out=runs/benchmarks
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
MATMULS = {
    "forward": 2,
    "forward and backward": 7,
}  # of a head's scores, by the mathematics: nothing recomputed


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


def both_passes(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """`function` of q, k, v with its gradients for the cotangent that comes last."""

    def run(q_BTNH, k_BSKH, v_BSKH, dout_BTNH):
        out, pull = jax.vjp(function, q_BTNH, k_BSKH, v_BSKH)
        return (out, *pull(dout_BTNH))

    return run


def rows_of(config: Config) -> list[tuple[dict[str, Any], Callable[[], Any]]]:
    """Each combination of length, packing, pass and implementation: what it is, and a call of it, compiled."""
    rows, platform = [], jax.default_backend()
    for length, segments in itertools.product(config.lengths, config.segments):
        batch, part = max(1, config.tokens // length), length // segments
        heads = (
            config.heads,
            config.heads // config.group,
            config.heads // config.group,
            config.heads,
        )
        keys = jax.random.split(jax.random.key(length), len(heads))
        arrays = [
            jax.random.normal(k, (batch, length, n, config.width), ModelConfig().compute_dtype)
            for k, n in zip(keys, heads, strict=True)
        ]
        seen = part * (part + 1) // 2 if config.causal else part**2
        packed = (
            {"segment_ids": np.arange(length)[None] // part + np.ones((batch, 1), int)}
            if segments > 1
            else {}
        )
        for what, name in itertools.product(MATMULS, RUNS_ON[platform]):
            function = functools.partial(
                attention, causal=config.causal, implementation=name, **packed
            )
            args = arrays[:3] if what == "forward" else arrays
            row = {
                "length": length,
                "segments": segments,
                "batch": batch,
                "pass": what,
                "implementation": name,
            }
            row["flops"] = (
                2 * MATMULS[what] * batch * config.heads * segments * seen * config.width
            )
            try:
                start = time.perf_counter()
                compiled = (
                    jax.jit(function if what == "forward" else both_passes(function))
                    .lower(*args)
                    .compile()
                )
                row["compile_s"] = time.perf_counter() - start
                row["temporary_MiB"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
                call = functools.partial(compiled, *args)
                jax.block_until_ready(call())
            except Exception as error:  # a shape that one implementation cannot serve must not end the others' run
                row["failed"], call = (
                    f"{type(error).__name__}: {error}".splitlines()[0][:200],
                    None,
                )
            rows.append((row, call))
    return rows


def seconds_of(call: Callable[[], Any], at_least: float) -> float:
    """Seconds of one call, averaged over as many as fill `at_least`."""
    count, spent = 0, 0.0
    start = time.perf_counter()
    while spent < at_least:
        result = call()
        count += 1
        if (
            count & (count - 1) == 0 or jax.default_backend() == "cpu"
        ):  # waits seldom, so that launches overlap
            jax.block_until_ready(result)
            spent = time.perf_counter() - start
    return spent / count


def measure(config: Config) -> dict[str, Any]:
    """The whole run: every row once a round, in an order that turns with the rounds."""
    rows, loads = rows_of(config), [os.getloadavg()[0]]
    timed = [(row, call) for row, call in rows if call is not None]
    seconds = {id(row): [] for row, _ in timed}
    for turn in range(config.rounds):
        for row, call in timed[turn:] + timed[:turn]:
            seconds[id(row)].append(seconds_of(call, config.seconds))
    for row, _ in timed:
        every = seconds[id(row)]
        row["ms"] = 1e3 * statistics.median(every)
        row["ms_every"] = [1e3 * one for one in every]
        row["tflops"] = row["flops"] / statistics.median(every) / 1e12
    versions = {
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": jax.devices()[0].device_kind,
        "platform_version": jax.devices()[0].client.platform_version.splitlines()[0],
        "cores": os.cpu_count(),
        "dtype": ModelConfig().compute_dtype.name,
        "load_average": [loads[0], os.getloadavg()[0]],
        "versions": versions,
        "config": {
            key: value for key, value in dataclasses.asdict(config).items() if key != "out"
        },
        "rows": [row for row, _ in rows],
    }


def table(platform: str, folder: pathlib.Path) -> str:
    """Results of one platform as Markdown; where there are none, that is what it says."""
    path = folder / f"attention-{platform}.json"
    if not path.exists():
        return f"## {platform.upper()}\n\n" + "\n".join(
            ["| implementation | |", "|---|---|"]
            + [
                f"| {name} | not yet measured on {platform.upper()} |"
                for name in RUNS_ON[platform]
            ]
        )
    result = json.loads(path.read_text())
    setting, before_after = (
        result["config"],
        "{:.1f} before and {:.1f} after".format(*result["load_average"]),
    )
    lines = [
        f"## {platform.upper()}",
        "",
        f"{result['device']} ({result['cores']} CPU cores), {result['date']}, "
        f"{', '.join(f'{name} {version}' for name, version in result['versions'].items())}; load {before_after}. "
        f"A batch has {setting['tokens']} tokens, {setting['heads']} query heads on "
        f"{setting['heads'] // setting['group']} key heads of width {setting['width']}, {result['dtype']}, "
        f"{'causal' if setting['causal'] else 'not causal'}. Median of {setting['rounds']} interleaved rounds "
        "(fastest to slowest).",
        "",
        "| tokens | pass | implementation | ms | TFLOP/s | time of reference | temporaries, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    kind = lambda row: (row["length"], row["segments"], row["pass"])
    times = {
        kind(row): row.get("ms") for row in result["rows"] if row["implementation"] == "reference"
    }
    for row in result["rows"]:
        part = row["length"] // row["segments"]
        tokens = f"{part}" if row["segments"] == 1 else f"{row['segments']} x {part}"
        start = f"| {tokens} | {row['pass']} | {row['implementation']} |"
        if "failed" in row:
            lines.append(f"{start} {row['failed']} | | | |")
            continue
        base = times[kind(row)]
        ratio = f"{row['ms'] / base:.2f}" if base else ""
        spread = f"{row['ms']:.3g} ({min(row['ms_every']):.3g} to {max(row['ms_every']):.3g})"
        lines.append(
            f"{start} {spread} | {row['tflops']:.3g} | {ratio} | {row['temporary_MiB']:.0f} |"
        )
    return "\n".join(lines)


def schedule_table(folder: pathlib.Path) -> str:
    """What benchmarks/tpu_schedule.py has counted, as Markdown."""
    path = folder / "tpu_schedule.json"
    result = json.loads(path.read_text()) if path.exists() else {"topology": "a TPU", "rows": []}
    lines = [
        "## Inner loops as compiled for a TPU",
        "",
        f"{result['topology']}, bfloat16, {', '.join(f'{k} {x}' for k, x in result.get('versions', {}).items())}; "
        "`python -m benchmarks.tpu_schedule`. Ideal: the cycles that a tile's products take the matrix units at peak "
        "rate; share: of the bundles. Waiting is not counted, so that a share can be above 1. Slots: the fullest. "
        "A product of width 64 leaves half of a matrix unit empty; half is then about the most that a share can be.",
        "",
        "| width | kernel | tile | bundles | ideal | share | slots filled |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        fullest = sorted(row["slots"].items(), key=lambda slot: -slot[1])[:4]
        tile, slots = (
            " x ".join(map(str, row["tile"])),
            ", ".join(f"{name} {share:.2f}" for name, share in fullest),
        )
        numbers = f"{row['bundles']} | {row['ideal']:.0f} | {row['share']:.2f}"
        lines.append(f"| {row['width']} | {row['kernel']} | {tile} | {numbers} | {slots} |")
    return "\n".join(lines)


def write_readme(folder: pathlib.Path) -> None:
    """All tables anew, from the JSON beside them."""
    written = "Written by `python -m benchmarks.attention` and `python -m benchmarks.tpu_schedule`; not edited by hand."
    tables = [*(table(platform, folder) for platform in RUNS_ON), schedule_table(folder)]
    (folder / "README.md").write_text(
        "\n\n".join(["# Attention: results", written, *tables]) + "\n"
    )


def main(config: Config) -> None:
    """Measures, writes the JSON, and writes all platforms' tables anew."""
    cpu = jax.default_backend() == "cpu"
    defaults = {
        "tokens": 4096 if cpu else 16384,
        "heads": 4 if cpu else 16,
        "width": 64 if cpu else 128,
    }
    config = dataclasses.replace(
        config, **{key: getattr(config, key) or value for key, value in defaults.items()}
    )
    folder = pathlib.Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    result = measure(config)
    (folder / f"attention-{jax.default_backend()}.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    write_readme(folder)
    print(table(jax.default_backend(), folder))


if __name__ == "__main__":
    flags.run(main, Config)
