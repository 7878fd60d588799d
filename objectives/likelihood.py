"""Log-probabilities of tokens, and the likelihood objective of pre-training and supervised fine-tuning."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Apply = Callable[..., Any]


def label_logprobs(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """log softmax(logits)[label], in nats, [B, T] float32; -inf is never produced from finite logits."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    # A compare-and-sum, for the backward pass of a gather is a scatter, which is slow on every platform.
    hit_BTV = labels_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    label_BT = jnp.where(hit_BTV, logits_BTV, 0.0).sum(-1)
    return label_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def token_logprobs(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """[:, t] is log p(token t | tokens before t), in nats; [:, 0] is 0. The one place that shifts."""
    # Shifted afterwards: a slice of the logits would copy them, and its backward pass pad them again.
    logp_BT = label_logprobs(logits_BTV, jnp.roll(tokens_BT, -1, axis=1))
    return jnp.pad(logp_BT[:, :-1], ((0, 0), (1, 0)))


def inputs(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a model's apply takes from a batch."""
    return batch["tokens_BT"], batch["segment_ids_BT"], batch["positions_BT"]


def response_mask(batch: dict[str, jax.Array]) -> jax.Array:
    """[B, T]: `mask_BR`, of the responses at the rows' ends, over the whole rows: a loss mask of the responses."""
    before = batch["tokens_BT"].shape[1] - batch["mask_BR"].shape[1]
    return jnp.pad(batch["mask_BR"], ((0, 0), (before, 0)))


def likelihood_objective(apply: Apply, params: Any, batch: dict[str, jax.Array]):
    """Negative log-likelihood of the tokens under the loss mask, in nats (sum over tokens)."""
    logits_BTV, _ = apply(params, *inputs(batch))
    mask_BT = batch["loss_mask_BT"]
    logp_BT = token_logprobs(logits_BTV, batch["tokens_BT"])
    tokens = mask_BT.sum()
    return -(logp_BT * mask_BT).sum(), (tokens, {})
