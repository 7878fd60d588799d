"""Files of every format give the rows of JSON Lines; what is wrong in one is named by its row."""

import csv
import dataclasses
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from running import fails, write

import train_sft
from data import formats
from data.bad_rows import bad_rows, set_on_bad_row
from data.batches import chat_batches
from data.sources import open_source
from data.tokenizer import Tokenizer
from runtime import data_files
from runtime.checkpoint import Checkpoints
from runtime.data_files import joint_sum
from runtime.errors import UserError
from runtime.inputs import with_pinned_runs
from runtime.run_folder import finished_steps
from train_state import pin_inputs
from training_run import Run

ROWS = [
    {
        "prompt": f'Say "{i}",\nor 2, é',
        "responses": ["1", "true", f"[{i}]"],
        "ranking": [1, 2, 2],
        "margin": 0.5 if i % 2 else None,
    }
    for i in range(40)
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    set_on_bad_row("stop")


# ---- Writers of each format ----


def as_array(path, rows):
    path.write_text(json.dumps(rows, indent=1))


def as_csv(path, rows):
    # As pandas writes it: lists as JSON, the index in a column without a name.
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *rows[0]])
        for i, row in enumerate(rows):
            cells = [json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values()]
            writer.writerow([i, *cells])


def as_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)


def as_saved_folder(folder, rows, files=2):
    """Write what save_to_disk of `datasets` writes: Arrow streams, and their names in a file."""
    folder.mkdir()
    names = [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    table = pyarrow.Table.from_pylist(rows)
    size = -(-len(rows) // files)
    for i, name in enumerate(names):
        part = table.slice(i * size, size)
        with pyarrow.ipc.new_stream(str(folder / name), part.schema) as stream:
            stream.write_table(part, max_chunksize=6)
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def as_lines(path, rows):
    write(path, rows)


WRITERS = {
    "rows.json": as_array,
    "lines.json": as_lines,
    "rows.csv": as_csv,
    "rows.parquet": as_parquet,
    "folder": as_saved_folder,
}


def everything(data, schema="comparison"):
    return [
        source[i]
        for split in ("train", "heldout")
        for source in [open_source(str(data), schema, split)]
        for i in range(len(source))
    ]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_every_format_gives_the_records_of_json_lines(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(formats, "CHUNK", chunk)
    WRITERS[name](tmp_path / name, ROWS)
    found = everything(tmp_path / name)
    assert found == everything(write(tmp_path / "wanted.jsonl", ROWS))
    assert len(found) == 40 and sum("margin" in record for record in found) == 20


def test_several_files_are_read_in_the_order_of_their_names(tmp_path):
    as_parquet(tmp_path / "part-1.parquet", ROWS[20:])
    as_parquet(tmp_path / "part-0.parquet", ROWS[:20])
    (tmp_path / "part-2.txt").write_text("no data")
    wanted = everything(write(tmp_path / "wanted.jsonl", ROWS))
    assert everything(tmp_path / "part-*") == wanted
    # Controls: the order is that of names, and files of other formats may stand beside.
    write(tmp_path / "part-2.jsonl", ROWS[:1])
    assert len(everything(tmp_path / "part-*")) == 41


def test_a_columns_filling_is_no_value(tmp_path):
    """Objects of one column have the fields of all others; arguments of tools must not."""
    rows = []
    for i in range(4):
        call = {"function": {"name": "f", "arguments": {f"x{i}": i}}}
        turns = [
            {"role": "user", "content": str(i)},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "done"},
        ]
        rows.append({"messages": turns})
    as_parquet(tmp_path / "rows.parquet", rows)
    assert everything(tmp_path / "rows.parquet", "chat") == everything(
        write(tmp_path / "wanted.jsonl", rows), "chat"
    )


def test_cells_are_texts_or_json(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,answer,label\n"[1, 2]",007,\n5,true,4\ntrue,1e3,False\n')
    found = everything(path, "prompt")
    assert {(record["prompt"][0]["content"], record.get("answer")) for record in found} == {
        ("[1, 2]", "007"),
        ("5", "true"),
        ("true", None),  # judged bad: its response is no answer
    }


BAD_ARRAYS = {
    '[{"text": "a"}, [1]]': ":2: line: must be an object, not list",
    '[{"text": "a"}, {"text": "b" "c"}]': ":2: line: is not JSON (Expecting ',' delimiter)",
    '[{"text": "a"}, {"text": "b"}': ":3: line: is not JSON (Expecting ',' or ']')",
    '[{"text": "a"}, {"text": "b': ":2: line: is not JSON (Unterminated string",
    '[{"text": "a"}, {"text": "b", "text": "c"}]': ":2: text: stands twice",
    '[{"text": "a"}] 1': ":2: line: is not JSON (something stands behind",
    '[{"text": "a"}, {"text": 5}]': ":2: text: must be a string, not int",
    '[{"id": ' + "9" * 5000 + "}]": ":1: line: holds a number of too many digits",
    '[{"x": ' + "[" * 100_000: ":1: line: is not JSON that can be read",
    "5": ":1: line: is not JSON (an array of objects must begin with [)",
    "[]": ": has no rows",
    "": ":1: line: is not JSON (an array of objects must begin with [)",
}
BAD_CSV = {
    b"text\na\n\xff\n": ":2: row: is not UTF-8",
    b"text,id\na,1\nb\n": ":3: row: has 1 cells, and the header 2",
    b"text,text\na,b\n": ":1: text: names two columns",
    b'text\n"a\n': ":2: row: is not CSV (unexpected end of data)",
    b"text;id\na;1\n": ":1: row: has one column, 'text;id'; part columns by commas",
    b"text,id\n,1\n": ":2: messages: missing; the row needs",
    b"": ": has no rows",
    b"text\n": ": has no rows",
}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [("rows.json", text.encode(), reason) for text, reason in BAD_ARRAYS.items()]
    + [("rows.csv", text, reason) for text, reason in BAD_CSV.items()],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_bad_row_is_named(tmp_path, cache, monkeypatch, name, content, reason, chunk):
    monkeypatch.setattr(formats, "CHUNK", chunk)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as fault:
        open_source(str(path), "text", "train")
    assert str(fault.value).startswith(f"{path}{reason}") and "\n" not in str(fault.value)
    assert not list(cache.glob("*"))


def test_a_bad_row_of_a_table_is_named(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(600)] + [{"text": None, "id": 1}]
    for name in ("rows.parquet", "folder"):
        WRITERS[name](tmp_path / name, rows)
    with pytest.raises(UserError, match=r"rows\.parquet:601: messages: missing"):
        open_source(str(tmp_path / "rows.parquet"), "text", "train")
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow:300: messages: missing"):
        open_source(str(tmp_path / "folder"), "text", "train")
    for name in ("rows.parquet", "folder/data-00000-of-00002.arrow"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:300])
        with pytest.raises(UserError, match="cannot be read") as fault:
            open_source(
                str((tmp_path / name).parent if "/" in name else tmp_path / name), "text", "train"
            )
        assert "\n" not in str(fault.value)


def test_names_of_nothing_are_one_line(tmp_path):
    (tmp_path / "plain").mkdir()
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "notes.txt").write_text("x")
    for name, reason in (
        ("plain", "is a folder; name files in it"),
        ("splits", f"holds several splits; name one of {splits}/train, {splits}/test"),
        ("*.parquet", "no file of a known kind"),
        ("none.parquet", "no such file"),
        ("notes.txt", "not a source"),
    ):
        with pytest.raises(UserError, match=reason) as fault:
            open_source(str(tmp_path / name), "text", "train")
        assert "\n" not in str(fault.value)


DAMAGED = ["{", "[]", "[" * 100_000, '{"_data_files": 3, "splits": 3}', '{"a": 1, "a": 2}']
DAMAGED += ['{"_data_files": [{}], "splits": [{}]}', '{"_data_files": [3], "splits": []}']


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_damaged_folder_of_datasets_is_one_line(tmp_path, name):
    for content in DAMAGED:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=name) as fault:
            open_source(str(tmp_path), "text", "train")
        assert "\n" not in str(fault.value)


