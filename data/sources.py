"""Records by random access, in one schema, from what is built in, a file or the TFDS catalogue.

    open_source("world" | "arithmetic" | "path.jsonl[.gz]" | "tfds:<name>[/config]",
                schema, split, seed=0)

Local files are validated line by line and prepared once as a TFDS ArrayRecord dataset, in
$PLUMB_CACHE. Errors in a file read `file:line: field: reason`. What is prepared is checked by its
sums, and prepared again where it is damaged.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import pathlib
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from tqdm import tqdm

from data.fields import FieldError, Row, name_shown
from data.messages import is_trained
from data.records import SCHEMAS, Record, Schema, unread_fields
from runtime.errors import UserError, require
from runtime.foreign import first_twin, one_line
from runtime.hosts import progressed
from runtime.inputs import BUILT_IN, content_sum
from runtime.writes import beside, is_full_disk, remove_all_left_over
from tasks import arithmetic, world

SCHEMA_VERSION = 2
"""Version of what is kept of a file. Raise it whenever a row would be adapted (data/records.py),
held out or stored in another way than before: files prepared with another version are prepared
again. Renaming, comments and messages need no new version."""
ENDLESS = 1 << 30
"""Records a split of what is built in is said to have: more than any run reads."""
HELDOUT_SHARE = 0.05
"""Share held out of a source without a held-out split of its own."""
HELDOUT_MOST = 1000
"""Most rows held out of such a source."""

SUMS = "sums.json"
"""File of a prepared folder: the SHA-256 of each other file."""

Split = Literal["train", "heldout", "all"]


@dataclass(frozen=True)
class Source:
    """`len(source)` records; `source[i]` is a dict in the schema asked for, from i = 0."""

    name: str
    """For messages: the path or the catalogue name."""
    rows: Sequence[int] | np.ndarray
    """For each record, its index where it is stored."""
    read: Callable[[int], Record]
    """The record stored at an index."""
    candidates: int = 2
    """The most responses that a comparison has."""

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, most: int) -> list[Record]:
        """Return the first `most` records, or all where there are fewer."""
        return [self[i] for i in range(min(most, len(self)))]

    def __getitem__(self, i: int) -> Record:
        return self.read(int(self.rows[i]))


def open_source(data: str, schema: Schema, split: Split, *, seed: int = 0) -> Source:
    """Open the records of `data` in `schema` (see data/records.py).

    `data`: world, arithmetic, a .jsonl[.gz] file or tfds:<name>. `split`: train or heldout, which
    share no prompt; or all, of a local file alone. `seed`: that of what is built in. Raises
    UserError for what is missing or malformed, naming file, line and field, and ValueError for
    another schema or split.
    """
    if schema not in SCHEMAS or split not in get_args(Split):
        raise ValueError(f"schema {schema!r}, split {split!r}")
    if not is_file(data):
        if split == "all":
            raise UserError(f"{data}: has no split {split}, only train and heldout")
        if data in BUILT_IN:
            return _built_in(data, schema, split, seed)
        return _catalogue(data.removeprefix("tfds:"), schema, split)
    if data.endswith((".jsonl", ".jsonl.gz")):
        return _local(pathlib.Path(data), schema, split)
    raise UserError(
        f"--data={data}: not a source; "
        "give world, arithmetic, a .jsonl or .jsonl.gz file, or tfds:<name>"
    )


def is_file(data: str) -> bool:
    """Tell a file from what is built in and from the catalogue, by its name alone."""
    return data not in BUILT_IN and not data.startswith("tfds:")


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


def lines_of(path: str) -> Iterator[str]:
    """Yield the rows of a .jsonl[.gz] file as they stand in it, without ends and blank lines."""
    for _, line in _lines(pathlib.Path(path)):
        if line.strip():
            yield line.decode("utf-8-sig").rstrip("\r\n")


def first_row(path: str) -> Row:
    """Return the first row of a .jsonl[.gz] file; UserError where there is none to read."""
    # Says what is wrong with the path, as opening it does.
    _file_sum(pathlib.Path(path))
    for number, line in _lines(pathlib.Path(path)):
        if not line.strip():
            continue
        try:
            return _row(line)
        except FieldError as fault:
            raise UserError(f"{path}:{number}: {fault}") from None
    raise UserError(f"{path}: has no rows; give a file with one JSON object a line")


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


# ---- The TFDS catalogue ----


def _catalogue(name: str, schema: Schema, split: Split) -> Source:
    # Slow to import: only where it is needed.
    import tensorflow_datasets as tfds

    home = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    data_dir = pathlib.Path(home).expanduser()
    newest = _newest_version(name, data_dir)
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


def _newest_version(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """Return the folder of the newest version of `name` that is prepared under `data_dir`."""
    versions = [info.parent for info in (data_dir / name).glob("[0-9]*/dataset_info.json")]
    if not versions:
        remedy = _how_to_prepare(name, data_dir)
        raise UserError(f"tfds:{name}: not under {data_dir} ($TFDS_DATA_DIR); {remedy}")

    def numbers(folder: pathlib.Path) -> list[int]:
        return [int(part) for part in folder.name.split(".") if part.isdigit()]

    return max(versions, key=numbers)


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
    modules = sorted([*root.glob(f"*/{base}.py"), *root.glob(f"*/{base}/{base}.py")])
    known = base in tfds.list_builders(with_community_datasets=False)
    if not known and not modules:
        return "the TFDS catalogue has no such name either: check the spelling"
    needed = ""
    if not known:
        module = modules[0].relative_to(root.parent).with_suffix("")
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


def _local(path: pathlib.Path, schema: Schema, split: Split) -> Source:
    folder = _prepared(path, schema)
    # Slow to import, and not needed where the file is at fault.
    import tensorflow_datasets as tfds

    stored = tfds.builder_from_directory(folder).as_data_source(split="train")
    with np.load(folder / "split.npz") as saved:
        keys_N = saved["keys"]
        candidates = int(saved["candidates"])

    def read(i: int) -> Record:
        return json.loads(stored[i]["json"])

    # What the user may not have meant is said with the records that are trained on.
    if split != "heldout":
        for note in json.loads((folder / "notes.json").read_text()):
            _say_once(f"note: {path}: {note}")
    if split == "all":
        return Source(str(path), np.arange(len(keys_N)), read, candidates)
    held_out_N = held_out(keys_N)
    if held_out_N.all():
        same = "has one row" if len(keys_N) == 1 else "all its prompts or texts are the same"
        raise UserError(f"{path}: {same}: none can be held out; add others")
    if split == "heldout":
        name = f"the held-out split of {path}"
        return Source(name, np.flatnonzero(held_out_N), read, candidates)
    return Source(str(path), np.flatnonzero(~held_out_N), read, candidates)


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


def _file_sum(path: pathlib.Path) -> str:
    """Return the SHA-256 of a data file's bytes; raise UserError where it cannot be read."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a .jsonl file in it")
    try:
        return content_sum(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give world, arithmetic, a .jsonl file, or tfds:<name>"
        ) from None
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None


