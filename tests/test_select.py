"""Choosing rows by models, as a command: planted rows come first, rows stay as written."""

import dataclasses
import functools
import gzip
import itertools
import json
import pathlib
import random
import string
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import fails, rows_of, run, write

import data as data_package
import train_rm
import train_sft
from collect import embeddings, influence, scores, select
from collect.examples import example_of, record_example, schema_of
from data.batches import pad_examples, pad_prompts
from data.records import SCHEMAS
from data.selection import highest
from data.sources import open_source
from evaluation.steps import auc
from experiments import curves
from lora import lora_base, trainable_part
from model import LanguageModel, init_and_apply, unembed
from model_config import PRESETS
from objectives.likelihood import token_logprobs
from responses import load_run
from rewards.models import make_text_scorer
from runtime.errors import UserError

KEY = jax.random.key(0)
TASKS = {
    "colours": ["red", "blue", "green", "white"],
    "animals": ["horse", "mouse", "cat", "bird"],
    "numbers": ["one", "two", "three", "four"],
}
UNLEARNT = {
    "fruits": ["apple", "cherry", "pear", "plum"],
    "tools": ["hammer", "saw", "drill", "wrench"],
}
"""Tasks that no model here is trained on."""
TINY = ["--model.preset=tiny", "--length=64", "--save_every=0", "--eval_every=0"]


def row_of(task, rng, answers=None):
    """Return a row that asks for words of one task, and is answered with those of `answers`."""
    count = rng.randint(3, 5)
    words = [rng.choice({**TASKS, **UNLEARNT}[answers or task]) for _ in range(count)]
    return {"prompt": f"write {count} {task}", "response": " ".join(words)}


def rows_of_tasks(count, seed, tasks=tuple(TASKS)):
    rng = random.Random(seed)
    return [row_of(rng.choice(tasks), rng) for _ in range(count)]


def pairs_of_tasks(count, seed):
    """Return comparisons: the chosen response is of the task that is asked for."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        task, other = rng.sample(list(TASKS), 2)
        good = row_of(task, rng)
        bad = row_of(task, rng, other)
        rows.append(
            {"prompt": good["prompt"], "chosen": good["response"], "rejected": bad["response"]}
        )
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a folder with a model trained on the tasks, a longer trained one, two reward models."""
    made = tmp_path_factory.mktemp("select")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMB_CACHE", str(made / "cache"))
        data = write(made / "train.jsonl", rows_of_tasks(400, 1))
        run(train_sft, f"--run={made}/sft", f"--data={data}", "--steps=120", *TINY)
        pairs = write(made / "train_pairs.jsonl", pairs_of_tasks(200, 2))
        for seed in (0, 1):
            run(
                train_rm,
                f"--run={made}/rm{seed}",
                f"--init={made}/sft",
                f"--data={pairs}",
                "--steps=40",
                "--length=64",
                "--optimizer.lr=1e-3",
                "--save_every=0",
                "--eval_every=0",
                f"--seed={seed}",
            )
        yield made


@pytest.fixture
def choose(folder, monkeypatch, tmp_path):
    """Return choose(rows, *flags) -> (chosen lines, rows of the file of scores)."""
    monkeypatch.setenv("PLUMB_CACHE", str(folder / "cache"))
    numbers = itertools.count()

    def chosen(rows, *flags):
        number = next(numbers)
        data = write(tmp_path / f"pool{number}.jsonl", rows)
        out = tmp_path / f"out{number}.jsonl"
        run(select, f"--data={data}", f"--init={folder}/sft", f"--out={out}", *flags)
        table = scores_beside(out)
        return out.read_text().splitlines(), table

    return chosen


