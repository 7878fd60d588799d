"""Process supervision: labels, scores, rewards of steps, Monte Carlo, re-ranking, step search."""

import json
import math
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import fails, rows_of, run, write

import train_ppo
import train_prm
import train_sft
from collect import steps as collect_steps
from data import records
from data.batches import collate
from data.sources import open_source
from data.steps import encode_steps, lines_of, pad_steps
from data.tokenizer import Tokenizer
from decoding import rerank, step_beam
from evaluation.steps import auc, majority, step_table
from model import LanguageModel, LanguageOutput, ScalarModel, ScalarOutput, init_and_apply, unembed
from model_config import ModelConfig
from objectives.reward import process_objective, running_score, step_ends, step_rewards
from responses import make_sampler
from rewards.models import STEP_SCORES
from runtime.errors import UserError
from runtime.run_folder import atomic_text
from sampling import SamplingConfig
from tasks import arithmetic

TINY = ModelConfig(
    vocab=320, width=16, mlp_width=32, layers=1, heads=2, kv_heads=1, head_dim=8, context=128
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = (
        f"{row['prompt']}\n{row['response']}" for row in map(arithmetic.demonstration, range(200))
    )
    return Tokenizer.train(texts, tmp_path_factory.mktemp("tokenizer"), 320)


def rows_in(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


# ---- Records ----

PRM800K = {  # a row as the dataset's README describes it
    "question": {"problem": "What is 2+2?", "ground_truth_answer": "4"},
    "label": {
        "steps": [
            {
                "completions": [{"text": "I add.", "rating": 0}],
                "human_completion": None,
                "chosen_completion": 0,
            },
            {
                "completions": [
                    {"text": "2+2=5", "rating": -1},
                    {"text": "2+2\n\n=4", "rating": 1},
                ],
                "human_completion": None,
                "chosen_completion": 1,
            },
            {
                "completions": [{"text": "So 5.", "rating": -1}],
                "human_completion": {"text": "So 4.", "rating": None},
                "chosen_completion": None,
            },
            {
                "completions": [{"text": "Hm.", "rating": None}],
                "human_completion": None,
                "chosen_completion": 0,
            },
            {
                "completions": [{"text": "It is 7.", "rating": -1}],
                "human_completion": None,
                "chosen_completion": None,
            },
        ],
        "finish_reason": "found_error",
    },
}


def test_prm800k_s_rows_become_labelled_steps():
    record = records.steps_record(PRM800K)
    assert record["prompt"] == [{"role": "user", "content": "What is 2+2?"}]
    assert record["steps"] == ["I add.", "2+2 =4", "So 4.", "Hm.", "It is 7."]
    assert record["labels"] == ["neutral", "positive", "positive", None, "negative"]
    given_up = {**PRM800K, "label": {"steps": [], "finish_reason": "give_up"}}
    assert records.steps_record(given_up)["steps"] == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": ["positive"]}, "labels: must be a list of 2 labels"),
        (
            {"labels": ["positive", "good"]},
            "labels[1]: must be positive, neutral, negative, 0 to 1, or null",
        ),
        ({"labels": [True, 1.5]}, "labels[0]: must be"),
        ({"labels": [0, 1.5]}, "labels[1]: must be"),
        ({"steps": []}, "steps: must be a list of one or more"),
        ({"steps": ["1", ""]}, "steps[1]: is empty"),
        ({"steps": ["1", "a\nb"]}, "steps[1]: must be one line"),
        ({"question": 3, "label": {}}, "question: must be an object"),
        (
            {**PRM800K, "label": {"steps": [{"completions": [], "chosen_completion": 2}, 5]}},
            "label.steps[1]",
        ),
    ],
)
def test_malformed_steps_name_their_field(change, message):
    row = {"prompt": "1+1", "steps": ["1+1=2", "answer 2"], "labels": ["positive", 0.25]} | change
    # A stage without completions ends the solution; what is no stage is a fault.
    if message == "label.steps[1]":
        row["label"]["steps"].reverse()
        message = "label.steps[0]: must be an object with completions"
    with pytest.raises(records.FieldError) as fault:
        records.steps_record(row)
    assert message in str(fault.value)


