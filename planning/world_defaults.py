"""Defaults that fit the built-in world, told where a model is much larger than the world's."""

import sys
from collections.abc import Sequence
from typing import Any

from model_config import ModelConfig
from planning.memory import parameter_count
from runtime.run_folder import default_settings

LARGE = 100e6
"""Parameters from which a model is no longer the world's."""
RATES = ("optimizer.lr", "value_optimizer.lr")
SIZES = ("batch_size", "length", "max_prompt", "max_new_tokens")


def defaults_left(config: Any, words: Sequence[str]) -> list[str]:
    """List the flags, as --length=256, that decide a run's size and rate and nobody has set.

    `config`: a training script's, or a fork's: fields that it lacks, and those without a default,
    are passed over. `words`: the command line. A flag counts as left where its value is the
    default's and it is not among the words; so a config that was made in Python leaves what equals
    the default. With adapters no rate is listed: theirs are larger than a whole model's, as the
    world's are.
    """
    given = _names(words)
    defaults = default_settings(config)
    has_adapters = _value(config, "lora.rank") not in (None, 0)
    left = []
    for name in SIZES if has_adapters else (*RATES, *SIZES):
        value = _value(config, name)
        if value is not None and name not in given and value == defaults.get(name):
            left.append(f"--{name}={value}")
    return left


def _names(words: Sequence[str]) -> set[str]:
    """Return the flags that stand in a command line, as the fields of a config are named."""
    return {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words}


def _value(config: Any, name: str) -> Any:
    """Return the field `name` of `config`, dotted where it lies within one; None without it."""
    for part in name.split("."):
        config = getattr(config, part, None)
    return config


def world_defaults_note(config: Any, words: Sequence[str] | None = None) -> str:
    """Say which defaults of the world a large model is trained with; "" where there is none.

    `config`: a training script's. `words`: the command line; None: that of this process.
    """
    if not isinstance(config.model, ModelConfig):
        return ""
    words = sys.argv[1:] if words is None else words
    count = parameter_count(config.model)
    left = defaults_left(config, words)
    if count <= LARGE or not left:
        return ""
    # A preset that is named makes the model, whatever run --init would be by default.
    if "model.preset" in _names(words) and "init" not in _names(words):
        model = config.model.preset
    else:
        model = _value(config, "init") or "the model"
    return (
        f"{model} has {count / 1e9:.2f} billion parameters, and {', '.join(left)} "
        f"{'is the default' if len(left) == 1 else 'are the defaults'} for the built-in world: "
        "set what fits this model, as in recipes/"
    )
