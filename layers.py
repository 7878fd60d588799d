"""How a decoder's layers are run: under one scan, as a pipeline over devices, or one by one.

`run_layers` chooses. What a layer is, is model.py's; here it is a Flax module whose call is

    (x_BTD, cache, layer), *rows, *own  ->  (x_BTD, cache, layer + 1), auxiliary loss or None

with `rows` what every layer reads of a batch's rows (segment ids, RoPE's cosines and sines), and
`own` what each has for itself beside its parameters, where layers differ (a window or none).
Parameters of all layers are stacked: their first axis is the layer. Suffixes are those of the
legend in model.py; here M is micro-batches.

The pipeline is GPipe (Huang et al. 2019). In tick t stage s works on micro-batch t - s and hands
it on, so m micro-batches are through p stages after m + p - 1 ticks, of which each stage idles
p - 1. The backward pass is the derivative of this one: the same ticks in reverse.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from runtime.errors import UserError
from sharding import along, constrain_residual, in_microbatches, path_name, summed_type

Remat = Literal["none", "dots", "full"]
"""Outputs that the backward pass recomputes: none, all but those of matmuls, or everything."""
Cache = Any
"""A model.KVCache, or None."""
Params = dict[str, Any]
"""See model.Params."""


def run_layers(
    decoder: nn.Module,
    block_class: type[nn.Module],
    ring: int,
    x_BTD: jax.Array,
    cache: Cache,
    rows: tuple[Any, Any],
    own: tuple[Any, ...] = (),
) -> tuple[jax.Array, Cache, jax.Array | None]:
    """Run all layers; return the hidden states [B, T, D], the cache, and the sum of their losses.

    Call it inside `decoder`, also to initialise: its parameters `layers` are the layers', and its
    `config` is read. `block_class(config, ring)` is one layer, called and returning as this
    module's docstring says; `ring`: devices over which the tokens, those of `x_BTD` too, are
    striped (kernels/ring.py), 1 without. `rows`: the pair of trees of [B, ...] arrays that each
    layer reads, in model.py (segment ids, turns). `own`: trees of arrays [L, ...], of which each
    layer gets its own part. `cache`: None, which comes back, or one that comes back with these
    tokens' keys and values, its `length` as it was: stacked, or unstacked on parameters of
    `unstack_params`. Without a cache a mesh with a stage axis makes it a pipeline of
    `decoder.microbatches`, which raises UserError for layers with losses. The sum is of the
    auxiliary losses, a scalar; None where the layers have none, and with an unstacked cache.
    """
    # Decoding, where the caller has unstacked the layers.
    if cache is not None and isinstance(cache.k_LBKSH, tuple):
        x_BTD, cache = _one_by_one(decoder, block_class, x_BTD, cache, rows, own)
        return x_BTD, cache, None

    # Training on a mesh with stages. Parameters are initialised under the scan.
    stages = along(jax.sharding.get_abstract_mesh(), "stage")
    if stages > 1 and cache is None and not decoder.is_initializing():
        return _over_stages(decoder, block_class, ring, x_BTD, rows, own, stages), None, None

    # All else. The cache rides in the carry: as xs and ys the scan would copy all of it.
    config = decoder.config
    layers_class = _scan(block_class, config.remat, config.layers, len(own))
    layers = layers_class(config, ring, name="layers")
    carry = (x_BTD, cache, jnp.int32(0))
    (x_BTD, cache, _), losses_L = layers(carry, *rows, *own)
    loss = None if losses_L is None else losses_L.sum()
    return x_BTD, cache, loss


# --- one scan


def _scan(
    block_class: type[nn.Module], remat: Remat, layers: int, own: int
) -> Callable[..., nn.Module]:
    """Return the class of `layers` blocks under one scan, which compiles one of them.

    `own`: how many arguments each layer has for itself.
    """
    # Parameters have the layer as their first axis; what the rows have is the same for all.
    return nn.scan(
        _with_remat(block_class, remat),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, *(0,) * own),
        length=layers,
    )


def _with_remat(block_class: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """Return the class of blocks whose backward pass computes again what `remat` says."""
    # The scan's loop already keeps XLA from merging the two passes: no barrier is needed.
    if remat == "none":
        return block_class
    if remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return nn.remat(block_class, policy=policy, prevent_cse=False)
    return nn.remat(block_class, prevent_cse=False)


# --- one by one, for decoding


@flax.struct.dataclass
class Int8Weight:
    """A weight of one layer that stands for `values` times `scale`."""

    values: jax.Array
    """int8, of the weight's shape, from -127 to 127."""
    scale: jax.Array
    """Of the type that is computed in, with 1 along SUMMED_AXES: one number for each output."""


