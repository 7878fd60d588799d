"""Records by random access, in one schema, from what is built in, a JSON Lines file or the TFDS catalogue.

    open_source("world" | "arithmetic" | "path.jsonl[.gz]" | "tfds:<name>[/config]", schema, split, seed=0)

Local files are validated line by line and prepared once as a TFDS ArrayRecord dataset, in $PLUMB_CACHE.
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
from typing import Any

import numpy as np
from tqdm import tqdm

from data import records
from runtime.errors import UserError
from tasks import arithmetic, world

ENDLESS = 1 << 30
"""Records a split of what is built in is said to have: more than any run reads."""
HELDOUT_SHARE, HELDOUT_MOST = 0.05, 1000
"""Of a source without a held-out split of its own: the share held out, and the most rows."""


@dataclass(frozen=True)
class Source:
    """`len(source)` records; `source[i]` is a dict in the schema asked for."""

    name: str
    """For messages: the path or the catalogue name."""
    rows: Sequence[int] | np.ndarray
    """Of each record, its index where it is stored."""
    read: Callable[[int], dict[str, Any]]
    """The record stored at an index."""
    candidates: int = 2
    """The most responses that a comparison has."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.read(int(self.rows[i]))


def open_source(data: str, schema: str, split: str, *, seed: int = 0) -> Source:
    """The records of `data` in `schema` (a key of `records.SCHEMAS`), `split` being train, heldout or all.

    `all` is for a local file that holds nothing but held-out records.

    `seed` is that of what is built in. Raises UserError for what is missing or malformed, naming file, line and field.
    """
    if schema not in records.SCHEMAS or split not in ("train", "heldout", "all"):
        raise ValueError(f"schema {schema!r}, split {split!r}")
    if data in ("world", "arithmetic"):
        return _built_in(data, schema, split, seed)
    if data.startswith("tfds:"):
        return _catalogue(data.removeprefix("tfds:"), schema, split)
    if data.endswith((".jsonl", ".jsonl.gz")):
        return _local(pathlib.Path(data), schema, split)
    raise UserError(
        f"--data={data}: not a source; give world, arithmetic, a .jsonl or .jsonl.gz file, or tfds:<name>"
    )


# ---- Built in ----


def _built_in(name: str, schema: str, split: str, seed: int) -> Source:
    options = {"split": split, "seed": seed}
    # Documents have no splits of their own: the held-out ones are numbered after the others.
    first = ENDLESS * (split == "heldout")
    draw = {
        "world": {
            "text": lambda i: {"text": world.text(i + first, seed=seed)},
            "chat": lambda i: world.demonstration(i, **options),
            "comparison": lambda i: world.comparison(i, **options),
            "unpaired": lambda i: world.judgement(i, **options),
            "prompt": lambda i: {"prompt": world.prompt(i, **options).text},
        },
        "arithmetic": {
            "text": lambda i: {"text": arithmetic.document(i + first, seed=seed)},
            "chat": lambda i: arithmetic.demonstration(i, **options),
            "prompt": lambda i: arithmetic.prompt(i, **options),
            "steps": lambda i: arithmetic.labelled(i, **options),
        },
    }[name]
    if schema not in draw:
        raise UserError(
            f"--data={name}: has no {schema} records, only {', '.join(draw)}; name another source"
        )
    return Source(name, range(ENDLESS), lambda i: records.SCHEMAS[schema](draw[schema](i)))


# ---- The TFDS catalogue ----


def _catalogue(name: str, schema: str, split: str) -> Source:
    import tensorflow_datasets as tfds  # slow to import: only where it is needed

    data_dir = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    versions = [info.parent for info in (data_dir / name).glob("[0-9]*/dataset_info.json")]
    if not versions:
        remedy = _how_to_prepare(name, data_dir)
        raise UserError(f"tfds:{name}: not under {data_dir} ($TFDS_DATA_DIR); {remedy}")
    newest = max(versions, key=lambda path: [int(n) for n in path.name.split(".") if n.isdigit()])
    builder = tfds.builder_from_directory(newest)
    own = next((s for s in ("validation", "test") if s in builder.info.splits), None)
    size = builder.info.splits["train"].num_examples if "train" in builder.info.splits else 0
    if own is None:
        held = min(max(int(size * HELDOUT_SHARE), 1), HELDOUT_MOST)
        part = f"train[:{size - held}]" if split == "train" else f"train[{size - held}:]"
    else:
        part = own if split == "heldout" else "train"
    try:
        stored = builder.as_data_source(split=part)
    except (
        NotImplementedError,
        ValueError,
        OSError,
    ) as fault:  # the first is TFDS's word for files read in order only
        raise UserError(
            f"tfds:{name}: {newest}: split {part} is not readable by random access ({fault}); "
            f"{_how_to_prepare(name, data_dir)}"
        ) from None
    adapt = records.SCHEMAS[schema]

    def read(i: int) -> dict[str, Any]:
        try:
            return adapt(_plain(stored[i]))
        except records.FieldError as fault:
            raise UserError(f"tfds:{name}: {part} row {i}: {fault}") from None

    return Source(f"tfds:{name}", range(len(stored)), read)


