"""Model families that the decoder covers: Hugging Face's config.json to ModelConfig, and back."""

import dataclasses
import math
import pathlib
import reprlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from data.tokenizer import Tokenizer
from model_config import ModelConfig
from runtime.errors import UserError
from runtime.foreign import (
    FLAG,
    OBJECT,
    TEXT,
    Kind,
    check_values,
    either,
    list_of,
    number,
    one_of,
    read_object,
    whole,
)
from weights.layouts import MIXTRAL, NEOX, NORMS_AFTER, PHI3, QWEN_MOE, Layout

GEMMA: dict[str, Any] = {"activation": "gelu", "scale_embedding": True, "zero_centered_norm": True}
"""Fields of ModelConfig that Gemma sets otherwise than the other families."""


NOTHING: Mapping[str, Any] = MappingProxyType({})
SILU: Mapping[str, str] = MappingProxyType({"silu": "silu"})


class Family(NamedTuple):
    """A model_type of Hugging Face: what its config.json says, and how its tensors lie."""

    architecture: str
    defaults: Mapping[str, Any] = NOTHING
    """Values where its config.json is silent, beside DEFAULTS."""
    fields: Mapping[str, Any] = NOTHING
    """Fields of ModelConfig that all its models have so, where it is not ModelConfig's default."""
    settings: Mapping[str, str] = NOTHING
    """Fields of ModelConfig that its config.json sets, and their names there, beside SETTINGS."""
    activations: Mapping[str, str] = SILU
    """The activations that it has: Hugging Face's names, the exported one first, and ours."""
    splits_width: bool = False
    """Heads share the model's width: head_dim is width / heads."""
    ropes: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    """The types of RoPE that it has."""
    layouts: Mapping[str, Layout] = NOTHING
    """How its weights lie where they lie otherwise than in LAYOUTS."""


WINDOW = {"window": "sliding_window"}
"""The setting of families that have a window in all layers or in none."""
WINDOWS = {**WINDOW, "window_pattern": "layer_types"}
"""Those of families that may have it in some layers."""

ATTENTION_BIAS = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
"""The setting of families whose q, k, v and o have biases, or none of them."""
ROUTER = {"experts_per_token": "num_experts_per_tok", "router_loss_coef": "router_aux_loss_coef"}
GEMMA_DEFAULTS = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA2_SETTINGS = {
    **WINDOWS,
    **ATTENTION_BIAS,
    "activation": "hidden_activation",
    "score_width": "query_pre_attn_scalar",
    "attention_soft_cap": "attn_logit_softcapping",
    "logit_soft_cap": "final_logit_softcapping",
}
TANH_GELU = {"gelu_pytorch_tanh": "gelu", "gelu": "gelu"}
"""The activations of the first Gemma, whose files say "gelu" of the tanh approximation."""
GEMMA2_GELU = {"gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf"}
"""Those of the later ones, whose `hidden_activation` means what it says."""

FAMILIES = {
    "llama": Family("LlamaForCausalLM", settings={**ATTENTION_BIAS, "mlp_bias": "mlp_bias"}),
    "mistral": Family("MistralForCausalLM", {"sliding_window": 4096}, settings=WINDOW),
    "qwen2": Family("Qwen2ForCausalLM", fields={"qkv_bias": True}, settings=WINDOWS),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"head_dim": 128},
        fields={"qk_norm": True},
        settings={**WINDOWS, **ATTENTION_BIAS},
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        GEMMA_DEFAULTS,
        fields=GEMMA,
        settings=ATTENTION_BIAS,
        activations=TANH_GELU,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **GEMMA_DEFAULTS,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        fields={**GEMMA, "norms": "both"},
        settings=GEMMA2_SETTINGS,
        activations=GEMMA2_GELU,
        layouts=NORMS_AFTER,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **GEMMA_DEFAULTS,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        fields={**GEMMA, "norms": "both", "qk_norm": True},
        settings={**GEMMA2_SETTINGS, "rope_local_base": "rope_local_base_freq"},
        activations=GEMMA2_GELU,
        layouts=NORMS_AFTER,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {"rms_norm_eps": 1e-5},
        settings={**WINDOW, "rope_share": "partial_rotary_factor"},
        ropes=("default",),
        layouts=PHI3,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "rotary_emb_base": 10_000.0,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
            "attention_bias": True,
        },
        fields={"norm": "layer", "gated": False, "mlp_bias": True},
        settings={
            "kv_heads": "num_attention_heads",
            "norm_eps": "layer_norm_eps",
            "rope_base": "rotary_emb_base",
            "rope_share": "rotary_pct",
            "parallel_residual": "use_parallel_residual",
            **ATTENTION_BIAS,
        },
        activations={"gelu": "gelu_erf", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"},
        splits_width=True,
        layouts=NEOX,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        settings={**WINDOW, **ROUTER, "experts": "num_local_experts"},
        layouts=MIXTRAL,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
        },
        fields={"qk_norm": True},
        settings={
            **WINDOW,
            **ATTENTION_BIAS,
            **ROUTER,
            "experts": "num_experts",
            "mlp_width": "moe_intermediate_size",
            "router_norm": "norm_topk_prob",
        },
        layouts=QWEN_MOE,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {"rms_norm_eps": 1e-5},
        fields={"norms": "after", "qk_norm": True, "qk_norm_over": "heads"},
        settings=ATTENTION_BIAS,
        layouts=NORMS_AFTER,
    ),
}
"""By model_type. A model is exported as the family that it was read from, or else as the first
here that has all its features."""

