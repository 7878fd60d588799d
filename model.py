"""The decoder (RoPE, RMSNorm, SwiGLU, grouped-query attention) and its heads: next token, scalar.

Shape suffixes, everywhere in Plumb: an array's name ends in the letters of its axes.

    B  rows of a batch                        D  model width
    T  tokens of a row, the queries           F  width of the feed-forward layers (mlp_width)
    S  keys; slots of a cache                 N  query heads
    P  tokens of a prompt                     K  key/value heads
    R  tokens of a response                   G  query heads for each K
    V  vocabulary                             H  width of a head
    C  candidates for one prompt              L  layers
    Q  prompts, where B are their responses   A  all responses of a call, where B of them are
    M  B and T as one axis (sharding.flat);      made at a time; E enter together (slots.py)
       in layers.py micro-batches

A row of a rollout is a prompt and its response, T = P + R; rollout.py draws one. Index t always
means token t: the model predicts it at position t - 1, and its log-probability has index t again.
So logits, log-probabilities and values of a response's tokens come from positions P - 1 to T - 2.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import attention, decode_attention
from kernels.ring import striped, turns_of, unstriped
from layers import run_layers
from model_config import ModelConfig
from sharding import (
    along,
    by_rows_and_experts,
    constrain_residual,
    constrain_rows,
    constrain_tokens,
    constrain_units,
    flat,
)

Params = dict[str, Any]
"""A model's parameters, nested dicts of float32 arrays: `decoder`, with `embed`, `layers` (each
stacked over the layers) and `final_norm`; beside it a LanguageModel's `unembed`, unless tied, or a
ScalarModel's `head` and `bias`. Paths and shapes: sharding.RULES and the classes below."""
Turns = tuple[jax.Array, jax.Array]
"""Cosines and sines of RoPE, [B, T, 1, H/2] each."""
Stack = Any
"""An array stacked over the layers, or a tuple of one array a layer (layers.unstack_cache)."""

EVERY_TOKEN = 1 << 30
"""The window of a layer that has none, among layers that have one."""

# The mesh's axes that cut the tokens of a layer's input.
TOKEN_AXES = ("sequence", "tensor")


# --- what goes in and out


@flax.struct.dataclass
class KVCache:
    """Keys and values of all tokens so far. Rows are left-padded, so all advance together.

    Each row holds one example. More tokens than there are slots left make their hidden states NaN,
    and those of all later ones. `k_LBKSH`, `v_LBKSH`: in the compute type; stacked, or after
    layers.unstack_cache a tuple of L arrays [B, K, S, H] each.
    """

    k_LBKSH: Stack
    v_LBKSH: Stack
    valid_BS: jax.Array
    """1 where a slot holds a real token, else 0; int32."""
    length: jax.Array
    """Slots in use, an int32 scalar; the next token goes into slot `length`."""
    is_empty: bool = flax.struct.field(pytree_node=False, default=False)
    """Known to hold no token yet, when it is compiled: a prefill need not read it."""


@flax.struct.dataclass
class SoftCapped:
    """An unembedding whose logits s become cap tanh(s / cap), as `unembed` makes them."""

    matrix_DV: jax.Array
    cap: float = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the matrix's shape: a property."""
        return self.matrix_DV.shape


Unembedding = jax.Array | SoftCapped
"""What makes logits of hidden states: a matrix [D, V], or one whose logits are capped."""


@flax.struct.dataclass
class LanguageOutput:
    """Hidden states of a language model, and the unembedding that makes logits of them.

    The caller decides what to make: `unembed` gives logits, objectives.likelihood.hidden_logprobs
    the log-probabilities of labels; of the positions that it needs alone, by slicing `x_BTD`.
    """

    x_BTD: jax.Array
    """Hidden states after the last norm, in the compute type; that of position t predicts token t
    + 1."""
    unembed_DV: Unembedding
    """The unembedding, or the embedding's transpose where they are tied."""
    cache: KVCache | None = None
    """The given cache with these tokens added; None where none was given."""
    auxiliary_loss: jax.Array | None = None
    """Sum of the layers' auxiliary losses per token, coefficients included, a float32 scalar; None
    without any."""


@flax.struct.dataclass
class ScalarOutput:
    """Scalars of a reward or value model, and the hidden states that they are read from."""

    scalars_BT: jax.Array
    """Float32: at each position the scalar of the tokens up to it and including it."""
    x_BTD: jax.Array
    """Hidden states after the last norm, in the compute type."""
    unembed_DV: Unembedding
    """The embedding's transpose: a language-model loss beside the scalars unembeds with it."""
    auxiliary_loss: jax.Array | None = None
    """As in LanguageOutput."""


class TurnsByWindow(NamedTuple):
    """Turns of layers that differ in them."""

    without_window: Turns
    with_window: Turns


Carry = tuple[jax.Array, KVCache | None, jax.Array]
"""From layer to layer: the residual stream [B, T, D], the cache, and the layer's number."""


