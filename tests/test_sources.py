import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from data import preparing, sources
from data.records import SCHEMAS
from data.sources import held_out, keep_prepared, open_source
from runtime.errors import UserError
from runtime.writes import beside

ROOT = pathlib.Path(__file__).parents[1]
REAL = pathlib.Path(__file__).parents[2] / "shared" / "data"
HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: joke?\n\nAssistant: knock knock",
    "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: joke?\n\nAssistant: no",
}
HH_PROMPT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "joke?"},
]


def turns(*contents):
    return [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def everything(data, schema):
    return [
        source[i]
        for split in ("train", "heldout")
        for source in [open_source(data, schema, split)]
        for i in range(len(source))
    ]


def only(tmp_path, row, schema):
    """Return the record made of `row`, which stands among others of its schema."""
    other = {"text": "x", "prompt": "other", "response": "x", "chosen": "x", "rejected": "y"}
    found = everything(write(tmp_path / "rows.jsonl", [row, other]), schema)
    return next(
        record for record in found if "other" not in str(record) and record != {"text": "x"}
    )


ADAPTED = [
    ("text", {"text": " a\nb ", "id": 3}, {"text": " a\nb "}),
    ("text", {"prompt": "p", "response": "r"}, {"text": "p\nr"}),
    ("chat", {"messages": turns("p", "r")}, {"messages": turns("p", "r")}),
    ("chat", {"prompt": "p", "response": "r"}, {"messages": turns("p", "r")}),
    (
        "chat",
        {"prompt": turns("a", "b", "c"), "completion": "r"},
        {"messages": turns("a", "b", "c", "r")},
    ),
    (
        "chat",
        {"question": "2+2?", "answer": "4\n#### 4"},
        {"messages": turns("2+2?", "4\n#### 4")},
    ),
    (
        "chat",
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        {"messages": turns("Add.\n\n2 2", "4")},
    ),
    (
        "chat",
        {"instruction": "Go.", "instances": [{"input": "", "output": "ok"}]},
        {"messages": turns("Go.", "ok")},
    ),
    ("chat", HH, {"messages": turns("hi", "hello", "joke?", "knock knock")}),
    (
        "comparison",
        HH,
        {"prompt": HH_PROMPT, "responses": ["knock knock", "no"], "ranking": [1, 2]},
    ),
    (
        "comparison",
        {"chosen": turns("p", "a"), "rejected": turns("p", "b")},
        {"prompt": turns("p"), "responses": ["a", "b"], "ranking": [1, 2]},
    ),
    (
        "comparison",
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2, "criterion": "honest"},
        {
            "prompt": turns("p"),
            "responses": ["a", "b"],
            "ranking": [1, 2],
            "margin": 2.0,
            "criterion": "honest",
        },
    ),
    (
        "comparison",
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": turns("p"), "responses": ["a", "a"], "ranking": [1, 1]},
    ),
    (
        "comparison",
        {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 1, 2]},
        {"prompt": turns("p"), "responses": ["a", "b", "c"], "ranking": [2, 1, 2]},
    ),
    ("prompt", {"prompt": "p", "answer": "4"}, {"prompt": turns("p"), "answer": "4"}),
    ("prompt", {"question": "2+2?", "answer": "4"}, {"prompt": turns("2+2?"), "answer": "4"}),
    ("prompt", {"messages": turns("p", "r")}, {"prompt": turns("p"), "answer": "r"}),
    ("prompt", HH, {"prompt": HH_PROMPT, "answer": "knock knock"}),
    ("prompt", {"text": "Once"}, {"text": "Once"}),
]


def test_a_dry_run_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n')
    keep_prepared(False)
    assert len(open_source(str(path), "chat", "all")) == 2
    assert os.listdir(tmp_path) == ["chats.jsonl"]
    keep_prepared(True)  # control
    assert len(open_source(str(path), "chat", "all")) == 2
    assert sorted(os.listdir(tmp_path)) == ["cache", "chats.jsonl"]


