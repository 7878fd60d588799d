"""plan.py: what is read from compiled programs; small plans through real compilers, where here."""

import dataclasses
import importlib
import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import plan as command
import train_sft
from kernels.attention import attention
from kernels.chunked import block_size
from lora import LoraConfig
from model import LanguageModel, init_and_apply, unembed
from model_config import PRESETS
from objectives import likelihood
from planning import hlo, plan
from planning.chips import CHIPS, devices_of
from planning.gpus import GPUS, describe_gpu
from planning.programs import LAYOUTS, forward_flops, layout_of
from rollout import RolloutConfig
from runtime.errors import UserError
from sharding import MeshConfig, constrain_residual, gathered, make_mesh

needs_tpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed"
)
needs_cuda = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"), reason="no CUDA plugin"
)
needs_eight = pytest.mark.skipif(
    jax.device_count() != 8, reason="XLA_FLAGS set another number of devices than 8"
)

# Eight devices as data 2 x fsdp 2 x tensor 2. In a loop of five: an all-gather over fsdp of 1,024
# bytes a device (its second half, on the same channel, in another fusion), an all-reduce of 4,096
# bytes over data and tensor, a matmul. Once: a reduce-scatter of 2,048 bytes over tensor, as a
# fusion; a permutation of 512 bytes over data.
PROGRAM = """HloModule m, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%start (p: bf16[16,32]) -> bf16[32,32] {
  %p = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.1 = bf16[32,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7,\
 replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
}

%more (q: bf16[16,32]) -> bf16[32,32] {
  %q = bf16[16,32]{1,0} parameter(0)
  ROOT %gather.2 = bf16[32,32]{1,0} all-gather(%q), channel_id=7,\
 replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
}

%body (c: (s32[], bf16[16,32], f32[32,32])) -> (s32[], bf16[16,32], f32[32,32]) {
  %c = (s32[]{:T(128)}, bf16[16,32]{1,0}, f32[32,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %w = bf16[16,32]{1,0} get-tuple-element(%c), index=1
  %x = f32[32,32]{1,0} get-tuple-element(%c), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %g = bf16[32,32]{1,0:S(1)} fusion(%w), kind=kCustom, calls=%start
  %h = bf16[32,32]{1,0:S(1)} fusion(%w), kind=kCustom, calls=%more
  %y = f32[32,32]{1,0} convolution(%x, %g), dim_labels=bf_io->bf
  %z = f32[32,32]{1,0} all-reduce(%y), channel_id=8,\
 replica_groups=[2,4]<=[2,2,2]T(1,0,2), to_apply=%sum
  ROOT %t = (s32[], bf16[16,32]{1,0}, f32[32,32]{1,0}) tuple(%next, %w, %z)
}

%condition (d: (s32[], bf16[16,32], f32[32,32])) -> pred[] {
  %d = (s32[], bf16[16,32]{1,0}, f32[32,32]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%d), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%j, %five), direction=LT
}

%all-reduce-scatter.3 (r: f32[16,32]) -> f32[8,32] {
  %r = f32[16,32]{1,0} parameter(0)
  %whole = f32[16,32]{1,0} all-reduce(%r), channel_id=9,\
 replica_groups=mesh['a'=4,'b'=2] {'b'}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %cut = f32[8,32]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={8,32}
}

ENTRY %main (w0: bf16[16,32], x0: f32[32,32], stack: f32[10,16,32]) -> f32[8,32] {
  %w0 = bf16[16,32]{1,0} parameter(0)
  %x0 = f32[32,32]{1,0} parameter(1)
  %stack = f32[10,16,32]{2,1,0} parameter(2)
  %nought = s32[] constant(0)
  %t0 = (s32[], bf16[16,32]{1,0}, f32[32,32]{1,0}) tuple(%nought, %w0, %x0)
  %loop = (s32[], bf16[16,32]{1,0}, f32[32,32]{1,0}) while(%t0), condition=%condition, body=%body
  %slice = f32[1,16,32]{2,1,0} dynamic-slice(%stack, %nought, %nought, %nought),\
 dynamic_slice_sizes={1,16,32}
  %flat = f32[16,32]{1,0} bitcast(%slice)
  %cut8 = f32[8,32]{1,0} fusion(%flat), kind=kCustom, calls=%all-reduce-scatter.3
  %small = f32[4,32]{1,0} slice(%cut8), slice={[0:4], [0:32]}
  %sent = f32[4,32]{1,0} collective-permute(%small), channel_id=10,\
 source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  ROOT %result = f32[8,32]{1,0} copy(%cut8)
}
"""
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_collectives_are_counted_once_a_channel_and_once_a_turn_of_their_loop():
    assert hlo.cost(PROGRAM, MESH).moved == {
        # Each of two devices receives the other's part.
        ("all-gather", "fsdp"): (5, 5 * 1024, 1024),
        # Reduced and gathered again: Thakur et al. 2005.
        ("all-reduce", "data+tensor"): (5, 5 * 2 * 4096 * 3 / 4, 2 * 4096 * 3 / 4),
        ("reduce-scatter", "tensor"): (1, 2048 / 2, 2048 / 2),
        ("collective-permute", "data"): (1, 512, 512),
    }


