"""Mixtures: their words, their shares, their order, and what resumes or runs on several hosts."""

import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from running import fails, rows_of, run, write

import train_distill
import train_dpo
import train_ppo
import train_rm
import train_sft
from data import batches as batches_module
from data import mixture as mixture_module
from data.batches import chat_batches, encode_comparison, prompt_batches, text_batches
from data.lengths import tokens_of, trained_tokens_of
from data.mixture import BLOCK, Mixture, counts, first_conversations, mixed, place_of, placed
from data.source import ENDLESS, Source
from data.sources import evaluated_split, open_source
from data.tokenizer import Tokenizer
from planning.dry_run import lengths_of
from runtime.errors import UserError
from runtime.mixtures import is_mixture, names_in, read_mixture
from train_state import load_params

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "data.md"


def source_of(name, rows):
    """Make a source whose records say where they are from."""
    return Source(name, range(rows), lambda i: {"text": f"{name} {i}", "from": (name, i)})


def mixture_of(words, **rows):
    """Mix sources of so many rows, by the words of --data."""
    return mixed(words, read_mixture(words), [source_of(*item) for item in rows.items()], [*rows])


def drawn(mixture, number, *, seed=0, stage=0):
    """Return (source, row) of the first draws of a stage."""
    order = mixture.order(seed, stage)
    return [mixture[order[i]]["from"] for i in range(number)]


def shares_of(mixture, stage=0):
    return np.array(mixture.shares_SP[stage]) / sum(mixture.shares_SP[stage])


# --- words


@pytest.mark.parametrize(
    "data",
    [
        "world",
        "chats.jsonl",
        "part-*.parquet",
        "my chats.jsonl",
        "C:/data/chats.jsonl",
        "tfds:gsm8k/main:1.0.0",
        "hf:owner/name:2",
        "hf:owner/name:main@train",
        "hf:owner/name:2@rest",
        "tasks.answers:number",
        "a.jsonl b.jsonl",
    ],
)
def test_other_names_are_no_mixtures(data):
    assert not is_mixture(data) and names_in(data) == []
    assert is_mixture(f"{data}:1 b.jsonl:2")  # control


def test_what_exists_is_no_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "notes 12:30 a.jsonl"
    assert is_mixture(name)
    write(tmp_path / name, [{"text": "a"}])
    assert not is_mixture(name)
    assert len(open_source(name, "text", "all")) == 1
    # One word with an option, too.
    assert is_mixture("a.jsonl:1@rows")
    write(tmp_path / "a.jsonl:1@rows", [{"text": "a"}])
    assert not is_mixture("a.jsonl:1@rows")


