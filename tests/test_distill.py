"""Distillation against float64 NumPy, its limits, and what each divergence prefers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import LanguageOutput
from objectives.distill import distill_objective, forward_kl, jsd, reverse_kl
from objectives.likelihood import likelihood_objective

B, T, V = 3, 5, 11


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


STUDENT, TEACHER = 2 * normal(B, T, V), 2 * normal(B, T, V, seed=1)
MASK = (np.arange(T) < np.array([[5], [2], [4]])).astype(np.float64)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- Values and gradients in the student's logits, position by position, derived on paper


def numpy_forward(z, t):
    q, p = softmax(z), softmax(t)
    return (p * np.log(p / q)).sum(), q - p


def numpy_reverse(z, t):
    q, p = softmax(z), softmax(t)
    value = (q * np.log(q / p)).sum()
    return value, q * (np.log(q / p) - value)


def numpy_jsd(z, t, beta):
    q, p = softmax(z), softmax(t)
    m = beta * p + (1 - beta) * q
    slope = (1 - beta) * np.log(q / m)  # in q_v, less what sums to nothing over v
    return beta * (p * np.log(p / m)).sum() + (q * slope).sum(), q * (slope - (q * slope).sum())


CASES = {
    "forward": (forward_kl, numpy_forward),
    "reverse": (reverse_kl, numpy_reverse),
    **{f"jsd {b}": (partial(jsd, beta=b), partial(numpy_jsd, beta=b)) for b in (0.1, 0.5, 0.9)},
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_numpy(name):
    ours, theirs = CASES[name]
    parts = [[theirs(STUDENT[b, t], TEACHER[b, t]) for t in range(T)] for b in range(B)]
    want = np.array([[value for value, _ in row] for row in parts]) * MASK
    slopes = np.array([[slope for _, slope in row] for row in parts]) * MASK[..., None]
    with jax.enable_x64(True):
        z, t, mask = map(jnp.asarray, (STUDENT, TEACHER, MASK))
        np.testing.assert_allclose(ours(z, t, mask), want, atol=1e-12)
        np.testing.assert_allclose(
            jax.grad(lambda x: ours(x, t, mask).sum())(z), slopes, atol=1e-12
        )
    z, t, mask = (jnp.asarray(x, jnp.float32) for x in (STUDENT, TEACHER, MASK))
    np.testing.assert_allclose(ours(z, t, mask), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: ours(x, t, mask).sum())(z), slopes, atol=1e-6)
    # Control: it has a direction.
    assert np.abs(ours(t, z, mask) - want).max() > 0.01 or name == "jsd 0.5"
    same, slope = jax.value_and_grad(lambda x: ours(x, t, mask).sum())(t)
    # Nothing to learn where the student is the teacher.
    assert abs(same) < 1e-6 and np.abs(slope).max() < 1e-6


def test_jsd_tends_to_either_kl():
    with jax.enable_x64(True):
        z, t, mask = map(jnp.asarray, (STUDENT, TEACHER, MASK))
        forward = forward_kl(z, t, mask)
        reverse = reverse_kl(z, t, mask)
        for small in (1e-5, 1e-7):
            np.testing.assert_allclose(
                jsd(z, t, mask, beta=small) / small, forward, atol=1e4 * small
            )
            np.testing.assert_allclose(
                jsd(z, t, mask, beta=1 - small) / small, reverse, atol=1e4 * small
            )
        assert np.abs(forward - reverse).max() > 0.1  # control
        half = partial(jsd, mask_BT=mask, beta=0.5)
        # Symmetric for this beta alone, and bounded.
        np.testing.assert_allclose(half(z, t), half(t, z), atol=1e-12)
        assert float(half(z, t).max()) < np.log(2)


# ---- The objective


def model(params, tokens_BT, segment_ids_BT, positions_BT):
    """Return logits from a table, by token and position alone."""
    return LanguageOutput(params[tokens_BT, positions_BT], jnp.eye(params.shape[-1]))


def table(seed, vocabulary=V):
    return jnp.asarray(normal(V, T, vocabulary, seed=seed))


def batch_of(mask=MASK):
    tokens = np.random.default_rng(5).integers(0, V, (B, T))
    positions = np.broadcast_to(np.arange(T), (B, T))
    kept = mask * (np.arange(T) > 0)  # the first token is predicted by none
    return {
        "tokens_BT": tokens,
        "segment_ids_BT": tokens * 0 + 1,
        "positions_BT": positions,
        "loss_mask_BT": kept,
    }


def numpy_objective(student, teacher, batch, alpha, tau, labelled):
    loss = 0.0
    slope = np.zeros(student.shape)
    shared = min(student.shape[-1], teacher.shape[-1])
    for tokens, mask in zip(batch["tokens_BT"], batch["loss_mask_BT"], strict=True):
        for t in range(1, T):
            # The logits after t - 1 tokens predict token t.
            row = (tokens[t - 1], t - 1)
            label = tokens[t]
            if not mask[t]:
                continue
            value, grad = numpy_forward(student[row][:shared] / tau, teacher[row][:shared] / tau)
            loss += (1 - alpha) * tau**2 * value
            slope[row][:shared] += (1 - alpha) * tau * grad  # tau^2 / tau by the chain rule
            if labelled:
                probs = softmax(student[row])
                loss -= alpha * np.log(probs[label])
                slope[row] += alpha * (probs - np.eye(len(probs))[label])
    return loss, slope


@pytest.mark.parametrize(
    "labelled, vocabulary", [(True, V), (False, V), (True, V + 3), (True, V - 2)]
)
def test_objective_equals_numpy_with_padding_and_vocabularies_of_other_sizes(labelled, vocabulary):
    with jax.enable_x64(True):
        student = table(0)
        teacher = table(1, vocabulary)
        batch = batch_of()
        settings = {"alpha": 0.3, "tau": 2.5, "labelled": labelled}
        loss_of = partial(distill_objective, model, model, divergence=forward_kl, **settings)
        gradient = jax.value_and_grad(
            lambda x: loss_of({"student": x, "teacher": teacher}, batch), has_aux=True
        )
        (loss, (tokens, metrics)), slope = gradient(student)
        want, want_slope = numpy_objective(
            np.asarray(student), np.asarray(teacher), batch, **settings
        )
        assert float(loss) == pytest.approx(want, abs=1e-6) and float(tokens) == 4 + 1 + 3
        np.testing.assert_allclose(slope, want_slope, atol=1e-6)
        nll, gap = (float(metrics[name][0]) for name in ("nll", "divergence"))
        assert float(loss) == pytest.approx((0.3 * nll if labelled else 0) + 0.7 * 2.5**2 * gap)
        other = batch | {"tokens_BT": np.where(MASK > 0, batch["tokens_BT"], 0)}
        # Tokens of the padding count nowhere.
        assert loss_of({"student": student, "teacher": teacher}, other)[0] == pytest.approx(want)
        # Control: off by one token.
        moved = batch | {"loss_mask_BT": np.roll(batch["loss_mask_BT"], -1, axis=1)}
        assert abs(float(loss_of({"student": student, "teacher": teacher}, moved)[0]) - want) > 0.1


def test_alpha_one_is_supervised_fine_tuning_exactly():
    student = table(0).astype(jnp.float32)
    teacher = table(1).astype(jnp.float32)
    sft = jax.value_and_grad(lambda x: likelihood_objective(model, x, batch_of())[0])(student)

    def distilled(alpha, teacher):
        loss_of = partial(
            distill_objective, model, model, divergence=reverse_kl, alpha=alpha, tau=2.0
        )
        return jax.value_and_grad(
            lambda x: loss_of({"student": x, "teacher": teacher}, batch_of())[0]
        )(student)

    jax.tree.map(np.testing.assert_array_equal, distilled(1.0, teacher), sft)
    assert np.abs(distilled(0.9, teacher)[1] - sft[1]).max() > 1e-2  # control
    # Teacher and student equal: the labels' part remains.
    (_, slope), (_, labels) = (distilled(0.9, student), sft)
    np.testing.assert_allclose(slope, 0.9 * labels, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_tau_squared_keeps_the_gradient(name):
    """At high tau logits of mean 0 are matched: tau^2 dKL/dz = (z - v) / V.

    Hinton et al. 2015, eq. 4.
    """
    divergence, _ = CASES[name]
    z, v = (x - x.mean(-1, keepdims=True) for x in (STUDENT[0, :1], TEACHER[0, :1]))
    curvature = {"forward": 1.0, "reverse": 1.0}.get(name) or float(name[4:]) * (
        1 - float(name[4:])
    )
    with jax.enable_x64(True):

        def slope(tau, scale=1.0):
            def loss_of(x):
                return (divergence(x / tau, scale * v / tau, jnp.ones(1)) * tau**2).sum()

            return np.asarray(jax.grad(loss_of)(scale * jnp.asarray(z)))

        want = curvature * (z - v) / V
        errors = [np.abs(slope(tau) - want).max() for tau in (10.0, 100.0, 1000.0)]
        assert errors[2] < 5e-3 * np.abs(want).max() and errors[2] < errors[1] / 5 < errors[0] / 25
        # Logits within 1 of 0.
        near = [np.linalg.norm(slope(tau, scale=0.1)) for tau in (1.0, 2.0, 4.0, 8.0)]
        assert max(near) < 1.1 * min(near)
        assert near[0] > 50 * near[3] / 8**2  # control: without tau^2 it falls


# ---- A student that cannot be the teacher

PLACES = jnp.arange(41.0)
MODES = ((10, 0.6), (30, 0.4))  # where, and its share


def bell(mean, width):
    return -0.5 * jnp.square((PLACES - mean) / width)


def fitted(divergence):
    """Fit a bell to a teacher of two narrow modes; return both as probabilities.

    The bell is the nearest of all means and widths.
    """
    teacher = jnp.logaddexp(*(bell(mode, 2.0) + jnp.log(share) for mode, share in MODES))[
        None, None
    ]
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, 1500))

    def loss(params):
        return divergence(
            bell(params[0], jnp.exp(params[1]))[None, None], teacher, jnp.ones((1, 1))
        ).sum()

    def update(_, carry):
        updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
        return optax.apply_updates(carry[0], updates), state

    @jax.vmap
    def descend(start):
        params = jax.lax.fori_loop(0, 1500, update, (start, optimizer.init(start)))[0]
        return params, loss(params)

    starts = jnp.array([[mean, width] for mean in (8.0, 20.0, 32.0) for width in (0.5, 2.0)])
    params, losses = jax.jit(descend)(starts)  # from many places, for there are local optima
    mean, width = np.asarray(params[np.argmin(losses)])
    return softmax(np.asarray(bell(mean, np.exp(width)), np.float64)), softmax(
        np.asarray(teacher, np.float64)
    )[0, 0]


def test_forward_kl_covers_the_mass_and_reverse_kl_seeks_a_mode():
    (wide, teacher), (narrow, _) = fitted(forward_kl), fitted(reverse_kl)
    places = np.arange(41.0)
    first, second = (np.abs(places - mode) <= 6 for mode, _ in MODES)
    # Forward KL in an exponential family matches mean and variance; the mean is between the modes.
    for power in (1, 2):
        assert (wide * places**power).sum() == pytest.approx(
            (teacher * places**power).sum(), rel=1e-3
        )
    assert min(wide[first].sum(), wide[second].sum()) > 0.2 and wide[20] > 0.015 > 10 * teacher[20]
    # Reverse KL keeps the larger mode alone, at the price of -log of its share.
    assert narrow[first].sum() > 0.99 and narrow[second].sum() < 1e-6
    assert (narrow * np.log(narrow / teacher)).sum() == pytest.approx(-np.log(0.6), abs=1e-2)
    # Each is worse by the other's measure.
    assert (wide * np.log(wide / teacher)).sum() > -2 * np.log(0.6)
    assert (teacher * np.log(teacher / narrow)).sum() > 2 * (
        teacher * np.log(teacher / wide)
    ).sum()
    near_forward, near_reverse = (fitted(partial(jsd, beta=beta))[0] for beta in (0.001, 0.9))
    assert np.abs(near_forward - wide).sum() < 0.1 and np.abs(near_reverse - narrow).sum() < 0.1
