"""How arrays lie on devices: the mesh, one table of parameter rules, batches, constraints."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.lax import with_sharding_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, get_abstract_mesh
from jax.sharding import PartitionSpec as P

from runtime.errors import UserError
from runtime.hosts import progressed

AnyMesh = Mesh | AbstractMesh
Memory = Literal["device", "pinned_host"]
"""Memory that arrays lie in: the devices', or their host's."""
BATCH = P(("data", "fsdp"))
"""How the rows of a batch are split."""
AXES = ("stage", "data", "fsdp", "sequence", "tensor")
"""From the outermost, whose devices talk least, to the innermost. A mesh has stage and sequence
only if asked for."""

# Anchored path pattern -> PartitionSpec. Every parameter matches exactly one rule. The first axis
# of a layer's parameter is the layer. An axis that does not divide its dimension is left out, so
# key/value heads are replicated where they are fewer than the tensor axis; so is one that the mesh
# does not have. What is cut over fsdp is cut over sequence too.
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
    """Stages of a pipeline over which the layers are split (layers.py); train_lm, train_sft."""


# --- the mesh


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh over `devices`, or over all, and set it as the current one.

    Its axes are data, fsdp and tensor, and stage and sequence where they are not 1; in the order
    of AXES. Raises UserError where the sizes and the number of devices do not agree.
    """
    if devices is None:
        devices = jax.devices()
    count = len(devices)

    # stage and sequence are axes of the mesh only where they are asked for.
    sizes = {}
    for axis in AXES:
        size = getattr(config, axis)
        if size != 1 or axis not in ("stage", "sequence"):
            sizes[axis] = size

    # At most one size is the rest, and the product is the number of devices.
    flags = _flags_of(sizes)
    impossible = any(size == 0 or size < -1 for size in sizes.values())
    given = [size for size in sizes.values() if size != -1]
    rest = len(sizes) - len(given)
    if impossible or rest > 1:
        raise UserError(f"{flags}: each size must be positive, and at most one -1 (the rest)")
    fixed = math.prod(given)
    if count % fixed or (fixed != count and not rest):
        raise UserError(
            f"{flags}: cannot lay {count} device(s) out so; the product must be {count}"
        )

    # The rest gets its size.
    shape: tuple[int, ...] = ()
    for size in sizes.values():
        shape += (count // fixed if size == -1 else size,)
    # jax.make_mesh refuses axes that share a dimension of the torus, as 128 x 4 on 8 x 8 x 8.
    places = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    kinds = (AxisType.Auto,) * len(shape)
    mesh = Mesh(places, tuple(sizes), axis_types=kinds)
    jax.set_mesh(mesh)
    return mesh


def with_wider_tensor(mesh: Mesh, tensor: int) -> Mesh:
    """Return a mesh of the same devices, in the same order, whose tensor axis has `tensor`.

    Neighbours along fsdp join it. `tensor`: a multiple of that of `mesh` that divides tensor x
    fsdp; `mesh` has no axis between the two. The mesh that is returned is not set.
    """
    # fsdp is as much shorter as tensor is longer.
    joined = tensor // mesh.shape["tensor"]
    sizes = {**mesh.shape, "fsdp": mesh.shape["fsdp"] // joined, "tensor": tensor}
    places = mesh.devices.reshape(tuple(sizes.values()))
    return Mesh(places, mesh.axis_names, axis_types=mesh.axis_types)


def _flags_of(sizes: Mapping[str, int]) -> str:
    """Write a mesh's sizes as the flags that set them, for messages."""
    flags = [f"--mesh.{name}={size}" for name, size in sizes.items()]
    return ", ".join(flags)


def platform() -> str:
    """Return `cpu`, `gpu` or `tpu`: where the current mesh lies; without a mesh, JAX's default."""
    # The mesh is asked first, so that a CPU can compile for a TPU.
    device = get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def along(mesh: AnyMesh, *axes: str) -> int:
    """Return how many devices lie along these axes together; 1 along an axis that is not there."""
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def fitting(mesh: AnyMesh, size: int, *axes: str | None) -> str | tuple[str, ...] | None:
    """Return those of `axes`, an entry of a PartitionSpec, over which `size` can be cut.

    `size`: length of the array's dimension. Kept, in order, are axes that the mesh has and that
    together divide it: one axis is returned as its name, several as a tuple, none as None.
    """
    found: list[str] = []
    for axis in axes:
        # Inside a shard_map its own axes are no longer the mesh's to cut with.
        if axis is None or axis not in mesh.axis_names or axis in mesh.manual_axes:
            continue
        if size % along(mesh, *found, axis) == 0:
            found.append(axis)
    # In the form that a PartitionSpec's entry has.
    if len(found) > 1:
        return tuple(found)
    return found[0] if found else None


# --- parameters and states


def path_name(path: tuple[Any, ...]) -> str:
    """Return `decoder/layers/attention/q` for a key path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_of(name: str, shape: tuple[int, ...], mesh: AnyMesh) -> P:
    """Return the PartitionSpec of a parameter, or of an optimiser's copy of it.

    `name`: its path, as of `path_name`. Replicated where no rule fits.
    """
    # Of each axis of the rule, what the mesh has and the shape allows.
    rule = _rule_of(name, len(shape))
    return P(*(fitting(mesh, size, *axes) for axes, size in zip(rule, shape, strict=False)))


def _rule_of(name: str, ndim: int) -> list[tuple[str | None, ...]]:
    """Return the mesh's axes that cut each axis of a parameter, by RULES; [] where none fits."""
    for pattern, spec in RULES:
        # The end of the path: an optimiser's copy has more before it.
        if re.search(rf"(^|/){pattern}$", name) and len(spec) == ndim:
            return [("fsdp", "sequence") if axis == "fsdp" else (axis,) for axis in spec]
    return []


def uncut(name: str, shape: tuple[int, ...], mesh: AnyMesh) -> dict[str, int]:
    """Return {axis of the mesh: axis of the parameter} where RULES would cut and the size forbids.

    `name`, `shape`: as of `spec_of`. Axes of one device cut nothing, and are not named.
    """
    found = {}
    for number, axes in enumerate(_rule_of(name, len(shape))):
        kept = fitting(mesh, shape[number], *axes) or ()
        for axis in axes:
            if axis is not None and along(mesh, axis) > 1 and axis not in kept:
                found[axis] = number
    return found


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """Return a NamedSharding for each leaf of a tree of arrays or shapes, by RULES.

    `tree`: parameters, or a whole train state, whose leaves are found by the end of their path.
    """

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec_of(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Return a tree like `tree` of ShapeDtypeStructs, with shardings on `mesh` by RULES.

    `tree`: arrays or shapes; parameters, or all that a checkpoint holds, for a leaf is found by
    the end of its path. What no rule fits is replicated. What comes back is what a checkpoint is
    restored onto.
    """

    def described(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(described, tree, shardings_of(tree, mesh))


def init_sharded(init: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """Compute `init(*args)` in place, each leaf of what it returns laid on `mesh` by RULES.

    Under one jit: otherwise an optimiser's moments are replicated. `args`: trees of arrays; they
    are not donated.
    """
    # Shapes first: they say where each leaf lies.
    shapes = jax.eval_shape(init, *args)
    placed = jax.jit(init, out_shardings=shardings_of(shapes, mesh))
    return placed(*args)


def to_memory(tree: Any, memory: Memory) -> Any:
    """Move `tree`, arrays on the mesh, to the memory `device` or the hosts' `pinned_host`.

    Each keeps its sharding. Arrays that are there already are returned as they are.
    """
    places = jax.tree.map(lambda x: x.sharding.with_memory_kind(memory), tree)
    return jax.device_put(tree, places)


def to_host(tree: Any) -> Any:
    """Return `tree` with NumPy arrays, whole on every host; of several hosts all must call it."""

    def whole(x: Any) -> Any:
        # NumPy arrays, and arrays of which this host has all.
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    fetched = jax.device_get(jax.tree.map(whole, tree))
    # The device has come this far: the watchdog need not end the run in a long evaluation.
    progressed()
    return fetched


# --- batches


def to_mesh(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global arrays of this host's rows of a batch, [B, ...], B split over data and fsdp.

    `batch`: NumPy arrays by name, whose first axis is the rows; names stay.
    """
    # Each host gives its rows; the arrays are as long as all hosts' together.
    sharding = NamedSharding(mesh, BATCH)
    on_mesh = {}
    for name, x in batch.items():
        on_mesh[name] = jax.make_array_from_process_local_data(sharding, x)
    return on_mesh


class DataShard(TypedDict):
    """Which part of the data a host reads: arguments of data.batches."""

    process: int
    """Number of the part, from 0."""
    processes: int
    """Number of parts."""


def data_shard(mesh: Mesh, owners: np.ndarray | None = None, host: int | None = None) -> DataShard:
    """Return which part of the data this host reads.

    Hosts whose devices hold the same rows, as where tensor spans them, read the same part.
    `owners`: the host of each device of the mesh, and `host`: this one, if not as JAX says. Raises
    UserError for a mesh on which hosts share some rows but not all.
    """
    # As JAX says, unless told otherwise.
    if owners is None:
        owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    if host is None:
        host = jax.process_index()

    # Devices by the part of a batch's rows that they hold: [parts, devices of a part].
    ways = along(mesh, "data", "fsdp")
    batch_axes = [mesh.axis_names.index(axis) for axis in ("data", "fsdp")]
    by_rows = np.moveaxis(owners, batch_axes, (0, 1))
    by_rows = by_rows.reshape(ways, -1)

    # The rows of each host. Hosts must hold the same rows, or none in common, and equally many.
    held = {}
    for owner in np.unique(owners):
        has_part = (by_rows == owner).any(1)
        numbers = np.flatnonzero(has_part).tolist()
        held[int(owner)] = tuple(numbers)
    parts = sorted(set(held.values()))
    lengths = [len(part) for part in parts]
    if sum(lengths) != ways or len(set(lengths)) > 1:
        raise UserError(
            f"{_flags_of(mesh.shape)}: hosts share rows of the batch in part; "
            "make what is not data or fsdp divide a host's devices"
        )
    return DataShard(process=parts.index(held[host]), processes=len(parts))


def check_batch(
    name: str, rows: int, microbatches: int, mesh: Mesh, length: int = 0, layers: int = 0
) -> None:
    """Raise UserError unless `rows` split evenly over micro-batches and the mesh's batch axes.

    So must a row's `length` in tokens over sequence, and over stage the `layers` of a model that
    the script can run as a pipeline; 0 where it cannot. `name`: the flag that set `rows`.
    """
    # The ring deals a row's tokens to stripes, each of which it cuts again.
    sequence = along(mesh, "sequence")
    if length % sequence**2:
        raise UserError(
            f"--mesh.sequence={sequence}: its square must divide --length={length} "
            "(kernels/ring.py)"
        )
    # Each stage has as many layers.
    stage = along(mesh, "stage")
    if stage > 1 and not layers:
        raise UserError(f"--mesh.stage={stage}: no pipeline here; take fsdp, tensor or sequence")
    if stage > 1 and layers % stage:
        raise UserError(f"--mesh.stage={stage}: must divide --model.layers={layers}")
    # Each device has as many rows of each micro-batch.
    data = mesh.shape["data"]
    fsdp = mesh.shape["fsdp"]
    parts = microbatches * data * fsdp
    if rows < 1 or microbatches < 1 or rows % parts:
        raise UserError(
            f"--{name}={rows}: must be a positive multiple of {parts} "
            f"(--microbatches={microbatches} x data {data} x fsdp {fsdp})"
        )


def in_microbatches(x: jax.Array, parts: int) -> jax.Array:
    """Return [B, ...] as [parts, B / parts, ...]; `parts` must divide B.

    Part i has every `parts`-th row, so a device keeps to the rows that it holds.
    """
    rows, *rest = x.shape
    dealt = x.reshape(rows // parts, parts, *rest)
    return dealt.swapaxes(0, 1)


# --- constraints inside compiled functions: without a mesh each returns its argument


def _rows_split(mesh: AnyMesh, x: jax.Array) -> bool:
    """True where there is a mesh and its batch axes divide the rows of `x`."""
    if mesh.empty:
        return False
    ways = along(mesh, "data", "fsdp")
    return x.shape[0] % ways == 0


def batch_devices(rows: int) -> int:
    """Return over how many parts of the mesh, data x fsdp, a batch's `rows` are split.

    1 without a mesh, and where these axes do not divide the rows.
    """
    ways = along(get_abstract_mesh(), "data", "fsdp")
    return ways if rows % ways == 0 else 1


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keep the first axis of `x` split over data and fsdp, where these divide it.

    Without a mesh, or where data x fsdp does not divide that axis, `x` is returned as it is.
    """
    if not _rows_split(get_abstract_mesh(), x):
        return x
    return with_sharding_constraint(x, BATCH)


def constrain_tokens(x: jax.Array, *axes: str) -> jax.Array:
    """Keep [B, T, ...] split: rows over data and fsdp, tokens over those of `axes` that fit.

    Without a mesh `x` is returned as it is.
    """
    mesh = get_abstract_mesh()
    if not _rows_split(mesh, x):
        return x
    tokens = fitting(mesh, x.shape[1], *axes)
    return with_sharding_constraint(x, P(*BATCH, tokens))


def constrain_residual(x_BTD: jax.Array) -> jax.Array:
    """Keep the residual stream split between layers: its tokens over sequence and over tensor.

    Rows are split over data and fsdp. An axis that does not divide the tokens is left out. Without
    a mesh, or where data and fsdp do not divide the rows, `x_BTD` is returned as it is.

    Korthikanti et al. 2022. Otherwise each device of the tensor axis would keep all of it, for
    every layer, until the backward pass.
    """
    return constrain_tokens(x_BTD, "sequence", "tensor")


def constrain_units(x: jax.Array) -> jax.Array:
    """Keep heads [B, T, N, H] or hidden units [B, T, F] split over tensor.

    So that XLA gathers the tokens, not the weights. Without a tensor axis `x` is returned as it
    is, of whatever shape.
    """
    # Heads that tensor does not divide stay whole on every device.
    mesh = get_abstract_mesh()
    tensor = along(mesh, "tensor")
    if tensor == 1 or x.shape[2] % tensor:
        return x
    rows = BATCH[0] if _rows_split(mesh, x) else None
    tokens = fitting(mesh, x.shape[1], "sequence")
    return with_sharding_constraint(x, P(rows, tokens, "tensor"))


def constrain_rows(table_VD: jax.Array) -> jax.Array:
    """Gather the embedding over fsdp; its vocabulary stays split over tensor.

    Without a mesh it is returned as it is.
    """
    mesh = get_abstract_mesh()
    if mesh.empty:
        return table_VD
    # Split as RULES has it, but for fsdp.
    divides = table_VD.shape[0] % mesh.shape["tensor"] == 0
    vocabulary = "tensor" if divides else None
    return with_sharding_constraint(table_VD, P(vocabulary, None))


def constrain_params(tree: Any) -> Any:
    """Keep parameters, or their gradients, laid as RULES say; replicated where no rule fits.

    No rule fits adapters. A leaf is found by the end of its path, so `tree` may hold parameters
    under further keys. A gradient's sum over rows is then a reduce-scatter. Without a mesh `tree`
    is returned as it is.
    """
    mesh = get_abstract_mesh()
    if mesh.empty:
        return tree

    def laid(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        spec = spec_of(path_name(path), x.shape, mesh)
        return with_sharding_constraint(x, spec)

    return jax.tree_util.tree_map_with_path(laid, tree)


def gathered(params: Any, dtype: Any) -> Any:
    """Gather weights for many passes in a row: cast to `dtype`, and cut over tensor alone.

    `params`: a tree of parameters, as RULES name them. Otherwise decoding gathers them anew for
    each token. Weights that nothing but tensor cuts are returned as they are, of their own type.
    """
    mesh = get_abstract_mesh()
    if mesh.empty:
        return params

    def whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        spec = spec_of(path_name(path), leaf.shape, mesh)
        left = _over_tensor(spec)
        if left == spec:
            return leaf
        return with_sharding_constraint(leaf.astype(dtype), left)

    return jax.tree_util.tree_map_with_path(whole, params)


def gathered_shapes(params: Any, mesh: Mesh, dtype: Any) -> Any:
    """Return the ShapeDtypeStructs of what `gathered` makes of `params` on `mesh`.

    `params`: arrays or shapes.
    """

    def whole(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        spec = spec_of(path_name(path), leaf.shape, mesh)
        left = _over_tensor(spec)
        kept = leaf.dtype if left == spec else dtype
        return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=NamedSharding(mesh, left))

    return jax.tree_util.tree_map_with_path(whole, params)


def _over_tensor(spec: P) -> P:
    """Return `spec` with tensor alone of its axes."""
    kept = [axis if axis == "tensor" else None for axis in spec]
    return P(*kept)


def flat(x: jax.Array, *axes: str) -> jax.Array:
    """Return [B, T, ...] as [M, ...], M = B T, or as it is where the mesh cuts the tokens.

    `axes`: names of the mesh axes that may cut the tokens, as "sequence"; the mesh is the current
    one (jax.set_mesh), if there is one. XLA's CPU backend runs the backward pass of a matmul over
    one leading axis up to three times as fast as over two, and others do not mind; but it cannot
    split a sum over M as tokens are cut.
    """
    mesh = get_abstract_mesh()
    if mesh.empty or along(mesh, *axes) == 1:
        _, _, *rest = x.shape
        return x.reshape(-1, *rest)
    return x