def test_words_are_read():
    first, second = read_mixture(
        "hf:o/n:2@train:.5 tfds:x/y:3 unit=tokens tokens=2e3 -> "
        "a=b.jsonl:2@cap=50@in_order c.jsonl:1@rows@text temperature=2"
    )
    assert [share.data for share in first.shares] == ["hf:o/n:2@train", "tfds:x/y"]
    assert [share.weight for share in first.shares] == [0.5, 3]
    assert first.by_tokens and first.tokens == 2000 and first.temperature == 1
    assert [share.label for share in second.shares] == ["a=b.jsonl@in_order", "c.jsonl@text"]
    assert [share.by_rows for share in second.shares] == [True, True]
    assert [share.cap for share in second.shares] == [50, None]
    assert second.temperature == 2 and second.tokens is None
    assert read_mixture("world steps=9 -> a.jsonl")[0].shares[0].weight == 1
    assert is_mixture("a.jsonl:1@in_order") and names_in("a:1 b:2 -> b:3 tokens=1") == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("a.jsonl:2 b.jsonl", "b.jsonl: has no weight, which is a number above 0"),
        ("a.jsonl:2 b.jsonl:-1", "b.jsonl:-1: has no weight, which is a number above 0"),
        ("my a.jsonl:2 b.jsonl:1", "my: has no weight, which is a number above 0, such as a.js"),
        (
            "a.jsonl:2 b.jsonl:1 temprature=2.5",
            "neither a setting, which are unit=, temperature=, tokens=, steps=, nor a source",
        ),
        ("world tokns=5 -> a.jsonl", "tokns=5: neither a setting"),
        ("a.jsonl:1e999 b.jsonl:1", "must be above 0 and below 1e+15"),
        ("a.jsonl:1e-999 b.jsonl:1", "must be above 0 and below 1e+15"),
        ("a.jsonl:1@cap=5@cap=7 b.jsonl:1@rows", "@cap stands there twice"),
        ("a.jsonl:2 b.jsonl:0", "must be above 0"),
        (f"a.jsonl:1@cap={'9' * 5000} b.jsonl:1@rows", "is no option; give @rows, @cap=ROWS"),
        ("a.jsonl:2 b.jsonl:1@cup=3", "@cup=3 is no option; give @rows, @cap=ROWS"),
        ("a.jsonl:2 a.jsonl:1", "stands twice"),
        ("a.jsonl:2 b.jsonl:1@rows", "all count rows or none does"),
        ("a.jsonl:2 b.jsonl:1 unit=words", "must be unit=examples or unit=tokens"),
        ("a.jsonl:2 b.jsonl:1 temperature=0", "must be a number above 0"),
        ("a.jsonl:2 b.jsonl:1 temperature=nan", "must be a number above 0"),
        ("a.jsonl:2 b.jsonl:1 tokens=5", "the last stage goes on to the end of the run"),
        ("a.jsonl -> b.jsonl", "stage 1 has no end; add tokens=N or steps=N"),
        ("a.jsonl steps=1.5 -> b.jsonl", "must be a whole number above 0"),
        ("a.jsonl steps=1 tokens=2 -> b.jsonl", "not by both"),
        ("a.jsonl steps=1 steps=2 -> b.jsonl", "stands twice"),
        ("a.jsonl steps=1 -> ", "names no source"),
    ],
)
def test_mistakes_in_the_words_are_one_line(data, told):
    with pytest.raises(UserError, match=re.escape(told)):
        open_source(data, "text", "train")


# --- shares


def test_shares_of_100000_draws_are_the_weights():
    mixture = mixture_of("a:2 b:1 world:0.5 c:0.01", a=5000, b=300, world=ENDLESS, c=7)
    draws = 100_000
    order = mixture.order(0)
    labels = np.array([mixture.label_of(order[i]) for i in range(draws)])
    for label, weight in (("a", 2), ("b", 1), ("world", 0.5), ("c", 0.01)):
        share = weight / 3.51
        sigma = np.sqrt(draws * share * (1 - share))
        assert abs((labels == label).sum() - draws * share) < 4 * sigma
        # Closer than chance: every block has its share.
        assert abs((labels[: 3 * BLOCK] == label).sum() - 3 * BLOCK * share) <= 4
    # The same again, and another order by another seed.
    assert drawn(mixture, 3000) == drawn(mixture, 3000) != drawn(mixture, 3000, seed=1)


def test_a_source_goes_through_its_rows_before_it_repeats_one():
    mixture = mixture_of("a:3 b:1", a=1000, b=90)
    rows = {"a": [], "b": []}
    for name, row in drawn(mixture, 5000):
        rows[name].append(row)
    for name, size in (("a", 1000), ("b", 90)):
        passes = [rows[name][i : i + size] for i in range(0, len(rows[name]) - size, size)]
        assert len(passes) >= 3 and all(sorted(one) == [*range(size)] for one in passes)
        # Shuffled, each pass in another way.
        assert passes[0] != passes[1] != sorted(passes[1])
    # Passes of the source that is seen most often.
    assert mixture.passes(4000) == pytest.approx(1000 / 90)


