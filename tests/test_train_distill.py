"""Distillation from the command line: smaller students, own samples, meshes, mistakes."""

import json
import pathlib
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from running import fails, rows_of, run

import train_distill
import train_sft
from data.tokenizer import Tokenizer
from model import LanguageModel, init_and_apply
from runtime import flags as config
from runtime.checkpoint import Checkpoints
from train_state import load_params

START = [
    "--optimizer.warmup=0",
    "--length=48",
    "--batch_size=8",
    "--eval_every=0",
    "--data=chats.jsonl",
]
EIGHT = ["--mesh.data=1", "--mesh.fsdp=8"]
COMMON = [*START, "--teacher=teacher", "--max_prompt=24", "--max_new_tokens=8", "--steps=2"]
SMALL = [
    "--model.preset=tiny",
    "--model.layers=1",
    "--model.width=16",
    "--model.heads=2",
    "--model.kv_heads=1",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make a folder with conversations and a teacher, of random weights."""
    folder = tmp_path_factory.mktemp("distill")
    sums = [
        {"prompt": f"{i} plus {j}", "response": str(i + j)} for i in range(10) for j in range(10)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMB_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        pathlib.Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
        tokenizer = Tokenizer.train(
            (f"{row['prompt']} {row['response']}" for row in sums), "words", 512
        )
        settings = config.parse(train_sft.Config, ["--model.preset=tiny"])
        params = jax.jit(init_and_apply(LanguageModel(settings.model))[0])(jax.random.key(7))
        with Checkpoints(
            "teacher", settings, script="train_sft", tokenizer=tokenizer.model
        ) as checkpoints:
            checkpoints.save(1, {"params": params})
        # And a reward model.
        head = np.ones(params["decoder"]["final_norm"].shape)
        scalar = {"decoder": params["decoder"], "head": head, "bias": np.ones(())}
        with Checkpoints(
            "judge", settings, script="train_rm", tokenizer=tokenizer.model
        ) as checkpoints:
            checkpoints.save(1, {"params": scalar})
    return folder


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(files / "cache"))
    monkeypatch.chdir(files)


def same(one, other, atol):
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=atol), load_params(one), load_params(other)
    )


@pytest.fixture(scope="module")
def mixed(files):
    """Return flags of a run with a step on data, then one on own samples; and the run."""

    def coin(seed, step):
        return train_distill.is_own(train_distill.Config(seed=seed, on_policy=0.5), step)

    seed = next(s for s in range(99) if not coin(s, 1) and coin(s, 2))
    flags = [*COMMON, *SMALL, "--on_policy=0.5", "--tau=2", f"--seed={seed}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMB_CACHE", str(files / "cache"))
        patch.chdir(files)
        run(train_distill, *flags, *EIGHT, "--run=mixed")
    return flags


def test_a_smaller_student_learns_from_data_and_own_samples(mixed):
    first, second = rows_of("mixed")
    assert first["divergence"] > 0 and first["nll"] > 0 and "own/loss" not in first
    assert first["loss"] == pytest.approx(
        0.1 * first["nll"] + 0.9 * 4 * first["divergence"], rel=1e-5
    )
    assert second["own/divergence"] > 0 and "loss" not in second
    # No labels there.
    assert second["own/loss"] == pytest.approx(0.9 * 4 * second["own/divergence"], rel=1e-5)
    assert load_params("mixed")["decoder"]["embed"].shape == (512, 16)


@pytest.mark.slow
def test_mesh_and_microbatches_change_nothing(mixed):
    mesh = [
        "--mesh.data=2",
        "--mesh.fsdp=2",
        "--mesh.tensor=2",
        "--batch_size=8",
        "--microbatches=2",
    ]
    run(train_distill, *mixed, *mesh, "--eval_every=2", "--run=other")
    same("mixed", "other", atol=1e-4)
    assert rows_of("other")[1]["eval/divergence"] > 0
    assert pathlib.Path("other/samples.md").read_text().count("**response**") > 0


@pytest.mark.slow
def test_alpha_one_is_train_sft():
    run(
        train_sft,
        *START,
        *SMALL,
        *EIGHT,
        "--steps=2",
        "--tokenizer=teacher/tokenizer.model",
        "--run=sft",
    )
    run(train_distill, *COMMON, *SMALL, *EIGHT, "--alpha=1", "--run=labels")
    same("labels", "sft", atol=1e-7)
    assert [row["loss"] for row in rows_of("labels")] == [row["loss"] for row in rows_of("sft")]


@pytest.mark.slow
def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    copy = [
        *COMMON,
        *EIGHT,
        "--init=teacher",
        "--alpha=0",
        "--divergence=jsd",
        "--optimizer.weight_decay=0",
    ]
    run(train_distill, *copy, "--run=copy")
    # The first step alone: Adam makes a full one of what rounding leaves of the gradient.
    first = rows_of("copy")[0]
    assert abs(first["divergence"]) < 1e-6 and first["grad_norm"] < 1e-4
    assert first["nll"] > 1  # control: the data is not what the teacher says


@pytest.mark.slow
def test_own_samples_alone_teach():
    """A student of random weights comes nearer to its teacher on what it says itself."""
    options = [
        "--on_policy=1",
        "--divergence=reverse_kl",
        "--alpha=0",
        "--steps=60",
        "--optimizer.lr=1e-2",
    ]
    run(train_distill, *COMMON, *SMALL, *EIGHT, *options, "--run=own")
    gaps = [row["own/divergence"] for row in rows_of("own")]
    assert np.mean(gaps[-5:]) < 0.5 * np.mean(gaps[:5])


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [[], ["--init=teacher", "--lora.rank=2"]])
def test_resuming_is_bitwise_equal(adapters):
    name = "adapters" if adapters else "all"
    student = adapters or SMALL
    options = [
        *COMMON,
        *student,
        *EIGHT,
        "--on_policy=0.5",
        "--divergence=jsd",
        "--steps=6",
        "--save_every=3",
    ]
    run(train_distill, *options, f"--run={name}")
    shutil.copytree(name, f"{name}_cut")
    shutil.rmtree(f"{name}_cut/checkpoints/6")
    run(train_distill, *options, f"--run={name}_cut")
    jax.tree.map(np.testing.assert_array_equal, load_params(f"{name}_cut"), load_params(name))
    rows = rows_of(name)
    assert [row["step"] for row in rows_of(f"{name}_cut")] == [1, 2, 3, 4, 5, 6]
    # Both kinds of step come after the cut.
    assert 0 < sum("own/loss" in row for row in rows[3:]) < 3


MISTAKES = {
    "no teacher": (["--teacher=nowhere"], "nowhere"),
    "a reward model": (["--teacher=judge"], "--teacher=judge: a reward model"),
    "another tokenizer": (["--init=stranger"], "tokenizer"),
    "alpha": (["--alpha=1.5"], "--alpha"),
    "tau": (["--tau=0"], "--tau"),
    "beta": (["--divergence=jsd", "--beta=1"], "--beta"),
    "share": (["--on_policy=-1"], "--on_policy"),
    "divergence": (["--divergence=tv"], "divergence"),
    "too long for the teacher": (["--length=300"], "300"),
    "own samples too long": (["--max_new_tokens=300"], "324"),
    "vocabulary too small": (["--model.vocab=10"], "vocab"),
    "batch does not split": (["--batch_size=4"], "batch_size"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, files, capsys, monkeypatch):
    if not (files / "stranger").exists():
        shutil.copytree("teacher", "stranger")
        Tokenizer.train(["other words than those"] * 9, "stranger", 280)
    argv, place = MISTAKES[name]
    shape = [] if "--init=stranger" in argv else [*SMALL, "--model.context=512"]
    assert place in fails(
        train_distill, [*COMMON, *shape, *EIGHT, *argv, f"--run={files}/new"], capsys
    )
    assert not (files / "new").exists()  # nothing half-written
