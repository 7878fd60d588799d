"""Families of models in Hugging Face folders, against float64 loops and against transformers."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from data.tokenizer import Tokenizer
from layers import unstack_cache, unstack_params
from model import LanguageModel, empty_cache, init_and_apply, rope_frequencies, unembed
from model_config import stored_model
from runtime.errors import UserError
from tests.test_weights import (
    CORPUS,
    SHAPE,
    TOKENS,
    D,
    F,
    L,
    V,
    exported,
    logits,
    logits_of,
    run_of,
    their_logits,
    tiny,
    write,
)
from train_state import load_params
from weights import families

FULL, SLIDING = families.FULL, families.SLIDING
TIED = {"tie_word_embeddings": True}
NEOX = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
    "rotary_emb_base": 100.0,
    "rotary_pct": 0.5,
    "use_parallel_residual": True,
    "attention_bias": True,
}
# The fields of config.json beside SHAPE.
CONFIGS = {
    "phi 3": {"model_type": "phi3", "sliding_window": 4},
    "phi 3, partial rotary": {
        "model_type": "phi3",
        "head_dim": 8,
        "partial_rotary_factor": 0.75,
        **TIED,
    },
    "olmo 2": {"model_type": "olmo2", "num_key_value_heads": 1, "head_dim": 8},
    "gemma 2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 3,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma 2, untied, without caps": {
        "model_type": "gemma2",
        "tie_word_embeddings": False,
        "head_dim": 4,
        "sliding_window": 5,
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu",
        "layer_types": [FULL, FULL, SLIDING],
    },
    "gemma 3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 3,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 5,
        "rope_theta": 1000.0,
        "rope_local_base_freq": 30.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma 3, untied": {
        "model_type": "gemma3_text",
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "sliding_window": 5,
        "query_pre_attn_scalar": 4,
        "rope_theta": None,
        "rope_parameters": {
            "full_attention": {"rope_theta": 50.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 20.0, "rope_type": "default"},
        },
        "layer_types": [FULL, SLIDING, FULL],
    },
    "gpt-neox": {"model_type": "gpt_neox", **NEOX},
    "gpt-neox, one residual": {
        "model_type": "gpt_neox",
        **NEOX,
        "use_parallel_residual": False,
        "rotary_pct": 1.0,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": False,
        **TIED,
    },
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, attention biases": {"model_type": "llama", "attention_bias": True, **TIED},
    "llama, mlp biases": {"model_type": "llama", "mlp_bias": True, "head_dim": 8},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral, window": {
        "model_type": "mixtral",
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 4,
        **TIED,
    },
    "qwen 3 moe": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen 3 moe, tied": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        **TIED,
    },
    "qwen 3, mixed windows": {
        "model_type": "qwen3",
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
    },
    "yarn": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        **TIED,
    },
    "yarn, all of it": {
        "model_type": "mistral",
        "sliding_window": None,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 3.0,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "original_max_position_embeddings": 32,
            "attention_factor": 1.3,
        },
    },
    "olmo 2, tied": {"model_type": "olmo2", **TIED},
}


# --- the reference: float64, a query at a time; rows of their matrices are outputs


def shapes(c):
    """Return {name: shape} of a layer's tensors in a folder, as published."""
    n, k = c["num_attention_heads"], c["num_key_value_heads"]
    h = c.get("head_dim", D // n)
    family = c["model_type"]
    if family == "phi3":
        return {
            "self_attn.qkv_proj.weight": (n * h + 2 * k * h, D),
            "self_attn.o_proj.weight": (D, n * h),
            "mlp.gate_up_proj.weight": (2 * F, D),
            "mlp.down_proj.weight": (D, F),
            "input_layernorm.weight": (D,),
            "post_attention_layernorm.weight": (D,),
        }
    if family == "gpt_neox":
        matrices = {
            "attention.query_key_value": (3 * D, D),
            "attention.dense": (D, D),
            "mlp.dense_h_to_4h": (F, D),
            "mlp.dense_4h_to_h": (D, F),
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
        }
        biases = {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
        if not c["attention_bias"]:
            biases = {name: x for name, x in biases.items() if not name.startswith("attention")}
        return {f"{name}.weight": shape for name, shape in matrices.items()} | biases
    apart = {f"self_attn.{x}_proj.weight": (m * h, D) for x, m in {"q": n, "k": k, "v": k}.items()}
    apart |= {"self_attn.o_proj.weight": (D, n * h), "mlp.down_proj.weight": (D, F)}
    apart |= {f"mlp.{x}_proj.weight": (F, D) for x in ("gate", "up")}
    apart |= biases_of(apart, c)
    if family in ("llama", "mistral"):
        return apart | {
            "input_layernorm.weight": (D,),
            "post_attention_layernorm.weight": (D,),
        }
    if family in EXPERTS:
        apart = {name: x for name, x in apart.items() if not name.startswith("mlp")}
        apart |= experts_of(c)
    heads = {"self_attn.q_norm.weight": (h,), "self_attn.k_norm.weight": (h,)}
    if family.startswith("gemma"):
        apart |= heads if family == "gemma3_text" else {}
        return apart | {f"{name}_layernorm.weight": (D,) for name in NORMS[family]}
    if family in ("mixtral", "qwen3", "qwen3_moe"):
        apart |= {} if family == "mixtral" else heads
        return apart | {f"{name}_layernorm.weight": (D,) for name in NORMS[family][::2]}
    if family == "olmo2":
        return apart | {
            "self_attn.q_norm.weight": (n * h,),
            "self_attn.k_norm.weight": (k * h,),
            "post_attention_layernorm.weight": (D,),
            "post_feedforward_layernorm.weight": (D,),
        }
    raise AssertionError(family)


def experts_of(c):
    """Return the shapes of a layer's router and experts."""
    layer, gate, up, down, count = EXPERTS[c["model_type"]]
    width = c.get("moe_intermediate_size", F)
    found = {f"{layer}.gate.weight": (c[count], D)}
    for e in range(c[count]):
        for name, shape in ((gate, (width, D)), (up, (width, D)), (down, (D, width))):
            found[f"{layer}.experts.{e}.{name}.weight"] = shape
    return found


def biases_of(matrices, c):
    """Return the shapes of the biases that a Llama's config.json asks for."""
    biases = {}
    for name, (rows, _) in matrices.items():
        part = "attention" if name.startswith("self_attn") else "mlp"
        if c.get(f"{part}_bias"):
            biases[name.replace("weight", "bias")] = (rows,)
    return biases


# The layer of experts; names of gate, up and down; the setting that counts them.
EXPERTS = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2", "num_local_experts"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj", "num_experts"),
}

