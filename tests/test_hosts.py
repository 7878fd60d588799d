"""Two real processes on loopback: results equal one process's; what happens to one ends both."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from running import ONE_DEVICE, rows_of, run, write

import train_dpo
import train_sft
from runtime import agreement, hosts
from runtime.errors import UserError
from runtime.run_folder import finished_steps
from sharding import data_shard, to_host
from train_state import load_params

ROOT = pathlib.Path(__file__).parents[1]
TINY = [
    "--model.preset=tiny",
    "--optimizer.warmup=0",
    "--eval_every=0",
    "--batch_size=8",
    "--save_every=2",
]
STOPPED = 128 + signal.SIGTERM
FAULTS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "stuck": "time.sleep(1000)",
    "raises": "raise ValueError('planted')",
    # So that it is known before step 8, the last.
    "sigterm": "os.kill(os.getpid(), signal.SIGTERM); time.sleep(3)",
}
# Runs a script as its command line does, and does `fault` after step 3, or when the save of step 4
# is half done.
DRIVER = """
import importlib, os, signal, sys, time
import data.batches
from runtime import checkpoint, flags

data.batches.PACKING_WINDOW = 16  # few rows each, so that the hosts' positions soon differ
script, at, fault = sys.argv[1:4]
del sys.argv[1:4]
sys.path.append("tests")
due, finish = checkpoint.Checkpoints.due, checkpoint.Checkpoints._finish

def fail(self):
    (self.run / "at_fault").touch()
    exec(fault)

def due_with_fault(self, step, every, last):
    if at == "step" and step == 3:
        fail(self)
    return due(self, step, every, last)

def finish_with_fault(self, path, body):
    if at == "save" and body["step"] == 4:
        fail(self)
    finish(self, path, body)

checkpoint.Checkpoints.due, checkpoint.Checkpoints._finish = due_with_fault, finish_with_fault
script = importlib.import_module(script)
flags.run(script.main, script.Config)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_two(script, argv, faults=(None, None), at="step", stall=5):
    """Start two processes of `script`; `faults`: what each of them does."""
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE}
    environment |= {"PYTHONPATH": str(ROOT), "PLUMB_TEST": str(ROOT)}
    processes = []
    for index, fault in enumerate(faults):
        flags = [
            f"--hosts.coordinator={address}",
            "--hosts.count=2",
            f"--hosts.index={index}",
            f"--hosts.stall={stall}",
            "--hosts.wait=60",
        ]
        command = [
            sys.executable,
            "-c",
            DRIVER,
            script,
            at if fault else "never",
            fault or "",
            *argv,
            *flags,
        ]
        pipes = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "start_new_session": True,
        }
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
    return processes


def ends(processes, seconds=120):
    """Return exit codes and what was written to stderr."""
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def equal(one, other, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerance),
        load_params(str(one)),
        load_params(str(other)),
    )


