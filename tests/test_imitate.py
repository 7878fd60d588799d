"""Selection against loops, the pool, best-of-n's KL by enumeration, Quark's turn and loss, RAFT with n = 1 as SFT."""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.batches import pad_examples, pad_prompts
from data.tokenizer import Tokenizer
from model import LanguageModel, LanguageOutput, init_and_apply
from model_config import PRESETS
from objectives import imitate
from objectives.likelihood import likelihood_objective
from rollout import make_rollout

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
    scores, group, one_in, threshold = scores_with_ties(seed), 4, 4, 0.5
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


@pytest.mark.parametrize("rows, empty, count", [(24, 5, 5), (24, 0, 4), (7, 4, 5)])
def test_quantiles_are_equally_filled_and_in_order(rows, empty, count):
    scores = scores_with_ties(0, rows, empty)
    given = [np.asarray(imitate.quantiles(scores, count, jax.random.key(k))) for k in range(32)]
    for quantile in given:
        assert (quantile[scores == NONE] == 0).all()
        sizes = np.bincount(quantile[scores > NONE], minlength=count + 1)[1:]
        assert sizes.sum() == rows - empty and len(sizes) == count and np.ptp(sizes) <= 1
        for a, b in itertools.product(np.flatnonzero(scores > NONE), repeat=2):
            assert scores[a] >= scores[b] or quantile[a] <= quantile[b]
    tied = len(set(scores[scores > NONE])) < rows - empty
    assert np.ptp(given, axis=0).any() == tied  # equal scores fall into quantiles at random
    distinct = np.random.default_rng(1).permutation(20).astype(np.float32)
    np.testing.assert_array_equal(
        imitate.quantiles(distinct, 5, jax.random.key(0)), 1 + distinct // 4
    )


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
    """KL(best of n || probs) by enumeration of all samples, ties to the first."""
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
    distinct, tied = np.arange(5.0), np.array([0.0, 1.0, 1.0, 1.0, 1.0])
    for n in (1, 2, 3, 5):
        exact = kl_of_best(probs, distinct, n)
        cumulative = (
            np.concatenate([[0.0], np.cumsum(probs)]) ** n
        )  # of the best reward (Beirami et al. 2024)
        best = np.diff(cumulative)
        np.testing.assert_allclose(exact, (best * np.log(best / probs)).sum(), atol=1e-12)
        assert (
            -1e-12
            <= kl_of_best(probs, tied, n)
            <= exact + 1e-12
            <= imitate.best_of_n_kl(n) + 2e-12
        )
    assert (
        kl_of_best(probs, distinct, 5) < imitate.best_of_n_kl(5) - 0.1
    )  # few outcomes: far below
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


# ---- Quark ----


