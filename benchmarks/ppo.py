"""A PPO iteration (rollout, advantages, epochs of updates of policy and critic) beside TRL's.

    python -m benchmarks.ppo

Prints a table and writes benchmarks/results/ppo-<platform>.json after every row.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command
from benchmarks.absent import standing_in
from benchmarks.rows import RESULTS, Built, Row, Side, run_rows, within
from benchmarks.side_by_side import model_of, plain_batch, random_params

with standing_in():
    import train_ppo
    from model import LanguageModel, ScalarModel, init_and_apply
    from rewards.scorer import make_model_scorer
    from rollout import Rollout, make_rollout, shuffled
    from sampling import SamplingConfig
    from train_state import init_state

NEVER = -1  # no token is this: responses have full length, as the peer's
EOS = 2
"""The token that ends a response where lengths differ."""
PARTS = ("  of this, the rollout", "  the advantages", "  each update of both")


@dataclasses.dataclass(frozen=True)
class Config:
    rows: tuple[str, ...] = ("full", "geometric")
    """Kinds to time: full (responses as long as they may be), geometric (lengths that differ)."""
    model: str = "small"
    """Shape of policy, reference, reward model and value model: a name of side_by_side.MODELS."""
    geometric_model: str = "small-64"
    """Theirs in the row whose lengths differ, whose mean is the size of the vocabulary."""
    batch: int = 16
    """Rollouts of an iteration."""
    prompt: int = 64
    """Tokens of a prompt."""
    new: int = 64
    """Tokens of a response."""
    longest: int = 256
    """Most tokens of a response in the row whose lengths differ."""
    minibatches: int = 1
    """Updates an epoch."""
    epochs: int = 4
    """Passes over an iteration's rollouts."""
    peers: tuple[str, ...] = ("trl",)
    """trl, or none."""
    rounds: int = 5
    """Timings of each side; medians are reported."""
    seconds: float = 1.0
    """Least duration of a timing, in seconds."""
    cores: int = 0
    """Cores that each side is held to, whose own seconds are then counted; 0: all, and the seconds
    that pass. On a shared CPU take 1."""
    row_limits: tuple[float, ...] = (420.0,)
    """Most seconds of each row, start and compilation included; the last is for the rest too."""
    out: str = RESULTS
    """Folder of the results."""


@dataclasses.dataclass(frozen=True)
class Iteration:
    """A row's iteration, as both sides are told of it."""

    what: str
    model: str
    batch: int
    prompt: int
    new: int
    eos: int
    """Token that ends a response; NEVER: none."""
    minibatches: int
    epochs: int
    temperature: float = 1.0


