"""Weights in and out: a Hugging Face folder becomes a run, and a run such a folder.

    python -m weights.convert --read=path/to/Llama-3.2-1B --run=runs/llama
    python -m weights.convert --write=path/to/folder --run=runs/llama-sft

A folder holds config.json, safetensors and a tokenizer. Every script can --init from the run.

Covered are Llama 2 and 3, Mistral, Qwen 2 and 3, and Gemma 1, where all layers are the decoder's.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data.tokenizer import Tokenizer
from data.tokenizer_json import read_tokenizer, tokenizer_files
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit, stored_model
from runtime import flags
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from runtime.run_folder import disk_faults, finished_steps
from sharding import MeshConfig, abstract, make_mesh, path_name
from train_state import load_params
from weights.families import config_of, model_of

SHARD_BYTES = 4 << 30
"""Largest file of an export. To write one takes so much memory more than the model."""

LAYER = "model.layers.{}."


class Layout(NamedTuple):
    """How a weight lies here and in Hugging Face's files, in the letters of model.py's legend."""

    ours: str
    """Axes of ours, without the layer's."""
    name: str
    """Their name of the tensor, with a place for the layer's number."""
    theirs: tuple[str, ...]
    """Their axes; one of theirs may join two of ours."""


LAYOUTS = {
    "decoder/embed": Layout("VD", "model.embed_tokens.weight", ("V", "D")),
    "decoder/final_norm": Layout("D", "model.norm.weight", ("D",)),
    "decoder/layers/attention_norm": Layout("D", LAYER + "input_layernorm.weight", ("D",)),
    "decoder/layers/mlp_norm": Layout("D", LAYER + "post_attention_layernorm.weight", ("D",)),
    "decoder/layers/attention/q": Layout("DNH", LAYER + "self_attn.q_proj.weight", ("NH", "D")),
    "decoder/layers/attention/k": Layout("DKH", LAYER + "self_attn.k_proj.weight", ("KH", "D")),
    "decoder/layers/attention/v": Layout("DKH", LAYER + "self_attn.v_proj.weight", ("KH", "D")),
    "decoder/layers/attention/o": Layout("NHD", LAYER + "self_attn.o_proj.weight", ("D", "NH")),
    "decoder/layers/attention/q_bias": Layout("NH", LAYER + "self_attn.q_proj.bias", ("NH",)),
    "decoder/layers/attention/k_bias": Layout("KH", LAYER + "self_attn.k_proj.bias", ("KH",)),
    "decoder/layers/attention/v_bias": Layout("KH", LAYER + "self_attn.v_proj.bias", ("KH",)),
    "decoder/layers/attention/q_norm": Layout("H", LAYER + "self_attn.q_norm.weight", ("H",)),
    "decoder/layers/attention/k_norm": Layout("H", LAYER + "self_attn.k_norm.weight", ("H",)),
    "decoder/layers/mlp/gate": Layout("DF", LAYER + "mlp.gate_proj.weight", ("F", "D")),
    "decoder/layers/mlp/up": Layout("DF", LAYER + "mlp.up_proj.weight", ("F", "D")),
    "decoder/layers/mlp/down": Layout("FD", LAYER + "mlp.down_proj.weight", ("D", "F")),
    "unembed": Layout("DV", "lm_head.weight", ("V", "D")),
}
"""By the path of a parameter of ours."""


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
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)
    """Over which the imported weights are laid: split over all devices."""
    model: tyro.conf.Suppress[ModelConfig] = ModelConfig()
    """Filled from config.json."""


# --- tensors


class Tensor(NamedTuple):
    """A tensor of Hugging Face's files."""

    name: str
    ours: str
    """Path of the parameter that it is part of."""
    layer: int | None
    """Its layer; None for a parameter that no layer has."""
    shape: tuple[int, ...]


def shapes_of(model: ModelConfig) -> Params:
    """Return the tree of the language model's ShapeDtypeStructs."""
    init, _ = init_and_apply(LanguageModel(model))
    return jax.eval_shape(init, jax.random.key(0))


def their_tensors(model: ModelConfig) -> Iterator[Tensor]:
    """Yield every tensor that a Hugging Face folder of `model` has, layer by layer."""
    sizes = _sizes(model)
    shapes = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes_of(model)):
        ours = path_name(path)
        shape = []
        for group in LAYOUTS[ours].theirs:
            shape.append(math.prod(sizes[axis] for axis in group))
        shapes[ours] = tuple(shape)

    # None: what no layer has.
    for layer in (None, *range(model.layers)):
        for ours, shape in shapes.items():
            name = LAYOUTS[ours].name
            if ("{}" in name) == (layer is not None):
                yield Tensor(name.format(layer), ours, layer, shape)