def test_targets_stand_at_each_labelled_step_s_last_token(tokenizer):
    labels = ["positive", None, 0.25, "neutral", "negative"]
    record = records.steps_record(
        {
            "prompt": "27+8-6",
            "steps": ["27+8=35", "so 35", "35-6=29", "so 29", "answer 28"],
            "labels": labels,
        }
    )
    encoded = encode_steps(record, tokenizer, 64)
    (row,) = encoded.rows
    text = "27+8=35\nso 35\n35-6=29\nso 29\nanswer 28"
    prompt = tokenizer.prompt("27+8-6")
    # The row is as a policy samples it.
    assert row["tokens"] == [*prompt, *tokenizer.encode(text), tokenizer.eos]
    assert not encoded.truncated
    ends = [
        t
        for t in range(len(prompt), len(row["tokens"]))
        if row["tokens"][t] in (*tokenizer.encode("\n"), tokenizer.eos)
    ]
    assert [row["mask"][t] for t in ends] == [1, 0, 1, 1, 1] and sum(row["mask"]) == 4
    assert [row["targets"][t] for t in ends] == [1.0, 0.0, 0.25, 1.0, 0.0]
    batch = pad_steps([row], 64, tokenizer.pad)
    mask_BT = np.arange(batch["tokens_BT"].shape[1])[None] >= len(prompt)
    mask_BT = mask_BT * (batch["segment_ids_BT"] > 0)
    # The rule by which responses are read.
    found = step_ends(batch["tokens_BT"], mask_BT, tokenizer.newlines(), tokenizer.eos)
    assert np.flatnonzero(found[0]).tolist() == ends
    short = encode_steps(record, tokenizer, ends[2])
    assert short.truncated and sum(short.rows[0]["mask"]) == 1
    no_label_is_left = encode_steps(record, tokenizer, ends[0])
    assert not no_label_is_left.rows and no_label_is_left.truncated


# ---- Losses, scores, rewards ----


def test_process_objective_and_its_gradient_against_numpy(tokenizer):
    rng = np.random.default_rng(0)
    logits_BT = rng.normal(size=(4, 9)) * 3
    targets_BT = rng.uniform(size=(4, 9)).round(1)
    mask_BT = (rng.uniform(size=(4, 9)) < 0.4).astype(np.float64)
    p = sigmoid(logits_BT)
    expected = -(mask_BT * (targets_BT * np.log(p) + (1 - targets_BT) * np.log(1 - p))).sum()
    ones = np.ones((4, 9), np.int32)
    batch = {"tokens_BT": ones, "segment_ids_BT": ones, "positions_BT": ones}
    batch |= {"loss_mask_BT": np.float32(mask_BT), "targets_BT": np.float32(targets_BT)}

    def apply(logits, *_):
        """Be a model whose scalars are its parameters."""
        return ScalarOutput(logits, None, None)

    def objective(logits):
        return process_objective(apply, logits, batch)

    (loss, (weight, metrics)), grad = jax.value_and_grad(objective, has_aux=True)(
        jnp.float32(logits_BT)
    )
    assert float(loss) == pytest.approx(expected, rel=1e-6) and float(weight) == mask_BT.sum()
    np.testing.assert_allclose(grad, mask_BT * (p - targets_BT), atol=1e-6)
    right = (((p > 0.5) == (targets_BT >= 0.5)) * mask_BT).sum()
    assert [float(x) for x in metrics["accuracy"]] == [right, mask_BT.sum()]
    # A logit of 0 is half right.
    (_, (_, undecided)) = objective(jnp.zeros((4, 9)))
    assert float(undecided["accuracy"][0]) == 0.5 * mask_BT.sum()
    extreme = jnp.full((4, 9), 200.0)
    assert (
        np.isfinite(objective(extreme)[0])
        and np.isfinite(jax.grad(lambda x: objective(x)[0])(extreme)).all()
    )


