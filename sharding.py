"""How arrays lie on devices: the mesh, one table of parameter rules, sharded states and global batches."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from runtime.errors import UserError

BATCH = P(("data", "fsdp"))
AXES = ("stage", "data", "fsdp", "sequence", "tensor")
"""From the outermost, whose devices talk least, to the innermost. A mesh has stage and sequence only if asked for."""

# Anchored path pattern -> PartitionSpec. Every parameter matches exactly one rule. The first axis of a
# layer's parameter is the layer. An axis that does not divide its dimension is left out, so key/value heads
# are replicated where they are fewer than the tensor axis; so is one that the mesh does not have. What is cut over
# fsdp is cut over sequence too.
RULES = (
    (r"decoder/embed", P("tensor", "fsdp")),
    (r"decoder/final_norm", P(None)),
    (r"decoder/layers/(attention|mlp)_norm", P("stage", None)),
    (r"decoder/layers/attention/[qkv]", P("stage", "fsdp", "tensor", None)),
    (r"decoder/layers/attention/[qkv]_bias", P("stage", "tensor", None)),
    (r"decoder/layers/attention/[qk]_norm", P("stage", None)),
    (r"decoder/layers/attention/o", P("stage", "tensor", None, "fsdp")),
    (r"decoder/layers/mlp/(gate|up)", P("stage", "fsdp", "tensor")),
    (r"decoder/layers/mlp/down", P("stage", "tensor", "fsdp")),
    (r"unembed", P("fsdp", "tensor")),
    (r"head", P(None)),
    (r"bias", P()),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 takes the rest."""

    data: int = -1
    """Copies of the model, each with its part of the batch."""
    fsdp: int = 1
    """Devices over which a copy's parameters and its batch are split."""
    tensor: int = 1
    """Devices over which heads and hidden units are split."""
    sequence: int = 1
    """Devices over which the tokens of a row are split, for long context (kernels/ring.py)."""
    stage: int = 1
    """Stages of a pipeline over which the layers are split (layers.py); of train_lm and train_sft."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`, or over all, also set as the current one; raises UserError where it cannot be."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    sizes, count = (
        {axis: n for axis, n in sizes.items() if n != 1 or axis not in ("stage", "sequence")},
        len(devices),
    )
    flags = ", ".join(f"--mesh.{name}={size}" for name, size in sizes.items())
    if (
        any(size == 0 or size < -1 for size in sizes.values())
        or list(sizes.values()).count(-1) > 1
    ):
        raise UserError(f"{flags}: each size must be positive, and at most one -1 (the rest)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if count % fixed or (fixed != count and -1 not in sizes.values()):
        raise UserError(
            f"{flags}: cannot lay {count} device(s) out so; the product must be {count}"
        )
    shape = tuple(count // fixed if size == -1 else size for size in sizes.values())
    # jax.make_mesh refuses axes that share a dimension of the torus, such as 128 x 4 on a v5p of 8 x 8 x 8.
    places = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    mesh = Mesh(places, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))
    jax.set_mesh(mesh)
    return mesh


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: where the current mesh lies; without a mesh, JAX's default."""
    device = (
        jax.sharding.get_abstract_mesh().abstract_device
    )  # of the mesh, so that a CPU can compile for a TPU
    return jax.default_backend() if device is None else device.platform


def path_name(path: tuple[Any, ...]) -> str:
    """`decoder/layers/attention/q` for a key path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def along(mesh: Mesh | AbstractMesh, *axes: str) -> int:
    """Devices along these axes together; one that the mesh does not have is of size 1."""
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def fitting(mesh: Mesh, size: int, *axes: str | None) -> str | tuple[str, ...] | None:
    """Of `axes` those that the mesh has, and that together divide `size`: to cut a dimension over them."""
    found: tuple[str, ...] = ()
    for axis in axes:
        if (
            axis in mesh.axis_names
            and axis not in mesh.manual_axes
            and size % along(mesh, *found, axis) == 0
        ):
            found += (axis,)
    return found if len(found) > 1 else found[0] if found else None


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The PartitionSpec of a parameter, or of an optimiser's copy of it; replicated where no rule fits."""
    for pattern, spec in RULES:
        if re.search(rf"(^|/){pattern}$", name) and len(spec) == len(shape):
            axes = [("fsdp", "sequence") if axis == "fsdp" else (axis,) for axis in spec]
            return P(*(fitting(mesh, size, *some) for some, size in zip(axes, shape, strict=True)))
    return P()


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of a tree of arrays or shapes (parameters or a whole train state)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path_name(path), leaf.shape, mesh)), tree
    )


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Shapes, types and shardings of `tree`: what a checkpoint is restored onto."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings_of(tree, mesh),
    )


def init_sharded(init: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """`init(*args)` computed in place, each leaf by the rules (under one jit: else moments are replicated)."""
    shardings = shardings_of(jax.eval_shape(init, *args), mesh)
    return jax.jit(init, out_shardings=shardings)(*args)


def to_mesh(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch as global arrays, split over data and fsdp by their first axis."""
    sharding = NamedSharding(mesh, BATCH)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def to_memory(tree: Any, memory: str) -> Any:
    """`tree` as it lies on the mesh, in the memory `device` or the hosts' `pinned_host`; itself if it is there."""
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(memory), tree))


def to_host(tree: Any) -> Any:
    """`tree` with NumPy arrays, whole on every host; of several hosts all must call it."""

    def whole(x: Any) -> Any:
        split = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return multihost_utils.process_allgather(x, tiled=True) if split else x

    return jax.device_get(jax.tree.map(whole, tree))


