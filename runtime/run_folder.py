"""A run on disk, below Orbax: config.json and whom it admits, sums of a step, whole writes.

A file is written whole or not at all; a step without `manifest.json` was never finished.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any, TextIO, TypeVar

import jax

from runtime.errors import UserError, command_name

ROOT = pathlib.Path(__file__).resolve().parents[1]
"""The repository's folder."""

# By name, since config.json and not a class is compared: a fork's config has the same names for
# the same things, and a field that it adds decides its results until it is listed here.
FREE = {"run", "steps", "keep_checkpoints", "mesh", "hosts", "offload", "dry_run"}
FREE |= {"eval_every", "save_every", "log_every", "sample_every"}
"""Config fields that may change when a run is resumed; all others decide its results."""

RENAMED = {
    "model.hidden": "model.mlp_width",
    "model.head_width": "model.head_dim",
    "model.gemma": "model.activation, model.scale_embedding and model.zero_centered_norm",
    "keep": "keep_checkpoints",
    "discount": "gamma",
    "smoothing": "gae_lambda",
    "centring": "center_rewards_coef",
    "lm_coefficient": "lm_coef",
    "dynamic": "dynamic_sampling",
    "carry": "replay_rounds",
}
"""Config fields by the names that older runs have for them. Such a run is read, never resumed."""

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")
DISK_FAULTS = "No space left|quota exceeded|Permission denied|Read-only|File too large"

ModelT = TypeVar("ModelT")


class Damaged(Exception):
    """A stored step that disagrees with its manifest: names the file and the fault."""


# --- config.json: what a run is


def path_from_root(path: pathlib.Path) -> str:
    """Return `path` relative to the repository's folder; the whole path if it lies outside."""
    path = path.resolve()
    # A repository may be moved: its own files are named from its root.
    if path.is_relative_to(ROOT):
        path = path.relative_to(ROOT)
    return path.as_posix()


def model_code() -> str | None:
    """Return the path of the `model.py` that is imported if it is a fork's own, else None."""
    # Asked of Python and not of a path: what was imported is what computes.
    model = sys.modules.get("model")
    if model is None or model.__file__ is None:
        return None
    path = path_from_root(pathlib.Path(model.__file__))
    return None if path == "model.py" else path


