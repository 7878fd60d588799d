"""Memory: the least that a run needs, compared with what there is before anything is allocated.

`plan.py` compiles a run and knows what it takes; here is arithmetic, always below that. A run that
it refuses could not have started; one that it lets pass may still be too large.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from model_config import PRESETS, ModelConfig
from objectives.likelihood import LOGITS, TOKENS
from runtime.errors import UserError

FLOAT32 = 4
"""Bytes of a parameter, a gradient, a logit."""
BATCH_BYTES = 16
"""Bytes of a token in a batch: its id, mask, segment and position."""
GB = 1e9


# --- what a run needs


def parameter_count(model: ModelConfig) -> int:
    """Count the parameters of a language model of this shape."""
    # By arithmetic, before anything is traced; tests/test_memory.py counts the arrays.
    norm = _norm_parameters(model, model.width)
    norms = 4 if model.norms == "both" else 2
    layer = _attention_parameters(model) + _mlp_parameters(model) + norms * norm
    # The embedding, the final norm, and an unembedding of its own.
    tables = model.vocab * model.width * (1 if model.tied else 2)
    return model.layers * layer + tables + norm


def _norm_parameters(model: ModelConfig, width: int) -> int:
    """Count the parameters of a norm over `width` numbers: a scale, and LayerNorm's bias."""
    return width * (2 if model.norm == "layer" else 1)


def _attention_parameters(model: ModelConfig) -> int:
    """Count the parameters of a layer's attention."""
    heads_width = model.heads * model.head_dim
    kv_width = model.kv_heads * model.head_dim
    count = 2 * model.width * (heads_width + kv_width)
    if model.qkv_bias:
        count += heads_width + 2 * kv_width
    if model.o_bias:
        count += model.width
    if model.qk_norm:
        is_of_a_head = model.qk_norm_over == "head"
        normed = 2 * model.head_dim if is_of_a_head else heads_width + kv_width
        count += _norm_parameters(model, normed)
    return count


def _mlp_parameters(model: ModelConfig) -> int:
    """Count the parameters of a layer's feed-forward layer."""
    # From the model's width to the hidden one, once or twice, and back.
    ways_in = 2 if model.gated else 1
    count = (ways_in + 1) * model.width * model.mlp_width
    if model.experts:
        count = model.experts * (count + model.width)
    if model.mlp_bias:
        count += ways_in * model.mlp_width + model.width
    return count


def needed_bytes(config: Any, axes: Mapping[str, int]) -> dict[str, float]:
    """Return the least bytes that training takes on a device, by what they are for.

    `config`: a training script's. `axes`: devices along each axis of the mesh.
    """
    model = config.model
    count = parameter_count(model)
    lora = getattr(config, "lora", None)
    is_adapted = lora is not None and lora.rank > 0

    # Parameters, cut over all axes but data. Adapters and what is beside them are small.
    ways = math.prod(size for axis, size in axes.items() if axis != "data")
    copies = 1
    if hasattr(config, "reward") and not is_adapted and not getattr(config, "offload", False):
        copies = 2
    needed = {"parameters": copies * count * FLOAT32 / ways}
    if not is_adapted:
        needed["gradients"] = count * FLOAT32 / ways
        needed["the optimiser"] = count * _moment_bytes(config.optimizer) / ways

    # Tokens of a micro-batch: each layer's input is kept for the backward pass.
    own_rows = _rows_of_an_update(config) / config.microbatches
    own_rows /= axes.get("data", 1) * axes.get("fsdp", 1)
    tokens = max(own_rows, 1) * config.length / axes.get("sequence", 1)
    itemsize = model.compute_dtype.itemsize
    hidden = tokens * model.width * model.layers * itemsize / axes.get("tensor", 1)
    needed["activations"] = hidden / axes.get("stage", 1)

    # Logits are made of some tokens at a time (objectives/likelihood.py). A reward model has none.
    if not hasattr(config, "eval_records") or hasattr(config, "loss"):
        own_vocab = model.vocab / axes.get("tensor", 1)
        at_once = min(tokens, max(LOGITS / own_vocab, TOKENS))
        needed["logits"] = at_once * own_vocab * FLOAT32
    return needed


def _moment_bytes(optimizer: Any) -> int:
    """Return the bytes that the optimiser keeps of each parameter."""
    # Adafactor's are of rows and columns.
    if optimizer.name == "adafactor":
        return 0
    return FLOAT32 + (2 if optimizer.moment == "bfloat16" else FLOAT32)