def _sizes(model: ModelConfig) -> dict[str, int]:
    """Return the sizes of the axes, by letter."""
    return {
        "V": model.vocab,
        "D": model.width,
        "F": model.mlp_width,
        "N": model.heads,
        "K": model.kv_heads,
        "H": model.head_dim,
    }


def find_tensors(folder: pathlib.Path, model: ModelConfig) -> dict[str, pathlib.Path]:
    """Return the file of each of their tensors, by name.

    Raises UserError unless just those of `model` are there, in its shapes.
    """
    wanted = {tensor.name: tensor.shape for tensor in their_tensors(model)}
    files: dict[str, pathlib.Path] = {}
    for file_name in sorted(_file_names(folder)):
        path = folder / file_name
        try:
            with safe_open(path, "numpy") as file:
                names = file.keys()
                for name in names:
                    # Computed here; and a copy of the embedding.
                    is_tied = name == "lm_head.weight" and model.tied
                    if name.endswith("rotary_emb.inv_freq") or is_tied:
                        continue
                    _check_tensor(path, name, file.get_slice(name), wanted)
                    files[name] = path
        except (OSError, SafetensorError) as fault:
            raise UserError(
                f"{path}: no readable safetensors file ({fault}); no other format is read"
            ) from None

    missing = [name for name in wanted if name not in files]
    if missing:
        raise UserError(f"{folder}: {missing[0]}: missing (of {len(missing)}); restore the files")
    return files


