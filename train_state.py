"""The state that a run starts from: fresh, from another run's weights, or resumed from its own."""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from data.bad_rows import set_on_bad_row
from data.sources import keep_prepared
from lora import LoraConfig, base_step, lora_base, merge, note_lora_base, trainable_part
from model import LanguageModel, Params, ScalarModel, init_and_apply
from model_config import ModelConfig, stored_model
from runtime.checkpoint import Checkpoints, load_step_params, stored_params
from runtime.errors import UserError
from runtime.inputs import with_pinned_runs
from runtime.run_folder import load_config, model_code, refuse_other_model_code
from sharding import abstract, init_sharded
from train_step import TrainState

# What a run may compute with otherwise than the run it starts from, none of it a parameter: how
# it is computed, a coefficient of its loss, and positions, so that a model can be trained on for a
# longer context.
NOT_COMPARED = ("preset", "dtype", "remat", "router_loss_coef")
POSITIONS = (
    "context",
    "rope_base",
    "rope_local_base",
    "rope_scale",
    "rope_llama3",
    "rope_yarn",
    "window",
    "window_pattern",
)

Init = Callable[[jax.Array], Params]
"""init(key) -> random parameters."""


# --- what a run reads


def pin_inputs(config: Any) -> Any:
    """Return a script's `config` with the runs that it reads pinned; a script calls it first.

    `config`: an instance of a script's Config; a new one is returned. Each run it names becomes a
    RunAtStep (runtime/inputs.py): that run at the step that `config.run` began with, or the
    newest. Where `lora.rank` is above 0, `lora.base` becomes the SHA-256 of --init's step. From
    now on this process keeps the data files that it prepares in $PLUMB_CACHE, unless `dry_run`,
    and meets bad rows as `on_bad_row` says. Raises UserError for an input that is not what the run
    began with, for a folder `run` of something else, and for a rank without --init.
    """
    # The named runs may be trained further meanwhile: each is read at one step.
    config = with_pinned_runs(config)
    # A dry run writes nothing, not even into the cache.
    keep_prepared(not getattr(config, "dry_run", False))
    set_on_bad_row(getattr(config, "on_bad_row", "stop"))
    return note_lora_base(config) if hasattr(config, "lora") else config


# --- parameters of another run


def load_params(run: str, step: int | None = None, shapes: Any = None) -> dict[str, Any]:
    """Load the parameters of the run in the folder `run`, at `step` or the newest, a nested dict.

    `run`: a folder, or a RunAtStep, whose own step is then the default. The parameters are those
    that it trains: of train_ppo the policy's, not the critic's. Without `shapes` they are NumPy
    arrays as saved, whole on every process; with it, a tree of ShapeDtypeStructs with shardings,
    jax.Arrays laid so, and names, shapes and types are checked against it. Adapters (lora.py) come
    merged into their base, read at the step that the run noted; then types are not checked, and
    are the base's. All processes must call it.

    Raises UserError for a missing run, step or base, a damaged file, other parameters, and a run
    of a fork whose model.py is not the one imported. Notes on stderr a run of the root's model.py
    that is read with a fork's.
    """
    config = load_config(run)
    refuse_other_model_code(run, config)
    code = model_code()
    if code is not None and "model_code" not in config and jax.process_index() == 0:
        print(f"note: {run}: made with the root's model.py, read with {code}", file=sys.stderr)
    # Adapters are merged into their base, which is another run's.
    if config.get("lora", {}).get("rank"):
        adapters = load_step_params(run, step, None)
        return _merged(run, config, adapters, shapes)
    return load_step_params(run, step, shapes)


def _merged(run: str, config: dict[str, Any], adapters: Params, shapes: Any) -> Params:
    """Load the base of `run`, whose config.json is `config`, and merge its adapters into it.

    `shapes` is as of load_params. Raises UserError where the base's step is gone, and for other
    shapes.
    """
    # The base's step that the adapters were trained on: a later one has other weights.
    lora = LoraConfig(**config["lora"])
    base = config["init"]
    step = base_step(lora, base)
    if step is None:
        raise UserError(
            f"{run}: its base, a step of {base}, is gone; "
            "restore that run, or train the adapters anew"
        )
    # On the host, where no mesh is asked for.
    if shapes is None:
        return merge(lora, load_params(base, step), adapters)

    # The base is a language model, whatever the adapters make of it.
    init, _ = init_and_apply(LanguageModel(ModelConfig(**config["model"])))
    base_shapes = jax.eval_shape(init, jax.random.key(0))
    found = jax.eval_shape(partial(merge, lora), base_shapes, adapters)
    if jax.tree.map(jnp.shape, found) != jax.tree.map(jnp.shape, shapes):
        raise UserError(f"{run}: a model of other parameters or shapes; use that run's config")

    # Merged where it is to lie; the base's buffers are used up.
    places = jax.tree.map(lambda like: like.sharding, shapes)
    mesh = jax.tree.leaves(places)[0].mesh
    loaded = load_params(base, step, abstract(base_shapes, mesh))
    merge_in_place = jax.jit(partial(merge, lora), out_shardings=places, donate_argnums=0)
    return merge_in_place(loaded, adapters)