def describe_run(config: Any, script: str, tokenizer: bytes | None) -> dict[str, Any]:
    """Return the content of config.json: fields of `config`, and what else decides the results.

    Beside the fields: `script`, `tokenizer_sha256`, `versions` of libraries, and, where a fork's
    own model.py is imported, its path as `model_code`. Values are as JSON gives them back.
    """
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    sha256 = None if tokenizer is None else hashlib.sha256(tokenizer).hexdigest()
    # In this order the file is read by people.
    described = {
        "script": script,
        **dataclasses.asdict(config),
        "tokenizer_sha256": sha256,
        "versions": versions,
    }
    # Left out for the root's model.py.
    code = model_code()
    if code is not None:
        described["model_code"] = code
    return json.loads(json.dumps(described, default=str))


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that must not change, by dotted name."""
    # Versions may change with a warning; FREE fields may change.
    fixed = {}
    for name, value in config.items():
        if name != "versions" and RENAMED.get(name, name) not in FREE:
            fixed[name] = value
    leaves = jax.tree_util.tree_leaves_with_path(
        fixed, is_leaf=lambda value: not isinstance(value, dict)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in leaves
    }


def identity_hash(config: dict[str, Any]) -> str:
    """Return the SHA-256 of the fields of `config` (as of config.json) that must not change."""
    # Sorted, so that the order of fields does not matter.
    text = json.dumps(_identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def stored_identity(run: str) -> str:
    """Hash the settings of `run` as it was made, which the manifests of its steps name too."""
    return identity_hash(_stored_config(run))


def load_config(run: str) -> dict[str, Any]:
    """Read `config.json` of the run folder `run`, with today's names of fields.

    Raises UserError where there is none.
    """
    config = _stored_config(run)
    if "model" in config:
        old = config["model"]
        # One switch in older runs, three settings now.
        if "gemma" in old:
            gemma = old.pop("gemma")
            old["activation"] = "gelu" if gemma else "silu"
            old["scale_embedding"] = gemma
            old["zero_centered_norm"] = gemma
        model = {}
        for name, value in old.items():
            now = RENAMED.get(f"model.{name}", name)
            model[now.removeprefix("model.")] = value
        config["model"] = model
    return config


def _stored_config(run: str) -> dict[str, Any]:
    path = pathlib.Path(run) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{run}: no run here ({path} is missing); name the folder of a finished run"
        ) from None
    except (OSError, ValueError) as fault:
        raise UserError(
            f"{path}: not readable as JSON ({fault}); restore it or start another run"
        ) from None


# --- the model of a run, which may be a fork's


def load_model_config(run: str, model_class: type[ModelT]) -> ModelT:
    """Read the model's shape of `run` as the dataclass `model_class`.

    Fields that the run lacks take their defaults, as for a run from before the field. Raises
    UserError where there is no run, where the run has fields that `model_class` does not know or
    lacks some without a default, and where its parameters belong to another model.py.
    """
    config = load_config(run)
    refuse_other_model_code(run, config)
    # Compare the names before the dataclass is made: it would raise a TypeError.
    stored = config.get("model", {})
    known = set()
    required = set()
    for field in dataclasses.fields(model_class):  # type: ignore[arg-type]
        known.add(field.name)
        if field.default is field.default_factory is dataclasses.MISSING:
            required.add(field.name)
    unknown = sorted(stored.keys() - known)
    missing = sorted(required - stored.keys())
    if unknown or missing:
        faults = []
        if unknown:
            faults.append(f"has {', '.join(unknown)}, unknown to this code")
        if missing:
            faults.append(f"lacks {', '.join(missing)}")
        script = str(config.get("script"))
        raise UserError(
            f"{run}: made by {script}, its model {' and '.join(faults)}; {_how_to_read(script)}"
        )
    return model_class(**stored)


def refuse_other_model_code(run: str, config: dict[str, Any]) -> None:
    """Raise UserError if `run` was made with a fork's model.py that is not the one imported.

    `config`: its config.json. A run of the root's model.py may be read with a fork's, which may
    start from it; load_params notes that on stderr.
    """
    # The same shapes may be computed with in another way: only the file tells.
    theirs = config.get("model_code")
    ours = model_code()
    if theirs is not None and theirs != ours:
        used = "the root's model.py" if ours is None else ours
        raise UserError(
            f"{run}: made with {theirs}, but this command uses {used}; {_how_to_read(theirs)}"
        )


def _how_to_read(code: str) -> str:
    """Return the remedy for a run made by `code`: a fork, or another version of the root."""
    folder = os.path.dirname(code)
    if not folder:
        return "read it with the version that made it"
    return f"run this command as PYTHONPATH={folder}:. python -P {command_name()} ..."


# --- whom a run folder admits


def refuse_other_run(run: pathlib.Path, config: dict[str, Any]) -> None:
    """Raise UserError unless the folder `run` is new, empty, or a run that `config` continues.

    `config`: what describe_run returns. A run that ended before its first step was saved, as after
    a mistake, is begun anew with any config. Warns of other versions of libraries.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: a file, not a folder; name another --run")
    if not (run / "config.json").exists():
        if run.exists() and set(os.listdir(run)) - {"checkpoints", "config.json.new"}:
            raise UserError(
                f"{run}: holds files but no config.json, so it is not a run; name another --run"
            )
        return
    # What was never saved binds no one.
    if not _has_begun(run):
        return
    stored = _stored_config(str(run))
    _refuse_other_script(run, stored, config)
    _refuse_old_names(run, stored)
    _refuse_other_settings(run, stored, config)
    # Results may differ in the last bits with other libraries.
    for name, version in config["versions"].items():
        before = stored.get("versions", {}).get(name)
        if before != version and jax.process_index() == 0:
            print(
                f"warning: {run}: {name} was {before}, is {version}: results may differ",
                file=sys.stderr,
            )


