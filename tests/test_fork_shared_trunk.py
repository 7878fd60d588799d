"""The fork experiments/shared_trunk: both losses of one pass are those of two models, the run."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import fails, rows_of, run, write

import generate
import train_sft
from data.tokenizer import Tokenizer
from experiments.shared_trunk import train_ppo
from experiments.shared_trunk.trunk import logprobs_and_values, trunk_objective, with_value_head
from model import LanguageModel, ScalarModel, init_and_apply
from model_config import PRESETS
from objectives.policy import (
    policy_objective,
    response_logprobs,
    response_values,
    value_objective,
)
from objectives.unpadded import unpadded, with_room
from responses import load_run
from runtime.checkpoint import Checkpoints
from runtime.run_folder import load_config

B, P, R = 6, 5, 7  # rows, tokens of a prompt, of a response
SETTINGS = {"clip": 0.2, "temperature": 0.8}
COEF = 0.3
INIT, APPLY = init_and_apply(LanguageModel(PRESETS["tiny"]))
_, SCALAR_APPLY = init_and_apply(ScalarModel(PRESETS["tiny"]))


def trunk():
    """Return random parameters, the head's too."""
    params = with_value_head(INIT(jax.random.key(0)))
    head = jax.random.normal(jax.random.key(1), params["value"]["head"].shape)
    return {**params, "value": {"head": head, "bias": jnp.float32(0.7)}}


def minibatch():
    """Return rows of prompts and responses of several lengths, and targets at random."""
    rng = np.random.default_rng(0)
    prompt_B, response_B = rng.integers(1, P + 1, B), rng.integers(1, R + 1, B)
    real = np.concatenate(
        [np.arange(P) >= P - prompt_B[:, None], np.arange(R) < response_B[:, None]], axis=1
    ).astype(np.int32)
    tokens = rng.integers(1, PRESETS["tiny"].vocab, real.shape).astype(np.int32) * real
    targets = ("old_logp_BR", "advantages_BR", "old_values_BR", "returns_BR")
    batch = {
        "tokens_BT": tokens,
        "segment_ids_BT": real,
        "positions_BT": np.maximum(np.cumsum(real, 1) - 1, 0).astype(np.int32),
        "response_BR": tokens[:, P:],
        "mask_BR": np.float32(real[:, P:]),
        "value_mask_BR": np.float32(real[:, P:]),
        **{name: rng.normal(size=(B, R)).astype(np.float32) for name in targets},
    }
    # Near the policy's, or all ratios would be clipped.
    batch = jax.tree.map(jnp.asarray, batch)
    logp_BR = response_logprobs(APPLY, trunk()["policy"], batch, SETTINGS["temperature"])
    return {**batch, "old_logp_BR": logp_BR + 0.3 * batch["old_logp_BR"]}


def as_two(params):
    """Return the same network as two models: a policy, and a ScalarModel with its decoder."""
    return params["policy"], {"decoder": params["policy"]["decoder"], **params["value"]}


def sum_of_two(params, batch):
    """Add the two objectives of train_ppo.py, of two models that share a decoder."""
    policy, critic = as_two(params)
    own, _ = policy_objective(APPLY, policy, batch, **SETTINGS)
    values, _ = value_objective(SCALAR_APPLY, critic, batch, clip=0.2)
    return own + COEF * values


def one_pass(params, batch, value_coef=COEF):
    more = {"value_clip": 0.2, "value_coef": value_coef}
    return trunk_objective(APPLY, params, batch, **SETTINGS, **more)


def test_logprobs_and_values_are_those_of_two_models():
    params, batch = trunk(), minibatch()
    logp_BR, values_BR = logprobs_and_values(APPLY, params, batch, SETTINGS["temperature"])
    policy, critic = as_two(params)
    wanted = response_logprobs(APPLY, policy, batch, SETTINGS["temperature"])
    np.testing.assert_allclose(logp_BR, wanted, atol=1e-6)
    values = response_values(SCALAR_APPLY, critic, batch)
    np.testing.assert_allclose(values_BR, values, atol=1e-5)
    assert np.std(values_BR) > 0.1


