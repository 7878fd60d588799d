"""The fork experiments/online_dpo: loss and gradient as the paper writes them, the script."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import fails, rows_of, run, write

import train_sft
from data.tokenizer import Tokenizer
from experiments.online_dpo import train_grpo
from experiments.online_dpo.pairs import best_and_worst
from model import LanguageModel, LanguageOutput, init_and_apply
from model_config import PRESETS
from runtime.checkpoint import Checkpoints
from runtime.run_folder import load_config

P, C, R, V = 3, 4, 6, 5  # prompts, responses to each, tokens of a response, vocabulary
BETA = 0.1


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def pairs_of(config, apply, policy, reference, batch, scores_B):
    """Return the pairs that the script makes of the rollouts `batch`."""
    compute_targets = train_grpo.make_targets(config, apply, eos=-1)
    ranked, _ = compute_targets(policy, reference, batch, {"r": scores_B}, {})
    return best_and_worst(ranked, config.samples_per_prompt)


def small_config(group):
    return train_grpo.Config(
        reward=("r",), samples_per_prompt=group, max_new_tokens=R, beta=BETA, missing_eos="none"
    )


def bigram(params, tokens, segments, positions):
    return LanguageOutput(params[tokens], jnp.eye(params.shape[-1]))


def rollouts(seed=0):
    """Return P C responses of one to R tokens to prompts of two, padded with another token."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, R + 1, P * C)
    lengths[:4] = [R, 1, 3, R]
    mask = (np.arange(R) < lengths[:, None]).astype(np.float32)
    response = np.where(mask > 0, rng.integers(1, V, (P * C, R)), 0).astype(np.int32)
    prompt = np.repeat(rng.integers(1, V, (P, 2)), C, axis=0).astype(np.int32)
    tokens = np.concatenate([prompt, response], axis=1)
    segments = np.concatenate([np.ones((P * C, 2)), mask], axis=1).astype(np.int32)
    batch = {
        "tokens_BT": tokens,
        "segment_ids_BT": segments,
        "positions_BT": np.cumsum(segments, 1) - 1,
    }
    return {**batch, "response_BR": response, "mask_BR": mask, "sampler_logp_BR": 0 * mask}


def token_logps(table, batch):
    """Return a list of log-probabilities for each response: real tokens only."""
    logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
    rows = zip(batch["tokens_BT"], batch["mask_BR"].sum(1).astype(int), strict=True)
    return [
        np.array([logp[row[1 + t], row[2 + t]] for t in range(length)]) for row, length in rows
    ]


def paper_loss(table, reference_table, batch, scores):
    """Return DPO's loss on the best and worst of each group, in loops (Guo et al. 2024)."""
    logp, reference = (token_logps(t, batch) for t in (table, reference_table))
    ratio = [a.sum() - b.sum() for a, b in zip(logp, reference, strict=True)]
    losses = []
    for p in range(P):
        rows = range(p * C, p * C + C)
        best = max(rows, key=lambda i: scores[i])
        worst = min(rows, key=lambda i: scores[i])
        if scores[best] > scores[worst]:
            losses.append(-np.log(1 / (1 + np.exp(-BETA * (ratio[best] - ratio[worst])))))
    return np.mean(losses)


def test_loss_and_gradient_equal_the_paper():
    config = small_config(C)
    batch = rollouts()
    reference = normal(V, V)
    old = normal(V, V, seed=1)
    table = old + 0.3 * normal(V, V, seed=2)
    scores = normal(P * C, seed=3).round(2)
    scores[C : 2 * C] = 0.1  # a group of equal scores
    with jax.enable_x64(True):
        pairs = pairs_of(
            config, bigram, jnp.array(old), jnp.array(reference), batch, jnp.array(scores)
        )
        objective = train_grpo.make_objective(config, bigram)
        gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))
        (loss, (count, _)), grad = gradient(jnp.array(table), pairs)
    paper = partial(paper_loss, reference_table=reference, batch=batch, scores=scores)
    numerical = np.zeros_like(table)
    for index in np.ndindex(table.shape):
        step = np.zeros_like(table)
        step[index] = 1e-6
        numerical[index] = (paper(table + step) - paper(table - step)) / 2e-6
    assert float(loss) / float(count) == pytest.approx(paper(table), abs=1e-6)
    np.testing.assert_allclose(np.asarray(grad) / float(count), numerical, atol=1e-6)
    assert np.abs(numerical).max() > 1e-3


