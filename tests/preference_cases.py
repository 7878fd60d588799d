"""Comparisons, tabular policies and the papers' sums in loops, for tests of preference methods."""

import jax
import jax.numpy as jnp
import numpy as np

from model import LanguageOutput

WORDS = ["red", "blue", "green", "black", "white", "grey", "brown", "pink"]


def comparison_rows(count=120):
    """Return rankings of two to four responses, one in ten of them a tie of all."""
    rows = []
    for i in range(count):
        words = [WORDS[(i * k + k) % 8] for k in range(1, 3 + i % 3)]
        responses = [f"{word} {k}" for k, word in enumerate(words)]
        ranking = [1, *[2 + (i + k) % 2 for k in range(1, len(words))]]
        if i % 10 == 0:
            ranking = [1] * len(words)
        rows.append({"prompt": f"name a colour {i}", "responses": responses, "ranking": ranking})
    return rows


def lookup(params, tokens, segments, positions):
    """Return logits by the row of the last token alone."""
    return LanguageOutput(params[tokens], jnp.eye(params.shape[-1]))


def mean_so_far(params, tokens, segments, positions):
    """Return logits by the mean of the rows of all tokens so far.

    So a response depends on all of its prompt.
    """
    rows = jnp.cumsum(params[tokens], axis=1) / jnp.arange(1, tokens.shape[1] + 1)[:, None]
    return LanguageOutput(rows, jnp.eye(params.shape[-1]))


def token_logps(table, tokens, mask):
    """Return by place the float64 log-probabilities of the tokens in `mask` by `mean_so_far`."""
    logits = {t: table[tokens[:t]].mean(0) for t in range(1, len(tokens)) if mask[t]}
    return {t: x[tokens[t]] - np.log(np.exp(x).sum()) for t, x in logits.items()}


def candidate_logps(table, batch, b):
    """Return `token_logps` of each candidate of row `b` that is there, by its number."""
    real = [c for c, rank in enumerate(batch["ranks_BC"][b]) if rank > 0]
    tokens, masks = batch["tokens_BCT"][b], batch["loss_mask_BCT"][b]
    return {c: token_logps(table, tokens[c], masks[c]) for c in real}


def loss_and_slope(objective, table, batch, direction):
    """Return loss sum and weight of a batch, and the loss's slope along `direction`.

    The slope is by its gradient in float32.
    """
    gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss, (weight, _)), grad = gradient(jnp.float32(table), batch)
    assert np.isfinite(grad).all()
    return float(loss), float(weight), (np.float64(grad) * direction).sum()


def slope_of(loss, table, direction, step=1e-5):
    """Return the slope of `loss(table)` along `direction`, by a central difference."""
    return (loss(table + step * direction) - loss(table - step * direction)) / (2 * step)
