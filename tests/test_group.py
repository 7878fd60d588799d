"""Methods without a critic against float64 loops from the papers, their limits, their optima."""

import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train_grpo
from model import LanguageOutput
from objectives import group
from objectives.policy import combined, kl_estimate, response_logprobs, token_rewards
from rollout import refill_groups
from runtime import flags

METHODS = ["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp"]
P, C, R, V = 3, 4, 6, 5  # prompts, responses to each, tokens of a response, vocabulary
GROUPS = [range(p * C, p * C + C) for p in range(P)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def settled(method, **fields):
    # Without an end token among the responses all are to be scored as they are.
    own = {"method": method, "reward": ("r",), "missing_eos": "none"}
    given = train_grpo.Config(**own | fields)
    return flags.fill_paper_defaults(given, group.PAPERS[method])


def experience_of(config, apply, policy, reference, batch, rewards_B):
    """Return the rollouts `batch` with the targets of the script, and the metrics."""
    advantages, _ = train_grpo.make_method(config, apply)
    compute_advantages = train_grpo.make_advantages(config, apply, advantages, eos=-1)
    return compute_advantages(policy, reference, batch, {"r": rewards_B}, {})


# ---- Loss and gradient of every method, from rewards on, as its paper writes it


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


def clipped(ratio, A, low, high):
    """Return the clipped term of a ratio and its advantage."""
    return min(ratio * A, float(np.clip(ratio, 1 - low, 1 + high)) * A)


def reinforce_pp_loss(logp, old, reference, rewards):
    """Return minus REINFORCE++'s objective from lists of token log-probabilities."""
    length = [len(row) for row in logp]
    A = [
        [rewards[i] - 0.01 * (old[i] - reference[i])[t:].sum() for t in range(length[i])]
        for i in range(P * C)
    ]
    mean = np.mean(np.concatenate(A))
    std = np.std(np.concatenate(A))
    A = [(np.array(row) - mean) / std for row in A]
    ratio = [np.exp(logp[i] - old[i]) for i in range(P * C)]
    terms = [
        clipped(ratio[i][t], A[i][t], 0.2, 0.2) for i in range(P * C) for t in range(length[i])
    ]
    return -np.mean(terms)


def rloo_loss(logp, old, reference, rewards):
    """Return minus RLOO's objective from lists of token log-probabilities."""
    total = [rewards[i] - 0.03 * (old[i] - reference[i]).sum() for i in range(P * C)]
    A = {}
    for rows in GROUPS:
        for i in rows:
            A[i] = total[i] - np.mean([total[j] for j in rows if j != i])
    return -np.mean([A[i] * np.exp((logp[i] - old[i]).sum()) for i in range(P * C)])


def dapo_loss(logp, old, rewards):
    """Return minus DAPO's objective, with L_max = R and a cache of a fifth of it."""

    def soft(n):
        """Return the penalty of a response of `n` tokens."""
        return 0.0 if n <= R - 1.2 else (R - 1.2 - n) / 1.2

    total, tokens = 0.0, 0
    for rows in GROUPS:
        if len({rewards[i] for i in rows}) == 1:
            continue
        r = [rewards[i] + soft(len(logp[i])) for i in rows]
        for i, x in zip(rows, r, strict=True):
            A = (x - np.mean(r)) / (np.std(r) + 1e-4)
            ratios = [np.exp(a - b) for a, b in zip(logp[i], old[i], strict=True)]
            total += sum(clipped(ratio, A, 0.2, 0.28) for ratio in ratios)
            tokens += len(ratios)
    return -total / tokens


def grpo_loss(method, logp, old, reference, rewards):
    """Return minus the objective of GRPO, Dr. GRPO or GSPO."""
    total = 0.0
    for rows in GROUPS:
        r = [rewards[i] for i in rows]
        for i in rows:
            length = len(logp[i])
            A = rewards[i] - np.mean(r)
            if method != "dr_grpo":
                A = A / (np.std(r) + 1e-4)
            ratios = np.exp(logp[i] - old[i])
            if method == "gspo":
                total += clipped(np.prod(ratios) ** (1 / length), A, 3e-4, 4e-4) / C
                continue
            terms = [clipped(ratio, A, 0.2, 0.2) for ratio in ratios]
            if method == "grpo":
                x = np.exp(reference[i] - logp[i])
                terms = np.array(terms) - 0.04 * (x - np.log(x) - 1)
            total += np.sum(terms) / (length if method == "grpo" else R) / C
    return -total / P


def paper_loss(method, table, old_table, reference_table, batch, rewards):
    """Return minus the paper's objective, in loops."""
    logp, old, reference = (token_logps(t, batch) for t in (table, old_table, reference_table))
    if method == "reinforce_pp":
        return reinforce_pp_loss(logp, old, reference, rewards)
    if method == "rloo":
        return rloo_loss(logp, old, reference, rewards)
    if method == "dapo":
        return dapo_loss(logp, old, rewards)
    return grpo_loss(method, logp, old, reference, rewards)


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_equal_the_papers(method):
    config = settled(
        method, samples_per_prompt=1 if method == "reinforce_pp" else C, max_new_tokens=R
    )
    batch = rollouts()
    reference = normal(V, V)
    old = normal(V, V, seed=1)
    table = old + (1.5e-3 if method == "gspo" else 0.3) * normal(V, V, seed=2)
    rewards = normal(P * C, seed=3).round(2)
    rewards[C : 2 * C] = 0.1  # a group of equal rewards
    with jax.enable_x64(True):
        targets, _ = experience_of(
            config, bigram, jnp.array(old), jnp.array(reference), batch, jnp.array(rewards)
        )
        objective = jax.jit(
            jax.value_and_grad(train_grpo.make_method(config, bigram)[1], has_aux=True)
        )
        (loss, (count, metrics)), grad = objective(jnp.array(table), targets)
    paper = partial(
        paper_loss, method, old_table=old, reference_table=reference, batch=batch, rewards=rewards
    )
    numerical = np.zeros_like(table)
    for index in np.ndindex(table.shape):
        step = np.zeros_like(table)
        step[index] = 1e-6
        numerical[index] = (paper(table + step) - paper(table - step)) / 2e-6
    assert float(loss) / float(count) == pytest.approx(paper(table), abs=1e-6)
    np.testing.assert_allclose(np.asarray(grad) / float(count), numerical, atol=1e-6)
    assert np.abs(numerical).max() > 1e-3
    if method != "rloo":  # control: both sides of the clip were met
        assert 0.1 < float(metrics["clipped"][0] / metrics["clipped"][1]) < 0.9


@pytest.mark.parametrize("method", ["grpo", "rloo", "reinforce_pp"])
def test_what_lies_in_the_padding_does_not_matter(method):
    config = settled(method, samples_per_prompt=C, max_new_tokens=R)
    batch = rollouts()
    table = jnp.float32(normal(V, V))
    # Token 0 is met in the padding only.
    table = table.at[0].set(jnp.float32([60.0, -60.0, 0.0, 0.0, 0.0]))
    other = {**batch, "response_BR": np.where(batch["mask_BR"] > 0, batch["response_BR"], 1)}
    other["tokens_BT"] = np.concatenate([batch["tokens_BT"][:, :2], other["response_BR"]], axis=1)

    def gradient(batch):
        targets, _ = experience_of(
            config, bigram, table, 0 * table, batch, jnp.float32(normal(P * C, seed=3))
        )
        moved = table + 0.1 * jnp.float32(normal(V, V, seed=2)) * (jnp.arange(V) > 0)[:, None]
        return jax.jit(jax.grad(train_grpo.make_method(config, bigram)[1], has_aux=True))(
            moved, targets
        )[0]

    one, two = gradient(batch), gradient(other)
    assert np.isfinite(one).all() and (one[0] == 0).all() and np.abs(one).max() > 1e-4
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_every_method_of_the_script_has_its_papers_values():
    assert (
        set(typing.get_args(train_grpo.Config.__annotations__["method"]))
        == set(group.PAPERS)
        == set(METHODS)
    )
    fields = group.GRPO.keys() - {"paper"}
    assert all(getattr(settled(method), name) is not None for method in METHODS for name in fields)
    citations = {paper["paper"] for paper in group.PAPERS.values()}
    assert len(citations) == len(METHODS)
    assert settled("dapo", clip_high=0.5).clip_high == 0.5 and settled("dapo").clip_high == 0.28


# ---- Limits


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_equal_rewards_give_exactly_zero_gradient(method):
    config = settled(method, samples_per_prompt=C - 1, max_new_tokens=R, kl_coef=0.0)
    batch = {name: x[: P * (C - 1)] for name, x in rollouts().items()}
    rewards = np.repeat(np.float32([0.9, 1.7, -2.9]), C - 1)
    # Control: the naive mean is not exact.
    assert np.abs(rewards[:3] - rewards[:3].sum() / np.float32(3)).max() > 0
    policy = jnp.float32(normal(V, V))

    def gradient(rewards):
        targets, _ = experience_of(config, bigram, policy, policy, batch, jnp.array(rewards))
        return jax.jit(jax.grad(train_grpo.make_method(config, bigram)[1], has_aux=True))(
            policy, targets
        )[0]

    assert (np.asarray(gradient(rewards)) == 0).all()
    rewards[0] += 0.5
    assert np.abs(gradient(rewards)).max() > 1e-3  # control


def test_dr_grpo_weighs_neither_length_nor_spread():
    """Two prompts have a right and a wrong answer; the first's rewards are ten times as far apart.

    In GRPO a token of the long wrong answer is pushed down a third as hard as one of the short
    (Dr. GRPO, section 3.1), and the prompt with the small spread as hard as the other. In Dr. GRPO
    it is as the rewards say.
    """
    lengths = [2, 6, 2, 2]
    rewards = np.float32([10.0, 0.0, 0.0, 1.0])
    mask = (np.arange(R) < np.array(lengths)[:, None]).astype(np.float32)
    tokens = np.zeros((4, R + 1), np.int32)
    batch = {
        "tokens_BT": tokens,
        "segment_ids_BT": tokens + 1,
        "positions_BT": tokens + np.arange(R + 1),
    }
    batch |= {"response_BR": tokens[:, 1:], "mask_BR": mask, "sampler_logp_BR": 0 * mask}
    logits = jnp.zeros((4, R + 1, 2))  # logits of its own for each row and position

    def push(method):

        def free(params, *_):
            return LanguageOutput(params, jnp.eye(2))

        config = settled(method, samples_per_prompt=2, max_new_tokens=R, kl_coef=0.0)
        targets, _ = experience_of(config, free, logits, logits, batch, rewards)
        grad = jax.grad(train_grpo.make_method(config, free)[1], has_aux=True)(logits, targets)[0]
        return np.asarray(-grad[:, :R, 0])  # descent: how far the taken token goes up

    grpo, dr_grpo = push("grpo"), push("dr_grpo")
    np.testing.assert_allclose(grpo[0, :2] / grpo[1, :2], -3.0, rtol=1e-3)  # |o| of 6 against 2
    np.testing.assert_allclose(dr_grpo[0, :2] / dr_grpo[1, :2], -1.0, rtol=1e-5)
    np.testing.assert_allclose(grpo[0, :2] / grpo[3, :2], 1.0, rtol=1e-3)
    np.testing.assert_allclose(dr_grpo[0, :2] / dr_grpo[3, :2], 10.0, rtol=1e-5)
    # Its loss is a sum over tokens, divided by the budget R.
    np.testing.assert_allclose(dr_grpo[1], np.where(mask[1] > 0, -5.0 * 0.5 / R, 0.0), rtol=1e-5)


def test_normalised_uses_n_or_n_minus_1():
    rewards = normal(5, 8)
    for unbiased in (False, True):
        want = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(
            1, keepdims=True, ddof=unbiased
        )
        np.testing.assert_allclose(group.normalised(rewards, unbiased=unbiased), want, rtol=1e-3)


def test_gspo_ratio_is_the_geometric_mean():
    change = 0.3 * normal(5, R)
    lengths = np.array([1, 2, 3, 4, 6])
    mask = (np.arange(R) < lengths[:, None]).astype(np.float32)
    ratio = np.exp(group.log_ratio(change * mask, mask, "geometric"))
    for b, length in enumerate(lengths):
        want = np.prod(np.exp(change[b, :length])) ** (1 / length)
        np.testing.assert_allclose(ratio[b], np.where(mask[b] > 0, want, 1.0), rtol=1e-5)
    twice = group.log_ratio(np.tile(change * mask, 2), np.tile(mask, 2), "geometric")
    # The same tokens again: the same ratio.
    np.testing.assert_allclose(np.exp(twice[:, :R]), ratio, rtol=1e-5)
    whole = np.exp(group.log_ratio(change * mask, mask, "sequence"))
    np.testing.assert_allclose(whole[:, 0], np.exp((change * mask).sum(1)), rtol=1e-5)
    assert (
        np.abs(
            np.exp(group.log_ratio(np.tile(change * mask, 2), np.tile(mask, 2), "sequence"))[:, :R]
            - whole
        ).max()
        > 0.1
    )


def test_dapo_clips_higher_above():
    """A ratio out of [1 - 0.2, 1 + 0.28] has no gradient where going further would be rewarded."""
    config = settled("dapo", samples_per_prompt=2)

    def model(params, *_):
        return LanguageOutput(params, jnp.eye(2))

    objective = train_grpo.make_method(config, model)[1]
    ratios = np.float32([0.75, 0.85, 1.15, 1.25, 1.35])
    batch = {
        name: np.zeros((10, 2), np.int32)
        for name in ("tokens_BT", "segment_ids_BT", "positions_BT")
    }
    batch |= {"response_BR": np.zeros((10, 1), np.int32), "mask_BR": np.ones((10, 1), np.float32)}
    batch |= {
        "old_logp_BR": (np.log(0.5) - np.log(np.tile(ratios, 2)))[:, None],
        "reference_BR": np.zeros((10, 1)),
    }
    batch["advantages_BR"] = np.repeat([1.0, -1.0], 5)[:, None]
    grad = jax.grad(objective, has_aux=True)(jnp.zeros((10, 2, 2)), batch)[0][:, 0, 0]
    assert (np.asarray(grad) != 0).tolist() == [True] * 4 + [False] + [False] + [True] * 4


def test_overlong_penalty_is_piecewise():
    lengths = np.arange(0, 22)
    want = [0.0 if n <= 16 else ((20 - 4) - n) / 4 if n <= 20 else -1.0 for n in lengths]
    np.testing.assert_allclose(group.overlong_penalty(lengths, 20, 4.0), want, atol=1e-7)


def test_dynamic_sampling_drops_groups_of_equal_rewards():
    config = settled("dapo", samples_per_prompt=C, max_new_tokens=R)
    batch = rollouts()
    table = jnp.float32(normal(V, V))
    pools = []
    for equal in (0, 2), (1,):
        rewards = np.float32(normal(P, C, seed=3).round(2))
        rewards[list(equal)] = 1.0
        targets, metrics = experience_of(config, bigram, table, table, batch, rewards.reshape(-1))
        kept = np.asarray(targets["mask_BR"]).reshape(P, -1).any(1)
        assert kept.tolist() == [p not in equal for p in range(P)] and float(
            metrics["groups_with_signal"]
        ) == pytest.approx(kept.mean())
        pools.append({**targets, "tokens_BT": targets["tokens_BT"] + 100 * len(pools)})
    full = refill_groups(*pools, C)
    first = np.concatenate(
        [
            pools[0]["tokens_BT"][C : 2 * C],
            pools[1]["tokens_BT"][:C],
            pools[1]["tokens_BT"][2 * C :],
        ]
    )
    np.testing.assert_array_equal(full["tokens_BT"], first)
    assert (np.asarray(full["mask_BR"]).sum(1) > 0).all()
    again = refill_groups(pools[0], pools[0], C)  # two groups in all: the third is still missing
    assert np.asarray(again["mask_BR"]).reshape(P, -1).any(1).tolist() == [True, True, False]
    equal, _ = experience_of(
        settled("grpo", samples_per_prompt=C),
        bigram,
        table,
        table,
        batch,
        np.ones(P * C, np.float32),
    )
    np.testing.assert_array_equal(equal["mask_BR"], batch["mask_BR"])  # control: GRPO keeps them


def test_reinforce_pp_normalises_over_the_batch():
    batch = rollouts()
    scale = np.repeat([1.0, 10.0, 100.0], C)
    mask = batch["mask_BR"]
    rewards_BR = np.zeros((P * C, R))
    rewards_BR[np.arange(P * C), mask.sum(1).astype(int) - 1] = scale * normal(P * C, seed=1)
    A = np.asarray(group.reinforce_pp(jnp.float32(rewards_BR), jnp.float32(mask)))
    real = A[mask > 0]
    assert real.mean() == pytest.approx(0, abs=1e-6) and real.std() == pytest.approx(1, rel=1e-5)
    assert (A[mask == 0] == 0).all()
    spread = [A[p * C : p * C + C][mask[p * C : p * C + C] > 0].std() for p in range(P)]
    assert spread[2] > 5 * spread[0]  # GRPO would make them equal
    based = np.asarray(group.reinforce_pp(jnp.float32(rewards_BR), jnp.float32(mask), group=C))
    totals = rewards_BR.sum(1).reshape(P, C)
    want = np.repeat((totals - totals.mean(1, keepdims=True)).reshape(-1)[:, None], R, 1)[mask > 0]
    np.testing.assert_allclose(based[mask > 0], (want - want.mean()) / want.std(), atol=1e-5)


def test_rewards_combine():
    help_B = np.float32([2.0, 3.0, -1.0])
    harm_B = np.float32([0.5, -0.5, 1.0])
    true_B = np.float32([1.0, 1.0, -2.0])
    scores = [help_B, harm_B, true_B]
    np.testing.assert_allclose(combined(scores, "mean"), np.mean(scores, 0), rtol=1e-6)
    np.testing.assert_allclose(combined(scores, "weighted", weights=(1, 0, 0)), help_B)
    np.testing.assert_allclose(
        combined(scores, "weighted", weights=(1, 2, -1)), help_B + 2 * harm_B - true_B
    )
    assert combined(scores, "minimum").tolist() == [0.5, -0.5, -2.0]
    assert combined(scores, "gated", gate=0.0, floor=-7.0).tolist() == [2.0, -7.0, -7.0]
    assert combined(scores[:2], "gated", gate=-0.5, floor=-7.0).tolist() == [2.0, 3.0, -1.0]
    # One reward has no gate.
    assert combined(scores[:1], "gated", gate=9.0, floor=-7.0).tolist() == help_B.tolist()


# ---- A policy small enough to enumerate: a prompt of one token, then two tokens out of three

FIRST, SECOND = (x.reshape(-1) for x in np.indices((3, 3)))


def tabular(params, tokens_BT, segment_ids_BT, positions_BT):
    """Return first tokens' logits from one table, second ones' from a row for each first token."""
    batch = tokens_BT.shape[0]
    first = jnp.broadcast_to(params["first"], (batch, 3))
    logits_BTV = jnp.stack(
        [first, params["second"][tokens_BT[:, 1]], jnp.zeros((batch, 3))], axis=1
    )
    return LanguageOutput(logits_BTV, jnp.eye(3))


def sequences(which_B):
    """Return the sequences of these numbers (0 to 8) as rollouts."""
    response = jnp.stack([jnp.array(FIRST)[which_B], jnp.array(SECOND)[which_B]], axis=1)
    tokens = jnp.pad(response, ((0, 0), (1, 0)))
    inputs = {
        "tokens_BT": tokens,
        "segment_ids_BT": tokens * 0 + 1,
        "positions_BT": tokens * 0 + jnp.arange(3),
    }
    return {
        **inputs,
        "response_BR": response,
        "mask_BR": jnp.ones(response.shape),
        "sampler_logp_BR": 0.0 * response,
    }


def tables(seed=0):
    return {
        "first": jnp.float32(normal(3, seed=seed)),
        "second": jnp.float32(normal(3, 3, seed=seed + 1)),
    }


def nine_logps(params):
    logp = jax.nn.log_softmax(params["first"])[FIRST]
    return logp + jax.nn.log_softmax(params["second"])[FIRST, SECOND]


def distance(p, q):  # total variation
    return float(0.5 * np.abs(np.asarray(p) - np.asarray(q)).sum())


@pytest.mark.parametrize("count", [2, 3])
def test_rloo_is_unbiased_by_enumeration(count):
    """Its gradient's expectation over all groups of `count` responses is the policy gradient."""
    params = tables()
    reward = jnp.float32(normal(9, seed=5))
    groups = np.stack(np.meshgrid(*[np.arange(9)] * count, indexing="ij"), -1).reshape(-1, count)
    batch = sequences(groups.reshape(-1))
    chance = jnp.exp(nine_logps(params)[groups].sum(1))
    rewards_BR = token_rewards(
        reward[groups.reshape(-1)],
        jnp.zeros((groups.size, 2)),
        batch["mask_BR"],
        0.0,
        jnp.ones(groups.size),
    )

    old_BR = response_logprobs(tabular, params, batch, 1.0)
    objective = train_grpo.make_method(settled("rloo", samples_per_prompt=count), tabular)[1]
    gradient = jax.jit(jax.grad(objective, has_aux=True))

    def expected(advantage):
        A_BR = group.by_response(advantage, rewards_BR, batch["mask_BR"], group=count)
        weighted = jnp.repeat(chance, count)[:, None] * A_BR
        targets = {
            **batch,
            "advantages_BR": weighted,
            "old_logp_BR": old_BR,
            "reference_BR": old_BR,
        }
        return jax.tree.map(lambda g: -g / count, gradient(params, targets)[0])

    want = jax.grad(lambda p: (jnp.exp(nine_logps(p)) * reward).sum())(params)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, atol=1e-6),
        expected(group.leave_one_out),
        want,
    )
    # With its own reward in the baseline, a share 1 / count of the gradient is lost.
    own = expected(group.centred)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w * (1 - 1 / count), atol=1e-6), own, want
    )
    std = expected(group.normalised)  # control: no multiple of it either
    cosine = sum((std[k] * want[k]).sum() for k in want) / np.sqrt(
        sum((std[k] ** 2).sum() for k in want) * sum((want[k] ** 2).sum() for k in want)
    )
    assert cosine < 0.999


