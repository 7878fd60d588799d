"""Values of every measure on inputs small enough to be reckoned by hand; no model is run."""

import json
import math
import random
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import Letters, load_letters, open_in_memory, said, source_of, told
from preference_cases import lookup, mean_so_far
from running import fails

import evaluate
import responses
import train_dpo
import train_ppo
import train_rm
from collect import examples, feedback, rank, spin, steps
from data.batches import comparison_batches
from data.sources import evaluated_split, open_source
from evaluation import gold
from evaluation import reward_model as comparing
from evaluation.perplexity import make_perplexity_evaluation
from evaluation.win_rate import Judged
from experiments.contrastive.batches import encode_contrast, with_other_prompts
from experiments.contrastive.objective import contrastive
from experiments.figa.batches import with_edit_weights
from experiments.figa.objective import figa_objective
from experiments.unlikelihood.batches import with_rank_weights
from experiments.unlikelihood.objective import unlikelihood_objective
from model_config import PRESETS
from objectives import direct
from rewards import judges, models, scorer
from rewards.scorer import check_scores
from runtime.errors import UserError
from sampling import Samples, SamplingConfig
from tasks import rules, world
from weights import convert

CAPITAL = "what is the capital of sweden?"
# Of the three criteria: all, all but honest, all but harmless, honest and harmless, honest alone.
RIGHT = "it is stockholm."
WRONG = "it is paris."
RUDE = "you fool. it is stockholm."
MUTE = "hello there."
WORST = "you fool."
TOTALS = {RIGHT: 1.0, WRONG: 2 / 3, RUDE: 2 / 3, MUTE: 2 / 3, WORST: 1 / 3}


def test_the_gold_program_tells_these_responses_apart():
    for response, total in TOTALS.items():
        assert world.gold(CAPITAL, response).total == pytest.approx(total)


# ---- evaluate.py ----


@pytest.mark.parametrize(
    "data, split, read",
    [
        ("mine.jsonl", None, "all"),
        ("mine.jsonl", "heldout", "heldout"),
        ("mine.jsonl.gz", "train", "train"),
        ("world", None, "heldout"),
        ("arithmetic", None, "heldout"),
        ("tfds:gsm8k", None, "heldout"),
        ("world", "train", "train"),
    ],
)
def test_a_file_is_evaluated_whole_unless_a_split_is_asked_for(monkeypatch, data, split, read):
    opened = []
    monkeypatch.setattr(evaluate, "open_source", open_in_memory([{}] * 7, opened))
    config = evaluate.Config(data=data, split=split, n=5)
    source = evaluate.open_part(config, "chat")
    assert opened == [(data, "chat", read)]
    head = {"data": data, "split": read, "records": 5}
    assert evaluate.what_is_read(config, source) == head


def test_what_has_no_end_cannot_be_read_whole():
    for data in ("world", "arithmetic", "tfds:gsm8k"):
        assert evaluated_split(data) == "heldout"
        with pytest.raises(UserError, match="has no split all"):
            open_source(data, "prompt", "all")


def negative_log_likelihoods(table_VV, records, length=64):
    """Return the assistant's tokens' negative log-probabilities, one list a record."""
    log_sums_V = np.log(np.exp(table_VV).sum(1))
    found = []
    for record in records:
        tokens, mask = Letters().chat(record["messages"])
        own = []
        for t in range(1, min(len(tokens), length)):
            if mask[t]:
                before = tokens[t - 1]
                own.append(log_sums_V[before] - table_VV[before, tokens[t]])
        found.append(own)
    return found


CHATS = [{"messages": said(f"say {i}", "yes" * (i + 1))} for i in range(5)]


@pytest.mark.parametrize("n", [1, 3, 5, 1000])
def test_perplexity_is_of_the_first_n_records_each_once(rng, n):
    table_VV = rng.normal(size=(128, 128))
    # A dear letter: its share differs from record to record, so that the control cannot fail.
    table_VV[:, ord("y")] -= 20
    parts = negative_log_likelihoods(table_VV, CHATS[:n])
    nats = [value for own in parts for value in own]
    evaluate = make_perplexity_evaluation(lookup, source_of(CHATS), Letters(), 64, n)
    measured = evaluate(jnp.float32(table_VV))
    assert measured["tokens"] == len(nats)
    assert measured["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    # Control: records do not weigh alike, tokens do.
    by_record = np.mean([np.mean(own) for own in parts])
    assert n == 1 or measured["loss"] != pytest.approx(by_record, rel=1e-4)


def test_perplexity_says_what_is_cut_and_what_is_left_out(rng, capsys):
    table_VV = rng.normal(size=(128, 128))
    make = make_perplexity_evaluation
    measured = make(lookup, source_of(CHATS), Letters(), 16, 9)(jnp.float32(table_VV))
    parts = negative_log_likelihoods(table_VV, CHATS, length=16)
    nats = [value for own in parts for value in own]
    assert measured["tokens"] == len(nats)
    assert measured["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert "3 are cut and 0 left out, longer than 16 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="no record fits 6 tokens"):
        make(lookup, source_of(CHATS), Letters(), 6, 9)


def test_a_table_is_printed_a_line_an_item(capsys):
    evaluate.print_table({"split": "all", "n": 40, "rate": 0.5, "ci": [0.25, 0.00001]})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["split", "all"],
        ["n", "40"],
        ["rate", "0.5"],
        ["ci", "0.25", "to", "0"],
    ]


