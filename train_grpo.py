"""Online RL without a critic: grpo, dr_grpo, dapo, gspo, rloo, reinforce_pp; any rewards.

    python train_grpo.py --init=runs/align/sft --reward=runs/align/rm --run=runs/grpo
    python train_grpo.py --method=rloo --reward runs/rm runs/harm --combine=gated --run=runs/gated
    python train_grpo.py --method=dapo --data=sums.jsonl --reward=tasks.answers:number \\
        --run=runs/sums

A method is an entry of `make_method` here and of PAPERS in objectives/group.py, where its
mathematics is.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from data.bad_rows import OnBadRow
from data.batches import Batches, prompt_batches
from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from evaluation.gold import make_gold_evaluation
from lora import LoraConfig, with_adapters
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit
from objectives import group
from objectives.policy import (
    Combine,
    MissingEos,
    kl_estimate,
    missing_eos,
    response_logprobs,
    score_position,
    token_rewards,
)
from planning.dry_run import preview
from planning.memory import check_memory
from rewards.scorer import check_rewards, is_function, make_reward_scorer, pooled
from rollout import (
    Batch,
    Rollout,
    RolloutConfig,
    Score,
    check_first_update,
    check_kl,
    check_rollout,
    ended,
    make_experience,
    make_rollout,
    mean_metrics,
    named,
    rollout_metrics,
    sample_rows,
    shuffled_minibatches,
)
from runtime import flags
from runtime.errors import refuse_unread, require
from runtime.flags import with_paper_defaults
from runtime.guard import GuardConfig, guarded_by_samples
from runtime.hosts import HostsConfig
from sampling import Apply, Ends, SamplingConfig, check_temperature
from sharding import MeshConfig, check_batch, data_shard, make_mesh
from train_state import Init, as_items, pin_inputs, starting_params
from train_step import (
    Objective,
    OptimizerConfig,
    Update,
    make_optimizer,
    make_rate,
    make_train_step,
)
from training_run import Run

Advantages = Callable[[jax.Array, jax.Array], jax.Array]
"""advantages(rewards_BR, mask_BR) -> [B, R] float32, 0 where masked; of `make_method`."""


@dataclasses.dataclass(frozen=True)
class Config:
    # Folders and method
    run: str = "runs/grpo"
    """Folder of this run; running again resumes it."""
    init: str = "runs/align/sft"
    """Run that policy and reference start from."""
    method: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp"] = "grpo"
    """Fills fields left at None with its paper's values (PAPERS in objectives/group.py)."""

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

    # Prompts
    data: str = "world"
    """Prompts: world, files, or tfds:<name>."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, and list them."""

    # Sizes of an iteration
    steps: int = 40
    """Iterations."""
    batch_size: int = 256
    """Rollouts per iteration, over all devices."""
    samples_per_prompt: int | None = None
    """Rollouts that share a prompt: a group."""
    minibatches: int = 4
    """Updates per epoch; divides batch_size."""
    epochs: int = 1
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

    # Loss
    ratio: Literal["token", "sequence", "geometric"] | None = None
    """Importance ratio of a token: its own, its whole response's, or the geometric mean over the
    response."""
    average: Literal["sequence", "tokens", "constant"] | None = None
    """sequence: mean over a response's tokens, then over responses. tokens: mean over all tokens.
    constant: sum over a response's tokens / max_new_tokens, then mean over responses."""
    clip: float | None = None
    """The ratio is clipped below at 1 - clip; inf: never."""
    clip_high: float | None = None
    """The ratio is clipped above at 1 + clip_high."""

    # KL to the reference
    kl_coef: float | None = None
    """Beta of the KL to the reference."""
    kl_in: Literal["loss", "reward"] | None = None
    """loss: a penalty per token, averaged by --average. reward: part of the return, so earlier
    tokens are charged for later drift; only this has the optimum pi_ref exp(r / beta) / Z."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimate of KL per token (objectives/policy.py). In the loss k2 has the gradient of
    KL(policy || reference), k3 that of KL(reference || policy)."""

    # Groups
    unbiased_std: bool = False
    """Variances divided by n - 1 (TRL, verl) instead of n."""
    dynamic_sampling: bool | None = None
    """Leave groups of equal scores out, and sample other prompts in their place."""
    max_rounds: int = 4
    """Most rollouts of an iteration with --dynamic_sampling; groups still missing are left out."""

    # What is added to the score
    overlong: float | None = None
    """Share of max_new_tokens, the last, over which a penalty on the score grows from 0 to 1."""
    missing_eos: MissingEos = "lowest"
    """Rule for a response without an end. lowest: its score is below all of the batch. Else it
    becomes `missing_eos_score` (replace), has it added (penalty), or stays (none)."""
    missing_eos_score: float = -1.0
    """Score of a response without an end (replace), or what is added to it (penalty)."""
    entropy_coef: float = 0.0
    """Alpha: each token's reward gets -alpha log pi, to explore; longer responses get more."""
    shaping: float = 0.0
    """Weight of a potential in the reward: the first reward model's scalar at each token
    (reinforce_pp)."""

    # Update
    kl_limit: float = 50.0
    """The run ends in an error when KL per response exceeds this: the policy has collapsed."""
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=2e-4, schedule="linear", warmup=0, final_lr=0.1, beta2=0.999, eps=1e-5, weight_decay=0.0
    )
    """The policy's optimiser."""
    model: ModelConfig = ModelConfig()
    """The policy's architecture; taken from --init."""
    lora: LoraConfig = LoraConfig()
    """Adapters of the policy; the reference is then their base."""

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
    eval_every: int = 10
    """Iterations between gold evaluations on held-out prompts (world only)."""
    save_every: int = 10
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""

    @property
    def length(self) -> int:
        """Return the tokens of a row, `max_prompt` + `max_new_tokens`: a property."""
        return self.max_prompt + self.max_new_tokens

    @property
    def updates(self) -> int:
        """Return the updates of the run, which the schedule counts: a property.

        They are --steps x --epochs x --minibatches; no field of the method is read.
        """
        return self.steps * self.epochs * self.minibatches


