"""PPO with policy and value on one decoder: a fork of train_ppo.py.

    PYTHONPATH=. python experiments/shared_trunk/train_ppo.py --init=runs/align/sft \\
        --reward=runs/align/rm --run=runs/trunk

What differs: a value head on the policy's last hidden states stands for the critic (trunk.py), so
an update is one pass and one backward pass over one decoder, and advantages need two passes in
place of three. Options that the experiment does not vary are gone. A run holds the policy's
parameters as those of train_ppo.py do: generate.py and every --init read it.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from data.batches import prompt_batches
from data.sources import open_source
from data.tokenizer import Tokenizer
from evaluation.gold import make_gold_evaluation
from experiments.shared_trunk.trunk import logprobs_and_values, trunk_objective, with_value_head
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit
from objectives.policy import (
    explained_variance,
    gae,
    kl_estimate,
    masked,
    masked_mean,
    missing_eos,
    response_logprobs,
    score_position,
    token_rewards,
    whiten,
)
from objectives.unpadded import OF_ROLLOUTS, unpadded
from planning.dry_run import preview_items
from rewards.scorer import make_reward_scorer
from rollout import (
    Batch,
    Rollout,
    check_first_update,
    check_kl,
    ended,
    make_rollout,
    mean_metrics,
    named,
    rollout_metrics,
    sample_rows,
    shuffled_minibatches,
)
from runtime import flags
from runtime.errors import require
from sampling import Apply, Ends, SamplingConfig, check_temperature
from sharding import (
    MeshConfig,
    abstract,
    check_batch,
    data_shard,
    init_sharded,
    make_mesh,
    to_mesh,
)
from train_state import as_items, from_items, init_state, pin_inputs, starting_params
from train_step import OptimizerConfig, TrainState, make_optimizer, make_train_step
from training_run import Run

# Adam as in train_ppo.py.
ADAM = partial(
    OptimizerConfig,
    schedule="linear",
    warmup=0,
    final_lr=0.1,
    beta2=0.999,
    eps=1e-5,
    weight_decay=0.0,
)


@dataclasses.dataclass(frozen=True)
class Config:
    # Folders
    run: str = "runs/trunk"
    """Folder of this run; running again resumes it."""
    init: str = "runs/align/sft"
    """Run that policy and reference start from."""
    reward: str = "runs/align/rm"
    """A run of train_rm.py, module:function called with (response, record), or http://<server>."""
    data: str = "world"
    """Prompts: world, a .jsonl file, or tfds:<name>."""

    # Sizes of an iteration
    steps: int = 24
    """PPO iterations."""
    batch_size: int = 256
    """Rollouts per iteration, over all devices."""
    minibatches: int = 4
    """Updates per epoch; divides batch_size."""
    epochs: int = 2
    """Passes over an iteration's rollouts."""
    microbatches: int = 1
    """Parts of a minibatch whose gradients are summed."""

    # Sampling
    max_prompt: int = 20
    """Longest prompt, in tokens."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; also applied to the log-probabilities in the KL and the loss."""

    # KL to the reference, as a reward
    kl_coef: float = 0.2
    """Beta: a token's reward is -beta times its KL estimate, k1."""
    kl_limit: float = 50.0
    """The run ends in an error when KL per response exceeds this: the policy has collapsed."""

    # Advantages and losses
    gamma: float = 1.0
    """Discount of the returns."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """Clip of the probability ratio."""
    value_clip: float = 0.2
    """Clip of the value's change within an iteration."""
    value_coef: float = 0.1
    """Weight of the values' loss beside the policy's; 0.1 is lm-human-preferences'."""

    # The model and its updates
    optimizer: OptimizerConfig = ADAM(lr=3e-4)
    """The decoder's optimiser, that of the policy in train_ppo.py; its clip is the head's too."""
    value_optimizer: OptimizerConfig = ADAM(lr=5e-3)
    """The value head's, which starts from zeros and has few parameters."""
    model: ModelConfig = ModelConfig()
    """The policy's architecture; taken from --init."""

    # Run
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    seed: int = 0
    """Seed of random weights, the order of the prompts and samples."""
    eval_every: int = 12
    """Iterations between gold evaluations on held-out prompts (world only)."""
    save_every: int = 12
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""

    @property
    def length(self) -> int:
        """Tokens of a row, prompt and response; a property."""
        return self.max_prompt + self.max_new_tokens


class Experience(Rollout):
    """A rollout and the targets of its updates, as in train_ppo.py; [B, R], float32."""

    old_logp_BR: jax.Array
    old_values_BR: jax.Array
    advantages_BR: jax.Array
    returns_BR: jax.Array


