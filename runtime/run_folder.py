"""A run on disk, below Orbax: config.json and whom it admits, sums of a step, its metrics.

A step without `manifest.json` was never finished. Nothing is written to or removed from a folder
that is not known to be a run, by what config.json holds.
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
import tomllib
from collections.abc import Collection
from typing import Any, TypeVar

import jax

from runtime.errors import UserError, command_name
from runtime.writes import atomic_bytes, atomic_text, disk_faults

# Whole writes are asked for here too, by those who write a run.
__all__ = ["atomic_bytes", "atomic_text", "disk_faults"]

ROOT = pathlib.Path(__file__).resolve().parents[1]
"""The repository's folder."""

# By name, since config.json and not a class is compared: a fork's config has the same names for
# the same things, and a field that it adds decides its results until it is listed here.
FREE = {"run", "steps", "keep_checkpoints", "mesh", "rollout", "hosts", "offload", "dry_run"}
FREE |= {"eval_every", "save_every", "log_every", "sample_every"}
# These say when a run gives up, and nothing of what it computes until then.
SAYS_WHEN_TO_GIVE_UP = {"guard.most", "kl_limit"}
# So does this: a run that stops at bad rows has skipped none, so its order of records stays.
FREED_LATER = SAYS_WHEN_TO_GIVE_UP | {"on_bad_row"}
FREE |= FREED_LATER
"""Config fields that may change when a run is resumed; all others decide its results."""

NO_FIELDS = {"versions", "inputs", "earlier"}
"""Entries of config.json that are no settings: compared in their own ways, or not at all."""

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

ModelT = TypeVar("ModelT")


class Damaged(Exception):
    """A stored step that disagrees with its manifest: names the file and the fault."""


# --- config.json: what a run is


def refuse_other_tokenizer(file: pathlib.Path, content: bytes) -> None:
    """Raise UserError, without the file's name, if a run was made with another tokenizer.

    `file`: where the tokenizer `content` was read. It is compared only where it is named
    tokenizer.model and lies in a run's folder.
    """
    if file.name != "tokenizer.model" or not (file.parent / "config.json").exists():
        return
    try:
        expected = _stored_config(str(file.parent)).get("tokenizer_sha256")
    except UserError:
        # Some model's folder of another project.
        return
    if expected is not None and hashlib.sha256(content).hexdigest() != expected:
        raise UserError(
            "not the tokenizer that the run was made with (its SHA-256 differs from "
            "config.json's); restore the file"
        )


def path_from_root(path: pathlib.Path) -> str:
    """Return `path` as a text, from the repository's folder; the whole path if it lies outside."""
    path = path.resolve()
    # A repository may be moved: its own files are named from its root.
    if path.is_relative_to(ROOT):
        path = path.relative_to(ROOT)
    return path.as_posix()


def model_code() -> str | None:
    """Return the path of the `model.py` that is imported if it is a fork's own, else None.

    It is as `path_from_root` has it.
    """
    # Asked of Python and not of a path: what was imported is what computes.
    model = sys.modules.get("model")
    if model is None or model.__file__ is None:
        return None
    path = path_from_root(pathlib.Path(model.__file__))
    return None if path == "model.py" else path


def plumb_version() -> str:
    """Return the version of this code, as pyproject.toml has it."""
    # One place has it.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return project["project"]["version"]