def train(config, rewards, reference=None, steps=300, lr=0.1, potentials=None, pool=None):
    """Train on samples of the policy by the script's advantages and objective.

    Returns the nine probabilities after it.
    """
    reference = tables() if reference is None else reference
    advantages, objective = train_grpo.make_method(config, tabular)
    compute_advantages = train_grpo.make_advantages(config, tabular, advantages, eos=-1)
    optimizer = optax.adam(optax.linear_schedule(lr, 0.0, steps))
    rewards = {name: jnp.float32(r) for name, r in rewards.items()}

    @jax.jit
    def run(params):
        def iteration(step, carry):
            params, opt_state = carry
            key = jax.random.fold_in(jax.random.key(0), step)
            which_B = jax.random.categorical(key, nine_logps(params), shape=(config.batch_size,))
            scalars = {} if potentials is None else {config.reward[0]: potentials(which_B)}
            batch = sequences(which_B)
            batch, _ = compute_advantages(
                params,
                reference,
                batch,
                {name: r[which_B] for name, r in rewards.items()},
                scalars,
            )
            grads, (count, _) = jax.grad(objective, has_aux=True)(params, batch)
            updates, opt_state = optimizer.update(
                jax.tree.map(lambda g: g / count, grads), opt_state
            )
            return optax.apply_updates(params, updates), opt_state

        return jax.lax.fori_loop(0, steps, iteration, (params, optimizer.init(params)))[0]

    return np.exp(np.float64(nine_logps(run(reference))))


