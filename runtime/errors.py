"""How a user's mistake is raised: one line that names the place and the remedy."""

import sys
from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """A mistake of the user's: its text is one line that names the place and the remedy."""

    code = 2
    """Exit code of a command that it ends."""


class TryAgain(UserError):
    """A fault that is nobody's mistake and that the same command may not meet again."""

    # As sysexits.h has it: a loop that restarts runs goes on after it.
    code = 75


def require(condition: bool, fault: str) -> None:
    """Raise UserError(`fault`) unless `condition` holds."""
    if not condition:
        raise UserError(fault)


def refuse_unread(config: Any, readers: Mapping[str, tuple[bool, str]]) -> None:
    """Raise UserError for a field of `config` that was changed, but that nothing reads.

    `config`: a dataclass whose fields have defaults. `readers`: {field: (whether the other
    settings have it read, the flag that would)}.
    """
    for name, (is_read, reader) in readers.items():
        value = getattr(config, name)
        require(
            is_read or value == getattr(type(config), name),
            f"--{name}={value}: not read without {reader}; leave it out",
        )


def command_name() -> str:
    """Return the name of the command that runs, as Python takes it.

    As in `train_sft.py`, `-m collect.rank`.
    """
    spec = sys.modules["__main__"].__spec__
    return sys.argv[0] if spec is None else f"-m {spec.name}"