# What comes before a layer's number, and the names of embedding, last norm and head.
NAMES = {
    "gpt_neox": (
        "gpt_neox.layers.",
        "gpt_neox.embed_in.weight",
        "gpt_neox.final_layer_norm",
        "embed_out.weight",
    )
}
LLAMA_NAMES = ("model.layers.", "model.embed_tokens.weight", "model.norm", "lm_head.weight")


def checkpoint(c, seed=0):
    """Return random tensors by their names in a folder of the family."""
    rng = np.random.default_rng(seed)

    def random(name, shape):
        noise = 0.3 * rng.normal(size=shape)
        return np.float32(noise + 1 if "norm" in name and "weight" in name else noise)

    layers, embed, last_norm, head = NAMES.get(c["model_type"], LLAMA_NAMES)
    tensors = {embed: (V, D), f"{last_norm}.weight": (D,)}
    if c["model_type"] == "gpt_neox":
        tensors[f"{last_norm}.bias"] = (D,)
    if not c.get("tie_word_embeddings", c["model_type"].startswith("gemma")):
        tensors[head] = (V, D)
    for i in range(L):
        for name, shape in shapes(c).items():
            tensors[f"{layers}{i}.{name}"] = shape
    return {name: random(name, shape) for name, shape in tensors.items()}


