"""How tests run scripts: as from the command line, but in this process."""

import json
import os
import pathlib
from typing import Any

import pytest

from runtime import flags as config


def run(script: Any, *argv: Any) -> Any:
    """What `script` returns under the flags `argv`; raises UserError."""
    return script.main(config.parse(script.Config, [str(a) for a in argv]))


def fails(script: Any, argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """Runs a script as its guard does; the one line that it ends with."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["script", *argv])
        with pytest.raises(SystemExit) as stop:
            config.run(script.main, script.Config)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    """`path`, with a JSON line for each of `rows`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [
        json.loads(line) for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()
    ]
