"""The scripts end to end on the world, at toy size; resuming after kill -9; equal over meshes."""

import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from running import ONE_DEVICE, fails, rows_of, run

import evaluate
import generate
import train_lm
import train_ppo
import train_rm
import train_sft
from collect import rank as collect
from evaluation.gold import make_kl_sampler
from model import LanguageModel, ScalarModel, init_and_apply
from model_config import ModelConfig
from responses import load_run
from runtime.errors import UserError
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from train_state import load_params, starting_params

ROOT = pathlib.Path(__file__).parents[1]
MODEL = [
    "--model.preset=tiny",
    "--optimizer.warmup=0",
    "--eval_every=0",
    "--mesh.data=1",
    "--mesh.fsdp=8",
]
SHORT = ["--optimizer.warmup=0", "--eval_every=0"]
KL_TARGET, KL_HORIZON = 0.002, 64
ADAPTED = [f"--kl_target={KL_TARGET}", f"--kl_horizon={KL_HORIZON}", "--optimizer.lr=3e-3"]
"""PPO whose beta adapts to the KL."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Make a folder with lm, sft, comparisons, rm and ppo, each trained for a few steps."""
    r = tmp_path_factory.mktemp("runs")
    rows = ["--batch_size=8", "--length=64"]
    run(train_lm, *MODEL, *rows, f"--run={r}/lm", "--steps=4")
    run(train_sft, *MODEL[1:], *rows, f"--run={r}/sft", f"--init={r}/lm", "--steps=4")
    # Four steps teach no end of turn, so the comparisons are the world's own demonstrators'.
    run(
        train_rm,
        *MODEL[1:],
        f"--run={r}/rm",
        f"--init={r}/sft",
        "--batch_size=8",
        "--length=64",
        "--steps=4",
    )
    ppo = [
        f"--init={r}/sft",
        f"--reward={r}/rm",
        "--batch_size=16",
        "--minibatches=2",
        "--max_prompt=48",
    ]
    short = ["--steps=3", "--max_new_tokens=16", *ADAPTED]
    run(train_ppo, *MODEL[1:], *ppo, f"--run={r}/ppo", *short)
    return r