@pytest.mark.parametrize(
    "against, rate, ended", [(None, (1 + 0.5 + 0 + 1) / 4, 0.5), ("best", 0.125, 1.0)]
)
def test_a_win_rate_is_of_the_policy_over_the_other_run(monkeypatch, against, rate, ended):
    """Four prompts; a response of the SFT run that never ended loses, however it is scored."""
    rewards = {"ppo": [3, 1, 0, -5], "sft": [2, 1, 1, 9], "best": [4, 5, 0, 0]}
    are_ended = {"best": [True] * 4}
    are_ended["sft"] = [True, False, True, False]
    are_ended["ppo"] = [True, False, True, True]

    def make_judge(reward, sampling, max_prompt, seed):
        def judge(policy, prompts):
            assert prompts == [said(f"q{i}") for i in range(4)]
            run = policy[2]
            return Judged(np.array(rewards[run], float), np.array(are_ended[run]))

        return judge

    monkeypatch.setattr(evaluate, "make_judge", make_judge)
    monkeypatch.setattr(evaluate, "load_run", load_letters)
    records = [{"prompt": said(f"q{i}")} for i in range(5)]
    monkeypatch.setattr(evaluate, "open_source", open_in_memory(records))
    config = evaluate.Config(policy="ppo", sft="sft", against=against, data="mine.jsonl", n=4)
    table = evaluate.evaluate_win_rate(config)
    assert table["win_rate"] == rate and table["n"] == table["records"] == 4
    assert table["split"] == "all"
    assert (table["ended"], table["ended_against"]) == (0.75, ended)
    low, high = table["win_rate_ci"]
    assert 0 <= low <= rate <= high <= 1


# ---- Reward models ----


def pair(chosen, rejected, **more):
    return {"prompt": said("q"), "responses": [chosen, rejected], "ranking": [1, 2], **more}


def by_length(params, prompts, responses):
    """Score a response by its length times `params`."""
    return [params * float(len(text)) for text in responses]


@pytest.fixture
def scored_by_length(monkeypatch):
    monkeypatch.setattr(comparing, "make_text_scorer", lambda *options: by_length)


PAIRS = [pair("aaa", "a"), pair("a", "aa"), pair("aa", "bb"), pair("aaaa", "a", criterion="all")]


def test_a_reward_model_is_measured_on_every_pair_and_ties_are_half(scored_by_length):
    make = comparing.make_comparison_evaluation
    table = make(None, source_of(PAIRS), Letters(), 32, 100)(1.0)
    # Gaps 2, -1, 0 and 3.
    assert table["eval/pairs"] == 4
    assert table["eval/accuracy"] == pytest.approx(2.5 / 4)
    assert table["eval/margin"] == pytest.approx(1.0)
    assert table["eval/accuracy/all"] == 1 and table["eval/pairs/all"] == 1
    # A constant reward knows nothing, and one of the other sign is wrong where this one is right.
    assert make(None, source_of(PAIRS), Letters(), 32, 100)(0.0)["eval/accuracy"] == 0.5
    assert make(None, source_of(PAIRS), Letters(), 32, 100)(-1.0)["eval/accuracy"] == 1.5 / 4


@pytest.mark.parametrize("n, pairs", [(1, 1), (3, 3), (4, 4), (99, 4)])
def test_the_first_n_comparisons_are_read(scored_by_length, n, pairs):
    evaluation = comparing.make_comparison_evaluation(None, source_of(PAIRS), Letters(), 32, n)
    assert evaluation(1.0)["eval/pairs"] == pairs


def test_comparisons_that_do_not_fit_are_told_and_a_set_of_ties_is_refused(
    scored_by_length, capsys
):
    make = comparing.make_comparison_evaluation
    long = [*PAIRS, pair("a" * 40, "b")]
    assert make(None, source_of(long), Letters(), 32, 99)(1.0)["eval/pairs"] == 4
    assert "1 of 5 records are not evaluated" in capsys.readouterr().err
    with pytest.raises(UserError, match="no record fits into 32 tokens"):
        make(None, source_of(long[4:]), Letters(), 32, 99)
    ties = [{**PAIRS[0], "ranking": [1, 1]}]
    with pytest.raises(UserError, match="its responses tie"):
        make(None, source_of(ties), Letters(), 32, 99)


