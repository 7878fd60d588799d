"""Flags from a script's dataclass, and how a user's mistake ends: one line on stderr and exit code 2."""

import contextlib
import dataclasses
import io
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from runtime.errors import UserError
from runtime.run_folder import load_config

ConfigT = TypeVar("ConfigT")


def fill_paper_defaults(config: ConfigT, paper: dict[str, Any]) -> ConfigT:
    """Fill the fields that `config` leaves at None with the values of `paper`.

    `paper`: values by field, and under "paper" the citation, which is no field.
    """
    return dataclasses.replace(config, **_left_to_paper(config, paper))


def paper_defaults_line(config: Any, method: str, paper: dict[str, Any]) -> str:
    """Name the fields that `config` leaves to the paper, for the terminal; "" where it leaves none.

    As in "grpo: clip 0.2, kl_coef 0.04 (Shao et al. 2024)". `config`: before it is filled.
    """
    filled = _left_to_paper(config, paper)
    if not filled:
        return ""
    settings = ", ".join(f"{name} {value}" for name, value in filled.items())
    citation = f" ({paper['paper']})" if "paper" in paper else ""
    return f"{method}: {settings}{citation}"


def _left_to_paper(config: Any, paper: dict[str, Any]) -> dict[str, Any]:
    """Select the values of `paper` whose field is None in `config`."""
    fields = {name: value for name, value in paper.items() if name != "paper"}
    return {name: value for name, value in fields.items() if getattr(config, name) is None}


def parse(cls: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """The dataclass `cls` filled from flags (`--batch_size=8 --model.layers=2 --raw`); raises UserError.

    `--model.preset=NAME` and `--init=RUN` first set all of `--model.*`; single fields then override.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    default = cls()
    is_switch = [
        isinstance(getattr(default, word.removeprefix("--"), None), bool) for word in argv
    ]
    argv = [
        f"{word}=True" if switch else word for word, switch in zip(argv, is_switch, strict=True)
    ]
    if hasattr(default, "model"):
        default = dataclasses.replace(default, model=_starting_model(default.model, argv))
    message = io.StringIO()
    about = (sys.modules[cls.__module__].__doc__ or "").partition("\n")[0]
    if "--help" in argv:
        signal.signal(
            signal.SIGPIPE, signal.SIG_DFL
        )  # a pager that is left early ends it, without a traceback
    try:
        with contextlib.redirect_stderr(message):
            flags = (tyro.conf.FlagConversionOff,)
            return tyro.cli(
                cls,
                description=about,
                args=argv,
                default=default,
                config=flags,
                use_underscores=True,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # tyro draws its message as a box: the text before the first rule is the fault, then come the proposals.
        lines = [line.strip("│╭╮╰╯─ ").strip() for line in message.getvalue().splitlines()]
        text = " ".join(line for line in lines[1:] if line)
        text = re.sub(r" ?(Argument helptext|For full helptext).*", "", text)
        raise UserError(f"flags: {text[:300]} (--help lists all flags)") from None


def _starting_model(model: Any, argv: Sequence[str]) -> Any:
    """The model that `--model.preset` or else the run of `--init` names."""
    init, preset = _flag(argv, "--init"), _flag(argv, "--model.preset")
    stored = (
        None if init is None else load_config(init)["model"]
    )  # first: a run that is missing is said to be
    if preset is not None:
        return model.from_preset(preset)
    return model if stored is None else type(model)(**stored)


def _flag(argv: Sequence[str], name: str) -> str | None:
    for i, word in enumerate(argv):
        if word.startswith(name + "="):
            return word.split("=", 1)[1]
        if word == name and i + 1 < len(argv):
            return argv[i + 1]
    return None


def run(main: Callable[[ConfigT], Any], cls: type[ConfigT]) -> None:
    """What a script does when started: parse the flags, run `main`, end a user's mistake in one line.

    A config with `hosts` joins the other processes first.
    """
    from runtime.hosts import joined

    def start() -> None:
        config = parse(cls)
        with joined(config.hosts) if hasattr(config, "hosts") else contextlib.nullcontext():
            main(config)

    ending_in_one_line(start)


def ending_in_one_line(main: Callable[[], Any]) -> None:
    """Run `main`; a user's mistake ends in one line and exit code 2."""
    from runtime.hosts import exit_now

    try:
        main()
    except UserError as fault:
        print(f"error: {' '.join(str(fault).split())}", file=sys.stderr)
        exit_now(2)
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        exit_now(130)
