"""Make the programs of a script that plan.py compiles: its own jitted functions, and their shapes.

A script names its programs in one place: the factories of its module (`make_update`,
`make_advantages` and so on), which its `main` calls, and which are called here. What this module
adds is the shapes that `main` would call them with. They are not recorded from an iteration of
`main`: the code between its jitted functions (files, tokenizers, scores computed on the host,
checks of values) needs arrays with values, and nothing runs a program for chips that are not here.

A script or a fork is told by the factories that its module has, never by its name: see LAYOUTS.
"""

import inspect
import os
import pathlib
from collections.abc import Callable
from functools import partial
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
from objectives.group import PAPERS
from rewards.scorer import is_function, make_model_scorer
from rollout import RolloutConfig, WideRollout, make_rollout, shuffled
from runtime.errors import UserError, require
from runtime.flags import fill_paper_defaults
from runtime.run_folder import path_from_root
from sampling import SamplingConfig
from sharding import BATCH, abstract, check_batch
from train_state import init_state
from train_step import TrainState


class Program(NamedTuple):
    """A jitted function as the script calls it."""

    name: str
    function: Any
    args: tuple[Any, ...]
    """Trees of ShapeDtypeStructs with shardings."""
    held: tuple[str, ...]
    """Names in Plan.held passed as arguments."""
    calls: int
    """Calls in a step of the script."""
    model_flops: float
    """FLOPs of a call, all chips together: what the mathematics needs, nothing computed twice."""
    rows: int
    """Rows that it works on at a time and may be cut into micro-batches: sequences, or pairs."""
    gradients: Any = None
    """The differentiated tree; None without a gradient."""
    cache: Any = None
    """The KV cache that it makes; None without."""
    mesh: Mesh | None = None
    """The mesh that it runs on, of the run's devices; None: the run's."""


class Plan(NamedTuple):
    """A script's step: the trees that lie in memory all the time, and the programs."""

    held: dict[str, Any]
    """Trees of ShapeDtypeStructs with shardings, by the names that the tables show."""
    programs: list[Program]
    tokens: int
    """Tokens of a step, as the script counts them."""


# --- shapes


def forward_flops(config: ModelConfig, rows: int, length: int, unembedded: float) -> float:
    """Return the FLOPs of matmuls in one forward pass over `rows` sequences of `length` tokens.

    `unembedded`: positions a row that become logits. Causal attention counts half, and of a layer
    with a window the keys in it.
    """
    # q and o for each query head, k and v for each key/value head; then SwiGLU's three, or two.
    projections = 2 * config.width * (config.heads + config.kv_heads) * config.head_dim
    mlp = (3 if config.gated else 2) * config.width * config.mlp_width
    if config.experts:
        mlp = config.experts_per_token * mlp + config.width * config.experts
    layers = config.layers * 2 * length * (projections + mlp)

    # Scores and weighted values, of the most keys that a query of each layer sees: the first
    # queries see fewer, on average half of them.
    for has_window in config.windowed_layers:
        most = min(config.window or length, length) if has_window else length
        seen = most * length - most * most / 2
        layers += 4 * seen * config.heads * config.head_dim
    return rows * (layers + 2 * unembedded * config.vocab * config.width)


def on_batch_axes(tree: Any, mesh: Mesh) -> Any:
    """Return the shapes of `tree` with the sharding that to_mesh gives a batch."""
    # Rows over data and fsdp.
    place = NamedSharding(mesh, BATCH)

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(placed, tree)


