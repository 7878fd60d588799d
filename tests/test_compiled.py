"""Compiled programs are kept from one command to the next, and nothing depends on them."""

import os
import pathlib
import subprocess
import sys

import pytest

from runtime.compiled import make_room

# Compiles one program that takes longer than the threshold, and counts what came from the disk.
COMMAND = """
import jax, jax.numpy as jnp
from runtime.compiled import keep_programs

keep_programs()
hits = 0

def count(event, **_):
    global hits
    hits += event == "/jax/compilation_cache/cache_hits"

jax.monitoring.register_event_listener(count)

@jax.jit
def long(x):
    for power in range(120):
        x = jnp.sin(x + power) @ x
    return x.sum()

print(float(long(jnp.eye(8))), hits)
"""


def ran(cache: pathlib.Path) -> tuple[str, int]:
    """Return what the command printed, and how many programs came from `cache`."""
    environment = {name: value for name, value in os.environ.items() if name[:9] != "JAX_COMPI"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMMAND],
        env={**environment, "PLUMB_CACHE": str(cache), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    value, hits = done.stdout.split()
    return value, int(hits)


def test_a_second_command_does_not_compile_again(tmp_path):
    first, _ = ran(tmp_path)
    again, hits = ran(tmp_path)
    assert again == first and hits > 0

    # What is damaged is compiled again, without a word.
    for path in tmp_path.glob("compiled/*/*"):
        path.write_bytes(path.read_bytes()[:-20])
    again, hits = ran(tmp_path)
    assert again == first and hits == 0


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    _, hits = ran(tmp_path / "file")
    assert hits == 0


@pytest.mark.parametrize(("most", "left"), [(40, [0, 1, 2, 3]), (39, [3])])
def test_the_oldest_go_where_there_is_no_room(tmp_path, most, left):
    for number in range(4):
        path = tmp_path / f"{number}-cache"
        path.write_bytes(bytes(10))
        os.utime(path, (number, number))
    make_room(tmp_path, most)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n}-cache" for n in left]
