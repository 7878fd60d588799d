import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import LanguageModel, ScalarModel, init_and_apply
from model_config import PRESETS
from objectives.likelihood import likelihood_objective
from runtime.errors import UserError
from sharding import RULES, path_name
from train_state import as_items, from_items, init_state
from train_step import (
    OptimizerConfig,
    decayed,
    make_evaluation,
    make_optimizer,
    make_schedule,
    make_train_step,
)

TINY = dataclasses.replace(PRESETS["tiny"], vocab=40, width=16, mlp_width=24, head_dim=4)
PLAIN = OptimizerConfig(lr=0.05, schedule="constant", warmup=0, weight_decay=0.0)


def regression(params, batch):
    """Return the weighted square error: a small objective with uneven weights."""
    error_B = (
        jnp.square(batch["x_BD"] @ params["w"] + params["bias"] - batch["y_B"]) * batch["weight_B"]
    )
    weight = batch["weight_B"].sum()
    return error_B.sum(), (weight, {"error": (jnp.sqrt(error_B).sum(), weight)})


def regression_batch(seed=0, rows=8):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(rows, 3)), rng.normal(size=rows)
    return {
        "x_BD": np.float32(x),
        "y_B": np.float32(y),
        "weight_B": np.float32(rng.integers(1, 9, rows)),
    }


def start(optimizer):
    return init_state({"w": jnp.array([0.5, -1.0, 2.0]), "bias": jnp.array(0.3)}, optimizer)


def language_batch(seed):
    """Return rows of very different length, some with hardly a token that counts."""
    rng = np.random.default_rng(seed)
    real = np.arange(10) < np.array([[10], [3], [9], [4], [2], [10], [2], [6]])
    return {
        "tokens_BT": np.int32(rng.integers(1, 40, (8, 10)) * real),
        "segment_ids_BT": np.int32(real),
        "positions_BT": np.int32(np.arange(10) * real),
        "loss_mask_BT": np.float32(real & (np.arange(10) > 0)),
    }


def close(x, y, atol):
    return all(
        np.allclose(a, b, atol=atol)
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )


def test_accumulation_equals_one_batch_with_unequal_token_counts():
    init, apply = init_and_apply(LanguageModel(TINY))
    objective = partial(likelihood_objective, apply)
    params = jax.jit(init)(jax.random.key(0))

    def mean_of_means(params, batch):  # control: what averaging micro-batches would minimise
        loss, (weight, metrics) = objective(params, batch)
        return loss / weight, (jnp.float32(1), metrics)

    def train(objective, microbatches):
        # Adam hides the scale of gradients: without it a difference in them shows in full.
        step = make_train_step(objective, optax.sgd(0.5), microbatches, max_norm=1e9)
        state = init_state(jax.tree.map(jnp.copy, params), optax.sgd(0.5))
        losses = []
        for seed in range(3):
            state, metrics = step(state, language_batch(seed))
            losses.append(metrics["loss"])
        return state.params, losses

    whole, losses = train(objective, 1)
    cut, cut_losses = train(objective, 4)
    assert close(whole, cut, 1e-6) and close(losses, cut_losses, 1e-5)
    naive, _ = train(mean_of_means, 4)
    assert not close(whole, naive, 1e-4)
    assert not close(whole, params, 1e-2)  # control: something was learnt


def test_clipping_equals_numpy_and_metrics_are_means():
    batch = regression_batch()
    lr = 0.1
    x, y, weight = (batch[k].astype(np.float64) for k in ("x_BD", "y_B", "weight_B"))
    error = x @ [0.5, -1, 2] + 0.3 - y
    grad_w = 2 * (weight * error) @ x / weight.sum()
    grad_b = 2 * (weight * error).sum() / weight.sum()
    norm = math.sqrt(grad_w @ grad_w + grad_b**2)
    for clip in (0.25, 100.0):
        state, metrics = make_train_step(regression, optax.sgd(lr), 1, max_norm=clip)(
            start(optax.sgd(lr)), batch
        )
        factor = min(1.0, clip / norm)
        np.testing.assert_allclose(
            state.params["w"], [0.5, -1, 2] - lr * factor * grad_w, atol=1e-6
        )
        np.testing.assert_allclose(state.params["bias"], 0.3 - lr * factor * grad_b, atol=1e-6)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)  # before clipping
        assert float(metrics["loss"]) == pytest.approx(
            (weight * error**2).sum() / weight.sum(), rel=1e-5
        )
        mean = (np.sqrt(weight) * np.abs(error)).sum() / weight.sum()
        assert float(metrics["error"]) == pytest.approx(mean, rel=1e-5)
    assert norm > 0.25  # control: the first was clipped


