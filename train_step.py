"""The one compiled training step: gradients, accumulation, clipping, bad updates, optimiser."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from model import Params
from runtime.errors import UserError, require
from runtime.metrics import TRAIN_STEP
from runtime.ranges import (
    ABOVE_0,
    ABOVE_0_OR_INF,
    AT_LEAST_0,
    BELOW_1,
    FROM_0_TO_1,
    check_ranges,
)
from sharding import along, constrain_params, in_microbatches, path_name, to_host

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
COUNTS = ("updates", "skipped", "left_out")
"""Metrics that count the updates of a state so far."""
MetricSums = dict[str, tuple[jax.Array, jax.Array]]
Sums = tuple[jax.Array, tuple[jax.Array, MetricSums]]
"""(sum of losses, (weight, {metric: (sum, weight)})), all float32 scalars."""
Objective = Callable[[Params, Batch], Sums]
"""objective(params, batch) -> Sums. The loss of a batch is the sum of losses over the weight; each
metric is its sum over its own weight."""
TrainStep = Callable[..., tuple["TrainState", Metrics]]
"""step(state, batch, base=None) -> (state, metrics), of make_train_step."""


# --- optimiser and schedule

RANGES = {
    "lr": ABOVE_0,
    "final_lr": FROM_0_TO_1,
    "beta1": BELOW_1,
    "beta2": BELOW_1,
    "eps": ABOVE_0,
    "weight_decay": AT_LEAST_0,
    "clip": ABOVE_0_OR_INF,
}
"""Ranges of OptimizerConfig's numbers (runtime/ranges.py)."""
ADAMW_ALONE = ("beta1", "beta2", "eps", "moment")
"""Fields that adafactor does not have."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """adamw (Loshchilov and Hutter 2019) or adafactor (Shazeer and Stern 2018)."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant"] = "cosine"
    """Decay after the warm-up. The last update of cosine and linear is at `final_lr` of the peak.
    inverse_sqrt (T5, PaLM): peak * sqrt(warmup / update), the peak itself during the warm-up."""
    warmup: int = 20
    """Steps of linear warm-up, the first at 1/(warmup + 1) of the peak; with inverse_sqrt, which
    does not warm up, updates at the peak (T5 and PaLM: 10,000). 20 is at most half of a run."""
    final_lr: float = 0.1
    """Last learning rate as a share of the peak (cosine and linear)."""
    beta1: float = 0.9
    """Decay of Adam's first moment; adafactor has none."""
    beta2: float = 0.95
    """Decay of Adam's second moment; adafactor's is 1 - update^-0.8."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    moment: Literal["float32", "bfloat16"] = "float32"
    """Type of Adam's first moment. The second is float32: bfloat16 would lose its small steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay; never on norms and biases."""
    clip: float = 1.0
    """Largest global gradient norm; inf: no clipping."""

    def __post_init__(self):
        check_ranges(self, RANGES, "optimizer.")

    @property
    def unused(self) -> dict[str, str]:
        """Return {field: "adafactor"} for the fields that this config's optimiser does not read.

        A property, for messages. With name "adafactor" the fields are beta1, beta2, eps and moment
        (ADAMW_ALONE); with "adamw" it is {}.
        """
        if self.name == "adafactor":
            return dict.fromkeys(ADAMW_ALONE, "adafactor")
        return {}


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: jax.Array
    """Updates tried so far, int32."""
    skipped: jax.Array
    """Those of them left out because loss or gradient was not finite, int32."""
    left_out: jax.Array
    """Those of them left out because nothing in the batch counted (weight 0), int32."""
    params: Params
    """What is trained: whole parameters, or with LoRA the adapters (lora.py)."""
    opt_state: Any


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Make schedule(count) -> learning rate, a scalar, for a run of `steps` updates.

    `count`: updates done before, from 0, a Python int or an array. The warm-up starts at
    `1/(warmup + 1)` of the peak, not at 0, and is at the peak at `count = warmup`; the decay ends
    at `count = steps - 1`, and stays there. `inverse_sqrt` does not warm up: its first `warmup`
    updates are at the peak, then it falls without an end. In a run of at most 20 steps a `warmup`
    of 20, the default, counts as `steps // 2`, whatever the schedule. Raises UserError for any
    other `warmup` that is not below `steps`.
    """
    # A run shorter than the warm-up that nobody has set warms up for half of it.
    if config.warmup == OptimizerConfig.warmup and 0 < steps <= config.warmup:
        config = dataclasses.replace(config, warmup=steps // 2)
    if config.warmup >= max(steps, 1):
        raise UserError(
            f"--optimizer.warmup={config.warmup}: must be below the {steps} steps; "
            "lower it, or raise --steps"
        )
    # It has no end to decay to, and a warm-up of its own.
    if config.schedule == "inverse_sqrt":
        return inverse_sqrt(config)

    # The decay runs over what the warm-up leaves, from the peak at its first update to its end at
    # the last.
    rest = max(steps - config.warmup - 1, 1)
    last_lr = config.lr * config.final_lr
    decay = {
        "cosine": optax.cosine_decay_schedule(config.lr, rest, config.final_lr),
        "linear": optax.linear_schedule(config.lr, last_lr, rest),
        "constant": optax.constant_schedule(config.lr),
    }[config.schedule]
    # The warm-up ends where the decay begins, at the peak.
    first_lr = config.lr / (config.warmup + 1)
    warmup = optax.linear_schedule(first_lr, config.lr, config.warmup)
    return optax.join_schedules([warmup, decay], [config.warmup])


def at_place(state: "TrainState", place: int) -> "TrainState":
    """Return `state` with its optimiser's schedule at update `place`, from 0; nothing else moves.

    The counters of the state, by which `make_rate` goes, and Adam's count for its bias stay;
    arrays are those of `state`. `state`: its optimiser is of make_optimizer. `place`: a Python
    int. Not for use under jit.
    """

    def is_schedule(part: Any) -> bool:
        # Of the learning rate, or of the decay that goes by it; moments have counts of their own.
        return getattr(part, "_fields", None) == ("count",)

    def moved(part: Any) -> Any:
        return part._replace(count=np.int32(place)) if is_schedule(part) else part

    opt_state = jax.tree.map(moved, state.opt_state, is_leaf=is_schedule)
    return dataclasses.replace(state, opt_state=opt_state)


def inverse_sqrt(config: OptimizerConfig) -> optax.Schedule:
    """Return the schedule of T5 (Raffel et al. 2020, section 3.1.2) and PaLM (section 5).

    schedule(count) -> lr sqrt(k / max(n, k)) at update n = count + 1, with k = max(warmup, 1), as
    `config` has it: the peak up to update k. The length of a run plays no part.
    """
    constant = max(config.warmup, 1)

    def schedule(count: jax.Array) -> jax.Array:
        updates = jnp.maximum(count + 1, constant)
        return config.lr * jnp.sqrt(constant / updates)

    return schedule


def make_rate(config: OptimizerConfig, steps: int) -> Callable[["TrainState"], jax.Array]:
    """Make rate(state) -> the learning rate of the last update taken on the way to `state`.

    A float32 scalar on the device; before any update, the first one's. `config` and `steps` are
    those that make_optimizer was given. Updates that were not taken do not advance the schedule.
    It goes by the counters of `state`, whatever `at_place` has set. Raises UserError as
    make_schedule.
    """
    schedule = make_schedule(config, steps)

    @jax.jit
    def rate(state: TrainState) -> jax.Array:
        # The schedule counts from 0, so the last update taken is number `taken` - 1 to it.
        taken = state.step - state.skipped - state.left_out
        return jnp.float32(schedule(jnp.maximum(taken - 1, 0)))

    return rate


def decayed(params: Params) -> Any:
    """Return a tree of Python bools like `params`: True under weight decay; a mask for optax.

    False are leaves whose path ends in `norm` or `bias`, as q_norm and q_bias do. `params`: a tree
    of arrays.
    """

    def is_decayed(path: Any, leaf: Any) -> bool:
        # Norms and biases set scales and shifts, which decay would only distort.
        return re.search(r"(norm|bias)$", path_name(path)) is None

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Make the optimiser for a run of `steps` updates: optax.adamw, or optax.adafactor.

    Its learning rate follows make_schedule(config, steps). Both decay by `weight_decay` times it,
    on the leaves of `decayed`. Clipping by the global norm is left to the step; adafactor, as
    optax has it, scales an update by the RMS of its parameter, and has no first moment whether
    beta1 is the default or 0. Raises UserError as make_schedule does, and for adafactor with
    another beta1.
    """
    # Adafactor: a factored second moment and no first, for models whose AdamW does not fit.
    schedule = make_schedule(config, steps)
    if config.name == "adafactor":
        require(
            config.beta1 in (OptimizerConfig.beta1, 0),
            f"--optimizer.beta1={config.beta1}: adafactor has no first moment; leave it out",
        )

        def decay_by_schedule(count: jax.Array) -> jax.Array:
            """Return the decay of a step, a multiple of its learning rate as in AdamW.

            optax adds it after the learning rate is applied.
            """
            return schedule(count) * config.weight_decay

        decay = decay_by_schedule if config.weight_decay else None
        return optax.adafactor(schedule, weight_decay_rate=decay, weight_decay_mask=decayed)
    # AdamW decays by a multiple of the learning rate (Loshchilov and Hutter 2019).
    return optax.adamw(
        schedule,
        config.beta1,
        config.beta2,
        config.eps,
        mu_dtype=config.moment,
        weight_decay=config.weight_decay,
        mask=decayed,
    )


