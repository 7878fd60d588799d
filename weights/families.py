"""The model families that the decoder covers: a Hugging Face config.json to a ModelConfig, and back."""

import json
import pathlib
from typing import Any

from data.tokenizer import Tokenizer
from model_config import ModelConfig
from runtime.errors import UserError

FAMILIES = {  # model_type: architecture, and what its config.json means where it is silent
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 4096}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 128}),
    "gemma": (
        "GemmaForCausalLM",
        {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu"},
    ),
}
GEMMA = {"activation": "gelu", "scale_embedding": True, "zero_centered_norm": True}
"""Fields of ModelConfig that Gemma sets otherwise than the other families."""

FEATURES = {  # by what a model has of gemma, qk_norm, qkv_bias, window: the family to export it as
    (): "llama",
    ("window",): "mistral",
    ("qkv_bias",): "qwen2",
    ("qkv_bias", "window"): "qwen2",
    ("qk_norm",): "qwen3",
    ("qk_norm", "window"): "qwen3",
    ("gemma",): "gemma",
}


def model_of(path: pathlib.Path) -> ModelConfig:
    """The model that the config.json at `path` describes; raises UserError for what the decoder does not cover."""
    try:
        given = dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; name a folder with config.json and safetensors"
        ) from None
    except (OSError, ValueError, TypeError) as fault:
        raise UserError(f"{path}: not readable as a JSON object ({fault}); restore it") from None
    family = given.get("model_type")
    if family not in FAMILIES:
        why = ": soft caps, and norms after layers" if family == "gemma2" else ""
        raise UserError(
            f"{path}: model_type {family!r} is not covered{why}; covered are {', '.join(FAMILIES)}"
        )
    silent = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"} | FAMILIES[
        family
    ][1]
    c = silent | {
        name: value
        for name, value in given.items()
        if value is not None or name == "sliding_window"
    }
    activations = (
        {"gelu", "gelu_pytorch_tanh"} if family == "gemma" else {"silu"}
    )  # Gemma's "gelu" is the tanh one
    refused = ("attention_bias", "mlp_bias", "quantization_config", "use_bidirectional_attention")
    for name in refused:
        if c.get(name):
            raise UserError(f"{path}: {name} is not covered; use a checkpoint without")
    for name in ("hidden_act", "hidden_activation"):
        if c.get(name) is not None and c[name] not in activations:
            raise UserError(
                f"{path}: {name} {c[name]!r} is not covered; {family} has {' or '.join(activations)} here"
            )
    try:
        heads = c["num_attention_heads"]
        return ModelConfig(
            preset=family, vocab=c["vocab_size"], width=c["hidden_size"], mlp_width=c["intermediate_size"],
            layers=c["num_hidden_layers"], heads=heads, kv_heads=c.get("num_key_value_heads", heads),
            head_dim=c.get("head_dim", c["hidden_size"] // heads), context=c["max_position_embeddings"],
            norm_eps=c["rms_norm_eps"], tied=c["tie_word_embeddings"], qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3", window=_window(family, c, path), remat="full",
            **_rope(c, path), **(GEMMA if family == "gemma" else {}),
        )  # fmt: skip
    except KeyError as name:
        raise UserError(f"{path}: {name} is missing; restore the file") from None


def _window(family: str, c: dict[str, Any], path: pathlib.Path) -> int | None:
    if family == "mistral":
        return c["sliding_window"]
    if family not in ("qwen2", "qwen3") or not c.get("use_sliding_window"):
        return None
    full = range(c["num_hidden_layers"])[: c.get("max_window_layers", 28)]
    kinds = c.get("layer_types") or [
        "full_attention" if i in full else "" for i in range(c["num_hidden_layers"])
    ]
    if len({kind == "full_attention" for kind in kinds}) > 1:
        raise UserError(
            f"{path}: layers with and without a window are not covered; set use_sliding_window to false"
        )
    return None if kinds[0] == "full_attention" else c.get("sliding_window", 4096)


def _rope(c: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """`rope_scaling` beside `rope_theta`, or the two together as `rope_parameters`."""
    rope = {
        "rope_theta": c.get("rope_theta", 10_000.0),
        **c.get("rope_scaling", {}),
        **c.get("rope_parameters", {}),
    }
    kind, base = (
        rope.get("rope_type", rope.get("type", "default")),
        {"rope_base": float(rope["rope_theta"])},
    )
    if kind == "linear":
        return {**base, "rope_scale": 1 / rope["factor"]}
    if kind == "llama3":
        names = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        return {**base, "rope_llama3": tuple(float(rope[name]) for name in names)}
    if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"{path}: RoPE of type {kind!r} is not covered; covered are default, linear and llama3, whole"
        )
    return base


def config_of(model: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The config.json of `model`; raises UserError where no family has its features."""
    gemma = {name: getattr(model, name) for name in GEMMA} == GEMMA
    has = (
        {}
        if gemma
        else {name: getattr(model, name) != getattr(ModelConfig, name) for name in GEMMA}
    )
    has |= {
        "gemma": gemma,
        **{name: getattr(model, name) for name in ("qk_norm", "qkv_bias", "window")},
    }
    features = tuple(name for name, present in has.items() if present)
    if features not in FEATURES or (model.rope_llama3 and model.rope_scale != 1):
        both = features if features not in FEATURES else ("rope_llama3", "rope_scale")
        raise UserError(
            f"--run: no Hugging Face family has {' and '.join(both)} together; export is not possible"
        )
    family, rope = FEATURES[features], None
    if model.rope_llama3:
        names = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        rope = {"rope_type": "llama3", **dict(zip(names, model.rope_llama3, strict=True))}
        rope[names[3]] = int(rope[names[3]])
    elif model.rope_scale != 1:
        rope = {"rope_type": "linear", "factor": 1 / model.rope_scale}
    qwen = (
        {"use_sliding_window": model.window is not None, "max_window_layers": 0}
        if family[:4] == "qwen"
        else {}
    )
    return {
        "architectures": [FAMILIES[family][0]], "model_type": family, "vocab_size": model.vocab,
        "hidden_size": model.width, "intermediate_size": model.mlp_width, "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim,
        "hidden_act": "gelu_pytorch_tanh" if gemma else "silu", "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_eps, "rope_theta": model.rope_base, "rope_scaling": rope,
        "tie_word_embeddings": model.tied, "sliding_window": model.window, **qwen, "attention_bias": False,
        "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad,
        "torch_dtype": dtype,
    }  # fmt: skip
