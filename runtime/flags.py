"""Flags from a script's dataclass, and how a user's mistake ends: in one line and exit code 2."""

import contextlib
import dataclasses
import io
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from runtime import interrupt, terminal
from runtime.agreement import refuse_different_commands
from runtime.compiled import keep_programs
from runtime.errors import UserError, command_name
from runtime.hosts import exit_now, joined
from runtime.ranges import SCRIPTS, OutOfRange, check_ranges
from runtime.run_folder import RENAMED, has_begun, load_model_config
from runtime.writes import is_full_disk

ConfigT = TypeVar("ConfigT")

HELP_WIDTH = 80
"""Columns of --help."""


def fill_paper_defaults(config: ConfigT, paper: dict[str, Any]) -> ConfigT:
    """Return `config` with the values of `paper` in the fields that it leaves at None.

    `paper`: {field: value}, and under "paper" the citation, which is no field.
    """
    return dataclasses.replace(config, **_left_to_paper(config, paper))  # type: ignore[type-var]


def with_paper_defaults(config: ConfigT, method: str, paper: dict[str, Any]) -> ConfigT:
    """Fill as `fill_paper_defaults`; print a line that names what was filled, if anything was.

    `method`: the word that the line begins with. `paper`: {field: value}, and under "paper" the
    citation.
    """
    line = paper_defaults_line(config, method, paper)
    if line:
        print(line)
    return fill_paper_defaults(config, paper)


def paper_defaults_line(config: Any, method: str, paper: dict[str, Any]) -> str:
    """Return a line that names the fields that `config` leaves to the paper; "" for none.

    As in "grpo: clip 0.2, kl_coef 0.04 (Shao et al. 2024)". `config`: before it is filled.
    `method`: the word that the line begins with. `paper`: {field: value}, and under "paper" the
    citation.
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
    """Fill the dataclass `cls` from flags, `--batch_size=8 --model.layers=2 --raw`.

    Every field of `cls` has a default. `--model.preset=NAME` and `--init=RUN` first set all of
    `--model.*`; single fields then override. `argv`: the flags; None: those of the command line.
    Raises UserError, also for a number out of its range (runtime/ranges.py) and for a flag that
    other settings leave unused. `--help` prints and ends the program.
    """
    # A switch may stand alone: `--raw` is `--raw=True`.
    words = list(sys.argv[1:] if argv is None else argv)
    default = cls()
    words = [_with_value(default, word) for word in words]
    if hasattr(default, "model"):
        model = _starting_model(default.model, words)
        default = dataclasses.replace(default, model=model)  # type: ignore[type-var]
    ending = terminal.ended_by_pipe() if "--help" in words else contextlib.nullcontext()
    with ending:
        return _read(cls, words, default)


def _read(cls: type[ConfigT], words: list[str], default: ConfigT) -> ConfigT:
    """Fill `cls` from the flags `words` over `default`; raise UserError as `parse` says."""
    # The script's first line heads its --help; tyro's own messages are caught.
    about = (sys.modules[cls.__module__].__doc__ or "").partition("\n")[0]
    # Indented, since tyro joins a line that begins with a letter to the one before.
    about = textwrap.fill(about, HELP_WIDTH, subsequent_indent="  ")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            config = tyro.cli(
                cls,
                prog=f"python {command_name()}",
                description=about,
                args=words,
                default=default,
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
            )
    except OutOfRange as fault:
        # A config does not know its flags where a script has two of its kind.
        given = _given(words, fault.field)
        raise UserError(f"{given[0]}={fault.fault}" if len(given) == 1 else str(fault)) from None
    except SystemExit as stop:
        # --help ends well.
        if stop.code in (0, None):
            raise
        _refuse_old_names(default, words)
        fault = _in_one_line(message.getvalue())
        raise UserError(f"flags: {fault} (--help lists all flags)") from None
    check_ranges(config, SCRIPTS)
    _refuse_unused(config, words)
    return config


def _given(words: Sequence[str], field: str) -> list[str]:
    """List the flags in `words` that set `field`, whatever the config that it lies in."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    names = ["--" + flag.removeprefix("--").replace("-", "_") for flag in flags]
    return [name for name in names if re.split(r"\.|--", name)[-1] == field]