def test_groups_are_counted_as_often_as_their_loop_runs():
    assert hlo.cost(PROGRAM, MESH).groups == {
        ("all-gather", 2): 5,
        ("all-reduce", 4): 5,
        ("reduce-scatter", 2): 1,
        ("collective-permute", 2): 1,
    }


def test_latency_grows_with_the_chips_of_a_group_and_not_on_a_switch():
    """Half way round a ring at a microsecond a hop, behind five; an all-reduce goes twice."""
    torus = CHIPS["v5e"].latency
    for kind, chips, microseconds in (
        ("all-gather", 4, 5 + 2),
        ("all-gather", 5, 5 + 3),
        ("reduce-scatter", 16, 5 + 8),
        ("all-reduce", 4, 5 + 2 * 2),
        ("all-reduce", 16, 5 + 2 * 8),
        ("collective-permute", 16, 5 + 1),
    ):
        assert torus.seconds(kind, chips) == pytest.approx(microseconds * 1e-6)
    on_a_switch = CHIPS["h200"].latency
    assert on_a_switch.seconds("all-reduce", 8) == on_a_switch.seconds("all-reduce", 2) == 6e-6

    # Of a program, all of its collectives.
    result = plan.Result(None, 0.0, 0.0, 0.0, hlo.cost(PROGRAM, MESH), 0.0)
    by_hand = 5 * (5 + 1) + 5 * (5 + 2 * 2) + (5 + 1) + (5 + 1)
    assert result.latency(CHIPS["v5e"]) == pytest.approx(by_hand * 1e-6)


def test_a_sweep_tries_copies_beside_fsdp():
    """On a square slice of 256 chips two copies beat one, for gradients are then scattered."""
    config = train_sft.Config(model=PRESETS["llama3-8b"])
    meshes = list(plan.meshes_to_try(config, 256))
    tried = {(mesh.data, mesh.fsdp, mesh.tensor) for mesh in meshes}
    assert {(1, 256, 1), (2, 128, 1), (1, 64, 4)} <= tried
    assert all(data * fsdp * tensor == 256 for data, fsdp, tensor in tried)


def test_matmuls_count_as_often_as_their_loop_runs():
    assert hlo.cost(PROGRAM, MESH).flops == 5 * 2 * 32**3
    assert hlo.cost(PROGRAM.replace("constant(5)", "constant(7)"), MESH).flops == 7 * 2 * 32**3
    by_two = PROGRAM.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")
    assert hlo.cost(by_two, MESH).flops == 3 * 2 * 32**3  # at 0, 2 and 4


def test_a_slice_of_an_array_moves_no_more_than_itself():
    """2,048 bytes read and written, whatever the stack's size; none in vector memory, S(1)."""
    few, many = (hlo.cost(PROGRAM.replace("[10,", f"[{n},"), MESH).memory for n in (10, 1000))
    assert few == many
    in_vector_memory = PROGRAM.replace(
        "%slice = f32[1,16,32]{2,1,0}", "%slice = f32[1,16,32]{2,1,0:S(1)}"
    )
    assert few - hlo.cost(in_vector_memory, MESH).memory == 2048


def test_a_fusion_that_passes_an_array_on_to_another_reads_it_once():
    """As a TPU's compiler does with weights: a fusion in the matmul's changes their shape only."""
    text = """HloModule m, is_scheduled=true

%turned (p: f32[32,4,8]) -> f32[32,32] {
  %p = f32[32,4,8]{2,1,0} parameter(0)
  ROOT %b = f32[32,32]{1,0} bitcast(%p)
}

%product (x: f32[16,32], w: f32[32,4,8]) -> f32[16,32] {
  %x = f32[16,32]{1,0:S(1)} parameter(0)
  %w = f32[32,4,8]{2,1,0} parameter(1)
  %t = f32[32,32]{1,0} fusion(%w), kind=kLoop, calls=%turned
  ROOT %y = f32[16,32]{1,0:S(1)} convolution(%x, %t), dim_labels=bf_io->bf
}

ENTRY %main (x: f32[16,32], w: f32[32,4,8]) -> f32[16,32] {
  %x.1 = f32[16,32]{1,0:S(1)} parameter(0)
  %w.1 = f32[32,4,8]{2,1,0} parameter(1)
  ROOT %f = f32[16,32]{1,0:S(1)} fusion(%x.1, %w.1), kind=kOutput, calls=%product
}
"""
    assert hlo.cost(text, {"data": 1}).memory == 32 * 32 * 4
    sliced = text.replace(
        "convolution(%x, %t), dim_labels=bf_io->bf", "slice(%t), slice={[0:16], [0:32]}"
    )
    assert hlo.cost(sliced, {"data": 1}).memory == 16 * 32 * 4


