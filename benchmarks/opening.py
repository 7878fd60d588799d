"""Time and memory of opening a JSON Lines file for the first time, in a process of its own.

    python -m benchmarks.opening --megabytes=1000

Makes a file of Python's own source texts, about 2 kB a row, in a temporary folder; opens it with
an empty cache, and once more; prints seconds and the peaks of the memory, of the process and of
the largest one that it starts, and adds a row to results/opening.json.
"""

import dataclasses
import json
import os
import pathlib
import random
import tempfile
from typing import Any

from benchmarks import command
from benchmarks.fresh import ROOT, opened_fresh
from benchmarks.rows import RESULTS

LEAST, MOST = 1000, 3000
"""Characters of a row's text."""
# What the process runs: the imports first, for they cost memory and time without any file.
PROGRAM = """
import json, os, resource, sys, time
import tensorflow_datasets
from data.sources import open_source

def peak_mb(whose):
    return resource.getrusage(whose).ru_maxrss / 1e3

def cpu_seconds():
    return sum(os.times()[:4])

before = peak_mb(resource.RUSAGE_SELF)
wall, cpu = time.perf_counter(), cpu_seconds()
source = open_source(sys.argv[1], "text", "train")
print(json.dumps({
    "rows": len(source.rows), "seconds": time.perf_counter() - wall,
    "cpu_seconds": cpu_seconds() - cpu, "imports_mb": before,
    "peak_mb": peak_mb(resource.RUSAGE_SELF), "worker_mb": peak_mb(resource.RUSAGE_CHILDREN),
}))
"""


@dataclasses.dataclass(frozen=True)
class Config:
    megabytes: int = 1000
    """Size of the file, in millions of bytes."""
    folder: str = tempfile.gettempdir()
    """Where the file and what is made of it lie, until the end; it takes twice the size."""
    code: str = ROOT
    """Folder of the code that opens it: of another version, to compare with."""
    label: str = "this version"
    """How the row calls that code."""
    out: str = RESULTS
    """Folder of the results."""


def write_file(path: pathlib.Path, size: int) -> None:
    """Write rows {"text"} until the file has `size` bytes; pieces of the standard library."""
    library = pathlib.Path(os.__file__).parent
    texts = [module.read_text() for module in sorted(library.glob("*.py"))]
    whole = "".join(texts)
    random_numbers = random.Random(0)
    written = 0
    with path.open("w") as file:
        while written < size:
            start = random_numbers.randrange(len(whole) - MOST)
            length = random_numbers.randrange(LEAST, MOST)
            # The number makes each row another one.
            text = f"{written} {whole[start : start + length]}"
            line = json.dumps({"text": text}) + "\n"
            file.write(line)
            written += len(line)


def main(config: Config) -> dict[str, Any]:
    """Make the file, open it, print what it took and add it to the rows; return the row."""
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        path = pathlib.Path(folder, "texts.jsonl")
        write_file(path, config.megabytes * 1_000_000)
        found = opened_fresh(PROGRAM, path, config.code)
        again = opened_fresh(PROGRAM, path, config.code)
    result = {
        "label": config.label,
        "megabytes": config.megabytes,
        **found,
        "again_seconds": again["seconds"],
    }
    print(
        f"{config.megabytes} MB, {result['rows']} rows: {result['seconds']:.1f} s, "
        f"{result['cpu_seconds']:.1f} CPU-s, and once more {result['again_seconds']:.1f} s; peak "
        f"{result['peak_mb']:.0f} MB, of which {result['imports_mb']:.0f} before the file; of the "
        f"largest process started {result['worker_mb']:.0f} MB"
    )
    results = pathlib.Path(config.out, "opening.json")
    rows = json.loads(results.read_text()) if results.exists() else []
    results.write_text(json.dumps([*rows, result], indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(command.parse(Config))
