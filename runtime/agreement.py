"""Several processes of one run must be of one command, data, code and libraries: or all end.

Compared before the first step, by a small hash of each field, so that the line can name it.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import sys
from typing import Any

import jax

from runtime.errors import UserError
from runtime.hosts import all_gather_json, processes_named
from runtime.inputs import contents_of
from runtime.run_folder import LIBRARIES, ROOT

OWN = {"index", "bind", "coordinator", "count"}
"""Fields of `hosts` that a process may have of its own; the count is compared as it is named."""
JAX_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
)
"""Settings of JAX that the environment may give and that decide results."""


def refuse_different_commands(config: Any) -> None:
    """Raise UserError on every process unless all were started alike.

    `config`: a script's dataclass, with `hosts`. Compared are its fields, the content of the files
    and runs that it names, the code that is imported, and libraries. All processes must call it;
    one alone passes.
    """
    if jax.process_count() == 1:
        return
    fields = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    # The count is the one that was named, by a flag or the environment: JAX may know another.
    alike = {
        **fields,
        "hosts": {**fields["hosts"], "count": processes_named(config.hosts)},
        "inputs": contents_of(config),
        "code": code_sums(),
        "versions": versions(),
        "settings": {name: str(getattr(jax.config, name, None)) for name in JAX_SETTINGS},
    }
    refuse_different_processes(alike, {"index", "bind", "coordinator"})


def refuse_different_processes(fields: dict[str, Any], own: set[str] = OWN) -> None:
    """Raise UserError on every process if `fields` differ between them; it names the first.

    `fields`: as JSON has them, nested by name. `own`: names within its `hosts` that are not
    compared. All processes must call it; one alone passes.
    """
    if jax.process_count() == 1:
        return
    # Each process has a place of its own.
    hosts = {name: value for name, value in fields.get("hosts", {}).items() if name not in own}
    # Small hashes travel, not values: one field a line of the comparison.
    sums = {}
    for name, value in flat({**fields, "hosts": hosts}).items():
        text = json.dumps(value, sort_keys=True)
        sums[name] = hashlib.sha256(text.encode()).hexdigest()[:12]
    fault = first_difference(all_gather_json(sums))
    if fault is not None:
        raise UserError(f"{fault}; start all processes alike")


def first_difference(sums: list[dict[str, str]]) -> str | None:
    """Say in which field a process first differs from process 0; None where all are equal.

    `sums`: {dotted field: hash} of each process. Modules (`code.NAME`) are compared where both
    have imported them.
    """
    first = sums[0]
    # Flags come first in the order of the fields, so that they are named before what follows.
    for process, theirs in enumerate(sums[1:], 1):
        for name in [*first, *theirs]:
            is_lacking = name not in first or name not in theirs
            if is_lacking and name.startswith("code."):
                continue
            if first.get(name) != theirs.get(name):
                return f"process {process}: {_words(name)} differs from process 0's"
    return None


def _words(name: str) -> str:
    """Return how a user calls a field: a flag, a module, a library, the content of an input."""
    # What is no flag has a kind in front.
    kind, _, rest = name.partition(".")
    if kind == "code":
        return f"the code of {rest}"
    if kind == "versions":
        return f"the version of {rest}"
    if kind == "settings":
        return f"JAX's {rest}"
    if kind == "inputs":
        return f"the content of --{rest.partition('.')[0]}"
    return f"--{name}"


def flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested `fields` as {dotted name: value}; lists and what lies in them are kept whole.

    `prefix`: put before each name. An empty dict has no entry.
    """
    leaves: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def versions() -> dict[str, str]:
    """Return {name: version} of Python and of the libraries that compute.

    A library's has two, as installed and as imported, "None" where it is not imported.
    """
    # Python itself, then what is installed.
    found = {"python": platform.python_version()}
    for name in (*LIBRARIES, "jaxlib", "numpy"):
        # As imported, too: a path may lead to another than the one that is installed.
        imported = getattr(sys.modules.get(name), "__version__", None)
        found[name] = f"{importlib.metadata.version(name)} {imported}"
    return found


@functools.cache
def code_sums() -> dict[str, str]:
    """Return {module: SHA-256} of each imported module of ours, and of those beside the script.

    The script itself is called `script`. Files are read once a process.
    """
    # A fork may lie anywhere.
    folders = [ROOT]
    main = getattr(sys.modules["__main__"], "__file__", None)
    if main is not None:
        folders.append(pathlib.Path(main).resolve().parent)
    # What is imported computes, wherever it was found.
    sums = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or not file.endswith(".py") or "site-packages" in file:
            continue
        path = pathlib.Path(file).resolve()
        if any(path.is_relative_to(folder) for folder in folders) and path.exists():
            known_as = "script" if name == "__main__" else name
            sums[known_as] = hashlib.sha256(path.read_bytes()).hexdigest()
    return sums
