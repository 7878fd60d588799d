"""PPO against float64 loops, exact enumeration and the closed form of its optimum."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train_ppo
from model import LanguageOutput, ScalarOutput
from objectives.policy import (
    adapt_kl,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_estimate,
    missing_eos,
    policy_objective,
    response_logprobs,
    response_values,
    token_rewards,
    value_objective,
    whiten,
    with_text,
)
from rollout import check_first_update, ended
from train_state import init_state
from train_step import make_train_step


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def log_softmax(x):
    return np.asarray(jax.nn.log_softmax(np.asarray(x, np.float32)), np.float64)


def random_mask(batch=7, length=9):
    lengths = np.random.default_rng(3).integers(1, length + 1, batch)
    return (np.arange(length) < lengths[:, None]).astype(np.float32), lengths


def test_kl_estimates_are_unbiased_by_enumeration():
    logp, reference = log_softmax(normal(9)), log_softmax(normal(9, seed=1))
    kl = (np.exp(logp) * (logp - reference)).sum()
    mean = {
        k: float((np.exp(logp) * kl_estimate(logp, reference, k)).sum())
        for k in ("k1", "k2", "k3")
    }
    assert mean["k1"] == pytest.approx(kl, rel=1e-5) == pytest.approx(mean["k3"], rel=1e-5)
    assert abs(mean["k2"] - kl) > 0.01 * kl  # control: k2 is biased
    x, y = np.float32([[-1e-4, 0.0, 1e-4, -20.0, 5.0]]), np.float32([[0.0, 0.0, 0.0, 0.5, -5.0]])
    assert (np.asarray(kl_estimate(x, y, "k3")) >= 0).all() and kl_estimate(x, y, "k3")[0, 1] == 0
    assert (np.asarray(kl_estimate(x, y, "k1")) < 0).any()  # control


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_a_loop(gamma, gae_lambda):
    mask, lengths = random_mask()
    rewards, values = normal(7, 9) * mask, normal(7, 9, seed=1) * mask
    advantages, returns = gae(rewards, values, gamma=gamma, gae_lambda=gae_lambda)
    want = np.zeros((7, 9))
    for b, length in enumerate(lengths):
        for t in range(length):  # A_t = sum of (gamma gae_lambda)^l delta_{t+l}, the definition
            for u in range(t, length):
                following = float(values[b, u + 1]) if u + 1 < length else 0.0
                delta = float(rewards[b, u]) + gamma * following - float(values[b, u])
                want[b, t] += (gamma * gae_lambda) ** (u - t) * delta
    np.testing.assert_allclose(advantages, want, atol=1e-5)
    np.testing.assert_allclose(returns, want + values, atol=1e-5)
    assert advantages.dtype == jnp.float32 and (np.asarray(advantages)[mask == 0] == 0).all()
    if gae_lambda == 1:  # then returns are the rewards still to come
        np.testing.assert_allclose(
            returns, np.flip(np.cumsum(np.flip(rewards, 1), 1), 1), atol=1e-5
        )


@pytest.mark.parametrize("unbiased", [False, True])
def test_whitening_uses_real_tokens_only(unbiased):
    mask, _ = random_mask()
    x = 3 * normal(7, 9) + 5 + 100 * (1 - mask)  # what lies in the padding must not matter
    real = x[mask > 0].astype(np.float64)
    deviation = np.sqrt(real.var(ddof=int(unbiased)) + 1e-8)
    white = np.asarray(whiten(x, mask, unbiased=unbiased))
    np.testing.assert_allclose(white[mask > 0], (real - real.mean()) / deviation, atol=2e-5)
    assert (white[mask == 0] == 0).all()
    kept = np.asarray(whiten(x, mask, shift_mean=False, unbiased=unbiased))
    np.testing.assert_allclose(
        kept[mask > 0], (real - real.mean()) / deviation + real.mean(), atol=2e-5
    )
    assert (kept[mask == 0] == 0).all()
    other = np.asarray(whiten(x, mask, unbiased=not unbiased))
    assert np.abs(other - white).max() > 1e-3  # control: n and n - 1 differ
    assert np.isfinite(
        whiten(np.ones((1, 1), np.float32), np.ones((1, 1), np.float32), unbiased=True)
    ).all()


def test_clipped_losses_and_gradients_equal_numpy():
    logp, old, advantage, before, returns = (
        np.float64(normal(50, 4, seed=k)) - (k < 2) for k in range(5)
    )
    ratio = np.exp(logp - old)
    want = -np.minimum(advantage * ratio, advantage * np.clip(ratio, 0.8, 1.28))
    # Further would be rewarded, so no gradient.
    beyond = np.where(advantage > 0, ratio > 1.28, ratio < 0.8)
    with jax.enable_x64(True):
        of = jax.jit(
            partial(jax.vjp, lambda x: clipped_policy_loss(x - old, advantage, 0.2, 0.28))
        )
        losses, pull = of(jnp.array(logp))
        (grad,) = pull(jnp.ones((50, 4)))
    np.testing.assert_allclose(losses, want, atol=1e-6)
    np.testing.assert_allclose(grad, np.where(beyond, 0, -advantage * ratio), atol=1e-6)
    assert 0.1 < beyond.mean() < 0.9

    mask = (np.arange(4) < np.random.default_rng(5).integers(1, 5, 50)[:, None]).astype(np.float64)
    # Those of two prompt tokens, and of responses of up to four.
    scalars = 0.5 * np.float64(normal(50, 7, seed=6))
    value = scalars[:, 1:5]  # of the states in which those were emitted
    near = np.clip(value, before - 0.2, before + 0.2)
    want = 0.5 * np.maximum((value - returns) ** 2, (near - returns) ** 2)
    # The clipped one counts, and is constant.
    held = (near != value) & ((near - returns) ** 2 > (value - returns) ** 2)
    slope = np.zeros_like(scalars)
    slope[:, 1:5] = np.where(held, 0, value - returns) * mask
    tokens = np.zeros((50, 6), np.int32)
    batch = {
        "tokens_BT": tokens,
        "segment_ids_BT": tokens,
        "positions_BT": tokens,
        "response_BR": tokens[:, 2:],
    }
    batch |= {"value_mask_BR": mask, "old_values_BR": before, "returns_BR": returns}

    def first_six(params, *_):
        return ScalarOutput(params[:, :6], None, None)

    with jax.enable_x64(True):
        losses = jax.jit(clipped_value_loss)(value, before, returns, 0.2)
        objective = partial(value_objective, first_six, clip=0.2)
        (loss, (count, _)), grad = jax.jit(jax.value_and_grad(objective, has_aux=True))(
            jnp.array(scalars), batch
        )
    np.testing.assert_allclose(losses, want, atol=1e-6)
    assert (
        float(loss) == pytest.approx((want * mask).sum(), abs=1e-6) and float(count) == mask.sum()
    )
    np.testing.assert_allclose(grad, slope, atol=1e-6)
    assert 0.1 < held[mask > 0].mean() < 0.9


def test_one_score_a_row_at_its_index():
    mask, lengths = random_mask()
    score = normal(7) + 3
    kl = normal(7, 9, seed=1)
    got = np.asarray(token_rewards(score, kl, mask, jnp.float32(0.1), lengths - 1))
    assert got.dtype == np.float32
    scores = got + 0.1 * kl * mask
    for b, length in enumerate(lengths):
        assert scores[b, length - 1] == pytest.approx(score[b], abs=1e-5)
    np.testing.assert_allclose(scores.sum(1), score, atol=1e-5)
    # It is 0 anywhere else.
    np.testing.assert_allclose(np.abs(scores).sum(1), np.abs(score), atol=1e-5)
    assert (got[mask == 0] == 0).all()
    after = np.asarray(
        token_rewards(score, kl * 0, mask, jnp.float32(0.1), np.minimum(lengths, 8))
    )
    assert (after.argmax(1) == np.minimum(lengths, 8)).all()


def test_adaptive_kl_moves_towards_its_target():
    adapt = partial(adapt_kl, jnp.float32(0.1), target=6.0, horizon=10_000, episodes=500)
    assert float(adapt(kl=6.0)) == pytest.approx(0.1)
    assert float(adapt(kl=6.6)) == pytest.approx(0.1 * (1 + 0.1 * 500 / 10_000))
    assert float(adapt(kl=600.0)) == pytest.approx(0.1 * (1 + 0.2 * 500 / 10_000))  # held to 20 %
    assert float(adapt(kl=0.0)) == pytest.approx(0.1 * (1 - 0.2 * 500 / 10_000))


# A policy small enough to enumerate: a prompt of one token, then two tokens out of three.
FIRST, SECOND = (x.reshape(-1) for x in np.indices((3, 3)))
PAIRS = np.stack([FIRST, SECOND], axis=1)


def tabular(params, tokens_BT, segment_ids_BT, positions_BT):
    """Return first tokens' logits from one table, second ones' from a row for each first token."""
    batch = tokens_BT.shape[0]
    first = jnp.broadcast_to(params["first"], (batch, 3))
    logits_BTV = jnp.stack(
        [first, params["second"][tokens_BT[:, 1]], jnp.zeros((batch, 3))], axis=1
    )
    return LanguageOutput(logits_BTV, jnp.eye(3))


def enumerated():
    tokens = np.concatenate([np.zeros((9, 1), int), PAIRS], axis=1)
    inputs = {
        "tokens_BT": tokens,
        "segment_ids_BT": tokens * 0 + 1,
        "positions_BT": tokens * 0 + np.arange(3),
    }
    return {**inputs, "response_BR": PAIRS, "mask_BR": np.ones((9, 2), np.float32)}


def tables(seed):
    return {
        "first": jnp.array(normal(3, seed=seed)),
        "second": jnp.array(normal(3, 3, seed=seed + 1)),
    }


def sequence_probs(params, temperature=1.0):
    logp = jax.nn.log_softmax(params["first"] / temperature)[FIRST]
    return jnp.exp(logp + jax.nn.log_softmax(params["second"] / temperature)[FIRST, SECOND])


def exact_advantages(params, rewards_BR):
    """Return Q - V of each enumerated token, exact, times its sequence's probability.

    So weighted, the objective's sum over the nine sequences is the expectation over samples.
    """
    p_B = sequence_probs(params)
    still_BR = jnp.flip(jnp.cumsum(jnp.flip(rewards_BR, 1), 1), 1)
    weighted_BR = p_B[:, None] * still_BR
    value_0 = weighted_BR[:, 0].sum()
    values_3 = weighted_BR[:, 1].reshape(3, 3).sum(1) / p_B.reshape(3, 3).sum(1)
    values_BR = jnp.stack([jnp.full(9, value_0), values_3[FIRST]], axis=1)
    return p_B[:, None] * gae(rewards_BR, values_BR, gamma=1.0, gae_lambda=1.0)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_at_ratio_one_is_the_exact_policy_gradient(temperature):
    params = tables(0)
    batch = enumerated()
    reward_B = normal(9, seed=5)
    want = jax.grad(lambda p: (sequence_probs(p, temperature) * reward_B).sum())(params)
    rewards_BR = token_rewards(reward_B, jnp.zeros((9, 2)), batch["mask_BR"], 0.0, jnp.full(9, 1))
    scaled = jax.tree.map(lambda x: x / temperature, params)
    batch = {
        **batch,
        "old_logp_BR": jax.jit(response_logprobs, static_argnums=(0, 3))(
            tabular, params, batch, temperature
        ),
        "advantages_BR": jax.jit(exact_advantages)(scaled, rewards_BR),
    }
    objective = partial(policy_objective, tabular, clip=0.2, temperature=temperature)
    gradient = jax.jit(jax.grad(objective, has_aux=True))
    grad, (tokens, metrics) = gradient(params, batch)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, -w, atol=1e-6), grad, want)
    # Two programs may round a division by the temperature in two ways.
    rounding = 0 if temperature == 1 else 1e-12
    assert (
        float(tokens) == 18
        and float(metrics["approx_kl"][0]) <= rounding
        and float(metrics["clipped"][0]) == 0
    )
    logp = np.log(np.asarray(sequence_probs(params, temperature)))
    np.testing.assert_allclose(batch["old_logp_BR"].sum(1), logp, atol=1e-5)
    # A constant baseline changes nothing.
    raised_BR = batch["advantages_BR"] + sequence_probs(scaled)[:, None]
    grad, _ = gradient(params, {**batch, "advantages_BR": raised_BR})
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, -w, atol=1e-6), grad, want)
    # Control: off by one token.
    swapped = {**batch, "advantages_BR": batch["advantages_BR"][:, ::-1]}
    grad, _ = gradient(params, swapped)
    assert np.abs(grad["first"] + want["first"]).max() > 1e-3


def test_updates_approach_the_closed_form():
    reference = tables(0)
    batch = enumerated()
    reward_B = 1.5 * normal(9, seed=5)
    reference_BR = response_logprobs(tabular, reference, batch, 1.0)
    objective = partial(policy_objective, tabular, clip=0.2, temperature=1.0)
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, 800))

    @jax.jit
    def train(beta):
        def iteration(_, carry):
            params, opt_state = carry
            old_BR = response_logprobs(tabular, params, batch, 1.0)
            kl_BR = kl_estimate(old_BR, reference_BR, "k1")
            rewards_BR = token_rewards(reward_B, kl_BR, batch["mask_BR"], beta, jnp.full(9, 1))
            targets = {
                "old_logp_BR": old_BR,
                "advantages_BR": exact_advantages(params, rewards_BR),
            }
            for _ in range(2):  # epochs: in the second the ratio is no longer 1
                grads, _ = jax.grad(objective, has_aux=True)(params, {**batch, **targets})
                updates, opt_state = optimizer.update(grads, opt_state)
                params = optax.apply_updates(params, updates)
            return params, opt_state

        return sequence_probs(
            jax.lax.fori_loop(0, 400, iteration, (reference, optimizer.init(reference)))[0]
        )

    def closed_form(beta):
        weights = sequence_probs(reference) * np.exp(reward_B / beta)
        return weights / weights.sum()

    def distance(p, q):  # total variation
        return float(0.5 * np.abs(np.asarray(p) - np.asarray(q)).sum())

    for beta in (0.5, 2.0):
        assert distance(train(beta), closed_form(beta)) < 0.02
    assert distance(train(0.5), sequence_probs(reference)) > 0.2  # control: it went somewhere
    assert distance(train(0.5), closed_form(2.0)) > 0.1  # control: and beta says where


def test_objectives_ignore_padding_and_pick_the_emitting_state():
    batch = enumerated()
    mask = np.ones((9, 2), np.float32)
    mask[::2, 1] = 0
    padded = {**batch, "mask_BR": mask, "value_mask_BR": mask, "advantages_BR": normal(9, 2)}
    # These would overflow if not masked.
    padded["old_logp_BR"] = np.where(mask > 0, -1.0, -1e4).astype(np.float32)
    objective = partial(policy_objective, tabular, clip=0.2, temperature=1.0)
    (loss, (tokens, _)), grads = jax.value_and_grad(objective, has_aux=True)(tables(0), padded)
    assert (
        np.isfinite(loss)
        and all(np.isfinite(g).all() for g in grads.values())
        and float(tokens) == 13
    )
    logp = response_logprobs(tabular, tables(0), padded, 1.0)
    losses = clipped_policy_loss(logp + 1.0, padded["advantages_BR"], 0.2, 0.2)
    want = losses[mask > 0].sum()
    assert float(loss) == pytest.approx(float(want), rel=1e-5)

    def scalars(params, tokens, segments, positions):  # the scalar at index t of row b is 10 b + t
        scalars_BT = params + 10.0 * jnp.arange(9)[:, None] + jnp.arange(3)
        return ScalarOutput(scalars_BT, None, None)

    values = response_values(scalars, 0.0, batch)
    # Response tokens are at 1 and 2, emitted in the states 0 and 1.
    assert values[4].tolist() == [40, 41]
    padded |= {
        "old_values_BR": np.asarray(values),
        "returns_BR": np.asarray(values) + mask * 0.5 + (1 - mask) * 1e6,
    }
    loss, (tokens, metrics) = value_objective(scalars, 0.0, padded, clip=0.2)
    assert float(tokens) == 13 and float(loss) == pytest.approx(0.5 * 0.25 * 13)
    assert float(metrics["square_error"][0]) == pytest.approx(0.25 * 13)


def test_a_first_update_off_the_policy_is_refused():
    metrics = {"kl": 0.0, "sampler_gap": 0.0}
    update = {"approx_kl": 0.0, "clipped": 0.0}
    check_first_update(update, metrics, jnp.float32, 0)
    for wrong in (*metrics, *update):
        bad = [
            {name: 0.01 if name == wrong else x for name, x in part.items()}
            for part in (update, metrics)
        ]
        with pytest.raises(AssertionError):
            check_first_update(*bad, jnp.float32, 0)
    # Weights in int8 explain a gap, and nothing else.
    metrics["sampler_gap"] = 0.01
    check_first_update(update, metrics, jnp.float32, 0, int8=True)
    with pytest.raises(AssertionError):
        check_first_update({**update, "clipped": 0.01}, metrics, jnp.float32, 0, int8=True)


# ---- Further terms: entropy, pre-training text, an adaptive KL, the missing end


def numpy_table_rows(params):
    """Return the float64 logits that each token of the sequences is drawn from, [9, 2, 3]."""
    first, second = (np.asarray(params[name], np.float64) for name in ("first", "second"))
    return np.stack([np.broadcast_to(first, (9, 3)), second[FIRST]], axis=1)


def to_tables(slope_BRV):
    """Return gradients in the rows' logits as gradients in the tables."""
    second = np.zeros((3, 3))
    np.add.at(second, FIRST, slope_BRV[:, 1])
    return {"first": slope_BRV[:, 0].sum(0), "second": second}


