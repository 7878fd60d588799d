"""A training step of the likelihood objective beside those of PyTorch and of plain Flax.

    python -m benchmarks.train

All have the same weights, clipping and AdamW, and must have the same first four losses. Prints a
table and writes benchmarks/results/train-<platform>.json after every row.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import command
from benchmarks.absent import standing_in
from benchmarks.rows import RESULTS, Built, Row, Side, run_rows, within
from benchmarks.side_by_side import count, model_of, peaks, plain_batch, random_params

with standing_in():
    from model import LanguageModel, init_and_apply
    from model_config import ModelConfig
    from objectives.likelihood import likelihood_objective
    from train_state import init_state
    from train_step import OptimizerConfig, TrainState, make_optimizer, make_train_step

LR = 1e-3
STEPS = 4
"""First steps, whose losses are compared."""


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "small"
    """Name of a model of side_by_side.MODELS."""
    batch: int = 16
    """Sequences of a step."""
    length: int = 256
    """Tokens of a sequence."""
    peers: tuple[str, ...] = ("transformers", "compiled", "flax")
    """Names of peers: transformers (eager), compiled (by torch.compile), flax (plain)."""
    rounds: int = 7
    """Timings of each side; medians are reported."""
    seconds: float = 1.0
    """Least duration of a timing, in seconds."""
    cores: int = 0
    """Cores that each side is held to, whose own seconds are then counted; 0: all, and the seconds
    that pass. On a shared CPU take 1."""
    row_limits: tuple[float, ...] = (300.0,)
    """Most seconds of each row, start and compilation included; the last is for the rest too."""
    out: str = RESULTS
    """Folder of the results."""


def our_parts(config: Config) -> tuple[Any, TrainState, dict[str, jax.Array]]:
    """Return the jitted train step, its first state (donated to it) and its batch."""
    model = model_of(config.model)
    optimizer = make_optimizer(OptimizerConfig(lr=LR, schedule="constant", warmup=0), 1000)
    _, apply = init_and_apply(LanguageModel(model))
    step = make_train_step(partial(likelihood_objective, apply), optimizer)
    batch = jax.device_put(plain_batch(model, config.batch, config.length))
    state = init_state(random_params(model), optimizer)
    return step, state, batch


def our_step(config: Config, name: str) -> Built:
    """Return a side whose call is one step on the same batch, and its first losses."""
    step, state, batch = our_parts(config)

    def loss() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return as_side(loss, name, "jax", ("flax", "optax"))


def flax_step(config: Config, name: str) -> Built:
    """Return the side of a plain Flax decoder; as `our_step`."""
    from benchmarks import plain_flax

    model = model_of(config.model)
    tokens_BT = plain_batch(model, config.batch, config.length)["tokens_BT"]
    loss = plain_flax.trainer(model, random_params(model), tokens_BT, LR)
    return as_side(loss, name, "jax", ("flax", "optax"))


def torch_step(config: Config, name: str, compiled: bool) -> Built:
    """Return the side of transformers' Llama; as `our_step`."""
    from benchmarks import peers

    model = model_of(config.model)
    tokens_BT = plain_batch(model, config.batch, config.length)["tokens_BT"]
    loss = peers.trainer(model, tokens_BT, LR, compiled)
    return as_side(loss, name, "torch", ("transformers",))


def as_side(
    loss: Callable[[], float], name: str, library: str, packages: tuple[str, ...]
) -> Built:
    """Return a side of loss() -> the loss of one more step; its check are the first losses."""

    def call() -> None:
        loss()

    tolerance = 2e-3 if jax.default_backend() == "cpu" else 2e-2
    check = ([loss() for _ in range(STEPS)], tolerance)
    return Built({name: call}, library, packages, check)


def same_losses(checks: dict[str, tuple[list[float], float]]) -> None:
    """Raise AssertionError unless all sides have the same losses, to their tolerance."""
    if not checks:
        return
    first, tolerance = next(iter(checks.values()))
    for side, (losses, _) in checks.items():
        np.testing.assert_allclose(losses, first, rtol=tolerance, err_msg=side, verbose=False)


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


def rows(config: Config) -> list[Row]:
    """Return a row for each peer, or one without."""
    name = f"train step {config.batch}x{config.length}"
    every = {
        "transformers": Side(torch_step, (config, name, False)),
        "compiled": Side(torch_step, (config, name, True)),
        "flax": Side(flax_step, (config, name)),
    }
    model = model_of(config.model)
    params = count(model)
    facts = {"params": params, "flops": flops(model, params, config.batch, config.length)}
    sides: list[dict[str, Side]] = [{peer: every[peer]} for peer in config.peers] or [{}]
    found = []
    for peer in sides:
        found.append(
            Row(
                what=" and ".join([name, *peer]),
                sides={"plumb": Side(our_step, (config, name))} | peer,
                tokens={name: config.batch * config.length},
                facts=facts,
                agree=same_losses,
            )
        )
    return within(found, config.row_limits)


def add_mfu(result: dict[str, Any]) -> None:
    """Add the share of the chip's peak FLOP/s, where a table has it, to each row's line."""
    peak = peaks(result["device"])
    for row in result["rows"]:
        for line in row.get("lines", []):
            if peak:
                line["mfu"] = row["flops"] / (line["ms"] / 1e3) / peak[0]


def main(config: Config) -> dict[str, Any]:
    """Time the steps, print the table, write the JSON; return what is written."""
    return run_rows("train", config, rows(config), add_mfu)


if __name__ == "__main__":
    command.run(main, Config)
