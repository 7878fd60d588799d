"""Stand-ins for packages that a benchmark's imports name and the benchmark never uses.

A machine that is rented by the minute may have jax, flax, optax, torch and transformers and
nothing more, and nothing can be installed there. The training scripts import readers of data and
of flags too; where those packages are absent, an empty module stands in for each while modules are
imported. Whoever calls one is told that it is not installed.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

MAY_BE_ABSENT = ("tyro", "grain", "sentencepiece", "tqdm")
"""Packages that the scripts import when they are imported; others are imported when called."""


class StandIn(types.ModuleType):
    """A module in which every name is another stand-in, so that annotations can name its types."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self.__name__}.{name}")

    def __getitem__(self, item: Any) -> Any:
        """Return `item`: an annotation such as tyro.conf.Suppress[str] means str."""
        return item

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ImportError(f"{self.__name__}: not installed; install requirements.txt")


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Let the imports of the block do without the packages of MAY_BE_ABSENT."""
    absent = []
    for name in MAY_BE_ABSENT:
        try:
            importlib.import_module(name)
        except ImportError:
            absent.append(name)
            sys.modules[name] = StandIn(name)
    try:
        yield
    # Other packages ask whether these are there.
    finally:
        for name in absent:
            del sys.modules[name]
