"""The fork experiments/quark: quantiles, their turns, the loss, rounds on a table, the script."""

import itertools
import math
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import fails, rows_of, run, write

import train_sft
from data.batches import pad_prompts
from data.tokenizer import Tokenizer
from experiments.quark import train_raft
from experiments.quark.quark import conditioned, quantiles, quark_objective
from model import LanguageModel, LanguageOutput, init_and_apply
from model_config import PRESETS
from objectives import imitate
from runtime.checkpoint import Checkpoints
from runtime.run_folder import load_config
from train_state import load_params

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


# ---- Quantiles ----


@pytest.mark.parametrize("rows, empty, count", [(24, 5, 5), (24, 0, 4), (7, 4, 5)])
def test_quantiles_are_equally_filled_and_in_order(rows, empty, count):
    scores = scores_with_ties(0, rows, empty)
    given = [np.asarray(quantiles(scores, count, jax.random.key(k))) for k in range(32)]
    for quantile in given:
        assert (quantile[scores == NONE] == 0).all()
        sizes = np.bincount(quantile[scores > NONE], minlength=count + 1)[1:]
        assert sizes.sum() == rows - empty and len(sizes) == count and np.ptp(sizes) <= 1
        for a, b in itertools.product(np.flatnonzero(scores > NONE), repeat=2):
            assert scores[a] >= scores[b] or quantile[a] <= quantile[b]
    tied = len(set(scores[scores > NONE])) < rows - empty
    assert np.ptp(given, axis=0).any() == tied  # equal scores fall into quantiles at random
    distinct = np.random.default_rng(1).permutation(20).astype(np.float32)
    np.testing.assert_array_equal(quantiles(distinct, 5, jax.random.key(0)), 1 + distinct // 4)


# ---- The turn that names a quantile, and the loss under it ----


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
        found = conditioned(batch, tokenizer.system, number)
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
    found = conditioned(rows, tokenizer.system, jnp.full(3, word))
    assert found["tokens_BT"][:, -2:].tolist() == [[7, tokenizer.pad]] * 3
    assert (
        found["segment_ids_BT"][:, -2:].tolist() == [[1, 0]] * 3
        and found["loss_mask_BT"].sum() == 3
    )
    np.testing.assert_array_equal(found["positions_BT"][:, -2], wanted["positions_BT"][:, -1] + 1)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_quarks_loss_and_gradient_equal_numpy():
    """The policy's logits are a row of a table, by the last token and the row's quantile."""
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
        """Return the likelihood with the quantile and the KL from the reference without it."""
        nll, kl = 0.0, 0.0
        for b, t in zip(*np.nonzero(batch["loss_mask_BT"]), strict=True):
            before, token = batch["tokens_BT"][b, t - 1 : t + 1]
            ours, theirs = log_softmax(policy[1, before]), log_softmax(reference[0, before])
            nll -= ours[token]
            kl += sum(math.exp(q) * (q - p) for p, q in zip(ours, theirs, strict=True))
        return nll + 0.3 * kl, kl

    objective = partial(quark_objective, apply, system=6, kl_coef=0.3)
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


# ---- Quark in rounds, on a table of the logits of a one-token answer by the quantile's word

# Tokens: 0 to 199 answers; 200, as of no word, to 205 words; two more.
ANSWERS, WORDS, SYSTEM, BOS = 200, 200, 206, 207


def worded(table, tokens_BT, segment_ids_BT, positions_BT):
    word_B = jnp.where(tokens_BT[:, 1] == SYSTEM, tokens_BT[:, 2] - WORDS, 0)
    x_BTV = jnp.broadcast_to(table[word_B][:, None], (*tokens_BT.shape, table.shape[-1]))
    return LanguageOutput(x_BTV, jnp.eye(table.shape[-1]))


@jax.jit
def table_after_rounds(reference, reward_V, blind):
    """Return the table after rounds as of experiments/quark/train_raft.py, from the reference.

    With `blind` responses are ranked by noise.
    """
    rounds, rows, updates, size = 4, 512, 40, 128
    rows_BT = jnp.zeros((rows, 2), jnp.int32)
    plain = {
        "segment_ids_BT": rows_BT + 1,
        "positions_BT": rows_BT + jnp.arange(2),
        "mask_BR": jnp.ones((rows, 1)),
    }
    objective = partial(quark_objective, worded, system=SYSTEM, kl_coef=0.05)
    optimizer = optax.adam(0.1)

    def update(carry, minibatch):
        def loss(table):
            return objective({"policy": table, "reference": reference}, minibatch)[0] / size

        changes, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], changes), state), None

    def turn(number, carry):
        table, state, pool = carry
        keys = jax.random.split(jax.random.key(number), 4)
        # At first the reference's own, then by the best word.
        asked_V = table[jnp.where(number == 0, 0, 5), :ANSWERS]
        answers_B = jax.random.categorical(keys[0], asked_V, shape=(rows,))
        batch = {**plain, "tokens_BT": rows_BT.at[:, 0].set(BOS).at[:, 1].set(answers_B)}
        score_B = jnp.where(blind, jax.random.uniform(keys[1], (rows,)), reward_V[answers_B])
        pool = imitate.added(pool, batch | {"score_B": score_B}, number)
        ranked = {**pool, "word_B": WORDS + quantiles(pool["score_B"], 5, keys[2])}
        (drawn,) = imitate.drawn(
            ranked, imitate.filled(pool["score_B"]), keys[3], 1, updates * size
        )
        minibatches = jax.tree.map(lambda x: x.reshape(updates, size, *x.shape[1:]), drawn)
        return *jax.lax.scan(update, (table, state), minibatches)[0], pool

    pool = imitate.empty_pool(rounds * rows, 1, 1, 0)
    return jax.lax.fori_loop(0, rounds, turn, (reference, optimizer.init(reference), pool))[0]


