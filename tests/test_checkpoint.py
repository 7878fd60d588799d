"""Checkpoints: what was saved comes back to the bit; no damaged or foreign step is ever loaded."""

import dataclasses
import errno
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from runtime import checkpoint, run_folder, writes
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from runtime.run_folder import load_config
from sharding import shardings_of
from train_state import load_params

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Model:
    layers: int = 2


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = ""
    steps: int = 9
    lr: float = 0.1
    model: Model = Model()


def open_run(run, tokenizer=b"tokens", script="train", keep=2, **fields):
    return Checkpoints(
        str(run), Config(run=str(run), **fields), script=script, tokenizer=tokenizer, keep=keep
    )


def make_state(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "decoder": {
            "embed": jax.random.normal(keys[0], (16, 8), dtype),
            "norm": jnp.ones(8, dtype),
        }
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = jax.tree.map(lambda x: x + 1, optimizer.init(params))
    return {
        "params": params,
        "opt": opt_state,
        "key": keys[1],
        "raw": jax.random.PRNGKey(3),
        "step": jnp.int32(seed),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def to_bytes(tree):
    def raw(x):
        key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x).tobytes()

    return [raw(x) for x in jax.tree.leaves(tree)]


@pytest.fixture
def saved(tmp_path):
    """Make a run with steps 1 and 2."""
    run = tmp_path / "run"
    with open_run(run) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), extra={"row": step})
    return run


def restore(run, **fields):
    with open_run(run, **fields) as checkpoints:
        return checkpoints.restore(abstract(make_state()))


def files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_round_trip_is_bitwise_with_optimizer_and_keys(saved):
    step, state, extra = restore(saved, steps=99)  # a longer run is the same run
    assert (step, extra) == (2, {"row": 2})
    assert jax.tree.structure(state) == jax.tree.structure(make_state())
    assert to_bytes(state) == to_bytes(make_state(2))
    assert jax.random.normal(state["key"]) == jax.random.normal(make_state(2)["key"])


def test_donated_buffers_do_not_change_what_is_saved(tmp_path):
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    with open_run(tmp_path / "run") as checkpoints:
        state = make_state(5)
        state["params"] = {"w": jnp.arange(500_000, dtype=jnp.float32)}
        checkpoints.save(1, state)
        jax.block_until_ready(change(state["params"]))
    assert (load_params(str(tmp_path / "run"))["w"] == np.arange(500_000)).all()


def test_new_run_has_nothing_to_restore_and_keeps_the_last_k(tmp_path):
    run = tmp_path / "run"
    with open_run(run, keep=3) as checkpoints:
        assert checkpoints.restore(abstract(make_state())) is None
        for step in range(1, 6):
            checkpoints.save(step, make_state(step))
    assert sorted(os.listdir(run / "checkpoints")) == ["3", "4", "5"]
    assert (run / "tokenizer.model").read_bytes() == b"tokens"


