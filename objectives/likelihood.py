"""Log-probabilities of tokens, and the objective of pre-training and supervised fine-tuning."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh

from model import Params, Unembedding, unembed
from sharding import along

Apply = Callable[..., Any]
"""apply(params, tokens_BT, segment_ids_BT, positions_BT) of model.init_and_apply: that of a
LanguageModel, which returns a LanguageOutput, unless a ScalarModel's is asked for, which returns a
ScalarOutput."""
TokenBatch = Mapping[str, Any]
"""Rows of tokens, [B, T] each, of data.batches or a rollout: `tokens_BT`, ids, int32;
`segment_ids_BT`, int32, 0 for padding and 1, 2, ... for the examples packed in a row;
`positions_BT`, int32, 0 at the first token of each example; and for a loss `loss_mask_BT`,
float32, 1 where a token is predicted and counts."""
Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Metrics of an objective: {name: (sum, weight)}, float32 scalars; the metric is the quotient."""
LossSum = tuple[jax.Array, tuple[jax.Array, Metrics]]
"""(loss sum, (weight, metrics)) of an objective; the loss is the sum divided by the weight."""

# A loss that needs the labels' log-probabilities alone never holds the logits of all its tokens: a
# device makes them part by part, at most LOGITS at a time, but of no fewer than TOKENS tokens, as
# each part gathers the unembedding over fsdp anew.
LOGITS = 2**25
TOKENS = 1024


# --- log-probabilities


