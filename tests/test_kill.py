"""Twenty kills at any moment: each script's run then equals, file by file, one that had none."""

import os
import pathlib
import random
import re
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from running import rows_of, run
from tensorboardX.proto import event_pb2

import train_rm
import train_sft
from train_state import load_params

ROOT = pathlib.Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "20"))
# Minibatches, prompts and comparisons of eight rows: one a simulated device.
STEPS = ["--optimizer.warmup=0", "--steps=6", "--eval_every=2", "--save_every=1"]
LENGTHS = ["--init=sft", "--max_prompt=48", "--max_new_tokens=8"]
SHORT = [*STEPS, "--batch_size=8"]
SAMPLED = [*SHORT, *LENGTHS]
ONLINE = [*STEPS, "--batch_size=16", *LENGTHS, "--reward=rm"]
SCRIPTS = {
    "train_lm": [*SHORT, "--model.preset=tiny", "--length=32"],
    "train_sft": [*SHORT, "--model.preset=tiny", "--length=32"],
    "train_rm": [*SHORT, "--init=sft", "--length=64"],
    "train_prm": [*SHORT, "--model.preset=tiny", "--length=64", "--data=arithmetic"],
    "train_dpo": [*SAMPLED, "--length=64"],
    "train_distill": [*SAMPLED, "--teacher=sft", "--on_policy=0.5"],
    "train_ppo": [*ONLINE, "--minibatches=2"],
    "train_grpo": [*ONLINE, "--minibatches=2", "--samples_per_prompt=2"],
    "train_raft": [*ONLINE, "--samples_per_prompt=2", "--missing_eos=none"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a folder with the runs `sft` and `rm`, from which others start."""
    path = tmp_path_factory.mktemp("killed")
    before = pathlib.Path.cwd()
    os.chdir(path)
    run(train_sft, *SHORT, "--model.preset=tiny", "--length=32", "--run=sft")
    run(train_rm, *SHORT, "--init=sft", "--length=64", "--run=rm")
    os.chdir(before)
    return path


def start(folder, script, name):
    command = [sys.executable, str(ROOT / f"{script}.py"), *SCRIPTS[script], f"--run={name}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def without_times(rows):
    """Return rows of metrics without what differs between any two starts."""
    timed = {"seconds", "tokens_per_second", "compilations", "peak_memory"}
    return [{name: x for name, x in row.items() if name not in timed} for row in rows]


def scalars(path):
    """Return {(step, name): value} as TensorBoard shows it, of all event files in a folder."""
    shown = {}
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        while len(data) >= 12:
            # A record: its length, a sum, the event, another sum.
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                # A restart: what was written from this step on does not count.
                shown = {key: x for key, x in shown.items() if key[0] < event.step}
            for value in event.summary.value:
                shown[event.step, value.tag] = value.simple_value
    timed = ("tokens_per_second", "compilations", "peak_memory")
    return {key: x for key, x in shown.items() if key[1] not in timed}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_kills_at_any_moment_change_nothing(folder, script):
    began = time.monotonic()
    whole = start(folder, script, f"{script}-whole")
    _, err = whole.communicate()
    assert whole.returncode == 0, err
    took = time.monotonic() - began

    rng = random.Random(1)
    name = f"{script}-killed"
    for _ in range(KILLS):
        process = start(folder, script, name)
        time.sleep(rng.uniform(0, took))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = start(folder, script, name)
    _, err = last.communicate()
    assert last.returncode == 0, err

    one, two = folder / f"{script}-whole", folder / name
    jax.tree.map(np.testing.assert_array_equal, load_params(str(one)), load_params(str(two)))
    assert without_times(rows_of(one)) == without_times(rows_of(two))
    assert (one / "samples.md").exists() == (two / "samples.md").exists()
    if (one / "samples.md").exists():
        assert (one / "samples.md").read_text() == (two / "samples.md").read_text()
    assert scalars(one / "tensorboard") == scalars(two / "tensorboard")
    steps = [sorted(os.listdir(path / "checkpoints")) for path in (one, two)]
    assert steps[0] == steps[1] and all(re.fullmatch(r"\d+", step) for step in steps[0])
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