def abstract_key() -> Any:
    """Return the shape of a random key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def abstract_params(model: Any, mesh: Mesh) -> Any:
    """Return the shapes of all parameters of `model`, a Flax module, in their shardings."""
    return abstract(jax.eval_shape(init_and_apply(model)[0], abstract_key()), mesh)


def full_row(length: int) -> dict[str, list[int]]:
    """Return an example that fills a row."""
    return {"tokens": [0] * length, "mask": [1] * length}


def full_pairs(config: Any) -> dict[str, Any]:
    """Return a batch of comparisons of two responses, every row filled."""
    # A prompt of one token and a response that fills the rest.
    pair = {
        "prompts": [[0]] * 2,
        "responses": [[0] * (config.length - 1)] * 2,
        "ranking": [1, 2],
        "margin": 0.0,
    }
    return pad_comparisons([pair] * config.batch_size, config.length, 0)


class Trained(NamedTuple):
    """The shapes of a model that a script updates."""

    state: TrainState
    base: Any
    """The frozen parameters under its adapters; None without adapters."""
    full: Any
    """The parameters that the model is applied with."""


def trained(config: Any, params: Any, optimizer: Any, mesh: Mesh) -> Trained:
    """Return the shapes of the model that a script starts to train from `params`."""

    def start(params: Any, key: jax.Array) -> TrainState:
        return init_state(trainable_part(config.lora, params, key), optimizer)

    # Nothing is computed: all of this is tracing.
    state = abstract(jax.eval_shape(start, params, abstract_key()), mesh)
    base = lora_base(config.lora, params)
    full = jax.eval_shape(partial(with_adapters, config.lora), base, state.params)
    return Trained(state, base, abstract(full, mesh))


# --- scripts that update one model on batches of a data set


def one_update(
    script: Any, config: Any, mesh: Mesh, model: Any, batch: Any, flops: float, rows: int
) -> Plan:
    """Lay out a step that is one update of `model` on `batch`, of `rows` sequences."""
    # The script's own step, and the state that it starts from.
    _, optimizer, _, step = script.make_update(config)
    state, base, _ = trained(config, abstract_params(model, mesh), optimizer, mesh)
    # With adapters, their base lies in memory too.
    held = {"parameters": state.params, "optimiser": state.opt_state}
    if base is not None:
        held["frozen base"] = base
    program = Program(
        "update",
        step,
        (state, on_batch_axes(batch, mesh), base),
        held=tuple(held),
        calls=1,
        model_flops=flops,
        rows=config.batch_size,
        gradients=state.params,
    )
    return Plan(held, [program], rows * config.length)


def likelihood(script: Any, config: Any, mesh: Mesh) -> Plan:
    """Lay out train_lm and train_sft: one step on packed rows."""
    rows = config.batch_size
    check_batch("batch_size", rows, config.microbatches, mesh, config.length, config.model.layers)
    # Packed rows are full: the most that a step can have to do.
    batch = pad_examples([full_row(config.length)] * rows, config.length, 0)
    flops = 3 * forward_flops(config.model, rows, config.length, config.length)
    return one_update(script, config, mesh, LanguageModel(config.model), batch, flops, rows)


def ranking(script: Any, config: Any, mesh: Mesh) -> Plan:
    """Lay out train_rm: one step on pairs."""
    check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length)
    rows = 2 * config.batch_size
    # Of the language-model loss on chosen responses, half of the positions are unembedded.
    unembedded = config.length / 2 if config.lm_coef else 0
    flops = 3 * forward_flops(config.model, rows, config.length, unembedded)
    batch = full_pairs(config)
    return one_update(script, config, mesh, ScalarModel(config.model), batch, flops, rows)


def preferences(script: Any, config: Any, mesh: Mesh) -> Plan:
    """Lay out train_dpo with a loss on pairs: one step, and the reference's pass."""
    config = fill_paper_defaults(config, direct.PAPERS.get(config.loss, direct.USUAL))
    script.check(config)
    check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length)
    require(
        config.loss != "kto",
        f"--loss={config.loss}: plan.py knows losses on pairs only, such as dpo",
    )
    model = LanguageModel(config.model)
    _, apply = init_and_apply(model)
    batch = full_pairs(config)
    # A pair is two sequences.
    rows = 2 * config.batch_size
    forward = forward_flops(config.model, rows, config.length, config.length)
    # Some losses have no reference: then the step is all.
    if not script.make_objective(config, apply).needs_reference:
        return one_update(script, config, mesh, model, batch, 3 * forward, rows)
    with_reference = {**batch, "reference_BC": np.zeros(batch["ranks_BC"].shape, np.float32)}
    plan = one_update(script, config, mesh, model, with_reference, 3 * forward, rows)

    # Cached, the reference reads all batches before there is a state: nothing else is held then.
    held = tuple(plan.held)
    reference = abstract_params(model, mesh)
    if config.reference == "online" and config.lora.rank:
        held = ("frozen base",)
    elif config.reference == "online":
        plan.held["reference"] = reference
        held = ("reference",)
    logprobs = jax.jit(partial(direct.candidate_logprobs, apply))
    args = (reference, on_batch_axes(batch, mesh))
    plan.programs.insert(0, Program("reference", logprobs, args, held, 1, forward, rows))
    return plan


# --- pieces of the scripts that sample