def closed_form(reward, beta, alpha=0.0):
    """Return pi_ref^(beta / (alpha + beta)) exp(r / (alpha + beta)) / Z; alpha: of the entropy."""
    weights = np.exp((beta * np.float64(nine_logps(tables())) + reward) / (alpha + beta))
    return weights / weights.sum()


REWARD = 1.5 * normal(9, seed=5)
IN_REWARD = {
    "kl_in": "reward",
    "kl_estimator": "k1",
    "kl_coef": 0.7,
    "batch_size": 4096,
    "samples_per_prompt": 512,
}


@pytest.mark.parametrize("method", ["rloo", "grpo", "entropy", "shaping"])
def test_with_the_kl_in_the_reward_the_optimum_is_the_closed_form(method):
    """GRPO has it too: with one prompt the deviation scales steps only.

    With several it would weigh them against each other, as it weighs r against a KL in the loss,
    and 1 / |o| would with responses of several lengths.
    """
    alpha = 0.4 * (method == "entropy")
    name = {"entropy": "rloo", "shaping": "reinforce_pp"}.get(method, method)
    options = IN_REWARD | ({"samples_per_prompt": 1} if name == "reinforce_pp" else {})
    potentials = None
    if method == "shaping":
        options["shaping"] = 1.0
        phi = jnp.float32(3 * normal(3, seed=8))

        def potentials(which_B):
            """Return `phi` of the state after the first token; 2 at the start."""
            after_B = phi[jnp.array(FIRST)[which_B]]
            return jnp.stack([2 + 0.0 * which_B, after_B, which_B], 1)

    reached = train(
        settled(name, **options, entropy_coef=alpha), {"r": REWARD}, potentials=potentials
    )
    assert distance(reached, closed_form(REWARD, 0.7, alpha)) < 0.02
    # Controls: alpha and beta say where.
    assert distance(reached, closed_form(REWARD, 0.7, 0.4 - alpha)) > 0.05
    assert distance(reached, closed_form(REWARD, 1.4, alpha)) > 0.05
    assert distance(reached, np.exp(nine_logps(tables()))) > 0.1


