"""Online RL without a critic: grpo, dr_grpo, dapo, gspo, rloo, reinforce_pp, online_dpo; any number of rewards.

    python train_grpo.py --init=runs/align/sft --reward=runs/align/rm --run=runs/grpo
    python train_grpo.py --method=rloo --reward runs/rm runs/harm --combine=gated --gate=0 --run=runs/gated
    python train_grpo.py --method=dapo --data=maths.jsonl --reward=tasks.answers:number --run=runs/maths

A method is an entry of `make_method` and of PAPERS in objectives/group.py, where its mathematics is.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from data.batches import prompt_batches
from data.sources import open_source
from data.tokenizer import Tokenizer
from evaluation.gold import make_gold_evaluation
from lora import LoraConfig, note_lora_base, with_adapters
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit
from objectives import direct, group
from objectives import policy as ppo
from planning.dry_run import describe, preview
from rewards.scorer import check_rewards, is_function, make_reward_scorer, pooled
from rollout import (
    Batch,
    check_first_update,
    ended,
    make_experience,
    make_rollout,
    rollout_metrics,
    sample_rows,
    shuffled,
)
from runtime import flags
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError, require
from runtime.flags import fill_paper_defaults
from runtime.hosts import HostsConfig
from runtime.metrics import Recorder
from sharding import MeshConfig, check_batch, data_shard, make_mesh
from train_state import as_items, start_or_resume, starting_params
from train_step import OptimizerConfig, make_optimizer, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/grpo"
    """Folder of this run; running again resumes it."""
    init: str = "runs/align/sft"
    """Run that policy and reference start from."""
    method: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp", "online_dpo"] = (
        "grpo"
    )
    """Sets the fields that are None here to its paper's values (PAPERS in objectives/group.py)."""
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
    max_prompt: int = 20
    """Longest prompt, in tokens."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Of sampling; policy, reference and updates all divide their logits by it."""
    ratio: Literal["token", "sequence", "geometric"] | None = None
    """Importance ratio of a token: its own, its response's, or that one's geometric mean over the response."""
    average: Literal["sequence", "tokens", "constant"] | None = None
    """Mean over a response's tokens and then responses; over all tokens; or sums by max_new_tokens."""
    clip: float | None = None
    """The ratio is clipped at 1 - clip; inf: never."""
    clip_high: float | None = None
    """And at 1 + clip_high."""
    kl_coef: float | None = None
    """Beta of the KL to the reference; DPO's beta in online_dpo."""
    kl_in: Literal["loss", "reward"] | None = None
    """In the loss, averaged as --average says, it pulls on each token by itself; in the reward it counts for those
    before too, and only then is pi_ref exp(r / beta) / Z the optimum (tests/test_group.py)."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Per token (objectives/policy.py). In the loss k2 has the KL's gradient; k3 has that of KL(reference, policy)."""
    unbiased_std: bool = False
    """Variances divided by n - 1 (TRL, verl) instead of n."""
    dynamic_sampling: bool | None = None
    """Leave groups of equal scores out and sample other prompts in their place."""
    max_rounds: int = 4
    """Rollouts an iteration at most, if dynamic; groups still missing then are left out."""
    overlong: float | None = None
    """Last share of max_new_tokens over which a penalty on the score grows from 0 to 1."""
    missing_eos: Literal["replace", "penalty", "none"] = "none"
    """A response that never ends: its score becomes, or is lowered by, `missing_eos_score`; or nothing."""
    missing_eos_score: float = -1.0
    """Score of an unended response; with `penalty`, added to its score."""
    entropy_coef: float = 0.0
    """Alpha: -alpha log pi joins each token's reward, for exploration; longer responses have more entropy."""
    shaping: float = 0.0
    """Weight of a potential, the first reward model's scalar at each token, in the reward (reinforce_pp)."""
    kl_limit: float = 50.0
    """The run ends in an error when KL per response exceeds this: the policy has collapsed."""
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=2e-4, schedule="linear", warmup=0, final_lr=0.1, beta2=0.999, eps=1e-5, weight_decay=0.0
    )
    model: ModelConfig = ModelConfig()
    """The policy's; taken from --init."""
    lora: LoraConfig = LoraConfig()
    """The reference is then the policy's base."""
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    seed: int = 0
    eval_every: int = 10
    """Iterations between gold evaluations on held-out prompts (world only)."""
    save_every: int = 10
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def make_method(config: Config, apply: Any) -> tuple[Callable[..., jax.Array], Any]:
    """Of --method: advantages(rewards_BR, mask_BR), and the objective."""
    n, std = config.samples_per_prompt, {"unbiased": config.unbiased_std}
    normalised = partial(group.by_response, partial(group.normalised, **std), group=n)
    centred, leave_one_out = (
        partial(group.by_response, a, group=n) for a in (group.centred, group.leave_one_out)
    )
    fields = ("ratio", "average", "clip", "clip_high", "kl_estimator", "temperature")
    options = {name: getattr(config, name) for name in fields}
    options["kl_coef"] = config.kl_coef if config.kl_in == "loss" else 0.0
    surrogate = partial(group.surrogate_objective, apply, **options)

    loss = partial(direct.dpo, beta=config.kl_coef)
    dpo = partial(
        direct.preference_objective, apply, loss=loss, temperature=config.temperature or 1.0
    )
    return {
        "grpo": (normalised, surrogate),
        "dr_grpo": (centred, surrogate),
        "dapo": (normalised, surrogate),
        "gspo": (normalised, surrogate),
        "rloo": (leave_one_out, surrogate),
        "reinforce_pp": (partial(group.reinforce_pp, group=n, **std), surrogate),
        "online_dpo": (
            centred,
            dpo,
        ),  # of the advantages it takes the order only, in best_and_worst
    }[config.method]