def empty_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """Return an empty stacked cache for `batch` rows of at most `slots` tokens.

    Keys and values are stacks [L, B, K, S, H] of zeros in the compute type; B is `batch`, S is
    `slots`.
    """
    # Keys and values start as the same zeros: writing makes new arrays.
    shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
    zeros_LBKSH = jnp.zeros(shape, config.compute_dtype)
    return KVCache(
        k_LBKSH=zeros_LBKSH,
        v_LBKSH=zeros_LBKSH,
        valid_BS=jnp.zeros((batch, slots), jnp.int32),
        length=jnp.int32(0),
        is_empty=True,
    )


# --- RoPE


def rope_frequencies(config: ModelConfig) -> jax.Array:
    """Return the angle per position of each rotated pair, [H/2] float32, in radians.

    Here H is `config.rope_width`, a head's width or a share of it. Pair i has `rope_base`^(-2i /
    H) (Su et al. 2021), slowed by `rope_llama3` or `rope_yarn` if `config` has one, times its
    `rope_scale`.
    """
    # Pair i turns by base^(-2i / H) a position.
    width = config.rope_width
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    frequencies = config.rope_base**-exponents
    if config.rope_yarn is not None:
        return frequencies * _yarn_stretch(config, *config.rope_yarn) * config.rope_scale
    if config.rope_llama3 is None:
        return frequencies * config.rope_scale

    # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between
    # interpolated, by the full rotations that they make over the original context.
    factor, low, high, context = config.rope_llama3
    rotations = context * frequencies / (2 * jnp.pi)
    kept = jnp.clip((rotations - low) / (high - low), 0.0, 1.0)
    stretch = kept + (1 - kept) / factor
    return frequencies * stretch * config.rope_scale


def _yarn_stretch(
    config: ModelConfig, factor: float, fast: float, slow: float, context: float, _: float
) -> jax.Array:
    """Return what YaRN multiplies each pair's frequency by, [H/2] float32.

    Peng et al. 2023, "NTK-by-parts": pairs that turn often over the original context are kept,
    those that turn little are stretched by the factor, and between them, by the pair's number, it
    is interpolated.
    """

    # The pair, perhaps a fraction, that makes so many rotations over the original context.
    def pair_of(rotations: float) -> float:
        turns = math.log(context / (rotations * 2 * math.pi))
        return config.rope_width * turns / (2 * math.log(config.rope_base))

    # Whole pairs, as the published models were trained.
    first = max(math.floor(pair_of(fast)), 0)
    last = min(math.ceil(pair_of(slow)), config.rope_width - 1)
    pairs_H = jnp.arange(config.rope_width // 2, dtype=jnp.float32)
    stretched_H = jnp.clip((pairs_H - first) / max(last - first, 0.001), 0.0, 1.0)
    return 1 - stretched_H + stretched_H / factor


def rope_turns(config: ModelConfig, positions_BT: jax.Array) -> Turns:
    """Return (cosine, sine) of each pair's angle, float32, [B, T, 1, H/2] each, for all layers.

    `positions_BT`: int32. YaRN's are multiplied by its last number, which sharpens attention.
    """
    # One angle a pair, so H here is half of the part of a head that turns.
    positions_BT1 = positions_BT[..., None].astype(jnp.float32)
    angles_BTH = positions_BT1 * rope_frequencies(config)
    # One more axis, for the heads.
    cos = jnp.cos(angles_BTH)[:, :, None, :]
    sin = jnp.sin(angles_BTH)[:, :, None, :]
    if config.rope_yarn is not None:
        magnitude = config.rope_yarn[-1]
        return cos * magnitude, sin * magnitude
    return cos, sin


def local_turns(config: ModelConfig, positions_BT: jax.Array, base: float) -> Turns:
    """Return `rope_turns` by another base, `rope_local_base`, and without any scaling."""
    local = dataclasses.replace(
        config,
        rope_base=base,
        rope_scale=1.0,
        rope_llama3=None,
        rope_yarn=None,
    )
    return rope_turns(local, positions_BT)


def rotate(x_BTNH: jax.Array, turns: Turns) -> jax.Array:
    """Turn queries or keys by RoPE, half-split: dimension i turns with i + H/2.

    `x_BTNH`: [B, T, N or K, H]; its shape and type come back, computed in float32. `turns`: of
    `rope_turns`; where they are of fewer pairs than a head has, its last dimensions stay as they
    are. As in GPT-NeoX and Hugging Face's Llama. Weights whose convention turns 2i with 2i + 1
    (Meta's, llama2.c's) need their q and k permuted.
    """
    # In float32: in bfloat16 the angles of far positions would lose their last bits.
    cos, sin = turns
    half = cos.shape[-1]
    x32 = x_BTNH.astype(jnp.float32)
    first, second, rest = jnp.split(x32, [half, 2 * half], axis=-1)
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    turned = jnp.concatenate([turned_first, turned_second, rest], axis=-1)
    return turned.astype(x_BTNH.dtype)


# --- norms and weights


# Only x is kept for the backward pass: computing the norm again is cheaper.
@partial(jax.checkpoint, prevent_cse=False)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Divide `x` by its root mean square over the last axes, multiply it by `scale`, in float32.

    Zhang and Sennrich 2019. `scale`: an array of these axes, one factor for each place. `eps` is
    added to the mean square. Returns x's shape and type (float64 is computed in float32 too).
    """
    axes = tuple(range(-scale.ndim, 0))
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=axes, keepdims=True)
    normed = x32 * jax.lax.rsqrt(mean_square + eps) * scale
    return normed.astype(x.dtype)


# Only x is kept for the backward pass, as above.
@partial(jax.checkpoint, prevent_cse=False)
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Shift `x` to mean 0 and variance 1 over the last axes, scale it and add `bias`, in float32.

    Ba et al. 2016. `scale`, `bias`: arrays of these axes. `eps` is added to the variance. Returns
    x's shape and type.
    """
    axes = tuple(range(-scale.ndim, 0))
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=axes, keepdims=True)
    variance = jnp.mean(centered * centered, axis=axes, keepdims=True)
    normed = centered * jax.lax.rsqrt(variance + eps) * scale + bias
    return normed.astype(x.dtype)


