"""A file that nobody has read yet, opened by a process of its own with an empty cache."""

import datetime
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from benchmarks.rows import cpu_name

ROOT = str(pathlib.Path(__file__).parents[1])


def opened_fresh(program: str, path: pathlib.Path, code: str = ROOT) -> dict[str, Any]:
    """Run the Python text `program` on the file `path`; return what it prints, and the machine.

    `program` prints one JSON object. `code`: folder of the code that it imports. What it keeps
    lies in a folder beside `path`, which the caller removes.
    """
    load = os.getloadavg()[0]
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=code,
        env={**os.environ, "PLUMB_CACHE": str(path.parent / "cache"), "PYTHONPATH": code},
    )
    return {
        **json.loads(done.stdout),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": load,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
