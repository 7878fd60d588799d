"""Weights of a mixture that follow what a model still learns."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from running import fails, run, write

import train_lm
from collect import reweigh
from collect.reweigh import held_out_losses, next_words, progress_shares
from data.mixture import mixed
from data.source import Source
from runtime.errors import UserError
from runtime.mixtures import read_mixture


@pytest.mark.parametrize("floor", [0.0, 0.05, 1 / 4])
def test_shares_follow_progress_down_to_the_floor(floor):
    rng = random.Random(0)
    for _ in range(50):
        progress = [rng.uniform(-1, 2) for _ in range(4)]
        progress[0] = -0.1
        shares = progress_shares(progress, floor)
        assert sum(shares) == pytest.approx(1) and min(shares) >= floor - 1e-12
        # What is learnt, or forgotten, falls to the floor; more progress never has less.
        assert shares[0] == pytest.approx(floor if max(progress) > 0 else 1 / 4)
        assert (np.diff(np.array(shares)[np.argsort(progress)]) >= -1e-12).all()
    assert progress_shares([0, -1], 0.1) == [0.5, 0.5]
    with pytest.raises(ValueError, match="shares of at least"):
        progress_shares([1, 1, 1], 0.4)


@pytest.mark.parametrize(
    ("data", "shares", "told"),
    [
        (
            "a:2@rows b:1@rows c:1@rows unit=tokens",
            [0.5, 0.5, 0.00004],
            "a:0.5000 b:0.5000 unit=tokens",
        ),
        ("a:1 b:1@in_order c:1", [0.2, 0.7, 0.1], "a:0.2000 b:0.7000@in_order c:0.1000"),
        ("a:1 b:1 c:1 unit=tokens", [0, 1, 0], "b"),
        ("a:1 b:1@in_order c:1", [0, 1, 0], "b:1.0000@in_order"),
    ],
)
def test_the_mixture_told_can_be_read(data, shares, told):
    stages = read_mixture(data)
    labels = [share.label for share in stages[0].shares]
    sources = [Source(label, range(9), {}.__getitem__) for label in labels]
    assert " ".join(next_words(mixed(data, stages, sources, labels), shares)) == told
    read_mixture(told)


def words(letters, seed):
    rng = random.Random(seed)
    return " ".join("".join(rng.choice(letters) for _ in range(3)) for _ in range(12))


def nothing_but_nan(_, examples):
    """Return losses that are no numbers, each of one token."""
    return np.array([[np.nan, 1.0]] * len(examples))


def test_losses_of_two_tokenizers_are_not_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", [{"text": words("ab", i)} for i in range(30)])
    monkeypatch.setattr(reweigh.Tokenizer, "load", lambda run: SimpleNamespace(sha256=run))
    flags = ["--data=a.jsonl:1 b.jsonl:1", "--schema=text", "--before=first", "--init=next"]
    line = fails(reweigh, flags, capsys)
    assert "--before=first: another tokenizer than --init=next" in line


@pytest.mark.slow
def test_a_source_that_is_learnt_falls_to_the_floor(tmp_path, monkeypatch, capsys):
    """The first run learns b alone, the next one a alone: b has no more to give."""
    monkeypatch.chdir(tmp_path)
    for name, letters in (("a", "ab"), ("b", "xy")):
        write(tmp_path / f"{name}.jsonl", [{"text": words(letters, i)} for i in range(300)])
    tiny = ["--model.preset=tiny", "--length=64", "--save_every=0", "--eval_every=0"]
    tiny += ["--optimizer.warmup=0", "--steps=40"]
    both = "--data=a.jsonl:1 b.jsonl:1"
    run(train_lm, both, "--run=start", *tiny, "--optimizer.lr=1e-5")
    run(train_lm, "--data=b.jsonl", "--run=first", "--init=start", *tiny)
    run(train_lm, "--data=a.jsonl", "--run=next", "--init=first", *tiny)
    flags = ["--data=a.jsonl:2@rows b.jsonl:1@rows", "--schema=text", "--floor=0.1"]
    shares = run(reweigh, *flags, "--before=first", "--init=next")
    assert shares == pytest.approx({"a.jsonl": 0.9, "b.jsonl": 0.1})
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == "--data='a.jsonl:0.9000 b.jsonl:0.1000'"
    assert read_mixture(told.removeprefix("--data=").strip("'"))[0].shares[0].weight == 0.9
    # Control: from the start to the first run, it is the other way round.
    shares = run(reweigh, *flags, "--before=start", "--init=first")
    assert shares["b.jsonl"] > shares["a.jsonl"]

    # A source whose share is none is left out, and that is said.
    run(reweigh, *flags[:2], "--floor=0", "--before=first", "--init=next")
    told = capsys.readouterr().out.splitlines()
    assert told[-2:] == [
        "b.jsonl: left out, its share is none; --floor keeps it in",
        "--data='a.jsonl'",
    ]

    models = ["--before=first", "--init=next"]
    told = fails(reweigh, [*flags, *models, "--length=5"], capsys)
    assert "--length=5: must be above 8 and at most the models' context of" in told
    told = fails(reweigh, [*flags, *models, "--records=0"], capsys)
    assert "--records=0: must be at least 1" in told
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="next: its loss on b is nan"),
    ):
        patch.setattr(reweigh, "make_response_losses", lambda *_: nothing_but_nan)
        part = Source("b", range(3), lambda i: {"text": f"xy {i}"})
        held_out_losses("next", [part], 64, 3)

    assert "is no mixture" in fails(reweigh, ["--data=a.jsonl", "--schema=text"], capsys)
    told = fails(reweigh, [*flags[:2], "--floor=0.6"], capsys)
    assert "--floor=0.6: must be at least 0 and at most 0.5, for 2 sources" in told