def scaled_norm(module: nn.Module, name: str, x: jax.Array, axes: int = 1) -> jax.Array:
    """Apply a norm over the last `axes` of `x`, with the parameter `name` of `module` as scale.

    Call it inside a Flax `module` with a `config`, a ModelConfig, whose `norm_eps` is read; the
    parameter, float32, of those axes, is created there, and that of LayerNorm's bias. With
    `config.zero_centered_norm` it is the scale less 1; the scale starts at 1. Returns x's shape
    and type.
    """
    # Either way the scale starts at 1.
    config = module.config
    shape = x.shape[-axes:]
    if config.zero_centered_norm:
        scale = 1 + module.param(name, nn.initializers.zeros, shape)
    else:
        scale = module.param(name, nn.initializers.ones, shape)
    if config.norm == "layer":
        bias = module.param(f"{name}_bias", nn.initializers.zeros, shape)
        return layer_norm(x, scale, bias, config.norm_eps)
    return rms_norm(x, scale, config.norm_eps)


def linear(module: nn.Module, labels: str, x: jax.Array, name: str, w: jax.Array) -> jax.Array:
    """Multiply `x` by `w`, the weight `name` of `module`, by the einsum `labels`, in x's type.

    `labels`: as in "...D,DF->...F"; the last axes of `x` are summed over, the first of `w`, which
    is cast to x's type. Call it inside the Flax `module`. Where lora.with_adapters has laid A and
    B of the weight beside it, x A B is added (B holds the factor alpha / rank).
    """
    # The weight itself, then its adapters, where there are any.
    out = jnp.einsum(labels, x, w.astype(x.dtype))
    if module.has_variable("params", f"{name}_a"):
        a: jax.Array = module.get_variable("params", f"{name}_a")
        b: jax.Array = module.get_variable("params", f"{name}_b")
        # Over all inputs, then over the rank.
        inner = jnp.tensordot(x, a.astype(x.dtype), a.ndim - 1)
        out += jnp.tensordot(inner, b.astype(x.dtype), 1)
    return out


