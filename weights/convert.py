"""Weights in and out: a Hugging Face folder becomes a run, and a run such a folder.

    python -m weights.convert --read=path/to/Llama-3.2-1B --run=runs/llama
    python -m weights.convert --write=path/to/folder --run=runs/llama-sft

A folder holds config.json, safetensors and a tokenizer. Every script can --init from the run.

Covered are the families of weights/families.py, where all layers are the decoder's.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data.tokenizer import Tokenizer
from data.tokenizer_json import is_qwen, read_tokenizer, tokenizer_files
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, stored_model
from runtime import flags
from runtime.checkpoint import Checkpoints
from runtime.data_files import named_sum
from runtime.errors import UserError, refuse_unread
from runtime.foreign import TEXT, check_values, file_in, object_of, one_line, read_object
from runtime.run_folder import finished_steps, load_config, plumb_version
from runtime.writes import atomic_folder
from sharding import MeshConfig, abstract, make_mesh, path_name
from train_state import load_params
from weights.families import FAMILIES, config_of, family_of, generation_of, model_of
from weights.layouts import LAYOUTS, Layout

SHARD_BYTES = 4 << 30
"""Largest file of an export. To write one takes so much memory more than the model."""

CARD = """\
---
license: {license}
library_name: transformers
pipeline_tag: text-generation
---

# {title}

A language model that was exported by Plumb.

| | |
|---|---|
{table}

All settings are in the run's config.json, which is not part of this folder. The chat template,
where there is one, is the one that the model was trained with.
"""

COMPUTED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
"""Endings of the names of tensors that old folders have, and that are computed here."""

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names in a folder: of the file where there is one, of the index where there are several."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Give --read or --write."""

    run: str = "runs/imported"
    """Run to write, or to export."""
    read: str | None = None
    """Hugging Face folder to import."""
    write: str | None = None
    """Folder to export to; must not exist."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the exported weights; imported ones become float32."""
    license: str = "unknown"
    """Licence of the exported model, as Hugging Face names it, such as apache-2.0."""
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)
    """Over which the imported weights are laid: split over all devices."""
    model: tyro.conf.Suppress[ModelConfig] = ModelConfig()
    """Filled from config.json."""
    weights_sha256: tyro.conf.Suppress[str | None] = None
    """Filled at an import: the sum of the files of weights."""


# --- tensors


class Tensor(NamedTuple):
    """A tensor of Hugging Face's files."""

    name: str
    ours: tuple[str, ...]
    """Paths of the parameters that lie in it, one behind another."""
    index: tuple[int, ...]
    """Its layer, and its expert, where it is of one."""
    shape: tuple[int, ...]


def shapes_of(model: ModelConfig) -> Params:
    """Return the tree of the language model's ShapeDtypeStructs."""
    init, _ = init_and_apply(LanguageModel(model))
    return jax.eval_shape(init, jax.random.key(0))


def layouts_of(model: ModelConfig) -> dict[str, Layout]:
    """Return how each parameter of `model` lies in a folder of its family, by its path."""
    known = {**LAYOUTS, **FAMILIES[family_of(model)].layouts}
    paths = set()
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes_of(model)):
        paths.add(path_name(path))
    # In the table's order, in which those that share a tensor lie there.
    return {path: layout for path, layout in known.items() if path in paths}


def their_tensors(model: ModelConfig) -> Iterator[Tensor]:
    """Yield every tensor that a Hugging Face folder of `model` has, layer by layer."""
    sizes = _sizes(model)
    ours: dict[str, list[str]] = {}
    shapes: dict[str, list[int]] = {}
    for path, layout in layouts_of(model).items():
        rows, *rest = _their_shape(layout, sizes)
        # What shares a tensor lengthens its first axis.
        ours.setdefault(layout.name, []).append(path)
        shape = shapes.setdefault(layout.name, [0, *rest])
        shape[0] += rows

    # First what no layer has.
    for name, shape in shapes.items():
        if "{}" not in name:
            yield Tensor(name, tuple(ours[name]), (), tuple(shape))
    for layer in range(model.layers):
        for name, shape in shapes.items():
            places = name.count("{}")
            experts = range(model.experts) if places == 2 else [None]
            for expert in experts if places else []:
                index = (layer,) if expert is None else (layer, expert)
                yield Tensor(name.format(*index), tuple(ours[name]), index, tuple(shape))


def _their_shape(layout: Layout, sizes: dict[str, int]) -> tuple[int, ...]:
    """Return the shape of a parameter, some of whose axes are joined, in their files."""
    shape = []
    for group in layout.theirs:
        shape.append(math.prod(sizes[axis] for axis in group))
    return tuple(shape)