def make_advantages(
    config: Config, apply: Apply, *, eos: Ends
) -> Callable[..., tuple[Experience, Batch]]:
    """Compile compute_advantages(trunk, reference, rollout, scores) -> (experience, metrics).

    `trunk`: parameters of trunk.with_value_head; `reference`: of a LanguageModel, as `apply` is.
    `scores`: {reward: [B]}, one. `eos`: ids that end a response. Nothing is donated. Metrics are
    scalars, named as those of train_ppo.py.
    """

    @jax.jit
    def compute_advantages(
        trunk: Params, reference: Params, rollout: Rollout, scores: Batch
    ) -> tuple[Experience, Batch]:
        mask_BR = rollout["mask_BR"]

        # Log-probabilities and values by one pass, and the reference's by another.
        logp_BR, values_BR = logprobs_and_values(apply, trunk, rollout, config.temperature)
        values_BR = masked(values_BR, mask_BR)
        reference_BR = response_logprobs(apply, reference, rollout, config.temperature)

        # A response without an end is scored below all others.
        raw_B = scores[config.reward]
        score_B = missing_eos(raw_B, ended(rollout, eos), "lowest")

        # A reward a token: -beta KL, and the score at the last one.
        kl_BR = kl_estimate(logp_BR, reference_BR, "k1", mask_BR)
        last_B, _ = score_position(mask_BR, "last")
        rewards_BR = token_rewards(score_B, kl_BR, mask_BR, config.kl_coef, last_B)
        advantages_BR, returns_BR = gae(
            rewards_BR, values_BR, mask_BR, gamma=config.gamma, gae_lambda=config.gae_lambda
        )

        # What the updates read.
        experience: Experience = {
            **rollout,
            "old_logp_BR": logp_BR,
            "old_values_BR": values_BR,
            "advantages_BR": whiten(advantages_BR, mask_BR),
            "returns_BR": returns_BR,
        }
        # What is logged of the rollout.
        metrics = {
            "score": raw_B.mean(),
            "score_with_eos_rule": score_B.mean(),
            "reward": rewards_BR.sum(1).mean(),
            "value": masked_mean(values_BR, mask_BR),
            "explained_variance": explained_variance(values_BR, returns_BR, mask_BR),
            **rollout_metrics(logp_BR, reference_BR, rollout, eos),
        }
        return experience, metrics

    return compute_advantages


class TrunkUpdate(NamedTuple):
    """How policy and value are updated, together."""

    optimizer: optax.GradientTransformation
    step: Callable[..., tuple[TrainState, Batch]]
    """step(state, minibatch) -> (state, metrics); `state` is donated."""


def make_update(config: Config, apply: Apply) -> TrunkUpdate:
    """Make the optimiser and its jitted step (train_step.make_train_step).

    `apply` is that of a LanguageModel. Minibatches are of Experience.
    """
    objective = partial(
        trunk_objective,
        apply,
        clip=config.clip,
        value_clip=config.value_clip,
        value_coef=config.value_coef,
        temperature=config.temperature,
    )
    # A rate for the decoder and one for the head. The schedules count updates, not iterations.
    updates = config.steps * config.epochs * config.minibatches
    parts = {
        "policy": make_optimizer(config.optimizer, updates),
        "value": make_optimizer(config.value_optimizer, updates),
    }
    optimizer = optax.multi_transform(parts, {name: name for name in parts})
    step = make_train_step(
        objective, optimizer, config.microbatches, max_norm=config.optimizer.clip
    )
    return TrunkUpdate(optimizer, step)


# What a checkpoint holds: under `params` the policy alone, a language model to whoever reads it.
def trunk_items(state: TrainState) -> dict[str, Any]:
    """Split a state as a checkpoint stores it: {"params": the policy's, "value", "rest"}."""
    items = as_items(state)
    return {
        "params": state.params["policy"],
        "value": state.params["value"],
        "rest": items["rest"],
    }


def from_trunk_items(items: dict[str, Any]) -> TrainState:
    """Undo `trunk_items`."""
    params = {"policy": items["params"], "value": items["value"]}
    return from_items({"params": params, "rest": items["rest"]})


