"""What plan.py compiles of each script: the script's own jitted functions, and the shapes that they are called with."""

import os
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data.batches import pad_comparisons, pad_examples, pad_prompts
from lora import lora_base, trainable_part, with_adapters
from model import LanguageModel, ScalarModel, empty_cache, init_and_apply
from model_config import ModelConfig, stored_model
from objectives import direct
from objectives.group import PAPERS, best_and_worst
from rewards.models import make_model_scorer
from rewards.scorer import is_function
from rollout import make_rollout, shuffled
from runtime.errors import require
from runtime.flags import fill_paper_defaults
from sharding import BATCH, abstract, check_batch
from train_state import init_state
from train_step import TrainState


class Program(NamedTuple):
    """A jitted function as the script calls it."""

    name: str
    function: Any
    args: tuple[Any, ...]
    held: tuple[str, ...]
    """Those of Plan.held that are among `args`."""
    calls: int
    """In a step of the script."""
    model_flops: float
    """Of a call, all chips together: what the mathematics needs, nothing computed twice."""
    rows: int
    """What it works on at a time and may be cut into micro-batches: sequences, or pairs of them."""
    gradients: Any = None
    """What has a gradient."""
    cache: Any = None
    """The KV cache that it makes."""


class Plan(NamedTuple):
    """A script's step: the trees that lie in memory all the time, and the programs."""

    held: dict[str, Any]
    programs: list[Program]
    tokens: int
    """A step's, as the script counts them."""


def forward_flops(c: ModelConfig, rows: int, length: int, unembedded: int) -> float:
    """Of matmuls in one forward pass, `unembedded` positions a row to logits; causal attention counts half."""
    layer = 2 * c.width * (c.heads + c.kv_heads) * c.head_dim + 3 * c.width * c.mlp_width
    attention = 2 * length * length * c.heads * c.head_dim
    return rows * (
        c.layers * (2 * length * layer + attention) + 2 * unembedded * c.vocab * c.width
    )


def on_batch_axes(tree: Any, mesh: Mesh) -> Any:
    """Shapes of arrays as to_mesh lays them."""
    place = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def whole_model(model: Any, mesh: Mesh) -> Any:
    """Shapes of all parameters, in their shardings."""
    return abstract(jax.eval_shape(init_and_apply(model)[0], a_key()), mesh)


def a_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def fresh(config: Any, params: Any, optimizer: Any, mesh: Mesh) -> TrainState:
    """Shapes of the state that a script starts from `params`."""
    start = lambda params, key: init_state(trainable_part(config.lora, params, key), optimizer)
    return abstract(jax.eval_shape(start, params, a_key()), mesh)


def full_row(length: int) -> dict[str, list[int]]:
    """An example that fills a row."""
    return {"tokens": [0] * length, "mask": [1] * length}


def likelihood(script: Any, config: Any, mesh: Mesh) -> Plan:
    """train_lm and train_sft: one step on packed rows."""
    batch = pad_examples([full_row(config.length)] * config.batch_size, config.length, 0)
    check_batch(
        "batch_size",
        config.batch_size,
        config.microbatches,
        mesh,
        config.length,
        config.model.layers,
    )
    flops = 3 * forward_flops(config.model, config.batch_size, config.length, config.length)
    return update(
        script, config, mesh, LanguageModel(config.model), batch, flops, config.batch_size
    )


def pairs_of(config: Any) -> dict[str, Any]:
    """A batch of comparisons of two responses, every row filled."""
    pair = {
        "prompts": [[0]] * 2,
        "responses": [[0] * (config.length - 1)] * 2,
        "ranking": [1, 2],
        "margin": 0.0,
    }
    return pad_comparisons([pair] * config.batch_size, config.length, 0)


def ranking(script: Any, config: Any, mesh: Mesh) -> Plan:
    """train_rm: one step on pairs."""
    check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length)
    rows, unembedded = 2 * config.batch_size, config.length / 2 if config.lm_coef else 0
    flops = 3 * forward_flops(config.model, rows, config.length, unembedded)
    return update(script, config, mesh, ScalarModel(config.model), pairs_of(config), flops, rows)