def label_logprobs(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """Return log softmax(logits)[label], in nats, [B, T] float32.

    `labels_BT`: ids of the tokens, int, below V, at the position of the logits that predict them
    (not shifted). Finite logits never give -inf.
    """
    return _label_logprobs(logits_BTV.astype(jnp.float32), labels_BT)


# A rule of its own for the derivative: that of a gather is a scatter, slow on every platform, and
# autodiff would keep the exponentials beside the logits. In this form the backward pass is one
# elementwise expression of the logits.
@jax.custom_vjp
def _label_logprobs(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    return _label_logprobs_forward(logits_BTV, labels_BT)[0]


def _label_logprobs_forward(logits_BTV, labels_BT):
    # The sum of exponentials, less the largest logit so that none overflows.
    top_BT = logits_BTV.max(-1)
    centred_BTV = logits_BTV - top_BT[..., None]
    total_BT = jnp.exp(centred_BTV).sum(-1)

    # The label's logit less the logarithm of that sum.
    labels_BT1 = labels_BT[..., None]
    label_BT = jnp.take_along_axis(logits_BTV, labels_BT1, axis=-1)[..., 0]
    log_total_BT = jnp.log(total_BT) + top_BT
    logp_BT = label_BT - log_total_BT
    return logp_BT, (logits_BTV, labels_BT, top_BT, total_BT)


def _label_logprobs_backward(saved, cotangent_BT):
    # d logp / d logit_v = [v is the label] - softmax_v
    logits_BTV, labels_BT, top_BT, total_BT = saved
    vocab = logits_BTV.shape[-1]
    is_label_BTV = labels_BT[..., None] == jnp.arange(vocab)
    scale_BT = -cotangent_BT / total_BT
    centred_BTV = logits_BTV - top_BT[..., None]
    softmax_part_BTV = jnp.exp(centred_BTV) * scale_BT[..., None]
    label_part_BTV = jnp.where(is_label_BTV, cotangent_BT[..., None], 0.0)
    # Labels have no derivative.
    return label_part_BTV + softmax_part_BTV, None


_label_logprobs.defvjp(_label_logprobs_forward, _label_logprobs_backward)


def hidden_logprobs(
    x_BTD: jax.Array, unembed_DV: Unembedding, labels_BT: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Return `label_logprobs` of logits / temperature, [B, T] float32 nats, from hidden states.

    `x_BTD` and `unembed_DV`: of a LanguageOutput, or a slice of its positions. `labels_BT`: the id
    that each position predicts, int. `temperature`: above 0, not checked. The logits are made in
    parts (see LOGITS), and in the backward pass again.
    """
    batch, length, _ = x_BTD.shape

    def part_logprobs(x_BTD: jax.Array, labels_BT: jax.Array) -> jax.Array:
        logits_BTV = unembed(x_BTD, unembed_DV) / temperature
        return label_logprobs(logits_BTV, labels_BT)

    # Few tokens are unembedded at once.

    parts = _parts(batch * length, unembed_DV.shape[1])
    if parts == 1:
        return part_logprobs(x_BTD, labels_BT)

    # Each device's own tokens are cut, or a part would be of some devices alone: [B, T] is seen as
    # [B, ways, own], and own, padded, as [parts, part].
    mesh = get_abstract_mesh()
    ways = 1 if mesh.empty else along(mesh, "stage", "sequence")
    if length % ways:
        ways = 1
    own = length // ways
    part = math.ceil(own / parts)

    def cut(x: jax.Array) -> jax.Array:
        """Return [B, T, ...] as [parts, B, ways part, ...]."""
        _, _, *rest = x.shape
        x = x.reshape(batch, ways, own, *rest)
        # Padded at the end of each device's own, so that all parts are of one size.
        padding = [(0, 0)] * x.ndim
        padding[2] = (0, parts * part - own)
        x = jnp.pad(x, padding)
        x = x.reshape(batch, ways, parts, part, *rest)
        x = jnp.moveaxis(x, 2, 0)
        return x.reshape(parts, batch, ways * part, *rest)

    def one_part(cut_arrays: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jax.checkpoint(part_logprobs)(*cut_arrays)

    logp = jax.lax.map(one_part, (cut(x_BTD), cut(labels_BT)))

    # Put together as they were cut, without the padding.
    logp = logp.reshape(parts, batch, ways, part)
    logp = jnp.moveaxis(logp, 0, 2)
    logp = logp.reshape(batch, ways, -1)
    return logp[:, :, :own].reshape(batch, length)


def _parts(tokens: int, vocab: int) -> int:
    """Return the parts in which `tokens` tokens are unembedded, by what is a device's of them."""
    mesh = get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    tensor = 1 if mesh.empty else along(mesh, "tensor")
    own_tokens = tokens * tensor / devices
    own_vocab = vocab / tensor
    # Whichever bound asks for fewer.
    by_logits = own_tokens * own_vocab / LOGITS
    by_tokens = own_tokens / TOKENS
    return math.ceil(min(by_logits, by_tokens))


# --- the shift: position t - 1 predicts token t


def token_logprobs(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Return [B, T] float32: at t log p(token t | tokens before t), in nats; at 0 it is 0.

    `logits_BTV`: of all positions of `tokens_BT`; those at t - 1 predict token t. In packed rows
    an example's first token has what the example before it predicts: mask it.
    """
    # Shifted afterwards: a slice of the logits would copy them, and its gradient pad them again.
    logp_BT = label_logprobs(logits_BTV, following(tokens_BT))
    return shifted(logp_BT)


def following(tokens_BT: jax.Array) -> jax.Array:
    """Return each position's label, [B, T]: the next token's id; at T - 1 the row's first."""
    return jnp.roll(tokens_BT, -1, axis=1)


def shifted(logp_BT: jax.Array) -> jax.Array:
    """Move log-probabilities, [B, T], from the position that predicts a token to the token's own.

    So what was at t is at t + 1; index 0 gets 0, and what was at T - 1 is dropped.
    """
    earlier_BT = logp_BT[:, :-1]
    return jnp.pad(earlier_BT, ((0, 0), (1, 0)))


# --- batches


def inputs(batch: TokenBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (`tokens_BT`, `segment_ids_BT`, `positions_BT`) of a batch, [B, T] int32 each.

    They are what a model's apply takes after the parameters, in its order.
    """
    return batch["tokens_BT"], batch["segment_ids_BT"], batch["positions_BT"]


def response_mask(batch: Mapping[str, Any]) -> jax.Array:
    """Return [B, T] float32: 1 for the tokens of the responses that the policy drew, else 0.

    `batch`: a rollout.Rollout; the result is its `mask_BR` behind zeros for the prompt, to serve
    as `loss_mask_BT`.
    """
    mask_BR = batch["mask_BR"]
    prompt_length = batch["tokens_BT"].shape[1] - mask_BR.shape[1]
    return jnp.pad(mask_BR, ((0, 0), (prompt_length, 0)))


# --- the objective


def likelihood_objective(apply: Apply, params: Params, batch: TokenBatch) -> LossSum:
    """Return the negative log-likelihood of the tokens under `loss_mask_BT`, summed, in nats.

    `apply` and `params`: of a LanguageModel. The mask, at a token's own index, may hold weights
    other than 0 and 1; its sum is the weight. At an example's first token, which nothing predicts,
    it must be 0 (not checked). Metrics: none, or, where the model has an auxiliary loss,
    `auxiliary_loss`, its mean a token; times the weight it is added to the loss sum.
    """
    # The log-probability of each token, at the token's own index.
    mask_BT = batch["loss_mask_BT"]
    output = apply(params, *inputs(batch))
    labels_BT = following(batch["tokens_BT"])
    logp_BT = shifted(hidden_logprobs(output.x_BTD, output.unembed_DV, labels_BT))

    # Summed where they count; the model's own loss is a token's.
    tokens = mask_BT.sum()
    loss = -(logp_BT * mask_BT).sum()
    if output.auxiliary_loss is None:
        return loss, (tokens, {})
    auxiliary_loss = tokens * output.auxiliary_loss
    return loss + auxiliary_loss, (tokens, {"auxiliary_loss": (auxiliary_loss, tokens)})


def without_auxiliary(loss: jax.Array, metrics: Metrics) -> jax.Array:
    """Return the loss sum of `likelihood_objective` without the model's auxiliary loss, in nats.

    `metrics`: returned beside it. What is left is the negative log-likelihood alone.
    """
    if "auxiliary_loss" not in metrics:
        return loss
    auxiliary_loss, _ = metrics["auxiliary_loss"]
    return loss - auxiliary_loss
