"""The decoder (ALiBi, RMSNorm, SwiGLU, grouped-query attention) and its heads: next token, scalar.

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
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import seen_slots, slot_distances, softmax_where
from kernels.layouts import SharedRows
from kernels.masks import mask_of, visible_ranges
from kernels.ring import striped, turns_of, unstriped
from layers import run_layers
from model_config import ModelConfig
from runtime.errors import require
from sharding import (
    along,
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
Stack = Any
"""An array stacked over the layers, or a tuple of one array a layer (layers.unstack_cache)."""

# The mesh's axes that cut the tokens of a layer's input.
TOKEN_AXES = ("sequence", "tensor")


# --- what goes in and out


@flax.struct.dataclass
class KVCache:
    """Keys and values of all tokens so far. Rows are left-padded, so all advance together.

    Each row holds one example. A cache that is too short for the tokens it is given makes their
    hidden states NaN, and those of all later ones.
    """

    k_LBKSH: Stack
    v_LBKSH: Stack
    valid_BS: jax.Array
    """1 where a slot holds a real token."""
    length: jax.Array
    """Slots in use; the next token goes here."""
    is_empty: bool = flax.struct.field(pytree_node=False, default=False)
    """Known to hold no token yet, when it is compiled: a prefill need not read it."""


@flax.struct.dataclass
class LanguageOutput:
    """Hidden states of a language model, and the unembedding that makes logits of them.

    The caller decides what to make: `unembed` gives logits, objectives.likelihood.hidden_logprobs
    the log-probabilities of labels; of the positions that it needs alone, by slicing `x_BTD`.
    """

    x_BTD: jax.Array
    """Hidden states after the last norm; that of position t predicts token t + 1."""
    unembed_DV: jax.Array
    """The unembedding, or the embedding's transpose where they are tied."""
    cache: KVCache | None = None
    """The given cache with these tokens added; None without one."""
    auxiliary_loss: jax.Array | None = None
    """Sum of the layers' auxiliary losses, a token, coefficients included; None without any."""


@flax.struct.dataclass
class ScalarOutput:
    """Scalars of a reward or value model, and the hidden states that they are read from."""

    scalars_BT: jax.Array
    """Float32: at each position the scalar of the tokens up to it and including it."""
    x_BTD: jax.Array
    """Hidden states after the last norm."""
    unembed_DV: jax.Array
    """The embedding's transpose: a language-model loss beside the scalars unembeds with it."""
    auxiliary_loss: jax.Array | None = None
    """As of LanguageOutput."""


Carry = tuple[jax.Array, KVCache | None, jax.Array]
"""From layer to layer: the residual stream [B, T, D], the cache, and the layer's number."""


def empty_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """Return an empty cache for `batch` rows of at most `slots` tokens, in the compute type.

    Keys and values are stacks [L, B, K, S, H]; B is `batch`, S is `slots`.
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


# --- norms and weights


# Only x is kept for the backward pass: computing the norm again is cheaper.
@partial(jax.checkpoint, prevent_cse=False)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Divide `x` by its root mean square over the last axis and scale it, in float32.

    Zhang and Sennrich 2019. `scale`: one factor for each place of that axis. `eps` is added to the
    mean square. Returns x's shape and type.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(mean_square + eps) * scale
    return normed.astype(x.dtype)


def scaled_norm(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """Apply RMSNorm to the last axis of `x` with the parameter `name` of `module` as its scale.

    With `module.config.zero_centered_norm` the parameter is the scale less 1.
    """
    # Either way the scale starts at 1.
    config = module.config
    shape = x.shape[-1:]
    if config.zero_centered_norm:
        scale = 1 + module.param(name, nn.initializers.zeros, shape)
    else:
        scale = module.param(name, nn.initializers.ones, shape)
    return rms_norm(x, scale, config.norm_eps)


def linear(module: nn.Module, labels: str, x: jax.Array, name: str, w: jax.Array) -> jax.Array:
    """Multiply `x` by the weight `w` of `module`, by the einsum `labels`, in x's type.

    `labels`: as in "...D,DF->...F". Where lora.py has laid adapters A and B of the weight `name`
    beside it, x A B is added.
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
    """Add a float32 `bias` to `x`, in x's type.

    In float32: so the derivative, a sum over all tokens, is one of float32 too.
    """
    return (x + bias).astype(x.dtype)