def test_padding_does_not_change_the_process_objective(tokenizer):
    source = open_source("arithmetic", "steps", "train")
    init, apply = init_and_apply(ScalarModel(TINY))
    params = init(jax.random.key(0))
    rows = [source[i] for i in range(6)]
    collated = partial(collate, encode_steps, partial(pad_steps, fixed=True))
    sums = jax.jit(partial(process_objective, apply))
    alone = [sums(params, collated([row], tokenizer, 64)) for row in rows]
    loss, (weight, _) = sums(params, collated(rows, tokenizer, 100))
    assert float(loss) == pytest.approx(sum(float(x[0]) for x in alone), rel=1e-5)
    assert float(weight) == sum(float(x[1][0]) for x in alone) > 6


def by_loop(logits, ends, how):
    """Return scores after each token, in probabilities, by a loop over the ended steps."""
    out, past = [], []
    for logit, end in zip(logits, ends, strict=True):
        past += [float(sigmoid(logit))] if end else []
        value = (
            {"product": math.prod, "minimum": min, "last": lambda p: p[-1]}[how](past)
            if past
            else 0.0
        )
        out.append(value)
    return np.array(out)


def test_steps_end_where_they_do_without_the_holes_of_the_mask(rng):
    for _ in range(50):
        tokens_T = rng.integers(1, 5, 12)
        mask_T = rng.random(12) < 0.7
        found_T = step_ends(tokens_T[None], mask_T[None], [1, 2], 4)[0]
        assert not found_T[~mask_T].any()
        # The tokens under the mask alone, with nothing between them.
        alone_T = tokens_T[mask_T]
        if alone_T.size:
            expected = step_ends(alone_T[None], np.ones((1, alone_T.size)), [1, 2], 4)[0]
            assert found_T[mask_T].tolist() == expected.tolist()


def test_a_step_ends_at_each_token_that_ends_in_a_newline():
    tokens_BT, mask_BT = np.array([[5, 7, 5, 8, 6, 9, 5]]), np.array([[0, 1, 1, 1, 1, 1, 0]])
    assert step_ends(tokens_BT, mask_BT, [5, 6]).tolist() == [
        [False, False, True, False, True, True, False]
    ]


def test_blank_lines_and_an_end_after_a_newline_are_no_steps(tokenizer):
    """The rule for tokens is the rule for texts, whatever newlines stand between the steps."""
    texts = ["a\nb", "a\n\nb", "a\nb\n", "\na\n\n\nb\n\n", "a", "\n", "", "a\n\n\nb\n\nc", "ab\n"]
    for text in texts:
        steps = [line for line, _ in lines_of(text)]
        assert steps == [line for line in text.split("\n") if line]
        tokens = [*tokenizer.encode(text), tokenizer.eos]
        padded_BT = np.array([[*tokens, *[tokenizer.pad] * (20 - len(tokens))]])
        mask_BT = np.arange(20)[None] < len(tokens)
        ends_BT = step_ends(padded_BT, mask_BT, tokenizer.newlines(), tokenizer.eos)
        # An empty response is one end, that of nothing.
        assert ends_BT.sum() == max(len(steps), text == ""), text
        # A step ends at the first newline after it, as a model of steps has learnt it.
        for step, t in zip(steps, np.flatnonzero(ends_BT[0]), strict=False):
            assert tokenizer.decode(tokens[:t]).endswith(step)
        assert "".join(line + end for line, end in lines_of(text)) == text.lstrip("\n")
    # What is unended ends its last step where it stops.
    unended_BT = np.array([tokenizer.encode("a\nb")])
    assert step_ends(unended_BT, unended_BT > 0, tokenizer.newlines(), tokenizer.eos).sum() == 2


def test_lines_of_spaces_are_blank():
    assert lines_of("a\n \t\n  b\n ") == [("a", "\n \t\n"), ("  b", "\n")]


