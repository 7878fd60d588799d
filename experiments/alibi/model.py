"""The decoder (RoPE, RMSNorm, SwiGLU, grouped-query attention) and its two heads: next token, and a scalar.

Shape suffixes, everywhere in Plumb: B batch, T query length, S key length, D model width, V vocabulary,
N query heads, K key/value heads, G query heads per K, H head width, F hidden width, L layers; C candidates
for one prompt, R response length. M is B and T flattened: XLA's CPU backend runs the backward pass of a flat
matmul up to three times as fast as of one over two leading axes, and others do not mind (but see sharding.flat).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import softmax_where
from kernels.masks import mask_of, visible_ranges
from kernels.ring import striped, turns_of, unstriped
from layers import pipelined
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
TOKENS = ("sequence", "tensor")  # the axes that cut the tokens of a layer's input


@flax.struct.dataclass
class KVCache:
    """Keys and values of all tokens so far, slots innermost but one. Rows are left-padded, so all advance together."""

    k_LBKSH: jax.Array | tuple[jax.Array, ...]
    v_LBKSH: jax.Array | tuple[jax.Array, ...]
    valid_BS: jax.Array
    """1 where a slot holds a real token."""
    length: jax.Array
    """Slots in use; the next token goes here."""


@flax.struct.dataclass
class LanguageOutput:
    """Hidden states of a language model, and what turns them into logits: `unembed` does, at the positions asked for."""

    x_BTD: jax.Array
    """Hidden states after the last norm; that of position t predicts token t + 1."""
    unembed_DV: jax.Array
    """The unembedding, or the embedding's transpose where they are tied."""
    cache: KVCache | None = None
    """The given cache with these tokens added; None without one."""
    auxiliary_loss: jax.Array | None = None
    """Sum over the layers of their auxiliary losses, nats a token, coefficients included; None where no layer has one."""


@flax.struct.dataclass
class ScalarOutput:
    """Scalars of a reward or value model, and the hidden states they are read from."""

    scalars_BT: jax.Array
    """Float32: the scalar at each position, of the tokens up to and including it."""
    x_BTD: jax.Array
    """Hidden states after the last norm."""
    unembed_DV: jax.Array
    """The embedding's transpose: a language-model loss beside the scalars unembeds with it."""
    auxiliary_loss: jax.Array | None = None
    """As of LanguageOutput."""


def empty_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """A cache for `batch` rows of at most `slots` tokens."""
    shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
    zeros = jnp.zeros(shape, config.compute_dtype)
    return KVCache(zeros, zeros, jnp.zeros((batch, slots), jnp.int32), jnp.int32(0))


@partial(
    jax.checkpoint, prevent_cse=False
)  # for its backward pass x alone is kept: to compute again is cheaper
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32 (Zhang and Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps) * scale).astype(
        x.dtype
    )