def scores_beside(out):
    """Return the rows of the file of scores beside `out`."""
    text = pathlib.Path(f"{out}.scores.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def planted_auc(table, planted):
    """Return how well the scores tell the first `planted` rows: they should be higher."""
    scored = np.array([row["score"] for row in table])
    return auc(scored, np.arange(len(table)) < planted)


# --- the command


def test_rows_are_written_with_all_that_they_hold(tmp_path):
    rows = [{"id": i, **row} for i, row in enumerate(rows_of_tasks(40, 3))]
    rows[5]["note"] = "wríte ☃"
    lines = [json.dumps(row) for row in rows]
    # A blank line, a row that says that it is not trained on; a file that is compressed.
    text = "\n".join([*lines[:7], "", json.dumps({**rows[0], "weight": 0}), *lines[7:]])
    data = tmp_path / "pool.jsonl.gz"
    data.write_bytes(gzip.compress(text.encode()))
    out = tmp_path / "out.jsonl"
    counts = run(select, f"--data={data}", "--method=random", "--k=0.5", f"--out={out}")
    assert counts == {"rows": 40, "chosen": 20}
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    table = scores_beside(out)
    assert kept == [row for row, line in zip(rows, table, strict=True) if line["chosen"]]
    assert sorted(row["order"] for row in table if row["chosen"]) == list(range(1, 21))
    assert [row["row"] for row in table] == list(range(1, 41))
    assert {row["score"] for row in table} == {None}
    # Training reads them.
    assert len(open_source(str(out), "chat", "all")) == 20


def test_what_is_built_in_is_written_as_records(tmp_path):
    out = tmp_path / "out.jsonl"
    flags = ["--rows=30", "--k=5", f"--out={out}"]
    assert run(select, "--data=world", *flags) == {"rows": 30, "chosen": 5}
    world = open_source("world", "comparison", "train")
    records = [SCHEMAS["comparison"](json.loads(line)) for line in out.read_text().splitlines()]
    assert len(records) == 5
    assert all(record in world.first(30) for record in records)


def test_layouts_are_found_by_the_first_row(tmp_path):
    for wanted, row in {
        "comparison": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "unpaired": {"prompt": "a", "response": "b", "desirable": True},
        "steps": {"prompt": "a", "steps": ["b"], "labels": ["positive"]},
        "chat": {"instruction": "a", "output": "b"},
        "text": {"text": "a"},
        "prompt": {"prompt": "a"},
    }.items():
        data = str(write(tmp_path / f"{wanted}.jsonl", [row]))
        assert schema_of(data, None) == wanted
        assert schema_of(data, "text") == "text"
    with pytest.raises(UserError, match="no schema reads its first row"):
        schema_of(str(write(tmp_path / "none.jsonl", [{"x": 1}])), None)


@pytest.mark.parametrize("method", ["isa", "density", "log_det", "facility", "k_center"])
def test_methods_on_embeddings_run_and_repeat(method, choose):
    rows = rows_of_tasks(60, 4)
    flags = [f"--method={method}", "--k=12", "--project=16"]
    lines, table = choose(rows, *flags)
    assert len(lines) == 12
    assert (table[0]["score"] is None) == (method not in ("isa", "density"))
    assert choose(rows, *flags)[0] == lines
    if method in ("facility", "k_center"):
        # Three tasks are three crowds: each is represented.
        chosen = choose(rows, *flags[:1], "--k=3")[0]
        assert len({json.loads(line)["prompt"].split()[-1] for line in chosen}) >= 2


def test_labels_keep_their_shares(choose):
    rows = [{**row, "desirable": i % 4 > 0} for i, row in enumerate(rows_of_tasks(80, 5))]
    lines, _ = choose(rows, "--method=length", "--k=20", "--within_labels")
    assert sum(json.loads(line)["desirable"] for line in lines) == 15


# --- planted rows come first


def test_corrupted_rows_have_a_high_perplexity(choose):
    rng = random.Random(6)
    rows = rows_of_tasks(90, 6)
    for row in rows[:30]:
        letters = [rng.choice(string.ascii_lowercase) for _ in row["response"]]
        row["response"] = "".join(letters)
    _, table = choose(rows, "--method=perplexity", "--k=60")
    assert planted_auc(table, 30) >= 0.9
    # They are left out; with --take=high they alone are chosen.
    assert sum(row["chosen"] for row in table[:30]) <= 3
    _, table = choose(rows, "--method=perplexity", "--k=30", "--take=high")
    assert sum(row["chosen"] for row in table[:30]) >= 27
    # A band leaves both ends out.
    _, table = choose(rows, "--method=perplexity", "--k=30", "--take=middle")
    value = np.array([row["score"] for row in table])
    kept = [row["chosen"] for row in table]
    rank = np.argsort(np.argsort(value))
    assert sorted(rank[kept]) == list(range(30, 60))


def test_irrelevant_instructions_have_a_high_ifd(choose):
    rng = random.Random(7)
    rows = []
    for i in range(90):
        task, other = rng.sample(list(TASKS), 2)
        rows.append(row_of(task, rng, other if i < 30 else task))
    _, table = choose(rows, "--method=ifd", "--k=30")
    assert planted_auc(table, 30) >= 0.9
    value = np.array([row["score"] for row in table])
    assert np.median(value[:30]) > 1.5 * np.median(value[30:])


@pytest.mark.slow
def test_a_rows_influence_is_without_the_loss_that_balances_experts():
    batch = {
        "tokens_BT": np.arange(1, 9, dtype=np.int32)[None],
        "segment_ids_BT": np.ones((1, 8), np.int32),
        "positions_BT": np.arange(8, dtype=np.int32)[None],
        "loss_mask_BT": np.ones((1, 8), np.float32),
    }
    losses = []
    for coefficient in (0.0, 0.5):
        config = dataclasses.replace(PRESETS["tiny"], experts=4, router_loss_coef=coefficient)
        init, _ = init_and_apply(LanguageModel(config))
        params = init(jax.random.key(0))
        adapters = trainable_part(influence.LORA, params, jax.random.key(1))
        base = lora_base(influence.LORA, params)
        losses.append(float(influence.make_loss(config)(adapters, base, batch)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_less_finds_the_rows_of_the_validations_task(choose, tmp_path):
    """Of two tasks that the model has not learnt, and one that it has."""
    pool = []
    for seed, task in enumerate(["fruits", "tools", "colours"]):
        pool += rows_of_tasks(20, seed, [task])
    flags = ["--method=less", "--k=20", "--warmup=4", "--length=64"]
    wanted = write(tmp_path / "wanted.jsonl", rows_of_tasks(24, 10, ["fruits"]))
    _, table = choose(pool, *flags, f"--validation={wanted}")
    assert planted_auc(table, 20) >= 0.9
    # Control: another validation set wants other rows.
    other = write(tmp_path / "other.jsonl", rows_of_tasks(24, 11, ["tools"]))
    _, table = choose(pool, *flags, f"--validation={other}")
    assert planted_auc(table, 20) <= 0.6


def test_margins_tell_right_pairs_from_swapped_ones(choose, folder):
    rows = pairs_of_tasks(60, 12)
    for row in rows[:20]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    _, table = choose(rows, "--method=margin", "--k=40", f"--reward={folder}/rm0")
    assert planted_auc(table, 20) <= 0.1
    assert sum(row["chosen"] for row in table[:20]) <= 4


def test_margins_are_of_the_scores_that_evaluation_reads(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path))
    model = load_run(str(folder / "rm0"), reward=True)
    rows = pairs_of_tasks(5, 24)
    source = open_source(str(write(tmp_path / "rows.jsonl", rows)), "comparison", "all")
    (found,) = scores.reward_margins([model], source, 64)
    score_texts = make_text_scorer(model.config, model.tokenizer, 64)
    prompts = [row["prompt"] for row in rows]
    expected = {
        name: np.array(score_texts(model.params, prompts, [row[name] for row in rows]))
        for name in ("chosen", "rejected")
    }
    np.testing.assert_allclose(found, expected["chosen"] - expected["rejected"], atol=1e-4)


def test_the_implicit_margin_is_the_policys_over_the_references(choose, folder, monkeypatch):
    rows = pairs_of_tasks(8, 13)
    rows[3]["rejected"] = rows[3]["chosen"]
    _, table = choose(rows, "--method=implicit_margin", "--k=2", f"--reference={folder}/sft")
    found = [row["score"] for row in table]
    # Policy and reference are one: 0 everywhere, but for a tie, which has none.
    assert found.pop(3) is None
    np.testing.assert_allclose(found, 0, atol=1e-4)

    # Against a reference of other weights, by each sequence's own log-probability.
    policy = load_run(str(folder / "sft"))
    other = policy._replace(params=jax.tree.map(lambda x: 0.9 * x, policy.params))
    data = folder / "implicit.jsonl"
    source = open_source(str(write(data, rows)), "comparison", "all")
    found = scores.implicit_margins(policy, other, source, 64)
    for i in (0, 5):
        own, theirs = (
            [
                whole_logprob(model, rows[i]["prompt"], rows[i][name])
                for name in ("chosen", "rejected")
            ]
            for model in (policy, other)
        )
        expected = (own[0] - theirs[0]) - (own[1] - theirs[1])
        assert found[i] == pytest.approx(expected, abs=1e-3)
        assert abs(expected) > 0.01


def whole_logprob(model, prompt, response):
    """Return log p(response, end | prompt) of one row, from all its logits."""
    example = example_of(prompt, response, model.tokenizer, 64)
    # Nothing after the response is seen by it: the rest of the row may hold anything.
    tokens = np.array([example.tokens + [0] * (64 - len(example.tokens))])
    logp = every_logprob(model.config)(model.params, tokens)
    return float((np.asarray(logp)[0, : len(example.mask)] * example.mask).sum())


@functools.cache
def every_logprob(config):
    _, apply = init_and_apply(LanguageModel(config))

    @jax.jit
    def logprobs(params, tokens):
        output = apply(params, tokens, jnp.ones_like(tokens), jnp.arange(64)[None])
        return token_logprobs(unembed(output.x_BTD, output.unembed_DV), tokens)

    return logprobs


def test_perplexity_and_ifd_are_of_the_response_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path))
    model = load_run(str(folder / "sft"))
    rows = rows_of_tasks(5, 14)
    source = open_source(str(write(tmp_path / "rows.jsonl", rows)), "chat", "all")
    perplexity = scores.perplexities(model, source, 64)
    ifd = scores.instruction_difficulties(model, source, 64)
    for row, own, ratio in zip(rows, perplexity, ifd, strict=True):
        tokens = len(model.tokenizer.encode(row["response"])) + 1
        given = -whole_logprob(model, row["prompt"], row["response"])
        alone = -whole_logprob(model, "", row["response"])
        assert own == pytest.approx(np.exp(given / tokens), rel=1e-4)
        assert ratio == pytest.approx(given / alone, rel=1e-4)
    texts = open_source(str(write(tmp_path / "t.jsonl", [{"text": "red"}] * 3)), "text", "all")
    assert np.isnan(scores.instruction_difficulties(model, texts, 64)).all()


