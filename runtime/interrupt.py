"""Ctrl-C while a command still imports: one line, and the exit code of a command so stopped.

A script imports this first. Some of what is imported after it turns a KeyboardInterrupt into an
error of its own, which would end in pages of traceback.
"""

import os
import signal
import sys
from typing import Any


def _end(number: int, frame: Any) -> None:
    os.write(2, b"stopped by the keyboard\n")
    os._exit(130)


def _is_imported_by_the_command() -> bool:
    """True where the file that imports this module is the one that Python was started with."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        # Between them are the frames of importing alone.
        if "importlib" not in frame.f_code.co_filename and frame.f_globals is not globals():
            break
    return frame.f_globals.get("__name__") == "__main__"


def imported() -> None:
    """From here on let Ctrl-C raise KeyboardInterrupt, as it does in Python by default.

    Until then this module, imported first by a command, ends it in one line. Without that nothing
    changes.
    """
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Where Ctrl-C is ignored, as behind `&` in a script, it stays so.
if _is_imported_by_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
