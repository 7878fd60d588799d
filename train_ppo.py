"""PPO with a critic: sample responses, score them, estimate advantages, update policy and critic.

    python train_ppo.py --init=runs/align/sft --reward=runs/align/rm --run=runs/align/ppo

Policy and reference start from the SFT run. The critic starts from the first reward model, or,
where no reward is a model, from the SFT run and the first rollout's mean score. Defaults follow
the "N+ implementation details" of Stiennon et al. 2020; contested ones are fields of Config.
docs/ppo.md follows one iteration, tensor by tensor.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from data.bad_rows import OnBadRow
from data.batches import Batches, prompt_batches, text_batches
from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from evaluation.gold import make_gold_evaluation
from lora import LoraConfig, lora_base, with_adapters
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit
from objectives.policy import (
    Combine,
    MissingEos,
    adapt_kl,
    explained_variance,
    gae,
    kl_estimate,
    masked,
    masked_mean,
    missing_eos,
    policy_objective,
    response_logprobs,
    response_values,
    score_position,
    token_rewards,
    value_objective,
    whiten,
    with_text,
)
from objectives.reward import step_ends, step_rewards
from objectives.unpadded import OF_ROLLOUTS, unpadded
from planning.dry_run import preview_items
from planning.memory import check_memory
from rewards.scorer import check_rewards, is_function, make_reward_scorer, pooled
from rollout import (
    Batch,
    Rollout,
    RolloutConfig,
    check_first_update,
    check_kl,
    check_rollout,
    ended,
    make_rollout,
    mean_metrics,
    named,
    rollout_metrics,
    sample_rows,
    shuffled_minibatches,
)
from runtime import flags
from runtime.errors import refuse_unread, require
from runtime.guard import GuardConfig, guarded_by_samples
from runtime.hosts import HostsConfig
from runtime.samples import SampleRow
from sampling import Apply, Ends, SamplingConfig, check_temperature
from sharding import (
    Memory,
    MeshConfig,
    abstract,
    check_batch,
    data_shard,
    init_sharded,
    make_mesh,
    to_memory,
    to_mesh,
)
from train_state import (
    as_items,
    fresh_state,
    from_items,
    pin_inputs,
    starting_critic,
    starting_params,
)
from train_step import (
    Objective,
    OptimizerConfig,
    TrainState,
    make_optimizer,
    make_rate,
    make_train_step,
)
from training_run import Run

# Adam as the reproduction has it: no decay of weights, a larger epsilon, a linear schedule.
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
    run: str = "runs/ppo"
    """Folder of this run; running again resumes it."""
    init: str = "runs/align/sft"
    """Run that policy and reference start from."""

    # Rewards, and how they make one score
    reward: tuple[str, ...] = ("runs/align/rm",)
    """Each a run of train_rm.py, module:function called with (response, record), or http://<server>
    (rewards/serve.py)."""
    combine: Combine = "mean"
    """How several rewards make one score; gated: the first if all others reach --gate, else
    --floor."""
    weights: tuple[float, ...] = ()
    """One a reward (weighted: the weighted sum, not divided)."""
    gate: float = 0.0
    """Least value of the second reward and of those after it (gated)."""
    floor: float | None = None
    """Score where one of them is below --gate (gated); None: below the first reward's lowest."""

    # Prompts and responses
    data: str = "world"
    """Prompts: world, files, or tfds:<name>."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, and list them."""

    # Sizes of an iteration
    steps: int = 24
    """PPO iterations."""
    batch_size: int = 256
    """Rollouts per iteration, over all devices."""
    samples_per_prompt: int = 1
    """Rollouts that share a prompt."""
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
    """Beta: a token's reward is -beta times its KL estimate. With --kl_target, the first beta."""
    kl_target: float | None = None
    """KL per response, in nats, that beta adapts to; None: beta is fixed. Measured by k1, whatever
    --kl_estimator."""
    kl_horizon: int = 10_000
    """Responses over which beta adapts."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of KL per token in the reward (objectives/policy.py)."""
    kl_limit: float = 50.0
    """The run ends in an error when KL per response exceeds this: the policy has collapsed."""

    # Where the score is added, and what a missing end costs
    step_rewards: Literal["none", "product", "minimum", "last"] = "none"
    """Reward at each step's last token: the change of the score there. Then --reward is a run of
    train_prm.py."""
    score_at: Literal["last", "after"] = "last"
    """The score is added at the last real token, or at the position after it if one is left."""
    missing_eos: MissingEos = "lowest"
    """Rule for a response without an end. lowest: its score is below all of the batch. Else it
    becomes `missing_eos_score` (replace), has it added (penalty), or stays (none)."""
    missing_eos_score: float = -1.0
    """Score of a response without an end (replace), or what is added to it (penalty)."""

    # Advantages
    gamma: float = 1.0
    """Discount of the returns."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    whiten_rewards: bool = False
    """Scale rewards about their mean to deviation 1 over the iteration; the mean stays."""
    whiten_unbiased: bool = False
    """Divide the variance in whitening by n - 1 (TRL, verl), not n (OpenAI, its reproduction)."""

    # Losses
    clip: float = 0.2
    """Clip of the probability ratio."""
    entropy_coef: float = 0.0
    """Weight of the entropy per token, added to what is maximised."""
    ptx_data: str | None = None
    """Pre-training text mixed into each update (PPO-ptx): world, files, or tfds:<name>."""
    ptx_coef: float = 1.0
    """Weight of its loss per token beside the policy's; Ouyang et al. 2022 took 27.8."""
    value_clip: float = 0.2
    """Clip of the value's change within an iteration."""

    # Models and their updates
    optimizer: OptimizerConfig = ADAM(lr=3e-4)
    """The policy's optimiser."""
    value_optimizer: OptimizerConfig = ADAM(lr=1.5e-3)
    """The critic's, which has more to learn: it starts from scores of whole responses."""
    model: ModelConfig = ModelConfig()
    """The policy's architecture; taken from --init."""
    lora: LoraConfig = LoraConfig()
    """Adapters of policy and critic; what they start from are then their bases."""
    offload: bool = False
    """Keep reference and reward models in the host's memory; on the devices only while in use."""

    # Run
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    int8: bool = False
    """Sample with weights in int8, half of bfloat16 to read; `sampler_gap` shows the rounding."""
    rollout: RolloutConfig = RolloutConfig()
    """Devices over which the policy is cut while it samples."""
    guard: GuardConfig = GuardConfig()
    """A spike of the policy's updates, after which other responses are drawn."""
    hosts: HostsConfig = HostsConfig()
    """Processes of this run."""
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
        """Return the tokens of a row, `max_prompt` + `max_new_tokens`: a property."""
        return self.max_prompt + self.max_new_tokens


