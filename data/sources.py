"""Records by random access, in one schema, from what is built in, a file or the TFDS catalogue.

    open_source("world" | "arithmetic" | "path.jsonl[.gz]" | "path.json" | "path.csv" |
                "part-*.parquet" | "folder/of/datasets" | "hf:<owner>/<name>[:config][@split]" |
                "tfds:<name>[/config]" | "a.jsonl:2 b.parquet:1", schema, split, seed=0)

Files are validated row by row and prepared once as an ArrayRecord file, in $PLUMB_CACHE. Errors
in a file read `file:line: field: reason`, or `file:row: ...` where rows are no lines. What is
prepared is checked by its sums, and prepared again where it is damaged.
"""

import functools
import glob
import gzip
import hashlib
import json
import os
import pathlib
import sys
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from tqdm import tqdm

from data.bad_rows import are_bad_rows_skipped, list_bad_rows
from data.fields import FieldError, LeftOut, Row, name_shown, unlike_keys
from data.formats import READERS, NumberedRow, is_lines
from data.messages import is_trained
from data.mixture import mixed
from data.records import SCHEMAS, Record, Schema, unread_fields
from data.source import ENDLESS, Source
from runtime.compiled import cache_folder
from runtime.data_files import KINDS, content_sum, files_named
from runtime.errors import UserError, require
from runtime.foreign import one_line
from runtime.hosts import progressed
from runtime.inputs import BUILT_IN, catalogue_folder, newest_prepared
from runtime.mixtures import Share, is_mixture, names_in, read_mixture
from runtime.writes import beside, is_full_disk, remove_all_left_over
from tasks import arithmetic, world

SCHEMA_VERSION = 3
"""Version of what is kept of a file. Raise it whenever a row would be adapted (data/records.py),
held out or stored in another way than before: files prepared with another version are prepared
again. Renaming, comments and messages need no new version."""
SOURCES = (
    "world, arithmetic, a .jsonl[.gz], .json, .csv or .parquet file, a folder of `datasets`, "
    "hf:<owner>/<name>, tfds:<name>, or several as in 'a.jsonl:2 b.jsonl:1'"
)
"""What --data may name, for messages."""
HELDOUT_SHARE = 0.05
"""Share held out of a source without a held-out split of its own."""
HELDOUT_MOST = 1000
"""Most rows held out of such a source."""

RECORDS = "records.array_record"
"""File of a prepared folder: the records, one after the other, each as JSON."""
SUMS = "sums.json"
"""File of a prepared folder: the SHA-256 of each other file."""

Split = Literal["train", "heldout", "all"]


def open_source(
    data: str, schema: Schema, split: Split, *, seed: int = 0, with_texts: bool = False
) -> Source:
    """Open the records of `data` in `schema` (see data/records.py).

    `data`: world, arithmetic, tfds:<name>, what names files (runtime/data_files.py), or several of
    these as a mixture (runtime/mixtures.py). `split`: train or heldout, which share no prompt; or
    all, of files alone. `seed`: that of what is built in. `with_texts`: a mixture may have sources
    of documents, records of the schema text. Raises UserError for what is missing or malformed,
    naming file, line and field, and ValueError for another schema or split.
    """
    if schema not in SCHEMAS or split not in get_args(Split):
        raise ValueError(f"schema {schema!r}, split {split!r}")
    if is_mixture(data):
        return _mixture(data, schema, split, seed, with_texts)
    return _open_one(data, schema, split, seed)


def _open_one(
    data: str, schema: Schema, split: Split, seed: int, held_out_elsewhere: Collection[int] = ()
) -> Source:
    """Open what is no mixture; as `open_source`.

    `held_out_elsewhere`: hashes of rows that no file trains on.
    """
    if not is_file(data):
        if split == "all":
            raise UserError(f"{data}: has no split {split}, only train and heldout")
        if data in BUILT_IN:
            return _built_in(data, schema, split, seed)
        return _catalogue(data.removeprefix("tfds:"), schema, split)
    return _local(data, schema, split, held_out_elsewhere)


def is_file(data: str) -> bool:
    """Tell files from what is built in and from the catalogue, by the name alone.

    A mixture is files where all that it names is.
    """
    names = names_in(data) or [data]
    return all(name not in BUILT_IN and not name.startswith("tfds:") for name in names)


