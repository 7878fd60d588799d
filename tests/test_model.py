import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.packing import pack
from layers import run_layers, unstack_params
from model import (
    LanguageModel,
    MixtureOfExperts,
    ScalarModel,
    ScalarOutput,
    SwiGLU,
    empty_cache,
    init_and_apply,
    rope_frequencies,
    rope_turns,
    rotate,
    unembed,
)
from model_config import PRESETS, ModelConfig
from objectives.likelihood import likelihood_objective, token_logprobs
from runtime.errors import UserError
from sharding import MeshConfig, gathered, make_mesh, path_name

TINY = dataclasses.replace(PRESETS["tiny"], vocab=40, width=16, mlp_width=24, layers=2, head_dim=4)
VARIANTS = {
    "grouped": TINY,
    "bias and norm": dataclasses.replace(TINY, qkv_bias=True, qk_norm=True, tied=False),
    "norms after": dataclasses.replace(TINY, norms="after", qk_norm=True, qk_norm_over="heads"),
    "norms on both sides": dataclasses.replace(TINY, norms="both", rope_share=0.5),
    "mixed windows": dataclasses.replace(
        TINY, window=3, window_pattern=(False, True), rope_local_base=50.0
    ),
    "as gpt-neox": dataclasses.replace(
        TINY,
        norm="layer",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        gated=False,
        parallel_residual=True,
        rope_share=0.5,
    ),
    "experts": dataclasses.replace(TINY, experts=4, experts_per_token=2, router_norm=False),
    "soft caps": dataclasses.replace(
        TINY, attention_soft_cap=0.5, logit_soft_cap=1.0, score_width=9.0
    ),
    "window": dataclasses.replace(TINY, window=3, rope_scale=0.5),
    "llama3 rope": dataclasses.replace(TINY, rope_llama3=(8.0, 1.0, 4.0, 64.0), rope_base=100.0),
}
PUBLISHED = {  # parameter counts of the published checkpoints
    "llama3.2-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "mistral-7b": 7_241_732_096,
    "gemma3-1b": 999_885_952,
    "pythia-1b": 1_011_781_632,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma2-2b": 2_614_341_888,
    "olmo2-7b": 7_298_617_344,
    "phi3-mini": 3_821_079_552,
    "stories260k": 260_032,
}


@functools.cache
def make(config, model=LanguageModel, seed=0):
    """Return parameters with every leaf random (norms and biases too), and the model, compiled.

    The model returns (logits, cache), or of a ScalarModel its scalars.
    """
    init, apply = init_and_apply(model(config))
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0))

    def leaf(path, shape):
        noise = 0.3 * rng.normal(size=shape.shape)
        return np.float32(noise + 1 if path_name(path).endswith("norm") else noise)

    return jax.tree_util.tree_map_with_path(leaf, shapes), jax.jit(results_of(apply))


def results_of(apply):
    """Reduce a model's apply to (logits_BTV, cache) or scalars_BT."""

    def results(*args):
        output = apply(*args)
        if isinstance(output, ScalarOutput):
            return output.scalars_BT
        return unembed(output.x_BTD, output.unembed_DV), output.cache

    return results


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, 40, size=shape).astype(np.int32)


def rows(tokens_BT, left, right=0, pad=0):
    """Return a model's inputs for rows padded by `left` [B] and `right` tokens.

    Positions count real tokens.
    """
    width = max(left) + tokens_BT.shape[1] + right
    tokens, segments, positions = (np.full((len(left), width), x, np.int32) for x in (pad, 0, 0))
    for b, start in enumerate(left):
        here = slice(start, start + tokens_BT.shape[1])
        tokens[b, here], segments[b, here] = tokens_BT[b], 1
        positions[b, here] = np.arange(tokens_BT.shape[1])
    return tokens, segments, positions