QWEN = ("qwen2", "qwen3", "qwen3_moe")
"""Families with a switch of their windows, `use_sliding_window`."""

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}

FULL_EVERY = {"gemma2": 2, "gemma3_text": 6}
"""Of so many layers the last has no window, where config.json lists no `layer_types`."""

SETTINGS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "activation": "hidden_act",
    "rope_base": "rope_theta",
}
"""Fields of ModelConfig that every config.json sets, and their names there."""

NOT_SET = ("preset", "dtype", "remat", "rope_scale", "rope_llama3", "rope_yarn")
"""Fields of ModelConfig that tell no family: how it is computed, and what `ropes` is about."""

MAY_BE_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
"""Settings of which null is a value."""

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
    "mlp_only_layers",
)
"""Settings that are false, 0, empty or absent in a family that does not have them."""

LLAMA3_ROPE = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
"""Hugging Face's names of ModelConfig.rope_llama3's four numbers."""
YARN_ROPE = (
    "factor",
    "beta_fast",
    "beta_slow",
    "original_max_position_embeddings",
    "attention_factor",
)
"""Hugging Face's names of ModelConfig.rope_yarn's five numbers."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""The kinds of layers in `layer_types`."""

# Sizes end far above any model's, so that a slip is refused before it is computed with.
SIZE = whole(1, 1 << 24)
TOKENS = whole(1, (1 << 31) - 1)
TOKEN = whole(0, (1 << 31) - 1)
POSITIVE = number(0, 1e12)
ZERO = Kind("0", lambda value: type(value) in (int, float) and value == 0)
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
    "original_max_position_embeddings": TOKENS,
    # Layers
    "rms_norm_eps": number(0, 1),
    "layer_norm_eps": number(0, 1),
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "use_parallel_residual": FLAG,
    "tie_word_embeddings": FLAG,
    "hidden_act": TEXT,
    "hidden_activation": TEXT,
    "use_sliding_window": FLAG,
    "sliding_window": TOKENS,
    "max_window_layers": whole(0, 10_000),
    "layer_types": list_of(one_of(FULL, SLIDING)),
    "sliding_window_pattern": whole(1, 10_000),
    "num_experts": SIZE,
    "num_local_experts": SIZE,
    "num_experts_per_tok": SIZE,
    "moe_intermediate_size": SIZE,
    "norm_topk_prob": FLAG,
    "router_aux_loss_coef": either(number(0, 1e12), ZERO),
    # Every layer has experts, or none has.
    "decoder_sparse_step": whole(1, 1),
    "query_pre_attn_scalar": POSITIVE,
    "attn_logit_softcapping": POSITIVE,
    "final_logit_softcapping": POSITIVE,
    # Positions
    "rope_theta": POSITIVE,
    "rotary_emb_base": POSITIVE,
    "rotary_pct": number(0, 1),
    "rope_local_base_freq": POSITIVE,
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
    "beta_fast": POSITIVE,
    "beta_slow": POSITIVE,
    "attention_factor": POSITIVE,
    "mscale": POSITIVE,
    "mscale_all_dim": POSITIVE,
    "truncate": FLAG,
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
    name = given.get("model_type")
    if name not in FAMILIES:
        raise UserError(
            f"{path}: model_type {reprlib.repr(name)} is not covered; "
            f"covered are {', '.join(FAMILIES)}"
        )

    # A null means silence, but where it means that there is none.
    theirs = {**DEFAULTS, **FAMILIES[name].defaults}
    for setting, value in given.items():
        if value is not None or setting in MAY_BE_NONE:
            theirs[setting] = value
    # transformers 5 writes the number of Qwen's experts by Mixtral's name.
    if name == "qwen3_moe" and "num_local_experts" in theirs:
        theirs["num_experts"] = theirs.pop("num_local_experts")
    _refuse_uncovered(name, theirs, path)

    # A name that has no default must be there.
    try:
        return _model_config(name, theirs, path)
    except KeyError as missing:
        raise UserError(f"{path}: {missing} is missing; restore the file") from None