@pytest.mark.parametrize("how", ["product", "minimum", "last"])
def test_step_rewards_stand_at_steps_and_sum_to_the_outcome(how):
    rng = np.random.default_rng(1)
    logits_BT = rng.normal(size=(6, 12)) * 2
    ends_BT = rng.uniform(size=(6, 12)) < 0.35
    ends_BT[0], ends_BT[1, -1] = False, True
    expected = np.stack([by_loop(*row, how) for row in zip(logits_BT, ends_BT, strict=True)])
    score_BT = jnp.exp(running_score(jnp.float32(logits_BT), ends_BT, how))
    np.testing.assert_allclose(score_BT, expected, atol=1e-6)
    rewards_BT = np.asarray(step_rewards(jnp.float32(logits_BT), ends_BT, how))
    assert (rewards_BT[~ends_BT] == 0).all() and (rewards_BT[ends_BT] != 0).any()
    np.testing.assert_allclose(rewards_BT.sum(1), expected[:, -1], atol=1e-6)  # telescoped
    assert rewards_BT[0].sum() == 0  # no step, no reward
    summed = (sigmoid(logits_BT) * ends_BT).sum(1)
    # Control: probabilities simply summed do not.
    assert np.abs(summed - expected[:, -1]).max() > 0.5


def test_ppo_gives_each_step_its_reward_at_its_last_token():
    """Returns without discounts are sums of rewards to come: their differences are the rewards."""
    newline, eos = 5, 3
    response_BR = np.array(
        [[7, 8, newline, 9, newline, 7, eos, 1], [7, newline, 7, 7, newline, 7, 7, 7]]
    )
    mask_BR = np.float32([[1] * 7 + [0], [1] * 8])
    scalars_BT = np.random.default_rng(2).normal(size=(2, 10))
    segments = np.concatenate([np.ones((2, 2)), mask_BR], 1).astype(np.int32)
    tokens = np.concatenate([np.full((2, 2), 6), response_BR], 1)
    batch = {
        "tokens_BT": tokens,
        "segment_ids_BT": segments,
        "positions_BT": np.cumsum(segments, 1) - 1,
    }
    batch |= {
        "response_BR": response_BR,
        "mask_BR": mask_BR,
        "sampler_logp_BR": np.zeros((2, 8), np.float32),
    }
    batch = jax.tree.map(jnp.asarray, batch)

    def policy(*_):
        return LanguageOutput(jnp.zeros((2, 10, 1)), jnp.zeros((1, 10)))

    def value_model(params, *_):
        return ScalarOutput(params, None, None)

    rewards = {}
    for how in ("product", "none"):
        config = train_ppo.Config(step_rewards=how, gae_lambda=1.0, missing_eos="replace")
        compute_advantages = train_ppo.make_advantages(
            config, policy, value_model, eos=eos, newlines=[newline]
        )
        models = train_ppo.Models(policy={}, reference={}, critic=jnp.zeros((2, 10)))
        given = [
            {config.reward[0]: jnp.float32(x)}
            for x in (scalars_BT[[0, 1], [8, 9]], scalars_BT[:, 1:])
        ]
        targets, _ = compute_advantages(models, batch, *given, jnp.float32(0.2))
        rewards[how] = -np.diff(np.asarray(targets["returns_BR"]), axis=1, append=0.0)
    p = sigmoid(scalars_BT[:, 2:])
    a, b, c = p[0, [2, 4, 6]]
    np.testing.assert_allclose(
        rewards["product"][0], [0, 0, a, 0, a * b - a, 0, a * b * c - a * b, 0], atol=1e-6
    )
    # It never ends: by the rule its sum is -1, and the last token makes up for the steps.
    a, b = p[1, [1, 4]]
    np.testing.assert_allclose(
        rewards["product"][1], [0, a, 0, 0, a * b - a, 0, 0, -1 - a * b], atol=1e-6
    )
    np.testing.assert_allclose(rewards["none"][0], [0] * 6 + [scalars_BT[0, 8], 0], atol=1e-6)


# ---- Monte Carlo labels ----


def odd(text, record):
    """Return 1 if an ASCII character of odd code is in the text: each token settles it alone."""
    return float(any(ord(c) < 128 and ord(c) % 2 for c in text))


