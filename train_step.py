"""The one jit-compiled training step: gradients, accumulation, clipping, non-finite updates, optimiser."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from model import Params
from runtime.errors import UserError
from sharding import along, constrain_params, in_microbatches, path_name

Batch = dict[str, jax.Array]
# objective(params, batch) -> (loss_sum, (weight, {name: (sum, weight)})), all float32 sums
Objective = Callable[
    [Params, Batch], tuple[jax.Array, tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]]
]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """adamw (Loshchilov and Hutter 2019) or adafactor (Shazeer and Stern 2018)."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant"] = "cosine"
    """Decay after the warm-up; cosine and linear end at `final_lr` of the peak."""
    warmup: int = 20
    """Steps of linear warm-up, the first at 1/(warmup + 1) of the peak."""
    final_lr: float = 0.1
    """Last learning rate as a share of the peak (cosine and linear)."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    moment: Literal["float32", "bfloat16"] = "float32"
    """Type of Adam's first moment. The second is always float32: bfloat16 would round its steps of 1 - beta2 away."""
    weight_decay: float = 0.1
    """Decoupled weight decay; never on norms and biases."""
    clip: float = 1.0
    """Largest global gradient norm."""


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: jax.Array
    """Updates tried so far, int32."""
    skipped: jax.Array
    """Of these, updates left out because loss or gradient was not finite, int32."""
    params: Params
    opt_state: Any


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step, over `steps` steps."""
    if not 0 <= config.warmup < max(steps, 1):
        raise UserError(
            f"--optimizer.warmup={config.warmup}: must be at least 0 and below the {steps} steps; "
            "lower it, or raise --steps"
        )
    if not config.lr > 0:
        raise UserError(f"--optimizer.lr={config.lr}: must be above 0")
    rest = max(steps - config.warmup, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(config.lr, rest, config.final_lr),
        "linear": optax.linear_schedule(config.lr, config.lr * config.final_lr, rest),
        "inverse_sqrt": lambda t: (
            config.lr * (1 + jnp.maximum(t, 0) / max(config.warmup, 1)) ** -0.5
        ),
        "constant": optax.constant_schedule(config.lr),
    }[config.schedule]
    # Step 0 already learns: the warm-up starts at 1/(warmup + 1) of the peak, not at 0.
    warmup = optax.linear_schedule(config.lr / (config.warmup + 1), config.lr, config.warmup)
    return optax.join_schedules([warmup, decay], [config.warmup])


def decayed(params: Params) -> Any:
    """True for the leaves under weight decay: all but norms and biases."""
    name_of = jax.tree_util.tree_map_with_path
    return name_of(lambda path, _: re.search(r"(norm|bias)$", path_name(path)) is None, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser for a run of `steps` updates; clipping is the step's."""
    schedule = make_schedule(config, steps)
    if config.name == "adafactor":
        # optax adds the decay after the learning rate is applied; as in AdamW, ours is a multiple of it.
        decay = (lambda t: schedule(t) * config.weight_decay) if config.weight_decay else None
        return optax.adafactor(schedule, weight_decay_rate=decay, weight_decay_mask=decayed)
    options = {"mu_dtype": config.moment, "weight_decay": config.weight_decay, "mask": decayed}
    return optax.adamw(schedule, config.beta1, config.beta2, config.eps, **options)


class Update(NamedTuple):
    """The pieces of a script that trains one model; `make_update` of each script makes them."""

    init: Callable[[jax.Array], Params]
    """init(key) -> random parameters."""
    optimizer: optax.GradientTransformation
    objective: Objective
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    """step(state, batch, base) -> (state, metrics), of make_train_step."""


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    *,
    max_norm: float = 1.0,
    full: Callable[[Params | None, Params], Params] = lambda base, params: params,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Compile step(state, batch, base=None) -> (state, metrics).

    `state` is donated: its buffers are gone after the call; `base` and `batch` are not.
    `microbatches`: parts into which the batch's first axis is cut, one after another. Sums are
    divided by the total weight at the end, so the result does not depend on the cut, whatever
    the counts of tokens. `max_norm`: largest global gradient norm; a longer gradient is scaled
    down to it. `full(base, state.params)`: the parameters that the objective sees, where
    `state.params` are adapters on `base`; gradients are of `state.params` alone.

    Metrics are of the parameters before the update: `loss`, the objective's own as means,
    `grad_norm` before clipping, and `skipped`, updates left out so far. An update with a
    non-finite loss or gradient changes nothing but the counters.
    """

    def loss_of(params: Params, batch: Batch, base: Params | None):
        return objective(full(base, params), batch)

    gradient = jax.value_and_grad(loss_of, has_aux=True)

    def sums(params: Params, batch: Batch, base: Params | None):
        """Sums over one part of the batch: loss, weight, metrics, gradient."""
        (loss, (weight, metrics)), grads = gradient(params, batch, base)
        return loss, weight, metrics, constrain_params(grads)

    def accumulated(params: Params, batch: Batch, base: Params | None):
        """Sums over the whole batch, part by part. A pipeline cuts the batch itself (layers.py)."""
        is_pipeline = along(jax.sharding.get_abstract_mesh(), "stage") > 1
        if microbatches == 1 or is_pipeline:
            return sums(params, batch, base)
        parts = jax.tree.map(lambda x: in_microbatches(x, microbatches), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(sums, params, first, base)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(totals, part):
            return jax.tree.map(jnp.add, totals, sums(params, part, base)), None

        return jax.lax.scan(add, zeros, parts)[0]

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, batch: Batch, base: Params | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        # The mean gradient, clipped to a global norm.
        loss, weight, metrics, grads = accumulated(state.params, batch, base)
        grads = jax.tree.map(lambda grad: grad / weight, grads)
        norm = optax.global_norm(grads)
        scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
        clipped = jax.tree.map(lambda grad: grad * scale, grads)

        # The optimiser's step, undone where the loss or the gradient is not finite.
        updates, opt_state = optimizer.update(clipped, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss / weight) & jnp.isfinite(norm)
        if_finite = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + (~finite).astype(jnp.int32),
            params=if_finite(params, state.params),
            opt_state=if_finite(opt_state, state.opt_state),
        )

        means = {
            name: total / jnp.maximum(count, 1e-9) for name, (total, count) in metrics.items()
        }
        metrics = {"loss": loss / weight, **means, "grad_norm": norm, "skipped": state.skipped}
        return state, metrics

    return step


def make_evaluation(objective: Objective) -> Callable[[Params, list[Batch]], dict[str, float]]:
    """evaluate(params, batches) -> means of loss and metrics over all batches, names prefixed by `eval/`."""

    @jax.jit
    def sums(params: Params, batch: Batch):
        loss, (weight, metrics) = objective(params, batch)
        return {"loss": (loss, weight), **metrics}

    def evaluate(params: Params, batches: list[Batch]) -> dict[str, float]:
        parts = [jax.device_get(sums(params, batch)) for batch in batches]
        totals = jax.tree.map(lambda *x: float(sum(x)), *parts)
        return {
            f"eval/{name}": total / max(weight, 1e-9) for name, (total, weight) in totals.items()
        }

    return evaluate
