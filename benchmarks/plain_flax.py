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
    length, width = x_BTNH.shape[1], x_BTNH.shape[-1]
    frequency_H = base ** (-jnp.arange(0, width, 2) / width)
    angle_TH = jnp.arange(length)[:, None] * frequency_H
    cos, sin = jnp.cos(angle_TH)[:, None], jnp.sin(angle_TH)[:, None]
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    both = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(both, axis=-1).astype(x_BTNH.dtype)


class Layer(nn.Module):
    """One pre-norm layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        options = {"use_bias": False, "dtype": c.compute_dtype}

        h_BTD = nn.RMSNorm(c.norm_eps, dtype=c.compute_dtype, name="attention_norm")(x_BTD)
        q_BTNH = nn.DenseGeneral((c.heads, c.head_dim), name="q", **options)(h_BTD)
        k_BTKH = nn.DenseGeneral((c.kv_heads, c.head_dim), name="k", **options)(h_BTD)
        v_BTKH = nn.DenseGeneral((c.kv_heads, c.head_dim), name="v", **options)(h_BTD)
        out_BTNH = jax.nn.dot_product_attention(
            turned(q_BTNH, c.rope_base), turned(k_BTKH, c.rope_base), v_BTKH, is_causal=True
        )
        x_BTD += nn.DenseGeneral(c.width, axis=(-2, -1), name="o", **options)(out_BTNH)

        h_BTD = nn.RMSNorm(c.norm_eps, dtype=c.compute_dtype, name="mlp_norm")(x_BTD)
        gate_BTF = nn.Dense(c.mlp_width, name="gate", **options)(h_BTD)
        up_BTF = nn.Dense(c.mlp_width, name="up", **options)(h_BTD)
        return x_BTD + nn.Dense(c.width, name="down", **options)(nn.silu(gate_BTF) * up_BTF)


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
    for i in range(config.layers):
        theirs[f"layer{i}"] = {
            "attention_norm": {"scale": layers["attention_norm"][i]},
            "mlp_norm": {"scale": layers["mlp_norm"][i]},
            **{x: {"kernel": layers["attention"][x][i]} for x in ("q", "k", "v", "o")},
            **{x: {"kernel": layers["mlp"][x][i]} for x in ("gate", "up", "down")},
        }
    return theirs


def trainer(
    model: ModelConfig, params: Params, tokens_BT: np.ndarray, lr: float
) -> Callable[[], float]:
    """Return a function that makes one step on `tokens_BT` from `params` on, and its loss."""
    net = Llama(model)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(lr, 0.9, 0.95, 1e-8, weight_decay=0.1)
    )
    weights = with_our_weights(model, params)
    state = (weights, optimizer.init(weights))
    tokens = jax.device_put(tokens_BT)

    def loss_of(weights: Params) -> jax.Array:
        logits_BTV = net.apply({"params": weights}, tokens)
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(
            logits_BTV[:, :-1].astype(jnp.float32), tokens[:, 1:]
        )
        return losses_BT.mean()

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
