"""Masks of responses: holes in them, and whatever lies outside them, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_grpo
import train_ppo
from model import LanguageOutput, ScalarOutput
from objectives import group
from objectives.policy import (
    combined,
    explained_variance,
    gae,
    kl_estimate,
    policy_objective,
    score_position,
    value_objective,
)
from objectives.reward import running_score
from rewards.scorer import decode_responses
from rollout import ended, join_responses, mean_metrics, rollout_metrics, shuffled_minibatches
from runtime import flags
from sampling import Samples

EOS = 3
# A hole inside, two holes, a hole at the start, none, no action at all.
MASK = np.float32(
    [
        [1, 1, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 0, 1, 1],
        [0, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0],
    ]
)
B, R = MASK.shape


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def actions(row):
    """Return the places of a row's actions."""
    return [t for t in range(R) if MASK[row, t]]


def test_the_score_is_at_the_last_action():
    last_B, value_BR = score_position(MASK, "last")
    assert last_B.tolist() == [max(actions(b), default=-1) for b in range(B)]
    np.testing.assert_array_equal(value_BR, MASK)
    after_B, value_BR = score_position(MASK, "after")
    assert after_B.tolist() == [min(max(actions(b), default=-1) + 1, R - 1) for b in range(B)]
    for b in range(B):
        states = {*actions(b), int(after_B[b])}
        assert np.flatnonzero(value_BR[b]).tolist() == sorted(states)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_goes_from_action_to_action(gamma):
    rewards, values = normal(B, R, seed=1), normal(B, R, seed=2)
    got, returns = gae(rewards, values, MASK, gamma=gamma, gae_lambda=0.8)
    want = np.zeros((B, R))
    for b in range(B):
        next_value = next_advantage = 0.0
        for t in reversed(actions(b)):
            delta = rewards[b, t] + gamma * next_value - values[b, t]
            next_advantage = want[b, t] = delta + gamma * 0.8 * next_advantage
            next_value = values[b, t]
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(returns, (want + values) * MASK, atol=1e-5)


def test_a_potential_is_that_of_the_next_action():
    rewards, potential = normal(B, R, seed=1) * MASK, normal(B, R, seed=2)
    want = np.array(rewards)
    for b in range(B):
        after = 0.0
        for t in reversed(actions(b)):
            want[b, t] += after - potential[b, t]
            after = potential[b, t]
    np.testing.assert_allclose(group.shaped(rewards, potential, MASK), want, atol=1e-6)


def rollout(outside=0.0):
    """Return five rollouts to prompts of two; the log-probabilities outside are `outside`."""
    response = np.random.default_rng(5).integers(4, 9, (B, R)).astype(np.int32)
    response[0, 4] = response[1, 0] = EOS
    samples = Samples(jnp.array(response), jnp.array(MASK), jnp.zeros((B, R)))
    prompts = {name: jnp.ones((B, 2), jnp.int32) for name in ("tokens_BT", "segment_ids_BT")}
    prompts["positions_BT"] = jnp.array([[0, 1]] * B)
    batch = join_responses(prompts, samples)
    logp = np.where(MASK > 0, -np.abs(normal(B, R, seed=6)), outside).astype(np.float32)
    return {**batch, "sampler_logp_BR": logp}


def test_tokens_in_a_hole_are_read_and_padding_is_not():
    batch = rollout()
    for b in range(B):
        real = max(actions(b), default=-1) + 1
        want = [1] * (2 + real) + [0] * (R - real)
        assert batch["segment_ids_BT"][b].tolist() == want
        positions = [min(t, 1 + real) for t in range(2 + R)]
        assert batch["positions_BT"][b].tolist() == positions
    assert ended(batch, EOS).tolist() == [True, False, False, False, False]


def test_a_text_goes_on_behind_a_hole():
    class Words:
        def decode(self, ids):
            return " ".join(map(str, ids))

    batch = rollout()
    texts = decode_responses(
        {n: np.asarray(batch[n]) for n in ("response_BR", "mask_BR")}, Words()
    )
    for b, text in enumerate(texts):
        tokens = np.asarray(batch["response_BR"])[b].tolist()
        assert text == " ".join(map(str, tokens[: max(actions(b), default=-1) + 1]))