@pytest.mark.slow
def test_completion_shares_err_as_one_over_the_root_of_n(tokenizer):
    """Exact success probabilities by enumerating both tokens of every completion."""
    init, apply = init_and_apply(LanguageModel(TINY))
    params = init(jax.random.key(1))
    params["decoder"]["embed"] *= 3  # far from uniform
    prompts = [tokenizer.prompt(f"{i}{j}") for i in "02468" for j in "02468"]
    states = [
        collect_steps.State(prompt, "2\n" if i % 2 else "", {}) for i, prompt in enumerate(prompts)
    ]
    hit_V = np.array([odd(tokenizer.decode([v]), {}) for v in range(320)], np.float64)
    vocabulary = np.arange(320)

    @jax.jit
    def next_probabilities(tokens_BT):
        ones = jnp.ones_like(tokens_BT)
        output = apply(params, tokens_BT, ones, jnp.cumsum(ones, 1) - 1)
        logits_BTV = unembed(output.x_BTD, output.unembed_DV)
        return jax.nn.softmax(logits_BTV[:, -1])

    exact = []
    for prompt, so_far, _ in states:
        context = np.array([*prompt, *tokenizer.encode(so_far)])
        first_V = np.asarray(next_probabilities(context[None]))[0].astype(np.float64)
        rows = np.concatenate([np.tile(context, (320, 1)), vocabulary[:, None]], 1)
        second_V = np.asarray(next_probabilities(rows)).astype(np.float64) @ hit_V
        second_V[tokenizer.eos] = 0  # nothing follows
        exact.append(first_V @ np.where(hit_V > 0, 1.0, second_V))
    exact = np.array(exact)
    assert exact.min() > 0.02 and exact.max() < 0.98 and exact.std() > 0.02

    rms = {}
    for n in (16, 256):
        respond = make_sampler(TINY, SamplingConfig(max_new_tokens=2), tokenizer, n)

        def complete(contexts, respond=respond):
            # All are told to have ended, as one without an end is no success.
            sampled = respond(params, contexts, jax.random.key(5))
            return [[*tokens, tokenizer.eos] for tokens in sampled]

        errors = np.array(collect_steps.success_shares(complete, odd, tokenizer, states)) - exact
        predicted = math.sqrt((exact * (1 - exact)).mean() / n)
        rms[n] = math.sqrt((errors**2).mean())
        assert rms[n] == pytest.approx(predicted, rel=0.4)
        assert abs(errors.mean()) < 3 * predicted / math.sqrt(len(states))
    assert rms[16] / rms[256] == pytest.approx(4, rel=0.5)


def test_a_completion_without_an_end_is_no_success(tokenizer):
    """Right as its text is: it would have gone on."""
    right = tokenizer.encode("35")
    written = [[*right, tokenizer.eos], right, [*right, tokenizer.eos], tokenizer.encode("2")]
    state = collect_steps.State(tokenizer.prompt("27+8"), "", {})
    assert collect_steps.success_shares(lambda _: written, odd, tokenizer, [state]) == [0.5]


# ---- Measures, re-ranking, search ----


def test_auc_and_first_error_against_loops():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=80).round(1)
    right = rng.uniform(size=80) < 0.7
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[right] for b in scores[~right]]
    assert auc(scores, right) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert math.isnan(auc(scores, np.ones(80, bool)))
    logits = np.array([[1.0, -1, 2, -3], [1, -1, -2, 5], [1, 2, 3, 4], [1, 2, 3, 4]])
    mask = np.array([[1, 1, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]])
    targets = np.array([[1, 0.2, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]])
    table = step_table(logits, targets, mask)
    assert table["first_error"] == pytest.approx(1 / 3)  # found; an earlier one named; none named
    assert (
        table["steps"] == 13
        and table["wrong"] == pytest.approx(4 / 13)
        and table["accuracy"] == pytest.approx(11 / 13)
    )


def test_majority_and_choices():
    assert majority([3.0, 4.0, None, 4.0, None, None]) == 1
    assert majority([3.0, 4.0]) == 0 and majority([None, None]) == 0  # ties: the first
    scores = {
        "prm": np.array([[-3.0, -1.0, -2.0, -0.5]]),
        "orm": np.array([[0.0, -1.0, -1.0, -1.0]]),
    }
    answers = [[7.0, 8.0, 8.0, 9.0]]
    for n, expected in ((1, (0, 0, 0)), (3, (1, 1, 0)), (4, (1, 3, 0))):
        chosen = rerank.choices(n, scores, answers)
        assert [int(chosen[way][0]) for way in ("majority", "prm", "orm")] == list(expected)