def numpy_softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def some_targets(mask):
    return {
        **enumerated(),
        "mask_BR": mask,
        "old_logp_BR": normal(9, 2, seed=6) - 1,
        "advantages_BR": normal(9, 2),
    }


def test_entropy_bonus_equals_numpy():
    mask = np.ones((9, 2))
    mask[::2, 1] = 0
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), tables(0))

        def grad_of(coef):
            objective = partial(
                policy_objective, tabular, clip=0.2, temperature=0.7, entropy_coef=coef
            )
            return jax.value_and_grad(objective, has_aux=True)(params, some_targets(mask))

        (plain, _), without = grad_of(0.0)
        (loss, (tokens, metrics)), slopes = grad_of(0.3)
    p = numpy_softmax(numpy_table_rows(params) / 0.7)
    entropy = -(p * np.log(p)).sum(-1) * mask
    assert float(loss) - float(plain) == pytest.approx(-0.3 * entropy.sum(), abs=1e-6)
    assert float(metrics["entropy"][0]) / float(tokens) == pytest.approx(
        entropy.sum() / 13, abs=1e-6
    )
    slope = -p * (np.log(p) + (-(p * np.log(p)).sum(-1))[..., None]) / 0.7 * mask[..., None]
    want = jax.tree.map(lambda g, s: np.asarray(g) - 0.3 * s, without, to_tables(slope))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-6), slopes, want)
    assert np.abs(slope).max() > 0.01  # control


