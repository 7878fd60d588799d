"""Responses without an end: no method pays for them, no search takes them."""

import http.client

import jax
import numpy as np
import pytest
from running import fails, rows_of, run, write

import evaluate
import train_grpo
import train_ppo
import train_prm
import train_raft
import train_rm
import train_sft
from data.tokenizer import Tokenizer
from decoding import best_of_n, step_beam
from evaluation.win_rate import Judged, ruled, win_rate_table
from model import LanguageModel, ScalarModel, init_and_apply
from model_config import PRESETS
from objectives.policy import combined
from responses import load_run
from rewards import client
from rewards.models import make_text_scorer
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError

OWN = """
def flat(response, record):
    return -5.0 + 0.0 * len(record["prompt"])

def long(response, record):
    return float(len(response))
"""
COMMON = [
    "--init=sft",
    "--data=sums.jsonl",
    "--reward=own_ends:flat",
    "--max_prompt=32",
    "--max_new_tokens=10",
    "--batch_size=64",
    "--optimizer.lr=3e-3",
    "--steps=6",
    "--eval_every=0",
]


def save(folder, script, params, tokenizer, **fields):
    """Save `params` as a run of `script`, a module of the root."""
    config = script.Config(run=str(folder), model=PRESETS["tiny"], **fields)
    name = script.__name__
    with Checkpoints(config.run, config, script=name, tokenizer=tokenizer.model) as saved:
        saved.save(1, {"params": params})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make a folder with prompts, a policy some of whose responses end, and reward models."""
    folder = tmp_path_factory.mktemp("ends")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMB_CACHE", str(folder / "cache"))
        sums = [(f"{i} plus {j}", str(i + j)) for i in range(10) for j in range(10)]
        rows = [{"prompt": p, "response": a, "answer": a} for p, a in sums]
        write(folder / "sums.jsonl", rows)
        (folder / "own_ends.py").write_text(OWN)
        tokenizer = Tokenizer.train((f"{p} is {a}" for p, a in sums), folder / "made", 512)
        params = jax.jit(init_and_apply(LanguageModel(PRESETS["tiny"]))[0])(jax.random.key(0))
        scalar = jax.jit(init_and_apply(ScalarModel(PRESETS["tiny"]))[0])(jax.random.key(1))
        embed = params["decoder"]["embed"]
        params["decoder"]["embed"] = embed.at[tokenizer.eos].multiply(5.5)
        save(folder / "sft", train_sft, params, tokenizer)
        save(folder / "rm", train_rm, scalar, tokenizer)
        save(folder / "prm", train_prm, scalar, tokenizer)
        yield folder


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(files / "cache"))
    monkeypatch.chdir(files)


# ---- Training: a reward that is the same for all, and lower than any fixed penalty

slow = pytest.mark.slow
TRAINERS = {
    "grpo": (train_grpo, ["--minibatches=1"]),
    "rloo": (train_grpo, ["--minibatches=1", "--method=rloo"]),
    "ppo": (train_ppo, ["--minibatches=1", "--epochs=1"]),
    "raft": (train_raft, ["--minibatch_size=8"]),
}


@slow
@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo", "raft"])
def test_a_constant_reward_does_not_teach_not_to_end(name):
    script, options = TRAINERS[name]
    run(script, *COMMON, *options, f"--run={name}")
    rows = rows_of(name)
    shares = [row["ended"] for row in rows]
    print(f"{name}: share that ended {[round(share, 2) for share in shares]}")
    assert 0.1 < shares[0] < 0.9  # control: there is something to unlearn
    assert min(shares[1:]) > shares[0]
    assert rows[0]["score"] == -5 > rows[0]["score_with_eos_rule"]
    logged = {"sampler_gap", "sampler_gap_mean", "sampler_k3", "learning_rate"}
    assert logged <= rows[0].keys() and rows[0]["sampler_k3"] < 1e-6


# ---- Choosing: what has no end only where nothing has


def test_best_of_n_takes_what_ended_where_anything_did(files):
    options = ["--policy=sft", "--data=sums.jsonl", "--reward=own_ends:long", "--n=8"]
    options += ["--prompts=20", "--max_new_tokens=10"]
    mesh = best_of_n.make_mesh(best_of_n.MeshConfig())
    config = best_of_n.flags.parse(best_of_n.Config, options)
    records = best_of_n.open_source("sums.jsonl", "prompt", "train", seed=0).first(20)
    scored = best_of_n.sample_and_score(config, records, mesh)
    # Longest are those without an end: chosen by the reward, and not by the rule.
    plain_P, best_P = scored.rewards_PN.argmax(1), scored.ranks_PN.argmax(1)
    ended_PN = scored.rewards_PN == scored.ranks_PN
    rows = np.arange(len(records))
    assert ended_PN[rows, plain_P].mean() < 0.5
    assert (ended_PN[rows, best_P] == ended_PN.any(1)).all() and ended_PN.any(1).mean() > 0.6


def test_a_search_by_steps_ends_in_what_has_an_end():
    """The score likes what goes on, which is full after three steps and has no end."""
    newline, eos, prompts = 90, 99, [[50], [51]]

    def extend(contexts, number):
        ends = (eos, newline) if number < last else (newline, newline)
        return [[step, end] for _ in contexts for step, end in zip((1, 2), ends, strict=True)]

    def score(prompts, responses):
        return np.array([sum(token for token in tokens if token < 90) for tokens in responses])

    def found(**rule):
        own = {"beams": 1, "branch": 2, "longest": 6, **rule}
        return step_beam.search(prompts, extend, score, (eos,), **own)[0]

    last = 3
    assert found() == [[2, newline, 2, newline, 1, eos]] * 2
    # Nothing ends in the last round: what ended before is still there.
    last = 2
    assert found() == [[2, newline, 1, eos]] * 2
    assert found(rule="none") == [[2, newline] * 3] * 2  # control
    last = 0
    assert all(len(tokens) == 6 for tokens in found())


def test_a_win_is_of_responses_that_ended():
    ours = Judged(np.float32([3.0, 9.0, 9.0, 1.0]), np.array([True, False, False, True]))
    theirs = Judged(np.float32([2.0, 0.0, 5.0, 8.0]), np.array([True, True, False, False]))
    table = win_rate_table(*ruled(ours, theirs, "lowest"))
    assert table["win_rate"] == (1 + 0 + 0.5 + 1) / 4
    assert win_rate_table(*ruled(ours, theirs, "none"))["win_rate"] == 3 / 4  # control


def test_win_rate_scores_the_tokens_that_were_sampled(files, capsys):
    """A response of the tokens that were sampled gets no end; a text has come to its own."""
    reward = load_run("rm", reward=True)
    score = make_text_scorer(reward.config, reward.tokenizer, 64)
    tokens = reward.tokenizer.encode("3 plus 4")
    cut, whole = score(reward.params, ["1"] * 2, [tokens, [*tokens, reward.tokenizer.eos]])
    assert score(reward.params, ["1"], ["3 plus 4"])[0] == pytest.approx(whole) != cut
    options = ["--measure=win_rate", "--policy=sft", "--against=sft", "--reward=rm"]
    table = run(evaluate, *options, "--data=sums.jsonl", "--n=40", "--max_new_tokens=10")
    assert table["win_rate"] == 0.5 and 0 < table["ended"] == table["ended_against"] < 1


@pytest.mark.parametrize("shift", [-1e3, 0.0, 1e3])
def test_what_fails_a_gate_is_below_all_that_pass(shift):
    first, gate = np.float32([1.0, -7.0, 4.0, 9.0]) + np.float32(shift), np.float32([1, 1, 0, 0])
    scores = np.asarray(combined([first, gate], "gated", gate=1.0))
    assert scores[:2].tolist() == first[:2].tolist() and (scores[2:] < first.min()).all()
    given = combined([first, gate], "gated", gate=1.0, floor=-1.0)
    assert given[2:].tolist() == [-1, -1]


# ---- Mistakes

MISTAKES = {
    "grpo: score of a rule": (train_grpo, ["--missing_eos_score=-3"], "missing_eos_score"),
    "grpo: shaping": (train_grpo, ["--shaping=1"], "--method=reinforce_pp"),
    "rloo: deviation": (train_grpo, ["--method=rloo", "--unbiased_std"], "unbiased_std"),
    "dr_grpo: deviation": (train_grpo, ["--method=dr_grpo", "--unbiased_std"], "unbiased_std"),
    "grpo: rounds": (train_grpo, ["--max_rounds=2"], "--dynamic_sampling"),
    "gspo: no KL": (train_grpo, ["--method=gspo", "--kl_in=reward"], "kl_coef"),
    "grpo: floor": (train_grpo, ["--floor=-2"], "--combine=gated"),
    "grpo: gate": (train_grpo, ["--gate=1"], "--combine=gated"),
    "grpo: steps": (train_grpo, ["--reward=prm"], "scores steps"),
    "ppo: score of a rule": (train_ppo, ["--missing_eos_score=2"], "missing_eos_score"),
    "ppo: floor": (train_ppo, ["--floor=0"], "--combine=gated"),
    "ppo: horizon": (train_ppo, ["--kl_horizon=5"], "--kl_target"),
    "ppo: text": (train_ppo, ["--ptx_coef=3"], "--ptx_data"),
    "ppo: steps": (train_ppo, ["--reward=prm"], "scores steps"),
    "ppo: weight of steps": (
        train_ppo,
        ["--reward=prm", "--step_rewards=last", "--weights", "3", "--combine=weighted"],
        "step_rewards",
    ),
    "raft: score of a rule": (train_raft, ["--missing_eos_score=2"], "missing_eos_score"),
    "raft: steps": (train_raft, ["--reward=prm"], "scores steps"),
    "no host": (train_raft, ["--reward=http://"], "names no host"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_flag_that_nothing_reads_is_refused(name, files, capsys):
    script, argv, words = MISTAKES[name]
    line = fails(script, [*COMMON, *argv, "--run=new"], capsys)
    assert words in line and argv[-1].partition("=")[2] in line
    assert not (files / "new").exists()


# ---- A server that fails for a while

QUESTION = {"tokenizer": "", "texts": ["a"], "records": [{}], "batch": {}}


def answering(monkeypatch, replies):
    """Have the server answer with each of `replies` in turn, the last of them for ever."""
    left = list(replies)

    def post(*_):
        reply = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(reply, Exception):
            raise reply
        text = '{"scores": [1.0]}' if reply == 200 else "why"
        return client.Reply(reply, "reason", text)

    monkeypatch.setattr(client, "_post", post)
    monkeypatch.setattr(client, "PAUSE", 0.001)
    return left


LOST = [ConnectionResetError("reset"), http.client.RemoteDisconnected("gone")]


@pytest.mark.parametrize("fault", [408, 425, 429, 500, 502, 503, 504, 529, *LOST])
def test_a_passing_fault_of_a_server_is_asked_again(fault, monkeypatch, capsys):
    answering(monkeypatch, [fault, fault, 200])
    assert client.ask("http://127.0.0.1:1", QUESTION) == [1.0]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "asking again" in lines[0] and "answers again" in lines[1]
    # And not for ever.
    answering(monkeypatch, [fault])
    with pytest.raises(UserError, match="for 0 s"):
        client.ask("http://127.0.0.1:1", QUESTION, wait=0.02)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 301])
def test_a_refusal_of_a_server_ends_at_once(status, monkeypatch, capsys):
    left = answering(monkeypatch, [status, 200])
    with pytest.raises(UserError, match="why"):
        client.ask("http://127.0.0.1:1", QUESTION)
    assert left == [200] and capsys.readouterr().err == ""


# ---- RAFT's schedule: a round may have fewer updates than it can have


@pytest.mark.parametrize("counts", [[8, 8, 8], [1, 3, 8], [8, 2, 1], [1, 1, 1]])
def test_the_schedule_ends_where_the_run_ends_however_few_are_chosen(counts):
    config = train_raft.Config(
        batch_size=64,
        minibatch_size=8,
        samples_per_prompt=8,
        epochs=1,
        select="above_threshold",
        replay_rounds=0,
        steps=3,
    )
    assert config.most_updates == 8 and config.schedule_updates == 24
    places = []
    for step, count in enumerate(counts, 1):
        own = [config.place(step, number, count) for number in range(count)]
        # Each round ends where its part of the schedule does.
        assert own[-1] == 8 * step - 1
        places += own
    assert places == sorted(set(places))
    if counts == [8, 8, 8]:
        assert places == list(range(24))


def test_the_schedule_is_set_and_the_moments_are_not():
    params = {"w": np.ones(3, np.float32)}
    config = train_raft.OptimizerConfig(lr=1.0, schedule="linear", warmup=0, final_lr=0.1)
    for name in ("adamw", "adafactor"):
        optimizer = train_raft.make_optimizer(
            train_raft.dataclasses.replace(config, name=name), 10
        )
        state = train_raft.init_state(params, optimizer)
        moved = train_raft.at_place(state, 7)
        counts = [
            (int(old), int(new))
            for old, new in zip(
                jax.tree.leaves(state.opt_state), jax.tree.leaves(moved.opt_state), strict=True
            )
            if np.ndim(old) == 0
        ]
        assert sorted(set(counts)) == [(0, 0), (0, 7)], name
