"""Time and memory from a Parquet file that nobody has read yet to the first batch of its tokens.

    python -m benchmarks.parquet --megabytes=1000

Makes a file of random words, 2 kB a row, in a temporary folder; a process of its own opens it
with an empty cache, trains a tokenizer on 200 rows and makes a batch; and once more. Prints
seconds and the peaks of the memory, of the process and of the largest one that it starts, and
writes results/parquet.json.
"""

import dataclasses
import json
import pathlib
import tempfile
from typing import Any

import numpy as np

from benchmarks import command
from benchmarks.fresh import opened_fresh
from benchmarks.rows import RESULTS

WORDS, WORDS_A_ROW = 50_000, 300
GROUP = 2000
"""Rows of a row group."""
PROGRAM = """
import json, os, resource, sys, tempfile, time

def peak_mib(whose):
    return resource.getrusage(whose).ru_maxrss / 1024

wall = time.perf_counter()
from data.batches import text_batches
from data.sources import open_source
from data.tokenizer import Tokenizer

source = open_source(sys.argv[1], "text", "train")
opened = time.perf_counter() - wall
texts = [record["text"] for record in source.first(200)]
with tempfile.TemporaryDirectory() as folder:
    tokenizer = Tokenizer.train(texts, folder, 4096)
batch = next(text_batches(source, tokenizer, batch_size=8, length=512))
assert batch["loss_mask_BT"].any()
print(json.dumps({
    "rows": len(source), "opened_s": opened, "first_batch_s": time.perf_counter() - wall,
    "cpu_s": sum(os.times()[:4]), "peak_mib": peak_mib(resource.RUSAGE_SELF),
    "worker_mib": peak_mib(resource.RUSAGE_CHILDREN),
}))
"""


@dataclasses.dataclass(frozen=True)
class Config:
    megabytes: int = 1000
    """Size of the file, in millions of bytes."""
    folder: str = tempfile.gettempdir()
    """Where the file and what is made of it lie, until the end; it takes twice the size."""
    out: str = RESULTS
    """Folder of the results."""


def write_file(path: pathlib.Path, size: int) -> None:
    """Write rows {"text", "id"} until the file has `size` bytes, frequent words first."""
    import pyarrow.parquet

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 11))) for _ in range(WORDS)])
    schema = pyarrow.schema([("text", pyarrow.string()), ("id", pyarrow.int64())])
    rows = 0
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        while path.stat().st_size < size:
            places_RW = (WORDS * rng.random((GROUP, WORDS_A_ROW)) ** 2).astype(int)
            texts = [" ".join(row) for row in words[places_RW].tolist()]
            ids = list(range(rows, rows + GROUP))
            file.write_table(pyarrow.table({"text": texts, "id": ids}, schema))
            rows += GROUP


def main(config: Config) -> dict[str, Any]:
    """Make the file, read it, print and write what it took; return what is written."""
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        path = pathlib.Path(folder, "texts.parquet")
        write_file(path, config.megabytes * 1_000_000)
        found = opened_fresh(PROGRAM, path)
        again = opened_fresh(PROGRAM, path)
    result = {
        "megabytes": config.megabytes,
        **found,
        "again_first_batch_s": again["first_batch_s"],
    }
    print(
        f"{config.megabytes} MB, {result['rows']:,} rows: first batch after "
        f"{result['first_batch_s']:.1f} s, {result['cpu_s']:.1f} CPU-s, and once more after "
        f"{result['again_first_batch_s']:.1f} s; peak {result['peak_mib']:.0f} MiB, of the "
        f"largest process started {result['worker_mib']:.0f} MiB"
    )
    pathlib.Path(config.out, "parquet.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(command.parse(Config))