def text_rows(loss_mask):
    tokens = np.concatenate([np.zeros((9, 1), int), PAIRS], axis=1)
    loss_mask = np.concatenate([np.zeros((9, 1)), loss_mask], axis=1).astype(np.float32)
    places = {"segment_ids_BT": tokens * 0 + 1, "positions_BT": tokens * 0 + np.arange(3)}
    return {"tokens_BT": tokens, "loss_mask_BT": loss_mask, **places}


def test_pretraining_text_adds_its_mean_loss_whatever_the_microbatches():
    params = tables(0)
    mask = np.ones((9, 2), np.float32)
    kept = np.zeros((9, 2), np.float32)
    mask[:4, 1], kept[2:, 0], kept[7:, 1] = 0, 1, 1  # unequal counts, also over the parts
    batch = with_text(some_targets(mask), text_rows(kept), 1.7)
    objective = partial(policy_objective, tabular, clip=0.2, temperature=1.0)
    alone = jax.grad(objective, has_aux=True)(params, some_targets(mask))[0]
    p = numpy_softmax(numpy_table_rows(params))
    said = np.take_along_axis(p, PAIRS[..., None], -1)[..., 0]
    slope = (p - np.eye(3)[PAIRS]) * kept[..., None] / kept.sum()
    want = jax.tree.map(lambda g, s: np.asarray(g) / mask.sum() + 1.7 * s, alone, to_tables(slope))
    for parts in (1, 3):
        step = make_train_step(objective, optax.sgd(1.0), parts, max_norm=1e9)
        state, metrics = step(init_state(jax.tree.map(jnp.copy, params), optax.sgd(1.0)), batch)
        moved = jax.tree.map(lambda before, after: before - after, params, state.params)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-6), moved, want)
        assert float(metrics["text_nll"]) == pytest.approx(
            -(np.log(said) * kept).sum() / kept.sum(), abs=1e-6
        )


