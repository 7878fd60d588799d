"""Weights in and out: a Hugging Face folder (config.json, safetensors, tokenizer) becomes a run, a run such a folder.

    python -m weights.convert --read=path/to/Llama-3.2-1B --run=runs/llama     # every script can --init from it
    python -m weights.convert --write=path/to/folder --run=runs/llama-sft

Covered are Llama 2 and 3, Mistral, Qwen 2 and 3, and Gemma 1, where all their layers are the decoder's.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Literal

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
"""Largest file of an export; so much more memory than the model takes is needed to write one."""

LAYER = "model.layers.{}."
TENSORS = {  # ours: axes of a layer's, in model.py's letters; theirs: name, and axes, of which theirs may join two
    "decoder/embed": ("VD", "model.embed_tokens.weight", ("V", "D")),
    "decoder/final_norm": ("D", "model.norm.weight", ("D",)),
    "decoder/layers/attention_norm": ("D", LAYER + "input_layernorm.weight", ("D",)),
    "decoder/layers/mlp_norm": ("D", LAYER + "post_attention_layernorm.weight", ("D",)),
    "decoder/layers/attention/q": ("DNH", LAYER + "self_attn.q_proj.weight", ("NH", "D")),
    "decoder/layers/attention/k": ("DKH", LAYER + "self_attn.k_proj.weight", ("KH", "D")),
    "decoder/layers/attention/v": ("DKH", LAYER + "self_attn.v_proj.weight", ("KH", "D")),
    "decoder/layers/attention/o": ("NHD", LAYER + "self_attn.o_proj.weight", ("D", "NH")),
    "decoder/layers/attention/q_bias": ("NH", LAYER + "self_attn.q_proj.bias", ("NH",)),
    "decoder/layers/attention/k_bias": ("KH", LAYER + "self_attn.k_proj.bias", ("KH",)),
    "decoder/layers/attention/v_bias": ("KH", LAYER + "self_attn.v_proj.bias", ("KH",)),
    "decoder/layers/attention/q_norm": ("H", LAYER + "self_attn.q_norm.weight", ("H",)),
    "decoder/layers/attention/k_norm": ("H", LAYER + "self_attn.k_norm.weight", ("H",)),
    "decoder/layers/mlp/gate": ("DF", LAYER + "mlp.gate_proj.weight", ("F", "D")),
    "decoder/layers/mlp/up": ("DF", LAYER + "mlp.up_proj.weight", ("F", "D")),
    "decoder/layers/mlp/down": ("FD", LAYER + "mlp.down_proj.weight", ("D", "F")),
    "unembed": ("DV", "lm_head.weight", ("V", "D")),
}


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
    """Of the exported weights; imported ones become float32."""
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)
    """Over which the imported weights are laid: split over all devices."""
    model: tyro.conf.Suppress[ModelConfig] = ModelConfig()
    """Filled from config.json."""


# --- tensors


def shapes_of(model: ModelConfig) -> Params:
    """The tree of the language model's ShapeDtypeStructs."""
    return jax.eval_shape(init_and_apply(LanguageModel(model))[0], jax.random.key(0))


def their_tensors(model: ModelConfig) -> Iterator[tuple[str, str, int | None, tuple[int, ...]]]:
    """(their name, our name, layer, their shape) of each tensor, layer by layer."""
    sizes = _sizes(model)
    ours = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes_of(model))]
    shape = {
        name: tuple(math.prod(sizes[x] for x in group) for group in TENSORS[name][2])
        for name in ours
    }
    for layer in (None, *range(model.layers)):
        for name in ours:
            if ("{}" in TENSORS[name][1]) == (layer is not None):
                yield TENSORS[name][1].format(layer), name, layer, shape[name]


def _sizes(c: ModelConfig) -> dict[str, int]:
    return {
        "V": c.vocab,
        "D": c.width,
        "F": c.mlp_width,
        "N": c.heads,
        "K": c.kv_heads,
        "H": c.head_dim,
    }


