"""Online DPO: sample, rank by a reward, and learn by DPO from each prompt's best and worst.

    PYTHONPATH=. python experiments/online_dpo/train_grpo.py --init=runs/align/sft \\
        --reward=runs/align/rm --run=runs/online_dpo

Guo et al. 2024. A fork of train_grpo.py: pairs of a rollout (pairs.py) and the objective of
train_dpo.py in place of advantages and ratios.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from data.bad_rows import OnBadRow
from data.batches import Batches, prompt_batches
from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from evaluation.gold import make_gold_evaluation
from experiments.online_dpo.pairs import best_and_worst
from lora import LoraConfig, with_adapters
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit
from objectives import direct
from objectives.policy import Combine, MissingEos, missing_eos, response_logprobs
from planning.dry_run import preview
from rewards.scorer import check_rewards, make_reward_scorer, pooled
from rollout import (
    Batch,
    Metrics,
    Rollout,
    Score,
    check_kl,
    check_sampler,
    ended,
    make_experience,
    make_rollout,
    mean_metrics,
    named,
    rollout_metrics,
    sample_rows,
    shuffled_minibatches,
    start_tolerance,
)
from runtime import flags
from runtime.errors import require
from runtime.hosts import HostsConfig
from sampling import Apply, Ends, SamplingConfig
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


@dataclasses.dataclass(frozen=True)
class Config:
    # Folders
    run: str = "runs/online_dpo"
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
    samples_per_prompt: int = 2
    """Rollouts that share a prompt: a group, of which the best and the worst are a pair."""
    minibatches: int = 4
    """Updates per epoch; divides the number of rows in pairs."""
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

    # Loss and score
    beta: float = 0.1
    """DPO's beta: how strongly the policy is held to the reference."""
    missing_eos: MissingEos = "lowest"
    """Rule for a response without an end. lowest: its score is below all of the batch. Else it
    becomes `missing_eos_score` (replace), has it added (penalty), or stays (none)."""
    missing_eos_score: float = -1.0
    """Score of a response without an end (replace), or what is added to it (penalty)."""

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
        """Return the tokens of a row: prompt and response."""
        return self.max_prompt + self.max_new_tokens

    @property
    def updates(self) -> int:
        """Return the updates of the run, which the schedule counts."""
        return self.steps * self.epochs * self.minibatches


class RankedRollout(Rollout):
    """A rollout and what pairs are made of."""

    reference_BR: jax.Array
    """Log-probabilities by the reference, float32."""
    score_B: jax.Array
    """The score that responses are ranked by, after the rule on a missing end; float32."""


def make_targets(
    config: Config, apply: Apply, *, eos: Ends
) -> Callable[..., tuple[RankedRollout, Batch]]:
    """Compile compute_targets(policy, reference, rollout, scores, scalars).

    It returns (ranked rollout, metrics). `scores`: {reward: [B]} of make_reward_scorer,
    whose scalars are not used. `eos` ends a response. Metrics are scalars: means over the rollout.
    """
    size = config.samples_per_prompt

    @jax.jit
    def compute_targets(
        policy: Params,
        reference: Params,
        rollout: Rollout,
        scores: Batch,
        scalars: Batch,
    ) -> tuple[RankedRollout, Batch]:
        logp_BR = response_logprobs(apply, policy, rollout, config.temperature)
        reference_BR = response_logprobs(apply, reference, rollout, config.temperature)
        raw_B = pooled(config, scores)
        score_B = missing_eos(
            raw_B, ended(rollout, eos), config.missing_eos, config.missing_eos_score
        )
        signal_Q = jnp.ptp(score_B.reshape(-1, size), axis=1) > 0
        metrics = {
            **{f"reward/{name}": score.mean() for name, score in scores.items()},
            "score": raw_B.mean(),
            "score_with_eos_rule": score_B.mean(),
            "groups_with_signal": signal_Q.mean(),
            **rollout_metrics(logp_BR, reference_BR, rollout, eos),
        }
        return {**rollout, "reference_BR": reference_BR, "score_B": score_B}, metrics

    return compute_targets


def make_objective(config: Config, apply: Apply) -> Objective:
    """Return DPO's objective on pairs, at the sampling temperature (greedy counts as 1)."""
    return partial(
        direct.preference_objective,
        apply,
        loss=partial(direct.dpo, beta=config.beta),
        temperature=config.temperature or 1.0,
    )


def check_first_pair_update(update: Metrics, metrics: Metrics, dtype: Any, start: int) -> None:
    """Assert that a new run's policy starts at the reference: margin 0 and KL 0.

    Called once per start, after the first update. `update`: that step's metrics, which are of the
    parameters before it. `metrics`: the rollout's.
    """
    margin = float(update["margin"])
    assert start > 0 or abs(margin) < start_tolerance(dtype), f"margin starts at {margin}"
    check_sampler(metrics, dtype, start)


