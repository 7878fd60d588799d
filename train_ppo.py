"""PPO with a critic, against any number of rewards: rollout, judgement, advantages, epochs of clipped updates.

    python train_ppo.py --init=runs/align/sft --reward=runs/align/rm --run=runs/align/ppo

Policy and reference start from the SFT run, the value model from the first reward model, else from the SFT run too. The
defaults follow the "N+ implementation details" of Stiennon et al. 2020; contested ones are fields of Config.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from data.batches import prompt_batches, text_batches
from data.sources import open_source
from data.tokenizer import Tokenizer
from evaluation.gold import make_gold_evaluation
from lora import LoraConfig, lora_base, note_lora_base, with_adapters
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit
from objectives import policy as ppo
from objectives.reward import step_ends, step_rewards
from planning.dry_run import describe, preview_items
from rewards.scorer import check_rewards, is_function, make_reward_scorer, pooled
from rollout import (
    Batch,
    check_first_update,
    ended,
    make_rollout,
    rollout_metrics,
    sample_rows,
    shuffled,
)
from runtime import flags
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError, require
from runtime.hosts import HostsConfig
from runtime.metrics import Recorder
from sharding import (
    MeshConfig,
    abstract,
    check_batch,
    data_shard,
    init_sharded,
    make_mesh,
    to_memory,
    to_mesh,
)
from train_state import as_items, fresh_state, from_items, starting_critic, starting_params
from train_step import OptimizerConfig, make_optimizer, make_train_step

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
    run: str = "runs/ppo"
    """Folder of this run; running again resumes it."""
    init: str = "runs/align/sft"
    """Run that policy and reference start from."""
    reward: tuple[str, ...] = ("runs/align/rm",)
    """Each a run of train_rm.py, module:function, called with (response, record), or http://<rewards/serve.py>."""
    combine: Literal["mean", "weighted", "minimum", "gated"] = "mean"
    """Several rewards as one score; gated: the first where all others reach --gate, else --floor."""
    weights: tuple[float, ...] = ()
    """Of the rewards (weighted: their sum, not divided)."""
    gate: float = 0.0
    """What the second reward and those after it must reach (gated)."""
    floor: float = -1.0
    """Score where one does not (gated)."""
    data: str = "world"
    """Prompts: world, a .jsonl file, or tfds:<name>."""
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
    max_prompt: int = 20
    """Longest prompt, in tokens."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Of sampling; policy, reference and updates all divide their logits by it."""
    kl_coef: float = 0.2
    """Beta: reward per token is -beta KL. The initial one, if adaptive."""
    kl_target: float | None = None
    """KL per response, in nats, that an adaptive beta steers to; None: beta is fixed."""
    kl_horizon: int = 10_000
    """Episodes over which the adaptive beta moves."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of KL per token in the reward (objectives/policy.py)."""
    kl_limit: float = 50.0
    """The run ends in an error when KL per response exceeds this: the policy has collapsed."""
    step_rewards: Literal["none", "product", "minimum", "last"] = "none"
    """Reward at each step's last token: how the score changes there by --reward, then a run of train_prm.py."""
    score_at: Literal["last", "after"] = "last"
    """The score is added at the last real token, or at the position after it (where one is left)."""
    missing_eos: Literal["replace", "penalty", "none"] = "replace"
    """A response that never ends: its score becomes, or is lowered by, `missing_eos_score`; or nothing."""
    missing_eos_score: float = -1.0
    """Score of an unended response; with `penalty`, added to its score."""
    gamma: float = 1.0
    """Gamma of the returns."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation over the iteration."""
    whiten_unbiased: bool = False
    """Variance in whitening divided by n - 1 (TRL, verl) instead of n (OpenAI's and the reproduction's)."""
    clip: float = 0.2
    """Clip of the probability ratio."""
    entropy_coef: float = 0.0
    """Weight of the entropy per token, added to what is maximised."""
    ptx_data: str | None = None
    """Pre-training text mixed into each update (PPO-ptx): world, a .jsonl file, or tfds:<name>."""
    ptx_coef: float = 1.0
    """Weight of its loss per token beside the policy's; Ouyang et al. 2022 took 27.8."""
    value_clip: float = 0.2
    """Clip of the value's move within an iteration."""
    optimizer: OptimizerConfig = ADAM(lr=3e-4)
    """Of the policy."""
    value_optimizer: OptimizerConfig = ADAM(lr=1.5e-3)
    """Of the value model, which has more to learn: it starts from scores of whole responses."""
    model: ModelConfig = ModelConfig()
    """The policy's; taken from --init."""
    lora: LoraConfig = LoraConfig()
    """Of policy and value model both; what they start from are then their bases."""
    offload: bool = False
    """Keep reference and reward models in the host's memory; on the devices only while they judge."""
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    seed: int = 0
    eval_every: int = 12
    """Iterations between gold evaluations on held-out prompts (world only)."""
    save_every: int = 12
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def make_judge(config: Config, apply: Any, scalar_apply: Any, eos: int, newlines: list[int]):
    """judge(policy, reference, value, batch, scores, scalars, beta) -> (batch with targets, metrics)."""

    @jax.jit
    def judge(
        policy: Params,
        reference: Params,
        value: Params,
        batch: Batch,
        scores: Batch,
        scalars: Batch,
        beta: Any,
    ):
        mask_BR = batch["mask_BR"]
        logp_BR = ppo.response_logprobs(apply, policy, batch, config.temperature)
        reference_BR = ppo.response_logprobs(apply, reference, batch, config.temperature)
        raw_B, steps_BR = pooled(config, scores), jnp.zeros_like(mask_BR)
        if config.step_rewards != "none":
            ends_BR = step_ends(batch["response_BR"], mask_BR, newlines)
            steps_BR = step_rewards(scalars[config.reward[0]][:, 1:], ends_BR, config.step_rewards)
            raw_B = steps_BR.sum(1)
        score_B = ppo.missing_eos(
            raw_B, ended(batch, eos), config.missing_eos, config.missing_eos_score
        )

        at_B, value_mask_BR = ppo.score_position(mask_BR, config.score_at)
        values_BR = ppo.response_values(scalar_apply, value, batch) * value_mask_BR
        estimate_BR = ppo.kl_estimate(logp_BR, reference_BR, config.kl_estimator)
        # What the steps were not given comes at the end: the sum is the score, eos rule included.
        rewards_BR = steps_BR + ppo.token_rewards(
            score_B - steps_BR.sum(1), estimate_BR, mask_BR, beta, at_B
        )
        if config.whiten_rewards:
            rewards_BR = ppo.whiten(
                rewards_BR, value_mask_BR, shift_mean=False, unbiased=config.whiten_unbiased
            )
        advantages_BR, returns_BR = ppo.gae(
            rewards_BR, values_BR, gamma=config.gamma, gae_lambda=config.gae_lambda
        )
        targets = {
            "old_logp_BR": logp_BR,
            "old_values_BR": values_BR,
            "value_mask_BR": value_mask_BR,
            "advantages_BR": ppo.whiten(advantages_BR, mask_BR, unbiased=config.whiten_unbiased),
            "returns_BR": returns_BR,
        }
        metrics = {
            **{f"reward/{name}": x.mean() for name, x in scores.items()},
            "score": raw_B.mean(),
            "score_with_eos_rule": score_B.mean(),
            "kl_coef": beta,
            "reward": rewards_BR.sum(1).mean(),
            "value": ppo.masked_mean(values_BR, value_mask_BR),
            **rollout_metrics(logp_BR, reference_BR, batch, eos),
        }
        return {**batch, **targets}, metrics

    return judge


