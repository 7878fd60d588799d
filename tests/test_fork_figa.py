"""FIGA (experiments/figa): token weights against a recursive edit distance, loss, script."""

from functools import cache, partial

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
from test_direct import candidates, normal

from data.batches import comparison_batches
from data.sources import open_source
from data.tokenizer import Tokenizer
from experiments.figa import train_dpo as figa_script
from experiments.figa.batches import edit_weights, with_edit_weights
from experiments.figa.objective import figa, figa_objective
from model import LanguageOutput


def test_edit_weights_mark_what_a_revision_changed():
    a, b, c, d, e = range(5)
    assert edit_weights([a, b, c], [a, d, c]) == ([0, -0.5, 0], [0, 1, 0])  # substituted
    assert edit_weights([a, b, c], [a, c]) == ([0, -0.5, 0], [0, 0])  # dropped
    assert edit_weights([a, c], [a, b, c, e], kept=0.1) == ([0, 0], [0.1, 1, 0.1, 1])  # added
    assert edit_weights([a, b], [a, b]) == ([0, 0], [0, 0])


def test_edit_weights_are_of_a_shortest_edit():
    @cache
    def distance(a, b):  # Levenshtein's, by its definition
        if not a or not b:
            return len(a) + len(b)
        swapped = distance(a[1:], b[1:]) + (a[0] != b[0])
        return min(swapped, distance(a[1:], b) + 1, distance(a, b[1:]) + 1)

    def kept_places(weights):
        return [-1, *(i for i, weight in enumerate(weights) if weight == 0), len(weights)]

    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = (tuple(rng.integers(3, size=rng.integers(8)).tolist()) for _ in range(2))
        before, after = map(kept_places, edit_weights(list(a), list(b)))
        assert [a[i] for i in before[1:-1]] == [b[j] for j in after[1:-1]]
        # Edits between two tokens that are kept.
        between = np.maximum(np.diff(before) - 1, np.diff(after) - 1)
        assert between.sum() == distance(a, b), (a, b)


def test_tokens_that_a_revision_keeps_have_no_gradient():
    prompt = [5, 6]
    batch = candidates([[2, 1, 0]], vocab=9)
    batch["tokens_BCT"][0, :2] = [[*prompt, 1, 2, 3, 0], [*prompt, 1, 4, 3, 7]]
    batch["loss_mask_BCT"][0, :2] = [[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    weighted = with_edit_weights(batch, 0.5)
    changed = [[0, 0, 0, -0.5, 0, 0], [0, 0, 0, 1, 0, 1], [0] * 6]
    assert weighted["weights_BCT"][0].tolist() == changed

    def table(params, tokens, segments, positions):
        """Return logits of its own for each row and position."""
        return LanguageOutput(params, jnp.eye(9))

    logits = jnp.float32(normal(3, 6, 9))
    gradient = jax.jit(jax.value_and_grad(partial(figa_objective, table), has_aux=True))
    (_, (weight, _)), grad = gradient(logits, weighted)
    touched = np.abs(np.asarray(grad)).sum(-1) > 0  # token t is predicted at t - 1
    assert np.argwhere(touched).tolist() == [[0, 2], [1, 2], [1, 4]] and float(weight) == 3
    assert grad[0, 2, 2] > 0 > grad[1, 2, 4]  # descent: the dropped token down, the new one up


def test_the_loss_is_a_weighted_likelihood_elementwise():
    logp = -np.abs(normal(4, 6)) - 0.05
    weights = np.array([1.0, -0.5, 0.0, 2.0, -1.0, 0.0]) * np.ones((4, 1))
    with jax.enable_x64(True):
        losses = figa(logp, weights)
        grad = jax.grad(lambda x: figa(x, weights).sum())(jnp.array(logp))
    np.testing.assert_allclose(losses, -weights * np.log(np.exp(logp)), atol=1e-6)
    np.testing.assert_allclose(grad, -weights, atol=1e-6)


def test_the_objective_on_its_own_batches_equals_loops(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    source = open_source(
        str(write(tmp_path / "c.jsonl", comparison_rows())), "comparison", "train"
    )
    tokenizer = Tokenizer.train(["name a colour red 1 blue 2"] * 9, tmp_path, 290)
    batches = comparison_batches(source, tokenizer, batch_size=8, length=64)
    batch = with_edit_weights(next(batches), 0.3)
    table, direction = np.random.default_rng(0).normal(size=(2, tokenizer.size, tokenizer.size))

    def in_loops(table):
        total = 0.0
        for b in range(8):
            for c, logps in candidate_logps(table, batch, b).items():
                total -= sum(batch["weights_BCT"][b, c, t] * x for t, x in logps.items())
        return total

    objective = partial(figa_objective, mean_so_far)
    loss, weight, slope = loss_and_slope(objective, table, batch, direction)
    np.testing.assert_allclose(loss, in_loops(table), rtol=1e-6)
    np.testing.assert_allclose(slope, slope_of(in_loops, table, direction), rtol=2e-5)
    assert weight == (batch["weights_BCT"] != 0).sum() > 0


def test_the_script_raises_what_was_added_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    data = write(tmp_path / "c.jsonl", comparison_rows())
    argv = ["--model.preset=tiny", "--model.vocab=296", f"--data={data}", f"--run={tmp_path}/run"]
    argv += ["--batch_size=8", "--length=64", "--optimizer.warmup=0", "--optimizer.lr=1e-2"]
    run(figa_script, *argv, "--steps=8", "--eval_every=4", "--max_new_tokens=4")
    rows = rows_of(tmp_path / "run")
    gap = [row["wanted"] - row["unwanted"] for row in rows]
    assert gap[-1] > gap[0] and "eval/loss" in rows[-1]
