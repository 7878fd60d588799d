"""The least that trains on several hosts: what tests/test_hosts.py runs where a whole script would take too long.

Each host's batches depend on its own position in its data, so that a position lost or mixed up changes the result.
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


def main(config: Config) -> None:
    mesh = make_mesh(MeshConfig())
    split = NamedSharding(mesh, P("data"))
    like = {"params": {"w": jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=split)}}
    step = jax.jit(
        lambda w, x_B: (w * 0.9 + jnp.outer(x_B, jnp.arange(1000.0)).mean(0), (w**2).mean())
    )
    with Checkpoints(config.run, config, script="host_loop", keep=9) as checkpoints:
        fresh = {"params": {"w": jax.jit(lambda: jnp.zeros(1000), out_shardings=split)()}}
        start, state, position = checkpoints.restore(like) or (0, fresh, jax.process_index())
        w = state["params"]["w"]
        for number in range(start + 1, config.steps + 1):
            rng = np.random.default_rng(position)
            position += int(rng.integers(1, 100))
            w, loss = step(w, to_mesh({"x_B": rng.random(4, np.float32)}, mesh)["x_B"])
            float(loss)
            finished_step()
            if checkpoints.due(number, 2, config.steps):
                checkpoints.save(number, {"params": {"w": w}}, position)
            if checkpoints.stopping:
                break
