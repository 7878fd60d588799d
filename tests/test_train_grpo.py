"""Methods without a critic from the command line: rewards, meshes, resuming, mistakes."""

import shutil
from functools import partial

import jax
import numpy as np
import pytest
from running import fails, rows_of, run, write

import train_grpo
import train_rm
import train_sft
from rewards import scorer as rewards
from runtime.errors import UserError
from runtime.run_folder import load_config
from tasks import answers as checks
from train_state import load_params

START = ["--optimizer.warmup=0", "--length=48", "--batch_size=8", "--steps=4", "--eval_every=0"]
SHORT = [
    "--batch_size=64",
    "--minibatches=2",
    "--max_prompt=32",
    "--max_new_tokens=8",
    "--steps=2",
    "--eval_every=0",
]
EIGHT = ["--mesh.data=1", "--mesh.fsdp=8"]
OWN = """
def even(response, record):
    return float(len(response) % 2 == 0) + 0.0 * len(record["prompt"][-1]["content"])

limit = 3
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make a folder with prompts and answers, a policy to start from and a module of rewards."""
    folder = tmp_path_factory.mktemp("grpo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMB_CACHE", str(folder / "cache"))
        sums = [(f"{i} plus {j}", str(i + j)) for i in range(10) for j in range(10)]
        write(folder / "sums.jsonl", [{"prompt": p, "answer": a} for p, a in sums])
        write(folder / "chats.jsonl", [{"prompt": p, "response": a} for p, a in sums])
        write(
            folder / "pairs.jsonl",
            [{"prompt": p, "chosen": a, "rejected": a + "1"} for p, a in sums],
        )
        (folder / "own.py").write_text(OWN)
        run(
            train_sft,
            "--model.preset=tiny",
            *START,
            *EIGHT,
            f"--data={folder}/chats.jsonl",
            f"--run={folder}/sft",
        )
        yield folder


@pytest.fixture(scope="module")
def reward_model(files):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMB_CACHE", str(files / "cache"))
        start = [f"--init={files}/sft", f"--data={files}/pairs.jsonl", f"--run={files}/rm"]
        run(train_rm, *START, *EIGHT, *start)
        yield "rm"


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(files / "cache"))
    monkeypatch.chdir(files)


# The policy is nearly random, and most of its responses do not end.
COMMON = [*SHORT, "--init=sft", "--data=sums.jsonl", "--optimizer.lr=2e-3", "--missing_eos=none"]


@pytest.mark.slow
def test_a_second_reward_of_weight_0_changes_nothing_on_another_mesh(files):
    """check_first_update asserts in the runs that the first ratio is 1 and the first KL 0."""
    run(train_grpo, *COMMON, *EIGHT, "--reward=own:even", "--run=one")
    both = [
        "--reward",
        "own:even",
        "tasks.answers:number",
        "--combine=weighted",
        "--weights",
        "1",
        "0",
    ]
    run(
        train_grpo,
        *COMMON,
        "--mesh.data=2",
        "--mesh.fsdp=2",
        "--mesh.tensor=2",
        *both,
        "--run=two",
    )
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-4), load_params("one"), load_params("two")
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), load_params("one"), load_params("sft"))
    assert max(jax.tree.leaves(moved)) > 1e-3  # control
    first, second = rows_of("one")[0], rows_of("two")[0]
    assert abs(first["kl"]) < 1e-5 and first["sampler_gap"] < 1e-4 and first["policy/skipped"] == 0
    assert second["reward/own:even"] == pytest.approx(first["score"], abs=1e-4)
    assert 0 <= second["reward/tasks.answers:number"] <= 1
    stored = load_config("one")
    assert (
        stored["kl_coef"] == 0.04
        and stored["kl_estimator"] == "k3"
        and stored["samples_per_prompt"] == 8
    )