@pytest.mark.parametrize("outside", [0.0, -94.0, -1e4, -np.inf, np.nan])
def test_metrics_are_of_actions_alone(outside):
    batch = rollout(outside)
    logp = np.float32(batch["sampler_logp_BR"] + 0.01 * normal(B, R, seed=7))
    reference = np.where(MASK > 0, logp - normal(B, R, seed=8), 0.0).astype(np.float32)
    got = rollout_metrics(jnp.array(logp), jnp.array(reference), batch, EOS)
    kl, k3, gaps, sampler_k3, length = [], [], [], [], []
    for b in range(B):
        k1 = [float(logp[b, t] - reference[b, t]) for t in actions(b)]
        moved = [float(batch["sampler_logp_BR"][b, t] - logp[b, t]) for t in actions(b)]
        kl.append(sum(k1))
        k3.append(sum(np.exp(-x) - 1 + x for x in k1))
        gaps += [abs(x) for x in moved]
        sampler_k3 += [np.exp(-x) - 1 + x for x in moved]
        length.append(len(k1))
    want = {
        "kl": np.mean(kl),
        "kl_k3": np.mean(k3),
        "length": np.mean(length),
        "ended": 1 / B,
        "sampler_gap": max(gaps),
        "sampler_gap_mean": np.mean(gaps),
        "sampler_k3": np.mean(sampler_k3),
    }
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


# ---- What lies outside the mask: nothing of it may reach a loss


def bigram(params, tokens, segments, positions):
    return LanguageOutput(params[tokens], jnp.eye(params.shape[-1]))


def value_of_token(params, tokens, segments, positions):
    return ScalarOutput(params[tokens], None, None)


def losses(batch):
    """Return the losses of PPO's policy and critic and of GRPO, and their gradients."""
    settings = {"ratio": "token", "average": "tokens", "clip": 0.2, "clip_high": 0.2}
    settings |= {"kl_coef": 0.1, "kl_estimator": "k3", "temperature": 1.0}

    def total(table, values):
        policy, _ = policy_objective(bigram, table, batch, clip=0.2, temperature=1.0)
        critic, _ = value_objective(value_of_token, values, batch, clip=0.2)
        grpo, _ = group.surrogate_objective(bigram, table, batch, **settings)
        return policy + critic + grpo

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(normal(9, 9), normal(9))


@pytest.mark.parametrize("outside", [1e4, np.inf, np.nan])
def test_nothing_outside_the_mask_reaches_a_loss(outside):
    targets = ("old_logp_BR", "reference_BR", "advantages_BR", "returns_BR", "old_values_BR")
    batch = {**rollout(), "value_mask_BR": MASK}
    clean = {name: 0.1 * normal(B, R, seed=i) - 1 for i, name in enumerate(targets)}
    dirty = {name: np.where(MASK > 0, x, np.float32(outside)) for name, x in clean.items()}
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6),
        losses({**batch, **dirty}),
        losses({**batch, **clean}),
    )


def test_the_advantages_of_both_scripts_are_finite_whatever_padding_says():
    """The reference gives a token of padding nearly no chance: 94 nats less than the policy."""
    far = jnp.zeros((9, 9)).at[:, 0].set(-94.0)
    batch = jax.tree.map(jnp.asarray, rollout())
    padding = batch["segment_ids_BT"][:, 2:] == 0
    response = jnp.where(padding, 0, batch["response_BR"])
    tokens = jnp.concatenate([batch["tokens_BT"][:, :2], response], 1)
    batch |= {"response_BR": response, "tokens_BT": tokens}
    near, scores = jnp.zeros((9, 9)), {"r": jnp.arange(5.0)}

    ppo = train_ppo.Config(reward=("r",), kl_estimator="k3")
    compute = train_ppo.make_advantages(ppo, bigram, value_of_token, eos=EOS)
    models = train_ppo.Models(near, far, jnp.zeros(9))
    got, metrics = compute(models, batch, scores, {}, jnp.float32(0.2))
    assert all(np.isfinite(x).all() for x in (*got.values(), *metrics.values()))
    assert (np.asarray(got["advantages_BR"])[MASK == 0] == 0).all()

    given = train_grpo.Config(
        method="reinforce_pp", reward=("r",), kl_in="reward", kl_estimator="k3"
    )
    grpo = flags.fill_paper_defaults(given, group.PAPERS["reinforce_pp"])
    advantages, _ = train_grpo.make_method(grpo, bigram)
    compute = train_grpo.make_advantages(grpo, bigram, advantages, eos=EOS)
    got, metrics = compute(near, far, batch, scores, {})
    assert all(np.isfinite(x).all() for x in (*got.values(), *metrics.values()))


