"""The state that a run starts from: fresh, from another run's weights, or resumed from its own checkpoint."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora import lora_base, merged, trainable_part
from model import LanguageModel, Params, ScalarModel, init_and_apply
from model_config import ModelConfig
from runtime.checkpoint import Checkpoints, load_step_params
from runtime.errors import UserError
from runtime.run_folder import load_config
from sharding import abstract, init_sharded
from train_step import TrainState


def load_params(run: str, step: int | None = None, shapes: Any = None) -> dict[str, Any]:
    """The parameters of `run`, at its newest step or `step`: nested dict of NumPy arrays.

    With `shapes` (tree of ShapeDtypeStructs with shardings) they are checked against it and become
    jax.Arrays placed so. Raises UserError for a missing run or step, a damaged file, another shape or dtype.
    Where a run has adapters alone (lora.py) they come merged into its base.
    """
    if (config := load_config(run)).get("lora", {}).get("rank"):
        return merged(run, config, load_step_params(run, step, None), load_params, shapes)
    return load_step_params(run, step, shapes)


def starting_params(
    init: Any, config: ModelConfig, run: str | None, mesh: jax.sharding.Mesh, seed: int
) -> Params:
    """Random parameters by `init(key)`; of these, what the model of `run` has too is taken from there.

    So a reward model starts with a policy's decoder and a new head, or goes on from another reward model. Raises
    UserError if the architectures differ, or for a language model that would start from a reward model.
    """
    if run is None:
        return init_sharded(init, mesh, jax.random.key(seed))
    saved = load_config(run)
    theirs, ours = ModelConfig(**saved["model"]), config
    for field in dataclasses.fields(ModelConfig):
        pair = getattr(theirs, field.name), getattr(ours, field.name)
        if pair[0] != pair[1] and field.name not in ("preset", "dtype", "remat"):
            raise UserError(
                f"--model.{field.name}={pair[1]}: --init={run} has {pair[0]}; leave --model.* out"
            )
    params = init_sharded(init, mesh, jax.random.key(seed))
    scalar = saved["script"] in ("train_rm", "train_prm")
    if scalar and "head" not in params:
        raise UserError(
            f"--init={run}: a reward model (of {saved['script']}); name the run of a language model"
        )
    model = ScalarModel(config) if scalar else LanguageModel(config)
    shapes = jax.eval_shape(init_and_apply(model)[0], jax.random.key(0))
    loaded = load_params(run, shapes=abstract(shapes, mesh))
    return {**params, **{name: loaded[name] for name in params.keys() & loaded.keys()}}


def starting_critic(
    config: Any, models: dict[str, Params], mesh: jax.sharding.Mesh
) -> tuple[Params, Any]:
    """Parameters that a value model starts from, and its apply; `models`: runs of reward models and their parameters.

    The first of these; where there is none, the decoder of --init, with a head that says 0.
    """
    if models:
        run, params = next(iter(models.items()))
        return params, init_and_apply(ScalarModel(ModelConfig(**load_config(run)["model"])))[1]
    init, apply = init_and_apply(ScalarModel(config.model))
    params = starting_params(init, config.model, config.init, mesh, config.seed)
    return {**params, "head": jnp.zeros_like(params["head"])}, apply


def fresh_state(
    config: Any, optimizer: optax.GradientTransformation, params: Params, key: jax.Array
) -> TrainState:
    """The state that a script of `config` starts from: of adapters where it has any, else of `params`."""
    return init_state(trainable_part(config.lora, params, key), optimizer)


def shapes_of(
    config: Any, init: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> Any:
    """A fresh state as a checkpoint stores it, and the `base` of its adapters: shapes and shardings alone."""
    key = jax.random.key(config.seed)
    params = jax.eval_shape(init, key)
    state = jax.eval_shape(partial(fresh_state, config, optimizer), params, key)
    return abstract({**as_items(state), "base": lora_base(config.lora, params)}, mesh)


def start_or_resume(
    checkpoints: Checkpoints,
    config: Any,
    init: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> tuple[int, TrainState, Any, Params | None]:
    """(step, state, data position, base) of the newest checkpoint, or 0, a state of `starting_params`, None, base.

    `config`: the script's, with `model`, `init`, `seed` and `lora`; the base is None unless there are adapters.
    """
    shapes = shapes_of(config, init, optimizer, mesh)
    saved = checkpoints.restore({"params": shapes["params"], "rest": shapes["rest"]})
    if saved and not config.lora.rank:
        return saved[0], from_items(saved[1]), saved[2], None
    params = starting_params(init, config.model, config.init, mesh, config.seed)
    base = lora_base(config.lora, params)
    if saved:
        return saved[0], from_items(saved[1]), saved[2], base
    fresh = partial(fresh_state, config, optimizer)
    return 0, init_sharded(fresh, mesh, params, jax.random.key(config.seed)), None, base


def as_items(state: TrainState) -> dict[str, Any]:
    """The state as a checkpoint stores it: parameters apart from the rest."""
    return {"params": state.params, "rest": state.replace(params={})}


def from_items(items: dict[str, Any]) -> TrainState:
    """The inverse of `as_items`."""
    return items["rest"].replace(params=items["params"])


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around `params`."""
    return TrainState(jnp.int32(0), jnp.int32(0), params, optimizer.init(params))
