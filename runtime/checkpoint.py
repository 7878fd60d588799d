"""Checkpoints of a run: saved in the background, sealed by SHA-256 sums, restored onto any mesh.

`<run>/checkpoints/<step>/` holds two Orbax items, `params` and `rest`, and `manifest.json`, which
is written last, in `<step>.saving`, which is then renamed: what is called so was never finished
and is removed. A step that disagrees with its manifest is never loaded.
"""

import concurrent.futures
import contextlib
import json
import logging
import os
import pathlib
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from runtime.agreement import refuse_different_processes
from runtime.errors import UserError
from runtime.guard import spike_count
from runtime.hosts import all_gather_json, progressed
from runtime.inputs import RunAtStep, contents_of, refuse_other_inputs
from runtime.run_folder import (
    Damaged,
    abstract_tree,
    accepted_hashes,
    array_type,
    check_step,
    default_settings,
    describe_run,
    finished_steps,
    has_begun,
    identity_hash,
    is_good,
    load_config,
    lock_run,
    note_lost_manifest,
    read_manifest,
    refuse_foreign_folder,
    refuse_other_run,
    remove_step,
    remove_unfinished,
    stored_hashes,
    unfinished,
    with_earlier_forms,
    write_manifest,
)
from runtime.writes import atomic_bytes, disk_faults, sync_folder

LONGEST_SAVE = 3600
"""Seconds after which a save is given up."""

ReadT = TypeVar("ReadT")

ADDED_LATER = ("left_out",)
"""Counters of the state that earlier versions did not keep: restored from those, they are 0."""