def evaluated_split(data: str) -> Split:
    """Return the split that an evaluation of `data` reads where none is asked for.

    All of a file, which holds what its user wants measured; of other sources what is held out.
    """
    return "all" if is_file(data) else "heldout"


def check_eval_records(records: int) -> None:
    """Raise UserError for a number of held-out records, --eval_records, that measures nothing."""
    require(
        records >= 1,
        f"--eval_records={records}: must be at least 1; --eval_every=0 leaves evaluations out",
    )


def rows_of(data: str, schema: Schema) -> Iterator[Row]:
    """Yield the rows of files as they stand there, those that open_source(..., "all") has."""

    def passed_over(_: str) -> None:
        """What is wrong with a row was said when the source was opened."""

    for row, _ in _rows_and_records(_data_files(data), schema, passed_over, passed_over):
        yield row


def first_row(data: str) -> Row:
    """Return the first row of files; UserError where there is none to read."""
    for path in _data_files(data):
        for number, row in _rows(path):
            if isinstance(row, FieldError):
                raise UserError(f"{path}:{number}: {row}")
            return row
    raise UserError(f"{data}: has no rows; give a file that has some")


def reads(row: Row, schema: Schema) -> bool:
    """Return whether `schema` reads a row."""
    try:
        SCHEMAS[schema](row)
    except FieldError:
        return False
    return True


_for_now: tempfile.TemporaryDirectory | None = None


def keep_prepared(keep: bool) -> None:
    """Keep local files that are prepared from now on in $PLUMB_CACHE, or, as a dry run, nowhere.

    Nowhere is a temporary folder that goes with this process, or with the next call of this.
    """
    global _for_now
    if _for_now is not None:
        _for_now.cleanup()
    _for_now = None if keep else tempfile.TemporaryDirectory(prefix="plumb-")


# ---- Built in ----


def _built_in(name: str, schema: Schema, split: world.Split, seed: int) -> Source:
    makers = _world(split, seed) if name == "world" else _arithmetic(split, seed)
    if schema not in makers:
        raise UserError(
            f"--data={name}: has no {schema} records, only {', '.join(makers)}; "
            "name another source"
        )
    make = makers[schema]
    adapt = SCHEMAS[schema]

    def read(i: int) -> Record:
        return adapt(make(i))

    return Source(name, range(ENDLESS), read)


def _world(split: world.Split, seed: int) -> dict[str, Callable[[int], Row]]:
    """Return functions from an index to a row of the built-in world, by schema."""
    # Documents have no splits of their own: the held-out ones are numbered after the others.
    first = ENDLESS if split == "heldout" else 0

    def text(i: int) -> Row:
        return {"text": world.text(i + first, seed=seed)}

    def chat(i: int) -> Row:
        return world.conversation(i, split=split, seed=seed)

    def comparison(i: int) -> Row:
        return world.comparison(i, split=split, seed=seed)

    def unpaired(i: int) -> Row:
        return world.judgement(i, split=split, seed=seed)

    def prompt(i: int) -> Row:
        return {"prompt": world.prompt(i, split=split, seed=seed).text}

    return {
        "text": text,
        "chat": chat,
        "comparison": comparison,
        "unpaired": unpaired,
        "prompt": prompt,
    }


def _arithmetic(split: arithmetic.Split, seed: int) -> dict[str, Callable[[int], Row]]:
    """Return functions from an index to a row of the built-in arithmetic, by schema."""
    # As in the world: documents have no splits of their own.
    first = ENDLESS if split == "heldout" else 0

    def text(i: int) -> Row:
        return {"text": arithmetic.document(i + first, seed=seed)}

    def chat(i: int) -> Row:
        return arithmetic.demonstration(i, split=split, seed=seed)

    def prompt(i: int) -> Row:
        return arithmetic.prompt(i, split=split, seed=seed)

    def steps(i: int) -> Row:
        return dict(arithmetic.labelled(i, split=split, seed=seed))

    return {"text": text, "chat": chat, "prompt": prompt, "steps": steps}


# ---- Mixtures ----