def _refuse_unused(config: Any, words: Sequence[str]) -> None:
    """Raise UserError for a flag in `words` that a config within `config` leaves unused.

    Such a config has a property `unused`: {field: the setting that does not use it}.
    """
    for field in dataclasses.fields(config):
        for name, setting in getattr(getattr(config, field.name), "unused", {}).items():
            if f"--{field.name}.{name}" in _given(words, name):
                raise UserError(f"--{field.name}.{name}: {setting} does not use it; leave it out")


def _refuse_old_names(default: Any, words: Sequence[str]) -> None:
    """Raise UserError if a flag in `words` is an older name of fields that `default` has."""
    for word in words:
        old = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if old not in RENAMED or _has_field(default, old):
            continue
        # One name, or several: "a, b and c".
        names = RENAMED[old].replace(" and ", ", ").split(", ")
        if all(_has_field(default, name) for name in names):
            now = ", ".join(f"--{name}" for name in names)
            raise UserError(f"--{old}: renamed to {now}")


def _has_field(config: Any, name: str) -> bool:
    """Tell whether `config` has the field `name`, dotted where it lies in a dataclass within."""
    for part in name.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


def _with_value(default: Any, word: str) -> str:
    """Return `word` with `=True` after it if it is a switch: a bool field of `default` alone."""
    is_switch = isinstance(getattr(default, word.removeprefix("--"), None), bool)
    return f"{word}=True" if is_switch else word


def _in_one_line(message: str) -> str:
    """Return the fault out of tyro's box: the text before the first rule; then come proposals."""
    # tyro draws a box.
    lines = [line.strip("│╭╮╰╯─ ").strip() for line in message.splitlines()]
    text = " ".join(line for line in lines[1:] if line)
    text = re.sub(r" ?(Argument helptext|For full helptext).*", "", text)
    return text[:300]


def _starting_model(model: Any, argv: Sequence[str]) -> Any:
    """Return the model of `--model.preset`, else of the run of `--init`, else `model`."""
    init = _flag(argv, "--init")
    preset = _flag(argv, "--model.preset")
    # The run is read in any case, so that one that is missing is told before anything else.
    if init is not None:
        stored = load_model_config(init, type(model))
    if preset is not None:
        return model.from_preset(preset)
    return model if init is None else stored


def _flag(argv: Sequence[str], name: str) -> str | None:
    """Return the value of the flag `name` in `argv`; None without it."""
    # As `--name=value` or `--name value`.
    for index, word in enumerate(argv):
        if word.startswith(name + "="):
            return word.split("=", 1)[1]
        if word == name and index + 1 < len(argv):
            return argv[index + 1]
    return None


# --- a script from its start to its end


def run(main: Callable[[ConfigT], Any], cls: type[ConfigT]) -> None:
    """Run a script as a command: parse `cls` from the flags, call `main`, tell mistakes in a line.

    `main(config)`: what it returns is dropped. A config with `hosts` joins the other processes
    first. A mistake ends the process, as `ending_in_one_line` says.
    """

    def start() -> None:
        config = parse(cls)
        # A dry run leaves nothing behind.
        if not getattr(config, "dry_run", False):
            keep_programs()
        if not hasattr(config, "hosts"):
            main(config)
            return
        # Training is for its run folder, all else for what it prints.
        if not getattr(config, "dry_run", False):
            terminal.outlive_stdout()
        run = getattr(config, "run", None)
        with joined(config.hosts, has_begun=run is not None and has_begun(pathlib.Path(run))):
            refuse_different_commands(config)
            main(config)

    ending_in_one_line(start)


def ending_in_one_line(main: Callable[[], Any]) -> None:
    """Run `main()`; end a UserError in one line and its exit code, 2, Ctrl-C in one line and 130.

    A full disk ends in one line and exit code 2 too, whoever met it; other errors are raised.
    Where nobody reads stdout any more and `main` does not outlive it, it ends by SIGPIPE.
    """
    terminal.prepare()
    interrupt.imported()
    try:
        main()
        sys.stdout.flush()
    except UserError as fault:
        # One line, whatever the fault's text has.
        line = terminal.printable(" ".join(str(fault).split()))
        print(f"error: {line}", file=sys.stderr)
        exit_now(fault.code)
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped by the keyboard", file=sys.stderr)
        exit_now(130)
    except terminal.PipeClosed:
        terminal.end_by_pipe()
    except Exception as fault:
        # Wherever it is met: no bug, and a restart is of no use.
        if not is_full_disk(fault):
            raise
        place = getattr(fault, "filename", None) or "the disk"
        print(f"error: {place}: no space left; free some, then try again", file=sys.stderr)
        exit_now(UserError.code)