def test_what_lies_in_the_padding_does_not_matter():
    config = small_config(C)
    batch = rollouts()
    table = jnp.float32(normal(V, V))
    # Token 0 is met in the padding only.
    table = table.at[0].set(jnp.float32([60.0, -60.0, 0.0, 0.0, 0.0]))
    other = {**batch, "response_BR": np.where(batch["mask_BR"] > 0, batch["response_BR"], 1)}
    other["tokens_BT"] = np.concatenate([batch["tokens_BT"][:, :2], other["response_BR"]], axis=1)

    def gradient(batch):
        scores = jnp.float32(normal(P * C, seed=3))
        pairs = pairs_of(config, bigram, table, 0 * table, batch, scores)
        moved = table + 0.1 * jnp.float32(normal(V, V, seed=2)) * (jnp.arange(V) > 0)[:, None]
        objective = train_grpo.make_objective(config, bigram)
        return jax.jit(jax.grad(objective, has_aux=True))(moved, pairs)[0]

    one, two = gradient(batch), gradient(other)
    assert np.isfinite(one).all() and (one[0] == 0).all() and np.abs(one).max() > 1e-4
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_equal_scores_give_exactly_zero_gradient():
    config = small_config(C - 1)
    batch = {name: x[: P * (C - 1)] for name, x in rollouts().items()}
    scores = np.repeat(np.float32([0.9, 1.7, -2.9]), C - 1)
    policy = jnp.float32(normal(V, V))

    def gradient(scores):
        pairs = pairs_of(config, bigram, policy, policy, batch, jnp.array(scores))
        objective = train_grpo.make_objective(config, bigram)
        return jax.jit(jax.grad(objective, has_aux=True))(policy, pairs)[0]

    assert (np.asarray(gradient(scores)) == 0).all()
    scores[0] += 0.5
    assert np.abs(gradient(scores)).max() > 1e-3  # control


# ---- The script ----

OWN = """
def even(response, record):
    return float(len(response) % 2 == 0)
"""
SMALL = [
    "--batch_size=64",
    "--minibatches=2",
    "--max_prompt=32",
    "--max_new_tokens=8",
    "--steps=2",
    "--eval_every=0",
    "--init=sft",
    "--data=sums.jsonl",
    "--optimizer.lr=2e-3",
    "--reward=own_even:even",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make a folder with prompts, a random policy to start from and a module of rewards."""
    folder = tmp_path_factory.mktemp("online_dpo")
    sums = [(f"{i} plus {j}", str(i + j)) for i in range(10) for j in range(10)]
    write(folder / "sums.jsonl", [{"prompt": p, "answer": a} for p, a in sums])
    (folder / "own_even.py").write_text(OWN)
    tokenizer = Tokenizer.train((f"{p} is {a}" for p, a in sums), folder / "made", 512)
    start = train_sft.Config(run=str(folder / "sft"), model=PRESETS["tiny"])
    params = jax.jit(init_and_apply(LanguageModel(start.model))[0])(jax.random.key(0))
    with Checkpoints(start.run, start, script="train_sft", tokenizer=tokenizer.model) as saved:
        saved.save(1, {"params": params})
    return folder


@pytest.fixture
def here(files, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(files / "cache"))
    monkeypatch.chdir(files)


@pytest.mark.slow
def test_it_runs_and_starts_at_the_reference(here):
    eight = ["--mesh.data=1", "--mesh.fsdp=8"]
    run(train_grpo, *SMALL, *eight, "--temperature=0.8", "--run=online_dpo")
    rows = rows_of("online_dpo")
    assert abs(rows[0]["kl"]) < 1e-5 and all(row["policy/skipped"] == 0 for row in rows)
    assert rows[1]["kl"] != 0 and all(np.isfinite(row["policy/loss"]) for row in rows)
    # The last minibatch of the first iteration, so the policy has moved already.
    assert rows[0]["policy/loss"] == pytest.approx(np.log(2), abs=0.2)
    assert load_config("online_dpo")["script"] == "experiments/online_dpo/train_grpo"


MISTAKES = {
    "pairs do not divide": (["--minibatches=64"], "minibatches"),
    "no beta": (["--beta=0"], "beta"),
    "no group": (["--samples_per_prompt=1"], "samples_per_prompt"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, here, capsys):
    argv, place = MISTAKES[name]
    assert place in fails(train_grpo, [*SMALL, *argv, "--run=new"], capsys)
