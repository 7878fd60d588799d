"""A run's metrics for TensorBoard, written at once and in the caller's thread."""

import pathlib
import re
import socket
import struct
import time
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c


class Board:
    """An event file of its own for each start of a run. All methods raise OSError.

    Rows are on the disk when `write` returns, as far as the system is concerned: a killed run
    leaves no fewer here than in metrics.jsonl.
    """

    def __init__(self, folder: pathlib.Path, start: int):
        """Begin a file in `folder` that takes the place of what lies there after step `start`.

        The folder is made where it is missing. `start`: steps that the run has finished, 0 for a
        new one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / next_name(folder)).open("xb")
        self._append(file_version="brain.Event:2")
        self._append(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the metrics of `step`, {name: value}."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._append(step=step, summary=Summary(value=points))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, **content: Any) -> None:
        event = Event(wall_time=time.time(), **content)
        self._file.write(framed(event.SerializeToString()))
        self._file.flush()


def next_name(folder: pathlib.Path) -> str:
    """Return a name for an event file that comes after all names in `folder`; make no file.

    TensorBoard reads files in the order of their names, which begin with their time in seconds: a
    clock that was set back, or two starts in a second, must not turn the order.
    """
    times = [int(time.time())]
    for path in folder.iterdir():
        named = re.match(r"events\.out\.tfevents\.(\d+)", path.name)
        if named:
            times.append(int(named[1]) + 1)
    return f"events.out.tfevents.{max(times):010}.{socket.gethostname()}"


def framed(event: bytes) -> bytes:
    """Frame an event, serialised, as TensorFlow's record files do: length, sum, event, sum."""
    length = struct.pack("<Q", len(event))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, event)]
    return length + sums[0] + event + sums[1]
