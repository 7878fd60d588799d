"""Sides for tests of benchmarks/rows.py; their processes import no more than these lines do."""

import os
import time

from benchmarks import rows


def work(seconds, tokens=None, check=None):
    """Return a side whose call takes so long."""

    def call():
        time.sleep(seconds)
        return tokens

    return rows.Built({"work": call}, "jax", check=check)


def stuck():
    """Never become a side."""
    time.sleep(1000)


def broken():
    """Fail as a side whose package is absent does."""
    raise ModuleNotFoundError("No module named 'peer'")


def dying():
    """Return a side whose process dies when it is called."""
    return rows.Built({"work": lambda: os._exit(3)}, "jax")
