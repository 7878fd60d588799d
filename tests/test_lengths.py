"""What a run cuts is said before its first step, in every script, and counted while it trains."""

import importlib
import re

import numpy as np
import pytest
from fakes import source_of
from running import rows_of, run, write

import evaluate
import train_sft
from data.batches import PACKING_WINDOW, encode_chat, encode_comparison, encode_prompt, encode_text
from data.lengths import lengths_line, measure_lengths
from data.packing import split_document
from data.sources import open_source
from data.tokenizer import Tokenizer

SHORT, LONG = "four of them", "many more of them and of these " * 12


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"{SHORT} {LONG} {word} unbelievably" for word in ("river", "cat", "sky")]
    return Tokenizer.train(texts * 9, tmp_path_factory.mktemp("tokenizer"), 320)


def chat(asked, said):
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": said},
        ]
    }


def pair(*responses):
    prompt = [{"role": "user", "content": SHORT}]
    return {"prompt": prompt, "responses": list(responses), "ranking": [1, 2]}


# ---- The measure ----


def test_lengths_are_those_before_any_cut(tokenizer):
    long = len(tokenizer.chat(chat(SHORT, LONG)["messages"])[0])
    short = len(tokenizer.chat(chat(SHORT, SHORT)["messages"])[0])
    assert short < 32 < long
    # Short ones, one cut, and one whose answer is beyond the limit.
    records = [chat(SHORT, SHORT)] * 7 + [chat(SHORT, LONG), chat(LONG, SHORT)]
    found = measure_lengths(source_of(records), encode_chat, tokenizer, 32)
    sizes = found.tokens_N.tolist()
    assert sizes[:8] == [short] * 7 + [long] and sizes[8] == long
    assert (found.cut, found.dropped) == (1, 1)
    (kept,) = encode_chat(records[7], tokenizer, 32).rows
    lost = 2 * long - len(kept["tokens"])
    assert found.lost == pytest.approx(lost / (7 * short + 2 * long))
    # Control: where all fits nothing is lost.
    assert measure_lengths(source_of(records), encode_chat, tokenizer, long)[1:] == (0, 0, 0, 0.0)


def test_of_a_comparison_the_longest_candidate_counts(tokenizer):
    record = pair(SHORT, LONG)
    found = measure_lengths(source_of([record]), encode_comparison, tokenizer, 512)
    prompt = len(tokenizer.prompt(record["prompt"]))
    assert found.tokens_N.tolist() == [prompt + len(tokenizer.encode(LONG)) + 1]


def test_a_document_loses_nothing(tokenizer):
    found = measure_lengths(source_of([{"text": LONG}] * 3), encode_text, tokenizer, 16)
    assert found[1:] == (0, 0, 0, 0.0)
    assert found.tokens_N.tolist() == [len(tokenizer.document(LONG))] * 3


def test_the_flag_is_named_from_a_twentieth_on(tokenizer):
    def line(long_ones, rows=40):
        records = [chat(SHORT, LONG)] * long_ones + [chat(SHORT, SHORT)] * (rows - long_ones)
        return lengths_line(source_of(records, "chats"), encode_chat, tokenizer, 32)

    sizes = [len(tokenizer.chat(chat(SHORT, said)["messages"])[0]) for said in (SHORT, LONG)]
    high = np.percentile([sizes[1]] * 3 + [sizes[0]] * 37, 95)
    told = line(3)
    assert told.startswith(f"chats: 40 rows; {sizes[0]} tokens at the median, {high:,.0f} at the")
    assert "at --length=32 7.5% are cut and 0.0% dropped" in told and told.endswith(
        "raise --length"
    )
    assert "raise" not in line(2) and "raise" not in line(0)


# ---- Between words ----


def test_no_word_is_cut_where_a_space_is_near(tokenizer):
    text = "unbelievably many rivers of unbelievably many skies " * 9
    document = tokenizer.document(text)
    pieces = [piece for piece, _ in split_document(document, 24, tokenizer.word_starts)]
    assert len(pieces) > 5
    words = set(text.split())
    # A piece begins with the last token of the one before.
    for piece in pieces[:-1]:
        assert tokenizer.decode(piece[1:]).split()[-1] in words
    whole = pieces[0] + [token for piece in pieces[1:] for token in piece[1:]]
    assert whole == document
    # Control: without a look at words some are cut.
    plain = [tokenizer.decode(piece[1:]).split()[-1] for piece, _ in split_document(document, 24)]
    assert not set(plain) <= words

    for said in (text, "of " + text, "cat " + text):
        (row,) = encode_chat(chat(SHORT, said), tokenizer, 40).rows
        assert 30 < len(row["tokens"]) <= 40
        assert tokenizer.decode(row["tokens"]).split()[-1] in words | {"of", "cat"}
        prompt = {"prompt": [{"role": "user", "content": said}]}
        (row,) = encode_prompt(prompt, tokenizer, 40).rows
        assert 30 < len(row["tokens"]) <= 40
        assert tokenizer.decode(row["tokens"]).split()[0] in words