class Checkpoints:
    """The run folder `run` while a script trains in it.

    On entry the folder is created, or found to hold a run of the same config, script, tokenizer
    and inputs: else UserError, and nothing is touched. SIGTERM, SIGHUP and Ctrl-C ask `due` for a
    last save, a second one ends at once. A run that has stopped so before its last step ends with
    a line, and then as a program that the signal ended: KeyboardInterrupt after Ctrl-C, else
    SystemExit of 128 and the signal's number. So nothing that follows it takes it for finished.
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
        refuse_foreign_folder(run)
        self.run = pathlib.Path(run)
        self.keep = keep
        self.folder = (self.run / "checkpoints").absolute()
        self.tokenizer = tokenizer
        # What the run is, and what it reads.
        inputs = contents_of(config)
        self.config = describe_run(config, script, self.tokenizer)
        if inputs:
            self.config["inputs"] = inputs
        self._script_config = config
        self.stopping = False
        """True once `due` has seen a signal: the script should end after that save."""
        self._signal: int | None = None
        self._pending: concurrent.futures.Future | None = None
        # The newest step that is saved, the newest that `due` was asked of, and the run's last.
        self._saved = 0
        self._step = 0
        self._last = 0

    def __enter__(self) -> "Checkpoints":
        # All processes look before one writes, and train one run in one way.
        refuse_other_run(self.run, self.config, default_settings(self._script_config))
        if has_begun(self.run):
            stored = load_config(str(self.run))
            refuse_other_inputs(
                str(self.run), stored, self._script_config, self.config.get("inputs", {})
            )
        refuse_different_processes(self.config)
        multihost_utils.sync_global_devices("run folder checked")
        if jax.process_index() == 0:
            self._lock = lock_run(self.run, self.folder)
            self._write_config()
            remove_unfinished(self.folder)
        multihost_utils.sync_global_devices("run folder written")
        self._saved = max(finished_steps(self.folder), default=0)
        # By which a folder is known that was removed, or replaced, while it is trained in.
        self._place = os.stat(self.folder)
        # Orbax writes in the background; a thread of ours waits for it and seals the step.
        ocp = _orbax()
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), timeout_secs=LONGEST_SAVE
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="manifest")
        self._old_handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._set_handlers()
        return self

    def _write_config(self) -> None:
        """Write config.json and the tokenizer, unless the run has done more than it is to do."""
        path = self.run / "config.json"
        done = max(finished_steps(self.folder), default=None)
        if done is not None:
            self.config = with_earlier_forms(load_config(str(self.run)), self.config)
            steps = self.config.get("steps", done)
            if steps < done:
                note = f"has done {done:,} steps, and --steps={steps} asks for no more"
                print(f"note: {self.run}: {note}: nothing to train", file=sys.stderr)
                return
        atomic_bytes(path, json.dumps(self.config, indent=1).encode())
        if self.tokenizer is not None:
            atomic_bytes(self.run / "tokenizer.model", self.tokenizer)

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
        if isinstance(fault, KeyboardInterrupt):
            # The second Ctrl-C, or one where no step was due.
            raise KeyboardInterrupt(self._told_saved()) from None
        if fault is None:
            self._end_as_stopped()

    def _end_as_stopped(self) -> None:
        """Raise as a program ends that a signal stopped, if one has stopped the run."""
        number = self._signal
        if number == signal.SIGINT:
            raise KeyboardInterrupt(self._told_stopped())
        if self.stopping and self._step < self._last:
            if jax.process_index() == 0:
                print(self._told_stopped(), file=sys.stderr)
            # Of several processes all stop, whichever of them got the signal.
            raise SystemExit(128 + (number or signal.SIGTERM))

    def _told_stopped(self) -> str:
        if not self._last:
            return self._told_saved()
        if self._step >= self._last:
            return f"{self.run}: finished, all {self._last:,} steps are saved"
        return (
            f"{self.run}: stopped at step {self._step:,} of {self._last:,}; "
            "the same command goes on"
        )

    def _told_saved(self) -> str:
        if not self._saved:
            return f"{self.run}: stopped, no step is saved; the same command begins anew"
        return f"{self.run}: stopped, saved is step {self._saved:,}; the same command goes on"

    def _set_handlers(self) -> None:
        """Make signals ask for a last save; those that are ignored, as under nohup, stay so."""
        if jax.process_count() == 1:
            signals = dict.fromkeys(STOP_SIGNALS, self._on_signal)
        else:
            # Several processes must agree on the step: JAX's preemption service, which takes
            # SIGTERM, does that (see `due`).
            signals = {signal.SIGHUP: _terminate}
        for number, handler in signals.items():
            if signal.getsignal(number) != signal.SIG_IGN:
                self._old_handlers[number] = signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number
        self._restore_handlers()
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            _leave_terminal()
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
        self._step = step
        self._last = last
        self.stopping = self._signal is not None
        if jax.process_count() > 1:
            self.stopping = multihost_utils.reached_preemption_sync_point(step)
        return self.stopping or step == last or (every > 0 and step % every == 0)

    def save(self, step: int, state: dict[str, Any], extra: Any = None) -> None:
        """Start saving `state` and `extra` as `step`; return once arrays are copied to the host.

        All processes must call it; `state` may then be donated. `state`: a dict of trees of arrays
        and typed keys, its parameters under "params". `extra`: small and JSON, each process's own,
        such as its position in the data. Raises UserError where parameters are not finite, where
        the previous save failed, and where the run's folder was removed.
        """
        # One save at a time: the one before must be on the disk.
        self.wait()
        self._refuse_other_place(step)
        _refuse_non_finite(state["params"], self.folder, step)
        ocp = _orbax()
        items = _items(state)
        body = {
            "step": step,
            "config": identity_hash(self.config),
            "arrays": {name: array_type(leaf) for name, leaf in _named(items).items()},
            "extra": all_gather_json(extra),
            "spikes": spike_count(str(self.run)),
        }
        path = self.folder / str(step)
        # Orbax copies the arrays to the host before it returns: they may then be donated.
        with disk_faults(path):
            # What an earlier save of this step, which failed, has left.
            if jax.process_count() == 1:
                shutil.rmtree(unfinished(path), ignore_errors=True)
            saves = {item: ocp.args.PyTreeSave(tree) for item, tree in items.items() if tree}
            self._orbax.save(unfinished(path), args=ocp.args.Composite(**saves))
        self._pending = self._thread.submit(self._finish, path, body)

    def _refuse_other_place(self, step: int) -> None:
        """Raise UserError where the run's folder was removed, or replaced, since it was opened."""
        try:
            is_same = os.path.samestat(os.stat(self.folder), self._place)
        except OSError:
            is_same = False
        if not is_same:
            raise UserError(
                f"{self.run}: removed or replaced while it was trained, so step {step} is not "
                "saved; put the folder back, then the same command resumes, or name another --run"
            )

    def _finish(self, path: pathlib.Path, body: dict[str, Any]) -> None:
        """Wait for Orbax in the background, write the manifest, and only then remove old steps."""
        with disk_faults(path):
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                new = unfinished(path)
                write_manifest(new, body)
                # Under its own name it is a finished step.
                new.rename(path)
                sync_folder(self.folder)
                # The new step counts among those kept.
                for step in finished_steps(self.folder)[self.keep :]:
                    remove_step(self.folder / str(step))
            else:
                # The others wait with process 0: whoever ends early is taken for lost.
                _wait_for(path)

    def wait(self) -> None:
        """Wait until the last save is on disk; raise what went wrong with it, mostly UserError."""
        pending = self._pending
        self._pending = None
        if pending is None:
            return
        # It may take longer than steps do, and has a limit of its own.
        while concurrent.futures.wait([pending], timeout=1).not_done:
            progressed()
        pending.result()
        self._saved = max(finished_steps(self.folder), default=self._saved)

    # --- restoring

    def restore(self, abstract_state: dict[str, Any]) -> tuple[int, dict[str, Any], Any] | None:
        """Load the newest good step as (step, state, extra of this process); None for a new run.

        `abstract_state`: the state's tree of ShapeDtypeStructs, whose shardings the result gets.
        All processes must call it. Damaged steps are passed over with a warning, and removed once
        an older good one is loaded. Raises UserError where all are damaged, where left_out.json
        has lost spikes, or where names, shapes or dtypes differ.
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
        self._refuse_lost_spikes(step, manifest.get("spikes", 0))
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

    def _refuse_lost_spikes(self, step: int, known: int) -> None:
        """Raise UserError if left_out.json has fewer spikes than step `step` was trained with."""
        listed = spike_count(str(self.run))
        if listed < known:
            raise UserError(
                f"{self.run}/left_out.json: lists {listed} loss spikes, but step {step} was "
                f"trained without the batches of {known}; restore the file, or name another --run"
            )

    def _newest_good(self, steps: list[int]) -> int | None:
        """Return the first of `steps` without damage; process 0 looks, and tells the others."""
        hashes = accepted_hashes(self.config)
        # -1 for none, as a number that can be broadcast.
        found = -1
        if jax.process_index() == 0:
            for step in steps:
                if is_good(self.folder / str(step), hashes):
                    found = step
                    break
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        return None if found < 0 else found


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _terminate(number: int, frame: Any) -> None:
    """Take SIGHUP for a SIGTERM."""
    _leave_terminal()
    os.kill(os.getpid(), signal.SIGTERM)


def _leave_terminal() -> None:
    """Say nothing more to a terminal, which is gone: the save must not end at a line of text."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    # Of several processes Python's stderr is another one (runtime/hosts.py).
    for output in (1, 2, sys.stderr.fileno()):
        # A terminal is a character device, also one that has hung up; a file or a pipe stays.
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(nowhere, output)
    os.close(nowhere)


