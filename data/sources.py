"""Records by random access, in one schema, from what is built in, a file or the TFDS catalogue.

    open_source("world" | "arithmetic" | "path.jsonl[.gz]" | "path.json" | "path.csv" |
                "part-*.parquet" | "folder/of/datasets" | "hf:<owner>/<name>[:config][@split]" |
                "tfds:<name>[/config]" | "a.jsonl:2 b.parquet:1", schema, split, seed=0)

Files are validated row by row and prepared once as ArrayRecord files, in $PLUMB_CACHE. Errors
in a file read `file:line: field: reason`, or `file:row: ...` where rows are no lines. What is
prepared is checked by its sums, and prepared again where it is damaged.
"""

import functools
import glob
import hashlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

from data.bad_rows import are_bad_rows_skipped, list_bad_rows
from data.fields import FieldError, Row
from data.formats import read_part, whole
from data.mixture import mixed
from data.preparing import damage, prepare, rows_and_records, stored_records
from data.records import SCHEMAS, Record, Schema
from data.source import ENDLESS, Source
from runtime.compiled import cache_folder
from runtime.data_files import KINDS, content_sum, files_named
from runtime.errors import UserError, require
from runtime.foreign import one_line
from runtime.inputs import BUILT_IN, catalogue_folder, newest_prepared
from runtime.mixtures import Share, is_mixture, names_in, read_mixture
from runtime.writes import beside, is_full_disk, remove_all_left_over
from tasks import arithmetic, world

SCHEMA_VERSION = 4
"""Version of what is kept of a file. Raise it whenever a row would be adapted (data/records.py),
held out or stored in another way than before: files prepared with another version are prepared
again. Renaming, comments and messages need no new version."""
SOURCES = (
    "world, arithmetic, a .jsonl[.gz], .json, .csv or .parquet file, a folder of `datasets`, "
    "hf:<owner>/<name>, tfds:<name>, or several as in 'a.jsonl:2 b.jsonl:1'"
)
"""Sources that --data may name, for messages."""
HELDOUT_SHARE = 0.05
"""Share held out of a source without a held-out split of its own."""
HELDOUT_MOST = 1000
"""Most rows held out of such a source."""

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

    parts = map(whole, _data_files(data))
    for row, _ in rows_and_records(parts, schema, passed_over, passed_over):
        yield row


def first_row(data: str) -> Row:
    """Return the first row of files; UserError where there is none to read."""
    for path in _data_files(data):
        for number, row in read_part(whole(path)):
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
    stored = stored_records(folder)
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
        fault = damage(folder)
        if fault is None:
            return folder
        print(f"note: {folder}: {fault}; {data} is prepared again", file=sys.stderr)
        _remove(folder)

    try:
        prepare(data, files, schema, folder)
    # ArrayRecord has errors of its own for a full disk.
    except Exception as fault:
        if not isinstance(fault, OSError) and not is_full_disk(fault):
            raise
        raise UserError(
            f"{cache}: cannot keep {data} here ({one_line(fault)}); "
            "free the disk, or set PLUMB_CACHE to another"
        ) from None
    return folder


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
