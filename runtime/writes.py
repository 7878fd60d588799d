"""Whole writes: a file is there with all of its content or not at all; and what disks say.

What is being written lies beside its place, hidden and locked: `.NAME.<random>.partial`. One that
nobody holds was left by a process that was killed, and goes with the next write to its place.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator
from typing import BinaryIO, TextIO

from runtime.errors import TryAgain, UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}

# Libraries wrap what the system says into errors of their own.
FULL_WORDS = "No space left on device|quota exceeded|File too large"
FORBIDDEN_WORDS = "Permission denied|Read-only file system"
TOO_MANY_FILES_WORDS = "Too many open files"
LATE_WORDS = "timed out after"


# --- files


def atomic_bytes(path: pathlib.Path, content: bytes) -> None:
    """Write the file `path` whole or not at all; it is on the disk afterwards.

    A file that exists is replaced; the folder must exist. Raises UserError, as `disk_faults` does.
    """
    with disk_faults(path):
        # The content first, then its name.
        with beside(path) as (new, lock):
            with os.fdopen(os.dup(lock), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Put the names in `folder` on the disk; raises OSError."""
    opened = os.open(folder, os.O_RDONLY)
    os.fsync(opened)
    os.close(opened)


@contextlib.contextmanager
def atomic_text(path: str, anew: bool = False) -> Iterator[TextIO]:
    """Open a text file that appears at `path` once all is written; a fault leaves nothing.

    A context manager. The text is UTF-8 wherever it is written; what that cannot hold is spelled
    out. The file's folder is made. A file that exists is replaced; `anew`: raise UserError if it
    is not empty. Raises UserError, as `disk_faults` does, where the file cannot be made, and for a
    folder, a pipe or a device; what goes wrong as it is written is raised as it is.
    """
    out = pathlib.Path(path)
    # What the caller writes is no fault of the disk's until it is closed.
    with contextlib.ExitStack() as stack:
        with disk_faults(out):
            refuse_taken(out, anew)
            out.parent.mkdir(parents=True, exist_ok=True)
            new, lock = stack.enter_context(beside(out))
            file = os.fdopen(os.dup(lock), "w", encoding="utf-8", errors="backslashreplace")
        with file:
            yield file
        new.replace(out)


def refuse_taken(out: pathlib.Path, anew: bool = True) -> None:
    """Raise UserError where a file at `out` would take the place of what is no file.

    As of a folder, a pipe or /dev/null. With `anew` that of a file that is not empty is not taken
    either. Raises OSError for a name that no file can have.
    """
    if not out.exists():
        return
    # To rename a file to a device's name would remove the device.
    if not out.is_file():
        raise UserError(f"{out}: a folder or a device, no file; name another")
    if anew and out.stat().st_size:
        raise UserError(f"{out}: exists; remove it or name another place")


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` once all is written; a fault leaves nothing.

    A context manager. The file's folder must exist; a file that exists is replaced. Raises
    UserError, as `disk_faults` does. It may not be on the disk yet afterwards (`atomic_bytes`).
    """
    with disk_faults(path), beside(path) as (new, lock):
        with os.fdopen(os.dup(lock), "wb") as file:
            yield file
        new.replace(path)


@contextlib.contextmanager
def atomic_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Make an empty folder that appears at `path` with all that is written into it, or never.

    A context manager, which yields where to write; the folder around it is made. Raises UserError,
    as `disk_faults` does, also where there is a folder that is not empty at `path`.
    """
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path, is_folder=True) as (new, _):
            yield new
            new.replace(path)


@contextlib.contextmanager
def beside(path: pathlib.Path, is_folder: bool = False) -> Iterator[tuple[pathlib.Path, int]]:
    """Make a new file or folder beside `path`: (its path, a descriptor that locks it).

    It is gone afterwards, unless it was renamed. What killed processes left is removed first.
    """
    remove_left_over(path)
    new, lock = _make_locked(path, is_folder)
    try:
        yield new, lock
    finally:
        if is_folder:
            shutil.rmtree(new, ignore_errors=True)
        else:
            new.unlink(missing_ok=True)
        os.close(lock)


def _make_locked(path: pathlib.Path, is_folder: bool) -> tuple[pathlib.Path, int]:
    # Between making and locking it another process may take it for left over: then once more.
    while True:
        # A name that was not there: nothing is overwritten, and no link is followed.
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        if is_folder:
            new.mkdir()
            lock = os.open(new, os.O_RDONLY)
        else:
            lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        # Some file systems have no locks.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if new.exists():
            return new, lock
        os.close(lock)


def remove_left_over(path: pathlib.Path) -> None:
    """Remove what killed processes left beside `path`; what a process still writes stays."""
    _remove_partial(path.parent, re.escape(path.name))


def remove_all_left_over(folder: pathlib.Path) -> None:
    """Remove what killed processes left in `folder`, as remove_left_over does for one name."""
    _remove_partial(folder, ".+")


def _remove_partial(folder: pathlib.Path, name_pattern: str) -> None:
    # Names that nobody else gives.
    pattern = re.compile(rf"\.{name_pattern}\.[0-9a-f]{{8}}\.partial")
    try:
        names = [name for name in os.listdir(folder) if pattern.fullmatch(name)]
    except OSError:
        return
    for name in names:
        other = folder / name
        # Held by its writer, no regular file or folder, or gone by now: left alone.
        with contextlib.suppress(OSError):
            lock = os.open(other, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if other.is_dir():
                    shutil.rmtree(other)
                else:
                    other.unlink()
            finally:
                os.close(lock)


# --- what disks say


@contextlib.contextmanager
def disk_faults(path: pathlib.Path) -> Iterator[None]:
    """Turn what the system says while `path` is written into a UserError with its remedy.

    A context manager. What a library says in its own words is known too. What took too long
    becomes a TryAgain; other errors pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as fault:
        remedy = remedy_of(fault)
        if remedy is None:
            raise
        kind = TryAgain if remedy == LATE else UserError
        raise kind(f"{path}: not saved: {_told(fault)}; {remedy}") from fault


LATE = "the same command resumes"


def remedy_of(fault: Exception) -> str | None:
    """Return in words what helps where a write ended in `fault`; None if no system's fault."""
    # By the system's number, or by its words where a library has wrapped them.
    text = str(fault)
    number = fault.errno if isinstance(fault, OSError) else None
    if number in FULL or re.search(FULL_WORDS, text, re.IGNORECASE):
        return "free the disk, then the same command resumes"
    if number in FORBIDDEN or re.search(FORBIDDEN_WORDS, text):
        return "make it writable, then the same command resumes"
    if number in TOO_MANY_FILES or TOO_MANY_FILES_WORDS in text:
        return "raise `ulimit -n`, then the same command resumes"
    if isinstance(fault, TimeoutError) or LATE_WORDS in text:
        return LATE
    # A folder that is gone, a disk that fails.
    return "see to it, then the same command resumes" if isinstance(fault, OSError) else None


def is_full_disk(fault: BaseException) -> bool:
    """True for what the system, or a library in its words, says of a full disk."""
    number = fault.errno if isinstance(fault, OSError) else None
    return number in FULL or bool(re.search(FULL_WORDS, str(fault), re.IGNORECASE))


def _told(fault: Exception) -> str:
    """Return the system's words in one line, without what a library adds to them."""
    words = "|".join([FULL_WORDS, FORBIDDEN_WORDS, TOO_MANY_FILES_WORDS])
    found = re.search(words, str(fault), re.IGNORECASE)
    return found.group() if found else " ".join(str(fault).split())[:200]