def _wait_for(path: pathlib.Path) -> None:
    """Wait until process 0 has finished the step `path`; give up after LONGEST_SAVE seconds."""
    for _ in range(LONGEST_SAVE):
        if (path / "manifest.json").exists():
            return
        time.sleep(1)
    raise TimeoutError(f"process 0 timed out after {LONGEST_SAVE} s")


# --- the parameters of a run, for other scripts


def load_step_params(run: str, step: int | None, shapes: Any) -> dict[str, Any]:
    """Load the parameters of `run` as they were saved, at `step`; None: at the newest.

    Where `run` is a RunAtStep, None means its step. `shapes`: tree of ShapeDtypeStructs with
    shardings, which the arrays get; None: NumPy arrays. Raises UserError for a missing run or
    step, a damaged file, another shape or dtype.
    """
    hashes = stored_hashes(run)

    def load(path: pathlib.Path, earlier: list[int]) -> dict[str, Any]:
        try:
            manifest = check_step(path, hashes, item="params/")
        except Damaged as fault:
            # What to name instead.
            good = [
                number
                for number in earlier
                if is_good(path.with_name(str(number)), hashes, quiet=True)
            ]
            raise UserError(
                f"{fault}; last good step before it: {good[0] if good else 'none'}"
            ) from None
        # As they were saved: shapes without shardings give NumPy arrays.
        as_saved = abstract_tree(manifest["arrays"])["params"]
        return _load(path, manifest, "params", as_saved if shapes is None else shapes)

    return _read_step(run, step, load)


def stored_params(run: str) -> dict[str, Any]:
    """Return the parameters of the newest step of `run` as nested ShapeDtypeStructs, reading none.

    Where `run` is a RunAtStep, it is its step. Raises UserError for a run without a finished step,
    or with a damaged manifest.
    """

    def read(path: pathlib.Path, earlier: list[int]) -> dict[str, Any]:
        try:
            manifest = read_manifest(path)
        except Damaged as fault:
            raise UserError(f"{fault}; restore it, or name another run") from None
        return abstract_tree(manifest["arrays"])["params"]

    return _read_step(run, None, read)


def _read_step(
    run: str, step: int | None, read: Callable[[pathlib.Path, list[int]], ReadT]
) -> ReadT:
    """Return read(folder of the step, earlier steps), again where a trainer has removed it."""
    while True:
        path, earlier = _find_step(run, step)
        try:
            return read(path, earlier)
        except Exception:
            # Still there: then that was no removal, and the fault is its own.
            if path.exists():
                raise


def _find_step(run: str, step: int | None) -> tuple[pathlib.Path, list[int]]:
    """Return the folder of `step` (None: the newest) of `run`, and earlier steps, newest first."""
    if step is None and isinstance(run, RunAtStep):
        step = run.step
    # Steps without a manifest were never finished.
    folder = (pathlib.Path(run) / "checkpoints").absolute()
    steps = finished_steps(folder)
    if not steps or step not in (None, *steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        finished = ", ".join(map(str, steps)) or "none"
        remedy = "; restore it, or name another --run" if isinstance(run, RunAtStep) else ""
        raise UserError(f"{run}: {wanted} (finished steps: {finished}){remedy}")
    if step is None:
        step = steps[0]
        note_lost_manifest(folder, step)
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