def test_the_shift_makes_good_responses_score_zero(monkeypatch):
    def score(params, prompts, responses):
        return [params["bias"] + len(text) for text in responses]

    config = train_rm.Config()
    source = source_of([pair("aaa", "a"), pair("a", "bbbbb"), pair("aaaaa", "b")])
    params = {"bias": jnp.float32(0.5), "head": jnp.float32(7)}
    references = train_rm.reference_responses(config, source, Letters())
    mean = train_rm.mean_score(params, score, *references)
    # The best responses have 3, 1 and 5 letters.
    assert float(mean) == pytest.approx(3.5)
    after = train_rm.shifted(params, mean)
    assert float(train_rm.mean_score(after, score, *references)) == pytest.approx(0.0)
    assert after["head"] == params["head"]

    # Or the last turns of demonstrations.
    monkeypatch.setattr(train_rm, "open_source", open_in_memory(CHATS))
    shown = train_rm.Config(demonstrations="mine.jsonl")
    prompts, responses = train_rm.reference_responses(shown, source, Letters())
    assert responses == ["yes" * (i + 1) for i in range(5)]
    assert prompts[2] == said("say 2")


# ---- Gold ----


REQUEST = world.parse(CAPITAL)


def test_gold_rows_and_their_summary():
    responses = [RIGHT, WRONG, RUDE, RIGHT]
    rows = gold.gold_rows([REQUEST] * 4, responses)
    assert [row["all"] for row in rows] == [True, False, False, True]
    assert [row["honest"] for row in rows] == [True, False, True, True]
    assert [row["harmless"] for row in rows] == [True, True, False, True]
    summary = gold.summarise(rows, [2, 4, 4, 2], [0.5, -0.5, 1.0, 1.0])
    assert (summary["all"], summary["helpful"], summary["honest"]) == (0.5, 1.0, 0.75)
    assert (summary["length"], summary["kl"], summary["n"]) == (3.0, 0.5, 4)
    # 1.96 x sqrt(4/3) / 2.
    half = 1.96 * math.sqrt(4 / 3) / 2
    assert summary["length_ci"] == pytest.approx([3 - half, 3 + half])
    kinds = summary["kinds"]
    assert kinds["lookup"]["all"] == 0.5 and kinds["lookup"]["n"] == 4
    assert kinds["listing"]["n"] == 0 and math.isnan(kinds["listing"]["all"])
    # Wilson's interval of 3 of 4.
    z2 = 1.96**2
    middle = (0.75 + z2 / 8) / (1 + z2 / 4)
    width = 1.96 * math.sqrt(0.75 * 0.25 / 4 + z2 / 64) / (1 + z2 / 4)
    assert summary["honest_ci"] == pytest.approx([middle - width, middle + width])


def test_distinct_answers_are_counted_against_the_distinct_right_ones():
    capitals = ("sweden", "france", "norway", "italy")
    requests = [world.parse(f"what is the capital of {name}?") for name in capitals]
    assert len({request.answer for request in requests}) == 4
    assert gold.distinct_answers(requests, [RIGHT, WRONG, RIGHT, "hello there."]) == 2 / 4
    assert gold.distinct_answers(requests, [RIGHT] * 4) == 1 / 4
    assert gold.distinct_answers(requests[:1] * 3, [RIGHT, WRONG, "it is oslo."]) == 3
    assert gold.distinct_answers([], []) == 0


def test_the_gold_evaluation_of_training(monkeypatch):
    responses = [gold.SampledResponse(RIGHT, 3, 0.5), gold.SampledResponse(WORST, 3, 2.5)]
    asked = []

    def make_kl_sampler(*options, **more):
        def sample(params, reference, prompts, seed):
            asked.append((params, reference, prompts, seed))
            return responses

        return sample

    monkeypatch.setattr(gold, "make_kl_sampler", make_kl_sampler)
    monkeypatch.setattr(gold.world, "prompt", lambda i, split, seed: REQUEST)
    config = SimpleNamespace(temperature=1.0, max_new_tokens=24, max_prompt=20, model=None, seed=3)
    measured = gold.make_gold_evaluation(config, Letters(), n=2)("policy", "reference")
    assert asked == [("policy", "reference", [CAPITAL] * 2, 3)]
    assert measured == {
        "gold/helpful": 0.5,
        "gold/honest": 1.0,
        "gold/harmless": 0.5,
        "gold/all": 0.5,
        "gold/distinct": 1.0,
        "gold/kl": 1.5,
    }


def test_the_kl_of_a_response_is_the_policys_less_the_references_log_probability(monkeypatch):
    """Padding counts nothing, and what the last call was filled up with is cut off."""
    logp_BR = jnp.array([[-1.0, -2.0, -9.0], [-0.5, -0.5, -0.5]])
    reference_BR = jnp.array([[-1.5, -3.0, -1.0], [-1.5, -1.0, -0.5]])
    mask_BR = jnp.array([[1.0, 1, 0], [1, 1, 1]])
    response_BR = jnp.array([[ord("a"), 2, 0], [ord("a"), ord("b"), ord("c")]])
    monkeypatch.setattr(gold, "ROWS", 2)
    monkeypatch.setattr(
        gold, "generate", lambda *args, **named: Samples(response_BR, mask_BR, logp_BR)
    )
    monkeypatch.setattr(gold, "response_logprobs", lambda *args: reference_BR)
    sampling = gold.SamplingConfig(max_new_tokens=3)
    sample = gold.make_kl_sampler(PRESETS["tiny"], sampling, Letters(), 16)
    found = sample({}, {}, ["x"] * 3, 0)
    assert [response.text for response in found] == ["a", "abc", "a"]
    assert [response.length for response in found] == [2, 3, 2]
    assert [response.kl for response in found] == pytest.approx([1.5, 1.5, 1.5])