def _mixture(data: str, schema: Schema, split: Split, seed: int, with_texts: bool) -> Source:
    """Open each source of a mixture, and join them."""
    stages = read_mixture(data)
    shares: dict[str, Share] = {}
    for stage in stages:
        shares |= {share.label: share for share in stage.shares}

    # What one file holds out no other may train on: prompts may stand in several. A conversation
    # and its text have different hashes.
    schemas: dict[str, Schema] = {}
    read_as_text: dict[pathlib.Path, bool] = {}
    held_out_hashes: set[int] = set()
    for label, share in shares.items():
        require(
            with_texts or not share.as_text,
            f"mixture: {label}: documents are mixed into conversations by train_sft.py alone; "
            "leave @text out",
        )
        schemas[label] = "text" if share.as_text else schema
        if is_file(share.data):
            for file in _data_files(share.data):
                as_text = read_as_text.setdefault(file.resolve(), share.as_text)
                require(
                    as_text == share.as_text,
                    f"mixture: {share.data}: stands there with @text and without, so that what "
                    "is held out would be trained on; name it once",
                )
            keys_N = _keys_of(share.data, schemas[label])
            held_out_hashes.update(keys_N[held_out(keys_N)].tolist())

    require(
        not all(share.as_text for share in shares.values()),
        f"{data}: holds documents alone; train_lm.py trains on them",
    )

    sources = []
    rows = []
    for label, share in shares.items():
        source = _open_one(share.data, schemas[label], split, seed, held_out_hashes)
        sources.append(source)
        # What is held out has the shares of what is trained on.
        if split == "heldout" and share.by_rows:
            source = _open_one(share.data, schemas[label], "train", seed, held_out_hashes)
        rows.append(len(source))
    return mixed(data, stages, sources, list(shares), rows)


# ---- The TFDS catalogue ----


def _catalogue(name: str, schema: Schema, split: Split) -> Source:
    # Slow to import: only where it is needed.
    import tensorflow_datasets as tfds

    data_dir = catalogue_folder()
    newest = newest_prepared(f"tfds:{name}")
    if newest is None:
        remedy = _how_to_prepare(name, data_dir)
        raise UserError(f"tfds:{name}: not under {data_dir} ($TFDS_DATA_DIR); {remedy}")
    builder = tfds.builder_from_directory(newest)
    part = _part(builder.info.splits, split)
    try:
        stored = builder.as_data_source(split=part)
    # The first is what TFDS raises for files that can be read in order only.
    except (NotImplementedError, ValueError, OSError) as fault:
        raise UserError(
            f"tfds:{name}: {newest}: split {part} is not readable by random access ({fault}); "
            f"{_how_to_prepare(name, data_dir)}"
        ) from None
    adapt = SCHEMAS[schema]

    def read(i: int) -> Record:
        try:
            return adapt(_plain(stored[i]))
        except (FieldError, UnicodeDecodeError) as fault:
            raise UserError(f"tfds:{name}: {part} row {i}: {fault}") from None

    return Source(f"tfds:{name}", range(len(stored)), read)


def _part(splits: dict[str, Any], split: Split) -> str:
    """Name the part of a catalogue data set that serves as `split`, as TFDS writes it.

    Held out is its own validation or test split, else the last rows of train.
    """
    for own in ("validation", "test"):
        if own in splits:
            return own if split == "heldout" else "train"
    size = splits["train"].num_examples if "train" in splits else 0
    held_out_rows = min(max(int(size * HELDOUT_SHARE), 1), HELDOUT_MOST)
    border = size - held_out_rows
    return f"train[:{border}]" if split == "train" else f"train[{border}:]"


def _how_to_prepare(name: str, data_dir: pathlib.Path) -> str:
    """Return the remedy when `name` is not on disk: the command that prepares it.

    Some of the catalogue is only found after an import of its module, which is then part of it.
    """
    import tensorflow_datasets as tfds

    root = pathlib.Path(tfds.__file__).parent
    base = name.split("/")[0]
    places = (f"*/{base}.py", f"*/{base}/{base}.py")
    # By os.path, to which a name that is too long is none.
    modules = [pathlib.Path(found) for place in places for found in glob.glob(str(root / place))]
    known = base in tfds.list_builders(with_community_datasets=False)
    if not known and not modules:
        return "the TFDS catalogue has no such name either: check the spelling"
    needed = ""
    if not known:
        module = min(modules).relative_to(root.parent).with_suffix("")
        needed = f"import {'.'.join(module.parts)}; "
    return (
        "prepare it once: python -c "
        f"\"import tensorflow_datasets as tfds; {needed}tfds.builder('{name}', "
        f"data_dir='{data_dir}', file_format='array_record').download_and_prepare()\""
    )