def _sizes(model: ModelConfig) -> dict[str, int]:
    """Return the sizes of the axes, by letter."""
    return {
        "V": model.vocab,
        "D": model.width,
        "F": model.mlp_width,
        "N": model.heads,
        "K": model.kv_heads,
        "H": model.head_dim,
        "E": model.experts,
    }


def find_model(folder: pathlib.Path) -> tuple[ModelConfig, dict[str, pathlib.Path]]:
    """Return the model of a Hugging Face folder, and the file of each tensor by their name.

    Raises UserError unless just the tensors of the model are there, in its shapes. A head of its
    own, in the files of a model whose config.json ties it to the embedding, is kept, with a note.
    """
    model = model_of(folder / "config.json")
    files = _tensor_files(folder)
    table = {**LAYOUTS, **FAMILIES[family_of(model)].layouts}
    head = table["unembed"].name
    has_head = head in files
    stored = dataclasses.replace(model, tied=model.tied and not has_head)
    _check_tensors(folder, files, stored)
    if model.tied and has_head:
        if _are_equal(files, head, table["decoder/embed"].name):
            return model, files
        print(
            f"note: {folder}: config.json ties {head} to the embedding, but the files have "
            "another; it is kept, and the run is not tied",
            file=sys.stderr,
        )
    return stored, files


def _tensor_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the file of each of the folder's tensors: by its index, or all in the one file."""
    file_of = _read_index(folder)
    files: dict[str, pathlib.Path] = {}
    for file_name in sorted(set(file_of.values()) or {ONE_FILE}):
        path = file_in(folder, file_name)
        for name in _tensor_names(path):
            # Of a tensor that lies in two files, the index says which counts.
            if file_of.get(name, file_name) == file_name:
                files[name] = path
            if file_of and name not in file_of:
                raise UserError(f"{path}: {name}: not in {INDEX}; restore the files")
    for name, file_name in file_of.items():
        if name not in files:
            raise UserError(f"{folder / file_name}: {name}: missing, but in {INDEX}; restore it")
    return files


def _read_index(folder: pathlib.Path) -> dict[str, str]:
    """Return the name of each tensor's file by the folder's index; none where it has no index."""
    path = folder / INDEX
    try:
        index = read_object(path)
    except FileNotFoundError:
        return {}
    check_values(path, index, {"weight_map": object_of(TEXT)})
    file_of = index.get("weight_map")
    if file_of is None:
        raise UserError(f"{path}: not readable as an index, weight_map is missing; restore it")
    # Readers differ in which they take.
    if (folder / ONE_FILE).exists() and ONE_FILE not in file_of.values():
        raise UserError(
            f"{folder}: {ONE_FILE} lies beside {INDEX}, which names other files; "
            "remove what is out of date"
        )
    return {name: file for name, file in file_of.items() if not name.endswith(COMPUTED)}


def _tensor_names(path: pathlib.Path) -> list[str]:
    """Return the names of the tensors in a file, but for those that are computed here."""
    try:
        with safe_open(path, "numpy") as file:
            names = file.keys()
    except (OSError, ValueError, SafetensorError) as fault:
        raise UserError(
            f"{path}: no readable safetensors file ({one_line(fault)}); no other format is read"
        ) from None
    return [name for name in names if not name.endswith(COMPUTED)]


def _check_tensors(
    folder: pathlib.Path, files: dict[str, pathlib.Path], model: ModelConfig
) -> None:
    """Raise UserError unless `files` has just the tensors of `model`, in its shapes."""
    wanted = {tensor.name: tensor.shape for tensor in their_tensors(model)}
    for name, path in files.items():
        with safe_open(path, "numpy") as file:
            _check_tensor(path, name, file.get_slice(name), wanted)
    missing = [name for name in wanted if name not in files]
    if missing:
        raise UserError(f"{folder}: {missing[0]}: missing (of {len(missing)}); restore the files")


def _are_equal(files: dict[str, pathlib.Path], one: str, other: str) -> bool:
    """True if two matrices of the files have the same shape and numbers."""
    with safe_open(files[one], "numpy") as file, safe_open(files[other], "numpy") as other_file:
        rows = file.get_slice(one)
        other_rows = other_file.get_slice(other)
        # Some rows at a time: a model's embedding may be gigabytes.
        count = rows.get_shape()[0]
        for start in range(0, count, 4096):
            cut = slice(start, min(start + 4096, count))
            if not np.array_equal(rows[cut], other_rows[cut]):
                return False
    return True


