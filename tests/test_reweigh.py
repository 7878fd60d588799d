"""Weights of a mixture that follow what a model still learns."""

import random

import numpy as np
import pytest
from running import fails, run, write

import train_lm
from collect import reweigh
from collect.reweigh import progress_shares
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


def words(letters, seed):
    rng = random.Random(seed)
    return " ".join("".join(rng.choice(letters) for _ in range(3)) for _ in range(12))


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

    assert "is no mixture" in fails(reweigh, ["--data=a.jsonl", "--schema=text"], capsys)
    told = fails(reweigh, [*flags[:2], "--floor=0.6"], capsys)
    assert "--floor=0.6: must be at least 0 and at most 0.5, for 2 sources" in told