def test_a_word_without_an_end_is_cut(tokenizer):
    document = tokenizer.document("x" * 400)
    for piece, _ in split_document(document, 24, tokenizer.word_starts)[:-1]:
        assert len(piece) == 24


# ---- In every script ----

QUESTION = [{"role": "user", "content": SHORT}]
ROWS = {
    "text": [{"text": f"{SHORT} {i}"} for i in range(40)],
    "chat": [{"prompt": f"{SHORT} {i}", "response": LONG} for i in range(40)],
    "comparison": [
        {"prompt": f"{LONG} {i}", "chosen": SHORT, "rejected": "many"} for i in range(40)
    ],
    "prompt": [{"prompt": f"{LONG} {i}", "answer": "4"} for i in range(40)],
    "steps": [
        {"prompt": f"{SHORT} {i}", "steps": [SHORT, LONG.strip()], "labels": [1, 0]}
        for i in range(40)
    ],
}
TINY = ["--eval_every=0", "--optimizer.warmup=1", "--optimizer.schedule=constant"]
ONLINE = ["--reward=tasks.answers:number", "--batch_size=64", "--max_prompt=24"]
ONLINE += ["--max_new_tokens=8"]
ROWS_OF_32 = ["--batch_size=8", "--length=32"]
SCRIPTS = {
    "train_lm": ("text", [*ROWS_OF_32]),
    "train_sft": ("chat", [*ROWS_OF_32]),
    "train_distill": ("chat", [*ROWS_OF_32, "--teacher={sft}"]),
    "train_rm": ("comparison", [*ROWS_OF_32]),
    "train_dpo": ("comparison", [*ROWS_OF_32]),
    "train_prm": ("steps", [*ROWS_OF_32]),
    "train_ppo": ("prompt", [*ONLINE, "--minibatches=2"]),
    "train_grpo": ("prompt", [*ONLINE]),
    "train_raft": ("prompt", [*ONLINE]),
}


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """Train for two steps on a file whose answers are longer than a row."""
    folder = tmp_path_factory.mktemp("sft")
    data = write(folder / "chats.jsonl", ROWS["chat"])
    flags = [f"--data={data}", f"--run={folder}/run", "--model.preset=tiny", *TINY, *ROWS_OF_32]
    run(train_sft, *flags, "--steps=2")
    return folder / "run", flags


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_is_cut_before_its_first_step(sft, tmp_path, capsys, name):
    schema, flags = SCRIPTS[name]
    data = write(tmp_path / "rows.jsonl", ROWS[schema])
    flags = [flag.format(sft=sft[0]) for flag in flags]
    capsys.readouterr()
    script = importlib.import_module(name)
    run(
        script,
        *(f"--init={sft[0]}", f"--data={data}", f"--run={tmp_path}/run", "--dry_run"),
        *(*TINY, *flags),
    )
    told = " ".join(capsys.readouterr().out.split())
    limit = "--max_prompt=24" if schema == "prompt" else "--length=32"
    found = re.search(
        rf"data {re.escape(str(data))}: \d+ rows; \d+ tokens at the median, \d+ at the 95th "
        rf"percentile; at {limit} ([\d.]+)% are cut and ([\d.]+)% dropped, ([\d.]+)% of the ",
        told,
    )
    assert found, told
    cut, dropped, lost = map(float, found.groups())
    # Documents go on in another row; all others are too long here.
    if schema == "text":
        assert (cut, dropped, lost) == (0, 0, 0)
    else:
        assert cut + dropped == 100 and lost > 5
        assert f": raise {limit.partition('=')[0]}" in told


def test_an_evaluation_says_what_is_cut(sft, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", ROWS["chat"])
    flags = [f"--policy={sft[0]}", f"--data={data}", "--length=32", "--n=20"]
    capsys.readouterr()
    run(evaluate, "--measure=perplexity", *flags)
    told = capsys.readouterr().err
    assert f"{data}: 40 rows; " in told and "of the first 20" in told
    assert "at --length=32 100.0% are cut" in told and ": raise --length" in told


def test_a_run_counts_what_is_cut_and_seen_and_goes_on_counting(sft):
    folder, flags = sft
    run(train_sft, *flags, "--steps=4")
    rows = rows_of(folder)
    assert [row["tokens_seen"] for row in rows] == [256, 512, 768, 1024]
    assert all(row["learning_rate"] > 0 and row["peak_memory"] > 0.01 for row in rows)
    # Of all conversations that are packed together the answer is cut.
    for row in rows:
        assert (row["data/truncated"], row["data/dropped"]) == (PACKING_WINDOW, 0)
    # Each row of a batch is one conversation, cut; the last are held out.
    trained_on = len(open_source(flags[0].partition("=")[2], "chat", "train"))
    epochs = [8 * step / trained_on for step in (1, 2, 3, 4)]
    assert [row["data/epoch"] for row in rows] == pytest.approx(epochs)