def has_scalar_head(run: str) -> bool:
    """Return True if `run` trained a scalar model, such as a reward model, not a language model.

    `run`: a run's folder, of any script, whose newest checkpoint is looked at, or a RunAtStep, of
    which it is that step. A scalar model has a parameter `head`, also where only adapters are
    trained; of train_ppo the policy counts, so it is False. No arrays are read. Raises UserError
    for a run without a finished checkpoint, and for a damaged manifest.
    """
    return "head" in stored_params(run)


def starting_params(
    init: Init, config: ModelConfig, run: str | None, mesh: jax.sharding.Mesh, seed: int
) -> Params:
    """Initialise parameters on the mesh, then take those top-level entries that `run` also has.

    These are `decoder`, `unembed`, `head` and `bias`: so a reward model starts with a policy's
    decoder and a new head, or goes on from another reward model. What `init` does not make is left
    out. `config`: the shape of the model that `init` makes. `run`: a run's folder or a RunAtStep;
    None: all is random. `seed` gives what is random. Returns the nested dict that `init` makes,
    laid as sharding.py says. All processes must call it. Raises UserError for a run of another
    shape, for a language model that would start from a reward model, and as `load_params` does.
    """
    if run is None:
        return init_sharded(init, mesh, jax.random.key(seed))
    # Random first: what the run lacks stays so.
    _refuse_other_shape(run, config)
    params = init_sharded(init, mesh, jax.random.key(seed))
    is_scalar = has_scalar_head(run)
    if is_scalar and "head" not in params:
        script = load_config(run)["script"]
        raise UserError(
            f"--init={run}: a reward model (of {script}); name the run of a language model"
        )
    # What `run` has, by the kind of model that it is of.
    model = ScalarModel(config) if is_scalar else LanguageModel(config)
    init_theirs, _ = init_and_apply(model)
    shapes = jax.eval_shape(init_theirs, jax.random.key(0))
    loaded = load_params(run, shapes=abstract(shapes, mesh))
    # `decoder` always; `head` where both have one.
    shared = params.keys() & loaded.keys()
    return {**params, **{name: loaded[name] for name in shared}}


def _refuse_other_shape(run: str, config: ModelConfig) -> None:
    """Raise UserError for the first field in which `config` differs from the model of `run`.

    Says on stderr where positions are read otherwise, which is allowed.
    """
    stored = stored_model(run)
    for field in dataclasses.fields(ModelConfig):
        theirs = getattr(stored, field.name)
        ours = getattr(config, field.name)
        if theirs == ours or field.name in NOT_COMPARED:
            continue
        change = f"--model.{field.name}={ours}: --init={run} has {theirs}"
        if field.name not in POSITIONS:
            free = ", ".join(f"--model.{name}" for name in POSITIONS)
            raise UserError(f"{change}; leave --model.* out, but for {free}")
        if jax.process_index() == 0:
            print(f"note: {change}", file=sys.stderr)


def starting_critic(
    config: Any, models: dict[str, Params], mesh: jax.sharding.Mesh
) -> tuple[Params, Callable[..., Any]]:
    """Return (parameters, apply) of the value model that a run starts with.

    `models`: {folder: parameters on the mesh} of reward models. The value model starts as the
    first of them, with the same arrays, not copied: copy them before a step donates them. For {}
    it starts as the decoder of --init (None: a random one) under a head of zeros, by `model`,
    `init` and `seed` of `config`, the script's. `apply`: of a ScalarModel (see
    model.init_and_apply) of the shape that the first folder holds, for {} of `config.model`.
    Raises UserError as `starting_params` does. All processes must call it.
    """
    # As in InstructGPT (Ouyang et al. 2022, appendix C) the critic starts as the reward model.
    if models:
        run, params = next(iter(models.items()))
        _, apply = init_and_apply(ScalarModel(stored_model(run)))
        return params, apply
    # A head of zeros, and no shift from a reward model's: the first values are 0.
    init, apply = init_and_apply(ScalarModel(config.model))
    params = starting_params(init, config.model, config.init, mesh, config.seed)
    zeros = {name: jnp.zeros_like(params[name]) for name in ("head", "bias")}
    return {**params, **zeros}, apply