def test_a_collective_in_flight_moves_its_result_once():
    """On TPUs it rides through fusions that overlap; else `-start` names its operand again."""
    text = """HloModule m, is_scheduled=true

%rides (p: bf16[16,32], r: bf16[32,32], x: f32[32,32]) -> (f32[32,32], bf16[16,32], bf16[32,32]) {
  %p = bf16[16,32]{1,0} parameter(0)
  %r = bf16[32,32]{1,0} parameter(1)
  %x = f32[32,32]{1,0} parameter(2)
  %more = bf16[32,32]{1,0} all-gather(%p), channel_id=7,\
 replica_groups={{0,1}}, dimensions={0}
  %y = f32[32,32]{1,0} negate(%x)
  ROOT %t = (f32[32,32]{1,0}, bf16[16,32]{1,0}, bf16[32,32]{1,0}) tuple(%y, %p, %more)
}

ENTRY %main (w: bf16[16,32], x: f32[32,32]) -> f32[32,32] {
  %w = bf16[16,32]{1,0} parameter(0)
  %x.1 = f32[32,32]{1,0} parameter(1)
  %start = (bf16[16,32]{1,0}, bf16[32,32]{1,0}) all-gather-start(%w),\
 channel_id=7, replica_groups={{0,1}}, dimensions={0}
  %a = bf16[16,32]{1,0} get-tuple-element(%start), index=0
  %b = bf16[32,32]{1,0} get-tuple-element(%start), index=1
  %f = (f32[32,32]{1,0}, bf16[16,32]{1,0}, bf16[32,32]{1,0}) fusion(%a, %b, %x.1),\
 kind=kLoop, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%rides
  ROOT %out = f32[32,32]{1,0} get-tuple-element(%f), index=0
}
"""
    start, negate = (16 + 32) * 32 * 2, 2 * 32 * 32 * 4
    assert hlo.cost(text, {"data": 2}).memory == start + negate


def test_attention_in_tiles_counts_those_that_the_mask_leaves():
    """The inner loop's bounds are data: XLA has no count, and a tile a row would be too few."""
    batch, heads, length, width = 1, 2, 1024, 32
    x = jax.ShapeDtypeStruct((batch, length, heads, width), jnp.float32)
    text = (
        jax.jit(partial(attention, implementation="xla_chunked"))
        .lower(x, x, x)
        .compile()
        .as_text()
    )
    tile = block_size(length)
    tiles = length // tile
    flops = 2 * 2 * batch * heads * width * tile**2 * tiles * (tiles + 1) / 2
    assert hlo.cost(text, {"data": 1}).flops == flops


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("replica_groups={{1,3},{0,2}}", [1, 3]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [0, 2, 4, 6]),
        ("replica_groups={}", list(range(8))),
        ("source_target_pairs={{3,5},{5,3}}", [3, 5]),
    ],
)
def test_groups_of_devices_in_all_notations(text, joined):
    assert list(hlo.one_group(hlo.Op("x", "", "all-reduce", [], text, False), 8)) == joined


def test_a_convolution_counts_only_places_inside_the_array():
    """XLA writes a batched matmul as a convolution with a reversed, padded window.

    One of 4 x 7 places is in use.
    """
    shapes = {"l": "bf16[4,16,8]{2,1,0}", "r": "bf16[4,8,32]{2,1,0}"}
    computation = {
        name: hlo.Op(name, shape, "parameter", [], "", False) for name, shape in shapes.items()
    }
    attributes = (
        ", window={size=4 stride=3 pad=3_3 lhs_dilate=4 rhs_reversal=1}, dim_labels=0bf_0io->0bf"
    )
    op = hlo.Op("c", "bf16[4,16,32]{2,1,0}", "convolution", ["l", "r"], attributes, False)
    # The definition: output o, window place k, at o * stride - pad + k of the dilated input.
    want = 0
    for o in range(4):
        for k in range(4):
            at = 3 * o - 3 + k
            want += 0 <= at <= 4 * 3 and at % 4 == 0
    assert hlo.matmul_flops(op, computation) == 2 * 16 * 8 * 32 * want and 0 < want < 16