def _has_begun(run: pathlib.Path) -> bool:
    """True if the folder holds results that belong to its config."""
    return (
        bool(finished_steps(run / "checkpoints"))
        or any(run.glob("reference-*.npz"))
        or (run / "left_out.json").exists()
    )


def _refuse_other_script(
    run: pathlib.Path, stored: dict[str, Any], config: dict[str, Any]
) -> None:
    # Before the fields: another script has other fields, which would be blamed.
    script = stored.get("script")
    if script != config["script"]:
        raise UserError(
            f"{run}: a run of {script}; name another --run, or start from it with --init={run}"
        )


def _refuse_old_names(run: pathlib.Path, stored: dict[str, Any]) -> None:
    for before, now in RENAMED.items():
        part, _, field = before.rpartition(".")
        fields = stored.get(part, {}) if part else stored
        if field in fields:
            raise UserError(
                f"{run}/config.json: made before {before} was renamed to {now}; "
                "start from it with --init, or name another --run"
            )


def _refuse_other_settings(
    run: pathlib.Path, stored: dict[str, Any], config: dict[str, Any]
) -> None:
    old = _identity(stored)
    new = _identity(config)
    for name in [*new, *old]:
        if old.get(name) != new.get(name):
            values = f"{name} is {old.get(name)!r} in this run and {new.get(name)!r} now"
            raise UserError(
                f"{run}/config.json: {values}; resume with the run's value or name another --run"
            )


def lock_run(run: pathlib.Path, folder: pathlib.Path) -> int:
    """Make `folder`, lock it against a second process that trains `run`; return its descriptor.

    Closing the descriptor opens the lock. Raises UserError where another process has it.
    """
    # The folder itself is locked: no file of ours is in the way of a reader.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as fault:
        raise UserError(f"{run}: {fault.strerror}; name another --run") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(
            f"{run}: another process is training it; wait for it or name another --run"
        ) from None
    except OSError:
        # A file system without locks.
        pass
    return lock


# --- whole writes


def atomic_bytes(path: pathlib.Path, content: bytes) -> None:
    """Write the file `path` whole or not at all; it is on the disk afterwards."""
    with disk_faults(path):
        # Beside it first, then renamed, with both file and folder on the disk.
        new = path.with_name(path.name + ".new")
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