def layer_of(w, c):
    """Return the matrices of a layer apart: q, k, v [heads, H, D], o, gate, up, down."""
    n, k = c["num_attention_heads"], c["num_key_value_heads"]
    h = c.get("head_dim", D // n)
    if c["model_type"] == "gpt_neox":
        # Of each head q, k and v, one behind another.
        parts = w["attention.query_key_value.weight"].reshape(n, 3, h, D)
        biases = np.zeros((n, 3, h))
        if c["attention_bias"]:
            biases = w["attention.query_key_value.bias"].reshape(n, 3, h)
        return {
            **{x: parts[:, i] for i, x in enumerate("qkv")},
            **{f"{x}_bias": biases[:, i] for i, x in enumerate("qkv")},
            "o": w["attention.dense.weight"],
            "o_bias": w.get("attention.dense.bias", 0),
            "up": w["mlp.dense_h_to_4h.weight"],
            "up_bias": w["mlp.dense_h_to_4h.bias"],
            "down": w["mlp.dense_4h_to_h.weight"],
            "down_bias": w["mlp.dense_4h_to_h.bias"],
        }
    if c["model_type"] != "phi3":
        heads = {
            x: w[f"self_attn.{x}_proj.weight"].reshape(m, h, D)
            for x, m in {"q": n, "k": k, "v": k}.items()
        }
        for x, m in {"q": n, "k": k, "v": k}.items():
            heads[f"{x}_bias"] = w.get(f"self_attn.{x}_proj.bias", np.zeros(m * h)).reshape(m, h)
        return heads | {
            "o": w["self_attn.o_proj.weight"],
            "o_bias": w.get("self_attn.o_proj.bias", 0),
            **{f"{x}_bias": w.get(f"mlp.{x}_proj.bias", 0) for x in ("gate", "up", "down")},
            **{x: w.get(f"mlp.{x}_proj.weight") for x in ("gate", "up", "down")},
        }
    rows = w["self_attn.qkv_proj.weight"]
    return {
        "q": rows[: n * h].reshape(n, h, D),
        "k": rows[n * h : n * h + k * h].reshape(k, h, D),
        "v": rows[n * h + k * h :].reshape(k, h, D),
        "o": w["self_attn.o_proj.weight"],
        "gate": w["mlp.gate_up_proj.weight"][:F],
        "up": w["mlp.gate_up_proj.weight"][F:],
        "down": w["mlp.down_proj.weight"],
    }


def rope_of(c, window):
    """Return the base of RoPE, and what it is scaled by, of layers with the window or without."""
    nested = c.get("rope_parameters", {})
    if "sliding_attention" in nested:
        return nested["full_attention" if window is None else "sliding_attention"]
    if "rope_local_base_freq" in c and window is not None:
        return {"rope_theta": c["rope_local_base_freq"]}
    if "rotary_emb_base" in c:
        return {"rope_theta": c["rotary_emb_base"]}
    return {"rope_theta": c["rope_theta"], **c.get("rope_scaling", {})}


def turned(x_TNH, c, window):
    """Turn pairs (i, i + half) of the first numbers of a head as complex numbers: RoPE."""
    T, _, h = x_TNH.shape
    width = int(h * c.get("partial_rotary_factor", c.get("rotary_pct", 1)))
    half = width // 2
    rope = rope_of(c, window)
    angles = rope["rope_theta"] ** (-2 * np.arange(half) / width)
    magnitude = 1.0
    if rope.get("rope_type") == "linear":
        angles /= rope["factor"]
    elif "factor" in rope:
        # YaRN, pair by pair: where the ramp begins and ends is solved from the wavelength.
        magnitude = rope.get("attention_factor", 1 + np.log(rope["factor"]) / 10)
        context, base = rope["original_max_position_embeddings"], c["rope_theta"]
        turns = [
            context / (2 * np.pi * rope.get(*x)) for x in (("beta_fast", 32), ("beta_slow", 1))
        ]
        low, high = (width / 2 * np.log(x) / np.log(base) for x in turns)
        low, high = max(np.floor(low), 0), min(np.ceil(high), width - 1)
        for i in range(half):
            part = min(max((i - low) / (high - low), 0), 1)
            angles[i] = part * angles[i] / rope["factor"] + (1 - part) * angles[i]
    z = magnitude * (x_TNH[..., :half] + 1j * x_TNH[..., half:width])
    z = z * np.exp(1j * np.arange(T)[:, None] * angles)[:, None]
    return np.concatenate([z.real, z.imag, x_TNH[..., width:]], -1)


def window_of(c, layer):
    """Return the window of a layer, or None."""
    default = [SLIDING] * L
    if c["model_type"] == "gemma3_text":
        every = c.get("sliding_window_pattern", 6)
        default = [FULL if i % every == every - 1 else SLIDING for i in range(L)]
    if c["model_type"] == "gemma2":
        default = [FULL if i % 2 else SLIDING for i in range(L)]
    if c["model_type"] == "qwen3":
        default = [SLIDING if i >= c["max_window_layers"] else FULL for i in range(L)]
    kinds = c.get("layer_types", default)
    return c.get("sliding_window") if kinds[layer] == SLIDING else None


def attended(q_TNH, k_TKH, v_TKH, window, c):
    """Return what each query sees of the keys up to it, of a window or all."""
    T, n, h = q_TNH.shape
    k = k_TKH.shape[1]
    out = np.zeros_like(q_TNH)
    for t in range(T):
        first = 0 if window is None else max(0, t - window + 1)
        for head in range(n):
            own = head * k // n
            scores = k_TKH[first : t + 1, own] @ q_TNH[t, head]
            scores = scores / np.sqrt(c.get("query_pre_attn_scalar", h))
            if c.get("attn_logit_softcapping"):
                cap = c["attn_logit_softcapping"]
                scores = cap * np.tanh(scores / cap)
            weight = np.exp(scores - scores.max())
            out[t, head] = weight / weight.sum() @ v_TKH[first : t + 1, own]
    return out.reshape(T, -1)


# Norms before and after attention, before and after the feed-forward layer: their names.
NORMS = {
    "llama": ("input", None, "post_attention", None),
    "mistral": ("input", None, "post_attention", None),
    "phi3": ("input", None, "post_attention", None),
    "olmo2": (None, "post_attention", None, "post_feedforward"),
    "qwen3": ("input", None, "post_attention", None),
    "mixtral": ("input", None, "post_attention", None),
    "qwen3_moe": ("input", None, "post_attention", None),
    "gpt_neox": ("input", None, "post_attention", None),
    "gemma3_text": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
    "gemma2": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
}


def norm(x, c, scale, bias=None):
    """Return RMSNorm over the last axis, or with a bias LayerNorm."""
    if bias is not None:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c["layer_norm_eps"]) * scale + bias
    root = np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"])
    return x / root * (scale + c["model_type"].startswith("gemma"))