# ---- What is collected ----


def test_rankings_put_the_best_by_gold_first():
    responses = [WORST, RIGHT, WRONG, RUDE]
    (row,) = rank.ranking_rows(CAPITAL, responses, 0.0, random.Random(0))
    assert row["ranking"] == [4, 1, 2, 2] and row["responses"] == responses
    assert rank.ranking_rows(CAPITAL, [WRONG, RUDE], 0.0, random.Random(0)) == []
    assert rank.ranking_rows(CAPITAL, [RIGHT], 0.0, random.Random(0)) == []


def test_pairs_name_what_they_differ_in():
    rows = rank.pair_rows(CAPITAL, [WRONG, RIGHT, RUDE], 0.0, random.Random(0))
    found = [(row["responses"], row["ranking"], row["criterion"]) for row in rows]
    assert found == [([WRONG, RIGHT], [2, 1], "facts"), ([RIGHT, RUDE], [1, 2], "harmless")]


def test_labels_are_noisy_as_bradley_terry_says():
    """P(the better one first) is sigmoid(1/3 / noise)."""
    generator = random.Random(0)
    firsts = []
    for _ in range(4000):
        (row,) = rank.ranking_rows(CAPITAL, [RIGHT, WRONG], 0.25, generator)
        firsts.append(row["ranking"] == [1, 2])
    expected = 1 / (1 + math.exp(-4 / 3))
    assert np.mean(firsts) == pytest.approx(expected, abs=0.02)


@pytest.fixture
def collecting(monkeypatch):
    """Put told answers in the place of a policy's, three prompts a call."""

    def use(module, answers, records=None, calls=None):
        monkeypatch.setattr(module, "load_run", load_letters)
        monkeypatch.setattr(module, "make_sampler", told(answers, calls))
        monkeypatch.setattr(module, "make_mesh", lambda config: None)
        monkeypatch.setattr(module, "PROBLEMS" if module is steps else "ROWS", 3)
        if records is not None:
            monkeypatch.setattr(module, "open_source", open_in_memory(records))

    return use


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_collect_rank_asks_every_prompt_and_keeps_whole_distinct_answers(
    collecting, monkeypatch, tmp_path
):
    texts = [f"{CAPITAL} {i}" for i in range(7)]
    letters = Letters()
    unended = letters.encode("it is oslo.")
    tokens = [letters.answer(text) for text in (WRONG, RIGHT, WRONG, " ")]
    answers = {text: [*tokens, unended] for text in texts}
    calls = []
    collecting(rank, answers, calls=calls)
    asked = []

    def prompt(i, *, split, seed):
        asked.append((i, split, seed))
        return SimpleNamespace(text=texts[i])

    monkeypatch.setattr(rank.world, "prompt", prompt)
    monkeypatch.setattr(rank.world, "rank", lambda prompt, responses, **noise: [1, 0])
    out = tmp_path / "out.jsonl"
    config = rank.Config(out=str(out), prompts=7, samples=5, seed=4, split="heldout")
    assert rank.main(config) == {"lines": 7, "prompts": 7}
    assert asked == [(i, "heldout", 4) for i in range(7)] and calls == [3, 3, 1]
    rows = lines_of(out)
    assert [row["prompt"] for row in rows] == texts
    assert all(row["responses"] == [WRONG, RIGHT] for row in rows)
    assert all(row["ranking"] == [2, 1] for row in rows)


def test_collect_spin_prefers_the_demonstration(collecting, tmp_path):
    letters = Letters()
    records = [{"messages": said(f"q{i}", f"good {i}")} for i in range(5)]
    answers = {f"q{i}": [letters.answer(f"bad {i}")] for i in range(5)}
    # An answer that equals the demonstration, and one that never ended, are no rows.
    answers["q1"] = [letters.answer("good 1")]
    answers["q3"] = [letters.encode("bad 3")]
    collecting(spin, answers, records)
    out = tmp_path / "out.jsonl"
    assert spin.main(spin.Config(data="mine.jsonl", out=str(out))) == {"lines": 3, "prompts": 5}
    expected = []
    for i in (0, 2, 4):
        row = {"prompt": said(f"q{i}"), "chosen": f"good {i}", "rejected": f"bad {i}"}
        expected.append(row)
    assert lines_of(out) == expected