class Models(NamedTuple):
    """The models that advantages are computed with: whole parameters, adapters merged in."""

    policy: Params
    reference: Params
    critic: Params


class Experience(Rollout):
    """A rollout and the targets of its updates; [B, R], float32."""

    old_logp_BR: jax.Array
    """Log-probabilities by the policy that sampled, recomputed by the training code."""
    old_values_BR: jax.Array
    """The critic's values of the states in which the tokens were emitted, before its updates."""
    value_mask_BR: jax.Array
    """1 for states that have a value: `mask_BR`, and with --score_at=after the state after it."""
    advantages_BR: jax.Array
    """Whitened over the batch; 0 where `mask_BR` is."""
    returns_BR: jax.Array
    """Targets of the critic: advantages before whitening, plus values."""


def make_advantages(
    config: Config,
    apply: Apply,
    scalar_apply: Apply,
    *,
    eos: Ends,
    newlines: Sequence[int] = (),
) -> Callable[..., tuple[Experience, Batch]]:
    """Compile f(models, rollout, scores, scalars, kl_coef) -> (Experience, metrics).

    `models`: a Models; `apply` is the policy's and the reference's, `scalar_apply` the critic's.
    `rollout`: a Rollout on the mesh. `scores`: {reward: [B]} and `scalars`: {reward: [B, R + 1]}
    of rewards.scorer.make_reward_scorer; scalars, read with --step_rewards alone, may be {}.
    `kl_coef`: beta, a scalar. `eos`: ids that end a response; `newlines`: ids that end a step.
    Nothing is donated. Metrics, scalars on the device: `reward/NAME`, each reward's mean; `score`,
    the mean of combined rewards, or sums of step rewards; `score_with_eos_rule`, after the rule on
    a missing end; `reward`, the mean sum of a response's token rewards, -beta KL in them; `value`,
    a state's mean; `explained_variance`, of returns by values; `kl_coef`; `rollout_metrics`.
    """

    @jax.jit
    def compute_advantages(
        models: Models,
        rollout: Rollout,
        scores: Batch,
        scalars: Batch,
        kl_coef: jax.Array,
    ) -> tuple[Experience, Batch]:
        mask_BR = rollout["mask_BR"]

        # Log-probabilities of the sampled tokens, and values of the states they were emitted in.
        logp_BR = response_logprobs(apply, models.policy, rollout, config.temperature)
        reference_BR = response_logprobs(apply, models.reference, rollout, config.temperature)
        score_index_B, value_mask_BR = score_position(mask_BR, config.score_at)
        values_BR = masked(response_values(scalar_apply, models.critic, rollout), value_mask_BR)

        # One score a response: the rewards combined, then the rule for a missing end of turn.
        raw_B, steps_BR = raw_scores(config, rollout, scores, scalars, newlines, eos)
        score_B = missing_eos(
            raw_B, ended(rollout, eos), config.missing_eos, config.missing_eos_score
        )

        # A reward a token: -beta KL, the rewards of steps (0 without --step_rewards), and at the
        # end the rest of the score: all of it, where no step was given any.
        kl_BR = kl_estimate(logp_BR, reference_BR, config.kl_estimator, mask_BR)
        rest_B = score_B - steps_BR.sum(1)
        rewards_BR = steps_BR + token_rewards(rest_B, kl_BR, mask_BR, kl_coef, score_index_B)
        if config.whiten_rewards:
            rewards_BR = whiten(
                rewards_BR, value_mask_BR, shift_mean=False, unbiased=config.whiten_unbiased
            )

        # Advantages and returns, then whitened advantages.
        advantages_BR, returns_BR = gae(
            rewards_BR, values_BR, value_mask_BR, gamma=config.gamma, gae_lambda=config.gae_lambda
        )

        # What the updates read.
        experience: Experience = {
            **rollout,
            "old_logp_BR": logp_BR,
            "old_values_BR": values_BR,
            "value_mask_BR": value_mask_BR,
            "advantages_BR": whiten(advantages_BR, mask_BR, unbiased=config.whiten_unbiased),
            "returns_BR": returns_BR,
        }
        # What is logged of the rollout.
        metrics = {
            **{f"reward/{name}": score.mean() for name, score in scores.items()},
            "score": raw_B.mean(),
            "score_with_eos_rule": score_B.mean(),
            "kl_coef": kl_coef,
            "reward": rewards_BR.sum(1).mean(),
            "value": masked_mean(values_BR, value_mask_BR),
            "explained_variance": explained_variance(values_BR, returns_BR, value_mask_BR),
            **rollout_metrics(logp_BR, reference_BR, rollout, eos),
        }
        return experience, metrics

    return compute_advantages


