"""How a user's mistake is raised: one line that names the place and the remedy."""

import sys


class UserError(Exception):
    """A mistake of the user's: its text is one line that names the place and the remedy."""


def require(condition: bool, fault: str) -> None:
    """Raise UserError(`fault`) unless `condition` holds."""
    if not condition:
        raise UserError(fault)


def command_name() -> str:
    """Name the command that runs, as Python takes it: `train_sft.py`, `-m collect.rank`."""
    spec = sys.modules["__main__"].__spec__
    return sys.argv[0] if spec is None else f"-m {spec.name}"
