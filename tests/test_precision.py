"""Sums are of float32 terms, whatever type a model computes in; and float16 beside bfloat16."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import (
    LanguageModel,
    ScalarModel,
    embedded,
    init_and_apply,
    plus_bias,
    unrounded_logits,
)
from model_config import PRESETS
from objectives.likelihood import inputs, likelihood_objective
from sharding import path_name

TINY = dataclasses.replace(PRESETS["tiny"], vocab=96, layers=1, qkv_bias=True, qk_norm=True)


def frequent_tokens(rng, rows, length, vocab):
    """Draw tokens of which a fifth are token 3: [rows, length] int32."""
    tokens = rng.integers(4, vocab, (rows, length))
    return np.where(rng.random((rows, length)) < 0.2, 3, tokens).astype(np.int32)


def text_batch(rng, rows, length, vocab):
    return {
        "tokens_BT": frequent_tokens(rng, rows, length, vocab),
        "segment_ids_BT": np.ones((rows, length), np.int32),
        "positions_BT": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "loss_mask_BT": np.ones((rows, length), np.float32),
    }


def gradients(config, dtype, batch):
    """Return the gradient of the likelihood, every leaf drawn at random, by path."""
    config = dataclasses.replace(config, dtype=dtype)
    init, apply = init_and_apply(LanguageModel(config))
    params = jax.jit(init)(jax.random.key(0))
    loss = partial(likelihood_objective, apply)
    grads = jax.jit(jax.grad(lambda params: loss(params, batch)[0]))(params)
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(grads)}


def relative_errors(config, dtype, batch):
    """Return |gradient - float32's| / |float32's| of each parameter, and of token 3's row."""
    exact = gradients(config, "float32", batch)
    rounded = gradients(config, dtype, batch)
    exact["row"], rounded["row"] = (x["decoder/embed"][3] for x in (exact, rounded))
    errors = {}
    for name, x in exact.items():
        errors[name] = float(jnp.linalg.norm(rounded[name] - x) / jnp.linalg.norm(x))
    return errors


def test_a_frequent_tokens_gradient_is_summed_in_float32(rng):
    # As many occurrences as of a fifth of 32 rows of 256 tokens, without a model around them.
    tokens_BT = frequent_tokens(rng, 32, 256, 50)
    embed_VD = np.float32(rng.normal(size=(50, 4)))
    weight_BTD = np.float32(1 + rng.random((32, 256, 4)))

    def total(embed_VD, dtype):
        rows_BTD = embedded(embed_VD, tokens_BT, jnp.dtype(dtype))
        return (rows_BTD.astype(jnp.float32) * weight_BTD).sum()

    exact_VD = np.zeros((50, 4))
    np.add.at(exact_VD, tokens_BT, weight_BTD)
    got_VD = jax.grad(total)(embed_VD, "bfloat16")
    assert got_VD.dtype == jnp.float32
    np.testing.assert_allclose(got_VD, exact_VD, rtol=2e-3)
    # Control: the sum of the lookup's own derivative stops growing.
    plain = jax.grad(lambda table: embedded_plainly(table, tokens_BT, weight_BTD))(embed_VD)
    assert (plain[3] < 0.9 * exact_VD[3]).all()


def embedded_plainly(embed_VD, tokens_BT, weight_BTD):
    rows_BTD = jnp.asarray(embed_VD).astype(jnp.bfloat16)[tokens_BT]
    return (rows_BTD.astype(jnp.float32) * weight_BTD).sum()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_every_gradient_in_bfloat16_is_near_float32s(tied):
    # With bfloat16 sums the frequent token's row is off by a fifth.
    config = dataclasses.replace(PRESETS["tiny"], vocab=512, tied=tied)
    batch = text_batch(np.random.default_rng(0), 32, 256, 512)
    config = dataclasses.replace(config, context=256)
    errors = relative_errors(config, "bfloat16", batch)
    assert {name: error for name, error in errors.items() if error > 0.03} == {}