def at(out_BT, left, length):
    """Return a model's outputs at the real tokens of `rows`."""
    return np.stack([row[i : i + length] for row, i in zip(np.asarray(out_BT), left, strict=True)])


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    shapes = jax.eval_shape(init_and_apply(LanguageModel(PRESETS[name]))[0], jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    scalar = jax.eval_shape(init_and_apply(ScalarModel(PRESETS[name]))[0], jax.random.key(0))
    assert jax.tree.structure(scalar["decoder"]) == jax.tree.structure(shapes["decoder"])


def test_causality_by_gradients():
    def influence(config, segments_T):
        """Return the size of the derivative of the logits at t by the input at s, [T, T]."""
        # Tied, the embedding would act twice.
        params, apply = make(dataclasses.replace(config, tied=False))
        # Distinct: token s stands for position s.
        tokens_T = np.arange(1, len(segments_T) + 1, dtype=np.int32)
        weights_V = np.random.default_rng(0).normal(size=config.vocab).astype(np.float32)
        positions_T = np.arange(len(tokens_T), dtype=np.int32)

        def summary_T(embed_VD):
            tree = {**params, "decoder": {**params["decoder"], "embed": embed_VD}}
            return (
                apply(tree, tokens_T[None], segments_T[None], positions_T[None])[0][0] @ weights_V
            )

        jacobian_TVD = jax.jit(jax.jacrev(summary_T))(params["decoder"]["embed"])
        return np.abs(jacobian_TVD[:, tokens_T]).sum(-1)

    t, s = np.indices((8, 8))
    ones = np.ones(8, np.int32)
    found = influence(TINY, ones)
    assert (found[s > t] == 0).all() and (found[s <= t] > 1e-6).all()
    found = influence(dataclasses.replace(TINY, layers=1, window=3), ones)
    visible = (s <= t) & (t - s < 3)
    assert (found[~visible] == 0).all() and (found[visible] > 1e-6).all()
    segments = np.array([1, 1, 1, 2, 2, 2, 0, 0], np.int32)
    found = influence(TINY, segments)
    visible = (s <= t) & (segments[t] == segments[s]) & (segments[t] > 0)
    # A padding token still passes along its own residual stream; nothing else reads it.
    assert (found[~visible & (s != t)] == 0).all() and (found[visible] > 1e-6).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_uncached_under_left_padding(variant):
    config = VARIANTS[variant]
    left = (0, 2, 5)
    prompt = 4
    total = 9
    params, apply = make(config)
    tokens_BT = random_tokens(3, total)
    want = at(apply(params, *rows(tokens_BT, left))[0], left, total)
    # Right-aligned prompts, then one token at a time.
    inputs = rows(tokens_BT[:, :prompt], [max(left)] * 3, pad=7)
    cache = empty_cache(config, 3, max(left) + total)
    logits, cache = apply(params, *inputs, cache)
    got = [np.asarray(logits)[:, -prompt:]]
    for t in range(prompt, total):
        ones = np.ones((3, 1), np.int32)
        logits, cache = apply(params, tokens_BT[:, t : t + 1], ones, ones * t, cache)
        got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, 1), want, atol=2e-5)
    wrong, _ = apply(
        params, tokens_BT[:, -1:], ones, ones * (total - 2), cache.replace(length=cache.length - 1)
    )
    assert np.abs(wrong[:, 0] - want[:, -1]).max() > 1e-3  # control: a position off by one shows


def test_layers_without_the_window_have_none_where_no_other_is_run():
    # The first layer of a model whose second has the window.
    config = dataclasses.replace(TINY, layers=1, window=2, window_pattern=(False, True))
    inputs = rows(random_tokens(1, 8), [0])
    params, apply = make(config)
    want, _ = make(dataclasses.replace(TINY, layers=1))[1](params, *inputs)
    np.testing.assert_allclose(apply(params, *inputs)[0], want, atol=1e-5)
    # Control: a window would show.
    windowed, _ = make(dataclasses.replace(TINY, layers=1, window=2))[1](params, *inputs)
    assert np.abs(windowed - want).max() > 1e-2