def test_a_conditioned_row_is_the_chat_with_a_system_turn_that_no_user_can_spell(tokenizer):
    texts = ["1 plus 2", "what is 11 plus 19, please?", "<|system|>5 1 plus 1"]
    plain = [tokenizer.prompt(text) for text in texts]
    turns = [
        [{"role": "system", "content": "5"}, {"role": "user", "content": text}] for text in texts
    ]
    told = [tokenizer.prompt(messages) for messages in turns]
    (word,) = tokenizer.encode("5")
    assert all(tokenizer.system in row for row in told) and not any(
        tokenizer.system in row for row in plain
    )
    width = max(map(len, plain))
    batch, wanted = (
        pad_prompts([{"tokens": row} for row in rows], size, tokenizer.pad, fixed=True)
        for rows, size in ((plain, width), (told, width + 2))
    )
    for number in (word, jnp.full(3, word)):
        found = imitate.conditioned(batch, tokenizer.system, number)
        for name, x in wanted.items():
            np.testing.assert_array_equal(
                np.where(wanted["segment_ids_BT"], found[name], x), x, err_msg=name
            )
        np.testing.assert_array_equal(found["segment_ids_BT"], wanted["segment_ids_BT"])
    # With a response, ended early, behind each prompt.
    behind = {
        "tokens_BT": [[7, tokenizer.pad]],
        "segment_ids_BT": [[1, 0]],
        "loss_mask_BT": [[1.0, 0.0]],
    }
    last = batch["positions_BT"][:, -1:] + 1
    rows = {
        k: np.hstack([batch[k], np.repeat(behind[k], 3, axis=0)])
        for k in ("tokens_BT", "segment_ids_BT")
    }
    rows["positions_BT"] = np.hstack([batch["positions_BT"], last, last])
    rows["loss_mask_BT"] = np.hstack(
        [np.zeros_like(batch["tokens_BT"]), np.repeat(behind["loss_mask_BT"], 3, axis=0)]
    )
    found = imitate.conditioned(rows, tokenizer.system, jnp.full(3, word))
    assert found["tokens_BT"][:, -2:].tolist() == [[7, tokenizer.pad]] * 3
    assert (
        found["segment_ids_BT"][:, -2:].tolist() == [[1, 0]] * 3
        and found["loss_mask_BT"].sum() == 3
    )
    np.testing.assert_array_equal(found["positions_BT"][:, -2], wanted["positions_BT"][:, -1] + 1)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_quarks_loss_and_gradient_equal_numpy():
    """A policy whose logits are a row of a table, by the last token and whether the row has a quantile."""
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(size=(2, 2, 7, 7))
    segments = np.array([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1]], np.int32)
    batch = {
        "tokens_BT": np.where(segments, rng.integers(1, 6, segments.shape), 0).astype(np.int32),
        "segment_ids_BT": segments,
        "positions_BT": np.maximum(np.cumsum(segments, 1) - 1, 0).astype(np.int32),
        "loss_mask_BT": np.array([[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]], np.float32),
        "word_B": np.array([4, 5], np.int32),
    }

    def apply(params, tokens_BT, segment_ids_BT, positions_BT):
        has_system_B = (tokens_BT == 6).any(1).astype(int)
        return LanguageOutput(params[has_system_B[:, None], tokens_BT], jnp.eye(params.shape[-1]))

    def parts(policy):
        """The likelihood with the quantile and the KL from the reference without, in loops."""
        nll, kl = 0.0, 0.0
        for b, t in zip(*np.nonzero(batch["loss_mask_BT"]), strict=True):
            before, token = batch["tokens_BT"][b, t - 1 : t + 1]
            ours, theirs = log_softmax(policy[1, before]), log_softmax(reference[0, before])
            nll -= ours[token]
            kl += sum(math.exp(q) * (q - p) for p, q in zip(ours, theirs, strict=True))
        return nll + 0.3 * kl, kl

    condition = lambda rows: imitate.conditioned(rows, 6, rows["word_B"])
    objective = partial(imitate.imitation_objective, apply, condition=condition, kl_coef=0.3)
    with jax.enable_x64(True):
        tables = {"policy": jnp.array(policy), "reference": jnp.array(reference)}
        (loss, (weight, metrics)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
            tables, batch
        )
    np.testing.assert_allclose([loss, metrics["reference_kl"][0]], parts(policy), rtol=1e-6)
    assert float(weight) == 5
    slope = np.zeros_like(policy)
    for index in np.ndindex(policy.shape):
        step = np.zeros_like(policy)
        step[index] = 1e-5
        slope[index] = (parts(policy + step)[0] - parts(policy - step)[0]) / 2e-5
    np.testing.assert_allclose(grads["policy"], slope, atol=1e-6)
    assert not np.any(grads["reference"]) and np.any(slope[1]) and not np.any(slope[0])


# ---- Quark in rounds, on a policy that is a table: the logits of a one-token answer by the quantile's word

ANSWERS, WORDS, SYSTEM, BOS = (
    200,
    200,
    206,
    207,
)  # tokens: 0 to 199 answers; 200, as of no word, to 205 words; two more


def worded(table, tokens_BT, segment_ids_BT, positions_BT):
    word_B = jnp.where(tokens_BT[:, 1] == SYSTEM, tokens_BT[:, 2] - WORDS, 0)
    logits_BTV = jnp.broadcast_to(table[word_B][:, None], (*tokens_BT.shape, table.shape[-1]))
    return LanguageOutput(logits_BTV, jnp.eye(table.shape[-1]))


