"""Sample, rank, imitate from the command line: learning, thresholds, resuming, mistakes."""

import shutil

import jax
import numpy as np
import pytest
from running import fails, rows_of, run, write

import train_raft
import train_sft
from data.tokenizer import Tokenizer
from decoding import best_of_n
from model import LanguageModel, init_and_apply
from model_config import PRESETS
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from train_state import load_params

SHORT = [
    "--batch_size=64",
    "--minibatch_size=8",
    "--max_prompt=32",
    "--max_new_tokens=8",
    "--steps=2",
]
EIGHT = ["--mesh.data=1", "--mesh.fsdp=8"]
OWN = """
def digits(response, record):
    asked = record["prompt"][-1]["content"]
    return float(sum(letter in "0123456789" for letter in response)) + 0.0 * len(asked)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make a folder with prompts and answers, a random policy, and a module of rewards."""
    folder = tmp_path_factory.mktemp("raft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMB_CACHE", str(folder / "cache"))
        sums = [(f"{i} plus {j}", str(i + j)) for i in range(10) for j in range(10)]
        write(folder / "sums.jsonl", [{"prompt": p, "answer": a} for p, a in sums])
        (folder / "own_sums.py").write_text(OWN)
        tokenizer = Tokenizer.train((f"{p} is {a}" for p, a in sums), folder / "made", 512)
        start = train_sft.Config(run=str(folder / "sft"), model=PRESETS["tiny"])
        params = jax.jit(init_and_apply(LanguageModel(start.model))[0])(jax.random.key(0))
        with Checkpoints(start.run, start, script="train_sft", tokenizer=tokenizer.model) as saved:
            saved.save(1, {"params": params})
        yield folder


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(files / "cache"))
    monkeypatch.chdir(files)


# The policy is random, and few of its responses end.
COMMON = [
    *SHORT,
    "--missing_eos=none",
    "--init=sft",
    "--data=sums.jsonl",
    "--optimizer.lr=2e-3",
    "--reward=own_sums:digits",
]


@pytest.mark.slow
def test_a_checkable_reward_is_learnt_in_a_few_rounds(files):
    """Digits in a response of at most eight tokens, from a policy that knows nothing."""
    run(
        train_raft, *COMMON, "--batch_size=256", "--steps=4", "--optimizer.lr=3e-3", "--run=digits"
    )
    rows = rows_of("digits")
    scores = np.array([row["score"] for row in rows])
    # From round to round, but for two standard errors: means of 256 counts, which vary by about
    # their mean (Poisson).
    noise = np.sqrt((scores[1:] + scores[:-1]) / 256)
    assert (np.diff(scores) > -2 * noise).all() and scores[-1] > 2 * scores[0]
    assert abs(rows[0]["kl"]) < 1e-5 and rows[-1]["kl"] > 0.1 and rows[0]["sampler_gap"] < 1e-4
    assert all(
        row["chosen"] == 32 and row["updates"] == 8 and row["policy/skipped"] == 0 for row in rows
    )
    assert all(row["chosen_score"] >= row["score"] for row in rows)


@pytest.mark.slow
def test_one_sample_a_prompt_is_self_training_and_learns_nothing(files):
    """The control of the test above: with nothing to choose from, nothing is optimised."""
    options = [
        "--batch_size=256",
        "--minibatch_size=64",
        "--samples_per_prompt=1",
        "--steps=4",
        "--optimizer.lr=3e-3",
    ]
    run(train_raft, *COMMON, *options, "--run=alone")
    rows = rows_of("alone")
    assert all(
        row["chosen"] == 256 and row["chosen_score"] == pytest.approx(row["score"]) for row in rows
    )
    assert rows[-1]["score"] < 1.5 * rows[0]["score"]


@pytest.mark.slow
def test_a_threshold_that_nothing_passes_ends_without_a_policy_and_is_told(files, capsys):
    with pytest.raises(UserError, match="none: no update was taken"):
        run(train_raft, *COMMON, "--method=expert", "--threshold=80.5", "--steps=1", "--run=none")
    told = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("note: round")
    ]
    assert len(told) == 1 and "--threshold=80.5" in told[0] and "nothing was learnt" in told[0]
    assert [(row["chosen"], row["updates"]) for row in rows_of("none")] == [(0, 0)]
    # Nor is there a checkpoint that could be taken for an aligned policy.
    with pytest.raises(UserError):
        load_params("none")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rejection", "rft"])
