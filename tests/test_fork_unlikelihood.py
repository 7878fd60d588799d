"""Unlikelihood (experiments/unlikelihood): loss against loops, what it lowers, its script."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from preference_cases import (
    candidate_logps,
    comparison_rows,
    loss_and_slope,
    mean_so_far,
    slope_of,
)
from running import rows_of, run, write
from test_direct import bigram, candidates, minimise, normal

from data.batches import comparison_batches
from data.sources import open_source
from data.tokenizer import Tokenizer
from experiments.unlikelihood import train_dpo as unlikelihood_script
from experiments.unlikelihood.batches import with_rank_weights
from experiments.unlikelihood.objective import unlikelihood, unlikelihood_objective
from objectives import likelihood


def test_the_loss_is_likelihood_or_unlikelihood_elementwise():
    logp = -np.abs(normal(4, 6)) - 0.05
    weights = np.array([1.0, -0.5, 0.0, 2.0, -1.0, 0.0]) * np.ones((4, 1))

    @np.vectorize
    def formula(x, w):
        return -w * np.log(np.exp(x)) if w >= 0 else w * np.log(1 - np.exp(x))

    with jax.enable_x64(True):
        losses = unlikelihood(logp, weights)
        grad = jax.grad(lambda x: unlikelihood(x, weights).sum())(jnp.array(logp))
    np.testing.assert_allclose(losses, formula(logp, weights), atol=1e-6)
    want = (formula(logp + 1e-6, weights) - formula(logp - 1e-6, weights)) / 2e-6
    np.testing.assert_allclose(grad, want, atol=1e-6)
    assert (np.asarray(grad)[:, weights[0] == 0] == 0).all()
    assert (np.asarray(grad)[:, weights[0] < 0] > 0).all()


def test_the_objective_on_its_own_batches_equals_loops(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    source = open_source(
        str(write(tmp_path / "c.jsonl", comparison_rows())), "comparison", "train"
    )
    tokenizer = Tokenizer.train(["name a colour red 1 blue 2"] * 9, tmp_path, 290)
    batches = comparison_batches(source, tokenizer, batch_size=8, length=64)
    batch = with_rank_weights(next(batches), 0.7)
    table, direction = np.random.default_rng(0).normal(size=(2, tokenizer.size, tokenizer.size))

    def in_loops(table):
        total = 0.0
        for b, ranks in enumerate(batch["ranks_BC"]):
            for c, logps in candidate_logps(table, batch, b).items():
                for x in logps.values():
                    total -= x if ranks[c] == 1 else 0.7 * np.log(1 - np.exp(x))
        return total

    objective = partial(unlikelihood_objective, mean_so_far)
    loss, weight, slope = loss_and_slope(objective, table, batch, direction)
    np.testing.assert_allclose(loss, in_loops(table), rtol=1e-6)
    np.testing.assert_allclose(slope, slope_of(in_loops, table, direction), rtol=2e-5)
    assert weight == batch["loss_mask_BCT"].sum() > 0


def test_unlikelihood_lowers_what_is_marked_bad_and_nothing_else():
    batch = candidates([[1, 2], [1, 2]], vocab=6)
    batch["tokens_BCT"][:] = [
        [[0, 1, 2, 2, 2, 2], [0, 3, 4, 4, 4, 4]],
        [[0, 1, 2, 2, 2, 2], [0, 3, 5, 5, 5, 5]],
    ]
    batch["loss_mask_BCT"][:] = [0, 0, 1, 0, 0, 0]
    batch = with_rank_weights(batch, 1.0)
    only_bad = {**batch, "weights_BCT": np.minimum(batch["weights_BCT"], 0)}
    start = jnp.float32(normal(6, 6))
    before = np.asarray(jax.nn.softmax(start))
    for chosen, good in ((batch, True), (only_bad, False)):
        loss = partial(unlikelihood_objective, bigram, batch=chosen)
        end = minimise(lambda table, loss=loss: loss(table)[0], start, 400)
        after = np.asarray(jax.nn.softmax(end))
        assert (after[3, [4, 5]] < 0.2 * before[3, [4, 5]]).all()
        assert after[1, 2] > 0.9 if good else after[1, 2] == before[1, 2]
        np.testing.assert_array_equal(np.delete(end, [1, 3], 0), np.delete(start, [1, 3], 0))


def test_unlikelihood_in_one_context_lowers_the_bad_token_and_never_the_good_one():
    """Good and bad answer follow the same token; at every step, and from many starts."""
    batch = candidates([[1, 2]], vocab=6)
    batch["tokens_BCT"][:, :, :3] = [[[0, 1, 2], [0, 1, 3]]]
    batch["loss_mask_BCT"][:] = [0, 0, 1, 0, 0, 0]
    batch = with_rank_weights(batch, 1.0)

    def course(batch):
        """Return the probabilities of what follows token 1, [starts, steps, V]."""
        slope = jax.grad(lambda table: unlikelihood_objective(bigram, table, batch)[0])

        def descend(table, _):
            return table - 0.5 * slope(table), table[1]

        tables = jax.vmap(lambda x: jax.lax.scan(descend, x, None, 100)[1])
        return np.asarray(jax.nn.softmax(jax.jit(tables)(jnp.float32(normal(20, 6, 6)))))

    good, bad = course(batch)[..., 2], course(batch)[..., 3]
    assert (np.diff(bad / good) < 0).all() and (bad[:, -1] < 0.1 * bad[:, 0]).all()
    assert (np.diff(good) >= 0).all() and (good[:, -1] > 0.9).all()
    swapped = course({**batch, "weights_BCT": batch["weights_BCT"][:, ::-1]})[..., 2]
    assert (swapped[:, -1] < 0.1 * swapped[:, 0]).all()  # control: marked bad, it goes


def test_unlikelihood_also_unlearns_what_the_model_is_sure_of():
    """At a margin of 16 nats float32's log p is 0 to rounding, and the loss is clamped."""

    def loss(margin):
        logits = jnp.array([[[margin, 0.0]]])
        logps = likelihood.label_logprobs(logits, jnp.array([[0]]))
        return unlikelihood(logps, jnp.float32([[-1.0]]))[0, 0]

    for margin in (0.0, 10.0, 15.0):
        assert float(jax.grad(loss)(margin)) > 0.3  # exactly: p
    assert float(jax.grad(loss)(16.0)) > 0.05 and np.isfinite(float(loss(1e3)))


def test_the_script_parts_wanted_from_unwanted_judgements(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    words = {True: "white", False: "black"}
    rows = [
        {"prompt": f"colour {i}", "response": words[i % 2 > 0], "desirable": i % 2 > 0}
        for i in range(40)
    ]
    data = write(tmp_path / "judged.jsonl", rows)
    argv = ["--model.preset=tiny", "--model.vocab=296", f"--data={data}", f"--run={tmp_path}/run"]
    argv += ["--batch_size=8", "--length=64", "--optimizer.warmup=0", "--optimizer.lr=1e-2"]
    run(unlikelihood_script, *argv, "--unpaired", "--steps=12", "--eval_every=0")
    found = rows_of(tmp_path / "run")
    assert found[-1]["wanted"] - found[-1]["unwanted"] > found[0]["wanted"] - found[0]["unwanted"]