class DataShard(TypedDict):
    """The part of the data that a host reads: keywords of data.batches.Batches."""

    process: int
    """From 0."""
    processes: int
    """Parts of the data in all."""


def data_shard(mesh: Mesh, owners: np.ndarray | None = None, host: int | None = None) -> DataShard:
    """Which part of the data this host reads, as `process` of `processes`, for data.batches.

    Hosts whose devices hold the same rows, as where tensor spans them, read the same part. `owners`: the host of each
    device of the mesh, and `host`: this one, if not as JAX says. Raises UserError for a mesh on which hosts share some
    rows but not all.
    """
    owners = (
        np.vectorize(lambda device: device.process_index)(mesh.devices)
        if owners is None
        else owners
    )
    host = jax.process_index() if host is None else host
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = np.moveaxis(
        owners, [mesh.axis_names.index(axis) for axis in ("data", "fsdp")], (0, 1)
    ).reshape(ways, -1)
    held = {int(o): tuple(np.flatnonzero((rows == o).any(1)).tolist()) for o in np.unique(owners)}
    parts = sorted(set(held.values()))
    if sum(map(len, parts)) != ways or len({len(part) for part in parts}) > 1:
        axes = ", ".join(f"--mesh.{name}={size}" for name, size in mesh.shape.items())
        raise UserError(
            f"{axes}: hosts share rows of the batch in part; make what is not data or fsdp divide a host's devices"
        )
    return {"process": parts.index(held[host]), "processes": len(parts)}


def check_batch(
    name: str, rows: int, microbatches: int, mesh: Mesh, length: int = 0, layers: int = 0
) -> None:
    """Raises UserError unless `rows` split evenly over micro-batches and the batch axes of the mesh.

    So must rows' `length` over sequence, and over stage the `layers` of a model that a script can pipeline, else 0.
    """
    sequence, stage = along(mesh, "sequence"), along(mesh, "stage")
    if length % sequence**2:
        raise UserError(
            f"--mesh.sequence={sequence}: its square must divide --length={length} (kernels/ring.py)"
        )
    if stage > 1 and (not layers or layers % stage):
        wrong = (
            f"must divide --model.layers={layers}"
            if layers
            else "no pipeline here; take fsdp, tensor or sequence"
        )
        raise UserError(f"--mesh.stage={stage}: {wrong}")
    parts = microbatches * mesh.shape["data"] * mesh.shape["fsdp"]
    if rows < 1 or microbatches < 1 or rows % parts:
        raise UserError(
            f"--{name}={rows}: must be a positive multiple of {parts} "
            f"(--microbatches={microbatches} x data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']})"
        )


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keep the first axis split over data and fsdp; without a mesh, or with an odd batch, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def in_microbatches(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] as [parts, B / parts, ...]: part i has every k-th row, so a device keeps to the rows that it holds."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def constrain_tokens(x: jax.Array, *axes: str) -> jax.Array:
    """[B, T, ...]: rows over data and fsdp, tokens over those of `axes` that divide them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, P(*BATCH, fitting(mesh, x.shape[1], *axes)))


def constrain_residual(x_BTD: jax.Array) -> jax.Array:
    """The residual stream between layers: its tokens over sequence, and over tensor (Korthikanti et al. 2022).

    Otherwise each device of the tensor axis would keep all of it, for every layer, until the backward pass.
    """
    return constrain_tokens(x_BTD, "sequence", "tensor")


def flat(x: jax.Array, *axes: str) -> jax.Array:
    """[B, T, ...] as [M, ...]; as it is where one of `axes` cuts the tokens, for XLA cannot split a sum over M so."""
    mesh = jax.sharding.get_abstract_mesh()
    return x.reshape(-1, *x.shape[2:]) if mesh.empty or along(mesh, *axes) == 1 else x


def constrain_units(x: jax.Array) -> jax.Array:
    """[B, T, N, H] or [B, T, F]: heads or hidden units over tensor, so that XLA gathers the tokens, not the weights."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] == 1 or x.shape[2] % mesh.shape["tensor"]:
        return x
    rows = BATCH[0] if x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    return jax.lax.with_sharding_constraint(
        x, P(rows, fitting(mesh, x.shape[1], "sequence"), "tensor")
    )


def constrain_params(tree: Any) -> Any:
    """Parameters, or their gradients, laid as the rules say: a gradient's sum over rows is then a reduce-scatter."""
    mesh = jax.sharding.get_abstract_mesh()
    lay = lambda path, x: jax.lax.with_sharding_constraint(
        x, spec_of(path_name(path), x.shape, mesh)
    )
    return tree if mesh.empty else jax.tree_util.tree_map_with_path(lay, tree)


def gathered(params: Any, dtype: Any) -> Any:
    """Weights for many passes in a row: in `dtype`, cut over tensor alone. Else decoding gathers them for a token."""
    mesh = jax.sharding.get_abstract_mesh()

    def whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        spec = spec_of(path_name(path), leaf.shape, mesh)
        left = P(*(axis if axis == "tensor" else None for axis in spec))
        return leaf if left == spec else jax.lax.with_sharding_constraint(leaf.astype(dtype), left)

    return params if mesh.empty else jax.tree_util.tree_map_with_path(whole, params)


def constrain_rows(table_VD: jax.Array) -> jax.Array:
    """The embedding gathered over fsdp, its vocabulary still split over tensor; without a mesh, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table_VD
    vocabulary = "tensor" if table_VD.shape[0] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(table_VD, P(vocabulary, None))
