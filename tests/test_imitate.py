"""Selection against loops, the pool, best-of-n's KL by enumeration, RAFT with n = 1 as SFT."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batches import pad_examples, pad_prompts
from data.tokenizer import Tokenizer
from model import LanguageModel, init_and_apply
from model_config import PRESETS
from objectives import imitate
from objectives.likelihood import likelihood_objective
from rollout import make_rollout
from sampling import SamplingConfig

NONE = -np.inf


def scores_with_ties(seed, rows=24, empty=5):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, rows).astype(np.float32) / 2 - 1
    scores[rng.choice(rows, empty, replace=False)] = NONE
    return scores


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"{i} plus {j} is {i + j}" for i in range(20) for j in range(20)]
    return Tokenizer.train(texts, tmp_path_factory.mktemp("tokenizer"), 320)


# ---- Selection ----


@pytest.mark.parametrize("seed", range(3))
def test_selection_equals_plain_loops_with_ties_and_empty_rows(seed):
    scores = scores_with_ties(seed)
    group = 4
    one_in = 4
    threshold = 0.5
    best = [False] * len(scores)
    for start in range(0, len(scores), group):
        winner = max(range(start, start + group), key=lambda b: (scores[b], -b))
        best[winner] = scores[winner] > NONE
    real = [b for b in range(len(scores)) if scores[b] > NONE]
    top = sorted(real, key=lambda b: (-scores[b], b))[: math.ceil(len(real) / one_in)]
    np.testing.assert_array_equal(imitate.best_of_n(scores, group), best)
    np.testing.assert_array_equal(
        imitate.top_fraction(scores, one_in), [b in top for b in range(len(scores))]
    )
    np.testing.assert_array_equal(
        imitate.passing(scores, threshold), [s >= threshold for s in scores]
    )
    assert imitate.best_of_n(scores, 1).sum() == imitate.top_fraction(scores, 1).sum() == len(real)
    assert not imitate.passing(scores, NONE)[scores == NONE].any()


def test_a_group_without_responses_has_no_best():
    scores = np.array([NONE, NONE, 0.0, NONE], np.float32)
    assert imitate.best_of_n(scores, 2).tolist() == [False, False, True, False]
    assert imitate.top_fraction(np.full(4, NONE), 2).sum() == 0


def test_of_equal_responses_to_a_prompt_the_first_is_distinct():
    rows = np.random.default_rng(0).integers(0, 2, (20, 2))
    wanted = [not any((rows[b] == rows[a]).all() for a in range(b // 5 * 5, b)) for b in range(20)]
    np.testing.assert_array_equal(imitate.first_of_equal(jnp.array(rows), 5), wanted)
    assert 0 < sum(wanted) < 20


# ---- The pool ----


def test_the_pool_keeps_the_last_rounds_and_draws_the_chosen_equally_often():
    pool = imitate.empty_pool(6, 2, 3, pad=9)
    assert not imitate.filled(pool["score_B"]).any()
    for number in range(5):
        ones_BT = jnp.full((2, 5), number, jnp.int32)
        rows = {"tokens_BT": ones_BT, "segment_ids_BT": ones_BT, "positions_BT": ones_BT}
        mask_BR = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        pool = imitate.added(
            pool, {**rows, "mask_BR": mask_BR, "score_B": jnp.array([0.0, 1.0]) + number}, number
        )
        if number == 1:  # not full yet
            assert (
                pool["score_B"].tolist() == [0, 1, 1, 2, NONE, NONE]
                and (pool["tokens_BT"][4:] == 9).all()
            )
    assert pool["score_B"].tolist() == [3, 4, 4, 5, 2, 3]
    assert pool["tokens_BT"][:, 0].tolist() == [3, 3, 4, 4, 2, 2]
    assert pool["loss_mask_BT"][4:].tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 0, 0]]
    chosen = np.array([True, False, True, True, False, False])
    parts = imitate.drawn(pool, chosen, jax.random.key(0), 4, 3)
    for part in parts:  # three are chosen: each minibatch is a pass
        assert sorted(part["score_B"].tolist()) == [3, 4, 5]
    orders = {
        tuple(imitate.drawn(pool, chosen, jax.random.key(k), 1, 3)[0]["score_B"].tolist())
        for k in range(20)
    }
    assert len(orders) > 3


# ---- Best-of-n ----


def kl_of_best(probs, rewards, n):
    """Return KL(best of n || probs) by enumeration of all samples, ties to the first."""
    groups = np.array(list(itertools.product(range(len(probs)), repeat=n)))
    chosen = np.asarray(
        imitate.best_of_n(jnp.array(rewards[groups].reshape(-1), jnp.float32), n)
    ).reshape(-1, n)
    assert (chosen.sum(1) == 1).all()
    best = np.bincount(groups[chosen], weights=probs[groups].prod(1), minlength=len(probs))
    return (best * np.log(best / probs)).sum()


def test_kl_of_best_of_n_stays_below_the_bound():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(5))
    distinct = np.arange(5.0)
    tied = np.array([0.0, 1.0, 1.0, 1.0, 1.0])
    for n in (1, 2, 3, 5):
        exact = kl_of_best(probs, distinct, n)
        # The chances of the best reward (Beirami et al. 2024).
        cumulative = np.concatenate([[0.0], np.cumsum(probs)]) ** n
        best = np.diff(cumulative)
        np.testing.assert_allclose(exact, (best * np.log(best / probs)).sum(), atol=1e-12)
        assert (
            -1e-12
            <= kl_of_best(probs, tied, n)
            <= exact + 1e-12
            <= imitate.best_of_n_kl(n) + 2e-12
        )
    # Few outcomes: far below.
    assert kl_of_best(probs, distinct, 5) < imitate.best_of_n_kl(5) - 0.1
    assert kl_of_best(probs, np.zeros(5), 5) == pytest.approx(0, abs=1e-12)  # nothing to choose


@pytest.mark.parametrize("n", [2, 8, 64])
def test_the_bound_is_the_limit_of_many_outcomes(n):
    gaps = []
    for outcomes in (8, 512, 1 << 17):
        best = np.diff((np.arange(outcomes + 1) / outcomes) ** n)
        real = best[best > 0]
        gaps.append(imitate.best_of_n_kl(n) - (real * np.log(real * outcomes)).sum())
    assert gaps[0] > gaps[1] > gaps[2] > 0 and gaps[2] < 1e-4 and gaps[0] > 10 * gaps[1]
    assert imitate.best_of_n_kl(1) == 0 and imitate.best_of_n_kl(n) < math.log(n)


# ---- RAFT ----


def test_raft_with_one_sample_is_sft_on_the_policys_own_responses(tokenizer):
    """The gradient is train_sft.py's on the same conversations as it would pad them."""
    model = PRESETS["tiny"]
    init, apply = init_and_apply(LanguageModel(model))
    params = jax.jit(init)(jax.random.key(0))
    texts = ["1 plus 2", "what is 11 plus 19, please?", "3", "19 plus 0 is 19"]
    asked = [tokenizer.prompt(text) for text in texts]
    length = max(map(len, asked))
    new = 6
    sampling = SamplingConfig(max_new_tokens=new)
    prompts = pad_prompts([{"tokens": row} for row in asked], length, tokenizer.pad, fixed=True)
    rollout = make_rollout(apply, model, sampling, eos=tokenizer.eos, pad=tokenizer.pad)
    batch = rollout(params, prompts, jax.random.key(1))
    batch["score_B"] = jnp.array([0.5, -1.0, 0.0, 2.0])
    pool = imitate.added(imitate.empty_pool(8, length, new, tokenizer.pad), batch, 0)
    (rows,) = imitate.drawn(pool, imitate.best_of_n(pool["score_B"], 1), jax.random.key(2), 1, 4)

    def raft(policy):
        models = {"policy": policy}
        loss, (weight, _) = imitate.imitation_objective(apply, models, rows, kl_coef=0.0)
        return loss / weight

    responses = [
        row[: int(m.sum())].tolist()
        for row, m in zip(batch["response_BR"], batch["mask_BR"], strict=True)
    ]
    chats = [
        {"tokens": p + r, "mask": [0] * len(p) + [1] * len(r)}
        for p, r in zip(asked, responses, strict=True)
    ]
    own = pad_examples(chats, 64, tokenizer.pad)

    def sft(policy):
        loss, (weight, _) = likelihood_objective(apply, policy, own)
        return loss / weight

    (a, grad_a), (b, grad_b) = (jax.jit(jax.value_and_grad(f))(params) for f in (raft, sft))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), grad_a, grad_b)
    own["loss_mask_BT"][2:] = 0.0  # control: two of the responses have another loss
    assert abs(float(jax.jit(sft)(params)) - float(a)) > 1e-4