def test_a_score_that_knows_nothing_is_right_as_often_as_blind_says():
    """Random scores, equal for equal texts: the highest is a uniform draw of the distinct ones."""
    texts = [["a", "b", "a", "a", "c"]]
    right = np.array([[1, 0, 1, 1, 0]])
    new_PN = rerank.first_of_equal_texts(texts)
    assert new_PN.tolist() == [[True, True, False, False, True]]
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(4000):
        of_text = dict(zip("abc", rng.normal(size=3), strict=True))
        scores = {"orm": np.array([[of_text[text] for text in row] for row in texts])}
        chosen = rerank.choices(5, scores, [[1, 2, 1, 1, 3]])["orm"]
        hits.append(right[0, chosen[0]])
    blind = np.average(right, 1, new_PN)[0]
    assert blind == pytest.approx(1 / 3)
    assert np.mean(hits) == pytest.approx(blind, abs=0.03)
    assert right.mean() == 0.6  # control: one sample drawn at random


def test_step_search_on_a_tree_that_is_known():
    """Steps are [digit, newline], the third [digit, eos]; the score is of the digits alone."""
    newline = 90
    eos = 99
    calls = []

    def extend(contexts, number):
        calls.append(len(contexts))
        end = eos if number == 2 else newline
        return [[digit, end] for context in contexts for digit in (1 + len(context) % 2, 3)]

    def score(prompts, responses):
        digits = [[t for t in r if t < 90] for r in responses]
        # A first 3 looks best at once, and is a dead end two steps later.
        return np.array([-10.0 if d[:1] == [3] and len(d) > 2 else sum(d) for d in digits])

    greedy, tokens = step_beam.search([[50]], extend, score, (eos,), beams=1, branch=2, longest=8)
    assert [t for t in greedy[0] if t < 90] == [3, 3, 2]
    assert tokens == 3 * 2 * 2  # rounds x branches x tokens of a step
    wide, tokens = step_beam.search(
        [[50], [51]], extend, score, (eos,), beams=4, branch=2, longest=8
    )
    assert [[t for t in r if t < 90] for r in wide] == [[2, 3, 3], [2, 3, 3]]
    assert all(r[-1] == eos for r in wide) and tokens == 2 * 3 * 4 * 2 * 2
    assert calls == [1] * 3 + [8] * 3
    cut, _ = step_beam.search([[50]], extend, score, (eos,), beams=2, branch=2, longest=3)
    assert len(cut[0]) == 3  # and it stops there
    assert step_beam.best([[1], [1], [2]], np.array([3.0, 3.0, 1.0]), 2) == [[1], [2]]


def test_step_search_over_whole_solutions_is_the_best_of_n():
    """Expert iteration with it is then rejection sampling: the best of beams x branch samples."""
    rng = np.random.default_rng(0)
    eos = 99
    drawn = rng.integers(1, 90, (5, 12, 3))  # to each of 5 problems 12 solutions of 3 tokens
    rows = iter(drawn.reshape(-1, 4, 3))

    def extend(contexts, number):
        return [[*map(int, t), eos] for _ in contexts for t in next(rows)]

    def score(prompts, responses):
        return np.array([sum(r) % 41 for r in responses])

    found, tokens = step_beam.search(
        [[i] for i in range(5)], extend, score, (eos,), beams=3, branch=4, longest=9
    )
    best = [max(of_one.tolist(), key=lambda t: (sum(t) + eos) % 41) for of_one in drawn]
    assert [r[:-1] for r in found] == best and tokens == 5 * 12 * 4
    assert best != [of_one[0].tolist() for of_one in drawn]  # control