def test_draws_of_different_sources_are_mixed():
    names = [name for name, _ in drawn(mixture_of("a:1 b:1", a=9000, b=9000), 4096)]
    changes = sum(one != other for one, other in itertools.pairwise(names))
    assert 0.4 < changes / 4096 < 0.6  # in runs 0, in turns 1


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ("a:1@rows b:1@rows", [5000, 300]),
        ("a:1@cap=1000 b:1@cap=1000", [1000, 300]),
        ("a:1@cap=1000000 b:1@rows", [5000, 300]),  # an infinite cap
        ("a:1@cap=1000 b:3@cap=1000", [1000, 900]),  # the weight after the cap
        ("a:4 b:1 temperature=2", [2, 1]),
        ("a:1@rows b:1@rows temperature=1e9", [1, 1]),
        ("a:9e14@rows b:9e14@rows", [5000, 300]),
        ("a:1 b:1 temperature=1e-5", [1, 1]),
        ("a:3 b:1 temperature=1e-3", [1, 0]),
    ],
)
def test_shares_by_rows_caps_and_temperature(words, weights):
    shares = shares_of(mixture_of(words, a=5000, b=300))
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), atol=1e-8)
    assert (shares > 0).all()


def test_rows_of_what_has_no_end_do_not_count():
    with pytest.raises(UserError, match="world: has no end"):
        mixture_of("a:1@rows world:1@rows", a=10, world=ENDLESS)
    shares = shares_of(mixture_of("a:1@rows world:1@cap=30", a=10, world=ENDLESS))
    np.testing.assert_allclose(shares, [0.25, 0.75], atol=1e-8)


@pytest.mark.parametrize("shares", [(1,), (2, 1), (1, 1, 1), (7, 0, 3), (1, 1000, 10)])
def test_counts_never_fall_and_add_up(shares):
    found = np.array([counts(n, shares) for n in range(3000)])
    steps = np.diff(found, axis=0)
    assert (steps >= 0).all() and (steps.sum(1) == 1).all()
    want = np.arange(3000)[:, None] * np.array(shares) / sum(shares)
    assert np.abs(found - want).max() < len(shares)


# --- all records, each once


def test_records_lie_evenly_and_each_once():
    mixture = mixture_of("a:2 b:1 c:1", a=700, b=90, c=400)
    assert len(mixture) == 1190
    seen = [mixture[i]["from"] for i in range(len(mixture))]
    assert len(set(seen)) == 1190
    for name in "abc":
        own = [row for other, row in seen if other == name]
        assert own == sorted(own)
    # In shares at first; what has not ended goes on alone.
    first = [name for name, _ in seen[:200]]
    assert [first.count(name) for name in "abc"] == [100, 50, 50]
    assert {name for name, _ in seen[:300]} == {*"abc"} and {name for name, _ in seen[400:]} == {
        *"ac"
    }


def test_places_are_inverse_also_without_an_end():
    shares, sizes = (5, 1, 3), (40, ENDLESS, 7)
    places = {}
    for part, size in enumerate(sizes):
        rows = np.arange(min(size, 300))
        found = place_of(part, rows, shares, sizes)
        assert found.tolist() == [place_of(part, row, shares, sizes) for row in rows.tolist()]
        places |= {place: (part, row) for row, place in enumerate(found.tolist())}
    assert sorted(places)[:340] == [*range(340)]
    for place, expected in sorted(places.items())[:340]:
        assert placed(place, shares, sizes) == expected
    last = sum(sizes) - 1
    assert placed(last, shares, sizes) == (1, ENDLESS - 1)
    with pytest.raises(IndexError):
        placed(last + 1, shares, sizes)


def test_rows_in_order_stay_so():
    mixture = mixture_of("a:1@in_order b:1", **{"a@in_order": 500, "b": 500})
    rows = {"a@in_order": [], "b": []}
    for name, row in drawn(mixture, 1000):
        rows[name].append(row)
    assert rows["a@in_order"] == [*range(500)] != rows["b"]