def test_text_nll_is_without_the_loss_that_balances_experts():
    def balanced(*args):
        return dataclasses.replace(tabular(*args), auxiliary_loss=jnp.float32(0.5))

    mask = np.ones((9, 2), np.float32)
    batch = with_text(some_targets(mask), text_rows(mask), 2.0)
    losses, nlls = [], []
    for apply in (tabular, balanced):
        loss, (_, metrics) = policy_objective(apply, tables(0), batch, clip=0.2, temperature=1.0)
        losses.append(float(loss))
        nlls.append(float(metrics["text_nll"][0]))
    assert nlls[0] == pytest.approx(nlls[1], rel=1e-6)
    # It is in the loss: a half a token, of 18 that count twice.
    assert losses[1] - losses[0] == pytest.approx(18.0, rel=1e-5)


def optimum(reference, known_B, reward_B, beta, text_weight, rate=0.05, steps=1500):
    """Return the policy that PPO-ptx ends at; its text has the likelihoods `known_B`.

    Expectations are exact, and the old policy is the policy.
    """
    optimizer = optax.adam(optax.linear_schedule(rate, 0.0, steps))
    reference_BR = response_logprobs(tabular, reference, enumerated(), 1.0)
    text = text_rows(np.repeat(known_B[:, None], 2, axis=1))
    objective = partial(policy_objective, tabular, clip=0.2, temperature=1.0)

    def update(_, carry):
        params, opt_state = carry
        old_BR = response_logprobs(tabular, params, enumerated(), 1.0)
        rewards_BR = token_rewards(
            reward_B,
            kl_estimate(old_BR, reference_BR, "k1"),
            jnp.ones((9, 2)),
            beta,
            jnp.full(9, 1),
        )
        targets = {"old_logp_BR": old_BR, "advantages_BR": exact_advantages(params, rewards_BR)}
        # 18 tokens: the sum is no mean here.
        batch = with_text({**enumerated(), **targets}, text, text_weight / 18)
        updates, opt_state = optimizer.update(
            jax.grad(objective, has_aux=True)(params, batch)[0], opt_state
        )
        return optax.apply_updates(params, updates), opt_state

    return sequence_probs(
        jax.lax.fori_loop(0, steps, update, (reference, optimizer.init(reference)))[0]
    )


