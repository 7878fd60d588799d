"""Records and reports: one step late, cut at resume, readable without a terminal, safe HTML."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from planning.dry_run import describe
from runtime import metrics
from runtime.errors import UserError
from runtime.metrics import Recorder
from runtime.report import alignment_report, last_samples, run_report
from runtime.run_folder import read_rows
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
    assert (
        "300,000 float32" in text and "2,048 tokens a step" in text and "1,228,800 tokens" in text
    )
    assert "about 4.8 MB a device" in text and "resumed after 50" in text
    assert len(text.splitlines()) <= 10 and max(map(len, text.splitlines())) <= 80


def test_a_broken_row_is_named(run):
    (pathlib.Path(run) / "metrics.jsonl").write_text('{"step": 1}\nnope\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not JSON"):
        read_rows(run)