def test_a_source_that_wraps_a_mixture_has_its_order():
    mixture = mixture_of("a:2 b:1", a=50, b=50)
    fields = {name: getattr(mixture, name) for name in mixture.__dataclass_fields__}
    wrapped = Mixture(**{**fields, "read": lambda i: mixture.read(i)["from"]})
    order = wrapped.order(0)
    assert [wrapped[order[i]] for i in range(99)] == drawn(mixture, 99)
    shorter = Mixture(**{**fields, "rows": mixture.rows[:10]})
    with pytest.raises(ValueError, match="rows were taken out"):
        shorter.order(0)


# --- batches


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"{name} {i}" for name in ("a", "b", "c") for i in range(900)]
    return Tokenizer.train(texts, tmp_path_factory.mktemp("run"), 400)


def texts_in(batch, tokenizer):
    """Return (source, row) of each whole document in a batch of texts, in order."""
    found = []
    for tokens, segments in zip(batch["tokens_BT"], batch["segment_ids_BT"], strict=True):
        for segment in range(1, segments.max() + 1):
            name, row = tokenizer.decode(tokens[segments == segment].tolist()).split()
            found.append((name, int(row)))
    return found


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_take_turns_along_one_order(tokenizer, hosts):
    mixture = mixture_of("a:2 b:1 c:1", a=70, b=30, c=900)
    parts = [
        prompt_batches(mixture, tokenizer, batch_size=8, length=16, process=h, processes=hosts)
        for h in range(hosts)
    ]
    seen = []
    for _ in range(40):
        of_hosts = []
        for part in parts:
            next(part)
            of_hosts.append([record["from"] for record in part.records])
        seen += [one for row in zip(*of_hosts, strict=True) for one in row]
    assert seen == drawn(mixture, 320)


@pytest.mark.parametrize(
    "words", ["a:2 b:1", "a:1 tokens=384 -> b:1 a:1 steps=5 -> b:1 c:2 temperature=2"]
)
def test_resuming_at_any_step_equals_going_on(tokenizer, monkeypatch, words):
    monkeypatch.setattr(batches_module, "PACKING_WINDOW", 7)
    monkeypatch.setattr(mixture_module, "BLOCK", 16)
    rows = {"a": 37, "b": 21, "c": 50}

    def start(seed=0):
        named = {name: rows[name] for name in names_in(words)}
        mixture = mixture_of(words, **named)
        return text_batches(mixture, tokenizer, batch_size=2, length=64, seed=seed)

    whole = start()
    states, expected, shares = [], [], []
    for _ in range(24):
        states.append(json.loads(json.dumps(whole.state)))
        expected.append(next(whole))
        shares.append(whole.shares)
    for step, state in enumerate(states):
        resumed = start()
        next(resumed)
        resumed.restore(state)
        for later in range(step, min(step + 4, 24)):
            batch = next(resumed)
            for name, array in expected[later].items():
                np.testing.assert_array_equal(batch[name], array)
            assert resumed.shares == shares[later]
    # Control: another seed.
    other = start(seed=1)
    assert any((next(other)["tokens_BT"] != want["tokens_BT"]).any() for want in expected)


def test_a_stage_ends_at_its_token(tokenizer):
    """Before the boundary stand the first stage's sources alone, behind it the second's."""
    words = "a:1 b:1 tokens=1280 -> c:1 b:1 steps=4 -> a:1"
    mixture = mixture_of(words, a=300, b=300, c=300)
    batches = text_batches(mixture, tokenizer, batch_size=4, length=32)
    assert mixture.stage_ends(128) == [10, 14]
    tokens = 0
    for batch in (next(batches) for _ in range(20)):
        names = {name for name, _ in texts_in(batch, tokenizer)}
        if tokens < 1280:
            assert names <= {"a", "b"}
        else:
            assert names == ({"b", "c"} if tokens < 1280 + 4 * 128 else {"a"})
        tokens += batch["tokens_BT"].size
    told = batches.lengths_line()
    assert "stage 1: 50.0% a, 50.0% b of the records drawn, to batch 10; stage 2: " in told