def _plain(value: Any) -> Any:
    """Turn what TFDS stores into what JSON gives: bytes to text, arrays to lists or numbers."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


# ---- Local files ----


def _keys_of(data: str, schema: Schema) -> np.ndarray:
    """Return the hashes of the rows of files that decide which are held out, uint64 [N]."""
    with np.load(_prepared(data, _data_files(data), schema) / "split.npz") as saved:
        return saved["keys"]


def _local(data: str, schema: Schema, split: Split, held_out_elsewhere: Collection[int]) -> Source:
    """Open files; hashes of rows `held_out_elsewhere` are not trained on."""
    folder = _prepared(data, _data_files(data), schema)
    stored = _stored(folder / RECORDS)
    with np.load(folder / "split.npz") as saved:
        keys_N = saved["keys"]
        candidates = int(saved["candidates"])
    list_bad_rows(json.loads((folder / "skipped.json").read_text()))

    def read(i: int) -> Record:
        return json.loads(stored[i])

    # What the user may not have meant is said with the records that are trained on.
    if split != "heldout":
        for note in json.loads((folder / "notes.json").read_text()):
            _say_once(f"note: {data}: {note}")
    if split == "all":
        return Source(data, np.arange(len(keys_N)), read, candidates)
    held_out_N = held_out(keys_N)
    if held_out_N.all():
        same = "has one row" if len(keys_N) == 1 else "all its prompts or texts are the same"
        raise UserError(f"{data}: {same}: none can be held out; add others")
    if split == "heldout":
        name = f"the held-out split of {data}"
        return Source(name, np.flatnonzero(held_out_N), read, candidates)
    train_N = ~held_out_N
    if held_out_elsewhere:
        train_N &= ~np.isin(keys_N, np.array([*held_out_elsewhere], np.uint64))
        if not train_N.any():
            raise UserError(f"{data}: all its prompts are held out of other sources; add others")
    return Source(data, np.flatnonzero(train_N), read, candidates)


@functools.cache
def _say_once(line: str) -> None:
    """Print a line to stderr, once in a process."""
    print(line, file=sys.stderr)


def held_out(keys_N: np.ndarray) -> np.ndarray:
    """Return which of N rows are held out, bool [N], by their hashes, uint64 [N].

    They are HELDOUT_SHARE of the rows, at least one and at most HELDOUT_MOST; rows of equal
    hashes stay together.
    """
    ordered = np.sort(keys_N)
    limit = np.uint64(HELDOUT_SHARE * 2**64)
    if len(ordered) > HELDOUT_MOST:
        limit = min(limit, ordered[HELDOUT_MOST])
    if ordered[0] < limit:
        return keys_N < limit
    return keys_N == ordered[0]


def _key(record: Record) -> int:
    """Hash what decides whether a record is held out: its prompt, or all of it without one.

    So no prompt is in both splits, whatever the schema.
    """
    messages = record.get("prompt") or record.get("messages", [])
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    text = json.dumps(messages or record, sort_keys=True)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8])


def _data_files(data: str) -> list[pathlib.Path]:
    """Return the files that `data` names; raise UserError for none, or for other files."""
    if is_mixture(data):
        raise UserError(f"{data}: is a mixture, which this command does not read; name one file")
    files = files_named(data)
    if not files:
        if os.path.isdir(data):
            raise UserError(f"{data}: is a folder; name files in it, such as {data}/*.jsonl")
        what = "no file of a known kind" if glob.has_magic(data) else "no such file"
        if os.path.exists(data):
            raise UserError(f"{data}: can be read only once; write it into a file")
        raise UserError(f"{data}: {what}; give {SOURCES}")
    for file in files:
        if not file.name.endswith(KINDS):
            raise UserError(f"{file}: not a source; give {SOURCES}")
    return files


def _file_sum(path: pathlib.Path) -> str:
    """Return the SHA-256 of a data file's bytes; raise UserError where it cannot be read."""
    try:
        return content_sum(path)
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None