def _normal(fan_in: int) -> Callable[..., jax.Array]:
    return nn.initializers.normal(fan_in**-0.5)


# --- a layer


def alibi_slopes(heads: int) -> jax.Array:
    """Return the slope of each head, [N] float32: 2^(-8 n / N) for n = 1 .. N (Press et al.)."""
    return 2.0 ** (-8.0 * jnp.arange(1, heads + 1, dtype=jnp.float32) / heads)


def alibi_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | SharedRows,
    positions_BT: jax.Array,
    *,
    window: int | None,
    ring: int,
) -> jax.Array:
    """Attend to earlier tokens of the segment, each score less slope x distance; [B, T, N, H].

    Distances are those of `positions_BT`. Raises UserError under --mesh.sequence: this fork has
    no ring.
    """
    if isinstance(segment_ids_BT, SharedRows):
        # Tokens in slots are laid out in rows, and what these see goes back.
        shared = segment_ids_BT
        out_BTNH = alibi_attention(
            shared.rows(q_BTNH),
            shared.rows(k_BTKH),
            shared.rows(v_BTKH),
            shared.segment_ids_BT,
            shared.rows(positions_BT),
            window=window,
            ring=ring,
        )
        return shared.slots(out_BTNH)

    require(ring == 1, "--mesh.sequence: experiments/alibi has no ring attention; leave it out")
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, -1, width)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32
    )

    # The bias: nothing for the token itself, slope less for each token further back.
    distance_BTS = positions_BT[:, :, None] - positions_BT[:, None, :]
    slopes_KG = alibi_slopes(heads).reshape(kv_heads, -1)
    bias_BKGTS = -slopes_KG[:, :, None, None] * distance_BTS[:, None, None]

    keys, _ = visible_ranges(batch, length, segment_ids_BT, True, window)
    mask_BTS = mask_of(keys)
    scores_BKGTS = scores_BKGTS * width**-0.5 + bias_BKGTS
    weights_BKGTS = softmax_where(mask_BTS[:, None, None], scores_BKGTS, 1.0, None)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BTKH.dtype), v_BTKH)
    return out_BTKGH.reshape(q_BTNH.shape)


def alibi_decode_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    valid_BS: jax.Array,
    at: jax.Array,
    *,
    window: int | None,
) -> jax.Array:
    """Attend from T new tokens a row, in the slots from `at` on, to the cache; [B, T, N, H].

    Slots are a ring and rows are left-padded, so distances of slots are those of tokens.
    """
    batch, length, heads, width = q_BTNH.shape
    kv_heads, slots = k_BKSH.shape[1:3]
    distance_TS = slot_distances(length, slots, at)
    mask_BTS = seen_slots(valid_BS, length, at, window)
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, -1, width)
    scores_BKTGS = jnp.einsum(
        "BTKGH,BKSH->BKTGS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32
    )
    slopes_KG = alibi_slopes(heads).reshape(kv_heads, -1)
    bias_KTGS = slopes_KG[:, None, :, None] * distance_TS[:, None]
    scores_BKTGS = scores_BKTGS * width**-0.5 - bias_KTGS
    mask_BKTGS = mask_BTS[:, None, :, None]
    weights_BKTGS = softmax_where(mask_BKTGS, scores_BKTGS, 1.0, None)
    weights_BKTGS = weights_BKTGS.astype(v_BKSH.dtype)
    out_BTKGH = jnp.einsum("BKTGS,BKSH->BTKGH", weights_BKTGS, v_BKSH)
    return out_BTKGH.reshape(q_BTNH.shape)