def test_a_stage_that_a_run_does_not_come_to_is_told(tokenizer):
    mixture = mixture_of("a steps=10 -> b steps=4 -> a", a=30, b=30)
    batches = text_batches(mixture, tokenizer, batch_size=4, length=32)
    for steps, number, end in ((3, 2, 10), (10, 2, 10), (11, 3, 14), (14, 3, 14)):
        told = f"; stage {number} begins after batch {end}: not in {steps} steps"
        assert lengths_of({"": batches}, steps).endswith(told)
    for steps, words in ((15, "a steps=10 -> b steps=4 -> a"), (1, "a:1 b:1")):
        mixture = mixture_of(words, a=30, b=30)
        batches = text_batches(mixture, tokenizer, batch_size=4, length=32)
        assert "not in" not in lengths_of({"": batches}, steps)


def test_a_stage_is_told_by_the_batches_that_a_step_reads_of_its_stream(tokenizer):
    mixture = mixture_of("a steps=10 -> b steps=4 -> a", a=30, b=30)
    batches = text_batches(mixture, tokenizer, batch_size=4, length=32)
    # PPO reads text for each of its updates.
    a_step = train_ppo.batches_a_step(train_ppo.Config(epochs=2, minibatches=2))
    # Three steps: three batches of prompts, twelve of text.
    prompts, text = (lengths_of({name: batches}, 3, a_step) for name in ("prompts", "text"))
    assert prompts.endswith("; stage 2 begins after batch 10: not in 3 steps")
    assert text.endswith("; stage 3 begins after batch 14: not in 3 steps")
    # Four come to all of the text.
    both = lengths_of({"prompts": batches, "text": batches}, 4, a_step)
    assert both.count("not in 4 steps") == 1 and "stage 2 begins after batch 10: not" in both


def test_a_step_of_distillation_reads_data_or_prompts(tokenizer):
    """So that 30 steps come to stage 2, after 10 batches, of one stream and not of the other."""
    mixture = mixture_of("a steps=10 -> b", a=30, b=30)
    batches = text_batches(mixture, tokenizer, batch_size=4, length=32)
    config = train_distill.Config(on_policy=0.75, steps=30)
    own = sum(train_distill.is_own(config, step) for step in range(1, 31))
    assert own > 10 >= 30 - own
    a_step = train_distill.batches_a_step(config)
    told = lengths_of({"batches": batches}, 30, a_step)
    assert told.endswith("; stage 2 begins after batch 10: not in 30 steps")
    assert "not in" not in lengths_of({"prompts": batches}, 30, a_step)


def test_stages_of_tokens_are_whole_batches_of_packed_rows(tokenizer):
    mixture = mixture_of("a tokens=1000 -> b", a=30, b=30)
    with pytest.raises(
        UserError, match="multiple of the 128 tokens of a batch; the nearest is 10"
    ):
        text_batches(mixture, tokenizer, batch_size=4, length=32)
    with pytest.raises(
        UserError, match=r"batches of these records differ.*end the stage by steps"
    ):
        prompt_batches(mixture, tokenizer, batch_size=4, length=32)


def test_shares_of_tokens(tokenizer):
    """Documents of one source are twenty times as long as those of the other."""
    long = Source("long", range(400), lambda i: {"text": "a 1 b 2 c 3 " * 20})
    short = Source("short", range(4000), lambda i: {"text": f"b {i}"})
    found = {}
    for unit in ("tokens", "examples"):
        words = f"long:1 short:1 unit={unit}"
        mixture = mixed(words, read_mixture(words), [long, short], ["long", "short"])
        batches = text_batches(mixture, tokenizer, batch_size=8, length=256)
        for _ in range(40):
            next(batches)
        found[unit] = batches.shares
        assert sum(of_tokens for _, of_tokens in batches.shares.values()) == pytest.approx(1)
    assert found["tokens"]["long"][1] == pytest.approx(0.5, abs=0.05)
    assert found["examples"]["long"][0] == pytest.approx(0.5, abs=0.01)
    assert found["examples"]["long"][1] > 0.9  # control