def check(c: Config, mesh: Any) -> None:
    """Raises UserError for settings that cannot run together."""
    rows, n, weights = c.batch_size, c.samples_per_prompt, (c.ptx_coef, c.entropy_coef)
    require(
        c.minibatches > 0 == rows % c.minibatches,
        f"--minibatches={c.minibatches}: must divide --batch_size={rows}",
    )
    require(n > 0 == rows % n, f"--samples_per_prompt={n}: must divide --batch_size={rows}")
    require(c.epochs >= 1, f"--epochs={c.epochs}: must be at least 1")
    require(
        min(weights) >= 0,
        f"--ptx_coef={weights[0]}, --entropy_coef={weights[1]}: must be at least 0",
    )
    require(
        not (c.offload and c.lora.rank),
        "--offload: adapters need their base all the time; leave it out",
    )
    require(
        c.step_rewards == "none" or (len(c.reward) == 1 and not is_function(c.reward[0])),
        f"--step_rewards={c.step_rewards}: --reward must be one run of train_prm.py",
    )
    check_rewards(c)
    check_batch("batch_size / --minibatches", rows // c.minibatches, c.microbatches, mesh)
    check_batch("batch_size / --samples_per_prompt", rows // n, 1, mesh)


def make_updates(c: Config, apply: Any, scalar_apply: Any):
    """((policy optimiser, policy step), (value optimiser, value step))."""
    policy = partial(
        ppo.policy_objective,
        apply,
        clip=c.clip,
        temperature=c.temperature,
        entropy_coef=c.entropy_coef,
    )
    value = partial(ppo.value_objective, scalar_apply, clip=c.value_clip)
    for loss, options in ((policy, c.optimizer), (value, c.value_optimizer)):
        optimizer = make_optimizer(options, c.steps * c.epochs * c.minibatches)
        yield (
            optimizer,
            make_train_step(
                loss,
                optimizer,
                c.microbatches,
                max_norm=options.clip,
                full=partial(with_adapters, c.lora),
            ),
        )


def main(config: Config) -> dict[str, float]:
    config = note_lora_base(config)
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    tokenizer, length = Tokenizer.load(config.init), config.max_prompt + config.max_new_tokens
    check_fit(config.model, tokenizer.size, length)
    models, score = make_reward_scorer(config.reward, tokenizer, mesh)
    init, apply = init_and_apply(LanguageModel(config.model))
    reference = starting_params(init, config.model, config.init, mesh, config.seed)
    critic, scalar_apply = starting_critic(config, models, mesh)
    source = open_source(config.data, "prompt", "train", seed=config.seed)
    options = {"seed": config.seed, **data_shard(mesh)}
    asked, rows = (
        config.batch_size // config.samples_per_prompt,
        config.batch_size // config.minibatches,
    )
    prompts = prompt_batches(
        source, tokenizer, batch_size=asked, length=config.max_prompt, **options
    )
    read = {"prompts": prompts}
    if config.ptx_data is not None:
        text = open_source(config.ptx_data, "text", "train", seed=config.seed)
        read["text"] = text_batches(text, tokenizer, batch_size=rows, length=length, **options)
    with_text = jax.jit(partial(ppo.with_text, coefficient=config.ptx_coef))
    rollout, whole = (
        make_rollout(config, apply, tokenizer, config.samples_per_prompt),
        partial(with_adapters, config.lora),
    )
    judge = make_judge(config, apply, scalar_apply, tokenizer.eos, tokenizer.newlines())
    (policy_optimizer, policy_step), (value_optimizer, value_step) = make_updates(
        config, apply, scalar_apply
    )
    evaluate = (
        make_gold_evaluation(config, tokenizer)
        if config.data == "world" and config.eval_every
        else None
    )

    def fresh(policy: Params, value: Params) -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(config.seed))
        copies = jax.tree.map(
            jnp.copy, (policy, value)
        )  # the steps donate theirs; reference and rewards stay
        starts = zip((policy_optimizer, value_optimizer), copies, keys, strict=True)
        states = [fresh_state(config, *start) for start in starts]
        return {**as_items(states[0]), "value": states[1], "beta": jnp.float32(config.kl_coef)}

    if config.dry_run:
        items = abstract(jax.eval_shape(fresh, reference, critic), mesh)
        return preview_items(
            config, {**items, "held": (reference, models)}, next(prompts), tokenizer
        )
    with Checkpoints(
        config.run,
        config,
        script="train_ppo",
        tokenizer=tokenizer.model,
        keep=config.keep_checkpoints,
    ) as saved:
        found = saved.restore(abstract(jax.eval_shape(fresh, reference, critic), mesh))
        start, items, position = found or (0, init_sharded(fresh, mesh, reference, critic), None)
        for name, state in (position or {}).items():
            read[name].restore(state)
        policy, value, beta = from_items(items), items["value"], items["beta"]
        base, value_base = (lora_base(config.lora, params) for params in (reference, critic))
        del critic  # with --offload nothing of it stays on the devices
        sizes = {
            "batch_size": config.batch_size,
            "length": length,
            "steps": config.steps,
            "start": start,
        }
        reference, models = to_memory(
            (reference, models), "pinned_host" if config.offload else "device"
        )
        others = (policy.opt_state, value, *(() if config.offload else (reference, models)))
        print(describe(f"{config.run}: PPO on {source.name}", policy.params, others, **sizes))
        unchecked = True
        with Recorder(config.run, config.steps, start, unit="iteration") as record:
            for step in record.steps():
                key = jax.random.fold_in(jax.random.key(config.seed), step)
                batch = rollout(whole(base, policy.params), to_mesh(next(prompts), mesh), key)
                scores, scalars = score(to_memory(models, "device"), batch, prompts.records)
                three = (
                    whole(base, policy.params),
                    to_memory(reference, "device"),
                    whole(value_base, value.params),
                )
                batch, metrics = judge(*three, batch, scores, scalars, beta)
                for epoch in range(config.epochs):
                    for minibatch in shuffled(
                        batch, jax.random.fold_in(key, epoch), config.minibatches
                    ):
                        value, value_metrics = value_step(value, minibatch, value_base)
                        if "text" in read:
                            minibatch = with_text(minibatch, to_mesh(next(read["text"]), mesh))
                        policy, policy_metrics = policy_step(policy, minibatch, base)
                        if unchecked:
                            check_first_update(policy_metrics, metrics, config, start)
                            unchecked = False
                if config.kl_target is not None:
                    beta = ppo.adapt_kl(
                        beta, metrics["kl"], config.kl_target, config.kl_horizon, config.batch_size
                    )
                metrics |= {f"policy/{name}": x for name, x in policy_metrics.items()}
                metrics |= {f"value/{name}": x for name, x in value_metrics.items()}
                record(step, metrics, tokens=config.batch_size * length)
                if (kl := record.last.get("kl", 0.0)) > config.kl_limit:
                    raise UserError(
                        f"--kl_limit={config.kl_limit}: KL reached {kl:.1f} nats; raise --kl_coef"
                    )
                if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                    shown = (
                        prompts.records,
                        batch["response_BR"],
                        tokenizer,
                        config.samples_per_prompt,
                    )
                    record.samples(step, sample_rows(*shown)[:8])
                    if evaluate is not None:
                        record(
                            step,
                            evaluate(whole(base, policy.params), to_memory(reference, "device")),
                        )
                if saved.due(step, config.save_every, config.steps):
                    record.flush()
                    items = {**as_items(policy), "value": value, "beta": beta}
                    saved.save(
                        step, items, {name: batches.state for name, batches in read.items()}
                    )
                if saved.stopping:
                    break
    return record.last


if __name__ == "__main__":
    flags.run(main, Config)
