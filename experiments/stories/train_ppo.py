"""PPO towards happy stories: a fork of train_ppo.py whose reward is a program on the decoded text.

    PYTHONPATH=. python experiments/stories/train_ppo.py --init=runs/stories --run=runs/stories_ppo

What differs: happy.py scores the stories, on the host; prompts are raw openings of stories; the
critic starts from the policy's decoder with a zero head; bos, which in pretraining separated
stories, ends a response; options that the experiment does not vary are gone.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.batches import Batches, pad_prompts, prompt_batches
from data.sources import Source
from data.tokenizer import Tokenizer
from experiments.stories import happy
from model import LanguageModel, Params, init_and_apply
from model_config import PRESETS, ModelConfig, check_fit
from objectives.policy import (
    explained_variance,
    gae,
    kl_estimate,
    masked,
    masked_mean,
    policy_objective,
    response_logprobs,
    response_values,
    score_position,
    token_rewards,
    value_objective,
    whiten,
)
from rollout import (
    Batch,
    Rollout,
    check_first_update,
    check_kl,
    make_rollout,
    mean_metrics,
    named,
    rollout_metrics,
    shuffled_minibatches,
)
from runtime import flags
from runtime.errors import UserError, require
from sampling import Apply, SamplingConfig
from sharding import MeshConfig, abstract, check_batch, init_sharded, make_mesh, to_mesh
from train_state import (
    as_items,
    from_items,
    init_state,
    pin_inputs,
    starting_critic,
    starting_params,
)
from train_step import OptimizerConfig, make_optimizer, make_train_step
from training_run import Run

VALIDATION_STORIES = 64


@dataclasses.dataclass(frozen=True)
class Config:
    # Folders
    run: str = "runs/stories_ppo"
    """Folder of this run; running again resumes it."""
    init: str = "runs/stories"
    """Run that policy, reference and critic start from (import_llama2c.py writes it)."""

    # Sizes of an iteration
    steps: int = 60
    """PPO iterations."""
    batch_size: int = 128
    """Rollouts per iteration, over all devices."""
    minibatches: int = 4
    """Updates per epoch; divides batch_size."""
    epochs: int = 1
    """Passes over an iteration's rollouts."""

    # Sampling
    max_prompt: int = 28
    """Longest opening, in tokens."""
    max_new_tokens: int = 80
    """Longest response, in tokens: the beginning of a story."""
    temperature: float = 1.0
    """Sampling temperature; also applied to the log-probabilities in the KL and the loss."""

    # KL to the reference, as a reward
    kl_coef: float = 0.03
    """Beta: a token's reward is -beta times its KL estimate."""
    kl_limit: float = 80.0
    """The run ends in an error when KL per response exceeds this: the policy has collapsed."""

    # Advantages and losses
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """Clip of the probability ratio."""
    value_clip: float = 0.2
    """Clip of the value's change within an iteration."""

    # Models and their updates
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=5e-4,
        schedule="linear",
        warmup=10,
        final_lr=0.1,
        beta2=0.999,
        eps=1e-5,
        weight_decay=0.0,
    )
    """The policy's optimiser."""
    value_optimizer: OptimizerConfig = OptimizerConfig(
        lr=1e-3,
        schedule="linear",
        warmup=10,
        final_lr=0.1,
        beta2=0.999,
        eps=1e-5,
        weight_decay=0.0,
    )
    """The critic's optimiser."""
    model: ModelConfig = PRESETS["stories260k"]
    """The policy's architecture; taken from --init."""

    # Run
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    seed: int = 0
    """Seed of random weights, the order of the prompts and samples."""
    eval_every: int = 20
    """Iterations between samples and scores on the validation openings."""
    save_every: int = 20
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""

    # No field: Run reads it, and here a minibatch is never cut.
    microbatches = 1

    @property
    def length(self) -> int:
        """Return the tokens of a row: prompt and response."""
        return self.max_prompt + self.max_new_tokens


Parts = dict[str, np.ndarray]
"""The parts of the reward by name, with the suffix _B: float32 [B] each (happy.parts)."""


def score_stories(
    records: list[dict[str, str]], response_BR: jax.Array, tokenizer: Tokenizer
) -> tuple[list[str], Parts]:
    """Return what continues the "text" of each record, its opening, and the parts of its reward.

    Waits for the device.
    """
    openings = [record["text"] for record in records]
    stories = []
    for text, response in zip(openings, jax.device_get(response_BR).tolist(), strict=True):
        # Decoded together and then cut: the space between opening and response is kept.
        story = tokenizer.decode([*tokenizer.encode(text), *response])
        stories.append(story[len(text) :])
    parts = [happy.parts(text, story) for text, story in zip(openings, stories, strict=True)]
    columns = {
        f"{name}_B": np.array([part[name] for part in parts], np.float32) for name in parts[0]
    }
    return stories, columns


class Models(NamedTuple):
    """The models that advantages are computed with."""

    policy: Params
    reference: Params
    critic: Params


