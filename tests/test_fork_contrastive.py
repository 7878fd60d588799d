"""Contrastive instructions (experiments/contrastive): loss against loops, contrasts, script."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_cases import (
    candidate_logps,
    comparison_rows,
    loss_and_slope,
    mean_so_far,
    slope_of,
)
from running import fails, rows_of, run, write
from test_direct import RANKS_OF_FOUR, bigram, minimise, normal, numerical_slopes

from data.batches import comparison_batches
from data.sources import open_source
from data.tokenizer import Tokenizer
from experiments.contrastive import train_dpo as contrastive_script
from experiments.contrastive.batches import encode_contrast, with_other_prompts
from experiments.contrastive.objective import contrastive
from objectives import direct


def in_loops(logp, ranks):
    losses = []
    for x, rank in zip(logp, ranks, strict=True):
        real = [c for c in range(len(x)) if rank[c]]
        best = min(real, key=lambda c: rank[c])
        losses.append(-np.log(np.exp(x[best]) / sum(np.exp(x[c]) for c in real)))
    return np.array(losses)


def test_the_loss_equals_loops():
    logp = -np.abs(normal(4, 4)) - 1
    ranks = RANKS_OF_FOUR
    loss = partial(contrastive, ranks_BC=ranks, tokens_BC=np.ones((4, 4)))
    with jax.enable_x64(True):
        losses = loss(logp)
        grad = jax.grad(lambda x: loss(x).sum())(jnp.array(logp))
    np.testing.assert_allclose(losses, in_loops(logp, ranks), atol=1e-6)
    want = numerical_slopes(partial(in_loops, ranks=ranks), logp)
    np.testing.assert_allclose(grad, want, atol=1e-6)
    assert (np.asarray(grad)[ranks == 0] == 0).all()


@pytest.fixture
def contrasts(tmp_path, monkeypatch):
    """Return comparisons, and a batch of eight of their contrasts of four prompts."""
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    source = open_source(
        str(write(tmp_path / "c.jsonl", comparison_rows())), "comparison", "train"
    )
    tokenizer = Tokenizer.train(["name a colour red 1 blue 2"] * 9, tmp_path, 290)
    batches = comparison_batches(
        with_other_prompts(source, 4), tokenizer, encode_contrast, batch_size=8, length=64
    )
    return source, tokenizer, batches


def test_a_contrast_is_the_best_response_after_its_own_prompt_and_others(contrasts):
    source, tokenizer, batches = contrasts
    made = with_other_prompts(source, 4)
    for i in range(len(source)):
        best = source[i]["responses"][source[i]["ranking"].index(1)]
        assert made[i]["response"] == best and made[i]["prompts"][0] == source[i]["prompt"]
        assert source[i]["prompt"] not in made[i]["prompts"][1:]
    batch = next(batches)
    assert batch["ranks_BC"].tolist() == [[1, 2, 2, 2]] * 8
    for tokens, masks in zip(batch["tokens_BCT"], batch["loss_mask_BCT"], strict=True):
        assert len({tokenizer.decode(t[m > 0]) for t, m in zip(tokens, masks, strict=True)}) == 1


def test_the_objective_on_its_own_batches_equals_loops(contrasts):
    _, tokenizer, batches = contrasts
    batch = next(batches)
    table, direction = np.random.default_rng(0).normal(size=(2, tokenizer.size, tokenizer.size))

    def whole(table):
        rows = [candidate_logps(table, batch, b) for b in range(8)]
        sums = [[sum(row[c].values()) for c in range(4)] for row in rows]
        return in_loops(sums, batch["ranks_BC"]).sum()

    objective = partial(direct.ranked_objective, mean_so_far, loss=contrastive)
    loss, weight, slope = loss_and_slope(objective, table, batch, direction)
    np.testing.assert_allclose(loss, whole(table), rtol=1e-6)
    np.testing.assert_allclose(slope, slope_of(whole, table, direction), rtol=2e-5)
    assert weight == 8


def test_contrast_of_instructions_starts_at_chance_and_is_learnt():
    """Four prompts for each response; the true one's token is the response's."""
    rng = np.random.default_rng(0)
    answers, others = rng.integers(0, 8, 400), rng.integers(1, 8, (400, 3))
    prompts = np.concatenate([answers[:, None], (answers[:, None] + others) % 8], axis=1)
    tokens = np.stack([prompts, np.broadcast_to(answers[:, None], (400, 4))], axis=2)
    batch = {
        "tokens_BCT": tokens,
        "segment_ids_BCT": tokens,
        "positions_BCT": tokens,
        "loss_mask_BCT": np.broadcast_to([0.0, 1.0], tokens.shape).astype(np.float32),
        "ranks_BC": np.broadcast_to([1, 2, 2, 2], (400, 4)),
    }
    objective = jax.jit(partial(direct.ranked_objective, bigram, batch=batch, loss=contrastive))

    def accuracy(table):
        return float(objective(table)[1][1]["first"][0]) / 400

    loss, (weight, _) = objective(jnp.zeros((8, 8)))
    assert float(loss / weight) == pytest.approx(np.log(4), rel=1e-5)
    starts = 1e-3 * jnp.float32(normal(40, 8, 8))
    assert np.mean([accuracy(table) for table in starts]) == pytest.approx(1 / 4, abs=0.03)
    assert accuracy(minimise(lambda table: objective(table)[0] / 400, starts[0], 300)) > 0.99


def test_the_script_lowers_the_loss_of_contrasts(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    data = write(tmp_path / "c.jsonl", comparison_rows())
    argv = ["--model.preset=tiny", "--model.vocab=296", f"--data={data}", f"--run={tmp_path}/run"]
    argv += ["--batch_size=8", "--length=64", "--optimizer.warmup=0", "--optimizer.lr=3e-3"]
    run(contrastive_script, *argv, "--steps=12", "--eval_every=12", "--max_new_tokens=4")
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"] and "eval/first" in rows[-1]


def test_one_instruction_is_a_mistake(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--model.preset=tiny", "--instructions=1"]
    assert "--instructions=1" in fails(contrastive_script, argv, capsys)
    assert not list(tmp_path.iterdir())