def test_a_hundred_flipped_bits_and_twenty_truncations_are_found(saved, capfd):
    rng = random.Random(1)
    config_hash = run_folder.identity_hash(load_config(str(saved)))
    step = saved / "checkpoints" / "2"
    paths = files(step)
    sizes = [path.stat().st_size for path in files(step)]
    for number in range(120):
        # Each file once, then any byte.
        path = paths[number] if number < len(paths) else rng.choices(paths, sizes)[0]
        good = path.read_bytes()
        bad = bytearray(good)
        if number < 100:
            bit = rng.randrange(8 * len(good))
            bad[bit // 8] ^= 1 << bit % 8
        else:
            del bad[rng.randrange(len(good)) :]
        path.write_bytes(bad)
        assert not run_folder.is_good(step, config_hash)
        assert str(path) in capfd.readouterr().err
        offered = "damaged.*last good step before it: 1"
        if path.name == "manifest.json" or "params" in path.parts:
            with pytest.raises(UserError, match=offered):
                load_params(str(saved))
        path.write_bytes(good)
    path.write_bytes(bad)
    assert restore(saved)[0] == 1 and "falling back to the step before" in capfd.readouterr().err


@pytest.mark.parametrize("fault", ["truncated", "missing", "surplus", "manifest"])
def test_damage_falls_back_with_a_warning_and_is_an_error_for_load_params(saved, fault, capfd):
    folder = saved / "checkpoints" / "2"
    path = next(p for p in files(folder / "params") if p.stat().st_size > 50)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif fault == "missing":
        path.unlink()
    elif fault == "surplus":
        path = folder / "params" / "stray"
        path.write_text("")
    else:
        path = folder / "manifest.json"
        path.write_text(path.read_text()[:-5])
    with pytest.raises(UserError) as error:
        load_params(str(saved))
    assert str(path) in str(error.value) and str(error.value).endswith("good step before it: 1")
    step, state, _ = restore(saved)
    assert step == 1 and to_bytes(state) == to_bytes(make_state(1))
    err = capfd.readouterr().err
    assert str(path) in err and err.count("\n") == 1
    assert os.listdir(saved / "checkpoints") == ["1"]  # so that step 2 can be saved again


def test_all_damaged_is_an_error_not_a_new_run(saved):
    for step in (1, 2):
        next(iter(files(saved / "checkpoints" / str(step) / "rest"))).unlink()
    with pytest.raises(UserError, match="no step is undamaged"):
        restore(saved)


def test_steps_without_manifest_do_not_exist(saved):
    (saved / "checkpoints" / "3").mkdir()  # an empty folder
    (saved / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    # Killed after Orbax, before the manifest.
    (saved / "checkpoints" / "2" / "manifest.json").unlink()
    (saved / "checkpoints" / "2").rename(saved / "checkpoints" / "2.saving")
    (saved / "checkpoints" / "1").rename(saved / "checkpoints" / "7")
    with pytest.raises(UserError, match="damaged"):  # a manifest of another step does not count
        load_params(str(saved))
    (saved / "checkpoints" / "7").rename(saved / "checkpoints" / "1")
    assert to_bytes(load_params(str(saved))) == to_bytes(make_state(1)["params"])
    assert restore(saved)[0] == 1
    assert os.listdir(saved / "checkpoints") == ["1"]


def test_a_step_that_lost_its_manifest_is_told_and_kept(saved, capfd):
    step = saved / "checkpoints" / "2"
    (step / "manifest.json").unlink()
    kept = {path.relative_to(step): path.read_bytes() for path in files(step)}
    load_params(str(saved))
    assert "2: has no manifest.json; read is step 1" in capfd.readouterr().err
    assert restore(saved)[0] == 1
    assert "2: has no manifest.json; kept as" in capfd.readouterr().err
    aside = saved / "set_aside" / "2"
    assert {path.relative_to(aside): path.read_bytes() for path in files(aside)} == kept
    # Without an earlier step nothing is begun anew over it.
    (saved / "checkpoints" / "1" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"1: has no manifest\.json; restore it"):
        restore(saved)


def test_load_params_reads_only_the_parameters(saved):
    shutil.rmtree(saved / "checkpoints" / "2" / "rest")
    params = load_params(str(saved))
    assert to_bytes(params) == to_bytes(make_state(2)["params"])
    assert isinstance(params["decoder"]["embed"], np.ndarray)
    assert to_bytes(load_params(str(saved), step=1)) == to_bytes(make_state(1)["params"])
    placed = load_params(str(saved), shapes=abstract(make_state()["params"]))
    assert isinstance(placed["decoder"]["embed"], jax.Array)
    with pytest.raises(UserError, match=r"no checkpoint of step 7 \(finished steps: 2, 1\)"):
        load_params(str(saved), step=7)
    with pytest.raises(UserError, match="no run here"):
        load_params(str(saved / "nowhere"))


def test_parameters_alone_make_a_run(tmp_path):
    with open_run(tmp_path / "run", tokenizer=None) as checkpoints:
        checkpoints.save(0, {"params": make_state(1)["params"]})
    assert to_bytes(load_params(str(tmp_path / "run"))) == to_bytes(make_state(1)["params"])


@pytest.mark.parametrize(
    "change, told",
    [
        ({"lr": 0.2}, "lr is 0.1 in this run and 0.2 now"),
        ({"model": Model(layers=4)}, "model.layers is 2 in this run and 4 now"),
        ({"script": "other"}, "a run of train; name another --run, or start from it with --init="),
        (
            {"tokenizer": b"others"},
            "tokenizer_sha256 is '[0-9a-f]{64}' in this run and '[0-9a-f]{64}' now",
        ),
    ],
)
def test_another_config_is_refused_and_nothing_written(saved, change, told):
    before = {path: path.stat().st_mtime_ns for path in files(saved)}
    with pytest.raises(UserError, match=told), open_run(saved, **change):
        pass
    assert {path: path.stat().st_mtime_ns for path in files(saved)} == before


def test_a_run_of_which_no_step_was_saved_is_begun_anew_with_any_config(tmp_path):
    run = tmp_path / "run"
    for lr in (0.1, 0.2):
        with open_run(run, lr=lr):
            pass
        assert load_config(str(run))["lr"] == lr
    (run / "reference-0.npz").touch()  # what was computed once belongs to the config
    with pytest.raises(UserError, match=r"lr is 0\.2 in this run"), open_run(run):
        pass


def foreign_folders(saved):
    """Return folders by name that are no runs, or have lost what made them one."""
    llama = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "model_type": "llama"}
    metrics = [{"step": step, "seconds": 1.0} for step in range(1, 4)]
    rows = "".join(json.dumps(row) + "\n" for row in metrics)
    return {
        "another project's checkpoints": {"checkpoints/1000/w": "x", "checkpoints/2000/w": "x"},
        "and its config": {"checkpoints/1000/w": "x", "config.json": json.dumps({"lr": 1})},
        "and ours by its keys alone": {"checkpoints/7/w": "x", "config.json": '{"versions": {}}'},
        "a list": {"config.json": "[1]", "model.bin": "x"},
        "not JSON": {"config.json": "{", "model.bin": "x"},
        "a Hugging Face folder": {"config.json": json.dumps(llama), "tokenizer.model": "x"},
        "files beside": {"checkpoints/1000/w": "x", "thesis.tex": "x"},
        "a run without its checkpoints": {"metrics.jsonl": rows, **without_checkpoints(saved)},
        "whose folder is empty": {
            "metrics.jsonl": rows,
            "checkpoints/": None,
            **without_checkpoints(saved, save_every=1),
        },
        "a run with another's steps": {"checkpoints/9/w": "x", **without_checkpoints(saved)},
        "another's temporary": {"checkpoints/9.orbax-checkpoint-tmp-1/w": "x"},
    }


def without_checkpoints(saved, **changed):
    config = json.loads((saved / "config.json").read_text())
    return {"config.json": json.dumps({**config, **changed}), "samples.md": "## Step 1\n"}


def test_nothing_that_is_not_ours_is_touched(saved, tmp_path):
    """Refused in one line, by its own settings and by others; not a byte is written or removed."""
    for name, content in foreign_folders(saved).items():
        folder = tmp_path / name
        for path, text in content.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if text is None:
                (folder / path).mkdir(exist_ok=True)
            else:
                (folder / path).write_text(text)
        before = [(path, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]
        for change in ({}, {"lr": 0.2}, {"script": "other"}):
            with pytest.raises(UserError), open_run(folder, **change):
                pass
            after = [(path, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]
            assert after == before, name


def test_a_run_killed_before_its_first_save_is_begun_anew(tmp_path):
    with open_run(tmp_path / "run"):
        pass
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    (tmp_path / "run" / "checkpoints" / "1.saving").mkdir()
    with open_run(tmp_path / "run") as checkpoints:
        assert checkpoints.restore(abstract(make_state())) is None
    with (
        pytest.raises(UserError, match="whose checkpoints are gone"),
        open_run(tmp_path / "run", lr=0.3),
    ):
        pass  # with other settings they are not computed again


def test_a_run_needs_a_folder():
    with pytest.raises(UserError, match="--run=: names no folder"):
        open_run("")
    with pytest.raises(UserError, match="File name too long"):
        open_run("r" * 300)


def test_fewer_steps_than_done_is_told_and_changes_nothing(saved, capfd):
    before = (saved / "config.json").read_bytes()
    assert restore(saved, steps=1)[0] == 2
    assert "has done 2 steps, and --steps=1 asks for no more" in capfd.readouterr().err
    assert (saved / "config.json").read_bytes() == before


def test_a_run_folder_that_is_gone_is_noticed_at_the_next_save(tmp_path):
    for replaced in (False, True):
        run = tmp_path / str(replaced)
        with open_run(run) as checkpoints:
            checkpoints.save(1, make_state(1))
            checkpoints.wait()
            shutil.rmtree(run)
            if replaced:
                (run / "checkpoints").mkdir(parents=True)
            with pytest.raises(UserError, match=r"removed or replaced .* step 2 is not saved"):
                checkpoints.save(2, make_state(2))
        assert replaced == run.exists() and not list(run.glob("checkpoints/*"))


def test_a_reader_beside_a_trainer_is_never_torn_nor_ends(tmp_path):
    run = tmp_path / "run"
    with open_run(run, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.wait()
        faults = []

        def read():
            try:
                for _ in range(40):
                    assert np.isfinite(load_params(str(run))["decoder"]["embed"]).all()
            except Exception as fault:
                faults.append(fault)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        step = 1
        while any(reader.is_alive() for reader in readers):
            step += 1
            checkpoints.save(step, make_state(1))
    assert faults == [] and step > 5


def test_a_step_that_goes_while_one_looks_is_looked_for_again(tmp_path, monkeypatch):
    """A trainer removes step 2, and has written step 3, between the listing and the look."""
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "manifest.json").touch()
    listed = pathlib.Path.glob
    looks = []

    def glob(folder, pattern):
        found = [*listed(folder, pattern)]
        if not looks:
            (tmp_path / "2").rename(tmp_path / "2.removed")
            (tmp_path / "3").mkdir()
            (tmp_path / "3" / "manifest.json").touch()
        looks.append(found)
        return found

    monkeypatch.setattr(pathlib.Path, "glob", glob)
    assert run_folder.finished_steps(tmp_path) == [3] and len(looks) == 2
    # A listed step that is gone by the look is none, and no fault.
    assert not run_folder._holds_something(tmp_path / "2")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a run"), open_run(tmp_path):
        pass
    with pytest.raises(UserError, match="not a folder"), open_run(tmp_path / "thesis.tex"):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_run_in_training_is_refused(tmp_path):
    run = tmp_path / "run"
    with open_run(run), pytest.raises(UserError, match="another process"), open_run(run):
        pass


def test_other_dtypes_shapes_and_names_are_refused(saved):
    def refuse(change, told):
        wanted = abstract(make_state())
        wanted["params"]["decoder"].update(change)
        with open_run(saved) as checkpoints, pytest.raises(UserError, match=told):
            checkpoints.restore(wanted)

    refuse(
        {"norm": jax.ShapeDtypeStruct((8,), jnp.bfloat16)},
        r"params/decoder/norm is float32\[8\] .* bfloat16\[8\]",
    )
    refuse(
        {"norm": jax.ShapeDtypeStruct((9,), jnp.float32)},
        r"decoder/norm is float32\[8\] stored and float32\[9\]",
    )
    refuse(
        {"head": jax.ShapeDtypeStruct((9,), jnp.float32)},
        r"decoder/head is absent stored and float32\[9\]",
    )


def test_parameters_that_are_not_finite_are_refused(saved):
    state = make_state(3)
    state["params"]["decoder"]["norm"] = state["params"]["decoder"]["norm"].at[3].set(jnp.nan)
    with (
        open_run(saved) as checkpoints,
        pytest.raises(UserError, match=r"decoder/norm is not finite .*step: 2"),
    ):
        checkpoints.save(3, state)
    assert restore(saved)[0] == 2


def test_a_save_that_fails_in_the_background_is_told(saved, monkeypatch):
    def full(path, body):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    checkpoints = open_run(saved).__enter__()
    checkpoints.save(3, make_state(3))
    with pytest.raises(UserError, match="3: not saved: No space left"):
        checkpoints.save(4, make_state(4))
    checkpoints.save(4, make_state(4))
    with pytest.raises(UserError, match="4: not saved: No space left"):
        checkpoints.__exit__(None, None, None)
    monkeypatch.undo()
    assert restore(saved)[0] == 2


@pytest.mark.parametrize(
    ("fault", "told", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free the disk", 2),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "free the disk", 2),
        (ValueError("tensorstore: write() failed: No space left on device"), "free the disk", 2),
        (OSError(errno.EROFS, "Read-only file system"), "make it writable", 2),
        (OSError(errno.EACCES, "Permission denied"), "make it writable", 2),
        (OSError(errno.EMFILE, "Too many open files"), "raise `ulimit -n`", 2),
        (OSError(errno.EIO, "Input/output error"), "see to it", 2),
        (TimeoutError("completed 2/4 futures but timed out after 7300.10 s"), "the same", 75),
        (ValueError("timed out after 3600 seconds"), "the same command resumes", 75),
    ],
)
def test_what_a_disk_says_has_its_own_remedy(fault, told, code):
    with pytest.raises(UserError) as error, writes.disk_faults(pathlib.Path("run/3")):
        raise fault
    assert str(error.value).startswith("run/3: not saved: ") and told in str(error.value)
    assert error.value.code == code


def test_a_bug_is_no_disk_fault():
    with pytest.raises(KeyError), writes.disk_faults(pathlib.Path("run/3")):
        raise KeyError("w")


def test_what_a_killed_writer_left_goes_and_what_is_written_stays(tmp_path):
    path = tmp_path / "out.jsonl"
    left = tmp_path / ".out.jsonl.0123abcd.partial"
    left.write_text("gigabytes")
    (tmp_path / "victim").write_text("years of work")
    (tmp_path / ".out.jsonl.01234567.partial").symlink_to(tmp_path / "victim")
    (tmp_path / "out.jsonl.new").symlink_to(tmp_path / "victim")
    with writes.atomic_text(str(path)) as first:
        assert not left.exists()
        first.write("first")
        # A second writer leaves the first alone.
        with writes.atomic_text(str(path)) as second:
            second.write("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    writes.atomic_bytes(path, b"third")
    with writes.atomic_folder(tmp_path / "folder") as new:
        (new / "w").write_text("x")
    assert (tmp_path / "victim").read_text() == "years of work"
    names = {entry for entry in os.listdir(tmp_path) if "partial" not in entry}
    assert names == {"out.jsonl", "victim", "out.jsonl.new", "folder"}
    assert os.stat(path).st_mode & 0o777 == 0o666 & ~umask()


def umask():
    now = os.umask(0)
    os.umask(now)
    return now


LOOP = """
import dataclasses, sys, time
import jax, jax.numpy as jnp
from runtime.checkpoint import Checkpoints

@dataclasses.dataclass(frozen=True)
class Config:
    steps: int

config = Config(int(sys.argv[2]))
with Checkpoints(sys.argv[1], config, script="loop", keep=2) as checkpoints:
    state = {"params": {"w": jnp.zeros(100_000)}, "key": jax.random.key(0)}
    step, state, _ = checkpoints.restore(jax.eval_shape(lambda: state)) or (0, state, None)
    print("from", step, flush=True)
    for step in range(step + 1, config.steps + 1):
        key, noise = jax.random.split(state["key"])
        w = state["params"]["w"] + jax.random.normal(noise, 100_000)
        state = {"params": {"w": w}, "key": key}
        if checkpoints.due(step, 1, config.steps):
            checkpoints.save(step, state)
        print("step", step, flush=True)
        if checkpoints.stopping:
            break
"""


def start(run, steps, source=LOOP, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(source), str(run), str(steps)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_kill_at_any_moment_resumes_to_the_bit(tmp_path):
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    reference = start(plain, 12)
    rng = random.Random(1)
    reached = 0
    for _ in range(3):
        process = start(killed, 12)
        reached = int(process.stdout.readline().split()[1])
        for _ in range(3):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert reached > 0  # the third start resumed
    process = start(killed, 12)
    assert process.communicate()[1] == "" and process.returncode == 0
    assert reference.communicate()[1] == "" and reference.returncode == 0
    assert to_bytes(load_params(str(killed), step=12)) == to_bytes(
        load_params(str(plain), step=12)
    )
    assert len(os.listdir(killed / "checkpoints")) == 2


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)],
)
def test_a_signal_saves_and_ends(tmp_path, number, code):
    """As an interrupted program does: what follows in a shell must not start."""
    process = start(tmp_path / "run", 10**6, LOOP.replace("due(step, 1,", "due(step, 0,"))
    while "step 3" not in process.stdout.readline():
        pass
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    last = int(out.split()[-1]) if out else 3
    assert process.returncode == code and err.strip().startswith(f"{number.name}: saving")
    assert f"stopped at step {last} of 1,000,000; the same command goes on" in err.replace(
        f"{last:,}", str(last)
    )
    assert os.listdir(tmp_path / "run" / "checkpoints") == [str(last)]


def test_a_lost_terminal_saves_and_ends(tmp_path):
    """As of a connection that broke: SIGHUP, and a terminal that takes no more text."""
    master, slave = os.openpty()
    # The first terminal that a session's leader opens is the session's.
    source = "import os\nos.open(os.ttyname(0), os.O_RDWR)\n" + LOOP
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path / "run"), str(10**6)],
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    shown = b""
    while b"step 3" not in shown:
        shown += os.read(master, 4096)
    os.close(master)
    assert process.wait(30) == 128 + signal.SIGHUP
    names = os.listdir(tmp_path / "run" / "checkpoints")
    assert len(names) == 2 and all(name.isdigit() for name in names)


