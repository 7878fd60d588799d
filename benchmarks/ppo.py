"""A PPO iteration (rollout, judgement, epochs of updates of policy and value model) beside TRL's PPOTrainer.

python -m benchmarks.ppo                       # prints a table, writes benchmarks/results/ppo-<platform>.json
"""

import dataclasses
import os
from types import SimpleNamespace
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
from rewards.models import make_model_scorer
from rollout import make_rollout, shuffled
from runtime import flags
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
    """Of sampling."""
    rounds: int = 5
    """Timings of each row; the median is reported."""
    peer: bool = True
    """Time TRL too, in the same run."""
    model: ModelConfig = (
        SMALL
        if on_cpu()
        else ModelConfig("135m", 32000, 768, 2048, 12, 12, 12, 64, 1024, tied=False)
    )
    """Of policy, reference, reward model and value model; default by platform."""
    out: str = RESULTS
    """Folder of the results."""


def our_calls(config: Config) -> dict[str, Any]:
    """A call of one iteration, as in train_ppo.py's loop, and one of each of its parts; all go on from the last."""
    shared = (
        "batch_size",
        "max_prompt",
        "max_new_tokens",
        "minibatches",
        "epochs",
        "temperature",
        "model",
    )
    ppo = train_ppo.Config(
        **{name: getattr(config, name) for name in shared}, missing_eos="none", steps=10_000
    )
    model, apply = config.model, init_and_apply(LanguageModel(config.model))[1]
    scalar_init, scalar_apply = init_and_apply(ScalarModel(model))
    reference, reward = random_params(model), jax.jit(scalar_init)(jax.random.key(1))
    rollout = make_rollout(ppo, apply, SimpleNamespace(eos=NEVER, pad=0))
    score, judge = (
        make_model_scorer(model),
        train_ppo.make_judge(ppo, apply, scalar_apply, eos=NEVER, newlines=[NEVER]),
    )
    (policy_optimizer, policy_step), (value_optimizer, value_step) = train_ppo.make_updates(
        ppo, apply, scalar_apply
    )
    prompts = jax.device_put(plain_batch(model, config.batch_size, config.max_prompt))
    copied = [jax.tree.map(jnp.copy, params) for params in (reference, reward)]
    states = [
        init_state(*pair) for pair in zip(copied, (policy_optimizer, value_optimizer), strict=True)
    ]
    keys = iter(jax.random.split(jax.random.key(2), 10_000))

    def sampled() -> dict[str, Any]:
        return rollout(states[0].params, prompts, next(keys))

    def judged(batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        scores, scalars = ({ppo.reward[0]: x} for x in score(reward, batch))
        models = states[0].params, reference, states[1].params
        return judge(*models, batch, scores, scalars, jnp.float32(ppo.kl_coef))

    def updated(minibatch: dict[str, Any]) -> dict[str, Any]:
        states[1], _ = value_step(states[1], minibatch, None)
        states[0], metrics = policy_step(states[0], minibatch, None)
        return metrics

    def iteration() -> None:
        batch, metrics = judged(sampled())
        for _ in range(config.epochs):
            for minibatch in shuffled(batch, next(keys), config.minibatches):
                last = updated(minibatch)
        assert np.isfinite(jax.device_get({**metrics, **last})["loss"])

    batch = sampled()
    (minibatch, *_), wait = (
        shuffled(judged(batch)[0], next(keys), config.minibatches),
        jax.block_until_ready,
    )
    return {
        "iteration": iteration,
        "rollout": lambda: wait(sampled()),
        "judgement": lambda: wait(judged(batch)),
        "update": lambda: wait((updated(minibatch), states)),
    }


def main(config: Config) -> None:
    """Times, prints and writes."""
    loads, ours = [os.getloadavg()[0]], our_calls(config)
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
        {"what": "  the judgement", "calls": {"plumb": ours["judgement"]}, "tokens": read},
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