def make_judge(config: Config, apply: Any, advantages: Callable[..., jax.Array], eos: int):
    """judge(policy, reference, batch, scores, scalars) -> (batch with targets, metrics)."""
    n, longest = config.samples_per_prompt, config.max_new_tokens

    @jax.jit
    def judge(policy: Params, reference: Params, batch: Batch, scores: Batch, scalars: Batch):
        mask_BR = batch["mask_BR"]
        logp_BR = ppo.response_logprobs(apply, policy, batch, config.temperature)
        reference_BR = ppo.response_logprobs(apply, reference, batch, config.temperature)
        raw_B = pooled(config, scores)
        score_B = ppo.missing_eos(
            raw_B, ended(batch, eos), config.missing_eos, config.missing_eos_score
        )
        if config.overlong:
            score_B += group.overlong_penalty(mask_BR.sum(1), longest, config.overlong * longest)
        cost_BR = config.entropy_coef * logp_BR
        if config.kl_in == "reward":
            cost_BR += config.kl_coef * ppo.kl_estimate(logp_BR, reference_BR, config.kl_estimator)
        rewards_BR = ppo.token_rewards(score_B, cost_BR, mask_BR, 1.0, mask_BR.sum(1) - 1)
        if config.shaping:
            before_BR = scalars[config.reward[0]][:, :-1]
            rewards_BR = group.shaped(rewards_BR, config.shaping * before_BR, mask_BR)
        unequal_P = jnp.ptp(raw_B.reshape(-1, n), axis=1) > 0
        targets = {
            "old_logp_BR": logp_BR,
            "reference_BR": reference_BR,
            "advantages_BR": advantages(rewards_BR, mask_BR),
            "total_B": rewards_BR.sum(1),
            # A response without tokens counts nowhere: so are groups left out.
            "mask_BR": mask_BR * jnp.repeat(unequal_P, n)[:, None]
            if config.dynamic_sampling
            else mask_BR,
        }
        metrics = {
            **{f"reward/{name}": x.mean() for name, x in scores.items()},
            "score": raw_B.mean(),
            "unequal": unequal_P.mean(),  # share of groups whose scores differ
            **rollout_metrics(logp_BR, reference_BR, batch, eos),
        }
        return {**batch, **targets}, metrics

    return judge


def make_update(config: Config, objective: Any):
    """(optimiser, train step)."""
    optimizer = make_optimizer(config.optimizer, config.steps * config.epochs * config.minibatches)
    full = partial(with_adapters, config.lora)
    step = make_train_step(
        objective, optimizer, config.microbatches, max_norm=config.optimizer.clip, full=full
    )
    return optimizer, step


