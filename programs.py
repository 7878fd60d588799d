"""What plan.py compiles of each script: the script's own jitted functions, and the shapes that they are called with."""

import os
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from config import load_config
from data.batches import pad_comparisons, pad_examples, pad_prompts
from lora import attach, frozen_part, trained_part
from model import LanguageModel, ModelConfig, ScalarModel, empty_cache, pure
from rollout import make_rollout, shuffled
from sharding import BATCH, abstract, check_batch
from train_step import TrainState, init_state


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
    """Sequences that it works on at a time."""
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
    layer = 2 * c.width * (c.heads + c.kv_heads) * c.head_width + 3 * c.width * c.hidden
    attention = 2 * length * length * c.heads * c.head_width
    return rows * (c.layers * (2 * length * layer + attention) + 2 * unembedded * c.vocab * c.width)


def on_batch_axes(tree: Any, mesh: Mesh) -> Any:
    """Shapes of arrays as to_mesh lays them."""
    place = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def whole_model(model: Any, mesh: Mesh) -> Any:
    """Shapes of all parameters, in their shardings."""
    return abstract(jax.eval_shape(pure(model)[0], a_key()), mesh)


def a_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def fresh(config: Any, params: Any, optimizer: Any, mesh: Mesh) -> TrainState:
    """Shapes of the state that a script starts from `params`."""
    start = lambda params, key: init_state(trained_part(config.lora, params, key), optimizer)  # noqa: E731
    return abstract(jax.eval_shape(start, params, a_key()), mesh)


def full_row(length: int) -> dict[str, list[int]]:
    """An example that fills a row."""
    return {"tokens": [0] * length, "mask": [1] * length}


def likelihood(script: Any, config: Any, mesh: Mesh) -> Plan:
    """train_lm and train_sft: one step on packed rows."""
    batch = pad_examples([full_row(config.length)] * config.batch_size, config.length, 0)
    check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length, config.model.layers)
    flops = 3 * forward_flops(config.model, config.batch_size, config.length, config.length)
    return update(script, config, mesh, LanguageModel(config.model), batch, flops, config.batch_size)


def ranking(script: Any, config: Any, mesh: Mesh) -> Plan:
    """train_rm: one step on pairs."""
    check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length)
    pair = {"prompts": [[0]] * 2, "responses": [[0] * (config.length - 1)] * 2, "ranking": [1, 2], "margin": 0.0}
    batch = pad_comparisons([pair] * config.batch_size, config.length, 0)
    rows, unembedded = 2 * config.batch_size, config.length / 2 if config.lm_coefficient else 0
    flops = 3 * forward_flops(config.model, rows, config.length, unembedded)
    return update(script, config, mesh, ScalarModel(config.model), batch, flops, rows)


def update(script: Any, config: Any, mesh: Mesh, model: Any, batch: Any, flops: float, rows: int) -> Plan:
    """A script whose step is one update on `rows` sequences."""
    _, optimizer, _, step = script.make_update(config)
    params = whole_model(model, mesh)
    state, base = fresh(config, params, optimizer, mesh), frozen_part(config.lora, params)
    held = {"parameters": state.params, "optimiser": state.opt_state}
    if base is not None:
        held["frozen base"] = base
    batch = on_batch_axes(batch, mesh)
    program = Program("update", step, (state, batch, base), tuple(held), 1, flops, rows, gradients=state.params)
    return Plan(held, [program], rows * config.length)


