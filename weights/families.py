"""Model families that the decoder covers: Hugging Face's config.json to ModelConfig, and back."""

import pathlib
import reprlib
from typing import Any, NamedTuple

from data.tokenizer import Tokenizer
from model_config import ModelConfig
from runtime.errors import UserError
from runtime.foreign import (
    FLAG,
    OBJECT,
    TEXT,
    check_values,
    either,
    list_of,
    number,
    one_of,
    read_object,
    whole,
)


class Family(NamedTuple):
    """A model_type of Hugging Face."""

    architecture: str
    defaults: dict[str, Any]
    """Values where its config.json is silent, beside DEFAULTS."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", {}),
    "mistral": Family("MistralForCausalLM", {"sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", {}),
    "qwen3": Family("Qwen3ForCausalLM", {"head_dim": 128}),
    "gemma": Family(
        "GemmaForCausalLM",
        {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu"},
    ),
}
DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}

GEMMA: dict[str, Any] = {"activation": "gelu", "scale_embedding": True, "zero_centered_norm": True}
"""Fields of ModelConfig that Gemma sets otherwise than the other families."""

# The family to export a model as, by what it has of gemma, qk_norm, qkv_bias and window.
EXPORTED_AS = {
    (): "llama",
    ("window",): "mistral",
    ("qkv_bias",): "qwen2",
    ("qkv_bias", "window"): "qwen2",
    ("qk_norm",): "qwen3",
    ("qk_norm", "window"): "qwen3",
    ("gemma",): "gemma",
}

REFUSED = (
    "attention_bias",
    "mlp_bias",
    "quantization_config",
    "use_bidirectional_attention",
    "is_encoder_decoder",
    "add_cross_attention",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_experts",
    "num_local_experts",
)
"""Settings of a config.json that the decoder does not have: they are false, 0, empty or absent."""

LLAMA3_ROPE = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
"""Hugging Face's names of ModelConfig.rope_llama3's four numbers."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""The kinds of layers in `layer_types`."""

# Sizes end far above any model's, so that a slip is refused before it is computed with.
SIZE = whole(1, 1 << 24)
TOKENS = whole(1, (1 << 31) - 1)
TOKEN = whole(0, (1 << 31) - 1)
POSITIVE = number(0, 1e12)
DTYPES = ("float32", "float16", "bfloat16", "auto")
DTYPE = one_of(*DTYPES, *(f"torch.{name}" for name in DTYPES[:3]))

KINDS = {
    "model_type": TEXT,
    # Sizes
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": whole(1, 10_000),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "max_position_embeddings": TOKENS,
    # Layers
    "rms_norm_eps": number(0, 1),
    "tie_word_embeddings": FLAG,
    "hidden_act": TEXT,
    "hidden_activation": TEXT,
    "use_sliding_window": FLAG,
    "sliding_window": TOKENS,
    "max_window_layers": whole(0, 10_000),
    "layer_types": list_of(one_of(FULL, SLIDING)),
    # Positions
    "rope_theta": POSITIVE,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "partial_rotary_factor": number(0, 1),
    # Tokens, and the type of the weights
    "bos_token_id": TOKEN,
    "eos_token_id": either(TOKEN, list_of(TOKEN)),
    "pad_token_id": whole(-1, (1 << 31) - 1),
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
}
"""Kinds of the fields of a config.json, where they are not null."""

ROPE_KINDS = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": POSITIVE,
    "factor": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "original_max_position_embeddings": TOKENS,
    "partial_rotary_factor": number(0, 1),
}
"""Kinds of the fields of `rope_scaling` and `rope_parameters`; others are not covered."""


# --- Hugging Face's config to ours