def plus_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Add a float32 `bias`, of the last axes of `x`, to `x`; return it in x's type.

    The sum is in float32: so the derivative, a sum over all tokens, is one of float32 too.
    """
    return (x + bias).astype(x.dtype)


def _normal(fan_in: int) -> Callable[..., jax.Array]:
    return nn.initializers.normal(fan_in**-0.5)


# --- a layer


class Attention(nn.Module):
    """Grouped-query self-attention with RoPE; `ring`: see Block."""

    config: ModelConfig
    ring: int = 1

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        segment_ids_BT: jax.Array,
        turns: Turns,
        cache: KVCache | None,
        layer: jax.Array,
        window: int | jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Return what the tokens see, [B, T, D], and the cache with their keys and values.

        `x_BTD`: normed residual stream, whose type comes back. `segment_ids_BT`: 0 is padding; not
        read with a cache in use. `turns`: of `rope_turns`. `cache`: stacked, or None, and then
        None comes back; its `length` and `valid_BS` stay. `layer`: the layer's number in the
        cache, from 0. `window`: see kernels.attention.attention.
        """
        # Weights; o, which adds to the residual stream, starts smaller, by the depth.
        c = self.config
        batch, length, _ = x_BTD.shape
        q_heads = (c.heads, c.head_dim)
        kv_heads = (c.kv_heads, c.head_dim)
        q_DNH = self.param("q", _normal(c.width), (c.width, *q_heads))
        k_DKH = self.param("k", _normal(c.width), (c.width, *kv_heads))
        v_DKH = self.param("v", _normal(c.width), (c.width, *kv_heads))
        o_fan_in = c.heads * c.head_dim * 2 * c.layers
        o_NHD = self.param("o", _normal(o_fan_in), (*q_heads, c.width))

        # Queries, keys and values of every token.
        x_MD = flat(x_BTD, *TOKEN_AXES)
        q_MNH = constrain_units(linear(self, "...D,DNH->...NH", x_MD, "q", q_DNH))
        k_MKH = constrain_units(linear(self, "...D,DKH->...KH", x_MD, "k", k_DKH))
        v_MKH = constrain_units(linear(self, "...D,DKH->...KH", x_MD, "v", v_DKH))

        # What some models add to them.
        if c.qkv_bias:
            zeros = nn.initializers.zeros
            q_MNH = plus_bias(q_MNH, self.param("q_bias", zeros, q_heads))
            k_MKH = plus_bias(k_MKH, self.param("k_bias", zeros, kv_heads))
            v_MKH = plus_bias(v_MKH, self.param("v_bias", zeros, kv_heads))
        if c.qk_norm and c.qk_norm_over == "heads":
            q_MNH = scaled_norm(self, "q_heads_norm", q_MNH, axes=2)
            k_MKH = scaled_norm(self, "k_heads_norm", k_MKH, axes=2)
        elif c.qk_norm:
            q_MNH = scaled_norm(self, "q_norm", q_MNH)
            k_MKH = scaled_norm(self, "k_norm", k_MKH)

        # One row a sequence again.
        q_BTNH = rotate(q_MNH.reshape(batch, length, *q_heads), turns)
        k_BTKH = rotate(k_MKH.reshape(batch, length, *kv_heads), turns)
        v_BTKH = v_MKH.reshape(batch, length, *kv_heads)

        # What the tokens attend to.
        scores: dict[str, Any] = {"window": window, "soft_cap": c.attention_soft_cap}
        if c.score_width is not None:
            scores["scale"] = c.score_width**-0.5
        if cache is not None:
            cache = _with_tokens(cache, layer, k_BTKH, v_BTKH)
        if cache is not None and not cache.is_empty:
            # New tokens against the cache, themselves among it.
            k_BKSH = jax.lax.dynamic_index_in_dim(cache.k_LBKSH, layer, keepdims=False)
            v_BKSH = jax.lax.dynamic_index_in_dim(cache.v_LBKSH, layer, keepdims=False)
            out_BTNH = decode_attention(
                q_BTNH, k_BKSH, v_BKSH, cache.valid_BS, cache.length, **scores
            )
        else:
            # Training, or prefill of an empty cache: the tokens see one another only. That is
            # faster than to read all slots.
            # Padding has embeddings like any token, and so finite numbers.
            out_BTNH = attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                segment_ids=segment_ids_BT,
                ring=self.ring,
                finite_padding=True,
                **scores,
            )

        # Back to the width of the residual stream.
        out_MNH = flat(out_BTNH, *TOKEN_AXES)
        out_MD = linear(self, "...NH,NHD->...D", out_MNH, "o", o_NHD)
        if c.o_bias:
            out_MD = plus_bias(out_MD, self.param("o_bias", nn.initializers.zeros, (c.width,)))
        return out_MD.reshape(x_BTD.shape), cache


def _with_tokens(
    cache: KVCache, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
) -> KVCache:
    """Write keys and values of a layer into the next slots of a stacked cache."""
    # All heads of this layer, from the first free slot on.
    start = (layer, 0, 0, cache.length, 0)
    k_1BKTH = k_BTKH.swapaxes(1, 2)[None]
    v_1BKTH = v_BTKH.swapaxes(1, 2)[None]
    k_LBKSH = jax.lax.dynamic_update_slice(cache.k_LBKSH, k_1BKTH, start)
    v_LBKSH = jax.lax.dynamic_update_slice(cache.v_LBKSH, v_1BKTH, start)
    return dataclasses.replace(cache, k_LBKSH=k_LBKSH, v_LBKSH=v_LBKSH)


def activation_of(config: ModelConfig) -> Callable[[jax.Array], jax.Array]:
    """Return the activation of feed-forward layers."""
    # The tanh approximation is Gemma's, up to 5e-4 from the exact one.
    activations: dict[str, Callable[[jax.Array], jax.Array]] = {
        "silu": nn.silu,
        "gelu": nn.gelu,
        "gelu_erf": partial(nn.gelu, approximate=False),
    }
    return activations[config.activation]


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020); with config.activation gelu it is his GEGLU."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return down(activation(gate(x)) * up(x)), [B, T, D], in x's type."""
        # Weights of the two branches, and of the way back; the last starts smaller, by the depth.
        c = self.config
        in_shape = (c.width, c.mlp_width)
        gate_DF = self.param("gate", _normal(c.width), in_shape)
        up_DF = self.param("up", _normal(c.width), in_shape)
        down_fan_in = c.mlp_width * 2 * c.layers
        down_FD = self.param("down", _normal(down_fan_in), (c.mlp_width, c.width))
        activation = activation_of(c)

        # Only gate and up are kept for the backward pass.
        @partial(jax.checkpoint, prevent_cse=False)
        def gated(gate_MF, up_MF):
            return activation(gate_MF) * up_MF

        # Each token by itself.
        x_MD = flat(x_BTD, *TOKEN_AXES)
        gate_MF = constrain_units(linear(self, "...D,DF->...F", x_MD, "gate", gate_DF))
        up_MF = constrain_units(linear(self, "...D,DF->...F", x_MD, "up", up_DF))
        if c.mlp_bias:
            zeros = nn.initializers.zeros
            gate_MF = plus_bias(gate_MF, self.param("gate_bias", zeros, (c.mlp_width,)))
            up_MF = plus_bias(up_MF, self.param("up_bias", zeros, (c.mlp_width,)))
        hidden_MF = gated(gate_MF, up_MF)
        out_MD = linear(self, "...F,FD->...D", hidden_MF, "down", down_FD)
        if c.mlp_bias:
            out_MD = plus_bias(out_MD, self.param("down_bias", zeros, (c.width,)))
        return out_MD.reshape(x_BTD.shape)