def preferences(script: Any, config: Any, mesh: Mesh) -> Plan:
    """train_dpo with a loss on pairs: one step, and the reference's pass over its batch."""
    config = fill_paper_defaults(config, direct.PAPERS.get(config.loss, direct.USUAL))
    script.check(config)
    check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length)
    known = config.loss != "kto"
    require(known, f"--loss={config.loss}: plan.py knows losses on pairs only, such as dpo")
    model, batch = LanguageModel(config.model), pairs_of(config)
    apply, rows = init_and_apply(model)[1], 2 * config.batch_size
    forward = forward_flops(config.model, rows, config.length, config.length)
    if not script.make_objective(config, apply)[1]:
        return update(script, config, mesh, model, batch, 3 * forward, rows)
    judged = {**batch, "reference_BC": np.zeros(batch["ranks_BC"].shape, np.float32)}
    plan = update(script, config, mesh, model, judged, 3 * forward, rows)
    reference, held = whole_model(model, mesh), tuple(plan.held)
    if config.reference == "online" and not config.lora.rank:
        plan.held["reference"] = reference
        held = ("reference",)
    elif config.reference == "online":  # the base of adapters is the reference
        held = ("frozen base",)
    # Cached, it judges all batches before there is a state: then nothing else is held.
    judge = jax.jit(partial(direct.candidate_logprobs, apply))
    args = reference, on_batch_axes(batch, mesh)
    plan.programs.insert(0, Program("reference", judge, args, held, 1, forward, rows))
    return plan


def update(
    script: Any, config: Any, mesh: Mesh, model: Any, batch: Any, flops: float, rows: int
) -> Plan:
    """A script whose step is one update on `rows` sequences."""
    _, optimizer, _, step = script.make_update(config)
    params = whole_model(model, mesh)
    state, base = fresh(config, params, optimizer, mesh), lora_base(config.lora, params)
    held = {"parameters": state.params, "optimiser": state.opt_state}
    if base is not None:
        held["frozen base"] = base
    batch = on_batch_axes(batch, mesh)
    program = Program(
        "update",
        step,
        (state, batch, base),
        tuple(held),
        1,
        flops,
        config.batch_size,
        gradients=state.params,
    )
    return Plan(held, [program], rows * config.length)


def reward_models(config: Any, mesh: Mesh) -> tuple[dict[str, ModelConfig], dict[str, Any]]:
    """Of the runs in --reward: the models, the policy's where there is no such run yet, and parameters' shapes."""
    models = {run: config.model for run in config.reward if not is_function(run)}
    for run in models:
        if os.path.exists(os.path.join(run, "config.json")):
            models[run] = stored_model(run)
    return models, {run: whole_model(ScalarModel(model), mesh) for run, model in models.items()}


def scored(
    config: Any,
    mesh: Mesh,
    held: Any,
    models: dict[str, ModelConfig],
    rewards: dict[str, Any],
    batch: Any,
):
    """Programs by which the reward models score a batch, and the shapes of the scores and of the scalars."""
    rows, length = config.batch_size, config.max_prompt + config.max_new_tokens
    shape = jax.ShapeDtypeStruct((rows,), jnp.float32, sharding=NamedSharding(mesh, BATCH))
    programs, scores, scalars = [], dict.fromkeys(config.reward, shape), {}
    for run, model in models.items():
        score, args, ours = (
            make_model_scorer(model),
            (rewards[run], batch),
            tuple(held.keys() & {run}),
        )
        scores[run], scalars[run] = on_batch_axes(jax.eval_shape(score, *args), mesh)
        programs.append(
            Program(
                f"score {run}", score, args, ours, 1, forward_flops(model, rows, length, 0), rows
            )
        )
    return programs, scores, scalars