class Experience(Rollout):
    """A rollout, the parts of its reward and the targets of its updates, as in train_ppo.py."""

    old_logp_BR: jax.Array
    old_values_BR: jax.Array
    value_mask_BR: jax.Array
    advantages_BR: jax.Array
    returns_BR: jax.Array


def make_advantages(
    config: Config, apply: Apply, scalar_apply: Apply, *, eos: int
) -> Callable[..., tuple[Experience, Batch]]:
    """Compile compute_advantages(models, rollout, parts) -> (experience, metrics).

    `models`: a Models; `apply` is the policy's and the reference's, `scalar_apply` the critic's.
    `parts`: Parts on the mesh; score_B is the reward. Metrics are means over the rollout.
    """

    @jax.jit
    def compute_advantages(
        models: Models, rollout: Rollout, parts: Batch
    ) -> tuple[Experience, Batch]:
        mask_BR = rollout["mask_BR"]
        logp_BR = response_logprobs(apply, models.policy, rollout, config.temperature)
        reference_BR = response_logprobs(apply, models.reference, rollout, config.temperature)
        values_BR = masked(response_values(scalar_apply, models.critic, rollout), mask_BR)

        # A reward a token: -beta KL, and the score at the last one.
        kl_BR = kl_estimate(logp_BR, reference_BR, "k1", mask_BR)
        last_B, _ = score_position(mask_BR, "last")
        rewards_BR = token_rewards(parts["score_B"], kl_BR, mask_BR, config.kl_coef, last_B)
        advantages_BR, returns_BR = gae(
            rewards_BR, values_BR, mask_BR, gamma=1.0, gae_lambda=config.gae_lambda
        )
        experience = {
            **{name: x for name, x in rollout.items() if name != "sampler_logp_BR"},
            **parts,
            "old_logp_BR": logp_BR,
            "old_values_BR": values_BR,
            "value_mask_BR": mask_BR,
            "advantages_BR": whiten(advantages_BR, mask_BR),
            "returns_BR": returns_BR,
        }
        # What is logged of the rollout.
        metrics = {
            **{name: parts[f"{name}_B"].mean() for name in ("score", "happy", "sad", "words")},
            "reward": rewards_BR.sum(1).mean(),
            "reference_nll_per_token": -masked_mean(reference_BR, mask_BR),
            "value": masked_mean(values_BR, mask_BR),
            "explained_variance": explained_variance(values_BR, returns_BR, mask_BR),
            **rollout_metrics(logp_BR, reference_BR, rollout, eos),
        }
        return experience, metrics

    return compute_advantages


def make_evaluation(
    config: Config,
    sample_rollout: Callable[..., Rollout],
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
) -> Callable[[Params], tuple[list[dict[str, str]], dict[str, float]]]:
    """Return evaluate(policy) -> (rows for samples.md, mean parts of the reward).

    One story for each of the first validation openings; metrics are named validation/... Always
    the same openings and key, so that what one sees before and after differs by the policy alone.
    """
    openings = happy.openings("validation")[:VALIDATION_STORIES]
    records = [{"text": text} for text in openings]
    tokens = [{"tokens": [tokenizer.bos, *tokenizer.encode(text)]} for text in openings]
    prompts = to_mesh(pad_prompts(tokens, config.max_prompt, tokenizer.pad, fixed=True), mesh)

    def evaluate(policy: Params) -> tuple[list[dict[str, str]], dict[str, float]]:
        rollout = sample_rollout(policy, prompts, jax.random.key(0))
        stories, parts = score_stories(records, rollout["response_BR"], tokenizer)
        scores = parts["score_B"].tolist()
        rows = []
        for opening, story, score in zip(openings, stories, scores, strict=True):
            rows.append({"opening": opening, "story": story, "score": f"{score:.2f}"})
        means = {f"validation/{name[:-2]}": float(x.mean()) for name, x in parts.items()}
        return rows[:4], means

    return evaluate


class Update(NamedTuple):
    """How one of the two models is updated."""

    optimizer: optax.GradientTransformation
    step: Callable[..., Any]
    """step(state, minibatch) -> (state, metrics); `state` is donated."""


def make_policy_update(config: Config, apply: Apply) -> Update:
    """Make the policy's optimiser and its jitted step (train_step.make_train_step)."""
    objective = partial(policy_objective, apply, clip=config.clip, temperature=config.temperature)
    return make_update(config, objective, config.optimizer)


def make_critic_update(config: Config, scalar_apply: Apply) -> Update:
    """Make the critic's optimiser and its jitted step (train_step.make_train_step)."""
    objective = partial(value_objective, scalar_apply, clip=config.value_clip)
    return make_update(config, objective, config.value_optimizer)


def make_update(config: Config, objective: Any, options: OptimizerConfig) -> Update:
    """Make the optimiser of `options` over all updates of the run, and the step of `objective`."""
    optimizer = make_optimizer(options, config.steps * config.epochs * config.minibatches)
    return Update(optimizer, make_train_step(objective, optimizer, max_norm=options.clip))