def scaled_norm(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """`rms_norm` by the parameter `name` of `module`, stored less 1 where config.zero_centered_norm."""
    c = module.config
    if c.zero_centered_norm:
        scale = 1 + module.param(name, nn.initializers.zeros, x.shape[-1:])
    else:
        scale = module.param(name, nn.initializers.ones, x.shape[-1:])
    return rms_norm(x, scale, c.norm_eps)


def linear(module: nn.Module, labels: str, x: jax.Array, name: str, w: jax.Array) -> jax.Array:
    """x w by einsum, and x A B where lora.py has laid the adapters of the weight `name` beside it."""
    out = jnp.einsum(labels, x, w.astype(x.dtype))
    if module.has_variable("params", f"{name}_a"):
        a, b = (module.get_variable("params", f"{name}_{which}").astype(x.dtype) for which in "ab")
        out += jnp.tensordot(
            jnp.tensordot(x, a, a.ndim - 1), b, 1
        )  # over all inputs, then over the rank R
    return out


def _normal(fan_in: int) -> Callable[..., jax.Array]:
    return nn.initializers.normal(fan_in**-0.5)


def alibi_slopes(heads: int) -> jax.Array:
    """Return the slope of each head, [N] float32: 2^(-8 n / N) for n = 1 .. N (Press et al. 2022)."""
    return 2.0 ** (-8.0 * jnp.arange(1, heads + 1, dtype=jnp.float32) / heads)


def alibi_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    window: int | None,
    ring: int,
) -> jax.Array:
    """Attend to earlier tokens of the segment, each score less slope x distance; [B, T, N, H].

    Distances are those of the row's indices: within a segment they are those of positions.
    Raises UserError under --mesh.sequence, which this fork has no ring for.
    """
    require(ring == 1, "--mesh.sequence: experiments/alibi has no ring attention; leave it out")
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, -1, width)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32
    )

    # The bias: nothing for the token itself, slope less for each token further back.
    index_T = jnp.arange(length)
    distance_TS = index_T[:, None] - index_T[None, :]
    slopes_KG = alibi_slopes(heads).reshape(kv_heads, -1)
    bias_KGTS = -slopes_KG[:, :, None, None] * distance_TS

    keys, _ = visible_ranges(batch, length, segment_ids_BT, True, window)
    mask_BTS = mask_of(keys)
    scores_BKGTS = scores_BKGTS * width**-0.5 + bias_KGTS
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
    """Attend from one new token a row (T = 1), at slot `at`, to the cache's slots; [B, 1, N, H].

    Slots are a ring and rows are left-padded, so distances of slots are those of tokens.
    """
    _, kv_heads, slots, width = k_BKSH.shape
    heads = q_BTNH.shape[2]
    distance_S = (at - jnp.arange(slots)) % slots
    mask_BS = valid_BS > 0
    if window is not None:
        mask_BS &= distance_S < window
    q_BKGH = q_BTNH.reshape(q_BTNH.shape[0], kv_heads, -1, width)
    scores_BKGS = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32)
    slopes_KG = alibi_slopes(heads).reshape(kv_heads, -1)
    scores_BKGS = scores_BKGS * width**-0.5 - slopes_KG[:, :, None] * distance_S
    weights_BKGS = softmax_where(mask_BS[:, None, None], scores_BKGS, 1.0, None)
    out_BKGH = jnp.einsum("BKGS,BKSH->BKGH", weights_BKGS.astype(v_BKSH.dtype), v_BKSH)
    return out_BKGH.reshape(q_BTNH.shape)


class Attention(nn.Module):
    """Grouped-query self-attention with linear biases (ALiBi)."""

    config: ModelConfig
    ring: int = 1

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT, turns, cache, layer):
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
        x_MD = flat(x_BTD, *TOKENS)
        q_MNH = constrain_units(linear(self, "...D,DNH->...NH", x_MD, "q", q_DNH))
        k_MKH = constrain_units(linear(self, "...D,DKH->...KH", x_MD, "k", k_DKH))
        v_MKH = constrain_units(linear(self, "...D,DKH->...KH", x_MD, "v", v_DKH))
        if c.qkv_bias:
            zeros = nn.initializers.zeros
            q_MNH += self.param("q_bias", zeros, q_heads).astype(x_MD.dtype)
            k_MKH += self.param("k_bias", zeros, kv_heads).astype(x_MD.dtype)
            v_MKH += self.param("v_bias", zeros, kv_heads).astype(x_MD.dtype)
        if c.qk_norm:
            q_MNH = scaled_norm(self, "q_norm", q_MNH)
            k_MKH = scaled_norm(self, "k_norm", k_MKH)
        q_BTNH = q_MNH.reshape(batch, length, *q_heads)
        k_BTKH = k_MKH.reshape(batch, length, *kv_heads)
        v_BTKH = v_MKH.reshape(batch, length, *kv_heads)

        if cache is not None:
            at = (layer, 0, 0, cache.length, 0)
            cache = cache.replace(
                k_LBKSH=jax.lax.dynamic_update_slice(
                    cache.k_LBKSH, k_BTKH.swapaxes(1, 2)[None], at
                ),
                v_LBKSH=jax.lax.dynamic_update_slice(
                    cache.v_LBKSH, v_BTKH.swapaxes(1, 2)[None], at
                ),
            )
        if cache is not None and x_BTD.shape[1] == 1:  # one token against the cache
            k_BKSH = jax.lax.dynamic_index_in_dim(cache.k_LBKSH, layer, keepdims=False)
            v_BKSH = jax.lax.dynamic_index_in_dim(cache.v_LBKSH, layer, keepdims=False)
            out_BTNH = alibi_decode_attention(
                q_BTNH, k_BKSH, v_BKSH, cache.valid_BS, cache.length, window=c.window
            )
        else:  # training, or prefill of an empty cache: the tokens see one another only
            out_BTNH = alibi_attention(
                q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window=c.window, ring=self.ring
            )
        return linear(self, "...NH,NHD->...D", flat(out_BTNH, *TOKENS), "o", o_NHD).reshape(
            x_BTD.shape
        ), cache


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        x_MD = flat(x_BTD, *TOKENS)
        gate_DF = self.param("gate", _normal(c.width), (c.width, c.mlp_width))
        up_DF = self.param("up", _normal(c.width), (c.width, c.mlp_width))
        down_FD = self.param("down", _normal(c.mlp_width * 2 * c.layers), (c.mlp_width, c.width))
        # Flax's GELU is the tanh approximation, as Gemma's.
        activation = {"silu": nn.silu, "gelu": nn.gelu}[c.activation]
        gate_MF = constrain_units(linear(self, "...D,DF->...F", x_MD, "gate", gate_DF))
        up_MF = constrain_units(linear(self, "...D,DF->...F", x_MD, "up", up_DF))
        gated_MF = jax.checkpoint(lambda gate, up: activation(gate) * up, prevent_cse=False)(
            gate_MF, up_MF
        )
        return linear(self, "...F,FD->...D", gated_MF, "down", down_FD).reshape(x_BTD.shape)


