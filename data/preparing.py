"""Prepare data files: check and adapt each row once, and keep the records for random access.

A prepared folder holds the records as ArrayRecord files, what decides which are held out, and the
sums of both. A large data set is cut into parts, which a process for each core prepares; what is
kept, and what is said of bad rows, does not depend on how many there are.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data.bad_rows import are_bad_rows_skipped
from data.fields import FieldError, LeftOut, Row, name_shown
from data.formats import Part, parts_of, read_part
from data.messages import is_trained
from data.records import SCHEMAS, Record, Schema, unread_fields
from runtime.data_files import content_sum
from runtime.errors import TryAgain, UserError
from runtime.hosts import progressed
from runtime.writes import beside

PART = 32 << 20
"""Bytes of data that are prepared together, about as many at least: two seconds' work."""
MOST_GROUPS = 64
"""Files of records in a prepared folder, about as many at most."""
GROUPS_A_PROCESS = 2
"""Files of records for which a process more is started, which takes a second to start."""
SUMS = "sums.json"
"""File of a prepared folder: the SHA-256 of each other file."""
RECORDS = "records-{:05}.array_record"
"""A file of records in a prepared folder, each as JSON; by their names in the data's order."""
LOOK = 0.2
"""Seconds between two looks at what processes have done."""


class Found(NamedTuple):
    """Counts and faults of some of the rows."""

    keys_N: np.ndarray
    """For each record the hash that decides whether it is held out, uint64."""
    candidates: int
    """The most responses that a comparison has."""
    turns: int
    """Turns of the assistant."""
    trained: int
    """Those of them that are trained on."""
    unread: frozenset[str]
    """Fields that nothing reads."""
    skipped: list[str]
    """Faults of the rows that were passed over."""
    left_out: int
    """Rows that say themselves that they are not trained on."""


# ---- A folder, all of it or nothing ----