def fresh_items(
    policy_optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation,
    policy: Params,
    critic: Params,
) -> dict[str, Any]:
    """Build what a checkpoint holds before the first iteration: the states of policy and critic.

    Keys: `params` and `rest` of the policy's state, `value`, the critic's state. The parameters
    are copied: the steps donate theirs, and the reference stays.
    """
    policy, critic = jax.tree.map(jnp.copy, (policy, critic))
    critic_state = init_state(critic, critic_optimizer)
    return {**as_items(init_state(policy, policy_optimizer)), "value": critic_state}


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError for settings that cannot run together."""
    count = jax.process_count()
    require(
        count == 1,
        f"{count} hosts: the reward reads all stories on one; start a single process",
    )
    rows = config.batch_size
    parts = config.minibatches
    if config.epochs < 1 or parts < 1 or rows % parts:
        raise UserError(
            f"--minibatches={parts} --epochs={config.epochs}: at least 1, and minibatches must "
            f"divide --batch_size={rows}"
        )
    check_batch("batch_size / --minibatches", rows // parts, 1, mesh)


def open_openings(config: Config, tokenizer: Tokenizer) -> Batches:
    """Open batches of the training stories' openings, raw text."""
    openings = happy.openings("train")
    source = Source("openings", range(len(openings)), lambda i: {"text": openings[i]})
    return prompt_batches(
        source,
        tokenizer,
        batch_size=config.batch_size,
        length=config.max_prompt,
        seed=config.seed,
    )


def main(config: Config) -> dict[str, float]:
    """Train a policy by PPO to tell happy stories; return the last metrics."""
    config = pin_inputs(config)
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    tokenizer = Tokenizer.load(config.init)
    check_fit(config.model, tokenizer.size, config.length)

    # Data: openings. Models: the reference, and what the critic starts from.
    prompts = open_openings(config, tokenizer)
    init, apply = init_and_apply(LanguageModel(config.model))
    reference = starting_params(init, config.model, config.init, mesh, config.seed)
    critic_start, scalar_apply = starting_critic(config, {}, mesh)

    # The jitted functions of an iteration. A story ends where the next would begin.
    sample_rollout = make_rollout(
        apply,
        config.model,
        SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens),
        eos=tokenizer.bos,
        pad=tokenizer.pad,
    )
    compute_advantages = make_advantages(config, apply, scalar_apply, eos=tokenizer.bos)
    policy_update = make_policy_update(config, apply)
    critic_update = make_critic_update(config, scalar_apply)
    evaluate = make_evaluation(config, sample_rollout, tokenizer, mesh)

    # What a checkpoint holds: the states of policy and critic.
    fresh = partial(fresh_items, policy_update.optimizer, critic_update.optimizer)
    shapes = abstract(jax.eval_shape(fresh, reference, critic_start), mesh)
    with Run(config, tokenizer, unit="iteration") as run:
        items = run.restore(shapes, prompts)
        if items is None:
            items = init_sharded(fresh, mesh, reference, critic_start)
        policy, critic = from_items(items), items["value"]
        run.describe(
            "PPO on happy stories",
            policy.params,
            (policy.opt_state, critic, reference),
            length=config.length,
        )
        for step in run.steps():
            if step == 1 and config.eval_every:
                run.samples(0, evaluate(reference)[0])

            # 1. Rollout: stories to the openings.
            key = jax.random.fold_in(jax.random.key(config.seed), step)
            rollout = sample_rollout(policy.params, to_mesh(next(prompts), mesh), key)

            # 2. Score: the program on the decoded text.
            _, parts = score_stories(prompts.records, rollout["response_BR"], tokenizer)

            # 3. Advantages: a reward a token with the KL, GAE, whitening.
            experience, metrics = compute_advantages(
                Models(policy=policy.params, reference=reference, critic=critic.params),
                rollout,
                to_mesh(parts, mesh),
            )

            # 4. Updates: epochs over shuffled minibatches; the policy's and the critic's.
            updates = []
            for minibatch in shuffled_minibatches(
                experience, key, config.epochs, config.minibatches
            ):
                policy, policy_metrics = policy_update.step(policy, minibatch)
                critic, critic_metrics = critic_update.step(critic, minibatch)
                updates.append(named(policy=policy_metrics, value=critic_metrics))
                if step == run.start + 1 and len(updates) == 1:
                    check_first_update(
                        policy_metrics, metrics, config.model.compute_dtype, run.start
                    )

            # 5. Record means over the updates.
            metrics |= mean_metrics(updates)
            run.record(step, metrics, tokens=config.batch_size * config.length)
            check_kl(run.last_metrics, config.kl_limit)

            # 6. Validation stories and a checkpoint, when they are due.
            if run.due(step, config.eval_every):
                rows, validation = evaluate(policy.params)
                run.samples(step, rows)
                run.record(step, validation)
            run.save_when_due(step, {**as_items(policy), "value": critic}, prompts)
    return run.last_metrics


if __name__ == "__main__":
    flags.run(main, Config)