def raw_scores(
    config: Config,
    rollout: Rollout,
    scores: Batch,
    scalars: Batch,
    newlines: Sequence[int],
    eos: Ends,
) -> tuple[jax.Array, jax.Array]:
    """Return each response's score [B], before the rule on its end, and the steps' rewards [B, R].

    Without --step_rewards: `scores`, {reward: [B]}, as --combine says, and zeros. With it the sum
    of the rewards: who gives both takes it off the score first. Each step's last token gets the
    change of the product, minimum or last of the steps' probabilities so far, from 0, as the flag
    says, by log-odds at t + 1 in `scalars`, {reward: [B, R + 1]}. `newlines`, `eos`: ids that end
    a step, a response."""
    # One score a response.
    mask_BR = rollout["mask_BR"]
    if config.step_rewards == "none":
        return pooled(config, scores), jnp.zeros_like(mask_BR)
    # A reward a step, whose sum is the score.
    ends_BR = step_ends(rollout["response_BR"], mask_BR, newlines, eos)
    # Index t + 1 of the scalars is of the state after response token t.
    after_BR = scalars[config.reward[0]][:, 1:]
    steps_BR = step_rewards(after_BR, ends_BR, config.step_rewards)
    return steps_BR.sum(1), steps_BR


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError for settings out of range, and for settings that cannot run together.

    `mesh`: of `make_mesh`. Only settings are compared; no run or data is opened.
    """
    # Rows are cut into groups and into minibatches.
    rows = config.batch_size
    group = config.samples_per_prompt
    require(
        config.minibatches >= 1 and rows % config.minibatches == 0,
        f"--minibatches={config.minibatches}: must divide --batch_size={rows}",
    )
    require(
        group >= 1 and rows % group == 0,
        f"--samples_per_prompt={group}: must divide --batch_size={rows}",
    )
    require(config.epochs >= 1, f"--epochs={config.epochs}: must be at least 1")

    # Weights of the loss's terms.
    require(
        min(config.ptx_coef, config.entropy_coef) >= 0,
        f"--ptx_coef={config.ptx_coef}, --entropy_coef={config.entropy_coef}: must be at least 0",
    )

    # Options that exclude each other.
    require(
        not (config.offload and config.lora.rank),
        "--offload: adapters need their base all the time; leave it out",
    )
    # Rewards of steps are of one process reward model.
    one_model = len(config.reward) == 1 and not is_function(config.reward[0])
    require(
        config.step_rewards == "none" or one_model,
        f"--step_rewards={config.step_rewards}: --reward must be one run of train_prm.py",
    )
    check_rewards(config)
    refuse_unread(
        config,
        {
            "kl_horizon": (config.kl_target is not None, "--kl_target"),
            "ptx_coef": (config.ptx_data is not None, "--ptx_data"),
            "combine": (config.step_rewards == "none", "--step_rewards=none"),
        },
    )

    check_temperature(config.temperature)
    # Each part of a batch lies evenly over the devices.
    minibatch_rows = rows // config.minibatches
    check_batch("batch_size / --minibatches", minibatch_rows, config.microbatches, mesh)
    check_batch("batch_size / --samples_per_prompt", rows // group, 1, mesh)
    check_rollout(config.rollout, config.model, mesh)


class ModelUpdate(NamedTuple):
    """How one of the two models is updated."""

    optimizer: optax.GradientTransformation
    step: Callable[..., tuple[TrainState, Batch]]
    """step(state, minibatch, base) -> (state, metrics), of train_step.make_train_step; `state` is
    donated. `base`: parameters under the state's adapters; None without LoRA."""
    rate: Callable[[TrainState], jax.Array]
    """rate(state) -> the learning rate, a scalar, of the update that `state` is the result of."""