def ppo(script: Any, config: Any, mesh: Mesh) -> Plan:
    """train_ppo: rollout, judgement, and the updates of an iteration. The reward model is of --reward, if it exists."""
    script.check(config, mesh)
    c, length, n = config.model, config.max_prompt + config.max_new_tokens, config.samples_per_prompt
    known = os.path.exists(os.path.join(config.reward, "config.json"))
    scalar = ModelConfig(**load_config(config.reward)["model"]) if known else c
    apply, scalar_apply = pure(LanguageModel(c))[1], pure(ScalarModel(scalar))[1]
    reference, reward = whole_model(LanguageModel(c), mesh), whole_model(ScalarModel(scalar), mesh)
    (policy_optimizer, policy_step), (value_optimizer, value_step) = script.make_updates(config, apply, scalar_apply)
    policy = fresh(config, reference, policy_optimizer, mesh)
    value = fresh(config, reward, value_optimizer, mesh)
    held = {
        "policy": policy.params, "policy optimiser": policy.opt_state, "value": value.params,
        "value optimiser": value.opt_state, "reference": reference, "reward": reward,
    }  # fmt: skip
    if config.offload:  # the judge's alone, and among its arguments
        del held["reference"], held["reward"]
    bases = [frozen_part(config.lora, params) for params in (reference, reward)]
    wholes = [  # with adapters, the bases are the reference's and the reward model's own arrays
        abstract(jax.eval_shape(partial(attach, config.lora), base, state.params), mesh)
        for base, state in zip(bases, (policy, value), strict=True)
    ]
    with_base = lambda name, base: (name, base) if config.lora.rank else (name,)  # noqa: E731

    rows, part = config.batch_size, config.batch_size // config.minibatches
    prompts = pad_prompts([full_row(config.max_prompt)] * (rows // n), config.max_prompt, 0)
    rollout = make_rollout(config, apply, SimpleNamespace(eos=1, pad=0), n)
    judge = script.make_judge(config, apply, scalar_apply, eos=1, newlines=[0])
    asked = on_batch_axes(prompts, mesh)
    sampled = on_batch_axes(jax.eval_shape(rollout, wholes[0], asked, a_key()), mesh)
    models, beta = (wholes[0], reference, reward, wholes[1]), jax.ShapeDtypeStruct((), jnp.float32)
    judged = jax.eval_shape(judge, *models, sampled, beta)[0]
    minibatch = on_batch_axes(jax.eval_shape(partial(shuffled, parts=config.minibatches), judged, a_key())[0], mesh)
    if config.ptx_data is not None:
        text = on_batch_axes(pad_examples([full_row(length)] * part, length, 0), mesh)
        mixed = jax.eval_shape(partial(script.ppo.with_text, coefficient=config.ptx_coef), minibatch, text)
        minibatch_policy = on_batch_axes(mixed, mesh)
    else:
        minibatch_policy = minibatch

    heads = "tensor" if c.kv_heads % mesh.shape["tensor"] == 0 else None
    cache = [  # as XLA lays it: rows with the batch, key/value heads over tensor where they divide
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(None, BATCH[0], None, heads)))
        for x in jax.tree.leaves(jax.eval_shape(lambda: empty_cache(c, rows, length)))
        if x.ndim == 5
    ]
    new, calls = config.max_new_tokens + 1, config.epochs * config.minibatches
    of = lambda model, count, unembedded: forward_flops(model, count, length, unembedded)  # noqa: E731
    judging = 2 * of(c, rows, new) + 2 * of(scalar, rows, 0)
    texts = forward_flops(c, part, length, length) if config.ptx_data is not None else 0.0
    policy_flops, value_flops = 3 * (of(c, part, new) + texts), 3 * of(scalar, part, 0)
    policy_held = with_base("policy", "reference")
    judge_held = tuple(held.keys() & {"policy", "value", "reference", "reward"})
    value_held = with_base("value", "reward")
    programs = [
        Program("rollout", rollout, (wholes[0], asked, a_key()), policy_held, 1, of(c, rows, new), rows, cache=cache),
        Program("judge", judge, (*models, sampled, beta), judge_held, 1, judging, rows),
        Program("value update", value_step, (value, minibatch, bases[1]), (*value_held, "value optimiser"), calls,
                value_flops, part, gradients=value.params),
        Program("policy update", policy_step, (policy, minibatch_policy, bases[0]), (*policy_held, "policy optimiser"),
                calls, policy_flops, part, gradients=policy.params),
    ]  # fmt: skip
    return Plan(held, programs, rows * length)


SCRIPTS = {"train_lm": likelihood, "train_sft": likelihood, "train_rm": ranking, "train_ppo": ppo}