def _model_config(name: str, theirs: dict[str, Any], path: pathlib.Path) -> ModelConfig:
    """Return the model of checked values; raises KeyError for the name of a missing one."""
    # What a silent file leaves to others of its fields.
    heads = theirs["num_attention_heads"]
    theirs.setdefault("num_key_value_heads", heads)
    theirs.setdefault("head_dim", theirs["hidden_size"] // heads)
    theirs["sliding_window"], theirs["layer_types"] = _windows(name, theirs, path)
    rope_fields = _rope(name, theirs, path)

    # What the family has, and what the file says.
    family = FAMILIES[name]
    settings = {**SETTINGS, **family.settings}
    fields = dict(family.fields)
    for ours, setting in settings.items():
        fields[ours] = theirs[setting]
    fields["activation"] = family.activations[fields["activation"]]
    fields |= rope_fields
    # Where no layer has the window, none has its base.
    if fields.get("window") is None:
        fields.pop("rope_local_base", None)
    try:
        return ModelConfig(preset=name, remat="full", **fields)
    # It speaks of flags, which its fields are elsewhere.
    except UserError as fault:
        raise UserError(f"{path}: {fault}; restore the file") from None


def _refuse_uncovered(name: str, theirs: dict[str, Any], path: pathlib.Path) -> None:
    """Raise UserError for a setting or an activation that the family does not have."""
    family = FAMILIES[name]
    for setting in REFUSED:
        if theirs.get(setting) and setting not in family.settings.values():
            raise UserError(f"{path}: {setting} is not covered; use a checkpoint without")
    for setting in ("hidden_act", "hidden_activation"):
        activation = theirs.get(setting)
        if activation is not None and activation not in family.activations:
            raise UserError(
                f"{path}: {setting} {reprlib.repr(activation)} is not covered; "
                f"{name} has {' or '.join(sorted(family.activations))} here"
            )


def _windows(
    name: str, theirs: dict[str, Any], path: pathlib.Path
) -> tuple[int | None, tuple[bool, ...]]:
    """Return ModelConfig's window and window_pattern.

    Raises UserError where the file contradicts itself or its family.
    """
    kinds = _layer_kinds(name, theirs)
    given = theirs.get("layer_types", kinds)
    # Layers of families that may differ are as listed; Qwen's switch turns all windows off.
    may_differ = "window_pattern" in FAMILIES[name].settings
    if may_differ and (name not in QWEN or theirs.get("use_sliding_window")):
        kinds = given
    if given != kinds or len(kinds) != theirs["num_hidden_layers"]:
        raise UserError(f"{path}: layer_types contradicts the other fields; restore the file")
    if SLIDING not in kinds:
        return None, (True,)
    window = theirs.get("sliding_window", 4096)
    if window is None:
        raise UserError(f"{path}: sliding_window is missing; restore the file")
    return window, _pattern([kind == SLIDING for kind in kinds])


def _pattern(layers: list[bool]) -> tuple[bool, ...]:
    """Return the shortest pattern that gives `layers` when it is repeated."""
    size = 1
    while (layers[:size] * len(layers))[: len(layers)] != layers:
        size += 1
    return tuple(layers[:size])


def _layer_kinds(name: str, theirs: dict[str, Any]) -> list[str]:
    """Return the kind of each layer, by a config.json without `layer_types`."""
    layers = theirs["num_hidden_layers"]
    if name in ("mistral", "phi3", "mixtral"):
        full = layers if theirs.get("sliding_window") is None else 0
    elif name == "qwen3_moe" and theirs.get("use_sliding_window"):
        full = 0
    elif name in QWEN and theirs.get("use_sliding_window"):
        full = min(layers, theirs.get("max_window_layers", 28))
    elif name in FULL_EVERY:
        every = theirs.get("sliding_window_pattern", FULL_EVERY[name])
        return [SLIDING if number % every else FULL for number in range(1, layers + 1)]
    else:
        full = layers
    return [FULL] * full + [SLIDING] * (layers - full)


def _rope_settings(name: str, theirs: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Return the settings of RoPE, `rope_type` among them; raises UserError for others.

    Theirs are `rope_scaling` beside `rope_theta`, or the two together as `rope_parameters`.
    """
    family = FAMILIES[name]
    if "rope_local_base" in family.settings:
        _unnest_rope(theirs, path)
    rope = {"rope_theta": theirs[family.settings.get("rope_base", "rope_theta")]}
    rope["partial_rotary_factor"] = theirs[
        family.settings.get("rope_share", "partial_rotary_factor")
    ]
    for part in ("rope_scaling", "rope_parameters"):
        given = theirs.get(part, {})
        check_values(path, given, ROPE_KINDS)
        rope |= {name: value for name, value in given.items() if value is not None}
    unknown = rope.keys() - ROPE_KINDS.keys()
    if not rope.get("truncate", True):
        unknown.add("truncate")
    if rope["partial_rotary_factor"] != 1 and "rope_share" not in family.settings:
        unknown.add("partial_rotary_factor")

    # Older files say `type`.
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "dynamic":
        raise UserError(
            f"{path}: RoPE of type 'dynamic' is not covered: it turns a token by the length of "
            "the whole text; remove it, for up to max_position_embeddings it is the default"
        )
    if kind not in family.ropes or unknown:
        with_what = f" with {reprlib.repr(sorted(unknown))}" if unknown else ""
        raise UserError(
            f"{path}: RoPE of type {reprlib.repr(kind)}{with_what} is not covered; "
            f"{name} has {' or '.join(family.ropes)} here"
        )
    return {**rope, "rope_type": kind}


def _rope(name: str, theirs: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Return RoPE's fields of ModelConfig; raises KeyError for a number that is missing."""
    rope = _rope_settings(name, theirs, path)
    kind = rope["rope_type"]
    # A number beside `rope_scaling` wins over the one in it, as in transformers 5.
    context = theirs.get("original_max_position_embeddings")
    if context is not None:
        rope["original_max_position_embeddings"] = context
    fields: dict[str, Any] = {"rope_base": float(rope["rope_theta"])}
    fields["rope_share"] = float(rope["partial_rotary_factor"])
    if kind == "linear":
        fields["rope_scale"] = 1 / rope["factor"]
    if kind == "llama3":
        fields["rope_llama3"] = _numbers(rope, LLAMA3_ROPE)
        _, low, high, _ = fields["rope_llama3"]
        if low >= high:
            raise UserError(
                f"{path}: low_freq_factor {low:g} is not below high_freq_factor {high:g}; "
                "restore the file"
            )
    if kind == "yarn":
        fields["rope_yarn"] = _yarn(rope, theirs)
    return fields


def _unnest_rope(theirs: dict[str, Any], path: pathlib.Path) -> None:
    """Bring newer files of Gemma 3 into the older form: one RoPE, and the base of local layers."""
    given = theirs.get("rope_parameters", {})
    if FULL not in given and SLIDING not in given:
        return
    check_values(path, given, {FULL: OBJECT, SLIDING: OBJECT})
    local = given.get(SLIDING) or {}
    check_values(path, local, ROPE_KINDS)
    if local.get("rope_type", "default") != "default":
        raise UserError(f"{path}: {SLIDING}: RoPE of another type than default is not covered")
    theirs["rope_local_base_freq"] = local.get("rope_theta", theirs["rope_local_base_freq"])
    theirs["rope_parameters"] = given.get(FULL) or {}
    # Nor is a number beside them read.
    theirs.pop("original_max_position_embeddings", None)


def _yarn(rope: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, ...]:
    """Return ModelConfig.rope_yarn; what a file may leave out is as in transformers."""
    factor = rope["factor"]

    # Peng et al. 2023, eq. 22; DeepSeek's files give two coefficients, whose quotient counts.
    def magnitude(coefficient: float) -> float:
        return 0.1 * coefficient * math.log(factor) + 1 if factor > 1 else 1.0

    attention_factor = magnitude(1)
    if "mscale" in rope and "mscale_all_dim" in rope:
        attention_factor = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    silent = {
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": theirs["max_position_embeddings"],
        "attention_factor": attention_factor,
    }
    return _numbers({**silent, **rope}, YARN_ROPE)


def _numbers(rope: dict[str, Any], names: tuple[str, ...]) -> tuple[float, ...]:
    """Return the numbers of `rope` with these names; raises KeyError for a missing one."""
    return tuple(float(rope[name]) for name in names)


# --- our config to Hugging Face's


def family_of(model: ModelConfig) -> str:
    """Return the family that `model` is exported as, a key of FAMILIES.

    Raises UserError where no family has all its features.
    """
    # The one that it was read from, if it has them still.
    names = list(FAMILIES)
    if model.preset in FAMILIES:
        names.insert(0, model.preset)
    for name in names:
        if not _lacks(name, model):
            return name
    features = _features(model)
    together = " together" if len(features) > 1 else ""
    raise UserError(
        f"--run: no Hugging Face family has {' and '.join(features)}{together}; "
        "export is not possible"
    )


def _features(model: ModelConfig) -> list[str]:
    """Return the fields in which `model` differs from a plain Llama, sizes aside."""
    features = []
    for field in dataclasses.fields(ModelConfig):
        is_size = field.name in SETTINGS and field.name != "activation"
        differs = getattr(model, field.name) != field.default
        if differs and not is_size and field.name not in NOT_SET:
            features.append(field.name)
    return [*features, *_ropes(model).values()]


def _lacks(name: str, model: ModelConfig) -> list[str]:
    """Return the fields of `model` whose values the family cannot have."""
    family = FAMILIES[name]
    settings = {**SETTINGS, **family.settings}
    lacking = []
    for field in dataclasses.fields(ModelConfig):
        needed = family.fields.get(field.name, field.default)
        is_free = field.name in settings or field.name in NOT_SET
        if not is_free and getattr(model, field.name) != needed:
            lacking.append(field.name)
    if model.activation not in family.activations.values():
        lacking.append("activation")
    if family.splits_width and model.heads * model.head_dim != model.width:
        lacking.append("head_dim")
    # What one setting says of several fields must hold of all.
    first_of: dict[str, str] = {}
    for ours, setting in settings.items():
        first = first_of.setdefault(setting, ours)
        if getattr(model, ours) != getattr(model, first):
            lacking.append(ours)

    # One type of RoPE at most, and one that the family has.
    ropes = _ropes(model)
    if len(ropes) > 1 or not set(family.ropes).issuperset(ropes):
        lacking.extend(ropes.values())
    # Layers with the window have a base there that no scaling applies to.
    has_local = "rope_local_base" in family.settings and model.window is not None
    if has_local and model.rope_local_base is None and ropes:
        lacking.append("rope_local_base")
    return lacking


def _ropes(model: ModelConfig) -> dict[str, str]:
    """Return the types of RoPE that `model` needs beside the default, and the fields they are."""
    ropes = {}
    if model.rope_llama3:
        ropes["llama3"] = "rope_llama3"
    if model.rope_yarn:
        ropes["yarn"] = "rope_yarn"
    if model.rope_scale != 1:
        ropes["linear"] = "rope_scale"
    return ropes


def config_of(model: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Return the config.json of `model`, whose weights are exported as `dtype`.

    Raises UserError where no family has all its features.
    """
    name = family_of(model)
    family = FAMILIES[name]
    settings = {}
    for ours, setting in {**SETTINGS, **family.settings}.items():
        settings[setting] = getattr(model, ours)

    # What has other words there.
    activation = family.settings.get("activation", SETTINGS["activation"])
    for theirs, ours in family.activations.items():
        if ours == model.activation:
            settings[activation] = theirs
            break
    if "window_pattern" in family.settings:
        kinds = [SLIDING if has_window else FULL for has_window in model.windowed_layers]
        settings["layer_types"] = kinds
    if "score_width" in family.settings:
        settings["query_pre_attn_scalar"] = _whole(model.score_width or model.head_dim)
    # Silence would be another base.
    if "rope_local_base" in family.settings:
        settings["rope_local_base_freq"] = model.rope_local_base or model.rope_base
    if name in QWEN:
        settings["use_sliding_window"] = model.window is not None
        settings["max_window_layers"] = 0
    return {
        "architectures": [family.architecture],
        "model_type": name,
        "sliding_window": None,
        "attention_bias": False,
        **settings,
        "rope_scaling": _rope_scaling(model),
        **generation_of(tokenizer),
        "torch_dtype": dtype,
    }


def _whole(value: float) -> float:
    """Return `value`, as an int if it is whole: transformers insists on that."""
    return int(value) if value == int(value) else value


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


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    """Return `rope_scaling` of a config.json; None where RoPE is plain."""
    if model.rope_llama3:
        rope: dict[str, Any] = {"rope_type": "llama3"}
        rope.update(zip(LLAMA3_ROPE, model.rope_llama3, strict=True))
        rope[LLAMA3_ROPE[3]] = int(rope[LLAMA3_ROPE[3]])
        return rope
    if model.rope_yarn:
        rope = {"rope_type": "yarn", **dict(zip(YARN_ROPE, model.rope_yarn, strict=True))}
        rope[YARN_ROPE[3]] = int(rope[YARN_ROPE[3]])
        return rope
    if model.rope_scale != 1:
        return {"rope_type": "linear", "factor": 1 / model.rope_scale}
    return None
