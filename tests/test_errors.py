"""A user's mistakes: one line on stderr, exit code 2, nothing half-written."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from running import fails

import evaluate
import generate
import train_ppo
import train_rm
import train_sft
from collect import rank as collect
from collect import spin as collect_spin
from model_config import ModelConfig
from runtime import flags
from runtime.errors import TryAgain, UserError
from runtime.run_folder import load_model_config
from weights import convert

TINY = [
    "--model.preset=tiny",
    "--length=32",
    "--batch_size=8",
    "--steps=2",
    "--optimizer.warmup=0",
    "--eval_every=0",
]


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    """Make a finished two-step run on a file of conversations."""
    folder = tmp_path_factory.mktemp("good")
    chats = folder / "chats.jsonl"
    chats.write_text(
        "".join(json.dumps({"prompt": f"say {i}", "response": f"{i}!"}) + "\n" for i in range(200))
    )
    argv = [*TINY, f"--data={chats}", f"--run={folder / 'run'}"]
    train_sft.main(flags.parse(train_sft.Config, argv))
    return folder / "run"


def write(path, *lines):
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return str(path)


def damage(path):
    """Flip one bit in the middle of the largest file below `path`."""
    file = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


CHAT = {"prompt": "a", "response": "b"}
MISTAKES = {
    "unknown flag": (train_sft, ["--batchsize=4"], "batchsize"),
    "flag of another type": (train_sft, ["--steps=many"], "steps"),
    "flag without a value": (train_sft, ["--run"], "--run"),
    "unknown preset": (train_sft, ["--model.preset=gpt5"], "gpt5"),
    "heads not divisible": (train_sft, ["--model.heads=4", "--model.kv_heads=3"], "kv_heads"),
    "odd head width": (train_sft, ["--model.head_dim=7"], "head_dim"),
    "no layers": (train_sft, ["--model.layers=0"], "layers"),
    "batch does not split": (
        train_sft,
        [*TINY, "--batch_size=12", "--microbatches=5"],
        "microbatches",
    ),
    "mesh does not fit": (train_sft, [*TINY, "--mesh.data=3", "--mesh.fsdp=5"], "mesh"),
    "two rests": (train_sft, [*TINY, "--mesh.data=-1", "--mesh.fsdp=-1"], "mesh"),
    "sequence too long": (train_sft, [*TINY, "--length=1000"], "context"),
    "warm-up too long": (
        train_sft,
        [*TINY, "--optimizer.warmup=9"],
        "below the 2 steps; lower it, or raise --steps",
    ),
    "steps below 1": (train_sft, ["--steps=-5"], "--steps=-5: must be at least 1"),
    "no steps": (train_ppo, ["--steps=0"], "--steps=0: must be at least 1"),
    "no folder": (train_sft, [*TINY, "--run="], "--run=: names no folder; give one"),
    "too long a name": (train_sft, [*TINY, f"--run={'r' * 300}"], "File name too long"),
    "a name too long for data": (train_sft, [*TINY, f"--data={'d' * 300}.jsonl"], "no such file"),
    "a name too long to start from": (train_sft, [f"--init={'i' * 300}"], "name too long"),
    "a name too long for a catalogue": (train_sft, [*TINY, f"--data=tfds:{'t' * 300}"], "tfds:t"),
    "a name too long for a tokenizer": (train_sft, [*TINY, f"--tokenizer={'t' * 300}"], "ttt"),
    "a name too long to read": (convert, [f"--read={'r' * 300}"], "rrr"),
    "a name too long to write": (convert, [f"--write={'w' * 300}", "--run=nowhere"], "nowhere"),
    "no such source": (train_sft, [*TINY, "--data=chats.csv"], "chats.csv"),
    "no such file": (train_sft, [*TINY, "--data=nowhere.jsonl"], "nowhere.jsonl"),
    "no such catalogue name": (train_sft, [*TINY, "--data=tfds:gms8k"], "gms8k"),
    "no such run to start from": (train_sft, ["--init=nowhere"], "nowhere: no run here"),
    "nor with a preset": (train_sft, [*TINY, "--init=nowhere"], "nowhere: no run here"),
    "no such tokenizer": (train_sft, [*TINY, "--tokenizer=nowhere.model"], "nowhere.model"),
    "nothing to sample from": (generate, ["--run=nowhere", "--prompt=a"], "nowhere"),
    "temperature below 0": (
        generate,
        ["--temperature=-1"],
        "--temperature=-1.0: must be at least 0",
    ),
    "no samples": (collect, ["--samples=1"], "samples"),
    "no prompts": (collect_spin, ["--prompts=0"], "--prompts=0: must be at least 1"),
    "no policy to align": (train_ppo, ["--init=nowhere"], "nowhere"),
    "nothing to evaluate": (evaluate, ["--run=nowhere"], "nowhere"),
    "language-model loss without an unembedding": (
        train_rm,
        ["--model.preset=tiny", "--model.tied=False", "--lm_coef=1", "--batch_size=8"],
        "lm_coef",
    ),
}
BAD_ROWS = {
    "not JSON": ("{oops\n", "line"),
    "not closed": ('{"prompt": 1\n', "line: is not JSON (Expecting ',' delimiter, column 13)"),
    "not an object": ("[1]\n", "line"),
    "missing field": ({"prompt": "a"}, "messages: missing"),
    "wrong type": ({"prompt": "a", "response": 3}, "response"),
    "empty": ({"prompt": "a", "response": ""}, "response"),
    "unknown role": ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_flag_is_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, argv, place = MISTAKES[name]
    assert place in fails(script, argv, capsys)
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_names_file_line_and_field(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row, field = BAD_ROWS[name]
    path = write(tmp_path / "chats.jsonl", CHAT, CHAT, row)
    assert f"{path}:3: {field}" in fails(train_sft, [*TINY, f"--data={path}"], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["chats.jsonl"]


def test_another_configuration_or_tokenizer_is_refused(good_run, capsys, tmp_path):
    data = f"--data={json.loads((good_run / 'config.json').read_text())['data']}"
    before = sorted((p, p.stat().st_mtime_ns) for p in good_run.rglob("*") if p.is_file())
    other = [*TINY, data, f"--run={good_run}", "--seed=7"]
    line = fails(train_sft, other, capsys)
    assert "seed" in line and "7" in line and "0" in line
    wider = [*TINY, data, f"--run={tmp_path / 'x'}", f"--init={good_run}", "--model.width=64"]
    assert "width" in fails(train_sft, wider, capsys)
    # Another script's run is told as such, not by a field that only one of the two has.
    ranked = fails(train_rm, [*TINY, f"--run={good_run}"], capsys)
    assert f"{good_run}: a run of train_sft; name another --run" in ranked
    assert f"start from it with --init={good_run}" in ranked
    # The same path with other rows is other data.
    chats = good_run.parent / "chats.jsonl"
    rows = chats.read_text()
    chats.write_text(rows + json.dumps(CHAT) + "\n")
    changed = fails(train_sft, [*TINY, data, f"--run={good_run}", "--steps=4"], capsys)
    assert f"{data}: its content is not what {good_run} began with" in changed
    chats.write_text(rows)
    assert sorted((p, p.stat().st_mtime_ns) for p in good_run.rglob("*") if p.is_file()) == before
    assert "train_sft" in fails(
        train_ppo, [f"--init={good_run}", f"--reward={good_run}", "--batch_size=32"], capsys
    )


def test_each_end_has_its_line_and_its_code(capsys):
    """As a command ends: a mistake, what may go well next time, a full disk, Ctrl-C."""
    full = OSError(errno.ENOSPC, "No space left on device", "runs/sft/samples.md")
    wrapped = RuntimeError(
        'Failed to write split "train": write() failed: No space left on device'
    )
    ends = {
        UserError("a: wrong; mend it"): (2, "error: a: wrong; mend it"),
        TryAgain("a: late"): (75, "error: a: late"),
        full: (2, "error: runs/sft/samples.md: no space left; free some, then try again"),
        wrapped: (2, "error: the disk: no space left; free some, then try again"),
        KeyboardInterrupt(): (130, "stopped by the keyboard"),
        KeyboardInterrupt("run: stopped at step 5 of 9"): (130, "run: stopped at step 5 of 9"),
    }
    for fault, (code, line) in ends.items():

        def main(fault=fault):
            raise fault

        with pytest.raises(SystemExit) as stop:
            flags.ending_in_one_line(main)
        assert stop.value.code == code and capsys.readouterr().err == f"{line}\n"


def test_a_bug_is_a_traceback():
    with pytest.raises(KeyError):
        flags.ending_in_one_line(lambda: {}["w"])


def test_ctrl_c_while_a_command_imports_is_one_line(tmp_path):
    """The signal comes as the first thing that is imported after the handler is there."""
    script = tmp_path / "script.py"
    slow = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ImportError('pages')"
    (tmp_path / "slow.py").write_text(slow)
    for first, code in (("import runtime.interrupt", 130), ("", 1)):
        caught = "try:\n    import slow\nexcept BaseException as e:\n    raise ImportError from e"
        script.write_text(f"{first}\n{caught}")
        root = str(pathlib.Path(__file__).parents[1])
        ended = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == code
        assert (ended.stderr == "stopped by the keyboard\n") == (code == 130)


DAMAGED = {
    "earlier": ["x", {}, [3], [{"seed": 3}]],
    "model_code": [3, []],
    "model": [[], {"rope_yarn": [1]}, {"rope_llama3": [1, 2]}, {"window_pattern": 3}],
}


@pytest.mark.parametrize("field", DAMAGED)
def test_a_damaged_config_of_a_run_is_one_line(field, tmp_path):
    for value in DAMAGED[field]:
        config = {"script": "train_sft", "model": {}, field: value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=rf"config\.json: .*{field}") as fault:
            load_model_config(str(tmp_path), ModelConfig)
        assert "restore the file" in str(fault.value)


def test_a_folder_that_is_not_a_run_is_left_alone(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert str(tmp_path) in fails(train_sft, [*TINY, f"--run={tmp_path}"], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_flipped_bit_is_never_loaded(good_run, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(good_run, copy)
    damage(next((copy / "checkpoints").iterdir()) / "params")
    assert str(copy) in fails(generate, [f"--run={copy}", "--prompt=a"], capsys)