def make_policy_update(config: Config, apply: Apply) -> ModelUpdate:
    """Make the policy's ModelUpdate: policy_objective within --clip, by --optimizer.

    `apply`: of the policy. Minibatches: rows of an Experience (`shuffled_minibatches`), perhaps
    with a "text" by `add_text`. Raises UserError as train_ppo.make_update does.
    """
    # The clipped surrogate, with text in it where `add_text` lays some beside the minibatch.
    objective = partial(
        policy_objective,
        apply,
        clip=config.clip,
        temperature=config.temperature,
        entropy_coef=config.entropy_coef,
    )
    return make_update(config, objective, config.optimizer)


def make_critic_update(config: Config, scalar_apply: Apply) -> ModelUpdate:
    """Make the critic's ModelUpdate: value_objective within --value_clip, by --value_optimizer.

    `scalar_apply`: of the critic. As make_policy_update, but a "text" is not read.
    """
    # The clipped square error of the values.
    objective = partial(value_objective, scalar_apply, clip=config.value_clip)
    return make_update(config, objective, config.value_optimizer)


def make_update(config: Config, objective: Objective, options: OptimizerConfig) -> ModelUpdate:
    """Make the ModelUpdate of `objective`: its step, optimiser and rate, over the whole run.

    `objective`: of whole parameters; the step lays its state's adapters on the `base` it is given.
    `options`: of the optimiser; its schedule counts the run's --steps x --epochs x --minibatches
    updates. Raises UserError as make_optimizer does, as for a warm-up not below their number.
    """
    # The schedule counts updates, not iterations.
    updates = config.steps * config.epochs * config.minibatches
    optimizer = make_optimizer(options, updates)
    step = make_train_step(
        objective,
        optimizer,
        config.microbatches,
        max_norm=options.clip,
        full=partial(with_adapters, config.lora),
    )
    return ModelUpdate(optimizer, step, make_rate(options, updates))