@pytest.mark.slow
def test_killed_peer_then_resumed_equals_one_process(tmp_path):
    # Without packing hosts share one order of the data.
    argv = [*TINY, "--loss=simpo", "--steps=5", "--seed=3"]
    codes, errors = ends(
        start_two("train_dpo", [*argv, f"--run={tmp_path}/two"], (None, FAULTS["killed"]))
    )
    assert codes == [hosts.LOST, -signal.SIGKILL]
    # Progress is told every ten seconds, on a busy machine.
    told = [line for line in errors[0].splitlines() if line and not line.startswith("step ")]
    assert (
        len(told) == 1
        and told[0].startswith("error: process 0: ")
        and "the same command resumes" in told[0]
    )
    codes, errors = ends(start_two("train_dpo", [*argv, f"--run={tmp_path}/two"]))
    assert codes == [0, 0], errors
    assert errors[1] == ""  # process 0 alone speaks
    run(train_dpo, *argv, f"--run={tmp_path}/one", "--mesh.data=1", "--mesh.fsdp=8")
    equal(tmp_path / "two", tmp_path / "one", atol=1e-5)
    ours, theirs = ([row["loss"] for row in rows_of(tmp_path / name)] for name in ("two", "one"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# --- processes that were not started alike

ALIKE = [*TINY, "--length=32", "--steps=4", "--seed=1"]
ROWS = [{"prompt": f"say {i}", "response": f"{i}!"} for i in range(60)]
# What is otherwise on process 1: flags, or what its driver does first, or the folder it runs in;
# and what the line must name.
DIFFERENCES = {
    "lr": (["--optimizer.lr=0.5"], "", None, "--optimizer.lr"),
    "seed": (["--seed=2"], "", None, "--seed"),
    "length": (["--length=64"], "", None, "--length"),
    "another file": (["--data=other.jsonl"], "", None, "--data"),
    "other rows": ([], "", "elsewhere", "the content of --data"),
    "code": ([], "", "copy", "the code of data.packing"),
    "jax": ([], "import jax; jax.__version__ = '0.0.1'", None, "the version of jax"),
    "count": (["--hosts.count=3"], "", None, "--hosts.count"),
    "steps": (["--steps=2"], "", None, "--steps"),
    "save_every": (["--save_every=1"], "", None, "--save_every"),
    "run": (["--run=another"], "", None, "--run"),
    # Further ones of the same kinds.
    "precision": ([], "import jax; jax.config.update('jax_enable_x64', True)", None, "jax_enable"),
    "dry run": (["--dry_run"], "", None, "--dry_run"),
    "evaluation": (["--eval_every=2"], "", None, "--eval_every"),
    "model": (["--model.layers=1"], "", None, "--model.layers"),
    "stall": (["--hosts.stall=9"], "", None, "--hosts.stall"),
}


def start_unlike(tmp_path, argv, name):
    """Start two processes of train_sft, the second otherwise as DIFFERENCES says."""
    flags, first, place, _ = DIFFERENCES[name]
    folders = [tmp_path, tmp_path if place is None else tmp_path / place]
    roots = [ROOT, folders[1] if place == "copy" else ROOT]
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for index in (0, 1):
        own = [f"--hosts.coordinator={address}", "--hosts.count=2", f"--hosts.index={index}"]
        start = [*argv, *own, "--hosts.stall=5", "--hosts.wait=60", *(flags if index else [])]
        # A flag that is given twice is that of process 1.
        last = {word.partition("=")[0]: word for word in start}
        source = (first if index else "") + "\n" + SCRIPT
        command = [sys.executable, "-c", source, *last.values()]
        environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE, "PYTHONPATH": str(roots[index])}
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                cwd=folders[index],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


SCRIPT = """
import train_sft
from runtime import flags

flags.run(train_sft.main, train_sft.Config)
"""


@pytest.mark.parametrize(
    "name",
    [
        "lr",
        *(pytest.param(name, marks=pytest.mark.slow) for name in DIFFERENCES if name != "lr"),
    ],
)
def test_processes_that_were_not_started_alike_end_at_once(tmp_path, name):
    """Both with code 2 and a line that names process and field, and nothing is written."""
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "chats.jsonl", ROWS)
    write(tmp_path / "other.jsonl", ROWS)
    write(tmp_path / "elsewhere" / "chats.jsonl", ROWS[::-1])
    if name == "code":
        ours = shutil.ignore_patterns(".*", "runs", "tests", "docs", "experiments", "benchmarks")
        shutil.copytree(ROOT, tmp_path / "copy", ignore=ours)
        write(tmp_path / "copy" / "chats.jsonl", ROWS)
        with (tmp_path / "copy" / "data" / "packing.py").open("a") as file:
            file.write("# another version\n")
    began = time.monotonic()
    processes = start_unlike(tmp_path, [*ALIKE, "--data=chats.jsonl", "--run=two"], name)
    told = DIFFERENCES[name][3]
    codes, errors = ends(processes, seconds=60)
    took = time.monotonic() - began
    print(f"{name}: {took:.1f} s, codes {codes}: {errors}")
    assert codes == [2, 2]
    for error in errors:
        [line] = [line for line in error.splitlines() if line.startswith("error:")]
        assert told in line and "process 1" in line
    assert not (tmp_path / "two").exists() and not (tmp_path / "another").exists()


def start_apart(tmp_path, *flags):
    """Start two processes of train_sft that have different ports of process 0; return both."""
    ports = [free_port(), free_port()]
    processes = []
    for index, port in enumerate(ports):
        own = [
            f"--hosts.coordinator=127.0.0.1:{port}",
            "--hosts.count=2",
            f"--hosts.index={index}",
        ]
        command = [sys.executable, "-c", SCRIPT, *ALIKE, *own, f"--run={tmp_path}/two"]
        environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes))
    return processes, ports