# --- the step


class Update(NamedTuple):
    """The pieces of an update of one model; a script's `make_update` makes them.

    `main` runs them and plan.py compiles them: a script names its programs here alone.
    """

    init: Callable[[jax.Array], Params]
    """init(key) -> random parameters."""
    optimizer: optax.GradientTransformation
    objective: Objective
    """objective(all parameters, batch) -> Sums; the script says which batches."""
    step: TrainStep
    """step(state, batch, base=None) -> (state, metrics), of make_train_step; `state` is
    donated."""


class PartSums(NamedTuple):
    """Sums over rows of a batch, to be divided by `weight`."""

    loss: jax.Array
    weight: jax.Array
    metrics: MetricSums
    """Each with a weight of its own."""
    grads: Params


def without_base(base: Params | None, params: Params) -> Params:
    """Return `params`, what a model without adapters computes with; `base` is not read."""
    return params


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    *,
    max_norm: float = 1.0,
    full: Callable[[Params | None, Params], Params] = without_base,
) -> TrainStep:
    """Compile step(state, batch, base=None) -> (state, metrics).

    `state`, a TrainState of `optimizer`, is donated: its buffers are gone after the call; `base`
    and `batch` are not. `batch`: arrays [B, ...] by name, as `objective` reads them.
    `microbatches`: parts of B computed one after another; it must divide B (on a mesh with stages
    the pipeline cuts). Sums are divided by the total weight at the end, so the result does not
    depend on the cut. `max_norm`: largest global gradient norm, inf for any; a longer gradient is
    scaled down to it. `full(base, state.params)`: the whole parameters that the objective sees,
    where `state.params` are adapters on `base`; gradients are of `state.params` alone. Every
    process must call it; it does not wait for the device.

    Metrics are of the parameters before the update, scalars on the device: `loss`, the objective's
    own as means, each over its own weight (0 where that is 0), `grad_norm` before clipping, and
    the state's counts so far, this update included: `updates`, those taken, `skipped`, whose loss
    or gradient (shown as it is) was not finite, and `left_out`, whose total loss and weight were 0
    (`loss` and `grad_norm` are then 0). The last two kinds change nothing but the counters.
    """

    # The sum of losses, differentiated by the parameters that the state holds.
    def loss_of(params: Params, batch: Batch, base: Params | None) -> Sums:
        return objective(full(base, params), batch)

    # Of `params` alone: `base` is frozen.
    gradient = jax.value_and_grad(loss_of, has_aux=True)

    def sums(params: Params, batch: Batch, base: Params | None) -> PartSums:
        """Sum over one part of the batch."""
        # Laid as the parameters are, before they are added up.
        (loss, (weight, metrics)), grads = gradient(params, batch, base)
        grads = constrain_params(grads)
        return PartSums(loss, weight, metrics, grads)

    def accumulated(params: Params, batch: Batch, base: Params | None) -> PartSums:
        """Sum over the whole batch, taken part by part."""
        # A pipeline cuts the batch itself (layers.py).
        is_pipeline = along(jax.sharding.get_abstract_mesh(), "stage") > 1
        if microbatches == 1 or is_pipeline:
            return sums(params, batch, base)
        # Zeros of the sums' shapes, then one part after another is added.
        parts = jax.tree.map(lambda x: in_microbatches(x, microbatches), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(sums, params, first, base)
        zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)

        def add(totals: PartSums, part: Batch) -> tuple[PartSums, None]:
            more = sums(params, part, base)
            return jax.tree.map(jnp.add, totals, more), None

        totals, _ = jax.lax.scan(add, zeros, parts)
        return totals

    def step(
        state: TrainState, batch: Batch, base: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        # The mean gradient, clipped to a global norm.
        loss, weight, metrics, grads = accumulated(state.params, batch, base)
        grads = jax.tree.map(lambda grad: grad / weight, grads)
        norm = optax.global_norm(grads)
        scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
        clipped = jax.tree.map(lambda grad: grad * scale, grads)

        # The optimiser's step, undone where the loss or the gradient is not finite. Both are 0 / 0
        # where nothing counted, which is no fault.
        updates, opt_state = optimizer.update(clipped, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss / weight) & jnp.isfinite(norm)
        is_weightless = (weight == 0) & (loss == 0)

        def if_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + (~finite & ~is_weightless).astype(jnp.int32),
            left_out=state.left_out + is_weightless.astype(jnp.int32),
            params=if_finite(params, state.params),
            opt_state=if_finite(opt_state, state.opt_state),
        )
        # Laid out as it came: else XLA may lay it out otherwise, and the next step compiles anew.
        state = constrain_params(state)

        # Sums of metrics to means, the loss first.
        means = {}
        for name, (total, count) in metrics.items():
            means[name] = total / jnp.maximum(count, 1e-9)
        counts = {
            "updates": state.step - state.skipped - state.left_out,
            "skipped": state.skipped,
            "left_out": state.left_out,
        }
        means = {"loss": loss / weight, **means, "grad_norm": norm}
        means |= {
            name: jnp.where(is_weightless, 0.0, means[name]) for name in ("loss", "grad_norm")
        }
        return state, {**means, **counts}

    # The recorder (runtime/metrics.py) counts compilations by this name, whatever `step` is.
    step.__name__ = TRAIN_STEP
    return jax.jit(step, donate_argnums=0)


# --- evaluation


def make_evaluation(objective: Objective) -> Callable[[Params, list[Batch]], dict[str, float]]:
    """Make evaluate(params, batches) -> {"eval/loss", "eval/NAME"}, means over all batches.

    NAME: each metric of `objective`, over its own weight; all are floats, 0 where the weight is 0.
    `params`: what `objective` takes. `batches`: a list of batches on the mesh, one or more; not
    donated; each new shape is compiled. Waits for the device. Every process must call it.
    """

    @jax.jit
    def sums(params: Params, batch: Batch) -> MetricSums:
        loss, (weight, metrics) = objective(params, batch)
        return {"loss": (loss, weight), **metrics}

    def evaluate(params: Params, batches: list[Batch]) -> dict[str, float]:
        """Return means of the loss and the metrics of `objective` over `batches`, on the mesh."""
        # Sums of all batches first: a mean of means would weigh them wrongly.
        parts = [to_host(sums(params, batch)) for batch in batches]
        totals = jax.tree.map(lambda *x: float(sum(x)), *parts)
        means = {}
        for name, (total, weight) in totals.items():
            means[f"eval/{name}"] = total / max(weight, 1e-9)
        return means

    return evaluate