def test_with_pretraining_text_the_tax_is_smaller_at_equal_reward():
    """The tax: by how many nats the text, which the reference knows, has become less likely."""
    reference = tables(0)
    reward_B = 1.5 * normal(9, seed=5)
    known = np.asarray(sequence_probs(reference), np.float64)

    def plain(beta):  # the closed form of the optimum without text
        weights = known * np.exp(reward_B / beta)
        return weights / weights.sum()

    def plain_with_reward(reward, low=0.05, high=20.0):
        for _ in range(60):  # reward falls with beta
            middle = (low * high) ** 0.5
            low, high = (middle, high) if plain(middle) @ reward_B > reward else (low, middle)
        return plain(low)

    def tax(policy):
        return (known * np.log(known / policy)).sum()

    train = jax.jit(jax.vmap(lambda beta: optimum(reference, known, reward_B, beta, 0.6)))
    for mixed in np.asarray(train(jnp.array([0.01, 0.1])), np.float64):
        other = plain_with_reward(mixed @ reward_B)
        assert (
            other @ reward_B == pytest.approx(mixed @ reward_B, abs=1e-6)
            and mixed @ reward_B > known @ reward_B + 1
        )
        assert 0.1 < tax(mixed) < 0.8 * tax(other)


@pytest.mark.parametrize("start", [0.02, 5.0])
def test_adaptive_kl_converges_to_its_target(start):
    """PPO with exact advantages on the enumerable policy gets within 20 %, from either side."""
    reference = tables(0)
    reward_B = 1.5 * normal(9, seed=5)
    target = 0.15
    reference_BR = response_logprobs(tabular, reference, enumerated(), 1.0)
    objective = partial(policy_objective, tabular, clip=0.2, temperature=1.0)
    optimizer = optax.adam(0.03)

    @partial(jax.jit, static_argnames="adapts")
    def train(beta, adapts):
        def update(_, carry):
            params, opt_state, beta, _ = carry
            old_BR = response_logprobs(tabular, params, enumerated(), 1.0)
            kl = (sequence_probs(params) * (old_BR - reference_BR).sum(1)).sum()
            rewards_BR = token_rewards(
                reward_B, old_BR - reference_BR, jnp.ones((9, 2)), beta, jnp.full(9, 1)
            )
            batch = enumerated() | {
                "old_logp_BR": old_BR,
                "advantages_BR": exact_advantages(params, rewards_BR),
            }
            updates, opt_state = optimizer.update(
                jax.grad(objective, has_aux=True)(params, batch)[0], opt_state
            )
            beta = adapt_kl(beta, kl, target, horizon=10_000, episodes=512) if adapts else beta
            return optax.apply_updates(params, updates), opt_state, beta, kl

        start = (reference, optimizer.init(reference), beta, 0.0)
        return jax.lax.fori_loop(0, 1500, update, start)[3]

    assert float(train(jnp.float32(start), True)) == pytest.approx(target, rel=0.2)
    assert float(train(jnp.float32(start), False)) != pytest.approx(target, rel=0.2)  # control


