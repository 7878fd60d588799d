"""Time an update of policy and value, and a whole iteration, with two models and with one trunk.

    python -m experiments.shared_trunk.speed

Held to one core, in turns, CPU-seconds of this process: other work on the machine counts for
little. Prints medians and writes speed.json. Sizes are those of benchmarks/ppo.py.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import train_ppo
from experiments.shared_trunk import train_ppo as trunk_ppo
from experiments.shared_trunk.trunk import with_value_head
from model import LanguageModel, ScalarModel, init_and_apply
from model_config import ModelConfig
from rewards.scorer import make_model_scorer
from rollout import Rollout, make_rollout, shuffled
from runtime import flags
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from train_state import init_state

MODEL = ModelConfig("small", 4096, 256, 688, 6, 8, 8, 32, 1024, tied=False)
"""6.8 million parameters: `small` of benchmarks/side_by_side.py."""
NEVER = -1
"""No token is this: every response is of full length."""
REWARD = "reward"


@dataclasses.dataclass(frozen=True)
class Config:
    batch: int = 16
    """Rollouts of an iteration, updated on at once."""
    prompt: int = 64
    """Tokens of a prompt."""
    new: int = 64
    """Tokens of a response."""
    epochs: int = 4
    """Passes over an iteration's rollouts."""
    rounds: int = 5
    """Timings of each piece of work, of which medians are told."""
    core: int = 0
    """Number of the core."""
    out: str = "experiments/shared_trunk/speed.json"
    """File to write."""


Call = Callable[[], Any]
Sides = dict[str, Call]
"""`update` and `iteration`, each of which goes on from the last and waits for its end."""


class Common:
    """What both sides share: the reference, the reward model, prompts, the sampler, the keys."""

    def __init__(self, config: Config):
        """Make random weights and prompts."""
        init, self.apply = init_and_apply(LanguageModel(MODEL))
        scalar_init, self.scalar_apply = init_and_apply(ScalarModel(MODEL))
        self.reference = jax.jit(init)(jax.random.key(0))
        self.reward = jax.jit(scalar_init)(jax.random.key(1))
        self._score = make_model_scorer(MODEL)

        # Prompts without padding.
        shape = (config.batch, config.prompt)
        self._prompts = {
            "tokens_BT": jax.random.randint(jax.random.key(2), shape, 3, MODEL.vocab),
            "segment_ids_BT": jnp.ones(shape, jnp.int32),
            "positions_BT": jnp.broadcast_to(jnp.arange(config.prompt), shape),
        }
        sampling = SamplingConfig(1.0, max_new_tokens=config.new)
        self._sample = make_rollout(self.apply, MODEL, sampling, eos=NEVER, pad=0)
        self._keys = iter(jax.random.split(jax.random.key(3), 10_000))

    def sampled(self, policy: dict[str, Any]) -> Rollout:
        """Sample responses to the prompts by `policy`."""
        return self._sample(policy, self._prompts, next(self._keys))

    def scores(self, rollout: Rollout) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Score `rollout` by the reward model, as rewards.scorer's score does."""
        score_B, scalars_BR = self._score(self.reward, rollout)
        return {REWARD: score_B}, {REWARD: scalars_BR}

    def shuffled(self, experience: Any) -> dict[str, jax.Array]:
        """Return all rows in another order: one minibatch."""
        return shuffled(experience, next(self._keys), 1)[0]


def two_models(config: Config, common: Common) -> Sides:
    """Return the sides of train_ppo.py: a policy and a critic."""
    settings = train_ppo.Config(
        reward=(REWARD,), model=MODEL, missing_eos="none", max_new_tokens=config.new
    )
    advantages = train_ppo.make_advantages(settings, common.apply, common.scalar_apply, eos=NEVER)
    policy_update = train_ppo.make_policy_update(settings, common.apply)
    critic_update = train_ppo.make_critic_update(settings, common.scalar_apply)
    # The steps donate their states.
    policy, critic = jax.tree.map(jnp.copy, (common.reference, common.reward))
    states = {
        "policy": init_state(policy, policy_update.optimizer),
        "critic": init_state(critic, critic_update.optimizer),
    }

    def experience() -> Any:
        rollout = common.sampled(states["policy"].params)
        models = train_ppo.Models(
            states["policy"].params, common.reference, states["critic"].params
        )
        made, _ = advantages(models, rollout, *common.scores(rollout), jnp.float32(0.2))
        return made

    def update(minibatch: dict[str, jax.Array]) -> None:
        states["critic"], _ = critic_update.step(states["critic"], minibatch)
        states["policy"], _ = policy_update.step(states["policy"], minibatch)

    return sides_of(config, common, experience, update, states)