def numpy_adamw(config, steps, decay, gradient, params):
    """Take AdamW's steps in float64 (Loshchilov and Hutter 2019, algorithm 2), at one rate."""
    m, v = np.zeros_like(params), np.zeros_like(params)
    for t in range(1, steps + 1):
        g = gradient(params, t - 1)
        g = g * min(1.0, 1.0 / np.linalg.norm(g))
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g * g
        unbiased_m, unbiased_v = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
        params = params - config.lr * (
            unbiased_m / (np.sqrt(unbiased_v) + config.eps) + decay * params
        )
    return params


def numpy_gradient(params, seed):
    """Return the gradient of `regression` on its batch of that seed."""
    batch = {k: x.astype(np.float64) for k, x in regression_batch(seed).items()}
    residual = (batch["x_BD"] @ params[:3] + params[3] - batch["y_B"]) * batch["weight_B"]
    return 2 * np.append(residual @ batch["x_BD"], residual.sum()) / batch["weight_B"].sum()


def test_adamw_equals_float64_numpy_over_five_steps():
    config = dataclasses.replace(PLAIN, weight_decay=0.2, eps=1e-3)
    optimizer = make_optimizer(config, 5)
    step = make_train_step(regression, optimizer)
    state = start(optimizer)
    for seed in range(5):
        state, _ = step(state, regression_batch(seed))
    want = numpy_adamw(
        config, 5, np.array([0.2, 0.2, 0.2, 0]), numpy_gradient, np.array([0.5, -1, 2, 0.3])
    )
    got = np.append(state.params["w"], state.params["bias"])
    np.testing.assert_allclose(got, want, atol=2e-6)
    control = numpy_adamw(config, 5, np.full(4, 0.2), numpy_gradient, np.array([0.5, -1, 2, 0.3]))
    assert abs(control[3] - got[3]) > 1e-4  # control: a decayed bias would show
    assert int(state.step) == 5 and int(state.skipped) == 0


def test_a_first_moment_in_bfloat16_is_right_to_its_rounding():
    config = dataclasses.replace(PLAIN, eps=1e-3, moment="bfloat16")
    optimizer = make_optimizer(config, 20)
    step = make_train_step(regression, optimizer)
    state = start(optimizer)
    for seed in range(20):
        state, _ = step(state, regression_batch(seed))
    adam = state.opt_state[0]
    assert adam.mu["w"].dtype == jnp.bfloat16 and adam.nu["w"].dtype == jnp.float32
    want = numpy_adamw(config, 20, np.zeros(4), numpy_gradient, np.array([0.5, -1, 2, 0.3]))
    gap = np.abs(np.append(state.params["w"], state.params["bias"]) - want).max()
    # A step rounds the moment by 2^-8 at most and forgets a tenth of it: ten such errors in each
    # of 20 updates.
    assert 1e-5 < gap < 20 * config.lr * 10 * 2**-8


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_shrinks_all_but_norms_and_biases(name):
    """Without a gradient only decay moves parameters, by lr times its coefficient."""
    config = dataclasses.replace(TINY, qkv_bias=True, qk_norm=True)
    shapes = jax.eval_shape(init_and_apply(ScalarModel(config))[0], jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    optimizer = make_optimizer(dataclasses.replace(PLAIN, name=name, lr=0.1, weight_decay=0.2), 5)

    def nothing(params, batch):
        return 0.0 * batch["x"].sum(), (jnp.float32(1), {})

    state, _ = make_train_step(nothing, optimizer)(
        init_state(params, optimizer), {"x": np.ones((2, 1))}
    )
    want = jax.tree.map(lambda is_decayed: 0.98 if is_decayed else 1.0, decayed(shapes))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), state.params, want)
    kept = {path_name(path) for path, x in jax.tree_util.tree_leaves_with_path(want) if x == 1}
    names = ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm")
    inner = {f"decoder/layers/attention/{name}" for name in names}
    inner |= {f"decoder/layers/{name}" for name in ("attention_norm", "mlp_norm")}
    assert kept == inner | {"decoder/final_norm", "bias"}


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    optimizer = make_optimizer(PLAIN, 9)
    step = make_train_step(regression, optimizer)
    good = regression_batch()
    state, _ = step(start(optimizer), good)
    faults = [
        {**good, "y_B": np.append(good["y_B"][:-1], np.float32(np.nan))},
        {**good, "x_BD": np.float32(1e30) * good["x_BD"]},  # the square overflows
        {**good, "weight_B": np.float32(np.nan) * good["weight_B"]},
    ]
    for count, batch in enumerate(faults, start=1):
        before = jax.tree.map(np.array, state)
        state, metrics = step(state, batch)
        assert (
            int(state.skipped) == count == int(metrics["skipped"]) and int(state.step) == 1 + count
        )
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(x, y),
            (state.params, state.opt_state),
            (before.params, before.opt_state),
        )
    before = np.array(state.params["w"])
    state, metrics = step(state, good)  # control: the next good one moves
    assert (
        (state.params["w"] != before).all()
        and int(state.skipped) == 3
        and np.isfinite(metrics["loss"])
    )