def sums_in(jaxpr, dtypes):
    """List the sums over an axis of arrays of `dtypes` in a jaxpr and those within it.

    A matrix product is none: it is summed in float32 and rounded once.
    """
    found = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        is_sum = name in (
            "reduce_sum",
            "cumsum",
            "scatter-add",
            "scatter_add",
            "reduce_window_sum",
        )
        if is_sum and eqn.outvars[0].aval.dtype in dtypes:
            found.append(f"{name} {eqn.outvars[0].aval}")
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    found += sums_in(inner, dtypes)
    return found


@pytest.mark.parametrize("model", [LanguageModel, ScalarModel])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_sum_of_a_step_is_of_rounded_terms(model, remat, rng):
    config = dataclasses.replace(TINY, dtype="bfloat16", remat=remat, scale_embedding=True)
    init, apply = init_and_apply(model(config))
    params = jax.eval_shape(init, jax.random.key(0))
    batch = text_batch(rng, 2, 16, config.vocab)

    def loss(params):
        if model is LanguageModel:
            return likelihood_objective(apply, params, batch)[0]
        return apply(params, *inputs(batch)).scalars_BT.sum()

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params)
    halves = (jnp.bfloat16, jnp.float16)
    assert sums_in(jaxpr.jaxpr, halves) == []
    # Controls: the float32 sums are seen, and so would be a rounded one.
    assert sums_in(jaxpr.jaxpr, (jnp.float32,))
    rounded = jax.make_jaxpr(jax.grad(lambda b: (jnp.ones((4, 3), jnp.bfloat16) + b).sum()))
    assert sums_in(rounded(jnp.ones(3, jnp.bfloat16)).jaxpr, halves)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_are_not_rounded(dtype, rng):
    x_MD, w_DV = (jnp.asarray(rng.normal(size=s), dtype) for s in ((5, 64), (64, 300)))
    exact_MV = np.asarray(x_MD, np.float64) @ np.asarray(w_DV, np.float64)
    logits_MV = unrounded_logits(x_MD, w_DV)
    assert logits_MV.dtype == jnp.float32
    np.testing.assert_allclose(logits_MV, exact_MV, atol=1e-4)
    rounded_MV = logits_MV.astype(dtype)  # control: to its own type they would be
    assert np.abs(np.asarray(rounded_MV, np.float64) - exact_MV).max() > 1e-3

    # The derivative is that of the product in its own type.
    def weighted(product):
        return lambda x, w: (product(x, w).astype(jnp.float32) * jnp.float32(exact_MV)).sum()

    got = jax.grad(weighted(unrounded_logits), (0, 1))(x_MD, w_DV)
    want = jax.grad(weighted(jnp.matmul), (0, 1))(x_MD, w_DV)
    for ours, plain in zip(got, want, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, plain)


def test_a_bias_is_added_before_rounding(rng):
    x = jnp.asarray(rng.normal(size=(6, 4)), jnp.bfloat16)
    bias = jnp.float32(rng.normal(size=4))
    exact = np.asarray(x, np.float64) + np.asarray(bias, np.float64)
    np.testing.assert_array_equal(plus_bias(x, bias), jnp.asarray(exact, jnp.bfloat16))


@pytest.mark.slow
def test_float16_is_nearer_to_float32_than_bfloat16(rng):
    batch = text_batch(rng, 2, 24, TINY.vocab)
    losses = {}
    for dtype in ("float32", "bfloat16", "float16"):
        init, apply = init_and_apply(LanguageModel(dataclasses.replace(TINY, dtype=dtype)))
        params = jax.jit(init)(jax.random.key(1))
        loss, (weight, _) = jax.jit(partial(likelihood_objective, apply))(params, batch)
        losses[dtype] = float(loss / weight)
    gaps = {dtype: abs(loss - losses["float32"]) for dtype, loss in losses.items()}
    assert gaps["float16"] < 0.5 * gaps["bfloat16"] < 0.01
