"""Tests run on the CPU, on eight simulated devices; they skip real data that is not there."""

import os
import pathlib
import shutil

# Before JAX is imported, and inherited by processes that tests start. Without a mesh everything
# stays on the first of the eight devices. Models here are tiny, so that compiling is nearly all
# of the time: unoptimised, it halves.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
# Tests compile the same tiny programs again and again, in this run and the next: each is stored.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache/compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax
import numpy as np
import pytest

NO_MESH = jax.sharding.get_mesh()
# The store is emptied above this size, some ten runs over changing code.
COMPILED = pathlib.Path(__file__).parents[1] / ".pytest_cache/compiled"
COMPILED_BYTES = 2 * 10**9


def pytest_configure(config: pytest.Config) -> None:
    """Empty the store of compiled programs once it is full, before any test or worker starts."""
    is_worker = hasattr(config, "workerinput")
    if is_worker or not COMPILED.is_dir():
        return
    stored = sum(path.stat().st_size for path in COMPILED.iterdir())
    if stored > COMPILED_BYTES:
        shutil.rmtree(COMPILED)


@pytest.fixture(autouse=True)
def no_mesh_is_left():
    """Start every test without a mesh: scripts set theirs for the whole process."""
    jax.set_mesh(NO_MESH)
    yield
    jax.set_mesh(NO_MESH)


@pytest.fixture
def rng() -> np.random.Generator:
    """Return random numbers that no run has seen before.

    A failing test prints SEED=<n>, which repeats it as an environment variable.
    """
    seed = int(os.environ.get("SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def shared_data() -> pathlib.Path:
    """Return the folder of real data beside the repository."""
    path = pathlib.Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"{path}: not here; this test needs real data")
    return path