@pytest.mark.parametrize(("schema", "row", "record"), ADAPTED)
def test_rows_are_adapted_by_content(tmp_path, schema, row, record):
    assert only(tmp_path, row, schema) == record


SYSTEM = {"role": "system", "content": "x"}
BAD = [
    ("text", "nonsense", "line: is not JSON"),
    ("text", "[1]", "line: must be a JSON object, not list"),
    ("text", b'{"text": "\xff"}', "line: is not UTF-8 (byte 11)"),
    ("text", {"text": 3}, "text: must be a string, not int"),
    ("text", {"text": " "}, "text: is empty"),
    ("text", '{"text": "\\ud800"}', "text: holds half a surrogate pair"),
    ("chat", {"query": "x"}, "messages: missing; the row needs"),
    ("chat", {"prompt": "p", "response": None}, "messages: missing; the row needs"),
    ("chat", '{"prompt": "p", "prompt": "q", "response": "r"}', "prompt: stands twice"),
    (
        "chat",
        '{"prompt": "p", "response": "r", "x": {"a": [{"b": 1, "b": 2}]}}',
        "b: stands twice",
    ),
    ("chat", "\0\0\0\0", "line: holds NULs alone"),
    ("chat", '{"id": ' + "9" * 5000 + "}", "line: holds a number of too many digits"),
    ("chat", "[" * 100_000, "line: is not JSON that can be read"),
    (
        "chat",
        '[{"prompt": "p"}]',
        "line: must be a JSON object, not list; write one object a line",
    ),
    ("chat", {"messages": []}, "messages: must be a list of one or more messages"),
    ("chat", {"messages": ["hi"]}, "messages[0]: must be an object"),
    ("chat", {"messages": turns("p")}, "messages: the last turn must be the assistant's"),
    ("chat", {"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role: must be"),
    ("chat", {"messages": [*turns("p", "r"), SYSTEM]}, "messages[2].role: must be"),
    ("chat", {"messages": turns("p", "")}, "messages[1].content: is empty"),
    ("chat", {"instruction": "x", "instances": []}, "instances: must be a list"),
    ("chat", {"instruction": "x", "instances": [{"input": "y"}]}, "instances[0].output: missing"),
    ("comparison", {"prompt": "p", "chosen": "a"}, "rejected: missing"),
    ("comparison", {"chosen": "a", "rejected": "b"}, "chosen: must be a transcript"),
    (
        "comparison",
        {**HH, "rejected": "\n\nHuman: x\n\nAssistant: no"},
        "rejected: must be the conversation",
    ),
    (
        "comparison",
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1},
        "margin: must be a number",
    ),
    (
        "comparison",
        {"prompt": "p", "responses": ["a"], "ranking": [1]},
        "responses: must be a list of two",
    ),
    (
        "comparison",
        {"prompt": "p", "responses": ["a", "b"], "ranking": [1]},
        "ranking: must be 2 whole",
    ),
    (
        "comparison",
        {"prompt": "p", "responses": ["a", "b"], "ranking": [0.9, 1]},
        "ranking: must be 2 whole",
    ),
    (
        "comparison",
        {"prompt": "p", "responses": ["a", "b"], "ranking": [2, 3]},
        "ranking: must be 2 whole",
    ),
    ("prompt", {"id": 1}, "prompt: missing"),
    ("prompt", {"prompt": turns("p", "r")}, "prompt: the last turn must be the user's"),
]


@pytest.mark.parametrize(("schema", "row", "reason"), BAD)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, cache, schema, row, reason):
    good = {"text": "t", "prompt": "p", "response": "r", "chosen": "c", "rejected": "r"}
    row = (
        row
        if isinstance(row, bytes)
        else (row if isinstance(row, str) else json.dumps(row)).encode()
    )
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(good).encode() + b"\n\n" + row + b"\n")
    with pytest.raises(UserError) as fault:
        open_source(str(path), schema, "train")
    assert str(fault.value).startswith(f"{path}:3: {reason}") and "\n" not in str(fault.value)
    assert not list(cache.glob("*"))  # nothing half-written