@pytest.mark.slow
def test_resuming_with_dynamic_sampling_is_bitwise_equal(files):
    options = [
        *COMMON,
        *EIGHT,
        "--method=dapo",
        "--reward=own:even",
        "--steps=4",
        "--samples_per_prompt=2",
    ]
    run(train_grpo, *options, "--run=whole", "--save_every=2")
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/checkpoints/4")
    run(train_grpo, *options, "--run=cut", "--save_every=2")
    jax.tree.map(np.testing.assert_array_equal, load_params("cut"), load_params("whole"))
    rows, again = rows_of("whole"), rows_of("cut")
    assert [row["step"] for row in again] == [1, 2, 3, 4]
    assert [row["score"] for row in again] == [row["score"] for row in rows]
    assert any(row["rounds"] > 1 for row in rows) and all(row["kept"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp"])
def test_every_method_runs_and_starts_at_the_reference(reward_model, method):
    extra = {
        "reinforce_pp": ["--shaping=0.5"],
        "rloo": ["--entropy_coef=0.01"],
    }
    both = ["--reward", reward_model, "own:even", "--combine=gated", "--gate=1"]
    run(
        train_grpo,
        *COMMON,
        *EIGHT,
        f"--method={method}",
        *both,
        *extra.get(method, []),
        f"--run={method}",
    )
    rows = rows_of(method)
    assert 0 <= rows[0]["reward/own:even"] <= 1 and np.isfinite(rows[0]["reward/rm"])
    assert abs(rows[0]["kl"]) < 1e-5 and all(row["policy/skipped"] == 0 for row in rows)
    assert rows[1]["kl"] != 0 and all(np.isfinite(row["policy/loss"]) for row in rows)


@pytest.mark.slow
def test_a_checkable_reward_is_learnt(files):
    """Responses of an even number of letters, from a policy that knows next to nothing."""
    options = ["--batch_size=128", "--steps=40", "--optimizer.lr=3e-3", "--kl_coef=0"]
    run(train_grpo, *COMMON, *options, *EIGHT, "--reward=own:even", "--run=even")
    rows = rows_of("even")
    assert (
        np.mean([row["score"] for row in rows[-3:]])
        > np.mean([row["score"] for row in rows[:3]]) + 0.3
    )


def test_checks_compare_numbers_and_texts():
    record = {"prompt": [], "answer": "She has 3 + 4 = 7.\n#### 1,234"}
    told = ["it is 1234", "1,234.0 of 5", "so 1,234.", "none", "it is -1234"]
    assert [checks.number(text, record) for text in told] == [1.0, 0.0, 1.0, 0.0, 0.0]
    # Two texts without a number do not agree.
    assert checks.number("none", {"answer": "none"}) == 0.0
    assert [checks.exact(text, {"answer": "New York"}) for text in ("new  york ", "york")] == [
        1.0,
        0.0,
    ]
    with pytest.raises(UserError, match="answer"):
        checks.exact("a", {"prompt": []})


def test_a_function_sees_each_response_with_its_prompts_record(files, monkeypatch):
    mesh = train_grpo.make_mesh(train_grpo.MeshConfig())
    tokenizer = rewards.Tokenizer.load("sft")
    texts = [f"{i} and {i}" for i in range(8)]
    tokens = [[*tokenizer.encode(text), tokenizer.eos] for text in texts]
    response = np.full((8, max(map(len, tokens)) + 2), tokenizer.pad, np.int32)
    for row, real in zip(response, tokens, strict=True):
        row[: len(real)] = real
    lengths = np.array([len(real) for real in tokens])
    mask = (np.arange(response.shape[1]) < lengths[:, None]).astype(np.float32)
    batch = rewards.to_mesh({"response_BR": response, "mask_BR": mask}, mesh)
    seen = []
    records = [{"n": k} for k in range(4)]

    def scores(function):
        monkeypatch.setattr(rewards, "load_function", lambda name: function)
        models, score = rewards.make_reward_scorer(["any:thing"], tokenizer, mesh)
        return score(models, batch, records)

    given, scalars = scores(lambda text, record: seen.append((text, record["n"])) or record["n"])
    assert given["any:thing"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and scalars == {}
    assert seen == [(text, i // 2) for i, text in enumerate(texts)]
    for bad in ("many", None, float("nan")):
        with pytest.raises(UserError, match="any:thing"):
            scores(lambda text, record, bad=bad: bad)
    with pytest.raises(UserError, match="answer"):
        scores(checks.number)


MISTAKES = {
    "unknown method": (["--method=ppo"], "method"),
    "unknown combination": (["--combine=median"], "combine"),
    "no such run": (["--reward=nowhere"], "nowhere"),
    "not a reward model": (["--reward=sft"], "train_sft"),
    "no such module": (["--reward=nowhere:even"], "nowhere"),
    "no such function": (["--reward=own:odd"], "odd"),
    "not a function": (["--reward=own:limit"], "own:limit"),
    "twice the same": (["--reward", "rm", "rm"], "--reward"),
    "weights missing": (["--reward", "rm", "own:even", "--combine=weighted"], "--weights"),
    "weights unused": (["--weights", "1"], "--weights"),
    "nothing gates": (["--combine=gated"], "gated"),
    "no group": (["--samples_per_prompt=1"], "samples_per_prompt"),
    "groups do not divide": (["--samples_per_prompt=5"], "samples_per_prompt"),
    "no groups at all": (["--samples_per_prompt=0"], "samples_per_prompt"),
    "minibatches do not divide": (["--minibatches=3"], "minibatches"),
    "k1 in the loss": (["--kl_estimator=k1"], "kl_estimator"),
    "shaping of sums": (["--shaping=1"], "shaping"),
    "shaping by a function": (
        ["--method=reinforce_pp", "--shaping=1", "--reward=own:even"],
        "shaping",
    ),
    "overlong": (["--overlong=2"], "overlong"),
    "clip": (["--clip=0"], "clip"),
    "batch does not split": (["--batch_size=8", "--minibatches=8"], "batch_size"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, files, capsys):
    argv, place = MISTAKES[name]
    if not any(word.startswith("--reward") for word in argv):
        argv = [*argv, "--reward=rm"]
    assert place in fails(train_grpo, [*COMMON, *argv, f"--run={files}/new"], capsys)
    assert not (files / "new").exists()  # nothing half-written