def make_update(config: Config, init: Init, objective: Objective) -> Update:
    """Make the Update of the policy: its optimiser over all updates of the run, its jitted step.

    `init` is handed through. The step's `base` is what lies under the adapters, None without;
    it donates the state.
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


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError for settings that cannot run together."""
    # What is rewarded, and how many responses are compared.
    check_rewards(config)
    size = config.samples_per_prompt
    require(
        size >= 1 and config.batch_size % size == 0,
        f"--samples_per_prompt={size}: must divide --batch_size={config.batch_size}",
    )
    require(
        size >= 2,
        f"--samples_per_prompt={size}: responses are compared in groups; give at least 2",
    )
    groups = config.batch_size // size
    require(
        config.minibatches >= 1 and groups % config.minibatches == 0,
        f"--minibatches={config.minibatches}: must divide {groups} pairs",
    )
    require(config.epochs >= 1, f"--epochs={config.epochs}: must be at least 1")
    require(config.beta > 0, f"--beta={config.beta}: must be above 0")
    minibatch_pairs = groups // config.minibatches
    check_batch("batch_size / --minibatches", minibatch_pairs, config.microbatches, mesh)
    check_batch("batch_size / --samples_per_prompt", groups, 1, mesh)


def open_prompts(
    config: Config, source: Source, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> Batches:
    """Open batches of one prompt a group, on this host's part of `source`.

    `source`: records of the schema `prompt`. Left-padded; `.records` are those of the last batch's
    prompts.
    """
    # Every host reads its own part, in an order that the seed gives.
    shard: dict[str, Any] = {"seed": config.seed, **data_shard(mesh)}
    groups = config.batch_size // config.samples_per_prompt
    return prompt_batches(source, tokenizer, batch_size=groups, length=config.max_prompt, **shard)


def load_score(config: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Score:
    """Load the rewards; return score(rollout, records) -> (scores, scalars).

    {reward: [B]} and {reward: [B, R + 1]}, as of rewards.scorer.make_reward_scorer with its models
    given, which stay on the mesh. UserError for a reward that cannot be loaded.
    """
    # The models stay on the mesh: they are given once for all.
    reward_models, score = make_reward_scorer(config.reward, tokenizer, mesh)
    return partial(score, reward_models)


def main(config: Config) -> dict[str, float]:
    """Train a policy by online DPO; return the last metrics."""
    config = pin_inputs(config)
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    tokenizer = Tokenizer.load(config.init)
    check_fit(config.model, tokenizer.size, config.length)

    # Data: prompts. The policy's functions: pairs of a rollout, and the update on them.
    source = open_source(config.data, "prompt", "train", seed=config.seed)
    prompts = open_prompts(config, source, tokenizer, mesh)
    init, apply = init_and_apply(LanguageModel(config.model))
    pairs_of = jax.jit(partial(best_and_worst, group=config.samples_per_prompt))
    update = make_update(config, init, make_objective(config, apply))
    rate = make_rate(config.optimizer, config.updates)

    # Steps 1 and 2 of an iteration. With LoRA the state holds adapters alone, and `full` lays them
    # on their base.
    experience_of = make_experience(
        prompts,
        rollout=make_rollout(
            apply,
            config.model,
            SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens),
            eos=tokenizer.ends,
            pad=tokenizer.pad,
            n=config.samples_per_prompt,
        ),
        score=load_score(config, tokenizer, mesh),
        compute_targets=make_targets(config, apply, eos=tokenizer.ends),
        mesh=mesh,
        pad=tokenizer.pad,
        prompt_length=config.max_prompt,
        group=config.samples_per_prompt,
    )
    full = partial(with_adapters, config.lora)
    # The gold program knows the world's prompts alone.
    evaluate_gold = None
    if config.data == "world" and config.eval_every:
        evaluate_gold = make_gold_evaluation(config, tokenizer)

    # A dry run ends here and has written nothing.
    if config.dry_run:
        return preview(config, init, update.optimizer, mesh, prompts, tokenizer)
    with Run(config, tokenizer, unit="iteration") as run:
        policy, base = run.start_or_resume(init, update.optimizer, mesh, prompts)
        # The base of adapters is the reference; else it is loaded beside the policy.
        reference = base or starting_params(init, config.model, config.init, mesh, config.seed)
        run.describe(
            f"online DPO on {source.name}",
            policy.params,
            (policy.opt_state, reference),
            length=config.length,
        )

        for step in run.steps():
            # 1. Rollout and 2. score.
            key = jax.random.fold_in(jax.random.key(config.seed), step)
            ranked, metrics, shown = experience_of(full(base, policy.params), reference, key)

            # 3. Pairs: the best and the worst of each group.
            pairs = pairs_of(ranked)

            # 4. Updates: epochs over shuffled minibatches of pairs.
            updates = []
            for minibatch in shuffled_minibatches(pairs, key, config.epochs, config.minibatches):
                policy, update_metrics = update.step(policy, minibatch, base)
                updates.append(update_metrics)
                if step == run.start + 1 and len(updates) == 1:
                    check_first_pair_update(
                        update_metrics, metrics, config.model.compute_dtype, run.start
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
