"""PPO towards happy stories: a fork of the root's train_ppo.py whose reward is a program on the decoded text.

    PYTHONPATH=. python experiments/stories/train_ppo.py --init=runs/stories --run=runs/stories_ppo

What differs: happy.py scores the stories, on the host; prompts are raw openings of stories; the value model starts
from the policy's decoder with a zero head; bos, which in pretraining separated stories, ends a response; options
that the experiment does not vary are gone.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batches import pad_prompts, prompt_batches
from data.sources import Source
from data.tokenizer import Tokenizer
from experiments.stories import happy
from model import LanguageModel, Params, init_and_apply
from model_config import PRESETS, ModelConfig, check_fit
from objectives import policy as ppo
from planning.dry_run import describe
from rollout import check_first_update, make_rollout, rollout_metrics, shuffled
from runtime import flags
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from runtime.metrics import Recorder
from sharding import MeshConfig, abstract, check_batch, init_sharded, make_mesh, to_mesh
from train_state import as_items, from_items, init_state, starting_critic, starting_params
from train_step import OptimizerConfig, make_optimizer, make_train_step

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/stories_ppo"
    """Folder of this run; running again resumes it."""
    init: str = "runs/stories"
    """Run that policy, reference and value model start from (import_llama2c.py writes it)."""
    steps: int = 60
    """PPO iterations."""
    batch_size: int = 128
    """Rollouts per iteration, over all devices."""
    minibatches: int = 4
    """Updates per epoch; divides batch_size."""
    epochs: int = 1
    """Passes over an iteration's rollouts."""
    max_prompt: int = 28
    """Longest opening, in tokens."""
    max_new_tokens: int = 80
    """Longest response, in tokens: the beginning of a story."""
    temperature: float = 1.0
    """Of sampling; policy, reference and updates all divide their logits by it."""
    kl_coef: float = 0.03
    """Beta: reward per token is -beta KL."""
    kl_limit: float = 80.0
    """The run ends in an error when KL per response exceeds this: the policy has collapsed."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """Clip of the probability ratio."""
    value_clip: float = 0.2
    """Clip of the value's move within an iteration."""
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=5e-4,
        schedule="linear",
        warmup=10,
        final_lr=0.1,
        beta2=0.999,
        eps=1e-5,
        weight_decay=0.0,
    )
    """Of the policy."""
    value_optimizer: OptimizerConfig = OptimizerConfig(
        lr=1e-3,
        schedule="linear",
        warmup=10,
        final_lr=0.1,
        beta2=0.999,
        eps=1e-5,
        weight_decay=0.0,
    )
    """Of the value model."""
    model: ModelConfig = PRESETS["stories260k"]
    """The policy's; taken from --init."""
    mesh: MeshConfig = MeshConfig()
    seed: int = 0
    eval_every: int = 20
    """Iterations between samples and scores on the validation openings."""
    save_every: int = 20
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""


def score_stories(
    openings: list[str], response_BR: jax.Array, tokenizer: Tokenizer
) -> tuple[list[str], Batch]:
    """What continues each opening, and per response the parts of its reward, float32 [B] each; waits for the device."""
    rows = zip(openings, jax.device_get(response_BR).tolist(), strict=True)
    # Decoded together and then cut: the space between opening and response is kept.
    stories = [
        tokenizer.decode([*tokenizer.encode(text), *row])[len(text) :] for text, row in rows
    ]
    parts = [happy.parts(text, story) for text, story in zip(openings, stories, strict=True)]
    return stories, {
        f"{name}_B": np.array([part[name] for part in parts], np.float32) for name in parts[0]
    }