class Block(nn.Module):
    """One pre-norm layer; the carry holds the residual stream, the cache and the layer's number.

    Beside the carry it returns the layer's auxiliary loss (see LanguageOutput), or None. This one has none; a mixture
    of experts returns its load-balancing loss there.
    """

    config: ModelConfig
    ring: int = 1  # of so many devices, over which its tokens are striped (kernels/ring.py), but not segment_ids_BT

    @nn.compact
    def __call__(self, carry, segment_ids_BT, turns):
        x_BTD, cache, layer = carry
        c = self.config
        normed_BTD = scaled_norm(self, "attention_norm", x_BTD)
        mixed_BTD, cache = Attention(c, self.ring, name="attention")(
            normed_BTD, segment_ids_BT, turns, cache, layer
        )
        x_BTD = constrain_residual(x_BTD + mixed_BTD)
        normed_BTD = scaled_norm(self, "mlp_norm", x_BTD)
        x_BTD = constrain_residual(x_BTD + SwiGLU(c, name="mlp")(normed_BTD))
        return (x_BTD, cache, layer + 1), None


REMAT = {
    "none": lambda block: block,
    "dots": lambda block: nn.remat(
        block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False
    ),
    "full": lambda block: nn.remat(block, prevent_cse=False),
}


def scanned(config: ModelConfig, layers: int) -> Any:
    """`layers` blocks under one scan, a class."""
    return nn.scan(
        REMAT[config.remat](Block),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=layers,
    )


