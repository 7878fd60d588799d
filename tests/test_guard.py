"""The loss-spike guard: what it sees and leaves out; the run stays a function of its folder."""

import importlib
import json
import pathlib
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from running import rows_of, run
from test_kill import SCRIPTS, without_times
from test_kill import folder as folder

import train_distill
import train_lm
from data.batches import Batches
from runtime import guard
from runtime.errors import UserError
from train_state import load_params

LM = [
    "--model.preset=tiny",
    "--optimizer.warmup=0",
    "--batch_size=8",
    "--length=32",
    "--eval_every=0",
    "--mesh.fsdp=8",
]


def poison(monkeypatch, numbers):
    """Fill batches of these numbers with random tokens, all predicted."""
    clean = Batches.__next__

    def poisoned(self):
        batch = clean(self)
        number = self.state["batches"]
        if number in numbers:
            rng = np.random.default_rng(number)
            noise = rng.integers(8, 400, batch["tokens_BT"].shape).astype(np.int32)
            batch = {
                **batch,
                "tokens_BT": noise,
                "loss_mask_BT": np.ones_like(batch["loss_mask_BT"]),
            }
        return batch

    monkeypatch.setattr(Batches, "__next__", poisoned)


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, load_params(str(one)), load_params(str(other)))


def test_deviations_are_those_of_a_log_normal_distribution():
    rng = np.random.default_rng(0)
    history = np.exp(rng.normal((1.5, 0.0), (0.1, 0.2), (20_001, 2)))
    values = np.exp(np.array([1.7, 0.6]))
    np.testing.assert_allclose(guard.deviations(history, values), (2, 3), rtol=0.05)
    # Several histories at once.
    several = guard.deviations(np.stack([history, history * 2]), np.stack([values, values * 2]))
    np.testing.assert_allclose(several, [(2, 3)] * 2, rtol=0.05)
    # No spread at all: one percent of the median counts as one deviation.
    flat = np.tile([4.0, 2.0], (32, 1))
    values = np.array([4.0 * np.exp(0.1), 2.0])
    np.testing.assert_allclose(guard.deviations(flat, values), (10, 0), atol=1e-6)


def healthy(seed, steps=40_000, spread=(0.3, 0.3)):
    """Draw losses and gradient norms of a run of small batches, [S, 2].

    In 40,000 steps of the tiny world model at 8 rows a batch the `spread` of their logarithms was
    0.16 and 0.2, and their deviations were correlated by 0.65: less than here.
    """
    rng = np.random.default_rng(seed)
    loss_S, other_S = rng.normal(size=(2, steps))
    norm_S = 0.8 * loss_S + 0.6 * other_S
    # Training goes on meanwhile: the loss falls and the norm rises.
    progress_S = np.linspace(0, 1, steps)
    loss_S = 2.0 * np.exp(spread[0] * loss_S - 0.7 * progress_S)
    norm_S = 1.8 * np.exp(spread[1] * norm_S + 0.7 * progress_S)
    return np.stack([loss_S, norm_S], axis=1)


def alarms(config, series_S2):
    """Return the steps of a series, from 0, that are spikes."""
    window_N2W = np.lib.stride_tricks.sliding_window_view(series_S2[:-1], config.window, axis=0)
    above_N2 = guard.deviations(window_N2W.swapaxes(1, 2), series_S2[config.window :])
    # Only these need a closer look.
    found = []
    for step in np.flatnonzero(above_N2.min(1) > config.threshold) + config.window:
        history = series_S2[max(0, step - config.history) : step].tolist()
        if guard.is_spike(config, history, series_S2[step].tolist()):
            found.append(int(step))
    return found


def test_a_healthy_run_of_forty_thousand_noisy_steps_is_left_alone(monkeypatch):
    config = guard.GuardConfig()
    for seed in range(3):
        assert alarms(config, healthy(seed)) == []
    # Control: as they are, not in logarithms, steps of the same series stand out.
    monkeypatch.setattr(guard, "TIMES_OWN_NOISE", 0.0)
    series = healthy(0)
    assert len(alarms(config, np.exp(series / series.mean(0)))) > 5


def test_a_run_of_heavy_tails_says_itself_what_is_usual(monkeypatch):
    """One step in a hundred is of a few hard rows, as where a batch has one row."""
    rng = np.random.default_rng(5)
    series = healthy(4, spread=(0.16, 0.2))
    is_hard = rng.uniform(size=(len(series), 1)) < 0.01
    series *= np.where(is_hard, np.exp(rng.normal(1.1, 0.2, is_hard.shape)), 1)
    config = guard.GuardConfig()
    with_own_noise = alarms(config, series)
    monkeypatch.setattr(guard, "TIMES_OWN_NOISE", 0.0)
    without = alarms(config, series)
    print(f"alarms with the run's own noise {with_own_noise}, without {len(without)}")
    # Nothing is known of a run at its start.
    assert len(without) > 50 and all(step < 200 for step in with_own_noise)


