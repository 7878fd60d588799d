"""Several processes as one run: how they join, and how all of them end when one is lost or stuck.

A run that cannot go on here and now ends with exit code 75 (sysexits.h: try again) and one line on
stderr; the same command then resumes it from its last checkpoint.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from runtime.errors import TryAgain, UserError
from runtime.ranges import AT_LEAST_1, check_ranges
from runtime.terminal import Stream
from runtime.writes import is_full_disk

LOST = TryAgain.code
"""Exit code of a run that lost a process or stopped making progress."""

NAMED_WAIT = 6
"""Seconds to wait for the others where --hosts.coordinator names the place: all start at once."""
FOUND_WAIT = 300
"""Seconds to wait where a launcher names it: its machines may come minutes apart."""

# What JAX says where another process is lost.
LOSS_WORDS = "Gloo|NCCL|[Cc]oordination|Barrier|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED"


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """The processes of a run, and how long they wait for one another."""

    coordinator: str | None = None
    """host:port of process 0; None: JAX_COORDINATOR_ADDRESS, or what SLURM or the TPU pod says."""
    count: int | None = None
    """Processes; None: JAX_NUM_PROCESSES, or SLURM's or the pod's."""
    index: int | None = None
    """This process, from 0; None: JAX_PROCESS_ID, or SLURM's or the pod's."""
    bind: str | None = None
    """host:port that process 0 listens on; None: JAX_COORDINATOR_BIND_ADDRESS, or coordinator."""
    wait: int | None = None
    """Seconds to wait for the others to come; None: 6 with --hosts.coordinator, else 300."""
    stall: int = 1800
    """Seconds without progress that end the run, ten times up to the first step; 0: never."""

    def __post_init__(self):
        check_ranges(self, {"count": AT_LEAST_1, "wait": AT_LEAST_1}, "hosts.")


# --- joining


def settings(config: HostsConfig) -> dict[str, Any] | None:
    """Return the arguments of jax.distributed.initialize by name; None for a run of one process.

    Other processes are named by flags, by the environment, by SLURM or by a TPU pod. Raises
    UserError for settings that are incomplete or cannot be.
    """
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = processes_named(config)
    index = _number(config.index, "JAX_PROCESS_ID")
    if not _on_slurm() and not _on_tpu():
        explicit = {"coordinator": coordinator, "count": count, "index": index}
        if all(value is None for value in explicit.values()):
            return None
        for flag, value in explicit.items():
            if value is None:
                raise UserError(
                    f"--hosts.{flag} is missing: give coordinator, count and index, "
                    "or none of them"
                )
    _refuse_no_index(index, count)
    bind = config.bind or os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or coordinator
    for flag, address in {"coordinator": coordinator, "bind": bind}.items():
        if address is not None:
            _refuse_no_address(flag, address)
    if index == 0 and bind is not None:
        _refuse_taken(bind)
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": index,
        "coordinator_bind_address": bind,
        "initialization_timeout": _seconds_to_wait(config),
        "heartbeat_timeout_seconds": min(100, config.stall or 100),
    }


def _seconds_to_wait(config: HostsConfig) -> int:
    """Return for how long the processes wait for one another to come."""
    if config.wait is not None:
        return config.wait
    return FOUND_WAIT if config.coordinator is None else NAMED_WAIT


def processes_named(config: HostsConfig) -> int | None:
    """Return how many processes the flags or the environment name; None: neither does."""
    return _number(config.count, "JAX_NUM_PROCESSES")


def _number(given: int | None, variable: str) -> int | None:
    """Return the flag's number, else the environment's; None without either."""
    try:
        return given if given is not None else int(os.environ[variable])
    except KeyError:
        return None
    except ValueError:
        raise UserError(f"{variable}={os.environ[variable]}: must be a number") from None


def _refuse_no_index(index: int | None, count: int | None) -> None:
    """Raise UserError for a process that cannot be among `count`."""
    if count is not None and count < 1:
        raise UserError(f"--hosts.count={count}: must be at least 1")
    if count is not None and index is not None and not 0 <= index < count:
        raise UserError(
            f"--hosts.index={index}: must be at least 0 and below --hosts.count={count}"
        )


def _refuse_no_address(flag: str, address: str) -> None:
    """Raise UserError for what no process can be reached at; JAX would wait for it."""
    _, _, port = address.rpartition(":")
    if not re.fullmatch(r".+:[0-9]+", address):
        raise UserError(f"--hosts.{flag}={address}: must be host:port")
    if len(port) > 5 or not 1 <= int(port) <= 65535:
        raise UserError(f"--hosts.{flag}={address}: the port must be in 1..65535")


def _on_slurm() -> bool:
    tasks = _number(None, "SLURM_STEP_NUM_TASKS")
    return tasks is not None and tasks > 1


def _on_tpu() -> bool:
    # JAX sets the first variable at its import where it finds no chip.
    if "TPU_SKIP_MDS_QUERY" in os.environ or importlib.util.find_spec("libtpu") is None:
        return False
    return "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu")


def _refuse_taken(bind: str) -> None:
    """Raise UserError where process 0 cannot listen; JAX would crash."""
    host, port = bind.rsplit(":", 1)
    try:
        socket.create_server((host.strip("[]"), int(port))).close()
    except (OSError, OverflowError) as fault:
        raise UserError(
            f"--hosts.bind={bind}: cannot listen there ({fault}); name another address"
        ) from None


def join(named: dict[str, Any], code: int) -> None:
    """Join the other processes; where they do not come, end this one with the exit code `code`.

    `named`: from `settings`. Then stdout of every process but process 0 leads nowhere.
    """
    global _name, _ends_unjoined
    _reach_first(named, code)

    # JAX ends this process by SIGABRT where the others do not come.
    _ends_unjoined = _not_all_came(named), code
    try:
        jax.distributed.initialize(**named)
    except ValueError as fault:
        # A TPU machine that belongs to no pod.
        if "should be defined" not in str(fault):
            raise
    except RuntimeError as fault:
        die(f"cannot join the others ({str(fault).splitlines()[0]})", code)
    _ends_unjoined = None
    if not jax.distributed.is_initialized():
        return

    _name = f"process {jax.process_index()}"
    if jax.process_index() > 0:
        # Process 0 alone speaks.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _reach_first(named: dict[str, Any], code: int) -> None:
    """Wait until process 0 listens where it is said to; end this process where nobody does.

    JAX would not tell an address at which nobody listens from a process that is missing.
    """
    address = named["coordinator_address"]
    if address is None or not named["process_id"]:
        return
    host, port = address.rsplit(":", 1)
    wait = named["initialization_timeout"]
    give_up = time.monotonic() + wait
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=wait).close()
            return
        except OSError as fault:
            if time.monotonic() > give_up:
                reason = f"cannot reach process 0 at {address} in {wait} s"
                remedy = "check --hosts.coordinator, or raise --hosts.wait"
                die(f"{reason} ({fault.strerror or fault}); {remedy}", code)
        time.sleep(0.2)


def _not_all_came(named: dict[str, Any]) -> str:
    """Say which processes did not come, as far as this one can know."""
    address = named["coordinator_bind_address"] or "the coordinator"
    count = named["num_processes"]
    if count == 2 and named["process_id"] == 0:
        absent = "process 1 did not come"
    else:
        absent = f"not all of {count or 'the'} processes came"
    wait = named["initialization_timeout"]
    return (
        f"{absent} to {address} in {wait} s; give all the same --hosts.coordinator and "
        "--hosts.count, or raise --hosts.wait"
    )


@contextlib.contextmanager
def joined(config: HostsConfig, has_begun: bool = False) -> Iterator[None]:
    """Join the other processes for a script's main; within it any fault of one ends all.

    A context manager. A watchdog ends the run after `config.stall` seconds without progress. Where
    the others do not come, a new run ends with code 2, as after any mistake. A run that
    `has_begun` has met them before: it ends with code 75, so that a loop which restarts it goes on
    until they are back. Raises UserError for settings that are incomplete or cannot be.
    """
    named = settings(config)
    done = threading.Event()
    sentinel = _post_sentinel(config.stall, named["process_id"]) if named else None
    if config.stall:
        jax.monitoring.register_event_duration_secs_listener(progressed)
        threading.Thread(target=_watch, args=(config.stall, sentinel, done), daemon=True).start()
    if named:
        join(named, LOST if has_begun else UserError.code)
    several = jax.distributed.is_initialized()
    try:
        yield
        if several:
            # Waits for the others, while the watchdog still looks.
            jax.distributed.shutdown()
    except (UserError, KeyboardInterrupt):
        # Told by flags.run.
        raise
    except SystemExit:
        # All have saved and stopped; they end together, as after the last step.
        if several:
            jax.distributed.shutdown()
        raise
    except Exception as fault:
        # A full disk is told by flags.run.
        if not several or is_full_disk(fault):
            raise
        _end_all(fault)
    finally:
        done.set()
        if sentinel is not None:
            assert sentinel.stdin is not None
            sentinel.stdin.close()


def _end_all(fault: Exception) -> NoReturn:
    """End this process of several after `fault`, at once, so that the others end too."""
    reason = _loss_in(fault)
    if reason:
        die_lost(f"another process was lost ({reason})")
    traceback.print_exc()
    exit_now(1)


def _loss_in(fault: BaseException | None) -> str | None:
    """Return what a fault, or one that it came from, says of a lost process.

    None where it is a bug or a lack of memory.
    """
    while fault is not None:
        text = str(fault)
        if isinstance(fault, jax.errors.JaxRuntimeError) and re.search(LOSS_WORDS, text):
            return text.splitlines()[0][:200]
        fault = fault.__cause__ or fault.__context__
    return None


def all_gather_json(value: Any) -> list[Any]:
    """Return the processes' values in a list, in their order, each as JSON gives it back.

    `value`: what JSON can hold, this process's own. All processes must call it.
    """
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(text.size))))
    # Padded to a multiple of 256, for few shapes.
    width = longest // 256 * 256 + 256
    padded = np.pad(text, (0, width - text.size), constant_values=ord(" "))
    rows = multihost_utils.process_allgather(padded).reshape(jax.process_count(), -1)
    return [json.loads(row.tobytes()) for row in rows]


# --- ending


def exit_now(code: int) -> NoReturn:
    """End this process with exit code `code`.

    One of several ends at once, without cleaning up, since an orderly end would wait for the
    others; a process alone raises SystemExit.
    """
    if not jax.distributed.is_initialized():
        raise SystemExit(code)
    sys.stdout.flush()
    if jax.process_index() == 0:
        # The others end with it; let them first tell what they know.
        time.sleep(1)
    os._exit(code)


_ending = threading.Lock()
# JAX must not be asked for this process's number by a thread that ends it: it might wait for the
# others.
_name = "this process"
# While the others are waited for: what to say if they do not come, and the exit code.
_ends_unjoined: tuple[str, int] | None = None


def die_lost(reason: str) -> NoReturn:
    """End this process at once, from any thread, with code 75 and a line on stderr.

    `reason`: what the line says of the fault; it adds that the same command resumes.
    """
    die(f"{reason}; the same command resumes from the last checkpoint", LOST)


def die(reason: str, code: int) -> NoReturn:
    """End this process at once, from any thread, with `code` and the line `reason` on stderr."""
    if not _ending.acquire(blocking=False):
        # Another thread is ending it.
        time.sleep(60)
    told = f"error: {_name}: {reason}\n"
    # Nobody may read it.
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), told.encode())
    os._exit(code)


# --- the watchdog

_steps = 0
_progress = 0


def finished_step() -> None:
    """Tell the watchdog that the device has finished a step."""
    global _steps
    _steps += 1
    progressed()


def progressed(*unused: Any, **named: Any) -> None:
    """Tell the watchdog of anything done that is no step: it begins to count anew.

    Called for each batch of an evaluation, part of the data prepared, second of a save. Arguments
    are not read: JAX's events call it with some, and a compilation is progress too.
    """
    global _progress
    _progress += 1


def _watch(stall: int, sentinel: subprocess.Popen | None, done: threading.Event) -> None:
    """End this process after `stall` seconds without progress, unless `done`.

    Counts its own seconds, not the clock's, so that a run suspended and resumed has lost none.
    """
    seen = 0
    idle = 0
    while not done.wait(1):
        if sentinel is not None:
            # It may be stopped, or gone.
            with contextlib.suppress(OSError, ValueError):
                os.write(sentinel.stdin.fileno(), b".")
        idle = 0 if _progress != seen else idle + 1
        seen = _progress
        if idle >= (stall if _steps else 10 * stall):
            die_lost(
                f"no step finished in {idle} s (--hosts.stall={stall}; ten times as long up to "
                "the first)"
            )


# A process that is stopped, or whose interpreter is, cannot end itself: a second one does it. It
# also passes on what native code writes to stderr, but for the pages that JAX's coordination
# service writes when a process is lost.
_SENTINEL = """
import os, select, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
pid, stall, idle, quiet = int(sys.argv[1]), int(sys.argv[2]), 0, False
native = int(sys.argv[3])
while True:
    ready = select.select([0, native], [], [], 1)[0]
    if native in ready:
        text = os.read(native, 1 << 16)
        quiet = quiet or b"coordination" in text
        if not quiet:
            os.write(2, text)
    if 0 in ready and not os.read(0, 4096):
        break
    idle = 0 if 0 in ready else idle + 1
    if stall and idle > stall:
        os.write(2, b"error: %s: stopped for %d s: killed\\n" % (sys.argv[4].encode(), idle))
        os.kill(pid, signal.SIGKILL)
        break
"""


def _post_sentinel(stall: int, index: int | None) -> subprocess.Popen:
    """Start that second process; this one is to write to its stdin every second."""
    native, written = os.pipe()
    global _name
    _name = socket.gethostname() if index is None else f"process {index}"
    arguments = [str(os.getpid()), str(stall), str(native), _name]
    post = subprocess.Popen(
        [sys.executable, "-IS", "-c", _SENTINEL, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[native],
    )
    assert post.stdin is not None
    os.close(native)

    # Python goes on writing to stderr, native code to the sentinel.
    sys.stderr = Stream(os.fdopen(os.dup(2), "wb"), errors="replace", line_buffering=True)
    os.dup2(written, 2)
    os.close(written)

    # JAX aborts this process when the coordinator is out of reach or a peer lost. Its own hook
    # cannot be in Python.
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
    os.set_blocking(post.stdin.fileno(), False)
    return post


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    if _ends_unjoined is not None:
        die(*_ends_unjoined)
    die_lost("another process was lost, or never came")
