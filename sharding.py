"""How arrays lie on devices: the mesh, one table of parameter rules, batches, constraints."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
    (r"decoder/final_norm(_bias)?", P(None)),
    (r"decoder/layers/(attention|mlp)(_out)?_norm(_bias)?", P("stage", None)),
    (r"decoder/layers/attention/[qkv]", P("stage", "fsdp", "tensor", None)),
    (r"decoder/layers/attention/[qkv]_bias", P("stage", "tensor", None)),
    (r"decoder/layers/attention/[qk]_norm(_bias)?", P("stage", None)),
    (r"decoder/layers/attention/[qk]_heads_norm(_bias)?", P("stage", "tensor", None)),
    (r"decoder/layers/attention/o_bias", P("stage", None)),
    (r"decoder/layers/attention/o", P("stage", "tensor", None, "fsdp")),
    (r"decoder/layers/mlp/(gate|up)", P("stage", "fsdp", "tensor")),
    (r"decoder/layers/mlp/(gate|up)_bias", P("stage", "tensor")),
    (r"decoder/layers/mlp/down", P("stage", "tensor", "fsdp")),
    (r"decoder/layers/mlp/down_bias", P("stage", None)),
    # A router is small, and whole on every device: so `gathered` keeps it in float32. The experts
    # themselves are dealt to the tensor axis.
    (r"decoder/layers/mlp/router", P("stage", None, None)),
    (r"decoder/layers/mlp/expert_(gate|up)", P("stage", "tensor", "fsdp", None)),
    (r"decoder/layers/mlp/expert_down", P("stage", "tensor", None, "fsdp")),
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
    """Make the mesh over `devices` (None: over all) and set it as the current one (jax.set_mesh).

    Its axes, from the outermost: stage, data, fsdp, sequence, tensor, all of AxisType.Auto; stage
    and sequence are left out where `config` has 1 for them. One size may be -1: what the others
    leave of the devices. Raises UserError for a size of 0 or below -1, for more than one -1, and
    where the sizes do not multiply to the number of devices.
    """
    # All devices of all hosts, unless told otherwise.
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
    # XLA chooses how arrays are laid that no rule or constraint names.
    kinds = (AxisType.Auto,) * len(shape)
    mesh = Mesh(places, tuple(sizes), axis_types=kinds)
    jax.set_mesh(mesh)
    return mesh


def with_wider_tensor(mesh: Mesh, tensor: int) -> Mesh:
    """Return a mesh of the same devices in the same order, with `tensor` along its tensor axis.

    Its fsdp axis is shorter by the same factor; others, stage too, stay. `tensor`: a multiple of
    the mesh's tensor that divides its tensor x fsdp. `mesh` must not have a sequence axis. Neither
    is checked. The new mesh is not set as the current one.
    """
    # fsdp shrinks by as much as tensor grows.
    joined = tensor // mesh.shape["tensor"]
    sizes = {**mesh.shape, "fsdp": mesh.shape["fsdp"] // joined, "tensor": tensor}
    # In the same order: neighbours along fsdp become neighbours along tensor.
    places = mesh.devices.reshape(tuple(sizes.values()))
    return Mesh(places, mesh.axis_names, axis_types=mesh.axis_types)


def _flags_of(sizes: Mapping[str, int]) -> str:
    """Write a mesh's sizes as the flags that set them, for messages."""
    flags = [f"--mesh.{name}={size}" for name, size in sizes.items()]
    return ", ".join(flags)


def platform() -> str:
    """Return the current mesh's platform, `cpu`, `gpu` or `tpu`; without a mesh, JAX's default."""
    # The mesh is asked first, so that a CPU can compile for a TPU.
    device = get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def summed_type(dtype: Any) -> Any:
    """Return the type in which arrays of `dtype` enter a shard_map over some axes that sums them.

    XLA's CPU backend crashes on such sums in bfloat16, in the derivative too.
    """
    return np.float32 if platform() == "cpu" else dtype


