"""Run scripts in tests: as from the command line, but in this process."""

import json
import os
import pathlib
from typing import Any

import pytest

from runtime import flags

ONE_DEVICE = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
"""XLA_FLAGS of a process that is to have one device."""


def run(script: Any, *argv: Any) -> Any:
    """Return what `script`, a module, returns under the flags `argv`; raise UserError."""
    return script.main(flags.parse(script.Config, [str(a) for a in argv]))


def fails(script: Any, argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """Run a script as a command that must fail with code 2; return its one line on stderr."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["script", *argv])
        with pytest.raises(SystemExit) as stop:
            flags.run(script.main, script.Config)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    """Write a JSON line for each of `rows`; return `path`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl in a run's folder."""
    return [
        json.loads(line) for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()
    ]