def test_a_matmul_of_cublas_counts_like_the_dot_that_it_was():
    """Copied from a program compiled for an H100: a batch of 4, contracted over 640."""
    text = """HloModule m

ENTRY %main (a: bf16[4,4096,640], b: bf16[4,640,96]) -> bf16[4,4096,96] {
  %a = bf16[4,4096,640]{2,1,0} parameter(0)
  %b = bf16[4,640,96]{2,1,0} parameter(1)
  %custom-call.2 = (bf16[4,4096,96]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],\
"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %out = bf16[4,4096,96]{2,1,0} get-tuple-element(%custom-call.2), index=0
}
"""
    assert hlo.cost(text, {"data": 1}).flops == 2 * 4 * 4096 * 96 * 640
    other = text.replace("__cublas$lt$matmul", "SomethingElse")
    assert hlo.cost(other, {"data": 1}).flops == 0


def test_forward_flops_are_those_of_the_compiled_model():
    """Against the CPU's compiler, whose attention computes the half that causality masks too."""
    c = PRESETS["tiny"]
    rows = 2
    length = 24
    init, apply = init_and_apply(LanguageModel(c))
    params = jax.eval_shape(init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def logits_BTV(params, tokens_BT):
        output = apply(params, tokens_BT, tokens_BT, tokens_BT)
        return unembed(output.x_BTD, output.unembed_DV)

    text = jax.jit(logits_BTV).lower(params, tokens).compile().as_text()
    masked = rows * c.layers * 2 * length * length * c.heads * c.head_dim
    assert hlo.cost(text, {"data": 1}).flops == forward_flops(c, rows, length, length) + masked


def test_forward_flops_count_the_keys_in_a_window():
    c = dataclasses.replace(PRESETS["tiny"], window=6, window_pattern=(True, False))
    rows, length = 3, 24
    without = forward_flops(PRESETS["tiny"], rows, length, 0)
    # Queries see 1, 2, ... 6, 6, ... keys; where causality hides some, half of their own counts.
    unseen = sum(max(query + 1 - c.window, 0) for query in range(length))
    unseen -= (length - c.window) / 2
    left_out = rows * 4 * c.heads * c.head_dim * unseen
    assert forward_flops(c, rows, length, 0) == without - left_out
    # A window as long as the rows leaves nothing out.
    assert forward_flops(dataclasses.replace(c, window=length), rows, length, 0) == without


def hidden(rng, rows=2, length=10, width=6, vocab=11):
    x, w = rng.normal(size=(rows, length, width)), rng.normal(size=(width, vocab))
    return x, w, rng.integers(0, vocab, (rows, length))


def test_log_probabilities_in_parts_are_those_of_all_logits(monkeypatch):
    x, w, labels = hidden(np.random.default_rng(0))
    logits = x @ w / 0.7
    want = np.take_along_axis(logits, labels[..., None], -1)[..., 0] - np.log(
        np.exp(logits).sum(-1)
    )
    weights = np.random.default_rng(1).normal(size=labels.shape)

    def loss(x, w):
        logp = likelihood.hidden_logprobs(x, w, jnp.asarray(labels), temperature=0.7)
        return (logp * weights).sum(), logp

    gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
    arrays = jnp.float32(x), jnp.float32(w)
    (_, plain), plain_grads = gradient(*arrays)
    monkeypatch.setattr(likelihood, "TOKENS", 1)
    # Four parts of three tokens, the last padded.
    monkeypatch.setattr(likelihood, "LOGITS", 2 * 3 * 11)
    (_, parts), grads = gradient(*arrays)
    assert "scan" in str(jax.make_jaxpr(loss)(*arrays))
    np.testing.assert_allclose(parts, want, atol=1e-5)
    np.testing.assert_allclose(parts, plain, atol=1e-5)
    # d loss / d logits = weight (one-hot - softmax) / temperature
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    dlogits = weights[..., None] * (np.eye(11)[labels] - softmax) / 0.7
    for got, whole, exact in zip(
        grads, plain_grads, (dlogits @ w.T, np.einsum("BTD,BTV->DV", x, dlogits)), strict=True
    ):
        np.testing.assert_allclose(got, exact, atol=1e-5)
        np.testing.assert_allclose(got, whole, atol=1e-5)


def test_a_loss_in_parts_takes_a_quarter_of_the_temporaries_at_a_vocabulary_of_128k():
    vocab = 2**17
    hidden_BTD = jax.ShapeDtypeStruct((16, 1024, 32), jnp.float32)
    weights_DV = jax.ShapeDtypeStruct((32, vocab), jnp.float32)
    labels_BT = jnp.zeros((16, 1024), jnp.int32)

    def of_all_logits(x, w):
        return likelihood.label_logprobs(unembed(x, w), labels_BT).sum()

    def in_parts(x, w):
        return likelihood.hidden_logprobs(x, w, labels_BT).sum()

    def temporaries(loss):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden_BTD, weights_DV).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = temporaries(of_all_logits)
    assert whole >= 16 * 1024 * vocab * 4
    assert temporaries(in_parts) < whole / 4


