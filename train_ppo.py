"""PPO with a critic, against a reward model: rollout, judgement, advantages, epochs of clipped updates.

    python train_ppo.py --init=runs/align/sft --reward=runs/align/rm --run=runs/align/ppo

Policy and reference start from the SFT run, the value model from the reward model. The defaults follow the
"N+ implementation details" reproduction of Stiennon et al. 2020; contested ones are fields of Config.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import config as flags
from checkpoint import Checkpoints, load_params
from config import UserError, load_config
from data.batches import prompt_batches
from data.tokenizer import Tokenizer
from evaluate import make_gold_evaluation
from generate import SamplingConfig, generate, join
from metrics import Recorder, describe
from model import LanguageModel, ModelConfig, Params, ScalarModel, pure
from objectives import policy as ppo
from objectives.likelihood import inputs
from objectives.reward import last_token
from sharding import MeshConfig, abstract, check_batch, init_sharded, make_mesh, shardings_of, to_mesh
from train_step import OptimizerConfig, TrainState, init_state, make_optimizer, make_train_step

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/ppo"
    """Folder of this run; running again resumes it."""
    init: str = "runs/align/sft"
    """Run that policy and reference start from."""
    reward: str = "runs/align/rm"
    """Run of the reward model, from which the value model starts too."""
    data: str = "world"
    """Prompts: world, a .jsonl file, or tfds:<name>."""
    steps: int = 100
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
    max_prompt: int = 32
    """Longest prompt, in tokens."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Of sampling; policy, reference and updates all divide their logits by it."""
    kl_coef: float = 0.05
    """Beta: reward per token is -beta KL. The initial one, if adaptive."""
    kl_target: float | None = None
    """KL per response, in nats, that an adaptive beta steers to; None: beta is fixed."""
    kl_horizon: int = 10_000
    """Episodes over which the adaptive beta moves."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of KL per token in the reward (objectives/policy.py)."""
    kl_limit: float = 50.0
    """The run ends in an error when KL per response exceeds this: the policy has collapsed."""
    score_at: Literal["last", "after"] = "last"
    """The score is added at the last real token, or at the position after it (where one is left)."""
    missing_eos: Literal["replace", "penalty", "none"] = "replace"
    """A response that never ends: its score becomes, or is lowered by, `missing_eos_score`; or nothing."""
    missing_eos_score: float = -1.0
    """Score of an unended response; with `penalty`, added to its score."""
    discount: float = 1.0
    """Gamma of the returns."""
    smoothing: float = 0.95
    """Lambda of generalised advantage estimation."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation over the iteration."""
    whiten_unbiased: bool = False
    """Variance in whitening divided by n - 1 (TRL, verl) instead of n (OpenAI's and the reproduction's)."""
    clip: float = 0.2
    """Clip of the probability ratio."""
    value_clip: float = 0.2
    """Clip of the value's move within an iteration."""
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=1e-4, schedule="linear", warmup=0, final_lr=0.1, beta2=0.999, eps=1e-5, weight_decay=0.0
    )
    """Of the policy."""
    value_optimizer: OptimizerConfig = OptimizerConfig(
        lr=1e-4, schedule="linear", warmup=0, final_lr=0.1, beta2=0.999, eps=1e-5, weight_decay=0.0
    )
    """Of the value model."""
    model: ModelConfig = ModelConfig()
    """The policy's; taken from --init."""
    mesh: MeshConfig = MeshConfig()
    seed: int = 0
    eval_every: int = 25
    """Iterations between gold evaluations on held-out prompts (world only)."""
    save_every: int = 25
    """Iterations between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""


def make_rollout(config: Config, apply: Any, tokenizer: Tokenizer):
    """rollout(policy, prompts, key): prompts and sampled responses as one batch, [B, T] with T = P + R."""
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    n = config.samples_per_prompt

    @jax.jit
    def rollout(policy: Params, prompts: Batch, key: jax.Array) -> Batch:
        samples = generate(
            apply, config.model, policy, prompts, key, sampling, eos=tokenizer.eos, pad=tokenizer.pad, n=n
        )
        return {**join(prompts, samples), "sampler_logp_BR": samples.logp_BR}

    return rollout


def score_responses(config: Config, raw_B: jax.Array, batch: Batch, eos: int) -> tuple[jax.Array, jax.Array]:
    """The reward model's scores after the missing-EOS rule, and which responses ended, [B] each."""
    ended_B = jnp.any((batch["response_BR"] == eos) & (batch["mask_BR"] > 0), axis=1)
    without = {
        "replace": jnp.full_like(raw_B, config.missing_eos_score),
        "penalty": raw_B + config.missing_eos_score,
        "none": raw_B,
    }[config.missing_eos]
    return jnp.where(ended_B, raw_B, without), ended_B


