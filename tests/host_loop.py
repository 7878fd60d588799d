"""The least that trains on several hosts: for tests/test_hosts.py, where a script takes too long.

Each host's batches depend on its own position in its data, so that a position lost or mixed up
changes the result.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from runtime.checkpoint import Checkpoints
from runtime.hosts import HostsConfig, finished_step
from sharding import MeshConfig, make_mesh, to_mesh


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/loop"
    steps: int = 8
    hosts: HostsConfig = HostsConfig()


@jax.jit
def train_step(w: jax.Array, x_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the next w [1000], which depends on the batch, and a loss."""
    moved = jnp.outer(x_B, jnp.arange(1000.0)).mean(0)
    return w * 0.9 + moved, (w**2).mean()


def main(config: Config) -> None:
    """Train, save every second step, and stop after a signal."""
    mesh = make_mesh(MeshConfig())
    split = NamedSharding(mesh, P("data"))
    like = {"params": {"w": jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=split)}}
    with Checkpoints(config.run, config, script="host_loop", keep=9) as checkpoints:
        fresh = {"params": {"w": jax.jit(lambda: jnp.zeros(1000), out_shardings=split)()}}
        start, state, position = checkpoints.restore(like) or (0, fresh, jax.process_index())
        w = state["params"]["w"]
        for number in range(start + 1, config.steps + 1):
            # A batch of this host's, by its position in its data.
            rng = np.random.default_rng(position)
            position += int(rng.integers(1, 100))
            batch = to_mesh({"x_B": rng.random(4, np.float32)}, mesh)
            w, loss = train_step(w, batch["x_B"])
            # Waits for the device.
            float(loss)
            finished_step()
            if checkpoints.due(number, 2, config.steps):
                checkpoints.save(number, {"params": {"w": w}}, position)
            if checkpoints.stopping:
                break
