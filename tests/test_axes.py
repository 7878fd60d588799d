"""The sequence axis (kernels/ring.py) and stage axis (layers.py) against one device and counts."""

import dataclasses
import functools
from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from running import fails, rows_of, run
from test_attention import assert_close, drawn, exact, packed, visible

import train_lm
import train_ppo
import train_rm
import train_sft
from kernels.attention import attention
from kernels.masks import mask_of, visible_ranges
from kernels.ring import of_stripe, striped, turns_of, unstriped, within
from layers import pipelined
from model import LanguageModel, ScalarModel, init_and_apply
from model_config import PRESETS
from objectives import likelihood
from objectives.likelihood import likelihood_objective
from objectives.reward import ranking_objective
from planning import hlo
from planning.dry_run import bubble, describe
from sharding import MeshConfig, init_sharded, make_mesh, shardings_of, to_mesh
from train_state import init_state, load_params
from train_step import OptimizerConfig, make_optimizer, make_train_step
from weights.families import GEMMA

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    vocab=32,
    width=16,
    mlp_width=24,
    layers=4,
    head_dim=4,
    qk_norm=True,
    dtype="float32",
)
MIXED = {
    "window": 5,
    "window_pattern": (True, False),
    "attention_soft_cap": 2.0,
    "norms": "both",
    "rope_local_base": 100.0,
}
UNLIKE_LLAMA = {
    "norm": "layer",
    "qk_norm_over": "heads",
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "gated": False,
    "parallel_residual": True,
    "logit_soft_cap": 3.0,
}
EXPERTS = {"experts": 4, "router_loss_coef": 0.0}
OPTIMIZER = make_optimizer(OptimizerConfig(lr=3e-3, warmup=1), 5)


# ---- Sequence: the ring ----


@functools.partial(jax.jit, static_argnames=("ring", "window", "causal", "implementation"))
def in_a_ring(q, k, v, dout, segments, ring, **options):
    """Return output and gradients of attention on striped tokens, in order again."""
    order = np.arange(q.shape[1]).reshape(-1, ring).T.reshape(-1)

    def run(*x):
        dealt = attention(*(x[:, order] for x in x), segment_ids=segments, ring=ring, **options)
        return dealt[:, np.argsort(order)]

    out, pull = jax.vjp(run, q, k, v)
    return (out, *pull(dout))


RINGS = {  # mesh, type, query heads, key/value heads, options
    "packed": (MeshConfig(data=2, sequence=4), "float32", 4, 2, {"packed": True}),
    "window, bfloat16": (
        MeshConfig(sequence=2, tensor=2),
        "bfloat16",
        4,
        1,
        {"packed": True, "window": 21},
    ),
    "both ways": (MeshConfig(data=1, sequence=8), "float32", 2, 2, {"causal": False}),
}