class MLP(nn.Module):
    """Feed-forward layer without a gate, as in GPT-NeoX."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return down(activation(up(x))), [B, T, D], in x's type."""
        # Weights as in SwiGLU.
        c = self.config
        zeros = nn.initializers.zeros
        up_DF = self.param("up", _normal(c.width), (c.width, c.mlp_width))
        down_fan_in = c.mlp_width * 2 * c.layers
        down_FD = self.param("down", _normal(down_fan_in), (c.mlp_width, c.width))

        # Each token by itself.
        x_MD = flat(x_BTD, *TOKEN_AXES)
        up_MF = constrain_units(linear(self, "...D,DF->...F", x_MD, "up", up_DF))
        if c.mlp_bias:
            up_MF = plus_bias(up_MF, self.param("up_bias", zeros, (c.mlp_width,)))
        hidden_MF = activation_of(c)(up_MF)
        out_MD = linear(self, "...F,FD->...D", hidden_MF, "down", down_FD)
        if c.mlp_bias:
            out_MD = plus_bias(out_MD, self.param("down_bias", zeros, (c.width,)))
        return out_MD.reshape(x_BTD.shape)


class MixtureOfExperts(nn.Module):
    """Feed-forward layer of E experts, of which each token uses a few (Shazeer et al. 2017).

    No token is dropped, whatever the load (MegaBlocks: Gale et al. 2023). On a mesh each device
    routes the tokens of its own rows, and multiplies those that its own experts take.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return the experts' weighted sum, [B, T, D] in x's type, and the balancing loss.

        The loss is a float32 scalar, coefficient included, or None where that is 0.
        """
        # Weights of the router, and of all experts, as SwiGLU's.
        c = self.config
        in_shape = (c.experts, c.width, c.mlp_width)
        out_shape = (c.experts, c.mlp_width, c.width)
        down_fan_in = c.mlp_width * 2 * c.layers
        router_DE = self.param("router", _normal(c.width), (c.width, c.experts))
        gate_EDF = self.param("expert_gate", _normal(c.width), in_shape)
        up_EDF = self.param("expert_up", _normal(c.width), in_shape)
        down_EFD = self.param("expert_down", _normal(down_fan_in), out_shape)

        # Experts are gathered over fsdp in the type in which they multiply.
        experts = tuple(weight.astype(x_BTD.dtype) for weight in (gate_EDF, up_EDF, down_EFD))
        feed = partial(feed_experts, config=c)
        out_BTD, loads_E, shares_E = by_rows_and_experts(feed, x_BTD, router_DE, experts)
        if not c.router_loss_coef:
            return out_BTD, None

        # Fedus et al. 2021 (Switch), eq. 4: load times mean share, of which the share alone has a
        # derivative. Tokens of padding count too.
        load_E = loads_E.mean(axis=0)
        share_E = shares_E.mean(axis=0)
        loss = c.experts * jnp.sum(load_E * share_E)
        return out_BTD, c.router_loss_coef * loss / c.layers


