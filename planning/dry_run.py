"""`--dry_run`: what a script would train and on what, told before anything is written."""

import math
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from data.batches import Batch, Batches
from data.tokenizer import Tokenizer
from planning.world_defaults import world_defaults_note
from runtime.run_folder import array_type
from runtime.terminal import printable
from sharding import path_name, uncut
from train_state import Init, shapes_of

SHOWN = 4
"""Rows of the batch that are shown."""
# Codes of a terminal.
PREDICTED = "\x1b[32m"
PADDING = "\x1b[2m"
OFF = "\x1b[0m"


Data = Batches | dict[str, Batches]
"""Batches that a script reads: one stream, or several by name."""


# --- what --dry_run prints


def preview(
    config: Any,
    init: Init,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    data: Data,
    tokenizer: Tokenizer,
    batches_a_step: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Print what `preview_items` does, for a script whose state is `start_or_resume`'s; return {}.

    Models that it only reads are not counted.
    """
    shapes = shapes_of(config, init, optimizer, mesh)
    return preview_items(config, shapes, data, tokenizer, batches_a_step)


def preview_items(
    config: Any,
    items: dict[str, Any],
    data: Data,
    tokenizer: Tokenizer,
    batches_a_step: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Print a run's arithmetic, its parameters' shapes and shardings, and the first batch as text.

    `config`: the script's. `items`: shapes with shardings of its checkpoint, the parameters under
    `params`, and of what else it holds. `data`: what the run would read; the batch is the first
    stream's. `batches_a_step`: as for `lengths_of`. Tokens under the loss mask are green; in
    brackets where stdout is no terminal or NO_COLOR is in the environment. Returns {}, the metrics
    of no step.
    """
    streams = data if isinstance(data, dict) else {"": data}
    batch = next(next(iter(streams.values())))
    # Sizes, mesh and memory.
    rest = {name: tree for name, tree in items.items() if name != "params"}
    if hasattr(config, "length"):
        length = config.length
    else:
        length = config.max_prompt + config.max_new_tokens
    text = describe(
        f"{config.run}: dry run",
        items["params"],
        rest,
        batch_size=config.batch_size,
        candidates=candidates_of(batch),
        length=length,
        steps=config.steps,
        microbatches=config.microbatches,
        data=lengths_of(streams, config.steps, batches_a_step),
        note=world_defaults_note(config),
    )
    print(text)

    # Each parameter, and how it is split.
    print("parameters, and the mesh axes that split them:")
    for path, leaf in jax.tree.leaves_with_path(items["params"]):
        axes = ", ".join("-" if axis is None else str(axis) for axis in leaf.sharding.spec)
        name = path_name(path)
        print(f"  {name:<36} {array_type(leaf):<28} ({axes})")

    # The batch: its arrays, then its tokens as text.
    is_alone = jax.process_count() == 1
    print("the first batch:" if is_alone else "this host's rows of the first batch:")
    for name, array in batch.items():
        print(f"  {name:<36} {array_type(array)}")
    for name in batch:
        if name.startswith("tokens"):
            print_rows(name, batch, tokenizer)
    return {}


def print_rows(name: str, batch: Batch, tokenizer: Tokenizer) -> None:
    """Print the first rows of the tokens `name` of `batch`, with their loss mask."""
    # Arrays of one batch share their names' endings: tokens_BT has segment_ids_BT.
    segments = batch[name.replace("tokens", "segment_ids")]
    mask = batch.get(name.replace("tokens", "loss_mask"))
    if mask is None:
        print(f"{name}, prompts: the run samples responses:")
        mask = np.zeros_like(segments)
    else:
        print(f"{name}, {'tokens in brackets' if is_plain() else 'green tokens'} are trained on:")
    # Candidates of a prompt are rows too.
    length = segments.shape[-1]
    tokens_NT, mask_NT, segments_NT = (
        array.reshape(-1, length) for array in (batch[name], mask, segments)
    )
    for row in range(min(SHOWN, len(tokens_NT))):
        text = decoded(tokens_NT[row], mask_NT[row], segments_NT[row], tokenizer)
        print(f"  {text}\n")


def is_plain() -> bool:
    """Tell whether text goes where colours are not shown, or not wanted."""
    return "NO_COLOR" in os.environ or not sys.stdout.isatty()


def decoded(
    tokens_T: np.ndarray, mask_T: np.ndarray, segments_T: np.ndarray, tokenizer: Tokenizer
) -> str:
    """Return a row as text: predicted tokens green, a bar between segments, padding as its length.

    `mask_T`: above 0 for predicted tokens. `segments_T`: 0 for padding.
    """
    # Without colours brackets tell.
    begin, after = ("[", "]") if is_plain() else (PREDICTED, OFF)

    # Pieces of one segment that are all predicted or all not.
    kinds = np.stack([mask_T > 0, segments_T])
    changes = (kinds[:, 1:] != kinds[:, :-1]).any(0)
    ends = [*(np.flatnonzero(changes) + 1), len(tokens_T)]
    parts = []
    start = 0
    for end in ends:
        if start and segments_T[start] != segments_T[start - 1]:
            parts.append(" | ")
        pieces = [piece(int(token), tokenizer) for token in tokens_T[start:end]]
        text = "".join(pieces)
        if segments_T[start] == 0:
            padding = f"({end - start} padding)"
            text = padding if is_plain() else f"{PADDING}{padding}{OFF}"
        elif mask_T[start] > 0:
            text = f"{begin}{text}{after}"
        parts.append(text)
        start = end
    return "".join(parts)


def piece(token: int, tokenizer: Tokenizer) -> str:
    """Return a token as it is seen in text; control tokens by their names."""
    # Rows of the embedding beyond the tokenizer's pieces.
    if token >= tokenizer.size:
        return f"<{token}>"
    text = tokenizer.pieces.id_to_piece(token)
    # SentencePiece's space, then a line's end by itself and in byte-level vocabularies.
    for mark, shown in (("▁", " "), ("\n", "⏎"), ("Ċ", "⏎"), ("Ġ", " ")):
        text = text.replace(mark, shown)
    return printable(text)


# --- the arithmetic of a run


def describe(
    title: str,
    params: Any,
    rest: Any,
    *,
    batch_size: int,
    length: int,
    steps: int,
    candidates: int = 1,
    start: int = 0,
    microbatches: int = 1,
    data: str = "",
    note: str = "",
) -> str:
    """Return the arithmetic of a run in a few lines of at most 80 columns.

    `params` and `rest` (the optimiser's state, other models): trees of arrays or of
    ShapeDtypeStructs with their shardings. `batch_size`: rows over all devices, each of
    `candidates` sequences of at most `length` tokens. `start`: steps finished. `microbatches`:
    those of a pipeline. `data`: what is read and what is lost of it, as a sentence. `note`: what
    else should be known before the first step.
    """
    # What is trained.
    leaves = jax.tree.leaves(params)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    dtypes = "/".join(sorted({str(leaf.dtype) for leaf in leaves}))
    weights = _bytes_per_device(params)
    others = _bytes_per_device(rest)

    # The mesh: over data and fsdp the batch is split, over stage the layers.
    mesh = getattr(leaves[0].sharding, "mesh", None)
    sizes = {} if mesh is None else dict(mesh.shape)
    axes = " × ".join(f"{name} {size}" for name, size in sizes.items()) or "none"
    parts = sizes.get("data", 1) * sizes.get("fsdp", 1)
    rows = str(batch_size) if candidates == 1 else f"{batch_size} × {candidates}"
    per_device = batch_size * candidates / parts
    stages = sizes.get("stage", 1)

    # In order of what one asks first.
    tokens = batch_size * candidates * length
    devices = jax.device_count()
    kind = jax.devices()[0].device_kind
    resumed = f", resumed after {start:,}" if start else ""
    lines = {
        "parameters": f"{count:,} {dtypes}",
        "batch": f"{rows} sequences of {length}: {tokens:,} tokens a step, "
        f"{per_device:g} sequences a device",
        "steps": f"{steps:,}{resumed}; {steps * tokens:,} tokens",
        "mesh": f"{axes}; {devices} {kind} device{'s' if devices > 1 else ''}",
        "memory": f"about {_size(2 * weights + others)} a device, and activations on top: "
        f"parameters {_size(weights)}, gradients {_size(weights)}, "
        f"optimiser and other models {_size(others)}",
    }
    if data:
        lines["data"] = data
    notes = [note] if note else []
    notes += _uncut_notes(params, mesh)
    if notes:
        lines["note"] = " ".join(notes)
    if stages > 1:
        lines["pipeline"] = pipeline_line(stages, microbatches)
    lines["compile"] = "the first step takes longer: it is compiled"
    return "\n".join([title, *_wrapped(lines)])


def lengths_of(
    data: dict[str, Batches], steps: int, batches_a_step: Mapping[str, float] | None = None
) -> str:
    """Say of each stream how long its records are and what of them is lost.

    Also where `steps` do not come to a stage of its mixture. `batches_a_step`: {name of a stream:
    batches that a step reads of it, on average}; of streams that it lacks a step reads one.
    """
    told = []
    for name, batches in data.items():
        told.append(batches.lengths_line())
        a_step = (batches_a_step or {}).get(name, 1)
        number, end = batches.stage_beyond(round(steps * a_step))
        if number:
            told.append(f"stage {number} begins after batch {end:,}: not in {steps:,} steps")
    return "; ".join(told)


def candidates_of(batch: Batch) -> int:
    """Return how many sequences a row of `batch` has: more than one for comparisons."""
    shape = next(array.shape for name, array in batch.items() if name.startswith("tokens"))
    return shape[1] if len(shape) == 3 else 1


# The fields of ModelConfig that are a parameter's axes; None where a mesh cuts no such axis.
SIZES = {
    "embed": ("vocab", "width"),
    "unembed": ("width", "vocab"),
    "q": (None, "width", "heads", None),
    "k": (None, "width", "kv_heads", None),
    "v": (None, "width", "kv_heads", None),
    "o": (None, "heads", None, "width"),
    "q_heads_norm": (None, "heads", None),
    "k_heads_norm": (None, "kv_heads", None),
    "gate": (None, "width", "mlp_width"),
    "up": (None, "width", "mlp_width"),
    "down": (None, "mlp_width", "width"),
    "router": (None, "width", "experts"),
    "expert_gate": (None, "experts", "width", None),
    "expert_up": (None, "experts", "width", None),
    "expert_down": (None, "experts", None, "width"),
    "gate_bias": (None, "mlp_width"),
    "up_bias": (None, "mlp_width"),
}
LARGE = 0.05
"""Share of what a device holds of the parameters, from which one of them is large."""


def _uncut_notes(params: Any, mesh: Any) -> list[str]:
    """Say of each axis of `mesh` which large parameter it does not cut, and the next size it does.

    Of several parameters the largest is named. `params`: arrays or shapes, on the mesh.
    """
    if mesh is None:
        return []
    # By axis: (bytes on a device, the parameter, its size along the axis that is not cut, field).
    largest: dict[str, tuple[int, str, int, str]] = {}
    whole = _bytes_per_device(params)
    for path, leaf in jax.tree.leaves_with_path(params):
        name = path_name(path)
        held = _bytes_per_device(leaf)
        for axis, number in uncut(name, leaf.shape, mesh).items():
            field = SIZES[name.rpartition("/")[2]][number] if held > LARGE * whole else None
            if field is not None:
                found = (held, name, leaf.shape[number], field)
                largest[axis] = max(largest.get(axis, found), found, key=lambda item: item[0])

    notes = []
    for axis, (_, name, size, field) in largest.items():
        devices = mesh.shape[axis]
        fits = f"--model.{field}={size + -size % devices}"
        divisor = max(n for n in range(1, devices) if size % n == 0)
        if divisor > 1:
            fits += f" or --mesh.{axis}={divisor}"
        notes.append(
            f"--mesh.{axis}={devices} does not divide --model.{field}={size}: each of its devices "
            f"holds and computes all of {name}; {fits} would fit."
        )
    return notes


def _wrapped(lines: dict[str, str]) -> Iterable[str]:
    for name, line in lines.items():
        # Paths stay whole.
        yield from textwrap.wrap(
            line,
            80,
            initial_indent=f"  {name:<12}",
            subsequent_indent=" " * 14,
            break_long_words=False,
            break_on_hyphens=False,
        )


def _bytes_per_device(tree: Any) -> int:
    """Return the largest share of a tree that one device holds."""
    # An array without a sharding lies whole on each device; a key has no item size.
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
        total += math.prod(shape) * getattr(leaf.dtype, "itemsize", 8)
    return total


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def pipeline_line(stages: int, microbatches: int) -> str:
    """Return the arithmetic of a pipeline's schedule as text."""
    # Each stage starts one tick after the one before it.
    ticks = f"{microbatches} micro-batches in {microbatches + stages - 1} ticks"
    idle = bubble(stages, microbatches)
    return f"{stages} stages, {ticks}: {idle:.1%} of the time idle"


def bubble(stages: int, microbatches: int) -> float:
    """Return the share of its time that a stage is idle (Huang et al. 2019, section 2.3)."""
    return (stages - 1) / (microbatches + stages - 1)