def test_first_ppo_update_has_ratio_one_and_kl_zero(runs):
    """check_first_update asserts it in the run itself; here is what the run wrote."""
    first = json.loads((runs / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kl"]) < 1e-5 and first["sampler_gap"] < 1e-4
    # By these a run is judged.
    assert first.keys() >= {"ended", "sampler_gap_mean", "sampler_k3", "learning_rate"}
    assert np.isfinite(first["explained_variance"])
    assert first["kl_k3"] >= 0 and 0 <= first["ended"] <= 1


def test_beta_moves_towards_the_target_kl(runs):
    """By the relative error of the KL just measured, at most a fifth, in 16 of 64 responses."""
    rows = rows_of(runs / "ppo")
    beta = 0.2
    for row in rows:
        assert row["kl_coef"] == pytest.approx(beta, rel=1e-5)
        error = np.clip(row["kl"] / KL_TARGET - 1, -0.2, 0.2)
        beta *= 1 + error * 16 / KL_HORIZON
    # Control: it moved, and each step by what was measured then.
    assert rows[1]["kl_coef"] == pytest.approx(0.2 * 0.95, rel=1e-5)
    assert len({row["kl_coef"] for row in rows}) == 3


def test_reward_is_shifted_to_score_good_responses_zero(runs):
    rows = [json.loads(line) for line in (runs / "rm" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert load_params(str(runs / "rm"))["bias"] != 0


def test_a_reward_model_goes_on_from_another_head_and_all(runs):
    stored = load_params(str(runs / "rm"))
    model = ModelConfig.from_preset("tiny")
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    start = starting_params(
        init_and_apply(ScalarModel(model))[0], model, str(runs / "rm"), mesh, seed=1
    )
    jax.tree.map(np.testing.assert_array_equal, stored, start)
    with pytest.raises(UserError, match="name the run of a language model"):
        starting_params(
            init_and_apply(LanguageModel(model))[0], model, str(runs / "rm"), mesh, seed=1
        )


@pytest.mark.slow
def test_a_forks_reward_model_is_one_whatever_its_scripts_name(runs, tmp_path, monkeypatch):
    """A run is what it holds: a reward model has a scalar head."""
    shutil.copy(ROOT / "train_rm.py", tmp_path / "my_rm.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    my_rm = importlib.import_module("my_rm")
    start = [*MODEL[1:], f"--init={runs}/sft", "--batch_size=8", "--length=64"]
    run(my_rm, *start, f"--run={tmp_path}/rm", "--steps=2")
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["script"].endswith("my_rm")

    # PPO takes it as its reward and starts the critic from it.
    ppo = [f"--init={runs}/sft", "--batch_size=16", "--minibatches=2", "--max_prompt=48"]
    short = ["--steps=1", "--max_new_tokens=16"]
    reward = f"--reward={tmp_path}/rm"
    run(train_ppo, *MODEL[1:], *ppo, *short, reward, f"--run={tmp_path}/ppo")
    [row] = rows_of(tmp_path / "ppo")
    assert np.isfinite(row["score"]) and row["score"] == row[f"reward/{tmp_path}/rm"]

    # Control: a language model is none.
    with pytest.raises(UserError, match=r"a language model .*; name the run of a reward model"):
        run(train_ppo, *MODEL[1:], *ppo, *short, f"--reward={runs}/sft", f"--run={tmp_path}/no")


def test_evaluation_writes_what_others_read(runs, capsys):
    summary = run(evaluate, f"--run={runs}", "--n=40", "--max_prompt=48", "--max_new_tokens=8")
    written = json.loads((runs / "summary.json").read_text())
    for model in ("base", "sft", "ppo"):
        for key in ("helpful", "honest", "harmless", "all", "kl", "length"):
            assert f"{key}_ci" in written[model]
        assert written[model]["n"] == 40
        low, high = summary[model]["honest_ci"]
        assert low <= summary[model]["honest"] <= high
    assert abs(summary["sft"]["kl"]) < 1e-4  # the SFT model against itself
    assert (runs / "report.html").stat().st_size > 1000
    assert all(
        len(line) <= 80 for line in capsys.readouterr().out.splitlines() if str(runs) not in line
    )


def test_prompts_too_long_for_the_evaluation_are_cut(runs):
    model, tokenizer, params = load_run(f"{runs}/sft")
    sample_with_kl = make_kl_sampler(model, SamplingConfig(max_new_tokens=2), tokenizer, 16)
    texts = ["what is the capital of sweden? " * 4, "hello."]
    assert len(tokenizer.prompt(texts[0])) > 16
    assert len(sample_with_kl(params, params, texts, 0)) == 2


def test_generate_prints_the_raw_prompt_and_its_continuation_only(runs, capsys):
    [text] = run(
        generate, f"--run={runs}/lm", "--prompt=the capital of", "--raw", "--temperature=0"
    )
    assert capsys.readouterr().out == text + "\n" and text.startswith("the capital of")


def test_collected_comparisons_are_what_the_reward_model_reads(runs, tmp_path):
    out = tmp_path / "comparisons.jsonl"
    counts = run(
        collect, f"--init={runs}/sft", f"--out={out}", "--prompts=64", "--max_new_tokens=32"
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert counts["lines"] == len(lines)
    assert all(
        len(row["responses"]) == len(row["ranking"]) and min(row["ranking"]) == 1 for row in lines
    )


def command(script, *argv):
    return [sys.executable, str(ROOT / f"{script}.py"), *argv]


def five_ppo_iterations(runs, folder):
    ppo = [
        f"--init={runs}/sft",
        f"--reward={runs}/rm",
        "--batch_size=16",
        "--minibatches=2",
        "--max_prompt=48",
    ]
    return [*SHORT, *ppo, "--max_new_tokens=16", "--steps=5", f"--run={folder}"]


@pytest.fixture(scope="module")
def one_device_ppo(runs, tmp_path_factory):
    """Run five iterations on one device, in a process that has no other."""
    folder = tmp_path_factory.mktemp("one_device")
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE}
    argv = command("train_ppo", *five_ppo_iterations(runs, folder / "ppo"))
    subprocess.run(argv, check=True, env=environment, cwd=ROOT, capture_output=True)
    return folder / "ppo"


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 1, 4, 1), (2, 1, 2, 2), (2, 2, 2, 1)]
)
def test_ppo_is_equal_over_meshes(runs, one_device_ppo, tmp_path, mesh):
    axes = [
        f"--mesh.{name}={size}"
        for name, size in zip(("data", "fsdp", "tensor", "sequence"), mesh, strict=True)
    ]
    run(train_ppo, *five_ppo_iterations(runs, tmp_path / "ppo"), *axes)
    ours, theirs = (load_params(str(folder)) for folder in (tmp_path / "ppo", one_device_ppo))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)
    for loss in ("policy/loss", "value/loss"):
        ours, theirs = (
            [row[loss] for row in rows_of(folder)] for folder in (tmp_path / "ppo", one_device_ppo)
        )
        assert len(ours) == 5
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_offloaded_models_change_nothing(runs, tmp_path, monkeypatch):
    kinds = []
    to_memory = train_ppo.to_memory

    def spied(tree, memory):
        tree = to_memory(tree, memory)
        kinds.append({x.sharding.memory_kind for x in jax.tree.leaves(tree)})
        return tree

    monkeypatch.setattr(train_ppo, "to_memory", spied)
    ppo = [
        f"--init={runs}/sft",
        f"--reward={runs}/rm",
        "--batch_size=16",
        "--minibatches=2",
        "--max_prompt=48",
    ]
    argv = [*MODEL[1:], *ppo, "--steps=3", "--max_new_tokens=16", *ADAPTED]
    run(train_ppo, *argv, "--offload", f"--run={tmp_path}/ppo")
    assert kinds == [{"pinned_host"}] + [{"device"}] * 6  # and in between nothing holds the models
    jax.tree.map(
        np.testing.assert_array_equal, load_params(f"{tmp_path}/ppo"), load_params(f"{runs}/ppo")
    )


@pytest.mark.slow
def test_ppo_with_pretraining_text_and_entropy_resumes_bitwise_equal(runs, tmp_path):
    start = [
        f"--init={runs}/sft",
        f"--reward={runs}/rm",
        "--batch_size=16",
        "--minibatches=2",
        "--max_prompt=48",
    ]
    terms = [
        "--ptx_data=world",
        "--ptx_coef=2",
        "--entropy_coef=0.01",
        "--max_new_tokens=16",
        "--save_every=2",
    ]
    argv = [*MODEL[1:], *start, *terms, "--steps=4"]
    run(train_ppo, *argv, f"--run={tmp_path}/whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    run(train_ppo, *argv, f"--run={tmp_path}/cut")
    whole, cut = (load_params(f"{tmp_path}/{name}") for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    first = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kl"]) < 1e-5 and first["policy/text_nll"] > 0 and first["policy/entropy"] > 0
    # Control: the text moves the policy.
    run(train_ppo, *argv, "--ptx_coef=0", f"--run={tmp_path}/without")
    apart = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), whole, load_params(f"{tmp_path}/without")
    )
    assert max(jax.tree.leaves(apart)) > 1e-5


def killed_and_resumed(argv, folder: pathlib.Path, at: int, environment) -> int:
    """Run `argv`, kill it -9 when `at` steps are recorded, run it to its end; return the kills."""
    quiet = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "env": environment,
        "cwd": ROOT,
    }
    kills = 0
    process = subprocess.Popen(argv, **quiet)
    rows = folder / "metrics.jsonl"
    while process.poll() is None:
        if not kills and rows.exists() and len(rows.read_text().splitlines()) >= at:
            process.send_signal(signal.SIGKILL)
            kills += 1
        time.sleep(0.02)
    if kills:
        subprocess.run(argv, check=True, **quiet)
    return kills