# Flags that only some methods read; their mathematics has no place for them elsewhere.
READ_BY = {
    "unbiased_std": ("grpo", "dapo", "gspo", "reinforce_pp"),
    "shaping": ("reinforce_pp",),
}


class Experience(Rollout):
    """A rollout and the targets of its updates, float32."""

    old_logp_BR: jax.Array
    """Log-probabilities by the policy that sampled, recomputed by the training code."""
    reference_BR: jax.Array
    """Log-probabilities by the reference."""
    advantages_BR: jax.Array
    total_B: jax.Array
    """The sum of a response's rewards, the KL included where it is in the reward."""


def make_method(config: Config, apply: Apply) -> tuple[Advantages, Objective]:
    """Return the advantages and the objective of --method, as functions.

    `config`: of runtime.flags.with_paper_defaults, with no field of the method at None. `apply`:
    of the policy. advantages(rewards_BR, mask_BR) -> [B, R] float32, 0 where `mask_BR` is 0:
    `rewards_BR` are all that a token gets, with --kl_in=reward less its KL, and must be 0 after a
    row's last token; rows are in groups of `samples_per_prompt` neighbours. objective(params,
    batch) -> sums, a train_step.Objective: `params` are the policy's alone, whole; `batch` is an
    Experience, whose `reference_BR` the KL is measured by; it is in the loss only with
    --kl_in=loss.
    """
    # Advantages of whole responses, from their group; of tokens, from the whole batch.
    size = config.samples_per_prompt
    of_group: dict[str, Callable[[jax.Array], jax.Array]] = {
        "normalised": partial(group.normalised, unbiased=config.unbiased_std),
        "centred": group.centred,
        "leave_one_out": group.leave_one_out,
    }
    by_group = {
        name: partial(group.by_response, advantage, group=size)
        for name, advantage in of_group.items()
    }
    over_batch = partial(group.reinforce_pp, group=size, unbiased=config.unbiased_std)
    advantages = {
        "grpo": by_group["normalised"],
        "dr_grpo": by_group["centred"],
        "dapo": by_group["normalised"],
        "gspo": by_group["normalised"],
        "rloo": by_group["leave_one_out"],
        "reinforce_pp": over_batch,
    }[config.method]

    # One objective, whose settings tell the methods apart.
    objective = partial(
        group.surrogate_objective,
        apply,
        ratio=config.ratio,
        average=config.average,
        clip=config.clip,
        clip_high=config.clip_high,
        kl_coef=config.kl_coef if config.kl_in == "loss" else 0.0,
        kl_estimator=config.kl_estimator,
        temperature=config.temperature,
    )
    return advantages, objective