@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_update_without_weight_is_left_out_and_no_fault(microbatches):
    optimizer = make_optimizer(PLAIN, 9)
    step = make_train_step(regression, optimizer, microbatches)
    good = regression_batch()
    state, metrics = step(start(optimizer), good)
    counts = ("updates", "skipped", "left_out")
    assert [int(metrics[name]) for name in counts] == [1, 0, 0]
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, {**good, "weight_B": 0 * good["weight_B"]})
    assert [int(metrics[name]) for name in counts] == [1, 0, 1]
    assert metrics["loss"] == metrics["grad_norm"] == 0
    after = jax.tree.map(np.array, state)
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.params, after.opt_state),
        (before.params, before.opt_state),
    )
    state, metrics = step(state, good)  # control: the next one moves
    assert [int(metrics[name]) for name in counts] == [2, 0, 1] and int(state.step) == 3
    assert (np.asarray(state.params["w"]) != before.params["w"]).all()


def test_one_bad_microbatch_spoils_the_whole_update():
    step = make_train_step(regression, optax.sgd(0.1), 4)
    batch = regression_batch()
    batch["y_B"][3] = np.inf
    state, _ = step(start(optax.sgd(0.1)), batch)
    assert int(state.skipped) == 1 and state.params["w"].tolist() == [0.5, -1, 2]


def test_schedules_start_peak_and_end_in_closed_form():
    def rate(name, step, **fields):
        config = OptimizerConfig(lr=0.4, schedule=name, final_lr=0.1, **{"warmup": 10, **fields})
        return float(make_schedule(config, 110)(step))

    for name in ("cosine", "linear", "constant"):
        for step in range(10):  # step 0 learns already
            assert rate(name, step) == pytest.approx(0.4 * (step + 1) / 11, rel=1e-5)
        assert rate(name, 10) == pytest.approx(0.4) == pytest.approx(rate(name, 0, warmup=0))
    # 100 updates behind the warm-up: the first at the peak, the last at the end.
    for t in (0, 30, 75, 99):
        share = 0.1 + 0.9 * (1 + math.cos(math.pi * t / 99)) / 2
        assert rate("cosine", 10 + t) == pytest.approx(0.4 * share, rel=1e-5)
        assert rate("linear", 10 + t) == pytest.approx(0.4 * (1 - 0.9 * t / 99), rel=1e-5)
        assert rate("constant", 10 + t) == pytest.approx(0.4)
    for last in (109, 500):
        assert rate("cosine", last) == pytest.approx(0.04) == pytest.approx(rate("linear", last))
    # T5's: the peak for as long as the warm-up, then 1 / sqrt(update), from 1.
    for t in (0, 4, 9):
        assert rate("inverse_sqrt", t) == pytest.approx(0.4)
    for t in (10, 39, 109):
        wanted = 0.4 * math.sqrt(10 / (t + 1))
        assert rate("inverse_sqrt", t) == pytest.approx(wanted, rel=1e-5)
    assert rate("inverse_sqrt", 99, warmup=0) == pytest.approx(0.04)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize(("warmup", "steps"), [(4, 10), (0, 10), (0, 2), (9, 10)])