def _check_tensor(
    path: pathlib.Path, name: str, tensor: Any, wanted: dict[str, tuple[int, ...]]
) -> None:
    """Raise UserError for a tensor that is not wanted, or of another shape or type."""
    shape = tuple(tensor.get_shape())
    dtype = tensor.get_dtype()
    if name not in wanted:
        raise UserError(f"{path}: {name}: unknown; config.json names no model that has it")
    if shape != wanted[name]:
        raise UserError(
            f"{path}: {name}: shape {shape}, by config.json {wanted[name]}; restore it"
        )
    if dtype not in ("F32", "F16", "BF16"):
        raise UserError(
            f"{path}: {name}: type {dtype}; use a checkpoint in float32, float16 or bfloat16"
        )


def read_params(
    files: dict[str, pathlib.Path], model: ModelConfig, mesh: jax.sharding.Mesh
) -> Params:
    """Read the parameters onto `mesh`, in float32, laid as sharding.py's rules say.

    `files`: of find_model. Each device's part is read for itself, a layer's tensor at a time.
    Raises UserError for a tensor that holds NaN or infinity.
    """

    layouts = layouts_of(model)

    def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        layout = layouts[path_name(path)]
        place = _place_of(path_name(path), layouts, _sizes(model))

        # The devices that hold each part of the array.
        holders: dict[str, list[jax.Device]] = {}
        indices: dict[str, tuple[slice, ...]] = {}
        for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
            holders.setdefault(str(index), []).append(device)
            indices[str(index)] = index

        # Each copy is waited for, so that at most one part is held twice.
        parts = []
        for part, devices in holders.items():
            array = _read_part(files, model, layout, place, like.shape, indices[part])
            for device in devices:
                parts.append(jax.device_put(array, device).block_until_ready())
        return jax.make_array_from_single_device_arrays(like.shape, like.sharding, parts)

    return jax.tree_util.tree_map_with_path(leaf, abstract(shapes_of(model), mesh))


class Place(NamedTuple):
    """Where the rows of a parameter lie in its tensor; in a head where weights take turns."""

    before: int
    """Rows of other parameters before its own."""
    own: int
    rows: int
    """Rows of all."""


def _place_of(path: str, layouts: dict[str, Layout], sizes: dict[str, int]) -> Place:
    """Return the place of the parameter `path` in the tensor that it may share."""
    before = own = rows = 0
    for other, layout in layouts.items():
        if layout.name != layouts[path].name:
            continue
        count = _their_shape(layout, sizes)[0]
        if layout.takes_turns:
            count //= sizes[layout.theirs[0][0]]
        if other == path:
            before, own = rows, count
        rows += count
    return Place(before, own, rows)


def _read_part(
    files: dict[str, pathlib.Path],
    model: ModelConfig,
    layout: Layout,
    place: Place,
    shape: tuple[int, ...],
    index: tuple[slice, ...],
) -> np.ndarray:
    """Read the part `index` of a parameter of `shape` that is laid out so, in float32.

    `place`: of its rows in a tensor that it shares.
    """
    spans = []
    for cut, size in zip(index, shape, strict=True):
        spans.append(range(*cut.indices(size)))
    part = np.empty([len(span) for span in spans], np.float32)
    # The axes of layers and experts, of which each has a tensor; then those of the tensor.
    places = layout.name.count("{}")
    span_of = dict(zip(layout.ours, spans[places:], strict=True))

    # Where an axis of theirs joins two, the inner one, a head's width, is never cut.
    sizes = _sizes(model)
    cuts = []
    for group in layout.theirs:
        inner = math.prod(sizes[axis] for axis in group[1:])
        outer = span_of[group[0]]
        cuts.append(slice(outer.start * inner, outer.stop * inner))
    # Of a tensor whose heads hold several weights, whole heads are read.
    first = cuts[0]
    if layout.takes_turns:
        heads = span_of[layout.theirs[0][0]]
        cuts[0] = slice(heads.start * place.rows, heads.stop * place.rows)
    else:
        cuts[0] = slice(place.before + first.start, place.before + first.stop)

    # One by one: their tensor, its joined axes apart, and in our order.
    their_axes = "".join(layout.theirs)
    order = [their_axes.index(axis) for axis in layout.ours]
    for at in np.ndindex(part.shape[:places]):
        numbers = [span[i] for span, i in zip(spans, at, strict=False)]
        name = layout.name.format(*numbers)
        # Opened for each tensor: a file that stays open holds its pages.
        with safe_open(files[name], "numpy") as file:
            tensor = file.get_slice(name)[tuple(cuts)]
        if layout.takes_turns:
            by_head = tensor.reshape(len(heads), place.rows, *tensor.shape[1:])
            tensor = by_head[:, place.before : place.before + place.own]
        tensor = tensor.reshape([len(span_of[axis]) for axis in their_axes]).transpose(order)
        part[at] = tensor
        if not np.isfinite(tensor).all():
            raise UserError(f"{files[name]}: {name}: holds NaN or infinity; restore the file")
    return part


