"""A training step of the likelihood objective beside transformers' Llama and torch's AdamW.

    python -m benchmarks.train

Both have the same weights. Prints a table and writes benchmarks/results/train-<platform>.json.
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
    Call,
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
from train_step import OptimizerConfig, TrainState, make_optimizer, make_train_step


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


def our_parts(config: Config) -> tuple[Any, TrainState, dict[str, jax.Array]]:
    """Return the jitted train step, its first state (donated to it) and its batch."""
    optimizer = make_optimizer(OptimizerConfig(schedule="constant", warmup=0), 1000)
    _, apply = init_and_apply(LanguageModel(config.model))
    step = make_train_step(partial(likelihood_objective, apply), optimizer)
    batch = jax.device_put(plain_batch(config.model, config.batch, config.length))
    state = init_state(random_params(config.model), optimizer)
    return step, state, batch


def our_step(config: Config) -> Call:
    """Return a call of one step on the same batch, which returns the loss."""
    step, state, batch = our_parts(config)

    def call() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return call


def flops(model: ModelConfig, params: int, batch: int, length: int) -> int:
    """Return the matmul FLOPs of a step that the mathematics needs: three times the forward's.

    An untied embedding is looked up, not multiplied; under the causal mask half of T^2 scores are
    needed.
    """
    multiplied = params
    if not model.tied:
        multiplied -= model.vocab * model.width
    scores = model.layers * model.heads * model.head_dim * length
    return 6 * batch * length * (multiplied + scores)


def main(config: Config) -> None:
    """Time the steps, print the table, write the JSON.

    Before that, both must have the same first four losses.
    """
    load = os.getloadavg()[0]
    calls = {"plumb": our_step(config)}
    if config.peer:
        from benchmarks import peers

        tokens_BT = plain_batch(config.model, config.batch, config.length)["tokens_BT"]
        (calls["transformers"],) = apart(peers.trainer, config.model, tokens_BT, 1e-3)
        losses = []
        for call in calls.values():
            losses.append([call() for _ in range(4)])
        np.testing.assert_allclose(*losses, rtol=2e-3 if on_cpu() else 2e-2)

    params = count(random_params(config.model))
    row = {
        "what": f"train step {config.batch}x{config.length}",
        "calls": calls,
        "params": params,
        "tokens": config.batch * config.length,
        "flops": flops(config.model, params, config.batch, config.length),
    }
    interleaved([row], config.rounds)
    if peaks():
        flops_per_second, _ = peaks()
        seconds = np.median(row["seconds"]["plumb"])
        row["mfu"] = row["flops"] / seconds / flops_per_second
    packages = ("torch", "transformers") if config.peer else ()
    report("train", config, [row], packages, [load])


if __name__ == "__main__":
    flags.run(main, Config)