def reward_models(config: Any, mesh: Mesh) -> tuple[dict[str, ModelConfig], dict[str, Any]]:
    """Return the shapes of the models in --reward by their run, and of their parameters.

    A run that is not there yet is taken to have the policy's shape. Functions and servers are left
    out.
    """
    # Of a function or a server nothing lies on these chips.
    models = {}
    for run in config.reward:
        if is_function(run):
            continue
        exists = os.path.exists(os.path.join(run, "config.json"))
        models[run] = stored_model(run) if exists else config.model
    params = {}
    for run, model in models.items():
        params[run] = abstract_params(ScalarModel(model), mesh)
    return models, params


def rollout_programs(
    config: Any, mesh: Mesh, apply: Any, policy: Any, held: tuple[str, ...]
) -> tuple[list[Program], Any]:
    """Lay out the rollout by `policy`, full parameters; return it and the shapes of its batch.

    With --rollout.tensor there is a program before it, which lays the weights.
    """
    model = config.model
    rows = config.batch_size
    n = config.samples_per_prompt
    # A fork may have no such flags.
    tensor = getattr(config, "rollout", RolloutConfig()).tensor
    int8 = getattr(config, "int8", False)
    # The ids of the control tokens do not change the shapes.
    full_prompts = [full_row(config.max_prompt)] * (rows // n)
    prompts = on_batch_axes(pad_prompts(full_prompts, config.max_prompt, 0), mesh)
    # As long as they may be: no response ends early, so all are decoded in one stage.
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens, int8=int8)
    rollout = make_rollout(
        apply, model, sampling, eos=1, pad=0, n=n, tensor=tensor, in_stages=False
    )
    length = config.max_prompt + config.max_new_tokens
    sample = Program(
        "rollout",
        rollout,
        (policy, prompts, abstract_key()),
        held=held,
        calls=1,
        model_flops=forward_flops(model, rows, length, config.max_new_tokens + 1),
        rows=rows,
        cache=abstract_cache(model, rows, length, mesh),
    )
    if not isinstance(rollout, WideRollout):
        batch = jax.eval_shape(rollout, *sample.args)
        return [sample], on_batch_axes(batch, mesh)

    # The weights are laid on another mesh, on which they are the rollout's arguments.
    lay = Program("rollout weights", rollout.lay(policy), sample.args, held, 1, 0.0, rows)
    weights = rollout.weights(policy)
    args = (weights, on_batch_axes(prompts, rollout.mesh), abstract_key())
    sample = sample._replace(
        function=rollout.sample,
        args=args,
        held=(),
        cache=abstract_cache(rollout.model, rows, length, rollout.mesh),
        mesh=rollout.mesh,
    )
    with jax.set_mesh(rollout.mesh):
        batch = jax.eval_shape(rollout.sample, *args)
    return [lay, sample], on_batch_axes(batch, mesh)


def abstract_cache(model: ModelConfig, rows: int, length: int, mesh: Mesh) -> list[Any]:
    """Return the shapes of the KV cache as XLA lays it.

    Rows lie with the batch, key/value heads over tensor where they divide.
    """
    # The layers' axis is whole.
    heads = "tensor" if model.kv_heads % mesh.shape["tensor"] == 0 else None
    place = NamedSharding(mesh, P(None, BATCH[0], heads))
    cache = jax.eval_shape(lambda: empty_cache(model, rows, length))
    return [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for leaf in jax.tree.leaves(cache)
        if leaf.ndim == 5
    ]


class Scoring(NamedTuple):
    """The programs by which reward models score a batch, and the shapes of what they return."""

    programs: list[Program]
    scores: dict[str, Any]
    """{reward: [B]}, of functions and servers too."""
    scalars: dict[str, Any]
    """{reward: [B, R + 1]}, of reward models alone."""


def score_programs(
    config: Any,
    mesh: Mesh,
    held: dict[str, Any],
    models: dict[str, ModelConfig],
    rewards: dict[str, Any],
    batch: Any,
) -> Scoring:
    """Lay out the scores of `batch`; `models` and `rewards` as of reward_models."""
    rows = config.batch_size
    length = config.max_prompt + config.max_new_tokens
    # Scores of functions and servers come from the host.
    a_score = jax.ShapeDtypeStruct((rows,), jnp.float32, sharding=NamedSharding(mesh, BATCH))
    scoring = Scoring([], dict.fromkeys(config.reward, a_score), {})
    for run, model in models.items():
        score = make_model_scorer(model)
        args = (rewards[run], batch)
        result = on_batch_axes(jax.eval_shape(score, *args), mesh)
        scoring.scores[run], scoring.scalars[run] = result
        own = (run,) if run in held else ()
        flops = forward_flops(model, rows, length, 0)
        scoring.programs.append(Program(f"score {run}", score, args, own, 1, flops, rows))
    return scoring