def make_judge(config: Config, apply: Any, scalar_apply: Any, eos: int):
    """judge(policy, reference, reward, value, batch, beta) -> (batch with targets, metrics)."""

    @jax.jit
    def judge(policy: Params, reference: Params, reward: Params, value: Params, batch: Batch, beta: jax.Array):
        mask_BR, new = batch["mask_BR"], batch["mask_BR"].shape[1]
        logp_BR = ppo.response_logprobs(apply, policy, batch, config.temperature)
        reference_BR = ppo.response_logprobs(apply, reference, batch, config.temperature)
        raw_B = last_token(scalar_apply(reward, *inputs(batch)), batch["segment_ids_BT"])
        score_B, ended_B = score_responses(config, raw_B, batch, eos)

        length_B = mask_BR.sum(1).astype(jnp.int32)
        at_B = length_B - 1
        value_mask_BR = mask_BR
        if config.score_at == "after":  # the state after the last token then has a value and a reward too
            at_B = jnp.minimum(length_B, new - 1)
            value_mask_BR = (jnp.arange(new) <= at_B[:, None]).astype(jnp.float32)
        values_BR = ppo.response_values(scalar_apply, value, batch) * value_mask_BR
        estimate_BR = ppo.kl_estimate(logp_BR, reference_BR, config.kl_estimator)
        rewards_BR = ppo.token_rewards(score_B, estimate_BR, mask_BR, beta, at_B)
        if config.whiten_rewards:
            rewards_BR = ppo.whiten(rewards_BR, value_mask_BR, shift_mean=False, unbiased=config.whiten_unbiased)
        advantages_BR, returns_BR = ppo.gae(
            rewards_BR, values_BR, discount=config.discount, smoothing=config.smoothing
        )
        targets = {
            "old_logp_BR": logp_BR,
            "old_values_BR": values_BR,
            "value_mask_BR": value_mask_BR,
            "advantages_BR": ppo.whiten(advantages_BR, mask_BR, unbiased=config.whiten_unbiased),
            "returns_BR": returns_BR,
        }
        response_BR = batch["response_BR"]
        repeats_BR = (response_BR[:, 1:] == response_BR[:, :-1]) * mask_BR[:, 1:]
        metrics = {
            "score": raw_B.mean(),
            "score_with_eos_rule": score_B.mean(),
            "kl": ((logp_BR - reference_BR) * mask_BR).sum(1).mean(),
            "kl_k3": (ppo.kl_estimate(logp_BR, reference_BR, "k3") * mask_BR).sum(1).mean(),
            "kl_coef": beta,
            "reward": rewards_BR.sum(1).mean(),
            "entropy": -ppo.masked_mean(logp_BR, mask_BR),
            "value": ppo.masked_mean(values_BR, value_mask_BR),
            "length": length_B.mean(),
            "ended": ended_B.mean(),
            "repeats": ppo.masked_mean(repeats_BR, mask_BR[:, 1:]),
            "sampler_gap": jnp.max(jnp.abs(logp_BR - batch["sampler_logp_BR"]) * mask_BR),
        }
        batch = {name: x for name, x in batch.items() if name != "sampler_logp_BR"}
        return {**batch, **targets}, metrics

    return judge


@partial(jax.jit, static_argnames="parts")
def shuffled(batch: Batch, key: jax.Array, parts: int) -> list[Batch]:
    """The rows of `batch` in random order, cut into `parts` minibatches."""
    order_B = jax.random.permutation(key, batch["tokens_BT"].shape[0])
    cut = {name: x[order_B].reshape(parts, -1, *x.shape[1:]) for name, x in batch.items()}
    return [{name: x[i] for name, x in cut.items()} for i in range(parts)]


