"""Inputs of a run: what its config names by path is pinned by content, and cannot change under it.

config.json holds `inputs`, by flag: {"data": {"sha256"}} of a file, or of several by one name;
{"data.0": {"sha256"}} of a source in a mixture; {"init": {"step", "sha256"}} of a run, the step
that is read and the sum of its manifest, which has the sums of all its files; {"data":
{"version", "sha256"}} of tfds:name; {"reward.0": {"module_sha256"}} of module:function, the sum of
the module's own file. What that module imports is not covered.
A run that is resumed reads the steps that it began with, however long their runs have gone on.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import re
import sys
import typing
from typing import Any, TypeVar

import jax

from runtime.data_files import files_named, joint_sum, named_sum
from runtime.errors import UserError
from runtime.mixtures import names_in
from runtime.run_folder import (
    finished_steps,
    has_begun,
    load_config,
    note_lost_manifest,
    refuse_foreign_folder,
)

BUILT_IN = ("world", "arithmetic")
"""Sources of data that are no paths, whatever the current folder holds."""

FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")
"""The name of a function, module:function."""

ConfigT = TypeVar("ConfigT")
Content = dict[str, Any]
"""{"sha256"} of a file, {"step", "sha256"} of a run, {"version", "sha256"} of a catalogue's data
set, {"module_sha256"} of a function."""
Contents = dict[str, Content]
"""By flag; `reward.0` of several."""


class RunAtStep(str):
    """The folder of a run, of which one step is meant: whoever loads it loads that step."""

    step: int
    sha256: str
    """The sum of the step's manifest."""


def run_at_step(run: str, step: int, sha256: str) -> RunAtStep:
    """Return `run`, a folder's name, with the step that is meant and the sum of its manifest.

    Nothing is read: the step may be gone, and loading it then raises UserError.
    """
    named = RunAtStep(run)
    named.step = step
    named.sha256 = sha256
    return named


# --- what a config names


def named_inputs(config: Any) -> dict[str, str]:
    """Return {flag: name} of the inputs that `config`, a script's, names and that exist.

    Inputs are files, runs, data sets of the catalogue and functions, as Content has them. Every
    field of the dataclass that holds free text is looked at, also one that a fork adds, but not
    `run`, where the script writes. Of a field with several names, and of a mixture of data, the
    flags are `FIELD.0`, `FIELD.1`.
    """
    # Of types alone: what a choice among words says may be the name of a folder here.
    hints = typing.get_type_hints(type(config))
    found = {}
    for field in dataclasses.fields(config):
        if field.name == "run" or not _is_text(hints[field.name]):
            continue
        value = getattr(config, field.name)
        # One path, or several.
        several = _several_names(value)
        if several is not None:
            found |= {f"{field.name}.{number}": one for number, one in enumerate(several)}
        elif value is not None:
            found[field.name] = value
    return {flag: name for flag, name in found.items() if _is_input(name)}


def _several_names(value: Any) -> list[str] | None:
    """Return the names in a field's value where it has several: a list, or a mixture of data."""
    if isinstance(value, str):
        return names_in(value) or None
    return None if value is None else list(value)


def _is_input(name: str) -> bool:
    if is_run(name) or _is_data(name):
        return True
    return newest_prepared(name) is not None or module_file(name) is not None


def _is_text(hint: Any) -> bool:
    """True for the type of a field that holds texts: str, str | None, tuple[str, ...]."""
    return hint is str or str in typing.get_args(hint)


def _is_data(path: str) -> bool:
    return path not in BUILT_IN and bool(files_named(path))


def is_run(path: str) -> bool:
    """True for the folder of a run with a finished step, and for any RunAtStep.

    False for a built-in source of data, also where a folder has its name.
    """
    if isinstance(path, RunAtStep):
        return True
    folder = pathlib.Path(path)
    is_named = bool(path) and path not in BUILT_IN and os.path.isfile(folder / "config.json")
    return is_named and bool(finished_steps(folder / "checkpoints"))


def catalogue_folder() -> pathlib.Path:
    """Return the folder under which TFDS data sets are prepared."""
    home = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return pathlib.Path(home).expanduser()