def _rows_of_an_update(config: Any) -> float:
    """Return the rows that one update reads, over all devices."""
    if hasattr(config, "minibatch_size"):
        return config.minibatch_size
    return config.batch_size / getattr(config, "minibatches", 1)


# --- what there is


def memory_of_host() -> float:
    """Return the bytes of this machine, or of the container that it is."""
    total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    # A container's limit (cgroup 2); "max" is none.
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            return min(total, float(file.read()))
    except (OSError, ValueError):
        return total


def memory_of_device(device: jax.Device) -> float:
    """Return the bytes that programs may use on `device`; of a CPU its part of the host's."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return memory_of_host() / jax.local_device_count()


# --- the comparison


def check_memory(config: Any, mesh: Mesh) -> None:
    """Raise UserError where the least that training takes is more than there is.

    `config`: a training script's, before anything is read or written. The line names the flags
    that would make it fit. In a dry run it is a note on stderr.
    """
    axes = dict(mesh.shape)
    fault = _batch_fault(config) or _device_fault(
        config, axes, memory_of_device(jax.local_devices()[0])
    )
    if fault is None:
        return
    if not config.dry_run:
        raise UserError(fault)
    if jax.process_index() == 0:
        print(f"note: {fault}", file=sys.stderr)


def _batch_fault(config: Any) -> str | None:
    """Describe a batch whose tokens alone are more than the host's memory."""
    own_tokens = config.batch_size * config.length / jax.process_count()
    most = memory_of_host()
    if own_tokens * BATCH_BYTES <= most:
        return None
    rows = int(config.batch_size * most / own_tokens / BATCH_BYTES)
    return (
        f"--batch_size={config.batch_size}: its tokens take {own_tokens * BATCH_BYTES / GB:.3g} "
        f"of this host's {most / GB:.3g} GB; give at most {rows}"
    )


def _device_fault(config: Any, axes: Mapping[str, int], most: float) -> str | None:
    """Describe a run that needs more than `most` bytes a device, and what would fit."""
    needed = needed_bytes(config, axes)
    total = sum(needed.values())
    if total <= most:
        return None
    parts = ", ".join(f"{name} {size / GB:.3g}" for name, size in needed.items())
    fitting = list(_fitting(config, axes, most))
    advice = "give " + ", or ".join(fitting) if fitting else "take more or larger devices"
    return (
        f"memory: this run takes at least {total / GB:.3g} GB a device ({parts}) "
        f"of {most / GB:.3g} GB; {advice}"
    )


def _fitting(config: Any, axes: Mapping[str, int], most: float) -> Iterator[str]:
    """Yield flags each of which alone makes the run fit into `most` bytes a device."""

    def fits(changed: Any, changed_axes: Mapping[str, int] = axes) -> bool:
        return sum(needed_bytes(changed, changed_axes).values()) <= most

    # Fewer rows at a time: the fewest parts that fit.
    rows = _rows_of_an_update(config) / (axes.get("data", 1) * axes.get("fsdp", 1))
    parts = 2 * config.microbatches
    while parts <= rows:
        if rows % parts == 0 and fits(dataclasses.replace(config, microbatches=parts)):
            yield f"--microbatches={parts}"
            break
        parts *= 2

    # Less that is kept of each parameter, or parameters on more devices.
    optimizer = dataclasses.replace(config.optimizer, name="adafactor")
    if fits(dataclasses.replace(config, optimizer=optimizer)):
        yield "--optimizer.name=adafactor"
    if axes.get("data", 1) > 1:
        fsdp = axes["data"] * axes.get("fsdp", 1)
        if fits(config, {**axes, "data": 1, "fsdp": fsdp}):
            yield f"--mesh.data=1 --mesh.fsdp={fsdp}"
    if hasattr(config, "lora") and config.init is not None:
        lora = dataclasses.replace(config.lora, rank=8)
        if fits(dataclasses.replace(config, lora=lora)):
            yield "--lora.rank=8"

    # Another model; that of --init is as large as it is.
    if config.init is None:
        yield from _fitting_models(config, fits)


def _fitting_models(config: Any, fits: Any) -> Iterator[str]:
    """Yield a smaller vocabulary and the largest preset that fit, where there are any."""
    vocab = config.model.vocab // 2
    while vocab >= 256:
        model = dataclasses.replace(config.model, vocab=vocab)
        if fits(dataclasses.replace(config, model=model)):
            yield f"--model.vocab={vocab}"
            break
        vocab //= 2
    for preset in sorted(PRESETS.values(), key=parameter_count, reverse=True):
        if fits(dataclasses.replace(config, model=preset)):
            yield f"--model.preset={preset.preset}"
            break