# ---- The first minibatch of an iteration


def numbered_rows(count):
    """Return rows of two tokens, of which no two begin alike, by number."""
    tokens_BT = jnp.arange(2 * count, dtype=jnp.int32).reshape(count, 2)
    whole_BT = jnp.ones_like(tokens_BT)
    return {
        "row_B": jnp.arange(count),
        "tokens_BT": tokens_BT,
        "segment_ids_BT": whole_BT,
        "positions_BT": whole_BT.cumsum(1) - 1,
    }


def test_the_first_minibatch_meets_the_policy_that_sampled_whatever_the_rounding():
    batch = {**rollout(), "old_logp_BR": np.full((B, R), -1.0, np.float32)}
    batch |= {"advantages_BR": normal(B, R, seed=3)}
    table = normal(9, 9)

    def loss(first):
        own = {**batch, "is_first_B": np.full(B, first)}

        def objective(params):
            return policy_objective(bigram, params, own, clip=1e-4, temperature=1.0)

        return jax.value_and_grad(objective, has_aux=True)(table)

    (value, (_, metrics)), gradient = loss(True)
    assert metrics["clipped"][0] == metrics["clip_active"][0] == 0
    assert metrics["approx_kl"][0] > 0.1  # of the recorded ones
    np.testing.assert_allclose(value, -(batch["advantages_BR"] * MASK).sum(), rtol=1e-5)
    assert np.abs(gradient).max() > 0.1
    (_, (_, metrics)), _ = loss(False)
    clipped, active = (float(metrics[name][0]) for name in ("clipped", "clip_active"))
    assert clipped == MASK.sum() and 0 < active < clipped  # control

    rows = numbered_rows(8)
    parts = list(shuffled_minibatches(rows, jax.random.key(0), epochs=2, parts=2))
    assert [bool(part["is_first_B"].all()) for part in parts] == [True, False, False, False]
    assert not any(part["is_first_B"].any() for part in parts[1:])
    for epoch in (parts[:2], parts[2:]):
        assert sorted(int(row) for part in epoch for row in part["row_B"]) == list(range(8))


def test_the_order_of_rows_is_not_that_of_their_noise():
    """Epoch e was once shuffled by the key that drew row e's tokens."""
    key = jax.random.key(0)
    rows = numbered_rows(64)
    orders = [
        np.asarray(part["row_B"]) for part in shuffled_minibatches(rows, key, epochs=3, parts=1)
    ]
    for number in range(8):
        of_row = jax.random.permutation(jax.random.fold_in(key, number), 64)
        assert not any((order == np.asarray(of_row)).all() for order in orders)


# ---- Metrics of an iteration


def test_metrics_are_means_over_the_updates_and_counters_the_last():
    updates = [{"loss": jnp.float32(x), "skipped": jnp.int32(x)} for x in (1, 2, 6)]
    means = mean_metrics(updates)
    assert means["loss"] == 3 and means["skipped"] == 6
    updates[0]["loss"] = jnp.float32(np.nan)
    assert np.isnan(mean_metrics(updates)["loss"])


def test_explained_variance_is_that_of_numpy():
    values, returns = normal(B, R, seed=1), normal(B, R, seed=2)
    kept = MASK > 0
    want = 1 - np.var((returns - values)[kept]) / np.var(returns[kept])
    assert explained_variance(values, returns, MASK) == pytest.approx(want, abs=1e-5)
    assert explained_variance(returns, returns, MASK) == pytest.approx(1)
    # A critic that is off by a constant explains all that differs.
    assert explained_variance(returns + 3, returns, MASK) == pytest.approx(1, abs=1e-5)


# ---- Modes that nobody wrote


def test_an_unknown_mode_is_refused_and_takes_no_last_branch():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(x, x, "k4")
    with pytest.raises(ValueError, match="before"):
        score_position(x, "before")
    with pytest.raises(ValueError, match="median"):
        combined([x[:, 0], x[:, 1]], "median")
    with pytest.raises(ValueError, match="mean"):
        running_score(x, x > 0, "mean")