class Attention(nn.Module):
    """Grouped-query self-attention with linear biases (ALiBi)."""

    config: ModelConfig
    ring: int = 1

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        cache: KVCache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache | None]:
        """Return what the tokens see, [B, T, D], and the cache with their keys and values."""
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
        if c.qk_norm:
            q_MNH = scaled_norm(self, "q_norm", q_MNH)
            k_MKH = scaled_norm(self, "k_norm", k_MKH)

        # One row a sequence again.
        q_BTNH = q_MNH.reshape(batch, length, *q_heads)
        k_BTKH = k_MKH.reshape(batch, length, *kv_heads)
        v_BTKH = v_MKH.reshape(batch, length, *kv_heads)

        # What the tokens attend to.
        if cache is not None:
            cache = _with_tokens(cache, layer, k_BTKH, v_BTKH)
        if cache is not None and not cache.is_empty:
            # New tokens against the cache, themselves among it.
            k_BKSH = jax.lax.dynamic_index_in_dim(cache.k_LBKSH, layer, keepdims=False)
            v_BKSH = jax.lax.dynamic_index_in_dim(cache.v_LBKSH, layer, keepdims=False)
            out_BTNH = alibi_decode_attention(
                q_BTNH, k_BKSH, v_BKSH, cache.valid_BS, cache.length, window=c.window
            )
        else:
            # Training, or prefill of an empty cache: the tokens see one another only. That is
            # faster than to read all slots.
            out_BTNH = alibi_attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                segment_ids_BT,
                positions_BT,
                window=c.window,
                ring=self.ring,
            )

        # Back to the width of the residual stream.
        out_MNH = flat(out_BTNH, *TOKEN_AXES)
        out_MD = linear(self, "...NH,NHD->...D", out_MNH, "o", o_NHD)
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


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020); with config.activation gelu it is his GEGLU."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return down(activation(gate(x)) * up(x)), [B, T, D]."""
        # Weights of the two branches, and of the way back; the last starts smaller, by the depth.
        c = self.config
        in_shape = (c.width, c.mlp_width)
        gate_DF = self.param("gate", _normal(c.width), in_shape)
        up_DF = self.param("up", _normal(c.width), in_shape)
        down_fan_in = c.mlp_width * 2 * c.layers
        down_FD = self.param("down", _normal(down_fan_in), (c.mlp_width, c.width))
        # The tanh approximation is Gemma's, up to 5e-4 from the exact one.
        activation = {
            "silu": nn.silu,
            "gelu": nn.gelu,
            "gelu_erf": partial(nn.gelu, approximate=False),
        }[c.activation]

        # Only gate and up are kept for the backward pass.
        @partial(jax.checkpoint, prevent_cse=False)
        def gated(gate_MF, up_MF):
            return activation(gate_MF) * up_MF

        # Each token by itself.
        x_MD = flat(x_BTD, *TOKEN_AXES)
        gate_MF = constrain_units(linear(self, "...D,DF->...F", x_MD, "gate", gate_DF))
        up_MF = constrain_units(linear(self, "...D,DF->...F", x_MD, "up", up_DF))
        hidden_MF = gated(gate_MF, up_MF)
        out_MD = linear(self, "...F,FD->...D", hidden_MF, "down", down_FD)
        return out_MD.reshape(x_BTD.shape)


