"""Log-probabilities of tokens, and the likelihood objective of pre-training and supervised fine-tuning."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model import unembed
from sharding import along

Apply = Callable[..., Any]
LOGITS, TOKENS = 2**25, 1024
"""Where a loss needs no more than the labels' log-probabilities, a device holds the logits of a part of its tokens at a
time: so many logits at most, if these are of so many tokens. Each part gathers the unembedding over fsdp anew."""


def label_logprobs(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """log softmax(logits)[label], in nats, [B, T] float32; -inf is never produced from finite logits."""
    return _label_logprobs(logits_BTV.astype(jnp.float32), labels_BT)


# A rule of its own for the derivative: that of a gather is a scatter, slow on every platform, and autodiff would keep
# the exponentials beside the logits. In this form the backward pass is one elementwise expression of the logits.
@jax.custom_vjp
def _label_logprobs(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    return _label_logprobs_forward(logits_BTV, labels_BT)[0]


def _label_logprobs_forward(logits_BTV, labels_BT):
    top_BT = logits_BTV.max(-1)
    total_BT = jnp.exp(logits_BTV - top_BT[..., None]).sum(-1)
    label_BT = jnp.take_along_axis(logits_BTV, labels_BT[..., None], axis=-1)[..., 0]
    return label_BT - (jnp.log(total_BT) + top_BT), (logits_BTV, labels_BT, top_BT, total_BT)


def _label_logprobs_backward(saved, cotangent_BT):
    logits_BTV, labels_BT, top_BT, total_BT = saved
    hit_BTV = labels_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    others_BTV = jnp.exp(logits_BTV - top_BT[..., None]) * (-cotangent_BT / total_BT)[..., None]
    return jnp.where(hit_BTV, cotangent_BT[..., None], 0.0) + others_BTV, None


_label_logprobs.defvjp(_label_logprobs_forward, _label_logprobs_backward)


def hidden_logprobs(
    x_BTD: jax.Array, unembed_DV: jax.Array, labels_BT: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """`label_logprobs` of the hidden states' logits / temperature, [B, T], in parts of the tokens.

    How large the parts are is said above; the backward pass computes their logits again.
    """
    (batch, length, _), mesh = x_BTD.shape, jax.sharding.get_abstract_mesh()
    chips, tensor = (1, 1) if mesh.empty else (mesh.size, along(mesh, "tensor"))
    tokens, vocab = batch * length * tensor / chips, unembed_DV.shape[1] / tensor
    parts = math.ceil(min(tokens * vocab / LOGITS, tokens / TOKENS))

    def of(x_BTD: jax.Array, labels_BT: jax.Array) -> jax.Array:
        return label_logprobs(unembed(x_BTD, unembed_DV) / temperature, labels_BT)

    if parts == 1:
        return of(x_BTD, labels_BT)
    # Each device's tokens are cut on their own, or a part would be of some devices alone.
    ways = 1 if mesh.empty else along(mesh, "stage", "sequence")
    ways = ways if length % ways == 0 else 1
    own = length // ways
    part = -(-own // parts)

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, ways, own, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, parts * part - own), *[(0, 0)] * (x.ndim - 3)))
        x = jnp.moveaxis(x.reshape(batch, ways, parts, part, *x.shape[3:]), 2, 0)
        return x.reshape(parts, batch, ways * part, *x.shape[4:])

    logp = jax.lax.map(lambda xs: jax.checkpoint(of)(*xs), (cut(x_BTD), cut(labels_BT)))
    logp = jnp.moveaxis(logp.reshape(parts, batch, ways, part), 0, 2)
    return logp.reshape(batch, ways, -1)[:, :, :own].reshape(batch, length)


def token_logprobs(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """[:, t] is log p(token t | tokens before t), in nats; [:, 0] is 0. The one place that shifts."""
    # Shifted afterwards: a slice of the logits would copy them, and its backward pass pad them again.
    return shifted(label_logprobs(logits_BTV, following(tokens_BT)))


def following(tokens_BT: jax.Array) -> jax.Array:
    """The label of each position: the next token, of the last one the first."""
    return jnp.roll(tokens_BT, -1, axis=1)


def shifted(logp_BT: jax.Array) -> jax.Array:
    """Log-probabilities of `following` tokens to the tokens' own places; the first has none."""
    return jnp.pad(logp_BT[:, :-1], ((0, 0), (1, 0)))


def inputs(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a model's apply takes from a batch."""
    return batch["tokens_BT"], batch["segment_ids_BT"], batch["positions_BT"]


def response_mask(batch: Mapping[str, Any]) -> jax.Array:
    """[B, T]: `mask_BR`, of the responses at the rows' ends, over the whole rows: a loss mask of the responses."""
    before = batch["tokens_BT"].shape[1] - batch["mask_BR"].shape[1]
    return jnp.pad(batch["mask_BR"], ((0, 0), (before, 0)))


def likelihood_objective(apply: Apply, params: Any, batch: dict[str, jax.Array]):
    """Negative log-likelihood of the tokens under the loss mask, in nats (sum over tokens).

    Where the model has an auxiliary loss, it is added for each token and is a metric of its own.
    """
    mask_BT = batch["loss_mask_BT"]
    output = apply(params, *inputs(batch))
    labels_BT = following(batch["tokens_BT"])
    logp_BT = shifted(hidden_logprobs(output.x_BTD, output.unembed_DV, labels_BT))
    tokens = mask_BT.sum()
    loss = -(logp_BT * mask_BT).sum()
    if output.auxiliary_loss is None:
        return loss, (tokens, {})
    auxiliary_loss = tokens * output.auxiliary_loss
    return loss + auxiliary_loss, (tokens, {"auxiliary_loss": (auxiliary_loss, tokens)})
