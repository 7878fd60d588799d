"""Rollouts whose weights are cut over more devices than in training: --rollout.tensor."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from running import run, write

import train_grpo
import train_sft
from data.batches import pad_prompts
from lora import LoraConfig, lora_base, trainable_part, with_adapters
from model import LanguageModel, init_and_apply
from model_config import PRESETS
from rollout import RolloutConfig, check_rollout, make_rollout, with_copied_heads
from runtime.errors import UserError
from sampling import SamplingConfig
from sharding import MeshConfig, init_sharded, make_mesh, shardings_of, to_mesh, with_wider_tensor
from train_state import load_params

pytestmark = pytest.mark.skipif(
    jax.device_count() != 8, reason="XLA_FLAGS set another number of devices than 8"
)
MODEL = dataclasses.replace(
    PRESETS["tiny"],
    vocab=64,
    heads=8,
    kv_heads=4,
    head_dim=4,
    qk_norm=True,
    qkv_bias=True,
    tied=False,
    dtype="float32",
)
LENGTHS = (3, 5, 8, 8, 2, 6, 7, 4)
SAMPLING = SamplingConfig(max_new_tokens=10)
HOW = {"eos": 1, "pad": 0, "n": 2}


def away_from_zero(params):
    """Biases start at 0, where copying them would be no different from leaving them out."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def start(mesh, model=MODEL):
    """Return the model's apply, its parameters and prompts on the mesh, and a key."""
    init, apply = init_and_apply(LanguageModel(model))
    params = init_sharded(lambda key: away_from_zero(init(key)), mesh, jax.random.key(0))
    rng = np.random.default_rng(0)
    rows = [{"tokens": rng.integers(3, 64, k).tolist(), "mask": [1] * k} for k in LENGTHS]
    return apply, params, to_mesh(pad_prompts(rows, max(LENGTHS), 0), mesh), jax.random.key(1)


@pytest.mark.parametrize(
    ("shape", "tensor"),
    [
        ((1, 4, 2), 4),
        pytest.param((1, 4, 2), 8, marks=pytest.mark.slow),
        pytest.param((2, 4, 1), 2, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), 8, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value).replace(", ", "x"),
)
def test_responses_are_those_of_the_usual_layout(shape, tensor):
    """With eight devices there are two for each key/value head."""
    mesh = make_mesh(MeshConfig(*shape))
    apply, params, prompts, key = start(mesh)
    want = make_rollout(apply, MODEL, SAMPLING, **HOW)(params, prompts, key)
    wide = make_rollout(apply, MODEL, SAMPLING, **HOW, tensor=tensor)
    got = wide(params, prompts, key)
    assert set(got) == set(want)
    for name in set(want) - {"sampler_logp_BR"}:
        np.testing.assert_array_equal(got[name], want[name])
    np.testing.assert_allclose(got["sampler_logp_BR"], want["sampler_logp_BR"], atol=1e-5)
    assert float(want["mask_BR"].sum()) > 16 and float(want["sampler_logp_BR"].min()) < -1

    # It lies as a batch of training, whose mesh is the current one again.
    for x in got.values():
        place = NamedSharding(mesh, P(("data", "fsdp")))
        assert x.sharding.is_equivalent_to(place, x.ndim)
    assert jax.sharding.get_mesh() == mesh

    # Control: other noise draws other responses.
    other = wide(params, prompts, jax.random.key(2))
    assert np.any(other["response_BR"] != want["response_BR"])


