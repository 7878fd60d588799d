"""Checkpoints of a run: saved in the background, sealed by SHA-256 sums, restored onto any mesh.

`<run>/checkpoints/<step>/` holds two Orbax items, `params` and `rest`, and `manifest.json`, which
is written last: a step without it was never finished and is removed; a step that disagrees with it
is never loaded.
"""

import concurrent.futures
import contextlib
import json
import logging
import os
import pathlib
import signal
import sys
import threading
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from runtime.errors import UserError
from runtime.hosts import all_gather_json
from runtime.run_folder import (
    Damaged,
    abstract_tree,
    array_type,
    atomic_bytes,
    check_step,
    describe_run,
    disk_faults,
    finished_steps,
    identity_hash,
    is_good,
    lock_run,
    read_manifest,
    refuse_other_run,
    remove_step,
    remove_unfinished,
    stored_identity,
    write_manifest,
)

ADDED_LATER = ("left_out",)
"""Counters of the state that earlier versions did not keep: restored from those, they are 0."""


class Checkpoints:
    """The run folder `run` while a script trains in it.

    On entry the folder is created, or found to hold a run of the same config, script and
    tokenizer: else UserError, and nothing is touched. SIGTERM and Ctrl-C ask `due` for a last
    save, a second one ends at once. After Ctrl-C the exit raises KeyboardInterrupt, so that
    nothing follows in a shell.
    """

    def __init__(
        self, run: str, config: Any, *, script: str, tokenizer: bytes | None = None, keep: int = 2
    ):
        """Describe the run; nothing is written before entry.

        `config`: the script's dataclass. `script`: its name, stored. `tokenizer`: the bytes of its
        model file. `keep`: checkpoints kept, the newest.
        """
        if keep < 1:
            raise UserError(f"--keep_checkpoints={keep}: at least one checkpoint must be kept")
        self.run = pathlib.Path(run)
        self.keep = keep
        self.folder = (self.run / "checkpoints").absolute()
        self.tokenizer = tokenizer
        self.config = describe_run(config, script, self.tokenizer)
        self.stopping = False
        """True once `due` has seen a signal: the script should end after that save."""
        self._signal: int | None = None
        self._pending: concurrent.futures.Future | None = None

    def __enter__(self) -> "Checkpoints":
        # All processes look before one writes.
        refuse_other_run(self.run, self.config)
        multihost_utils.sync_global_devices("run folder checked")
        if jax.process_index() == 0:
            self._lock = lock_run(self.run, self.folder)
            atomic_bytes(self.run / "config.json", json.dumps(self.config, indent=1).encode())
            if self.tokenizer is not None:
                atomic_bytes(self.run / "tokenizer.model", self.tokenizer)
            remove_unfinished(self.folder)
        multihost_utils.sync_global_devices("run folder written")
        # Orbax writes in the background; a thread of ours waits for it and seals the step.
        ocp = _orbax()
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), timeout_secs=3600)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="manifest")
        # Several processes must agree on the step: JAX's preemption service, which takes SIGTERM,
        # does that (see `due`).
        self._old_handlers = {}
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: Any, fault: Any, trace: Any) -> None:
        if isinstance(fault, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            # Another process is gone: its part of a save would be waited for in vain.
            return
        try:
            self.wait()
        except Exception as unsaved:
            if fault is None:
                raise
            # The body's own fault goes on.
            print(f"warning: {unsaved}", file=sys.stderr)
        finally:
            self._thread.shutdown()
            # What closing could tell, `wait` has told.
            with contextlib.suppress(Exception):
                self._orbax.close()
            self._restore_handlers()
            if jax.process_index() == 0:
                os.close(self._lock)
        if self._signal == signal.SIGINT and fault is None:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number
        self._restore_handlers()
        name = signal.Signals(number).name
        # Nobody may read it.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: saving after this step (again: stop at once)\n".encode())

    def _restore_handlers(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    # --- saving

    def due(self, step: int, every: int, last: int) -> bool:
        """True every `every` steps, at step `last`, and after a signal (then `stopping` is set).

        `every` 0: at `last` or after a signal alone. With several processes, all must call it at
        every step.
        """
        self.stopping = self._signal is not None
        if jax.process_count() > 1:
            self.stopping = multihost_utils.reached_preemption_sync_point(step)
        return self.stopping or step == last or (every > 0 and step % every == 0)

    def save(self, step: int, state: dict[str, Any], extra: Any = None) -> None:
        """Start saving `state` and `extra` as `step`; return once arrays are copied to the host.

        `state`: a tree of arrays and typed keys, its parameters under "params". `extra`: small and
        JSON, each process's own, such as its position in the data. Raises UserError where
        parameters are not finite, or where the previous save failed.
        """
        # One save at a time: the one before must be on the disk.
        self.wait()
        _refuse_non_finite(state["params"], self.folder, step)
        ocp = _orbax()
        items = _items(state)
        body = {
            "step": step,
            "config": identity_hash(self.config),
            "arrays": {name: array_type(leaf) for name, leaf in _named(items).items()},
            "extra": all_gather_json(extra),
        }
        path = self.folder / str(step)
        # Orbax copies the arrays to the host before it returns: they may then be donated.
        with disk_faults(path):
            saves = {item: ocp.args.PyTreeSave(tree) for item, tree in items.items() if tree}
            self._orbax.save(path, args=ocp.args.Composite(**saves))
        self._pending = self._thread.submit(self._finish, path, body)

    def _finish(self, path: pathlib.Path, body: dict[str, Any]) -> None:
        """Wait for Orbax in the background, write the manifest, and only then remove old steps."""
        with disk_faults(path):
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(path, body)
                # The new step counts among those kept.
                for step in finished_steps(self.folder)[self.keep :]:
                    remove_step(self.folder / str(step))

    def wait(self) -> None:
        """Wait until the last save is on disk; raise what went wrong with it."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    # --- restoring

    def restore(self, abstract_state: dict[str, Any]) -> tuple[int, dict[str, Any], Any] | None:
        """Load the newest good step as (step, state, extra of this process); None for a new run.

        `abstract_state`: the state's tree of ShapeDtypeStructs, whose shardings the result gets.
        Damaged steps are passed over with a warning, and removed once an older good one is loaded.
        Raises UserError where all are damaged, or where names, shapes or dtypes differ.
        """
        self.wait()
        steps = finished_steps(self.folder)
        step = self._newest_good(steps)
        if step is None:
            if steps:
                raise UserError(
                    f"{self.folder}: no step is undamaged; remove the folder to start anew"
                )
            return None
        # Names, dtypes and shapes are compared before anything is read.
        path = self.folder / str(step)
        manifest = read_manifest(path)
        items = {}
        for item, tree in _items(abstract_state).items():
            added = _added_later(manifest["arrays"], item, tree)
            stored = {name: leaf for name, leaf in tree.items() if name not in added}
            items[item] = {**_load(path, manifest, item, stored), **added}

        # The rest was stored by name: put it back into the tree that optax and Flax know.
        abstract_rest = _without_params(abstract_state)
        leaves = [
            _typed(items["rest"][name], like) for name, like in _named(abstract_rest).items()
        ]
        rest = jax.tree.unflatten(jax.tree.structure(abstract_rest), leaves)

        multihost_utils.sync_global_devices("restored")
        if jax.process_index() == 0:
            for damaged in steps[: steps.index(step)]:
                remove_step(self.folder / str(damaged))
        # A process that the save did not have gets another's extra, which the data then refuses.
        extras = manifest["extra"]
        extra = extras[jax.process_index() % len(extras)]
        return step, {"params": items["params"], **rest}, extra

    def _newest_good(self, steps: list[int]) -> int | None:
        """Return the first of `steps` without damage; process 0 looks, and tells the others."""
        config_hash = identity_hash(self.config)
        # -1 for none, as a number that can be broadcast.
        found = -1
        if jax.process_index() == 0:
            for step in steps:
                if is_good(self.folder / str(step), config_hash):
                    found = step
                    break
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        return None if found < 0 else found


# --- the parameters of a run, for other scripts


def load_step_params(run: str, step: int | None, shapes: Any) -> dict[str, Any]:
    """Load the parameters of `run` as they were saved, at `step` or the newest.

    `shapes`: tree of ShapeDtypeStructs with shardings, which the arrays get; None: NumPy arrays.
    Raises UserError for a missing run or step, a damaged file, another shape or dtype.
    """
    config_hash = stored_identity(run)
    path, earlier = _find_step(run, step)
    try:
        manifest = check_step(path, config_hash, item="params/")
    except Damaged as fault:
        # What to name instead.
        good = [
            number
            for number in earlier
            if is_good(path.with_name(str(number)), config_hash, quiet=True)
        ]
        raise UserError(
            f"{fault}; last good step before it: {good[0] if good else 'none'}"
        ) from None
    # As they were saved: shapes without shardings give NumPy arrays.
    if shapes is None:
        shapes = abstract_tree(manifest["arrays"])["params"]
    return _load(path, manifest, "params", shapes)


def stored_params(run: str) -> dict[str, Any]:
    """Return the parameters of the newest step of `run` as nested ShapeDtypeStructs, reading none.

    Raises UserError for a run without a finished step, or with a damaged manifest.
    """
    path, _ = _find_step(run, None)
    try:
        manifest = read_manifest(path)
    except Damaged as fault:
        raise UserError(f"{fault}; restore it, or name another run") from None
    return abstract_tree(manifest["arrays"])["params"]


def _find_step(run: str, step: int | None) -> tuple[pathlib.Path, list[int]]:
    """Return the folder of `step` (None: the newest) of `run`, and earlier steps, newest first."""
    # Steps without a manifest were never finished.
    folder = (pathlib.Path(run) / "checkpoints").absolute()
    steps = finished_steps(folder)
    if not steps or step not in (None, *steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        finished = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{run}: {wanted} (finished steps: {finished})")
    if step is None:
        step = steps[0]
    return folder / str(step), [number for number in steps if number < step]


# --- the two items of a step


def _without_params(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in state.items() if name != "params"}


def _items(state: dict[str, Any]) -> dict[str, Any]:
    """Return the two trees that Orbax stores.

    `params` as it is, and `rest` by name, whatever types optax and Flax have for it.
    """
    rest = {name: _raw(leaf) for name, leaf in _named(_without_params(state)).items()}
    return {"params": state["params"], "rest": rest}


def _named(tree: Any) -> dict[str, Any]:
    """Return the leaves by their paths, joined by slashes, in the tree's order."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _added_later(arrays: dict[str, str], item: str, tree: dict[str, Any]) -> dict[str, Any]:
    """Return zeros for those leaves of `tree` that a step of an earlier version does not have.

    `arrays`: those of its manifest; only counters named in ADDED_LATER may be missing.
    """
    zeros = {}
    for name, leaf in tree.items():
        is_stored = f"{item}/{name}" in arrays
        if name.rpartition("/")[2] in ADDED_LATER and not is_stored:
            make = partial(jnp.zeros, leaf.shape, leaf.dtype)
            zeros[name] = jax.jit(make, out_shardings=leaf.sharding)()
    return zeros


def _raw(leaf: Any) -> Any:
    """Return a typed random key as its bits, abstract or not; anything else unchanged."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.random.key_data(leaf)
    bits = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=leaf.sharding)


def _typed(bits: Any, like: Any) -> Any:
    """Undo `_raw` for the abstract leaf `like`."""
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return bits
    # The kind of an abstract key can only be asked while tracing.
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(bits, impl=found[0])


def _load(path: pathlib.Path, manifest: dict[str, Any], item: str, tree: Any) -> Any:
    """Load one item of the step at `path` as the abstract `tree`, its arrays placed as there.

    Raises UserError for another name, dtype or shape.
    """
    leaves = _named(tree)
    if not leaves:
        return tree
    _refuse_other_arrays(path, manifest["arrays"], item, leaves)
    ocp = _orbax()

    # A sharding makes it a jax.Array there, none a NumPy array.
    def place(leaf: jax.ShapeDtypeStruct) -> Any:
        if leaf.sharding:
            return ocp.ArrayRestoreArgs(sharding=leaf.sharding)
        return ocp.RestoreArgs(restore_type=np.ndarray)

    args = ocp.args.PyTreeRestore(tree, restore_args=jax.tree.map(place, tree))
    with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as reader:
        return reader.restore(path / item, args=args)


def _refuse_other_arrays(
    path: pathlib.Path, arrays: dict[str, str], item: str, leaves: dict[str, Any]
) -> None:
    """Raise UserError for the first of `leaves` that `arrays`, a manifest's, has otherwise."""
    stored = {name: array for name, array in arrays.items() if name.startswith(f"{item}/")}
    wanted = {f"{item}/{name}": array_type(leaf) for name, leaf in leaves.items()}
    # Ours first, then what is stored beside.
    for name in [*wanted, *stored]:
        there = stored.get(name, "absent")
        here = wanted.get(name, "absent")
        if there != here:
            shown = name.removeprefix("rest/")
            raise UserError(
                f"{path}: {shown} is {there} stored and {here} here; use that run's config"
            )


# --- finite parameters


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if not floats:
        return jnp.bool_(True)
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()


def _refuse_non_finite(params: Any, folder: pathlib.Path, step: int) -> None:
    """Raise UserError for a NaN or infinity; waits for the parameters, as the copy would next."""
    if bool(_all_finite(params)):
        return
    # Which one is looked for only now that there is one.
    name = next(name for name, leaf in _named(params).items() if not bool(_all_finite(leaf)))
    newest = next(iter(finished_steps(folder)), "none")
    fault = f"params/{name} is not finite (last saved step: {newest})"
    raise UserError(f"{folder}: step {step} not saved: {fault}; lower the learning rate")


# --- Orbax


def _orbax() -> Any:
    """Import Orbax at its first use (0.4 s), its log off the terminal: faults are raised too."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    import orbax.checkpoint as ocp

    return ocp