def test_the_papers_grpo_has_another_optimum():
    """It is where pi (r - mean) / std = beta (pi - reference), found by ascent on one token.

    For its KL in the loss is k3, whose gradient is that of KL(reference || policy), and its reward
    is divided by its deviation. The ascent is in float64.
    """
    beta = 2.0
    steady = np.full(9, 0.0)
    # The second token is always 0.
    start = {"first": tables()["first"], "second": jnp.float32([[30.0, 0.0, 0.0]] * 3)}
    reward = np.float64([2.0, 0.0, -1.0, 0, 0, 0, 0, 0, 0])[[0, 0, 0, 1, 1, 1, 2, 2, 2]]
    r = reward[::3]
    logits = np.float64(start["first"])
    reference = np.exp(logits) / np.exp(logits).sum()
    for _ in range(4000):
        pi = np.exp(logits) / np.exp(logits).sum()
        mean = (pi * r).sum()
        logits = logits + 0.1 * (
            pi * (r - mean) / np.sqrt((pi * (r - mean) ** 2).sum()) - beta * (pi - reference)
        )
    options = {
        "kl_coef": beta,
        "batch_size": 4096,
        "samples_per_prompt": 1024,
        "max_new_tokens": 2,
    }
    reached = train(settled("grpo", **options), {"r": reward}, start)[::3] + steady[:3]
    closed = reference * np.exp(r / beta)
    assert distance(reached, pi) < 0.02 < 0.05 < distance(pi, closed / closed.sum())
    assert distance(reached, reference) > 0.05