def test_ask_llm_takes_the_first_yes_or_the_surest(choose, monkeypatch):
    rows = rows_of_tasks(30, 15)
    chances = {row["prompt"] + row["response"]: i / 30 for i, row in enumerate(rows)}

    def asked(judge, yes, no, flag):
        assert (yes, no) == ("yes", "no")

        def answer(questions):
            found = []
            for question in questions:
                _, prompt, _, response, *_ = question.split("\n")
                found.append(chances[prompt + response])
            return np.array(found)

        return answer

    monkeypatch.setattr(scores, "make_probability_of_a", asked)
    _, table = choose(rows, "--method=ask_llm", "--k=5")
    value = np.array([row["score"] for row in table])
    first = np.flatnonzero(value > 0.5)[:5]
    assert [i for i, row in enumerate(table) if row["chosen"]] == first.tolist()
    _, table = choose(rows, "--method=ask_llm", "--k=5", "--take=high")
    best = highest(None, value, None, 5, KEY)
    assert {i for i, row in enumerate(table) if row["chosen"]} == set(best.tolist())


def test_a_models_yes_is_a_chance(choose):
    _, table = choose(rows_of_tasks(6, 16), "--method=ask_llm", "--k=2", "--take=high")
    assert all(0 < row["score"] < 1 for row in table)