@needs_eight
def test_the_residual_stream_is_split_over_tensor_where_its_tokens_divide():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    rows = ("data", "fsdp")
    for shape, spec in (((4, 6), P(rows, "tensor")), ((4, 1), P(rows)), ((3, 6), P())):
        x = jax.jit(constrain_residual)(jnp.zeros((*shape, 3)))
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


TINY = (
    "--model.preset=tiny",
    "--model.width=512",
    "--model.mlp_width=1024",
    "--model.head_dim=128",
    "--model.vocab=2048",
    "--model.tied=False",
    "--topology=v5e:2x2",
    "--mesh.fsdp=2",
    "--mesh.tensor=2",
)


@needs_tpu
def test_a_plan_agrees_with_the_tpu_compiler(capsys):
    verdict = plan.main(["train_sft", *TINY, "--batch_size=8", "--length=128"])
    assert verdict.fits and capsys.readouterr().out.splitlines()[-1].startswith(
        "fits: update peaks at"
    )
    (result,) = verdict.results
    state = result.program.args[0]
    assert abs(result.arguments / plan.bytes_of(result.program.args) - 1) < 0.02
    count = sum(x.size for x in jax.tree.leaves(state.params))
    assert plan.bytes_of((state.params, state.opt_state)) == pytest.approx(
        3 * 4 * count / 4, rel=0.02
    )
    moved = result.cost.moved
    # Weights in bfloat16 are gathered over fsdp for the forward, and at most again for the
    # backward pass.
    assert 0.9 * count / 4 * 2 < moved["all-gather", "fsdp"][1] < 2.1 * count / 4 * 2
    assert ("all-gather", "tensor") in moved and result.cost.flops > 0
    # Nothing is computed twice.
    assert result.program.model_flops / 4 == pytest.approx(result.cost.flops, rel=0.1)


@needs_tpu
@pytest.mark.slow
def test_ppo_is_planned_whole(capsys):
    rows = ("--batch_size=16", "--max_prompt=128", "--max_new_tokens=64", "--samples_per_prompt=2")
    verdict = plan.main(
        ["train_ppo", *TINY, "--model.width=2048", "--model.mlp_width=28672", *rows]
    )
    assert [r.program.name for r in verdict.results] == [
        "rollout",
        "score runs/align/rm",
        "advantages",
        *UPDATES,
    ]
    assert verdict.fits and all(r.cost.flops > 0 for r in verdict.results)
    rollout = verdict.results[0]
    c = PRESETS["tiny"]
    rows = 16 / 2
    # bfloat16, heads over tensor.
    cache = 2 * c.layers * rows * (128 + 64) * c.kv_heads / 2 * 128 * 2
    assert plan.bytes_of(rollout.program.cache) == cache < rollout.temporaries
    # Each token decoded reads the weights, whole over fsdp and in bfloat16, but for what stays in
    # 128 MiB nearer by.
    weights = plan.bytes_of(rollout.program.args[0]) * 2 / 2
    assert 64 * (weights - 2**27) < rollout.cost.memory < 64 * 1.2 * weights


UPDATES = ("value update", "policy update")
VARIANTS = {  # a script's fields, and the programs that its plan then has
    "train_lm": [({}, ["update"])],
    "train_sft": [({"lora": LoraConfig(rank=2), "init": "x"}, ["update"])],
    "train_rm": [({"lm_coef": 0.5}, ["update"])],
    "train_dpo": [
        ({}, ["reference", "update"]),
        ({"reference": "online"}, ["reference", "update"]),
        (
            {"reference": "online", "lora": LoraConfig(rank=2), "init": "x"},
            ["reference", "update"],
        ),
        ({"loss": "simpo"}, ["update"]),
    ],
    "train_ppo": [
        ({"ptx_data": "world"}, ["rollout", "score runs/align/rm", "advantages", *UPDATES]),
        (
            {"reward": ("a", "b"), "lora": LoraConfig(rank=2)},
            ["rollout", "score a", "score b", "advantages", *UPDATES],
        ),
        (
            {"reward": ("tasks.answers:number",), "lora": LoraConfig(rank=2)},
            ["rollout", "advantages", *UPDATES],
        ),
        ({"offload": True}, ["rollout", "score runs/align/rm", "advantages", *UPDATES]),
        (
            {"reward": ("tasks.answers:number",), "rollout": RolloutConfig(1)},
            ["rollout weights", "rollout", "advantages", *UPDATES],
        ),
    ],
    "train_grpo": [
        ({}, ["rollout", "score runs/align/rm", "advantages", "update"]),
        (
            {"reward": ("tasks.answers:number",), "method": "rloo"},
            ["rollout", "advantages", "update"],
        ),
        (
            {"reward": ("a", "b"), "lora": LoraConfig(rank=2)},
            ["rollout", "score a", "score b", "advantages", "update"],
        ),
    ],
}