SUMMED_AXES = {
    "q": (0,),
    "k": (0,),
    "v": (0,),
    "o": (0, 1),
    "gate": (0,),
    "up": (0,),
    "down": (0,),
}
"""The axes of a layer's weights over which a product with it sums: an output's are the others."""


def in_int8(weight: jax.Array, axes: tuple[int, ...]) -> Int8Weight:
    """Return `weight` rounded to 127 steps each way of the largest of each output.

    `axes`: over which products sum. An error is half a step at most: a 254th of that largest,
    besides the rounding of the scale's type.
    """
    # The scale is rounded first, so that values are of what it is then.
    largest = jnp.max(jnp.abs(weight), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1).astype(weight.dtype)
    steps = jnp.round(weight.astype(jnp.float32) / scale.astype(jnp.float32))
    return Int8Weight(jnp.clip(steps, -127, 127).astype(jnp.int8), scale)


def whole_weight(weight: jax.Array | Int8Weight) -> jax.Array:
    """Return the weight that an Int8Weight stands for, in its scale's type; others as they are."""
    if not isinstance(weight, Int8Weight):
        return weight
    return weight.values.astype(weight.scale.dtype) * weight.scale


def unstack_params(params: Params, dtype: jnp.dtype, *, int8: bool = False) -> Params:
    """Return `params` with a tuple of L arrays in place of each stack [L, ...] of the layers.

    For a loop over tokens, where slicing a stack would copy it at every token; an apply takes them
    only with a cache of `unstack_cache`. All weights, the embedding and adapters among them, are
    cast once to `dtype`, in which they are multiplied; norms, biases and the routers of experts,
    which are computed with in float32, keep their type. With `int8` the layers' weights that are
    named in SUMMED_AXES, all but those of experts, are Int8Weights. `params`: whole parameters of
    a LanguageModel (model.Params), perhaps with lora.with_adapters'.
    """

    def leaf(path: tuple[Any, ...], weight: jax.Array) -> Any:
        name = path_name(path)
        if not name.endswith(("norm", "bias", "router")):
            weight = weight.astype(dtype)
        if "/layers/" not in name:
            return weight
        own_name = name.rsplit("/", 1)[-1]
        if int8 and own_name in SUMMED_AXES:
            return tuple(in_int8(own, SUMMED_AXES[own_name]) for own in weight)
        return tuple(weight)

    return jax.tree_util.tree_map_with_path(leaf, params)


def unstack_cache(cache: Cache) -> Cache:
    """Return a KVCache like `cache` whose `k_LBKSH` and `v_LBKSH` are tuples of L [B, K, S, H].

    `run_layers` then runs the layers one by one, on parameters of `unstack_params`. `cache`: a
    stacked KVCache, not None.
    """
    keys = tuple(cache.k_LBKSH)
    values = tuple(cache.v_LBKSH)
    return dataclasses.replace(cache, k_LBKSH=keys, v_LBKSH=values)


def _one_by_one(
    decoder: nn.Module,
    block_class: type[nn.Module],
    x_BTD: jax.Array,
    cache: Cache,
    rows: tuple[Any, Any],
    own: tuple[Any, ...],
) -> tuple[jax.Array, Cache]:
    """Run unstacked layers on an unstacked cache."""
    # The leaves of the weights are tuples, which jax.tree would take for more branches.
    weights: Params = decoder.get_variable("params", "layers")
    block = block_class(decoder.config, parent=None)

    def is_stack(leaf: Any) -> bool:
        return isinstance(leaf, tuple)

    keys = []
    values = []
    for i in range(decoder.config.layers):
        # Of int8 only what is read for a product becomes a whole weight, and as a part of it.
        own_weights = jax.tree.map(
            lambda stack, i=i: whole_weight(stack[i]), weights, is_leaf=is_stack
        )
        # A cache of this layer alone, in which its number is 0.
        own_cache = dataclasses.replace(
            cache, k_LBKSH=cache.k_LBKSH[i][None], v_LBKSH=cache.v_LBKSH[i][None]
        )
        carry = (x_BTD, own_cache, 0)
        more = jax.tree.map(lambda x, i=i: x[i], own)
        (x_BTD, own_cache, _), _ = block.apply({"params": own_weights}, carry, *rows, *more)
        # Back among those of the other layers.
        keys.append(own_cache.k_LBKSH[0])
        values.append(own_cache.v_LBKSH[0])
    return x_BTD, dataclasses.replace(cache, k_LBKSH=tuple(keys), v_LBKSH=tuple(values))


