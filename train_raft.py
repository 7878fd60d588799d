"""Sample, rank, imitate: raft, rejection, rft, expert and quark; in rounds, of the policy's own responses.

    python train_raft.py --init=runs/align/sft --reward=runs/align/rm --run=runs/raft
    python train_raft.py --method=expert --data=maths.jsonl --reward=tasks.answers:number --threshold=1 --run=runs/maths
    python train_raft.py --method=quark --init=runs/align/sft --reward=runs/align/rm --run=runs/quark

A method sets fields (PAPERS in objectives/imitate.py, where its mathematics is). What a policy of Quark learnt is
asked for by a system turn: its best quantile, such as `5`.
"""

import dataclasses
import sys
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data.batches import prompt_batches
from data.sources import open_source
from data.tokenizer import Tokenizer
from evaluation.gold import make_gold_evaluation
from lora import LoraConfig, lora_base, note_lora_base, trainable_part, with_adapters
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit
from objectives import imitate
from objectives.policy import missing_eos, response_logprobs
from planning.dry_run import describe, preview_items
from rewards.scorer import make_reward_scorer
from rollout import (
    Batch,
    Condition,
    ended,
    make_experience,
    make_rollout,
    rollout_metrics,
    sample_rows,
)
from runtime import flags
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError, require
from runtime.flags import fill_paper_defaults
from runtime.hosts import HostsConfig
from runtime.metrics import Recorder
from sharding import (
    MeshConfig,
    abstract,
    check_batch,
    constrain_batch,
    data_shard,
    init_sharded,
    make_mesh,
)
from train_state import as_items, from_items, init_state, starting_params
from train_step import OptimizerConfig, make_optimizer, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/raft"
    """Folder of this run; running again resumes it."""
    init: str = "runs/align/sft"
    """Run that policy and reference start from."""
    method: Literal["raft", "rejection", "rft", "expert", "quark"] = "raft"
    """Sets the fields that are None here to its paper's values (PAPERS in objectives/imitate.py)."""
    reward: str = "runs/align/rm"
    """A run of train_rm.py, module:function, called with (response, record), or http://<rewards/serve.py>."""
    data: str = "world"
    """Prompts: world, a .jsonl file, or tfds:<name>."""
    steps: int = 10
    """Rounds: sample, rank, imitate."""
    batch_size: int = 1024
    """Responses sampled in a round, over all devices."""
    samples_per_prompt: int | None = None
    """Responses to each prompt of a round."""
    select: Literal["best", "top", "above_threshold", "quantiles"] | None = None
    """Imitated are: of each prompt's responses the best; of all the best 1 / samples_per_prompt; those that reach
    --threshold; all, each after a system turn that names the quantile of its reward."""
    threshold: float | None = None
    """Score that a response must reach (passing)."""
    quantiles: int = 5
    """Into which the pool is cut, 2..9; from the second round on the last one is asked for (quantiles)."""
    distinct: bool | None = None
    """Of equal responses to a prompt only the first."""
    replay_rounds: int | None = None
    """Earlier rounds whose responses stay in the pool, ranked anew in every round and imitated again."""
    epochs: int = 2
    """Passes over the chosen responses in a round."""
    minibatch_size: int = 64
    """Responses per update; the last minibatch of a round is filled up with the round's first responses."""
    microbatches: int = 1
    """Parts of a minibatch whose gradients are summed."""
    kl_coef: float | None = None
    """Beta of KL(reference, policy), over all the vocabulary at each token."""
    max_prompt: int = 20
    """Longest prompt, in tokens."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Of sampling."""
    missing_eos: Literal["replace", "penalty", "none"] = "none"
    """A response that never ends: its score becomes, or is lowered by, `missing_eos_score`; or nothing."""
    missing_eos_score: float = -1.0
    """Score of an unended response; with `penalty`, added to its score."""
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=2e-4, schedule="constant", warmup=0, weight_decay=0.0
    )
    model: ModelConfig = ModelConfig()
    """The policy's; taken from --init."""
    lora: LoraConfig = LoraConfig()
    """The reference is then the policy's base."""
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    seed: int = 0
    eval_every: int = 1
    """Rounds between gold evaluations on held-out prompts (world only)."""
    save_every: int = 1
    """Rounds between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def check(c: Config, mesh: Any) -> None:
    """Raises UserError for settings that cannot run together."""
    n = c.samples_per_prompt
    require(
        n >= 1 and c.batch_size % n == 0,
        f"--samples_per_prompt={n}: must divide --batch_size={c.batch_size}",
    )
    require(c.epochs >= 1, f"--epochs={c.epochs}: must be at least 1")
    require(c.replay_rounds >= 0, f"--replay_rounds={c.replay_rounds}: must be at least 0")
    require(c.kl_coef >= 0, f"--kl_coef={c.kl_coef}: must be at least 0")
    require(2 <= c.quantiles <= 9, f"--quantiles={c.quantiles}: must be in 2..9")
    require(
        c.select != "above_threshold" or c.threshold is not None,
        f"--threshold: give the score to reach; --method={c.method} imitates what passes",
    )
    require(
        c.select == "above_threshold" or c.threshold is None,
        f"--threshold={c.threshold}: unused by --select={c.select}; leave it out or give --select=above_threshold",
    )
    check_batch("minibatch_size", c.minibatch_size, c.microbatches, mesh)
    check_batch("batch_size / --samples_per_prompt", c.batch_size // n, 1, mesh)


def quantile_words(config: Config, tokenizer: Tokenizer) -> jax.Array:
    """[count + 1]: the token of each quantile's number; raises UserError where there are no such tokens."""
    words = [tokenizer.encode(str(number)) for number in range(config.quantiles + 1)]
    if tokenizer.system is None or any(len(word) != 1 for word in words):
        raise UserError(
            f"--init={config.init}: quantiles need a tokenizer with <|system|> and one token for a digit"
        )
    return jnp.array([word[0] for word in words], jnp.int32)