def fresh_items(optimizer: optax.GradientTransformation, policy: Params) -> dict[str, Any]:
    """Build what a checkpoint holds before the first iteration; see `trunk_items`.

    `policy` is copied, for the step donates its parameters and the reference stays.
    """
    trunk = with_value_head(jax.tree.map(jnp.copy, policy))
    return trunk_items(init_state(trunk, optimizer))


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError for settings that cannot run together."""
    rows = config.batch_size
    parts = config.minibatches
    require(
        parts >= 1 and rows % parts == 0,
        f"--minibatches={parts}: must divide --batch_size={rows}",
    )
    require(config.epochs >= 1, f"--epochs={config.epochs}: must be at least 1")
    require(config.value_coef >= 0, f"--value_coef={config.value_coef}: must be at least 0")
    # The losses divide by it.
    check_temperature(config.temperature)
    require(config.temperature > 0, f"--temperature={config.temperature}: must be above 0")
    check_batch("batch_size / --minibatches", rows // parts, config.microbatches, mesh)


def main(config: Config) -> dict[str, float]:
    """Train a policy by PPO on one trunk; return the last row of metrics."""
    config = pin_inputs(config)
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    tokenizer = Tokenizer.load(config.init)
    check_fit(config.model, tokenizer.size, config.length)

    # Models: the reward, and the reference, which the policy starts as a copy of.
    rewards, score = make_reward_scorer((config.reward,), tokenizer, mesh)
    init, apply = init_and_apply(LanguageModel(config.model))
    reference = starting_params(init, config.model, config.init, mesh, config.seed)

    # Data: prompts, of which each host reads its own part.
    source = open_source(config.data, "prompt", "train", seed=config.seed)
    prompts = prompt_batches(
        source,
        tokenizer,
        batch_size=config.batch_size,
        length=config.max_prompt,
        seed=config.seed,
        **data_shard(mesh),
    )

    # The jitted functions of an iteration.
    sample_rollout = make_rollout(
        apply,
        config.model,
        SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens),
        eos=tokenizer.ends,
        pad=tokenizer.pad,
    )
    compute_advantages = make_advantages(config, apply, eos=tokenizer.ends)
    update = make_update(config, apply)
    # The gold program knows the world's prompts alone.
    evaluate_gold = None
    if config.data == "world" and config.eval_every:
        evaluate_gold = make_gold_evaluation(config, tokenizer)

    # A dry run ends here and has written nothing.
    fresh = partial(fresh_items, update.optimizer)
    shapes = abstract(jax.eval_shape(fresh, reference), mesh)
    if config.dry_run:
        held = {**shapes, "held": (reference, rewards)}
        return preview_items(config, held, prompts, tokenizer)

    with Run(config, tokenizer, unit="iteration") as run:
        # The state of the newest checkpoint, or of a new run.
        items = run.restore(shapes, prompts)
        if items is None:
            items = init_sharded(fresh, mesh, reference)
        state = from_trunk_items(items)
        run.describe(
            f"PPO on one trunk, {source.name}",
            state.params,
            (state.opt_state, reference, rewards),
            length=config.length,
        )

        for step in run.steps():
            # 1. Rollout: sample responses. Models are run over its real tokens alone.
            key = jax.random.fold_in(jax.random.key(config.seed), step)
            prompt_batch = to_mesh(next(prompts), mesh)
            rollout = sample_rollout(state.params["policy"], prompt_batch, key)
            rollout = unpadded(rollout, sizes=OF_ROLLOUTS)

            # 2. Score: one score a response.
            scores, _ = score(rewards, rollout, prompts.records)

            # 3. Advantages: a reward a token with the KL, GAE, whitening.
            experience, metrics = compute_advantages(state.params, reference, rollout, scores)

            # 4. Updates: epochs over shuffled minibatches; of policy and value together.
            updates = []
            for minibatch in shuffled_minibatches(
                experience, key, config.epochs, config.minibatches, config.microbatches
            ):
                state, update_metrics = update.step(state, minibatch)
                updates.append(named(policy=update_metrics))
                # Once a start: is the ratio 1 where it must be?
                if step == run.start + 1 and len(updates) == 1:
                    check_first_update(
                        update_metrics, metrics, config.model.compute_dtype, run.start
                    )

            # 5. Record means over the updates.
            metrics |= mean_metrics(updates)
            run.record(step, metrics, tokens=config.batch_size * config.length)
            check_kl(run.last_metrics, config.kl_limit)

            # 6. Samples, the gold evaluation and a checkpoint, when they are due.
            if run.due(step, config.eval_every):
                rows = sample_rows(prompts.records, rollout["response_BR"], tokenizer, 1)
                run.samples(step, rows[:8])
                if evaluate_gold is not None:
                    run.record(step, evaluate_gold(state.params["policy"], reference))
            run.save_when_due(step, trunk_items(state), prompts)
    return run.last_metrics


if __name__ == "__main__":
    flags.run(main, Config)