# --- a pipeline over the mesh's stage axis


def _over_stages(
    decoder: nn.Module,
    block_class: type[nn.Module],
    ring: int,
    x_BTD: jax.Array,
    rows: tuple[Any, Any],
    own: tuple[Any, ...],
    stages: int,
) -> jax.Array:
    """Run the layers as a pipeline, an equal part of them on each of `stages` devices."""
    # A stage's part of the layers, as one scan.
    config = decoder.config
    part_class = _scan(block_class, config.remat, config.layers // stages, len(own))
    part = part_class(config, ring, parent=None)

    def run(layers, x_BTD, *rows):
        weights, own = layers
        (x_BTD, _, _), losses_L = part.apply({"params": weights}, (x_BTD, None, 0), *rows, *own)
        if losses_L is not None:
            raise UserError(
                f"--mesh.stage={stages}: a pipeline does not carry the experts' balancing loss; "
                "use --model.router_loss_coef=0, or no stages"
            )
        return x_BTD

    weights: Params = decoder.get_variable("params", "layers")
    return pipelined(run, (weights, own), x_BTD, rows, decoder.microbatches)


def pipelined(
    run: Callable[..., jax.Array],
    weights: Any,
    x_BTD: jax.Array,
    rows: tuple[Any, Any],
    microbatches: int,
) -> jax.Array:
    """Return `run(weights, x_BTD, *rows)` of all layers, [B, T, D], computed stage after stage.

    Call it under jit, with a mesh set (jax.set_mesh) that has an axis "stage"; it may be
    differentiated. `weights`: a tree whose leaves' first axis, the layers, is cut over stage,
    which must divide it. run(weights, x_BTD, *rows) must take any unbroken part of the layers and
    any rows, and return hidden states of x's shape and type. `rows`: a pair of trees of [B, ...]
    arrays that every layer reads. `microbatches`, a Python int, 1 or above, must divide B. Other
    axes of the mesh are XLA's and `run`'s as ever.
    """
    # The micro-batches, on every stage.
    stages = along(jax.sharding.get_abstract_mesh(), "stage")
    x_MBTD = in_microbatches(x_BTD, microbatches)
    rows_M = jax.tree.map(lambda x: in_microbatches(x, microbatches), rows)

    # The results, and in the derivative the micro-batches, are summed over stage.
    summed = summed_type(x_BTD.dtype)

    def stage(weights, x_MBTD, rows_M):
        """Run this stage's part of the layers on every micro-batch."""
        here = jax.lax.axis_index("stage")
        x_MBTD = x_MBTD.astype(x_BTD.dtype)

        def tick(x_BTD, t):
            # Idle stages compute too, on whatever is there: nothing reads it.
            i = jnp.clip(t - here, 0, microbatches - 1)
            # The first stage takes a new micro-batch, the others what came from the one before.
            x_BTD = jnp.where(here == 0, x_MBTD[i], x_BTD)
            x_BTD = constrain_residual(x_BTD)
            rows_B = jax.tree.map(lambda x: x[i], rows_M)
            x_BTD = run(weights, x_BTD, *rows_B)
            to_next = [(s, s + 1) for s in range(stages - 1)]
            return jax.lax.ppermute(x_BTD, "stage", to_next), x_BTD

        ticks = jnp.arange(microbatches + stages - 1)
        _, outs = jax.lax.scan(tick, jnp.zeros_like(x_MBTD[0]), ticks)
        # The last stage has the results; the sum gives them to all.
        results = jnp.where(here == stages - 1, outs[stages - 1 :], 0)
        return jax.lax.psum(results.astype(summed), "stage")

    # Each stage has its layers; the micro-batches are whole on all.
    over_stages = jax.shard_map(
        stage,
        in_specs=(P("stage"), P(), P()),
        out_specs=P(),
        axis_names={"stage"},
        check_vma=False,
    )
    # One batch again.
    x_MBTD = over_stages(weights, x_MBTD.astype(summed), rows_M)
    x_BTD = x_MBTD.swapaxes(0, 1).reshape(x_BTD.shape).astype(x_BTD.dtype)
    return constrain_residual(x_BTD)