def test_bad_files_are_one_line(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"plain")
    write(tmp_path / "cut.jsonl.gz", [{"text": str(i)} for i in range(2000)])
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "cut.jsonl.gz").read_bytes()[:-2000])
    write(tmp_path / "same.jsonl", [{"text": "x"}] * 3)
    write(tmp_path / "one.jsonl", [{"text": "x"}])
    for name, reason in (
        ("none.jsonl", "no such file"),
        ("folder.jsonl", "is a folder"),
        ("a.txt", "not a source"),
        ("empty.jsonl", "no rows"),
        ("same.jsonl", "the same"),
        ("one.jsonl", "has one row"),
        ("bad.jsonl.gz", "broken gzip"),
        ("cut.jsonl.gz", "broken gzip"),
    ):
        with pytest.raises(UserError, match=reason) as fault:
            open_source(str(tmp_path / name), "text", "train")
        assert name in str(fault.value)


def test_gzip_equals_plain_and_line_order_is_kept(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(50)]
    plain, packed = write(tmp_path / "a.jsonl", rows), write(tmp_path / "a.jsonl.gz", rows)
    assert everything(plain, "text") == everything(packed, "text")
    train = open_source(plain, "text", "train")
    assert [train[i] for i in range(len(train))] == [rows[i] for i in train.rows]


def test_prepared_once_and_again_when_the_content_changes(tmp_path, cache):
    data = write(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(20)])
    first = everything(data, "text")
    (prepared,) = cache.iterdir()
    written = prepared.stat().st_mtime_ns
    assert everything(data, "text") == first
    assert list(cache.iterdir()) == [prepared] and prepared.stat().st_mtime_ns == written
    write(tmp_path / "a.jsonl", [{"text": f"new {i}"} for i in range(20)])
    assert everything(data, "text") != first
    assert len(list(cache.iterdir())) == 2


def prepare_with(root, data):
    """Open `data` in a process of its own, with the code under `root`."""
    program = f"from data.sources import open_source; open_source({data!r}, 'text', 'train')"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, check=True)


def test_a_file_is_prepared_again_for_another_version_and_not_for_a_comment(tmp_path, cache):
    data = write(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(20)])
    everything(data, "text")
    (prepared,) = cache.iterdir()

    # A copy of the code that differs in comments only.
    copy = tmp_path / "copy"
    for folder in ("data", "tasks", "runtime"):
        shutil.copytree(ROOT / folder, copy / folder)
    for name in ("sources.py", "records.py"):
        code = copy / "data" / name
        code.write_text(code.read_text() + "# another comment\n")
    prepare_with(copy, data)
    assert list(cache.iterdir()) == [prepared]

    # Control: another version of what is kept.
    code = copy / "data" / "sources.py"
    version = f"SCHEMA_VERSION = {sources.SCHEMA_VERSION}"
    assert version in code.read_text()
    code.write_text(code.read_text().replace(version, "SCHEMA_VERSION = -1"))
    prepare_with(copy, data)
    assert len(list(cache.iterdir())) == 2


def test_a_preparation_that_fails_or_loses_rows_leaves_nothing(tmp_path, cache, monkeypatch):
    data = write(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(20)])
    with monkeypatch.context() as patch:
        patch.setattr(
            preparing.np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
        )
        with pytest.raises(UserError, match=r"disk full.*set PLUMB_CACHE"):
            open_source(data, "text", "train")
        assert not list(cache.iterdir())

    class Loses(array_record_module.ArrayRecordWriter):
        def write(self, record):
            if b"text 7" not in record:
                super().write(record)

    with monkeypatch.context() as patch:
        patch.setattr(array_record_module, "ArrayRecordWriter", Loses)
        with pytest.raises(RuntimeError, match="20 rows, but 19 are kept"):
            open_source(data, "text", "train")
    assert not list(cache.iterdir())
    assert len(everything(data, "text")) == 20