def activation(x, c):
    """Return SiLU, or GELU exact or by tanh."""
    default = "gelu_pytorch_tanh" if c["model_type"].startswith("gemma") else "silu"
    name = c.get("hidden_activation") or c.get("hidden_act") or default
    if name == "gelu_pytorch_tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    if name == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    return x / (1 + np.exp(-x))


def seen_by(y_TD, own, p, c, window):
    """Return what attention makes of its input."""
    q, k, v = (
        np.einsum("td,nhd->tnh", y_TD, p[name]) + p.get(f"{name}_bias", 0) for name in "qkv"
    )
    if "self_attn.q_norm.weight" in own:
        # Over each head, or in OLMo 2 over all of them.
        shape = (len(q), 1, -1) if c["model_type"] == "olmo2" else (len(q), -1, q.shape[-1])
        q = norm(q.reshape(shape), c, own["self_attn.q_norm.weight"]).reshape(q.shape)
        k = norm(k.reshape(shape), c, own["self_attn.k_norm.weight"]).reshape(k.shape)
    seen = attended(turned(q, c, window), turned(k, c, window), v, window, c)
    return seen @ p["o"].T + p.get("o_bias", 0)


def fed_forward(y_TD, p, c):
    """Return what the feed-forward layer makes of its input."""
    hidden = y_TD @ p["up"].T + p.get("up_bias", 0)
    if "gate" in p:
        hidden *= activation(y_TD @ p["gate"].T + p.get("gate_bias", 0), c)
    else:
        hidden = activation(hidden, c)
    return hidden @ p["down"].T + p.get("down_bias", 0)


def by_experts(y_TD, own, c):
    """Return what the experts make of their input, a token at a time."""
    layer, gate, up, down, _ = EXPERTS[c["model_type"]]
    out = np.zeros_like(y_TD)
    for t, y in enumerate(y_TD):
        logits = own[f"{layer}.gate.weight"] @ y
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares)[: c["num_experts_per_tok"]]
        total = shares[best].sum() if c.get("norm_topk_prob", True) else 1
        for e in best:
            w = {x: own[f"{layer}.experts.{e}.{x}.weight"] for x in (gate, up, down)}
            hidden = activation(w[gate] @ y, c) * (w[up] @ y)
            out[t] += shares[e] / total * (w[down] @ hidden)
    return out