def test_gradients_are_the_sum_of_both_objectives():
    params, batch = trunk(), minibatch()
    (loss, (weight, metrics)), grads = jax.value_and_grad(one_pass, has_aux=True)(params, batch)
    wanted, wanted_grads = jax.value_and_grad(sum_of_two)(params, batch)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4), grads, wanted_grads)
    assert weight == batch["mask_BR"].sum() and metrics["value_loss"][0] > 0

    # Control: the values' loss moves the decoder, and the policy's alone does not move the head.
    alone = jax.grad(one_pass, has_aux=True)(params, batch, 0.0)[0]
    embed = ("policy", "decoder", "embed")
    moved, still = grads, alone
    for name in embed:
        moved, still = moved[name], still[name]
    assert np.abs(moved - still).max() > 1e-2
    assert np.abs(alone["value"]["head"]).max() == 0


def test_padding_costs_nothing_and_changes_nothing():
    """Over real tokens alone, in fewer rows: as train_ppo.py runs its models."""
    params, batch = trunk(), minibatch()
    packed = unpadded(batch)
    assert packed["room"].rows(B) < B
    gradient = jax.jit(jax.grad(one_pass, has_aux=True))
    grads, _ = gradient(params, with_room(batch, None))
    packed_grads, _ = gradient(params, packed)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4), packed_grads, grads)


def test_the_first_values_are_zero():
    params = with_value_head(INIT(jax.random.key(0)))
    _, values_BR = logprobs_and_values(APPLY, params, minibatch(), 1.0)
    assert (np.asarray(values_BR) == 0).all()


# ---- The script ----

OWN = """
def even(response, record):
    return float(len(response) % 2 == 0)
"""
SMALL = [
    "--batch_size=16",
    "--minibatches=2",
    "--max_prompt=32",
    "--max_new_tokens=8",
    "--eval_every=0",
    "--init=sft",
    "--data=sums.jsonl",
    "--reward=trunk_even:even",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make a folder with prompts, a random policy to start from and a module of rewards."""
    folder = tmp_path_factory.mktemp("shared_trunk")
    sums = [(f"{i} plus {j}", str(i + j)) for i in range(10) for j in range(10)]
    write(folder / "sums.jsonl", [{"prompt": p, "answer": a} for p, a in sums])
    (folder / "trunk_even.py").write_text(OWN)
    tokenizer = Tokenizer.train((f"{p} is {a}" for p, a in sums), folder / "made", 512)
    start = train_sft.Config(run=str(folder / "sft"), model=PRESETS["tiny"])
    params = jax.jit(INIT)(jax.random.key(0))
    with Checkpoints(start.run, start, script="train_sft", tokenizer=tokenizer.model) as saved:
        saved.save(1, {"params": params})
    return folder


@pytest.fixture
def here(files, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(files / "cache"))
    monkeypatch.chdir(files)


@pytest.mark.slow
def test_it_learns_resumes_to_the_bit_and_is_read_as_a_language_model(here):
    # Rates that do not depend on the number of steps.
    rates = ["--optimizer.schedule=constant", "--value_optimizer.schedule=constant"]
    flags = [*SMALL, *rates, "--save_every=1"]
    run(train_ppo, *flags, "--steps=3", "--run=whole")
    rows = rows_of("whole")
    assert abs(rows[0]["kl"]) < 1e-5 and rows[2]["kl"] != 0
    assert rows[0]["value"] == 0 and rows[2]["value"] != 0
    assert all(row["policy/skipped"] == 0 for row in rows)

    # In two starts, the second of which goes on from the first's checkpoint.
    run(train_ppo, *flags, "--steps=2", "--run=parts")
    run(train_ppo, *flags, "--steps=3", "--run=parts")
    whole, parts = (load_run(name).params for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)

    # A run of it is a policy to whoever reads it.
    assert load_config("whole")["script"] == "experiments/shared_trunk/train_ppo"
    assert set(whole) == set(load_run("sft").params)
    run(generate, "--run=whole", "--prompt=1 plus 1", "--max_new_tokens=4")
    run(train_ppo, *SMALL, "--steps=1", "--init=whole", "--run=next")


def test_a_dry_run_writes_nothing(here, capsys):
    assert run(train_ppo, *SMALL, "--dry_run", "--run=dry") == {}
    assert "the run samples responses" in capsys.readouterr().out
    assert not pathlib.Path("dry").exists()


MISTAKES = {
    "minibatches": (["--minibatches=5"], "minibatches"),
    "no temperature": (["--temperature=0"], "temperature"),
    "a negative weight": (["--value_coef=-1"], "value_coef"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, here, capsys):
    argv, place = MISTAKES[name]
    assert place in fails(train_ppo, [*SMALL, *argv, "--run=new"], capsys)