def test_the_last_update_is_at_the_final_rate(name, warmup, steps):
    config = OptimizerConfig(lr=1.0, schedule=name, warmup=warmup, final_lr=0.1)
    schedule = make_schedule(config, steps)
    # A decay of one update is its first, at the peak.
    last = 0.1 if steps - warmup > 1 else 1.0
    assert float(schedule(steps - 1)) == pytest.approx(last)


@pytest.mark.parametrize(
    "fields",
    [
        {"warmup": 10},
        {"warmup": -1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"name": "adafactor", "beta1": 0.5},
    ],
)
def test_impossible_schedules_are_refused_by_name(fields):
    with pytest.raises(UserError, match=f"--optimizer.{[*fields][-1]}="):
        make_optimizer(dataclasses.replace(PLAIN, **fields), 10)


def test_a_warm_up_that_nobody_set_is_at_most_half_of_a_run():
    for steps, half in ((1, 0), (10, 5), (20, 10), (21, 20)):
        short = make_schedule(OptimizerConfig(lr=0.4), steps)
        same = make_schedule(OptimizerConfig(lr=0.4, warmup=half), steps)
        assert [float(short(i)) for i in range(steps)] == [float(same(i)) for i in range(steps)]


def test_adafactor_learns():
    optimizer = make_optimizer(dataclasses.replace(PLAIN, name="adafactor", weight_decay=0.1), 40)
    step = make_train_step(regression, optimizer, microbatches=2)
    state = start(optimizer)
    losses = []
    for _ in range(40):
        state, metrics = step(state, regression_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0] and int(state.skipped) == 0


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_adafactors_first_step_equals_float64_numpy(beta1):
    config = dataclasses.replace(PLAIN, name="adafactor", beta1=beta1)
    optimizer = make_optimizer(config, 5)
    rng = np.random.default_rng(0)
    shapes = {"factored": (128, 256), "small": (5, 3)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    grads = {name: rng.normal(size=shape) ** 3 for name, shape in shapes.items()}

    # Shazeer and Stern 2018, algorithm 4: of a large matrix the squares' rows and columns alone.
    want = {}
    for name, grad in grads.items():
        square = grad**2
        if name == "factored":
            rows, columns = square.mean(1), square.mean(0)
            square = rows[:, None] * columns / rows.mean()
        update = grad / np.sqrt(square)
        update /= max(1.0, np.sqrt(np.mean(update**2)))
        want[name] = -config.lr * np.sqrt(np.mean(params[name] ** 2)) * update

    params, grads = (jax.tree.map(np.float32, tree) for tree in (params, grads))
    state = optimizer.init(params)
    updates, _ = optimizer.update(grads, state, params)
    for name, update in want.items():
        np.testing.assert_allclose(updates[name], update, rtol=1e-4)
    # It holds the sums of rows and columns: less than one number a parameter, let alone two.
    assert sum(x.size for x in jax.tree.leaves(state)) < 0.1 * params["factored"].size


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", [LanguageModel, ScalarModel])
def test_each_parameter_matches_exactly_one_rule(name, model):
    for fields in ({}, {"qkv_bias": True, "qk_norm": True, "tied": False}):
        config = dataclasses.replace(PRESETS[name], **fields)
        shapes = jax.eval_shape(init_and_apply(model(config))[0], jax.random.key(0))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            found = [spec for pattern, spec in RULES if re.fullmatch(pattern, path_name(path))]
            assert len(found) == 1, path_name(path)
            assert len(found[0]) == leaf.ndim
    assert not any(re.fullmatch(pattern, "decoder/unembed") for pattern, _ in RULES)  # control


def test_items_of_a_checkpoint_are_the_state():
    state = start(make_optimizer(PLAIN, 5))
    assert as_items(state)["rest"].params == {}
    again = from_items(as_items(state))
    assert jax.tree.structure(again) == jax.tree.structure(state) and close(again, state, 0)


def test_evaluation_is_the_mean_over_all_tokens_of_all_batches():
    batches = [regression_batch(0, 8), regression_batch(1, 3)]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *batches)
    params = start(optax.sgd(1)).params
    evaluate = make_evaluation(regression)
    parts, whole = evaluate(params, batches), evaluate(params, [joined])
    assert parts == pytest.approx(whole, rel=1e-5) and parts.keys() == {"eval/loss", "eval/error"}
    means = [evaluate(params, [batch])["eval/loss"] for batch in batches]
    # Control: a mean of means is another number.
    assert abs(sum(means) / 2 - parts["eval/loss"]) > 1e-3
