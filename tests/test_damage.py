"""Damage to a run's files: each is told in one line, or changes nothing that anybody reads."""

import contextlib
import io
import json
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from running import run

import train_sft
from data.tokenizer import Tokenizer
from responses import load_run
from runtime import flags, run_folder
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from runtime.guard import left_out, spike_count
from runtime.inputs import with_pinned_runs
from runtime.metrics import Recorder
from runtime.run_folder import load_config
from sharding import MeshConfig, make_mesh
from train_state import start_or_resume, starting_params
from training_run import script_name
from weights import convert

TINY = ["--model.preset=tiny", "--length=32", "--batch_size=8", "--optimizer.warmup=0"]
TINY += ["--eval_every=2", "--save_every=1", "--keep_checkpoints=9"]


def argv_of(folder: pathlib.Path, seed: int = 0) -> list[str]:
    return [*TINY, "--steps=2", f"--seed={seed}", f"--run={folder}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """Make two runs of two steps that differ in their seed, with a loss spike behind them."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("good", "other")):
        run(train_sft, *argv_of(folder / name, seed))
        spike = [{"step": 1, "resumed_after": 0, "batches": [1]}]
        (folder / name / "left_out.json").write_text(json.dumps(spike, indent=1))
        # As a step that was saved after the spike: it names how many there were.
        for manifest in (folder / name).glob("checkpoints/*/manifest.json"):
            body = json.loads(manifest.read_text())
            del body["self"]
            manifest.write_bytes(run_folder._seal({**body, "spikes": 1}))
    return folder / "good", folder / "other"


# --- who reads a run


def content(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def read(folder: pathlib.Path) -> Any:
    """Read a run as generate.py, evaluate.py, collectors and searchers do."""
    model, tokenizer, params = load_run(str(folder))
    return model, tokenizer.sha256, content(params)


def start_from(folder: pathlib.Path) -> Any:
    """Start another run from it, as --init does."""
    config = flags.parse(train_sft.Config, [f"--init={folder}", f"--run={folder}-new"])
    config = with_pinned_runs(config)
    mesh = make_mesh(MeshConfig())
    init = train_sft.make_update(config).init
    params = starting_params(init, config.model, config.init, mesh, 0)
    return config.model, Tokenizer.load(config.init).sha256, content(params)


def resume(folder: pathlib.Path) -> Any:
    """Resume it, up to its first step."""
    config = with_pinned_runs(flags.parse(train_sft.Config, argv_of(folder)))
    tokenizer = Tokenizer.load(folder)
    without = left_out(config.run)
    update = train_sft.make_update(config)
    mesh = make_mesh(MeshConfig())
    with Checkpoints(
        config.run, config, script=script_name(config), tokenizer=tokenizer.model, keep=9
    ) as checkpoints:
        start = start_or_resume(checkpoints, config, update.init, update.optimizer, mesh)
        with Recorder(config.run, config.steps, start.step) as recorder:
            steps = list(recorder.steps())
    # An older step, passed on to after a warning, ends where this one is: that is harmless.
    state = content(start.state) if start.step == 2 else "older"
    return state, start.data_position if start.step == 2 else "older", without, len(steps) < 2


def export(folder: pathlib.Path) -> Any:
    """Export it; return all that is written."""
    out = folder.with_name("exported")
    shutil.rmtree(out, ignore_errors=True)
    config = convert.Config(run=str(folder), write=str(out))
    convert.main(config)
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


READERS: dict[str, Callable[[pathlib.Path], Any]] = {
    "read": read,
    "start_from": start_from,
    "resume": resume,
    "export": export,
}


# --- damage


def flip(path: pathlib.Path, twin: pathlib.Path, rng: random.Random) -> None:
    bad = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(bad))
    bad[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bad)


def truncate(path: pathlib.Path, twin: pathlib.Path, rng: random.Random) -> None:
    good = path.read_bytes()
    path.write_bytes(good[: rng.randrange(len(good))])


def empty(path: pathlib.Path, twin: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def remove(path: pathlib.Path, twin: pathlib.Path, rng: random.Random) -> None:
    path.unlink()


def swap(path: pathlib.Path, twin: pathlib.Path, rng: random.Random) -> None:
    shutil.copy(twin, path)


def zeros(path: pathlib.Path, twin: pathlib.Path, rng: random.Random) -> None:
    """As a power cut leaves the end of a file."""
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2] + bytes(len(good) - len(good) // 2))


def another_kind(path: pathlib.Path, twin: pathlib.Path, rng: random.Random) -> None:
    """Valid JSON, but nothing that was ever written there."""
    nested = "[" * 100_000 + "]" * 100_000
    path.write_text(rng.choice(["[]", "1", '"x"', "null", '{"model": 5}', "{}", nested]))


DAMAGES = (flip, truncate, empty, remove, swap, zeros, another_kind)


def kinds_of(good: pathlib.Path) -> list[pathlib.Path]:
    """Return a file of each kind in a run, by its path there."""
    step = good / "checkpoints" / "2"
    files = [good / name for name in ("config.json", "tokenizer.model", "left_out.json")]
    files += [good / name for name in ("metrics.jsonl", "samples.md", "report.html")]
    files.append(step / "manifest.json")
    for item in ("params", "rest"):
        inside = [path for path in (step / item).rglob("*") if path.is_file()]
        files.append(max(inside, key=lambda path: path.stat().st_size))
    return [path.relative_to(good) for path in files]


def trial(
    runs: tuple[pathlib.Path, pathlib.Path],
    tmp_path: pathlib.Path,
    path: pathlib.Path,
    damage: Callable[..., None],
    reader: str,
    expected: Any,
    rng: random.Random,
) -> str | None:
    """Damage a copy of a run, and return what was wrong with how `reader` took it."""
    good, other = runs
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(good, copy)
    # Orbax names its files anew in each run: the twin of one is any of its kind.
    twin = other / path
    if not twin.exists():
        twin = next(p for p in (other / path.parent).iterdir() if p.is_file())
    damage(copy / path, twin, rng)
    if (copy / path).exists() and (copy / path).read_bytes() == (good / path).read_bytes():
        return None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = READERS[reader](copy)
    except UserError as told:
        return None if len(str(told)) < 1000 and "\n" not in str(told) else f"long: {told}"
    except Exception as fault:
        return f"{type(fault).__name__}: {fault}"
    # An older step is as good an answer, where it is told.
    is_older = reader == "resume" and found[0] == "older"
    if is_older or "has no manifest.json; read is step 1" in said.getvalue():
        return None
    return None if found == expected else "silent"


def faults_of(
    runs: tuple[pathlib.Path, pathlib.Path],
    tmp_path: pathlib.Path,
    trials: list[tuple[pathlib.Path, Callable[..., None], str]],
) -> list[str]:
    rng = random.Random(1)
    expected = {}
    for reader, of in READERS.items():
        shutil.copytree(runs[0], tmp_path / reader / "copy")
        expected[reader] = of(tmp_path / reader / "copy")
    faults = []
    for path, damage, reader in trials:
        fault = trial(runs, tmp_path, path, damage, reader, expected[reader], rng)
        if fault is not None:
            faults.append(f"{path} {damage.__name__} {reader}: {fault[:200]}")
    return faults


@pytest.mark.slow
def test_each_kind_of_file_damaged_once(runs, tmp_path):
    """Each damage to each kind of file, for the readers in turn."""
    trials = []
    readers = list(READERS)
    for number, path in enumerate(kinds_of(runs[0])):
        for turn, damage in enumerate(DAMAGES):
            trials.append((path, damage, readers[(number + turn) % len(readers)]))
    assert faults_of(runs, tmp_path, trials) == []


@pytest.mark.slow
def test_three_hundred_damages(runs, tmp_path):
    rng = random.Random(2)
    kinds = kinds_of(runs[0])
    trials = [
        (rng.choice(kinds), rng.choice(DAMAGES), rng.choice(list(READERS))) for _ in range(300)
    ]
    assert faults_of(runs, tmp_path, trials) == []


@pytest.mark.slow
def test_controls(runs, tmp_path):
    """An undamaged run is read by all, and the spike is known."""
    assert spike_count(str(runs[0])) == 1 and left_out(str(runs[0])) == {1}
    assert load_config(str(runs[0]))["seed"] == 0
    for reader, of in READERS.items():
        for name in ("one", "two"):
            shutil.copytree(runs[0], tmp_path / reader / name / "copy")
        assert of(tmp_path / reader / "one" / "copy") == of(tmp_path / reader / "two" / "copy")