@pytest.mark.parametrize(
    ("name", "fields", "programs"), [(n, *v) for n, all_of in VARIANTS.items() for v in all_of]
)
def test_a_script_s_functions_take_what_its_plan_says(name, fields, programs):
    script = importlib.import_module(name)
    config = script.Config(model=PRESETS["tiny"], batch_size=16, **fields)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    planned = layout_of(script).plan(script, config, mesh)
    assert [program.name for program in planned.programs] == programs
    assert set(VARIANTS) == {layout.example for layout in LAYOUTS}
    for program in planned.programs:
        assert jax.tree.leaves(jax.eval_shape(program.function, *program.args))
        assert set(program.held) <= set(planned.held)
        if program.name == "reference" and not fields:
            continue  # it reads all batches before there is a state
        given = [(x.shape, x.dtype) for x in jax.tree.leaves(program.args)]
        for tree in map(planned.held.get, program.held):
            assert all((x.shape, x.dtype) in given for x in jax.tree.leaves(tree))


FORK = """
from train_sft import *
from train_sft import make_update as update_of_sft

def make_update(config):
    update = update_of_sft(config)
    return update._replace(step=renamed_step(update.step))

def renamed_step(step):
    return jax.jit(lambda *args: step(*args))
"""


def test_a_fork_is_planned_by_its_path_and_its_own_factories(tmp_path):
    """Whatever its file is called; what is compiled is what the fork's factory makes."""
    (tmp_path / "my_method.py").write_text(FORK)
    script = plan.load_script(f"{tmp_path}/my_method")
    config = script.module.Config(model=PRESETS["tiny"], batch_size=16)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    planned = script.lay_out(config, mesh)
    assert script.layout.example == "train_sft"
    assert "lambda" in planned.programs[0].function.__name__
    # One that calls its factory otherwise is told so in a line.
    (tmp_path / "another.py").write_text(FORK + "config_of_sft = Config\nclass Config: pass\n")
    another = plan.load_script(f"{tmp_path}/another")
    with pytest.raises(UserError, match="factories of train_sft, but is called or configured"):
        another.lay_out(another.module.Config(), mesh)

    # Control: without its factory it is none that plan.py knows.
    (tmp_path / "no_method.py").write_text("from train_sft import Config, chat_batches")
    with pytest.raises(UserError, match=r"plan.py knows .*train_sft.*factories"):
        plan.load_script(f"{tmp_path}/no_method")


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_dpo", "train_grpo"])
def test_methods_beside_ppo_are_planned_whole(script, capsys):
    sizes = {
        "train_dpo": ["--length=128"],
        "train_grpo": ["--max_prompt=128", "--max_new_tokens=128"],
    }
    verdict = plan.main([script, *TINY, "--batch_size=16", *sizes[script]])
    assert verdict.fits
    # Nothing is computed twice; of tokens decoded some products are sums to XLA.
    for result in verdict.results:
        least = 0.5 if result.program.name == "rollout" else 0.9
        assert least < result.cost.flops / (result.program.model_flops / 4) < 1.1


@needs_tpu
@pytest.mark.slow
def test_a_ring_compiles_for_a_tpu_and_sends_keys_and_values_round(capsys):
    sizes = [
        "--topology=v5e:2x4",
        "--mesh.data=1",
        "--mesh.fsdp=2",
        "--mesh.sequence=4",
        "--model.context=512",
    ]
    others = [word for word in TINY if "v5e" not in word and "mesh" not in word]
    verdict = plan.main(["train_lm", *others, *sizes, "--batch_size=8", "--length=512"])
    (result,) = verdict.results
    assert verdict.fits and result.program.model_flops / 8 == pytest.approx(
        result.cost.flops, rel=0.1
    )
    # Keys and values of a device's tokens, in bfloat16.
    turn = 2 * (8 / 2) * (512 / 4) * 2 * 128 * 2
    # Three turns forward and three back, and gradients in float32 go round with them, and home.
    expected = 2 * turn * (3 + 3 + 2 * 4)
    _, received, largest = result.cost.moved["collective-permute", "sequence"]
    # Keys and values each for themselves.
    assert expected <= received < 1.1 * expected and largest <= turn