def test_prefill_of_rows_of_unequal_length():
    params, apply = make(TINY)
    tokens_BT = random_tokens(3, 8)
    lengths = (8, 5, 2)
    inputs = [np.zeros((3, 8), np.int32) for _ in range(3)]
    for b, length in enumerate(lengths):
        inputs[0][b, 8 - length :] = tokens_BT[b, :length]
        inputs[1][b, 8 - length :] = 1
        inputs[2][b, 8 - length :] = np.arange(length)
    cache = empty_cache(TINY, 3, 10)
    logits, cache = apply(params, *inputs, cache)
    last = logits[:, -1:]
    assert cache.length == 8
    ones = np.ones((3, 1), np.int32)
    next_B1 = np.array([[3], [4], [5]], np.int32)
    after, _ = apply(params, next_B1, ones, np.array(lengths, np.int32)[:, None], cache)
    for b, length in enumerate(lengths):
        alone_1T = np.concatenate([tokens_BT[b : b + 1, :length], next_B1[b : b + 1]], 1)
        want, _ = apply(params, *rows(alone_1T, [0]))
        np.testing.assert_allclose(last[b, 0], want[0, -2], atol=2e-5)
        np.testing.assert_allclose(after[b, 0], want[0, -1], atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_unpacked(variant):
    params, apply = make(VARIANTS[variant])
    examples = [
        (row[:n].tolist(), [1] * n) for row, n in zip(random_tokens(3, 6), (6, 4, 5), strict=True)
    ]
    packed = pack(examples, 16)
    inputs = [packed[k] for k in ("tokens_BT", "segment_ids_BT", "positions_BT")]
    assert inputs[0].shape == (1, 16) and inputs[1].max() == 3
    together, _ = apply(params, *inputs)
    mixed, _ = apply(params, inputs[0], (inputs[1] > 0).astype(np.int32), inputs[2])
    for segment in (1, 2, 3):
        here = inputs[1][0] == segment
        tokens = inputs[0][:, here]
        padded = np.pad(tokens, ((0, 0), (0, 6 - tokens.shape[1])))
        alone, _ = apply(params, *rows(padded, [0]))
        alone = alone[0, : tokens.shape[1]]
        np.testing.assert_allclose(together[0, here], alone, atol=2e-5)
        if segment > 1:  # control: without segments they see one another
            assert np.abs(mixed[0, here] - alone).max() > 1e-3


@pytest.mark.parametrize("model", [LanguageModel, ScalarModel])
def test_padding_side_amount_and_content_change_nothing(model):
    params, apply = make(TINY, model)
    tokens_BT = random_tokens(2, 5)

    def out(left, right, pad=0):
        result = apply(params, *rows(tokens_BT, left, right, pad))
        return at(result[0] if model is LanguageModel else result, left, 5)

    want = out((0, 0), 0)
    for left, right, pad in (((0, 0), 6, 0), ((6, 6), 0, 0), ((2, 4), 2, 39)):
        np.testing.assert_allclose(out(left, right, pad), want, atol=2e-5)
    tokens, segments, positions = rows(tokens_BT, (6, 6))
    # Control: padding that is seen.
    seen = apply(params, tokens, np.ones_like(segments), positions)
    seen = seen[0] if model is LanguageModel else seen
    assert np.abs(at(seen, (6, 6), 5) - want).max() > 1e-3


def test_earlier_positions_need_not_be_unembedded():
    params, apply = make(TINY)
    inputs = rows(random_tokens(2, 7), (0, 0))
    output = init_and_apply(LanguageModel(TINY))[1](params, *inputs)
    last = unembed(output.x_BTD[:, 4:], output.unembed_DV)
    np.testing.assert_allclose(last, apply(params, *inputs)[0][:, 4:], atol=1e-6)


def test_rope_depends_on_distance_only_and_turns_halves():
    config = dataclasses.replace(TINY, head_dim=8)
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def score(m, n):
        turned = [rotate(x, rope_turns(config, jnp.full((1, 1), p))) for x, p in ((q, m), (k, n))]
        return float((turned[0] * turned[1]).sum())

    assert (
        score(3, 1)
        == pytest.approx(score(40, 38), abs=1e-4)
        == pytest.approx(score(102, 100), abs=1e-4)
    )
    assert abs(score(3, 1) - score(3, 2)) > 1e-2  # control
    assert score(5, 5) == pytest.approx(float((q * k).sum()), abs=1e-5)
    # Half-split: as complex numbers x[i] + j x[i + H/2] multiplied by exp(j m base^(-2i/H)).
    x = q.reshape(8).astype(np.float64)
    m = 11
    turned = (x[:4] + 1j * x[4:]) * np.exp(1j * m * config.rope_base ** (-np.arange(4) / 4))
    got = np.asarray(rotate(q, rope_turns(config, jnp.full((1, 1), m)))).reshape(8)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag]), atol=1e-5)