def find_tensors(folder: pathlib.Path, model: ModelConfig) -> dict[str, pathlib.Path]:
    """The file of each of their tensors; raises UserError unless just those of `model` are there, in its shapes."""
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except FileNotFoundError:
        names = {"model.safetensors"}
    except (OSError, ValueError, KeyError, AttributeError) as fault:
        raise UserError(f"{index}: not readable as an index ({fault}); restore it") from None
    wanted = {name: shape for name, _, _, shape in their_tensors(model)}
    files: dict[str, pathlib.Path] = {}
    for path in [folder / name for name in sorted(names)]:
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict: it has no `in`)
                    tensor = file.get_slice(name)
                    found, kind = tuple(tensor.get_shape()), tensor.get_dtype()
                    if name.endswith("rotary_emb.inv_freq") or (
                        name == "lm_head.weight" and model.tied
                    ):
                        continue  # computed here; a copy of the embedding
                    if name not in wanted:
                        raise UserError(
                            f"{path}: {name}: unknown; config.json names no model that has it"
                        )
                    if found != wanted[name]:
                        raise UserError(
                            f"{path}: {name}: shape {found}, by config.json {wanted[name]}; restore it"
                        )
                    if kind not in ("F32", "F16", "BF16"):
                        raise UserError(
                            f"{path}: {name}: type {kind}; use a checkpoint in float32, float16 or bfloat16"
                        )
                    files[name] = path
        except (OSError, SafetensorError) as fault:
            raise UserError(
                f"{path}: no readable safetensors file ({fault}); no other format is read"
            ) from None
    if missing := [name for name in wanted if name not in files]:
        raise UserError(f"{folder}: {missing[0]}: missing (of {len(missing)}); restore the files")
    return files


