"""A training step of the likelihood objective beside transformers' Llama with the same weights and torch's AdamW.

python -m benchmarks.train                     # prints a table, writes benchmarks/results/train-<platform>.json
"""

import dataclasses
import os
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.side_by_side import (
    LARGE,
    RESULTS,
    SMALL,
    apart,
    count,
    interleaved,
    on_cpu,
    peaks,
    plain_batch,
    random_params,
    report,
)
from model import LanguageModel, init_and_apply
from model_config import ModelConfig
from objectives.likelihood import likelihood_objective
from runtime import flags
from train_state import init_state
from train_step import OptimizerConfig, make_optimizer, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    batch: int = 16 if on_cpu() else 8
    """Sequences of a step."""
    length: int = 256 if on_cpu() else 2048
    """Tokens of a sequence."""
    rounds: int = 7
    """Timings of each row; the median is reported."""
    peer: bool = True
    """Time transformers too, in the same run."""
    model: ModelConfig = SMALL if on_cpu() else LARGE
    """Default by platform."""
    out: str = RESULTS
    """Folder of the results."""


def our_parts(config: Config) -> tuple[Any, Any, Any]:
    """The step, its state and its batch."""
    optimizer = make_optimizer(OptimizerConfig(schedule="constant", warmup=0), 1000)
    objective = partial(likelihood_objective, init_and_apply(LanguageModel(config.model))[1])
    batch = jax.device_put(plain_batch(config.model, config.batch, config.length))
    return (
        make_train_step(objective, optimizer),
        init_state(random_params(config.model), optimizer),
        batch,
    )


def our_step(config: Config) -> Any:
    """A call of one step on the same batch; returns the loss."""
    step, *state, batch = our_parts(config)

    def call() -> float:
        state[0], metrics = step(state[0], batch)
        return float(metrics["loss"])

    return call


def main(config: Config) -> None:
    """Times, prints and writes. Before that, both must have the same first losses."""
    loads, model = [os.getloadavg()[0]], config.model
    calls = {"plumb": our_step(config)}
    if config.peer:
        from benchmarks import peers

        tokens_BT = plain_batch(model, config.batch, config.length)["tokens_BT"]
        (calls["transformers"],) = apart(peers.trainer, model, tokens_BT, 1e-3)
        losses = [[call() for _ in range(4)] for call in calls.values()]
        np.testing.assert_allclose(*losses, rtol=2e-3 if on_cpu() else 2e-2)
    params = count(random_params(model))
    row = {"what": f"train step {config.batch}x{config.length}", "calls": calls, "params": params}
    row["tokens"] = config.batch * config.length
    # Matmul FLOPs of the mathematics, three times the forward's: no embedding, under the causal mask half of T^2.
    scores = model.layers * model.heads * model.head_dim * config.length
    row["flops"] = (
        6 * row["tokens"] * (params - model.vocab * model.width * (not model.tied) + scores)
    )
    interleaved([row], config.rounds)
    if peaks():
        row["mfu"] = row["flops"] / np.median(row["seconds"]["plumb"]) / peaks()[0]
    report("train", config, [row], ("torch", "transformers") if config.peer else (), loads)


if __name__ == "__main__":
    flags.run(main, Config)