def newest_prepared(data: str) -> pathlib.Path | None:
    """Return the folder of the newest version of `data`, tfds:name, that is prepared; or None."""
    kind, _, name = data.partition(":")
    if kind != "tfds" or not name:
        return None
    # By os.path, which finds nothing where a name is too long to be one.
    if not os.path.isdir(catalogue_folder() / name):
        return None
    described = (catalogue_folder() / name).glob("[0-9]*/dataset_info.json")

    def numbers(folder: pathlib.Path) -> list[int]:
        return [int(part) for part in folder.name.split(".") if part.isdigit()]

    return max([info.parent for info in described], key=numbers, default=None)


def module_file(function: str) -> str | None:
    """Return the file of the module of `function`, module:function; None where there is none."""
    if not FUNCTION.fullmatch(function):
        return None
    search_current_folder()
    try:
        found = importlib.util.find_spec(function.partition(":")[0])
    except (ImportError, ValueError, AttributeError):
        # Told where it is loaded.
        return None
    has_file = found is not None and found.origin is not None and os.path.isfile(found.origin)
    return found.origin if found is not None and has_file else None


def search_current_folder() -> None:
    """Let modules be found in the current folder too, after all others."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


# --- sums


def contents_of(config: Any) -> Contents:
    """Return the content of each of `named_inputs`: of a run, the step meant or the newest.

    Raises UserError for a file that cannot be read and a run without a finished step.
    """
    return {flag: _content_of(name) for flag, name in named_inputs(config).items()}


def _content_of(name: str) -> Content:
    # Of a run its manifest stands for all files.
    if is_run(name):
        at = at_newest(name)
        return {"step": at.step, "sha256": at.sha256}
    if _is_data(name):
        return {"sha256": joint_sum(name)}
    prepared = newest_prepared(name)
    if prepared is not None:
        return {"version": prepared.name, "sha256": _prepared_sum(prepared)}
    module = module_file(name)
    assert module is not None, "one of named_inputs"
    return {"module_sha256": joint_sum(module)}


def _prepared_sum(folder: pathlib.Path) -> str:
    """Return the SHA-256 of the names and sums of what is read of a prepared data set."""
    paths = []
    for path in sorted(folder.iterdir()):
        # It describes the others, and differs between versions of TFDS.
        if path.is_file() and path.name != "dataset_info.json":
            paths.append(path)
    return named_sum(paths)


def at_newest(run: str) -> RunAtStep:
    """Return `run` with the step that it means, or its newest; raise UserError if it has none.

    Where a later step has lost its manifest a note on stderr says so.
    """
    if isinstance(run, RunAtStep):
        return run
    folder = pathlib.Path(run) / "checkpoints"
    while True:
        steps = finished_steps(folder)
        if not steps:
            raise UserError(f"{run}: no checkpoint; name the folder of a finished run")
        # Where a trainer has removed it meanwhile there is a newer one.
        with contextlib.suppress(FileNotFoundError):
            sha256 = manifest_sum(run, steps[0])
            note_lost_manifest(folder, steps[0])
            return run_at_step(run, steps[0], sha256)


def manifest_sum(run: str, step: int) -> str:
    """Return the SHA-256, in hex, of the manifest of a step of `run`: it stands for all its files.

    Raises FileNotFoundError where there is no such step.
    """
    path = pathlib.Path(run) / "checkpoints" / str(step) / "manifest.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def step_of_sum(run: str, sha256: str) -> int | None:
    """Return the step of `run` whose manifest has the SHA-256 `sha256` (hex); None without one."""
    # Newest first: that is mostly the one.
    for step in finished_steps(pathlib.Path(run) / "checkpoints"):
        # Gone where a trainer has removed it meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if manifest_sum(run, step) == sha256:
                return step
    return None


# --- pins


def with_pinned_runs(config: ConfigT) -> ConfigT:
    """Return a script's `config` in which each run that it names is a RunAtStep.

    It is the step that `config.run` began with, or for a new run the newest. Every script calls
    this first. Raises UserError where `config.run` is a folder of something else, and where an
    input now differs from what the run began with. A step that is gone is noted on stderr: a run
    that has its own checkpoints may not need it.
    """
    # Before anything in the folder is read as if it were a run's.
    run = config.run  # type: ignore[attr-defined]
    refuse_foreign_folder(run)

    # Each run by the flag that names it, at the step that it had.
    named = named_inputs(config)
    pins = _stored_pins(run, named)
    changes: dict[str, Any] = {}
    for flag, path in named.items():
        field, _, number = flag.partition(".")
        # A run in a mixture is no data, which is told where it is opened.
        is_in_mixture = number and isinstance(getattr(config, field), str)
        if not is_run(path) or is_in_mixture:
            continue
        at = _at_pin(run, field, path, pins.get(flag, {}))
        if not number:
            changes[field] = at
        else:
            # One of several, among those replaced so far.
            several = list(changes.get(field, getattr(config, field)))
            several[int(number)] = at
            changes[field] = tuple(several)
    pinned = dataclasses.replace(config, **changes)  # type: ignore[type-var]
    # Told before any file is prepared or model loaded.
    if pins:
        refuse_other_inputs(run, load_config(run), pinned, contents_of(pinned))
    return pinned


def _stored_pins(run: str, named: dict[str, str]) -> Contents:
    """Return the contents that `run` began with of the inputs `named`, by flag.

    None where it has not begun; and none of an input that had another path, which is told later.
    """
    folder = pathlib.Path(run)
    if not (folder / "config.json").exists() or not has_begun(folder):
        return {}
    config = load_config(run)
    pins = {}
    for flag, content in config.get("inputs", {}).items():
        is_same = flag in named and named[flag] == _stored_path(config, flag)
        if isinstance(content, dict) and is_same:
            pins[flag] = content
    # Runs of adapters have always noted their base.
    base = config.get("lora", {}).get("base")
    is_same = "init" in named and config.get("init") == named["init"]
    if base and is_same and "init" not in pins:
        step = step_of_sum(config["init"], base)
        if step is not None:
            pins["init"] = {"step": step, "sha256": base}
    return pins


def _at_pin(run: str, field: str, path: str, pin: dict[str, Any]) -> RunAtStep:
    """Return `path` at the step of which `pin` has the sum; without one at its newest."""
    if pin.keys() != {"step", "sha256"}:
        return at_newest(path)
    # By its content, whatever its number.
    step = pin["step"]
    found = step_of_sum(path, pin["sha256"])
    if found is not None:
        return run_at_step(path, found, pin["sha256"])
    # Trained anew under the same name, or damaged.
    if step in finished_steps(pathlib.Path(path) / "checkpoints"):
        raise UserError(_told_other(run, field, path, f"its step {step} is"))
    if jax.process_index() == 0:
        gone = f"--{field}={path}: step {step}, with which {run} began, is gone"
        print(f"note: {gone}; what needs it again ends in an error", file=sys.stderr)
    return run_at_step(path, step, pin["sha256"])


def refuse_other_inputs(run: str, stored: dict[str, Any], config: Any, contents: Contents) -> None:
    """Raise UserError if an input of `run` is not the one that it began with.

    `stored`: its config.json; a run from before inputs were pinned is not compared. `config`: the
    script's, of which `contents` is `contents_of`. An input that has another path now is not
    compared: that is another setting, told elsewhere.
    """
    # Another path is another setting, which is told as such.
    paths = named_inputs(config)
    for flag, before in stored.get("inputs", {}).items():
        now = contents.get(flag, before)
        if now != before and paths.get(flag) == _stored_path(stored, flag):
            field = flag.partition(".")[0]
            what = "its content is"
            if "module_sha256" in now:
                what = "the file of its module is"
            elif now.get("version") != before.get("version"):
                what = f"its version {now['version']} is"
            raise UserError(_told_other(run, field, paths[flag], what))


def _stored_path(stored: dict[str, Any], flag: str) -> Any:
    """Return what `stored`, a config.json, has for a flag, or for one of its several values."""
    field, _, number = flag.partition(".")
    value = stored.get(field)
    if not number:
        return value
    several = _several_names(value) if isinstance(value, str | list) else None
    is_there = several is not None and number.isdigit() and int(number) < len(several)
    return several[int(number)] if several is not None and is_there else None


def _told_other(run: str, field: str, path: str, what: str) -> str:
    return (
        f"--{field}={path}: {what} not what {run} began with (SHA-256); "
        f"restore it, or name another --run"
    )
