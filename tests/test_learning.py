"""What the scripts learn: a few rows by heart, a known entropy, labels and no labels."""

import importlib
import itertools
import math

import jax
import numpy as np
import pytest
from running import rows_of, run, write

from data.sources import open_source
from data.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

SIZES = ["--batch_size=8", "--length=32", "--eval_every=0", "--save_every=0"]
QUICK = ["--optimizer.lr=1e-2", "--optimizer.warmup=0", "--optimizer.weight_decay=0"]
MODEL = ["--model.preset=tiny", "--model.vocab=320"]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
REWARD = """
def likes_yes(response, record):
    return float(response == "yes")
"""


def one_device(config):
    """Make a mesh of one device: of eight, each would have one row."""
    types = (jax.sharding.AxisType.Auto,) * 3
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((1, 1, 1), axes, axis_types=types, devices=jax.devices()[:1])
    jax.set_mesh(mesh)
    return mesh


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(files / "cache"))
    monkeypatch.chdir(files)
    monkeypatch.syspath_prepend(str(files))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make a folder with nine rows of every schema, and a reward."""
    folder = tmp_path_factory.mktemp("learning")
    texts = [{"text": f"{word} is {i}"} for i, word in enumerate(WORDS)]
    chats, pairs, steps, questions = [], [], [], []
    for i, word in enumerate(WORDS):
        chats.append({"prompt": f"say {i}", "response": word})
        other = WORDS[(i + 4) % len(WORDS)]
        pairs.append({"prompt": f"say {i}", "chosen": word, "rejected": other})
        labels = [i % 2, (i // 2) % 2]
        steps.append({"prompt": f"say {i}", "steps": [word, other], "labels": labels})
        for answer in ("yes", "no"):
            questions.append({"prompt": f"is it {i}", "response": answer})
    write(folder / "texts.jsonl", texts)
    write(folder / "chats.jsonl", chats)
    write(folder / "pairs.jsonl", pairs)
    write(folder / "steps.jsonl", steps)
    write(folder / "questions.jsonl", questions)
    (folder / "a_reward.py").write_text(REWARD)
    return folder


def train(monkeypatch, script, *options):
    """Train on one device; return the rows of metrics."""
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "make_mesh", one_device)
    run(module, *options)
    (folder,) = [option.removeprefix("--run=") for option in options if "--run=" in str(option)]
    return rows_of(folder)


@pytest.fixture(scope="module")
def supervised(files):
    """Fine-tune on the conversations; and on questions that have two answers each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMB_CACHE", str(files / "cache"))
        start = [*MODEL, *SIZES, *QUICK, "--steps=60"]
        rows = train(
            patch, "train_sft", *start, f"--data={files}/chats.jsonl", f"--run={files}/sft"
        )
        answers = train(
            patch, "train_sft", *start, f"--data={files}/questions.jsonl", f"--run={files}/coin"
        )
    return rows, answers


def test_sft_learns_its_answers_by_heart(supervised):
    rows, answers = supervised
    assert rows[0]["loss"] > 1 and rows[-1]["loss"] < 0.05
    # An answer of a token or two and an end, of which the first is a coin's toss.
    assert 0.2 < answers[-1]["loss"] < 0.45


def test_lm_learns_its_texts_by_heart(files, monkeypatch):
    data = f"--data={files}/texts.jsonl"
    rows = train(monkeypatch, "train_lm", *MODEL, *SIZES, *QUICK, data, "--steps=80", "--run=lm")
    # What cannot be known is which of the eight or nine texts comes next.
    tokenizer = Tokenizer.load(files / "lm")
    predicted = [len(tokenizer.document(f"{word} is {i}")) - 1 for i, word in enumerate(WORDS)]
    entropy = math.log(8.5) / np.mean(predicted)
    assert rows[0]["loss"] > 3 and abs(rows[-1]["loss"] - entropy) < 0.1