def check_first_update(metrics: dict[str, Any], float32: bool) -> None:
    """Before the first update of a run policy = old policy; a breach is a bug, not a setting."""
    values = {name: float(metrics[name]) for name in ("loss/approx_kl", "loss/clipped", "sampler_gap")}
    assert values["loss/approx_kl"] < 1e-9 and values["loss/clipped"] == 0, f"ratio is not 1: {values}"
    assert values["sampler_gap"] < 1e-4 or not float32, f"sampler and trainer disagree: {values}"


def load_models(config: Config, mesh: Any) -> tuple[Params, Params, ModelConfig]:
    """The SFT policy and the reward model on the mesh, and the latter's ModelConfig; raises UserError."""
    if config.model.preset != (saved := ModelConfig(**load_config(config.init)["model"])).preset or config.model != saved:
        raise UserError(f"--model: differs from the model of --init={config.init}; leave --model.* out")
    reward_config = load_config(config.reward)
    if reward_config["script"] != "train_rm":
        raise UserError(f"--reward={config.reward}: a run of {reward_config['script']}; name one of train_rm")
    reward_model = ModelConfig(**reward_config["model"])
    trees = []
    for run, model in ((config.init, LanguageModel(config.model)), (config.reward, ScalarModel(reward_model))):
        shapes = jax.eval_shape(pure(model)[0], jax.random.key(0))
        trees.append(load_params(run, shapes=abstract(shapes, mesh)))
    return *trees, reward_model


def check(config: Config, tokenizer: Tokenizer) -> None:
    """Raises UserError for settings that cannot run together."""
    if Tokenizer.load(config.reward).sha256 != tokenizer.sha256:
        raise UserError(f"--reward={config.reward}: its tokenizer is not that of --init={config.init}; train it from there")
    for name, parts in (("minibatches", config.minibatches), ("samples_per_prompt", config.samples_per_prompt)):
        if parts < 1 or config.batch_size % parts:
            raise UserError(f"--{name}={parts}: must divide --batch_size={config.batch_size} without remainder")
    if config.max_prompt + config.max_new_tokens > config.model.context:
        raise UserError(
            f"--max_prompt={config.max_prompt} and --max_new_tokens={config.max_new_tokens}: together over the "
            f"model's context of {config.model.context} tokens"
        )


def main(config: Config) -> dict[str, float]:
    mesh = make_mesh(config.mesh)
    tokenizer = Tokenizer.load(config.init)
    check(config, tokenizer)
    check_batch("batch_size", config.batch_size // config.minibatches, config.microbatches, mesh)
    reference, reward, reward_model = load_models(config, mesh)
    _, apply = pure(LanguageModel(config.model))
    _, scalar_apply = pure(ScalarModel(reward_model))
    prompts = prompt_batches(
        config.data, tokenizer, config.batch_size // config.samples_per_prompt, max_length=config.max_prompt, seed=config.seed
    )

    updates = config.steps * config.epochs * config.minibatches
    rollout = make_rollout(config, apply, tokenizer)
    judge = make_judge(config, apply, scalar_apply, tokenizer.eos)
    losses = (
        partial(ppo.policy_objective, apply, clip=config.clip, temperature=config.temperature),
        partial(ppo.value_objective, scalar_apply, clip=config.value_clip),
    )
    optimizers = [make_optimizer(o, updates) for o in (config.optimizer, config.value_optimizer)]
    policy_step, value_step = (
        make_train_step(loss, optimizer, config.microbatches, o.clip)
        for loss, optimizer, o in zip(losses, optimizers, (config.optimizer, config.value_optimizer), strict=True)
    )
    copy = partial(jax.tree.map, jnp.copy)  # the steps donate their states; reference and reward stay
    states = [
        init_sharded(partial(init_state, optimizer=optimizer), mesh, copy(params))
        for params, optimizer in zip((reference, reward), optimizers, strict=True)
    ]
    ...