def our_iteration(asked: Iteration) -> Built:
    """Return a side of one iteration, as in train_ppo.py's loop, and of each of its parts.

    Each goes on from the last and waits for the device.
    """
    model = model_of(asked.model)
    ppo = train_ppo.Config(
        batch_size=asked.batch,
        max_prompt=asked.prompt,
        max_new_tokens=asked.new,
        minibatches=asked.minibatches,
        epochs=asked.epochs,
        temperature=asked.temperature,
        model=model,
        missing_eos="none",
        steps=10_000,
    )
    (reward_name,) = ppo.reward

    # Models of random weights, and the script's own functions.
    _, apply = init_and_apply(LanguageModel(model))
    scalar_init, scalar_apply = init_and_apply(ScalarModel(model))
    reference = random_params(model)
    reward = jax.jit(scalar_init)(jax.random.key(1))
    sampling = SamplingConfig(asked.temperature, max_new_tokens=asked.new)
    sample_rollout = make_rollout(apply, model, sampling, eos=asked.eos, pad=0)
    score = make_model_scorer(model)
    compute_advantages = train_ppo.make_advantages(ppo, apply, scalar_apply, eos=asked.eos)
    policy_update = train_ppo.make_policy_update(ppo, apply)
    critic_update = train_ppo.make_critic_update(ppo, scalar_apply)

    # The steps donate their states: reference and reward stay.
    states = {
        "policy": init_state(jax.tree.map(jnp.copy, reference), policy_update.optimizer),
        "critic": init_state(jax.tree.map(jnp.copy, reward), critic_update.optimizer),
    }
    prompts = jax.device_put(plain_batch(model, asked.batch, asked.prompt))
    keys = iter(jax.random.split(jax.random.key(2), 10_000))

    def sample() -> Rollout:
        return sample_rollout(states["policy"].params, prompts, next(keys))

    def advantages(rollout: Rollout) -> tuple[train_ppo.Experience, dict[str, jax.Array]]:
        score_B, scalars_BR = score(reward, rollout)
        models = train_ppo.Models(
            policy=states["policy"].params,
            reference=reference,
            critic=states["critic"].params,
        )
        scores, scalars = {reward_name: score_B}, {reward_name: scalars_BR}
        return compute_advantages(models, rollout, scores, scalars, jnp.float32(ppo.kl_coef))

    def update(minibatch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        states["critic"], _ = critic_update.step(states["critic"], minibatch, None)
        states["policy"], metrics = policy_update.step(states["policy"], minibatch, None)
        return metrics

    def iteration() -> None:
        experience, metrics = advantages(sample())
        for _ in range(asked.epochs):
            for minibatch in shuffled(experience, next(keys), asked.minibatches):
                last = update(minibatch)
        assert np.isfinite(jax.device_get({**metrics, **last})["loss"])

    rollout = sample()
    experience, _ = advantages(rollout)
    first, *_ = shuffled(experience, next(keys), asked.minibatches)

    def only_sample() -> None:
        jax.block_until_ready(sample())

    def only_advantages() -> None:
        jax.block_until_ready(advantages(rollout))

    def only_update() -> None:
        jax.block_until_ready((update(first), states))

    calls = [iteration, only_sample, only_advantages, only_update]
    mean_length = float(rollout["mask_BR"].sum()) / asked.batch
    named = dict(zip((asked.what, *PARTS), calls, strict=True))
    return Built(named, "jax", facts={"mean_length": mean_length})


def trl_iteration(asked: Iteration) -> Built:
    """Return the side of TRL's PPOTrainer."""
    from benchmarks import peers

    model = model_of(asked.model)
    prompts_PT = plain_batch(model, 4 * asked.batch, asked.prompt)["tokens_BT"]
    call = peers.ppo(prompts_PT, model, asked)
    return Built({asked.what: call}, "torch", ("transformers", "trl"))


def row_of(config: Config, name: str) -> Row:
    """Return the row `full` or `geometric`."""
    model = config.model
    new = config.new
    eos = NEVER
    words = ""
    if name == "geometric":
        model = config.geometric_model
        new = config.longest
        eos = EOS
        words = f", {model_of(model).vocab} on average"
    what = f"PPO {config.batch} x {config.prompt}+{new}{words}"
    asked = Iteration(
        what=what,
        model=model,
        batch=config.batch,
        prompt=config.prompt,
        new=new,
        eos=eos,
        minibatches=config.minibatches,
        epochs=config.epochs,
    )
    sides = {"plumb": Side(our_iteration, (asked,))}
    if "trl" in config.peers:
        sides["trl"] = Side(trl_iteration, (asked,))

    # Tokens that are sampled, and that are read.
    sampled = config.batch * new
    read = config.batch * (config.prompt + new)
    tokens = (sampled, sampled, read, read // config.minibatches)
    by_call = dict(zip((what, *PARTS), tokens, strict=True))
    return Row(what, sides, by_call, {"epochs": config.epochs})


def rows(config: Config) -> list[Row]:
    """Return the rows that are asked for."""
    asked = [row_of(config, name) for name in config.rows]
    return within(asked, config.row_limits)


def main(config: Config) -> dict[str, Any]:
    """Time an iteration and its parts, print the table, write it; return what is written."""
    return run_rows("ppo", config, rows(config))


if __name__ == "__main__":
    command.run(main, Config)