def _prepared(path: pathlib.Path, schema: Schema) -> pathlib.Path:
    """Return the folder of the ArrayRecord dataset made of `path`; make it if it is not there.

    A damaged folder is made again, with a note. What processes that were killed left in the cache
    is removed.
    """
    digest = _file_sum(path)
    cache = pathlib.Path(os.environ.get("PLUMB_CACHE", "~/.cache/plumb")).expanduser()
    # Its name is a hash of all that it depends on.
    identity = f"{schema} {SCHEMA_VERSION} {digest}"
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
        print(f"note: {folder}: {fault}; {path} is prepared again", file=sys.stderr)
        _remove(folder)

    # Read all of it once before anything is written: to validate it, and for the split.
    facts = _facts(path, schema)
    if not len(facts.keys_N):
        raise UserError(f"{path}: has no rows; give a file with one JSON object a line")
    try:
        _prepare(path, schema, folder, facts)
    # ArrayRecord has errors of its own for a full disk.
    except Exception as fault:
        if not isinstance(fault, OSError) and not is_full_disk(fault):
            raise
        raise UserError(
            f"{cache}: cannot keep {path} here ({one_line(fault)}); "
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


def _facts(path: pathlib.Path, schema: Schema) -> Facts:
    """Read all of a file, which validates it; raise UserError for the first bad row."""
    keys = []
    candidates = 0
    turns = 0
    trained = 0
    unread: set[str] = set()
    for row, record in _rows_and_records(path, schema):
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
    if unread:
        names = [name_shown(name) for name in sorted(unread)]
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        notes.append(f"fields that nothing reads: {', '.join(names[:12])}{more}")
    if trained < turns:
        notes.append(
            f"{turns - trained} of {turns} assistant's turns are not trained on "
            "(weight 0, or they call tools)"
        )
    return Facts(np.array(keys, np.uint64), candidates, notes)


def _prepare(path: pathlib.Path, schema: Schema, folder: pathlib.Path, facts: Facts) -> None:
    """Make `folder` of `path`: all of it or nothing. Raises OSError where there is no room."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with beside(folder, is_folder=True) as (partial, _):
        built = _write(path, schema, len(facts.keys_N), partial)
        np.savez(built / "split.npz", keys=facts.keys_N, candidates=facts.candidates)
        (built / "notes.json").write_text(json.dumps(facts.notes))
        sums = {file.name: content_sum(file) for file in built.iterdir()}
        (built / SUMS).write_text(json.dumps(sums))
        try:
            built.rename(folder)
        except OSError:
            # Another process may have been faster.
            if not folder.exists():
                raise


def _write(path: pathlib.Path, schema: Schema, count: int, folder: pathlib.Path) -> pathlib.Path:
    """Build the dataset of `count` rows inside `folder`; return where it lies there."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import GeneratorBasedBuilder

    # The class is defined anew for each file, so it must not be registered.
    with tfds.core.registered.skip_registration():

        class LocalRows(GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> tfds.core.DatasetInfo:
                # Records nest, and differ in their keys: each is stored as one string.
                features = tfds.features.FeaturesDict({"json": tfds.features.Text()})
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=True
                )

            def _split_generators(self, _):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                rows = _records(path, schema)
                progress = tqdm(rows, f"preparing {path.name}", total=count, unit="row")
                for i, record in enumerate(progress):
                    yield i, {"json": json.dumps(record)}

    tfds.disable_progress_bar()
    builder = LocalRows(data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    stored = builder.info.splits["train"].num_examples
    if stored != count:
        raise RuntimeError(f"{path}: {count} rows, but the prepared dataset has {stored}")
    return pathlib.Path(builder.data_dir)


def _records(path: pathlib.Path, schema: Schema) -> Iterator[Record]:
    """Yield the records of a file; see `_rows_and_records`."""
    for _, record in _rows_and_records(path, schema):
        yield record


def _rows_and_records(path: pathlib.Path, schema: Schema) -> Iterator[tuple[Row, Record]]:
    """Yield each row of a .jsonl[.gz] file and its record, blank lines skipped.

    Raises UserError as `file:line: field: reason`.
    """
    adapt = SCHEMAS[schema]
    for number, line in _lines(path):
        if not line.strip():
            continue
        progressed()
        try:
            row = _row(line)
            yield row, adapt(row)
        except FieldError as fault:
            raise UserError(f"{path}:{number}: {fault}") from None


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
        row = json.loads(text, object_pairs_hook=_unlike_keys)
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
            "line", f"must be a JSON object, not {type(row).__name__}; write one object a line"
        )
    return row


def _unlike_keys(pairs: list[tuple[str, Any]]) -> Row:
    """Return the pairs of a JSON object as a dict; raise FieldError for a key that repeats."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise FieldError(name_shown(first_twin(pairs)), "stands twice in one object; keep one")
    return row