def write_tensors(
    folder: pathlib.Path, params: Params, model: ModelConfig, dtype: str, most: int
) -> None:
    """Write model.safetensors in `folder`, or several files and their index.

    A file has at most `most` bytes of tensors, or one tensor. `dtype`: of the written weights.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaves[path_name(path)] = leaf

    layouts = layouts_of(model)

    # Which tensors each file gets, layer by layer.
    files: list[list[Tensor]] = [[]]
    sizes = [0]
    for tensor in their_tensors(model):
        size = math.prod(tensor.shape) * np.dtype(dtype).itemsize
        if sizes[-1] and sizes[-1] + size > most:
            files.append([])
            sizes.append(0)
        files[-1].append(tensor)
        sizes[-1] += size

    file_of = {}
    for i, tensors in enumerate(files, 1):
        name = f"model-{i:05}-of-{len(files):05}.safetensors"
        if len(files) == 1:
            name = ONE_FILE
        content = {tensor.name: _as_theirs(leaves, layouts, tensor, dtype) for tensor in tensors}
        save_file(content, folder / name, {"format": "pt"})
        file_of.update(dict.fromkeys(content, name))
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": file_of}
        text = json.dumps(index, indent=1)
        (folder / INDEX).write_text(text)


def _as_theirs(
    leaves: Params, layouts: dict[str, Layout], tensor: Tensor, dtype: str
) -> np.ndarray:
    """Return a tensor of theirs, from our parameters by path."""
    # The reverse of _read_part: their order, axes joined, and what shares a tensor together.
    parts = []
    takes_turns = False
    for path in tensor.ours:
        layout = layouts[path]
        leaf = leaves[path]
        array = np.asarray(leaf[tensor.index])
        array = array.transpose([layout.ours.index(axis) for axis in "".join(layout.theirs)])
        takes_turns = layout.takes_turns
        heads = array.shape[:1] if takes_turns else ()
        parts.append(array.reshape(*heads, -1, *tensor.shape[1:]))
    joined = np.concatenate(parts, axis=1 if takes_turns else 0)
    return np.ascontiguousarray(joined.reshape(tensor.shape), dtype)


# --- folders


def load(
    folder: str | os.PathLike, mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Read the model of a Hugging Face folder: its shape, and its parameters in float32.

    The parameters lie on `mesh`, by default one that splits them over all devices. Raises
    UserError for a folder that is damaged, or of a model that the decoder does not cover.
    """
    folder = pathlib.Path(folder)
    model, files = find_model(folder)
    mesh = mesh or make_mesh(MeshConfig(data=1, fsdp=-1))
    return model, read_params(files, model, mesh)


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    dtype: str = "float32",
    card: str | None = None,
) -> None:
    """Write a Hugging Face folder, whole or not at all.

    `dtype`: float32 or bfloat16, of the written weights. `card`: text of its README.md; None: it
    gets none. Raises UserError where the folder exists, where no family has the model's features,
    for a reward model, and for a tokenizer that other tools would read otherwise. What exports to
    the folder that were killed have left is removed.
    """
    out = pathlib.Path(folder)
    if "head" in params:
        raise UserError(f"{out}: not written: a reward model; only language models are exported")
    # By os.path, which says no where a name is too long to be one.
    if os.path.lexists(out):
        raise UserError(f"{out}: exists already; remove it, or name another folder")

    # What is small, in full, before anything is written.
    content = config_of(config, tokenizer, dtype)
    if content["model_type"] == "qwen2" and not is_qwen(tokenizer):
        print(
            "note: transformers' AutoTokenizer reads every qwen2 folder's tokenizer as Qwen's, "
            "with other ids; load this one with PreTrainedTokenizerFast.from_pretrained",
            file=sys.stderr,
        )
    texts = {"config.json": content, "generation_config.json": generation_of(tokenizer)}
    files = tokenizer_files(tokenizer)
    for name, text in texts.items():
        files[name] = json.dumps(text, indent=1).encode()
    if card is not None:
        files["README.md"] = card.encode()
    # Written beside it, and renamed when all of it is there.
    with atomic_folder(out) as new:
        for name, file in files.items():
            (new / name).write_bytes(file)
        write_tensors(new, params, config, dtype, SHARD_BYTES)
        # That library gives its files to the user alone.
        for path in new.glob("*.safetensors"):
            shutil.copymode(new / "config.json", path)


