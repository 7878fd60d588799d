import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from model import LanguageModel, ScalarModel, init_and_apply
from model_config import PRESETS
from objectives.likelihood import likelihood_objective
from objectives.reward import ranking_objective
from planning import hlo
from runtime.errors import UserError
from sharding import (
    MeshConfig,
    abstract,
    check_batch,
    constrain_batch,
    init_sharded,
    make_mesh,
    path_name,
    shardings_of,
    spec_of,
    to_mesh,
)
from train_state import init_state
from train_step import OptimizerConfig, make_optimizer, make_train_step

CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    vocab=32,
    width=16,
    mlp_width=24,
    layers=2,
    head_dim=4,
    qk_norm=True,
    dtype="float32",
)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (2, 1, 4)]
OPTIMIZER = make_optimizer(OptimizerConfig(lr=3e-3, warmup=1), 5)
needs_eight = pytest.mark.skipif(
    jax.device_count() != 8,
    reason="XLA_FLAGS of the environment set another number of devices than 8",
)


def one_device():
    names = ("data", "fsdp", "tensor")
    return jax.make_mesh(
        (1, 1, 1), names, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def inputs(rng, *shape):
    real = np.arange(shape[-1]) < rng.integers(3, shape[-1] + 1, (*shape[:-1], 1))
    positions = np.broadcast_to(np.arange(shape[-1]), shape)
    arrays = (rng.integers(1, 32, shape) * real, real, positions * real)
    return [x.astype(np.int32) for x in arrays], (real & (positions > 0)).astype(np.float32)


def likelihood_batch(seed):
    (tokens, segments, positions), mask = inputs(np.random.default_rng(seed), 8, 10)
    names = ("tokens_BT", "segment_ids_BT", "positions_BT", "loss_mask_BT")
    return dict(zip(names, (tokens, segments, positions, mask), strict=True))


def ranking_batch(seed):
    rng = np.random.default_rng(seed)
    (tokens, segments, positions), mask = inputs(rng, 8, 3, 8)
    names = ("tokens_BCT", "segment_ids_BCT", "positions_BCT", "loss_mask_BCT")
    ranks = np.argsort(rng.random((8, 3)), axis=1).astype(np.int32) + 1
    ranks[0, 1] = 0
    batch = dict(zip(names, (tokens, segments, positions, mask), strict=True))
    return {**batch, "ranks_BC": ranks, "margin_B": np.zeros(8, np.float32)}


OBJECTIVES = {
    "likelihood": (LanguageModel, likelihood_objective, likelihood_batch),
    "ranking": (ScalarModel, partial(ranking_objective, center_rewards_coef=0.01), ranking_batch),
}


def five_steps(mesh, name, microbatches=1, config=CONFIG):
    """Return losses, parameters and the whole sharded state after five updates on `mesh`."""
    model, objective, batches = OBJECTIVES[name]
    init, apply = init_and_apply(model(config))
    with jax.set_mesh(mesh):
        state = init_sharded(lambda key: init_state(init(key), OPTIMIZER), mesh, jax.random.key(0))
        step = make_train_step(partial(objective, apply), OPTIMIZER, microbatches)
        losses = []
        for seed in range(5):
            state, metrics = step(state, to_mesh(batches(seed), mesh))
            losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, state.params), state


@functools.cache
def on_one_device(name):
    return five_steps(one_device(), name)[:2]


@needs_eight
def test_experts_train_in_bfloat16_where_rows_alone_are_cut():
    config = dataclasses.replace(CONFIG, experts=4, layers=1, dtype="bfloat16")
    losses, _, _ = five_steps(make_mesh(MeshConfig(data=1, fsdp=8)), "likelihood", config=config)
    want, _, _ = five_steps(one_device(), "likelihood", config=config)
    np.testing.assert_allclose(losses, want, rtol=1e-2)


@needs_eight
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("likelihood", shape) for shape in MESHES),
        ("ranking", (2, 2, 2)),
        *(pytest.param("ranking", shape, marks=pytest.mark.slow) for shape in MESHES[:2]),
    ],
)
def test_five_steps_equal_one_device_and_one_batch(shape, name):
    mesh = make_mesh(MeshConfig(*shape))
    microbatches = 1 if shape[0] * shape[1] == 8 else 2  # the rows are eight
    losses, params, state = five_steps(mesh, name, microbatches)
    want_losses, want = on_one_device(name)
    np.testing.assert_allclose(losses, want_losses, atol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), params, want)
    assert losses[0] != losses[-1]

    # Parameters lie as the rules say after the steps too, and Adam's moments as the parameters.
    wanted = shardings_of(state, mesh)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f"{x.sharding} {s}"),
        state,
        wanted,
    )
    adam = state.opt_state[0]
    for moment in (adam.mu, adam.nu):
        same = jax.tree.map(
            lambda m, p: m.sharding.is_equivalent_to(p.sharding, p.ndim), moment, state.params
        )
        assert jax.tree.all(same)
    here = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves((adam.mu, state.params)))
    everywhere = sum(x.size for x in jax.tree.leaves((adam.mu, state.params)))
    split = shape[1] * shape[2]
    assert here == everywhere if split == 1 else here < everywhere / split * 1.5 + 200