def read_params(
    files: dict[str, pathlib.Path], model: ModelConfig, mesh: jax.sharding.Mesh
) -> Params:
    """The float32 parameters on `mesh`; each device's part is read for itself, a layer's tensor at a time."""
    sizes = _sizes(model)

    def leaf(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        ours, theirs, groups = TENSORS[path_name(path)]
        layered, letters = "{}" in theirs, "".join(groups)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            spans = [
                range(*cut.indices(size)) for cut, size in zip(index, like.shape, strict=True)
            ]
            out = np.empty([len(span) for span in spans], np.float32)
            of = dict(zip(ours, spans[layered:], strict=True))
            cuts = []  # where an axis of theirs joins two, the inner one, a head's width, is never split
            for group in groups:
                inner = math.prod(sizes[x] for x in group[1:])
                cuts.append(slice(of[group[0]].start * inner, of[group[0]].stop * inner))
            for i, layer in enumerate(spans[0] if layered else [None]):
                name = theirs.format(layer)
                with safe_open(
                    files[name], "numpy"
                ) as file:  # closed again, so that its pages are not held
                    tensor = file.get_slice(name)[tuple(cuts)]
                tensor = tensor.reshape([len(of[x]) for x in letters]).transpose(
                    [letters.index(x) for x in ours]
                )
                out[i if layered else ...] = tensor
            return out

        devices: dict[str, list[Any]] = {}  # of each part, all that hold it
        where = like.sharding.addressable_devices_indices_map(like.shape)
        for device, index in where.items():
            devices.setdefault(str(index), []).append((device, index))
        parts = []
        for holders in (
            devices.values()
        ):  # waited for, so that at most one part is held twice, as it is copied
            read = part(holders[0][1])
            parts += [jax.device_put(read, device).block_until_ready() for device, _ in holders]
        return jax.make_array_from_single_device_arrays(like.shape, like.sharding, parts)

    return jax.tree_util.tree_map_with_path(leaf, abstract(shapes_of(model), mesh))


def write_tensors(
    folder: pathlib.Path, params: Params, model: ModelConfig, dtype: str, most: int
) -> None:
    """model.safetensors in `folder`, or files of at most `most` bytes (but a tensor) and their index."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    files: list[list[tuple[str, str, int | None]]] = [[]]
    sizes, width = [0], np.dtype(dtype).itemsize
    for theirs, ours, layer, shape in their_tensors(model):
        size = math.prod(shape) * width
        if sizes[-1] and sizes[-1] + size > most:
            files.append([])
            sizes.append(0)
        files[-1].append((theirs, ours, layer))
        sizes[-1] += size
    index = {}
    for i, entries in enumerate(files, 1):
        name = (
            "model.safetensors"
            if len(files) == 1
            else f"model-{i:05}-of-{len(files):05}.safetensors"
        )
        content = {}
        for theirs, ours, layer in entries:
            axes, _, groups = TENSORS[ours]
            tensor = np.asarray(leaves[ours] if layer is None else leaves[ours][layer])
            tensor = tensor.transpose([axes.index(x) for x in "".join(groups)])
            shape = [
                math.prod(tensor.shape["".join(groups).index(x)] for x in group)
                for group in groups
            ]
            content[theirs] = np.ascontiguousarray(tensor.reshape(shape), dtype)
        save_file(content, folder / name, {"format": "pt"})
        index |= dict.fromkeys(content, name)
    if len(files) > 1:
        text = json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": index}, indent=1)
        (folder / "model.safetensors.index.json").write_text(text)


# --- folders


def load(
    folder: str | os.PathLike, mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """The model of a Hugging Face folder, its parameters in float32 on `mesh`; raises UserError.

    Default: split over all devices.
    """
    model = model_of(pathlib.Path(folder) / "config.json")
    files = find_tensors(pathlib.Path(folder), model)
    return model, read_params(files, model, mesh or make_mesh(MeshConfig(data=1, fsdp=-1)))


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    dtype: str = "float32",
) -> None:
    """Writes a Hugging Face folder, whole or not at all; raises UserError where it exists, or no family fits."""
    content, out = config_of(config, tokenizer, dtype), pathlib.Path(folder)
    if "head" in params:
        raise UserError(f"{out}: not written: a reward model; only language models are exported")
    if out.exists():
        raise UserError(f"{out}: exists already; name another folder")
    new = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with disk_faults(out):
            new.mkdir(parents=True)
            write_tensors(new, params, config, dtype, SHARD_BYTES)
            (new / "config.json").write_text(json.dumps(content, indent=1))
            for name, file in tokenizer_files(tokenizer).items():
                (new / name).write_bytes(file)
            new.replace(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


# --- the script


def import_run(config: Config) -> Params:
    """Writes the run at step 0; returns its parameters."""
    mesh, folder = make_mesh(config.mesh), pathlib.Path(config.read)
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
    config = dataclasses.replace(config, model=model)
    _, params = load(folder, mesh)
    with Checkpoints(
        config.run, config, script="weights", tokenizer=tokenizer.model
    ) as checkpoints:
        checkpoints.save(0, {"params": params})
    print(f"{config.run}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters of {folder}")
    return params


def export_run(config: Config) -> Params:
    """Writes the folder; returns the parameters."""
    params = load_params(config.run)
    model, tokenizer = stored_model(config.run), Tokenizer.load(config.run)
    save(config.write, model, params, tokenizer, config.dtype)
    size = sum(x.size for x in jax.tree.leaves(params))
    print(f"{config.write}: {size:,} parameters of {config.run}, as {config.dtype}")
    return params


def main(config: Config) -> Params:
    """Imports or exports; returns the parameters."""
    if (config.read is None) == (config.write is None):
        raise UserError("give --read=FOLDER to import into --run, or --write=FOLDER to export it")
    return import_run(config) if config.read is not None else export_run(config)


if __name__ == "__main__":
    flags.run(main, Config)
