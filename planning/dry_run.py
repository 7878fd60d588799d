"""`--dry_run`: what a script would train and on what, told before anything is written."""

import math
import os
import textwrap
from typing import Any

import jax
import numpy as np

from data.batches import Batch
from data.tokenizer import Tokenizer
from runtime.run_folder import array_type
from sharding import path_name
from train_state import shapes_of

SHOWN = 4
"""Rows of the batch that are shown."""
PREDICTED, PADDING, OFF = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def preview(
    config: Any, init: Any, optimizer: Any, mesh: Any, batch: Batch, tokenizer: Tokenizer
) -> dict[str, float]:
    """`preview_items` of a script whose state is `start_or_resume`'s; models that it only reads are not counted."""
    return preview_items(config, shapes_of(config, init, optimizer, mesh), batch, tokenizer)


def preview_items(
    config: Any, items: dict[str, Any], batch: Batch, tokenizer: Tokenizer
) -> dict[str, float]:
    """Prints a run's arithmetic, each parameter's shape and sharding, and the first batch decoded; returns {}.

    `config`: the script's; `items`: shapes with shardings of its checkpoint (parameters as `params`) and of what else
    it holds. Tokens under the loss mask are green; with NO_COLOR in the environment, in brackets.
    """
    params, rest = (
        items["params"],
        {name: tree for name, tree in items.items() if name != "params"},
    )
    length = (
        config.length if hasattr(config, "length") else config.max_prompt + config.max_new_tokens
    )
    sizes = {"batch_size": config.batch_size, "length": length, "steps": config.steps}
    sizes["microbatches"] = config.microbatches
    print(describe(f"{config.run}: dry run", params, rest, **sizes))
    print("parameters, and the mesh axes that split them:")
    for path, leaf in jax.tree.leaves_with_path(params):
        axes = ", ".join("-" if axis is None else str(axis) for axis in leaf.sharding.spec)
        print(f"  {path_name(path):<36} {array_type(leaf):<28} ({axes})")
    print(
        "the first batch:" if jax.process_count() == 1 else "this host's rows of the first batch:"
    )
    for name, x in batch.items():
        print(f"  {name:<36} {array_type(x)}")
    for name in (name for name in batch if name.startswith("tokens")):
        mask = batch.get(name.replace("tokens", "loss_mask"))
        segments = batch[name.replace("tokens", "segment_ids")]
        parts = [
            x.reshape(-1, x.shape[-1])
            for x in (batch[name], np.zeros_like(segments) if mask is None else mask, segments)
        ]
        print(
            f"{name}, {'prompts: the run samples responses' if mask is None else 'the loss is of what is green'}:"
        )
        for tokens, wanted, segment in list(zip(*parts, strict=True))[:SHOWN]:
            print(f"  {decoded(tokens, wanted, segment, tokenizer)}\n")
    return {}


def decoded(
    tokens_T: np.ndarray, mask_T: np.ndarray, segments_T: np.ndarray, tokenizer: Tokenizer
) -> str:
    """A row as text: predicted tokens green, a bar between segments, padding as its length."""
    plain = "NO_COLOR" in os.environ
    begin, after = ("[", "]") if plain else (PREDICTED, OFF)
    parts, start = [], 0
    kinds = np.stack([mask_T > 0, segments_T])
    for end in [*(np.flatnonzero((kinds[:, 1:] != kinds[:, :-1]).any(0)) + 1), len(tokens_T)]:
        text = "".join(piece(int(token), tokenizer) for token in tokens_T[start:end])
        if segments_T[start] == 0:
            text = (
                f"({end - start} padding)" if plain else f"{PADDING}({end - start} padding){OFF}"
            )
        elif mask_T[start] > 0:
            text = f"{begin}{text}{after}"
        parts.append(" | " if start and segments_T[start] != segments_T[start - 1] else "")
        parts.append(text)
        start = end
    return "".join(parts)


def piece(token: int, tokenizer: Tokenizer) -> str:
    """A token as it is seen in text; control tokens by their names."""
    if token >= tokenizer.size:
        return f"<{token}>"
    return (
        tokenizer.pieces.id_to_piece(token)
        .replace("▁", " ")
        .replace("\n", "⏎")
        .replace("Ċ", "⏎")
        .replace("Ġ", " ")
    )


def describe(
    title: str,
    params: Any,
    rest: Any,
    *,
    batch_size: int,
    length: int,
    steps: int,
    start: int = 0,
    microbatches: int = 1,
) -> str:
    """The arithmetic of a run in a few lines of at most 80 columns.

    `params` and `rest` (optimiser and the like): trees of arrays or ShapeDtypeStructs with their shardings;
    `batch_size` in sequences over all devices, of `length` tokens. `microbatches`: of a pipeline.
    """
    leaves = jax.tree.leaves(params)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    dtypes = "/".join(sorted({str(leaf.dtype) for leaf in leaves}))
    devices = jax.device_count()
    mesh = getattr(leaves[0].sharding, "mesh", None)
    axes = (
        " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
        if mesh is not None
        else "none"
    )
    weights, others = _bytes_per_device(params), _bytes_per_device(rest)
    spread = mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1) if mesh is not None else 1
    stages = mesh.shape.get("stage", 1) if mesh is not None else 1
    tokens = batch_size * length
    resumed = f", resumed after {start:,}" if start else ""
    lines = {
        "parameters": f"{count:,} {dtypes}",
        "batch": f"{batch_size} sequences of {length}: {tokens:,} tokens a step, "
        f"{batch_size / spread:g} sequences a device",
        "steps": f"{steps:,}{resumed}; {steps * tokens:,} tokens",
        "mesh": f"{axes}; {devices} {jax.devices()[0].device_kind} device{'s' * (devices > 1)}",
        "memory": f"about {_size(2 * weights + others)} a device, and activations on top: "
        f"parameters {_size(weights)}, gradients {_size(weights)}, optimiser and other models {_size(others)}",
        **({"pipeline": in_words(stages, microbatches)} if stages > 1 else {}),
        "compile": "the first step takes longer: it is compiled",
    }
    text = [title]
    for name, line in lines.items():
        text += textwrap.wrap(line, 80, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14)
    return "\n".join(text)


def _bytes_per_device(tree: Any) -> int:
    """Largest share that one device holds."""

    def share(leaf: Any) -> int:
        shape = (
            leaf.sharding.shard_shape(leaf.shape)
            if getattr(leaf, "sharding", None)
            else leaf.shape
        )
        return math.prod(shape) * getattr(leaf.dtype, "itemsize", 8)

    return sum(share(leaf) for leaf in jax.tree.leaves(tree))


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def in_words(stages: int, microbatches: int) -> str:
    """The schedule's arithmetic."""
    ticks = f"{microbatches} micro-batches in {microbatches + stages - 1} ticks"
    return f"{stages} stages, {ticks}: {bubble(stages, microbatches):.1%} of the time idle"


def bubble(stages: int, microbatches: int) -> float:
    """The share of its time that a stage has nothing to work on (Huang et al. 2019, section 2.3)."""
    return (stages - 1) / (microbatches + stages - 1)