def bigram(table, tokens, segments, positions):
    return LanguageOutput(table[tokens], jnp.eye(len(table)))


def value_of_token(values_V, tokens_BT, *_):
    """Apply a critic that knows the last token alone."""
    return ScalarOutput(values_V[tokens_BT], None, None)


EOS = 6
GAMMA, GAE_LAMBDA, BETA, TEMPERATURE = 0.9, 0.95, 0.2, 0.7
PROMPT, LONGEST = 2, 5
LENGTHS = np.array([1, 2, 5, 3, 4, 5])


def responses_of_all_lengths():
    """Return six rollouts; the first four end with EOS, the last two do not."""
    rng = np.random.default_rng(0)
    rows = len(LENGTHS)
    mask = (np.arange(LONGEST) < LENGTHS[:, None]).astype(np.float32)
    response = np.where(mask > 0, rng.integers(1, EOS, (rows, LONGEST)), 0).astype(np.int32)
    response[np.arange(4), LENGTHS[:4] - 1] = EOS
    prompt = rng.integers(1, EOS, (rows, PROMPT))
    segments = np.concatenate([np.ones((rows, PROMPT)), mask], axis=1).astype(np.int32)
    return {
        "tokens_BT": np.concatenate([prompt, response], axis=1).astype(np.int32),
        "segment_ids_BT": segments,
        "positions_BT": segments.cumsum(1) - 1,
        "response_BR": response,
        "mask_BR": mask,
        "sampler_logp_BR": 0 * mask,
    }


