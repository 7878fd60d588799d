"""Records and reports: one step late, cut at resume, readable without a terminal, safe HTML."""

import errno
import hashlib
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto.event_pb2 import Event

from planning.dry_run import describe
from runtime import metrics
from runtime.board import framed
from runtime.errors import UserError
from runtime.metrics import Recorder
from runtime.report import alignment_report, run_report
from runtime.rows import Rows, read_rows
from runtime.samples import append_samples, cut_samples, last_samples
from runtime.terminal import printable
from train_state import init_state
from train_step import make_train_step


class Watched:
    """A scalar that notes when it is fetched."""

    def __init__(self, value, fetched):
        self.value, self.fetched = value, fetched

    def __array__(self, dtype=None, copy=None):
        self.fetched.append(self.value)
        return np.asarray(self.value, dtype)


@pytest.fixture
def run(tmp_path):
    config = {"script": "train_sft", "run": "<b>runs</b>", "model": {"layers": 2}, "steps": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_values_are_fetched_one_step_late(run):
    fetched = []
    with Recorder(run, 3) as record:
        for step in record.steps():
            record(step, {"loss": Watched(step, fetched)}, tokens=100)
            assert fetched == list(range(1, step))
        assert [row["step"] for row in read_rows(run)] == [1, 2]
    assert fetched == [1, 2, 3] and record.last["loss"] == 3


def test_rows_hold_scalars_pairs_and_later_calls_of_a_step(run):
    with Recorder(run, 2) as record:
        record(
            1, {"loss": jnp.float32(0.5), "accuracy": (jnp.float32(3), jnp.float32(4))}, tokens=64
        )
        record(1, {"eval/loss": 2.0})
        record(2, {"loss": float("nan"), "accuracy": (0.0, 0.0)}, tokens=64)
    first, second = read_rows(run)
    assert (first["loss"], first["accuracy"], first["eval/loss"]) == (0.5, 0.75, 2.0)
    assert (
        second["loss"] is None and second["accuracy"] is None and second["tokens_per_second"] > 0
    )
    assert any("tfevents" in path.name for path in (pathlib.Path(run) / "tensorboard").iterdir())


def test_resume_cuts_rows_and_samples_of_steps_to_be_done_again(run):
    with Recorder(run, 4) as record:
        for step in record.steps():
            record(step, {"loss": 1.0 * step})
            record.samples(step, [{"prompt": "p", "response": f"r{step}"}])
    with (pathlib.Path(run) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    with Recorder(run, 5, start=2) as record:
        assert list(record.steps()) == [3, 4, 5]
        for step in record.steps():
            record(step, {"loss": 10.0 * step})
    rows = read_rows(run)
    assert [row["loss"] for row in rows] == [1, 2, 30, 40, 50]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert last_samples(run) == [{"prompt": "p", "response": "r2"}]


def test_without_a_terminal_there_are_lines_and_no_carriage_returns(run, capfd):
    with Recorder(run, 3) as record:
        for step in record.steps():
            record(step, {"loss": 1.25}, tokens=10)
            record.samples(step, [{"prompt": "word " * 60, "response": "yes"}] * 5)
    err = capfd.readouterr().err
    assert (
        "\r" not in err
        and "step 3/3  loss 1.250" in err
        and err.count("left") == err.count("00:00 left") == 1
    )
    assert err.count("response: yes") == 6  # two a call
    assert max(map(len, err.splitlines()[:-1])) <= 80


def test_what_is_held_out_is_told_and_time_left_from_the_second_step_on(run, capfd):
    with Recorder(run, 3) as record:
        for step in record.steps():
            record(step, {"loss": 1.25, "accuracy": 0.5}, tokens=10)
            record(step, {"eval/loss": 2.5, "eval/accuracy": 0.75, "eval/margin": 3.0})
    lines = capfd.readouterr().err.splitlines()[:-1]
    told = "loss 1.250 (held out 2.500)  accuracy 0.500 (held out 0.750)"
    assert lines[0] == f"step 1/3  {told}" and len(lines) == 3 and max(map(len, lines)) <= 80
    assert lines[1].startswith(f"step 2/3  {told}")


def one_parameter_loss(params, batch):
    """Return params * sum of the batch, of weight 1."""
    return (params * batch).sum(), (1.0, {})


def test_compilations_of_the_step_are_counted_and_capped(run, monkeypatch):
    monkeypatch.setattr(metrics, "MOST_COMPILATIONS", 2)
    step = make_train_step(one_parameter_loss, optax.sgd(0.1))
    state = init_state(jnp.float32(1), optax.sgd(0.1))
    with pytest.raises(UserError, match="compiled 3 times by step 5"), Recorder(run, 6) as record:
        for number, length in enumerate([3, 3, 4, 3, 5, 5], 1):
            state, values = step(state, jnp.ones(length))
            record(number, values)
    assert [row.get("compilations") for row in read_rows(run)] == [1, None, 2, None]


def test_compilations_are_those_of_make_train_step_whatever_a_fork_calls_it(run):
    """A fork's names do not hide them; and another function called `step` is not one."""
    objective = one_parameter_loss
    my_quantile_update = make_train_step(objective, optax.sgd(0.1))
    state = init_state(jnp.float32(1), optax.sgd(0.1))

    @jax.jit
    def step(x):
        return x + 1

    with Recorder(run, 2) as record:
        record(1, {"loss": step(jnp.ones(3))[0]})
        record(1, {"loss": step(jnp.ones(4))[0]})
        state, values = my_quantile_update(state, jnp.ones(3))
        record(2, values)
    assert [row.get("compilations") for row in read_rows(run)] == [None, 1]


def test_a_fault_in_the_loop_keeps_the_rows_and_shows_itself(run):
    with pytest.raises(ZeroDivisionError), Recorder(run, 3) as record:
        record(1, {"loss": 1.0})
        raise ZeroDivisionError
    assert [row["loss"] for row in read_rows(run)] == [1.0]


def test_run_report_shows_values_and_escapes(run):
    nasty = "<script>alert(1)</script>\n```\n## not a heading\n```"
    with Recorder(run, 60) as record:
        for step in record.steps():
            record(step, {"loss": 1 / step, "<i>odd</i>": 3.0, "eval/loss": 2.0})
        record.samples(
            60, [{"prompt": nasty, "response": "fine"}, {"prompt": "q", "response": ""}]
        )
    assert last_samples(run) == [
        {"prompt": nasty, "response": "fine"},
        {"prompt": "q", "response": ""},
    ]
    page = (pathlib.Path(run) / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "&lt;b&gt;runs&lt;/b&gt;" in page and "<i>odd" not in page and "model.layers" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "60 steps" in page
    assert page.count("<svg") == 2 and "held out" in page


def test_run_report_of_a_run_without_rows(run):
    assert "No metrics were recorded" in pathlib.Path(run_report(run)).read_text()


def test_alignment_report_shows_every_number_and_sample(run, tmp_path):
    with Recorder(run, 5) as record:
        for step in record.steps():
            record(step, {"score": step * 1.0, "kl": step * 2.0, "loss": 1.0})
    entry = {
        "helpful": 0.71,
        "honest": 0.82,
        "harmless": 0.93,
        "all": 0.64,
        "kl": 1.5,
        "length": 20.0,
        "n": 1000,
    }
    entry |= {f"{name}_ci": [value - 0.02, value + 0.02] for name, value in entry.items()}
    entry["kinds"] = {"small <talk>": {"all": 0.55, "all_ci": [0.5, 0.6], "n": 166}}
    summary = {
        "base": entry,
        "sft": entry,
        "ppo": entry,
        "reward_model": {"accuracy": 0.88, "by_criterion": {}},
    }
    answer = {"response": "<img src=x>", "helpful": True, "honest": False, "harmless": True}
    samples = [
        {"prompt": "Who & why?", "kind": "lookup", "base": answer, "sft": answer, "ppo": answer}
    ]
    page = pathlib.Path(
        alignment_report(str(tmp_path), run, run, run, run, summary, samples)
    ).read_text()
    for shown in (
        "71 %",
        "69 % to 73 %",
        "82 %",
        "93 %",
        "64 %",
        "55 %",
        "88 %",
        "small &lt;talk&gt;",
        "✗ honest",
    ):
        assert shown in page
    assert "<img" not in page and "Reward against KL" in page and "Who &amp; why?" in page
    bare = pathlib.Path(
        alignment_report(str(tmp_path), run, run, run, run, {"sft": {"all": 0.5}}, [])
    ).read_text()
    assert "50 %" in bare


def test_describe_is_the_arithmetic_and_short():
    params = {"w": jax.ShapeDtypeStruct((1000, 300), jnp.float32)}
    rest = {"mu": params, "nu": params, "step": jax.ShapeDtypeStruct((), jnp.int32)}
    text = describe("SFT", params, rest, batch_size=32, length=64, steps=600, start=50)
    pairs = describe(
        "RM", params, rest, batch_size=32, length=64, steps=6, candidates=4, data="all"
    )
    assert "32 × 4 sequences of 64: 8,192 tokens a step" in pairs and "data        all" in pairs
    assert (
        "300,000 float32" in text and "2,048 tokens a step" in text and "1,228,800 tokens" in text
    )
    assert "about 4.8 MB a device" in text and "resumed after 50" in text
    assert len(text.splitlines()) <= 10 and max(map(len, text.splitlines())) <= 80


# --- damage


LINES = [b'{"step": %d, "seconds": %d.5, "loss": %d.25}\n' % (i, i, i) for i in range(1, 7)]
"""Rows of six steps, of which the first four are sealed."""


def sealed(rows):
    """Return the seal of these lines, as a checkpoint has it."""
    content = b"".join(rows)
    sha256 = hashlib.sha256(content).hexdigest()
    return {"size": len(content), "rows": len(rows), "sha256": sha256}


def reopened(path, content, seal):
    """Open metrics.jsonl with this content after step 4; return the steps that are kept."""
    path.write_bytes(content)
    rows = Rows(path, 4, seal)
    rows.write({"step": 5, "seconds": rows.seconds, "loss": 0.0})
    rows.close()
    return [row["step"] for row in read_rows(str(path.parent), quiet=True)]


@pytest.mark.parametrize("seal", [sealed(LINES[:4]), None])
def test_whole_rows_are_kept_and_later_ones_cut(tmp_path, capfd, seal):
    path = tmp_path / "metrics.jsonl"
    for later in (
        b"",
        LINES[4],
        LINES[4] + LINES[5],
        LINES[4][:9],
        b"\0" * 40,
        LINES[4] + b"\0\n",
    ):
        assert reopened(path, b"".join(LINES[:4]) + later, seal) == [1, 2, 3, 4, 5]
        assert path.read_bytes().startswith(b"".join(LINES[:4])) and not capfd.readouterr().err
    assert read_rows(str(tmp_path))[-1]["seconds"] == 4.5


def damaged_lines():
    """Return contents in which the second of the rows is no row any more."""
    second = LINES[1]
    others = (
        second.replace(b"{", b"\x7b\x00"),
        second.replace(b":", b"\xba", 1),
        second.replace(b'"', b"'", 1),
        second.replace(b"2.25", b'"2"'),
        b"\0" * (len(second) - 1) + b"\n",
        b"[1, 2]\n",
        b"\n",
        second.replace(b'"step": 2', b'"step": 2.5'),
        second.replace(b"2.25", b"9" * 400),
        second.replace(b"2.25", b"[" * 5000),
        second.replace(b"2.25", b'{"a": 1}'),
    )
    return [LINES[0] + other + b"".join(LINES[2:]) for other in others]


@pytest.mark.parametrize("seal", [sealed(LINES[:4]), None])
def test_a_damaged_row_is_left_out_alone_and_told(tmp_path, capfd, seal):
    path = tmp_path / "metrics.jsonl"
    for content in damaged_lines():
        assert reopened(path, content, seal) == [1, 3, 4, 5], content
        assert "metrics.jsonl:2: damaged" in capfd.readouterr().err
        # It may be resumed again, and stays readable.
        assert reopened(path, path.read_bytes(), seal) == [1, 3, 4, 5]
        assert [row["step"] for row in read_rows(str(tmp_path))] == [1, 3, 4, 5]
        capfd.readouterr()


def test_rows_that_changed_or_went_without_a_trace_are_not_gone_on_with(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    whole = b"".join(LINES)
    changes = {
        "a digit": whole.replace(b"2.25", b"7.25"),
        "a name": whole.replace(b"loss", b"lost", 1),
        "a row gone": whole.replace(LINES[1], b""),
        "the first gone": whole.replace(LINES[0], b""),
        "the last gone": b"".join(LINES[:3]),
        "cut after two": whole[: len(b"".join(LINES[:2]))],
        "cut within the third": whole[: len(b"".join(LINES[:2])) + 9],
        "two rows as one": whole.replace(b"\n", b" ", 1),
        "zeros over two rows": LINES[0] + b"\0" * 99 + whole[len(LINES[0]) + 99 :],
        "a row twice": LINES[0] + whole,
        "empty": b"",
    }
    for name, content in changes.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match="restore the file, or remove it"):
            Rows(path, 4, sealed(LINES[:4]))
        assert path.read_bytes() == content, name
    # Removed on purpose: told, and gone on with.
    path.unlink()
    Rows(path, 4, sealed(LINES[:4])).close()
    assert "rows up to step 4 are lost" in capfd.readouterr().err


def test_a_seal_is_that_of_the_bytes_on_the_disk(run):
    with Recorder(run, 3) as record:
        for step in record.steps():
            record(step, {"loss": 1.0 * step})
        record.flush()
        seal = record.seal()
    content = (pathlib.Path(run) / "metrics.jsonl").read_bytes()
    assert seal == sealed(content.splitlines(keepends=True))
    with Recorder(run, 4, start=3, seal=seal) as record:
        record(4, {"loss": 4.0})
    assert len(read_rows(run)) == 4


def test_headings_and_rules_within_a_sample_are_text(run):
    """Instruction data has lines that look like samples.md's own."""
    path = pathlib.Path(run) / "samples.md"
    texts = [
        "## Step 99\n", "a\n## Step 99\n\n**prompt**\n\n```text\nx\n```\n\n---\n",
        "---\n## Step 1",
        "````text\n## Step 7\n````", "\r## Step 5\r\n", "", "\n", "**response**\n\n```text\n",
    ]  # fmt: skip
    rows = [{"prompt": text, "response": text[::-1]} for text in texts]
    append_samples(path, 1, rows)
    append_samples(path, 2, rows)
    shown = [{name: printable(text) for name, text in row.items()} for row in rows]
    assert last_samples(run) == shown
    whole = path.read_bytes()
    cut_samples(path, 2)
    assert path.read_bytes() == whole
    cut_samples(path, 1)
    assert path.read_bytes() == whole[: len(whole) // 2] and last_samples(run) == shown
    cut_samples(path, 0)
    assert path.read_bytes() == b""


def test_samples_that_are_not_utf_8_are_read(run):
    path = pathlib.Path(run) / "samples.md"
    append_samples(path, 1, [{"prompt": "p", "response": "r"}])
    path.write_bytes(path.read_bytes().replace(b"r\n", b"\xff\n"))
    assert last_samples(run) == [{"prompt": "p", "response": "\ufffd"}]
    assert "report.html" in run_report(run)


CONTROLS = [
    chr(code) for code in (*range(32), *range(127, 160), 0x202E, 0x2066) if chr(code) not in "\n\t"
]


def test_no_control_character_of_a_text_is_shown_or_kept(run, capfd):
    nasty = "".join(CONTROLS) + "\x1b]52;c;ZXZpbA==\x07\ud800"
    kept = "tab\tline\nñ 日本 👩‍🔬 ×"
    with Recorder(run, 1) as record:
        record(1, {"loss": 1.0})
        record.samples(1, [{"prompt": nasty, "response": kept}])
    err = capfd.readouterr().err
    page = pathlib.Path(run_report(run)).read_text()
    markdown = (pathlib.Path(run) / "samples.md").read_text()
    for text in (err, page, markdown):
        assert not set(text) & set(CONTROLS)
    assert kept in page and kept in markdown and "\\x1b]52;c" in err
    assert printable(kept) == kept and printable(printable(nasty)) == printable(nasty)


# --- what training goes on without


def full_disk():
    """Return a file that the system refuses to write: its disk is full."""
    return open("/dev/full", "wb")


def test_a_board_that_cannot_be_written_is_told_once_and_holds_up_nothing(run, capfd):
    with Recorder(run, 40) as record:
        record._board._file.close()
        record._board._file = full_disk()
        for step in record.steps():
            record(step, {"loss": 1.0})
    err = capfd.readouterr().err
    assert (
        err.count("warning: ") == 1
        and "tensorboard: not written" in err
        and len(read_rows(run)) == 40
    )


def test_a_run_folder_in_which_nothing_else_can_be_written_still_trains(run, capfd):
    folder = pathlib.Path(run)
    (folder / "tensorboard").write_text("a file")
    (folder / "samples.md").mkdir()
    (folder / "report.html").mkdir()
    with Recorder(run, 3) as record:
        for step in record.steps():
            record(step, {"loss": 1.0})
            record.samples(step, [{"prompt": "p", "response": "r"}])
    err = capfd.readouterr().err
    assert err.count("warning: ") == 3 and len(read_rows(run)) == 3
    for name in ("tensorboard", "samples.md", "report.html"):
        assert f"{name}: not written" in err


def test_rows_on_a_full_disk_end_the_run_in_a_line(run):
    fault = r"metrics.jsonl: not saved: .*No space left"
    with pytest.raises(UserError, match=fault), Recorder(run, 3) as record:
        record._rows._file.close()
        record._rows._file = full_disk()
        for step in record.steps():
            record(step, {"loss": 1.0})


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("place, size, code", [("run/tensorboard", "4k", 0), ("run", "64k", 2)])
def test_a_run_ends_by_itself_on_a_disk_that_fills(tmp_path, place, size, code):
    """TensorBoard's disk is done without; the run's own ends it in a line. Neither hangs it."""
    script = pathlib.Path(__file__).parents[1] / "train_sft.py"
    command = [sys.executable, str(script), "--model.preset=tiny", "--batch_size=8", "--length=32"]
    command += ["--eval_every=50", "--save_every=0", f"--run={tmp_path / 'run'}"]
    # A folder with files is a run's where the run has begun.
    folder = tmp_path / place
    if place != "run":
        subprocess.run([*command, "--steps=1"], capture_output=True, check=True)
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        ended = subprocess.run(
            [*command, "--steps=150"], capture_output=True, text=True, timeout=300
        )
        rows = read_rows(str(tmp_path / "run"), quiet=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(rows) == 150 if code == 0 else 0 < len(rows) < 150
    assert ended.stderr.count("warning: ") == 1 or "error: " in ended.stderr


def test_half_a_section_of_samples_is_taken_back(run, monkeypatch):
    path = pathlib.Path(run) / "samples.md"
    append_samples(path, 1, [{"prompt": "p", "response": "r"}])
    whole = path.read_bytes()

    class Short(io.FileIO):
        def write(self, content):
            super().write(bytes(content)[:9])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "open", lambda path, mode: Short(path, mode))
    with pytest.raises(OSError, match="No space"):
        append_samples(path, 2, [{"prompt": "p", "response": "r"}])
    monkeypatch.undo()
    assert path.read_bytes() == whole


def events_of(folder):
    """Return [(step, {name: value})] of all event files in TensorBoard's order, purges applied."""
    points = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            assert content[: size + 16] == framed(content[12 : 12 + size])
            content = content[size + 16 :]
            if event.HasField("session_log"):
                points = [point for point in points if point[0] < event.step]
            elif event.HasField("summary"):
                values = {value.tag: value.simple_value for value in event.summary.value}
                points.append((event.step, values))
    return points


@pytest.mark.parametrize("clock", [0, -3600, 3600])
def test_the_board_has_every_step_once_whatever_the_clock_says(run, monkeypatch, clock):
    now = time.time()
    for start, steps in ((0, 4), (2, 4), (4, 6)):
        monkeypatch.setattr("time.time", lambda shift=clock * start / 2: now + shift)
        with Recorder(run, steps, start=start) as record:
            for step in record.steps():
                record(step, {"loss": 10.0 * start + step, "large": 1e300})
                # What a process that is killed now leaves behind.
                if step > start + 1:
                    assert events_of(pathlib.Path(run) / "tensorboard")[-1][0] == step - 1
    points = events_of(pathlib.Path(run) / "tensorboard")
    assert [(step, values["loss"]) for step, values in points] == [
        (1, 1), (2, 2), (3, 23), (4, 24), (5, 45), (6, 46)
    ]  # fmt: skip


def test_the_learning_rate_is_that_of_the_updates_taken(run):
    with Recorder(run, 4, learning_rates=np.array([0.1, 0.2, 0.4, 0.8])) as record:
        # The second update is left out.
        for step, updates in zip(record.steps(), (1, 1, 2, 3), strict=True):
            record(step, {"loss": 1.0, "updates": updates})
    assert [row["learning_rate"] for row in read_rows(run)] == [0.1, 0.2, 0.2, 0.4]