def test_quark_orders_its_words_by_reward_and_the_best_word_gains():
    """Mean rewards under each word are exact; the control's quantiles are those of noise."""
    rng = np.random.default_rng(0)
    reward_V = rng.permutation(ANSWERS) / 25
    start = np.full((6, 208), -1e4, np.float32)
    # The same whatever the word, which the reference does not know.
    start[:, :ANSWERS] = rng.normal(size=ANSWERS)

    def mean(table):
        return np.exp(log_softmax(np.float64(table)))[:, :ANSWERS] @ reward_V

    before = mean(start)[0]
    after = mean(table_after_rounds(start, np.float32(reward_V), False))
    blind = mean(table_after_rounds(start, np.float32(reward_V), True))
    assert (np.diff(after[1:]) > 0).all() and after[5] > before + 2
    assert np.ptp(blind[1:]) < 1 and blind[5] < before + 0.5  # control


# ---- The script ----

OWN = """
def digits(response, record):
    return float(sum(letter in "0123456789" for letter in response))
"""
SMALL = [
    "--batch_size=64",
    "--minibatch_size=8",
    "--max_prompt=32",
    "--max_new_tokens=8",
    "--epochs=1",
    "--init=sft",
    "--data=sums.jsonl",
    "--optimizer.lr=2e-3",
    "--reward=own_digits:digits",
]
EIGHT = ["--mesh.data=1", "--mesh.fsdp=8"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make a folder with prompts, a random policy to start from and a module of rewards."""
    folder = tmp_path_factory.mktemp("quark")
    sums = [(f"{i} plus {j}", str(i + j)) for i in range(10) for j in range(10)]
    write(folder / "sums.jsonl", [{"prompt": p, "answer": a} for p, a in sums])
    (folder / "own_digits.py").write_text(OWN)
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
def test_the_best_quantile_is_asked_for_from_the_second_round_on(here):
    run(train_raft, *SMALL, "--steps=3", "--run=quark")
    rows = rows_of("quark")
    assert abs(rows[0]["kl"]) < 1e-5 and rows[1]["kl"] > 1e-3  # asked otherwise, and trained
    assert [row["chosen"] for row in rows] == [64, 128, 192]
    assert all(row["sampler_gap"] < 1e-4 and row["policy/reference_kl"] > 0 for row in rows)
    stored = load_config("quark")
    assert stored["script"] == "experiments/quark/train_raft"
    assert (stored["kl_coef"], stored["replay_rounds"]) == (0.05, 4)


@pytest.mark.slow
def test_resuming_with_a_pool_is_bitwise_equal(here):
    options = [*SMALL, *EIGHT, "--steps=4", "--replay_rounds=1", "--save_every=2"]
    run(train_raft, *options, "--run=whole")
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/checkpoints/4")
    run(train_raft, *options, "--run=cut")
    jax.tree.map(np.testing.assert_array_equal, load_params("cut"), load_params("whole"))
    rows, again = rows_of("whole"), rows_of("cut")
    assert [(row["step"], row["score"], row["chosen"]) for row in again] == [
        (row["step"], row["score"], row["chosen"]) for row in rows
    ]


@pytest.mark.parametrize("count", [1, 10])
def test_a_number_of_quantiles_that_is_no_digit_is_refused(count, here, capsys):
    line = fails(train_raft, [*SMALL, f"--quantiles={count}", "--run=new"], capsys)
    assert "quantiles" in line