def resumes(runs, tmp_path, script, points):
    steps = 12
    rows = {
        "train_ppo": [
            "--batch_size=16",
            "--minibatches=2",
            "--max_prompt=48",
            "--max_new_tokens=16",
        ]
    }
    start = [f"--init={runs}/sft"] + ([f"--reward={runs}/rm"] if script == "train_ppo" else [])
    common = [
        *SHORT,
        *start,
        *rows.get(script, ["--batch_size=8", "--length=64"]),
        f"--steps={steps}",
        "--save_every=3",
    ]
    # Compiled once, as in `make align`: what was kept must give the same bits.
    kept = {
        "JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE, **kept}
    whole = command(script, *common, f"--run={tmp_path}/whole")
    subprocess.run(whole, check=True, env=environment, cwd=ROOT, capture_output=True)
    expected = load_params(f"{tmp_path}/whole")
    for at in points:
        folder = tmp_path / f"killed{at}"
        assert (
            killed_and_resumed(
                command(script, *common, f"--run={folder}"), folder, at, environment
            )
            == 1
        )
        jax.tree.map(np.testing.assert_array_equal, load_params(str(folder)), expected)
        numbers = [
            json.loads(line)["step"]
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        assert numbers == list(range(1, steps + 1))  # no row lost, none twice


@pytest.mark.slow
def test_a_run_beyond_its_kl_limit_stops_an_iteration_later_at_most(runs, tmp_path, capsys):
    ppo = [
        f"--init={runs}/sft",
        f"--reward={runs}/rm",
        "--batch_size=16",
        "--minibatches=2",
        "--max_prompt=48",
    ]
    options = [
        "--max_new_tokens=16",
        "--steps=9",
        "--optimizer.lr=1e-2",
        "--kl_limit=0.001",
        f"--run={tmp_path}/far",
    ]
    line = fails(train_ppo, [*SHORT, "--mesh.data=1", "--mesh.fsdp=8", *ppo, *options], capsys)
    assert line.startswith("error: --kl_limit=0.001: KL reached") and "--kl_coef" in line
    beyond = [row["kl"] > 0.001 for row in rows_of(tmp_path / "far")]
    # Metrics are read when the next iteration's are there.
    assert sum(beyond) in (1, 2) and len(beyond) < 9


@pytest.mark.slow  # minutes; the quick suite kills a process in tests/test_checkpoint.py
@pytest.mark.parametrize("script", ["train_sft", "train_rm", "train_ppo"])
def test_kill_at_ten_points_resumes_bitwise_equal(runs, tmp_path, script):
    resumes(runs, tmp_path, script, random.Random(0).sample(range(1, 12), 10))