def test_position_scale_interpolates():
    halved = dataclasses.replace(TINY, rope_scale=0.5)
    np.testing.assert_allclose(
        rope_turns(halved, jnp.array([[14]]))[1], rope_turns(TINY, jnp.array([[7]]))[1]
    )


def test_llama3_frequencies_follow_the_published_formula():
    config = PRESETS["llama3.2-1b"]
    factor, low, high, old_context = config.rope_llama3
    want = []
    for i in range(config.head_dim // 2):  # by wavelength, case by case, in float64
        frequency = config.rope_base ** (-2 * i / config.head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < old_context / high:
            want.append(frequency)
        elif wavelength > old_context / low:
            want.append(frequency / factor)
        else:
            smooth = (old_context / wavelength - low) / (high - low)
            want.append((1 - smooth) * frequency / factor + smooth * frequency)
    np.testing.assert_allclose(rope_frequencies(config), want, rtol=1e-5)
    plain = rope_frequencies(dataclasses.replace(config, rope_llama3=None))
    kept = np.isclose(plain, want, rtol=1e-5)
    assert kept.any() and not kept.all()  # control: some are kept, some stretched


def loss_and_grads(config, batch):
    params, _ = make(dataclasses.replace(config, remat="none", dtype="float32"))
    _, apply = init_and_apply(LanguageModel(config))
    objective = functools.partial(likelihood_objective, apply)
    return jax.jit(jax.value_and_grad(objective, has_aux=True))(params, batch)


def likelihood_batch():
    tokens, segments, positions = rows(random_tokens(2, 7), (0, 1))
    return {
        "tokens_BT": tokens,
        "segment_ids_BT": segments,
        "positions_BT": positions,
        "loss_mask_BT": segments * (positions > 0).astype(np.float32),
    }


def test_remat_changes_neither_loss_nor_gradients():
    (want, _), want_grads = loss_and_grads(TINY, likelihood_batch())
    for remat in ("dots", "full"):
        (loss, _), grads = loss_and_grads(
            dataclasses.replace(TINY, remat=remat), likelihood_batch()
        )
        assert float(loss) == pytest.approx(float(want), rel=1e-6)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-4), grads, want_grads
        )


def test_remat_keeps_less_for_the_backward_pass():
    batch = likelihood_batch()
    kept = {}
    for remat in ("none", "dots", "full"):
        init, apply = init_and_apply(LanguageModel(dataclasses.replace(TINY, remat=remat)))
        params = jax.eval_shape(init, jax.random.key(0))

        # The residuals are what the backward pass is closed over.
        def backward(params, apply=apply):
            loss = functools.partial(likelihood_objective, apply, batch=batch)
            return jax.vjp(lambda params: loss(params)[0], params)[1]

        residuals = jax.tree.leaves(jax.eval_shape(backward, params))
        kept[remat] = sum(x.size * x.dtype.itemsize for x in residuals)
    assert kept["full"] < 0.8 * kept["dots"] < 0.8 * kept["none"]


class ToyBlock(nn.Module):
    """A layer that adds its weight to all hidden states; its auxiliary loss is its square."""

    config: ModelConfig
    ring: int = 1

    @nn.compact
    def __call__(self, carry, scale, has_loss):
        x_BTD, cache, layer = carry
        w = self.param("w", nn.initializers.normal(1.0), ())
        return (x_BTD + scale * w, cache, layer + 1), None if has_loss is None else w**2


class ToyDecoder(nn.Module):
    config: ModelConfig
    microbatches: int = 1

    @nn.compact
    def __call__(self, x_BTD, has_loss):
        return run_layers(self, ToyBlock, 1, x_BTD, None, (jnp.float32(2.0), has_loss))


