"""Train many small policies at a time: members of one jitted step, each with a state of its own.

    params = train(config, params, pools, orders)           # config: of train_dpo.py

`jax.vmap` of the step that train_dpo.py takes: a member's update is the one it would do alone. The
learning rates of a run are data, a table in the optimiser's state, so that runs of all lengths
share one program.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import train_dpo
from data.batches import Batch
from model import LanguageModel, Params, init_and_apply
from objectives import direct
from train_state import init_state
from train_step import (
    Metrics,
    OptimizerConfig,
    TrainState,
    make_optimizer,
    make_schedule,
    make_train_step,
)

Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


# ---- Learning rates as data ----


class Rates(NamedTuple):
    """State of `scale_by_rates`."""

    taken: jax.Array
    """Updates taken, int32."""
    rates_S: jax.Array
    """Learning rate of each update, float32."""


def scale_by_rates(rates_S: np.ndarray) -> optax.GradientTransformation:
    """Multiply update number n, from 0, by `rates_S[n]`, which is kept in the state."""

    def init(params: Params) -> Rates:
        return Rates(jnp.int32(0), jnp.asarray(rates_S, jnp.float32))

    def update(updates: Params, state: Rates, params: Params | None = None):
        rate = state.rates_S[state.taken]
        scaled = jax.tree.map(lambda x: rate * x, updates)
        return scaled, state._replace(taken=state.taken + 1)

    return optax.GradientTransformation(init, update)


def make_table_optimizer(
    config: OptimizerConfig, rates_S: np.ndarray
) -> optax.GradientTransformation:
    """Make the optimiser of `config`, AdamW, with the learning rates of a table, [S].

    An update of AdamW, its decay too, is a multiple of the learning rate: here of 1.
    """
    assert config.name == "adamw"
    unit = dataclasses.replace(config, lr=1.0, schedule="constant", warmup=0)
    return optax.chain(make_optimizer(unit, 1), scale_by_rates(rates_S))


def rates_of(config: train_dpo.Config, longest: int) -> np.ndarray:
    """Return the learning rates of a run's steps, padded with 0 to `longest`, [S]."""
    schedule = make_schedule(config.optimizer, config.steps)
    rates = [float(schedule(count)) for count in range(config.steps)]
    return np.pad(np.array(rates, np.float32), (0, longest - config.steps))


# ---- The step ----


def make_step(config: train_dpo.Config) -> Step:
    """Compile step(states, batch) -> (states, metrics) for members side by side.

    `config`: loss and settings of train_dpo.py; steps and schedule are the states'. `states`: of
    `start`, donated. `batch`: arrays [M, B, ...] of train_dpo.py's candidates with `reference_BC`;
    kto's last candidate serves the estimate of the KL, as there. Metrics are [M].
    """
    return _make_step(without_length(config))


def without_length(config: train_dpo.Config) -> train_dpo.Config:
    """Return `config` without what differs between runs of one program."""
    optimizer = dataclasses.replace(config.optimizer, lr=1.0, warmup=0)
    return dataclasses.replace(config, steps=1, optimizer=optimizer)


@functools.cache
def _make_step(config: train_dpo.Config) -> Step:
    _, apply = init_and_apply(LanguageModel(config.model))
    objective = train_dpo.make_objective(config, apply).objective
    optimizer = make_table_optimizer(config.optimizer, np.zeros(1))
    update = make_train_step(objective, optimizer, max_norm=config.optimizer.clip)

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        if config.loss == "kto":
            batch = direct.kto_kl_estimate(apply, state.params, batch)
        return update(state, batch)

    return jax.jit(jax.vmap(step), donate_argnums=0)


def start(config: train_dpo.Config, params: Params, members: int, longest: int) -> TrainState:
    """Return the states of `members` policies that start from `params`; each array is [M, ...].

    `longest`: steps of the longest run that shares the program.
    """
    optimizer = make_table_optimizer(config.optimizer, rates_of(config, longest))
    state = init_state(params, optimizer)

    def repeated(x: Any) -> jax.Array:
        return jnp.repeat(jnp.asarray(x)[None], members, axis=0)

    return jax.tree.map(repeated, state)


# ---- Their batches ----


def order_of(chosen: np.ndarray, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Return the rows of each step, [S, B]: the chosen ones shuffled, epoch after epoch.

    Each epoch is an order of its own; the last one may be cut.
    """
    rng = np.random.default_rng(seed)
    epochs = -(-batch_size * steps // len(chosen))
    rows = np.concatenate([rng.permutation(chosen) for _ in range(epochs)])
    return rows[: batch_size * steps].reshape(steps, batch_size)


def stacked_batches(pools: Sequence[Batch], orders: Sequence[np.ndarray]) -> Iterator[Batch]:
    """Yield the batch of each step, [M, B, ...]: of every member its own rows of its own pool."""
    for rows_of_members in zip(*orders, strict=True):
        batch = {}
        for name in pools[0]:
            parts = [pool[name][rows] for pool, rows in zip(pools, rows_of_members, strict=True)]
            batch[name] = np.stack(parts)
        yield batch


def train(
    config: train_dpo.Config,
    params: Params,
    pools: Sequence[Batch],
    orders: Sequence[np.ndarray],
    longest: int,
) -> Params:
    """Train a policy from `params` on each pool's rows, in its order; return them, [M, ...].

    `orders`: [S, B] each, of as many steps as `config` has; `longest` as of `start`.
    """
    states = start(config, params, len(pools), longest)
    step = make_step(config)
    for batch in stacked_batches(pools, orders):
        states, _ = step(states, batch)
    return states.params