def prepare(
    data: str, files: Sequence[pathlib.Path], schema: Schema, folder: pathlib.Path
) -> None:
    """Make `folder` of `files`, which `data` names: all of it or nothing.

    Raises OSError where there is no room, and UserError for a bad row.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with beside(folder, is_folder=True) as (partial, _):
        built = partial / "built"
        built.mkdir()
        found = _write(files, schema, built)
        if found.skipped and not len(found.keys_N):
            raise UserError(found.skipped[0])
        if not len(found.keys_N):
            raise UserError(f"{data}: has no rows; give a file that has some")
        np.savez(built / "split.npz", keys=found.keys_N, candidates=found.candidates)
        (built / "notes.json").write_text(json.dumps(_notes(found)))
        (built / "skipped.json").write_text(json.dumps(found.skipped))
        sums = {file.name: content_sum(file) for file in built.iterdir()}
        (built / SUMS).write_text(json.dumps(sums))
        try:
            built.rename(folder)
        except OSError:
            # Another process may have been faster.
            if not folder.exists():
                raise


def damage(folder: pathlib.Path) -> str | None:
    """Return what is wrong with a prepared folder, by its sums; None for one that is whole."""
    try:
        sums = json.loads((folder / SUMS).read_bytes())
        for name, digest in sums.items():
            if content_sum(folder / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, AttributeError) as fault:
        return f"is damaged ({fault})"
    return None if "split.npz" in sums else "is damaged"


def stored_records(folder: pathlib.Path) -> Sequence[bytes]:
    """Open the records of a prepared folder, each read when it is asked for."""
    return _stored(sorted(folder.glob("*.array_record")))


def _stored(paths: Sequence[pathlib.Path]) -> Sequence[bytes]:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource([str(path) for path in paths])


def _notes(found: Found) -> list[str]:
    """Return what the user may not have meant."""
    notes = []
    if found.skipped:
        count, rows = len(found.skipped), len(found.skipped) + len(found.keys_N)
        notes.append(f"{count:,} of {rows:,} rows are skipped; the first is {found.skipped[0]}")
    if found.left_out:
        notes.append(f"{found.left_out:,} rows say that they are not trained on: left out")
    if found.unread:
        names = [name_shown(name) for name in sorted(found.unread)]
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        notes.append(f"fields that nothing reads: {', '.join(names[:12])}{more}")
    if found.trained < found.turns:
        notes.append(
            f"{found.turns - found.trained} of {found.turns} assistant's turns are not trained on "
            "(weight 0, or they call tools)"
        )
    return notes


# ---- Parts, each prepared by itself ----


def _write(files: Sequence[pathlib.Path], schema: Schema, folder: pathlib.Path) -> Found:
    """Write the records of `files` into `folder`, a file for each group of parts."""
    groups = _groups(files)
    skip = are_bad_rows_skipped()
    tasks = [
        functools.partial(_write_group, group, schema, skip, folder / RECORDS.format(number))
        for number, group in enumerate(groups)
    ]
    cores = len(os.sched_getaffinity(0))
    with tqdm(desc=f"preparing {files[0].name}", unit="row") as bar:
        processes = min(cores, len(tasks) // GROUPS_A_PROCESS)
        if processes > 1:
            return _merged(_by_processes(tasks, processes, bar))

        def count_row() -> None:
            progressed()
            bar.update()

        return _merged([task(count_row) for task in tasks])


def _groups(files: Sequence[pathlib.Path]) -> list[list[Part]]:
    """Cut files into parts, and those into groups of about equal bytes, in order."""
    whole = sum(file.stat().st_size for file in files)
    size = max(PART, -(-whole // MOST_GROUPS))
    groups: list[list[Part]] = []
    filled = 0
    for file in files:
        for part in parts_of(file, size):
            # The first part, and the one that crosses a multiple of `size`.
            if not groups or filled // size != (filled + part.size) // size:
                groups.append([])
            groups[-1].append(part)
            filled += part.size
    return groups


def _merged(all_found: Sequence[Found]) -> Found:
    """Put together what was found in groups of parts, in their order."""
    return Found(
        keys_N=np.concatenate([found.keys_N for found in all_found]),
        candidates=max(found.candidates for found in all_found),
        turns=sum(found.turns for found in all_found),
        trained=sum(found.trained for found in all_found),
        unread=frozenset().union(*(found.unread for found in all_found)),
        skipped=[fault for found in all_found for fault in found.skipped],
        left_out=sum(found.left_out for found in all_found),
    )


def _write_group(
    parts: Sequence[Part],
    schema: Schema,
    skip: bool,
    path: pathlib.Path,
    on_row: Callable[[], Any],
) -> Found:
    """Write the records of `parts` to `path`, so that each can be read by itself.

    `skip`: pass over bad rows, else raise UserError. `on_row`: called for each row.
    """
    # Not there where a benchmark runs without data.
    from array_record.python import array_record_module

    skipped: list[str] = []
    left_out: list[str] = []
    on_fault = skipped.append if skip else _stop
    rows = rows_and_records(parts, schema, on_fault, left_out.append, on_row)
    keys = []
    candidates = turns = trained = 0
    unread: set[str] = set()
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    try:
        for row, record in rows:
            writer.write(json.dumps(record).encode())
            keys.append(_key(record))
            candidates = max(candidates, len(record.get("responses", ())))
            unread |= unread_fields(row, schema)
            # Turns that are context only.
            said = [
                message for message in record.get("messages", ()) if message["role"] == "assistant"
            ]
            turns += len(said)
            trained += sum(map(is_trained, said))
    finally:
        writer.close()
    stored = len(_stored([path])) if keys else 0
    if stored != len(keys):
        raise RuntimeError(f"{parts[0].path}: {len(keys)} rows, but {stored} are kept of them")
    keys_N = np.array(keys, np.uint64)
    return Found(keys_N, candidates, turns, trained, frozenset(unread), skipped, len(left_out))


def rows_and_records(
    parts: Iterable[Part],
    schema: Schema,
    on_fault: Callable[[str], None],
    on_left_out: Callable[[str], None],
    on_row: Callable[[], Any] = progressed,
) -> Iterator[tuple[Row, Record]]:
    """Yield each row of the parts, one after the other, and its record.

    Called with `file:line: field: reason`, and the row passed over, are `on_fault` for a bad row
    and `on_left_out` for one that says that it is not trained on. `on_row`: called for each row,
    whether or not it is passed over.
    """
    adapt = SCHEMAS[schema]
    for part in parts:
        for number, row in read_part(part):
            on_row()
            try:
                if isinstance(row, FieldError):
                    raise row
                record = adapt(row)
            except FieldError as fault:
                pass_over = on_left_out if isinstance(fault, LeftOut) else on_fault
                pass_over(f"{part.path}:{number}: {fault}")
                continue
            yield row, record


def _stop(fault: str) -> None:
    raise UserError(fault)


def _key(record: Record) -> int:
    """Hash what decides whether a record is held out: its prompt, or all of it without one.

    So no prompt is in both splits, whatever the schema.
    """
    messages = record.get("prompt") or record.get("messages", [])
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    text = json.dumps(messages or record, sort_keys=True)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8])


# ---- Processes ----


def _by_processes(
    tasks: Sequence[Callable[[Callable[[], Any]], Found]], processes: int, bar: tqdm
) -> list[Found]:
    """Run tasks in several processes; return what each found. The first that fails is raised."""
    # Forked, they would have the locks of this process's threads, and no thread to free them.
    context = multiprocessing.get_context("spawn")
    # Without locks, which a process that is killed may hold: each task counts in a place of its
    # own.
    rows = context.RawArray("q", len(tasks))
    is_stopped = context.RawValue("b")
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, _start, (rows, is_stopped))
    try:
        with _without_main():
            futures = [pool.submit(_run, number, task) for number, task in enumerate(tasks)]
        found = []
        told = 0
        for future in futures:
            while not concurrent.futures.wait([future], timeout=LOOK).done:
                done = sum(rows)
                if done > told:
                    progressed()
                    bar.update(done - told)
                    told = done
            found.append(future.result())
        bar.update(sum(rows) - told)
        return found
    except BrokenProcessPool:
        raise TryAgain(
            "a process that prepares data was ended, perhaps for lack of memory; start again, on "
            "fewer cores (taskset) where there is little"
        ) from None
    finally:
        is_stopped.value = True
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Let processes begin without the main module.

    Else each would run the command's file, or a user's script, once more: for its names, which
    are not needed, and all that it imports.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_rows: Any = None
"""In a process of the pool: the rows that each task has done."""
_is_stopped: Any = None
"""In a process of the pool: whether its parent asks for no more."""


def _start(rows: Any, is_stopped: Any) -> None:
    """Prepare a process of the pool: it ends with its parent, which alone is interrupted."""
    global _rows, _is_stopped
    _rows, _is_stopped = rows, is_stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a process of the pool"
    parent.join()
    os._exit(1)


def _run(number: int, task: Callable[[Callable[[], Any]], Found]) -> Found:
    """Run task `number` in a process of the pool."""

    def count_row() -> None:
        _rows[number] += 1
        if _is_stopped.value:
            raise RuntimeError("stopped by its parent")

    return task(count_row)
