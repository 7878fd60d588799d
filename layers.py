"""Pipeline parallelism over the mesh's stage axis: GPipe (Huang et al. 2019). Each stage holds a part of the layers.

In tick t stage s works on micro-batch t - s and hands it on, so m micro-batches are through p stages after m + p - 1
ticks, of which each stage idles p - 1. The backward pass is the derivative of this one: the same ticks in reverse.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sharding import along, constrain_residual, in_microbatches, platform


def pipelined(
    run: Callable[..., jax.Array], weights: Any, x_BTD: jax.Array, rows: Any, microbatches: int
) -> jax.Array:
    """`run(weights, x_BTD, *rows)` of all layers, [B, T, D].

    `run` takes any unbroken part of the layers, the first axis of `weights`, which is cut over stage; `rows`: trees of
    [B, ...] arrays that every layer reads. Other axes of the mesh are XLA's and `run`'s as ever.
    """
    stages, parts = along(jax.sharding.get_abstract_mesh(), "stage"), microbatches
    x_PBTD, rows_P = jax.tree.map(lambda x: in_microbatches(x, parts), (x_BTD, rows))

    # XLA's CPU backend dies of sums over stage in bfloat16, here and in the derivative.
    summed = jnp.float32 if platform() == "cpu" else x_BTD.dtype

    def stage(weights, x_PBTD, rows_P):
        here, x_PBTD = jax.lax.axis_index("stage"), x_PBTD.astype(x_BTD.dtype)

        def tick(x_BTD, t):
            i = jnp.clip(
                t - here, 0, parts - 1
            )  # idle stages compute too, on what is there: nobody takes it
            x_BTD = constrain_residual(jnp.where(here == 0, x_PBTD[i], x_BTD))
            x_BTD = run(weights, x_BTD, *jax.tree.map(lambda x: x[i], rows_P))
            return jax.lax.ppermute(x_BTD, "stage", [(s, s + 1) for s in range(stages - 1)]), x_BTD

        _, outs = jax.lax.scan(tick, jnp.zeros_like(x_PBTD[0]), jnp.arange(parts + stages - 1))
        # The last stage's, for all of them.
        return jax.lax.psum(
            jnp.where(here == stages - 1, outs[stages - 1 :], 0).astype(summed), "stage"
        )

    specs = {"in_specs": (P("stage"), P(), P()), "out_specs": P(), "axis_names": {"stage"}}
    x_PBTD = jax.shard_map(stage, **specs, check_vma=False)(weights, x_PBTD.astype(summed), rows_P)
    return constrain_residual(x_PBTD.swapaxes(0, 1).reshape(x_BTD.shape).astype(x_BTD.dtype))