def log_probs_at_temperature(table):
    logits = np.asarray(table, np.float64) / TEMPERATURE
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def rewards_and_values_in_loops(batch, policy, reference, value, scores, at):
    """Return both in float64; `last`: the index of each row's last state with a value."""
    gap = log_probs_at_temperature(policy) - log_probs_at_temperature(reference)
    rewards, values = np.zeros((2, len(LENGTHS), LONGEST))
    last = []
    for b, length in enumerate(LENGTHS):
        last.append(min(length, LONGEST - 1) if at == "after" else length - 1)
        for t in range(last[b] + 1):
            state = batch["tokens_BT"][b, PROMPT - 1 + t]
            values[b, t] = value[state]
            if t < length:
                rewards[b, t] -= BETA * gap[state, batch["response_BR"][b, t]]
        rewards[b, last[b]] += scores[b]
    return rewards, values, np.array(last)


def advantages_in_loops(rewards, values):
    advantages = np.zeros((len(LENGTHS), LONGEST + 1))
    later = np.pad(values, ((0, 0), (0, 1)))
    for t in reversed(range(LONGEST)):
        delta = rewards[:, t] + GAMMA * later[:, t + 1] - later[:, t]
        advantages[:, t] = delta + GAMMA * GAE_LAMBDA * advantages[:, t + 1]
    return advantages[:, :LONGEST]


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("at", ["last", "after"])
def test_advantages_equal_loops(at, whitened):
    """The loops are in float64, token by token; responses have all lengths, two no end."""
    batch = responses_of_all_lengths()
    policy, reference = normal(7, 7, seed=1), normal(7, 7, seed=2)
    value, given = normal(7, seed=4), normal(6, seed=3)
    config = train_ppo.Config(
        score_at=at,
        whiten_rewards=whitened,
        temperature=TEMPERATURE,
        gamma=GAMMA,
        gae_lambda=GAE_LAMBDA,
    )
    compute_advantages = train_ppo.make_advantages(config, bigram, value_of_token, eos=EOS)
    models = train_ppo.Models(
        policy=jnp.asarray(policy), reference=jnp.asarray(reference), critic=jnp.asarray(value)
    )
    scores = {config.reward[0]: jnp.float32(given)}
    got, _ = compute_advantages(models, batch, scores, {}, jnp.float32(BETA))

    ruled = np.where(np.arange(6) < 4, given, given.min() - given.std())
    rewards, values, last = rewards_and_values_in_loops(batch, policy, reference, value, ruled, at)
    counted = np.arange(LONGEST) <= last[:, None]
    if whitened:  # the mean stays
        real = rewards[counted]
        white = (rewards - real.mean()) / np.sqrt(real.var() + 1e-8) + real.mean()
        rewards = np.where(counted, white, 0)
    advantages = advantages_in_loops(rewards, values)
    np.testing.assert_allclose(got["old_values_BR"], values, atol=1e-5)
    returns = (advantages + values) * counted
    np.testing.assert_allclose(got["returns_BR"] * counted, returns, atol=1e-5)

    mask = batch["mask_BR"]
    real = advantages[mask > 0]
    white = (advantages - real.mean()) / np.sqrt(real.var() + 1e-8)
    np.testing.assert_allclose(got["advantages_BR"] * mask, white * mask, atol=1e-5)