def test_sampled_steps_end_at_a_newline(tokenizer):
    init, _ = init_and_apply(LanguageModel(TINY))
    newline = tokenizer.encode("\n")[-1]
    params = init(jax.random.key(0))
    params["decoder"]["embed"] = params["decoder"]["embed"].at[newline].multiply(3.0)
    prompts = [tokenizer.prompt("27+8")] * 64
    for ends in ((newline,), ()):
        respond = make_sampler(TINY, SamplingConfig(max_new_tokens=24), tokenizer, 2, ends=ends)
        out = respond(params, prompts, jax.random.key(1))
        inside = sum(newline in row[:-1] for row in out)
        assert (inside == 0) == bool(ends)  # without: goes on
    assert sum(row[-1] == newline for row in out) < len(out)


# ---- The scripts ----

SHORT = ["--optimizer.warmup=0", "--batch_size=8", "--eval_every=0"]
SMALL = [f"--model.{name}={value}" for name, value in (("preset", "tiny"), ("vocab", 320))]


def test_what_is_written_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with pytest.raises(ZeroDivisionError), atomic_text(str(path)) as file:
        file.write(str(1 / 0))
    assert not list(path.parent.iterdir())
    with atomic_text(str(path)) as file:
        file.write("row\n")
    assert path.read_text() == "row\n" and len(list(path.parent.iterdir())) == 1
    with pytest.raises(UserError, match="exists; remove it"), atomic_text(str(path), anew=True):
        pass
    with (
        pytest.raises(UserError, match="not saved"),
        atomic_text(str(path / "below_a_file")) as file,
    ):
        pass


@pytest.mark.slow
def test_a_process_model_learns_from_rows_of_every_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [arithmetic.labelled(i) for i in range(60)] + [
        PRM800K,
        {**PRM800K, "label": {"steps": []}},
    ]
    rows += [
        {"prompt": f"{i}+1", "steps": [f"{i}+1={i + 1}"], "labels": [i / 9]} for i in range(10)
    ]
    data = write(tmp_path / "steps.jsonl", rows)
    flags = [
        *SHORT,
        *SMALL,
        f"--data={data}",
        "--steps=6",
        "--eval_every=3",
        "--save_every=3",
        "--run=prm",
    ]
    last = run(train_prm, *flags, f"--eval_data={data}", "--optimizer.lr=5e-3")
    found = rows_of("prm")
    assert found[-1]["loss"] < found[0]["loss"]
    labelled = sum(label is not None for row in rows[:60] for label in row["labels"]) + 4 + 10
    assert last["eval/steps"] == labelled and 0 < last["eval/auc"] < 1
    # With the same rows held out its batches are those of the first run.
    same = [f"--data={data}", f"--eval_data={data}"]
    again = [*SHORT, "--init=prm", *same, "--steps=3", "--run=again"]
    assert run(train_prm, *again, "--dry_run") == {} and not (tmp_path / "again").exists()
    # It goes on, head and all: the same three batches are known by now.
    run(train_prm, *again)
    of_both = [sum(row["loss"] for row in rows_of(name)[:3]) for name in ("again", "prm")]
    assert of_both[0] < of_both[1] - 0.1
    for script, flag in ((rerank, "--policy=prm"), (train_sft, "--init=prm")):
        assert "prm: a reward model (of train_prm); name" in fails(script, [flag], capsys)
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "1+1", "steps": ["2"], "labels": ["fine"]}])
    assert "bad.jsonl:1: labels[0]: must be positive" in fails(
        train_prm, [f"--data={bad}", "--run=no"], capsys
    )
    labels = ["--init=arithmetic", "--labels=completions", "--max_new_tokens=60"]
    short = ["--length=64", "--model.context=128"]
    run(train_sft, *SHORT, *SMALL, *short, "--data=arithmetic", "--steps=1", "--run=arithmetic")
    assert "sequences of 136 tokens: outside 1..128" in fails(collect_steps, labels, capsys)
    message = fails(collect_steps, ["--data=x.jsonl", "--labels=gold"], capsys)
    assert "--labels=gold: no program checks the steps of x.jsonl" in message


# ---- All of process supervision, once: a policy, labels of three kinds, a model of each ----

LABELS = ("gold", "outcome", "completions")