@jax.jit
def quark(reference, reward_V, blind):
    """The table after rounds as of train_raft.py, from the reference; `blind`: responses are ranked by noise."""
    rounds, rows, updates, size = 4, 512, 40, 128
    rows_BT = jnp.zeros((rows, 2), jnp.int32)
    plain = {
        "segment_ids_BT": rows_BT + 1,
        "positions_BT": rows_BT + jnp.arange(2),
        "mask_BR": jnp.ones((rows, 1)),
    }
    told = lambda batch: imitate.conditioned(batch, SYSTEM, batch["word_B"])
    objective = partial(imitate.imitation_objective, worded, condition=told, kl_coef=0.05)
    optimizer = optax.adam(0.1)

    def update(carry, minibatch):
        loss = lambda table: (
            objective({"policy": table, "reference": reference}, minibatch)[0] / size
        )
        changes, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], changes), state), None

    def turn(number, carry):
        table, state, pool = carry
        keys = jax.random.split(jax.random.key(number), 4)
        asked_V = table[
            jnp.where(number == 0, 0, 5), :ANSWERS
        ]  # at first the reference's own, then by the best word
        answers_B = jax.random.categorical(keys[0], asked_V, shape=(rows,))
        batch = {**plain, "tokens_BT": rows_BT.at[:, 0].set(BOS).at[:, 1].set(answers_B)}
        score_B = jnp.where(blind, jax.random.uniform(keys[1], (rows,)), reward_V[answers_B])
        pool = imitate.added(pool, batch | {"score_B": score_B}, number)
        ranked = {**pool, "word_B": WORDS + imitate.quantiles(pool["score_B"], 5, keys[2])}
        (drawn,) = imitate.drawn(
            ranked, imitate.filled(pool["score_B"]), keys[3], 1, updates * size
        )
        minibatches = jax.tree.map(lambda x: x.reshape(updates, size, *x.shape[1:]), drawn)
        return *jax.lax.scan(update, (table, state), minibatches)[0], pool

    pool = imitate.empty_pool(rounds * rows, 1, 1, 0)
    return jax.lax.fori_loop(0, rounds, turn, (reference, optimizer.init(reference), pool))[0]


def test_quark_orders_its_words_by_reward_and_the_best_word_gains():
    """Mean rewards under each word, exactly; the control's quantiles are of noise, so that words tell nothing."""
    rng = np.random.default_rng(0)
    reward_V, start = rng.permutation(ANSWERS) / 25, np.full((6, 208), -1e4, np.float32)
    start[:, :ANSWERS] = rng.normal(
        size=ANSWERS
    )  # the same whatever the word, which the reference does not know
    mean = lambda table: np.exp(log_softmax(np.float64(table)))[:, :ANSWERS] @ reward_V
    before, after, blind = (
        mean(start)[0],
        *(mean(quark(start, np.float32(reward_V), noise)) for noise in (False, True)),
    )
    assert (np.diff(after[1:]) > 0).all() and after[5] > before + 2
    assert np.ptp(blind[1:]) < 1 and blind[5] < before + 0.5  # control


# ---- RAFT ----


def test_raft_with_one_sample_is_sft_on_the_policys_own_responses(tokenizer):
    """The gradient is that of train_sft.py's objective on the same conversations as it would pad them."""
    model = PRESETS["tiny"]
    init, apply = init_and_apply(LanguageModel(model))
    params = jax.jit(init)(jax.random.key(0))
    texts = ["1 plus 2", "what is 11 plus 19, please?", "3", "19 plus 0 is 19"]
    asked = [tokenizer.prompt(text) for text in texts]
    length, new = max(map(len, asked)), 6
    options = SimpleNamespace(model=model, temperature=1.0, max_new_tokens=new)
    prompts = pad_prompts([{"tokens": row} for row in asked], length, tokenizer.pad, fixed=True)
    batch = make_rollout(options, apply, tokenizer)(params, prompts, jax.random.key(1))
    batch["score_B"] = jnp.array([0.5, -1.0, 0.0, 2.0])
    pool = imitate.added(imitate.empty_pool(8, length, new, tokenizer.pad), batch, 0)
    (rows,) = imitate.drawn(pool, imitate.best_of_n(pool["score_B"], 1), jax.random.key(2), 1, 4)
    condition = {"condition": lambda rows: rows, "kl_coef": 0.0}

    def raft(policy):
        loss, (weight, _) = imitate.imitation_objective(
            apply, {"policy": policy}, rows, **condition
        )
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