def sampled(
    config: Any, mesh: Mesh, apply: Any, policy: Any, held: tuple[str, ...]
) -> tuple[Program, Any]:
    """The rollout by the `policy`, adapters attached, and the shapes of the batch that it makes."""
    c, rows, n = config.model, config.batch_size, config.samples_per_prompt
    prompts = pad_prompts([full_row(config.max_prompt)] * (rows // n), config.max_prompt, 0)
    rollout, asked = (
        make_rollout(config, apply, SimpleNamespace(eos=1, pad=0), n),
        on_batch_axes(prompts, mesh),
    )
    batch = on_batch_axes(jax.eval_shape(rollout, policy, asked, a_key()), mesh)
    length = config.max_prompt + config.max_new_tokens
    heads = "tensor" if c.kv_heads % mesh.shape["tensor"] == 0 else None
    cache = [  # as XLA lays it: rows with the batch, key/value heads over tensor where they divide
        jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, P(None, BATCH[0], heads))
        )
        for x in jax.tree.leaves(jax.eval_shape(lambda: empty_cache(c, rows, length)))
        if x.ndim == 5
    ]
    flops = forward_flops(c, rows, length, config.max_new_tokens + 1)
    return Program(
        "rollout", rollout, (policy, asked, a_key()), held, 1, flops, rows, cache=cache
    ), batch


def attached(config: Any, base: Any, state: TrainState, mesh: Mesh) -> Any:
    """Shapes of the weights that a model is applied with: the state's, or its adapters on their base."""
    return abstract(jax.eval_shape(partial(with_adapters, config.lora), base, state.params), mesh)


def minibatch_of(batch: Any, parts: int, mesh: Mesh) -> Any:
    """Shapes of what an update takes."""
    return on_batch_axes(jax.eval_shape(partial(shuffled, parts=parts), batch, a_key())[0], mesh)


