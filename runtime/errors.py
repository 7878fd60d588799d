"""How a user's mistake is raised: one line that names the place and the remedy."""


class UserError(Exception):
    """A mistake of the user's: its text is one line that names the place and the remedy."""


def require(condition: bool, fault: str) -> None:
    """Raise UserError(`fault`) unless `condition` holds."""
    if not condition:
        raise UserError(fault)
