import dataclasses
import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import SUMMED_AXES, in_int8, unstack_cache, unstack_params, whole_weight
from model import LanguageModel, LanguageOutput, empty_cache, init_and_apply, unembed
from model_config import PRESETS
from objectives.policy import response_logprobs
from responses import make_sampler
from rollout import join_responses, make_rollout
from runtime.errors import UserError
from sampling import SamplingConfig, Stage, generate, stages_of, truncate
from sharding import MeshConfig, init_sharded, make_mesh, path_name, to_mesh
from slots import generate_in_slots

CONFIG = dataclasses.replace(
    PRESETS["tiny"], vocab=24, width=16, mlp_width=24, head_dim=4, tied=False, dtype="float32"
)
NEVER, PAD, EOS = 23, 0, 2  # NEVER: an end that the tests' models do not reach by chance


@functools.cache
def model(seed=0, scale=0.5):
    init, apply = init_and_apply(LanguageModel(CONFIG))
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0))

    def leaf(path, shape):
        noise = scale * rng.normal(size=shape.shape)
        return np.float32(1 if path_name(path).endswith("norm") else 0) + np.float32(noise)

    return jax.tree_util.tree_map_with_path(leaf, shapes), jax.jit(logits_and_cache(apply))


def logits_and_cache(apply):
    """Reduce a language model's apply to (logits_BTV, cache)."""

    def results(*args):
        output = apply(*args)
        return unembed(output.x_BTD, output.unembed_DV), output.cache

    return results


def left_padded(prompts, extra=0):
    width = max(map(len, prompts)) + extra
    batch = {
        k: np.zeros((len(prompts), width), np.int32)
        for k in ("tokens_BT", "segment_ids_BT", "positions_BT")
    }
    for b, tokens in enumerate(prompts):
        here = slice(width - len(tokens), None)
        batch["tokens_BT"][b, here], batch["segment_ids_BT"][b, here] = tokens, 1
        batch["positions_BT"][b, here] = np.arange(len(tokens))
    return batch


@functools.partial(jax.jit, static_argnames=("sampling", "eos", "n"))
def sample(params, prompts, key, sampling, eos=NEVER, n=1):
    _, apply = init_and_apply(LanguageModel(CONFIG))
    return generate(apply, CONFIG, params, prompts, key, sampling, eos=eos, pad=PAD, n=n)


PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=6)


def uncached_logits(params, tokens):
    """Return the logits after `tokens`, by a full pass without a cache, in one width for all."""
    padded = np.pad(np.array([tokens], np.int32), ((0, 0), (0, 12 - len(tokens))))
    segments = (np.arange(12) < len(tokens)).astype(np.int32)[None]
    logits, _ = model()[1](
        params, padded, segments, np.arange(12, dtype=np.int32)[None] * segments
    )
    return np.asarray(logits)[0, len(tokens) - 1]


@functools.cache
def greedy():
    return jax.device_get(sample(model()[0], left_padded(PROMPTS), jax.random.key(0), GREEDY))


def test_greedy_is_the_argmax_of_uncached_logits_at_every_step():
    params = model()[0]
    got = greedy()
    for b, prompt in enumerate(PROMPTS):
        tokens = list(prompt)
        for t in range(6):
            logits = uncached_logits(params, tokens)
            tokens.append(int(logits.argmax()))
            logp = -np.log(np.exp(logits - logits.max()).sum())
            assert got.response_BR[b, t] == tokens[-1] and abs(got.logp_BR[b, t] - logp) < 1e-4
    assert got.mask_BR.all() and len({tuple(row) for row in got.response_BR}) == 3


