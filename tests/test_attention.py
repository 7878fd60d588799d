import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels.attention

attention = jax.jit(kernels.attention.attention, static_argnames=("causal", "window", "scale"))
decode_attention = jax.jit(kernels.attention.decode_attention, static_argnames="window")


def qkv(rng, batch, length, heads, kv_heads, width):
    return [rng.normal(size=(batch, length, n, width)).astype(np.float32) for n in (heads, kv_heads, kv_heads)]


def loops(q, k, v, segments, *, causal=True, window=None, scale=None):
    """Attention in float64, one query and one key at a time, straight from the definition."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    batch, length, heads, width = q.shape
    out, group = np.zeros_like(q), heads // k.shape[2]
    for b, t, n in np.ndindex(batch, length, heads):
        seen, scores = [], []
        for s in range(length):
            if causal and s > t:
                continue
            if window is not None and t - s >= window:
                continue
            if segments is not None and (segments[b, s] != segments[b, t] or segments[b, t] == 0):
                continue
            seen.append(s)
            scores.append(q[b, t, n] @ k[b, s, n // group] * (width**-0.5 if scale is None else scale))
        weights = np.exp(np.array(scores) - max(scores, default=0))
        for s, weight in zip(seen, weights, strict=True):
            out[b, t, n] += weight / weights.sum() * v[b, s, n // group]
    return out


@pytest.mark.parametrize("seed", range(6))
def test_equals_float64_loops_on_random_shapes(seed):
    rng = np.random.default_rng(seed)
    kv_heads, group, length = rng.integers(1, 4), rng.integers(1, 4), int(rng.integers(2, 14))
    q, k, v = qkv(rng, rng.integers(1, 4), length, kv_heads * group, kv_heads, 2 * rng.integers(1, 5))
    segments = None if seed == 0 else rng.integers(0, 3, size=q.shape[:2])
    options = {
        "causal": seed != 1,
        "window": [None, 1, 3][seed % 3],
        "scale": 0.7 if seed == 2 else None,
    }
    got = attention(q, k, v, segment_ids=segments, **options)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, loops(q, k, v, segments, **options), atol=2e-6)
    flipped = {**options, "causal": not options["causal"]}  # control
    assert np.abs(got - loops(q, k, v, None, **flipped)).max() > 1e-2


def test_rows_that_see_nothing_give_zero_and_finite_gradients():
    q, k, v = qkv(np.random.default_rng(0), 2, 6, 4, 2, 4)
    segments = np.array([[0, 0, 1, 1, 2, 0], [0] * 6])
    out = attention(q, k, v, segment_ids=segments)
    assert (np.asarray(out)[segments == 0] == 0).all() and np.asarray(out)[segments > 0].all()
    # Huge values at the padding: nothing of them arrives, forwards or backwards.
    pad = (segments == 0)[..., None, None]
    q2, k2, v2 = (np.where(pad, 1e30, x).astype(np.float32) for x in (q, k, v))
    assert (np.asarray(attention(q2, k2, v2, segment_ids=segments)) == np.asarray(out)).all()
    loss = lambda *x: jnp.square(attention(*x, segment_ids=segments)).sum()  # noqa: E731
    for grad in map(np.asarray, jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)):
        assert np.isfinite(grad).all() and (np.where(pad, grad, 0) == 0).all() and np.abs(grad).max() > 0


def test_bfloat16_inputs_keep_their_type_and_float32_statistics():
    # 512 equal keys: weights of 1/512 summed in bfloat16 would stall; v is 1, so the output is 1.
    ones = jnp.ones((1, 512, 2, 8), jnp.bfloat16)
    out = attention(ones, ones, ones, causal=False)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=1e-2)


@pytest.mark.parametrize("window", [None, 3])
def test_decoding_one_token_equals_the_last_row_of_self_attention(window):
    rng = np.random.default_rng(1)
    q, k, v = qkv(rng, 3, 9, 6, 2, 4)
    valid = (np.arange(9) >= np.array([[0], [2], [5]])).astype(np.int32)  # left padding
    full = attention(q, k, v, segment_ids=valid, window=window)
    stale = rng.normal(size=(2, 3, 4, 2, 4)).astype(np.float32)  # slots not written yet
    k2, v2 = np.concatenate([k, stale[0]], axis=1), np.concatenate([v, stale[1]], axis=1)
    valid2 = np.pad(valid, ((0, 0), (0, 4)), constant_values=1)
    one = decode_attention(q[:, -1:], k2, v2, valid2, jnp.int32(8), window=window)
    np.testing.assert_allclose(one, full[:, -1:], atol=2e-6)
    control = decode_attention(q[:, -1:], k2, v2, valid2, jnp.int32(9), window=window)
    assert np.abs(control - full[:, -1:]).max() > 1e-2