class Block(nn.Module):
    """One pre-norm layer. layers.py runs it; the carry is its input and its output.

    `ring`: devices over which the tokens are striped (kernels/ring.py); segment ids are not.
    """

    config: ModelConfig
    ring: int = 1

    @nn.compact
    def __call__(
        self,
        carry: Carry,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
    ) -> tuple[Carry, jax.Array | None]:
        """Return (residual stream, cache, number of the next layer), and its auxiliary loss.

        This layer has no such loss: a mixture of experts returns its load-balancing loss in place
        of None, a float32 scalar, coefficient included.
        """
        # Tokens see tokens before them.
        x_BTD, cache, layer = carry
        normed_BTD = scaled_norm(self, "attention_norm", x_BTD)
        attention_layer = Attention(self.config, self.ring, name="attention")
        attended_BTD, cache = attention_layer(
            normed_BTD, segment_ids_BT, positions_BT, cache, layer
        )
        x_BTD = constrain_residual(x_BTD + attended_BTD)

        # Each token by itself.
        normed_BTD = scaled_norm(self, "mlp_norm", x_BTD)
        mlp_layer = SwiGLU(self.config, name="mlp")
        x_BTD = constrain_residual(x_BTD + mlp_layer(normed_BTD))
        return (x_BTD, cache, layer + 1), None


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
    """Return the tokens' rows of the embedding, [B, T, D], in `dtype`.

    Its gradient is summed in float32, whatever `dtype` is.
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


NOT_HERE = (
    "norm",
    "norms",
    "qk_norm_over",
    "o_bias",
    "mlp_bias",
    "gated",
    "parallel_residual",
    "window_pattern",
    "score_width",
    "attention_soft_cap",
    "logit_soft_cap",
    "experts",
    "experts_per_token",
    "router_norm",
    "router_loss_coef",
)
"""Fields of ModelConfig that this fork does not have, besides RoPE's."""


def _refuse_what_is_not_here(config: ModelConfig) -> None:
    """Raise UserError for a value that this fork would pass over."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_served = field.name not in NOT_HERE or value == field.default
        fault = f"--model.{field.name}={value}: experiments/alibi has none; leave it out"
        require(is_served, fault)


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

        `segment_ids_BT`: 0 is padding, 1, 2, ... the examples packed into a row, which do not see
        one another; with a cache a row is one example. A cache takes one token a row or several,
        empty or in use: they see what is in it, and one another as in training. Raises ValueError
        for more tokens than the cache has slots.
        """
        c = self.config
        _refuse_what_is_not_here(c)
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
        if cache is not None:
            cache = _with_valid(cache, segment_ids_BT)
        x_BTD, cache, auxiliary_loss = run_layers(
            self, Block, ring, x_BTD, cache, (segment_ids_BT, positions_BT)
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
    """Return x times the unembedding, of one type, as it is summed: in float32 or more."""
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


def unembed(x_BTD: jax.Array, unembed_DV: jax.Array) -> jax.Array:
    """Return the logits [B, T, V] of hidden states: float32, or float64 where these are.

    `x_BTD` and `unembed_DV`: of a LanguageOutput, or a slice of its positions. Logits are not
    rounded to x's type on the way: at 16 that would be by 0.06.
    """
    x_MD = flat(x_BTD, "stage", "sequence")
    logits_MV = unrounded_logits(x_MD, unembed_DV.astype(x_MD.dtype))
    batch, length, _ = x_BTD.shape
    return logits_MV.reshape(batch, length, -1)


class LanguageModel(nn.Module):
    """A decoder that predicts the next token."""

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
        """Return hidden states and the unembedding; arguments are those of Decoder."""
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
        return LanguageOutput(x_BTD, unembed_DV, cache, auxiliary_loss)


class ScalarModel(nn.Module):
    """A decoder with a scalar a token: rewards are read at the last token, values at each."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array
    ) -> ScalarOutput:
        """Return the scalars and the hidden states; arguments are those of Decoder."""
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
        return ScalarOutput(scalars_BT, x_BTD, embed_VD.T, auxiliary_loss)


def init_and_apply(model: nn.Module) -> tuple[Callable[[jax.Array], Params], Callable[..., Any]]:
    """Return (init, apply) of `model` on plain nested dicts of parameters.

    init(key) -> params, random. apply(params, tokens_BT, segment_ids_BT, positions_BT) ->
    LanguageOutput or ScalarOutput; that of a LanguageModel takes a KVCache as a fifth argument,
    `cache`. See Decoder.__call__ for the arguments.
    """
    # In NumPy, not on a device: plan.py has none.
    token_11 = np.ones((1, 1), np.int32)

    def init(key: jax.Array) -> Params:
        return model.init(key, token_11, token_11, token_11)["params"]

    def apply(params: Params, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, **kwargs)

    return init, apply