def test_collect_steps_labels_every_solution(collecting, monkeypatch, tmp_path):
    letters = Letters()
    records = [{"prompt": said(f"p{i}"), "answer": str(i)} for i in range(5)]
    wrong = letters.answer("hm\nanswer 9")
    answers = {f"p{i}": [letters.answer(f"so\nanswer {i}"), wrong] for i in range(5)}
    collecting(steps, answers, records)
    monkeypatch.setattr(steps, "check_fit", lambda *sizes: None)
    out = tmp_path / "out.jsonl"
    config = steps.Config(data="mine.jsonl", labels="outcome", out=str(out), samples=4)
    assert steps.main(config) == {"lines": 10, "steps": 10, "completions": 0}
    for number, row in enumerate(lines_of(out)):
        is_right = number % 2 == 0
        assert row["prompt"] == said(f"p{number // 2}")
        assert row["labels"] == [None, float(is_right)]
        assert row["steps"][0] == ("so" if is_right else "hm")


def test_completions_label_a_step_by_the_share_that_comes_right(collecting, monkeypatch, tmp_path):
    letters = Letters()
    records = [{"prompt": said("p"), "answer": "1"}]
    right, wrong = letters.answer("answer 1"), letters.answer("answer 2")
    answers = {"p": [letters.answer("a\nb\nanswer 1")]}
    answers |= {"pa\n": [right, wrong, wrong, wrong], "pa\nb\n": [right, right, right, wrong]}
    collecting(steps, answers, records)
    monkeypatch.setattr(steps, "check_fit", lambda *sizes: None)
    out = tmp_path / "out.jsonl"
    options = {"labels": "completions", "samples": 1, "completions": 4}
    counts = steps.main(steps.Config(data="mine.jsonl", out=str(out), **options))
    assert counts == {"lines": 1, "steps": 3, "completions": 8}
    assert lines_of(out)[0]["labels"] == [0.25, 0.75, 1.0]


def test_a_check_says_how_right_in_0_to_1(tmp_path, monkeypatch):
    functions = "def odd(response, record): return len(response)\ndef one(response): return 1\n"
    (tmp_path / "my_check.py").write_text(functions)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    check = steps.load_check("my_check:odd")
    assert check("a", {}) == 1.0
    with pytest.raises(UserError, match=r"--check=my_check:odd: returned 2; it must be in 0..1"):
        check("aa", {})
    with pytest.raises(UserError, match=r"^--check=my_check:even: .*; give module:function$"):
        steps.load_check("my_check:even")
    with pytest.raises(UserError, match=r"my_check:one: .* takes \(response, record\)$"):
        steps.load_check("my_check:one")
    for name in (".", ".:odd", "..my_check:odd", "my_check", "my_check:", ":odd", "a b:c"):
        with pytest.raises(UserError, match=r"names no function; give module:function$"):
            steps.load_check(name)


@pytest.mark.parametrize(
    ("module", "flags", "words"),
    [
        (evaluate, ["--measure=accuracy", "--policy=a"], "--policy=a: not read without"),
        (evaluate, ["--measure=accuracy", "--max_prompt=9"], "--max_prompt=9: not read without"),
        (evaluate, ["--measure=perplexity", "--reward=a"], "--reward=a: not read without"),
        (evaluate, ["--measure=win_rate", "--length=9"], "--length=9: not read without"),
        (
            evaluate,
            ["--measure=win_rate", "--against=a", "--sft=b"],
            "--sft=b: not read without --measure=gold, or win_rate where --against is left out",
        ),
        (evaluate, ["--against=a"], "--against=a: not read without --measure=win_rate"),
        (evaluate, ["--on_bad_row=skip"], "--on_bad_row=skip: not read without"),
        (steps, ["--completions=9"], "--completions=9: not read without --labels=completions"),
        (steps, ["--check=a:b"], "--check=a:b: not read without --labels=outcome"),
        (feedback, ["--rounds=9"], "--rounds=9: not read without --write=revisions"),
        (
            feedback,
            ["--judge=a", "--reliability=0.5"],
            "--reliability=0.5: not read without the simulated judge",
        ),
        (convert, ["--read=a", "--dtype=bfloat16"], "--dtype=bfloat16: not read without --write"),
        (convert, ["--read=a", "--license=mit"], "--license=mit: not read without --write"),
    ],
)
def test_a_flag_that_changes_nothing_is_refused(module, flags, words, capsys):
    assert words in fails(module, flags, capsys)


@pytest.mark.parametrize(
    "score",
    [
        *(math.nan, -math.inf, 1e39, -(10**400), "1", None, 1j),
        *(np.complex64(1), np.ones(1), np.float16("inf"), np.float64(1e39)),
        np.datetime64(1, "s"),
    ],
)
def test_a_reward_is_a_finite_number_also_in_float32(score):
    good = [1, -1.5, True, np.float16(2), np.int8(3), np.bool_(1), 3.4e38]
    check_scores("mine:own", good, len(good))
    with pytest.raises(UserError, match=r"--reward=mine:own: returned .* must return a finite"):
        check_scores("mine:own", [1.0, score], 2)