def forward(tensors, c, tokens_T):
    """Return float64 logits [T, V]."""
    w = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    layers, embed, last_norm, head = NAMES.get(c["model_type"], LLAMA_NAMES)
    is_gemma = c["model_type"].startswith("gemma")
    in_attention, out_attention, in_mlp, out_mlp = NORMS[c["model_type"]]

    x_TD = w[embed][tokens_T] * (np.sqrt(D) if is_gemma else 1)
    for i in range(L):
        at = f"{layers}{i}."
        own = {name.removeprefix(at): x for name, x in w.items() if name.startswith(at)}
        p = layer_of(own, c)

        def at_place(name, x, own=own):
            if name is None:
                return x
            name = f"{name}_layernorm"
            return norm(x, c, own[f"{name}.weight"], own.get(f"{name}.bias"))

        y_TD = at_place(in_attention, x_TD)
        attended_TD = at_place(out_attention, seen_by(y_TD, own, p, c, window_of(c, i)))
        read_TD = x_TD if c.get("use_parallel_residual") else x_TD + attended_TD
        read_TD = at_place(in_mlp, read_TD)
        has_experts = c["model_type"] in EXPERTS
        fed_TD = by_experts(read_TD, own, c) if has_experts else fed_forward(read_TD, p, c)
        fed_TD = at_place(out_mlp, fed_TD)
        x_TD = x_TD + attended_TD + fed_TD
    x_TD = norm(x_TD, c, w[f"{last_norm}.weight"], w.get(f"{last_norm}.bias"))
    logits_TV = x_TD @ w.get(head, w[embed]).T
    cap = c.get("final_logit_softcapping")
    return cap * np.tanh(logits_TV / cap) if cap else logits_TV


# --- against the reference


def decoded(model, params, tokens_T):
    """Return the logits [T, V] of tokens that enter a cache: some at once, then one by one."""
    apply = init_and_apply(LanguageModel(model))[1]
    params = unstack_params(params, model.compute_dtype)
    cache = unstack_cache(empty_cache(model, 1, len(tokens_T)))

    @jax.jit
    def enter(params, cache, tokens_BT, positions_BT):
        output = apply(params, tokens_BT, jnp.ones_like(tokens_BT), positions_BT, cache)
        return unembed(output.x_BTD, output.unembed_DV)[0], output.cache

    parts = []
    positions_T = np.arange(len(tokens_T))
    for at_once in np.split(positions_T, range(5, len(tokens_T))):
        logits_TV, cache = enter(params, cache, tokens_T[None, at_once], at_once[None])
        parts.append(logits_TV)
    return np.concatenate(parts)


# A change of config.json that must show in the logits.
MATTERS = {
    "rope_theta": 7.0,
    "rope_local_base_freq": 3.0,
    "sliding_window_pattern": 2,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "layer_norm_eps": 0.3,
    "rotary_emb_base": 7.0,
    "rotary_pct": 1.0,
    "rms_norm_eps": 0.3,
    "sliding_window": 2,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {},
    "layer_types": [SLIDING, FULL, FULL],
    "max_window_layers": 2,
    "query_pre_attn_scalar": 2,
    "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 1.0,
}


def is_read(setting, c):
    """Return False for settings of SHAPE that GPT-NeoX has by other names."""
    return c["model_type"] != "gpt_neox" or setting not in ("rope_theta", "rms_norm_eps")