def make_judge(config: Config, apply: Any, eos: int, condition: Condition):
    """judge(policy, reference, batch, scores, scalars) -> (batch with `score_B`, metrics)."""

    @jax.jit
    def judge(policy: Params, reference: Params, batch: Batch, scores: Batch, scalars: Batch):
        asked = {**batch, **condition(batch)}
        logp_BR = response_logprobs(apply, policy, asked, config.temperature)
        reference_BR = response_logprobs(apply, reference, batch, config.temperature)
        metrics = {
            "score": scores[config.reward].mean(),
            **rollout_metrics(logp_BR, reference_BR, batch, eos),
        }
        rule = (config.missing_eos, config.missing_eos_score)
        return {
            **batch,
            "score_B": missing_eos(scores[config.reward], ended(batch, eos), *rule),
        }, metrics

    return judge


def make_choose(config: Config, words: jax.Array | None):
    """choose(pool, key) -> (pool, with `word_B` where there are quantiles; rows to imitate [B]; their number)."""
    n = config.samples_per_prompt
    select = {
        "best": partial(imitate.best_of_n, group=n),
        "top": partial(imitate.top_fraction, one_in=n),
        "above_threshold": partial(imitate.passing, threshold=config.threshold),
        "quantiles": imitate.filled,
    }[config.select]

    @jax.jit
    def choose(pool: Batch, key: jax.Array):
        chosen_B = select(pool["score_B"])
        if config.distinct:
            chosen_B &= imitate.first_of_equal(pool["tokens_BT"], n)
        if words is not None:
            pool = {
                **pool,
                "word_B": words[imitate.quantiles(pool["score_B"], config.quantiles, key)],
            }
        count = chosen_B.sum()
        score = jnp.where(chosen_B, pool["score_B"], 0.0).sum() / jnp.maximum(count, 1)
        return (
            pool,
            chosen_B,
            {"chosen": count, "chosen_score": score, "best_score": pool["score_B"].max()},
        )

    return choose


