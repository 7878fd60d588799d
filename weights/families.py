"""Model families that the decoder covers: Hugging Face's config.json to ModelConfig, and back."""

import json
import pathlib
from typing import Any, NamedTuple

from data.tokenizer import Tokenizer
from model_config import ModelConfig
from runtime.errors import UserError


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

REFUSED = ("attention_bias", "mlp_bias", "quantization_config", "use_bidirectional_attention")
"""Settings of a config.json that the decoder does not have."""

LLAMA3_ROPE = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
"""Hugging Face's names of ModelConfig.rope_llama3's four numbers."""


# --- Hugging Face's config to ours


def model_of(path: pathlib.Path) -> ModelConfig:
    """Read the model that the config.json at `path` describes.

    Raises UserError for a file that is missing, damaged, or of what the decoder does not cover.
    """
    given = _read_json(path)
    family = given.get("model_type")
    if family not in FAMILIES:
        why = ": soft caps, and norms after layers" if family == "gemma2" else ""
        raise UserError(
            f"{path}: model_type {family!r} is not covered{why}; covered are {', '.join(FAMILIES)}"
        )

    # A null means silence, but for the window, where it means none.
    theirs = {**DEFAULTS, **FAMILIES[family].defaults}
    for name, value in given.items():
        if value is not None or name == "sliding_window":
            theirs[name] = value
    _refuse_uncovered(family, theirs, path)

    # A name that has no default must be there.
    try:
        heads = theirs["num_attention_heads"]
        return ModelConfig(
            preset=family,
            vocab=theirs["vocab_size"],
            width=theirs["hidden_size"],
            mlp_width=theirs["intermediate_size"],
            layers=theirs["num_hidden_layers"],
            heads=heads,
            kv_heads=theirs.get("num_key_value_heads", heads),
            head_dim=theirs.get("head_dim", theirs["hidden_size"] // heads),
            context=theirs["max_position_embeddings"],
            norm_eps=theirs["rms_norm_eps"],
            tied=theirs["tie_word_embeddings"],
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            window=_window(family, theirs, path),
            remat="full",
            **_rope(theirs, path),
            **(GEMMA if family == "gemma" else {}),
        )
    except KeyError as name:
        raise UserError(f"{path}: {name} is missing; restore the file") from None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; name a folder with config.json and safetensors"
        ) from None
    except (OSError, ValueError, TypeError) as fault:
        raise UserError(f"{path}: not readable as a JSON object ({fault}); restore it") from None


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
                f"{path}: {name} {activation!r} is not covered; "
                f"{family} has {' or '.join(known)} here"
            )


def _window(family: str, theirs: dict[str, Any], path: pathlib.Path) -> int | None:
    """Return the sliding window of all layers, or None; raises UserError where layers differ."""
    if family == "mistral":
        return theirs["sliding_window"]
    if family not in ("qwen2", "qwen3") or not theirs.get("use_sliding_window"):
        return None
    # Qwen's layers have a window or not, each by itself; the decoder has one for all.
    layers = theirs["num_hidden_layers"]
    kinds = theirs.get("layer_types")
    if not kinds:
        full = min(layers, theirs.get("max_window_layers", 28))
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if len({kind == "full_attention" for kind in kinds}) > 1:
        raise UserError(
            f"{path}: layers with and without a window are not covered; "
            "set use_sliding_window to false"
        )
    if kinds[0] == "full_attention":
        return None
    return theirs.get("sliding_window", 4096)


def _rope(theirs: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Return RoPE's fields of ModelConfig.

    Theirs are `rope_scaling` beside `rope_theta`, or the two together as `rope_parameters`.
    """
    rope = {
        "rope_theta": theirs.get("rope_theta", 10_000.0),
        **theirs.get("rope_scaling", {}),
        **theirs.get("rope_parameters", {}),
    }
    # Older files say `type`.
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = {"rope_base": float(rope["rope_theta"])}
    if kind == "linear":
        return {**base, "rope_scale": 1 / rope["factor"]}
    if kind == "llama3":
        return {**base, "rope_llama3": tuple(float(rope[name]) for name in LLAMA3_ROPE)}
    if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"{path}: RoPE of type {kind!r} is not covered; "
            "covered are default, linear and llama3, whole"
        )
    return base


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
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
        "torch_dtype": dtype,
    }


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