def ppo(script: Any, config: Any, mesh: Mesh) -> Plan:
    """train_ppo: rollout, scores, judgement, and the updates of an iteration. Reward models are those that exist."""
    script.check(config, mesh)
    c, length = config.model, config.max_prompt + config.max_new_tokens
    models, rewards = reward_models(config, mesh)
    scalar = next(iter(models.values()), c)
    apply, scalar_apply = (
        init_and_apply(LanguageModel(c))[1],
        init_and_apply(ScalarModel(scalar))[1],
    )
    reference, critic = whole_model(LanguageModel(c), mesh), whole_model(ScalarModel(scalar), mesh)
    (policy_optimizer, policy_step), (value_optimizer, value_step) = script.make_updates(
        config, apply, scalar_apply
    )
    policy = fresh(config, reference, policy_optimizer, mesh)
    value = fresh(config, critic, value_optimizer, mesh)
    held = {
        "policy": policy.params, "policy optimiser": policy.opt_state, "value": value.params,
        "value optimiser": value.opt_state,
    }  # fmt: skip
    if (
        not config.offload
    ):  # else they are on the devices while they judge, and among the judges' arguments
        held |= {"reference": reference, **rewards}
    # With adapters, the bases are the reference's and the first reward model's own arrays.
    bases = [lora_base(config.lora, params) for params in (reference, critic)]
    if config.lora.rank and not models:
        held["value base"] = critic
    wholes = [
        attached(config, base, state, mesh)
        for base, state in zip(bases, (policy, value), strict=True)
    ]
    with_base = lambda name, base: (name, base) if config.lora.rank else (name,)
    policy_held, value_held = (
        with_base("policy", "reference"),
        with_base("value", next(iter(models), "value base")),
    )

    rollout, batch = sampled(config, mesh, apply, wholes[0], policy_held)
    scoring, scores, scalars = scored(config, mesh, held, models, rewards, batch)
    judge = script.make_judge(config, apply, scalar_apply, eos=1, newlines=[0])
    args = (
        wholes[0],
        reference,
        wholes[1],
        batch,
        scores,
        scalars,
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    minibatch = minibatch_of(jax.eval_shape(judge, *args)[0], config.minibatches, mesh)
    rows, part, mixed = config.batch_size, config.batch_size // config.minibatches, minibatch
    if config.ptx_data is not None:
        text = on_batch_axes(pad_examples([full_row(length)] * part, length, 0), mesh)
        with_text = partial(script.ppo.with_text, coefficient=config.ptx_coef)
        mixed = on_batch_axes(jax.eval_shape(with_text, minibatch, text), mesh)

    new, calls = config.max_new_tokens + 1, config.epochs * config.minibatches
    of = lambda model, count, unembedded: forward_flops(model, count, length, unembedded)
    judging = 2 * of(c, rows, new) + of(scalar, rows, 0)
    texts = of(c, part, length) if config.ptx_data is not None else 0.0
    policy_flops, value_flops = 3 * (of(c, part, new) + texts), 3 * of(scalar, part, 0)
    judge_held = tuple(held.keys() & {*policy_held, *value_held, "reference"})
    programs = [
        rollout,
        *scoring,
        Program("judge", judge, args, judge_held, 1, judging, rows),
        Program("value update", value_step, (value, minibatch, bases[1]), (*value_held, "value optimiser"), calls,
                value_flops, part, gradients=value.params),
        Program("policy update", policy_step, (policy, mixed, bases[0]), (*policy_held, "policy optimiser"),
                calls, policy_flops, part, gradients=policy.params),
    ]  # fmt: skip
    return Plan(held, programs, rows * length)


def grpo(script: Any, config: Any, mesh: Mesh) -> Plan:
    """train_grpo: one rollout of an iteration, its scores by reward models, judgement, and the updates."""
    config = fill_paper_defaults(config, PAPERS[config.method])
    script.check(config, mesh)
    c, n, apply = (
        config.model,
        config.samples_per_prompt,
        init_and_apply(LanguageModel(config.model))[1],
    )
    advantages, objective = script.make_method(config, apply)
    optimizer, step = script.make_update(config, objective)
    reference = whole_model(LanguageModel(c), mesh)
    policy, base = fresh(config, reference, optimizer, mesh), lora_base(config.lora, reference)
    models, rewards = reward_models(config, mesh)
    held = {
        "policy": policy.params,
        "optimiser": policy.opt_state,
        "reference": reference,
        **rewards,
    }
    policy_held = ("policy", "reference") if config.lora.rank else ("policy",)
    whole = attached(config, base, policy, mesh)

    rollout, batch = sampled(config, mesh, apply, whole, policy_held)
    rows, length, new = (
        config.batch_size,
        config.max_prompt + config.max_new_tokens,
        config.max_new_tokens + 1,
    )
    scoring, scores, scalars = scored(config, mesh, held, models, rewards, batch)
    judge, args = (
        script.make_judge(config, apply, advantages, 1),
        (whole, reference, batch, scores, scalars),
    )
    judged, unembedded, flops = (
        jax.eval_shape(judge, *args)[0],
        new,
        2 * forward_flops(c, rows, length, new),
    )
    programs = [
        rollout,
        *scoring,
        Program("judge", judge, args, ("policy", "reference"), 1, flops, rows),
    ]
    if (
        config.method == "online_dpo"
    ):  # the best and the worst of each group, whole rows unembedded
        judged, unembedded = jax.eval_shape(partial(best_and_worst, group=n), judged), length
        rows = rows // n * 2
    part, calls = rows // config.minibatches, config.epochs * config.minibatches
    minibatch, flops = (
        minibatch_of(judged, config.minibatches, mesh),
        3 * forward_flops(c, part, length, unembedded),
    )
    programs.append(Program("update", step, (policy, minibatch, base), (*policy_held, "optimiser"), calls, flops, part,
                            gradients=policy.params))  # fmt: skip
    return Plan(held, programs, config.batch_size * length)


SCRIPTS = {
    "train_lm": likelihood, "train_sft": likelihood, "train_rm": ranking, "train_dpo": preferences, "train_ppo": ppo,
    "train_grpo": grpo,
}  # fmt: skip
