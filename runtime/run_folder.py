"""A run on disk, below Orbax: config.json and whom it admits, the sums of a finished step, whole writes.

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
from functools import reduce
from typing import Any, TextIO

import jax

from runtime.errors import UserError

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


class Damaged(Exception):
    """A stored step that disagrees with its manifest: names the file and the fault."""


# --- the run folder


def describe_run(config: Any, script: str, tokenizer: bytes | None) -> dict[str, Any]:
    """What config.json holds."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    sha256 = None if tokenizer is None else hashlib.sha256(tokenizer).hexdigest()
    fields = dataclasses.asdict(config)
    described = {"script": script, **fields, "tokenizer_sha256": sha256, "versions": versions}
    return json.loads(json.dumps(described, default=str))


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that must not change, by dotted name."""
    fixed = {
        key: value
        for key, value in config.items()
        if key != "versions" and RENAMED.get(key, key) not in FREE
    }
    named = jax.tree_util.tree_leaves_with_path(
        fixed, is_leaf=lambda value: not isinstance(value, dict)
    )
    return {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in named}


def identity_hash(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_identity(config), sort_keys=True).encode()).hexdigest()


def refuse_other_run(run: pathlib.Path, config: dict[str, Any]) -> None:
    """Raises UserError unless the folder `run` is new, empty, or a run that `config` continues.

    A run that ended before its first step was saved, as after a mistake, is begun anew with any config.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: a file, not a folder; name another --run")
    if not (run / "config.json").exists():
        if run.exists() and set(os.listdir(run)) - {"checkpoints", "config.json.new"}:
            raise UserError(
                f"{run}: holds files but no config.json, so it is not a run; name another --run"
            )
        return
    if not (
        finished_steps(run / "checkpoints")
        or any(run.glob("reference-*.npz"))
        or (run / "left_out.json").exists()
    ):
        return
    stored = _stored_config(str(run))
    for before, now in RENAMED.items():
        part, _, field = before.rpartition(".")
        if field in (stored.get(part, {}) if part else stored):
            raise UserError(
                f"{run}/config.json: made before {before} was renamed to {now}; "
                "start from it with --init, or name another --run"
            )
    old, new = _identity(stored), _identity(config)
    for name in [*new, *old]:
        if old.get(name) != new.get(name):
            values = f"{name} is {old.get(name)!r} in this run and {new.get(name)!r} now"
            raise UserError(
                f"{run}/config.json: {values}; resume with the run's value or name another --run"
            )
    for name, version in config["versions"].items():
        before = stored.get("versions", {}).get(name)
        if before != version and jax.process_index() == 0:
            print(
                f"warning: {run}: {name} was {before}, is {version}: results may differ",
                file=sys.stderr,
            )


def lock_run(run: pathlib.Path, folder: pathlib.Path) -> int:
    """A descriptor whose lock tells a second process that this run is being trained."""
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
    except OSError:  # a file system without locks
        pass
    return lock


def atomic_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with disk_faults(path):
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
    """A file to write into that is at `path`, its folder made, once all is written; of a fault nothing is left.

    `anew`: raises UserError where there is one that is not empty.
    """
    out = pathlib.Path(path)
    if anew and out.exists() and out.stat().st_size:
        raise UserError(f"{out}: exists; remove it or name another --out")
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
    """Turns a full disk, a lost permission and the like, also in Orbax's words, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as fault:
        reason = re.search(
            "No space left|quota exceeded|Permission denied|Read-only|File too large", str(fault)
        )
        if not isinstance(fault, OSError) and not reason:
            raise
        told = reason.group() if reason else fault
        raise UserError(
            f"{path}: not saved: {told}; free the disk, then the same command resumes"
        ) from fault


# --- the manifest


def _files(path: pathlib.Path) -> list[str]:
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(
        name for file in files if (name := file.relative_to(path).as_posix()) != "manifest.json"
    )


def _sum(path: pathlib.Path, sync: bool = False) -> dict[str, Any]:
    """SHA-256 and size of a file; with `sync` it is on the disk afterwards."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return {
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "size": path.stat().st_size,
        }