@needs_tpu
@pytest.mark.slow
def test_a_pipeline_compiles_for_a_tpu_and_sends_its_activations_alone(capsys):
    sizes = ["--mesh.data=1", "--mesh.fsdp=2", "--mesh.stage=2", "--microbatches=4"]
    verdict = plan.main(
        [
            "train_lm",
            *[x for x in TINY if "mesh" not in x],
            *sizes,
            "--batch_size=16",
            "--length=128",
        ]
    )
    (result,) = verdict.results
    handed = 16 / 2 / 4 * 128 * 512 * 2  # a micro-batch's residual stream, in bfloat16
    ticks, (_, received, _) = 4 + 2 - 1, result.cost.moved["collective-permute", "stage"]
    # There, and gradients back.
    assert verdict.fits and received == pytest.approx(2 * ticks * handed, rel=0.05)
    c = result.program
    unembedding = 6 * 16 * 128 * 2048 * 512 / 4
    layers = c.model_flops / 4 - unembedding
    # The bubble computes too.
    assert result.cost.flops == pytest.approx(layers * ticks / 4 + unembedding, rel=0.1)


@needs_cuda
@pytest.mark.parametrize("kind", GPUS)
def test_a_plan_for_gpus_is_of_the_cuda_compiler(kind, capsys):
    argv = [word for word in TINY if "topology" not in word]
    argv += [f"--topology={kind}:4", "--batch_size=8", "--length=64"]
    verdict = plan.main(["train_sft", *argv])
    (result,) = verdict.results
    assert verdict.fits and abs(result.arguments / plan.bytes_of(result.program.args) - 1) < 0.02
    assert result.program.model_flops / 4 == pytest.approx(result.cost.flops, rel=0.1)


def test_each_gpu_is_described_by_its_own_numbers():
    """And its limits are those of the description, but for what XLA does not know."""
    texts = {kind: describe_gpu(gpu) for kind, gpu in GPUS.items()}
    assert len(set(texts.values())) == len(GPUS)
    for kind, gpu in GPUS.items():
        for field, value in gpu.numbers.items():
            assert f"  {field}: {value}\n" in texts[kind]
        # No place of the template is left; XLA's own sign for a cache is a dollar.
        assert "$" not in texts[kind].replace("B L2$", "")
        chip = CHIPS[kind]
        assert chip.memory == 0.75 * gpu.numbers["device_memory_size"]
        assert chip.bandwidth == gpu.numbers["memory_bandwidth"] and chip.devices == 1
    assert "major: 8\n    feature_extension: NONE" in texts["a100"]
    assert "major: 10\n    feature_extension: ACCELERATED_FEATURES" in texts["b200"]