def test_the_gradient_of_each_kl_estimate():
    """It is the gradient of E[estimate] with the samples held, as in the loss.

    That of k1 is 0, that of k2 is KL(pi || ref)'s, that of k3 KL(ref || pi)'s.
    """
    pi = jnp.float32(normal(4))
    reference = jax.nn.log_softmax(jnp.float32(normal(4, seed=1)))
    p = jax.nn.softmax(pi)

    def gradient(estimator):
        return jax.grad(
            lambda x: (p * kl_estimate(jax.nn.log_softmax(x), reference, estimator)).sum()
        )(pi)

    reverse = jax.grad(lambda x: (jax.nn.softmax(x) * (jax.nn.log_softmax(x) - reference)).sum())(
        pi
    )
    forward = jax.grad(lambda x: (jnp.exp(reference) * (reference - jax.nn.log_softmax(x))).sum())(
        pi
    )
    for estimator, want in (("k1", 0 * pi), ("k2", reverse), ("k3", forward)):
        np.testing.assert_allclose(gradient(estimator), want, atol=1e-6)
    assert np.abs(forward - reverse).max() > 0.05


@pytest.mark.slow
def test_a_tighter_gate_lowers_violations_at_a_cost():
    """The gate is on a harm score; of nine responses the most helpful are the most harmful."""
    helpful, harmless = np.linspace(-1, 3, 9), np.linspace(1, -1, 9)
    shares, costs = [], []
    for gate in (-9.0, 0.2):
        options = {
            **IN_REWARD,
            "reward": ("help", "harm"),
            "combine": "gated",
            "gate": gate,
            "floor": -3.0,
        }
        reached = train(settled("rloo", **options), {"help": helpful, "harm": harmless})
        want = closed_form(np.where(harmless >= gate, helpful, -3.0), 0.7)
        assert distance(reached, want) < 0.02
        shares.append((reached * (harmless < 0.2)).sum())
        costs.append((reached * helpful).sum())
    assert shares[0] > 0.5 > 0.1 > shares[1] and costs[0] > costs[1] + 0.2