def make_judge(config: Config, apply: Any, scalar_apply: Any, bos: int):
    """judge(policy, reference, value, batch with the reward's parts) -> (batch with targets, metrics)."""

    @jax.jit
    def judge(policy: Params, reference: Params, value: Params, batch: Batch):
        mask_BR = batch["mask_BR"]
        logp_BR = ppo.response_logprobs(apply, policy, batch, config.temperature)
        reference_BR = ppo.response_logprobs(apply, reference, batch, config.temperature)
        values_BR = ppo.response_values(scalar_apply, value, batch) * mask_BR
        kl_BR = ppo.kl_estimate(logp_BR, reference_BR, "k1")
        rewards_BR = ppo.token_rewards(
            batch["score_B"], kl_BR, mask_BR, config.kl_coef, mask_BR.sum(1) - 1
        )
        advantages_BR, returns_BR = ppo.gae(
            rewards_BR, values_BR, gamma=1.0, gae_lambda=config.gae_lambda
        )
        targets = {
            "old_logp_BR": logp_BR,
            "old_values_BR": values_BR,
            "value_mask_BR": mask_BR,
            "advantages_BR": ppo.whiten(advantages_BR, mask_BR),
            "returns_BR": returns_BR,
        }
        metrics = {
            **{name: batch[f"{name}_B"].mean() for name in ("score", "happy", "sad", "words")},
            "reward": rewards_BR.sum(1).mean(),
            "reference_surprise": -ppo.masked_mean(reference_BR, mask_BR),
            "value": ppo.masked_mean(values_BR, mask_BR),
            **rollout_metrics(logp_BR, reference_BR, batch, bos),
        }
        return {
            **{name: x for name, x in batch.items() if name != "sampler_logp_BR"},
            **targets,
        }, metrics

    return judge


def make_evaluation(config: Config, rollout: Any, tokenizer: Tokenizer, mesh: Any):
    """evaluate(policy) -> (rows for samples.md, mean parts of the reward): one story for each of 64 openings.

    Always the same openings and key, so that what one sees before and after differs by the policy alone.
    """
    openings = happy.openings("validation")[:64]
    rows = [{"tokens": [tokenizer.bos, *tokenizer.encode(text)]} for text in openings]
    prompts = to_mesh(pad_prompts(rows, config.max_prompt, tokenizer.pad, fixed=True), mesh)

    def evaluate(policy: Params) -> tuple[list[dict[str, str]], dict[str, float]]:
        stories, parts = score_stories(
            openings, rollout(policy, prompts, jax.random.key(0))["response_BR"], tokenizer
        )
        shown = zip(openings, stories, parts["score_B"].tolist(), strict=True)
        rows = [{"opening": o, "story": s, "score": f"{score:.2f}"} for o, s, score in shown]
        return rows[:4], {f"validation/{name[:-2]}": float(x.mean()) for name, x in parts.items()}

    return evaluate


def make_updates(config: Config, apply: Any, scalar_apply: Any):
    """((policy optimiser, policy step), (value optimiser, value step))."""
    policy_loss = partial(
        ppo.policy_objective, apply, clip=config.clip, temperature=config.temperature
    )
    value_loss = partial(ppo.value_objective, scalar_apply, clip=config.value_clip)
    for loss, options in ((policy_loss, config.optimizer), (value_loss, config.value_optimizer)):
        optimizer = make_optimizer(options, config.steps * config.epochs * config.minibatches)
        yield optimizer, make_train_step(loss, optimizer, max_norm=options.clip)