def _how_to_prepare(name: str, data_dir: pathlib.Path) -> str:
    """The remedy when `name` is not on disk, with the import that some of the catalogue needs to be found."""
    import tensorflow_datasets as tfds

    root, base = pathlib.Path(tfds.__file__).parent, name.split("/")[0]
    modules = sorted([*root.glob(f"*/{base}.py"), *root.glob(f"*/{base}/{base}.py")])
    known = base in tfds.list_builders(with_community_datasets=False)
    if not known and not modules:
        return "the TFDS catalogue has no such name either: check the spelling"
    module = "" if known else ".".join(modules[0].relative_to(root.parent).with_suffix("").parts)
    needed = f"import {module}; " if module else ""
    return (
        "prepare it once: python -c "
        f"\"import tensorflow_datasets as tfds; {needed}tfds.builder('{name}', "
        f"data_dir='{data_dir}', file_format='array_record').download_and_prepare()\""
    )


def _plain(value: Any) -> Any:
    """What TFDS stores, as JSON would: bytes as text, arrays as lists or numbers."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list) else value


# ---- Local files ----


def _local(path: pathlib.Path, schema: str, split: str) -> Source:
    folder = _prepared(path, schema)
    import tensorflow_datasets as tfds

    stored = tfds.builder_from_directory(folder).as_data_source(split="train")
    with np.load(folder / "split.npz") as saved:
        keys, candidates = saved["keys"], int(saved["candidates"])
    if split == "all":
        return Source(
            str(path), np.arange(len(keys)), lambda i: json.loads(stored[i]["json"]), candidates
        )
    held = held_out(keys)
    if held.all():
        raise UserError(
            f"{path}: all its prompts or texts are the same: none can be held out; add others"
        )
    rows = np.flatnonzero(held if split == "heldout" else ~held)
    name = f"the held-out split of {path}" if split == "heldout" else str(path)
    return Source(name, rows, lambda i: json.loads(stored[i]["json"]), candidates)


def held_out(keys_N: np.ndarray) -> np.ndarray:
    """Which rows are held out, by their hashes: 5 %, one to 1,000 of them; equal hashes stay together."""
    ordered = np.sort(keys_N)
    limit = np.uint64(HELDOUT_SHARE * 2**64)
    if len(ordered) > HELDOUT_MOST:
        limit = min(limit, ordered[HELDOUT_MOST])
    return keys_N < limit if ordered[0] < limit else keys_N == ordered[0]


def _key(record: dict[str, Any]) -> int:
    """Hash by which a record is held out: of its prompt if it has one, so that none is in both splits."""
    messages = record.get("prompt") or record.get("messages", [])
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    text = json.dumps(messages or record, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _prepared(path: pathlib.Path, schema: str) -> pathlib.Path:
    """Folder of the ArrayRecord dataset made of `path`, named by the hash of what it depends on."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a .jsonl file in it")
    cache = pathlib.Path(os.environ.get("PLUMB_CACHE", "~/.cache/plumb")).expanduser()
    try:
        content = hashlib.sha256(schema.encode())
        for code in (__file__, records.__file__):
            content.update(pathlib.Path(code).read_bytes())
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
        folder = cache / content.hexdigest()[:32]
        if folder.exists():
            return folder
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give world, arithmetic, a .jsonl file, or tfds:<name>"
        ) from None
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None
    adapted = [
        (_key(record), len(record.get("responses", ()))) for record in _records(path, schema)
    ]
    if not adapted:
        raise UserError(f"{path}: has no rows; give a file with one JSON object a line")
    keys, candidates = zip(*adapted, strict=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix="partial-", dir=cache))
        try:
            built = _write(path, schema, len(keys), partial)
            np.savez(
                built / "split.npz", keys=np.array(keys, np.uint64), candidates=max(candidates)
            )
            try:
                built.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as fault:
        raise UserError(
            f"{cache}: cannot keep {path} here ({fault}); set PLUMB_CACHE to another"
        ) from None
    return folder


def _write(path: pathlib.Path, schema: str, count: int, folder: pathlib.Path) -> pathlib.Path:
    """Build the dataset inside `folder`; where it lies there."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():  # defined anew for each file

        class LocalRows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> tfds.core.DatasetInfo:
                features = tfds.features.FeaturesDict(
                    {"json": tfds.features.Text()}
                )  # records nest: one string
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=True
                )

            def _split_generators(self, _):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                rows = tqdm(
                    _records(path, schema), f"preparing {path.name}", total=count, unit="row"
                )
                for i, record in enumerate(rows):
                    yield i, {"json": json.dumps(record)}

    tfds.disable_progress_bar()
    builder = LocalRows(data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    stored = builder.info.splits["train"].num_examples
    if stored != count:
        raise RuntimeError(f"{path}: {count} rows, but the prepared dataset has {stored}")
    return pathlib.Path(builder.data_dir)


def _records(path: pathlib.Path, schema: str) -> Iterator[dict[str, Any]]:
    """Of a .jsonl[.gz] file, blank lines skipped; raises UserError as `file:line: field: reason`."""
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rb") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    row = json.loads(
                        line.decode("utf-8-sig").rstrip()
                    )  # the newline would be where the fault is
                    if not isinstance(row, dict):
                        raise records.FieldError(
                            "line", f"must be a JSON object, not {type(row).__name__}"
                        )
                    yield records.SCHEMAS[schema](row)
    except records.FieldError as fault:
        raise UserError(f"{path}:{number}: {fault}") from None
    except UnicodeDecodeError as fault:
        raise UserError(f"{path}:{number}: line: is not UTF-8 (byte {fault.start + 1})") from None
    except (ValueError, RecursionError) as fault:
        reason = (
            f"{fault.msg}, column {fault.colno}"
            if isinstance(fault, json.JSONDecodeError)
            else fault
        )
        raise UserError(f"{path}:{number}: line: is not JSON ({reason})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as fault:
        raise UserError(
            f"{path}:{number + 1}: broken gzip file ({fault}); compress it again"
        ) from None
