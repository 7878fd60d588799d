"""Compiled programs, kept on the disk from command to command by JAX.

A command that was run before, whatever its run folder and seed, does not compile again. Compiling
is most of a short run's time on two CPU cores.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import warnings

import jax

COMPILED_BYTES = 2 * 10**9
"""Above this size the programs that were stored first go, down to half of it."""


def keep_programs() -> None:
    """Store what this process compiles in $PLUMB_CACHE, and take from there what was before.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    Where the folder cannot be made nothing is kept. A damaged program is compiled again.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_folder() / "compiled" / machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    make_room(folder, COMPILED_BYTES)

    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Not the smallest: to read one takes as long as to compile it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # JAX notices damage by a checksum, and warns each time.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def cache_folder() -> pathlib.Path:
    """Return the folder of what can be made again: $PLUMB_CACHE, or ~/.cache/plumb."""
    return pathlib.Path(os.environ.get("PLUMB_CACHE", "~/.cache/plumb")).expanduser()


def machine() -> str:
    """Name this kind of processor: a program for one may not run on another.

    So a home folder that several machines share has a folder of programs for each kind.
    """
    kind = platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(kind.encode()).hexdigest()[:16]


def make_room(folder: pathlib.Path, most: int) -> None:
    """Remove the oldest files of `folder`, where it has more than `most` bytes, down to half."""
    sizes = {}
    for path in folder.iterdir():
        # Another process may be doing the same.
        with contextlib.suppress(OSError):
            sizes[path] = path.stat().st_mtime, path.stat().st_size

    total = sum(size for _, size in sizes.values())
    if total <= most:
        return
    for path, (_, size) in sorted(sizes.items(), key=lambda item: item[1]):
        if total <= most / 2:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size
