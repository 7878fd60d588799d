"""Likelihood and reward objectives against float64 loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import LanguageOutput, ScalarOutput
from objectives.likelihood import likelihood_objective, token_logprobs
from objectives.reward import bradley_terry, last_token, ranking_loss, ranking_objective


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return (
        x
        - x.max(-1, keepdims=True)
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_logprob_t_is_that_of_token_t_given_those_before():
    logits = 5 * normal(3, 6, 11)
    tokens = np.random.default_rng(1).integers(0, 11, (3, 6))
    got = token_logprobs(logits, tokens)
    logp = log_softmax(logits)
    want = [[0.0 if t == 0 else logp[b, t - 1, tokens[b, t]] for t in range(6)] for b in range(3)]
    assert got.dtype == jnp.float32 and got.shape == tokens.shape
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.isfinite(token_logprobs(logits * 1e30, tokens)).all()
    # The softmax itself is in float32.
    rounded = token_logprobs(logits.astype(jnp.bfloat16), tokens)
    np.testing.assert_allclose(
        rounded, token_logprobs(jnp.float32(logits.astype(jnp.bfloat16)), tokens)
    )


def lookup(params, tokens, segments, positions):
    """Apply a model whose logits are its parameters, a [B, T, V] table."""
    return LanguageOutput(params, jnp.eye(params.shape[-1]))


def test_an_auxiliary_loss_of_the_layers_is_added_for_each_token():
    table_BTV = normal(2, 6, 9)
    tokens = np.random.default_rng(1).integers(0, 9, (2, 6)).astype(np.int32)
    batch = dict.fromkeys(("tokens_BT", "segment_ids_BT", "positions_BT"), tokens)
    batch["loss_mask_BT"] = np.float32([[0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0]])

    def with_auxiliary(params, *batch):
        return lookup(params, *batch).replace(auxiliary_loss=jnp.float32(0.25))

    plain, (tokens, metrics) = likelihood_objective(lookup, table_BTV, batch)
    loss, (weight, more) = likelihood_objective(with_auxiliary, table_BTV, batch)
    assert float(loss - plain) == pytest.approx(4 * 0.25) and float(weight) == float(tokens) == 4
    assert metrics == {} and [float(x) for x in more["auxiliary_loss"]] == [1.0, 4.0]


def test_likelihood_gradient_is_non_zero_on_exactly_the_masked_positions():
    tokens = np.random.default_rng(1).integers(0, 7, (2, 6))
    mask = np.array([[0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0]], np.float32)
    batch = {
        "tokens_BT": tokens,
        "segment_ids_BT": tokens,
        "positions_BT": tokens,
        "loss_mask_BT": mask,
    }
    logits = normal(2, 6, 7)
    objective = jax.value_and_grad(partial(likelihood_objective, lookup), has_aux=True)
    (loss, (weight, _)), grad = objective(logits, batch)
    logp = log_softmax(logits)
    want = -sum(logp[b, t - 1, tokens[b, t]] for b, t in zip(*np.nonzero(mask), strict=True))
    assert float(loss) == pytest.approx(want, rel=1e-5) and float(weight) == 4
    touched = np.abs(grad).sum(-1) > 0  # token t is predicted at t - 1
    assert (touched[:, :-1] == (mask[:, 1:] > 0)).all() and not touched[:, -1].any()
    loss, (weight, _) = likelihood_objective(lookup, logits, {**batch, "loss_mask_BT": mask * 0})
    assert float(loss) == 0 and float(weight) == 0  # the step divides, finds no number and skips


def pairwise(rewards, ranks, margins, coefficient):
    """Return the mean over pairs, prompt by prompt, in float64."""
    losses, valid = [], []
    for reward, rank, margin in zip(rewards.astype(np.float64), ranks, margins, strict=True):
        pairs = []
        for i in range(len(rank)):
            for j in range(len(rank)):
                if rank[i] > 0 and rank[j] > 0 and rank[i] < rank[j]:
                    gap = reward[i] - reward[j] - margin
                    pairs.append(
                        np.log1p(np.exp(-gap)) + coefficient * (reward[i] + reward[j]) ** 2
                    )
        losses.append(np.mean(pairs) if pairs else 0.0)
        valid.append(float(bool(pairs)))
    return losses, valid


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_ranking_loss_and_gradient_equal_a_loop_over_pairs(coefficient):
    rewards = 2 * np.float64(normal(40, 5))
    margins = np.abs(np.float64(normal(40, seed=2)))
    # Ties and absent candidates, full and empty rows.
    ranks = np.random.default_rng(1).integers(0, 5, (40, 5))
    ranks[0], ranks[1], ranks[2] = [3, 1, 2, 5, 4], 0, 2
    with jax.enable_x64(True):

        def of(x):
            return ranking_loss(x, ranks, margins, coefficient)

        (losses, valid), pull = jax.jit(partial(jax.vjp, of))(jnp.array(rewards))
        (grad,) = pull((jnp.ones(40), jnp.zeros(40, jnp.float32)))
    want, want_valid = pairwise(rewards, ranks, margins, coefficient)
    np.testing.assert_allclose(losses, want, atol=1e-6)
    assert valid.tolist() == want_valid and want_valid[:3] == [1, 0, 0]
    slope = np.zeros_like(rewards)
    for c in range(5):  # in all rows at once, of which each has a loss of its own
        up, down = (
            pairwise(rewards + step * np.eye(5)[c], ranks, margins, coefficient)[0]
            for step in (1e-5, -1e-5)
        )
        slope[:, c] = (np.array(up) - down) / 2e-5
    np.testing.assert_allclose(grad, slope, atol=1e-6)
    assert (np.asarray(grad)[ranks == 0] == 0).all() and np.abs(slope).max() > 0.1
    # Control: margins count.
    assert (
        np.abs(np.array(losses) - pairwise(rewards, ranks, margins * 0, coefficient)[0]).max()
        > 0.1
    )


def test_two_candidates_are_plain_bradley_terry():
    rewards = 3 * normal(8, 2)
    zero = np.zeros(8, np.float32)
    ranks = np.array([[1, 2], [2, 1]] * 4)
    chosen = rewards[np.arange(8), ranks.argmin(1)]
    rejected = rewards[np.arange(8), ranks.argmax(1)]
    losses, _ = ranking_loss(rewards, ranks, zero)
    np.testing.assert_allclose(
        losses, np.log1p(np.exp(-(chosen - rejected).astype(np.float64))), rtol=1e-5
    )
    np.testing.assert_allclose(bradley_terry(chosen, rejected), losses, rtol=1e-6)
    assert np.isfinite(bradley_terry(jnp.float32(-1e4), jnp.float32(1e4)))
    # A margin asks for a wider gap; center_rewards_coef costs what lies off 0, chosen or rejected.
    assert (np.asarray(ranking_loss(rewards, ranks, zero + 1)[0]) > np.asarray(losses)).all()
    shifted = ranking_loss(rewards + 7, ranks, zero)[0]
    np.testing.assert_allclose(shifted, losses, rtol=1e-4, atol=1e-5)
    centred = ranking_loss(rewards, ranks, zero, 0.01)[0]
    np.testing.assert_allclose(centred - losses, 0.01 * rewards.sum(1) ** 2, rtol=1e-2, atol=1e-5)


def test_ties_and_absent_candidates_get_no_gradient():
    ranks = np.array([[1, 0, 2, 2], [0, 1, 1, 0]])

    def loss(rewards):
        return ranking_loss(rewards, ranks, jnp.zeros(2), 0.1)[0].sum()

    grad = np.asarray(jax.grad(loss)(normal(2, 4)))
    assert (grad[0] != 0).tolist() == [True, False, True, True] and (grad[1] == 0).all()


def test_last_token_on_either_padding_side():
    scalars = np.arange(18, dtype=np.float32).reshape(3, 6)
    segments = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
    assert last_token(scalars, segments).tolist() == [2, 11, 16]
    grad = jax.grad(lambda x: last_token(x, segments).sum())(scalars)
    assert np.argwhere(grad).tolist() == [[0, 2], [1, 5], [2, 4]]


def comparison_batch(ranks, length=6, seed=0):
    rng, (rows, candidates) = np.random.default_rng(seed), np.shape(ranks)
    shape = (rows, candidates, length)
    real = np.arange(length) < rng.integers(3, length + 1, (rows, candidates, 1))
    real &= np.array(ranks)[..., None] > 0
    return {
        "tokens_BCT": rng.integers(0, 9, shape) * real,
        "segment_ids_BCT": real.astype(np.int32),
        "positions_BCT": np.broadcast_to(np.arange(length), shape) * real,
        "loss_mask_BCT": (real & (np.arange(length) >= 2)).astype(np.float32),
        "ranks_BC": np.array(ranks),
        "margin_B": np.zeros(rows, np.float32),
    }


def test_ranking_objective_with_language_model_loss_on_the_best():
    batch = comparison_batch([[2, 1, 3], [1, 0, 2], [1, 1, 0], [3, 2, 1]])
    values_V, table_VV = normal(9), normal(9, 9, seed=1)

    def scalar(params, tokens, segments, positions):
        """Apply a scalar model whose logits are a bigram table."""
        return ScalarOutput(params["values"][tokens], params["table"][tokens], jnp.eye(9))

    params = {"values": jnp.array(values_V), "table": jnp.array(table_VV)}
    plain = partial(ranking_objective, scalar, params)
    loss, (weight, metrics) = plain(batch)
    # -1 for an absent candidate, whose reward counts not.
    end = batch["segment_ids_BCT"].sum(-1, keepdims=True) - 1
    rewards = values_V[np.take_along_axis(batch["tokens_BCT"], end, 2)[..., 0]]
    want, valid = pairwise(rewards, batch["ranks_BC"], batch["margin_B"], 0)
    assert float(loss) == pytest.approx(sum(want), rel=1e-5) and float(weight) == sum(valid) == 3
    # Each pair: row, better, worse.
    pairs = [(0, 1, 0), (0, 0, 2), (0, 1, 2), (1, 0, 2), (3, 2, 1), (3, 2, 0), (3, 1, 0)]
    better, worse = (np.array([rewards[b, pair[k]] for b, *pair in pairs]) for k in (0, 1))
    right = (better > worse).sum() + 0.5 * (better == worse).sum()
    assert [float(x) for x in metrics["accuracy"]] == [right, 7]
    for name, parts in (("margin", better - worse), ("chosen", better), ("rejected", worse)):
        assert float(metrics[name][0]) == pytest.approx(parts.sum(), rel=1e-4)

    both, (_, metrics) = plain(batch, lm_coef=0.5)
    nll = 0.0
    logp = log_softmax(table_VV)
    for b, best in ((0, 1), (1, 0), (3, 2)):  # row 2 has no pair, so it does not count at all
        tokens, mask = batch["tokens_BCT"][b, best], batch["loss_mask_BCT"][b, best]
        nll -= np.mean([logp[tokens[t - 1], tokens[t]] for t in np.nonzero(mask)[0]])
    assert float(both - loss) == pytest.approx(0.5 * nll, rel=1e-4)
    assert (
        float(metrics["nll"][0]) == pytest.approx(nll, rel=1e-4) and float(metrics["nll"][1]) == 3
    )