def test_amount_of_left_padding_changes_nothing():
    params = model()[0]
    got = greedy()
    more = sample(params, left_padded(PROMPTS, extra=5), jax.random.key(0), GREEDY)
    assert (more.response_BR == got.response_BR).all()
    np.testing.assert_allclose(more.logp_BR, got.logp_BR, atol=1e-5)
    unmasked = left_padded(PROMPTS, extra=5)
    unmasked["segment_ids_BT"][:] = 1  # control: padding that is seen
    seen = sample(params, unmasked, jax.random.key(0), GREEDY)
    assert np.abs(seen.logp_BR - got.logp_BR).max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logp_equals_the_trainers_teacher_forced(temperature):
    params, _ = model()
    logprobs = jax.jit(
        functools.partial(response_logprobs, init_and_apply(LanguageModel(CONFIG))[1]),
        static_argnums=2,
    )
    sampling = SamplingConfig(temperature=temperature, top_k=9, top_p=0.95, max_new_tokens=6)
    prompts = left_padded(PROMPTS)
    samples = sample(params, prompts, jax.random.key(3), sampling, eos=EOS, n=8)
    batch = join_responses(prompts, samples)
    assert batch["tokens_BT"].shape == (24, 11) and 0 < float(samples.mask_BR.mean()) < 1
    mask = np.asarray(samples.mask_BR)
    logp = np.asarray(logprobs(params, batch, temperature))
    gap = np.abs(logp - samples.logp_BR) * mask
    assert gap.max() < 1e-4 and (np.asarray(samples.logp_BR)[mask == 0] == 0).all()
    other = np.asarray(logprobs(params, batch, temperature * 1.1))
    assert (
        np.abs(other - samples.logp_BR) * mask
    ).max() > 1e-2  # control: another temperature shows
    # Rows are prompts in order, n of each, then the responses.
    for b, tokens in enumerate(batch["tokens_BT"]):
        assert (tokens[:5] == prompts["tokens_BT"][b // 8]).all() and (
            tokens[5:] == samples.response_BR[b]
        ).all()
        real = np.asarray(batch["segment_ids_BT"][b]) > 0
        assert (np.asarray(batch["positions_BT"][b])[real] == np.arange(real.sum())).all()


def scripted(next_token):
    """Make a model that counts its calls: after token i next_token[i] is likeliest."""
    calls = []

    def apply(params, tokens_BT, segment_ids_BT, positions_BT, cache=None):
        jax.debug.callback(lambda: calls.append(1))
        cache = cache.replace(length=cache.length + tokens_BT.shape[1])
        logits_BTV = 9.0 * jax.nn.one_hot(jnp.array(next_token)[tokens_BT], len(next_token))
        return LanguageOutput(logits_BTV, jnp.eye(len(next_token)), cache)

    return apply, calls


def test_any_of_several_ends_ends_a_row():
    apply, _ = scripted([0, 5, 0, 4, 2, 6, 3, 0])  # 1 5 6 3 4 2
    run = jax.jit(functools.partial(generate, apply, CONFIG, sampling=GREEDY, pad=PAD))
    prompts = left_padded([[3], [1], [4]])
    for eos, lengths in (((2, 6), [2, 2, 1]), ((6, 2), [2, 2, 1]), ((4, 3, 9), [1, 3, 6])):
        samples = run({}, prompts, jax.random.key(0), eos=jnp.array(eos))
        assert samples.mask_BR.sum(1).tolist() == lengths, eos


def test_rows_end_at_eos_and_the_loop_when_all_have():
    apply, calls = scripted([0, 5, 0, 4, 2, 6, 3, 0])  # 1 5 6 3 4 2, and 2 ends it
    run = jax.jit(functools.partial(generate, apply, CONFIG, sampling=GREEDY, eos=EOS, pad=PAD))
    prompts = left_padded([[3], [1], [4]])
    samples = jax.device_get(run({}, prompts, jax.random.key(0)))
    jax.effects_barrier()
    assert samples.response_BR.tolist() == [
        [4, 2, 0, 0, 0, 0],
        [5, 6, 3, 4, 2, 0],
        [2, 0, 0, 0, 0, 0],
    ]
    assert samples.mask_BR.sum(1).tolist() == [2, 5, 1]
    assert ((samples.logp_BR < 0) == (samples.mask_BR > 0)).all()
    assert len(calls) == 5  # prefill and four steps for five tokens: none after the last
    calls.clear()
    run({}, left_padded([[4], [4], [3]]), jax.random.key(0)).mask_BR.block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 2
    calls.clear()  # control: with an end that never comes all steps are taken
    run = jax.jit(functools.partial(generate, apply, CONFIG, sampling=GREEDY, eos=7, pad=PAD))
    samples = run({}, prompts, jax.random.key(0))
    jax.effects_barrier()
    assert len(calls) == 6 and samples.mask_BR.all()


def test_n_samples_equal_repeated_prompts_from_one_prefill():
    params = model()[0]
    sampling = SamplingConfig(max_new_tokens=6)
    key = jax.random.key(5)
    repeated = left_padded([prompt for prompt in PROMPTS for _ in range(4)])
    for config in (GREEDY, sampling):
        together = sample(params, left_padded(PROMPTS), key, config, n=4)
        apart = sample(params, repeated, key, config)
        assert (together.response_BR == apart.response_BR).all()
        np.testing.assert_allclose(together.logp_BR, apart.logp_BR, atol=1e-5)
    # Samples differ.
    assert len({tuple(row) for row in np.asarray(together.response_BR).tolist()}) > 6
    rows = []

    def counting(params, tokens_BT, *args, **kwargs):
        rows.append(tokens_BT.shape)
        return init_and_apply(LanguageModel(CONFIG))[1](params, tokens_BT, *args, **kwargs)

    trace = functools.partial(generate, counting, CONFIG, sampling=sampling, eos=EOS, pad=PAD, n=4)
    jax.eval_shape(trace, params, left_padded(PROMPTS), key)
    assert rows[0] == (3, 5) and set(rows[1:]) == {(12, 1)}


@pytest.mark.parametrize("slots, window, temperature", [(3, None, 1.0), (16, 4, 0.7)])
def test_refilled_slots_give_what_the_plain_loop_gives(slots, window, temperature):
    params = model()[0]
    config = dataclasses.replace(CONFIG, window=window)
    _, apply = init_and_apply(LanguageModel(config))
    prompts = left_padded([list(range(3, 4 + i % 5)) for i in range(7)])
    how = {
        "sampling": SamplingConfig(temperature, max_new_tokens=8),
        "eos": EOS,
        "pad": PAD,
        "n": 3,
    }
    plain = jax.jit(functools.partial(generate, apply, config, **how))
    refilled = jax.jit(functools.partial(generate_in_slots, apply, config, slots=slots, **how))
    want = plain(params, prompts, jax.random.key(1))
    got = refilled(params, prompts, jax.random.key(1))
    assert (got.response_BR == want.response_BR).all() and (got.mask_BR == want.mask_BR).all()
    np.testing.assert_allclose(got.logp_BR, want.logp_BR, atol=1e-5)
    assert len(set(np.asarray(want.mask_BR.sum(1)).tolist())) > 3  # of many lengths
    other = refilled(params, prompts, jax.random.key(2))
    assert (other.response_BR != want.response_BR).any()  # control


STAGES = {
    "columns": [Stage(21, 3), Stage(21, 9), Stage(21, 15)],
    "rows": [Stage(21, 15), Stage(12, 15), Stage(5, 15), Stage(1, 15)],
    "both": [Stage(21, 2), Stage(21, 15), Stage(6, 15), Stage(2, 15)],
}


@pytest.mark.parametrize(
    "stages, window, temperature", [("columns", None, 1.0), ("rows", 4, 0.7), ("both", None, 1.0)]
)
def test_stages_give_what_the_plain_loop_gives(stages, window, temperature):
    params = model()[0]
    config = dataclasses.replace(CONFIG, window=window)
    _, apply = init_and_apply(LanguageModel(config))
    prompts = left_padded([list(range(3, 4 + i % 5)) for i in range(7)])
    how = {
        "sampling": SamplingConfig(temperature, max_new_tokens=16),
        "eos": EOS,
        "pad": PAD,
        "n": 3,
    }
    plain = jax.jit(functools.partial(generate, apply, config, **how))
    staged = jax.jit(functools.partial(generate, apply, config, stages=STAGES[stages], **how))
    want = plain(params, prompts, jax.random.key(1))
    got = staged(params, prompts, jax.random.key(1))
    assert (got.response_BR == want.response_BR).all() and (got.mask_BR == want.mask_BR).all()
    # Sums over fewer columns may be rounded otherwise.
    np.testing.assert_allclose(got.logp_BR, want.logp_BR, atol=1e-5)
    lengths = np.asarray(want.mask_BR.sum(1))
    assert len(set(lengths.tolist())) > 4 and lengths.max() == 16  # the last stage is needed
    other = staged(params, prompts, jax.random.key(2))
    assert (other.response_BR != want.response_BR).any()  # control


def test_rows_that_have_ended_leave_with_the_next_stage():
    # After the token 4 comes one token, after 3 two, after 1 five.
    apply, _ = scripted([0, 5, 0, 4, 2, 6, 3, 0])
    rows = []

    def noting(params, tokens_BT, *args, **kwargs):
        jax.debug.callback(lambda: rows.append(len(tokens_BT)))
        return apply(params, tokens_BT, *args, **kwargs)

    prompts = left_padded([[1], *[[3]] * 4, [4], [4], [4]])
    stages = [Stage(8, 5), Stage(4, 5), Stage(1, 5)]
    run = functools.partial(generate, noting, CONFIG, sampling=GREEDY, eos=EOS, pad=PAD)
    for given, decoded in ((stages, [8, 8, 1, 1, 1]), (None, [8] * 5)):
        rows.clear()
        samples = jax.jit(functools.partial(run, stages=given))({}, prompts, jax.random.key(0))
        jax.effects_barrier()
        assert samples.mask_BR.sum(1).tolist() == [5, 2, 2, 2, 2, 1, 1, 1]
        assert samples.response_BR[0].tolist() == [5, 6, 3, 4, 2, 0]
        assert rows == decoded  # the first is the prefill


@pytest.mark.parametrize("rows, prompt, limit", [(64, 64, 256), (16, 64, 64), (7, 9, 400)])
def test_stages_hold_every_response(rows, prompt, limit):
    first, *others = stages_of(rows, prompt, limit)
    assert first.rows == rows and 1 < len([first, *others]) < 6
    assert [first, *others][-1].room == limit - 1
    for before, after in itertools.pairwise([first, *others]):
        # Each differs from the last in one way: longer, or fewer.
        assert (after.rows < before.rows) != (after.room > before.room)
        assert 2 * after.rows <= before.rows or after.rows == before.rows
    assert stages_of(rows, prompt, 8) == [Stage(rows, 7)]  # few tokens are not worth compiling for


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
def test_stages_on_a_mesh_keep_rows_on_their_device():
    config = dataclasses.replace(CONFIG, vocab=64, layers=1)
    init, apply = init_and_apply(LanguageModel(config))
    prompts = left_padded([list(range(3, 4 + i % 5)) for i in range(16)])
    sampling = SamplingConfig(max_new_tokens=64)
    eos = np.array([5, 7, 9, 11])
    results = []
    gathers = []
    for size, in_stages in ((1, False), (2, False), (2, True)):
        mesh = make_mesh(MeshConfig(size, size, size), jax.devices()[: size**3])
        params = init_sharded(init, mesh, jax.random.key(0))
        args = (params, to_mesh(prompts, mesh), jax.random.key(1))
        rollout = make_rollout(apply, config, sampling, eos=eos, pad=PAD, n=2, in_stages=in_stages)
        program = rollout.lower(*args).compile()
        gathers.append(len(re.findall(r" all-(?:gather|to-all)\(", program.as_text())))
        results.append(jax.device_get(program(*args)))
    lengths = results[0]["mask_BR"].sum(1)
    assert len(stages_of(32, 5, 64)) > 2 and lengths.max() > 30 and (lengths < 10).sum() > 8
    for other in results[1:]:
        assert (other["response_BR"] == results[0]["response_BR"]).all()
        logp_BR = results[0]["sampler_logp_BR"]
        np.testing.assert_allclose(other["sampler_logp_BR"], logp_BR, atol=1e-5)
    # Neither the cache nor anything else goes from device to device for the stages.
    assert gathers[0] == 0 < gathers[1] == gathers[2]


def test_a_slot_does_not_wait_for_the_longest_row():
    # After the token 4 comes one token, after 3 two, after 1 five.
    apply, calls = scripted([0, 5, 0, 4, 2, 6, 3, 0])
    settings = {"sampling": GREEDY, "eos": EOS, "pad": PAD}
    prompts = left_padded([[1], *[[3]] * 4, [4]])
    # One of two slots takes all responses but the first, one after another.
    for slots, steps in ((2, 4), (1, 8), (6, 4)):
        calls.clear()
        run = functools.partial(generate_in_slots, apply, CONFIG, slots=slots, **settings)
        samples = jax.device_get(jax.jit(run)({}, prompts, jax.random.key(0)))
        jax.effects_barrier()
        assert samples.mask_BR.sum(1).tolist() == [5, 2, 2, 2, 2, 1] and len(calls) == 1 + steps


def test_unstacked_layers_in_bfloat16_change_no_bit():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    params = model()[0]
    apply = logits_and_cache(init_and_apply(LanguageModel(config))[1])
    op_by_op = jax.disable_jit()(apply)  # a compiler may leave roundings out
    prompts = left_padded(PROMPTS)
    inputs = [prompts[name] for name in ("tokens_BT", "segment_ids_BT", "positions_BT")]
    _, cache = jax.jit(apply)(params, *inputs, empty_cache(config, 3, 6))
    one = (inputs[0][:, -1:], inputs[1][:, -1:], inputs[2][:, -1:] + 1)
    want, _ = op_by_op(params, *one, cache)
    apart = unstack_params(params, config.compute_dtype)
    tuples = unstack_cache(cache)
    assert (op_by_op(apart, *one, tuples)[0] == want).all() and isinstance(tuples.k_LBKSH, tuple)
    assert apart["decoder"]["layers"]["mlp"]["up"][1].dtype == jnp.bfloat16
    # Control: the norms' scales too.
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16), apart)
    assert (op_by_op(rounded, *one, tuples)[0] != want).any()