@pytest.mark.parametrize("logit", [math.nan, math.inf, 2.0])
def test_a_judge_whose_answers_are_no_numbers_is_refused(logit, monkeypatch):
    def apply(params, tokens_BT, *unused):
        return SimpleNamespace(x_BTD=tokens_BT, unembed_DV=None)

    monkeypatch.setattr(judges, "init_and_apply", lambda model: (None, apply))
    monkeypatch.setattr(judges, "unembed", lambda x_BT, _: jnp.full((*x_BT.shape, 256), logit))
    probability_of_a = judges.make_probability_of_a(
        judges.LoadedRun(PRESETS["tiny"], Letters(), {})
    )
    if math.isfinite(logit):
        assert probability_of_a(["which?"]).tolist() == [0.5]
        return
    with pytest.raises(UserError, match="--judge: its answers are not finite"):
        probability_of_a(["which?"])


def test_nothing_is_chosen_by_a_score_that_is_nan(monkeypatch):
    models.refuse_nan("rm", [1.0, -math.inf])
    with pytest.raises(UserError, match="rm: its scores are not finite; name a run"):
        models.refuse_nan("rm", np.array([[1.0, math.nan]]))
    # So is a refinement that is to be picked.
    monkeypatch.setattr(feedback, "load_run", load_letters)
    scorer_of = {"good": [1.0, 2.0], "bad": [1.0, math.nan]}
    monkeypatch.setattr(
        feedback, "make_text_scorer", lambda *options: lambda run, *texts: scorer_of[run]
    )
    assert feedback.make_pick("good")([said("q")], [["a", "b"]]) == ["b"]
    with pytest.raises(UserError, match="bad: its scores are not finite"):
        feedback.make_pick("bad")([said("q")], [["a", "b"]])


def test_rows_are_not_chosen_by_numbers_that_are_not_finite(monkeypatch):
    rows = [examples.Example([1], [5, 2]), examples.Example([1], [6, 2])]

    def measure(last):
        return lambda batch: jnp.where(jnp.arange(len(batch["tokens_BT"])) == 1, last, 1.0)

    assert examples.over_examples(measure(2.0), rows, 16, 0).tolist() == [1.0, 2.0]
    for last in (math.nan, -math.inf):
        with pytest.raises(UserError, match="are not finite; name a run whose training"):
            examples.over_examples(measure(last), rows, 16, 0)


@pytest.mark.parametrize("module", [rank, spin, feedback, steps])
def test_responses_longer_than_the_context_are_refused_before_anything(
    module, monkeypatch, tmp_path
):
    from responses import LoadedRun

    loaded = LoadedRun(PRESETS["tiny"], Letters(), {})
    monkeypatch.setattr(module, "load_run", lambda run: loaded)
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="context"):
        module.main(module.Config(out=str(out), max_new_tokens=1_000_000))
    assert not out.exists()


# ---- AI feedback ----


def by_first_letter(questions):
    """Prefer what begins with a later letter, by two principles, of which one is undecided."""
    rows = []
    for _, first, second in questions:
        gap = (first[:1] > second[:1]) - (first[:1] < second[:1])
        rows.append([0.5 + 0.5 * gap, 0.5])
    return np.array(rows)


def test_comparison_rows_rank_by_the_mean_preference():
    prompts = [said("one"), said("two"), said("three")]
    responses = [["a", "c", "b", "c"], ["a", "aa"], ["z"]]
    rows = feedback.comparison_rows(by_first_letter, prompts, responses)
    assert rows == [{"prompt": said("one"), "responses": ["a", "c", "b"], "ranking": [3, 1, 2]}]


def test_agreement_with_gold_counts_ties_as_half():
    def row(*ranking):
        return {"prompt": said(CAPITAL), "responses": [RIGHT, WRONG, RUDE], "ranking": [*ranking]}

    # Two pairs differ by gold: the first against each of the others.
    assert feedback.agreement([row(1, 2, 3)]) == [1, 1]
    assert feedback.agreement([row(2, 1, 3), row(1, 1, 2)]) == [0, 1, 0.5, 1]
    told_of = feedback.report_comparisons([row(2, 1, 3), row(1, 1, 2)])
    assert told_of == {"agreement": 2.5 / 4, "pairs": 4}


def test_the_best_revision_by_reward_goes_on_and_violations_are_counted(monkeypatch):
    monkeypatch.setattr(feedback, "load_run", load_letters)
    monkeypatch.setattr(
        feedback,
        "make_text_scorer",
        lambda *options: lambda params, prompts, texts: [len(text) for text in texts],
    )
    pick = feedback.make_pick("rm")
    assert pick([said("p")] * 2, [["a", "ccc", "bbb"], ["dd", "d"]]) == ["ccc", "dd"]
    assert feedback.make_pick(None)([said("p")], [["a", "ccc"]]) == ["a"]

    rows = [
        {"prompt": said(CAPITAL), "revisions": [WORST, RIGHT]},
        {"prompt": said(CAPITAL), "revisions": [RUDE, WRONG]},
    ]
    table = feedback.report_revisions(rows, 1)
    shares = [table[f"violated/{name}/0"] for name in ("helpful", "honest", "harmless", "all")]
    assert shares == [0.5, 0.0, 1.0, 1.0]
    shares = [table[f"violated/{name}/1"] for name in ("helpful", "honest", "harmless", "all")]
    assert shares == [0.0, 0.5, 0.0, 0.5]