def check(c: Config, mesh: Any) -> None:
    """Raises UserError for settings that cannot run together."""
    n, alone = c.samples_per_prompt, c.method == "reinforce_pp" and not c.dynamic_sampling
    rows = c.batch_size // max(n, 1) if c.method == "online_dpo" else c.batch_size
    check_rewards(c)
    require(
        n >= 1 and c.batch_size % n == 0,
        f"--samples_per_prompt={n}: must divide --batch_size={c.batch_size}",
    )
    require(
        n >= 2 or alone,
        f"--samples_per_prompt={n}: responses are compared in groups; give at least 2",
    )
    require(
        c.minibatches >= 1 and rows % c.minibatches == 0,
        f"--minibatches={c.minibatches}: must divide {rows} rows",
    )
    require(
        min(c.epochs, c.max_rounds) >= 1,
        f"--epochs={c.epochs}, --max_rounds={c.max_rounds}: must be at least 1",
    )
    require(c.kl_coef >= 0, f"--kl_coef={c.kl_coef}: must be at least 0")
    require(c.kl_coef > 0 or c.method != "online_dpo", "--kl_coef=0: online_dpo needs one above 0")
    require(
        (c.kl_in, c.kl_estimator) != ("loss", "k1") or c.kl_coef == 0,
        "--kl_estimator=k1: in the loss its gradient is 0 on average; use k2 or k3, or --kl_in=reward",
    )
    require(
        c.clip > 0 and c.clip_high > 0,
        f"--clip={c.clip}, --clip_high={c.clip_high}: must be above 0",
    )
    require(0 <= c.overlong <= 1, f"--overlong={c.overlong}: must be in 0..1")
    require(
        c.shaping == 0 or (c.method == "reinforce_pp" and not is_function(c.reward[0])),
        "--shaping: tells tokens apart; needs --method=reinforce_pp and a reward model first",
    )
    check_batch("batch_size / --minibatches", rows // c.minibatches, c.microbatches, mesh)
    check_batch("batch_size / --samples_per_prompt", c.batch_size // n, 1, mesh)


def main(config: Config) -> dict[str, float]:
    config = note_lora_base(fill_paper_defaults(config, group.PAPERS[config.method]))
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    tokenizer = Tokenizer.load(config.init)
    length = config.max_prompt + config.max_new_tokens
    check_fit(config.model, tokenizer.size, length)
    models, score = make_reward_scorer(config.reward, tokenizer, mesh)
    init, apply = init_and_apply(LanguageModel(config.model))
    source = open_source(config.data, "prompt", "train", seed=config.seed)
    prompts = prompt_batches(
        source, tokenizer, batch_size=config.batch_size // config.samples_per_prompt, length=config.max_prompt,
        seed=config.seed, **data_shard(mesh),
    )  # fmt: skip
    advantages, objective = make_method(config, apply)
    rollout, whole = (
        make_rollout(config, apply, tokenizer, config.samples_per_prompt),
        partial(with_adapters, config.lora),
    )
    judge, most = (
        make_judge(config, apply, advantages, tokenizer.eos),
        config.max_rounds if config.dynamic_sampling else 1,
    )
    experience = make_experience(
        config, prompts, mesh, tokenizer.pad, rollout, partial(score, models), judge, most
    )
    optimizer, train_step = make_update(config, objective)
    pairs = jax.jit(partial(group.best_and_worst, group=config.samples_per_prompt))
    evaluate = (
        make_gold_evaluation(config, tokenizer)
        if config.data == "world" and config.eval_every
        else None
    )

    if config.dry_run:
        return preview(config, init, optimizer, mesh, next(prompts), tokenizer)
    with Checkpoints(
        config.run,
        config,
        script="train_grpo",
        tokenizer=tokenizer.model,
        keep=config.keep_checkpoints,
    ) as saved:
        start, policy, position, base = start_or_resume(saved, config, init, optimizer, mesh)
        reference = base or starting_params(init, config.model, config.init, mesh, config.seed)
        if position:
            prompts.restore(position)
        sizes = {
            "batch_size": config.batch_size,
            "length": length,
            "steps": config.steps,
            "start": start,
        }
        others = (policy.opt_state, reference)
        print(
            describe(
                f"{config.run}: {config.method} on {source.name}", policy.params, others, **sizes
            )
        )
        unchecked = True
        with Recorder(config.run, config.steps, start, unit="iteration") as record:
            for step in record.steps():
                key = jax.random.fold_in(jax.random.key(config.seed), step)
                batch, metrics, shown = experience(whole(base, policy.params), reference, key)
                batch = pairs(batch) if config.method == "online_dpo" else batch
                for epoch in range(config.epochs):
                    order = jax.random.fold_in(key, config.max_rounds + epoch)
                    for minibatch in shuffled(batch, order, config.minibatches):
                        policy, update = train_step(policy, minibatch, base)
                        if unchecked:
                            check_first_update(update, metrics, config, start)
                            unchecked = False
                metrics |= {f"policy/{name}": x for name, x in update.items()}
                record(step, metrics, tokens=config.batch_size * length)
                if record.last.get("kl", 0.0) > config.kl_limit:
                    raise UserError(
                        f"--kl_limit={config.kl_limit}: KL is {record.last['kl']:.1f}; raise --kl_coef"
                    )
                if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                    record.samples(
                        step, sample_rows(*shown, tokenizer, config.samples_per_prompt)[:8]
                    )
                    if evaluate is not None:
                        record(step, evaluate(whole(base, policy.params), reference))
                if saved.due(step, config.save_every, config.steps):
                    record.flush()
                    saved.save(step, as_items(policy), prompts.state)
                if saved.stopping:
                    break
    return record.last


if __name__ == "__main__":
    flags.run(main, Config)
