"""Records by random access, in one schema, from what is built in, a file or the TFDS catalogue.

    open_source("world" | "arithmetic" | "path.jsonl[.gz]" | "tfds:<name>[/config]",
                schema, split, seed=0)

Local files are validated line by line and prepared once as a TFDS ArrayRecord dataset, in
$PLUMB_CACHE. Errors in a file read `file:line: field: reason`.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from tqdm import tqdm

from data.records import SCHEMAS, FieldError, Record, Row, Schema
from runtime.errors import UserError
from tasks import arithmetic, world

SCHEMA_VERSION = 1
"""Version of what is kept of a file. Raise it whenever a row would be adapted (data/records.py),
held out or stored in another way than before: files prepared with another version are prepared
again. Renaming, comments and messages need no new version."""
ENDLESS = 1 << 30
"""Records a split of what is built in is said to have: more than any run reads."""
HELDOUT_SHARE = 0.05
"""Share held out of a source without a held-out split of its own."""
HELDOUT_MOST = 1000
"""Most rows held out of such a source."""

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
    share no prompt; or all, for a local file that holds nothing but held-out records. `seed`: that
    of what is built in. Raises UserError for what is missing or malformed, naming file, line and
    field, and ValueError for another schema or split.
    """
    if schema not in SCHEMAS or split not in get_args(Split):
        raise ValueError(f"schema {schema!r}, split {split!r}")
    if data in ("world", "arithmetic"):
        if split == "all":
            raise ValueError(f"{data} has no split {split!r}")
        return _built_in(data, schema, split, seed)
    if data.startswith("tfds:"):
        return _catalogue(data.removeprefix("tfds:"), schema, split)
    if data.endswith((".jsonl", ".jsonl.gz")):
        return _local(pathlib.Path(data), schema, split)
    raise UserError(
        f"--data={data}: not a source; "
        "give world, arithmetic, a .jsonl or .jsonl.gz file, or tfds:<name>"
    )


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
        except FieldError as fault:
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

    if split == "all":
        return Source(str(path), np.arange(len(keys_N)), read, candidates)
    held_out_N = held_out(keys_N)
    if held_out_N.all():
        raise UserError(
            f"{path}: all its prompts or texts are the same: none can be held out; add others"
        )
    if split == "heldout":
        name = f"the held-out split of {path}"
        return Source(name, np.flatnonzero(held_out_N), read, candidates)
    return Source(str(path), np.flatnonzero(~held_out_N), read, candidates)


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


def _prepared(path: pathlib.Path, schema: Schema) -> pathlib.Path:
    """Return the folder of the ArrayRecord dataset made of `path`; make it if it is not there."""
    cache = pathlib.Path(os.environ.get("PLUMB_CACHE", "~/.cache/plumb")).expanduser()
    folder = cache / _cache_name(path, schema)
    if folder.exists():
        return folder

    # Read all of it once before anything is written: to validate it, and for the split.
    keys = []
    candidates = 0
    for record in _records(path, schema):
        keys.append(_key(record))
        candidates = max(candidates, len(record.get("responses", ())))
    if not keys:
        raise UserError(f"{path}: has no rows; give a file with one JSON object a line")
    try:
        _prepare(path, schema, folder, np.array(keys, np.uint64), candidates)
    except OSError as fault:
        raise UserError(
            f"{cache}: cannot keep {path} here ({fault}); set PLUMB_CACHE to another"
        ) from None
    return folder


def _cache_name(path: pathlib.Path, schema: Schema) -> str:
    """Hash what a prepared file depends on: schema, SCHEMA_VERSION and the file's bytes."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a .jsonl file in it")
    content = hashlib.sha256(f"{schema} {SCHEMA_VERSION}\n".encode())
    try:
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give world, arithmetic, a .jsonl file, or tfds:<name>"
        ) from None
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None
    return content.hexdigest()[:32]


def _prepare(
    path: pathlib.Path, schema: Schema, folder: pathlib.Path, keys_N: np.ndarray, candidates: int
) -> None:
    """Make `folder` of `path`: all of it or nothing. Raises OSError where there is no room."""
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix="partial-", dir=cache))
    try:
        built = _write(path, schema, len(keys_N), partial)
        np.savez(built / "split.npz", keys=keys_N, candidates=candidates)
        try:
            built.rename(folder)
        except OSError:
            # Another process may have been faster.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    """Yield the records of a .jsonl[.gz] file, blank lines skipped.

    Raises UserError as `file:line: field: reason`.
    """
    adapt = SCHEMAS[schema]
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            yield adapt(_row(line))
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
    try:
        # Without its newline, at which the parser would say the fault is.
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as fault:
        raise FieldError("line", f"is not UTF-8 (byte {fault.start + 1})") from None
    except json.JSONDecodeError as fault:
        reason = f"{fault.msg}, column {fault.colno}"
        raise FieldError("line", f"is not JSON ({reason})") from None
    except (ValueError, RecursionError) as fault:
        raise FieldError("line", f"is not JSON ({fault})") from None
    if not isinstance(row, dict):
        raise FieldError("line", f"must be a JSON object, not {type(row).__name__}")
    return row