@pytest.mark.parametrize("has_loss", [True, False])
def test_auxiliary_losses_of_the_layers_are_summed(has_loss):
    toy = ToyDecoder(dataclasses.replace(TINY, layers=3))
    inputs = (jnp.zeros((1, 2, 4)), True if has_loss else None)
    variables = toy.init(jax.random.key(0), *inputs)
    weights_L = variables["params"]["layers"]["w"]
    got_BTD, cache, auxiliary_loss = jax.jit(toy.apply)(variables, *inputs)
    np.testing.assert_allclose(got_BTD, np.full((1, 2, 4), 2 * weights_L.sum()), rtol=1e-6)
    assert cache is None
    if has_loss:
        assert float(auxiliary_loss) == pytest.approx(float((weights_L**2).sum()))
    else:
        assert auxiliary_loss is None


def test_a_loss_curve_in_bfloat16_is_within_one_percent_of_float32s():
    """Over 60 updates that halve the loss; and a weight of 1e-30 stays what it is."""
    batch = likelihood_batch()
    weight = batch["loss_mask_BT"].sum()
    optimizer = optax.adam(3e-3)
    curves = {}
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(TINY, dtype=dtype, tied=False)
        init, apply = init_and_apply(LanguageModel(config))
        params = init(jax.random.key(0))
        params["decoder"]["embed"] = params["decoder"]["embed"].at[-1, 0].set(1e-30)
        objective = functools.partial(likelihood_objective, apply)

        @jax.jit
        def update(params, state, objective=objective):
            (loss, _), grads = jax.value_and_grad(objective, has_aux=True)(params, batch)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, loss / weight

        state = optimizer.init(params)
        losses = []
        for _ in range(60):
            params, state, loss = update(params, state)
            losses.append(float(loss))
        assert float(params["decoder"]["embed"][-1, 0]) == np.float32(1e-30)  # a token not met
        curves[dtype] = np.array(losses)
    assert curves["float32"][-1] < 0.5 * curves["float32"][0]
    np.testing.assert_allclose(curves["bfloat16"], curves["float32"], rtol=0.01)


def test_bfloat16_compute_keeps_logits_and_losses_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    batch = likelihood_batch()
    params, apply = make(TINY)
    (want, _), _ = loss_and_grads(TINY, batch)
    (loss, (weight, _)), grads = loss_and_grads(config, batch)
    assert loss.dtype == weight.dtype == jnp.float32 and float(loss) == pytest.approx(
        float(want), rel=0.05
    )
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))
    inputs = [batch[k] for k in ("tokens_BT", "segment_ids_BT", "positions_BT")]
    logits, _ = jax.jit(results_of(init_and_apply(LanguageModel(config))[1]))(params, *inputs)
    assert (
        logits.dtype == jnp.float32
        and token_logprobs(logits, batch["tokens_BT"]).dtype == jnp.float32
    )
    # Control: it did compute in bfloat16.
    assert np.abs(logits - apply(params, *inputs)[0]).max() > 1e-4
    scalar_model = jax.jit(results_of(init_and_apply(ScalarModel(config))[1]))
    scalars = scalar_model(make(TINY, ScalarModel)[0], *inputs)
    assert scalars.dtype == jnp.float32
    assert empty_cache(config, 1, 4).k_LBKSH.dtype == jnp.bfloat16


def test_gelu_is_by_name_the_tanh_form_or_the_exact_one():
    config = dataclasses.replace(TINY, width=1, mlp_width=1)
    one_11 = jnp.ones((1, 1))
    weights = {"params": {"gate": one_11, "up": one_11, "down": one_11}}
    x = np.linspace(-4, 4, 17, dtype=np.float32)
    tanh = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    exact = np.array([math.erf(value / math.sqrt(2)) for value in x])
    for name, curve in (("gelu", tanh), ("gelu_erf", exact)):
        layer = SwiGLU(dataclasses.replace(config, activation=name))
        got = np.asarray(layer.apply(weights, x.reshape(1, -1, 1))).reshape(-1)
        np.testing.assert_allclose(got, x * (x * (1 + curve) / 2), atol=1e-5)
    assert np.abs(tanh - exact).max() > 1e-4  # control: they differ


