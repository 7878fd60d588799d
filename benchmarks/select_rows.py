"""Selections of rows over a million embeddings: seconds, and the most memory, of each.

    python -m benchmarks.select_rows                    # a million rows of 256 random numbers
    python -m benchmarks.select_rows --rows=20000 --methods=density,k_center --out=/tmp/results

Each selection runs in a process of its own, from embeddings in a memory-mapped file, as
collect/select.py keeps them: pages of that file that were read count as memory. The results are
written after every one; a method that has a result there is not run again with --missing. The
table in docs/less_data.md is written from them.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import datetime
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import tempfile
import time
from typing import Any

import jax
import numpy as np

from data import selection, selection_isa
from runtime import flags
from runtime.errors import UserError, require

RESULTS = pathlib.Path(__file__).parent / "results"
DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "less_data.md"
FIRST = "<!-- written by python -m benchmarks.select_rows -->"
LAST = "<!-- end -->"
# Numbers that are drawn at a time.
PART = 65_536


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int = 1_000_000
    """Rows chosen among."""
    width: int = 256
    """Numbers of an embedding."""
    shares: tuple[float, ...] = (0.01, 0.1)
    """Shares of the rows that are chosen."""
    methods: str = "random,highest,isa,density,log_det,facility,k_center"
    """Methods, parted by commas."""
    missing: bool = False
    """Keep the results that are there, and run what is missing."""
    out: str = str(RESULTS)
    """Folder of select-<platform>.json."""
    seed: int = 0
    """Seed of the embeddings and of what is drawn."""


def choose(method: str, embeddings: np.ndarray, k: int, key: jax.Array) -> np.ndarray:
    """Choose rows as collect/select.py does, scores of embeddings included."""
    if method == "isa":
        return selection_isa.isa(embeddings, k, key=key)
    scores = embeddings[:, 0]
    if method == "density":
        scores = selection.kernel_sums(embeddings, key)
    return selection.SELECTIONS[method](embeddings, scores, None, k, key)


def timed(path: str, method: str, k: int, seed: int, results: Any) -> None:
    """Time one selection, and put {seconds, peak_mib} into the queue `results`."""
    embeddings = np.load(path, mmap_mode="r")
    # Imports and the first program are not of the method.
    key = jax.random.key(seed)
    before = peak_mib()
    started = time.perf_counter()
    chosen = choose(method, embeddings, k, key)
    seconds = time.perf_counter() - started
    distinct = len(set(chosen.tolist()))
    if distinct != k:
        raise ValueError(f"{method}: {k} rows asked for, {distinct} chosen")
    results.put({"seconds": round(seconds, 2), "peak_mib": peak_mib(), "before_mib": before})


def peak_mib() -> int:
    """Return the most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def write_embeddings(path: pathlib.Path, config: Config) -> None:
    """Write standard normal numbers [rows, width], part by part.

    Through a file, not a map: what this process has in memory counts as its children's most.
    """
    header = {"descr": "<f4", "fortran_order": False, "shape": (config.rows, config.width)}
    rng = np.random.default_rng(config.seed)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, config.rows, PART):
            count = min(PART, config.rows - start)
            file.write(rng.standard_normal((count, config.width), dtype=np.float32).tobytes())


def in_a_process(path: pathlib.Path, method: str, k: int, seed: int) -> dict[str, Any]:
    """Run `timed` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=timed, args=(str(path), method, k, seed, results))
    child.start()
    child.join()
    if child.exitcode:
        raise UserError(f"{method}: its process ended with code {child.exitcode}")
    return results.get()


def processor() -> str:
    """Name the processor."""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main(config: Config) -> dict[str, Any]:
    """Time every method at every share; return what the file holds."""
    names = config.methods.split(",")
    known = {*selection.SELECTIONS, "isa"}
    require(set(names) <= known, f"--methods={config.methods}: choose of {', '.join(known)}")
    path = pathlib.Path(config.out) / f"select-{jax.default_backend()}.json"
    rows: list[dict[str, Any]] = []
    if config.missing and path.exists():
        rows = json.loads(path.read_text())["rows"]
    there = {(row["method"], row["k"]) for row in rows}

    with tempfile.TemporaryDirectory() as folder:
        embeddings = pathlib.Path(folder) / "embeddings.npy"
        write_embeddings(embeddings, config)
        for method in names:
            for share in config.shares:
                k = round(share * config.rows)
                if (method, k) in there:
                    continue
                load = os.getloadavg()[0]
                cores = len(os.sched_getaffinity(0))
                found = in_a_process(embeddings, method, k, config.seed)
                row = {"method": method, "k": k, **found, "cores": cores, "load": round(load, 1)}
                row["ended"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
                print(row, flush=True)
                rows.append(row)
                written = {
                    "rows_chosen_among": config.rows,
                    "width": config.width,
                    "cpu": processor(),
                    "numpy": np.__version__,
                    "rows": rows,
                }
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(written, indent=1) + "\n")
    if path.parent == RESULTS:
        write_table(json.loads(path.read_text()))
    return {"rows": rows}


def table_of(result: dict[str, Any]) -> str:
    """Return the results as a table in Markdown, and a line on how they were measured."""
    lines = [
        "| method | rows chosen | seconds | peak, MiB | cores | load before |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        cells = [
            row["method"],
            f"{row['k']:,}",
            f"{row['seconds']:,.1f}",
            f"{row['peak_mib']:,}",
            f"{row['cores']}",
            f"{row['load']}",
        ]
        joined = " | ".join(cells)
        lines.append(f"| {joined} |")
    shape = f"{result['rows_chosen_among']:,} random rows of {result['width']} numbers"
    lines += ["", f"{shape}; {result['cpu']}, numpy {result['numpy']}."]
    return "\n".join(lines)


def write_table(result: dict[str, Any]) -> None:
    """Write the table into the document, between its two marks."""
    text = DOCUMENT.read_text("utf-8")
    before, _, rest = text.partition(FIRST)
    _, _, after = rest.partition(LAST)
    DOCUMENT.write_text(f"{before}{FIRST}\n\n{table_of(result)}\n\n{LAST}{after}", "utf-8")


if __name__ == "__main__":
    flags.run(main, Config)