def make_advantages(
    config: Config, apply: Apply, advantages: Advantages, *, eos: Ends
) -> Callable[..., tuple[Experience, Batch]]:
    """Compile compute_advantages(policy, reference, rollout, scores, scalars).

    It returns (Experience, metrics). `config`: of with_paper_defaults, with no field of the method
    at None. `policy`, `reference`: whole parameters that `apply` takes, both needed without a KL
    too; nothing is donated. `rollout`: a Rollout on the mesh. `advantages`: of `make_method`.
    `scores`: {reward: [B]} for each of --reward, pooled by --combine. `scalars`: {reward: [B, R +
    1]}, of which with --shaping the first reward's, a reward model's, are read, else none. Both
    are of rewards.scorer.make_reward_scorer. `eos`: ids that end a response. With
    --dynamic_sampling `mask_BR` of the Experience is 0 in every row of a group whose scores, after
    the rule --missing_eos, are all equal, so that it counts nowhere. Metrics are scalars on the
    device, means over all of the rollout's rows: `reward/NAME` of each reward, `score` (pooled),
    `score_with_eos_rule` (after that rule), `groups_with_signal` (share of groups whose scores
    differ), and those of `rollout_metrics`.
    """
    size = config.samples_per_prompt

    @jax.jit
    def compute_advantages(
        policy: Params,
        reference: Params,
        rollout: Rollout,
        scores: Batch,
        scalars: Batch,
    ) -> tuple[Experience, Batch]:
        # Log-probabilities of the sampled tokens, by the policy and by the reference.
        mask_BR = rollout["mask_BR"]
        logp_BR = response_logprobs(apply, policy, rollout, config.temperature)
        reference_BR = response_logprobs(apply, reference, rollout, config.temperature)

        # One score a response: the rewards combined, then the rule for a missing end of turn.
        raw_B = pooled(config, scores)
        ruled_B = missing_eos(
            raw_B, ended(rollout, eos), config.missing_eos, config.missing_eos_score
        )
        score_B = ruled_B
        if config.overlong:
            # The window is a share of the longest response.
            longest = config.max_new_tokens
            score_B += group.overlong_penalty(mask_BR.sum(1), longest, config.overlong * longest)

        # A reward a token: the score at the last one, less the costs that are in the reward.
        cost_BR = config.entropy_coef * logp_BR
        if config.kl_in == "reward":
            kl_BR = kl_estimate(logp_BR, reference_BR, config.kl_estimator, mask_BR)
            cost_BR += config.kl_coef * kl_BR
        last_B, _ = score_position(mask_BR, "last")
        rewards_BR = token_rewards(score_B, cost_BR, mask_BR, 1.0, last_B)
        if config.shaping:
            # Index t of the scalars is of the state before response token t.
            before_BR = scalars[config.reward[0]][:, :-1]
            rewards_BR = group.shaped(rewards_BR, config.shaping * before_BR, mask_BR)

        # Groups of equal scores have no signal; dynamic sampling leaves them out.
        signal_Q = jnp.ptp(ruled_B.reshape(-1, size), axis=1) > 0
        kept_BR = mask_BR
        if config.dynamic_sampling:
            kept_BR = mask_BR * jnp.repeat(signal_Q, size)[:, None]

        # What the updates read; advantages are of the whole rollout, before anything is left out.
        experience: Experience = {
            **rollout,
            "old_logp_BR": logp_BR,
            "reference_BR": reference_BR,
            "advantages_BR": advantages(rewards_BR, mask_BR),
            "total_B": rewards_BR.sum(1),
            "mask_BR": kept_BR,
        }
        # What is logged of the rollout.
        metrics = {
            **{f"reward/{name}": score.mean() for name, score in scores.items()},
            "score": raw_B.mean(),
            "score_with_eos_rule": ruled_B.mean(),
            "groups_with_signal": signal_Q.mean(),
            **rollout_metrics(logp_BR, reference_BR, rollout, eos),
        }
        return experience, metrics

    return compute_advantages