def test_resuming_with_a_pool_is_bitwise_equal(files, method):
    threshold = ["--threshold=1"] if method == "rft" else []
    options = [
        *COMMON,
        *EIGHT,
        f"--method={method}",
        *threshold,
        "--steps=4",
        "--replay_rounds=1",
        "--save_every=2",
    ]
    whole, cut = f"{method}-whole", f"{method}-cut"
    run(train_raft, *options, f"--run={whole}")
    shutil.copytree(whole, cut)
    shutil.rmtree(f"{cut}/checkpoints/4")
    run(train_raft, *options, f"--run={cut}")
    jax.tree.map(np.testing.assert_array_equal, load_params(cut), load_params(whole))
    rows, again = rows_of(whole), rows_of(cut)
    assert [row["step"] for row in again] == [1, 2, 3, 4]
    assert [(row["score"], row["chosen"]) for row in again] == [
        (row["score"], row["chosen"]) for row in rows
    ]
    if method == "rejection":
        assert [row["chosen"] for row in rows] == [8, 16, 16, 16]


@pytest.mark.slow
def test_another_mesh_and_adapters_give_what_they_should(files):
    run(train_raft, *COMMON, "--select=top", "--run=one")
    two = ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2", "--microbatches=2"]
    run(train_raft, *COMMON, *two, "--select=top", "--run=two")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        load_params("one"),
        load_params("two"),
    )
    run(train_raft, *COMMON, "--lora.rank=2", "--run=lora")
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), load_params("lora"), load_params("sft")
    )
    assert moved["decoder"]["layers"]["attention"]["q"] > 0 and moved["decoder"]["embed"] == 0


def test_best_of_more_is_better(files, capsys):
    options = [
        "--policy=sft",
        "--data=sums.jsonl",
        "--reward=own_sums:digits",
        "--max_new_tokens=8",
        "--prompts=40",
        "--missing_eos=none",
    ]
    table = run(best_of_n, *options, "--n=6")
    means = [table[n]["reward"][0] for n in (1, 2, 4, 6)]
    assert means == sorted(means) and means[0] < means[-1]
    printed = capsys.readouterr().out.splitlines()
    assert (
        len(printed) == 6
        and printed[1].split()[:2] == ["1", "0.000"]
        and printed[2].split()[:2] == ["2", "0.193"]
    )


MISTAKES = {
    "unknown method": (["--method=ppo"], "method"),
    "unknown selection": (["--select=worst"], "select"),
    "no such run": (["--reward=nowhere"], "nowhere"),
    "not a reward model": (["--reward=sft"], "train_sft"),
    "no such function": (["--reward=own_sums:odd"], "odd"),
    "no threshold": (["--method=rft"], "--threshold"),
    "threshold unused": (["--threshold=1"], "--threshold"),
    "groups do not divide": (["--samples_per_prompt=5"], "samples_per_prompt"),
    "no groups at all": (["--samples_per_prompt=0"], "samples_per_prompt"),
    "no epochs": (["--epochs=0"], "epochs"),
    "replay_rounds": (["--replay_rounds=-1"], "replay_rounds"),
    "kl_coef": (["--kl_coef=-1"], "kl_coef"),
    "minibatch does not split": (["--minibatch_size=4"], "minibatch_size"),
    "batch does not split": (["--batch_size=8"], "batch_size"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, files, capsys):
    argv, place = MISTAKES[name]
    assert place in fails(train_raft, [*COMMON, *argv, f"--run={files}/new"], capsys)
    assert not (files / "new").exists()  # nothing half-written


BEST = {"no samples": (["--n=0"], "--n")}


@pytest.mark.parametrize("name", BEST)
def test_a_mistake_of_best_of_n_is_one_line(name, files, capsys):
    argv, place = BEST[name]
    assert place in fails(
        best_of_n, ["--policy=sft", "--data=sums.jsonl", "--reward=own_sums:digits", *argv], capsys
    )