def test_a_file_is_read_once_and_its_rows_are_not_held(tmp_path, monkeypatch):
    """Neither twice nor all at once: what a row was is gone before the one after the next."""
    data = write(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(50)])
    alive = []
    adapt = SCHEMAS["text"]

    class Counted(dict):
        def __init__(self, record):
            super().__init__(record)
            alive.append(self)

    def counted(row):
        # This name, the list's and the call's: a row that is held elsewhere has more.
        held = [record for record in alive if sys.getrefcount(record) > 3]
        assert len(held) <= 1
        return Counted(adapt(row))

    monkeypatch.setitem(preparing.SCHEMAS, "text", counted)
    open_source(data, "text", "train")
    assert len(alive) == 50


DAMAGES = {
    "a flipped byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "cut": lambda data: data[: len(data) // 2],
    "nothing": lambda data: b"",
    "other bytes": lambda data: b"\xff" * len(data),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_prepared_again_with_a_note(tmp_path, cache, capsys, damage):
    data = write(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(20)])
    wanted = everything(data, "text")
    (prepared,) = cache.iterdir()
    files = sorted(prepared.iterdir())
    assert len(files) == 5
    for file in files:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
        capsys.readouterr()
        assert everything(data, "text") == wanted, file.name
        notes = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
        assert len(notes) == 1 and "prepared again" in notes[0], file.name
        assert list(cache.iterdir()) == [prepared]
    files[0].unlink()
    assert everything(data, "text") == wanted


def test_what_a_killed_process_left_is_removed_and_what_others_hold_is_not(tmp_path, cache):
    data = write(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(20)])
    cache.mkdir()
    # A name that this code gives, and one that others may give.
    dead, theirs = cache / ".set.0123abcd.partial", cache / "partial-dead"
    with beside(cache / "set", is_folder=True) as (held, _):
        (dead / "inside").mkdir(parents=True)
        theirs.mkdir()
        everything(data, "text")
        assert len(list(cache.iterdir())) == 3 and held.exists()
    assert not held.exists()
    # By the next start also where nothing has to be prepared.
    dead.mkdir()
    everything(data, "text")
    assert not dead.exists() and theirs.exists() and len(list(cache.iterdir())) == 2


def test_a_full_cache_disk_is_one_line(tmp_path, cache, monkeypatch):
    data = write(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(20)])

    def full(*_):
        raise RuntimeError("Failed to finalize writing: \nwrite() failed: No space left on device")

    monkeypatch.setattr(preparing, "_write", full)
    with pytest.raises(UserError, match=r"No space left on device.*free the disk") as fault:
        open_source(data, "text", "train")
    assert "\n" not in str(fault.value) and not list(cache.iterdir())


def test_what_is_not_read_or_trained_on_is_said_once(tmp_path, capsys):
    quiet, loud = (
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": weight}]
        for weight in (1, 0)
    )
    rows = [
        {"messages": [*loud, *quiet, {**quiet[0], "content": str(i)}, quiet[1]]} for i in range(3)
    ]
    data = write(
        tmp_path / "a.jsonl", [{**row, "id": 1, "\ud83d": 2, "url": None} for row in rows]
    )
    everything(data, "chat")
    everything(data, "chat")
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")] == [
        f"note: {data}: fields that nothing reads: id, '\\ud83d'",
        f"note: {data}: 3 of 9 assistant's turns are not trained on "
        "(weight 0, or they call tools)",
    ]