@pytest.mark.parametrize(
    "name",
    # A comma tells a variant of a family.
    [pytest.param(name, marks=pytest.mark.slow) if ", " in name else name for name in CONFIGS],
)
def test_logits_decoding_and_the_round_trip(name, tmp_path):
    c = SHAPE | CONFIGS[name]
    tensors = checkpoint(c)
    sharded = ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"]
    run_of(write(tmp_path / "theirs", c, tensors), tmp_path / "run", *sharded)
    want = forward(tensors, c, TOKENS)
    np.testing.assert_allclose(logits(tmp_path / "run"), want, atol=1e-4)
    # Control: each setting that the file has matters.
    for setting, value in MATTERS.items():
        if setting in c and c[setting] not in (None, value) and is_read(setting, c):
            other = forward(tensors, {**c, setting: value}, TOKENS)
            assert np.abs(other - want).max() > 1e-2, setting

    # A token at a time, through a cache.
    model, params = stored_model(str(tmp_path / "run")), load_params(str(tmp_path / "run"))
    np.testing.assert_allclose(decoded(model, params, TOKENS), want, atol=1e-4)

    # Out again, to the bit.
    folder = exported(tmp_path / "run", tmp_path / "ours")
    again = load_file(folder / "model.safetensors")
    assert again.keys() == tensors.keys()
    for tensor, x in tensors.items():
        np.testing.assert_array_equal(again[tensor], x)
    assert families.model_of(folder / "config.json") == model


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_agrees_both_ways(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    # The defaults would lie outside of so small a vocabulary.
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    theirs = tiny(transformers, SHAPE | CONFIGS[name] | ids)
    want = their_logits(theirs)
    greedy = theirs.generate(
        torch.tensor(TOKENS[None]), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        theirs.to(getattr(torch, dtype)).save_pretrained(folder)
        Tokenizer.train(CORPUS, folder / "tokenizer.model", V)
        run_of(folder, tmp_path / f"{dtype}-run")
        # In float32, of weights that may have been rounded.
        rounded = their_logits(load(folder, **options))
        np.testing.assert_allclose(logits(tmp_path / f"{dtype}-run"), rounded, atol=1e-4)
        assert dtype == "bfloat16" or np.array_equal(rounded, want)

    # Their greedy tokens are ours.
    model = stored_model(str(tmp_path / "float32-run"))
    params = load_params(str(tmp_path / "float32-run"))
    sequence = greedy[0].numpy().astype(np.int32)
    found_TV = logits_of(model)(params, sequence[None])[0]
    np.testing.assert_array_equal(
        np.argmax(found_TV[len(TOKENS) - 1 : -1], -1), sequence[len(TOKENS) :]
    )

    # Ours, read by them.
    folder = exported(tmp_path / "float32-run", tmp_path / "ours")
    loaded, told = load(folder, output_loading_info=True, **options)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(theirs)
    np.testing.assert_array_equal(their_logits(loaded), want)


# --- what is not covered


UNCOVERED = {
    "longrope": {"model_type": "phi3", "rope_scaling": {"type": "longrope", "factor": 4.0}},
    "remove it": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "'truncate'": {
        "model_type": "llama",
        "rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False},
    },
    "RoPE needs an even width": {"model_type": "phi3", "partial_rotary_factor": 0.25},
    "'partial_rotary_factor'": {"model_type": "llama", "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("why", UNCOVERED)
def test_what_is_not_covered_is_refused_in_one_line(why, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE | UNCOVERED[why]))
    with pytest.raises(UserError, match=why) as fault:
        families.model_of(path)
    assert str(path) in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
)
def test_an_original_context_beside_rope_scaling_wins(rope, tmp_path):
    name = "original_max_position_embeddings"

    def written(given, **beside):
        c = {**SHAPE, "model_type": "llama", "rope_scaling": {**rope, name: given}, **beside}
        (tmp_path / "config.json").write_text(json.dumps(c))
        return families.model_of(tmp_path / "config.json")

    inside = written(16)
    assert written(32) != inside  # control
    assert written(32, **{name: 16}) == inside
    # That is how transformers reads this file.
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    want = theirs.model.rotary_emb.inv_freq
    np.testing.assert_allclose(rope_frequencies(inside), want, rtol=1e-5)


def test_gemma_3_without_a_base_of_its_windows_has_that_of_all_layers(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE | CONFIGS["gemma 3"]))
    gemma3 = families.model_of(path)
    tokenizer = Tokenizer.train(CORPUS, tmp_path / "tokenizer.model", V)
    one_base = dataclasses.replace(gemma3, rope_local_base=None, rope_scale=1.0)
    path.write_text(json.dumps(families.config_of(one_base, tokenizer, "float32")))
    assert families.model_of(path) == dataclasses.replace(one_base, rope_local_base=1000.0)
    # Where no layer has the window there is no other base.
    everywhere = dataclasses.replace(one_base, window=None, window_pattern=(True,))
    path.write_text(json.dumps(families.config_of(everywhere, tokenizer, "float32")))
    assert families.model_of(path) == everywhere
    # What is scaled there has no name.
    with pytest.raises(UserError, match="no Hugging Face family has"):
        families.family_of(dataclasses.replace(gemma3, rope_local_base=None))


def test_a_model_is_exported_as_the_family_that_it_was_read_from(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE | CONFIGS["phi 3"]))
    phi3 = families.model_of(path)
    assert families.family_of(phi3) == "phi3"
    # What has no other family's name is the first that fits; what no longer fits is another.
    assert families.family_of(dataclasses.replace(phi3, preset="mine")) == "mistral"
    biased = dataclasses.replace(phi3, qkv_bias=True)
    assert families.family_of(biased) == "qwen2"
    assert families.family_of(dataclasses.replace(biased, o_bias=True, window=None)) == "llama"
    assert families.family_of(dataclasses.replace(phi3, qk_norm=True)) == "qwen3"
    with pytest.raises(UserError, match="no Hugging Face family has rope_share and qk_norm"):
        families.family_of(dataclasses.replace(phi3, rope_share=0.5, qk_norm=True, window=None))