def kind_of(leaf: Any) -> str:
    """How the manifest's `arrays` names dtype and shape: `float32[2,3]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def nested(kinds: dict[str, str]) -> dict[str, Any]:
    """The abstract tree that a manifest's `arrays` names."""
    tree: dict[str, Any] = {}
    for name, kind in kinds.items():
        *parents, last = name.split("/")
        dtype, shape = kind.rstrip("]").split("[")
        leaf = jax.ShapeDtypeStruct([int(size) for size in shape.split(",") if size], dtype)
        reduce(lambda inner, key: inner.setdefault(key, {}), parents, tree)[last] = leaf
    return tree


def write_manifest(path: pathlib.Path, body: dict[str, Any]) -> None:
    """Finishes the step at `path`: sums of all its files, next to what `body` says of it."""
    body = {**body, "files": {name: _sum(path / name, sync=True) for name in _files(path)}}
    atomic_bytes(path / "manifest.json", _seal(body))


def _seal(body: dict[str, Any]) -> bytes:
    """The manifest's bytes: its last entry is the sum of the others, so that it vouches for itself too."""
    text = json.dumps(body, sort_keys=True)
    return json.dumps(
        {**body, "self": hashlib.sha256(text.encode()).hexdigest()}, indent=1
    ).encode()


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        body = json.loads(file.read_bytes())
        del body["self"]
        if _seal(body) == file.read_bytes() and body["step"] == int(path.name):
            return body
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise Damaged(f"{file}: damaged")


def check_step(path: pathlib.Path, config_hash: str, item: str = "") -> dict[str, Any]:
    """The manifest of a step, after comparing all its files, or those of one `item`; raises Damaged."""
    manifest = read_manifest(path)
    if manifest["config"] != config_hash:
        raise Damaged(f"{path / 'manifest.json'}: written under another config.json")
    listed = {name: entry for name, entry in manifest["files"].items() if name.startswith(item)}
    present = {name for name in _files(path) if name.startswith(item)}
    for name, entry in listed.items():
        if name not in present:
            raise Damaged(f"{path / name}: missing")
        if (size := (path / name).stat().st_size) != entry["size"]:
            raise Damaged(f"{path / name}: damaged ({size:,} bytes instead of {entry['size']:,})")
        if _sum(path / name) != entry:
            raise Damaged(f"{path / name}: damaged (its SHA-256 differs from the manifest's)")
    if surplus := present - set(listed):
        raise Damaged(f"{path / min(surplus)}: surplus, not written by this run")
    return manifest


def is_good(path: pathlib.Path, config_hash: str, quiet: bool = False) -> bool:
    try:
        check_step(path, config_hash)
    except Damaged as fault:
        if not quiet:
            print(f"warning: {fault}; falling back to the step before", file=sys.stderr)
        return False
    return True


def finished_steps(folder: pathlib.Path) -> list[int]:
    """Finished steps, newest first: those with a manifest."""
    found = folder.glob("*/manifest.json")
    return sorted(
        (int(p.parent.name) for p in found if re.fullmatch(r"\d+", p.parent.name)), reverse=True
    )


def remove_step(path: pathlib.Path) -> None:
    """Removes a step; whenever that is interrupted, the step is either whole or no step."""
    gone = path.with_name(path.name + ".removed")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def remove_unfinished(folder: pathlib.Path) -> None:
    """Removes what an interrupted save or removal left."""
    finished = set(map(str, finished_steps(folder)))
    for path in folder.iterdir():
        if path.is_dir() and re.fullmatch(r"\d+(\..+)?", path.name) and path.name not in finished:
            shutil.rmtree(path)


def load_config(run: str) -> dict[str, Any]:
    """Read `config.json` of the run folder `run`, with today's names of fields.

    Raises UserError where there is none.
    """
    config = _stored_config(run)
    if "model" in config:
        model = config["model"]
        # One switch in older runs, three settings now.
        if "gemma" in model:
            gemma = model.pop("gemma")
            model["activation"] = "gelu" if gemma else "silu"
            model["scale_embedding"] = gemma
            model["zero_centered_norm"] = gemma
        model = {RENAMED.get(f"model.{name}", name): x for name, x in model.items()}
        config["model"] = {name.removeprefix("model."): x for name, x in model.items()}
    return config


def stored_identity(run: str) -> str:
    """Hash the settings of `run` as it was made, which the manifests of its steps name too."""
    return identity_hash(_stored_config(run))


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


def read_rows(run: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; raises UserError for a line that is not JSON."""
    path = pathlib.Path(run) / "metrics.jsonl"
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}:{number}: not JSON; remove the line") from None
    return rows