@needs_eight
def test_each_device_has_the_tokens_of_its_own_rows_and_its_own_experts():
    config = dataclasses.replace(
        CONFIG, experts=4, experts_per_token=2, mlp_width=40, router_loss_coef=0.5
    )
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    losses, params, _ = five_steps(mesh, "likelihood", config=config)
    want_losses, want_params, _ = five_steps(one_device(), "likelihood", config=config)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, atol=2e-4), params, want_params
    )

    # 8 rows of 10 tokens, 2 experts each: no device has more than its fourth of the choices, and
    # of the four experts its two.
    init, apply = init_and_apply(LanguageModel(config))
    batch = to_mesh(likelihood_batch(0), mesh)
    objective = partial(likelihood_objective, apply)
    gradient = jax.jit(jax.grad(lambda params: objective(params, batch)[0]))
    shapes = jax.eval_shape(init, jax.random.key(0))
    text = gradient.lower(abstract(shapes, mesh)).compile().as_text()
    assert "f32[40,16]" in text and "f32[2,16,40]" in text
    assert "f32[160," not in text and "f32[4,16,40]" not in text


@needs_eight
def test_key_value_heads_fewer_than_the_tensor_axis_are_replicated():
    mesh = make_mesh(MeshConfig(2, 1, 4))
    assert spec_of("decoder/layers/attention/k", (2, 16, 2, 4), mesh) == P(
        None, "fsdp", None, None
    )
    assert spec_of("decoder/layers/attention/q", (2, 16, 4, 4), mesh) == P(
        None, "fsdp", "tensor", None
    )


@needs_eight
def test_a_rule_holds_for_whole_names_and_their_copies_in_the_optimizer():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    assert spec_of("unembed", (16, 32), mesh) == P("fsdp", "tensor")
    assert spec_of("decoder/embed", (32, 16), mesh) == P("tensor", "fsdp")
    assert spec_of("opt_state/0/mu/decoder/embed", (32, 16), mesh) == P("tensor", "fsdp")
    assert spec_of("decoder/unembed_", (32, 16), mesh) == spec_of("step", (), mesh) == P()
    # Adafactor's factor: another shape.
    assert spec_of("opt_state/0/v_row/decoder/embed", (32,), mesh) == P()


@needs_eight
def test_adafactor_steps_on_a_mesh_by_one_program_that_gathers_layer_by_layer():
    mesh = make_mesh(MeshConfig(1, 8, 1))
    optimizer = make_optimizer(OptimizerConfig(name="adafactor", warmup=0), 5)
    # Wide enough to be factored.
    config = dataclasses.replace(CONFIG, vocab=128, width=128, mlp_width=256, layers=3)
    init, apply = init_and_apply(LanguageModel(config))
    state = init_sharded(lambda key: init_state(init(key), optimizer), mesh, jax.random.key(0))
    rows = [x for path, x in jax.tree.leaves_with_path(state) if "v_row" in path_name(path)]
    assert max(x.size for x in rows) > 1
    step = make_train_step(partial(likelihood_objective, apply), optimizer)
    batch = to_mesh(likelihood_batch(0), mesh)

    # A program takes arrays that lie as those that it was compiled for, and no others.
    program = step.lower(state, batch).compile()
    state, first = program(state, batch)
    for _ in range(4):
        state, last = program(state, batch)
    assert float(last["loss"]) < float(first["loss"])
    for x, place in zip(*map(jax.tree.leaves, (state, shardings_of(state, mesh))), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)

    # Parameters are gathered a layer's matrix at a time, never a stack of layers.
    matrix = 128 * 256 * 4
    moved = hlo.cost(program.as_text(), dict(mesh.shape)).moved
    gathers = {name: sizes for name, sizes in moved.items() if "gather" in name[0]}
    assert gathers and max(largest for _, _, largest in gathers.values()) <= matrix


@needs_eight
def test_batches_are_split_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(2, 2, -1))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    tokens = to_mesh({"tokens_BT": np.arange(32).reshape(8, 4)}, mesh)["tokens_BT"]
    assert {shard.data.shape for shard in tokens.addressable_shards} == {(2, 4)}
    constrained = jax.jit(constrain_batch)(jnp.zeros((8, 3)))
    assert constrained.sharding.is_equivalent_to(tokens.sharding, 2)
    # An odd batch is left alone.
    assert jax.jit(constrain_batch)(jnp.zeros((3, 3))).shape == (3, 3)


@needs_eight
@pytest.mark.parametrize(
    "sizes", [(3, 1, 1), (2, 2, 1), (-1, -1, 1), (0, 1, 1), (-2, 1, 1), (-1, 16, 1), (-1, 3, 1)]
)
def test_impossible_meshes_are_refused_with_all_three_sizes(sizes):
    with pytest.raises(
        UserError,
        match=f"--mesh.data={sizes[0]}, --mesh.fsdp={sizes[1]}, --mesh.tensor={sizes[2]}:",
    ):
        make_mesh(MeshConfig(*sizes))
    assert jax.sharding.get_mesh().empty  # and none is set


def test_batches_that_do_not_split_are_refused():
    mesh = one_device()
    check_batch("batch_size", 6, 3, mesh)
    for rows, microbatches in ((6, 4), (0, 1), (6, 0)):
        with pytest.raises(UserError, match=f"--batch_size={rows}: must be a positive multiple"):
            check_batch("batch_size", rows, microbatches, mesh)


def test_names_of_paths():
    tree = {"a": {"b": [1, 2]}}
    assert [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)] == [
        "a/b/0",
        "a/b/1",
    ]