@pytest.fixture(scope="module")
def supervised(tmp_path_factory):
    """Make a folder with runs sft, gold, outcome, completions, and labels of the last three."""
    folder = tmp_path_factory.mktemp("supervised")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMB_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        policy = ["--data=arithmetic", "--length=128", "--steps=300", "--optimizer.lr=1e-2"]
        run(train_sft, *SHORT, *SMALL, *policy, "--run=sft")
        for labels in LABELS:
            collect = ["--init=sft", f"--labels={labels}", "--prompts=300", "--samples=2"]
            counts = run(collect_steps, *collect, f"--out={labels}.jsonl")
            assert counts["lines"] == len(rows_in(f"{labels}.jsonl")) > 100
            train = ["--init=sft", f"--data={labels}.jsonl", "--steps=4"]
            run(train_prm, *SHORT, *train, f"--run={labels}")
    return folder


@pytest.fixture
def in_study(supervised, tmp_path, monkeypatch):
    """Make `supervised` the current folder; return another one for what a test makes."""
    monkeypatch.setenv("PLUMB_CACHE", str(supervised / "cache"))
    monkeypatch.chdir(supervised)
    return tmp_path


@pytest.mark.slow
def test_labels_of_three_kinds_agree_where_they_speak_of_the_same_thing(in_study):
    files = [rows_in(f"{labels}.jsonl") for labels in LABELS]
    for gold, outcome, shares in zip(*files, strict=True):
        assert gold["steps"] == outcome["steps"] == shares["steps"]
        assert outcome["labels"][:-1] == [None] * (len(gold["steps"]) - 1)
        text = gold["prompt"][0]["content"]
        response = "\n".join(gold["steps"])
        solved = float(arithmetic.solved(text, response))
        assert outcome["labels"][-1] == shares["labels"][-1] == solved
        assert all(0 <= label <= 1 and (8 * label).is_integer() for label in shares["labels"])


@pytest.mark.slow
def test_every_way_to_choose_is_in_the_table(in_study):
    options = ["--policy=sft", "--models", "outcome", "gold", "--prompts=40", "--n=4"]
    table = run(rerank, *options, f"--out={in_study}/table.json")
    ways = {f"{model} {way}" for model in ("outcome", "gold") for way in STEP_SCORES}
    blind = {"one drawn at random", "a score that knows nothing"}
    assert set(table) == ways | blind | {"majority", "one of them is right"}
    # One answer leaves no choice.
    assert len({row[1].value for row in table.values()}) == 1
    written = rows_in(in_study / "table.json")[0]
    assert len(written["hits"]["majority"]) == 40
    value, (low, high) = written["accuracy"]["majority"]["4"]
    assert table["majority"][4] == (value, low, high)


@pytest.mark.slow
def test_what_a_search_finds_is_right_and_can_be_imitated(in_study):
    """This policy's samples are right one time in twenty; a hit without an end is no solution."""
    search = ["--policy=sft", "--model=gold", "--beams=1", "--prompts=300", "--split=train"]
    files = [f"--out={in_study}/beam.json", f"--solutions={in_study}/found.jsonl"]
    accuracy, tokens = run(step_beam, *search, *files)
    assert 0 <= accuracy.value <= 1 and tokens > 0
    found = rows_in(in_study / "found.jsonl")
    hits = rows_in(in_study / "beam.json")[0]["hits"]
    assert 0 < len(found) <= sum(hits) <= 300
    for row in found:
        problem, solution = (message["content"] for message in row["messages"])
        assert arithmetic.solved(problem, solution)
    imitate = ["--init=sft", f"--data={in_study}/found.jsonl", "--steps=1"]
    run(train_sft, *SHORT, *imitate, f"--run={in_study}/imitated")


@pytest.mark.slow
def test_ppo_is_rewarded_step_by_step(in_study):
    ppo = ["--init=sft", "--reward=gold", "--step_rewards=product", "--data=arithmetic"]
    sizes = ["--max_prompt=16", "--max_new_tokens=48", "--batch_size=16", "--minibatches=2"]
    short = ["--steps=2", "--optimizer.warmup=0"]
    run(train_ppo, *ppo, *sizes, *short, f"--run={in_study}/ppo")
    assert all(0 <= row["score"] <= 1 for row in rows_of(in_study / "ppo"))