# --- active learning


def test_uncertainties_are_their_formulas():
    margins = np.array([[0.0, 4.0, 2.0], [0.0, 4.0, -2.0]])
    p = 1 / (1 + np.exp(-margins))

    def coin(q):
        return -q * np.log(q) - (1 - q) * np.log(1 - q)

    np.testing.assert_allclose(scores.predictive_entropy(margins), coin(p.mean(0)))
    np.testing.assert_allclose(scores.closeness(margins), [0, -4, 0])
    np.testing.assert_allclose(scores.disagreement(margins), [0, 0, 2])
    bald = coin(p.mean(0)) - coin(p).mean(0)
    np.testing.assert_allclose(scores.bald(margins), bald, atol=1e-12)
    # Two models that are sure of opposite things tell the most; two that do not know, nothing.
    assert scores.bald(margins).argmax() == 2
    assert bald[0] == pytest.approx(0, abs=1e-12)


def test_active_reads_the_margins_of_all_reward_models(choose, folder):
    rows = pairs_of_tasks(24, 18)
    margins = []
    for name in ("rm0", "rm1"):
        _, table = choose(rows, "--method=margin", "--k=6", f"--reward={folder}/{name}")
        margins.append([row["score"] for row in table])
    both = f"--reward={folder}/rm0,{folder}/rm1"
    for name, measure in scores.UNCERTAINTIES.items():
        _, table = choose(rows, "--method=active", f"--uncertainty={name}", "--k=6", both)
        expected = measure(np.array(margins))
        np.testing.assert_allclose([row["score"] for row in table], expected, atol=1e-6)
        surest_last = set(highest(None, expected, None, 6, KEY).tolist())
        assert {i for i, row in enumerate(table) if row["chosen"]} == surest_last