@pytest.mark.parametrize(
    "implementation", ["xla_chunked", pytest.param("pallas_tpu", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "case", ["packed", *(pytest.param(c, marks=pytest.mark.slow) for c in list(RINGS)[1:])]
)
def test_a_ring_equals_float64(case, implementation, rng):
    config, dtype, heads, kv_heads, options = RINGS[case]
    mesh = make_mesh(config)
    options = dict(options)
    length = 64 * int(rng.integers(1, 4))
    assert turns_of(length) == mesh.shape["sequence"] and turns_of(length + 2) == 1
    arrays = drawn(rng, 2, length, heads, kv_heads, 64, dtype)
    segments = packed(rng, 2, length) if options.pop("packed", False) else None
    got = in_a_ring(
        *arrays, segments, ring=mesh.shape["sequence"], implementation=implementation, **options
    )
    assert_close(got, exact(*arrays, segments, **options), dtype)
    with pytest.raises(AssertionError):  # control: another window
        assert_close(got, exact(*arrays, segments, **{**options, "window": 5}), dtype)


def test_keys_travel_to_the_neighbour_and_are_never_gathered():
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    arrays = [jax.ShapeDtypeStruct((2, 256, n, 64), jnp.float32) for n in (2, 1, 1, 2)]
    place = jax.NamedSharding(mesh, P(("data", "fsdp"), "sequence"))
    run = partial(attention, ring=4, implementation="xla_chunked")
    text = jax.jit(run, in_shardings=place).lower(*arrays[:3]).compile().as_text()
    moved = hlo.cost(text, dict(mesh.shape)).moved
    assert set(moved) == {("collective-permute", "sequence")}
    # k and v of 64 tokens, three times.
    assert moved["collective-permute", "sequence"][1] == 3 * 2 * 64 * 64 * 4


def test_stripes_share_the_work_and_lose_none(rng):
    ring, length = 4, 64
    segments = packed(rng, 2, length)
    keys, queries = visible_ranges(2, length, jnp.asarray(segments), True, 20)
    seen = visible(2, length, segments, True, 20)
    causal = np.zeros((ring, ring), int)
    for mine in range(ring):
        for theirs in range(ring):
            part = seen[:, mine::ring, theirs::ring]
            got = mask_of(within(of_stripe(keys, mine, ring), theirs, ring))
            np.testing.assert_array_equal(got[:, :, : length // ring], part)
            got = mask_of(within(of_stripe(queries, theirs, ring), mine, ring))
            np.testing.assert_array_equal(got[:, :, : length // ring], part.swapaxes(1, 2))
            causal[mine, theirs] = np.tri(length)[mine::ring, theirs::ring].sum()
    turns = np.array(
        [[causal[mine, (mine - turn) % ring] for mine in range(ring)] for turn in range(ring)]
    )
    assert causal.sum() == length * (length + 1) / 2
    # A turn lasts as long as its slowest device: within one key a query of perfect, where unbroken
    # parts take double.
    assert turns.max(1).sum() * ring / causal.sum() < 1.2
    unbroken = np.tri(length).reshape(ring, length // ring, ring, length // ring).sum((1, 3))
    slowest = sum(max(unbroken[m, (m - turn) % ring] for m in range(ring)) for turn in range(ring))
    assert slowest * ring / causal.sum() > 1.5


def test_striped_tokens_come_back_in_order():
    make_mesh(MeshConfig(data=2, sequence=4))
    x = np.arange(4 * 32).reshape(4, 32)
    dealt = striped(jnp.asarray(x), 4)
    np.testing.assert_array_equal(dealt[:, :8], x[:, ::4])
    back = jax.jit(partial(unstriped, ring=4))(dealt[..., None])
    np.testing.assert_array_equal(back[..., 0], x)


# ---- Stage: the schedule ----


def scans(jaxpr):
    """Return the lengths of all scans."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params["length"]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from scans(inner)


@pytest.mark.parametrize(("stages", "parts"), [(4, 3), (8, 4)])
def test_the_schedule_takes_as_many_ticks_as_the_bubble_says(stages, parts):
    mesh = make_mesh(MeshConfig(data=-1, stage=stages))
    weights = jnp.arange(1.0, 9.0)[:, None, None] * jnp.eye(16)
    x = jnp.ones((parts * 8 // stages, 4, 16))

    def run(weights, x, scale):
        for w in weights:
            x = jnp.einsum("BTD,DE->BTE", x, w) * scale[:, None, None]
        return x

    scale = jnp.arange(1.0, 1 + x.shape[0])
    function = partial(pipelined, run, microbatches=parts)
    (ticks,) = scans(jax.make_jaxpr(function)(weights, x, (scale,)).jaxpr)
    assert (
        bubble(stages, parts)
        == pytest.approx(1 - parts / ticks)
        == (stages - 1) / (parts + stages - 1)
    )
    np.testing.assert_allclose(
        jax.jit(function)(weights, x, (scale,)), x * 40320.0 * scale[:, None, None] ** 8
    )
    # Each device multiplies by its layers once a tick, so the compiler counts idle ticks too.
    compiled = jax.jit(function).lower(weights, x, (scale,)).compile()
    rows = 1  # a micro-batch's on a device
    assert (
        hlo.cost(compiled.as_text(), dict(mesh.shape)).flops
        == ticks * (8 // stages) * 2 * rows * 4 * 16 * 16
    )


def test_the_bubble_is_in_the_runs_arithmetic():
    mesh = make_mesh(MeshConfig(data=2, stage=4))
    shapes = jax.eval_shape(init_and_apply(LanguageModel(CONFIG))[0], jax.random.key(0))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings_of(shapes, mesh),
    )
    text = describe("title", params, (), batch_size=16, length=8, steps=2, microbatches=8)
    assert "4 stages, 8 micro-batches in 11 ticks: 27.3% of the time idle" in text


# ---- Both: five steps ----


def rows(seed, *shape):
    """Return packed rows: two segments and padding."""
    draw = np.random.default_rng(seed)
    length = shape[-1]
    ends = np.sort(draw.integers(2, length + 1, (*shape[:-1], 2)))
    at = np.broadcast_to(np.arange(length), shape)
    segments = (at < ends[..., :1]) + 2 * ((at >= ends[..., :1]) & (at < ends[..., 1:]))
    positions = at - np.where(segments == 2, ends[..., :1], 0)
    arrays = (draw.integers(1, 32, shape), segments, positions * (segments > 0))
    return [x.astype(np.int32) for x in arrays], ((segments > 0) & (positions > 0)).astype(
        np.float32
    )


def likelihood_batch(seed):
    arrays, mask = rows(seed, 8, 16)
    names = ("tokens_BT", "segment_ids_BT", "positions_BT", "loss_mask_BT")
    return dict(zip(names, (*arrays, mask), strict=True))


def ranking_batch(seed):
    arrays, mask = rows(seed, 8, 2, 16)
    names = ("tokens_BCT", "segment_ids_BCT", "positions_BCT", "loss_mask_BCT")
    ranks = np.argsort(np.random.default_rng(seed).random((8, 2)), axis=1).astype(np.int32) + 1
    batch = dict(zip(names, (*arrays, mask), strict=True))
    return {**batch, "ranks_BC": ranks, "margin_B": np.zeros(8, np.float32)}


OBJECTIVES = {
    "likelihood": (LanguageModel, likelihood_objective, likelihood_batch),
    "ranking": (
        ScalarModel,
        partial(ranking_objective, center_rewards_coef=0.01, lm_coef=0.5),
        ranking_batch,
    ),
}


def five_steps(config, name, microbatches, model_config=CONFIG):
    """Return losses, the state after five updates, and its mesh."""
    devices = jax.devices() if config != MeshConfig(1) else jax.devices()[:1]
    mesh, (model, objective, batches) = make_mesh(config, devices), OBJECTIVES[name]
    init, apply = init_and_apply(
        model(model_config, microbatches) if model is LanguageModel else model(model_config)
    )
    state = init_sharded(lambda key: init_state(init(key), OPTIMIZER), mesh, jax.random.key(0))
    step = make_train_step(partial(objective, apply), OPTIMIZER, microbatches)
    losses = []
    for seed in range(5):
        state, metrics = step(state, to_mesh(batches(seed), mesh))
        losses.append(float(metrics["loss"]))
    return losses, state, mesh


@functools.cache
def on_one_device(name, model_config=CONFIG):
    losses, state, _ = five_steps(MeshConfig(1), name, 1, model_config)
    return losses, jax.tree.map(np.asarray, state.params)


def case(name, microbatches=1, slow=True, **sizes):
    mesh = "x".join(f"{axis}{size}" for axis, size in sizes.items())
    sizes = {"data": 1, **sizes}
    return pytest.param(
        sizes, name, microbatches, id=f"{name}-{mesh}", marks=[pytest.mark.slow] if slow else []
    )


CASES = [
    case("likelihood", data=2, sequence=4, slow=False),
    case("likelihood", 2, sequence=2, tensor=2, data=2),
    case("likelihood", 2, sequence=2, fsdp=4),
    case("likelihood", 2, stage=2, data=4),
    case("likelihood", 4, stage=4, fsdp=2, slow=False),
    case("likelihood", 2, stage=2, fsdp=2, tensor=2),
    case("likelihood", 4, stage=2, sequence=2, tensor=2),
    case("likelihood", 8, stage=2, sequence=4),
    case("ranking", sequence=2, fsdp=2, tensor=2),
    case("ranking", 2, sequence=4, data=2),
]


@pytest.mark.parametrize(("sizes", "name", "microbatches"), CASES)
def test_five_steps_equal_one_device(sizes, name, microbatches):
    losses, state, mesh = five_steps(MeshConfig(**sizes), name, microbatches)
    want_losses, want = on_one_device(name)
    np.testing.assert_allclose(losses, want_losses, atol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), state.params, want)
    assert losses[0] != losses[-1]
    wanted = shardings_of(state, mesh)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f"{x.sharding} {s}"),
        state,
        wanted,
    )
    q = state.params["decoder"]["layers"]["attention"]["q"]
    ways = np.prod([sizes.get(axis, 1) for axis in ("stage", "fsdp", "sequence", "tensor")])
    assert q.addressable_shards[0].data.size == q.size / ways


@pytest.mark.slow
def test_parts_of_a_chunked_loss_are_of_all_devices(monkeypatch):
    """As five steps, but the logits of a row are computed in parts."""
    want_losses, want = on_one_device("likelihood")
    monkeypatch.setattr(likelihood, "TOKENS", 1)
    # Three parts: a device's four tokens as 2, 2, 0.
    monkeypatch.setattr(likelihood, "LOGITS", 8 * 16 * 32 // 8 // 3)
    losses, state, _ = five_steps(MeshConfig(data=2, sequence=4), "likelihood", 1)
    np.testing.assert_allclose(losses, want_losses, atol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), state.params, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"sequence": 4, "data": 2}, {"stage": 2, "sequence": 2, "tensor": 2}]
)
@pytest.mark.parametrize(
    "change",
    [
        {"window": 5},
        MIXED,
        UNLIKE_LLAMA,
        EXPERTS,
        {"remat": "full", "tied": False},
        {"qkv_bias": True, **GEMMA},
    ],
)
def test_variants_of_the_model_equal_one_device(sizes, change):
    changed = dataclasses.replace(CONFIG, **change)
    losses, state, _ = five_steps(MeshConfig(**{"data": 1, **sizes}), "likelihood", 2, changed)
    want_losses, want = on_one_device("likelihood", changed)
    np.testing.assert_allclose(losses, want_losses, atol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), state.params, want)


# ---- The scripts ----

TINY = ["--model.preset=tiny", "--mesh.data=-1"]
MISTAKES = [
    (
        train_sft,
        [*TINY, "--mesh.sequence=4", "--length=60"],
        "--mesh.sequence=4: its square must divide --length=60",
    ),
    (
        train_rm,
        [*TINY, "--mesh.sequence=8", "--length=32"],
        "--mesh.sequence=8: its square must divide --length=32",
    ),
    (train_lm, [*TINY, "--mesh.stage=4"], "--mesh.stage=4: must divide --model.layers=2"),
    (train_rm, [*TINY, "--mesh.stage=2"], "--mesh.stage=2: no pipeline here"),
    (train_ppo, ["--mesh.stage=2"], "--mesh.stage=2: no pipeline here"),
    (
        train_lm,
        ["--mesh.data=1", "--mesh.stage=3"],
        "--mesh.data=1, --mesh.fsdp=1, --mesh.tensor=1: cannot lay",
    ),
]


@pytest.mark.parametrize(("script", "argv", "words"), MISTAKES)
def test_mistakes_are_one_line(script, argv, words, capsys, tmp_path):
    assert words in fails(script, [*argv, f"--run={tmp_path}/run"], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [["--mesh.sequence=4"], ["--mesh.stage=2", "--mesh.fsdp=2", "--microbatches=2"]]
)
def test_scripts_run_evaluate_sample_and_resume_on_another_mesh(axes, tmp_path):
    constant = ["--optimizer.warmup=0", "--optimizer.schedule=constant"]
    common = [*constant, "--batch_size=16", "--length=64", "--eval_every=2"]
    for folder, steps, mesh in (
        ("one", 4, ["--mesh.tensor=2"]),
        ("two", 2, axes),
        ("two", 4, ["--mesh.tensor=2"]),
    ):
        parts = [word for word in axes if "microbatches" in word]
        mesh = [word for word in mesh if "microbatches" not in word]
        run(
            train_lm,
            *TINY,
            *common,
            *parts,
            *mesh,
            f"--steps={steps}",
            f"--run={tmp_path}/{folder}",
        )
    first, second = (load_params(f"{tmp_path}/{folder}") for folder in ("one", "two"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), first, second)
    evaluated = [
        [row["eval/loss"] for row in rows_of(tmp_path / f) if "eval/loss" in row]
        for f in ("one", "two")
    ]
    np.testing.assert_allclose(*evaluated, atol=1e-4)