def make_update(config: Config, init: Init, objective: Objective) -> Update:
    """Make the policy's Update: its optimiser over `config.updates`, its loss and its jitted step.

    No field of the method is read of `config`. `init`: of the policy, handed through. `objective`:
    of `make_method`. Batches: rows of an Experience (`shuffled_minibatches`). The step donates its
    state; its `base` is the parameters under the adapters, None without LoRA. Raises UserError as
    make_optimizer does.
    """
    optimizer = make_optimizer(config.optimizer, config.updates)
    step = make_train_step(
        objective,
        optimizer,
        config.microbatches,
        max_norm=config.optimizer.clip,
        full=partial(with_adapters, config.lora),
    )
    return Update(init, optimizer, objective, step)


def check_flags(given: Config, config: Config) -> None:
    """Raise UserError for a changed flag that --method or another setting leaves unread.

    They are `unbiased_std`, `shaping`, `kl_in` and `max_rounds`; one at its default passes.
    `given`: before with_paper_defaults, as the user gave it. `config`: what that made of it.
    """
    # Flags of single methods.
    readers = {}
    for name, methods in READ_BY.items():
        readers[name] = (config.method in methods, f"--method={' or '.join(methods)}")
    # Flags of other flags.
    refuse_unread(
        given,
        {
            **readers,
            "kl_in": (config.kl_coef > 0, "a --kl_coef above 0"),
            "max_rounds": (config.dynamic_sampling, "--dynamic_sampling"),
        },
    )


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError for settings out of range, and for settings that cannot run together.

    Among them the rewards (check_rewards; none is loaded), `check_group`, and sizes that the mesh
    does not divide; not `check_flags`. `config`: of with_paper_defaults, with no field of the
    method at None (TypeError otherwise). `mesh`: of `make_mesh`.
    """
    # What is rewarded, and how many responses are compared.
    check_rewards(config)
    check_group(config)

    # Rows are cut into minibatches, over and over.
    rows = config.batch_size
    require(
        config.minibatches >= 1 and rows % config.minibatches == 0,
        f"--minibatches={config.minibatches}: must divide {rows} rows",
    )
    require(
        min(config.epochs, config.max_rounds) >= 1,
        f"--epochs={config.epochs}, --max_rounds={config.max_rounds}: must be at least 1",
    )

    # The KL: its weight, and an estimate that has a gradient where it is.
    require(config.kl_coef >= 0, f"--kl_coef={config.kl_coef}: must be at least 0")
    k1_in_loss = config.kl_in == "loss" and config.kl_estimator == "k1"
    require(
        config.kl_coef == 0 or not k1_in_loss,
        "--kl_estimator=k1: in the loss its gradient is 0 on average; use k2 or k3, or "
        "--kl_in=reward",
    )

    # Ranges of the other terms.
    require(
        config.clip > 0 and config.clip_high > 0,
        f"--clip={config.clip}, --clip_high={config.clip_high}: must be above 0",
    )
    require(0 <= config.overlong <= 1, f"--overlong={config.overlong}: must be in 0..1")
    require(
        config.shaping == 0 or not is_function(config.reward[0]),
        "--shaping: its potential is a reward model's; name a train_rm run first in --reward",
    )

    check_temperature(config.temperature)
    # Each part of a batch lies evenly over the devices.
    minibatch_rows = rows // config.minibatches
    groups = rows // config.samples_per_prompt
    check_batch("batch_size / --minibatches", minibatch_rows, config.microbatches, mesh)
    check_batch("batch_size / --samples_per_prompt", groups, 1, mesh)
    check_rollout(config.rollout, config.model, mesh)


def note_rounding(config: Config) -> None:
    """Say on stderr, on process 0 alone, where rounding may move a ratio beyond its clip.

    That is with --ratio=geometric in a compute type of less than 32 bits; else nothing is said.
    `config`: of with_paper_defaults, which alone gives --method=gspo that ratio.
    """
    # A mean over a response is clipped near 1; sampled and trained, a token differs by rounding.
    is_rounded = config.model.compute_dtype.itemsize < 4
    if config.ratio == "geometric" and is_rounded and jax.process_index() == 0:
        print(
            f"note: --ratio=geometric in {config.model.compute_dtype}: rounding alone is up to "
            f"0.004 nats a token, more than --clip={config.clip} of a short response's mean; "
            "give --model.dtype=float32",
            file=sys.stderr,
        )


def check_group(config: Config) -> None:
    """Raise UserError for a group size that does not divide --batch_size, or is too small.

    The size, `samples_per_prompt`, must not be None (TypeError). It must be at least 2, so that
    responses are compared, but for reinforce_pp without --dynamic_sampling at least 1.
    """
    # Groups are cut from the batch.
    size = config.samples_per_prompt
    require(
        size >= 1 and config.batch_size % size == 0,
        f"--samples_per_prompt={size}: must divide --batch_size={config.batch_size}",
    )
    # A response alone has none to be compared with, but where the whole batch is compared.
    alone = config.method == "reinforce_pp" and not config.dynamic_sampling
    require(
        size >= 2 or alone,
        f"--samples_per_prompt={size}: responses are compared in groups; give at least 2",
    )


def open_prompts(
    config: Config, source: Source, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> Batches:
    """Return endless batches of prompts, --batch_size / --samples_per_prompt over all hosts.

    `source`: records of the schema `prompt`, of which this host reads its part, in an order by
    --seed. Batches are NumPy arrays of this host's prompts, left-padded
    (data.batches.prompt_batches); longer ones than --max_prompt tokens are cut on the left.
    `.records` are those of the last batch. `config`: of with_paper_defaults, with no field of the
    method at None. Raises UserError where the hosts do not divide the prompts.
    """
    # Every host reads its own part, in an order that the seed gives.
    shard: dict[str, Any] = {"seed": config.seed, **data_shard(mesh)}
    groups = config.batch_size // config.samples_per_prompt
    return prompt_batches(source, tokenizer, batch_size=groups, length=config.max_prompt, **shard)


def load_score(config: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Score:
    """Load the rewards; return score(rollout, records) -> ({reward: [B]}, {reward: [B, R + 1]}).

    `reward`: the text of --reward. score takes a Rollout on the mesh, and a record for each of
    this host's prompts, in order. The first dict has the score of each response by each reward;
    the second, of reward models alone, the scalars at the prompt's last token and at the
    response's R, which mean nothing at padding. All are float32 on the mesh, where the models
    stay. For a function or a server score waits for the device, and raises UserError where it
    returns no finite number; what models give is not checked. All processes must call load_score
    and score.

    Raises UserError for a reward that cannot be loaded or reached, for a model of another
    tokenizer, and for a model of steps.
    """
    # The models stay on the mesh: they are given once for all.
    reward_models, score = make_reward_scorer(config.reward, tokenizer, mesh)
    return partial(score, reward_models)


@guarded_by_samples
def main(config: Config) -> dict[str, float]:
    """Train a policy by --method; return the last row of metrics, {name: float}.

    The row is the last of metrics.jsonl in --run; {} where no step ran: in a dry run, and where
    --run has done its --steps already. `config`: of flags.parse, before with_paper_defaults, which
    main calls. The parser takes `model` from --init; in a config made by hand it must be that
    run's. All processes must call it. Raises UserError for settings or files that do not fit.
    """
    # What the paper sets, and a mesh of all devices.
    given = config
    config = with_paper_defaults(config, config.method, group.PAPERS[config.method])
    check_flags(given, config)
    config = pin_inputs(config)
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    check_memory(config, mesh)
    note_rounding(config)
    tokenizer = Tokenizer.load(config.init)
    check_fit(config.model, tokenizer.size, config.length)

    # Data: prompts. The policy's functions: advantages and update, by the method.
    source = open_source(config.data, "prompt", "train", seed=config.seed)
    prompts = open_prompts(config, source, tokenizer, mesh)
    init, apply = init_and_apply(LanguageModel(config.model))
    advantages, objective = make_method(config, apply)
    update = make_update(config, init, objective)
    rate = make_rate(config.optimizer, config.updates)

    # Steps 1 to 3 of an iteration, which dynamic sampling repeats. With LoRA the state holds
    # adapters alone, and `full` lays them on their base.
    experience_of = make_experience(
        prompts,
        rollout=make_rollout(
            apply,
            config.model,
            SamplingConfig(
                config.temperature, max_new_tokens=config.max_new_tokens, int8=config.int8
            ),
            eos=tokenizer.ends,
            pad=tokenizer.pad,
            n=config.samples_per_prompt,
            tensor=config.rollout.tensor,
        ),
        score=load_score(config, tokenizer, mesh),
        compute_targets=make_advantages(config, apply, advantages, eos=tokenizer.ends),
        mesh=mesh,
        pad=tokenizer.pad,
        prompt_length=config.max_prompt,
        group=config.samples_per_prompt,
        max_rounds=config.max_rounds if config.dynamic_sampling else 1,
    )
    full = partial(with_adapters, config.lora)
    # The gold program knows the world's prompts alone.
    evaluate_gold = None
    if config.data == "world" and config.eval_every:
        evaluate_gold = make_gold_evaluation(config, tokenizer)

    # A dry run ends here and has written nothing.
    if config.dry_run:
        return preview(config, init, update.optimizer, mesh, prompts, tokenizer)
    with Run(config, tokenizer, unit="iteration", guard=config.guard) as run:
        policy, base = run.start_or_resume(init, update.optimizer, mesh, prompts)
        # The base of adapters is the reference; else it is loaded beside the policy.
        reference = base or starting_params(init, config.model, config.init, mesh, config.seed)
        run.describe(
            f"{config.method} on {source.name}",
            policy.params,
            (policy.opt_state, reference),
            length=config.length,
        )

        for step in run.steps():
            # 1. Rollout, 2. score, 3. advantages.
            key = run.key(step)
            experience, metrics, shown = experience_of(full(base, policy.params), reference, key)

            # 4. Updates: epochs over shuffled minibatches.
            updates = []
            for minibatch in shuffled_minibatches(
                experience, key, config.epochs, config.minibatches, config.microbatches
            ):
                policy, update_metrics = update.step(policy, minibatch, base)
                updates.append(update_metrics)
                if step == run.start + 1 and len(updates) == 1:
                    check_first_update(
                        update_metrics, metrics, config.model.compute_dtype, run.start, config.int8
                    )

            # 5. Record means over the updates, and stop where the policy has left the reference
            # too far behind.
            metrics |= {**named(policy=mean_metrics(updates)), "learning_rate": rate(policy)}
            run.record(step, metrics, tokens=config.batch_size * config.length)
            check_kl(run.last_metrics, config.kl_limit)

            # 6. Samples, the gold evaluation and a checkpoint, when they are due.
            if run.due(step, config.eval_every):
                run.samples(step, sample_rows(*shown, tokenizer, config.samples_per_prompt)[:8])
                if evaluate_gold is not None:
                    run.record(step, evaluate_gold(full(base, policy.params), reference))
            run.save_when_due(step, as_items(policy), prompts)
    return run.last_metrics


if __name__ == "__main__":
    flags.run(main, Config)