def main(config: Config) -> dict[str, float]:
    mesh = make_mesh(config.mesh)
    if jax.process_count() > 1:
        raise UserError(
            f"{jax.process_count()} hosts: the reward reads all stories on one; start a single process"
        )
    if config.epochs < 1 or config.minibatches < 1 or config.batch_size % config.minibatches:
        given = f"--minibatches={config.minibatches} --epochs={config.epochs}"
        raise UserError(
            f"{given}: at least 1, and minibatches must divide --batch_size={config.batch_size}"
        )
    check_batch("batch_size / --minibatches", config.batch_size // config.minibatches, 1, mesh)
    tokenizer = Tokenizer.load(config.init)
    length = config.max_prompt + config.max_new_tokens
    check_fit(config.model, tokenizer.size, length)
    openings = happy.openings("train")
    source = Source("openings", range(len(openings)), lambda i: {"text": openings[i]})
    sizes = {"batch_size": config.batch_size, "length": config.max_prompt}
    prompts = prompt_batches(source, tokenizer, **sizes, seed=config.seed)
    init, apply = init_and_apply(LanguageModel(config.model))
    reference = starting_params(init, config.model, config.init, mesh, config.seed)
    value_start, scalar_apply = starting_critic(config, {}, mesh)
    rollout = make_rollout(config, apply, tokenizer, eos=tokenizer.bos)
    judge = make_judge(config, apply, scalar_apply, tokenizer.bos)
    evaluate = make_evaluation(config, rollout, tokenizer, mesh)
    (policy_optimizer, policy_step), (value_optimizer, value_step) = make_updates(
        config, apply, scalar_apply
    )

    def fresh(policy: Params, value: Params) -> dict[str, Any]:
        copies = jax.tree.map(
            jnp.copy, (policy, value)
        )  # the steps donate theirs; the reference stays
        states = [
            init_state(p, o)
            for p, o in zip(copies, (policy_optimizer, value_optimizer), strict=True)
        ]
        return {**as_items(states[0]), "value": states[1]}

    saving = Checkpoints(
        config.run,
        config,
        script="stories_ppo",
        tokenizer=tokenizer.model,
        keep=config.keep_checkpoints,
    )
    with saving as checkpoints:
        saved = checkpoints.restore(abstract(jax.eval_shape(fresh, reference, value_start), mesh))
        start, items, position = saved or (
            0,
            init_sharded(fresh, mesh, reference, value_start),
            None,
        )
        if position:
            prompts.restore(position)
        policy, value = from_items(items), items["value"]
        sizes = {
            "batch_size": config.batch_size,
            "length": length,
            "steps": config.steps,
            "start": start,
        }
        others = (policy.opt_state, value, reference)
        print(describe(f"{config.run}: PPO on happy stories", policy.params, others, **sizes))
        unchecked = True
        with Recorder(config.run, config.steps, start, unit="iteration") as record:
            if start == 0 and config.eval_every:
                record.samples(0, evaluate(reference)[0])
            for step in record.steps():
                key = jax.random.fold_in(jax.random.key(config.seed), step)
                batch = rollout(policy.params, to_mesh(next(prompts), mesh), key)
                _, parts = score_stories(
                    [r["text"] for r in prompts.records], batch["response_BR"], tokenizer
                )
                batch, metrics = judge(
                    policy.params, reference, value.params, {**batch, **to_mesh(parts, mesh)}
                )
                for epoch in range(config.epochs):
                    for minibatch in shuffled(
                        batch, jax.random.fold_in(key, epoch), config.minibatches
                    ):
                        policy, policy_metrics = policy_step(policy, minibatch)
                        value, value_metrics = value_step(value, minibatch)
                        if unchecked:
                            check_first_update(policy_metrics, metrics, config, start)
                            unchecked = False
                metrics |= {f"policy/{name}": x for name, x in policy_metrics.items()}
                metrics |= {f"value/{name}": x for name, x in value_metrics.items()}
                record(step, metrics, tokens=config.batch_size * length)
                if record.last.get("kl", 0.0) > config.kl_limit:
                    raise UserError(
                        f"--kl_limit={config.kl_limit}: KL is {record.last['kl']:.1f}; raise --kl_coef"
                    )
                if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                    rows, means = evaluate(policy.params)
                    record.samples(step, rows)
                    record(step, means)
                if checkpoints.due(step, config.save_every, config.steps):
                    record.flush()
                    checkpoints.save(step, {**as_items(policy), "value": value}, prompts.state)
                if checkpoints.stopping:
                    break
    return record.last


if __name__ == "__main__":
    flags.run(main, Config)