def test_held_out_rows_never_train(tmp_path):
    rows = [{"prompt": f"prompt {i % 300}", "response": f"response {i}"} for i in range(600)]
    data = write(tmp_path / "a.jsonl", rows)
    train, held = (open_source(data, "chat", split) for split in ("train", "heldout"))
    train_prompts, held_prompts = (
        open_source(data, "prompt", split) for split in ("train", "heldout")
    )
    assert len(train) + len(held) == 600 and 10 < len(held) < 60
    # As messages call them.
    assert (train.name, held.name) == (str(data), f"the held-out split of {data}")
    # The same rows in any schema.
    for one, other in ((train, train_prompts), (held, held_prompts)):
        assert (one.rows == other.rows).all()
    prompts = [
        {source[i]["messages"][0]["content"] for i in range(len(source))}
        for source in (train, held)
    ]
    assert not prompts[0] & prompts[1]  # though each prompt has two rows


def test_the_share_held_out():
    rng = np.random.default_rng(0)
    for n in (2, 5, 100, 10_000, 100_000):
        held = held_out(rng.integers(0, 2**64, n, np.uint64))
        assert 1 <= held.sum() <= max(1, min(0.07 * n + 3, 1000))
    assert held.sum() == 1000
    assert held_out(np.array([7, 7], np.uint64)).all()


def test_candidates_are_counted(tmp_path):
    rows = [
        {"prompt": f"p{i}", "responses": list("abcd")[: 2 + i % 3], "ranking": [1] * (2 + i % 3)}
        for i in range(9)
    ]
    assert open_source(write(tmp_path / "a.jsonl", rows), "comparison", "train").candidates == 4


def test_the_world_has_every_schema_but_steps_and_every_split():
    for schema in SCHEMAS.keys() - {"steps"}:
        train, again, held = (
            open_source("world", schema, s) for s in ("train", "train", "heldout")
        )
        assert train[7] == again[7] != held[7]
        assert train[7] != open_source("world", schema, "train", seed=1)[7]
        assert len(train) == sources.ENDLESS
    assert set(open_source("world", "comparison", "train")[0]) == {
        "prompt",
        "responses",
        "ranking",
    }


class Gsm8k(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"question": text, "answer": text})
        )

    def _split_generators(self, _):
        return {"train": self._generate_examples(8), "test": self._generate_examples(3)}

    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"question": f"{n} times {i}?", "answer": f"#### {n * i}"}


def test_a_catalogue_name_is_read_from_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    with pytest.raises(
        UserError, match=r"text\.gsm8k\.gsm8k; tfds.builder\('gsm8k'.*download_and_prepare"
    ):
        open_source("tfds:gsm8k", "chat", "train")
    with pytest.raises(UserError, match=r"check the spelling"):
        open_source("tfds:gms8k", "chat", "train")
    tfds.disable_progress_bar()
    Gsm8k(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    train, held = (open_source("tfds:gsm8k", "chat", split) for split in ("train", "heldout"))
    assert (len(train), len(held)) == (8, 3)
    questions = {train[i]["messages"][0]["content"] for i in range(8)}
    assert questions == {f"8 times {i}?" for i in range(8)}
    record = open_source("tfds:gsm8k", "prompt", "heldout")[0]
    assert record["answer"].startswith("#### ") and isinstance(record["prompt"][0]["content"], str)
    with pytest.raises(UserError, match=r"tfds:gsm8k: train row 0: .*missing"):
        open_source("tfds:gsm8k", "comparison", "train")[0]


@pytest.mark.skipif(not REAL.exists(), reason="the real data files are not here")
def test_real_files_work_unchanged():
    hh = everything(str(REAL / "hh" / "harmless_base.jsonl"), "comparison")
    assert len(hh) == 1800 and all(r["prompt"][-1]["role"] == "user" for r in hh)
    assert len({r["responses"][0] for r in hh}) > 1700
    gsm8k = everything(str(REAL / "gsm8k" / "test.jsonl"), "prompt")
    assert len(gsm8k) == 1319 and all("####" in r["answer"] for r in gsm8k)
    assert len(everything(str(REAL / "text" / "self_instruct_seed_tasks.jsonl"), "chat")) == 175