def test_sigterm_handler_goes_when_the_run_ends(saved):
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    before = list(map(signal.getsignal, numbers))
    with open_run(saved) as checkpoints:
        assert list(map(signal.getsignal, numbers)) == [checkpoints._on_signal] * 3
    assert list(map(signal.getsignal, numbers)) == before


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
def test_all_pairs_of_meshes(tmp_path):
    shapes = [(count, data) for count in (1, 2, 4, 8) for data in (1, 2, 4, 8) if data <= count]
    shapes += [(count, -1) for count in (2, 4, 8)]  # -1: all fsdp

    def placed(shape):
        names, (count, data) = ("data", "fsdp", "tensor"), shape
        sizes = (data, 1, count // data) if data > 0 else (1, count, 1)
        mesh = jax.make_mesh(
            sizes, names, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:count]
        )
        return jax.tree.map(jax.device_put, make_state(4), shardings_of(make_state(4), mesh))

    for number, before in enumerate(shapes):
        with open_run(tmp_path / str(number)) as checkpoints:
            checkpoints.save(1, placed(before))
            for after in shapes:
                wanted = abstract(placed(after))
                restored = checkpoints.restore(wanted)[1]
                assert to_bytes(restored) == to_bytes(make_state(4))
                assert jax.tree.all(
                    jax.tree.map(lambda x, y: x.sharding == y.sharding, restored, wanted)
                )


