"""How a study ends where a command that it runs has failed."""

from runtime.errors import TryAgain, UserError


def check_ended(code: int, fault: str) -> None:
    """Raise what a child process that ended with `code` asks for; return where that is 0.

    `code`: negative for a signal, as subprocess gives it. SystemExit with its code, where the
    child was stopped by a signal or the same command may succeed (TryAgain), for who restarts
    commands goes by these codes; else UserError with the line `fault`.
    """
    # A shell gives 128 and more for signals.
    if code < 0:
        raise SystemExit(128 - code)
    if code >= TryAgain.code:
        raise SystemExit(code)
    if code:
        raise UserError(fault)
