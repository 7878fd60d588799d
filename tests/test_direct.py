"""Direct methods against float64 loops from the papers, their limits, optima on a tiny policy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import LanguageOutput
from objectives import direct


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


RANKS_OF_FOUR = np.array([[2, 1, 3, 0], [1, 2, 2, 2], [4, 3, 1, 2], [0, 2, 1, 1]])


def numerical_slopes(losses, x):
    """Return the slope of the sum of `losses(x)` in each entry of `x`, by central differences."""
    slopes = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-6
        slopes[index] = (losses(x + step) - losses(x - step)).sum() / 2e-6
    return slopes


# ---- The papers' formulas on four numbers, in Python's own logarithms: independent of our code


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gap(w, l, rw, rl):
    return np.log(np.exp(w) / np.exp(rw)) - np.log(np.exp(l) / np.exp(rl))


def kto_value(r, z0, good, beta):
    return sigmoid(beta * (r - z0)) if good else sigmoid(beta * (z0 - r))


def odds(mean):
    return np.exp(mean) / (1 - np.exp(mean))


PAIRED = {  # name: (ours, the paper's)
    "dpo": (partial(direct.dpo, beta=0.3), lambda *x: -np.log(sigmoid(0.3 * gap(*x)))),
    "cdpo": (
        partial(direct.cdpo, beta=0.3, label_smoothing=0.2),
        lambda *x: -0.8 * np.log(sigmoid(0.3 * gap(*x))) - 0.2 * np.log(sigmoid(-0.3 * gap(*x))),
    ),
    "robust_dpo": (
        partial(direct.robust_dpo, beta=0.3, label_smoothing=0.2),
        lambda *x: (
            (-0.8 * np.log(sigmoid(0.3 * gap(*x))) + 0.2 * np.log(sigmoid(-0.3 * gap(*x)))) / 0.6
        ),
    ),
    "ipo": (partial(direct.ipo, beta=0.3), lambda *x: (gap(*x) - 1 / 0.6) ** 2),
    "slic": (partial(direct.slic, beta=0.3, delta=0.7), lambda *x: max(0.0, 0.7 - 0.3 * gap(*x))),
    "kto": (
        partial(direct.kto, beta=0.3, kl=0.4, desirable_weight=1.5, undesirable_weight=0.8),
        lambda w, l, rw, rl: (
            0.5 * (1.5 - 1.5 * kto_value(w - rw, 0.4, True, 0.3))
            + 0.5 * (0.8 - 0.8 * kto_value(l - rl, 0.4, False, 0.3))
        ),
    ),
    "cpo": (
        lambda w, l, rw, rl: direct.cpo(w, l, beta=0.3, nll_weight=0.5),
        lambda w, l, rw, rl: (
            -np.log(np.exp(w) ** 0.3 / (np.exp(w) ** 0.3 + np.exp(l) ** 0.3)) - 0.5 * w
        ),
    ),
    "slic_hf": (
        # Any target: here the third.
        lambda w, l, rw, rl: direct.slic_hf(w, l, rw, delta=0.7, weight=0.2),
        lambda w, l, rw, rl: max(0.0, 0.7 - w + l) - 0.2 * rw,
    ),
}
PER_TOKEN = {
    "orpo": (
        lambda w, l, rw, rl: direct.orpo(w, l, beta=0.3),
        lambda w, l, rw, rl: -w - 0.3 * np.log(sigmoid(np.log(odds(w) / odds(l)))),
    ),
    "simpo": (
        lambda w, l, rw, rl: direct.simpo(w, l, beta=2.0, gamma=0.5),
        lambda w, l, rw, rl: -np.log(sigmoid(2.0 * w - 2.0 * l - 0.5)),
    ),
}


def padded_tokens(rows=6, length=5):
    """Return log-probabilities of tokens, [4, rows, length], and their masks.

    The four: of chosen and rejected by the policy, then of both by the reference.
    """
    lengths = np.random.default_rng(7).integers(1, length + 1, (4, rows))
    lengths[2:] = lengths[:2]  # the reference sees the same tokens
    return -np.abs(normal(4, rows, length)) - 0.05, np.arange(length) < lengths[:, :, None]


@pytest.mark.parametrize("name", [*PAIRED, *PER_TOKEN])
def test_value_and_gradient_equal_the_papers_formula(name):
    ours, papers = {**PAIRED, **PER_TOKEN}[name]
    tokens, mask = padded_tokens()
    # Values in the padding must not matter.
    noisy = np.where(mask, tokens, 1e3 * normal(*tokens.shape, seed=1))

    def in_jax(logp):
        sums = jnp.where(mask, logp, 0.0).sum(-1) / (mask.sum(-1) if name in PER_TOKEN else 1)
        return ours(*sums)

    def in_loops(logp):
        losses = []
        for b in range(logp.shape[1]):
            rows = [
                [logp[k, b, t] for t in range(logp.shape[2]) if mask[k, b, t]] for k in range(4)
            ]
            losses.append(
                papers(*[np.mean(row) if name in PER_TOKEN else np.sum(row) for row in rows])
            )
        return np.array(losses)

    with jax.enable_x64(True):
        losses = in_jax(jnp.array(noisy))
        grad = jax.grad(lambda x: in_jax(x).sum())(jnp.array(noisy))
        assert losses.dtype == jnp.float64 and losses.shape == (6,)
    np.testing.assert_allclose(losses, in_loops(tokens), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(grad, numerical_slopes(in_loops, tokens), atol=1e-6)
    swapped = (
        papers(*np.array([1.0, -1.0, 0.0, 0.0]) - 2),
        papers(*np.array([-1.0, 1.0, 0.0, 0.0]) - 2),
    )
    assert swapped[0] < swapped[1]  # control: the formula itself prefers the chosen


def rrhf_in_loops(logp, ranks, tokens):
    losses = []
    for x, rank, n in zip(logp, ranks, tokens, strict=True):
        best = min((c for c in range(len(x)) if rank[c]), key=lambda c: rank[c])
        pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if 0 < rank[i] < rank[j]]
        losses.append(sum(max(0.0, x[j] / n[j] - x[i] / n[i]) for i, j in pairs) - x[best])
    return np.array(losses)


def test_rrhf_equals_loops():
    logp = -np.abs(normal(4, 4)) - 1
    tokens = np.random.default_rng(1).integers(1, 9, (4, 4)).astype(float)
    loss = partial(direct.rrhf, ranks_BC=RANKS_OF_FOUR, tokens_BC=tokens)
    with jax.enable_x64(True):
        losses = loss(logp)
        grad = jax.grad(lambda x: loss(x).sum())(jnp.array(logp))
    in_loops = partial(rrhf_in_loops, ranks=RANKS_OF_FOUR, tokens=tokens)
    np.testing.assert_allclose(losses, in_loops(logp), atol=1e-6)
    np.testing.assert_allclose(grad, numerical_slopes(in_loops, logp), atol=1e-6)
    assert (np.asarray(grad)[RANKS_OF_FOUR == 0] == 0).all()


# ---- Limits


def test_limits():
    w, l, rw, rl = -np.abs(normal(4, 50)) * 5
    args, at_reference = (w, l, rw, rl), (w, l, w, l)
    with jax.enable_x64(True):
        dpo = direct.dpo(*args, beta=0.5)
        np.testing.assert_allclose(direct.dpo(*at_reference, beta=0.5), np.log(2), rtol=1e-12)
        np.testing.assert_allclose(
            direct.cdpo(*args, beta=0.5, label_smoothing=0.0), dpo, rtol=1e-12
        )
        np.testing.assert_allclose(
            direct.robust_dpo(*args, beta=0.5, label_smoothing=0.0), dpo, rtol=1e-12
        )
        np.testing.assert_allclose(direct.kto(*at_reference, beta=0.5), 0.5, rtol=1e-12)
        np.testing.assert_allclose(direct.kto_unpaired(w, w, w > -3, beta=0.5), 0.5, rtol=1e-12)
        np.testing.assert_allclose(direct.ipo(*at_reference, beta=0.5), 1.0, rtol=1e-12)
        np.testing.assert_allclose(direct.slic(*at_reference, beta=0.5), 1.0, rtol=1e-12)
        zeros = np.zeros(50)
        np.testing.assert_allclose(
            direct.cpo(w, l, beta=0.5, nll_weight=0.0),
            direct.dpo(w, l, zeros, zeros, beta=0.5),
            rtol=1e-12,
        )
        np.testing.assert_allclose(
            direct.slic_hf(w, l, delta=1.5, weight=0.0),
            direct.slic(w, l, zeros, zeros, beta=1.0, delta=1.5),
        )
        np.testing.assert_allclose(
            direct.simpo(w, l, beta=0.5, gamma=0.0),
            direct.dpo(w, l, zeros, zeros, beta=0.5),
            rtol=1e-12,
        )
        np.testing.assert_allclose(direct.orpo(w, l, beta=0.0), -w)  # plain fine-tuning
        # Labels flipped with probability 0.2: robust DPO is unbiased, conservative DPO is not.
        flipped = (l, w, rl, rw)
        for loss, unbiased in ((direct.robust_dpo, True), (direct.cdpo, False)):
            smooth = partial(loss, beta=0.5, label_smoothing=0.2)
            mean = 0.8 * smooth(*args) + 0.2 * smooth(*flipped)
            assert np.allclose(mean, dpo, rtol=1e-10) == unbiased
        certain = jax.value_and_grad(partial(direct.orpo, beta=1.0))(0.0, 0.0)
        assert np.isfinite(certain).all()


def test_slic_margin_fixture():
    chosen, rejected, target = (jnp.array(x) for x in ([-1.0, -3.0], [-4.0, -2.5], [-2.0, -2.0]))
    assert direct.slic_hf(chosen, rejected, delta=1.0, weight=0.0).tolist() == [0.0, 1.5]
    assert direct.slic_hf(chosen, rejected, delta=1.0, weight=0.5).tolist() == [0.5, 3.0]
    assert direct.slic_hf(chosen, rejected, target, delta=1.0, weight=0.5).tolist() == [1.0, 2.5]


def test_kto_clamps_its_kl_gives_it_no_gradient_and_falls_as_rewards_rise():
    r = np.linspace(-4, 4, 9)
    good, bad = (
        np.asarray(direct.kto_unpaired(r, 0 * r, side, beta=0.5)) for side in (True, False)
    )
    assert (np.diff(good) < 0).all() and (np.diff(bad) > 0).all()

    def at(kl):
        return np.asarray(direct.kto_unpaired(r, 0 * r, True, beta=0.5, kl=kl))

    np.testing.assert_array_equal(at(-3.0), at(0.0))
    assert (at(2.0) > at(0.0)).all()
    slope = jax.grad(lambda kl: direct.kto_unpaired(jnp.float32(1.0), 0.0, True, beta=0.5, kl=kl))
    assert slope(2.0) == 0 == slope(-2.0)
    kl = direct.mismatched_kl(np.array([-1.0, -2.0, -4.0]), np.array([-2.0, -2.0, -3.5]))
    assert float(kl) == pytest.approx((1 + 0 - 0.5) / 3)


def test_ipo_is_bounded_where_dpo_is_not():
    """On labels that never disagree one logit stops at 1 / (2 beta); by DPO it goes on."""

    @partial(jax.jit, static_argnames=("loss", "steps"))
    def train(loss, steps):
        slope = jax.grad(lambda h: loss(h, -h, 0.0, 0.0, beta=0.1))
        return 2 * jax.lax.fori_loop(
            0, steps, lambda _, h: h - 0.1 * jnp.sign(slope(h)) / (1 + _) ** 0.5, 0.0
        )

    ipo, dpo = (float(train(loss, 3000)) for loss in (direct.ipo, direct.dpo))
    assert ipo == pytest.approx(1 / (2 * 0.1), abs=0.05)
    assert dpo > 4 * ipo and float(train(direct.dpo, 12000)) > 1.9 * dpo
    assert float(train(direct.ipo, 12000)) == pytest.approx(5.0, abs=0.05)


def test_rrhf_is_zero_when_ordered_and_restores_order():
    ranks, tokens = np.array([[3, 1, 2]]), np.array([[2.0, 4.0, 1.0]])
    # Per token -3, -1, -2.
    ordered, disordered = (np.array([[-6.0, -4.0, -2.0]]), np.array([[-1.0, -8.0, -3.0]]))

    def only_ranks(logps):  # without L_ft
        return direct.rrhf(logps, ranks, tokens) + (logps * (ranks == 1)).sum(1)

    assert only_ranks(ordered) == 0 < only_ranks(disordered)
    slope = jax.jit(jax.grad(lambda x: direct.rrhf(x, ranks, tokens).sum()))
    x = jnp.array(disordered)
    for _ in range(40):
        x = x - 0.1 * slope(x)
    assert np.argsort(-np.asarray(x / tokens)[0]).tolist() == [1, 2, 0]


# ---- Batches of candidates


def bigram(params, tokens, segments, positions):
    return LanguageOutput(params[tokens], jnp.eye(params.shape[-1]))


def candidates(ranks, length=6, vocab=7, seed=0):
    rng, (rows, count) = np.random.default_rng(seed), np.shape(ranks)
    real = np.arange(length) < rng.integers(3, length + 1, (rows, count, 1))
    real &= np.array(ranks)[..., None] > 0
    tokens = rng.integers(0, vocab, (rows, count, length)) * real
    return {
        "tokens_BCT": tokens,
        "segment_ids_BCT": real.astype(np.int32),
        "positions_BCT": np.arange(length) * real,
        "loss_mask_BCT": (real & (np.arange(length) >= 2)).astype(np.float32),
        "ranks_BC": np.array(ranks),
        "margin_B": np.zeros(rows, np.float32),
    }


def sums_in_loops(table, batch):
    """Return [B, C] log-probabilities, and numbers of tokens."""
    logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
    sums, counts = np.zeros(batch["ranks_BC"].shape), np.zeros(batch["ranks_BC"].shape)
    for b, c, t in zip(*np.nonzero(batch["loss_mask_BCT"]), strict=True):
        sums[b, c] += logp[batch["tokens_BCT"][b, c, t - 1], batch["tokens_BCT"][b, c, t]]
        counts[b, c] += 1
    return sums, counts


RANKS = [[2, 1, 3, 2], [1, 0, 2, 0], [1, 1, 0, 0], [3, 2, 1, 4], [0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["dpo", "simpo"])
@pytest.mark.parametrize("extremes", [False, True])
def test_objective_averages_over_the_pairs_of_each_ranking(name, extremes):
    table, reference = normal(7, 7), normal(7, 7, seed=1)
    batch = candidates(RANKS)
    loss, formula = {**PAIRED, **PER_TOKEN}[name]
    if name == "dpo":
        batch["reference_BC"] = sums_in_loops(reference, batch)[0].astype(np.float32)
    else:
        loss = partial(direct.simpo, beta=2.0, gamma=0.5)
    options = {"loss": loss, "extremes": extremes, "per_token": name == "simpo"}
    objective = jax.jit(
        jax.value_and_grad(partial(direct.preference_objective, bigram, **options), has_aux=True)
    )

    def in_loops(table):
        sums, counts = sums_in_loops(table, batch)
        theirs = sums_in_loops(reference, batch)[0] if name == "dpo" else np.zeros_like(sums)
        scores = sums / np.maximum(counts, 1) if name == "simpo" else sums
        total = 0.0
        gaps = []
        for b, ranks in enumerate(batch["ranks_BC"]):
            pairs = [(i, j) for i in range(4) for j in range(4) if 0 < ranks[i] < ranks[j]]
            if extremes and pairs:
                real = [c for c in range(4) if ranks[c]]
                pairs = [(min(real, key=lambda c: ranks[c]), max(real, key=lambda c: ranks[c]))]
            losses = [
                formula(scores[b, i], scores[b, j], theirs[b, i], theirs[b, j]) for i, j in pairs
            ]
            gaps += [scores[b, i] - theirs[b, i] - scores[b, j] + theirs[b, j] for i, j in pairs]
            total += np.mean(losses) if losses else 0.0
        return total, gaps

    (loss, (weight, metrics)), grad = objective(jnp.float32(table), batch)
    want, gaps = in_loops(table)
    # A tie and an empty row have no pair.
    assert float(loss) == pytest.approx(want, rel=2e-6) and float(weight) == 3
    assert [float(x) for x in metrics["accuracy"]] == [sum(g > 0 for g in gaps), len(gaps)]
    assert float(metrics["margin"][0]) == pytest.approx(sum(gaps), rel=1e-4, abs=1e-5)
    numerical = np.zeros_like(table)
    for index in np.ndindex(table.shape):
        step = np.zeros_like(table)
        step[index] = 1e-6
        numerical[index] = (in_loops(table + step)[0] - in_loops(table - step)[0]) / 2e-6
    np.testing.assert_allclose(grad, numerical, atol=2e-6)


def test_chosen_and_rejected_go_through_the_model_once():
    """All candidates in one pass forward; the gradient takes no other."""
    passes = []
    batch = candidates(RANKS)
    batch["reference_BC"] = np.zeros((5, 4), np.float32)

    def counted(params, tokens, *rest, **options):
        passes.append(tokens.shape[0])
        return bigram(params, tokens, *rest, **options)

    objective = partial(
        direct.preference_objective, counted, batch=batch, loss=partial(direct.dpo, beta=0.1)
    )
    jax.eval_shape(jax.value_and_grad(objective, has_aux=True), np.float32(normal(7, 7)))
    assert passes == [5 * 4]


def test_certain_and_absent_candidates_leave_the_gradient_finite():
    batch = candidates(RANKS)
    objective = partial(
        direct.preference_objective, bigram, loss=partial(direct.orpo, beta=1.0), per_token=True
    )
    for table in (np.zeros((7, 7)), 1e4 * np.eye(7)):
        grad, _ = jax.jit(jax.grad(objective, has_aux=True))(jnp.float32(table), batch)
        assert np.isfinite(grad).all()


def test_kto_objective_judges_by_rank():
    table, reference = normal(7, 7), normal(7, 7, seed=1)
    # Every rank but the first is undesirable, 0 is not judged.
    batch = candidates([[1, 3], [2, 0], [1, 0], [0, 0]])
    sums, theirs = sums_in_loops(table, batch)[0], sums_in_loops(reference, batch)[0]
    batch |= {"reference_BC": theirs.astype(np.float32), "kl_B": np.full(4, 0.3, np.float32)}
    loss, (weight, metrics) = jax.jit(partial(direct.kto_objective, bigram, beta=0.3))(
        jnp.float32(table), batch
    )
    r = sums - theirs
    values = [
        kto_value(r[b, c], 0.3, good, 0.3)
        for b, c, good in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 0, 1))
    ]
    assert float(loss) == pytest.approx(4 - sum(values), rel=2e-6) and float(weight) == 4
    assert [float(x) for x in metrics["desirable"]] == pytest.approx(
        [r[0, 0] + r[2, 0], 2], rel=1e-4
    )
    assert [float(x) for x in metrics["undesirable"]] == pytest.approx(
        [r[0, 1] + r[1, 0], 2], rel=1e-4
    )
    assert [float(x) for x in metrics["accuracy"]] == [r[0, 0] > r[0, 1], 1]


# ---- Optima on a policy small enough to enumerate: one token as a prompt, then two out of three

FIRST, SECOND = (x.reshape(-1) for x in np.indices((3, 3)))


def tabular(params, tokens_BT, segment_ids_BT, positions_BT):
    batch = tokens_BT.shape[0]
    first = jnp.broadcast_to(params["first"], (batch, 3))
    logits_BTV = jnp.stack(
        [first, params["second"][tokens_BT[:, 1]], jnp.zeros((batch, 3))], axis=1
    )
    return LanguageOutput(logits_BTV, jnp.eye(3))


def sequences(order):
    """Return the nine sequences in rows of `order` [B, C], as a batch of candidates."""
    tokens = np.stack([0 * FIRST, FIRST, SECOND], axis=1)[order]
    mask = np.broadcast_to([0.0, 1.0, 1.0], tokens.shape).astype(np.float32)
    ranks = np.broadcast_to(np.arange(1, order.shape[1] + 1), order.shape)
    return {
        "tokens_BCT": tokens, "loss_mask_BCT": mask, "ranks_BC": ranks,
        "segment_ids_BCT": tokens * 0 + 1, "positions_BCT": tokens * 0 + np.arange(3),
    }  # fmt: skip


def start_tables():
    return {"first": jnp.float32(normal(3)), "second": jnp.float32(normal(3, 3, seed=1))}


def nine_probs(params):
    first, second = (np.float64(params[k]) for k in ("first", "second"))
    first = first - np.log(np.exp(first).sum())
    second = second - np.log(np.exp(second).sum(1, keepdims=True))
    return np.exp(first[FIRST] + second[FIRST, SECOND])


def minimise(loss, params, steps=1200):
    optimizer = optax.adam(optax.linear_schedule(0.05, 0.0, steps))

    @jax.jit
    def run(params):
        def update(_, carry):
            params, opt_state = carry
            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
            return optax.apply_updates(params, updates), opt_state

        return jax.lax.fori_loop(0, steps, update, (params, optimizer.init(params)))[0]

    return run(params)


def distance(p, q):
    return 0.5 * np.abs(p - q).sum()


def test_dpo_reaches_its_closed_form():
    """Every ordered pair, weighted by its Bradley-Terry probability, is DPO's population loss."""
    reward = 1.5 * normal(9, seed=5)
    start = start_tables()
    order = np.array([(i, j) for i in range(9) for j in range(9) if i != j])
    preferred = sigmoid(reward[order[:, 0]] - reward[order[:, 1]]).astype(np.float32)
    batch = sequences(order)
    batch["reference_BC"] = np.asarray(direct.candidate_logprobs(tabular, start, batch))
    reference = nine_probs(start)

    def train(beta):
        def weighted(*pair):
            return preferred[:, None, None] * direct.dpo(*pair, beta=beta)

        loss = partial(direct.preference_objective, tabular, batch=batch, loss=weighted)
        return nine_probs(minimise(lambda params: loss(params)[0], start))

    def closed_form(beta):
        weights = reference * np.exp(reward / beta)
        return weights / weights.sum()

    reached = train(1.0)
    assert distance(reached, closed_form(1.0)) < 0.02
    # Controls: the start, and another beta's optimum.
    assert distance(reached, reference) > 0.2 and distance(reached, closed_form(0.5)) > 0.1