def make_draw(config: Config, pool_rows: int):
    """(draw(pool, chosen_B, key) -> minibatches, as many as the most rows that can be chosen need; their number)."""
    most = (
        -(-pool_rows // config.samples_per_prompt)
        if config.select in ("best", "top")
        else pool_rows
    )
    parts = -(-config.epochs * most // config.minibatch_size)

    @jax.jit
    def draw(pool: Batch, chosen_B: jax.Array, key: jax.Array) -> list[Batch]:
        return jax.tree.map(
            constrain_batch, imitate.drawn(pool, chosen_B, key, parts, config.minibatch_size)
        )

    return draw, parts


def main(config: Config) -> dict[str, float]:
    config = note_lora_base(fill_paper_defaults(config, imitate.PAPERS[config.method]))
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    tokenizer = Tokenizer.load(config.init)
    by_quantile, length = config.select == "quantiles", config.max_prompt + config.max_new_tokens
    check_fit(config.model, tokenizer.size, length + 2 * by_quantile)
    words = quantile_words(config, tokenizer) if by_quantile else None
    models, score = make_reward_scorer([config.reward], tokenizer, mesh)
    init, apply = init_and_apply(LanguageModel(config.model))
    source = open_source(config.data, "prompt", "train", seed=config.seed)
    prompts = prompt_batches(
        source, tokenizer, batch_size=config.batch_size // config.samples_per_prompt, length=config.max_prompt,
        seed=config.seed, **data_shard(mesh),
    )  # fmt: skip

    def plain(batch: Batch) -> Batch:
        return batch

    def best_asked(batch: Batch) -> Batch:
        return imitate.conditioned(batch, tokenizer.system, words[-1]) if by_quantile else batch

    def told(batch: Batch) -> Batch:
        return (
            imitate.conditioned(batch, tokenizer.system, batch["word_B"]) if by_quantile else batch
        )

    def make_sampling(condition: Condition):
        rollout = make_rollout(
            config, apply, tokenizer, config.samples_per_prompt, condition=condition
        )
        judge = make_judge(config, apply, tokenizer.eos, condition)
        return make_experience(
            config, prompts, mesh, tokenizer.pad, rollout, partial(score, models), judge
        )

    # The first responses are the reference's own, which knows no quantiles yet (Quark, algorithm 1).
    first = make_sampling(plain)
    later = make_sampling(best_asked) if by_quantile else first
    pool_rows = config.batch_size * (1 + config.replay_rounds)
    choose, (draw, parts) = make_choose(config, words), make_draw(config, pool_rows)
    add = jax.jit(imitate.added, out_shardings=NamedSharding(mesh, P()))
    optimizer = make_optimizer(config.optimizer, config.steps * parts)
    objective = partial(imitate.imitation_objective, apply, condition=told, kl_coef=config.kl_coef)
    whole = partial(with_adapters, config.lora)
    both = lambda held, params: {
        "policy": whole(held["base"], params),
        "reference": held["reference"],
    }
    train_step = make_train_step(
        objective, optimizer, config.microbatches, max_norm=config.optimizer.clip, full=both
    )
    judges = config.data == "world" and config.eval_every > 0
    evaluate = make_gold_evaluation(config, tokenizer, condition=best_asked) if judges else None

    reference = starting_params(init, config.model, config.init, mesh, config.seed)

    def fresh(params: Params) -> dict[str, Any]:
        trained = trainable_part(config.lora, params, jax.random.key(config.seed))
        state = init_state(
            jax.tree.map(jnp.copy, trained), optimizer
        )  # its steps donate; the reference stays
        pool = imitate.empty_pool(
            pool_rows, config.max_prompt, config.max_new_tokens, tokenizer.pad
        )
        return {**as_items(state), "pool": pool}

    if config.dry_run:
        items = abstract(jax.eval_shape(fresh, reference), mesh)
        return preview_items(config, {**items, "held": reference}, next(prompts), tokenizer)
    with Checkpoints(
        config.run,
        config,
        script="train_raft",
        tokenizer=tokenizer.model,
        keep=config.keep_checkpoints,
    ) as saved:
        found = saved.restore(abstract(jax.eval_shape(fresh, reference), mesh))
        start, items, position = found or (0, init_sharded(fresh, mesh, reference), None)
        if position:
            prompts.restore(position)
        policy, pool = from_items(items), items["pool"]
        held = {"base": lora_base(config.lora, reference), "reference": reference}
        sizes = {
            "batch_size": config.batch_size,
            "length": length,
            "steps": config.steps,
            "start": start,
        }
        title = f"{config.run}: {config.method} on {source.name}"
        print(describe(title, policy.params, (policy.opt_state, reference), **sizes))
        with Recorder(config.run, config.steps, start, unit="round") as record:
            for step in record.steps():
                key = jax.random.fold_in(jax.random.key(config.seed), step)
                sampling = first if step == 1 else later
                batch, metrics, shown = sampling(
                    whole(held["base"], policy.params), reference, key
                )
                pool = add(pool, batch, step - 1)
                ranked, chosen_B, of_chosen = choose(pool, jax.random.fold_in(key, 1))
                count, best = (
                    int(of_chosen["chosen"]),
                    float(of_chosen["best_score"]),
                )  # waits: once a round
                updates = -(-config.epochs * count // config.minibatch_size)
                for minibatch in (
                    draw(ranked, chosen_B, jax.random.fold_in(key, 2))[:updates] if count else []
                ):
                    policy, update = train_step(policy, minibatch, held)
                    metrics |= {f"policy/{name}": x for name, x in update.items()}
                if not count and jax.process_index() == 0:
                    reason = f"no response reached --threshold={config.threshold} (the best score was {best:.4g})"
                    print(f"note: round {step}: {reason}: nothing was learnt", file=sys.stderr)
                record(
                    step,
                    metrics | of_chosen | {"updates": updates},
                    tokens=config.batch_size * length,
                )
                if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                    record.samples(
                        step, sample_rows(*shown, tokenizer, config.samples_per_prompt)[:8]
                    )
                    if evaluate is not None:
                        record(step, evaluate(whole(held["base"], policy.params), reference))
                if saved.due(step, config.save_every, config.steps):
                    record.flush()
                    saved.save(step, {**as_items(policy), "pool": pool}, prompts.state)
                if saved.stopping:
                    break
    return record.last


if __name__ == "__main__":
    flags.run(main, Config)