def test_processes_that_never_meet_end_within_seconds(tmp_path):
    """Each says whom it waited for, and where; a run that has begun is to be tried again."""
    began = time.monotonic()
    processes, ports = start_apart(tmp_path)
    codes, errors = ends(processes, seconds=60)
    took = time.monotonic() - began
    print(f"{took:.1f} s, codes {codes}: {errors}")
    # Of it 6 s are waited, the rest is their start, long on a busy machine.
    assert codes == [2, 2] and took < 30
    [line_0], [line_1] = (error.splitlines() for error in errors)
    absent = f"process 1 did not come to 127.0.0.1:{ports[0]} in 6 s"
    unreached = f"cannot reach process 0 at 127.0.0.1:{ports[1]} in 6 s"
    assert line_0.startswith(f"error: process 0: {absent}")
    assert line_1.startswith(f"error: process 1: {unreached}")
    assert not (tmp_path / "two").exists()

    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "left_out.json").touch()
    processes, _ = start_apart(tmp_path, "--hosts.wait=1")
    assert ends(processes, seconds=60)[0] == [hosts.LOST, hosts.LOST]


def test_a_process_that_comes_late_is_waited_for(monkeypatch):
    """For as long as --hosts.wait says, and no longer."""
    told = []

    def die(reason, code):
        told.append(reason)
        raise SystemExit(code)

    monkeypatch.setattr(hosts, "die", die)
    port = free_port()
    config = hosts.HostsConfig(coordinator=f"127.0.0.1:{port}", count=2, index=1, wait=1)
    with pytest.raises(SystemExit, match="2"):
        hosts._reach_first(hosts.settings(config), 2)
    assert "in 1 s" in told[0]

    def listen():
        time.sleep(2)
        listeners.append(socket.create_server(("127.0.0.1", port)))

    listeners = []
    late = threading.Thread(target=listen)
    late.start()
    hosts._reach_first(hosts.settings(dataclasses.replace(config, wait=30)), 2)
    late.join()
    listeners[0].close()
    assert len(told) == 1


def test_the_first_difference_is_named():
    sums = {"seed": "a", "data": "b", "code.data.packing": "c", "inputs.data.sha256": "d"}
    assert agreement.first_difference([sums, dict(sums), dict(sums)]) is None
    # A module that one process alone has imported by now is no difference.
    assert agreement.first_difference([sums, {**sums, "code.data.steps": "e"}]) is None
    for change, told in {
        "seed": "process 2: --seed differs",
        "code.data.packing": "process 2: the code of data.packing differs",
        "inputs.data.sha256": "process 2: the content of --data differs",
        "versions.numpy": "process 2: the version of numpy differs",
    }.items():
        assert agreement.first_difference([sums, sums, {**sums, change: "z"}]).startswith(told)