def feed_experts(
    x_BTD: jax.Array,
    router_DE: jax.Array,
    experts: tuple[jax.Array, ...],
    first: int | jax.Array,
    total: Callable[[jax.Array], jax.Array],
    *,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Route tokens to experts; return their weighted sum, the experts' load and mean share.

    `router_DE`: float32, of all experts. `experts`: gate, up and down, as in MixtureOfExperts, of
    those from number `first` on, in x's type. `total`: sums arrays over those who have the others.
    Returns [B, T, D] in x's type, and two float32 arrays [1, E] over all tokens: how many
    choices a token fell on each expert, and the router's mean probability of it. Here M counts
    tokens, C the choices of each, config.experts_per_token, and A the choices of all.
    """
    # The experts of each token, in float32: their order depends on small differences.
    x_MD = x_BTD.reshape(-1, config.width)
    logits_ME = jnp.einsum("MD,DE->ME", x_MD.astype(jnp.float32), router_DE, precision="highest")
    shares_ME = jax.nn.softmax(logits_ME, axis=-1)
    chosen_MC, experts_MC = jax.lax.top_k(shares_ME, config.experts_per_token)
    if config.router_norm:
        chosen_MC /= chosen_MC.sum(axis=-1, keepdims=True)

    # The choices in the order of the experts from `first` on, and last those of others: so each
    # expert here has an unbroken run of rows. Tokens are repeated first: no sum, here or in the
    # derivative, then depends on the order of a scatter.
    gate_EDF, up_EDF, down_EFD = experts
    experts_here = gate_EDF.shape[0]
    experts_A = experts_MC.reshape(-1)
    order_A = jnp.argsort((experts_A - first) % config.experts)
    load_E = jnp.bincount(experts_A, length=config.experts).astype(jnp.int32)
    runs_E = jax.lax.dynamic_slice_in_dim(load_E, first, experts_here)
    repeated_AD = jnp.repeat(x_MD, config.experts_per_token, axis=0)
    x_AD = repeated_AD.at[order_A].get(unique_indices=True)

    # Of rows behind the runs a ragged product may hold anything, in its derivative too.
    is_here_A1 = (jnp.arange(len(order_A)) < runs_E.sum())[:, None]
    x_AD = jnp.where(is_here_A1, x_AD, 0)

    # SwiGLU of each run of rows by its expert.
    gate_AF = jax.lax.ragged_dot(x_AD, gate_EDF, runs_E)
    up_AF = jax.lax.ragged_dot(x_AD, up_EDF, runs_E)
    hidden_AF = activation_of(config)(gate_AF) * up_AF
    out_AD = jax.lax.ragged_dot(hidden_AF, down_EFD, runs_E)
    out_AD = jnp.where(is_here_A1, out_AD, 0)

    # Back in the order of the tokens, whose sums are in float32.
    back_A = jnp.argsort(order_A)
    out_MCD = out_AD.at[back_A].get(unique_indices=True).reshape(*experts_MC.shape, -1)
    out_MCD = out_MCD.astype(jnp.float32)
    sum_MD = total(jnp.einsum("MCD,MC->MD", out_MCD, chosen_MC, precision="highest"))
    out_BTD = sum_MD.astype(x_BTD.dtype).reshape(x_BTD.shape)
    load_share_E = load_E / x_MD.shape[0]
    return out_BTD, load_share_E[None], shares_ME.mean(axis=0)[None]


class Block(nn.Module):
    """One layer. layers.py runs it; the carry is its input and its output.

    `ring`: devices over which the tokens are striped (kernels/ring.py); segment ids are not.
    """

    config: ModelConfig
    ring: int = 1

    @nn.compact
    def __call__(
        self,
        carry: Carry,
        segment_ids_BT: jax.Array,
        turns: Turns | TurnsByWindow,
        has_window: jax.Array | None = None,
    ) -> tuple[Carry, jax.Array | None]:
        """Return (residual stream, cache, number of the next layer), and its auxiliary loss.

        `carry`: (residual stream [B, T, D], cache or None, this layer's number, from 0). `turns`:
        of `rope_turns`. `has_window`: this layer's, a bool, where layers differ in that; None: all
        have config.window. The loss is a mixture of experts', of which each token's mean is meant:
        a float32 scalar, coefficient included; others have None.
        """
        # Tokens see tokens before them.
        c = self.config
        x_BTD, cache, layer = carry
        window: int | jax.Array | None = c.window
        if window is not None and has_window is not None:
            window = jnp.where(has_window, window, EVERY_TOKEN)
        if isinstance(turns, TurnsByWindow):
            choose = partial(jnp.where, has_window)
            own_turns: Turns = jax.tree.map(choose, turns.with_window, turns.without_window)
        else:
            own_turns = turns
        input_BTD = self.normed("attention_norm", x_BTD, c.norms != "after")
        attention_layer = Attention(c, self.ring, name="attention")
        attended_BTD, cache = attention_layer(
            input_BTD, segment_ids_BT, own_turns, cache, layer, window
        )
        attended_BTD = self.normed("attention_out_norm", attended_BTD, c.norms != "before")
        layer_input_BTD = x_BTD
        x_BTD = constrain_residual(x_BTD + attended_BTD)

        # Each token by itself.
        read_BTD = layer_input_BTD if c.parallel_residual else x_BTD
        input_BTD = self.normed("mlp_norm", read_BTD, c.norms != "after")
        loss = None
        if c.experts:
            fed_BTD, loss = MixtureOfExperts(c, name="mlp")(input_BTD)
        else:
            mlp_layer = SwiGLU(c, name="mlp") if c.gated else MLP(c, name="mlp")
            fed_BTD = mlp_layer(input_BTD)
        out_BTD = self.normed("mlp_out_norm", fed_BTD, c.norms != "before")
        x_BTD = constrain_residual(x_BTD + out_BTD)
        return (x_BTD, cache, layer + 1), loss

    def normed(self, name: str, x_BTD: jax.Array, is_there: bool) -> jax.Array:
        """Return `x_BTD` after the norm `name`, where that `is_there`, or else as it is."""
        return scaled_norm(self, name, x_BTD) if is_there else x_BTD


# --- the decoder and its heads


def _with_valid(cache: KVCache, segment_ids_BT: jax.Array) -> KVCache:
    """Note in `cache` which of its next slots will hold a real token; ValueError for too many."""
    length = segment_ids_BT.shape[1]
    slots = cache.valid_BS.shape[1]
    if length > slots:
        raise ValueError(f"{length} tokens for a cache of {slots} slots: make a longer one")
    real_BT = (segment_ids_BT > 0).astype(jnp.int32)
    valid_BS = jax.lax.dynamic_update_slice(cache.valid_BS, real_BT, (0, cache.length))
    return dataclasses.replace(cache, valid_BS=valid_BS)


# A rule of its own for the derivative: a frequent token's gradient is a sum of thousands of terms,
# which in bfloat16 stops growing at a few hundred.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embedded(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the tokens' rows of the embedding, [B, T, D], in `dtype`, not scaled.

    `tokens_BT`: ids, int. The gradient, in reverse mode alone, has the embedding's own type
    (float32 of a model's parameters), in which it is summed, whatever `dtype` is.
    """
    # In whole rows on every device: else XLA replicates the result. Gathered in `dtype`, of which
    # bfloat16 is half as much.
    rows_VD = constrain_rows(embed_VD.astype(dtype))
    return rows_VD[tokens_BT]


def _embedded_forward(embed_VD, tokens_BT, dtype):
    return embedded(embed_VD, tokens_BT, dtype), (embed_VD, tokens_BT)


def _embedded_backward(dtype, saved, cotangent_BTD):
    embed_VD, tokens_BT = saved

    def rows(embed_VD: jax.Array) -> jax.Array:
        return constrain_rows(embed_VD)[tokens_BT]

    # The same lookup in the embedding's own type, transposed.
    (gradient_VD,) = jax.linear_transpose(rows, embed_VD)(cotangent_BTD.astype(embed_VD.dtype))
    # Tokens have no derivative.
    return gradient_VD, None


embedded.defvjp(_embedded_forward, _embedded_backward)


def _own(config: ModelConfig) -> tuple[np.ndarray, ...]:
    """Return what each layer has for itself: if it has the window, where that makes layers differ.

    They differ where some lack the window that the config has, perhaps all that are run (the first
    few of a model), and where RoPE is another in it.
    """
    has_window_L = np.array(config.windowed_layers)
    differ = not has_window_L.all() or config.rope_local_base is not None
    return (has_window_L,) if config.window is not None and differ else ()


class Decoder(nn.Module):
    """Embedding, layers, final norm. `microbatches`: of a pipeline, if the mesh has stages."""

    config: ModelConfig
    microbatches: int = 1

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, jax.Array, KVCache | None, jax.Array | None]:
        """Return hidden states [B, T, D], the embedding [V, D], the cache, and the auxiliary loss.

        All arguments [B, T] are int32. `segment_ids_BT`: 0 is padding, 1, 2, ... the examples
        packed into a row, which do not see one another (with a cache a row is one example); or
        kernels.layouts.SharedRows. `positions_BT`: from 0 in each example. A cache takes one token
        a row or several, empty or in use: they see what is in it, and one another as in training.
        Without a cache, and without losses of the layers, None comes back. Raises ValueError for
        more tokens than the cache has slots.
        """
        c = self.config
        length = tokens_BT.shape[1]
        embed_VD = self.param("embed", _normal(c.width), (c.vocab, c.width))

        # Over a sequence axis the tokens are dealt to a ring of devices.
        ring = turns_of(length) if cache is None else 1
        if ring > 1:
            tokens_BT = striped(tokens_BT, ring)
            positions_BT = striped(positions_BT, ring)

        # The lookup. Only then are tokens cut over tensor: in the lookup the vocabulary is.
        x_BTD = embedded(embed_VD, tokens_BT, c.compute_dtype)
        x_BTD = constrain_tokens(x_BTD, "sequence")
        x_BTD = constrain_residual(x_BTD)
        if c.scale_embedding:
            x_BTD *= jnp.asarray(c.width**0.5, x_BTD.dtype)

        # The layers. A cache first learns which of its new slots hold a real token.
        own = _own(c)
        turns: Turns | TurnsByWindow = rope_turns(c, positions_BT)
        if own and c.rope_local_base is not None:
            local = local_turns(c, positions_BT, c.rope_local_base)
            turns = TurnsByWindow(rope_turns(c, positions_BT), local)
        if cache is not None:
            cache = _with_valid(cache, segment_ids_BT)
        x_BTD, cache, auxiliary_loss = run_layers(
            self, Block, ring, x_BTD, cache, (segment_ids_BT, turns), own
        )
        if cache is not None:
            used = cache.length + length
            # Beyond the last slot nothing is known of the tokens, and nothing is made up.
            x_BTD = jnp.where(used > cache.valid_BS.shape[1], jnp.nan, x_BTD)
            cache = dataclasses.replace(cache, length=used, is_empty=False)

        # The tokens in their own order again.
        if ring > 1:
            x_BTD = unstriped(x_BTD, ring)
        # A pipeline's result lies on every stage: each unembeds its part of the tokens.
        if along(jax.sharding.get_abstract_mesh(), "stage") > 1:
            x_BTD = constrain_tokens(x_BTD, "sequence", "stage")
        return scaled_norm(self, "final_norm", x_BTD), embed_VD, cache, auxiliary_loss


# A rule of its own for the derivative, whose two products then take x's type as all others do.
@jax.custom_vjp
def unrounded_logits(x_MD: jax.Array, unembed_DV: jax.Array) -> jax.Array:
    """Return x times the unembedding, [..., V], in float32, or in float64 where both are.

    `x_MD`, [M, D] or [B, T, D], and `unembed_DV`: of one type, to which the product is not
    rounded. Gradients, in reverse mode alone, are computed in it.
    """
    dtype = jnp.promote_types(x_MD.dtype, jnp.float32)
    return jnp.einsum("...D,DV->...V", x_MD, unembed_DV, preferred_element_type=dtype)


def _logits_forward(x_MD, unembed_DV):
    return unrounded_logits(x_MD, unembed_DV), (x_MD, unembed_DV)


def _logits_backward(saved, cotangent_MV):
    # The product is not computed again: its derivative does not need it.
    product = partial(jnp.einsum, "...D,DV->...V")
    _, transposed = jax.vjp(product, *saved)
    return transposed(cotangent_MV.astype(saved[0].dtype))


unrounded_logits.defvjp(_logits_forward, _logits_backward)


def with_soft_cap(config: ModelConfig, unembed_DV: jax.Array) -> Unembedding:
    """Return the unembedding of a model whose logits may have a soft cap."""
    if config.logit_soft_cap is None:
        return unembed_DV
    return SoftCapped(unembed_DV, config.logit_soft_cap)


def unembed(x_BTD: jax.Array, unembed_DV: Unembedding) -> jax.Array:
    """Return the logits [B, T, V] of hidden states: float32, or float64 where these are.

    `x_BTD` and `unembed_DV`: of a LanguageOutput, or a slice of its positions; the second is cast
    to x's type. V is `config.vocab`, ids beyond the tokenizer's included. Logits are not rounded
    to x's type on the way: at 16 that would be by 0.06.
    """
    x_MD = flat(x_BTD, "stage", "sequence")
    if isinstance(unembed_DV, SoftCapped):
        logits_MV = unrounded_logits(x_MD, unembed_DV.matrix_DV.astype(x_MD.dtype))
        logits_MV = unembed_DV.cap * jnp.tanh(logits_MV / unembed_DV.cap)
    else:
        logits_MV = unrounded_logits(x_MD, unembed_DV.astype(x_MD.dtype))
    batch, length, _ = x_BTD.shape
    return logits_MV.reshape(batch, length, -1)


class LanguageModel(nn.Module):
    """A decoder that predicts the next token. `microbatches`: see Decoder."""

    config: ModelConfig
    microbatches: int = 1

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        cache: KVCache | None = None,
    ) -> LanguageOutput:
        """Return a LanguageOutput: hidden states and the unembedding. Arguments: see Decoder."""
        c = self.config
        decoder = Decoder(c, self.microbatches, name="decoder")
        x_BTD, embed_VD, cache, auxiliary_loss = decoder(
            tokens_BT, segment_ids_BT, positions_BT, cache
        )
        # One matrix for both where they are tied.
        if c.tied:
            unembed_DV = embed_VD.T
        else:
            unembed_DV = self.param("unembed", _normal(c.width), (c.width, c.vocab))
        return LanguageOutput(x_BTD, with_soft_cap(c, unembed_DV), cache, auxiliary_loss)