def _prepared(data: str, files: Sequence[pathlib.Path], schema: Schema) -> pathlib.Path:
    """Return the folder of the records made of `files`; make it if it is not there.

    A damaged folder is made again, with a note. What processes that were killed left in the cache
    is removed.
    """
    cache = cache_folder()
    # Its name is a hash of all that it depends on.
    contents = [f"{file.suffix} {_file_sum(file)}" for file in files]
    choice = "skip" if are_bad_rows_skipped() else "stop"
    identity = " ".join([schema, str(SCHEMA_VERSION), choice, *contents])
    folder = cache / hashlib.sha256(identity.encode()).hexdigest()[:32]
    remove_all_left_over(cache)
    # A dry run leaves nothing behind.
    if _for_now is not None and not folder.exists():
        cache = pathlib.Path(_for_now.name)
        folder = cache / folder.name
    if folder.exists():
        fault = _damage(folder)
        if fault is None:
            return folder
        print(f"note: {folder}: {fault}; {data} is prepared again", file=sys.stderr)
        _remove(folder)

    try:
        _prepare(data, files, schema, folder)
    # ArrayRecord has errors of its own for a full disk.
    except Exception as fault:
        if not isinstance(fault, OSError) and not is_full_disk(fault):
            raise
        raise UserError(
            f"{cache}: cannot keep {data} here ({one_line(fault)}); "
            "free the disk, or set PLUMB_CACHE to another"
        ) from None
    return folder


def _damage(folder: pathlib.Path) -> str | None:
    """Return what is wrong with a prepared folder, by its sums; None for one that is whole."""
    try:
        sums = json.loads((folder / SUMS).read_bytes())
        for name, digest in sums.items():
            if content_sum(folder / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, AttributeError) as fault:
        return f"is damaged ({fault})"
    return None if "split.npz" in sums else "is damaged"


def _remove(folder: pathlib.Path) -> None:
    """Remove a prepared folder, all of it at once for others that look for it."""
    try:
        with beside(folder, is_folder=True) as (gone, _):
            folder.rename(gone / folder.name)
    # Another process was faster.
    except FileNotFoundError:
        return
    except OSError as fault:
        raise UserError(f"{folder}: is damaged ({fault.strerror}); remove it") from None


# ---- Preparing, all of it or nothing ----


class Facts(NamedTuple):
    """Facts of a file, known once all of it has been read."""

    keys_N: np.ndarray
    """For each record the hash that decides whether it is held out, uint64."""
    candidates: int
    """The most responses that a comparison has."""
    notes: list[str]
    """What the user may not have meant."""
    skipped: list[str]
    """What is wrong with each row that was left out."""


def _facts(
    rows: Iterable[tuple[Row, Record]], schema: Schema, skipped: list[str], left_out: list[str]
) -> Facts:
    """Go through all rows and their records.

    `skipped`: what is wrong with rows that are passed over; `left_out`: those that say themselves
    that they are not trained on. Both are filled while the rows are read.
    """
    keys = []
    candidates = 0
    turns = 0
    trained = 0
    unread: set[str] = set()
    for row, record in rows:
        keys.append(_key(record))
        candidates = max(candidates, len(record.get("responses", ())))
        unread |= unread_fields(row, schema)
        # Turns that are context only.
        said = [
            message for message in record.get("messages", ()) if message["role"] == "assistant"
        ]
        turns += len(said)
        trained += sum(map(is_trained, said))

    notes = []
    if skipped:
        count = f"{len(skipped):,} of {len(skipped) + len(keys):,} rows are skipped"
        notes.append(f"{count}; the first is {skipped[0]}")
    if left_out:
        notes.append(f"{len(left_out):,} rows say that they are not trained on: left out")
    if unread:
        names = [name_shown(name) for name in sorted(unread)]
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        notes.append(f"fields that nothing reads: {', '.join(names[:12])}{more}")
    if trained < turns:
        notes.append(
            f"{turns - trained} of {turns} assistant's turns are not trained on "
            "(weight 0, or they call tools)"
        )
    return Facts(np.array(keys, np.uint64), candidates, notes, skipped)


def _prepare(
    data: str, files: Sequence[pathlib.Path], schema: Schema, folder: pathlib.Path
) -> None:
    """Make `folder` of `files`: all of it or nothing. Raises OSError where there is no room."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with beside(folder, is_folder=True) as (partial, _):
        built = partial / "built"
        built.mkdir()
        facts = _write(files, schema, built / RECORDS)
        if facts.skipped and not len(facts.keys_N):
            raise UserError(facts.skipped[0])
        if not len(facts.keys_N):
            raise UserError(f"{data}: has no rows; give a file that has some")
        np.savez(built / "split.npz", keys=facts.keys_N, candidates=facts.candidates)
        (built / "notes.json").write_text(json.dumps(facts.notes))
        (built / "skipped.json").write_text(json.dumps(facts.skipped))
        sums = {file.name: content_sum(file) for file in built.iterdir()}
        (built / SUMS).write_text(json.dumps(sums))
        try:
            built.rename(folder)
        except OSError:
            # Another process may have been faster.
            if not folder.exists():
                raise


def _stored(path: pathlib.Path) -> Sequence[bytes]:
    """Open a file of records, each read when it is asked for."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource(str(path))