def along(mesh: AnyMesh, *axes: str) -> int:
    """Return how many devices lie along `axes` together, the product of their sizes.

    An axis that `mesh` does not have counts 1; with no `axes`, or on an empty mesh, the result is
    1. Axes of a shard_map count in full.
    """
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def fitting(mesh: AnyMesh, size: int, *axes: str | None) -> str | tuple[str, ...] | None:
    """Return the PartitionSpec entry that cuts a dimension of `size` over the `axes` that fit.

    `axes`: names of mesh axes, tried in order; None is passed over. An axis, of one device too,
    fits if `mesh` has it and its size times those of the axes that fitted before it divides
    `size`. Axes over which `mesh` is manual, as the abstract mesh inside a shard_map is over its
    own, do not fit. Returns one axis as its name, several as a tuple of names, and None where no
    axis fits.
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
    """Return the names of a jax.tree_util key path joined by /: `decoder/layers/attention/q`.

    An index is its number, 0/q; the empty path is "".
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_of(name: str, shape: tuple[int, ...], mesh: AnyMesh) -> P:
    """Return the PartitionSpec on `mesh` of a parameter, or of an optimiser's copy of it.

    `name`: the path by `path_name`. `shape`: of the array. The first rule of RULES that matches
    the end of the path, whole names, and has as many axes as `shape` is taken; axes that do not
    fit a dimension (`fitting`) are left out of it. Where there is none the result is P(),
    replicated.
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
    """Return {mesh axis: dimension} where RULES would cut a parameter but its size forbids it.

    `name`, `shape`: as in `spec_of`. `dimension`: its number, from 0. Axes of one device, or that
    `mesh` does not have, are left out. Returns {} where every axis of the rule fits, and where no
    rule matches.
    """
    # Dimension by dimension: which axes the rule names, and which of them divide it.
    found = {}
    for number, axes in enumerate(_rule_of(name, len(shape))):
        kept = fitting(mesh, shape[number], *axes) or ()
        for axis in axes:
            if axis is not None and along(mesh, axis) > 1 and axis not in kept:
                found[axis] = number
    return found


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """Return a tree like `tree` with a NamedSharding on `mesh` for each leaf, by RULES.

    `tree`: arrays or ShapeDtypeStructs: parameters, or a whole TrainState, for RULES match the end
    of a leaf's path (`spec_of`). Leaves that match no rule are replicated.
    """

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec_of(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Return a tree like `tree` of ShapeDtypeStructs, with shardings on `mesh` by RULES.

    `tree`: arrays, NumPy's too, or ShapeDtypeStructs: parameters, a TrainState, or all items of a
    checkpoint. Types are kept; leaves that match no rule are replicated. A checkpoint is restored
    onto the result.
    """

    def described(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(described, tree, shardings_of(tree, mesh))


def init_sharded(init: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """Return `init(*args)`, computed under one jit, with each leaf laid on `mesh` by RULES.

    `args`: trees of arrays, such as a key, traced and not donated. `mesh` need not be current,
    unless `init` reads it. `init` returns any tree of arrays, such as a TrainState: without this
    an optimiser's moments would be replicated.
    """
    # Shapes first: they say where each leaf lies.
    shapes = jax.eval_shape(init, *args)
    placed = jax.jit(init, out_shardings=shardings_of(shapes, mesh))
    return placed(*args)


def to_memory(tree: Any, memory: Memory) -> Any:
    """Move a tree of arrays on the mesh to the memory `device` or the hosts' `pinned_host`.

    Returns a tree like `tree`; each array keeps its sharding otherwise. Arrays that lie there
    already are returned as they are. Those given are not freed. For calls outside jit; does not
    wait for the copies. A CPU has both memories too.
    """
    places = jax.tree.map(lambda x: x.sharding.with_memory_kind(memory), tree)
    return jax.device_put(tree, places)


def to_host(tree: Any) -> Any:
    """Return `tree` with whole NumPy arrays in place of JAX arrays, on every process.

    Types are kept, bfloat16 too; leaves that are no JAX arrays are returned as they are. Waits for
    the device. With several processes all must call it.
    """

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
    """Lay this host's rows of a batch on the mesh; return global arrays [B, ...] by name.

    `batch`: arrays of NumPy, [rows, ...]; B is the rows of all hosts, each host's where its
    devices stand on the mesh (hosts that read the same part, see `data_shard`, give the same
    rows). B is split over data and fsdp, other axes are whole. Raises JAX's ValueError where data
    x fsdp does not divide B. Every host must call it.
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
    """Return which part of the data this host reads, as keyword arguments of data.batches.

    Hosts whose devices hold the same rows of a batch, as where tensor spans them, read the same
    part. `owners`: the process index of each device, in the shape of `mesh.devices`; None: JAX's.
    `host`: the process index of this host, which must own a device; None: JAX's. Raises UserError
    for a mesh on which two hosts share some rows but not all, or hold unequal numbers of rows.
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
    """Raise UserError unless a batch of `rows` rows splits evenly over micro-batches and the mesh.

    `rows`, those of all hosts, must be a positive multiple of `microbatches` x data x fsdp.
    `name`: the flag that set it, without the dashes. `length`, tokens of a row, must be a multiple
    of the square of sequence; 0 passes. `layers` must be a multiple of stage; 0 says that the
    script runs no pipeline, and then stage must be 1.
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
    """Return `x` [B, ...] as [parts, B / parts, ...]; `parts` is a Python int that divides B.

    Part i has rows i, i + parts, i + 2 parts, ..., so each device keeps to the rows that it holds,
    where each part splits evenly over the devices. Raises JAX's TypeError where `parts` does not
    divide B.
    """
    # Dealt like cards: blocks would give each part to a few devices alone.
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
    """Return over how many parts, data x fsdp of the current mesh, `rows` rows are split.

    It is 1 without a mesh, and where data x fsdp does not divide `rows`.
    """
    ways = along(get_abstract_mesh(), "data", "fsdp")
    return ways if rows % ways == 0 else 1


def by_rows_and_experts(
    run: Callable[..., Any], x: jax.Array, router: jax.Array, experts: tuple[jax.Array, ...]
) -> Any:
    """Return `run(x, router, experts, first, total)`, each device with its own rows and experts.

    `x`: [B, ...]; data and fsdp cut its rows, where the two divide them. `router` is whole on each
    device. `experts`: arrays [E, ...]; tensor cuts their first axis, where it divides it. `first`:
    the number of the first expert that a device has. `total(y)`: sums over the devices that have
    the same rows and other experts. `run` returns a tree of arrays that is equal on these, and
    whose first axes are joined over the others: a device's rows, or one entry a device. Other axes
    of the mesh are left to XLA. Without a mesh `run` is called once, with all.
    """
    # What the mesh cuts.
    mesh = get_abstract_mesh()
    count = experts[0].shape[0]
    has_rows_cut = batch_devices(x.shape[0]) > 1
    has_experts_cut = along(mesh, "tensor") > 1 and count % along(mesh, "tensor") == 0
    axes = {"data", "fsdp"} if has_rows_cut else set()
    if has_experts_cut:
        axes.add("tensor")
    if not axes:
        return run(x, router, experts, 0, lambda y: y)

    # In the derivative experts are summed over the devices that share them.
    computed = x.dtype
    summed = summed_type(computed)

    def local(x: jax.Array, router: jax.Array, experts: tuple[jax.Array, ...]) -> Any:
        x = x.astype(computed)
        experts = tuple(weight.astype(computed) for weight in experts)
        if not has_experts_cut:
            return run(x, router, experts, 0, lambda y: y)
        first = jax.lax.axis_index("tensor") * experts[0].shape[0]
        return run(x, router, experts, first, partial(jax.lax.psum, axis_name="tensor"))

    # Unchecked: with the check JAX 0.10 has a wrong derivative of x[i] where `i` differs over
    # devices and `x` does not.
    rows = BATCH if has_rows_cut else P()
    expert = P("tensor") if has_experts_cut else P()
    on_mesh = jax.shard_map(
        local,
        in_specs=(rows, P(), expert),
        out_specs=rows,
        axis_names=frozenset(axes),
        check_vma=False,
    )
    experts = tuple(weight.astype(summed) for weight in experts)
    return on_mesh(x.astype(summed), router, experts)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keep the first axis of `x` [B, ...] split over data and fsdp, the others whole; return `x`.

    Without a mesh, or where data x fsdp does not divide B, `x` is returned as it is.
    """
    # Rows that the devices do not divide, such as one prompt, are left to XLA.
    if not _rows_split(get_abstract_mesh(), x):
        return x
    return with_sharding_constraint(x, BATCH)


def constrain_tokens(x: jax.Array, *axes: str) -> jax.Array:
    """Keep `x` [B, T, ...] split: rows over data and fsdp, tokens over `axes`; return `x`.

    `axes`: names of mesh axes; those that do not fit T are left out (`fitting`). Without any, T is
    whole, as the axes after T always are. Without a mesh, or where data x fsdp does not divide B,
    `x` is returned as it is.
    """
    mesh = get_abstract_mesh()
    if not _rows_split(mesh, x):
        return x
    tokens = fitting(mesh, x.shape[1], *axes)
    return with_sharding_constraint(x, P(*BATCH, tokens))


def constrain_residual(x_BTD: jax.Array) -> jax.Array:
    """Keep the residual stream split between layers, its tokens over sequence and tensor.

    Returns `x_BTD`. Rows are split over data and fsdp; D is whole. An axis that does not divide
    the tokens is left out. Without a mesh, or where data x fsdp does not divide the rows, `x_BTD`
    is returned as it is.

    Korthikanti et al. 2022. Otherwise each device of the tensor axis would keep all of it, for
    every layer, until the backward pass.
    """
    return constrain_tokens(x_BTD, "sequence", "tensor")


def constrain_units(x: jax.Array) -> jax.Array:
    """Keep heads [B, T, N, H] or hidden units [B, T, F], axis 2, split over tensor; return `x`.

    Then XLA gathers the tokens, not the weights. Rows are split over data and fsdp if their
    product divides B, tokens over sequence if it divides T; else they stay whole. Without a mesh,
    where tensor has one device, or where it does not divide axis 2, `x` is returned as it is; with
    one device it may have any shape.
    """
    # Heads that tensor does not divide stay whole on every device.
    mesh = get_abstract_mesh()
    tensor = along(mesh, "tensor")
    if tensor == 1 or x.shape[2] % tensor:
        return x
    # Tokens stay cut over sequence alone: tensor now cuts heads or units.
    rows = BATCH[0] if _rows_split(mesh, x) else None
    tokens = fitting(mesh, x.shape[1], "sequence")
    return with_sharding_constraint(x, P(rows, tokens, "tensor"))


def constrain_rows(table_VD: jax.Array) -> jax.Array:
    """Gather the embedding [V, D] over fsdp, keep V split over tensor, and return it.

    V is whole where tensor does not divide it. Without a mesh `table_VD` is returned as it is.
    """
    mesh = get_abstract_mesh()
    if mesh.empty:
        return table_VD
    # Split as RULES has it, but for fsdp.
    divides = table_VD.shape[0] % mesh.shape["tensor"] == 0
    vocabulary = "tensor" if divides else None
    return with_sharding_constraint(table_VD, P(vocabulary, None))


def constrain_params(tree: Any) -> Any:
    """Keep parameters, or their gradients, laid by RULES on the current mesh; return the tree.

    RULES match the end of a leaf's path, so `tree` may hold parameters under further keys, as a
    TrainState does. Leaves that match no rule, such as adapters, are replicated. A gradient's sum
    over rows is then a reduce-scatter. Without a mesh `tree` is returned as it is.
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

    Otherwise decoding would gather them for each token. `params`: a tree of parameters; RULES
    match the ends of their paths. Those whose `spec_of` names no axis but tensor (norms, biases,
    routers) are returned as they are, in their own type; an fsdp axis of one device counts as
    named, so matrices are cast there too. Without a mesh all of `params` is returned as it is.
    """
    mesh = get_abstract_mesh()
    if mesh.empty:
        return params

    def whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        spec = spec_of(path_name(path), leaf.shape, mesh)
        left = _over_tensor(spec)
        # There is nothing to gather: it is whole already, or cut over tensor alone.
        if left == spec:
            return leaf
        # Cast before it is gathered, so that fewer bytes are sent.
        return with_sharding_constraint(leaf.astype(dtype), left)

    return jax.tree_util.tree_map_with_path(whole, params)


def gathered_shapes(params: Any, mesh: Mesh, dtype: Any) -> Any:
    """Return what `gathered` makes of `params` on `mesh`, as a tree of ShapeDtypeStructs.

    `params`: arrays or ShapeDtypeStructs. All shardings are by RULES on `mesh`, which need not be
    current, also those of leaves that `gathered` returns as they are.
    """

    def whole(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        spec = spec_of(path_name(path), leaf.shape, mesh)
        left = _over_tensor(spec)
        # Only what is gathered is cast.
        kept = leaf.dtype if left == spec else dtype
        return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=NamedSharding(mesh, left))

    return jax.tree_util.tree_map_with_path(whole, params)


def _over_tensor(spec: P) -> P:
    """Return `spec` with tensor alone of its axes."""
    kept = [axis if axis == "tensor" else None for axis in spec]
    return P(*kept)


def flat(x: jax.Array, *axes: str) -> jax.Array:
    """Return [B, T, ...] as [B T, ...], or as it is where the current mesh cuts the tokens.

    `axes`: names of the mesh axes that may cut the tokens, such as "sequence"; one of more than
    one device counts as cutting them, whatever T is. Without a mesh `x` is flattened.

    XLA's CPU backend runs the backward pass of a matmul over one leading axis up to three times as
    fast as over two, and other backends do not mind; but XLA cannot split a sum over B T as tokens
    are cut.
    """
    mesh = get_abstract_mesh()
    if mesh.empty or along(mesh, *axes) == 1:
        _, _, *rest = x.shape
        return x.reshape(-1, *rest)
    return x