def test_several_rewards_are_one_score():
    """Weights 1 and 0 are the first reward alone; below the second's gate, it is the floor."""
    response = np.array([[1, 2], [3, 2], [2, 0]], np.int32)
    mask = np.float32([[1, 1], [1, 1], [1, 0]])
    tokens, segments = (np.insert(x, 0, 1, axis=1).astype(np.int32) for x in (response, mask))
    batch = {
        "tokens_BT": tokens,
        "segment_ids_BT": segments,
        "positions_BT": segments.cumsum(1) - 1,
    }
    batch |= {"response_BR": response, "mask_BR": mask, "sampler_logp_BR": 0 * mask}
    scores = {"a": jnp.float32([2.0, 3.0, -1.0]), "b": jnp.float32([0.0, 1.0, 1.0])}

    def returns(**fields):
        """Return each response's return at the first token, its score for a critic of zeros."""
        config = train_ppo.Config(gae_lambda=1.0, missing_eos="none", **fields)
        compute_advantages = train_ppo.make_advantages(config, bigram, value_of_token, eos=9)
        table = jnp.asarray(normal(4, 4))
        models = train_ppo.Models(policy=table, reference=table, critic=jnp.zeros(4))
        targets, metrics = compute_advantages(models, batch, scores, {}, jnp.float32(0.2))
        assert metrics["reward/b"] == pytest.approx(2 / 3)  # logged apart
        return np.asarray(targets["returns_BR"][:, 0]).tolist()

    both = {"reward": ("a", "b")}
    assert (
        returns(**both, combine="weighted", weights=(1.0, 0.0))
        == returns(reward=("a",))
        == [2, 3, -1]
    )
    assert returns(**both) == [1, 2, 0] and returns(**both, combine="minimum") == [0, 1, -1]
    assert returns(**both, combine="gated", gate=0.5, floor=-7.0) == [-7, 3, -1]


def test_a_missing_end_replaces_or_lowers_the_score():
    response = np.array([[5, 3, 0], [5, 5, 5], [5, 3, 0], [3, 5, 5]])
    # The third one's is padding; the last one's ends a turn within it.
    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]])
    batch = {"response_BR": response, "mask_BR": mask}
    ended_B = ended(batch, 3)
    assert ended_B.tolist() == [True, False, False, False]
    scores = jnp.array([2.0, 3.0, 4.0, 5.0])
    rules = {"replace": [2, -1, -1, -1], "penalty": [2, 2, 3, 4], "none": [2, 3, 4, 5]}
    for rule, want in rules.items():
        assert missing_eos(scores, ended_B, rule, -1.0).tolist() == want
    with pytest.raises(KeyError):
        missing_eos(scores, ended_B, "lower")


# Scores of eight responses; every other one has an end.
SCORES = {
    "constant -5": np.full(8, -5.0),
    "constant 0": np.zeros(8),
    "constant 1e3": np.full(8, 1e3),
    "constant, to rounding": 0.1 + np.float32(1e-8) * np.arange(8),
    "positive": np.arange(1.0, 9),
    "negative": -np.arange(1.0, 9),
    "tiny": 1e-6 * normal(8),
    "huge": 1e3 * normal(8),
    "beyond squares": 1e30 * normal(8),
    "paid for no end": np.tile([-5.0, 1e3], 4),
    "far below for no end": np.tile([2.0, -1e3], 4),
}


@pytest.mark.parametrize("name", SCORES)
def test_by_default_no_scale_of_rewards_pays_for_a_missing_end(name):
    """Below every score there is, and equal: also where none has an end, or all but one have."""
    given = np.float32(SCORES[name])
    for ended_B in (np.arange(8) % 2 == 0, np.arange(8) > 0, np.zeros(8, bool)):
        ruled = np.asarray(missing_eos(given, ended_B, "lowest"))
        np.testing.assert_array_equal(ruled[ended_B], given[ended_B])
        assert np.isfinite(ruled).all() and (ruled[~ended_B] < given.min()).all()
        assert len(set(ruled[~ended_B].tolist())) == 1
    all_ended = missing_eos(given, np.ones(8, bool), "lowest")
    np.testing.assert_array_equal(all_ended, given)  # control


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
@pytest.mark.parametrize("shift", [-1e3, 0.0, 40.0])
def test_the_rule_moves_with_the_scores(factor, shift):
    """Scaling and shifting rewards scales and shifts what it gives: whitened, nothing changes."""
    given = normal(64).astype(np.float32)
    ended_B = np.arange(64) % 3 > 0

    def whitened(scores):
        ruled = np.float64(missing_eos(np.float32(scores), ended_B, "lowest"))
        return (ruled - ruled.mean()) / ruled.std()

    want = whitened(given)
    np.testing.assert_allclose(whitened(factor * given + factor * shift), want, atol=1e-3)
    # Control: a fixed score does not.
    fixed = np.asarray(missing_eos(given + 40, ended_B, "replace", -1.0))
    assert np.abs((fixed - fixed.mean()) / fixed.std() - want).max() > 0.5
