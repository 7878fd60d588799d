"""Checkpoints of a run: saved by Orbax in the background, sealed by SHA-256 sums, restored onto any mesh.

`<run>/checkpoints/<step>/` holds two Orbax items, `params` and `rest`, and `manifest.json`, which is written
last: a step without it was never finished and is removed; a step that disagrees with it is never loaded.
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
    atomic_bytes,
    check_step,
    describe_run,
    disk_faults,
    finished_steps,
    identity_hash,
    is_good,
    kind_of,
    lock_run,
    nested,
    read_manifest,
    refuse_other_run,
    remove_step,
    remove_unfinished,
    stored_identity,
    write_manifest,
)


class Checkpoints:
    """The run folder `run` while a script trains in it.

    On entry the folder is created, or found to hold a run of the same config, script and tokenizer: else
    UserError, and nothing is touched. SIGTERM and Ctrl-C ask `due` for a last save, a second one ends at once.
    After Ctrl-C the exit raises KeyboardInterrupt, so that nothing follows in a shell.
    """

    def __init__(
        self, run: str, config: Any, *, script: str, tokenizer: bytes | None = None, keep: int = 2
    ):
        """`config`: the script's dataclass; `tokenizer`: the bytes of its model file; `keep`: steps kept."""
        if keep < 1:
            raise UserError(f"--keep_checkpoints={keep}: at least one checkpoint must be kept")
        self.run, self.keep = pathlib.Path(run), keep
        self.folder = (self.run / "checkpoints").absolute()
        self.tokenizer = tokenizer
        self.config = describe_run(config, script, self.tokenizer)
        self.stopping, self._signal = False, None
        self._pending: concurrent.futures.Future | None = None

    def __enter__(self) -> "Checkpoints":
        refuse_other_run(self.run, self.config)
        multihost_utils.sync_global_devices("run folder checked")
        if jax.process_index() == 0:
            self._lock = lock_run(self.run, self.folder)
            atomic_bytes(self.run / "config.json", json.dumps(self.config, indent=1).encode())
            if self.tokenizer is not None:
                atomic_bytes(self.run / "tokenizer.model", self.tokenizer)
            remove_unfinished(self.folder)
        multihost_utils.sync_global_devices("run folder written")
        ocp = _orbax()
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), timeout_secs=3600)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="manifest")
        # Several processes must agree on the step: JAX's preemption service, which takes SIGTERM, does (see `due`).
        self._old_handlers = {}
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._old_handlers = {
                n: signal.signal(n, self._on_signal) for n in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, kind: Any, fault: Any, trace: Any) -> None:
        if isinstance(fault, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            return  # another process is gone: its part of a save would be waited for in vain
        try:
            self.wait()
        except Exception as unsaved:
            if fault is None:
                raise
            print(f"warning: {unsaved}", file=sys.stderr)  # the body's own fault goes on
        finally:
            self._thread.shutdown()
            with contextlib.suppress(Exception):  # what it could tell, `wait` has told
                self._orbax.close()
            self._restore_handlers()
            if jax.process_index() == 0:
                os.close(self._lock)
        if self._signal == signal.SIGINT and fault is None:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number
        self._restore_handlers()
        os.write(
            2,
            f"\n{signal.Signals(number).name}: saving after this step (again: stop at once)\n".encode(),
        )

    def _restore_handlers(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def due(self, step: int, every: int, last: int) -> bool:
        """Whether to save now: every `every` steps, at step `last`, after a signal (then `stopping` is set).

        With several processes, all must call it at every step.
        """
        self.stopping = self._signal is not None
        if jax.process_count() > 1:
            self.stopping = multihost_utils.reached_preemption_sync_point(step)
        return self.stopping or step == last or (every > 0 and step % every == 0)

    def save(self, step: int, state: dict[str, Any], extra: Any = None) -> None:
        """Starts saving `state` (arrays, typed keys; its "params" apart) and `extra` (small, JSON) as `step`.

        `extra` is each process's own, such as its position in the data.

        Returns once the arrays are copied to the host. Raises UserError where parameters are not finite, or
        where the previous save failed.
        """
        self.wait()
        _refuse_non_finite(state["params"], self.folder, step)
        ocp, items = _orbax(), _items(state)
        body = {
            "step": step,
            "config": identity_hash(self.config),
            "arrays": {name: kind_of(leaf) for name, leaf in _named(items).items()},
            "extra": all_gather_json(extra),
        }
        path = self.folder / str(step)
        with disk_faults(path):
            saves = {item: ocp.args.PyTreeSave(tree) for item, tree in items.items() if tree}
            self._orbax.save(path, args=ocp.args.Composite(**saves))
        self._pending = self._thread.submit(self._finish, path, body)

    def _finish(self, path: pathlib.Path, body: dict[str, Any]) -> None:
        """In the background: wait for Orbax, write the manifest, and only then remove old steps."""
        with disk_faults(path):
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(path, body)
                for step in finished_steps(self.folder)[self.keep :]:
                    remove_step(self.folder / str(step))

    def wait(self) -> None:
        """Waits until the last save is on disk; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, abstract_state: dict[str, Any]) -> tuple[int, dict[str, Any], Any] | None:
        """The newest good step as (step, state, extra), or None for a new run.

        `abstract_state`: the state's tree of ShapeDtypeStructs, whose shardings the result gets. Damaged
        steps are passed over with a warning, and removed once an older good one is loaded.
        """
        self.wait()
        steps = finished_steps(self.folder)
        config_hash = identity_hash(self.config)
        candidates = steps if jax.process_index() == 0 else []
        good = next(
            (step for step in candidates if is_good(self.folder / str(step), config_hash)), -1
        )
        good = int(multihost_utils.broadcast_one_to_all(np.int32(good)))
        if good < 0:
            if steps:
                raise UserError(
                    f"{self.folder}: no step is undamaged; remove the folder to start anew"
                )
            return None
        path = self.folder / str(good)
        manifest = read_manifest(path)
        items = {
            item: _load(path, manifest, item, tree)
            for item, tree in _items(abstract_state).items()
        }
        rest = _without_params(abstract_state)
        leaves = [_typed(items["rest"][name], like) for name, like in _named(rest).items()]
        rest = jax.tree.unflatten(jax.tree.structure(rest), leaves)
        multihost_utils.sync_global_devices("restored")
        if jax.process_index() == 0:
            for step in steps[: steps.index(good)]:
                remove_step(self.folder / str(step))
        extras = manifest[
            "extra"
        ]  # a process too many gets another's, which the data then refuses
        return good, {"params": items["params"], **rest}, extras[jax.process_index() % len(extras)]


def load_step_params(run: str, step: int | None, shapes: Any) -> dict[str, Any]:
    config_hash = stored_identity(run)
    folder = (pathlib.Path(run) / "checkpoints").absolute()
    steps = finished_steps(folder)
    if not steps or step not in (None, *steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(
            f"{run}: {wanted} (finished steps: {', '.join(map(str, steps)) or 'none'})"
        )
    step = steps[0] if step is None else step
    path = folder / str(step)
    try:
        manifest = check_step(path, config_hash, item="params/")
    except Damaged as fault:
        good = [s for s in steps if s < step and is_good(folder / str(s), config_hash, quiet=True)]
        raise UserError(
            f"{fault}; last good step before it: {good[0] if good else 'none'}"
        ) from None
    if shapes is None:
        shapes = nested(manifest["arrays"])["params"]
    return _load(path, manifest, "params", shapes)


# --- the two items


def _without_params(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "params"}


def _items(state: dict[str, Any]) -> dict[str, Any]:
    """What Orbax stores: `params` as it is; the rest by name, whatever optax's and Flax's types."""
    rest = {name: _raw(leaf) for name, leaf in _named(_without_params(state)).items()}
    return {"params": state["params"], "rest": rest}


def _named(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _raw(leaf: Any) -> Any:
    """A typed random key as its bits (an abstract key as the abstract bits); anything else unchanged."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.random.key_data(leaf)
    bits = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=leaf.sharding)


def _typed(bits: Any, like: Any) -> Any:
    """The inverse of `_raw`, for the abstract leaf `like`."""
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return bits
    found = []  # the kind of an abstract key can only be asked while tracing
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(bits, impl=found[0])


def _load(path: pathlib.Path, manifest: dict[str, Any], item: str, tree: Any) -> Any:
    """One item of the step at `path`, as the abstract `tree` says, after comparing every dtype and shape."""
    if not (leaves := _named(tree)):
        return tree
    stored = {
        name: kind for name, kind in manifest["arrays"].items() if name.startswith(f"{item}/")
    }
    wanted = {f"{item}/{name}": kind_of(leaf) for name, leaf in leaves.items()}
    for name in [*wanted, *stored]:
        there, here = stored.get(name, "absent"), wanted.get(name, "absent")
        if there != here:
            name = name.removeprefix("rest/")
            raise UserError(
                f"{path}: {name} is {there} stored and {here} here; use that run's config"
            )
    ocp = _orbax()
    numpy, placed = partial(ocp.RestoreArgs, restore_type=np.ndarray), ocp.ArrayRestoreArgs
    places = jax.tree.map(
        lambda leaf: placed(sharding=leaf.sharding) if leaf.sharding else numpy(), tree
    )
    with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as reader:
        return reader.restore(path / item, args=ocp.args.PyTreeRestore(tree, restore_args=places))


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return (
        jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()
        if floats
        else jnp.bool_(True)
    )


def _refuse_non_finite(params: Any, folder: pathlib.Path, step: int) -> None:
    """Waits for the parameters, as Orbax's copy to the host would next."""
    if not bool(_all_finite(params)):
        name = next(name for name, leaf in _named(params).items() if not bool(_all_finite(leaf)))
        newest = next(iter(finished_steps(folder)), "none")
        fault = f"params/{name} is not finite (last saved step: {newest})"
        raise UserError(f"{folder}: step {step} not saved: {fault}; lower the learning rate")


# --- Orbax and other processes


def _orbax() -> Any:
    """Orbax, imported at its first use (0.4 s), its log kept off the terminal: what fails is raised too."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    import orbax.checkpoint as ocp

    return ocp