def bytes_on_a_device(tree, shardings):
    """Return the bytes of a tree of shapes that each device holds."""
    held = 0
    for leaf, place in zip(*map(jax.tree.leaves, (tree, shardings)), strict=True):
        held += np.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return held


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_a_device_holds_its_part_of_the_weights_and_of_the_cache(tensor):
    """By the compiled programs: what `lay` gives, what `sample` takes, and its loop's arrays."""
    model = dataclasses.replace(MODEL, dtype="bfloat16", qkv_bias=False)
    mesh = make_mesh(MeshConfig(1, 4, 2))
    apply, params, prompts, key = start(mesh, model)
    wide = make_rollout(apply, model, SAMPLING, **HOW, tensor=tensor)
    laying = wide.lay(params).lower(params, prompts, key).compile()
    laid = laying(params, prompts, key)
    with jax.set_mesh(wide.mesh):
        sampling = wide.sample.lower(*laid).compile()
    (taken, *_), _ = sampling.input_shardings
    given, *_ = laying.output_shardings

    # In bfloat16, with a copy of key/value heads for every device; but norms, which are float32.
    copied = jax.eval_shape(partial(with_copied_heads, copies=max(1, tensor // 4)), params)
    decoder = copied["decoder"]
    layers = decoder["layers"]
    matrices = [copied["unembed"], decoder["embed"], layers["mlp"]]
    matrices += [layers["attention"][name] for name in "qkvo"]
    norms = [layers["attention_norm"], layers["mlp_norm"], decoder["final_norm"]]
    norms += [layers["attention"][name] for name in ("q_norm", "k_norm")]
    count = sum(x.size for x in jax.tree.leaves(matrices))
    want = 2 * count / tensor + 4 * sum(x.size for x in norms)
    weights, *_ = laid
    assert bytes_on_a_device(weights, given) == bytes_on_a_device(weights, taken) == want

    # Keys and values of a layer: [rows, heads, slots, head width], rows over what fsdp has left.
    rows = len(LENGTHS) * HOW["n"] // (8 // tensor)
    heads = max(4, tensor) // tensor
    slots = max(LENGTHS) + SAMPLING.max_new_tokens - 1
    assert f"[{rows},{heads},{slots},4]" in sampling.as_text()


@pytest.mark.parametrize("over", ["head", "heads"])
def test_copied_heads_compute_what_one_did(over):
    """Of adapters too; heads that are dealt in another order do not."""
    make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    model = dataclasses.replace(MODEL, qk_norm_over=over)
    init, apply = init_and_apply(LanguageModel(model))
    _, wide_apply = init_and_apply(LanguageModel(dataclasses.replace(model, kv_heads=8)))
    apply, wide_apply = jax.jit(apply), jax.jit(wide_apply)
    lora = LoraConfig(rank=2)
    base = away_from_zero(init(jax.random.key(0)))
    adapters = away_from_zero(trainable_part(lora, base, jax.random.key(1)))
    params = with_adapters(lora, lora_base(lora, base), adapters)
    tokens_BT = jnp.arange(12).reshape(2, 6) + 3
    positions_BT = jnp.broadcast_to(jnp.arange(6), (2, 6))
    inputs = (tokens_BT, jnp.ones_like(tokens_BT), positions_BT)
    want = apply(params, *inputs).x_BTD
    copied = with_copied_heads(params, 2)
    np.testing.assert_allclose(wide_apply(copied, *inputs).x_BTD, want, atol=1e-5)

    by_head = ["k", "v_bias", "v_b"]
    if over == "heads":
        by_head.append("k_heads_norm")
    for name in by_head:
        attention = copied["decoder"]["layers"]["attention"]
        turned = {**attention, name: jnp.roll(attention[name], 1, axis=-2)}
        layers = {**copied["decoder"]["layers"], "attention": turned}
        wrong = {**copied, "decoder": {**copied["decoder"], "layers": layers}}
        assert np.abs(wide_apply(wrong, *inputs).x_BTD - want).max() > 1e-3


@pytest.mark.parametrize(
    ("tensor", "fields", "words"),
    [
        (3, {}, "a multiple of --mesh.tensor=2 that divides tensor x fsdp = 8"),
        (1, {}, "a multiple of --mesh.tensor=2"),
        (0, {}, "a multiple of --mesh.tensor=2"),
        (16, {}, "divides tensor x fsdp = 8"),
        (8, {"heads": 12}, "must divide --model.heads=12"),
        (4, {"mlp_width": 66}, "must divide --model.mlp_width=66"),
        (4, {"experts": 6}, "must divide --model.experts=6"),
        (8, {"heads": 24, "kv_heads": 3}, "must divide --model.kv_heads=3, or be a multiple"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(tensor, fields, words):
    mesh = make_mesh(MeshConfig(1, 4, 2))
    model = dataclasses.replace(MODEL, **fields)
    with pytest.raises(UserError, match=f"^--rollout.tensor={tensor}: .*{words}"):
        check_rollout(RolloutConfig(tensor), model, mesh)
    # Controls.
    check_rollout(RolloutConfig(), model, mesh)
    check_rollout(RolloutConfig(4), MODEL, mesh)
    experts = dataclasses.replace(MODEL, experts=4, mlp_width=66)
    check_rollout(RolloutConfig(4), experts, mesh)


def test_a_sequence_axis_is_refused():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
    with pytest.raises(UserError, match=r"tensor=4: not with --mesh\.sequence=2"):
        check_rollout(RolloutConfig(4), MODEL, mesh)


def test_neighbours_along_fsdp_join_tensor_and_no_device_moves():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    wide = with_wider_tensor(mesh, 4)
    assert dict(wide.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert list(wide.devices.flat) == list(mesh.devices.flat)
    assert shardings_of({"head": jnp.ones(3)}, wide)["head"].mesh.axis_types == mesh.axis_types


@pytest.mark.slow
def test_a_run_learns_the_same_and_may_be_resumed_with_another_layout(tmp_path, monkeypatch):
    """check_first_update asserts in the runs that sampler and trainer agree to 1e-4 nats."""
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    sums = [(f"{i} plus {j}", str(i + j)) for i in range(5) for j in range(5)]
    write(tmp_path / "chats.jsonl", [{"prompt": p, "response": a} for p, a in sums])
    write(tmp_path / "sums.jsonl", [{"prompt": p, "answer": a} for p, a in sums])
    mesh = ("--mesh.data=1", "--mesh.fsdp=8", "--model.dtype=float32")
    sizes = ("--batch_size=8", "--eval_every=0")
    sft = ("--model.preset=tiny", "--data=chats.jsonl", "--length=48", "--steps=2", "--run=sft")
    run(train_sft, *sft, *mesh, *sizes)
    grpo = ("--init=sft", "--data=sums.jsonl", "--reward=tasks.answers:number", "--batch_size=32")
    grpo += (
        "--samples_per_prompt=4",
        "--minibatches=2",
        "--max_prompt=32",
        "--max_new_tokens=4",
        "--eval_every=0",
    )
    run(train_grpo, *grpo, *mesh, "--steps=2", "--run=one")
    run(train_grpo, *grpo, *mesh, "--steps=1", "--rollout.tensor=4", "--run=two")
    run(train_grpo, *grpo, *mesh, "--steps=2", "--rollout.tensor=2", "--run=two")
    close = partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, load_params("one"), load_params("two"))
    with pytest.raises(UserError, match=r"--rollout\.tensor=3"):
        run(train_grpo, *grpo, *mesh, "--rollout.tensor=3", "--run=three")
