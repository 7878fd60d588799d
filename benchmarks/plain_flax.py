"""A Llama and its training step as users of Flax and Optax write them: a peer of the benchmarks.

DenseGeneral layers in a Python loop, `jax.nn.dot_product_attention`, Optax's AdamW with clipping
and its cross-entropy, one jit with donated arguments.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from model import Params
from model_config import ModelConfig


def turned(x_BTNH: jax.Array, base: float) -> jax.Array:
    """Return `x_BTNH` turned by RoPE, half-split."""
    _, length, _, width = x_BTNH.shape
    # An angle for each position and each pair of a head's numbers.
    frequency_H = base ** (-jnp.arange(0, width, 2) / width)
    angle_TH = jnp.arange(length)[:, None] * frequency_H
    cos_T1H = jnp.cos(angle_TH)[:, None]
    sin_T1H = jnp.sin(angle_TH)[:, None]
    # A pair is a number of the first half and one of the second.
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    turned_first = first * cos_T1H - second * sin_T1H
    turned_second = second * cos_T1H + first * sin_T1H
    both = jnp.concatenate([turned_first, turned_second], axis=-1)
    return both.astype(x_BTNH.dtype)


class Layer(nn.Module):
    """One pre-norm layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        norm = functools.partial(nn.RMSNorm, c.norm_eps, dtype=c.compute_dtype)
        heads = functools.partial(nn.DenseGeneral, use_bias=False, dtype=c.compute_dtype)
        dense = functools.partial(nn.Dense, use_bias=False, dtype=c.compute_dtype)

        # Attention.
        h_BTD = norm(name="attention_norm")(x_BTD)
        q_BTNH = heads((c.heads, c.head_dim), name="q")(h_BTD)
        k_BTKH = heads((c.kv_heads, c.head_dim), name="k")(h_BTD)
        v_BTKH = heads((c.kv_heads, c.head_dim), name="v")(h_BTD)
        q_BTNH = turned(q_BTNH, c.rope_base)
        k_BTKH = turned(k_BTKH, c.rope_base)
        out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True)
        x_BTD += heads(c.width, axis=(-2, -1), name="o")(out_BTNH)

        # SwiGLU.
        h_BTD = norm(name="mlp_norm")(x_BTD)
        gate_BTF = dense(c.mlp_width, name="gate")(h_BTD)
        up_BTF = dense(c.mlp_width, name="up")(h_BTD)
        gated_BTF = nn.silu(gate_BTF) * up_BTF
        return x_BTD + dense(c.width, name="down")(gated_BTF)


class Llama(nn.Module):
    """Tokens to logits."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        c = self.config
        embed = nn.Embed(c.vocab, c.width, dtype=c.compute_dtype, name="embed")
        x_BTD = embed(tokens_BT)
        for i in range(c.layers):
            x_BTD = Layer(c, name=f"layer{i}")(x_BTD)
        x_BTD = nn.RMSNorm(c.norm_eps, dtype=c.compute_dtype, name="final_norm")(x_BTD)
        if c.tied:
            return embed.attend(x_BTD)
        return nn.Dense(c.vocab, use_bias=False, dtype=c.compute_dtype, name="unembed")(x_BTD)


def with_our_weights(config: ModelConfig, params: Params) -> Params:
    """Return the parameters of `Llama`, from those of a LanguageModel."""
    decoder = params["decoder"]
    layers = decoder["layers"]
    theirs: Params = {
        "embed": {"embedding": decoder["embed"]},
        "final_norm": {"scale": decoder["final_norm"]},
    }
    if not config.tied:
        theirs["unembed"] = {"kernel": params["unembed"]}
    # Ours hold all layers in one array, theirs one by one.
    for i in range(config.layers):
        layer = {
            "attention_norm": {"scale": layers["attention_norm"][i]},
            "mlp_norm": {"scale": layers["mlp_norm"][i]},
        }
        for name in ("q", "k", "v", "o"):
            layer[name] = {"kernel": layers["attention"][name][i]}
        for name in ("gate", "up", "down"):
            layer[name] = {"kernel": layers["mlp"][name][i]}
        theirs[f"layer{i}"] = layer
    return theirs


def trainer(
    model: ModelConfig, params: Params, tokens_BT: np.ndarray, lr: float
) -> Callable[[], float]:
    """Return a function that makes one step on `tokens_BT` from `params` on, and its loss."""
    net = Llama(model)
    adamw = optax.adamw(lr, 0.9, 0.95, 1e-8, weight_decay=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    weights = with_our_weights(model, params)
    state = (weights, optimizer.init(weights))
    tokens = jax.device_put(tokens_BT)

    def loss_of(weights: Params) -> jax.Array:
        # Position t predicts token t + 1.
        logits_BTV = net.apply({"params": weights}, tokens)
        predicting = logits_BTV[:, :-1].astype(jnp.float32)
        labels = tokens[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(predicting, labels)
        return losses.mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        weights, opt_state = state
        loss, gradient = jax.value_and_grad(loss_of)(weights)
        updates, opt_state = optimizer.update(gradient, opt_state, weights)
        return (optax.apply_updates(weights, updates), opt_state), loss

    def call() -> float:
        nonlocal state
        state, loss = step(state)
        return float(loss)

    return call