def test_a_folder_of_datasets_names_files_of_its_own(tmp_path):
    as_saved_folder(tmp_path / "folder", ROWS)
    write(tmp_path / "mine.jsonl", ROWS)
    for outside in ("../mine.jsonl", str(tmp_path / "mine.jsonl")):
        state = {"_data_files": [{"filename": outside}]}
        (tmp_path / "folder" / "state.json").write_text(json.dumps(state))
        with pytest.raises(UserError, match="lies outside the folder"):
            open_source(str(tmp_path / "folder"), "comparison", "train")


# ---- The Hub, by `datasets` ----


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stand in for `datasets`: what it was asked for, and a folder that it has fetched."""
    as_saved_folder(tmp_path / "fetched", ROWS)
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        if split == "none":
            raise ValueError('Unknown split "none".\nShould be one of train')
        files = sorted((tmp_path / "fetched").glob("*.arrow"))
        return types.SimpleNamespace(cache_files=[{"filename": str(file)} for file in files])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data_files._on_the_hub.cache_clear()
    yield asked
    data_files._on_the_hub.cache_clear()


def test_a_name_on_the_hub_is_read_as_files(tmp_path, hub, monkeypatch):
    assert everything("hf:me/pairs") == everything(write(tmp_path / "wanted.jsonl", ROWS))
    assert len(open_source("hf:me/pairs:hard@test", "comparison", "all")) == 40
    assert hub == [("me/pairs", None, "train"), ("me/pairs", "hard", "test")]
    with pytest.raises(UserError, match=r"cannot be fetched \(Unknown split .none.. Should be"):
        open_source("hf:me/pairs@none", "comparison", "train")
    with pytest.raises(UserError, match="must be hf:<owner>/<name>"):
        open_source("hf:pairs", "comparison", "train")
    # None is a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs `datasets`; pip install -r requirements-hf\.txt"):
        open_source("hf:me/other", "comparison", "train")


# ---- Pinned and resumed as JSON Lines are ----

CHATS = [
    {"prompt": f"question {i % 40}", "response": f"answer {i} of the many"} for i in range(120)
]
SMALL = ["--model.preset=tiny", "--length=32", "--batch_size=8", "--eval_every=0"]


@dataclasses.dataclass(frozen=True)
class Config:
    """As a script has it, of what reads data."""

    run: str
    data: str
    steps: int = 9


def begin_or_resume(config):
    """Open the folder of a run as a script does; save its first step if it has none."""
    config = with_pinned_runs(config)
    with Checkpoints(config.run, config, script="fork", tokenizer=None, keep=2) as saver:
        if not finished_steps(saver.folder):
            saver.save(1, {"params": {"w": jnp.zeros(4)}})


@pytest.fixture(params=["part-*.parquet", "folder"])
def several(request, tmp_path):
    """Write CHATS into two files; return what names both, and the second one."""
    if request.param == "folder":
        as_saved_folder(tmp_path / "folder", CHATS)
        return str(tmp_path / "folder"), tmp_path / "folder" / "data-00001-of-00002.arrow"
    as_parquet(tmp_path / "part-0.parquet", CHATS[:60])
    as_parquet(tmp_path / "part-1.parquet", CHATS[60:])
    return str(tmp_path / "part-*.parquet"), tmp_path / "part-1.parquet"


def test_several_files_are_resumed_to_the_bit(several, tmp_path):
    data, _ = several

    def batches_of(data, at=None):
        source = open_source(str(data), "chat", "train")
        made = chat_batches(source, tokenizer, batch_size=8, length=32)
        if at is not None:
            made.restore(at)
        return made

    texts = [f"{row['prompt']} {row['response']}" for row in CHATS]
    tokenizer = Tokenizer.train(texts, tmp_path, 300)
    whole = batches_of(data)
    first = [next(whole) for _ in range(2)]
    at = whole.state
    rest = [next(whole) for _ in range(3)]
    resumed = batches_of(data, json.loads(json.dumps(at)))
    lines = batches_of(write(tmp_path / "wanted.jsonl", CHATS))
    for wanted in (*first, *rest):
        for name, array in next(lines).items():
            np.testing.assert_array_equal(array, wanted[name])
    for wanted in rest:
        for name, array in next(resumed).items():
            np.testing.assert_array_equal(array, wanted[name])


def test_the_content_of_all_files_is_pinned(several, tmp_path):
    data, second = several
    config = Config(run=str(tmp_path / "run"), data=data)
    begin_or_resume(config)
    begin_or_resume(dataclasses.replace(config, steps=12))  # control
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["inputs"]["data"] == {"sha256": joint_sum(data)}
    # Other content, in the second file alone.
    second.write_bytes(second.read_bytes() + b" ")
    with pytest.raises(UserError, match="its content is not what"):
        begin_or_resume(config)


# ---- Bad rows, skipped ----

GOOD = [{"text": f"text {i}"} for i in range(40)]
FAULTS = {
    "rows.jsonl": ["2: line: is not JSON", "4: text: must be a string"],
    "rows.json": ["2: line: must be an object", "4: text: must be a string"],
    "rows.csv": ["3: row: has 3 cells, and the header 1", "6: row: has 2 cells"],
    "rows.parquet": ["2: messages: missing", "4: text: is empty"],
}


@pytest.fixture
def with_bad_rows(tmp_path):
    """Write a file of each format with bad rows among GOOD; return the folder."""
    texts = [json.dumps(row) for row in GOOD]
    wrong = [texts[0], "[1]", texts[1], '{"text": 5}', *texts[2:]]
    (tmp_path / "rows.json").write_text(f"[{','.join(wrong)}]")
    wrong[1] = "nonsense"
    (tmp_path / "rows.jsonl").write_text("\n".join(wrong))
    cells = ["text", "text 0", "a,b,c", "text 1", "", "c,d", *[row["text"] for row in GOOD[2:]]]
    (tmp_path / "rows.csv").write_text("\n".join(cells))
    rows = [GOOD[0], {"text": None}, GOOD[1], {"text": " "}, *GOOD[2:]]
    as_parquet(tmp_path / "rows.parquet", rows)
    return tmp_path


@pytest.mark.parametrize("name", FAULTS)
def test_bad_rows_are_skipped_counted_and_listed(with_bad_rows, capsys, name):
    data = str(with_bad_rows / name)
    with pytest.raises(UserError) as fault:
        open_source(data, "text", "all")
    assert str(fault.value).startswith(f"{data}:{FAULTS[name][0]}")

    set_on_bad_row("skip")
    source = open_source(data, "text", "all")
    assert [source[i] for i in range(len(source))] == GOOD
    skipped = bad_rows()
    assert len(skipped) == 2
    for said, wanted in zip(skipped, FAULTS[name], strict=True):
        assert said.startswith(f"{data}:{wanted}")
    note = f"note: {data}: 2 of 42 rows are skipped; the first is {skipped[0]}"
    assert note in capsys.readouterr().err
    # Kept: the same again, of what is kept.
    set_on_bad_row("skip")
    open_source(data, "text", "train")
    assert bad_rows() == skipped

    # And stopped at again, although it is kept.
    set_on_bad_row("stop")
    with pytest.raises(UserError):
        open_source(data, "text", "all")


def test_rows_that_say_so_are_not_trained_on(tmp_path, capsys):
    rows = [*GOOD[:3], {"text": "a", "weight": 0}, *GOOD[3:], {"text": "b", "train": False}]
    data = str(write(tmp_path / "rows.jsonl", rows))
    source = open_source(data, "text", "all")
    assert [source[i] for i in range(len(source))] == GOOD and not bad_rows()
    note = f"note: {data}: 2 rows say that they are not trained on: left out"
    assert note in capsys.readouterr().err
    # Control: with their weight they are there.
    write(tmp_path / "rows.jsonl", [*GOOD, {"text": "a", "weight": 1, "train": True}])
    assert len(open_source(data, "text", "all")) == len(GOOD) + 1


def test_a_file_of_bad_rows_alone_is_refused(tmp_path):
    set_on_bad_row("skip")
    data = write(tmp_path / "rows.jsonl", [{"text": 5}] * 3)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: text: must be a string"):
        open_source(str(data), "text", "all")


def test_a_run_lists_the_rows_that_it_skipped(tmp_path, capsys):
    data = write(tmp_path / "chats.jsonl", [*CHATS[:9], {"prompt": "q", "response": ""}, *CHATS])
    flags = [f"--data={data}", f"--run={tmp_path}/run", *SMALL]
    assert "chats.jsonl:10: response: is empty" in fails(train_sft, flags, capsys)
    assert not (tmp_path / "run").exists()

    # As a script does it, up to its first step; some have a file for evaluations too.
    evaluated = write(tmp_path / "evaluated.jsonl", [*CHATS[:3], {"prompt": "a", "response": ""}])

    def begin(folder, *more):
        config = train_sft.Config(run=str(tmp_path / folder), data=str(data), **dict(more))
        config = pin_inputs(config)
        source = open_source(config.data, "chat", "train")
        open_source(str(evaluated), "chat", "all")
        texts = [f"{row['prompt']} {row['response']}" for row in CHATS]
        tokenizer = Tokenizer.train(texts, tmp_path, 300)
        with Run(config, tokenizer) as frame:
            frame.restore({}, chat_batches(source, tokenizer, batch_size=8, length=32))
        return tmp_path / folder / "skipped.txt"

    line, of_evaluated = begin("run", ("on_bad_row", "skip")).read_text().splitlines()
    assert line.startswith(f"{data}:10: response: is empty")
    assert of_evaluated.startswith(f"{evaluated}:4: response: is empty")
    # Control: a run that skips nothing lists nothing.
    write(data, CHATS)
    write(evaluated, CHATS)
    assert not begin("other", ("on_bad_row", "skip")).exists()


def test_parquet_is_never_read_whole(tmp_path, monkeypatch):
    """Of a file of one row group, no more than ROWS rows are decoded before the first is given."""
    rows = [{"text": f"text {i}"} for i in range(4 * formats.ROWS)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    sizes = []
    each = formats._rows_of

    def counted(batches, before):
        def watched():
            for batch in batches:
                sizes.append(batch.num_rows)
                yield batch

        return each(watched(), before)

    monkeypatch.setattr(formats, "_rows_of", counted)
    read = formats.read_parquet(tmp_path / "rows.parquet")
    assert next(read) == (1, rows[0])
    assert sizes == [formats.ROWS]
    assert len(list(read)) == 4 * formats.ROWS - 1 and len(sizes) == 4


@pytest.mark.parametrize("rows_a_group", [100, 5000])
def test_what_is_read_of_parquet_is_not_kept(tmp_path, rows_a_group):
    rng = np.random.default_rng(0)
    # 20 MB, 10 MB in the file, in small pages.
    rows = [{"text": rng.bytes(2000).hex()} for _ in range(5000)]
    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist(rows)
    sizes = {"row_group_size": rows_a_group, "data_page_size": 1 << 16, "write_batch_size": 16}
    pyarrow.parquet.write_table(table, path, use_dictionary=False, **sizes)
    del table
    before = pyarrow.total_allocated_bytes()
    held = []
    for number, row in formats.read_parquet(path):
        assert row == rows[number - 1]
        held.append(pyarrow.total_allocated_bytes() - before)
    assert len(held) == 5000 and max(held) < 5e6 < path.stat().st_size
