"""The files that the name of a data set stands for, and the sum of their content.

A name is a file, a pattern such as `part-*.parquet`, a folder that `datasets` saved with
save_to_disk, or `hf:<owner>/<name>[:config][@split]`, which `datasets` fetches and keeps.
"""

import functools
import glob
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable

from runtime.errors import UserError
from runtime.foreign import TEXT, Kind, check_values, file_in, list_of, one_line, read_object

HUB = "hf:"
"""How a name on the Hugging Face Hub begins."""
KINDS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".arrow")
"""Endings of the files that are data; a pattern of other files names none."""
FILE = Kind(
    "an object with a filename",
    lambda value: type(value) is dict and type(value.get("filename")) is str,
)
"""An entry of a folder's state.json."""
MOST_SUMS = 4096
"""Files whose sums are kept while a command runs."""


def files_named(name: str) -> list[pathlib.Path]:
    """Return the files that `name` stands for, in the order in which they are read; [] for none.

    Those of a pattern are sorted by name. Raises UserError for a folder of several splits, and
    for a name on the Hub that cannot be fetched.
    """
    if name.startswith(HUB):
        return _on_the_hub(name)
    path = pathlib.Path(name)
    # By os.path, which says no where a name is too long to be one.
    if os.path.isfile(name):
        return [path]
    if os.path.isdir(name):
        return _saved_by_datasets(path)
    found = [pathlib.Path(match) for match in sorted(glob.glob(name, recursive=True))]
    return [match for match in found if match.is_file() and match.name.endswith(KINDS)]


def _saved_by_datasets(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the Arrow files of a folder written by save_to_disk; [] for any other folder."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        content = read_object(splits)
        check_values(splits, content, {"splits": list_of(TEXT)})
        names = [f"{folder / split}" for split in content.get("splits", [])]
        raise UserError(f"{folder}: holds several splits; name one of {', '.join(names)}")
    state = folder / "state.json"
    if not state.is_file():
        return []
    content = read_object(state)
    check_values(state, content, {"_data_files": list_of(FILE)})
    files = content.get("_data_files") or []
    return [file_in(folder, file["filename"]) for file in files]


def hub_parts(name: str) -> tuple[str, str | None, str | None]:
    """Return (repository, config, split) of a name on the Hub, None for what it leaves open.

    Raises UserError for what is no hf:<owner>/<name>[:config][@split].
    """
    parts = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w.-]+))?", name)
    if parts is None:
        raise UserError(f"{name}: must be hf:<owner>/<name>[:config][@split]")
    repository, config, split = parts.groups()
    return repository, config, split


@functools.cache
def _on_the_hub(name: str) -> list[pathlib.Path]:
    """Fetch a data set of the Hub, unless it is kept already; return its Arrow files."""
    repository, config, split = hub_parts(name)
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name}: needs `datasets`; pip install -r requirements-hf.txt, or name files"
        ) from None
    try:
        loaded = datasets.load_dataset(repository, config, split=split or "train")
    # No network, no such name, config or split: each library below has errors of its own.
    except Exception as fault:
        raise UserError(f"{name}: cannot be fetched ({one_line(fault)})") from None
    return [pathlib.Path(file["filename"]) for file in loaded.cache_files]


# --- sums


def content_sum(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, read once for as long as it does not change.

    Raises OSError where it cannot be read.
    """
    status = os.stat(path)
    return _file_sum(os.fspath(path), status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(MOST_SUMS)
def _file_sum(path: str, *status: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def named_sum(paths: Iterable[pathlib.Path]) -> str:
    """Return the SHA-256 of the names and sums of files, in the order given.

    Raises UserError where a file cannot be read.
    """
    lines = [f"{path.name} {joint_sum(str(path))}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def joint_sum(name: str) -> str:
    """Return the SHA-256 of what `name` stands for: of one file, or of the sums of several.

    Raises UserError where a file cannot be read.
    """
    files = files_named(name)
    try:
        sums = [content_sum(file) for file in files]
    except OSError as fault:
        raise UserError(f"{fault.filename}: cannot be read ({fault.strerror})") from None
    if len(sums) == 1:
        return sums[0]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()