def model_of(path: pathlib.Path) -> ModelConfig:
    """Read the model that the config.json at `path` describes.

    Raises UserError for a file that is missing, damaged, or of what the decoder does not cover.
    """
    try:
        given = read_object(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; name a folder with config.json and safetensors"
        ) from None
    check_values(path, given, KINDS)
    family = given.get("model_type")
    if family not in FAMILIES:
        why = ": soft caps, and norms after layers" if family == "gemma2" else ""
        raise UserError(
            f"{path}: model_type {reprlib.repr(family)} is not covered{why}; "
            f"covered are {', '.join(FAMILIES)}"
        )

    # A null means silence, but for the window, where it means none.
    theirs = {**DEFAULTS, **FAMILIES[family].defaults}
    for name, value in given.items():
        if value is not None or name == "sliding_window":
            theirs[name] = value
    _refuse_uncovered(family, theirs, path)

    # A name that has no default must be there.
    try:
        return _model_config(family, theirs, path)
    except KeyError as name:
        raise UserError(f"{path}: {name} is missing; restore the file") from None


def _model_config(family: str, theirs: dict[str, Any], path: pathlib.Path) -> ModelConfig:
    """Return the model of checked values; raises KeyError for the name of a missing one."""
    heads = theirs["num_attention_heads"]
    shape = {
        "preset": family,
        "vocab": theirs["vocab_size"],
        "width": theirs["hidden_size"],
        "mlp_width": theirs["intermediate_size"],
        "layers": theirs["num_hidden_layers"],
        "heads": heads,
        "kv_heads": theirs.get("num_key_value_heads", heads),
        "head_dim": theirs.get("head_dim", theirs["hidden_size"] // heads),
        "context": theirs["max_position_embeddings"],
        "norm_eps": theirs["rms_norm_eps"],
        "tied": theirs["tie_word_embeddings"],
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "window": _window(family, theirs, path),
        "remat": "full",
        **_rope(theirs, path),
        **(GEMMA if family == "gemma" else {}),
    }
    try:
        return ModelConfig(**shape)
    # It speaks of flags, which its fields are elsewhere.
    except UserError as fault:
        raise UserError(f"{path}: {fault}; restore the file") from None


def _refuse_uncovered(family: str, theirs: dict[str, Any], path: pathlib.Path) -> None:
    """Raise UserError for a bias, a quantisation or an activation that the decoder lacks."""
    for name in REFUSED:
        if theirs.get(name):
            raise UserError(f"{path}: {name} is not covered; use a checkpoint without")
    # Gemma's "gelu" is the tanh approximation.
    known = {"gelu", "gelu_pytorch_tanh"} if family == "gemma" else {"silu"}
    for name in ("hidden_act", "hidden_activation"):
        activation = theirs.get(name)
        if activation is not None and activation not in known:
            raise UserError(
                f"{path}: {name} {reprlib.repr(activation)} is not covered; "
                f"{family} has {' or '.join(known)} here"
            )


def _window(family: str, theirs: dict[str, Any], path: pathlib.Path) -> int | None:
    """Return the sliding window of all layers, or None; raises UserError where layers differ."""
    kinds = _layer_kinds(family, theirs)
    given = theirs.get("layer_types", kinds)
    if theirs.get("use_sliding_window") and family in ("qwen2", "qwen3"):
        kinds = given
    if given != kinds or len(kinds) != theirs["num_hidden_layers"]:
        raise UserError(f"{path}: layer_types contradicts the other fields; restore the file")
    # Qwen's layers have a window or not, each by itself; the decoder has one for all.
    if len(set(kinds)) > 1:
        raise UserError(
            f"{path}: layers with and without a window are not covered; "
            "use a checkpoint whose layers are alike"
        )
    if kinds[0] == FULL:
        return None
    window = theirs.get("sliding_window", 4096)
    if window is None:
        raise UserError(f"{path}: sliding_window is missing; restore the file")
    return window


def _layer_kinds(family: str, theirs: dict[str, Any]) -> list[str]:
    """Return the kind of each layer, by a config.json without `layer_types`."""
    layers = theirs["num_hidden_layers"]
    if family == "mistral":
        full = layers if theirs["sliding_window"] is None else 0
    elif family in ("qwen2", "qwen3") and theirs.get("use_sliding_window"):
        full = min(layers, theirs.get("max_window_layers", 28))
    else:
        full = layers
    return [FULL] * full + [SLIDING] * (layers - full)


def _rope(theirs: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Return RoPE's fields of ModelConfig.

    Theirs are `rope_scaling` beside `rope_theta`, or the two together as `rope_parameters`.
    """
    rope = {"rope_theta": theirs.get("rope_theta", 10_000.0)}
    rope["partial_rotary_factor"] = theirs.get("partial_rotary_factor", 1)
    for part in ("rope_scaling", "rope_parameters"):
        given = theirs.get(part, {})
        check_values(path, given, ROPE_KINDS)
        rope |= {name: value for name, value in given.items() if value is not None}
    unknown = rope.keys() - ROPE_KINDS.keys()
    if rope["partial_rotary_factor"] != 1:
        unknown.add("partial_rotary_factor")

    # Older files say `type`.
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3") or unknown:
        with_what = f" with {reprlib.repr(sorted(unknown))}" if unknown else ""
        raise UserError(
            f"{path}: RoPE of type {reprlib.repr(kind)}{with_what} is not covered; "
            "covered are default, linear and llama3, whole"
        )
    base = {"rope_base": float(rope["rope_theta"])}
    if kind == "linear":
        return {**base, "rope_scale": 1 / rope["factor"]}
    if kind == "default":
        return base
    numbers = tuple(float(rope[name]) for name in LLAMA3_ROPE)
    if numbers[1] >= numbers[2]:
        raise UserError(
            f"{path}: low_freq_factor {numbers[1]:g} is not below high_freq_factor "
            f"{numbers[2]:g}; restore the file"
        )
    return {**base, "rope_llama3": numbers}


# --- our config to Hugging Face's


def config_of(model: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Return the config.json of `model`, whose weights are exported as `dtype`.

    Raises UserError where no family has all its features.
    """
    features = _features(model)
    if features not in EXPORTED_AS or (model.rope_llama3 and model.rope_scale != 1):
        both = features if features not in EXPORTED_AS else ("rope_llama3", "rope_scale")
        together = " together" if len(both) > 1 else ""
        raise UserError(
            f"--run: no Hugging Face family has {' and '.join(both)}{together}; "
            "export is not possible"
        )
    family = EXPORTED_AS[features]
    qwen = {}
    if family in ("qwen2", "qwen3"):
        qwen = {"use_sliding_window": model.window is not None, "max_window_layers": 0}
    return {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "gelu_pytorch_tanh" if family == "gemma" else "silu",
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "rope_scaling": _rope_scaling(model),
        "tie_word_embeddings": model.tied,
        "sliding_window": model.window,
        **qwen,
        "attention_bias": False,
        **generation_of(tokenizer),
        "torch_dtype": dtype,
    }


def generation_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the generation_config.json: the ids that a sampler needs."""
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": end_ids(tokenizer),
        "pad_token_id": tokenizer.pad,
    }


def end_ids(tokenizer: Tokenizer) -> int | list[int]:
    """Return `eos_token_id`: an id, or a list where several tokens end a response."""
    return tokenizer.eos if len(tokenizer.ends) == 1 else tokenizer.ends


def _features(model: ModelConfig) -> tuple[str, ...]:
    """Return what distinguishes the families, as EXPORTED_AS names it."""
    features = [name for name, value in GEMMA.items() if getattr(model, name) == value]
    # All three together are Gemma; one alone is no family's.
    if len(features) == len(GEMMA):
        features = ["gemma"]
    for name in ("qk_norm", "qkv_bias", "window"):
        if getattr(model, name):
            features.append(name)
    return tuple(features)


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    """Return `rope_scaling` of a config.json; None where RoPE is plain."""
    if model.rope_llama3:
        rope: dict[str, Any] = {"rope_type": "llama3"}
        rope.update(zip(LLAMA3_ROPE, model.rope_llama3, strict=True))
        rope[LLAMA3_ROPE[3]] = int(rope[LLAMA3_ROPE[3]])
        return rope
    if model.rope_scale != 1:
        return {"rope_type": "linear", "factor": 1 / model.rope_scale}
    return None
