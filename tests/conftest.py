"""Tests run on the CPU, on eight simulated devices; they skip real data that is not there."""

import gc
import importlib.metadata
import os
import pathlib
import shutil

# Before JAX is imported, and inherited by processes that tests start. Without a mesh everything
# stays on the first of the eight devices. Models here are tiny, so that compiling is nearly all
# of the time: unoptimised, it halves.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
# XLA's older emitters compile in half the time. Later versions do not know them, and would end.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
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


# Node ids of what has passed since a run without --rest began, and of what --rest leaves out.
PASSED = pathlib.Path(__file__).parents[1] / ".pytest_cache/passed.txt"
LEFT_OUT = PASSED.with_name("left_out.txt")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --rest: a run that was cut off, or had failures, goes on where it was."""
    parser.addoption("--rest", action="store_true", help="leave out what has passed already")


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the folder of results, before any test or worker starts."""
    is_worker = hasattr(config, "workerinput")
    if is_worker:
        return
    empty_if_full(COMPILED)
    # Workers, also one that replaces another later, must all leave out the same.
    PASSED.parent.mkdir(exist_ok=True)
    before = PASSED.read_text() if config.getoption("rest") and PASSED.exists() else ""
    LEFT_OUT.write_text(before)
    PASSED.write_text(before)
    config.pluginmanager.register(Passed())


def empty_if_full(store: pathlib.Path) -> None:
    """Remove the store of compiled programs above its size."""
    if not store.is_dir():
        return
    stored = sum(path.stat().st_size for path in store.iterdir())
    if stored > COMPILED_BYTES:
        shutil.rmtree(store)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out the tests that --rest leaves out."""
    if not config.getoption("rest"):
        return
    left_out = set(LEFT_OUT.read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


class Passed:
    """Writes down each test that has passed or was skipped, as soon as it has."""

    def __init__(self):
        self.failed = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid not in self.failed:
            with PASSED.open("a") as file:
                file.write(f"{report.nodeid}\n")


@pytest.fixture(scope="module", autouse=True)
def memory_maps_are_left():
    """Forget compiled programs before they have all memory maps that Linux allows a process.

    Each program takes some of the 65,530: a worker had 39,000 at the end of the suite.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


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