@contextlib.contextmanager
def atomic_text(path: str, anew: bool = False) -> Iterator[TextIO]:
    """Open a text file that appears at `path` once all is written; after a fault nothing is left.

    Its folder is made. `anew`: raise UserError where there is a file that is not empty.
    """
    out = pathlib.Path(path)
    if anew and out.exists() and out.stat().st_size:
        raise UserError(f"{out}: exists; remove it or name another --out")
    # Hidden, and a name of this process's own: two may write at once.
    new = out.with_name(f".{out.name}.{os.getpid()}")
    with disk_faults(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = new.open("w")
    try:
        with file:
            yield file
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_faults(path: pathlib.Path) -> Iterator[None]:
    """Turn a full disk or a lost permission, also in Orbax's words, into a UserError on `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as fault:
        # Orbax wraps what the system says into errors of its own.
        reason = re.search(DISK_FAULTS, str(fault))
        if not isinstance(fault, OSError) and not reason:
            raise
        told = reason.group() if reason else fault
        raise UserError(
            f"{path}: not saved: {told}; free the disk, then the same command resumes"
        ) from fault


# --- the manifest of a step


def array_type(leaf: Any) -> str:
    """Return dtype and shape of an array as the manifest's `arrays` has them: `float32[2,3]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def abstract_tree(types: dict[str, str]) -> dict[str, Any]:
    """Return `arrays` of a manifest, {"a/b": array_type}, as nested ShapeDtypeStructs."""
    # `a/b/c` is the entry c of the entry b of the entry a.
    tree: dict[str, Any] = {}
    for name, array in types.items():
        *parents, last = name.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        dtype, sizes = array.rstrip("]").split("[")
        shape = [int(size) for size in sizes.split(",") if size]
        inner[last] = jax.ShapeDtypeStruct(shape, dtype)
    return tree


def write_manifest(path: pathlib.Path, body: dict[str, Any]) -> None:
    """Finish the step at `path`: store `body` and the sums of all the step's files."""
    # The sums first: the manifest is the last file of a step.
    sums = {name: _sum(path / name, sync=True) for name in _files(path)}
    atomic_bytes(path / "manifest.json", _seal({**body, "files": sums}))


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """Read the manifest of the step at `path`; raise Damaged where its own sum differs.

    Keys: `step`; `config`, an identity_hash; `arrays`, {"params/...": array_type}; `extra`, a list
    with an entry per process; `files`, {path: {"sha256", "size"}}.
    """
    file = path / "manifest.json"
    try:
        body = json.loads(file.read_bytes())
        del body["self"]
        # A changed byte changes the sum; a copied folder has another name.
        if _seal(body) == file.read_bytes() and body["step"] == int(path.name):
            return body
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise Damaged(f"{file}: damaged")


def check_step(path: pathlib.Path, config_hash: str, item: str = "") -> dict[str, Any]:
    """Compare all files of the step at `path`, or those below `item`, and return its manifest.

    Raises Damaged for the first that is missing, differs or was not written by the run.
    """
    manifest = read_manifest(path)
    if manifest["config"] != config_hash:
        raise Damaged(f"{path / 'manifest.json'}: written under another config.json")
    # What should be there, and what is.
    listed = {name: entry for name, entry in manifest["files"].items() if name.startswith(item)}
    present = {name for name in _files(path) if name.startswith(item)}
    for name, entry in listed.items():
        if name not in present:
            raise Damaged(f"{path / name}: missing")
        # The size first: it costs nothing, and tells a file that was cut.
        size = (path / name).stat().st_size
        if size != entry["size"]:
            raise Damaged(f"{path / name}: damaged ({size:,} bytes instead of {entry['size']:,})")
        if _sum(path / name) != entry:
            raise Damaged(f"{path / name}: damaged (its SHA-256 differs from the manifest's)")
    surplus = present - set(listed)
    if surplus:
        raise Damaged(f"{path / min(surplus)}: surplus, not written by this run")
    return manifest


def is_good(path: pathlib.Path, config_hash: str, quiet: bool = False) -> bool:
    """True if check_step finds no fault; else it is told on stderr unless `quiet`."""
    try:
        check_step(path, config_hash)
    except Damaged as fault:
        if not quiet:
            print(f"warning: {fault}; falling back to the step before", file=sys.stderr)
        return False
    return True


def _files(path: pathlib.Path) -> list[str]:
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    return sorted(name for name in names if name != "manifest.json")


def _sum(path: pathlib.Path, sync: bool = False) -> dict[str, Any]:
    """Return SHA-256 and size of a file; with `sync` it is on the disk afterwards."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": sha256, "size": path.stat().st_size}


def _seal(body: dict[str, Any]) -> bytes:
    """Return the manifest's bytes; its last entry is the sum of the others: it guards itself."""
    text = json.dumps(body, sort_keys=True)
    own_sum = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**body, "self": own_sum}, indent=1).encode()


# --- the steps of a run


def finished_steps(folder: pathlib.Path) -> list[int]:
    """Return the steps with a manifest in `folder`, RUN/checkpoints, newest first."""
    names = [path.parent.name for path in folder.glob("*/manifest.json")]
    return sorted((int(name) for name in names if re.fullmatch(r"\d+", name)), reverse=True)


def remove_step(path: pathlib.Path) -> None:
    """Remove a step; whenever that is interrupted, the step is either whole or no step."""
    # Renamed first, which happens at once or not at all.
    gone = path.with_name(path.name + ".removed")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def remove_unfinished(folder: pathlib.Path) -> None:
    """Remove what an interrupted save or removal left in `folder` (RUN/checkpoints)."""
    # Folders named by a number, with or without an ending of Orbax's or ours.
    finished = {str(step) for step in finished_steps(folder)}
    for path in folder.iterdir():
        if path.is_dir() and re.fullmatch(r"\d+(\..+)?", path.name) and path.name not in finished:
            shutil.rmtree(path)
