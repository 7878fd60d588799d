"""Inputs of a run: what its config names by path is pinned by content, and cannot change under it.

config.json holds `inputs`, by flag: {"data": {"sha256"}} of a file, or of several by one name;
{"init": {"step", "sha256"}} of a run, the step that is read and the sum of its manifest, which has
the sums of all its files.
A run that is resumed reads the steps that it began with, however long their runs have gone on.
"""

import dataclasses
import hashlib
import os
import pathlib
import sys
import typing
from typing import Any, TypeVar

import jax

from runtime.data_files import files_named, joint_sum
from runtime.errors import UserError
from runtime.run_folder import (
    finished_steps,
    has_begun,
    load_config,
    note_lost_manifest,
    refuse_foreign_folder,
)

BUILT_IN = ("world", "arithmetic")
"""Sources of data that are no paths, whatever the current folder holds."""

ConfigT = TypeVar("ConfigT")
Contents = dict[str, dict[str, Any]]
"""{flag: {"sha256"}} of files, {flag: {"step", "sha256"}} of runs; `reward.0` of several."""


class RunAtStep(str):
    """The folder of a run, of which one step is meant: whoever loads it loads that step."""

    step: int
    sha256: str
    """The sum of the step's manifest."""


def run_at_step(run: str, step: int, sha256: str) -> RunAtStep:
    """Name `step` of `run`, which may be gone: loading it then raises UserError."""
    named = RunAtStep(run)
    named.step = step
    named.sha256 = sha256
    return named


# --- what a config names


def named_inputs(config: Any) -> dict[str, str]:
    """Return {flag: path} of the files and runs that `config`, a script's, names and that exist.

    Any field of the dataclass that is free text is looked at, so those that a fork adds too; but
    for `run`, where the script writes.
    """
    # Of types alone: what a choice among words says may be the name of a folder here.
    hints = typing.get_type_hints(type(config))
    found = {}
    for field in dataclasses.fields(config):
        if field.name == "run" or not _is_text(hints[field.name]):
            continue
        value = getattr(config, field.name)
        # One path, or several.
        if isinstance(value, str):
            found[field.name] = value
        elif value is not None:
            found |= {f"{field.name}.{number}": one for number, one in enumerate(value)}
    return {flag: path for flag, path in found.items() if is_run(path) or _is_data(path)}


def _is_text(hint: Any) -> bool:
    """True for the type of a field that holds texts: str, str | None, tuple[str, ...]."""
    return hint is str or str in typing.get_args(hint)


def _is_data(path: str) -> bool:
    return path not in BUILT_IN and bool(files_named(path))


def is_run(path: str) -> bool:
    """True for the folder of a run that has a finished step, or of which one is meant."""
    if isinstance(path, RunAtStep):
        return True
    folder = pathlib.Path(path)
    is_named = bool(path) and path not in BUILT_IN and os.path.isfile(folder / "config.json")
    return is_named and bool(finished_steps(folder / "checkpoints"))


# --- sums


def contents_of(config: Any) -> Contents:
    """Return the content of each of `named_inputs`: of a run, the step meant or the newest."""
    # Of a run its manifest stands for all files.
    contents: Contents = {}
    for flag, path in named_inputs(config).items():
        if is_run(path):
            at = at_newest(path)
            contents[flag] = {"step": at.step, "sha256": at.sha256}
        else:
            contents[flag] = {"sha256": joint_sum(path)}
    return contents


def at_newest(run: str) -> RunAtStep:
    """Return `run` with the step that it means, or its newest; raise UserError without one."""
    if isinstance(run, RunAtStep):
        return run
    folder = pathlib.Path(run) / "checkpoints"
    steps = finished_steps(folder)
    if not steps:
        raise UserError(f"{run}: no checkpoint; name the folder of a finished run")
    note_lost_manifest(folder, steps[0])
    return run_at_step(run, steps[0], manifest_sum(run, steps[0]))


def manifest_sum(run: str, step: int) -> str:
    """Return the SHA-256 of the manifest of a step, which stands for all its files."""
    path = pathlib.Path(run) / "checkpoints" / str(step) / "manifest.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def step_of_sum(run: str, sha256: str) -> int | None:
    """Return the step of `run` whose manifest has this sum; None where it is gone."""
    # Newest first: that is mostly the one.
    for step in finished_steps(pathlib.Path(run) / "checkpoints"):
        if manifest_sum(run, step) == sha256:
            return step
    return None


# --- pins


def with_pinned_runs(config: ConfigT) -> ConfigT:
    """Return a script's `config` in which each run that it names is a RunAtStep.

    It is the step that `config.run` began with, or of a new run the newest. Called first by every
    script. Raises UserError where `config.run` is a folder of something else, and where the step
    is now another one than the run began with; notes one that is gone, which a run that has its
    own checkpoints may not need.
    """
    # Before anything in the folder is read as if it were a run's.
    run = config.run  # type: ignore[attr-defined]
    refuse_foreign_folder(run)

    # Each run by the flag that names it, at the step that it had.
    named = named_inputs(config)
    pins = _stored_pins(run, named)
    changes: dict[str, Any] = {}
    for flag, path in named.items():
        if not is_run(path):
            continue
        field, _, number = flag.partition(".")
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
    script's; `contents`: of it, by contents_of.
    """
    # Another path is another setting, which is told as such.
    paths = named_inputs(config)
    for flag, before in stored.get("inputs", {}).items():
        now = contents.get(flag, before)
        if now != before and paths.get(flag) == _stored_path(stored, flag):
            field = flag.partition(".")[0]
            raise UserError(_told_other(run, field, paths[flag], "its content is"))


def _stored_path(stored: dict[str, Any], flag: str) -> Any:
    """Return what `stored`, a config.json, has for a flag, or for one of its several values."""
    field, _, number = flag.partition(".")
    value = stored.get(field)
    if not number:
        return value
    is_there = isinstance(value, list) and number.isdigit() and int(number) < len(value)
    return value[int(number)] if is_there else None


def _told_other(run: str, field: str, path: str, what: str) -> str:
    return (
        f"--{field}={path}: {what} not what {run} began with (SHA-256); "
        f"restore it, or name another --run"
    )