def test_the_sampler_has_the_routers_of_the_trainer():
    params, _ = make(VARIANTS["experts"])
    unstacked = unstack_params(params, jnp.bfloat16)["decoder"]["layers"]["mlp"]
    routers = params["decoder"]["layers"]["mlp"]["router"]
    np.testing.assert_array_equal(np.stack(unstacked["router"]), routers)
    assert unstacked["expert_up"][0].dtype == jnp.bfloat16  # control: others are cast
    # On a mesh too, where weights are gathered for many tokens.
    mesh = make_mesh(MeshConfig(fsdp=2, data=2, tensor=2))
    with jax.set_mesh(mesh):
        gather = jax.jit(lambda params: gathered(params, jnp.bfloat16))
        whole = gather(params)["decoder"]["layers"]["mlp"]
    assert whole["router"].dtype == jnp.float32 and whole["expert_up"].dtype == jnp.bfloat16


def test_experts_drop_no_token_and_balance_their_load():
    config = dataclasses.replace(TINY, experts=4, experts_per_token=1, router_loss_coef=0.5)
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(2, 5, config.width)).astype(np.float32)
    x_BTD[..., 0] = 1.0
    init = MixtureOfExperts(config).init(jax.random.key(0), x_BTD)["params"]
    third = {name: init[f"expert_{name}"][2] for name in ("gate", "up", "down")}

    # All tokens to the third expert: it is the layer, and the load is as uneven as can be.
    router_DE = jnp.zeros_like(init["router"]).at[0, 2].set(50.0)
    got, loss = MixtureOfExperts(config).apply({"params": {**init, "router": router_DE}}, x_BTD)
    want = SwiGLU(config).apply({"params": third}, x_BTD)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert float(loss) == pytest.approx(0.5 * 4 / config.layers)

    # Control: a router without a preference has a fourth of that loss, and another output.
    even = {**init, "router": jnp.zeros_like(router_DE)}
    other, loss = MixtureOfExperts(config).apply({"params": even}, x_BTD)
    assert float(loss) == pytest.approx(0.5 / config.layers)
    assert np.abs(other - want).max() > 1e-3
    # Both coefficient and loss may be none.
    silent = dataclasses.replace(config, router_loss_coef=0.0)
    assert MixtureOfExperts(silent).apply({"params": even}, x_BTD)[1] is None


def test_experts_equal_a_sum_over_all_of_them():
    config = dataclasses.replace(TINY, experts=4, experts_per_token=2, router_loss_coef=0.0)
    layer = MixtureOfExperts(config)
    x_BTD = np.random.default_rng(0).normal(size=(2, 5, config.width)).astype(np.float32)
    params = layer.init(jax.random.key(0), x_BTD)["params"]

    def dense(params, x_BTD):
        """All experts of all tokens, weighted by 0 where a token did not choose them."""
        shares_BTE = jax.nn.softmax(x_BTD @ params["router"])
        least_BT1 = jnp.sort(shares_BTE)[..., -2:-1]
        weights_BTE = jnp.where(shares_BTE >= least_BT1, shares_BTE, 0)
        weights_BTE /= weights_BTE.sum(-1, keepdims=True)
        outs = [
            SwiGLU(config).apply(
                {"params": {name: params[f"expert_{name}"][e] for name in ("gate", "up", "down")}},
                x_BTD,
            )
            for e in range(config.experts)
        ]
        return jnp.einsum("EBTD,BTE->BTD", jnp.stack(outs), weights_BTE)

    def sum_of_squares(of):
        return lambda params, x_BTD: jnp.square(of(params, x_BTD)).sum()

    def sparse(params, x_BTD):
        return layer.apply({"params": params}, x_BTD)[0]

    np.testing.assert_allclose(sparse(params, x_BTD), dense(params, x_BTD), atol=1e-5)
    got = jax.grad(sum_of_squares(sparse), argnums=(0, 1))(params, x_BTD)
    want = jax.grad(sum_of_squares(dense), argnums=(0, 1))(params, x_BTD)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4), got, want)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want)) > 1e-2  # control


@pytest.mark.parametrize(
    "fields", [{"kv_heads": 3}, {"head_dim": 5}, {"layers": 0}, {"vocab": -1}]
)
def test_impossible_shapes_are_refused_by_name(fields):
    with pytest.raises(UserError, match=f"--model.{next(iter(fields))}="):
        ModelConfig(**fields)
    with pytest.raises(
        UserError, match=r"--model.preset=gpt5: unknown; choose one of world, tiny"
    ):
        ModelConfig.from_preset("gpt5")