def test_shares_of_tokens_are_of_those_that_are_trained_on(tokenizer):
    """Of two sources whose answers are alike one has a prompt twenty times as long."""
    long = Source("long", range(400), lambda i: {"messages": talk("a 1 b 2 " * 20, f"b {i}")})
    short = Source("short", range(400), lambda i: {"messages": talk("a 1", f"b {i}")})
    words = "long:1 short:1 unit=tokens"
    mixture = mixed(words, read_mixture(words), [long, short], ["long", "short"])
    batches = chat_batches(mixture, tokenizer, batch_size=8, length=256)
    for _ in range(10):
        next(batches)
    np.testing.assert_allclose(batches.shares["long"], [0.5, 0.5], atol=0.02)
    # A comparison's are its responses.
    record = {"prompt": talk("a 1"), "responses": ["b 1", "b 2 c 3"], "ranking": [1, 2]}
    rows = encode_comparison(record, tokenizer, 256).rows
    counts = [len(tokenizer.answer(response)) for response in record["responses"]]
    assert trained_tokens_of(rows) == sum(counts) < tokens_of(rows)


def test_shares_count_what_gave_rows(tokenizer):
    """Records that are dropped are in no share."""
    good = Source("good", range(50), lambda i: {"messages": talk("a 1", f"b {i}")})
    unsaid = Source("unsaid", range(50), lambda i: {"messages": talk("a 1")})
    words = "good:1 unsaid:1"
    mixture = mixed(words, read_mixture(words), [good, unsaid], ["good", "unsaid"])
    batches = chat_batches(mixture, tokenizer, batch_size=4, length=32)
    next(batches)
    assert batches.shares == {"good": (1.0, 1.0)} and batches.dropped > 200


# --- files


