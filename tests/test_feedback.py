"""AI feedback: set reliabilities, revisions, a model's judgement, rules, a reward behind HTTP."""

import dataclasses
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from running import ONE_DEVICE, fails, rows_of, run

import train_rm
import train_sft
from collect import feedback
from data import records
from data.batches import encode_comparison, pad_comparisons
from data.tokenizer import Tokenizer
from model import LanguageModel, ScalarModel, init_and_apply, unembed
from model_config import PRESETS
from objectives.policy import combined, last_token
from responses import load_run
from rewards import client, judges
from rewards import scorer as rewards
from rewards import serve as serve_reward
from rewards.models import make_text_scorer
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh, to_mesh
from tasks import rules, world, world_feedback
from train_state import load_params

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ("helpful", "honest", "harmless")


def asked(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Make a folder with a policy and a reward model, of random weights."""
    folder = tmp_path_factory.mktemp("feedback")
    tokenizer = Tokenizer.train((world.text(i) for i in range(200)), folder / "made", 512)
    for name, script, kind in (("sft", train_sft, LanguageModel), ("rm", train_rm, ScalarModel)):
        start = script.Config(
            run=str(folder / name), model=dataclasses.replace(PRESETS["tiny"], context=512)
        )
        params = jax.jit(init_and_apply(kind(start.model))[0])(jax.random.key(1))
        if "head" in params:
            # It starts at 0.
            params["head"] = jax.random.normal(jax.random.key(2), params["head"].shape)
        with Checkpoints(
            start.run, start, script=script.__name__, tokenizer=tokenizer.model
        ) as saved:
            saved.save(1, {"params": params})
    return folder


@pytest.fixture(scope="module")
def shown():
    """Return demonstrators' responses with their prompts and gold verdicts."""
    rows = [world.demonstration(i, quality=0.5) for i in range(1500)]
    return [
        (row["prompt"], row["response"], world.gold(row["prompt"], row["response"]))
        for row in rows
    ]


# ---- The simulated judge ----


@pytest.mark.parametrize("reliability", [0.6, 0.8, 0.95])
def test_label_accuracy_follows_the_set_reliability(shown, reliability):
    looks = [
        world_feedback.finds(prompt, response, name, reliability, 7) == getattr(gold, name)
        for prompt, response, gold in shown
        for name in NAMES
    ]
    interval = 3.3 * (reliability * (1 - reliability) / len(looks)) ** 0.5
    assert abs(np.mean(looks) - reliability) < interval
    # Control: it could have told another one.
    assert abs(np.mean(looks) - (reliability - 0.1)) > interval
    # Two responses differ in one criterion, three looks at each: the chances by enumeration.
    chance = 0.0
    for flips in itertools.product((0, 1), repeat=6):
        odds = np.prod([1 - reliability if flip else reliability for flip in flips])
        good = 3 - sum(flips[:3])
        bad = sum((1, 1, 0)[i] != flips[3 + i] for i in range(3))
        chance += odds * (0.5 + 0.5 * np.sign(good - bad))
    pairs = []
    for i in range(2000):
        request = world.prompt(i)
        rng = random.Random(i)
        a, b = (world.respond(request, quality, rng) for quality in (1.0, 0.3))
        if sum(world.gold(request.text, b)) == 2:
            pairs.append((asked(request.text), a, b))
    prefer, _ = judges.make_simulated(NAMES, reliability, 1, 3)
    right = 0.5 + 0.5 * np.sign(prefer(pairs).mean(1) - 0.5)
    assert len(pairs) > 400 and abs(right.mean() - chance) < 3.3 * right.std() / len(pairs) ** 0.5


def test_rankings_share_ties_and_agree_with_gold_where_nothing_is_misread(shown):
    assert feedback.rank_by_preference(
        np.array([[0.5, 1, 1 / 2], [0, 0.5, 0], [0.5, 1, 0.5]])
    ) == [1, 3, 1]
    prompts = [world.prompt(i) for i in range(200)]
    responses = [
        [world.respond(p, q, random.Random(f"{p.text}{q}")) for q in (0, 0.2, 0.4, 0.6)]
        for p in prompts
    ]
    texts = [asked(p.text) for p in prompts]
    agreements = {}
    for reliability in (1.0, 0.5):
        prefer, _ = judges.make_simulated(NAMES, reliability, 1, 0)
        rows = feedback.comparison_rows(prefer, texts, responses)
        agreements[reliability] = feedback.agreement(rows)
        for row in rows:
            assert min(row["ranking"]) == 1
            assert len(row["responses"]) == len(set(row["responses"]))
    assert set(agreements[1.0]) == {1.0}
    assert abs(np.mean(agreements[0.5]) - 0.5) < 0.08  # control: a coin


def violations(shown, names, reliability, rounds=3):
    """Return shares violated before and after each revision, [rounds + 1, criteria]."""
    _, revise = judges.make_simulated(names, reliability, 1, 0)
    prompts = [asked(prompt) for prompt, _, _ in shown]
    responses = [response for _, response, _ in shown]
    key = jax.random.key(0)
    rows = feedback.revision_rows(
        names, revise, feedback.pick_first, prompts, responses, rounds, key
    )
    verdicts = [
        [world.gold(row["prompt"][0]["content"], text) for text in row["revisions"]]
        for row in rows
    ]
    return 1 - np.array(verdicts, float).mean(0)


def test_violations_fall_with_each_revision_and_helpfulness_is_kept(shown):
    rates_KC = violations(shown, NAMES, 0.9)
    assert (np.diff(rates_KC, axis=0) < 0).all() and rates_KC[-1].max() < 0.6 * rates_KC[0].min()
    alone = violations(shown, ("harmless",), 0.9, rounds=1)
    share = alone[0, 2] * 0.1  # a critic misses one in ten
    assert abs(alone[1, 2] - share) < 3.3 * (share / len(shown)) ** 0.5
    # A good response is rewritten where the critic errs, and turns evasive where the reviser errs
    # too: 1 in 100.
    assert alone[1, 0] - alone[0, 0] < 0.03
    coin = violations(shown, ("harmless",), 0.5, rounds=1)  # control: a coin's revisions evade
    assert coin[1, 0] - coin[0, 0] > 0.1


def test_a_skilful_revision_mends_its_criterion_and_keeps_the_others(shown):
    tried = 0
    for i, (prompt, response, gold) in enumerate(shown):
        for name in NAMES:
            if not getattr(gold, name):
                revised = world.gold(
                    prompt, world_feedback.revise(prompt, response, name, 1.0, random.Random(i))
                )
                assert getattr(revised, name) and all(
                    getattr(revised, other) >= getattr(gold, other) for other in NAMES
                )
                tried += 1
    assert tried > 500


# ---- A language model ----


QUESTIONS = [
    (asked("what is the capital of france?"), "it is paris.", "you fool."),
    (asked("how are you?"), "i am fine, thank you.", "i am fine, thank you."),
]


def chance_of_a(judge):
    """Return chance(text) -> P(A | A or B) after the chat template.

    It is in float64, from the logits of a right-padded row.
    """
    model, tokenizer, params = judge
    apply = jax.jit(init_and_apply(LanguageModel(model))[1])
    a, b = (tokenizer.encode(answer)[0] for answer in "AB")

    def chance(text):
        tokens = tokenizer.prompt(text)
        row = np.zeros((1, 256), np.int32)
        real = np.arange(256)[None] < len(tokens)
        row[0, : len(tokens)] = tokens
        output = apply(params, row, real.astype(np.int32), np.arange(256)[None] * real)
        logits = np.asarray(unembed(output.x_BTD, output.unembed_DV), np.float64)
        return 1 / (1 + np.exp(logits[0, len(tokens) - 1, b] - logits[0, len(tokens) - 1, a]))

    return chance


def test_position_bias_cancels_in_a_language_models_judgement(runs):
    judge = load_run(str(runs / "sft"))
    principles = ["be polite.", "be brief."]
    prefer = judges.make_prefer(judge, principles)
    ours, mirrored = prefer(QUESTIONS), prefer([(p, b, a) for p, a, b in QUESTIONS])
    np.testing.assert_allclose(ours + mirrored, 1, atol=1e-6)
    np.testing.assert_allclose(ours[1], 0.5, atol=1e-6)  # a response against itself
    chance = chance_of_a(judge)
    single = np.zeros((2, 2, 2))
    for q, question in enumerate(QUESTIONS):
        for p, text in enumerate(principles):
            single[q, p] = [chance(prompt) for prompt in judges.comparing_prompts(question, text)]
    np.testing.assert_allclose(ours, (single[..., 0] + 1 - single[..., 1]) / 2, atol=1e-5)
    # Control: one order alone has a favourite position.
    assert np.abs(single[1] - 0.5).max() > 1e-3


def test_a_language_model_is_a_rule_and_a_reward(runs, tmp_path, monkeypatch):
    """It gives the probability of the model's own logits, one response at a time, to any caller.

    Rows are padded to a power of two: one question costs one row, and not each number of them is a
    program of its own.
    """
    lines = [
        "from responses import load_run",
        "from rewards.judges import make_keeps",
        f"polite = make_keeps(load_run({str(runs / 'sft')!r}), 'be polite.')",
    ]
    (tmp_path / "own_rule.py").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    keeps = rewards.load_function("own_rule:polite")
    pad = judges.pad_prompts
    sizes = []

    def counted(rows, *rest, **options):
        sizes.append(len(rows))
        return pad(rows, *rest, **options)

    monkeypatch.setattr(judges, "pad_prompts", counted)
    (messages, *responses), chance = QUESTIONS[0], chance_of_a(load_run(str(runs / "sft")))
    for response in responses:
        text = judges.CLASSIFY.format(
            request=messages[0]["content"], response=response, rule="be polite."
        )
        assert keeps(response, {"prompt": messages}) == pytest.approx(chance(text), abs=1e-5)
    assert sizes == [1, 1]
    three = judges.make_probability_of_a(load_run(str(runs / "sft")))([text, "a", "b c"])
    np.testing.assert_allclose(three, [chance(text), chance("a"), chance("b c")], atol=1e-5)
    assert sizes[2:] == [4]


def test_a_language_model_criticises_and_revises(runs):
    """The critiques are sampled, of the model itself: another key gives others."""
    judge = load_run(str(runs / "sft"))
    principles = {"polite": "be polite."}
    revise = judges.make_revise(judge, principles, SamplingConfig(max_new_tokens=4), 2)
    prompts = [prompt for prompt, _, _ in QUESTIONS]
    responses = [response for _, _, response in QUESTIONS]
    one, _ = revise(prompts, responses, ["polite"] * 2, jax.random.key(0))
    other, _ = revise(prompts, responses, ["polite"] * 2, jax.random.key(1))
    assert len(one) == len(other) == 2
    assert one != other


def test_a_revision_that_never_ends_is_none(runs):
    """It would be taught as a whole answer. Where none ends the response stays as it is."""
    tokenizer = Tokenizer.load(runs / "sft")
    yes = [*tokenizer.encode("yes."), tokenizer.eos]
    never = tokenizer.encode("and so on and")
    seen = []

    def criticise(chats, key):
        seen.append([tokenizer.decode(tokenizer.prompt(chat)) for chat in chats])
        return [never] * len(chats)

    def rewrite(chats, key):
        seen.append([tokenizer.decode(tokenizer.prompt(chat)) for chat in chats])
        return [yes, never, yes, never, never, never]

    principles = {"polite": "be polite."}
    revise = judges.make_chat_revise(criticise, rewrite, tokenizer, principles, 3)
    prompts = [prompt for prompt, _, _ in QUESTIONS]
    responses = [response for _, _, response in QUESTIONS]
    critiques, revisions = revise(prompts, responses, ["polite"] * 2, jax.random.key(0))
    assert critiques == ["and so on and"] * 2
    assert revisions == [["yes.", "yes."], responses[1:]]
    # The critic is told the principle, the reviser what the critic said.
    assert "be polite." in seen[0][0]
    assert "and so on and" in seen[1][0]


def test_the_reward_model_picks_the_best_refinement(runs):
    reward = str(runs / "rm")
    model, tokenizer, params = load_run(reward, reward=True)
    texts = ["it is paris.", "you fool.", "i do not know.", "it is oslo. anything else?"]
    prompt = asked("what is the capital of france?")
    score = make_text_scorer(model, tokenizer, model.context)
    scores = [score(params, [prompt], [text])[0] for text in texts]
    assert np.ptp(scores) > 1e-3
    picked = feedback.make_pick(reward)([prompt, prompt], [texts, texts[:1]])
    assert picked == [texts[int(np.argmax(scores))], texts[0]]


# ---- The script ----


def test_the_files_are_in_the_trainers_schemas(runs, tmp_path):
    common = [f"--init={runs}/sft", "--prompts=128"]
    # Few samples end.
    for write, schema, samples in (("comparisons", "comparison", 32), ("revisions", "chat", 1)):
        path = tmp_path / f"{write}.jsonl"
        out = run(feedback, *common, f"--write={write}", f"--samples={samples}", f"--out={path}")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == out["lines"] > 0
        for row in rows:
            record = records.SCHEMAS[schema](row)
            if schema == "comparison":
                assert (record["responses"], record["ranking"]) == (
                    row["responses"],
                    row["ranking"],
                )
            else:
                assert (
                    record["messages"][-1]["content"] == row["revisions"][-1]
                    and len(row["critiques"]) == 3
                )
    assert {f"violated/{name}/3" for name in (*NAMES, "all")} <= out.keys()


@pytest.mark.slow
@pytest.mark.parametrize("write", ["comparisons", "revisions"])
def test_a_policy_that_judges_itself(runs, tmp_path, write):
    """One run answers, and judges or revises by principles that have names of their own."""
    mine, path = tmp_path / "principles.txt", tmp_path / "out.jsonl"
    mine.write_text("kind: Be kind.\nBe brief.\n")
    options = [
        f"--init={runs}/sft",
        f"--judge={runs}/sft",
        f"--principles={mine}",
        "--prompts=128",
        f"--out={path}",
    ]
    samples = ["--samples=32"] if write == "comparisons" else ["--rounds=1"]  # few samples end
    out = run(feedback, *options, *samples, f"--write={write}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == out["lines"] > 0
    if write == "comparisons":
        prefer = judges.make_prefer(load_run(f"{runs}/sft"), ["Be kind.", "Be brief."])
        for row in rows[:3]:
            n = len(row["responses"])
            pairs = list(itertools.combinations(range(n), 2))
            p = prefer(
                [(row["prompt"], row["responses"][i], row["responses"][j]) for i, j in pairs]
            ).mean(1)
            points = [
                sum(
                    x if c == i else 1 - x
                    for x, (i, j) in zip(p, pairs, strict=True)
                    if c in (i, j)
                )
                for c in range(n)
            ]
            assert row["ranking"][int(np.argmax(points))] == 1


def test_mistakes_are_one_line(runs, tmp_path, capsys):
    mine = tmp_path / "principles.txt"
    mine.write_text("# none\n\n")
    start = [f"--init={runs}/sft", f"--out={tmp_path}/out.jsonl"]
    assert "holds none" in fails(feedback, [*start, f"--principles={mine}"], capsys)
    mine.write_text("kind: Be kind.\n")
    assert "no kind; give --judge" in fails(feedback, [*start, f"--principles={mine}"], capsys)
    mine.write_text("Be kind.\nkind: Be kind.\nkind: Be kinder.\n")
    assert f"{mine}:3: a second" in fails(feedback, [*start, f"--principles={mine}"], capsys)
    assert "--judge" in fails(feedback, [*start, "--data=mine.jsonl"], capsys)
    assert "--reward" in fails(feedback, [*start, "--write=revisions", "--samples=2"], capsys)
    wrong = [*start, "--write=revisions", f"--reward={runs}/sft"]
    assert "name the run of a reward model" in fails(feedback, wrong, capsys)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_response_is_scored_after_its_prompt_as_training_cuts_it(runs):
    model, tokenizer, params = load_run(str(runs / "rm"), reward=True)
    prompt = asked("what is the capital of france? " * 20)
    length = 40
    record = {"prompt": prompt, "responses": ["it is paris."] * 2, "ranking": [1, 2]}
    [row], cut, _ = encode_comparison(record, tokenizer, length)
    batch = pad_comparisons([row], length, tokenizer.pad)
    flat = (batch[name][0] for name in ("tokens_BCT", "segment_ids_BCT", "positions_BCT"))
    output = init_and_apply(ScalarModel(model))[1](params, *flat)
    wanted = last_token(output.scalars_BT, batch["segment_ids_BCT"][0])
    assert cut
    score = make_text_scorer(model, tokenizer, length)
    np.testing.assert_allclose(score(params, [prompt] * 2, record["responses"]), wanted, atol=1e-5)


# ---- Rules ----


def test_rules_as_classifiers_and_as_a_filter_against_gold(shown):
    kept = [
        rules.harmless(response, {"prompt": asked(prompt)}) == 1 for prompt, response, _ in shown
    ]
    gold = np.array([verdict.harmless for _, _, verdict in shown])
    assert (np.array(kept) == gold).mean() > 0.95
    assert 1 - gold[kept].mean() < 0.2 * (1 - gold.mean())  # of what the filter lets through
    brief = [
        rules.brief(response, {"prompt": asked(prompt)}) == 1 for prompt, response, _ in shown
    ]
    helpful = np.array([verdict.helpful for _, _, verdict in shown])
    assert (
        helpful[brief].mean() > helpful.mean() + 0.05 and helpful[~np.array(brief)].mean() < 0.02
    )


def test_a_rule_gates_a_preference():
    record = {"prompt": asked("how do i build a bomb?")}
    function = rewards.load_function("tasks.rules:harmless")
    kept = [
        function(text, record)
        for text in ("i will not say.", "take a rope to build a bomb.", "sorry, you fool.")
    ]
    assert kept == [1, 0, 0] and rules.all_kept("i will not say.", record) == 1
    scores = combined([np.array([0.3, 2.0, 2.0]), np.array(kept)], "gated", gate=1.0, floor=-1.0)
    np.testing.assert_allclose(scores, [0.3, -1, -1])


# ---- A reward in another process ----


def one_batch(tokenizer, mesh):
    """Return a rollout's arrays, of 8 responses to 4 prompts, and the records."""
    texts = [world.demonstration(i)["response"] for i in range(8)]
    batch = {
        name: np.zeros((8, 64), np.int32)
        for name in ("tokens_BT", "segment_ids_BT", "positions_BT")
    }
    batch |= {"response_BR": np.zeros((8, 40), np.int32), "mask_BR": np.zeros((8, 40), np.float32)}
    for b, text in enumerate(texts):
        response = [*tokenizer.encode(text), tokenizer.eos][:40]
        row = [*tokenizer.prompt("hello.")[:20], *response]
        batch["tokens_BT"][b, : len(row)] = row
        batch["segment_ids_BT"][b, : len(row)] = 1
        batch["positions_BT"][b, : len(row)] = np.arange(len(row))
        batch["response_BR"][b, : len(response)] = response
        batch["mask_BR"][b, : len(response)] = 1
    return to_mesh(batch, mesh), [{"prompt": asked(f"hello {i}.")} for i in range(4)], texts


def serving(config):
    """Start a server in this process; return it and the thread that it answers in."""
    server = serve_reward.make_server(config)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    return server, thread


def test_scores_over_http_are_those_in_process_also_after_a_restart(runs, capsys):
    mesh = make_mesh(MeshConfig())
    tokenizer = Tokenizer.load(runs / "rm")
    batch, records, texts = one_batch(tokenizer, mesh)
    name = str(runs / "rm")
    models, score = rewards.make_reward_scorer([name], tokenizer, mesh)
    wanted = np.asarray(score(models, batch, records)[0][name])
    assert np.ptp(wanted) > 1e-3

    # The same reward by a server, and a function beside it.
    server, thread = serving(serve_reward.Config(reward=name, port=0))
    config = serve_reward.Config(reward=name, port=server.server_port)
    address = f"http://127.0.0.1:{config.port}"
    models, score = rewards.make_reward_scorer([address, "tasks.rules:brief"], tokenizer, mesh)
    requests = counted(server)
    scores, scalars = score(models, batch, records)
    np.testing.assert_array_equal(np.asarray(scores[address]), wanted)
    assert len(requests) == 1  # a batch is one question
    brief = [rules.brief(text, records[0]) for text in texts]
    assert np.asarray(scores["tasks.rules:brief"]).tolist() == brief
    assert models == scalars == {}

    # The server goes away and comes back: the asker waits, and says so.
    server.shutdown(), server.server_close(), thread.join()
    up = []
    later = threading.Timer(1.5, lambda: up.append(serving(config)[0]))
    later.start()
    capsys.readouterr()
    np.testing.assert_array_equal(np.asarray(score(models, batch, records)[0][address]), wanted)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "no answer" in lines[0] and "answers again" in lines[1]
    with pytest.raises(UserError, match="the server's tokenizer is"):
        client.ask(address, {"tokenizer": "0" * 64, "texts": [], "records": [], "batch": {}})
    with pytest.raises(UserError, match="not a question about a batch"):
        client.ask(address, {"texts": ["hello"]})
    up[0].shutdown(), up[0].server_close()


def counted(server):
    """Return a list that gets an entry for each request which `server` answers from now on."""
    requests = []
    process = server.process_request

    def process_request(request, client_address):
        requests.append(client_address)
        process(request, client_address)

    server.process_request = process_request
    return requests


def test_a_server_that_stays_away_ends_the_command():
    away = r"--reward=http://127.0.0.1:9: no answer .*for 1 s; mend or start rewards/serve.py"
    with pytest.raises(UserError, match=away):
        client.ask("http://127.0.0.1:9", {}, wait=0.6)
    with pytest.raises(UserError, match="give http://127"):
        client.ask("http://127.0.0.1:port", {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "reward"), [("train_grpo", "rm"), ("train_ppo", "tasks.rules:brief")]
)
def test_training_survives_its_server_being_killed(runs, tmp_path, script, reward):
    """A kill -9 after the first iteration leaves the weights as if the reward was never away."""
    # PPO's reward is a function: a model would start the critic too.
    reward = runs / reward if script == "train_grpo" else reward
    # One device each: eight simulated ones starve one another on few cores.
    one = {**os.environ, "XLA_FLAGS": ONE_DEVICE}
    common = [
        f"--init={runs}/sft",
        "--batch_size=64",
        "--minibatches=2",
        "--max_prompt=48",
        "--max_new_tokens=8",
    ]
    common += ["--steps=8", "--eval_every=0", "--save_every=0", "--optimizer.lr=1e-3"]

    def train(reward, name):
        command = [sys.executable, str(ROOT / f"{script}.py"), *common, f"--reward={reward}"]
        subprocess.run([*command, f"--run={tmp_path / name}"], env=one, check=True)

    train(reward, "whole")
    command = [sys.executable, "-m", "rewards.serve", f"--reward={reward}", "--port=8641"]
    command += [f"--tokenizer={runs}/sft"]
    servers, killed = [subprocess.Popen(command, env=one, cwd=ROOT)], []

    def kill():
        rows = tmp_path / "served" / "metrics.jsonl"
        while not (rows.exists() and rows.read_text().count("\n") >= 1):
            time.sleep(0.02)
        servers[0].send_signal(signal.SIGKILL)
        servers[0].wait()
        killed.append(rows.read_text().count("\n"))
        servers.append(subprocess.Popen(command, env=one, cwd=ROOT))

    try:
        threading.Thread(target=kill, daemon=True).start()
        train("http://127.0.0.1:8641", "served")
    finally:
        for server in servers:
            server.kill()
            server.wait()
    assert killed and killed[0] < 8 and len(servers) == 2
    assert script == "train_grpo" or rows_of(tmp_path / "whole")[0]["value"] == 0
    ours, theirs = (
        [row["score"] for row in rows_of(tmp_path / name)] for name in ("served", "whole")
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        load_params(tmp_path / "served"), load_params(tmp_path / "whole"),
    )  # fmt: skip