class Decoder(nn.Module):
    """Embedding, blocks under one scan, final norm. `microbatches`: of a pipeline, if the mesh has stages."""

    config: ModelConfig
    microbatches: int = 1

    @nn.compact
    def __call__(self, tokens_BT, segment_ids_BT, positions_BT, cache=None):
        """Hidden states [B, T, D], the embedding [V, D], the cache with these tokens added, the auxiliary loss."""
        c = self.config
        embed_VD = self.param("embed", _normal(c.width), (c.vocab, c.width))
        # Whole rows on every device: a gather of rows that fsdp has cut makes XLA replicate its result instead.
        ring = turns_of(tokens_BT.shape[1]) if cache is None else 1
        if ring > 1:
            tokens_BT, positions_BT = striped(tokens_BT, ring), striped(positions_BT, ring)
        x_BTD = constrain_tokens(
            constrain_rows(embed_VD.astype(c.compute_dtype))[tokens_BT], "sequence"
        )
        x_BTD = constrain_residual(
            x_BTD
        )  # only then: tokens and vocabulary cannot both be cut over tensor
        if c.scale_embedding:
            x_BTD *= jnp.asarray(c.width**0.5, x_BTD.dtype)
        turns = positions_BT
        if cache is not None:
            cache = cache.replace(
                valid_BS=jax.lax.dynamic_update_slice(
                    cache.valid_BS, (segment_ids_BT > 0).astype(jnp.int32), (0, cache.length)
                )
            )
        stages = along(jax.sharding.get_abstract_mesh(), "stage")
        if cache is not None and isinstance(cache.k_LBKSH, tuple):  # sampling.py's layers_apart
            weights, k, v = self.get_variable("params", "layers"), [], []
            losses = None  # nothing is trained here
            for i in range(c.layers):
                mine = jax.tree.map(
                    lambda w, i=i: w[i], weights, is_leaf=lambda w: isinstance(w, tuple)
                )
                here = cache.replace(
                    k_LBKSH=cache.k_LBKSH[i][None], v_LBKSH=cache.v_LBKSH[i][None]
                )
                block = Block(c, parent=None)
                (x_BTD, here, _), _ = block.apply(
                    {"params": mine}, (x_BTD, here, 0), segment_ids_BT, turns
                )
                k, v = [*k, here.k_LBKSH[0]], [*v, here.v_LBKSH[0]]
            cache = cache.replace(k_LBKSH=tuple(k), v_LBKSH=tuple(v))
        elif stages > 1 and cache is None and not self.is_initializing():
            part = scanned(c, c.layers // stages)(c, ring, parent=None)

            def run(weights, x_BTD, *rows):
                (x_BTD, _, _), losses = part.apply({"params": weights}, (x_BTD, None, 0), *rows)
                if losses is not None:
                    raise NotImplementedError("a pipeline does not carry auxiliary losses")
                return x_BTD

            losses = None
            weights, rows = self.get_variable("params", "layers"), (segment_ids_BT, turns)
            x_BTD = pipelined(run, weights, x_BTD, rows, self.microbatches)
        else:
            # The cache rides in the carry: as xs and ys the scan would copy all of it.
            carry = (x_BTD, cache, jnp.int32(0))
            (x_BTD, cache, _), losses = scanned(c, c.layers)(c, ring, name="layers")(
                carry, segment_ids_BT, turns
            )
        if cache is not None:
            cache = cache.replace(length=cache.length + tokens_BT.shape[1])
        if ring > 1:
            x_BTD = unstriped(x_BTD, ring)
        if stages > 1:  # a pipeline's result lies on every stage: each unembeds its part
            x_BTD = constrain_tokens(x_BTD, "sequence", "stage")
        auxiliary_loss = None if losses is None else losses.sum()
        return scaled_norm(self, "final_norm", x_BTD), embed_VD, cache, auxiliary_loss


def unembed(x_BTD: jax.Array, unembed_DV: jax.Array) -> jax.Array:
    """Return the logits [B, T, V] of hidden states: float32, or float64 where these are."""
    x_MD = flat(x_BTD, "stage", "sequence")
    logits_MV = jnp.einsum("...D,DV->...V", x_MD, unembed_DV.astype(x_MD.dtype))
    logits_BTV = logits_MV.reshape(*x_BTD.shape[:2], -1)
    return logits_BTV.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))


class LanguageModel(nn.Module):
    """A decoder that predicts the next token."""

    config: ModelConfig
    microbatches: int = 1

    @nn.compact
    def __call__(self, tokens_BT, segment_ids_BT, positions_BT, cache=None) -> LanguageOutput:
        """Hidden states and the unembedding; logits are the caller's to make, `unembed`, where it needs them."""
        c = self.config
        decoder = Decoder(c, self.microbatches, name="decoder")
        x_BTD, embed_VD, cache, auxiliary_loss = decoder(
            tokens_BT, segment_ids_BT, positions_BT, cache
        )
        if c.tied:
            unembed_DV = embed_VD.T
        else:
            unembed_DV = self.param("unembed", _normal(c.width), (c.width, c.vocab))
        return LanguageOutput(x_BTD, unembed_DV, cache, auxiliary_loss)


class ScalarModel(nn.Module):
    """A decoder that gives one number per token: a reward model reads it at the last, a value model at each."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT, segment_ids_BT, positions_BT) -> ScalarOutput:
        """Float32 scalars [B, T], and the hidden states."""
        c = self.config
        decoder = Decoder(c, name="decoder")
        x_BTD, embed_VD, _, auxiliary_loss = decoder(tokens_BT, segment_ids_BT, positions_BT)
        # N(0, 1/sqrt(D + 1)): Stiennon et al. 2020 and the "N+ details" reproduction of it.
        head_D = self.param("head", nn.initializers.normal((c.width + 1) ** -0.5), (c.width,))
        bias = self.param("bias", nn.initializers.zeros, ())
        scalars_BT = jnp.einsum("BTD,D->BT", x_BTD.astype(jnp.float32), head_D) + bias
        return ScalarOutput(scalars_BT, x_BTD, embed_VD.T, auxiliary_loss)


def init_and_apply(model: nn.Module) -> tuple[Callable[[jax.Array], Params], Callable[..., Any]]:
    """(init(key) -> params, apply(params, tokens_BT, segment_ids_BT, positions_BT, ...)) on plain trees."""
    token_11 = np.ones((1, 1), np.int32)  # not on a device: plan.py has none

    def init(key: jax.Array) -> Params:
        return model.init(key, token_11, token_11, token_11)["params"]

    def apply(params: Params, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, **kwargs)

    return init, apply
