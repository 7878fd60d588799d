"""Several new tokens against a cache in use, and a cache that is too short for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import decode_attention, seen_slots
from layers import unstack_cache, unstack_params
from model import LanguageModel, empty_cache, init_and_apply, unembed
from model_config import PRESETS

TINY = dataclasses.replace(PRESETS["tiny"], vocab=40, width=16, mlp_width=24, head_dim=4)
LENGTHS = (10, 7, 3)
TOTAL = 10


@functools.cache
def model_of(window):
    """Return the config, parameters, and the model, compiled: run(...) -> (logits, cache)."""
    config = dataclasses.replace(TINY, window=window)
    init, apply = init_and_apply(LanguageModel(config))

    @jax.jit
    def run(params, *args):
        output = apply(params, *args)
        return unembed(output.x_BTD, output.unembed_DV), output.cache

    return config, jax.jit(init)(jax.random.key(3)), run


def ragged(rng):
    """Return left-padded rows of LENGTHS tokens: tokens, segments, positions [3, TOTAL]."""
    real = np.arange(TOTAL) >= TOTAL - np.array(LENGTHS)[:, None]
    positions = np.maximum(np.arange(TOTAL) - (TOTAL - np.array(LENGTHS)[:, None]), 0)
    tokens = rng.integers(1, 40, (3, TOTAL)) * real
    return [x.astype(np.int32) for x in (tokens, real, positions)]


@pytest.mark.parametrize(("window", "chunks"), [(None, (4, 6)), (3, (4, 3, 3))])
def test_chunks_equal_one_pass_without_a_cache(window, chunks, rng):
    config, params, run = model_of(window)
    inputs = ragged(rng)
    want, _ = run(params, *inputs)
    cache = empty_cache(config, 3, TOTAL)
    got = []
    start = 0
    for size in chunks:
        before = cache
        part = [x[:, start : start + size] for x in inputs]
        logits, cache = run(params, *part, cache)
        got.append(logits)
        start += size
    is_real = inputs[1] > 0
    got = np.concatenate(got, axis=1)
    np.testing.assert_allclose(got[is_real], np.asarray(want)[is_real], atol=2e-5)
    assert int(cache.length) == TOTAL
    # Control: tokens that see their own chunk alone are others.
    alone, _ = run(params, *part, before.replace(valid_BS=0 * before.valid_BS))
    assert np.abs(alone - got[:, -size:]).max() > 1e-3


def test_unstacked_layers_take_chunks_too(rng):
    config, params, run = model_of(None)
    inputs = ragged(rng)
    want, _ = run(params, *inputs)
    _, cache = run(params, *(x[:, :4] for x in inputs), empty_cache(config, 3, TOTAL))
    params = unstack_params(params, jnp.float32)
    got, _ = run(params, *(x[:, 4:] for x in inputs), unstack_cache(cache))
    np.testing.assert_allclose(got[0], want[0, 4:], atol=2e-5)


def test_a_full_cache_gives_nan_and_never_another_tokens_answer(rng):
    config, params, run = model_of(None)
    first, second = ([x[:, part] for x in ragged(rng)] for part in (slice(4), slice(4, 10)))
    _, cache = run(params, *first, empty_cache(config, 3, TOTAL))
    fits, full = run(params, *second, cache)
    assert np.isfinite(fits).all()  # control: to its last slot it serves
    beyond, later = run(params, *second, full)
    assert np.isnan(beyond).all()
    again, _ = run(params, *second, later)
    assert np.isnan(again).all()
    # So are tokens of which the first have room.
    half = full.replace(length=jnp.int32(TOTAL - 1))
    assert np.isnan(run(params, *second, half)[0]).all()


def test_more_tokens_than_slots_are_refused(rng):
    config, params, run = model_of(None)
    with pytest.raises(ValueError, match="10 tokens for a cache of 6 slots"):
        run(params, *ragged(rng), empty_cache(config, 3, 6))


@pytest.mark.parametrize("window", [None, 3])
def test_new_tokens_in_a_ring_see_what_came_before_them(window):
    # A ring of 8 slots, of which the new tokens take 6, 7 and 0; slot 1 holds none.
    valid_BS = np.array([[1, 0, 1, 1, 1, 1, 1, 1]])
    seen = seen_slots(jnp.asarray(valid_BS), 3, jnp.int32(6), window)[0]
    order = [2, 3, 4, 5, 6, 7, 0]
    for t in range(3):
        before = order[: 5 + t]
        wanted = before if window is None else before[-window:]
        assert sorted(np.flatnonzero(seen[t])) == sorted(wanted)


def test_several_queries_equal_one_after_another(rng):
    q = np.float32(rng.normal(size=(2, 3, 4, 8)))
    k, v = np.float32(rng.normal(size=(2, 2, 2, 9, 8)))
    valid = np.ones((2, 9), np.int32)
    together = decode_attention(q, k, v, valid, jnp.int32(6), window=4)
    for t in range(3):
        # What comes later is not there yet.
        so_far = valid * (np.arange(9) <= 6 + t)
        alone = decode_attention(q[:, t : t + 1], k, v, so_far, jnp.int32(6 + t), window=4)
        np.testing.assert_allclose(together[:, t], alone[:, 0], atol=1e-6)