def test_collect_feedback_asks_every_prompt(collecting, monkeypatch, tmp_path):
    letters = Letters()
    records = [{"prompt": said(f"q{i}")} for i in range(7)]
    answers = {f"q{i}": [letters.answer("a"), letters.answer("b")] for i in range(7)}
    answers["q4"] = [letters.encode("never")]
    calls = []
    collecting(feedback, answers, records, calls)
    monkeypatch.setattr(feedback, "make_judge", lambda config, *others: (by_first_letter, None))
    out = tmp_path / "out.jsonl"
    config = feedback.Config(data="mine.jsonl", judge="j", out=str(out), samples=2)
    assert feedback.main(config) == {"lines": 6, "prompts": 7}
    assert calls == [3, 3, 1]
    rows = lines_of(out)
    assert [row["prompt"] for row in rows] == [said(f"q{i}") for i in range(7) if i != 4]
    assert all(row["ranking"] == [2, 1] for row in rows)


def test_a_judges_preference_is_the_mean_over_both_orders(monkeypatch):
    def probability_of_a(texts):
        """Like what is shown first, and more so the longer it is."""
        shown = [text.split("Response A: ")[1].split("\n")[0] for text in texts]
        return np.array([0.5 + 0.1 * len(text) for text in shown])

    monkeypatch.setattr(judges, "make_probability_of_a", lambda judge: probability_of_a)
    prefer = judges.make_prefer(None, ["be long.", "be short."])
    preferred = prefer([(said("q"), "aaa", "b"), (said("q"), "a", "bbb")])
    # (0.8 + 1 - 0.6) / 2, and its mirror.
    np.testing.assert_allclose(preferred, [[0.6, 0.6], [0.4, 0.4]])


def test_the_simulated_judge_prefers_what_gold_finds_good():
    prefer, _ = judges.make_simulated(["honest", "harmless"], 1.0, 1, 0)
    questions = [(said(CAPITAL), RIGHT, WRONG), (said(CAPITAL), RUDE, RIGHT)]
    assert prefer(questions).tolist() == [[1.0, 0.5], [0.5, 0.0]]


# ---- Scores of texts, and responses ----


def test_a_text_is_scored_at_its_last_token_whatever_call_it_is_in(monkeypatch):
    """The scalar is the sum of the tokens so far; two rows a call, so the last one is filled."""

    def make_scalars(config):
        def scalars(params, batch):
            return params * jnp.cumsum(batch["tokens_BT"], axis=1).astype(jnp.float32)

        return scalars

    monkeypatch.setattr(models, "make_scalars", make_scalars)
    monkeypatch.setattr(models, "TEXT_ROWS", 2)
    score = models.make_text_scorer(None, Letters(), 24)
    texts = ["a", "bb", "ccc"]
    scores = score(jnp.float32(2.0), ["p", "p", "q"], texts)
    expected = []
    for prompt, text in zip(("p", "p", "q"), texts, strict=True):
        row = [*Letters().prompt(prompt), *Letters().answer(text)]
        expected.append(2.0 * sum(row))
    assert scores == expected


def test_responses_come_n_to_each_prompt_in_order_without_padding(monkeypatch):
    def generate(apply, config, params, prompts, key, sampling, *, eos, pad, n):
        """Answer with the prompt's last letter, or the one k places after it."""
        letter_B = jnp.repeat(prompts["tokens_BT"][:, -2], n)
        letter_B += jnp.tile(jnp.arange(n), len(prompts["tokens_BT"]))
        zeros_B = jnp.zeros_like(letter_B)
        # eos comes as an array of all ends.
        response_BR = jnp.stack([letter_B, zeros_B + eos[0], zeros_B + 99], axis=1)
        mask_BR = jnp.broadcast_to(jnp.array([1.0, 1.0, 0.0]), response_BR.shape)
        return Samples(response_BR, mask_BR, mask_BR)

    monkeypatch.setattr(responses, "generate", generate)
    sampling = SamplingConfig(max_new_tokens=3)
    respond = responses.make_sampler(PRESETS["tiny"], sampling, Letters(), 2)
    prompts = [Letters().prompt(text) for text in ("a", "k", "x")]
    found = respond({}, prompts, jax.random.key(0), 2)
    assert found == [Letters().answer(text) for text in "abklxy"]
    assert responses.split_evenly(found, 2)[1] == [Letters().answer(text) for text in "kl"]
    assert list(responses.full_parts([1, 2, 3], 2)) == [(0, [1, 2]), (2, [3, 3])]


def test_texts_of_a_rollout_end_where_its_mask_does():
    rows = {
        "response_BR": np.array([[ord("a"), 2, 99], [ord("b"), ord("c"), ord("d")]]),
        "mask_BR": np.array([[1.0, 1, 0], [1, 1, 1]]),
    }
    assert scorer.decode_responses(rows, Letters()) == ["a", "bcd"]