def one_trunk(config: Config, common: Common) -> Sides:
    """Return the sides of this fork's train_ppo.py."""
    settings = trunk_ppo.Config(reward=REWARD, model=MODEL, max_new_tokens=config.new)
    advantages = trunk_ppo.make_advantages(settings, common.apply, eos=NEVER)
    trunk_update = trunk_ppo.make_update(settings, common.apply)
    # The step donates its state.
    trunk = with_value_head(jax.tree.map(jnp.copy, common.reference))
    states = {"trunk": init_state(trunk, trunk_update.optimizer)}

    def experience() -> Any:
        rollout = common.sampled(states["trunk"].params["policy"])
        scores, _ = common.scores(rollout)
        made, _ = advantages(states["trunk"].params, common.reference, rollout, scores)
        return made

    def update(minibatch: dict[str, jax.Array]) -> None:
        states["trunk"], _ = trunk_update.step(states["trunk"], minibatch)

    return sides_of(config, common, experience, update, states)


def sides_of(
    config: Config,
    common: Common,
    experience: Callable[[], Any],
    update: Callable[[dict[str, jax.Array]], None],
    states: dict[str, Any],
) -> Sides:
    """Return one update on rows made once, and a whole iteration, each until its end."""
    minibatch = common.shuffled(experience())

    def one_update() -> None:
        update(minibatch)
        jax.block_until_ready(states)

    def iteration() -> None:
        made = experience()
        for _ in range(config.epochs):
            update(common.shuffled(made))
        jax.block_until_ready(states)

    return {"update": one_update, "iteration": iteration}


def processor() -> str:
    """Return the processor's name, family and model, as Linux tells them; "" elsewhere."""
    path = pathlib.Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    first = path.read_text().partition("\n\n")[0]
    facts = dict(line.split(":", 1) for line in first.splitlines())
    named = {name.strip(): value.strip() for name, value in facts.items()}
    return f"{named['model name']} (family {named['cpu family']}, model {named['model']})"


def main(config: Config) -> dict[str, Any]:
    """Time both sides in turns; print and write medians, and return what is written."""
    # One core, before JAX counts those that it may use.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {config.core})
    make_mesh(MeshConfig())
    common = Common(config)
    sides = {"two models": two_models(config, common), "one trunk": one_trunk(config, common)}

    # The first call of each compiles; then each is timed once a round.
    seconds: dict[str, dict[str, list[float]]] = {}
    for turn in range(config.rounds + 1):
        for side, calls in sides.items():
            for what, call in calls.items():
                start = time.process_time()
                call()
                if turn:
                    own = seconds.setdefault(what, {}).setdefault(side, [])
                    own.append(time.process_time() - start)

    result: dict[str, Any] = {
        **dataclasses.asdict(config),
        "processor": processor(),
        "load": os.getloadavg()[0],
        "jax": jax.__version__,
        "cpu_seconds": seconds,
        "faster": {},
    }
    print(f"{'CPU-ms, median':16}" + "".join(f"{side:>12}" for side in sides) + f"{'faster':>9}")
    for what, timed in seconds.items():
        medians = {side: statistics.median(every) for side, every in timed.items()}
        # Of the same round each.
        pairs = zip(timed["two models"], timed["one trunk"], strict=True)
        ratios = [two / one for two, one in pairs]
        result["faster"][what] = [statistics.median(ratios), min(ratios), max(ratios)]
        cells = "".join(f"{1e3 * medians[side]:12.0f}" for side in sides)
        print(f"{what:16}{cells}{statistics.median(ratios):9.2f}")
    pathlib.Path(config.out).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    flags.run(main, Config)