PACKED = ["train_sft", *TINY, "--length=64", "--steps=8", "--keep_checkpoints=5"]
LOOP = ["host_loop", "--steps=8"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return whole(argv): the folder of an undisturbed run of two processes."""
    folders = {}

    def run_of(script, *argv):
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp("whole") / script
            codes, errors = ends(start_two(script, [*argv, f"--run={folders[script]}"]))
            assert codes == [0, 0], errors
        return folders[script]

    return run_of


def alive_in_groups(groups, seconds=2):
    """Return what `ps` shows of these process groups after a moment, but for unreaped dead."""
    deadline = time.monotonic() + seconds
    while True:
        table = subprocess.run(
            ["ps", "-A", "-o", "pgid=,stat=,command="], capture_output=True, text=True, check=True
        )
        rows = [line.split(None, 2) for line in table.stdout.splitlines()]
        found = [row for row in rows if int(row[0]) in groups and not row[1].startswith("Z")]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def check_fault(whole, tmp_path, argv, fault, rank, at):
    """Check that both end within 15 s, with their codes and lines, and resume to the bit."""
    script, *argv = argv
    again = [*argv, f"--run={tmp_path}/run"]
    processes = start_two(
        script, again, [FAULTS[fault] if index == rank else None for index in (0, 1)], at
    )
    while not (tmp_path / "run" / "at_fault").exists() and processes[rank].poll() is None:
        time.sleep(0.05)
    began = time.monotonic()
    codes, errors = ends(processes)
    took = time.monotonic() - began
    print(f"{script}, {fault} {rank} {at}: {took:.1f} s, codes {codes}: {errors}")
    assert took < 13
    assert not alive_in_groups([process.pid for process in processes])
    own = {
        "killed": -signal.SIGKILL,
        "stopped": -signal.SIGKILL,
        "stuck": hosts.LOST,
        "raises": 1,
        "sigterm": STOPPED,
    }[fault]
    other = STOPPED if fault == "sigterm" else hosts.LOST
    assert codes[rank] == own and codes[1 - rank] == other
    if fault == "sigterm":
        assert "of 8; the same command goes on" in errors[0]
        assert 3 <= finished_steps(tmp_path / "run" / "checkpoints")[0] < 8
    else:
        # Notes on the data and lines of progress may stand before it.
        [line] = [line for line in errors[1 - rank].splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: process {1 - rank}: ")
        assert "the same command resumes" in line
    codes, errors = ends(start_two(script, again))
    assert codes == [0, 0], errors
    equal(tmp_path / "run", whole(script, *argv), rtol=0)


CASES = [(fault, rank, "step") for fault in FAULTS for rank in (0, 1)] + [
    ("killed", rank, "save") for rank in (0, 1)
]


@pytest.mark.parametrize(
    ("fault", "rank", "at"),
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])],
)
def test_a_fault_of_one_ends_both_and_the_run_resumes_bitwise(whole, tmp_path, fault, rank, at):
    check_fault(whole, tmp_path, LOOP, fault, rank, at)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [("killed", 1, "step"), ("killed", 0, "save"), ("sigterm", 1, "step")]
)
def test_so_it_is_with_a_script_that_packs(whole, tmp_path, case):
    check_fault(whole, tmp_path, PACKED, *case)
    folder = whole(*PACKED)
    assert [row["loss"] for row in rows_of(tmp_path / "run")] == [
        row["loss"] for row in rows_of(folder)
    ]
    manifest = json.loads((folder / "checkpoints" / "8" / "manifest.json").read_text())
    one, two = (extra["position"] for extra in manifest["extra"])
    assert one != two and one["batches"] == two["batches"] == 8  # their positions in the data


@pytest.mark.slow
def test_hosts_that_tensor_spans_equal_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr("data.batches.PACKING_WINDOW", 16)  # as in the two processes
    codes, errors = ends(
        start_two("train_sft", [*PACKED[1:], "--mesh.tensor=2", f"--run={tmp_path}/two"])
    )
    assert codes == [0, 0], errors
    run(train_sft, *PACKED[1:], f"--run={tmp_path}/one", "--mesh.data=1", "--mesh.fsdp=8")
    equal(tmp_path / "two", tmp_path / "one", atol=1e-4)


@pytest.mark.slow
def test_every_script_runs_on_two_and_evaluates(tmp_path):
    r = tmp_path
    short = ["--optimizer.warmup=0", "--steps=2", "--eval_every=2", "--batch_size=16"]
    sampled = [*short, f"--init={r}/train_sft", "--max_prompt=48", "--max_new_tokens=8"]
    with_reward = [*sampled, f"--reward={r}/train_rm"]
    flags = {
        "train_lm": [*short, "--model.preset=tiny"],
        "train_sft": [*short, f"--init={r}/train_lm"],
        "train_rm": [*short, f"--init={r}/train_sft", "--length=64"],
        "train_dpo": [*sampled, "--length=64"],
        "train_distill": [*sampled, f"--teacher={r}/train_sft", "--on_policy=0.5"],
        "train_ppo": [*with_reward, "--minibatches=2"],
        "train_grpo": [*with_reward, "--minibatches=2", "--samples_per_prompt=2"],
        "train_raft": [*with_reward, "--samples_per_prompt=2"],
    }
    for script, argv in flags.items():
        codes, errors = ends(start_two(script, [*argv, f"--run={r}/{script}"], stall=60))
        assert codes == [0, 0], f"{script}: {errors}"
        rows = rows_of(r / script)
        assert len(rows) == 2 and errors[1] == "" and np.isfinite(list(rows[-1].values())).all()


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
def test_hosts_that_hold_the_same_rows_read_the_same_data():
    def read(shape, hosts_of):
        """Return the part that each host reads, were the mesh's devices those of `hosts_of`."""
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        owner = np.array(hosts_of).reshape(shape)
        return [data_shard(mesh, owner, host) for host in sorted(set(hosts_of))]

    apart = [{"process": 0, "processes": 2}, {"process": 1, "processes": 2}]
    assert read((8, 1, 1), [0] * 4 + [1] * 4) == apart == read((2, 1, 4), [0] * 4 + [1] * 4)
    assert read((1, 4, 2), [0] * 4 + [1] * 4) == apart
    assert read((1, 1, 8), [0] * 4 + [1] * 4) == [{"process": 0, "processes": 1}] * 2
    assert read((2, 1, 4), [0, 0, 1, 1] * 2) == [{"process": 0, "processes": 1}] * 2
    with pytest.raises(UserError, match="hosts share rows of the batch in part"):
        read((4, 1, 2), [0, 0, 0, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"coordinator": "127.0.0.1:9"}, "--hosts.count is missing"),
        ({"coordinator": "127.0.0.1:9", "count": 2}, "--hosts.index is missing"),
        (
            {"coordinator": "localhost", "count": 2, "index": 0},
            "--hosts.coordinator=localhost: must be host:port",
        ),
        (
            {"coordinator": "127.0.0.1:9", "count": 2, "index": 2},
            "--hosts.index=2: must be at least 0 and below",
        ),
        (
            {"coordinator": "127.0.0.1:99999", "count": 2, "index": 1},
            "--hosts.coordinator=127.0.0.1:99999: the port must be in 1..65535",
        ),
        (
            {"coordinator": "127.0.0.1:9", "count": 0, "index": 0},
            "--hosts.count=0: must be at least 1",
        ),
        ({"stall": -1}, "--hosts.stall=-1: must be at least 0"),
    ],
)
def test_incomplete_settings_are_told(flags, told):
    with pytest.raises(UserError, match=told):
        hosts.settings(hosts.HostsConfig(**flags))