def kto_optimum(reference, weights, beta):
    """Return by bisection the policy where the gradient of KTO's expected loss is 0.

    With z0 = KL(pi || ref) held, on a free softmax, that is where weights s (1 - s) = c pi and pi
    sums to one, with s = sigmoid(beta (log pi/ref - z0)).
    """

    def bisect(is_low, low, high):
        for _ in range(45):
            middle = 0.5 * (low + high)
            low = np.where(is_low(middle), middle, low)
            high = np.where(is_low(middle), high, middle)
        return 0.5 * (low + high)

    def policy(z0):
        def candidate(log_c):
            # t = log pi/ref; one root each, for with beta < 1 the difference falls in t.
            def too_low(t):
                s = sigmoid(beta * (t - z0))
                return np.log(weights * s * (1 - s)) > log_c + t + np.log(reference)

            return reference * np.exp(bisect(too_low, np.full(9, -60.0), np.full(9, 60.0)))

        return candidate(bisect(lambda log_c: candidate(log_c).sum() > 1, -40.0, 40.0))

    def kl_exceeds(z0):
        p = policy(z0)
        return (p * np.log(p / reference)).sum() > z0

    return policy(bisect(kl_exceeds, 0.0, 10.0))


@pytest.mark.slow
def test_kto_reaches_its_own_optimum():
    """Each response is desirable more often than not; one that mostly is not is driven out."""
    start = start_tables()
    beta = 0.5
    batch = sequences(np.arange(9)[:, None])
    reference = nine_probs(start)
    reference_BC = direct.candidate_logprobs(tabular, start, batch)

    def train(desirable):
        def loss(params):
            logp_BC = direct.candidate_logprobs(tabular, params, batch)
            kl = (jnp.exp(logp_BC) * (logp_BC - reference_BC)).sum()  # exact
            good, bad = (
                direct.kto_unpaired(logp_BC, reference_BC, side, beta=beta, kl=kl)
                for side in (True, False)
            )
            return (desirable[:, None] * good + (1 - desirable[:, None]) * bad).sum()

        return nine_probs(minimise(loss, start))

    desirable = np.linspace(0.55, 0.98, 9)[np.random.default_rng(2).permutation(9)]
    reached = train(np.float32(desirable))
    assert distance(reached, kto_optimum(reference, 2 * desirable - 1, beta)) < 0.02
    assert distance(reached, reference) > 0.1  # control
    disliked = desirable.copy()
    disliked[reference.argmax()] = 0.2
    assert train(np.float32(disliked))[reference.argmax()] < 0.02 < reference.max()
