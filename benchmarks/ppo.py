"""A PPO iteration (rollout, advantages, epochs of updates of policy and critic) beside TRL's.

    python -m benchmarks.ppo

Prints a table and writes benchmarks/results/ppo-<platform>.json.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import train_ppo
from benchmarks.side_by_side import (
    RESULTS,
    SMALL,
    apart,
    interleaved,
    on_cpu,
    plain_batch,
    random_params,
    report,
)
from model import LanguageModel, ScalarModel, init_and_apply
from model_config import ModelConfig
from rewards.scorer import make_model_scorer
from rollout import Rollout, make_rollout, shuffled
from runtime import flags
from sampling import SamplingConfig
from train_state import init_state

NEVER = -1  # no token is this: responses have full length, as the peer's


@dataclasses.dataclass(frozen=True)
class Config:
    batch_size: int = 16 if on_cpu() else 64
    """Rollouts of an iteration."""
    max_prompt: int = 64
    """Tokens of a prompt."""
    max_new_tokens: int = 64 if on_cpu() else 128
    """Tokens of a response."""
    minibatches: int = 1
    """Updates an epoch."""
    epochs: int = 4
    """Passes over an iteration's rollouts."""
    temperature: float = 1.0
    """Temperature of sampling."""
    rounds: int = 5
    """Timings of each row; the median is reported."""
    peer: bool = True
    """Time TRL too, in the same run."""
    model: ModelConfig = (
        SMALL
        if on_cpu()
        else ModelConfig("135m", 32000, 768, 2048, 12, 12, 12, 64, 1024, tied=False)
    )
    """Shape of policy, reference, reward model and value model; default by platform."""
    out: str = RESULTS
    """Folder of the results."""


def our_calls(config: Config) -> dict[str, Callable[[], Any]]:
    """Make a call of one iteration, as in train_ppo.py's loop, and one of each of its parts.

    Keys: iteration, rollout, advantages, update. Each goes on from the last and waits for the
    device.
    """
    shared = {
        name: getattr(config, name)
        for name in (
            "batch_size",
            "max_prompt",
            "max_new_tokens",
            "minibatches",
            "epochs",
            "temperature",
            "model",
        )
    }
    ppo = train_ppo.Config(**shared, missing_eos="none", steps=10_000)
    model = config.model
    (reward_name,) = ppo.reward

    # Models of random weights, and the script's own functions.
    _, apply = init_and_apply(LanguageModel(model))
    scalar_init, scalar_apply = init_and_apply(ScalarModel(model))
    reference = random_params(model)
    reward = jax.jit(scalar_init)(jax.random.key(1))
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    sample_rollout = make_rollout(apply, model, sampling, eos=NEVER, pad=0)
    score = make_model_scorer(model)
    compute_advantages = train_ppo.make_advantages(ppo, apply, scalar_apply, eos=NEVER)
    policy_update = train_ppo.make_policy_update(ppo, apply)
    critic_update = train_ppo.make_critic_update(ppo, scalar_apply)

    # The steps donate their states: reference and reward stay.
    states = {
        "policy": init_state(jax.tree.map(jnp.copy, reference), policy_update.optimizer),
        "critic": init_state(jax.tree.map(jnp.copy, reward), critic_update.optimizer),
    }
    prompts = jax.device_put(plain_batch(model, config.batch_size, config.max_prompt))
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
        for _ in range(config.epochs):
            for minibatch in shuffled(experience, next(keys), config.minibatches):
                last = update(minibatch)
        assert np.isfinite(jax.device_get({**metrics, **last})["loss"])

    rollout = sample()
    experience, _ = advantages(rollout)
    first, *_ = shuffled(experience, next(keys), config.minibatches)
    wait = jax.block_until_ready
    return {
        "iteration": iteration,
        "rollout": lambda: wait(sample()),
        "advantages": lambda: wait(advantages(rollout)),
        "update": lambda: wait((update(first), states)),
    }


def main(config: Config) -> None:
    """Time an iteration and its parts, print the table, write it to `out`."""
    loads = [os.getloadavg()[0]]
    ours = our_calls(config)
    size = f"{config.batch_size} x {config.max_prompt}+{config.max_new_tokens}"
    calls = {"plumb": ours["iteration"]}
    if config.peer:
        from benchmarks import peers

        prompts_PT = plain_batch(config.model, 4 * config.batch_size, config.max_prompt)[
            "tokens_BT"
        ]
        (calls["trl"],) = apart(peers.ppo, prompts_PT, config)
    tokens = config.batch_size * config.max_new_tokens
    read = config.batch_size * (config.max_prompt + config.max_new_tokens)
    rows = [
        {"what": f"PPO {size}, {config.epochs} epochs", "calls": calls, "tokens": tokens},
        {"what": "  of this, the rollout", "calls": {"plumb": ours["rollout"]}, "tokens": tokens},
        {"what": "  the advantages", "calls": {"plumb": ours["advantages"]}, "tokens": read},
        {
            "what": "  each update of both",
            "calls": {"plumb": ours["update"]},
            "tokens": read // config.minibatches,
        },
    ]
    interleaved(rows, config.rounds)
    report("ppo", config, rows, ("torch", "transformers", "trl") if config.peer else (), loads)


if __name__ == "__main__":
    flags.run(main, Config)