def describe_run(config: Any, script: str, tokenizer: bytes | None) -> dict[str, Any]:
    """Return the content of config.json: fields of `config`, and what else decides the results.

    `config`: a script's dataclass. `script`: its path. `tokenizer`: the bytes of its model file,
    None without one. Beside the fields: `script`, `tokenizer_sha256`, `versions` of libraries and
    of this code, and, where a fork's own model.py is imported, its path as `model_code`. Values
    are as JSON gives them back.
    """
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    versions["plumb"] = plumb_version()
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


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return all settings in a config.json as {dotted name: value}; lists are kept whole."""
    fields = {name: value for name, value in config.items() if name not in NO_FIELDS}
    leaves = jax.tree_util.tree_leaves_with_path(
        fields, is_leaf=lambda value: not isinstance(value, dict)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in leaves
    }


def _identity(config: dict[str, Any], free: Collection[str] = FREE) -> dict[str, Any]:
    """Return the settings that must not change, by dotted name."""
    fixed = {}
    for name, value in settings_of(config).items():
        # A field is free by its own name, or by that of what it lies in.
        top = name.partition(".")[0]
        if free.isdisjoint({name, top, RENAMED.get(top, top)}):
            fixed[name] = value
    return fixed


def _hash(identity: dict[str, Any]) -> str:
    # Sorted, so that the order of fields does not matter.
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def identity_hash(config: dict[str, Any]) -> str:
    """Return the SHA-256 (hex) of the settings in a config.json that must not change."""
    return _hash(_identity(config))


def accepted_hashes(config: dict[str, Any]) -> set[str]:
    """Return the hashes under which the steps of a run with this config.json may be saved.

    `config`: read from it. For each form that it has had there are three: today's identity_hash,
    one from the time when the fields in FREED_LATER counted too, and one from when those in
    SAYS_WHEN_TO_GIVE_UP had been freed alone.
    """
    # Runs from before fields were free have manifests that name the hash of all.
    hashes = set()
    for form in _forms(config):
        for freed in (set(), SAYS_WHEN_TO_GIVE_UP, FREED_LATER):
            hashes.add(_hash({name: form[name] for name in form.keys() - freed}))
    return hashes


def _forms(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the settings, but for those always free, of each form that a config.json has had.

    The first is as it is. `earlier` lists the others by what they had otherwise: {name: [value]},
    with [] for a setting that was absent.
    """
    now = _identity(config, FREE - FREED_LATER)
    forms = [now]
    for differences in config.get("earlier", []):
        form = {name: value for name, value in now.items() if name not in differences}
        form |= {name: values[0] for name, values in differences.items() if values}
        forms.append(form)
    return forms


def with_earlier_forms(stored: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return `config`, with which the run `stored` goes on, with the forms that `stored` had.

    Both are contents of a config.json. So steps that were saved under these forms, as before the
    code had a field, are known again.
    """
    # Those of `stored` itself, told from what the config is now.
    now, *_ = _forms(config)
    earlier = []
    for form in _forms(stored):
        differences: dict[str, list[Any]] = {}
        for name in sorted(form.keys() | now.keys()):
            if name not in form:
                differences[name] = []
            elif name not in now or form[name] != now[name]:
                differences[name] = [form[name]]
        if differences and differences not in earlier:
            earlier.append(differences)
    return {**config, "earlier": earlier} if earlier else config


def stored_hashes(run: str) -> set[str]:
    """Return the hashes that the manifests of the steps of `run` may name: its `accepted_hashes`.

    Raises UserError where it is no run.
    """
    return accepted_hashes(_stored_config(run))


def load_config(run: str) -> dict[str, Any]:
    """Read `config.json` of the run folder `run`, with today's names of the model's fields.

    Raises UserError where there is none, and where it is damaged or not a run's.
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
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{run}: no run here ({path} is missing); name the folder of a finished run"
        ) from None
    except (OSError, ValueError, RecursionError) as fault:
        raise UserError(
            f"{path}: not readable as JSON ({fault}); restore it or start another run"
        ) from None
    # A model's folder of another project has a config.json too.
    if not isinstance(config, dict) or not isinstance(config.get("script"), str):
        raise UserError(f"{path}: not that of a run; name the folder of a run")
    for name in ("model", "lora", "guard", "inputs", "versions"):
        if not isinstance(config.get(name, {}), dict):
            raise UserError(f"{path}: {name}: damaged; restore the file or start another run")
    is_code = isinstance(config.get("model_code", ""), str)
    if not is_code or not _are_forms(config.get("earlier", [])):
        raise UserError(
            f"{path}: earlier or model_code: damaged; restore the file or start another run"
        )
    return config


