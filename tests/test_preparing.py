"""Files cut into parts and prepared by several processes: the same records, numbers and faults."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tqdm import tqdm

from data import formats, preparing
from data.bad_rows import set_on_bad_row
from data.formats import parts_of, read_lines, read_parquet, read_part
from data.sources import open_source
from runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cores(monkeypatch):
    """Set the cores that this process has, and the bytes of a part."""

    def have(number, part):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(number)))
        monkeypatch.setattr(preparing, "PART", part)

    return have


def texts(count, seed=0):
    rng = random.Random(seed)
    return [{"text": f"{i} " + "word " * rng.randrange(1, 60)} for i in range(count)]


def write(path, rows, end=b"\n"):
    lines = [json.dumps(row).encode() for row in rows]
    path.write_bytes(end.join(lines))
    return str(path)


def everything(data, schema="text"):
    return [open_source(data, schema, split).first(10**6) for split in ("all", "heldout")]


CONTENTS = {
    "ends in a newline": b'{"text": "a"}\n' * 40,
    "ends without one": b'{"text": "a"}\n' * 40 + b'{"text": "b"}',
    "blank lines": b'\n\n{"text": "a"}\n\n' * 30 + b"\n\n",
    "carriage returns": b'{"text": "a"}\r\n' * 40,
    "bad lines": b'{"text": "a"}\nnothing\n\xff\n' * 20,
    "one long line": b'{"text": "' + b"x" * 5000 + b'"}\n',
    "empty": b"",
}


@pytest.mark.parametrize("size", [1, 13, 14, 100, 4096])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_parts_of_lines_have_the_lines_and_numbers_of_the_file(tmp_path, content, size):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    parts = parts_of(path, size)
    assert sum(part.size for part in parts) == len(content)
    if len(content) > 2 * size and content.count(b"\n") > 2:
        assert len(parts) > 1

    def shown(rows):
        return [(number, str(row)) for number, row in rows]

    found = [row for part in parts for row in shown(read_part(part))]
    assert found == shown(read_lines(path))


def test_parts_of_parquet_are_its_row_groups(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts(95)), path, row_group_size=20)
    parts = parts_of(path, 100)
    assert [part.before for part in parts] == [0, 20, 40, 60, 80]
    assert [row for part in parts for row in read_part(part)] == list(read_parquet(path))
    # Larger ones hold several row groups, so that a file is not opened for each.
    parts = parts_of(path, path.stat().st_size // 2)
    assert [(part.start, part.end, part.before) for part in parts] == [
        (0, 2, 0),
        (2, 4, 40),
        (4, 5, 80),
    ]
    assert [row for part in parts for row in read_part(part)] == list(read_parquet(path))


def test_other_formats_are_one_part(tmp_path):
    for name in ("rows.json", "rows.csv", "rows.jsonl.gz"):
        (tmp_path / name).write_bytes(b"[" + b" " * 1000 + b"]")
        (part,) = parts_of(tmp_path / name, 10)
        assert part == formats.whole(tmp_path / name)


def test_several_processes_keep_what_one_keeps(tmp_path, cores, cache, capsys):
    write(tmp_path / "a.jsonl", texts(400))
    write(tmp_path / "b.jsonl", [{**row, "unread": 1} for row in texts(300, 1)])
    table = pyarrow.Table.from_pylist(texts(200, 2))
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=40)
    data = str(tmp_path / "*")
    cores(1, 1 << 30)
    alone = everything(data)
    (folder,) = cache.iterdir()
    assert len(list(folder.glob("*.array_record"))) == 1
    said = (folder / "notes.json").read_text()
    for file in folder.iterdir():
        file.unlink()

    cores(3, 10_000)
    assert everything(data) == alone
    (folder,) = cache.iterdir()
    assert len(list(folder.glob("*.array_record"))) > 3
    assert (folder / "notes.json").read_text() == said and "unread" in said


def test_the_first_bad_row_is_named_whichever_process_met_it(tmp_path, cores, cache):
    rows = texts(500)
    rows[260] = rows[470] = {"text": 3}
    data = write(tmp_path / "a.jsonl", rows)
    cores(2, 5_000)
    with pytest.raises(UserError, match=r"a\.jsonl:261: text"):
        open_source(data, "text", "train")
    assert not list(cache.iterdir())

    # Skipped, both are listed in their order.
    set_on_bad_row("skip")
    try:
        assert len(open_source(data, "text", "all")) == 498
        (folder,) = cache.iterdir()
        first, second = json.loads((folder / "skipped.json").read_text())
        assert ":261: text" in first and ":471: text" in second
    finally:
        set_on_bad_row("stop")


def test_a_file_that_grew_since_it_was_cut_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 100)
    first, *_ = parts_of(path, 500)
    path.write_bytes(b'{"text": "ab"}\n' * 100)
    assert len(list(read_part(first))) < 40


def nothing():
    return preparing.Found(np.array([], np.uint64), 0, 0, 0, frozenset(), [], 0)


def idle(on_row):
    """Do no row."""
    time.sleep(1)
    return nothing()


def busy(on_row):
    """Do some rows."""
    for _ in range(5):
        on_row()
        time.sleep(0.3)
    return nothing()


def endless(on_row):
    """Do rows until it is stopped."""
    while True:
        on_row()
        time.sleep(0.01)


def failing(on_row):
    raise UserError("a bad row")


@pytest.mark.parametrize(("task", "is_progress"), [(idle, False), (busy, True)])
def test_only_rows_are_progress(monkeypatch, task, is_progress):
    calls = []
    monkeypatch.setattr(preparing, "progressed", lambda: calls.append(1))
    with tqdm(disable=True) as bar:
        preparing._by_processes([task, task], 2, bar)
    assert bool(calls) == is_progress


def test_a_fault_stops_what_the_others_do(cache):
    """Else this would never end."""
    with tqdm(disable=True) as bar, pytest.raises(UserError, match="a bad row"):
        preparing._by_processes([failing, endless, endless], 2, bar)


BEGUN = """
print("begun")
import os, sys
from data import preparing
from data.sources import open_source
os.sched_getaffinity = lambda _: {0, 1}
preparing.PART = 50_000
open_source(sys.argv[1], "text", "train")
"""


def test_a_script_is_not_run_again_in_each_process(tmp_path, cache):
    data = write(tmp_path / "a.jsonl", texts(2000))
    script = tmp_path / "script.py"
    script.write_text(BEGUN.replace("50_000", "5_000"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), data]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "begun\n"
    (folder,) = cache.iterdir()
    assert len(list(folder.glob("*.array_record"))) > 10


def children(process):
    """Return the processes that `process` has started, but for the tracker of resources."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == process and "spawn_main" in command:
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("killed", ["parent", "child"])
def test_a_process_that_is_killed_leaves_none_behind_and_no_half_folder(tmp_path, cache, killed):
    data = write(tmp_path / "a.jsonl", texts(20_000))
    program = subprocess.Popen(
        [sys.executable, "-c", BEGUN, data], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(workers := children(program.pid)) < 2:
        assert time.monotonic() < deadline and program.poll() is None
        time.sleep(0.01)
    os.kill(program.pid if killed == "parent" else workers[0], signal.SIGKILL)
    _, said = program.communicate(timeout=60)
    if killed == "child":
        assert program.returncode == 1 and "TryAgain: a process that prepares data" in said

    # None is left after a moment, and the next start is whole.
    while any(pathlib.Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(open_source(data, "text", "all")) == 20_000
    (folder,) = cache.iterdir()
    assert preparing.damage(folder) is None