def test_restores_onto_another_mesh(tmp_path):
    source = """
        import sys
        import jax, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from tests.test_checkpoint import abstract, make_state, open_run, to_bytes

        state = make_state(4)
        def place(shape, embed):
            mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
            placed = jax.device_put(state, NamedSharding(mesh, P()))
            decoder = placed["params"]["decoder"]
            decoder["embed"] = jax.device_put(decoder["embed"], NamedSharding(mesh, embed))
            return placed
        with open_run(sys.argv[1]) as checkpoints:
            checkpoints.save(1, place((8, 1), P("data")))
            places = {(8, 1): P("data"), (2, 4): P("tensor", "data"), (1, 8): P(None, "tensor")}
            for shape, embed in places.items():
                wanted = abstract(place(shape, embed))
                step, restored, _ = checkpoints.restore(wanted)
                assert to_bytes(restored) == to_bytes(state)
                same = jax.tree.map(lambda x, y: x.sharding == y.sharding, restored, wanted)
                assert jax.tree.all(same)
    """
    process = start(
        tmp_path / "run", 0, source, XLA_FLAGS="--xla_force_host_platform_device_count=8"
    )
    assert process.communicate()[1] == "" and process.returncode == 0
    assert to_bytes(load_params(str(tmp_path / "run"))) == to_bytes(make_state(4)["params"])