def _file_names(folder: pathlib.Path) -> set[str]:
    """Return the names of the folder's safetensors files: those of its index, or the one file."""
    index = folder / "model.safetensors.index.json"
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except FileNotFoundError:
        return {"model.safetensors"}
    except (OSError, ValueError, KeyError, AttributeError) as fault:
        raise UserError(f"{index}: not readable as an index ({fault}); restore it") from None


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

    `files`: of find_tensors. Each device's part is read for itself, a layer's tensor at a time.
    """

    def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        layout = LAYOUTS[path_name(path)]

        # The devices that hold each part of the array.
        holders: dict[str, list[jax.Device]] = {}
        indices: dict[str, tuple[slice, ...]] = {}
        for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
            holders.setdefault(str(index), []).append(device)
            indices[str(index)] = index

        # Each copy is waited for, so that at most one part is held twice.
        parts = []
        for part, devices in holders.items():
            array = _read_part(files, model, layout, like.shape, indices[part])
            for device in devices:
                parts.append(jax.device_put(array, device).block_until_ready())
        return jax.make_array_from_single_device_arrays(like.shape, like.sharding, parts)

    return jax.tree_util.tree_map_with_path(leaf, abstract(shapes_of(model), mesh))


def _read_part(
    files: dict[str, pathlib.Path],
    model: ModelConfig,
    layout: Layout,
    shape: tuple[int, ...],
    index: tuple[slice, ...],
) -> np.ndarray:
    """Read the part `index` of a parameter of `shape` that is laid out so, in float32."""
    spans = []
    for cut, size in zip(index, shape, strict=True):
        spans.append(range(*cut.indices(size)))
    part = np.empty([len(span) for span in spans], np.float32)
    has_layers = "{}" in layout.name
    span_of = dict(zip(layout.ours, spans[has_layers:], strict=True))

    # Where an axis of theirs joins two, the inner one, a head's width, is never cut.
    sizes = _sizes(model)
    cuts = []
    for group in layout.theirs:
        inner = math.prod(sizes[axis] for axis in group[1:])
        outer = span_of[group[0]]
        cuts.append(slice(outer.start * inner, outer.stop * inner))

    # Layer by layer: their tensor, its joined axes apart, and in our order.
    their_axes = "".join(layout.theirs)
    order = [their_axes.index(axis) for axis in layout.ours]
    for i, layer in enumerate(spans[0] if has_layers else [None]):
        name = layout.name.format(layer)
        # Opened for each tensor: a file that stays open holds its pages.
        with safe_open(files[name], "numpy") as file:
            tensor = file.get_slice(name)[tuple(cuts)]
        tensor = tensor.reshape([len(span_of[axis]) for axis in their_axes]).transpose(order)
        part[i if has_layers else ...] = tensor
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
            name = "model.safetensors"
        content = {tensor.name: _as_theirs(leaves, tensor, dtype) for tensor in tensors}
        save_file(content, folder / name, {"format": "pt"})
        file_of.update(dict.fromkeys(content, name))
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": file_of}
        text = json.dumps(index, indent=1)
        (folder / "model.safetensors.index.json").write_text(text)


def _as_theirs(leaves: Params, tensor: Tensor, dtype: str) -> np.ndarray:
    """Return a tensor of theirs, from our parameters by path."""
    # The reverse of _read_part: their order, and axes joined.
    layout = LAYOUTS[tensor.ours]
    leaf = leaves[tensor.ours]
    array = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
    array = array.transpose([layout.ours.index(axis) for axis in "".join(layout.theirs)])
    return np.ascontiguousarray(array.reshape(tensor.shape), dtype)


# --- folders


def load(
    folder: str | os.PathLike, mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Read the model of a Hugging Face folder: its shape, and its parameters in float32.

    The parameters lie on `mesh`, by default one that splits them over all devices. Raises
    UserError for a folder that is damaged, or of a model that the decoder does not cover.
    """
    folder = pathlib.Path(folder)
    model = model_of(folder / "config.json")
    files = find_tensors(folder, model)
    mesh = mesh or make_mesh(MeshConfig(data=1, fsdp=-1))
    return model, read_params(files, model, mesh)


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    dtype: str = "float32",
) -> None:
    """Write a Hugging Face folder, whole or not at all.

    `dtype`: float32 or bfloat16, of the written weights. Raises UserError where the folder exists,
    where no family has the model's features, and for a reward model.
    """
    content = config_of(config, tokenizer, dtype)
    out = pathlib.Path(folder)
    if "head" in params:
        raise UserError(f"{out}: not written: a reward model; only language models are exported")
    if out.exists():
        raise UserError(f"{out}: exists already; name another folder")

    # Written beside it, and renamed when all of it is there.
    new = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with disk_faults(out):
            new.mkdir(parents=True)
            write_tensors(new, params, config, dtype, SHARD_BYTES)
            (new / "config.json").write_text(json.dumps(content, indent=1))
            for name, file in tokenizer_files(tokenizer).items():
                (new / name).write_bytes(file)
            # All for the same readers: safetensors' own files are for their owner alone.
            for written in new.iterdir():
                shutil.copymode(new / "config.json", written)
            new.replace(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


# --- the script


def import_run(config: Config, folder: pathlib.Path) -> Params:
    """Write the run `config.run` at step 0, from a Hugging Face folder; return its parameters."""
    mesh = make_mesh(config.mesh)
    model = model_of(folder / "config.json")
    try:
        tokenizer = Tokenizer(read_tokenizer(folder))
    except RuntimeError as fault:
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({fault}); restore the file"
        ) from None
    check_fit(model, tokenizer.size, 1)
    if finished_steps(pathlib.Path(config.run) / "checkpoints"):
        raise UserError(f"{config.run}: holds a checkpoint already; name another --run")

    # Saved as a finished run of no steps, that any script can start from.
    _, params = load(folder, mesh)
    config = dataclasses.replace(config, model=model)
    with Checkpoints(
        config.run, config, script="weights", tokenizer=tokenizer.model
    ) as checkpoints:
        checkpoints.save(0, {"params": params})
    print(f"{config.run}: {_count(params):,} parameters of {folder}")
    return params


def export_run(config: Config, folder: str) -> Params:
    """Write the run `config.run` as a Hugging Face folder; return its parameters."""
    params = load_params(config.run)
    model = stored_model(config.run)
    save(folder, model, params, Tokenizer.load(config.run), config.dtype)
    print(f"{folder}: {_count(params):,} parameters of {config.run}, as {config.dtype}")
    return params


def _count(params: Params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def main(config: Config) -> Params:
    """Import or export; return the parameters."""
    if config.read is not None and config.write is None:
        return import_run(config, pathlib.Path(config.read))
    if config.write is not None and config.read is None:
        return export_run(config, config.write)
    raise UserError("give --read=FOLDER to import into --run, or --write=FOLDER to export it")


if __name__ == "__main__":
    flags.run(main, Config)