def _are_forms(earlier: Any) -> bool:
    """Tell if a value of a config.json is what `_forms` reads: {name: [value]} of each form."""
    if not isinstance(earlier, list) or not all(isinstance(form, dict) for form in earlier):
        return False
    return all(isinstance(values, list) for form in earlier for values in form.values())


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
    stored = config.get("model")
    if not isinstance(stored, dict):
        raise UserError(f"{run}/config.json: has no model; restore the file or start another run")
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
            f"{run}: made by {script}{_by_version(config)}, its model {' and '.join(faults)}; "
            f"{_how_to_read(script)}"
        )
    try:
        return model_class(**stored)
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as fault:
        raise UserError(
            f"{run}/config.json: model: {fault}; restore the file or start another run"
        ) from None


def _by_version(config: dict[str, Any]) -> str:
    """Return " of Plumb 0.1.0" for the version that wrote `config`; "" where it did not say."""
    version = config.get("versions", {}).get("plumb")
    return f" of Plumb {version}" if version else ""


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


def refuse_foreign_folder(run: str) -> None:
    """Raise UserError unless the folder `run` is a run, or can become one: new or empty.

    A run is known by its config.json, and there by entries that nobody else writes. Whatever else
    a folder holds, it is left as it is.
    """
    if not run:
        raise UserError("--run=: names no folder; give one")
    # What lies there, if anything.
    folder = pathlib.Path(run)
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise UserError(f"{run}: a file, not a folder; name another --run") from None
    except OSError as fault:
        raise UserError(f"--run={run[:80]}: {fault.strerror}; name another --run") from None
    # Many a project has a config.json.
    if "config.json" in names:
        _refuse_foreign_config(run)
    elif not _is_as_if_new(folder, names):
        raise UserError(
            f"{run}: holds files but no config.json, so it is not a run; name another --run"
        )


def _refuse_foreign_config(run: str) -> None:
    try:
        stored = _stored_config(run)
    except UserError as fault:
        raise UserError(f"{fault}; nothing was changed, name another --run") from None
    if not {"tokenizer_sha256", "versions"} <= stored.keys():
        raise UserError(
            f"{run}/config.json: not that of a run, nothing was changed; name another --run"
        )


def _is_as_if_new(folder: pathlib.Path, names: set[str]) -> bool:
    """True if a start of ours that ended before config.json was there may have left `names`."""
    ours = {name for name in names if re.fullmatch(r"\.config\.json\..+\.partial", name)}
    if names - ours == {"checkpoints"}:
        # Its own are made after config.json.
        return not any((folder / "checkpoints").iterdir())
    return names == ours