def test_the_coordinator_listens_where_it_is_told(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--hosts.bind={address}: cannot listen there"):
            hosts.settings(hosts.HostsConfig(coordinator=address, count=2, index=0))
    given = {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1}
    for name, value in {
        "COORDINATOR_ADDRESS": "h:1",
        "NUM_PROCESSES": "2",
        "PROCESS_ID": "1",
    }.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    for config, bind, beat, wait in (
        (hosts.HostsConfig(stall=7), "h:1", 7, 300),
        (hosts.HostsConfig(bind="i:2", wait=900), "i:2", 100, 900),
        (hosts.HostsConfig(coordinator="h:1"), "h:1", 100, hosts.NAMED_WAIT),
    ):
        options = {
            "coordinator_bind_address": bind,
            "heartbeat_timeout_seconds": beat,
            "initialization_timeout": wait,
        }
        assert hosts.settings(config) == {**given, **options}
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(UserError, match="JAX_PROCESS_ID=one: must be a number"):
        hosts.settings(hosts.HostsConfig())


def test_without_others_nothing_is_joined(monkeypatch):
    assert hosts.settings(hosts.HostsConfig()) is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a job of one task
    assert hosts.settings(hosts.HostsConfig()) is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "many")
    with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS=many: must be a number"):
        hosts.settings(hosts.HostsConfig())
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # JAX finds the rest out
    assert hosts.settings(hosts.HostsConfig())["coordinator_address"] is None


def test_whatever_is_done_is_progress(monkeypatch):
    """A long evaluation, a save or preparing data does not end a run; standing still does."""
    ended = []
    monkeypatch.setattr(hosts, "die_lost", ended.append)
    monkeypatch.setattr(hosts, "_steps", 1)

    class Clock:
        """Waits no time; `work(second)` is what the run does in each second."""

        def __init__(self, seconds, work):
            self.second, self.seconds, self.work = 0, seconds, work

        def wait(self, timeout):
            self.second += 1
            self.work(self.second)
            return self.second > self.seconds or bool(ended)

    device = jax.numpy.ones(3)
    hosts._watch(4, None, Clock(30, lambda second: second % 3 or to_host(device)))
    assert ended == []
    hosts._watch(4, None, Clock(30, lambda second: second % 3 or hosts.progressed()))
    assert ended == []
    hosts._watch(4, None, Clock(30, lambda second: None))
    assert "no step finished in 4 s" in ended[0]
