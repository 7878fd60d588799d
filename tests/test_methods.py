"""The study of methods: a run's cost, that it is not made twice, intervals over seeds."""

import dataclasses
import json

import numpy as np
import pytest
import running

import train_sft
from data.batches import pad_prompts
from data.tokenizer import Tokenizer
from experiments.child import check_ended
from experiments.methods import run as study
from experiments.seeds import half
from model_config import ModelConfig
from runtime.errors import UserError

# Attention's own products are small beside its weights here, so that 2 FLOPs a weight and token
# are nearly all.
MODEL = ModelConfig(
    vocab=512, width=256, mlp_width=512, layers=3, heads=4, kv_heads=2, head_dim=64
)
BLOCKS = 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
UNEMBEDDING = 512 * 256


def counted(tmp_path, rows=(), **fields):
    """Return the training FLOPs that the study counts for a run with these settings."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model": dataclasses.asdict(MODEL), **fields})
    )
    running.write(
        tmp_path / "metrics.jsonl",
        [{"step": i + 1, "seconds": 0.0, **row} for i, row in enumerate(rows)],
    )
    return study.training_flops(str(tmp_path))


def test_a_direct_method_passes_four_candidates_forward_and_back_and_the_reference_once(tmp_path):
    tokens = 10 * 8 * 4 * 32
    options = {"script": "train_dpo", "batch_size": 8, "steps": 10, "length": 32}
    weights = BLOCKS + UNEMBEDDING
    assert counted(tmp_path, **options, loss="simpo") == pytest.approx(
        6 * weights * tokens, rel=0.02
    )
    for loss in ("dpo", "cdpo", "robust_dpo", "ipo", "slic"):
        assert counted(tmp_path, **options, loss=loss) == pytest.approx(
            8 * weights * tokens, rel=0.02
        )
    # KTO: the best and the worst, and one to another prompt, which is never passed back
    assert counted(tmp_path, **options, loss="kto") == pytest.approx(
        (2 * 8 + 1 * 4) / 4 * weights * tokens, rel=0.02
    )
    # Forks: four candidates and no reference; hindsight has one row a prompt.
    options["script"] = "experiments/figa/train_dpo"
    assert counted(tmp_path, **options) == pytest.approx(6 * weights * tokens, rel=0.02)
    options["script"] = "experiments/hindsight/train_dpo"
    assert counted(tmp_path, **options) == pytest.approx(6 / 4 * weights * tokens, rel=0.02)


def test_words_are_added_at_the_end_of_the_user_s_turn(tmp_path):
    added = "\nA helpful answer:"
    texts = ("hello.", "please name two months.")
    tokenizer = Tokenizer.train([*texts, added] * 9, tmp_path, 300)
    plain, expected = (
        [{"tokens": tokenizer.prompt(text + end)} for text in texts] for end in ("", added)
    )
    words = tokenizer.encode(added)
    longest = max(len(row["tokens"]) for row in plain)
    asked = study.with_suffix(pad_prompts(plain, longest, tokenizer.pad, fixed=True), words)
    for name, x in pad_prompts(expected, longest + len(words), tokenizer.pad, fixed=True).items():
        np.testing.assert_array_equal(asked[name], x)


def test_an_online_method_samples_judges_and_updates(tmp_path):
    shape = {
        "batch_size": 64,
        "steps": 2,
        "max_prompt": 20,
        "max_new_tokens": 24,
        "epochs": 1,
        "reward": ["runs/rm"],
    }
    blocks, unembedded = BLOCKS * 64 * 44, UNEMBEDDING * 64 * 25
    policy, scalar = 2 * (blocks + unembedded), 2 * blocks
    # One prompt a response: sampling passes each token once.
    ppo = counted(tmp_path, **shape, script="train_ppo", samples_per_prompt=1)
    assert ppo == pytest.approx(2 * ((1 + 2 + 3) * policy + (2 + 3) * scalar), rel=0.02)
    # Eight responses share a prefill.
    sampled = 2 * (BLOCKS * (8 * 20 + 64 * 24) + UNEMBEDDING * (8 + 64 * 24))
    grpo = {**shape, "script": "train_grpo", "method": "grpo", "samples_per_prompt": 8}
    once = 2 * (sampled + (2 + 3) * policy + scalar)
    assert counted(tmp_path, [{"rounds": 1}, {"rounds": 1}], **grpo) == pytest.approx(
        once, rel=0.02
    )
    ruled = counted(
        tmp_path, [{"rounds": 1}, {"rounds": 1}], **{**grpo, "reward": ["tasks.rules:all_kept"]}
    )
    assert ruled == pytest.approx(once - 2 * scalar, rel=0.02)
    # A second rollout, judged too, in one of the two iterations.
    again = once + sampled + 2 * policy + scalar
    assert counted(tmp_path, [{"rounds": 2}, {"rounds": 1}], **grpo) == pytest.approx(
        again, rel=0.02
    )
    raft = {
        **shape,
        "reward": "runs/rm",
        "script": "train_raft",
        "samples_per_prompt": 8,
        "minibatch_size": 16,
        "kl_coef": 0.0,
    }
    update = 6 * (BLOCKS + UNEMBEDDING) * 16 * 44
    expected = 2 * (sampled + 2 * policy + scalar) + 5 * update
    assert counted(tmp_path, [{"updates": 2}, {"updates": 3}], **raft) == pytest.approx(
        expected, rel=0.02
    )


@pytest.mark.slow
def test_a_run_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "HERE", tmp_path)
    options = [
        "--model.preset=tiny",
        "--model.vocab=1280",
        "--steps=1",
        "--optimizer.warmup=0",
        "--batch_size=8",
    ]
    running.run(train_sft, *options, "--eval_every=0", f"--run={tmp_path}/align3/sft")
    words = [
        f"--align={tmp_path}/align{{seed}}",
        f"--out={tmp_path}/out",
        "--methods",
        "sft",
        "--seeds",
        "3",
        "--n=16",
    ]
    (row,) = running.run(study, *words)
    assert (row["method"], row["seed"], row["prompts_seed"], row["n"]) == ("sft", 3, 1003, 16)
    assert abs(row["kl"]) < 1e-4 and "training_flops" not in row and row["reward_model_flops"] == 0
    before = (tmp_path / "results.jsonl").read_text()
    assert running.run(study, *words) == [] and (tmp_path / "results.jsonl").read_text() == before
    (other,) = running.run(study, *words, "--tune")  # the seed's own prompts, in another file
    assert other["prompts_seed"] == 3 and (tmp_path / "results.jsonl").read_text() == before


def test_mistakes_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "HERE", tmp_path)
    assert "ppp unknown" in running.fails(study, ["--methods", "ppp"], capsys)
    assert "--tune only" in running.fails(study, ["--methods", "dpo", "--flags=--beta=1"], capsys)


def test_the_interval_over_three_seeds_is_student_s():
    # t of 0.975 with 2 degrees.
    assert half([0.0, 1.0, 2.0]) == pytest.approx(4.302652729911275 / 3**0.5)
    assert half([1.0]) != half([1.0])  # of one seed there is none


@pytest.mark.parametrize(("code", "want"), [(75, 75), (130, 130), (-15, 143), (-9, 137)])
def test_a_study_ends_as_the_run_that_it_started(code, want):
    """For who starts commands again: 75 means once more, signals mean stopped."""
    with pytest.raises(SystemExit) as stop:
        check_ended(code, "a line")
    assert stop.value.code == want
    check_ended(0, "a line")
    for mistake in (1, 2):
        with pytest.raises(UserError, match="a line"):
            check_ended(mistake, "a line")