def refuse_other_run(run: pathlib.Path, config: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise UserError unless the folder `run` is new, empty, or a run that `config` continues.

    `config`: what describe_run returns. `defaults`: of settings by dotted name, for those that the
    run does not have yet. A run that ended before its first step was saved, as after a mistake, is
    begun anew with any config, unless it has rows of metrics. Warns of other versions of
    libraries.
    """
    refuse_foreign_folder(str(run))
    if not (run / "config.json").exists():
        return
    stored = _stored_config(str(run))
    # What was never saved binds no one.
    if not has_begun(run):
        _refuse_lost_checkpoints(run, stored, config, defaults)
        return
    _refuse_other_script(run, stored, config)
    _refuse_old_names(run, stored)
    _refuse_other_settings(run, stored, config, defaults)
    # Results may differ in the last bits with other libraries.
    for name, version in config["versions"].items():
        before = stored.get("versions", {}).get(name)
        if before not in (None, version) and jax.process_index() == 0:
            print(
                f"warning: {run}: {name} was {before}, is {version}: results may differ",
                file=sys.stderr,
            )


def has_begun(run: pathlib.Path) -> bool:
    """True if the folder `run` holds results that belong to its config.

    Such are a finished step, log-probabilities of a reference, or left_out.json; not metrics.
    """
    # A name that can be no folder's is refused where the folder is made.
    with contextlib.suppress(OSError):
        return _holds_results(run)
    return False


def _holds_results(run: pathlib.Path) -> bool:
    return (
        bool(finished_steps(run / "checkpoints"))
        or any(run.glob("reference-*.npz"))
        or (run / "left_out.json").exists()
    )


def _refuse_lost_checkpoints(
    run: pathlib.Path,
    stored: dict[str, Any],
    config: dict[str, Any],
    defaults: dict[str, Any],
) -> None:
    """Raise UserError if the run `stored`, which has no finished step, seems to have had one.

    Its metrics and samples would be lost. A run that ended before its first step was saved may
    have some too: the same command computes these again.
    """
    # Ours have their number with the manifest alone: this one has lost it, or is another's.
    bare = _steps_without_manifest(run / "checkpoints")
    if bare:
        raise UserError(
            f"{bare[0]}: has no manifest.json; restore it, or remove the folder to begin anew"
        )
    written = [run / name for name in ("metrics.jsonl", "samples.md")]
    if not any(path.exists() and path.stat().st_size for path in written):
        return
    # The same command, after a kill: what it had written comes again.
    is_same = not other_settings(stored, config, defaults)
    if is_same and (run / "checkpoints").is_dir() and not _was_saved(run, stored):
        return
    raise UserError(
        f"{run}: holds metrics of a run whose checkpoints are gone; "
        "name another --run, or remove the folder to begin anew"
    )


def _was_saved(run: pathlib.Path, stored: dict[str, Any]) -> bool:
    """True if the metrics of a run show that a step of it must have been saved."""
    path = run / "metrics.jsonl"
    rows = path.read_bytes() if path.exists() else b""
    # The last that is whole; a kill may have cut one off.
    steps = re.findall(rb'^\{"step": (\d{1,9}),', rows, re.MULTILINE)
    last = int(steps[-1]) if steps else 0
    every = stored.get("save_every")
    # The save of one step is finished before that of the next begins.
    return isinstance(every, int) and 0 < 2 * every < last


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


def default_settings(config: Any) -> dict[str, Any]:
    """Return {dotted name: default} of the settings of the dataclass instance `config`.

    Values are as JSON gives them back; settings without a default are left out.
    """
    # Of the class, as for a run that nobody set it for.
    defaults = {}
    for field in dataclasses.fields(config):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING:
            continue
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            default = dataclasses.asdict(default)
        defaults[field.name] = default
    return settings_of(json.loads(json.dumps(defaults, default=str)))


def other_settings(
    stored: dict[str, Any], config: dict[str, Any], defaults: dict[str, Any]
) -> list[str]:
    """Return the dotted names of settings that must not change but differ between two config.json.

    `defaults`: of `default_settings`; a setting that `stored` does not have, as an older run, has
    its default there.
    """
    old = _with_defaults(stored, config, defaults)
    new = _identity(config)
    # In the order of the fields, those unknown to this code last.
    missing = object()
    names = [*new, *(name for name in old if name not in new)]
    return [name for name in names if old.get(name, missing) != new.get(name, missing)]


def _with_defaults(
    stored: dict[str, Any], config: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, Any]:
    """Return the settings of `stored` that must not change, and defaults of those of `config`."""
    known = {name: defaults[name] for name in _identity(config) if name in defaults}
    return {**known, **_identity(stored)}


def _refuse_other_settings(
    run: pathlib.Path,
    stored: dict[str, Any],
    config: dict[str, Any],
    defaults: dict[str, Any],
) -> None:
    """Raise UserError for the first setting with which `config` is another run than `stored`."""
    old = _with_defaults(stored, config, defaults)
    new = _identity(config)
    for name in other_settings(stored, config, defaults):
        if name not in new:
            raise UserError(
                f"{run}/config.json: {name} is {old[name]!r}, which is unknown to this version "
                f"of {config['script']}; resume with the one that made the run"
                f"{_by_version(stored)}"
            )
        values = f"{name} is {old.get(name)!r} in this run and {new[name]!r} now"
        raise UserError(
            f"{run}/config.json: {values}; resume with the run's value or name another --run"
        )


def lock_run(run: pathlib.Path, folder: pathlib.Path) -> int:
    """Make `folder`, lock it against a second process that trains `run`; return its descriptor.

    `folder`: RUN/checkpoints. Closing the descriptor opens the lock. Raises UserError where
    another process has it, or where the folder cannot be made.
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
    """Finish the step at `path`, its folder: store `body` and the sums of all the step's files.

    `body`: entries of `read_manifest` but `files`. All is on the disk afterwards.
    """
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
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    raise Damaged(f"{file}: damaged")


def check_step(
    path: pathlib.Path, config_hashes: Collection[str], item: str = ""
) -> dict[str, Any]:
    """Compare all files of the step at `path` with its manifest, which is returned.

    `item`: only files whose path in the step begins so; "": all. `config_hashes`: those of the
    run's config, one of which the manifest names. Raises Damaged for the first file that is
    missing, differs or was not written by the run.
    """
    manifest = read_manifest(path)
    if manifest["config"] not in config_hashes:
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


def is_good(path: pathlib.Path, config_hashes: Collection[str], quiet: bool = False) -> bool:
    """True if `check_step` finds no fault; else the fault is told on stderr unless `quiet`.

    `path`: the step's folder. `config_hashes`: of `stored_hashes`.
    """
    try:
        check_step(path, config_hashes)
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
    while True:
        steps = [path for path in folder.glob("*") if re.fullmatch(r"\d+", path.name)]
        finished = [path for path in steps if (path / "manifest.json").exists()]
        # A trainer that has removed one meanwhile has written another: it is looked for again.
        if all(path.exists() for path in steps):
            return sorted((int(path.name) for path in finished), reverse=True)


def unfinished(path: pathlib.Path) -> pathlib.Path:
    """Return where the step `path` lies until it has its manifest: beside it, as NAME.saving."""
    return path.with_name(path.name + ".saving")


def remove_step(path: pathlib.Path) -> None:
    """Remove the step at `path`; when that is interrupted, the step is either whole or no step."""
    # Renamed first, which happens at once or not at all.
    gone = path.with_name(path.name + ".removed")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def remove_unfinished(folder: pathlib.Path) -> None:
    """Remove what an interrupted save or removal left in `folder` (RUN/checkpoints).

    A step that has lost its manifest is not among it: that one is set aside, with a note.
    """
    # The endings are ours, or Orbax's for what it has not written whole.
    left = re.compile(r"\d+(\.saving)?(\.removed|\.saving|\.orbax-checkpoint-tmp.*)")
    for path in list(folder.iterdir()):
        is_empty = path.name.isdigit() and path.is_dir() and not any(path.iterdir())
        if path.is_dir() and not path.is_symlink() and (left.fullmatch(path.name) or is_empty):
            shutil.rmtree(path)
    for path in _steps_without_manifest(folder):
        aside = folder.parent / "set_aside" / path.name
        while aside.exists():
            aside = aside.with_name(aside.name + "_")
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
        print(f"note: {path}: has no manifest.json; kept as {aside}", file=sys.stderr)


def note_lost_manifest(folder: pathlib.Path, step: int) -> None:
    """Note on stderr, on process 0, if a step later than `step` has lost its manifest.

    `folder`: RUN/checkpoints. `step`: the newest finished one, which is read instead.
    """
    lost = _steps_without_manifest(folder)
    if lost and int(lost[0].name) > step and jax.process_index() == 0:
        print(f"note: {lost[0]}: has no manifest.json; read is step {step}", file=sys.stderr)


def _steps_without_manifest(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return folders named as steps that hold something, but no manifest, newest first."""
    found = []
    for path in folder.glob("*"):
        if path.name.isdigit() and path.is_dir() and not (path / "manifest.json").exists():
            found.append(path)
    found = [path for path in found if _holds_something(path)]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def _holds_something(path: pathlib.Path) -> bool:
    try:
        return bool(os.listdir(path))
    # A trainer has removed it meanwhile.
    except FileNotFoundError:
        return False
