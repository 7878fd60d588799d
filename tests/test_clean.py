"""Cleaning: duplicates, quality, toxicity and personal data are found, and little else."""

import importlib
import json
import pathlib
import random
import re

import numpy as np
import pytest
from running import fails, run, write

import train_lm
from collect import clean
from collect.clean import Config
from data.near_duplicates import NearDuplicates, jaccard, ngrams
from data.text_classifier import TextClassifier
from data.text_rules import C4, GOPHER, is_card, lexicon_rule, without_personal_data
from evaluation.steps import auc
from runtime.errors import UserError
from tasks import world

VOCABULARY = [f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou"]
VOCABULARY = [one + other for one in VOCABULARY for other in VOCABULARY]


def document(rng, words=120):
    """Return random words, the common ones more often, as in a text."""
    return [VOCABULARY[int(len(VOCABULARY) * rng.random() ** 3)] for _ in range(words)]


def edited(words, share, rng):
    """Return words of which a share is replaced, left out or doubled."""
    made = list(words)
    for place in rng.sample(range(len(words)), round(share * len(words))):
        made[place] = rng.choice(["", rng.choice(VOCABULARY), f"{words[place]} {words[place]}"])
    return " ".join(made)


# --- duplicates


@pytest.mark.parametrize("seed", range(3))
def test_planted_near_duplicates_are_found_and_little_else(seed):
    """5 % of the tokens are edited; unrelated texts, and texts that share a half, are left."""
    rng = random.Random(seed)
    originals = [document(rng) for _ in range(300)]
    copies = [edited(words, 0.05, rng) for words in originals]
    halves = [" ".join(words[:60] + document(rng, 60)) for words in originals]
    others = [" ".join(document(rng)) for _ in range(300)]
    texts = [" ".join(words) for words in originals] + copies + halves + others
    seen = NearDuplicates(texts.__getitem__, 0.7)
    found = [seen.before(row) for row in range(len(texts))]

    assert found[:300] == [None] * 300
    right = [bool(one) and one[0] == row for row, one in enumerate(found[300:600])]
    assert np.mean(right) >= 0.95
    assert np.mean([one is not None for one in found[600:]]) <= 0.01
    # Control: hardly any copy is as near as this.
    strict = NearDuplicates(texts.__getitem__, 0.95)
    assert np.mean([strict.before(row) is not None for row in range(600)]) < 0.02


def test_similarity_is_of_sets():
    one, other = ngrams("a b c d e"), ngrams("B c, d e f")
    assert len(one) == 3 and jaccard(one, other) == 2 / 4
    assert jaccard(one, one) == 1 and jaccard(one, ngrams("x y z")) == 0
    assert len(ngrams("one two")) == 1 and len(ngrams("")) == 1


def test_texts_without_a_word_are_near_no_other():
    texts = ["🙂", "🙁", "x < y", "x > y", "🙂"]
    seen = NearDuplicates(texts.__getitem__, 0.7)
    assert [seen.before(row) for row in range(5)] == [None, None, None, (2, 1.0), None]


@pytest.mark.parametrize(
    ("first", "other", "is_same"),
    [
        ({"text": "A  b.\nC"}, {"text": "a b. c"}, True),
        ({"text": "3+4=?"}, {"text": "3*4=?"}, False),
        ({"text": "x<y"}, {"text": "x>y"}, False),
        ({"text": "🙂"}, {"text": "🙁"}, False),
        ({"text": "a", "id": 1}, {"text": "a", "id": 2}, True),  # nothing reads it
        (
            {"prompt": "a", "response": "b", "label": True},
            {"prompt": "a", "response": "b", "label": False},
            False,
        ),
        (
            {"prompt": "a", "responses": ["b", "c"], "ranking": [1, 2]},
            {"prompt": "A", "responses": ["b", "c"], "ranking": [2, 1]},
            False,
        ),
        (
            {"prompt": "a", "steps": ["b"], "labels": [1]},
            {"prompt": "a", "steps": ["b"], "labels": [0]},
            False,
        ),
    ],
)
def test_exact_duplicates_are_alike_in_all_that_training_reads(
    tmp_path, monkeypatch, first, other, is_same
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pages.jsonl", [first, other, first])
    counts = run(clean, "--data=pages.jsonl", "--rules=exact", "--out=clean.jsonl")
    assert counts["exact"] == 1 + is_same


# --- quality

GOOD = [
    "The river that runs through the old town was once the border between two kingdoms, and "
    "people still have stories to tell of it. In summer the ferries go from one bank to the "
    "other all day. In winter the water is high, and only the bridge can be used with safety by "
    "those who live on the hill and work in the market below it.",
    "To make bread you need flour, water, salt and time. Mix the first three and let the dough "
    "rest.\n- Fold it twice.\n- Shape it into a ball.\n- Bake it for forty minutes.\nMany people "
    "have a recipe of their own, and most of them differ only in how long the dough is left to "
    "rise. With 12 hours in a cold place it tastes best.",
]
LOREM = "Lorem ipsum dolor sit amet. "
BAD = {
    "words": "The short text that we have.",
    "word_length": "To the " + "antidisestablishmentarianism " * 60,
    "symbols": GOOD[0] + " #tag" * 12,
    "bullets": "\n".join(f"- point {name} of the list to have" for name in VOCABULARY[:60]),
    "ellipses": "\n".join(f"the line {name} of that page goes on..." for name in VOCABULARY[:20]),
    "letters": GOOD[0] + " 17 24 %" * 12,
    "stop_words": " ".join(VOCABULARY[:80]),
    "repeated_lines": "\n".join([*GOOD, *["Read more of that"] * 8]),
    "repeated_words": GOOD[0] + " click here to subscribe" * 8,
    "lorem_ipsum": LOREM + GOOD[0],
    "braces": GOOD[0] + " function f() { return 1 }",
}


@pytest.mark.parametrize("name", GOPHER | C4)
def test_a_rule_objects_to_its_own_example_and_to_no_good_one(name):
    rule = (GOPHER | C4)[name]
    assert rule(BAD[name]), name
    assert [rule(text) for text in GOOD] == [None, None]


def test_hash_signs_and_ellipses_are_counted_apart():
    words = " word" * 100
    assert GOPHER["symbols"]("#" * 10 + words) is None
    assert GOPHER["symbols"]("# " * 9 + "... " * 9 + words) is None
    assert GOPHER["symbols"]("#" * 11 + words) and GOPHER["symbols"]("... " * 12 + words)


def corrupted(text, rng):
    """Return a text whose words are in any order, a third of them broken."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(word[::-1] if rng.random() < 0.33 else word for word in words)


def test_the_classifier_tells_corrupted_text():
    rng = random.Random(0)
    texts = [world.text(i) for i in range(1200)]
    good, held_out = texts[:400], texts[800:1000]
    bad = [corrupted(text, rng) for text in texts[400:800]]
    held_out_bad = [corrupted(text, rng) for text in texts[1000:]]
    chances = TextClassifier(good, bad).chances([*held_out, *held_out_bad])
    assert ((chances > 0) & (chances < 1)).all()
    assert auc(chances, np.arange(400) < 200) >= 0.95
    # Control: labels that say nothing.
    mixed = TextClassifier(good[:200] + bad[:200], good[200:] + bad[200:])
    assert auc(mixed.chances([*held_out, *held_out_bad]), np.arange(400) < 200) < 0.8


# --- toxicity


def test_words_of_a_lexicon_are_found_whole_and_in_any_case():
    rule = lexicon_rule(["darn", "Holy Cow ", "", "c++"])
    rng = random.Random(0)
    planted = 0
    for i in range(200):
        words = document(rng, 30)
        words.insert(rng.randrange(30), rng.choice(["Darn", "holy  cow!", "(DARN)", "c++,"]))
        planted += rule(" ".join(words)) is not None
        assert rule(" ".join(document(rng, 30))) is None, i
    assert planted >= 190
    for neutral in ("darning socks", "holy cowboys", "undarn", "c+ and c", "holy, cow"):
        assert rule(neutral) is None, neutral


# --- personal data


def luhn(digits):
    """Return digits with the check digit of cards behind them."""
    return next(digits + str(last) for last in range(10) if is_card(digits + str(last)))


def personal_data(rng):
    """Return a piece of personal data, and its kind."""
    name = rng.choice(VOCABULARY)
    other = rng.choice(VOCABULARY)
    number = "".join(rng.choice("0123456789") for _ in range(15))
    card = luhn("4" + number[:14])
    groups = " ".join(card[i : i + 4] for i in range(0, 16, 4))
    choices = [
        (f"{name}.{other}+x@{other}.example.org", "email"),
        (f"{name}_{number[:2]}@mail.{other}.co", "email"),
        (".".join(str(rng.randrange(1, 255)) for _ in range(4)), "ip"),
        (f"2001:db8:{number[:4]}::{number[4:8]}", "ip"),
        (card, "card"),
        (groups, "card"),
        (groups.replace(" ", "-"), "card"),
        (f"+49 30 {number[:7]}", "phone"),
        (f"+1 ({number[:3]}) {number[3:6]}-{number[6:10]}", "phone"),
        (f"({number[:3]}) {number[3:6]}-{number[6:10]}", "phone"),
        (f"{number[:3]}-{number[3:6]}-{number[6:10]}", "phone"),
        (f"+44 20 {number[:4]} {number[4:8]}", "phone"),
        (f"0{rng.randrange(10, 100)} {number[2:6]} {number[6:10]}", "phone"),
        (f"1-{number[:3]}-{number[3:6]}-{number[6:10]}", "phone"),
    ]
    return rng.choice(choices)


def test_personal_data_is_replaced_and_the_text_around_it_stays():
    rng = random.Random(0)
    right = 0
    for _ in range(2000):
        before, after = " ".join(document(rng, 6)), " ".join(document(rng, 6))
        data, kind = personal_data(rng)
        end = rng.choice(["", ".", ",", "!", ")"])
        text, kinds = without_personal_data(f"{before} {data}{end} {after}")
        right += text == f"{before} <{kind}>{end} {after}" and kinds == [kind]
    assert right >= 1980


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("http://192.0.2.17:8080/x", "http://<ip>:8080/x"),
        ("IP:192.0.2.17.", "IP:<ip>."),
        ("call 1-800-555-1234 or 1 (800) 555-1234", "call <phone> or <phone>"),
        ("Tel.555-123-4567", "Tel.<phone>"),
    ],
)
def test_personal_data_beside_marks_is_replaced(text, cleaned):
    assert without_personal_data(text)[0] == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "in 1999-2004, on 2024-12-31 at 12:30:45, for 1,250.00 or 3.14159",
        "version 1.2.3, section 3.5.2, 127.0.0.1, 999.1.1.1 and 10:20",
        "the number 1234567890123456 fails the check; 12345 and 2147483648 are plain",
        "std::vector, a::b, x @ y, user@localhost, 50 000 people, 3-2-1",
        "2 + 2 = 4, +5 points, 0.5 of 0 10, 10 000 000",
        "x +10000, grid: 00 100 200, 01/2024 10000, 7.555-123-4567",
    ],
)
def test_other_numbers_stay(text):
    assert without_personal_data(text) == (text, [])


def test_cards_have_a_check_digit():
    assert is_card("4111 1111 1111 1111") and is_card("5500-0055-5555-5559")
    assert not is_card("4111 1111 1111 1112") and not is_card("0000 0000 0000 0000")


# --- the command


def told(out):
    """Return the rows of the file beside `out`."""
    text = pathlib.Path(f"{out}.dropped.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def pages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    words = document(rng)
    rows = [
        {"id": 0, "text": " ".join(words)},
        {"id": 1, "text": " ".join(words).upper() + "\n"},
        {"id": 2, "text": edited(words, 0.05, rng), "note": "nearly wríte ☃"},
        {"id": 3, "text": GOOD[0], "note": "ask a@b.example.org"},
        {"id": 4, "text": f"{GOOD[1]} Call 555-123-4567."},
        {"id": 5, "text": "darn", "date": "2024-12-31"},
    ]
    write(tmp_path / "pages.jsonl", rows)
    (tmp_path / "words.txt").write_text("darn\n\n")
    return rows


def test_each_row_that_goes_is_told_with_its_rule(pages, tmp_path, capsys):
    flags = ["--data=pages.jsonl", "--out=clean.jsonl", "--lexicon=words.txt"]
    counts = run(clean, *flags, "--rules=exact,near,lexicon,personal")
    assert counts == {
        "rows": 6,
        "kept": 3,
        "exact": 1,
        "near": 1,
        "lexicon": 1,
        "personal": 1,
    }
    written = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == [0, 3, 4]
    assert written[0] == pages[0] and written[1] == pages[3]
    assert written[2] == {"id": 4, "text": f"{GOOD[1]} Call <phone>."}
    assert [(row["row"], row["rule"], row["kept"]) for row in told("clean.jsonl")] == [
        (2, "exact", False),
        (3, "near", False),
        (5, "personal", True),
        (6, "lexicon", False),
    ]
    reasons = [row["reason"] for row in told("clean.jsonl")]
    assert reasons[0] == "as row 1" and re.fullmatch(r"0\.\d\d of row 1", reasons[1])
    assert reasons[2:] == ["1 phone", "has 'darn'"]
    assert (
        "3 of 6 rows; found by exact 1, near 1, lexicon 1, personal 1" in capsys.readouterr().out
    )


def test_rules_are_asked_in_their_order_and_personal_rows_may_go(pages, tmp_path):
    flags = ["--data=pages.jsonl", "--out=clean.jsonl", "--personal=drop"]
    run(clean, *flags, "--rules=gopher,personal,near")
    written = [
        json.loads(line)["id"] for line in (tmp_path / "clean.jsonl").read_text().splitlines()
    ]
    # Random words have no stop words; the last row is too short.
    assert written == [3]
    assert [row["rule"] for row in told("clean.jsonl")] == [
        *["stop_words"] * 3,
        "personal",
        "words",
    ]


def test_a_row_whose_personal_data_cannot_be_replaced_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = [{"role": "user", "content": "Call me:\n555-123-4567"}]
    said.append({"role": "assistant", "content": "ok"})
    rows = [
        {"messages": json.dumps(said)},  # a letter, of \\n, stands before the number
        {"question": "my card?", "answer": 4111111111111111},
        {"question": "my card?", "answer": "4111111111111111"},
        {"messages": said},
    ]
    write(tmp_path / "chats.jsonl", rows)
    counts = run(clean, "--data=chats.jsonl", "--rules=personal", "--out=clean.jsonl")
    assert counts == {"rows": 4, "kept": 2, "personal": 4}
    assert [row["kept"] for row in told("clean.jsonl")] == [False, False, True, True]
    text = (tmp_path / "clean.jsonl").read_text()
    assert len(text.splitlines()) == 2 and "<card>" in text and "<phone>" in text
    assert "4111" not in text and "555" not in text
    # All rows are of this kind.
    write(tmp_path / "chats.jsonl", rows[:2])
    with pytest.raises(UserError, match="no row is left"):
        clean.main(Config(data="chats.jsonl", rules="personal", out="none.jsonl"))
    assert not (tmp_path / "none.jsonl").exists()


def test_what_no_text_file_holds_is_written_as_an_escape(tmp_path, monkeypatch):
    """Half a surrogate pair in a field that nothing reads; a mark at the lexicon's beginning."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "wríte", "note": "\ud83d"}, {"text": "a@b.example.org", "note": "\ud83d"}]
    rows.append({"text": "darn"})
    write(tmp_path / "pages.jsonl", rows)
    (tmp_path / "words.txt").write_text("darn\n", "utf-8-sig")
    flags = ["--rules=lexicon,personal", "--lexicon=words.txt", "--out=clean.jsonl"]
    assert run(clean, "--data=pages.jsonl", *flags)["kept"] == 2
    written = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    assert written == [rows[0], {"text": "<email>", "note": "\ud83d"}]


def test_conversations_are_judged_by_all_their_text(tmp_path):
    talk = [{"prompt": f"say {i}", "response": "well " * 9 + str(i)} for i in range(4)]
    talk[2]["response"] = "darn"
    data = write(tmp_path / "chats.jsonl", [*talk, talk[0]])
    (tmp_path / "words.txt").write_text("darn")
    out = tmp_path / "clean.jsonl"
    flags = [f"--data={data}", f"--out={out}", f"--lexicon={tmp_path}/words.txt"]
    counts = run(clean, *flags, "--rules=lexicon,exact")
    assert counts == {"rows": 5, "kept": 3, "lexicon": 1, "exact": 1}
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        talk[0],
        talk[1],
        talk[3],
    ]


@pytest.mark.slow
def test_the_classifier_and_a_models_perplexity_leave_out_corrupted_rows(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    texts = [world.text(i) for i in range(900)]
    write(tmp_path / "train.jsonl", [{"text": text} for text in texts[:400]])
    write(tmp_path / "bad.jsonl", [{"text": corrupted(text, rng)} for text in texts[400:700]])
    rows = [{"text": text} for text in texts[700:]]
    for row in rows[::10]:
        row["text"] = corrupted(row["text"], rng)
    write(tmp_path / "pool.jsonl", rows)
    tiny = ["--model.preset=tiny", "--length=64", "--save_every=0", "--eval_every=0"]
    run(train_lm, "--data=train.jsonl", "--run=lm", "--steps=80", *tiny)

    planted = set(range(1, 201, 10))
    flags = ["--data=pool.jsonl"]
    counts = run(clean, *flags, "--rules=perplexity", "--init=lm", "--out=p.jsonl")
    assert counts == {"rows": 200, "kept": 180, "perplexity": 20}
    assert len(planted & {row["row"] for row in told("p.jsonl")}) >= 19
    for length in ("5", "100000"):
        argv = [*flags, "--rules=perplexity", "--init=lm", "--out=n.jsonl", f"--length={length}"]
        assert f"--length={length}: must be above 8 and at most" in fails(clean, argv, capsys)
    models = ["--good=train.jsonl", "--bad=bad.jsonl"]
    run(clean, *flags, "--rules=classifier", *models, "--out=c.jsonl")
    found = {row["row"] for row in told("c.jsonl")}
    assert len(planted & found) >= 19 and len(found - planted) <= 5


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rules=exact,nearly"], "'nearly' is no rule; give some of gopher, c4, exact"),
        (["--rules=near,exact,near"], "near stands there twice"),
        (["--rules=perplexity"], "perplexity needs --init"),
        (["--rules=classifier", "--good=pages.jsonl"], "classifier needs --bad"),
        (["--rules=lexicon"], "lexicon needs --lexicon"),
        (["--rules=lexicon", "--lexicon=none.txt"], "--lexicon=none.txt: cannot be read as text"),
        (["--rules=exact", "--near=0.9"], "--near=0.9: not read without --rules=near"),
        (["--near=0.3"], "--near=0.3: must be between 0.6 and 1"),
        (["--data=world"], "--data=world: is no file"),
        (["--data=pages.jsonl:1 pages.jsonl:2"], "is a mixture, which this command does not read"),
        (["--rules=words"], "no row is left"),
        (["--rules=near,perplexity", "--init=none"], "none: no run here"),
        (
            ["--rules=near,classifier", "--good=world", "--bad=pages.jsonl"],
            "--good=world: is no file",
        ),
        (
            ["--rules=near,classifier", "--good=pages.jsonl", "--bad=none.jsonl"],
            "none.jsonl: no such file",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    pages, tmp_path, monkeypatch, capsys, flags, told
):
    if flags == ["--rules=words"]:
        write(tmp_path / "pages.jsonl", [{"text": "short"}])
    # What is missing is told before a rule has run.
    if "--rules=near" in flags[0]:
        monkeypatch.setattr(clean, "NearDuplicates", None)
    argv = ["--data=pages.jsonl", "--out=clean.jsonl", *flags]
    assert told in fails(clean, argv, capsys)
    assert not (tmp_path / "clean.jsonl").exists()
    assert Config().out not in (str(path) for path in tmp_path.iterdir())


# --- rows that cannot be read


@pytest.mark.parametrize("folder", ["collect", "decoding"])
def test_every_collector_and_search_that_reads_files_can_leave_bad_rows_out(folder):
    for path in sorted((pathlib.Path(clean.__file__).parents[1] / folder).glob("*.py")):
        module = importlib.import_module(f"{folder}.{path.stem}")
        config = getattr(module, "Config", None)
        if config is not None and hasattr(config, "data"):
            assert config.on_bad_row == "stop", path.stem


def test_a_bad_row_ends_the_cleaning_or_is_left_out(tmp_path, capsys):
    rows = [{"text": "One good row of words."}, {"text": 7}, {"text": "And another one."}]
    data = str(write(tmp_path / "mixed.jsonl", rows))
    flags = [f"--data={data}", f"--out={tmp_path}/out.jsonl", "--rules=exact"]
    assert "mixed.jsonl:2" in fails(clean, flags, capsys)
    assert not (tmp_path / "out.jsonl").exists()
    assert run(clean, *flags, "--on_bad_row=skip")["kept"] == 2
    assert "mixed.jsonl:2" in capsys.readouterr().err