def abstract_minibatch(experience: Any, parts: int, mesh: Mesh) -> Any:
    """Return the shapes of one of `parts` minibatches of `experience`."""
    # All minibatches have one shape.
    minibatches = jax.eval_shape(partial(shuffled, parts=parts), experience, abstract_key())
    return on_batch_axes(minibatches[0], mesh)


# --- scripts that sample


def ppo(script: Any, config: Any, mesh: Mesh) -> Plan:
    """Lay out train_ppo: an iteration's rollout, scores, advantages, and both models' updates.

    Reward models have their runs' shapes where these exist, else the policy's.
    """
    script.check(config, mesh)
    length = config.max_prompt + config.max_new_tokens
    rows = config.batch_size

    # The models: policy and reference, and a critic that starts as the first reward model.
    models, rewards = reward_models(config, mesh)
    critic_model = next(iter(models.values()), config.model)
    _, apply = init_and_apply(LanguageModel(config.model))
    _, scalar_apply = init_and_apply(ScalarModel(critic_model))
    reference = abstract_params(LanguageModel(config.model), mesh)
    critic_start = abstract_params(ScalarModel(critic_model), mesh)
    policy_update = script.make_policy_update(config, apply)
    critic_update = script.make_critic_update(config, scalar_apply)
    policy = trained(config, reference, policy_update.optimizer, mesh)
    critic = trained(config, critic_start, critic_update.optimizer, mesh)

    # What is held all the time. With --offload reference and reward models are on the devices
    # while they are read, and then among the programs' arguments.
    held = {
        "policy": policy.state.params,
        "policy optimiser": policy.state.opt_state,
        "value": critic.state.params,
        "value optimiser": critic.state.opt_state,
    }
    if not config.offload:
        held |= {"reference": reference, **rewards}

    # With adapters, the bases are the reference's and the first reward model's own arrays.
    policy_held: tuple[str, ...] = ("policy",)
    critic_held: tuple[str, ...] = ("value",)
    if config.lora.rank:
        if not models:
            held["value base"] = critic_start
        policy_held = ("policy", "reference")
        critic_held = ("value", next(iter(models), "value base"))

    # Rollout, scores and advantages.
    rollouts, batch = rollout_programs(config, mesh, apply, policy.full, policy_held)
    scoring = score_programs(config, mesh, held, models, rewards, batch)
    compute_advantages = script.make_advantages(config, apply, scalar_apply, eos=1, newlines=[0])
    advantages = Program(
        "advantages",
        compute_advantages,
        (
            script.Models(policy=policy.full, reference=reference, critic=critic.full),
            batch,
            scoring.scores,
            scoring.scalars,
            jax.ShapeDtypeStruct((), jnp.float32),
        ),
        held=tuple(held.keys() & {*policy_held, *critic_held, "reference"}),
        calls=1,
        model_flops=2 * forward_flops(config.model, rows, length, config.max_new_tokens + 1)
        + forward_flops(critic_model, rows, length, 0),
        rows=rows,
    )
    experience, _ = jax.eval_shape(compute_advantages, *advantages.args)

    # The updates on minibatches; with --ptx_data the policy's have rows of text beside them.
    part = rows // config.minibatches
    minibatch = abstract_minibatch(experience, config.minibatches, mesh)
    policy_minibatch = minibatch
    policy_flops = 3 * forward_flops(config.model, part, length, config.max_new_tokens + 1)
    if config.ptx_data is not None:
        text_rows = pad_examples([full_row(length)] * part, length, 0)
        text = on_batch_axes(text_rows, mesh)
        with_text = partial(script.with_text, coefficient=config.ptx_coef)
        policy_minibatch = on_batch_axes(jax.eval_shape(with_text, minibatch, text), mesh)
        policy_flops += 3 * forward_flops(config.model, part, length, length)
    # Each epoch goes over all minibatches.
    calls = config.epochs * config.minibatches
    value_program = Program(
        "value update",
        critic_update.step,
        (critic.state, minibatch, critic.base),
        held=(*critic_held, "value optimiser"),
        calls=calls,
        model_flops=3 * forward_flops(critic_model, part, length, 0),
        rows=part,
        gradients=critic.state.params,
    )
    policy_program = Program(
        "policy update",
        policy_update.step,
        (policy.state, policy_minibatch, policy.base),
        held=(*policy_held, "policy optimiser"),
        calls=calls,
        model_flops=policy_flops,
        rows=part,
        gradients=policy.state.params,
    )
    programs = [*rollouts, *scoring.programs, advantages, value_program, policy_program]
    return Plan(held, programs, rows * length)