def test_a_model_whose_logits_are_not_finite_draws_nothing():
    """Weights that are finite, but too large for what they are multiplied in."""
    config = dataclasses.replace(CONFIG, dtype="float16")
    params = jax.tree.map(lambda weight: 1e4 * weight, model()[0])
    sampling = SamplingConfig(max_new_tokens=3)
    tokenizer = types.SimpleNamespace(ends=(EOS,), pad=PAD)
    respond = make_sampler(config, sampling, tokenizer)
    with pytest.raises(UserError, match="log-probabilities are not finite"):
        respond(params, PROMPTS, jax.random.key(0))
    # Control: float32 holds them.
    respond = make_sampler(CONFIG, sampling, tokenizer)
    assert len(respond(params, PROMPTS, jax.random.key(0))) == len(PROMPTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_in_int8_is_within_half_a_step_of_each_output(dtype):
    """`o` is summed over two axes; an output of zeros alone stays zeros."""
    rng = np.random.default_rng(0)
    weight_NHD = rng.normal(size=(4, 8, 6)) * np.logspace(-6, 3, 6)
    weight_NHD[..., 2] = 0
    weight = jnp.asarray(weight_NHD, dtype)
    short = in_int8(weight, SUMMED_AXES["o"])
    assert short.values.dtype == jnp.int8 and short.scale.shape == (1, 1, 6)
    exact = np.asarray(weight, np.float64)
    got = np.asarray(short.values, np.float64) * np.asarray(short.scale, np.float64)
    steps = np.abs(exact).max((0, 1)) / 127
    # The largest may lie beyond step 127 by what the scale was rounded down.
    rounding = float(jnp.finfo(dtype).eps) / 2 * np.abs(exact).max((0, 1))
    assert (np.abs(got - exact) <= 0.5 * steps + rounding + 1e-12).all()
    assert (got[..., 2] == 0).all()
    # A scale for all outputs together would lose the small ones.
    assert (got[..., 0] != 0).any()


@pytest.mark.parametrize("slots", [None, 2])
def test_decoding_in_int8_is_decoding_with_the_rounded_weights(slots):
    """The first token is the whole weights'; norms and embedding are theirs throughout."""
    params = model()[0]
    prompts = left_padded(PROMPTS)
    sampling = SamplingConfig(max_new_tokens=6, int8=True)
    key = jax.random.key(3)
    _, apply = init_and_apply(LanguageModel(CONFIG))

    def sampled(params, sampling):
        how = {"eos": NEVER, "pad": PAD}
        if slots is None:
            return generate(apply, CONFIG, params, prompts, key, sampling, **how)
        return generate_in_slots(apply, CONFIG, params, prompts, key, sampling, slots=slots, **how)

    got = jax.jit(sampled, static_argnums=1)(params, sampling)
    plain = jax.jit(sampled, static_argnums=1)(params, SamplingConfig(max_new_tokens=6))
    # Responses by the definition: each token's log-probability under the rounded weights, on the
    # cache that the whole ones made of the prompt.
    apart = unstack_params(params, jnp.float32, int8=True)
    is_tuple = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    rounded = jax.tree.map(
        lambda stack: tuple(whole_weight(x) for x in stack) if is_tuple(stack) else stack,
        apart,
        is_leaf=is_tuple,
    )
    room = 5
    inputs = [prompts[name] for name in ("tokens_BT", "segment_ids_BT", "positions_BT")]
    rows, width = inputs[0].shape
    logits, cache = logits_and_cache(apply)(
        params, *inputs, empty_cache(CONFIG, rows, width + room)
    )
    logits = logits[:, -1:]
    cache = unstack_cache(cache)
    one = jnp.ones((rows, 1), jnp.int32)
    for t in range(6):
        token_B = got.response_BR[:, t]
        logp_BV = jax.nn.log_softmax(logits[:, 0])
        want_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(got.logp_BR[:, t], want_B, atol=2e-5)
        if t < room:
            positions = inputs[2][:, -1:] + t + 1
            logits, cache = logits_and_cache(apply)(
                rounded, token_B[:, None], one, positions, cache
            )
    # Control: it is not what the whole weights draw.
    np.testing.assert_array_equal(got.response_BR[:, 0], plain.response_BR[:, 0])
    assert np.abs(got.logp_BR - plain.logp_BR).max() > 1e-4


def kept_by_definition(logits, k, p):
    """Return the indices that stay, by sorting and adding up in float64.

    First k tokens are kept, then the nucleus of those.
    """
    order = [int(i) for i in np.argsort(-logits.astype(np.float64), kind="stable")][: k or None]
    weights = np.exp(logits[order].astype(np.float64) - logits[order[0]])
    total = 0.0
    kept = set()
    for i, share in zip(order, weights / weights.sum(), strict=True):
        if total >= p:
            break
        kept.add(i)
        total += share
    return kept


@pytest.mark.parametrize(
    "k, p", [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.7), (0, 1e-6), (4, 0.8), (99, 0.5)]
)
def test_truncation_equals_its_definition(k, p):
    logits = 2 * np.random.default_rng(0).normal(size=(20, 13)).astype(np.float32)
    got = np.asarray(jax.jit(truncate, static_argnums=(1, 2))(logits, k, p))
    for row, logit in zip(got, logits, strict=True):
        kept = kept_by_definition(logit, k, p)
        assert set(np.nonzero(np.isfinite(row))[0].tolist()) == kept and kept
        assert all(row[i] == logit[i] for i in kept)


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 0), (1.5, 4)])
def test_frequencies_follow_the_softmax(temperature, top_k):
    params = model(scale=0.3)[0]
    count = 4096
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, max_new_tokens=1)
    samples = sample(params, left_padded(PROMPTS[:1]), jax.random.key(7), sampling, n=count)
    logits = uncached_logits(params, PROMPTS[0]).astype(np.float64) / temperature
    if top_k:
        logits[logits < np.sort(logits)[-top_k]] = -np.inf
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()

    def chi_square(p):
        seen = np.bincount(np.asarray(samples.response_BR)[:, 0], minlength=CONFIG.vocab)
        assert (seen[p == 0] == 0).all()
        common = p * count > 5
        rare = max(p[~common].sum(), 1e-9) * count
        terms = (seen[common] - p[common] * count) ** 2 / (p[common] * count)
        return terms.sum() + (seen[~common].sum() - rare) ** 2 / max(rare, 5.0), common.sum()

    statistic, classes = chi_square(p)
    assert statistic < classes + 4 * np.sqrt(2 * classes) + 4
    sharper = p**1.2 / (p**1.2).sum()  # control: a temperature a fifth off is found out
    statistic, classes = chi_square(sharper)
    assert statistic > classes + 4 * np.sqrt(2 * classes) + 4


@pytest.mark.parametrize(
    "fields", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"max_new_tokens": 0}]
)
def test_impossible_sampling_is_refused_by_name(fields):
    with pytest.raises(UserError, match=f"--{next(iter(fields))}="):
        SamplingConfig(**fields)