@pytest.mark.parametrize(
    "script, data, options",
    [
        ("train_rm", "pairs", ["--init=sft"]),
        ("train_prm", "steps", ["--init=sft"]),
        ("train_dpo", "pairs", ["--init=sft", "--beta=0.5"]),
        ("train_distill", "chats", ["--teacher=sft", *MODEL, "--on_policy=0"]),
    ],
)
def test_a_script_learns_its_rows_by_heart(supervised, monkeypatch, script, data, options):
    steps = ["--steps=60", f"--run={script}", f"--data={data}.jsonl"]
    rows = train(monkeypatch, script, *SIZES, *QUICK, *options, *steps)
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"] and rows[-1]["loss"] < 0.1
    assert rows[-1].get("accuracy", 1.0) == 1.0


@pytest.mark.parametrize(
    "script, options",
    [
        ("train_ppo", ["--minibatches=1", "--kl_coef=0", "--value_optimizer.lr=1e-2"]),
        ("train_grpo", ["--minibatches=1", "--kl_coef=0", "--samples_per_prompt=4"]),
        ("train_raft", ["--minibatch_size=32", "--samples_per_prompt=4"]),
    ],
)
def test_what_a_program_rewards_is_learnt(supervised, monkeypatch, script, options):
    """The policy that tosses a coin learns to say yes."""
    sizes = ["--batch_size=32", "--max_prompt=16", "--max_new_tokens=6", "--steps=20"]
    common = ["--init=coin", "--data=questions.jsonl", "--reward=a_reward:likes_yes"]
    rest = ["--eval_every=0", "--optimizer.lr=3e-3", "--optimizer.warmup=0", f"--run={script}"]
    rows = train(monkeypatch, script, *common, *sizes, *rest, *options)
    assert 0.2 < rows[0]["score"] < 0.8
    assert np.mean([row["score"] for row in rows[-3:]]) > 0.9


def test_lm_reaches_the_entropy_of_a_source(files, monkeypatch):
    """Binary digits of which each is the one before with probability 0.9."""
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(100):
        changes_N = rng.uniform(size=400) < 0.1
        digits_N = np.cumsum(changes_N) % 2
        documents.append({"text": "".join(map(str, digits_N))})
    data = write(files / "digits.jsonl", documents)
    sizes = ["--batch_size=32", "--length=64", "--eval_every=150", "--steps=150"]
    start = [*MODEL, *sizes, "--optimizer.lr=3e-3", f"--data={data}", "--run=digits"]
    last = train(monkeypatch, "train_lm", *start)[-1]

    # What the source itself makes of the held-out digits; each is one token.
    held_out = open_source(str(data), "text", "heldout")
    nats = 0.0
    tokens = 0
    for i in range(len(held_out)):
        text = held_out[i]["text"]
        changes = sum(one != other for one, other in itertools.pairwise(text))
        nats -= changes * math.log(0.1) + (len(text) - 1 - changes) * math.log(0.9)
        # The first digit is a coin's toss; the end comes once in 401.
        nats += math.log(2) + math.log(401)
        tokens += len(text) + 1
    entropy = nats / tokens
    assert last["eval/loss"] == pytest.approx(entropy, abs=0.02)
    # Control: who does not look at the digit before pays log 2.
    assert entropy < 0.6 * math.log(2)


@pytest.mark.parametrize("noise, low, high", [(0.0, 0.9, 1.0), (0.5, 0.35, 0.65)])
def test_a_reward_model_knows_clean_labels_and_cannot_know_tossed_ones(
    files, monkeypatch, noise, low, high
):
    """The better response has the larger digit; with noise 1/2 a coin says which is better."""
    rng = np.random.default_rng(1)
    rows = []
    for i in range(3000):
        small, large = sorted(rng.choice(10, 2, replace=False))
        chosen, rejected = (small, large) if rng.uniform() < noise else (large, small)
        row = {"prompt": f"{i} {i % 7}", "chosen": f"it is {chosen}"}
        rows.append({**row, "rejected": f"it is {rejected}"})
    data = write(files / f"noise{noise}.jsonl", rows)
    sizes = ["--batch_size=32", "--length=32", "--eval_every=150", "--steps=150"]
    options = [*MODEL, *sizes, "--optimizer.lr=3e-3", f"--data={data}", f"--run=rm{noise}"]
    last = train(monkeypatch, "train_rm", *options)[-1]
    assert last["eval/pairs"] > 100 and low <= last["eval/accuracy"] <= high