def grpo(script: Any, config: Any, mesh: Mesh) -> Plan:
    """Lay out train_grpo: one rollout of an iteration, its scores, advantages, and the updates."""
    config = fill_paper_defaults(config, PAPERS[config.method])
    script.check(config, mesh)
    model = config.model
    length = config.max_prompt + config.max_new_tokens
    rows = config.batch_size

    # The models.
    init, apply = init_and_apply(LanguageModel(model))
    advantages, objective = script.make_method(config, apply)
    update = script.make_update(config, init, objective)
    reference = abstract_params(LanguageModel(model), mesh)
    policy = trained(config, reference, update.optimizer, mesh)
    models, rewards = reward_models(config, mesh)
    held = {
        "policy": policy.state.params,
        "optimiser": policy.state.opt_state,
        "reference": reference,
        **rewards,
    }
    policy_held = ("policy", "reference") if config.lora.rank else ("policy",)

    # Rollout, scores and advantages.
    rollouts, batch = rollout_programs(config, mesh, apply, policy.full, policy_held)
    scoring = score_programs(config, mesh, held, models, rewards, batch)
    compute_advantages = script.make_advantages(config, apply, advantages, eos=1)
    args = (policy.full, reference, batch, scoring.scores, scoring.scalars)
    forward = forward_flops(model, rows, length, config.max_new_tokens + 1)
    reading = Program(
        "advantages", compute_advantages, args, ("policy", "reference"), 1, 2 * forward, rows
    )
    experience, _ = jax.eval_shape(compute_advantages, *args)

    # The updates on minibatches.
    part = rows // config.minibatches
    minibatch = abstract_minibatch(experience, config.minibatches, mesh)
    updating = Program(
        "update",
        update.step,
        (policy.state, minibatch, policy.base),
        held=(*policy_held, "optimiser"),
        calls=config.epochs * config.minibatches,
        model_flops=3 * forward_flops(model, part, length, config.max_new_tokens + 1),
        rows=part,
        gradients=policy.state.params,
    )
    return Plan(held, [*rollouts, *scoring.programs, reading, updating], rows * length)


# --- which of these a script is


class Layout(NamedTuple):
    """The names that a script's module must have to be laid out by `plan`."""

    names: tuple[str, ...]
    plan: Callable[[Any, Any, Mesh], Plan]
    """plan(script, config, mesh): the script's module, its Config, the mesh."""
    example: str
    """The script that has them."""


LAYOUTS = (
    Layout(("make_advantages", "make_policy_update", "make_critic_update"), ppo, "train_ppo"),
    Layout(("make_advantages", "make_method", "make_update"), grpo, "train_grpo"),
    Layout(
        ("make_objective", "make_update(config)", "comparison_batches"), preferences, "train_dpo"
    ),
    Layout(("make_update(config)", "comparison_batches", "ScalarModel"), ranking, "train_rm"),
    Layout(("make_update(config)", "chat_batches"), likelihood, "train_sft"),
    Layout(("make_update(config)", "text_batches"), likelihood, "train_lm"),
)
"""The first whose names a module has is its layout. `name(config)`: that takes nothing else."""


def layout_of(script: Any) -> Layout:
    """Return the layout of the module `script`; raise UserError for one that has none."""
    # From the most particular to the most general.
    for layout in LAYOUTS:
        if all(_has(script, name) for name in layout.names):
            return layout
    known = ", ".join(sorted(layout.example for layout in LAYOUTS))
    name = path_from_root(pathlib.Path(script.__file__).with_suffix(""))
    raise UserError(
        f"{name}: plan.py knows {known} and forks with their factories; "
        "describe it in planning/programs.py"
    )


def _has(script: Any, name: str) -> bool:
    """True if the module has `name`; with `(config)` after it, only if it needs nothing else."""
    # Functions of the module, or names that it imports.
    attribute = getattr(script, name.removesuffix("(config)"), None)
    if attribute is None or not name.endswith("(config)"):
        return attribute is not None
    # Others, such as train_distill's, need more than a config.
    parameters = inspect.signature(attribute).parameters.values()
    return sum(parameter.default is parameter.empty for parameter in parameters) == 1