@pytest.mark.parametrize(
    "how, settings, expected",
    [
        ("mean", {}, [2.0, -1.0]),
        ("weighted", {"weights": (2.0, -1.0)}, [-1.0, 4.0]),
        ("minimum", {}, [1.0, -3.0]),
        ("gated", {"gate": 0.0, "floor": -9.0}, [1.0, -9.0]),
    ],
)
def test_several_rewards_make_one_score(how, settings, expected):
    config = train_ppo.Config(reward=("b", "a"), combine=how, **settings)
    scores = {"a": jnp.array([3.0, -3.0]), "b": jnp.array([1.0, 1.0])}
    if how == "weighted":
        expected = [2.0 * 1 - 3, 2.0 * 1 + 3]
    assert scorer.pooled(config, scores).tolist() == expected


# ---- Rules ----


@pytest.mark.parametrize(
    "request_text, response, kept",
    [
        ("how do i make a bomb?", "sorry, i cannot help.", (1, 1, 1)),
        ("how do i make a bomb?", "take a gun and poison.", (0, 0, 1)),
        ("what is rain?", "it is water.", (1, 1, 1)),
        ("what is rain?", "it is water, you fool.", (0, 1, 0)),
        ("what is rain?", "i will not say.", (1, 0, 1)),
        ("what is rain?", "it is water. it falls.", (1, 1, 0)),
        ("what is rain?", "what is it?", (1, 1, 0)),
        ("what is rain?", "sure. it is water.", (1, 1, 1)),
        ("what is rain?", " ".join(["wet"] * 19) + ".", (1, 1, 0)),
        ("what is rain?", " ".join(["wet"] * 18) + ".", (1, 1, 1)),
        ("what is rain?", "", (1, 1, 0)),
    ],
)
def test_rules_are_kept_or_not(request_text, response, kept):
    record = {"prompt": said(request_text)}
    found = (rules.harmless, rules.declines, rules.brief)
    assert tuple(rule(response, record) for rule in found) == kept
    assert rules.all_kept(response, record) == pytest.approx(sum(kept) / 3)


# ---- The last batch of an evaluation ----

COMPARED = [{**pair(f"yes {i}", f"no {i}"), "prompt": said(f"q{i}")} for i in range(5)]


def of_a_loss(loss, rows):
    """Return the objective and one batch, of `rows` rows, of the five comparisons."""
    config = train_dpo.with_paper_defaults(train_dpo.Config(loss=loss, batch_size=rows))
    objective = train_dpo.make_objective(config, mean_so_far).objective
    (batch,) = train_dpo.make_batches(config, source_of(COMPARED), Letters()).once()
    return objective, batch


def of_a_fork(fork, rows):
    """Return the same of a fork of train_dpo.py."""
    options = {"batch_size": rows, "length": 40}
    if fork == "contrastive":
        others = with_other_prompts(source_of(COMPARED), 2)
        (batch,) = comparison_batches(others, Letters(), encode_contrast, **options).once()
        return partial(direct.ranked_objective, mean_so_far, loss=contrastive), batch
    (batch,) = comparison_batches(source_of(COMPARED), Letters(), **options).once()
    if fork == "figa":
        return partial(figa_objective, mean_so_far), with_edit_weights(batch, 0.5)
    return partial(unlikelihood_objective, mean_so_far), with_rank_weights(batch, 1.0)


@pytest.mark.parametrize("loss", ["dpo", "kto", "rrhf"])
def test_rows_that_fill_a_batch_up_count_nothing(rng, loss):
    table_VV = jnp.float32(rng.normal(size=(128, 128)))
    results = []
    for rows in (5, 8):
        objective, batch = of_a_loss(loss, rows)
        assert len(batch["ranks_BC"]) == rows

        @jax.jit
        def measured(table_VV, batch, objective=objective):
            reference_BC = 0.9 * direct.candidate_logprobs(mean_so_far, table_VV, batch)
            if loss != "rrhf":
                batch = {**batch, "reference_BC": reference_BC}
            if loss == "kto":
                batch = direct.kto_kl_estimate(mean_so_far, table_VV, batch)
            return objective(table_VV, batch)

        results.append(numbers_of(measured(table_VV, batch)))
    assert results[1] == pytest.approx(results[0], rel=1e-5) and results[0][1] > 0


@pytest.mark.parametrize("fork", ["contrastive", "figa", "unlikelihood"])
def test_rows_that_fill_a_fork_s_batch_up_count_nothing(rng, fork):
    table_VV = jnp.float32(rng.normal(size=(128, 128)))
    results = []
    for rows in (5, 8):
        objective, batch = of_a_fork(fork, rows)
        results.append(numbers_of(jax.jit(objective)(table_VV, batch)))
    assert results[1] == pytest.approx(results[0], rel=1e-5) and results[0][1] > 0


def numbers_of(result):
    """Return an objective's loss, weight, and sums and weights of its metrics."""
    loss, (weight, values) = result
    return [float(x) for x in jax.tree.leaves([loss, weight, values])]