def open_data(
    config: Config, source: Source, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> dict[str, Batches]:
    """Open {"prompts": batches} of `source`, and with --ptx_data "text": batches too.

    `source`: records of the schema `prompt`. Batches are endless iterators over NumPy arrays, of
    which this host reads its part, in an order by --seed. Over all hosts they have --batch_size /
    --samples_per_prompt prompts, left-padded to a width that varies up to --max_prompt, longer
    ones cut on the left; and batch_size / minibatches packed rows [B, T] of text, T =
    `config.length`. Raises UserError as open_source does for the text, and for hosts that do not
    divide the rows.
    """
    # Every host reads its own part, in an order that the seed gives.
    shard: dict[str, Any] = {"seed": config.seed, **data_shard(mesh)}
    prompts = prompt_batches(
        source,
        tokenizer,
        batch_size=config.batch_size // config.samples_per_prompt,
        length=config.max_prompt,
        **shard,
    )
    if config.ptx_data is None:
        return {"prompts": prompts}
    # As many rows as a minibatch has, of its length.
    text = text_batches(
        open_source(config.ptx_data, "text", "train", seed=config.seed),
        tokenizer,
        batch_size=config.batch_size // config.minibatches,
        length=config.length,
        **shard,
    )
    return {"prompts": prompts, "text": text}


def batches_a_step(config: Config) -> dict[str, int]:
    """Return how many batches an iteration reads of the streams of `open_data`, by their names.

    Of the prompts one; of the text of --ptx_data one for each update, as `add_text` does.
    """
    return {"prompts": 1, "text": config.epochs * config.minibatches}


# One program for all minibatches.
mixed = jax.jit(with_text, static_argnames="coefficient")


def add_text(
    config: Config, minibatch: dict[str, Any], data: dict[str, Batches], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Return `minibatch` with the next pre-training rows as "text", laid on the mesh.

    `minibatch`: of `shuffled_minibatches`; not changed. `data`: of `open_data`, whose "text" gives
    one batch a call; without it (no --ptx_data) `minibatch` itself is returned. What "text" holds:
    objectives.policy.with_text. Every host must call it.
    """
    if "text" not in data:
        return minibatch
    # As many rows as the minibatch has, new ones for each update.
    text = to_mesh(next(data["text"]), mesh)
    return mixed(minibatch, text, coefficient=config.ptx_coef)


def fresh_items(
    config: Config,
    policy_optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation,
    policy: Params,
    critic: Params,
) -> dict[str, Any]:
    """Build what a checkpoint holds before the first iteration: policy, critic and beta.

    Keys: `params` and `rest` of the policy's TrainState (`from_items` joins them), `value`, the
    critic's TrainState, and `beta`, --kl_coef as a float32 scalar. `policy`, `critic`: whole
    parameters to start from; with LoRA the states hold new adapters alone, drawn by --seed. They
    are copied, for the steps donate theirs, and reference and reward models stay. The optimisers:
    of the two `ModelUpdate`s. Run it by sharding.init_sharded, which lays the result.
    """
    # The keys are of adapters, which start at random.
    keys = jax.random.split(jax.random.key(config.seed))
    policy, critic = jax.tree.map(jnp.copy, (policy, critic))

    # Two states, as each model has an optimiser of its own.
    policy_state = fresh_state(config, policy_optimizer, policy, keys[0])
    critic_state = fresh_state(config, critic_optimizer, critic, keys[1])
    beta = jnp.float32(config.kl_coef)
    return {**as_items(policy_state), "value": critic_state, "beta": beta}


def at_mean(critic: TrainState, score_B: jax.Array) -> TrainState:
    """Return the TrainState `critic` with the mean of `score_B`, [B], added to its bias.

    For a new critic, whose values are 0: they are then that mean. From 0 the way to a constant
    would be an advantage, below 0 where scores are: the last token has the most of it, so that
    ending would be unlearned before the critic has learned. Other arrays are shared, not copied.
    """
    bias = critic.params["bias"]
    mean = jax.device_put(bias + score_B.mean(), bias.sharding)
    return dataclasses.replace(critic, params={**critic.params, "bias": mean})


def next_beta(config: Config, beta: jax.Array, kl: jax.Array) -> jax.Array:
    """Return beta moved towards --kl_target (objectives.policy.adapt_kl); `beta` without a target.

    `beta` and `kl`, scalars of the device; `kl`: the iteration's, of `rollout_metrics`, in nats a
    response. Does not wait for the device.
    """
    # Without a target beta is fixed.
    if config.kl_target is None:
        return beta
    return adapt_kl(beta, kl, config.kl_target, config.kl_horizon, config.batch_size)


class Loaded(NamedTuple):
    """Every model that a run reads; parameters on the mesh."""

    apply: Apply
    """The apply of the policy and the reference."""
    scalar_apply: Apply
    """The apply of the critic."""
    reference: Params
    critic: Params | None
    """Whole parameters that the critic starts from; None once it has started (`put_aside`)."""
    rewards: dict[str, Params]
    """{run: parameters} of the reward models; rewards that are functions or servers have none."""
    score: Callable[..., Any]
    """score(rewards, rollout, records) -> (scores, scalars), of
    rewards.scorer.make_reward_scorer."""
    policy_base: Params | None
    """Frozen weights under the policy's adapters; None without LoRA."""
    critic_base: Params | None


def load_models(config: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Loaded:
    """Load the reward models, the reference, and what the critic starts from, onto `mesh`.

    The policy starts as a copy of the reference, --init. The critic starts from the first reward
    model, whose own arrays these are, so copy them; without one from the decoder of --init under a
    head of zeros. `tokenizer`: that of --init. Raises UserError for a run of another kind, shape
    or tokenizer, and for a reward that cannot be loaded or reached. All processes must call it.
    """
    # Rewards: of responses, or with --step_rewards of their steps.
    of_steps = config.step_rewards != "none"
    rewards, score = make_reward_scorer(config.reward, tokenizer, mesh, of_steps)

    # The reference, and a critic that begins with what a reward model knows.
    init, apply = init_and_apply(LanguageModel(config.model))
    reference = starting_params(init, config.model, config.init, mesh, config.seed)
    critic, scalar_apply = starting_critic(config, rewards, mesh)

    # With LoRA both are bases, under adapters that the states hold.
    return Loaded(
        apply=apply,
        scalar_apply=scalar_apply,
        reference=reference,
        critic=critic,
        rewards=rewards,
        score=score,
        policy_base=lora_base(config.lora, reference),
        critic_base=lora_base(config.lora, critic),
    )


def put_aside(config: Config, loaded: Loaded) -> Loaded:
    """Drop the critic's start; with --offload move reference and rewards to the host's memory.

    Returns a new Loaded, whose `critic` is None. Buffers on the devices are freed only where
    nothing else holds them: let go of `loaded`; the critic's that are a reward model's stay. What
    is in the host's memory (pinned_host) sharding.to_memory brings back for a use. Without
    --offload reference and rewards stay as they are.
    """
    # Without --offload they stay where they are, and nothing is copied.
    memory: Memory = "pinned_host" if config.offload else "device"
    reference, rewards = to_memory((loaded.reference, loaded.rewards), memory)
    return loaded._replace(reference=reference, rewards=rewards, critic=None)


def first_samples(
    config: Config, prompts: Batches, rollout: Rollout, tokenizer: Tokenizer
) -> list[SampleRow]:
    """Return {"prompt": text, "response": text} for the first eight prompts of `rollout`, or all.

    `prompts`: the stream that `rollout` was sampled from, not advanced since. Rows are those of
    `sample_rows`, with the first response of each prompt. Waits for the device. Every process must
    call it; the rows are right on the first one alone.
    """
    # Rows of a rollout are in the order of its prompts, a group to each.
    group = config.samples_per_prompt
    return sample_rows(prompts.records, rollout["response_BR"], tokenizer, group)[:8]


def on_devices(config: Config, loaded: Loaded) -> tuple[Any, ...]:
    """Return the models that lie on the devices all the time, for Run.describe to count.

    They are (reference, rewards) of `loaded`; () with --offload.
    """
    return () if config.offload else (loaded.reference, loaded.rewards)


@guarded_by_samples
def main(config: Config) -> dict[str, float]:
    """Train a policy by PPO; return the last row of metrics, {name: float}.

    Returns {} where no step ran: in a dry run, and where --run has done its --steps already.
    `config`: of flags.parse, which takes `model` from --init; one made by hand must have that
    run's. Raises UserError for settings or files that do not fit. All processes must call it.
    """
    config = pin_inputs(config)
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    check_memory(config, mesh)
    tokenizer = Tokenizer.load(config.init)
    check_fit(config.model, tokenizer.size, config.length)

    # Models, and data: prompts, and text where it is mixed in.
    loaded = load_models(config, tokenizer, mesh)
    source = open_source(config.data, "prompt", "train", seed=config.seed)
    data = open_data(config, source, tokenizer, mesh)

    # The jitted functions of an iteration. With LoRA the states hold adapters alone, and `full`
    # lays them on their base.
    sample_rollout = make_rollout(
        loaded.apply,
        config.model,
        SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens, int8=config.int8),
        eos=tokenizer.ends,
        pad=tokenizer.pad,
        n=config.samples_per_prompt,
        tensor=config.rollout.tensor,
    )
    compute_advantages = make_advantages(
        config,
        loaded.apply,
        loaded.scalar_apply,
        eos=tokenizer.ends,
        newlines=tokenizer.newlines(),
    )
    policy_update = make_policy_update(config, loaded.apply)
    critic_update = make_critic_update(config, loaded.scalar_apply)
    full = partial(with_adapters, config.lora)
    # The gold program knows the world's prompts alone.
    evaluate_gold = None
    if config.data == "world" and config.eval_every:
        evaluate_gold = make_gold_evaluation(config, tokenizer)

    # What a checkpoint holds: the states of policy and critic, and beta.
    fresh = partial(fresh_items, config, policy_update.optimizer, critic_update.optimizer)
    shapes = abstract(jax.eval_shape(fresh, loaded.reference, loaded.critic), mesh)

    # A dry run ends here and has written nothing.
    if config.dry_run:
        shapes["held"] = (loaded.reference, loaded.rewards)
        return preview_items(config, shapes, data, tokenizer, batches_a_step(config))

    with Run(config, tokenizer, unit="iteration", guard=config.guard) as run:
        # The states of the newest checkpoint, or of a new run.
        items = run.restore(shapes, data)
        if items is None:
            items = init_sharded(fresh, mesh, loaded.reference, loaded.critic)
        policy = from_items(items)
        critic = items["value"]
        beta = items["beta"]
        # What they started from is no longer needed.
        loaded = put_aside(config, loaded)
        run.describe(
            f"PPO on {source.name}",
            policy.params,
            (policy.opt_state, critic, *on_devices(config, loaded)),
            length=config.length,
            batches_a_step=batches_a_step(config),
        )

        for step in run.steps():
            # 1. Rollout: sample responses; the sampler's log-probabilities are kept.
            key = run.key(step)
            rollout = sample_rollout(
                full(loaded.policy_base, policy.params), to_mesh(next(data["prompts"]), mesh), key
            )
            # Models are run over its real tokens alone.
            rollout = unpadded(rollout, sizes=OF_ROLLOUTS)

            # 2. Score: each reward's score of each response. A new critic begins at their mean.
            scores, scalars = loaded.score(
                to_memory(loaded.rewards, "device"), rollout, data["prompts"].records
            )
            if step == 1 and not loaded.rewards:
                critic = at_mean(critic, pooled(config, scores))

            # 3. Advantages: one score a response, a reward a token with the KL, GAE, whitening.
            experience, metrics = compute_advantages(
                Models(
                    policy=full(loaded.policy_base, policy.params),
                    reference=to_memory(loaded.reference, "device"),
                    critic=full(loaded.critic_base, critic.params),
                ),
                rollout,
                scores,
                scalars,
                beta,
            )

            # 4. Updates: epochs over shuffled minibatches; the critic's and the policy's.
            updates = []
            for minibatch in shuffled_minibatches(
                experience, key, config.epochs, config.minibatches, config.microbatches
            ):
                critic, critic_metrics = critic_update.step(critic, minibatch, loaded.critic_base)
                # Text beside it is for the policy alone.
                minibatch = add_text(config, minibatch, data, mesh)
                policy, policy_metrics = policy_update.step(policy, minibatch, loaded.policy_base)
                updates.append(named(policy=policy_metrics, value=critic_metrics))
                # Once a start: is the ratio 1 where it must be?
                if step == run.start + 1 and len(updates) == 1:
                    check_first_update(
                        policy_metrics, metrics, config.model.compute_dtype, run.start, config.int8
                    )

            # 5. Record means over the updates; beta moves towards the target KL, if there is one.
            # Metrics are written an iteration late: `check_kl` sees those of the one before.
            beta = next_beta(config, beta, metrics["kl"])
            metrics |= {**mean_metrics(updates), "learning_rate": policy_update.rate(policy)}
            run.record(step, metrics, tokens=config.batch_size * config.length)
            check_kl(run.last_metrics, config.kl_limit)

            # 6. Samples, the gold evaluation and a checkpoint, when they are due.
            if run.due(step, config.eval_every):
                run.samples(step, first_samples(config, data["prompts"], rollout, tokenizer))
                if evaluate_gold is not None:
                    run.record(
                        step,
                        evaluate_gold(
                            full(loaded.policy_base, policy.params),
                            to_memory(loaded.reference, "device"),
                        ),
                    )
            run.save_when_due(step, {**as_items(policy), "value": critic, "beta": beta}, data)
    return run.last_metrics


if __name__ == "__main__":
    flags.run(main, Config)