def _write(files: Sequence[pathlib.Path], schema: Schema, path: pathlib.Path) -> Facts:
    """Write the records of `files` to `path`, one a group, so that each is read by itself."""
    # Not there where a benchmark runs without data.
    from array_record.python import array_record_module

    skipped: list[str] = []
    left_out: list[str] = []
    on_fault = skipped.append if are_bad_rows_skipped() else _stop
    rows = _rows_and_records(files, schema, on_fault, left_out.append)
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")

    def written() -> Iterator[tuple[Row, Record]]:
        for row, record in tqdm(rows, f"preparing {files[0].name}", unit="row"):
            writer.write(json.dumps(record).encode())
            yield row, record

    # In one go: a file is read once.
    try:
        facts = _facts(written(), schema, skipped, left_out)
    finally:
        writer.close()
    stored = len(_stored(path)) if len(facts.keys_N) else 0
    if stored != len(facts.keys_N):
        raise RuntimeError(f"{files[0]}: {len(facts.keys_N)} rows, but {stored} are kept of them")
    return facts


def _stop(fault: str) -> None:
    raise UserError(fault)


def _rows(path: pathlib.Path) -> Iterator[NumberedRow]:
    """Yield the rows of a file, of whatever format, with their numbers."""
    read = read_lines if is_lines(path) else READERS[path.suffix]
    return read(path)


def _rows_and_records(
    files: Sequence[pathlib.Path],
    schema: Schema,
    on_fault: Callable[[str], None] = _stop,
    on_left_out: Callable[[str], None] = _stop,
) -> Iterator[tuple[Row, Record]]:
    """Yield each row of the files, one after the other, and its record.

    Called with `file:line: field: reason`, and the row passed over, are `on_fault` for a bad row
    and `on_left_out` for one that says that it is not trained on.
    """
    adapt = SCHEMAS[schema]
    for path in files:
        for number, row in _rows(path):
            progressed()
            try:
                if isinstance(row, FieldError):
                    raise row
                record = adapt(row)
            except FieldError as fault:
                pass_over = on_left_out if isinstance(fault, LeftOut) else on_fault
                pass_over(f"{path}:{number}: {fault}")
                continue
            yield row, record


def read_lines(path: pathlib.Path) -> Iterator[NumberedRow]:
    """Yield (number, row) of each line of a .jsonl[.gz] file, from 1, blank lines skipped.

    A line that is no JSON object yields (number, FieldError). Raises UserError for a broken gzip
    file and OSError for a file that cannot be opened.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            yield number, _row(line)
        except FieldError as fault:
            yield number, fault


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Yield each line of a .jsonl[.gz] file and its number, from 1."""
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rb") as lines:
            for line in lines:
                number += 1
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as fault:
        raise UserError(
            f"{path}:{number + 1}: broken gzip file ({fault}); compress it again"
        ) from None


def _row(line: bytes) -> Row:
    """Read a line as a JSON object; raises FieldError for the field `line`."""
    if not line.strip(b"\0 \r\n\t"):
        raise FieldError("line", "holds NULs alone, as a crash leaves them; remove it")
    try:
        # Without its newline, at which the parser would say the fault is.
        text = line.decode("utf-8-sig").rstrip()
        row = json.loads(text, object_pairs_hook=unlike_keys)
    except UnicodeDecodeError as fault:
        raise FieldError(
            "line", f"is not UTF-8 (byte {fault.start + 1}); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as fault:
        reason = f"{fault.msg}, column {fault.colno}"
        raise FieldError("line", f"is not JSON ({reason}); write one object a line") from None
    except RecursionError:
        raise FieldError("line", "is not JSON that can be read (it nests too deep)") from None
    except ValueError:
        raise FieldError("line", "holds a number of too many digits; write a string") from None
    if not isinstance(row, dict):
        raise FieldError(
            "line",
            f"must be a JSON object, not {type(row).__name__}; write one object a line, or name a "
            "file that is an array .json",
        )
    return row