# --- the state of a run


class Start(NamedTuple):
    """Where a run goes on from."""

    step: int
    """Steps finished; 0 for a new run."""
    state: TrainState
    data_position: Any
    """The `extra` that `Checkpoints.save` was given, this process's; None for a new run."""
    base: Params | None
    """The parameters that `state.params` are adapters on; None without adapters."""


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Return a TrainState at step 0 around `params`, whose arrays it holds: a step donates them.

    `params`: what is trained; `optimizer`: of make_optimizer, whose state starts anew.
    """
    return TrainState(
        step=jnp.int32(0),
        skipped=jnp.int32(0),
        left_out=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
    )


def fresh_state(
    config: Any, optimizer: optax.GradientTransformation, params: Params, key: jax.Array
) -> TrainState:
    """Return the TrainState that a script starts from: of `params`, or with LoRA of new adapters.

    `config`: the script's, of which `lora` is read. `params`: whole parameters. The state holds
    arrays of `params` themselves (with LoRA a ScalarModel's head and bias), which a step donates:
    copy them, or call this under jit. `key`: for the adapters' random part; not used without LoRA.
    """
    return init_state(trainable_part(config.lora, params, key), optimizer)


def shapes_of(
    config: Any, init: Init, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Return the ShapeDtypeStructs, laid on `mesh`, of a fresh state as a checkpoint stores it.

    Keys: `params` and `rest`, see as_items; and `base`, of the parameters under the adapters, None
    without LoRA. No checkpoint holds `base`: leave it out of what `Checkpoints.restore` is given.
    `config`: the script's, of which `lora` and `seed` are read. `init`, `optimizer`: of the
    script's Update. Nothing is computed.
    """
    # Nothing is computed: the shapes follow from tracing.
    key = jax.random.key(config.seed)
    params = jax.eval_shape(init, key)
    state = jax.eval_shape(partial(fresh_state, config, optimizer), params, key)
    base = lora_base(config.lora, params)
    return abstract({**as_items(state), "base": base}, mesh)


def start_or_resume(
    checkpoints: Checkpoints,
    config: Any,
    init: Init,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> Start:
    """Return the state of the newest good checkpoint, or a fresh one on `starting_params`.

    `checkpoints`: of the run's own folder, opened. `config`: the script's, of which `model`,
    `init`, `seed` and `lora` are read. `init`, `optimizer`: of the script's Update. A resumed run
    does not read --init, but with LoRA: parameters under adapters are in no checkpoint, and come
    from `starting_params` again. The state shares no array with `base`. All processes must call
    it. Raises UserError as `starting_params` and `Checkpoints.restore` do.
    """
    # All parameters are in the checkpoint, unless it holds adapters.
    shapes = shapes_of(config, init, optimizer, mesh)
    saved = checkpoints.restore({"params": shapes["params"], "rest": shapes["rest"]})
    if saved and not config.lora.rank:
        step, items, position = saved
        return Start(step, from_items(items), position, None)

    # A checkpoint holds adapters alone: their base is read from --init again.
    params = starting_params(init, config.model, config.init, mesh, config.seed)
    base = lora_base(config.lora, params)
    if saved:
        step, items, position = saved
        return Start(step, from_items(items), position, base)
    # Under one jit, or the moments of Adam would come out replicated.
    fresh = partial(fresh_state, config, optimizer)
    state = init_sharded(fresh, mesh, params, jax.random.key(config.seed))
    return Start(0, state, None, base)


def as_items(state: TrainState) -> dict[str, Any]:
    """Split the state as a checkpoint stores it: {"params", "rest"}, rest all but parameters.

    `rest` is a TrainState whose `params` are {}. Nothing is copied.
    """
    # Apart, so that other runs read the parameters without the optimiser's moments.
    rest = dataclasses.replace(state, params={})
    return {"params": state.params, "rest": rest}


def from_items(items: dict[str, Any]) -> TrainState:
    """Join `params` and `rest` of `as_items` into the TrainState; other keys are not read."""
    return dataclasses.replace(items["rest"], params=items["params"])