def talk(*contents):
    return [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write chats, documents and pairs, and go there."""
    monkeypatch.chdir(tmp_path)
    chats = [{"messages": talk(f"a {i}", f"b {i}")} for i in range(60)]
    write(tmp_path / "a.jsonl", chats)
    write(tmp_path / "b.jsonl", chats[20:] + [{"prompt": f"c {i}", "response": "d"} for i in [1]])
    write(tmp_path / "docs.jsonl", [{"text": f"the text {i}"} for i in range(40)])
    pairs = [{"prompt": f"a {i}", "chosen": "yes", "rejected": "no"} for i in range(60)]
    write(tmp_path / "pairs.jsonl", pairs)
    return tmp_path


def test_no_prompt_that_one_file_holds_out_is_trained_on(files):
    words = "a.jsonl:1 b.jsonl:1"

    def prompts(split, data=words):
        source = open_source(data, "chat", split)
        return {source[i]["messages"][0]["content"] for i in range(len(source))}

    assert len(prompts("train")) > 30 and not prompts("train") & prompts("heldout")
    # Each holds out its own, the first of which may stand in the other.
    assert prompts("heldout", "a.jsonl") | prompts("heldout", "b.jsonl") == prompts("heldout")


def test_what_is_held_out_has_the_shares_of_what_is_trained_on(files):
    """A cap is of the rows that are trained on, and cuts none of the few that are held out."""
    write(files / "big.jsonl", [{"text": f"big {i}"} for i in range(900)])
    write(files / "small.jsonl", [{"text": f"small {i}"} for i in range(200)])
    words = "big.jsonl:1@cap=250 small.jsonl:1@cap=250"
    train, held_out, all_of_it = (
        open_source(words, "text", split) for split in ("train", "heldout", "all")
    )
    assert held_out.shares_SP == train.shares_SP
    assert shares_of(train)[0] == pytest.approx(250 / (250 + len(train.parts[1].source)))
    assert shares_of(all_of_it)[0] == pytest.approx(250 / 450)
    # Control: of the rows that are held out the shares are others.
    alone = mixed(words, held_out.stages, held_out.alone(), ["big.jsonl", "small.jsonl"])
    assert shares_of(alone)[0] > 0.7


def test_a_file_is_not_read_both_as_conversations_and_as_documents(files):
    for data in ("a.jsonl:1 a.jsonl:1@text", "a.jsonl steps=3 -> b.jsonl:1 ./a.jsonl:1@text"):
        with pytest.raises(UserError, match=r"a.jsonl: stands there with @text and without"):
            open_source(data, "chat", "train", with_texts=True)
    open_source("a.jsonl:1 b.jsonl:1@text", "chat", "train", with_texts=True)  # control


def test_the_first_conversations_are_found_among_endless_documents(files):
    """Conversations that end are followed by no walk through documents without an end."""
    write(files / "tiny.jsonl", [{"messages": talk(f"q {i}", "r")} for i in range(6)])
    for data, most, found in (("tiny.jsonl:9 world:1@text", 8, 1), ("a.jsonl:1 world:1", 8, 8)):
        source = open_source(data, "chat", "heldout", with_texts=True)
        assert len(first_conversations(source, most)) == found
    # In turns.
    said = [messages[0]["content"] for messages in first_conversations(source, 2)]
    assert said[0].startswith("a ") and not said[1].startswith("a ")


def test_an_evaluation_reads_all_of_files(files):
    assert evaluated_split("a.jsonl:1 b.jsonl:1") == "all"
    assert evaluated_split("a.jsonl:1 world:1") == "heldout"
    assert len(open_source("a.jsonl:1 b.jsonl:1", "chat", "all")) == 101


def test_documents_among_conversations_are_predicted_whole(files, tokenizer):
    source = open_source("a.jsonl:1 docs.jsonl:1@text", "chat", "train", with_texts=True)
    batch = next(chat_batches(source, tokenizer, batch_size=2, length=256))
    tokens, mask = batch["tokens_BT"], batch["loss_mask_BT"]
    kinds = set()
    for b, segments in enumerate(batch["segment_ids_BT"]):
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            is_text = "text" in tokenizer.decode(tokens[b][own].tolist())
            kinds.add(is_text)
            assert (
                mask[b][own].sum() == own.sum() - 1
                if is_text
                else mask[b][own].sum() < own.sum() / 2
            )
    assert kinds == {True, False}
    with pytest.raises(UserError, match=r"docs.jsonl@text: .*leave @text out"):
        open_source("a.jsonl:1 docs.jsonl:1@text", "chat", "train")
    with pytest.raises(UserError, match="holds documents alone"):
        open_source("a.jsonl:1@text docs.jsonl:1@text", "chat", "train", with_texts=True)


# --- scripts

TINY = ["--model.preset=tiny", "--eval_every=2", "--optimizer.warmup=0", "--save_every=1"]
ROWS_OF_32 = ["--batch_size=8", "--length=32"]


@pytest.mark.slow
def test_scripts_train_on_mixtures_and_tell_the_shares(files, capsys):
    mixture = "a.jsonl:3 docs.jsonl:1@text world:1"
    flags = [*TINY, *ROWS_OF_32, "--steps=4"]
    run(train_sft, f"--data={mixture}", "--run=sft", *flags)
    last = rows_of("sft")[-1]
    shares = [last[f"data/share/{name}"] for name in ("a.jsonl", "docs.jsonl@text", "world")]
    np.testing.assert_allclose(shares, [0.6, 0.2, 0.2], atol=0.04)
    assert last["eval/loss"] > 0 and last["data/token_share/world"] > 0.2
    assert "Its share of the examples read so far" in (files / "sft" / "report.html").read_text()
    told = " ".join(capsys.readouterr().out.split())
    assert "60.0% a.jsonl, 20.0% docs.jsonl@text, 20.0% world of the records drawn;" in told
    assert re.search(
        r"; a\.jsonl: \d+ rows; .*; docs\.jsonl: \d+ rows; .*; world: endless; ", told
    )

    # Each source is pinned by its content.
    assert json.loads((files / "sft" / "config.json").read_text())["inputs"].keys() == {
        "data.0",
        "data.1",
    }
    run(train_sft, f"--data={mixture}", "--run=sft", *flags[:-1], "--steps=5")
    with open("docs.jsonl", "a") as file:
        file.write("\n")
    told = fails(train_sft, [f"--data={mixture}", "--run=sft", *flags[:-1], "--steps=6"], capsys)
    assert "--data=docs.jsonl: its content is not what sft began with" in told

    # Comparisons, and prompts.
    short = ["--init=sft", "--steps=2", *TINY[1:]]
    pairs = ["--data=pairs.jsonl:1 world:1", *short, *ROWS_OF_32]
    run(train_rm, *pairs, "--run=rm")
    run(train_dpo, *pairs, "--run=dpo")
    prompts = ["--data=pairs.jsonl:1 world:1 temperature=2", *short, "--reward=rm"]
    prompts += ["--batch_size=16", "--minibatches=2", "--max_prompt=24", "--max_new_tokens=8"]
    run(train_ppo, *prompts, "--run=ppo")
    for name in ("rm", "dpo", "ppo"):
        assert rows_of(name)[-1]["data/share/world"] == pytest.approx(0.5, abs=0.3)


@pytest.mark.slow
def test_after_a_kill_the_remainder_is_identical(files):
    """SIGKILL at two moments, one in each stage; the runs then have the same rows and weights."""
    data = "--data=a.jsonl:2 world:1 tokens=1024 -> world:1"
    command = [sys.executable, str(ROOT / "train_sft.py"), data, *TINY, *ROWS_OF_32, "--steps=8"]

    def start(name):
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([*command, f"--run={name}"], env=environment, **pipes)

    def finish(process):
        _, err = process.communicate()
        assert process.returncode == 0, err

    finish(start("whole"))
    for step in (2, 6):
        process = start("killed")
        while not (files / "killed" / "checkpoints" / str(step)).exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start("killed"))
    jax.tree.map(np.testing.assert_array_equal, load_params("whole"), load_params("killed"))
    one, other = rows_of("whole"), rows_of("killed")
    assert len(one) == len(other) == 8
    for row, same in zip(one, other, strict=True):
        for name in row:
            if name.startswith(("loss", "data/")):
                assert row[name] == same[name], name


# --- the page


def mixtures_of_the_page():
    """Return the mixtures that docs/data.md shows, as --data has them."""
    section = PAGE.read_text().partition("## Mixtures")[2].partition("\n## ")[0]
    found = []
    for line in section.splitlines():
        if line.startswith("    .venv/bin/python"):
            words = shlex.split(line)
            found += [word.removeprefix("--data=") for word in words if word.startswith("--data=")]
    return found


@pytest.mark.parametrize("data", mixtures_of_the_page())
def test_the_pages_mixtures_are_read(data):
    stages = read_mixture(data)
    names = names_in(data)
    labels = {share.label: 0 for stage in stages for share in stage.shares}
    sources = [source_of(label, 100) for label in labels]
    mixture = mixed(data, stages, sources, [*labels])
    assert is_mixture(data) and names
    assert mixture.spread_P and all(sum(shares) for shares in mixture.shares_SP)


def test_the_page_has_mixtures():
    assert len(mixtures_of_the_page()) >= 6