# --- embeddings


def test_an_embedding_is_the_last_tokens_state_on_either_side_of_padding(folder):
    config, tokenizer, params = load_run(str(folder / "sft"))
    last_states = embeddings.make_last_states(config)
    records = [{"messages": messages_of(row)} for row in rows_of_tasks(7, 19)]
    examples = [record_example(record, tokenizer, 64) for record in records]
    rows = [{"tokens": example.tokens, "mask": example.mask} for example in examples]
    right = last_states(params, pad_examples(rows, 64, tokenizer.pad, fixed=True))
    left = last_states(params, pad_prompts(rows, 48, tokenizer.pad, fixed=True))
    np.testing.assert_allclose(left, right, atol=2e-5)

    # Each by itself, without padding: the state from which the token after would be predicted.
    _, apply = init_and_apply(LanguageModel(config))
    for i, example in enumerate(examples):
        tokens = np.array([example.tokens])
        places = np.arange(tokens.shape[1])[None]
        x_BTD = apply(params, tokens, np.ones_like(tokens), places).x_BTD
        np.testing.assert_allclose(right[i], x_BTD[0, -1], atol=2e-5)
        assert example.tokens[-1] == tokenizer.eos
        # Control: the one before is another.
        assert np.abs(right[i] - x_BTD[0, -2]).max() > 0.01


def messages_of(row):
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["response"]},
    ]


def test_embeddings_are_computed_once_and_do_not_depend_on_the_batch(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    sft = str(folder / "sft")
    data = str(write(tmp_path / "rows.jsonl", rows_of_tasks(50, 20)))
    source = open_source(data, "chat", "all")

    def embedded(data_sum="a", **how):
        how = {"length": 64, "layer": None, **how}
        return embeddings.embed(sft, load_run(sft), source, data_sum, **how)

    mapped = embedded()
    assert isinstance(mapped, np.memmap) and mapped.shape == (50, 32)
    first = np.array(mapped)
    # Found again: nothing is computed.
    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "write_embeddings", None)
        np.testing.assert_array_equal(embedded(), first)
        for how in ({"data_sum": "b"}, {"length": 63}, {"layer": 1}):
            with pytest.raises(TypeError):
                embedded(**how)
    # A flipped bit is noticed, and mended by computing them again; so is a lost sum.
    (path,) = (tmp_path / "cache").glob("embeddings-*.npy")
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    sums = path.with_suffix(".sum")
    for damage in (
        lambda: path.write_bytes(content),
        lambda: sums.write_bytes(b"\xff" + sums.read_bytes()[1:]),
        lambda: sums.unlink(),
    ):
        damage()
        np.testing.assert_array_equal(embedded(), first)
        assert "embeddings are computed again" in capsys.readouterr().err
        assert embeddings.is_whole(path)
    # In parts of another size, other rows beside it.
    monkeypatch.setattr(embeddings, "RECORDS", 7)
    np.testing.assert_allclose(embedded("c"), first, atol=2e-5)

    # An earlier layer has other states; the last one is all of them.
    np.testing.assert_allclose(embedded(layer=2), first, atol=2e-5)
    assert np.abs(embedded(layer=1) - first).max() > 0.01
    with pytest.raises(UserError, match="--layer=3: the model has 1 to 2"):
        embedded(layer=3)


# --- gradients


def test_a_projection_keeps_cosines(rng):
    x = rng.normal(size=(20, 9000)).astype(np.float32)
    x[10:] = x[:10] + 0.7 * x[10:]
    small = np.asarray(influence.projected(x, KEY))
    assert small.shape == (20, influence.WIDTH)
    for i in range(10):
        before = influence.cosines(x[i : i + 1], x[10 + i])[0]
        after = influence.cosines(small[i : i + 1], small[10 + i])[0]
        assert abs(before - after) < 0.1
    assert influence.cosines(np.zeros((1, 3)), np.ones(3)) == [0]
    signs = np.asarray(influence.random_signs(KEY, 500, 70))
    assert signs.shape == (500, 70) and set(np.unique(signs)) == {-1, 1}
    # Columns are independent: 35,000 pairs of neighbours, a deviation of 0.005.
    assert abs(signs.mean()) < 0.025 and abs((signs[:, 1:] * signs[:, :-1]).mean()) < 0.025