@pytest.mark.parametrize("kind", GPUS)
def test_every_gpu_is_as_many_devices_as_are_asked_for(kind, monkeypatch):
    """Of the CPU, where CUDA's compiler is not there."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "cuda" in name else found(name)
    )
    assert len(devices_of(f"{kind}:4")) == 4
    for shape in ("0", "2x2", ""):
        with pytest.raises(UserError, match=f"--topology={kind}:{shape}: the number of GPUs"):
            devices_of(f"{kind}:{shape}")


@needs_tpu
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_tpu_is_known_to_its_compiler(topology):
    kind = topology.partition(":")[0]
    assert len(devices_of(topology)) == 4 * CHIPS[kind].devices


@needs_eight
def test_without_the_cuda_compiler_the_cpus_stands_in(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "cuda" in name else found(name)
    )
    argv = [word for word in TINY if "topology" not in word]
    verdict = plan.main(["train_sft", *argv, "--topology=h200:4", "--batch_size=8", "--length=64"])
    (result,) = verdict.results
    assert verdict.fits and capsys.readouterr().out.startswith("note: the CPU's compiler")
    assert result.program.model_flops / 4 == pytest.approx(result.cost.flops, rel=0.1)
    assert {axes for _, axes in result.cost.moved} >= {"fsdp", "tensor"}


@pytest.mark.slow
@needs_eight
def test_weights_cut_further_while_sampling_are_planned(monkeypatch, capsys):
    """Half of the weights is read for a token, and each layer's sums go through twice the chips.

    By the CPU's compiler, whose traffic in memory is not a GPU's; their ratio is told by it too.
    """
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "cuda" in name else found(name)
    )
    argv = ["train_grpo", "--model.preset=tiny", "--model.mlp_width=4096", "--topology=h200:8"]
    argv += ["--mesh.data=1", "--mesh.fsdp=4", "--mesh.tensor=2", "--reward=tasks.answers:number"]
    argv += ["--batch_size=8", "--samples_per_prompt=2", "--minibatches=1"]
    argv += ["--max_prompt=8", "--max_new_tokens=8"]
    usual = plan.main(argv)
    wide = plan.main([*argv, "--rollout.tensor=4"])
    told = capsys.readouterr().out
    assert told.count("latency of collectives: ") == told.count("forecast: ") == 2

    names = [result.program.name for result in wide.results]
    assert names == ["rollout weights", "rollout", "advantages", "update"]
    laid, sampled = wide.results[:2]
    before = usual.results[0]
    # The arguments are the weights in bfloat16, a quarter of each; before, float32 cut by eight.
    weights, *_ = sampled.program.args
    assert sampled.arguments == pytest.approx(plan.bytes_of(sampled.program.args), rel=0.02)
    assert plan.bytes_of(weights) == pytest.approx(plan.bytes_of(before.program.args), rel=0.05)
    assert laid.cost.flops == 0 and plan.received_bytes(laid.cost) > 0
    assert sampled.cost.memory < 0.75 * before.cost.memory
    assert sampled.cost.flops == pytest.approx(before.cost.flops, rel=0.1)

    # In the loop, sums over what is tensor then.
    def sums(result, chips):
        return result.cost.groups.get(("all-reduce", chips), 0)

    layers = PRESETS["tiny"].layers
    assert sums(before, 2) >= 2 * layers * 7 and sums(sampled, 4) >= 2 * layers * 7
    assert sums(sampled, 2) < layers * 7

    # What does not fit is told as by the script.
    with pytest.raises(UserError, match=r"--rollout\.tensor=16: .* tensor x fsdp = 8"):
        plan.main([*argv, "--rollout.tensor=16"])


@needs_tpu
def test_axes_may_share_a_dimension_of_the_torus():
    assert make_mesh(MeshConfig(1, 128, 4), plan.devices_of("v5p:8x8x8")).size == 512


@needs_tpu
def test_what_does_not_fit_says_so_and_names_a_field(capsys):
    argv = [
        "train_sft",
        "--model.preset=llama3-8b",
        "--topology=v5e:2x2",
        "--length=64",
        "--batch_size=4",
    ]
    assert command.run(argv) == 1  # held alone is too much: found without compiling
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("does not fit: update peaks at 89.7") and "--mesh.fsdp" in last
    assert command.run([*argv, "--mesh.data=1", "--mesh.fsdp=4"]) == 1
    assert "--topology" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "name a script"),
        (["train_sft"], "--topology: missing"),
        (["train_sfx", "--topology=v5e:2x2"], "train_sfx: no such script; plan.py knows"),
        (["train_distill", "--topology=v5e:2x2"], "train_distill: plan.py knows"),
        (["train_sft", "--topology=v9:2x2"], "--topology=v9:2x2: unknown chip"),
        (["train_sft", "--topology=v5e:2x2", "--lenght=3"], "flags:"),
        pytest.param(
            ["train_sft", "--topology=v5e:2x2", "--batch_size=3"],
            "--batch_size=3",
            marks=needs_tpu,
        ),
        pytest.param(["train_sft", "--topology=v5e:2x9"], "--topology=v5e:2x9", marks=needs_tpu),
        (["train_raft", "--topology=v5e:2x2"], "planning/programs.py"),
        (["train_sft", "--topology=h200:1", "--length=9999"], "sequences of 9999 tokens: outside"),
        (["train_sft", "--topology=h200:0"], "--topology=h200:0: the number of GPUs"),
        (["train_sft", f"--topology=h200:{'9' * 5000}"], "the number of GPUs of a machine"),
        pytest.param(
            ["train_dpo", "--topology=v5e:2x2", "--loss=kto"],
            "--loss=kto: plan.py knows",
            marks=needs_tpu,
        ),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        command.run(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--topology=v5e:2x2", "--help"]])
def test_help_without_a_script_is_the_docstring_and_the_own_flags(argv, capsys):
    assert command.run(argv) == 0
    told = capsys.readouterr().out
    assert command.__doc__ in told and "--topology" in told and "--sweep" in told


@pytest.mark.parametrize("others", [[], ["--topology=v5e:2x2", "--sweep"]])
def test_help_of_a_script_begins_with_the_own_flags(others, capsys):
    with pytest.raises(SystemExit) as stop:
        command.run(["train_sft", *others, "--help"])
    told = capsys.readouterr().out
    assert not stop.value.code
    assert -1 < told.index("--topology") < told.index("--sweep") < told.index("--batch_size")


def test_without_libtpu_the_requirement_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name)
    )
    with pytest.raises(UserError, match=r"requirements-tpu\.txt"):
        plan.main(["train_sft", "--topology=v5e:2x2"])


@needs_eight
def test_weights_for_decoding_are_whole_over_fsdp_and_equal_to_the_bit():
    make_mesh(MeshConfig(1, 4, 2))
    params = init_and_apply(LanguageModel(PRESETS["tiny"]))[0](jax.random.key(0))
    whole = jax.jit(lambda p: gathered(p, jnp.bfloat16))(params)
    q = whole["decoder"]["layers"]["attention"]["q"]
    assert q.dtype == jnp.bfloat16 and q.sharding.spec == P(None, None, "tensor")
    norm = whole["decoder"]["final_norm"]
    assert norm.dtype == jnp.float32  # what is not cut over fsdp stays as it is: norms are float32
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, np.asarray(y.astype(x.dtype))), whole, params
    )
