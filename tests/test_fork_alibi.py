"""The fork experiments/alibi: attention against float64 loops, decoding against training."""

import dataclasses
import importlib.util
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model_config import PRESETS
from objectives.likelihood import inputs, token_logprobs
from objectives.unpadded import Room, run_model, with_room
from rollout import join_responses
from runtime.errors import UserError
from sampling import SamplingConfig, generate
from slots import generate_in_slots

PATH = pathlib.Path(__file__).parents[1] / "experiments" / "alibi" / "model.py"
SPEC = importlib.util.spec_from_file_location("alibi_model", PATH)
alibi = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(alibi)

CONFIG = dataclasses.replace(PRESETS["tiny"], vocab=40, dtype="float32")
PAD, EOS = 0, 39


def in_loops(q_BTNH, k_BTKH, v_BTKH, segments_BT, slopes_N):
    """Compute Press et al. 2022, section 3, one query at a time, in float64."""
    batch, length, heads, width = q_BTNH.shape
    group = heads // k_BTKH.shape[2]
    out = np.zeros(q_BTNH.shape)
    for b, t, n in np.ndindex(batch, length, heads):
        earlier = range(t + 1)
        seen = [s for s in earlier if segments_BT[b, s] == segments_BT[b, t] > 0]
        if not seen:
            continue
        keys = k_BTKH[b, seen, n // group]
        scores = keys @ q_BTNH[b, t, n] / np.sqrt(width)
        scores -= slopes_N[n] * (t - np.array(seen))
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v_BTKH[b, seen, n // group] / weights.sum()
    return out


def test_fields_that_it_does_not_have_are_refused():
    changed = dataclasses.replace(CONFIG, logit_soft_cap=30.0)
    init, _ = alibi.init_and_apply(alibi.LanguageModel(changed))
    with pytest.raises(UserError, match=r"--model.logit_soft_cap=30.0: .* has none; leave it out"):
        jax.eval_shape(init, jax.random.key(0))


def test_attention_equals_loops():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 9, 4, 8))
    k, v = rng.normal(size=(2, 2, 9, 2, 8))
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 0], [0, 0, 0, 1, 2, 3, 4, 5, 6]])
    slopes = [2**-2, 2**-4, 2**-6, 2**-8]  # four heads: the paper's geometric sequence
    np.testing.assert_allclose(alibi.alibi_slopes(4), slopes)

    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    out = alibi.alibi_attention(
        *arrays, jnp.asarray(segments), jnp.asarray(positions), window=None, ring=1
    )
    wanted = in_loops(q, k, v, segments, slopes)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    without = in_loops(q, k, v, segments, np.zeros(4))
    assert np.abs(out - without).max() > 0.1  # control: the slopes matter


@pytest.mark.parametrize("decode", [generate, partial(generate_in_slots, slots=2)])
def test_the_sampler_agrees_with_training(decode):
    """Log-probabilities of sampled tokens equal those of one pass over the whole row."""
    init, apply = alibi.init_and_apply(alibi.LanguageModel(CONFIG))
    params = init(jax.random.key(0))
    prompts = {
        "tokens_BT": jnp.array([[0, 0, 5, 6, 7], [0, 8, 9, 10, 11], [3, 4, 5, 6, 7]]),
        "segment_ids_BT": jnp.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "positions_BT": jnp.array([[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]),
    }
    sampling = SamplingConfig(1.0, max_new_tokens=12)
    key = jax.random.key(1)
    samples = decode(apply, CONFIG, params, prompts, key, sampling, eos=EOS, pad=PAD)

    batch = join_responses(prompts, samples)
    output = apply(params, *inputs(batch))
    logits_BTV = alibi.unembed(output.x_BTD, output.unembed_DV)
    logp_BR = token_logprobs(logits_BTV, batch["tokens_BT"])[:, -12:]
    gap = np.abs(logp_BR - samples.logp_BR) * samples.mask_BR
    assert samples.mask_BR.sum() > 12 and gap.max() < 1e-4


def test_beginnings_are_shared_as_rows_one_by_one():
    init, apply = alibi.init_and_apply(alibi.LanguageModel(CONFIG))
    params = init(jax.random.key(0))
    tokens_BT = jnp.array([[3, 4, 5, 6, 7], [3, 4, 5, 8, 9], [3, 4, 6, 6, 7]])
    ones_BT = jnp.ones_like(tokens_BT)
    positions_BT = ones_BT.cumsum(1) - 1
    batch = {"tokens_BT": tokens_BT, "segment_ids_BT": ones_BT, "positions_BT": positions_BT}
    run = jax.jit(partial(run_model, apply))
    want = run(params, batch).x_BTD
    # Of fifteen tokens ten have a beginning of their own: in two rows of five.
    shared = with_room(batch, Room(2 / 3, is_shared=True))
    np.testing.assert_allclose(run(params, shared).x_BTD, want, atol=1e-5)