@pytest.mark.parametrize("steps", [100, 5_000])
def test_a_divergence_is_seen_within_a_few_steps(steps):
    config = guard.GuardConfig()
    spread = (0.16, 0.2)
    # Loss and norm double with every step from here on.
    series = healthy(1, steps + 20, spread)
    series[steps:] *= 2.0 ** np.arange(1, 21)[:, None]
    assert steps <= alarms(config, series)[0] < steps + 5
    # One batch far above the others, as of random tokens.
    series = healthy(2, steps + 1, spread)
    series[steps] = np.median(series[-33:], axis=0) * (4, 6)
    assert alarms(config, series) == [steps]
    # Control: a hard batch among others.
    series[steps] = np.median(series[-33:], axis=0) * (1.5, 1.7)
    assert alarms(config, series) == []


def test_a_spike_is_of_loss_and_gradient_both_and_needs_a_history():
    config = guard.GuardConfig()
    rng = np.random.default_rng(1)
    history = rng.normal((3.0, 1.0), 0.1, (64, 2)).tolist()
    assert guard.is_spike(config, history, [6.0, 4.0])
    assert not guard.is_spike(config, history, [6.0, 1.0])  # a hard batch
    assert not guard.is_spike(config, history, [3.0, 4.0])  # clipping deals with it
    assert not guard.is_spike(config, history[:15], [6.0, 4.0])
    assert not guard.is_spike(guard.GuardConfig(threshold=0), history, [6.0, 4.0])
    assert (
        guard.watched({"loss": float("nan"), "grad_norm": 1.0})
        is guard.watched({"loss": 1.0})
        is None
    )


@pytest.mark.slow
def test_poison_is_skipped(tmp_path, monkeypatch, capfd):
    argv = [*LM, "--steps=66", "--keep_checkpoints=9", "--save_every=20", "--guard.skip=2"]
    poison(monkeypatch, {64})
    run(train_lm, *argv, f"--run={tmp_path}/run")
    assert (
        "loss spike at step 64: back to step 60; batches 63 to 64 are left out"
        in capfd.readouterr().err
    )
    [spike] = json.loads((tmp_path / "run" / "left_out.json").read_text())
    assert spike == {"step": 64, "resumed_after": 60, "batches": [63, 64]}
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, 67))


@pytest.mark.slow
def test_a_run_that_left_batches_out_resumes_bitwise(tmp_path, monkeypatch):
    argv = [*LM, "--steps=66", "--keep_checkpoints=9", "--save_every=20", "--guard.skip=2"]
    poison(monkeypatch, {64})
    run(train_lm, *argv, f"--run={tmp_path}/run")
    # From before the spike; and as if killed while going back: it is found again.
    for kept in ("left_out.json", None):
        shutil.copytree(tmp_path / "run", tmp_path / str(kept))
        for step in (40, 60, 66) if kept else (60, 66):
            shutil.rmtree(tmp_path / str(kept) / "checkpoints" / str(step))
        if not kept:
            (tmp_path / "None" / "left_out.json").unlink()
        run(train_lm, *argv, f"--run={tmp_path}/{kept}")
        assert json.loads((tmp_path / str(kept) / "left_out.json").read_text())[0]["batches"] == [
            63,
            64,
        ]
        equal(tmp_path / str(kept), tmp_path / "run")


def test_spikes_count_within_a_thousand_steps(tmp_path):
    config = SimpleNamespace(run=str(tmp_path), guard=guard.GuardConfig(skip=1, most=2))
    (tmp_path / "config.json").write_text(json.dumps({"script": "train_lm", "guard": {"skip": 1}}))
    guard.go_back(config, 10)
    guard.go_back(config, 500)
    with pytest.raises(UserError, match=r"at step 1009; .*of 1,000 steps"):
        guard.go_back(config, 1009)
    guard.go_back(config, 1010)  # the first is a thousand steps ago
    assert [spike["step"] for spike in guard._spikes(str(tmp_path))] == [10, 500, 1010]


@pytest.mark.slow
def test_too_many_spikes_end_the_run_and_what_is_good_stays(tmp_path, monkeypatch):
    poison(monkeypatch, {64, 65})
    argv = [
        *LM,
        "--steps=70",
        "--guard.skip=1",
        "--guard.most=1",
        "--save_every=30",
        f"--run={tmp_path}/run",
    ]
    with pytest.raises(
        UserError, match=r"spiked more than --guard.most=1 times, now at step 64; lower"
    ):
        run(train_lm, *argv)
    assert (tmp_path / "run" / "checkpoints" / "60").exists()


@pytest.mark.slow
def test_poison_costs_less_than_one_percent(tmp_path, monkeypatch):
    argv = [*LM, "--steps=400", "--eval_every=400", "--save_every=50"]
    run(train_lm, *argv, f"--run={tmp_path}/clean")
    poison(monkeypatch, {233})
    run(train_lm, *argv, f"--run={tmp_path}/guarded")
    assert (tmp_path / "guarded" / "left_out.json").exists() and not (
        tmp_path / "clean" / "left_out.json"
    ).exists()
    clean, guarded = (rows_of(tmp_path / name)[-1]["eval/loss"] for name in ("clean", "guarded"))
    print(f"held-out loss: clean {clean:.4f}, guarded {guarded:.4f}")
    assert abs(guarded / clean - 1) < 0.01


