"""Output of a process: streams that outlive their reader, and text that is safe to show."""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Iterator

from runtime.errors import UserError

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys and does not show: controls (category Cc) but newline and tab,
those that turn the direction of text, and halves of surrogate pairs, which cannot be written."""


def printable(text: str) -> str:
    """Return `text` with its control characters spelled out, as `\\x1b`; newlines and tabs stay.

    For text of a model or of a record: a terminal would let it clear the screen, set the title or
    write the clipboard.
    """

    def spelled(match: re.Match[str]) -> str:
        return match.group().encode("unicode_escape").decode()

    return CONTROLS.sub(spelled, text)


class PipeClosed(SystemExit):
    """Nobody reads stdout any more, and the command was there to be read."""


class Stream(io.TextIOWrapper):
    """stdout or stderr, whose reader may go away: a pipe that is closed, a disk that is full.

    What cannot be written then and later is lost, without a fault. Where `is_product` is set, the
    text is what the command is for: PipeClosed is raised, or UserError where the disk is full.
    """

    is_product = False

    def write(self, text: str) -> int:
        """Write `text`; return its length, whether or not it arrives."""
        try:
            return super().write(text)
        except OSError as fault:
            self._lose(fault)
            return len(text)

    def flush(self) -> None:
        """Pass on what is buffered."""
        try:
            super().flush()
        except OSError as fault:
            self._lose(fault)

    def _lose(self, fault: OSError) -> None:
        # Below Python too: what is buffered, and what native code writes, goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if not self.is_product:
            # Nowhere as well, if it is stderr that is lost.
            reason = f"{self.name}: {fault.strerror}"
            print(f"warning: {reason}; the command goes on without it", file=sys.stderr)
        elif isinstance(fault, BrokenPipeError):
            raise PipeClosed(128 + signal.SIGPIPE) from None
        else:
            raise UserError(f"stdout: not written: {fault.strerror}") from None


def prepare() -> None:
    """Make a Stream of stdout and of stderr; call it first in a command.

    Characters that their encoding lacks become question marks. A stream that the process was
    started without leads nowhere. Streams that a test has put in their place stay.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _stream_to_nowhere(number))
        elif stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _stream_over(stream))
    if isinstance(sys.stdout, Stream):
        sys.stdout.is_product = True
    # What is typed or piped in may be anything, or nothing.
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def _stream_over(stream: io.TextIOWrapper) -> Stream:
    # Whoever holds the old one, as a log does, goes on with it.
    stream.reconfigure(errors="replace")
    return Stream(
        stream.buffer,
        encoding=stream.encoding,
        errors="replace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _stream_to_nowhere(number: int) -> Stream:
    """Return a Stream to /dev/null, under the file descriptor `number` if that is free."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(number)
    except OSError:
        # The next file to be opened would get the number, and what native code says.
        os.dup2(nowhere, number)
    return Stream(os.fdopen(nowhere, "wb"), encoding="utf-8", errors="replace")


def outlive_stdout() -> None:
    """Go on when nobody reads stdout: for commands whose work is in files."""
    if isinstance(sys.stdout, Stream):
        sys.stdout.is_product = False


@contextlib.contextmanager
def ended_by_pipe() -> Iterator[None]:
    """End by SIGPIPE, without a traceback, where a pager is left while help is printed.

    A context manager. Afterwards the signal is handled as before: a process that goes on, such as
    one that runs many tests, would otherwise end without a word at any pipe or socket that closes.
    """
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
    finally:
        # What is still buffered would meet the closed pipe later.
        sys.stdout.flush()
        signal.signal(signal.SIGPIPE, before)


def end_by_pipe() -> None:
    """End this process as one that writes to a closed pipe does, by SIGPIPE."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.raise_signal(signal.SIGPIPE)