# --- the script


def import_run(config: Config, folder: pathlib.Path) -> Params:
    """Write the run `config.run` at step 0, from a Hugging Face folder; return its parameters.

    Where an earlier import of this very folder is there, they are its. Raises UserError as `load`
    does, and where the run holds another model.
    """
    mesh = make_mesh(config.mesh)
    model, files = find_model(folder)
    try:
        tokenizer = Tokenizer(read_tokenizer(folder))
    except UserError as fault:
        raise UserError(f"{folder}: its tokenizer cannot be read: {fault}") from None
    if tokenizer.size > model.vocab:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.size} tokens, its config.json a vocab_size "
            f"of {model.vocab}: they do not belong together; restore the files"
        )
    if finished_steps(pathlib.Path(config.run) / "checkpoints"):
        _refuse_other_import(config.run, folder, model, tokenizer, weights_sum(files))
        print(f"{config.run}: has been imported from {folder}")
        return load_params(config.run)

    # Saved as a finished run of no steps, that any script can start from.
    params = read_params(files, model, mesh)
    config = dataclasses.replace(config, model=model, weights_sha256=weights_sum(files))
    with Checkpoints(
        config.run, config, script="weights", tokenizer=tokenizer.model
    ) as checkpoints:
        checkpoints.save(0, {"params": params})
    print(f"{config.run}: {_count(params):,} parameters of {folder}")
    return params


def weights_sum(files: dict[str, pathlib.Path]) -> str:
    """Return the SHA-256 of the names and sums of the files of weights, each read once.

    `files`: of `find_model`, the file of each tensor.
    """
    return named_sum(sorted(set(files.values()), key=lambda path: path.name))


def _refuse_other_import(
    run: str, folder: pathlib.Path, model: ModelConfig, tokenizer: Tokenizer, weights: str
) -> None:
    """Raise UserError unless `run` was imported from `folder` as it is now.

    `model`, `tokenizer` and `weights`, of `weights_sum`: what the folder holds now.
    """
    stored = load_config(run)
    # Runs of other scripts have no such field; an exporting command makes no run.
    read = stored.get("read")
    if read is None or pathlib.Path(read).resolve() != folder.resolve():
        raise UserError(f"{run}: holds a checkpoint already; name another --run")
    # By their content: times change with copies, and stay where other weights are moved in.
    # Imports from before the sum was kept have none.
    is_same_weights = stored.get("weights_sha256") in (None, weights)
    is_same_shape = stored_model(run) == model
    is_same_tokenizer = Tokenizer.load(run).sha256 == tokenizer.sha256
    if not (is_same_weights and is_same_shape and is_same_tokenizer):
        raise UserError(f"{run}: {folder} has changed since it was imported; name another --run")


def export_run(config: Config, folder: str) -> Params:
    """Write the run `config.run` as a Hugging Face folder; return its parameters."""
    params = load_params(config.run)
    model = stored_model(config.run)
    card = model_card(config.run, pathlib.Path(folder).name, config.license)
    save(folder, model, params, Tokenizer.load(config.run), config.dtype, card)
    print(f"{folder}: {_count(params):,} parameters of {config.run}, as {config.dtype}")
    return params


def model_card(run: str, title: str, license: str) -> str:
    """Return the README.md of an export: what made the model, and where that is written."""
    stored = load_config(run)
    lines = [f"| Plumb | {plumb_version()} |"]
    for name in ("script", "init", "data", "reward", "steps", "seed"):
        values = stored.get(name)
        if values is None:
            continue
        # Names alone: where the files lay is nobody's business.
        every = values if isinstance(values, list) else [values]
        names = [pathlib.Path(str(value)).name for value in every]
        lines.append(f"| {name} | {', '.join(names)} |")
    return CARD.format(title=title, license=license, table="\n".join(lines))


def _count(params: Params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def main(config: Config) -> Params:
    """Import or export; return the parameters."""
    exports = (config.write is not None, "--write")
    refuse_unread(config, {"dtype": exports, "license": exports})
    if config.read is not None and config.write is None:
        return import_run(config, pathlib.Path(config.read))
    if config.write is not None and config.read is None:
        return export_run(config, config.write)
    raise UserError("give --read=FOLDER to import into --run, or --write=FOLDER to export it")


if __name__ == "__main__":
    flags.run(main, Config)