@pytest.mark.slow
def test_silent_on_twenty_clean_runs(tmp_path):
    largest = []
    for seed in range(20):
        run(
            train_lm,
            *LM,
            "--steps=200",
            "--save_every=0",
            "--mesh.data=1",
            f"--seed={seed}",
            f"--run={tmp_path}/{seed}",
        )
        assert not (tmp_path / str(seed) / "left_out.json").exists()
        rows = np.array([[row["loss"], row["grad_norm"]] for row in rows_of(tmp_path / str(seed))])
        largest.append(
            np.max(
                [guard.deviations(rows[max(0, i - 32) : i], rows[i]) for i in range(16, 200)],
                axis=0,
            )
        )
    most = np.max(largest, axis=0).round(1)
    print(f"largest deviations over 20 runs, of loss and gradient norm: {most}")


def test_every_script_that_trains_has_the_guard():
    for script in SCRIPTS:
        config = importlib.import_module(script).Config()
        assert isinstance(config.guard, guard.GuardConfig), script


def test_of_a_policy_the_change_is_watched_and_not_the_loss():
    row = {"policy/loss": -0.1, "policy/grad_norm": 2.0, "policy/approx_kl": 0.5}
    assert guard.watched(row) == ("policy/approx_kl", [0.5, 2.0])
    assert guard.watched({**row, "loss": 3.0, "grad_norm": 4.0}) == ("loss", [3.0, 4.0])
    assert guard.watched({**row, "policy/approx_kl": None}) is None
    # RAFT's, which is a likelihood.
    likelihood = {"policy/loss": 3.0, "policy/grad_norm": 2.0}
    assert guard.watched(likelihood) == ("policy/loss", [3.0, 2.0])


def test_each_stream_of_distillation_leaves_out_its_own_batches(monkeypatch):
    """Against the loop: what a run without spikes reads, less what is left out."""
    config = train_distill.Config(on_policy=0.4, steps=40)
    left_out = frozenset({3, 4, 5, 20, 21, 37})
    monkeypatch.setattr(train_distill, "left_out", lambda run: left_out)

    # The batches of all numbers, each by its number within its stream.
    counts = {"prompts": 0, "batches": 0}
    batches = {}
    for number in range(1, 60):
        stream = "prompts" if train_distill.is_own(config, number) else "batches"
        counts[stream] += 1
        batches[number] = (stream, counts[stream])
    without = train_distill.left_out_of_streams(config)
    assert {batches[number] for number in left_out} == {
        (stream, count) for stream, numbers in without.items() for count in numbers
    }

    # So a stream without them gives each step the batch of its number.
    remaining = {
        stream: iter(sorted(set(range(1, 60)) - numbers)) for stream, numbers in without.items()
    }
    numbers = guard.batches_of_steps(config.steps, left_out)
    assert len(numbers) == 40 and not left_out & set(numbers)
    own = train_distill.own_steps(config)
    for number, is_own in zip(numbers, own, strict=True):
        stream, count = batches[number]
        assert is_own == (stream == "prompts") and next(remaining[stream]) == count


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_goes_back_from_a_spike_and_resumes_to_the_bit(script, folder, monkeypatch):
    monkeypatch.chdir(folder)
    module = importlib.import_module(script)
    flags = [*SCRIPTS[script], "--keep_checkpoints=9", "--guard.skip=2"]
    run(module, *flags, f"--run={script}-calm")

    # The fourth step is a spike, once.
    steps = []

    def is_spike(config, history, values):
        steps.append(values)
        return len(steps) == 4

    with monkeypatch.context() as patch:
        patch.setattr("runtime.metrics.is_spike", is_spike)
        run(module, *flags, f"--run={script}-spiked")
    (spike,) = json.loads(pathlib.Path(f"{script}-spiked/left_out.json").read_text())
    assert (spike["step"], spike["resumed_after"], spike["batches"]) == (4, 2, [3, 4])
    calm, spiked = (rows_of(pathlib.Path(f"{script}-{name}")) for name in ("calm", "spiked"))
    assert [row["step"] for row in spiked] == [1, 2, 3, 4, 5, 6]
    # Before the spike all is as it was, and after it nothing.
    same = [a == b for a, b in zip(without_times(calm), without_times(spiked), strict=True)]
    assert same == [True, True, False, False, False, False]

    # As if killed at the fifth step.
    shutil.copytree(f"{script}-spiked", f"{script}-again")
    shutil.rmtree(f"{script}-again/checkpoints/6")
    run(module, *flags, f"--run={script}-again")
    equal(f"{script}-again", f"{script}-spiked")