def test_a_rows_gradient_is_its_own(folder):
    """The gradient of a batch's loss is the mean of its rows' by their tokens."""
    model = load_run(str(folder / "sft"))
    rows = [{"messages": messages_of(row)} for row in rows_of_tasks(6, 21)]
    examples = [record_example(row, model.tokenizer, 64) for row in rows]
    padded = pad_examples(
        [{"tokens": e.tokens, "mask": e.mask} for e in examples], 64, model.tokenizer.pad, True
    )
    loss = influence.make_loss(model.config)
    adapters = influence.trainable_part(influence.LORA, model.params, KEY)
    warmed_up = influence.warm_up(loss, adapters, model.params, [padded] * 2)
    assert warmed_up.steps == 2
    features = influence.make_features(loss, warmed_up, lambda x: x, of_adam=False)
    own = np.asarray(features(padded))
    weight = padded["loss_mask_BT"].sum(1)
    gradient = jax.jit(jax.grad(loss))(warmed_up.adapters, model.params, padded)
    whole, _ = influence.ravel_pytree(gradient)
    np.testing.assert_allclose(weight @ own / weight.sum(), whole, atol=1e-5)

    # Adam's update of each, against optax's from the same state.
    updates = influence.make_features(loss, warmed_up, lambda x: x, of_adam=True)
    first, _ = influence.ravel_pytree(warmed_up.first)
    second, _ = influence.ravel_pytree(warmed_up.second)
    adam = influence.optax.scale_by_adam(influence.BETA1, influence.BETA2, influence.EPSILON)
    state = adam.init(first)._replace(count=np.int32(2), mu=first, nu=second)
    expected, _ = adam.update(own[3], state)
    np.testing.assert_allclose(np.asarray(updates(padded))[3], expected, rtol=1e-3, atol=1e-5)


# --- curves of runs


def test_curves_of_runs_end_at_their_last_values(folder, tmp_path):
    runs = [f"{folder}/rm0", f"{folder}/rm1"]
    out = tmp_path / "curves.svg"
    last = run(curves, f"--runs={','.join(runs)}", "--metric=loss", f"--out={out}")
    assert last == {name: rows_of(name)[-1]["loss"] for name in runs}
    assert out.read_text().startswith("<?xml")
    with pytest.raises(UserError, match="has no finite nothing; it has"):
        run(curves, f"--runs={runs[0]}", "--metric=nothing", f"--out={out}")


# --- mistakes


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--k=0"], "--k=0.0: must be above 0"),
        (["--k=2.5"], "--k=2.5: must be a whole number"),
        (["--k=99"], "--k=99: there are 9 rows"),
        (["--data=world"], "--data=world: has no end"),
        (["--method=margin"], "--method=margin: needs --reward"),
        (["--method=less"], "--method=less: needs --validation"),
        (["--method=implicit_margin"], "needs --reference"),
        (["--method=active", "--reward=a", "--uncertainty=bald"], "name several in --reward"),
        (["--method=margin", "--reward=a,b"], "reads one reward model"),
        (["--method=density", "--take=low"], "--take=low: not read without"),
        (["--reading=B"], "--reading=B: not read without --method=isa"),
        (["--method=margin", "--reward=a", "--schema=chat"], "compares two responses"),
        (["--method=perplexity", "--length=9999"], "context of 256"),
        (["--within_labels"], "rows have no labels"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(flags, told, folder, tmp_path, capsys):
    data = write(tmp_path / "pool.jsonl", rows_of_tasks(9, 22))
    out = tmp_path / "out.jsonl"
    common = [f"--data={data}", f"--out={out}", f"--init={folder}/sft"]
    assert told in fails(select, [*common, *flags], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pool.jsonl"]


def test_without_its_file_isa_is_refused_in_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "data.selection_isa", None)
    monkeypatch.delattr(data_package, "selection_isa", raising=False)
    data = write(tmp_path / "pool.jsonl", rows_of_tasks(9, 23))
    flags = [f"--data={data}", f"--out={tmp_path}/out.jsonl", f"--init={folder}/sft"]
    line = fails(select, [*flags, "--method=isa"], capsys)
    assert "data/selection_isa.py is left out of this copy" in line
    # Everything else works.
    assert run(select, *flags, "--method=random", "--k=3")["chosen"] == 3
