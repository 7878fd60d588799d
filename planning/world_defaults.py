"""Defaults that fit the built-in world, told where a model is much larger than the world's."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from planning.memory import parameter_count

LARGE = 100e6
"""Parameters from which a model is no longer the world's."""
SIZES = ("batch_size", "length")
SIZES_OF_ROLLOUTS = ("batch_size", "max_prompt", "max_new_tokens")


def defaults_left(config: Any, words: Sequence[str]) -> list[str]:
    """List the flags, as --length=256, that decide a run's size and rate and nobody has set.

    `config`: a training script's. `words`: the command line. A flag counts as left where its value
    is the default's and it is not among the words; so a config that was made in Python leaves what
    equals the default.
    """
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words}
    fields = {field.name for field in dataclasses.fields(config)}
    rates = [name for name in ("optimizer", "value_optimizer") if name in fields]
    sizes = SIZES if "length" in fields else SIZES_OF_ROLLOUTS

    default = type(config)()
    left = []
    for name in [*(f"{rate}.lr" for rate in rates), *sizes]:
        value = _value(config, name)
        if name not in given and value == _value(default, name):
            left.append(f"--{name}={value}")
    return left


def _value(config: Any, name: str) -> Any:
    """Return the field `name` of `config`, dotted where it lies in a dataclass within."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def world_defaults_note(config: Any, words: Sequence[str] | None = None) -> str:
    """Say which defaults of the world a large model is trained with; "" where there is none.

    `config`: a training script's. `words`: the command line; None: that of this process.
    """
    count = parameter_count(config.model)
    left = defaults_left(config, sys.argv[1:] if words is None else words)
    if count <= LARGE or not left:
        return ""
    model = config.init or "the model"
    return (
        f"{model} has {count / 1e9:.2f} billion parameters, and {', '.join(left)} "
        f"{'is the default' if len(left) == 1 else 'are the defaults'} for the built-in world: "
        "set what fits this model, as in recipes/"
    )