class ScalarModel(nn.Module):
    """A decoder with a scalar a token: rewards are read at the last token, values at each."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array
    ) -> ScalarOutput:
        """Return a ScalarOutput: the scalars and the hidden states. Arguments: see Decoder."""
        c = self.config
        decoder = Decoder(c, name="decoder")
        x_BTD, embed_VD, _, auxiliary_loss = decoder(tokens_BT, segment_ids_BT, positions_BT)

        # The head, in float32: rewards are compared, and differ by little.
        # N(0, 1/sqrt(D + 1)): Stiennon et al. 2020 and the "N+ details" reproduction of it.
        head_init = nn.initializers.normal((c.width + 1) ** -0.5)
        head_D = self.param("head", head_init, (c.width,))
        bias = self.param("bias", nn.initializers.zeros, ())
        x32_BTD = x_BTD.astype(jnp.float32)
        # Accelerators would round its factors to half of float32's bits.
        products_BT = jnp.einsum("BTD,D->BT", x32_BTD, head_D, precision="highest")
        scalars_BT = products_BT + bias
        unembed_DV = with_soft_cap(c, embed_VD.T)
        return ScalarOutput(scalars_BT, x_BTD, unembed_DV, auxiliary_loss)


def init_and_apply(model: nn.Module) -> tuple[Callable[[jax.Array], Params], Callable[..., Any]]:
    """Return (init, apply) of `model` on plain nested dicts of parameters (Params), not jitted.

    `model`: a LanguageModel or a ScalarModel. init(key) -> params, random, float32. apply(params,
    tokens_BT, segment_ids_BT, positions_BT) -> LanguageOutput or ScalarOutput, arguments int32 [B,
    T] as Decoder.__call__ says. That of a LanguageModel takes a KVCache as a fifth argument,
    `cache` (default None); the output's `cache` is then the new one.
    """
    # In NumPy, not on a device: plan.py has none.
    token_11 = np.ones((1, 1), np.int32)

    def init(key: jax.Array) -> Params:
        return model.init(key, token_11, token_11, token_11)["params"]

    def apply(params: Params, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, **kwargs)

    return init, apply
